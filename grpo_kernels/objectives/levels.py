"""Levels: how log-ratios are pooled into the ratio of a loss, and how the slope of that ratio gets back to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .compiler import computed_once

LevelName = Literal["token", "sequence", "sequence_token", "sequence_product"]
Share = Literal["own", "mean", "sum"]
"""A token's own value, or the mean or the sum of its sequence's."""


@dataclass(frozen=True)
class Level:
    """A way to pool log-ratios; a config names it, ``LEVELS`` has it."""

    name: LevelName
    pooled: Share
    """The log-ratio that stands for each token."""
    spread: Share
    """The slope that each token's own log-prob gets, of the slopes in those log-ratios."""
    equation: str

    @computed_once
    def pools(self) -> bool:
        """Whether a token's ratio needs the other tokens of its sequence."""
        return self.pooled != "own"

    @computed_once
    def spreads(self) -> bool:
        """Whether a token's slope needs those of the other tokens."""
        return self.spread != "own"


_LEVELS = (
    Level("token", "own", "own", "r = exp(ℓ - old)"),
    Level("sequence", "mean", "mean", "r = exp(mean_t(ℓ - old))"),  # GSPO
    Level("sequence_token", "mean", "own", "r = exp(sg(mean_t(ℓ - old)) + ℓ - sg(ℓ))"),  # GSPO-token
    Level("sequence_product", "sum", "sum", "r = exp(Σ_t(ℓ - old))"),  # π(y)/π_old(y)
)
LEVELS: Mapping[str, Level] = MappingProxyType({level.name: level for level in _LEVELS})
"""Levels by name, of the policy term and of the KL's ratio."""
