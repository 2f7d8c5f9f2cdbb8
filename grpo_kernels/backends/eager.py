"""Plain PyTorch, a few rows at a time: any device and dtype, the fallback of every other backend.

Two passes only. Same numerics contract as the kernels: fp32 after the load (fp64 for fp64), the sampled
column left out of the sum of exponentials, entropy in shifted form. A chunk of rows goes through a few operations in
place, over one or two buffers; numbers of which a row has one are computed for all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.maths import log_ratio_of
from ..objectives.metrics import reduce_ratios
from ..objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW
from .contract import Request, RowGradients, Rows, RowStats, TokenInputs, TokenRecords, TokenValues

CHUNKS = 16
"""The number of chunks that the rows are cut into, so that buffers are small beside the logits ..."""
CHUNK_ELEMENTS = (7 << 16, 1 << 20)
"""... within these bounds of a chunk's logits on a CPU, where chunks cost time in Python and buffers belong in the
cache, ..."""
LAUNCHED_ELEMENTS = (1 << 20, 1 << 24)
"""... and within these on other devices, where every operation is a launch."""
_LOG2_E = math.log2(math.e)
_NO_POWER = -1100.0
"""An exponent of 2 whose power is 0, in fp64 too. It stands for -inf, whose product with 0 is not 0."""


def unsupported(request: Request) -> str | None:
    return "it has no one-pass loss" if request.fused else None


def log_probs(rows: Rows, stats: RowStats) -> None:
    ids, in_range = _columns(rows)
    factor = _factor(rows)
    largest, sampled, weighted, others = statistics = [torch.empty_like(stats.log_prob) for _ in range(4)]
    for chunk in _chunks(rows, 2, rows.live, ids, *statistics):
        if not chunk.dead:
            _sum_rows(chunk, factor, *chunk.per_row)
    z_sampled = (sampled - largest) * factor
    total = others + z_sampled.exp()
    log_total = total.log()
    values = RowStats(
        log_prob=torch.where(z_sampled == 0, -torch.log1p(others), z_sampled - log_total),
        entropy=(log_total - weighted / (total * _LOG2_E)).clamp(min=0),
        anchor=largest,
        log_sum=log_total,
    )
    for output, value in zip(stats, values, strict=True):
        output.copy_(torch.where(rows.live, torch.where(in_range, value, math.nan), 0.0))


def _sum_rows(
    chunk: _Chunk, factor: Tensor, ids: Tensor, largest: Tensor, sampled: Tensor, weighted: Tensor, others: Tensor
) -> None:
    """Write a chunk's row sums: the largest and the sampled value, Σ_j e_j·log2 e_j and Σ_j e_j without the sampled j.

    e_j = 2^power_j with power_j = (value_j - largest)·factor·log2(e), so that e_j = exp(z_j - z_largest) <= 1. All
    outputs are (rows, 1). ``log_probs`` makes of them, with s the sampled column and E = e_s + others,

        log_prob = z_s - z_largest - log E, or -log1p(others) where s is the largest: exact for p near 1,
        entropy = log E - Σ_j e_j·log e_j / E.
    """
    powers, exps = chunk.buffers
    values = _load(chunk, powers.numbers)
    torch.amax(values, -1, keepdim=True, out=largest)
    torch.gather(values, -1, ids, out=sampled)
    torch.sub(values, largest, out=powers.numbers).mul_(factor * _LOG2_E)  # exact where they are close
    exps.exp2_(powers)
    count = len(ids)
    # A column of -inf has power -inf and e = 0, whose product is NaN: nansum leaves it out, as its limit is 0. A row
    # that is NaN for another reason has a NaN in ``others`` or in ``sampled`` too.
    weighted.copy_(_several(powers.numbers.mul_(exps.numbers)).nansum(-1, keepdim=True)[:count])
    # The sampled e is left out before the sum: subtracted afterwards it would take small others' digits with it.
    others.copy_(_several(exps.numbers.scatter_(-1, ids, 0.0)).sum(-1, keepdim=True)[:count])


def log_probs_backward(rows: Rows, stats: RowStats, gradients: RowGradients, out: Tensor) -> None:
    log_prob, entropy, anchor, log_sum = stats
    ids, _ = _columns(rows)
    factor = _factor(rows)
    zero = torch.zeros_like(log_prob)
    g, h = (zero if gradient is None else torch.where(rows.live, gradient, 0.0) for gradient in gradients)
    read = rows.live & ((g != 0) | (h != 0))

    def of_read(values: Tensor, other: float = 0.0) -> Tensor:
        return torch.where(read, values, other)

    weight = of_read(torch.where(log_sum.isnan(), math.nan, -factor))
    per_row = [ids, of_read(anchor, math.inf)]  # a row that is not read has no powers, whatever its logits are
    if gradients.grad_entropy is None:  # the sum as a part of the weight spares a sweep
        total = of_read(log_sum.exp(), 1.0)
        per_row += [of_read(torch.expm1(log_prob)) * total, weight * g / total]
    else:
        numbers = (log_sum * _LOG2_E, entropy, log_prob.clamp(min=_NO_POWER))
        per_row += [of_read(torch.expm1(log_prob)), weight, g, h, *map(of_read, numbers)]
    finite = gradients.grad_entropy is None and _all_of(read)  # then a power of -inf does no harm
    for chunk in _chunks(rows, 1 if gradients.grad_entropy is None and not rows.softcap else 2, read, *per_row):
        place = rows.row_view(out)[chunk.at]
        if chunk.dead:
            place.zero_()
        else:
            place.copy_(_gradient(chunk, factor, finite, *chunk.per_row).view_as(place))


def _gradient(
    chunk: _Chunk,
    factor: Tensor,
    finite: bool,
    ids: Tensor,
    anchor: Tensor,
    of_sampled: Tensor,
    weight: Tensor,
    *of_entropy: Tensor,
) -> Tensor:
    """Return the logits' gradient of a chunk, (rows, V), in one of its buffers.

    With ℓ = z_s - lse, H the entropy, g = ∂loss/∂ℓ, h = ∂loss/∂H and z_j = value_j·factor,

        ∂loss/∂z_j = g·(1[j = s] - p_j) - h·p_j·(log p_j + H) = -( g·p'_j + h·p_j·(log p_j + H) ),

    p' being p but for p'_s = p_s - 1 = expm1(ℓ), which keeps its digits where p_s is near 1. Hence

    - with an entropy term: weight·( g·p' + h·p·(log p + H) ), weight = -factor, p_j = 2^(power_j - log2 Σe);
    - without one: weight·e', weight = -factor·g / Σe, e_j = 2^power_j = p_j·Σe, so that no sweep divides by the sum;
      e'_s = expm1(ℓ)·Σe.

    ``of_sampled`` is p'_s or e'_s, ``log_sum`` is log2 Σe; log p_s is the row's own log-prob, not that of the rounded
    powers. Under a softcap dvalue/dlogit follows (``_times_cap_derivative_``).
    """
    powers, p = chunk.buffers[0], chunk.buffers[-1]
    torch.sub(_load(chunk, powers.numbers), anchor, out=powers.numbers).mul_(factor * _LOG2_E)
    if of_entropy:
        g, h, log_sum, entropy, log_prob = of_entropy
        powers.numbers.sub_(log_sum)
    if not finite:
        powers.numbers.nan_to_num_(nan=_NO_POWER, neginf=_NO_POWER)  # -inf·0 is not 0
    p.exp2_(powers)
    if of_entropy:
        log_p = powers.numbers.mul_(1 / _LOG2_E).scatter_(-1, ids, log_prob)
        bonus = log_p.add_(entropy).mul_(p.numbers).mul_(h)
        gradient = p.numbers.scatter_(-1, ids, of_sampled).mul_(g).add_(bonus)
    else:
        gradient = p.numbers.scatter_(-1, ids, of_sampled)
    if chunk.rows.softcap:
        _times_cap_derivative_(gradient, chunk, powers)
    return gradient.mul_(weight)


def _times_cap_derivative_(gradient: Tensor, chunk: _Chunk, q: _Buffer) -> None:
    """Multiply by the cap's dvalue/dlogit, scale·(1 - tanh²), as scale·4q/(1+q)², q = exp(-2|logit·scale/cap|), which
    keeps its precision where tanh is nearly 1."""
    _, scale, cap = chunk.rows.numbers[:3].unbind()
    q.numbers.copy_(chunk.logits).mul_(scale / cap).abs_().mul_(-2 * _LOG2_E)
    q.numbers.nan_to_num_(nan=_NO_POWER, neginf=_NO_POWER)  # of dead rows, and of infinite logits
    q.exp2_(q)
    gradient.mul_(q.numbers).mul_(4 * scale)
    gradient.div_(q.numbers.add_(1)).div_(q.numbers)


class _Buffer:
    """Memory for the numbers of a chunk, (rows, V).

    PyTorch computes 2^x of the last few numbers of a thread's share with other instructions, which round otherwise.
    For a row to have the same bits wherever it lies, shares are made whole vectors by numbers behind the rows.
    """

    def __init__(self, memory: Tensor, count: int, vocab: int) -> None:
        self.numbers = memory[: count * vocab].view(count, vocab)
        self._whole = memory[: _whole_vectors(count * vocab)]

    def exp2_(self, exponents: _Buffer) -> None:
        """Write 2 to the power of another buffer's numbers, or of its own."""
        torch.exp2(exponents._whole, out=self._whole)


def _whole_vectors(count: int) -> int:
    """Return a size of at least ``count`` that TensorIterator shares among threads without cutting a vector."""
    vector, least_share = 64, 1 << 15
    shares = max(1, min(torch.get_num_threads(), -(-count // least_share)))
    return -(-count // (vector * shares)) * vector * shares


class _Chunk(NamedTuple):
    """A part of the rows: whole sequences, or some tokens of one."""

    rows: Rows
    at: tuple[slice, slice]
    buffers: list[_Buffer]
    per_row: tuple[Tensor, ...]
    """Numbers of the chunk's rows, (rows, 1) each: views, so that statistics are written through them."""
    dead: bool
    """Whether it is known that no row counts: on a CPU alone, as other devices would have to be waited for."""

    @property
    def logits(self) -> Tensor:
        """Return the chunk's logits, (rows, V), in their own dtype."""
        return self.rows.row_view(self.rows.logits)[self.at].flatten(0, 1)


def _chunks(rows: Rows, buffers: int, read: Tensor, *per_row: Tensor) -> Iterator[_Chunk]:
    """Walk over all rows chunk by chunk; ``read``, bool (B, T), are the rows whose logits count."""
    places = _places(rows)
    counts = [(b.stop - b.start) * (t.stop - t.start) for b, t in places]
    size = _whole_vectors(max(counts, default=0) * rows.vocab)
    memory = [torch.empty(size, dtype=rows.numbers.dtype, device=rows.logits.device) for _ in range(buffers)]
    made = {count: [_Buffer(room, count, rows.vocab) for room in memory] for count in set(counts)}
    views = [values.view(-1, 1).split(counts) for values in per_row if counts]
    may_be_dead = read.device.type == "cpu" and not _all_of(read)
    for at, count, *parts in zip(places, counts, *views, strict=True):
        yield _Chunk(rows, at, made[count], tuple(parts), may_be_dead and not bool(read[at].any()))


def _places(rows: Rows) -> list[tuple[slice, slice]]:
    """Return the sequences and the tokens of each chunk."""
    batch, length = rows.token_ids.shape
    fewest, most = CHUNK_ELEMENTS if rows.logits.device.type == "cpu" else LAUNCHED_ELEMENTS
    elements = min(max(fewest, batch * length * rows.vocab // CHUNKS), most)
    size = max(1, elements // rows.vocab)
    return [(b, t) for b in _parts(batch, max(1, size // max(1, length))) for t in _parts(length, size)]


def _parts(length: int, most: int) -> list[slice]:
    """Cut ``length`` into parts of at most ``most``, equal but for a difference of one."""
    count = -(-length // most)
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


def _all_of(read: Tensor) -> bool:
    """Whether it is known that all rows are read: on a CPU alone (``_Chunk.dead``)."""
    return read.device.type == "cpu" and bool(read.all())


def _columns(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the sampled tokens' columns, 0 for ids outside the vocabulary, and where ids are inside. Raise IndexError,
    on a CPU, for a live token outside."""
    ids = rows.token_ids
    in_range = (ids >= 0) & (ids < rows.vocab)
    if ids.device.type == "cpu" and bool((bad := rows.live & ~in_range).any()):
        raise IndexError(token_id_message(rows, int(bad.flatten().nonzero()[0])))
    return torch.where(in_range, ids, 0), in_range


def _factor(rows: Rows) -> Tensor:
    """Return the factor, 0-d, that makes z of the values that ``_load`` returns."""
    temperature, scale, _ = rows.numbers[:3].unbind()
    return (1.0 if rows.softcap else scale) / temperature


def _load(chunk: _Chunk, buffer: Tensor) -> Tensor:
    """Return logits in fp32 (fp64), capped where there is a cap: in the buffer, or where they are."""
    logits, rows = chunk.logits, chunk.rows
    if logits.dtype == buffer.dtype and not rows.softcap:
        return logits
    buffer.copy_(logits)
    if rows.softcap:
        _, scale, cap = rows.numbers[:3].unbind()
        buffer.mul_(scale / cap).tanh_().mul_(cap)
    return buffer


def _several(values: Tensor) -> Tensor:
    """Return rows as they are, but a lone one twice: PyTorch adds it up in another order than one of several."""
    return values if len(values) > 1 else values.expand(2, -1)


def token_sums(
    values: TokenValues,
    masked_in: Tensor,
    inputs: TokenInputs,
    records: TokenRecords,
    kl_estimator: int,
    sequences: int,
    loss: Tensor,
    sums: Tensor,
) -> None:
    """Reduce records by a few operations on stacked columns: on a GPU every one of them is a launch."""
    log_prob, entropy, live = values
    old, ref, rollout = inputs.old, inputs.ref, inputs.rollout
    weight = records.rollout_weight
    zero = torch.zeros_like(log_prob)

    def weighted(weight: Tensor | None, value: Tensor) -> Tensor:
        return zero if weight is None else torch.where(weight == 0, zero, weight * value)

    terms = (
        weighted(inputs.policy_weight, records.policy),
        weighted(inputs.kl_weight, records.kl),
        -weighted(inputs.entropy_weight, entropy),
    )
    counts = (masked_in, masked_in & ~live, log_prob == -math.inf, entropy)
    others = torch.stack([log_prob if other is None else other for other in (ref, old, rollout)])
    absent = torch.ones_like(live)  # NaN - NaN is not 0
    unknown = absent if rollout is None else rollout.isnan()
    ignored = torch.stack([absent if other is None else ~live for other in (ref, old)] + [~live | unknown])
    differences = torch.where(ignored, 0.0, log_ratio_of(log_prob, others)).to(sums.dtype)
    k3 = torch.expm1(-differences) + torch.where(differences == -math.inf, 0.0, differences)  # fp64: no series needed
    to_ref, to_old, to_rollout = differences
    plain = (to_ref, to_ref * to_ref / 2, k3[0], to_ref.abs())[kl_estimator - 1]
    recorded = torch.zeros_like(live) if rollout is None else live & ~unknown
    old_to_rollout = log_ratio_of(log_prob if old is None else old, others[2]).to(sums.dtype)
    rho = torch.where(recorded, old_to_rollout.exp(), 0.0)
    applied = torch.where(recorded, weight.to(sums.dtype) if weight.numel() else 1.0, 0.0).to(sums.dtype)
    compared = torch.zeros_like(live) if ref is None else live
    divergences = (plain, compared, to_old, k3[1], to_rollout, k3[2], recorded)
    factors = (rho, rho * rho, applied, applied * applied, recorded & (applied == 0))
    columns = torch.stack([column.flatten() for column in (*terms, *counts, *divergences, *factors)]).to(sums.dtype)
    token = columns.sum(-1)
    clipped = [((records.flags & bit) != 0).flatten() for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]
    ratios = reduce_ratios(to_old.exp().flatten(), live.flatten(), clipped)
    count = torch.full((1,), sequences, dtype=sums.dtype, device=sums.device)
    lowest = torch.full((2, 1), -math.inf, dtype=sums.dtype, device=sums.device)
    largest = torch.where(recorded, torch.stack([rho, applied]), -math.inf).flatten(1)
    sums.copy_(torch.cat([token, count, ratios, torch.cat([largest, lowest], 1).amax(1)]))
    loss.copy_(token[:3].sum())


def rescale(gradient: Tensor, upstream: Tensor, announced: Tensor) -> None:
    if gradient.device.type == "cpu":
        if torch.equal(upstream, announced):
            return
        gradient.mul_(upstream / announced)
    else:
        factor = torch.where(upstream == announced, 1.0, upstream / announced)
        gradient.copy_(gradient.to(factor.dtype) * factor)  # a factor rounded to half precision would be a bias


def token_id_message(rows: Rows, row: int) -> str:
    length = rows.token_ids.shape[1]
    batch, token = divmod(row, length)
    token_id = int(rows.token_ids[batch, token])
    return (
        f"token_ids[{batch}, {token}] = {token_id} at a live position is outside the vocabulary [0, {rows.vocab}). "
        "Mask that position, or check that ids and logits come from one tokenizer (ids of -100 need mask=0)."
    )
