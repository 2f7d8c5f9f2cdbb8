"""Computes what the GPU's kernels are held against: float64, in every row, some rows at a time so that it fits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels.objectives.divergence import Divergence
from grpo_kernels.verification.reference.divergences import divergence_of

ELEMENTS = 2**25
"""In float64 at once."""


def allowed(dtype: torch.dtype) -> tuple[float, float]:
    """Of log-probs, absolute, and of a row of the gradient (relative, L2), for logits of a dtype: half a unit of the
    gradient's last place, or what the arithmetic of log-probs leaves."""
    if dtype == torch.float64:
        return 1e-12, 1e-12
    return 2e-5, max(0.5 * torch.finfo(dtype).eps, 1e-5)


def log_prob_error(logits: Tensor, ids: Tensor, found: Tensor) -> float:
    """Return the largest error of all rows; NaN if one is. Logits (N, V), token ids and log-probs (N,)."""
    worst = logits.new_zeros((), dtype=torch.float64)
    for part in _parts(logits):
        exact = torch.log_softmax(logits[part].double(), -1).gather(-1, ids[part, None]).squeeze(-1)
        worst = torch.maximum(worst, (found[part].double() - exact).abs().max())
    return float(worst)


def gradient_error(logits: Tensor, ids: Tensor, slope: Tensor, found: Tensor) -> float:
    """Return the largest relative L2 error of a row of slope * (onehot - p); NaN where one is not finite or written.

    Logits and ``found`` (N, V), token ids and slopes (N,), none of which is 0.
    """
    worst = logits.new_zeros((), dtype=torch.float64)
    for part in _parts(logits):
        exact = torch.softmax(logits[part].double(), -1).neg_()
        exact.scatter_add_(-1, ids[part, None], torch.ones_like(exact[:, :1]))
        exact *= slope[part, None].double()
        size = exact.norm(dim=-1)
        worst = torch.maximum(worst, ((found[part].double() - exact).norm(dim=-1) / size).max())
    return float(worst)


def divergence_errors(
    divergence: Divergence, logits: Tensor, teacher: Tensor, found: Tensor, gradient: Tensor
) -> tuple[float, float]:
    """Return the largest error of a divergence, relative, and of a row of its gradient (relative, L2); NaN where one is
    not finite or written. Logits, the teacher's and the gradient (N, V), divergences (N,)."""
    worst = logits.new_zeros(2, dtype=torch.float64)
    for part in _parts(logits):
        leaf = logits[part].double().requires_grad_()
        value = divergence_of(divergence, leaf.log_softmax(-1), teacher[part].double().log_softmax(-1))
        (exact,) = torch.autograd.grad(value.sum(), leaf)
        value, size = value.detach(), exact.norm(dim=-1)
        errors = [(found[part].double() - value).abs() / value, (gradient[part].double() - exact).norm(dim=-1) / size]
        worst = torch.maximum(worst, torch.stack([error.max() for error in errors]))
    return float(worst[0]), float(worst[1])


def _parts(logits: Tensor) -> Iterator[slice]:
    rows = max(1, ELEMENTS // logits.shape[1])
    yield from (slice(first, first + rows) for first in range(0, len(logits), rows))
