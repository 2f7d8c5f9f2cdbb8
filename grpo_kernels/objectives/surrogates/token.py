"""Surrogates of a token by itself: those that kernels compute in one pass.

``csrc/common/surrogates.h`` and ``backends/triton/surrogates.py`` are the same maths, with the same names in the same
order; a parity test holds them together. Slopes are *selected* branch by branch, never multiplied by a 0/1 mask:
0 * inf is NaN.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..maths import log_ratio_of, others_of, times
from ..names import translates_fields
from .base import Point, Surrogate, Terms, as_flags, check_band, check_field, chosen, no_flags, nothing


@dataclass(frozen=True, repr=False)
class Reinforce(Surrogate):
    """-A * log_prob: the plain policy gradient, GPG's as well. Its value is no estimate of anything; its slope is -A.

    Drops the ratio: samples of an older policy count as if they were the policy's own.
    """

    name = "reinforce"
    equation = "-A·ℓ"
    slope_equation = "-A"
    paper = "Williams 1992, Simple statistical gradient-following algorithms; GPG: Chu et al. 2025, arXiv:2504.02546"
    found_in = "verl gpg"
    kernel_id = 0
    uses_ratio = False

    def terms(self, t: Point) -> Terms:
        A = t.advantage
        return Terms(times(-A, t.log_prob), nothing(A), -A, no_flags(A))


@dataclass(frozen=True, repr=False)
class NoSurrogate(Reinforce):
    """No policy term: of distillation alone. ``LossConfig(surrogate=None)`` is this.

    Its weight in the loss is 0 at every token, so kernels may take any of their arms.
    """

    equation = "0"
    slope_equation = "0"
    paper = found_in = ""

    def terms(self, t: Point) -> Terms:
        zero = nothing(t.log_prob)
        return Terms(zero, zero, zero, no_flags(zero))


@dataclass(frozen=True, repr=False)
class Unclipped(Surrogate):
    """-r * A: importance sampling without a bound. On-policy it is the policy gradient, pi/sg(pi) * A.

    Drops every bound of the variance.
    """

    name = "unclipped"
    equation = "-r·A"
    slope_equation = "-r·A"
    paper = "Schulman et al. 2017, arXiv:1707.06347, L^CPI"
    found_in = "SkyRL and Tinker importance_sampling"
    kernel_id = 1

    def terms(self, t: Point) -> Terms:
        value = times(-t.advantage, t.ratio)
        return Terms(value, value, None, no_flags(value))


@translates_fields
@dataclass(frozen=True, repr=False)
class Clip(Surrogate):
    """-min(min(r, dual) * A, clip(r, 1-low, 1+high) * A): PPO's clip, asymmetric and dual if asked.

    ``dual`` bounds the loss of tokens with a negative advantage whose ratio exploded; it must be at least
    1 + high (TRL's ``delta``, verl's ``clip_ratio_c``). The gradient is that of r * A at the bounds themselves.
    Drops the gradient of tokens that left the band in the direction of their advantage.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    name = "clip"
    equation = "-min(min(r, dual)·A, clip(r, 1-low, 1+high)·A)"
    slope_equation = "-r·A, 0 where clipped"
    paper = "Schulman et al. 2017, arXiv:1707.06347; dual: Ye et al. 2020, arXiv:1912.09729"
    found_in = "all"
    kernel_id = 2

    def __post_init__(self) -> None:
        check_band(self, self.low, self.high)
        if self.dual is not None:
            check_field(self, "dual")
        if self.dual is not None and self.dual < 1 + self.high:
            raise ValueError(
                f"Clip(dual=...) must be finite and at least 1 + high = {1 + self.high:g}, where it only bounds "
                f"negative advantages; got {self.dual!r}."
            )

    def parameters(self) -> tuple[float, ...]:
        return (1 - self.low, 1 + self.high, math.inf if self.dual is None else self.dual)

    def written(self) -> str:
        low, high, dual = self.parameters()
        first = "r·A" if self.dual is None else f"min(r, {dual:g})·A"
        return f"-min({first}, clip(r, {low:g}, {high:g})·A)"

    def terms(self, t: Point) -> Terms:
        ratio, advantage = t.ratio, t.advantage
        low, high, dual = self.parameters()
        against, negative = -advantage, advantage < 0
        clipped_high = (advantage > 0) & (ratio > high)
        clipped_low = negative & (ratio < low)
        inside = times(against, ratio)
        value = torch.where(clipped_high, against * high, inside)
        value = torch.where(clipped_low, against * low, value)
        clipped, clipped_dual = clipped_high | clipped_low, None
        if self.dual is not None:
            clipped_dual = negative & (ratio > dual)
            value = torch.where(clipped_dual, against * dual, value)
            clipped = clipped | clipped_dual
        slope = inside.masked_fill(clipped, 0.0)
        return Terms(value, slope, None, as_flags(clipped_low, clipped_high, clipped_dual))


