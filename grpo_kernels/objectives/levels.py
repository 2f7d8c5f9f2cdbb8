"""Levels: how log-ratios are pooled into the ratio of a loss, and how the slope of that ratio gets back to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .compiler import computed_once

LevelName = Literal["token", "sequence", "sequence_token", "sequence_product", "prefix_product", "prefix_min"]
Share = Literal["own", "mean", "sum", "sum_before", "least_before", "sum_behind", "sum_of_least"]
"""Which of a sequence's values come to a token: its own; the mean or the sum of all; of running levels the sum, or the
least (of equal ones the last), of those up to it, the sum of those from it on, the sum of those of the tokens whose
least is its own."""


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
    def running(self) -> bool:
        """Whether a token's ratio is that of the tokens up to it: of each token another, which metrics count."""
        return self.pooled in ("sum_before", "least_before")

    @computed_once
    def spreads(self) -> bool:
        """Whether a token's slope needs those of the other tokens."""
        return self.spread != "own"


_LEVELS = (
    Level("token", "own", "own", "r = exp(ℓ - old)"),
    Level("sequence", "mean", "mean", "r = exp(mean_t(ℓ - old))"),  # GSPO
    Level("sequence_token", "mean", "own", "r = exp(sg(mean_t(ℓ - old)) + ℓ - sg(ℓ))"),  # GSPO-token
    Level("sequence_product", "sum", "sum", "r = exp(Σ_t(ℓ - old))"),  # π(y)/π_old(y)
    # The weight of a decision and all before it: Precup, Sutton, Singh 2000.
    Level("prefix_product", "sum_before", "sum_behind", "r = exp(Σ_{s≤t}(ℓ_s - old_s))"),
    # Lei et al. 2026 (MinPRO), arXiv:2601.22718: the least ratio of a prefix in the place of their product.
    Level("prefix_min", "least_before", "sum_of_least", "r = exp(min_{s≤t}(ℓ_s - old_s))"),
)
LEVELS: Mapping[str, Level] = MappingProxyType({level.name: level for level in _LEVELS})
"""Levels by name, of the policy term and of the KL's ratio."""
