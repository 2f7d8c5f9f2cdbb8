"""Divergences of the policy's distribution p from a teacher's q, in plain PyTorch; gradients are autograd's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...objectives.divergence import Divergence


def divergence_of(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D of each row, from log-probs (rows, V) of policy and teacher."""
    w, p, q = divergence.mix, log_p.exp(), log_q.exp()
    if divergence.kind == "forward_kl":
        return kl(q, log_q, log_p)
    if divergence.kind == "reverse_kl":
        return kl(p, log_p, log_q)
    if divergence.kind == "mixed_kl":
        return w * kl(q, log_q, log_p) + (1 - w) * kl(p, log_p, log_q)
    if divergence.kind == "jsd":
        log_m = mixture(w, log_q, log_p)
        return w * kl(q, log_q, log_m) + (1 - w) * kl(p, log_p, log_m)
    if divergence.kind == "skew_forward_kl":
        return kl(q, log_q, mixture(w, log_q, log_p))
    if divergence.kind == "skew_reverse_kl":
        return kl(p, log_p, mixture(w, log_p, log_q))
    assert divergence.kind == "tvd"
    return (p - q).abs().sum(-1) / 2


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ_j p_j·(log p_j - log q_j); a column with p_j = 0 has no part, and one with q_j = 0 < p_j makes it infinite."""
    possible = p != 0  # NaN is not 0
    x = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return torch.where(possible, p * x, 0.0).sum(-1)


def mixture(w: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(w·a + (1 - w)·b), -inf where both are 0."""
    possible = (log_a != -torch.inf) | (log_b != -torch.inf)
    a, b = (torch.where(possible, x, 0.0) for x in (log_a, log_b))
    return torch.where(possible, torch.logaddexp(a + math.log(w), b + math.log1p(-w)), -torch.inf)
