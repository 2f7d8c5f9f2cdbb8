"""The penalties towards the reference policy and towards the sampler: their options, value and slope.

The per-token maths is twinned in ``csrc/common/surrogates.h`` and ``backends/triton/surrogates.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import names
from .checks import check_flag
from .levels import LEVELS
from .maths import beyond, clamp, k3_of, sign_of, times
from .settings import no_subclass, read_limit, settle_name, settle_number

ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("pathwise", "straight_through_k2", "weighted_k2", "score_function")


@dataclass(frozen=True)
class KL:
    """A penalty on the divergence from the reference policy, with x = log_prob - ref_log_prob; as ``rollout_kl=`` from
    the sampler, with the rollout log-prob in its place, and ``rollout_kl_coef=`` of a call.

    Args:
        coef: its factor in the loss, a finite number; 0, the default, leaves the term out. Can be given per call
            (``kl_coef=``) instead.
        estimator: "k1" x, "k2" x²/2, "k3" exp(-x) + x - 1 (Schulman 2020, "Approximating KL divergence"), "abs" |x|.
        gradient: the value is the estimator's in any case; its slope is

            - "pathwise": that of the estimator;
            - "straight_through_k2": x, that of the KL itself on-policy (verl's ``k1+``, ``k3+``);
            - "weighted_k2": min(r, ratio_cap)·x, that of the KL on samples of the old policy, r the detached ratio
              (OpenRLHF's ``unbiased_gradient``);
            - "score_function": estimator + its slope, that of k·exp(ℓ - sg(ℓ)) (NeMo-RL's default, which has slope 0
              beyond its clamps: with ``limit`` they differ there).
        ratio_weighted: multiply by the (differentiable) ratio to the old policy, as TRL's
            ``use_bias_correction_kl`` and DeepSeek-V3.2 do; needs "pathwise". On-policy it changes the
            gradient of k3 from 1 - exp(-x) to x, not the value.
        limit: (input, output) clamps, each > 0, in nats: x to ±input before the estimator, its value to ±output after;
            the pathwise slope is 0 where a clamp bites, those through k2 where the input's does, that of the score
            function keeps the value. None: no clamp. verl uses (20, 10), TRL none; the default has verl's first alone.
        ratio_cap: the largest weight min(r, ratio_cap) of "weighted_k2", > 0 (OpenRLHF: 10).
        level: how log-ratios are pooled into the ratio that weighs the KL; None: as those of the policy term. Without a
            ratio (``ratio_weighted``, "weighted_k2") it has no effect.
    """

    coef: float = 0.0
    estimator: str = "k3"
    gradient: str = "pathwise"
    ratio_weighted: bool = False
    limit: tuple[float | None, float | None] = (20.0, None)
    ratio_cap: float = 10.0
    level: str | None = None

    def __init_subclass__(cls) -> None:
        no_subclass(cls, KL)

    def __post_init__(self) -> None:
        settle_number(self, "coef", "KL(coef=...)")
        settle_name(self, "estimator", "KL(estimator=...)", ESTIMATORS, names.ESTIMATORS)
        settle_name(self, "gradient", "KL(gradient=...)", GRADIENTS)
        if not (isinstance(self.limit, tuple) and len(self.limit) == 2):
            raise ValueError(f"KL(limit=...) must be a pair (input, output) of limits; got {self.limit!r}.")
        pairs = zip(("input", "output"), self.limit, strict=True)
        limits = tuple(read_limit(f"KL(limit=...): the {name} limit", value) for name, value in pairs)
        object.__setattr__(self, "limit", limits)
        settle_number(self, "ratio_cap", "KL(ratio_cap=...)", above=0, infinite=True)
        if self.level is not None:
            settle_name(self, "level", "KL(level=...)", LEVELS)
        check_flag("KL", "ratio_weighted", self.ratio_weighted)
        object.__setattr__(self, "ratio_weighted", bool(self.ratio_weighted))
        if self.ratio_weighted and self.gradient != "pathwise":
            raise ValueError(
                'KL(ratio_weighted=True) needs gradient="pathwise": the ratio carries gradient itself. With a detached '
                'ratio, the gradient is "weighted_k2".'
            )

    def written(self, other: str = "ref") -> str:
        """Return the penalty of a token as maths; ``other`` is what the policy is compared with."""
        at = "" if self.level is None else f" at level {self.level}"
        ratio = f"r{at}·" if self.ratio_weighted else ""
        slope = "" if self.gradient == "pathwise" else f" [slope: {self.gradient}]"
        return f"{ratio}{self.estimator}(ℓ - {other}){slope}"

    def level_beside(self, policy: str) -> str:
        """Return the level of the KL's ratio beside a policy term of level ``policy``, which it is without one."""
        uses_ratio = self.ratio_weighted or self.gradient == "weighted_k2"
        return policy if self.level is None or not uses_ratio else self.level


class KLTerms(NamedTuple):
    """A KL estimator of x = log_prob - ref at every token, and its slopes in x."""

    value: Tensor
    slope: Tensor
    slope_with_ratio: Tensor
    """The slope of value * exp(log_prob - const), divided by that ratio."""


def kl_terms(kl: KL, difference: Tensor, ratio: Tensor) -> KLTerms:
    """Return the KL estimator of ``difference`` = log_prob - ref, with its clamps; ``ratio`` is to the old policy."""
    input_limit, output_limit = kl.limit
    outside = beyond(difference, input_limit)
    x = clamp(difference, input_limit)
    value, slope, slope_with_ratio = _estimate(kl.estimator, x)
    bounded = outside | beyond(value, output_limit)
    value = clamp(value, output_limit)
    slope = slope.masked_fill(bounded, 0.0)
    slope_with_ratio = torch.where(bounded, value, slope_with_ratio)
    if kl.gradient == "straight_through_k2":
        slope = x.masked_fill(outside, 0.0)
    elif kl.gradient == "weighted_k2":
        slope = times(ratio.clamp(max=kl.ratio_cap), x).masked_fill_(outside, 0.0)
    elif kl.gradient == "score_function":
        slope = slope_with_ratio
    return KLTerms(value, slope, slope_with_ratio)


def _estimate(estimator: str, x: Tensor) -> KLTerms:
    if estimator == "k1":
        return KLTerms(x, torch.ones_like(x), 1 + x)
    if estimator == "k2":
        return KLTerms(x * x / 2, x, x + x * x / 2)
    if estimator == "abs":
        sign = sign_of(x)
        return KLTerms(x.abs(), sign, sign + x.abs())
    return KLTerms(k3_of(-x), -torch.expm1(-x), x)  # k3 + its slope is x, exactly