@dataclass(frozen=True, repr=False)
class Cispo(Surrogate):
    """-sg(clip(r)) * A * log_prob: REINFORCE with bounded importance weights; no token loses its gradient.

    Two conventions of the bound: ``Cispo(cap=5.0)`` is min(r, 5), as TRL, Liger and ScaleRL have it (their
    ``epsilon_high`` is this cap); ``Cispo(low=0.2, high=0.28)`` is clip(r, 1-low, 1+high), as verl, slime, NeMo-RL and
    MiniMax's paper write it (``low=1`` leaves the lower bound out). ``Cispo()`` is ``cap=5.0``.
    Drops the gradient through the ratio.
    """

    cap: float | None = None
    low: float | None = None
    high: float | None = None

    name = "cispo"
    equation = "-sg(min(r, cap))·A·ℓ, or -sg(clip(r, 1-low, 1+high))·A·ℓ"
    slope_equation = "-min(r, cap)·A"
    paper = "MiniMax 2025 (MiniMax-M1), arXiv:2506.13585; cap: Khatri et al. 2025 (ScaleRL), arXiv:2510.13786"
    found_in = "TRL, Liger, Unsloth, swift (cap); verl, slime, NeMo-RL, SkyRL, AReaL (band)"
    kernel_id = 3

    def __post_init__(self) -> None:
        band = (self.low, self.high)
        if self.cap is not None and band != (None, None):
            raise ValueError(f"Cispo takes a cap, or low and high, not both; got {self!r}.")
        if self.cap is None and band == (None, None):
            object.__setattr__(self, "cap", 5.0)
        if self.cap is not None:
            check_field(self, "cap", above=0)
            return
        if self.low is None or self.high is None:
            raise ValueError(f"Cispo's band needs both low and high (low=1 for no lower bound); got {self!r}.")
        check_band(self, self.low, self.high)

    def parameters(self) -> tuple[float, ...]:
        if self.low is None or self.high is None:
            assert self.cap is not None
            return (0.0, self.cap)
        return (1 - self.low, 1 + self.high)

    def written(self) -> str:
        low, high = self.parameters()
        return f"-sg(clip(r, {low:g}, {high:g}))·A·ℓ" if self.cap is None else f"-sg(min(r, {high:g}))·A·ℓ"

    def terms(self, t: Point) -> Terms:
        low, high = self.parameters()
        weighted = -t.ratio.clamp(low, high) * t.advantage
        acts = t.advantage != 0
        flags = as_flags((t.ratio < low) & acts, (t.ratio > high) & acts)
        return Terms(times(weighted, t.log_prob), nothing(weighted), weighted, flags)


