"""The objectives of TRL and Liger, which name and parametrise them alike, as a ``LossConfig``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives.config import LossConfig
from ..objectives.kl import KL
from ..objectives.rollout import FOLDED, TruncatedIS
from ..objectives.settings import check_name
from ..objectives.surrogates import Cispo, Clip, Sapo, Surrogate, Vespo

AGGREGATIONS = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "luspo": "sequence_sum",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
    "vespo": "token_mean",
}
"""Of each ``loss_type``."""
OVER_ITEMS = ("dapo", "cispo", "vespo")
"""Whose denominator is ``num_items_in_batch``."""
UNBOUNDED = ("cispo", "sapo", "vespo")
"""Which have no band and no delta."""
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Objective:
    """An objective in their words; ``vespo`` is (k_pos, lambda_pos, k_neg, lambda_neg), ``sapo`` (pos, neg)."""

    loss_type: str
    level: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    bias_correction: bool
    constant_length: int | None
    sapo: tuple[float, float]
    vespo: tuple[float, float, float, float]

    def config(self, correct_rollout: bool = False) -> LossConfig:
        """Return our config for it. Neither package clamps log-ratios or the KL, so no limit is set. An entropy bonus
        is a mean over tokens.

        Args:
            correct_rollout: rollout weights are part of the ratio, as VESPO's are: ``sampler_log_probs`` brings them.
        """
        check_name("loss_type", self.loss_type, AGGREGATIONS)
        check_name("importance_sampling_level", self.level, LEVELS)
        vespo = self.loss_type == "vespo"
        return LossConfig(
            self._surrogate(),
            level="sequence_product" if vespo else self.level,  # type: ignore[arg-type]
            aggregation=AGGREGATIONS[self.loss_type],  # type: ignore[arg-type]
            kl=KL(self.beta, ratio_weighted=self.bias_correction, limit=(None, None), level=self.level),
            rollout=TruncatedIS(high=math.inf) if correct_rollout else (),
            entropy_aggregation="token_mean",
            log_ratio_limit=None,
            constant_length=self.constant_length if self.loss_type == "dr_grpo" else None,
        )

    def _surrogate(self) -> Surrogate:
        if self.loss_type == "cispo":
            return Cispo(cap=self.epsilon_high)
        if self.loss_type == "sapo":
            return Sapo(*self.sapo)
        if self.loss_type == "vespo":
            k_pos, lam_pos, k_neg, lam_neg = self.vespo
            return Vespo(k_pos, max(lam_pos, 1e-4), k_neg, max(lam_neg, 1e-4))
        return _clip(self.epsilon_low, self.epsilon_high, self.delta)


def _clip(low: float, high: float, delta: float | None) -> Clip:
    """Return the clip that both mean: they bound the ratio of the unclipped branch by delta, whatever the advantage's
    sign. Below 1 + high that lowers the upper bound of positive advantages, and leaves negative ones to the clipped
    branch, bounded at 1 + high."""
    low = min(low, 1.0)  # ratios are positive
    delta = None if delta == math.inf else delta
    if delta is None or delta >= 1 + high:
        return Clip(low, high, dual=delta)
    if delta < 1:
        raise ValueError(f"delta must be at least 1: below it on-policy tokens are bounded as well; got {delta!r}.")
    return Clip(low, delta - 1, dual=1 + high)


def sampler_log_probs(old: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Return log-probs (B, T) of a sampler whose ratios to ``old`` are these weights: (B, T), or (B, 1) spread
    evenly."""
    old = old.to(torch.promote_types(old.dtype, torch.float32))  # bf16 log-probs would round the weights away
    log_weights = weights.to(old).log().clamp(*FOLDED)
    if weights.shape[1] == 1:
        log_weights = log_weights / (mask != 0).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask != 0, old - log_weights, 0.0)
