"""Numbers that are read off a measured loss: rounded to what a person would have written, and what they follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain(value: float, tolerance: float) -> float:
    """Return the shortest decimal within the relative tolerance."""
    for digits in range(10):
        short = float(f"{value:.{digits}e}")
        if abs(short - value) <= tolerance * max(abs(value), 1e-3):
            return short
    return value


def spread(values: Tensor) -> float:
    """Return the largest distance from the median over its size; 0 of nothing."""
    if not values.numel():
        return 0.0
    middle = values.median()
    return float((values - middle).abs().max() / middle.abs().clamp(min=1e-300))


def follows(values: Tensor, properties: dict[str, Tensor]) -> str | None:
    """Return the property of which the values are a monotone function, if there is one; all (n,)."""
    for name, by in properties.items():
        order = torch.argsort(by, stable=True)
        v, p = values[order], by[order]
        steps = v.diff()
        near = 1e-6 * v.abs().max()
        tied = p.diff() == 0
        if bool((steps[tied].abs() > near).any()) or not bool((steps.abs() > near).any()):
            continue
        if bool((steps >= -near).all()) or bool((steps <= near).all()):
            return name
    return None


def bisect(crossed: Callable[[Tensor], Tensor], inside: Tensor, outside: Tensor, rounds: int = 60) -> Tensor:
    """Return where each element is crossed, between a point that is not and one that is; a bool for each point."""
    for _ in range(rounds):
        if bool(((outside - inside).abs() <= 1e-13 * outside.abs()).all()):
            break
        middle = (inside + outside) / 2
        beyond = crossed(middle)
        inside, outside = torch.where(beyond, inside, middle), torch.where(beyond, middle, outside)
    return outside
