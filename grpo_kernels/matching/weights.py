"""Which weight a loss gives each token: the pattern over tokens, and the denominator behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .call import ITEMS_FACTOR

Counts = Callable[[Tensor], float]

SEQUENCES: dict[str, Counts] = {
    "sequences": lambda live: float(live.shape[0]),
    "sequences with tokens": lambda live: float(live.any(-1).sum()),
    "nothing": lambda live: 1.0,
}
TOKENS: dict[str, Counts] = {
    "tokens": lambda live: float(live.sum()),
    "sequences": SEQUENCES["sequences"],
    "num_items": lambda live: ITEMS_FACTOR * float(live.sum()),
    "positions": lambda live: float(live.numel()),
    "sequences with tokens": SEQUENCES["sequences with tokens"],
    "nothing": SEQUENCES["nothing"],
}
DENOMINATORS = {"token": TOKENS, "sequence": SEQUENCES}
"""By what a pattern is divided, the likeliest first; the mask is that of the loss."""


@dataclass(frozen=True)
class Weights:
    """w = factor / denominator · pattern."""

    pattern: str
    """"token" (1 each), "sequence" (1 over the tokens of the sequence), "group" (… of the group)."""
    group_size: int | None
    denominator: str
    factor: float
    spread: float
    """Largest relative distance of a token from the pattern; above the tolerance, nothing fits."""
    apart: float
    """How far the factors of different batches are from each other: whether the denominator is that."""


def patterns(live: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """Every pattern, (B, T), 0 at masked tokens."""
    ones = live.double()
    lengths = ones.sum(-1, keepdim=True).clamp(min=1)
    found: dict[tuple[str, int | None], Tensor] = {("token", None): ones, ("sequence", None): ones / lengths}
    B = live.shape[0]
    for size in range(2, B):
        if B % size == 0:
            groups = ones.view(B // size, size, -1).sum((1, 2)).clamp(min=1)
            found["group", size] = ones / groups.repeat_interleave(size)[:, None]
    return found


def denominators(pattern: str, group_size: int | None) -> dict[str, Counts]:
    if pattern != "group":
        return DENOMINATORS[pattern]
    assert group_size is not None
    size = group_size
    return {"groups": lambda live: live.shape[0] / size, "nothing": lambda live: 1.0}


Measured = tuple[Tensor, Tensor, Tensor]
"""(B, T): weights, which tokens have one, and which of them denominators count (bool)."""


def fit_weights(measure: Callable[[Batch], Measured], batches: list[Batch], tolerance: float) -> Weights:
    """The pattern and denominator of weights that ``measure`` gives.

    Args:
        measure: the weights of a batch, and what the loss's denominators count.
        batches: the first decides about the pattern; a denominator must explain all of them.
    """
    measured = []
    for batch in batches:
        try:
            measured.append(measure(batch))
        except Exception:  # a loss may insist on its first batch's sizes
            if batch is batches[0]:
                raise
    spreads = {key: _spread(key, measured) for key in patterns(measured[0][1])}
    name, size = min(spreads, key=lambda key: round(spreads[key] / max(tolerance, 1e-12)))  # the first of equals
    factors = {
        denominator: torch.tensor(_scales((name, size), measured, count), dtype=torch.float64)
        for denominator, count in denominators(name, size).items()
    }
    apart = {key: float((f.max() - f.min()) / f.abs().mean().clamp(min=1e-300)) for key, f in factors.items()}
    order = list(factors)
    chosen = min(order, key=lambda d: (round(apart[d], 3), plainness(float(factors[d][0])), order.index(d)))
    return Weights(name, size, chosen, float(factors[chosen][0]), spreads[name, size], apart[chosen])


def _shares(key: tuple[str, int | None], measured: Measured) -> Tensor | None:
    """Weights over the pattern at the tokens that have one; None where the batch cannot have this pattern."""
    weights, live, _ = measured
    pattern = patterns(live).get(key)
    return None if pattern is None or not bool(live.any()) else weights[live] / pattern[live]


def _spread(key: tuple[str, int | None], measured: list[Measured]) -> float:
    """Largest relative distance of a token's share from the mean of its batch."""
    found = [shares for m in measured if (shares := _shares(key, m)) is not None]
    return max(float((s - s.mean()).abs().max() / s.abs().mean().clamp(min=1e-300)) for s in found)


def _scales(key: tuple[str, int | None], measured: list[Measured], count: Counts) -> list[float]:
    """The factor of each batch with this denominator."""
    found = [(shares, m[2]) for m in measured if (shares := _shares(key, m)) is not None]
    return [float(shares.mean()) * count(counted) for shares, counted in found]


def plainness(factor: float) -> int:
    """0: one; 1: one over an integer; 2: anything else."""
    if off_plain(factor) > 1e-3:
        return 2
    return 0 if abs(abs(factor) - 1) < 1e-3 else 1


def off_plain(factor: float) -> float:
    """Relative distance from the nearest one over an integer."""
    inverse = 1 / abs(factor) if factor else math.inf
    return abs(inverse / max(1, round(inverse)) - 1) if inverse < 1e6 else math.inf
