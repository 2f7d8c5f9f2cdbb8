"""From a loss to what it is: a fold of steps, each of which measures one property with those before it in place."""

from __future__ import annotations

from collections.abc import Callable

from .known import Known, Said, Step
from .penalties import find_entropy, find_kl, find_rollout, find_sampler_kl
from .probe import Probe
from .ratios import find_coupling, find_level, find_missing_exp
from .scoring import find_pairing, find_scored_tokens, find_tokens
from .shapes import find_surrogate
from .teacher import find_divergence
from .weighing import find_weights, find_whitening

STEPS: tuple[Callable[[Probe, Known], Step], ...] = (
    find_scored_tokens,
    find_coupling,
    find_pairing,
    find_missing_exp,
    find_tokens,
    find_whitening,
    find_level,
    find_weights,
    find_surrogate,
    find_sampler_kl,
    find_kl,
    find_divergence,
    find_entropy,
    find_rollout,
)
LAST = {
    "bent_logits", "missing_exp", "other_tokens", "early_stop", "coupled_ratios", "level_unknown",
    "advantages_not_linear", "advantages_scaled",
}  # fmt: skip
"""What is wrong in a way that leaves nothing to measure behind it."""


def learn(probe: Probe, known: Known) -> tuple[Known, list[Said], bool]:
    """Return what was found, what there is to say, and whether every step was taken."""
    says: list[Said] = []
    for step in STEPS:
        known, found = step(probe, known)
        says += found
        if any(one.key in LAST for one in found):
            return known, says, False
    return known, says, True
