"""Surrogates of whole sequences: two passes, as they need every log-prob of a sequence first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths import times
from ..rollout import FOLDED
from .base import Clipped, Point, Surrogate, Terms, as_flags, check_field, chosen, no_flags, nothing


@dataclass(frozen=True, repr=False)
class Vespo(Surrogate):
    """-phi(W) * A * log_prob, phi(W) = exp(lam) * W^k * exp(-lam * W), detached, phi(1) = 1; by the advantage's sign.

    W is the product of a sequence's ratios (``level="sequence_product"``), rollout weights among them, log W bounded
    to [log 1e-8, 20]. Drops the gradient through W: a sequence far from the policy fades out.
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0

    name = "vespo"
    equation = "-sg(φ(W))·A·ℓ, φ(W) = exp(λ + k·log W - λ·W), (k, λ) by the sign of A"
    slope_equation = "-φ(W)·A"
    paper = "Shen et al. 2026 (VESPO), arXiv:2602.10693"
    found_in = "TRL, Liger, Unsloth"
    takes_rollout = True

    def __post_init__(self) -> None:
        for name in ("k_pos", "k_neg"):
            check_field(self, name, at_least=0)
        for name in ("lam_pos", "lam_neg"):
            check_field(self, name, at_least=1e-4)

    def terms(self, t: Point) -> Terms:
        log_w = t.log_ratio.clamp(*FOLDED)
        positive = t.advantage >= 0
        k = chosen(positive, self.k_pos, self.k_neg, log_w)
        lam = chosen(positive, self.lam_pos, self.lam_neg, log_w)
        weighted = -torch.exp(lam + k * log_w - lam * log_w.exp()) * t.advantage
        return Terms(times(weighted, t.log_prob), nothing(weighted), weighted, no_flags(weighted))


@dataclass(frozen=True, repr=False)
class Gmpo(Surrogate):
    """-r * A with log-ratios clipped token by token, before they are pooled: at level "sequence" r is a geometric mean.

    Bounds are log-ratios, low and high around 0. Drops the gradient of tokens that left the band in the direction of
    their advantage; their bounded ratios stay in the mean.
    """

    low: float = 0.4
    high: float = 0.4

    name = "gmpo"
    equation = "-r·A, r of log-ratios clipped to [-low, high] on the side that A pushes to"
    slope_equation = "-r·A, 0 where clipped"
    paper = "Zhao et al. 2025 (GMPO), arXiv:2507.20673"
    found_in = "TRL (experimental), verl geo_mean"

    def __post_init__(self) -> None:
        check_field(self, "low", at_least=0)
        check_field(self, "high", at_least=0)

    def clip_log_ratios(self, log_ratio: Tensor, advantage: Tensor) -> Clipped:
        high = (advantage > 0) & (log_ratio > self.high)
        low = (advantage < 0) & (log_ratio < -self.low)
        bounded = torch.where(high, self.high, torch.where(low, -self.low, log_ratio))
        return Clipped(bounded, ~(low | high), as_flags(low, high))

    def terms(self, t: Point) -> Terms:
        value = times(-t.advantage, t.ratio)
        return Terms(value, value, None, no_flags(value))
