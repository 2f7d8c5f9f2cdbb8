"""Plain PyTorch, a few rows at a time: any device and dtype, the fallback of every other backend.

Two passes only. Same numerics contract as the kernels: fp32 after the load (fp64 for fp64), the sampled
column left out of the sum of exponentials, entropy in shifted form. ``eager_rows.py`` has the chunks,
``eager_divergence.py`` rows in pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objectives.maths import log_ratio_of, weighed
from ..objectives.metrics import reduce_ratios
from ..objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW
from .contract import Request, RowGradients, Rows, RowStats, TokenInputs, TokenRecords, TokenValues
from .eager_divergence import divergence as divergence
from .eager_divergence import divergence_backward as divergence_backward
from .eager_gradient import row_gradient, row_gradients
from .eager_rows import LOG2_E, Chunk, chunks_of, columns_of, factor_of, load, several


def unsupported(request: Request) -> str | None:
    return "it has no one-pass loss" if request.fused else None


def log_probs(rows: Rows, stats: RowStats) -> None:
    ids, in_range = columns_of(rows)
    factor = factor_of(rows)
    largest, sampled, weighted, others = statistics = [torch.empty_like(stats.log_prob) for _ in range(4)]
    for chunk in chunks_of(rows, 2, rows.live, factor, ids, *statistics):
        if not chunk.dead:
            _sum_rows(chunk, *chunk.per_row)
    z_sampled = (sampled - largest) * factor
    total = others + z_sampled.exp()
    log_total = total.log()
    values = RowStats(
        log_prob=torch.where(z_sampled == 0, -torch.log1p(others), z_sampled - log_total),
        entropy=(log_total - weighted / (total * LOG2_E)).clamp(min=0),
        anchor=largest,
        log_sum=log_total,
    )
    for output, value in zip(stats, values, strict=True):
        output.copy_(torch.where(rows.live, torch.where(in_range, value, math.nan), 0.0))


def _sum_rows(
    chunk: Chunk, factor: Tensor, ids: Tensor, largest: Tensor, sampled: Tensor, weighted: Tensor, others: Tensor
) -> None:
    """Write a chunk's row sums: the largest and the sampled value, Σ_j e_j·log2 e_j and Σ_j e_j without the sampled j.

    e_j = 2^power_j with power_j = (value_j - largest)·factor·log2(e), so that e_j = exp(z_j - z_largest) <= 1. All
    outputs are (rows, 1). ``log_probs`` makes of them, with s the sampled column and E = e_s + others,

        log_prob = z_s - z_largest - log E, or -log1p(others) where s is the largest: exact for p near 1,
        entropy = log E - Σ_j e_j·log e_j / E.
    """
    powers, exps = chunk.buffers
    values = load(chunk, powers.numbers)
    torch.amax(values, -1, keepdim=True, out=largest)
    torch.gather(values, -1, ids, out=sampled)
    torch.sub(values, largest, out=powers.numbers).mul_(factor * LOG2_E)  # exact where they are close
    exps.exp2_(powers)
    count = len(ids)
    # A column of -inf has power -inf and e = 0, whose product is NaN: nansum leaves it out, as its limit is 0. A row
    # that is NaN for another reason has a NaN in ``others`` or in ``sampled`` too.
    weighted.copy_(several(powers.numbers.mul_(exps.numbers)).nansum(-1, keepdim=True)[:count])
    # The sampled e is left out before the sum: subtracted afterwards it would take small others' digits with it.
    others.copy_(several(exps.numbers.scatter_(-1, ids, 0.0)).sum(-1, keepdim=True)[:count])


def log_probs_backward(rows: Rows, stats: RowStats, gradients: RowGradients, out: Tensor) -> None:
    read, buffers, per_row, finite = row_gradients(rows, stats, gradients)
    for chunk in chunks_of(rows, buffers, read, *per_row):
        place = rows.row_view(out)[chunk.at]
        if chunk.dead:
            place.zero_()
        else:
            place.copy_(row_gradient(chunk, finite, *chunk.per_row).view_as(place))


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
        return zero if weight is None else weighed(weight, value)

    terms = (
        weighted(inputs.policy_weight, records.policy),
        weighted(inputs.kl_weight, records.kl),
        -weighted(inputs.entropy_weight, entropy),
        weighted(inputs.rollout_kl_weight, records.rollout_kl),
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
    unrecorded = torch.zeros_like(live) if rollout is None else live & unknown
    divergences = (plain, compared, to_old, k3[1], to_rollout, k3[2], recorded, unrecorded)
    factors = (rho, rho * rho, applied, applied * applied, recorded & (applied == 0))
    columns = torch.stack([column.flatten() for column in (*terms, *counts, *divergences, *factors)]).to(sums.dtype)
    token = columns.sum(-1)
    clipped = [((records.flags & bit) != 0).flatten() for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]
    ratios = reduce_ratios(to_old.exp().flatten(), live.flatten(), clipped)
    count = torch.full((1,), sequences, dtype=sums.dtype, device=sums.device)
    lowest = torch.full((2, 1), -math.inf, dtype=sums.dtype, device=sums.device)
    largest = torch.where(recorded, torch.stack([rho, applied]), -math.inf).flatten(1)
    written = torch.cat([token, count, ratios, torch.cat([largest, lowest], 1).amax(1)])
    sums[: len(written)].copy_(written)
    loss.copy_(token[: len(terms)].sum())


def rescale(gradient: Tensor, upstream: Tensor, announced: Tensor) -> None:
    if gradient.device.type == "cpu":
        if torch.equal(upstream, announced):
            return
        gradient.mul_(upstream / announced)
    else:
        factor = torch.where(upstream == announced, 1.0, upstream / announced)
        gradient.copy_(gradient.to(factor.dtype) * factor)  # a factor rounded to half precision would be a bias
