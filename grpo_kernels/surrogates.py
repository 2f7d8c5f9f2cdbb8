"""The per-token maths of the policy term, once for Python: every surrogate, its value and its slopes.

``csrc/common/surrogates.h`` is the same maths for C++ and CUDA, with the same names in the same order; a
parity test holds them together. Slopes are *selected* branch by branch, never multiplied by a 0/1 mask: 0 * inf is
NaN.

A new surrogate is one class here (value and slopes) and its value in ``reference.py``; CONTRIBUTING.md
tells how to make it one-pass as well. A class of a user's own is ``register_surrogate``'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .checks import check_number
from .maths import log_ratio_of, times

CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL = 1, 2, 4
"""Flags of a token at which a bound took effect: its slope is 0, or its weight is not its ratio."""


class Point(NamedTuple):
    """What a surrogate is a function of, at every token; all of one shape."""

    log_prob: Tensor
    log_ratio: Tensor
    """To the old policy, pooled as the level says, saturated at the config's limit."""
    ratio: Tensor
    """exp(log_ratio)"""
    advantage: Tensor
    old_log_prob: Tensor
    """Of the token itself, whatever the level; log_prob on-policy."""


class Terms(NamedTuple):
    """A surrogate f at every token."""

    value: Tensor
    slope: Tensor
    """∂f/∂log_ratio: pooled levels spread it over the sequence, and it is 0 where the log-ratio saturates."""
    direct: Tensor
    """∂f/∂log_prob at a fixed ratio, the token's own at every level."""
    flags: Tensor
    """uint8, CLIPPED_* bits."""


class Clipped(NamedTuple):
    """Log-ratios bounded token by token, before they are pooled."""

    log_ratio: Tensor
    free: Tensor | None
    """bool: where the slope passes; None: everywhere."""
    flags: Tensor | None


