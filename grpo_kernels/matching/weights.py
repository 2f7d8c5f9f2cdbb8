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

DENOMINATORS: dict[str, dict[str, Counts]] = {
    "token": {
        "tokens": lambda live: float(live.sum()),
        "sequences": lambda live: float(live.shape[0]),
        "num_items": lambda live: ITEMS_FACTOR * float(live.sum()),
        "positions": lambda live: float(live.numel()),
        "sequences with tokens": lambda live: float(live.any(-1).sum()),
        "nothing": lambda live: 1.0,
    },
    "sequence": {
        "sequences": lambda live: float(live.shape[0]),
        "sequences with tokens": lambda live: float(live.any(-1).sum()),
        "nothing": lambda live: 1.0,
    },
}
"""By what a pattern is divided; the mask is that of the loss."""


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
    weights, live, _ = measure(batches[0])
    best: tuple[float, str, int | None] = (math.inf, "token", None)
    for (name, size), pattern in patterns(live).items():
        shares = weights[live] / pattern[live]
        spread = float((shares - shares.mean()).abs().max() / shares.abs().mean().clamp(min=1e-300))
        if spread < best[0] * 0.999 - tolerance:  # the first of equals
            best = (spread, name, size)
    spread, name, size = best
    scales: list[float] = []
    counted: list[Tensor] = []
    for batch in batches:
        try:
            weights, live, counts = measure(batch)
        except Exception:  # a loss may insist on its first batch's sizes
            continue
        mine = patterns(live).get((name, size))
        if mine is not None and bool(live.any()):
            scales.append(float((weights[live] / mine[live]).mean()))
            counted.append(counts)
    chosen, factor = _denominator(denominators(name, size), scales, counted)
    return Weights(name, size, chosen, factor, spread)


def _denominator(choices: dict[str, Counts], scales: list[float], counted: list[Tensor]) -> tuple[str, float]:
    """That whose factor varies least over the batches; of equals, the one with the plainest factor."""
    ranked = []
    for place, (name, count) in enumerate(choices.items()):
        factors = torch.tensor([s * count(live) for s, live in zip(scales, counted, strict=True)], dtype=torch.float64)
        spread = float((factors.max() - factors.min()) / factors.abs().mean().clamp(min=1e-300))
        ranked.append((round(spread, 3), plainness(float(factors[0])), place, name, float(factors[0])))
    *_, name, factor = min(ranked)
    return name, factor


def plainness(factor: float) -> int:
    """0: one; 1: one over an integer; 2: anything else."""
    if off_plain(factor) > 1e-3:
        return 2
    return 0 if abs(abs(factor) - 1) < 1e-3 else 1


def off_plain(factor: float) -> float:
    """Relative distance from the nearest one over an integer."""
    inverse = 1 / abs(factor) if factor else math.inf
    return abs(inverse / max(1, round(inverse)) - 1) if inverse < 1e6 else math.inf
