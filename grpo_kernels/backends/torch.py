"""Plain PyTorch, a few rows at a time: any device and dtype, the fallback of every other backend.

Two passes only. Same numerics contract as the kernels: fp32 after the load (fp64 for fp64), the sampled
column left out of the sum of exponentials, entropy in shifted form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..maths import log_ratio_of
from ..objective import reduce_ratios
from ..rows import Rows
from ..surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW
from . import Request

CHUNK_ELEMENTS = 1 << 21
"""fp32 elements held at a time; a few temporaries of this size live at once."""


def unsupported(request: Request) -> str | None:
    return "it has no one-pass loss" if request.fused else None


def log_probs(rows: Rows, log_prob: Tensor, entropy: Tensor, anchor: Tensor, log_sum: Tensor) -> None:
    outputs = [output.view(-1) for output in (log_prob, entropy, anchor, log_sum)]
    for chunk in _chunks(rows):
        for output, value in zip(outputs, _chunk_log_probs(chunk), strict=True):
            output[chunk.index] = torch.where(chunk.live, value, 0.0)[: chunk.count]


def log_probs_backward(
    rows: Rows,
    log_prob: Tensor,
    entropy: Tensor,
    anchor: Tensor,
    log_sum: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    zero = torch.zeros((), dtype=log_prob.dtype, device=log_prob.device).expand(log_prob.shape)
    per_row = [log_prob, entropy, anchor, log_sum]
    per_row += [zero if gradient is None else gradient for gradient in (grad_log_prob, grad_entropy)]
    flat = [values.reshape(-1) for values in per_row]
    out_rows = rows.row_view(out)
    length = rows.token_ids.shape[1]
    for chunk in _chunks(rows):
        gradient = _chunk_gradient(chunk, *(chunk.take(values) for values in flat))[: chunk.count].to(out.dtype)
        batch, token = chunk.index // length, chunk.index % length
        out_rows[batch, token] = torch.where(chunk.live[: chunk.count, None], gradient, 0.0)


class _Chunk:
    """Some rows in fp32 (fp64): z = values * factor, the values capped where there is a cap.

    A lone row comes twice: PyTorch sums a single row in another order, and a row's log-prob must not depend
    on its company.
    """

    def __init__(self, rows: Rows, logit_rows: Tensor, start: int, end: int) -> None:
        self.index = torch.arange(start, end, device=logit_rows.device)
        self.count = end - start
        self._padded = self.index if self.count > 1 else self.index.repeat(2)
        length = rows.token_ids.shape[1]
        self.numbers = rows.numbers
        self.live = rows.live.reshape(-1)[self._padded]
        ids = rows.token_ids.reshape(-1)[self._padded]
        in_range = (ids >= 0) & (ids < rows.vocab)
        if ids.device.type == "cpu" and bool((self.live & ~in_range).any()):
            bad = int(self._padded[self.live & ~in_range][0])
            raise IndexError(token_id_message(rows, bad))
        logits = logit_rows[self._padded // length, self._padded % length].to(rows.numbers.dtype)
        self.ids = torch.where(in_range, ids, 0)[:, None]
        self.raw = torch.where((self.live & in_range)[:, None], logits, torch.where(self.live, math.nan, 0.0)[:, None])
        temperature, scale, cap = rows.numbers[:3].unbind()
        capped = cap * torch.tanh(self.raw * scale / torch.where(cap > 0, cap, 1.0))
        self.values = torch.where(cap > 0, capped, self.raw)
        self.factor = torch.where(cap > 0, 1.0, scale) / temperature

    def take(self, values: Tensor) -> Tensor:
        return values[self._padded]

    def is_target(self) -> Tensor:
        return torch.arange(self.values.shape[-1], device=self.values.device) == self.ids

    def slope(self) -> Tensor:
        """dz/dlogit: 1 - tanh² as 4q/(1+q)², which keeps its precision where tanh is nearly 1."""
        temperature, scale, cap = self.numbers[:3].unbind()
        q = torch.exp(-2 * (self.raw * scale / torch.where(cap > 0, cap, 1.0)).abs())
        return torch.where(cap > 0, 4 * q / (1 + q) ** 2, 1.0) * scale / temperature


def _chunks(rows: Rows) -> Iterator[_Chunk]:
    logit_rows = rows.row_view(rows.logits)
    total = rows.token_ids.numel()
    size = max(2, CHUNK_ELEMENTS // rows.vocab)
    for start in range(0, total, size):
        yield _Chunk(rows, logit_rows, start, min(start + size, total))


def _chunk_log_probs(chunk: _Chunk) -> tuple[Tensor, ...]:
    values, is_target = chunk.values, chunk.is_target()
    largest = values.amax(-1, keepdim=True)
    shifted = (values - torch.where(largest == -math.inf, 0.0, largest)) * chunk.factor  # exact where they are close
    exps = shifted.exp()
    rest = exps.masked_fill(is_target, 0.0).sum(-1)
    z_target = shifted.gather(-1, chunk.ids).squeeze(-1)
    total = rest + z_target.exp()
    log_total = total.log()
    log_prob = torch.where(z_target == 0, -torch.log1p(rest), z_target - log_total)
    weighted = torch.where(exps == 0, 0.0, exps * shifted).sum(-1)
    entropy = (log_total - weighted / total).clamp(min=0)
    anchor = largest.squeeze(-1)
    void = anchor == -math.inf  # no column is possible
    log_prob, entropy, log_sum = (torch.where(void, math.nan, output) for output in (log_prob, entropy, log_total))
    return log_prob, entropy, anchor, log_sum


def _chunk_gradient(
    chunk: _Chunk, log_prob: Tensor, entropy: Tensor, anchor: Tensor, log_sum: Tensor, g: Tensor, h: Tensor
) -> Tensor:
    log_p = (chunk.values - anchor[:, None]) * chunk.factor - log_sum[:, None]
    p = log_p.exp()
    inner = torch.where(p == 0, 0.0, log_p + entropy[:, None])
    gradient = -(g[:, None] + h[:, None] * inner) * p
    target = -g * torch.expm1(log_prob)
    p_target = log_prob.exp()
    target = target - torch.where(p_target == 0, 0.0, h * p_target * (log_prob + entropy))
    gradient = torch.where(chunk.is_target(), target[:, None], gradient)
    known_zero = ((g == 0) & (h == 0))[:, None]
    return torch.where(known_zero, 0.0, gradient * chunk.slope())


def token_sums(
    log_prob: Tensor,
    entropy: Tensor,
    policy: Tensor,
    kl: Tensor,
    flags: Tensor,
    live: Tensor,
    masked_in: Tensor,
    policy_weight: Tensor,
    kl_weight: Tensor | None,
    entropy_weight: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    rollout_weight: Tensor | None,
    kl_estimator: int,
    sequences: int,
    loss: Tensor,
    sums: Tensor,
) -> None:
    """A few operations on stacked columns: on a GPU every one of them is a launch."""
    zero = torch.zeros_like(log_prob)

    def weighted(weight: Tensor | None, value: Tensor) -> Tensor:
        return zero if weight is None else torch.where(weight == 0, zero, weight * value)

    terms = (weighted(policy_weight, policy), weighted(kl_weight, kl), -weighted(entropy_weight, entropy))
    counts = (masked_in, masked_in & ~live, log_prob == -math.inf, entropy)
    others = torch.stack([log_prob if other is None else other for other in (ref, old, rollout)])
    absent = torch.ones_like(live)  # NaN - NaN is not 0
    unknown = absent if rollout is None else rollout.isnan()
    ignored = torch.stack([absent if other is None else ~live for other in (ref, old)] + [~live | unknown])
    differences = torch.where(ignored, 0.0, log_ratio_of(log_prob, others)).to(sums.dtype)
    k3 = torch.expm1(-differences) + torch.where(differences == -math.inf, 0.0, differences)  # fp64: no series needed
    to_ref, to_old, to_rollout = differences
    plain = (to_ref, to_ref * to_ref / 2, k3[0], to_ref.abs())[kl_estimator - 1]
    known = torch.zeros_like(live) if rollout is None else live & ~unknown
    old_to_rollout = log_ratio_of(log_prob if old is None else old, others[2]).to(sums.dtype)
    rho = torch.where(known, old_to_rollout.exp(), 0.0)
    applied = torch.where(known, 1.0 if rollout_weight is None else rollout_weight.to(sums.dtype), 0.0).to(sums.dtype)
    compared = torch.zeros_like(live) if ref is None else live
    divergences = (plain, compared, to_old, k3[1], to_rollout, k3[2], known)
    factors = (rho, rho * rho, applied, applied * applied, known & (applied == 0))
    columns = torch.stack([column.flatten() for column in (*terms, *counts, *divergences, *factors)]).to(sums.dtype)
    token = columns.sum(-1)
    clipped = [((flags & bit) != 0).flatten() for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]
    ratios = reduce_ratios(to_old.exp().flatten(), live.flatten(), clipped)
    count = torch.full((1,), sequences, dtype=sums.dtype, device=sums.device)
    lowest = torch.full((2, 1), -math.inf, dtype=sums.dtype, device=sums.device)
    largest = torch.where(known, torch.stack([rho, applied]), -math.inf).flatten(1)
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
