"""What the policy losses of verl, OpenRLHF and SkyRL have in common: they are given log-probs, bound ratios by the same
options, and count the tokens that a bound took effect on."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..objectives.surrogates import Clip


class Step(NamedTuple):
    """What metrics are made of: (B, T), 0 where a token is not live."""

    log_prob: Tensor
    old: Tensor
    log_ratio: Tensor
    """Saturated where the system's is."""
    advantages: Tensor
    live: Tensor

    def outside(self, log_ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Return where PPO's clip took effect: below 1 - low with A < 0, and above 1 + high with A > 0."""
        ratio = log_ratio.exp()
        return (self.advantages < 0) & (ratio < 1 - low), (self.advantages > 0) & (ratio > 1 + high)


def sequence_means(values: Tensor, live: Tensor) -> Tensor:
    """Return each sequence's mean of values (B, T), 0 where a token is not live, on every token."""
    return (values.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)).expand_as(values)


def token_mean(values: Tensor, live: Tensor) -> Tensor:
    """Return the mean of values (B, T) over live tokens, 0 where there is none."""
    return torch.where(live, values, 0).sum(dtype=torch.float64) / live.sum().clamp(min=1)


def clip_of(system: str, low: float, high: float, dual: float | None, option: str) -> Clip:
    """Return PPO's clip by a system's numbers; ``option`` is its name for ``dual``."""
    if dual is not None and dual < 1 + high:
        refuse(system, f"{option}={dual!r} with an upper bound of 1 + {high!r}", f"{option} of at least that")
    return Clip(min(low, 1.0), high, dual=dual)  # ratios are positive: a low above 1 bounds nothing


def refuse(system: str, option: str, supported: str) -> NoReturn:
    """Raise for an option of a system's that its losses have here no counterpart for."""
    raise ValueError(
        f"{system}: the policy losses of grpo_kernels do not have {option}; supported: {supported}. "
        f"patch_{system.lower()}(losses=False) keeps {system}'s own."
    )
