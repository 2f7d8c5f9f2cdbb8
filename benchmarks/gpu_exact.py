"""Computes what the GPU's kernels are held against: float64, in every row, some rows at a time so that it fits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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


def _parts(logits: Tensor) -> Iterator[slice]:
    rows = max(1, ELEMENTS // logits.shape[1])
    yield from (slice(first, first + rows) for first in range(0, len(logits), rows))