def _none(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _chosen(condition: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """One of two numbers; torch.where on two of them would round both to fp32."""
    return torch.where(condition, one, torch.full_like(like, other))


def _flags(low: Tensor, high: Tensor, dual: Tensor | bool = False) -> Tensor:
    return (low * CLIPPED_LOW + high * CLIPPED_HIGH + dual * CLIPPED_DUAL).to(torch.uint8)


def _no_flags(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.uint8)


@dataclass(frozen=True)
class Surrogate:
    """An objective's per-token function f(log_prob, ratio, advantage).

    A subclass is a frozen dataclass of its own parameters with the class attributes below and ``terms``; or, if it is
    registered with ``register_surrogate``, with ``value`` and perhaps ``slopes``. At most eight numbers reach a kernel
    (``parameters``).
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    slope_equation: ClassVar[str]
    """∂f/∂ℓ of a token by itself."""
    paper: ClassVar[str]
    found_in: ClassVar[str]
    """Which training systems have it, by their names for it."""
    kernel_id: ClassVar[int | None] = None
    """Its number in csrc/common/surrogates.h; None: no one-pass arm, the two-pass route serves it."""
    uses_ratio: ClassVar[bool] = True
    """False: a function of the log-prob alone, so old log-probs and levels do not concern it."""
    flat_at_zero_advantage: ClassVar[bool] = True
    """Value and slope are 0 where the advantage is 0."""
    takes_rollout: ClassVar[bool] = False
    """Rollout weights are part of its ratio, not factors of its value."""

    def terms(self, t: Point) -> Terms:
        """Value, slopes and flags."""
        raise NotImplementedError(f"{type(self).__name__} has no terms: register it with @register_surrogate.")

    def clip_log_ratios(self, log_ratio: Tensor, advantage: Tensor) -> Clipped:
        """Bounds of a token's own log-ratio, before pooling; most have none."""
        return Clipped(log_ratio, None, None)

    def parameters(self) -> tuple[float, ...]:
        """What a kernel is told: formed in float64, rounded once."""
        return ()

    def written(self) -> str:
        """The equation with this instance's numbers."""
        numbers = ", ".join(f"{f.name} = {getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name))
        return f"{self.equation}, {numbers}" if numbers else self.equation

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) is not None)
        return f"{type(self).__name__}({', '.join(given)})"


def _check(surrogate: Surrogate, name: str, at_least: float = 0.0) -> None:
    check_number(f"{type(surrogate).__name__}({name}=...)", getattr(surrogate, name), at_least=at_least)


def _check_band(surrogate: Surrogate, low: float, high: float) -> None:
    """Bounds 1 - low and 1 + high of a ratio."""
    kind = type(surrogate).__name__
    check_number(f"{kind}(low=...)", low, at_least=0)
    check_number(f"{kind}(high=...)", high, at_least=0)
    if low > 1:
        raise ValueError(f"{kind}(low=...) must be at most 1 (the bound is 1 - low); got {low!r}.")


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
        return Terms(times(-A, t.log_prob), _none(A), -A, _no_flags(A))


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
        return Terms(value, value, _none(value), _no_flags(value))


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
        _check_band(self, self.low, self.high)
        if self.dual is not None and not (math.isfinite(self.dual) and self.dual >= 1 + self.high):
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
        clipped_high = (advantage > 0) & (ratio > high)
        clipped_low = (advantage < 0) & (ratio < low)
        clipped_dual = (advantage < 0) & (ratio > dual)
        inside = times(-advantage, ratio)
        value = torch.where(clipped_high, -advantage * high, inside)
        value = torch.where(clipped_low, -advantage * low, value)
        if self.dual is not None:
            value = torch.where(clipped_dual, -advantage * dual, value)
        slope = torch.where(clipped_high | clipped_low | clipped_dual, 0.0, inside)
        return Terms(value, slope, _none(value), _flags(clipped_low, clipped_high, clipped_dual))


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
            check_number("Cispo(cap=...)", self.cap, above=0)
            return
        if self.low is None or self.high is None:
            raise ValueError(f"Cispo's band needs both low and high (low=1 for no lower bound); got {self!r}.")
        _check_band(self, self.low, self.high)

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
        flags = _flags((t.ratio < low) & acts, (t.ratio > high) & acts)
        return Terms(times(weighted, t.log_prob), _none(weighted), weighted, flags)


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
        check_number("Sapo(tau_pos=...)", self.tau_pos, above=0)
        check_number("Sapo(tau_neg=...)", self.tau_neg, above=0)

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_pos, self.tau_neg)

    def terms(self, t: Point) -> Terms:
        tau = _chosen(t.advantage > 0, self.tau_pos, self.tau_neg, t.ratio)
        x = tau * (t.ratio - 1)
        e = torch.exp(-x.abs())  # of the smaller side: exact where the gate closes
        gate = torch.where(x < 0, e, 1.0) / (1 + e)
        slope = times(4 * e / ((1 + e) * (1 + e)), t.ratio)
        value = -t.advantage * gate * 4 / tau
        return Terms(value, times(-t.advantage, slope), _none(value), _no_flags(value))


@dataclass(frozen=True, repr=False)
class _Dppo(Surrogate):
    """A trust region in probabilities; ``moved_too_far`` is the divergence's own."""

    low: float = 0.2
    high: float = 0.2
    cap: float | None = None

    def __post_init__(self) -> None:
        _check(self, "low")
        _check(self, "high")
        if self.cap is not None:
            check_number(f"{type(self).__name__}(cap=...)", self.cap, above=0)

    def parameters(self) -> tuple[float, ...]:
        return (self.low, self.high, math.inf if self.cap is None else self.cap)

    def moved_too_far(self, t: Point) -> tuple[Tensor, Tensor]:
        """Where the probability fell too far, and where it rose too far."""
        raise NotImplementedError

    def terms(self, t: Point) -> Terms:
        fallen, risen = self.moved_too_far(t)
        low, high = fallen & (t.advantage < 0), risen & (t.advantage > 0)
        kept = ~(low | high)
        if self.cap is None:
            slope = torch.where(kept, times(-t.advantage, t.ratio), 0.0)
            return Terms(slope, slope, _none(slope), _flags(low, high))
        direct = torch.where(kept, -t.ratio.clamp(max=self.cap) * t.advantage, 0.0)
        truncated = kept & (t.ratio > self.cap) & (t.advantage != 0)
        return Terms(times(direct, t.log_prob), _none(direct), direct, _flags(low, high, truncated))


