"""Arithmetic of the per-token maths that keeps infinities and small differences exact.

Twinned in ``csrc/common/surrogates.h`` and ``backends/triton/surrogates.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def times(a: Tensor, b: Tensor) -> Tensor:
    """Return a * b where a factor that is exactly zero wins over an infinite one (NaN stays NaN)."""
    zero = torch.minimum(a.abs(), b.abs()) == 0  # NaN where either is
    return (a * b).masked_fill_(zero, 0.0)


def weighed(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight * x where a weight of zero wins over anything, NaN as well: a token of weight 0 has no part in a
    loss. A zero of x wins over an infinite weight."""
    zero = (weight == 0) | ((x == 0) & (weight == weight))
    return (weight * x).masked_fill_(zero, 0.0)


def log_ratio_of(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b; equal log-probs differ by exactly zero, also where both are -inf."""
    return (a - b).masked_fill_(a == b, 0.0)


def sign_of(x: Tensor) -> Tensor:
    """Return the sign; NaN of NaN, which ``torch.sign`` calls 0."""
    return torch.where(x.isnan(), x, x.sign())


def others_of(log_prob: Tensor) -> Tensor:
    """Return 1 - p, with all its digits near p = 1; +0 where p is 1, or above it by a log-softmax's rounding."""
    return (-torch.expm1(log_prob)).masked_fill_(log_prob >= 0, 0.0)


def beyond(x: Tensor, limit: float | None) -> Tensor:
    """Return where x lies outside of [-limit, limit], whose bounds are inside, as NaN is."""
    return torch.zeros_like(x, dtype=torch.bool) if limit is None else x.abs() > limit


def clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def k3_of(u: Tensor) -> Tensor:
    """Return exp(u) - u - 1 without cancellation: u^2/2 (1 + u/3 (1 + u/4 (...))) near zero."""
    near = u.abs() < 1
    v = torch.where(near, u, 0.0)
    total = torch.ones_like(v)
    for k in range((18 if u.dtype == torch.float64 else 11) + 2, 2, -1):
        total = 1 + v * (1 / k) * total
    far = torch.where(u == math.inf, u, torch.expm1(u) - u)
    return torch.where(near, v * v / 2 * total, far)


def real_dtype(logits: torch.dtype) -> torch.dtype:
    """Return the dtype of all numbers but the logits and their gradient: fp64 beside fp64 logits, else fp32."""
    return torch.float64 if logits == torch.float64 else torch.float32
