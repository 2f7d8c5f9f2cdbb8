"""The gradient of plain PyTorch's rows, by a row's log-prob and entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import RowGradients, Rows, RowStats
from .eager_rows import LOG2_E, Buffer, Chunk, all_of, columns_of, factor_of, load

_NO_POWER = -1100.0
"""An exponent of 2 whose power is 0, in fp64 too. It stands for -inf, whose product with 0 is not 0."""


class Prepared(NamedTuple):
    """What ``row_gradient`` takes of every row."""

    read: Tensor
    """bool (B, T): rows whose slopes are not both 0."""
    buffers: int
    per_row: list[Tensor]
    finite: bool
    """Whether a power of -inf does no harm."""


def row_gradients(rows: Rows, stats: RowStats, gradients: RowGradients) -> Prepared:
    log_prob, entropy, anchor, log_sum = stats
    ids, _ = columns_of(rows)
    factor = factor_of(rows)
    zero = torch.zeros_like(log_prob)
    g, h = (zero if gradient is None else torch.where(rows.live, gradient, 0.0) for gradient in gradients)
    read = rows.live & ((g != 0) | (h != 0))

    def of_read(values: Tensor, other: float = 0.0) -> Tensor:
        return torch.where(read, values, other)

    weight = of_read(torch.where(log_sum.isnan(), math.nan, -factor))
    per_row = [factor, ids, of_read(anchor, math.inf)]  # a row that is not read has no powers, whatever its logits are
    if gradients.grad_entropy is None:  # the sum as a part of the weight spares a sweep
        total = of_read(log_sum.exp(), 1.0)
        per_row += [of_read(torch.expm1(log_prob)) * total, weight * g / total]
    else:
        numbers = (log_sum * LOG2_E, entropy, log_prob.clamp(min=_NO_POWER))
        per_row += [of_read(torch.expm1(log_prob)), weight, g, h, *map(of_read, numbers)]
    finite = gradients.grad_entropy is None and all_of(read)  # then a power of -inf does no harm
    buffers = 1 if gradients.grad_entropy is None and not rows.softcap else 2
    return Prepared(read, buffers, per_row, finite)


def row_gradient(
    chunk: Chunk,
    finite: bool,
    factor: Tensor,
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
    powers. Under a softcap dvalue/dlogit follows (``times_cap_derivative_``).
    """
    powers, p = chunk.buffers[0], chunk.buffers[-1]
    torch.sub(load(chunk, powers.numbers), anchor, out=powers.numbers).mul_(factor * LOG2_E)
    if of_entropy:
        g, h, log_sum, entropy, log_prob = of_entropy
        powers.numbers.sub_(log_sum)
    if not finite:
        powers.numbers.nan_to_num_(nan=_NO_POWER, neginf=_NO_POWER)  # -inf·0 is not 0
    p.exp2_(powers)
    if of_entropy:
        log_p = powers.numbers.mul_(1 / LOG2_E).scatter_(-1, ids, log_prob)
        bonus = log_p.add_(entropy).mul_(p.numbers).mul_(h)
        gradient = p.numbers.scatter_(-1, ids, of_sampled).mul_(g).add_(bonus)
    else:
        gradient = p.numbers.scatter_(-1, ids, of_sampled)
    if chunk.rows.softcap:
        times_cap_derivative_(gradient, chunk, powers)
    return gradient.mul_(weight)


def times_cap_derivative_(gradient: Tensor, chunk: Chunk, q: Buffer) -> None:
    """Multiply by the cap's dvalue/dlogit, scale·(1 - tanh²), as scale·4q/(1+q)², q = exp(-2|logit·scale/cap|), which
    keeps its precision where tanh is nearly 1."""
    _, scale, cap = chunk.rows.numbers[:3].unbind()
    q.numbers.copy_(chunk.logits).mul_(scale / cap).abs_().mul_(-2 * LOG2_E)
    q.numbers.nan_to_num_(nan=_NO_POWER, neginf=_NO_POWER)  # of dead rows, and of infinite logits
    q.exp2_(q)
    gradient.mul_(q.numbers).mul_(4 * scale)
    gradient.div_(q.numbers.add_(1)).div_(q.numbers)