@dataclass(frozen=True, repr=False)
class DppoTV(_Dppo):
    """-M * r * A, M = 0 where the probability moved by more than low or high in the advantage's direction.

    The binary total variation |p - p_old| of the sampled token in the place of the ratio: rare tokens may move,
    frequent ones may not. ``cap`` truncates the ratio, which is then detached: -M * sg(min(r, cap)) * A * log_prob
    (verl; its configuration makes that 3). prime-rl and SkyRL have none.
    Drops the gradient of tokens outside of the region; with a cap, that through the ratio.
    """

    name = "dppo_tv"
    equation = "-M·r·A, M = 0 where A·(p - p_old) > 0 and |p - p_old| > low or high; with cap -M·sg(min(r, cap))·A·ℓ"
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

    1 - p is exact near p = 1 (verl adds 1e-8 to it). Drops what ``DppoTV`` drops.
    """

    name = "dppo_kl"
    equation = "-M·r·A, M = 0 where A·(p - p_old) > 0 and KL(p_old, p) > low or high; with cap -M·sg(min(r, cap))·A·ℓ"
    slope_equation = "-M·min(r, cap)·A"
    paper = "Qi et al. 2026 (DPPO), arXiv:2602.04879"
    found_in = "verl (cap)"
    kernel_id = 6

    def moved_too_far(self, t: Point) -> tuple[Tensor, Tensor]:
        fall = log_ratio_of(t.old_log_prob, t.log_prob)
        others, old_others = -torch.expm1(t.log_prob), -torch.expm1(t.old_log_prob)
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
        check_number("Dro(beta=...)", self.beta, above=0)

    def parameters(self) -> tuple[float, ...]:
        return (self.beta,)

    def terms(self, t: Point) -> Terms:
        pull = self.beta * t.log_ratio
        value = times(-t.advantage, t.log_prob) + pull * t.log_ratio / 2
        return Terms(value, pull, -t.advantage, _no_flags(value))


_VESPO_LOWEST, _VESPO_HIGHEST = math.log(1e-8), 20.0


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
            _check(self, name)
        for name in ("lam_pos", "lam_neg"):
            _check(self, name, at_least=1e-4)

    def terms(self, t: Point) -> Terms:
        log_w = t.log_ratio.clamp(_VESPO_LOWEST, _VESPO_HIGHEST)
        positive = t.advantage >= 0
        k = _chosen(positive, self.k_pos, self.k_neg, log_w)
        lam = _chosen(positive, self.lam_pos, self.lam_neg, log_w)
        weighted = -torch.exp(lam + k * log_w - lam * log_w.exp()) * t.advantage
        return Terms(times(weighted, t.log_prob), _none(weighted), weighted, _no_flags(weighted))


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
        _check(self, "low")
        _check(self, "high")

    def clip_log_ratios(self, log_ratio: Tensor, advantage: Tensor) -> Clipped:
        high = (advantage > 0) & (log_ratio > self.high)
        low = (advantage < 0) & (log_ratio < -self.low)
        bounded = torch.where(high, self.high, torch.where(low, -self.low, log_ratio))
        return Clipped(bounded, ~(low | high), _flags(low, high))

    def terms(self, t: Point) -> Terms:
        value = times(-t.advantage, t.ratio)
        return Terms(value, value, _none(value), _no_flags(value))


BUILT_IN = (Reinforce, Unclipped, Clip, Cispo, Sapo, DppoTV, DppoKL, Dro, Vespo, Gmpo)
SURROGATES: dict[str, type[Surrogate]] = {cls.name: cls for cls in BUILT_IN}
"""Every surrogate by name, registered ones as well; tests, tables and the CLI enumerate it."""
