"""Which weight a loss gives each token: the pattern over tokens, and the denominator behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .call import ITEMS_FACTOR


class Measured(NamedTuple):
    """Weights of one batch, (B, T), with the tokens that have one, those that count, and those of the mask."""

    weights: Tensor
    live: Tensor
    counted: Tensor
    mask: Tensor


Count = Callable[[Tensor, Tensor], float]
"""Takes the tokens that count and the mask."""


class Denominator(NamedTuple):
    """What a sum over tokens or sequences is divided by."""

    of: Count
    normalizer: str | None = None
    """What to give as ``normalizer=``; None: the aggregation divides by it already."""


TOKENS: dict[str, Denominator] = {
    "tokens": Denominator(lambda counted, mask: float(counted.sum())),
    "tokens of the mask": Denominator(lambda counted, mask: float(mask.sum()), "mask.sum()"),
    "sequences": Denominator(lambda counted, mask: float(mask.shape[0])),
    "num_items": Denominator(lambda counted, mask: ITEMS_FACTOR * float(mask.sum()), "num_items_in_batch"),
    "positions": Denominator(lambda counted, mask: float(mask.numel()), "mask.numel()"),
    "sequences with tokens": Denominator(lambda counted, mask: float(mask.any(-1).sum()), "mask.any(-1).sum()"),
    "nothing": Denominator(lambda counted, mask: 1.0, "1.0"),
}
SEQUENCES = {name: TOKENS[name] for name in ("sequences", "sequences with tokens", "nothing")}
"""By what a pattern is divided, the likeliest first."""


@dataclass(frozen=True)
class Weights:
    """w = factor / denominator · pattern."""

    pattern: str
    """"token" (1 each), "sequence" (1 over the tokens of the sequence), "group" (... of the group)."""
    group_size: int | None
    denominator: str
    factor: float
    spread: float
    """Largest relative distance of a token from the pattern; above what counts as close, nothing fits."""
    apart: float
    """How far the factors of different batches are from each other: whether the denominator is that."""

    def normalizer(self) -> Denominator:
        return denominators(self.pattern, self.group_size)[self.denominator]


def patterns(live: Tensor, counted: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """Return every pattern, (B, T), 0 where a token is not live; lengths are of the tokens that count."""
    ones, B = live.double(), live.shape[0]
    lengths = counted.sum(-1).double().clamp(min=1)
    found: dict[tuple[str, int | None], Tensor] = {("token", None): ones, ("sequence", None): ones / lengths[:, None]}
    for size in (size for size in range(2, B) if B % size == 0):
        tokens = counted.view(B // size, -1).sum(-1).double().clamp(min=1)
        found["group", size] = ones / tokens.repeat_interleave(size)[:, None]
    return found


def denominators(pattern: str, group_size: int | None) -> dict[str, Denominator]:
    if pattern == "group":
        assert group_size is not None
        size = group_size
        groups = Denominator(lambda counted, mask: mask.shape[0] / size)
        return {"groups": groups, "nothing": TOKENS["nothing"]}
    return TOKENS if pattern == "token" else SEQUENCES


def on_batches(measure: Callable[[Batch], Measured], batches: list[Batch]) -> list[Measured]:
    """Return the weights of every batch that the loss takes; it may insist on its first one's sizes."""
    return [measure(batches[0]), *_taken(measure, batches[1:])]


def _taken(measure: Callable[[Batch], Measured], batches: list[Batch]) -> Iterator[Measured]:
    for batch in batches:
        try:
            yield measure(batch)
        except Exception:  # whatever the loss raises about sizes that are not its own
            continue


def fit_weights(measured: list[Measured], same: float) -> Weights:
    """Return the pattern and denominator of measured weights.

    Args:
        measured: the first decides which patterns there are; a denominator must explain all of them.
        same: relative differences that count as none; of equal fits the first wins.
    """
    spreads = {key: _spread(key, measured) for key in patterns(measured[0].live, measured[0].counted)}
    name, size = min(spreads, key=lambda key: round(spreads[key] / same))
    counts = denominators(name, size)
    factors = {
        key: torch.tensor(list(_factors((name, size), measured, d.of)), dtype=torch.float64)
        for key, d in counts.items()
    }
    apart = {key: float((f.max() - f.min()) / f.abs().mean().clamp(min=1e-300)) for key, f in factors.items()}
    order = list(factors)
    chosen = min(order, key=lambda d: (round(apart[d], 3), plainness(float(factors[d][0])), order.index(d)))
    return Weights(name, size, chosen, float(factors[chosen][0]), spreads[name, size], apart[chosen])


def _shares(key: tuple[str, int | None], measured: list[Measured]) -> Iterator[tuple[Tensor, Measured]]:
    """Yield weights over the pattern at live tokens, of each batch that can have this pattern."""
    for m in measured:
        pattern = patterns(m.live, m.counted).get(key)
        if pattern is not None and bool(m.live.any()):
            yield m.weights[m.live] / pattern[m.live], m


def _spread(key: tuple[str, int | None], measured: list[Measured]) -> float:
    """Return the largest relative distance of a token's share from the mean of its batch."""
    return max(float((s - s.mean()).abs().max() / s.abs().mean().clamp(min=1e-300)) for s, _ in _shares(key, measured))


def _factors(key: tuple[str, int | None], measured: list[Measured], count: Count) -> Iterator[float]:
    """Yield the factor of each batch with this denominator."""
    for shares, m in _shares(key, measured):
        yield float(shares.mean()) * count(m.counted, m.mask)


def plainness(factor: float) -> int:
    """Return 0 for one, 1 for one over an integer, 2 for anything else."""
    if off_plain(factor) > 1e-3:
        return 2
    return 0 if abs(abs(factor) - 1) < 1e-3 else 1


def off_plain(factor: float) -> float:
    """Return the relative distance from the nearest one over an integer."""
    inverse = 1 / abs(factor) if factor else math.inf
    return abs(inverse / max(1, round(inverse)) - 1) if inverse < 1e6 else math.inf