@dataclass(frozen=True, repr=False)
class Sapo(Surrogate):
    """-A * sigmoid(tau * (r - 1)) * 4/tau: a soft gate in the place of the clip, tau by the advantage's sign.

    Drops nothing at once: the slope falls off smoothly on both sides of r = 1, where it is -A.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    name = "sapo"
    equation = "-A·σ(τ(r-1))·4/τ, τ = tau_pos if A > 0 else tau_neg"
    slope_equation = "-A·4σ(1-σ)·r"
    paper = "Gao et al. 2025 (SAPO), arXiv:2511.20347"
    found_in = "TRL, Liger, Unsloth, verl, swift, SkyRL, AReaL"
    kernel_id = 4

    def __post_init__(self) -> None:
        check_field(self, "tau_pos", above=0)
        check_field(self, "tau_neg", above=0)

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_pos, self.tau_neg)

    def terms(self, t: Point) -> Terms:
        tau = chosen(t.advantage > 0, self.tau_pos, self.tau_neg, t.ratio)
        x = tau * (t.ratio - 1)
        e = torch.exp(-x.abs())  # of the smaller side: exact where the gate closes
        gate = torch.where(x < 0, e, 1.0) / (1 + e)
        slope = times(4 * e / ((1 + e) * (1 + e)), t.ratio)
        value = -t.advantage * gate * 4 / tau
        return Terms(value, times(-t.advantage, slope), None, no_flags(value))


@dataclass(frozen=True, repr=False)
class _Dppo(Surrogate, abc.ABC):
    """A trust region in probabilities; its subclasses are measures of how far a probability moved."""

    low: float = 0.2
    high: float = 0.2
    cap: float | None = None

    def __post_init__(self) -> None:
        check_field(self, "low", at_least=0)
        check_field(self, "high", at_least=0)
        if self.cap is not None:
            check_field(self, "cap", above=0)

    def parameters(self) -> tuple[float, ...]:
        return (self.low, self.high, math.inf if self.cap is None else self.cap)

    @abc.abstractmethod
    def moved_too_far(self, t: Point) -> tuple[Tensor, Tensor]:
        """Return where the probability fell too far, and where it rose too far (bool)."""

    def terms(self, t: Point) -> Terms:
        fallen, risen = self.moved_too_far(t)
        low, high = fallen & (t.advantage < 0), risen & (t.advantage > 0)
        kept = ~(low | high)
        if self.cap is None:
            slope = torch.where(kept, times(-t.advantage, t.ratio), 0.0)
            return Terms(slope, slope, None, as_flags(low, high))
        direct = torch.where(kept, -t.ratio.clamp(max=self.cap) * t.advantage, 0.0)
        truncated = kept & (t.ratio > self.cap) & (t.advantage != 0)
        return Terms(times(direct, t.log_prob), nothing(direct), direct, as_flags(low, high, truncated))


@dataclass(frozen=True, repr=False)
class DppoTV(_Dppo):
    """-M * r * A, M = 0 where the probability moved by more than low or high in the advantage's direction.

    The binary total variation |p - p_old| of the sampled token in the place of the ratio: rare tokens may move,
    frequent ones may not. ``cap`` truncates the ratio, which is then detached: -M * sg(min(r, cap)) * A * log_prob
    (verl; its configuration makes that 3). prime-rl and SkyRL have none.
    Drops the gradient of tokens outside of the region; with a cap, that through the ratio.
    """

    name = "dppo_tv"
    equation = "-M·r·A, M = 0 where A·(p - p_old) > 0 and abs(p - p_old) > low or high; with cap -M·sg(min(r, cap))·A·ℓ"
    slope_equation = "-M·min(r, cap)·A"
    paper = "Qi et al. 2026 (DPPO), arXiv:2602.04879"
    found_in = "verl (cap), SkyRL, prime-rl"
    kernel_id = 5

    def moved_too_far(self, t: Point) -> tuple[Tensor, Tensor]:
        rise = t.log_prob.exp() - t.old_log_prob.exp()
        return rise < -self.low, rise > self.high


@dataclass(frozen=True, repr=False)
class DppoKL(_Dppo):
    """``DppoTV`` with the binary KL divergence p_old log(p_old/p) + (1-p_old) log((1-p_old)/(1-p)) as its measure.

    1 - p keeps its digits near p = 1, and is 0 there: the KL of what was no certainty is infinite (verl adds 1e-8 to
    both). Drops what ``DppoTV`` drops.
    """

    name = "dppo_kl"
    equation = "-M·r·A, M = 0 where A·(p - p_old) > 0 and KL(p_old, p) > low or high; with cap -M·sg(min(r, cap))·A·ℓ"
    slope_equation = "-M·min(r, cap)·A"
    paper = "Qi et al. 2026 (DPPO), arXiv:2602.04879"
    found_in = "verl (cap)"
    kernel_id = 6

    def moved_too_far(self, t: Point) -> tuple[Tensor, Tensor]:
        fall = log_ratio_of(t.old_log_prob, t.log_prob)
        others, old_others = others_of(t.log_prob), others_of(t.old_log_prob)
        away = torch.where(old_others > 0, old_others * (old_others / others).log(), 0.0)
        divergence = times(t.old_log_prob.exp(), fall) + away
        return (divergence > self.low) & (fall > 0), (divergence > self.high) & (fall < 0)


@dataclass(frozen=True, repr=False)
class Dro(Surrogate):
    """-(A * log_prob - beta/2 * (log_prob - old)^2): a policy gradient and a spring towards the old policy.

    Drops the ratio: the square of its logarithm alone holds the policy. Its slope is not 0 at A = 0.
    """

    beta: float

    name = "dro"
    equation = "-A·ℓ + beta/2·(ℓ - old)²"
    slope_equation = "-A + beta·(ℓ - old)"
    paper = "Richemond et al. 2024 (DRO), arXiv:2405.19107"
    found_in = "verl, Tinker"
    kernel_id = 7
    flat_at_zero_advantage = False

    def __post_init__(self) -> None:
        check_field(self, "beta", above=0)

    def parameters(self) -> tuple[float, ...]:
        return (self.beta,)

    def terms(self, t: Point) -> Terms:
        pull = self.beta * t.log_ratio
        value = times(-t.advantage, t.log_prob) + pull * t.log_ratio / 2
        return Terms(value, pull, -t.advantage, no_flags(value))
