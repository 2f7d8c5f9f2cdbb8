"""The per-token maths of the loss, once for Python: surrogates, KL estimators, their values and slopes.

``csrc/common/surrogates.h`` is the same maths for C++ and CUDA, with the same names in the same order; a
parity test holds them together. Slopes are derivatives with respect to the log-prob (or the pooled
log-ratio). They are *selected* branch by branch, never multiplied by a 0/1 mask: 0 * inf is NaN.

A new surrogate is one class here (value and slope) and its value in ``reference.py``; CONTRIBUTING.md
tells how to make it one-pass as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import KL

CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL = 1, 2, 4
"""Flags of a token whose policy slope is 0 because it was clipped."""

ESTIMATORS = ("k1", "k2", "k3")


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b where a factor that is exactly zero wins over an infinite one (NaN stays NaN)."""
    zero = ((a == 0) & ~b.isnan()) | ((b == 0) & ~a.isnan())
    return torch.where(zero, 0.0, a * b)


def log_ratio_of(a: Tensor, b: Tensor) -> Tensor:
    """a - b; equal log-probs differ by exactly zero, also where both are -inf."""
    return torch.where(a == b, 0.0, a - b)


def within(x: Tensor, limit: float | None) -> Tensor:
    """Where x lies inside [-limit, limit], bounds included; NaN counts as inside."""
    return torch.ones_like(x, dtype=torch.bool) if limit is None else ~(x.abs() > limit)


def clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def k3_of(u: Tensor) -> Tensor:
    """exp(u) - u - 1 without cancellation: u^2/2 (1 + u/3 (1 + u/4 (...))) near zero."""
    near = u.abs() < 1
    v = torch.where(near, u, 0.0)
    total = torch.ones_like(v)
    for k in range((18 if u.dtype == torch.float64 else 11) + 2, 2, -1):
        total = 1 + v / k * total
    far = torch.where(u == math.inf, u, torch.expm1(u) - u)
    return torch.where(near, v * v / 2 * total, far)


class Terms(NamedTuple):
    """A surrogate at every token."""

    value: Tensor
    slope: Tensor
    flags: Tensor
    """uint8, CLIPPED_* bits."""


def _no_flags(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.uint8)


@dataclass(frozen=True)
class Surrogate:
    """An objective's per-token function f(log_prob, ratio, advantage).

    A subclass is a frozen dataclass of its own parameters with the class attributes below and
    ``terms``. At most eight numbers reach a kernel (``parameters``).
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str]
    kernel_id: ClassVar[int | None] = None
    """Its number in csrc/common/surrogates.h; None: no one-pass arm, the two-pass route serves it."""
    uses_ratio: ClassVar[bool] = True
    """False: a function of the log-prob alone, so old log-probs and levels do not concern it."""
    flat_at_zero_advantage: ClassVar[bool] = True
    """Value and slope are 0 where the advantage is 0."""

    def terms(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Terms:
        """Value, slope and flags; all tensors of one shape."""
        raise NotImplementedError

    def parameters(self) -> tuple[float, ...]:
        """What a kernel is told: formed in float64, rounded once."""
        return ()

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) is not None)
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Reinforce(Surrogate):
    """-A * log_prob: the plain policy gradient. Its value is no estimate of anything; its slope is -A."""

    name = "reinforce"
    equation = "-A·ℓ"
    paper = "Williams 1992, Simple statistical gradient-following algorithms"
    kernel_id = 0
    uses_ratio = False

    def terms(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Terms:
        return Terms(times(-advantage, log_prob), -advantage, _no_flags(ratio))


@dataclass(frozen=True, repr=False)
class Unclipped(Surrogate):
    """-r * A: importance sampling without a bound. On-policy it is the policy gradient, pi/sg(pi) * A."""

    name = "unclipped"
    equation = "-r·A"
    paper = "Schulman et al. 2017, arXiv:1707.06347, L^CPI"
    kernel_id = 1

    def terms(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Terms:
        value = times(-advantage, ratio)
        return Terms(value, value, _no_flags(ratio))


@dataclass(frozen=True, repr=False)
class Clip(Surrogate):
    """-min(min(r, dual) * A, clip(r, 1-low, 1+high) * A): PPO's clip, asymmetric and dual if asked.

    ``dual`` bounds the loss of tokens with a negative advantage whose ratio exploded; it must be at least
    1 + high (TRL's ``delta``, verl's ``clip_ratio_c``). The gradient is that of r * A at the bounds themselves.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    name = "clip"
    equation = "-min(min(r, dual)·A, clip(r, 1-low, 1+high)·A)"
    paper = "Schulman et al. 2017, arXiv:1707.06347; dual: Ye et al. 2020, arXiv:1912.09729"
    kernel_id = 2

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"Clip({name}=...) must be a finite number >= 0; got {value!r}.")
        if self.low > 1:
            raise ValueError(f"Clip(low=...) must be at most 1 (the bound is 1 - low); got {self.low!r}.")
        if self.dual is not None and not (math.isfinite(self.dual) and self.dual >= 1 + self.high):
            raise ValueError(
                f"Clip(dual=...) must be finite and at least 1 + high = {1 + self.high:g}, where it only bounds "
                f"negative advantages; got {self.dual!r}."
            )

    def parameters(self) -> tuple[float, ...]:
        return (1 - self.low, 1 + self.high, math.inf if self.dual is None else self.dual)

    def terms(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Terms:
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
        flags = clipped_low * CLIPPED_LOW + clipped_high * CLIPPED_HIGH + clipped_dual * CLIPPED_DUAL
        return Terms(value, slope, flags.to(torch.uint8))


SURROGATES: dict[str, type[Surrogate]] = {cls.name: cls for cls in (Reinforce, Unclipped, Clip)}
"""Every surrogate by name; tests, tables and the CLI enumerate it."""


class KLTerms(NamedTuple):
    value: Tensor
    slope: Tensor
    slope_with_ratio: Tensor
    """Slope of value * exp(log_prob - const), divided by that ratio."""


def kl_terms(kl: KL, difference: Tensor) -> KLTerms:
    """One KL estimator of ``difference`` = log_prob - ref, with its clamps; Schulman 2020, "Approximating KL"."""
    input_limit, output_limit = kl.limit
    inside = within(difference, input_limit)
    x = clamp(difference, input_limit)
    value, slope, slope_with_ratio = _estimate(kl.estimator, x)
    free = inside & within(value, output_limit)
    value = clamp(value, output_limit)
    slope = torch.where(free, slope, 0.0)
    slope_with_ratio = torch.where(free, slope_with_ratio, value)
    if kl.gradient == "straight_through_k2":
        slope = torch.where(inside, x, 0.0)
    return KLTerms(value, slope, slope_with_ratio)


def _estimate(estimator: str, x: Tensor) -> KLTerms:
    if estimator == "k1":
        return KLTerms(x, torch.ones_like(x), 1 + x)
    if estimator == "k2":
        return KLTerms(x * x / 2, x, x + x * x / 2)
    return KLTerms(k3_of(-x), -torch.expm1(-x), x)  # k3 + its slope is x, exactly
