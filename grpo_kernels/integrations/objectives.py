"""The objectives of TRL and Liger, which name and parametrise them alike, as a ``LossConfig``."""

from __future__ import annotations

import math

from ..config import KL, LossConfig, check_name
from ..surrogates import Clip

AGGREGATIONS = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "luspo": "sequence_sum",
}
"""Of each ``loss_type`` that the fused loss has."""
LEVELS = ("token", "sequence")


def objective(
    loss_type: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    bias_correction: bool,
    constant_length: int | None,
) -> LossConfig:
    """Neither package clamps log-ratios or the KL, so no limit is set. An entropy bonus is a mean over tokens."""
    check_name("loss_type", loss_type, AGGREGATIONS)
    check_name("importance_sampling_level", level, LEVELS)
    return LossConfig(
        _clip(epsilon_low, epsilon_high, delta),
        level=level,  # type: ignore[arg-type]
        aggregation=AGGREGATIONS[loss_type],  # type: ignore[arg-type]
        kl=KL(beta, ratio_weighted=bias_correction, limit=(None, None)),
        entropy_aggregation="token_mean",
        log_ratio_limit=None,
        constant_length=constant_length if loss_type == "dr_grpo" else None,
    )


def _clip(low: float, high: float, delta: float | None) -> Clip:
    """Both bound the ratio of the unclipped branch by delta, whatever the advantage's sign: below 1 + high that lowers
    the upper bound of positive advantages, and leaves negative ones to the clipped branch, bounded at 1 + high."""
    low = min(low, 1.0)  # ratios are positive
    delta = None if delta == math.inf else delta
    if delta is None or delta >= 1 + high:
        return Clip(low, high, dual=delta)
    if delta < 1:
        raise ValueError(f"delta must be at least 1: below it on-policy tokens are bounded as well; got {delta!r}.")
    return Clip(low, delta - 1, dual=1 + high)
