"""Which weight a loss gives each token: the pattern over tokens, and the denominator behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .call import ITEMS_FACTOR
from .numbers import spread


class Measured(NamedTuple):
    """Weights of one batch, (B, T), with the tokens that have one, those that count, and those of the mask."""

    weights: Tensor
    live: Tensor
    counted: Tensor
    mask: Tensor


class Denominator(NamedTuple):
    """What a sum over tokens or sequences is divided by."""

    of: Callable[[Tensor, Tensor], float]
    """Takes the tokens that count and the mask."""
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
"""By what a sum is divided, the likeliest first."""
SEQUENCES = {name: TOKENS[name] for name in ("sequences", "sequences with tokens", "nothing")}


@dataclass(frozen=True)
class Weights:
    """w = factor / denominator · pattern."""

    pattern: str = "token"
    """"token" (1 each), "sequence" (1 over the tokens of the sequence), "group" (... of the group)."""
    group_size: int | None = None
    denominator: str = "tokens"
    factor: float = 1.0
    spread: float = 0.0
    """Largest relative distance of a token from the pattern; above what counts as close, nothing fits."""
    apart: float = 0.0
    """How far the factors of different batches are from each other: whether the denominator is that."""

    @property
    def divisor(self) -> Denominator:
        return denominators(self.pattern, self.group_size)[self.denominator]


def patterns(live: Tensor, counted: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """Return every pattern, (B, T), 0 where a token is not live; lengths are of the tokens that count."""
    ones, B = live.double(), live.shape[0]
    sizes = {("sequence", None): 1} | {("group", size): size for size in range(2, B) if B % size == 0}
    found: dict[tuple[str, int | None], Tensor] = {("token", None): ones}
    for key, size in sizes.items():
        tokens = counted.reshape(B // size, -1).sum(-1).double().clamp(min=1)
        found[key] = ones / tokens.repeat_interleave(size)[:, None]
    return found


def denominators(pattern: str, group_size: int | None) -> dict[str, Denominator]:
    if group_size is not None:
        groups = Denominator(lambda counted, mask: mask.shape[0] / group_size)
        return {"groups": groups, "nothing": TOKENS["nothing"]}
    return TOKENS if pattern == "token" else SEQUENCES


def fit_weights(measured: list[Measured], same: float) -> Weights:
    """Return the pattern and denominator of measured weights.

    Args:
        measured: the first decides which patterns there are; a denominator must explain all of them.
        same: relative differences that count as none; of equal fits the first wins.
    """
    shares = {key: list(_shares(key, measured)) for key in patterns(measured[0].live, measured[0].counted)}
    spreads = {key: max(spread(share) for share, _ in of_batches) for key, of_batches in shares.items()}
    key = min(spreads, key=lambda key: round(spreads[key] / same))
    fits = []
    for name, denominator in denominators(*key).items():
        factors = [float(share.mean()) * denominator.of(m.counted, m.mask) for share, m in shares[key]]
        apart = (max(factors) - min(factors)) / max(sum(map(abs, factors)) / len(factors), 1e-300)
        fits.append(Weights(*key, name, factors[0], spreads[key], apart))
    return min(fits, key=lambda fit: (round(fit.apart, 3), plainness(fit.factor)))


def _shares(key: tuple[str, int | None], measured: list[Measured]) -> Iterator[tuple[Tensor, Measured]]:
    """Yield weights over the pattern at live tokens, of each batch that can have this pattern."""
    for m in measured:
        pattern = patterns(m.live, m.counted).get(key)
        if pattern is not None and bool(m.live.any()):
            yield m.weights[m.live] / pattern[m.live], m


def plainness(factor: float) -> int:
    """Return 0 for one, 1 for one over an integer, 2 for anything else."""
    if off_plain(factor) > 1e-3:
        return 2
    return 0 if abs(abs(factor) - 1) < 1e-3 else 1


def off_plain(factor: float) -> float:
    """Return the relative distance from the nearest one over an integer."""
    inverse = 1 / abs(factor) if factor else math.inf
    return abs(inverse / max(1, round(inverse)) - 1) if inverse < 1e6 else math.inf
