"""Numbers that are read off a measured loss: rounded to what a person would have written, and what they follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain(value: float, tolerance: float, least: float = 1e-3) -> float:
    """Return the shortest decimal within the relative tolerance; of values below ``least``, within that of it."""
    for digits in range(10):
        short = float(f"{value:.{digits}e}")
        if abs(short - value) <= tolerance * max(abs(value), least):
            return short
    return value


def spread(values: Tensor) -> float:
    """Return the largest distance from the mean over the mean size; 0 of nothing."""
    if not values.numel():
        return 0.0
    return float((values - values.mean()).abs().max() / values.abs().mean().clamp(min=1e-300))


def apart(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    """Return where ``one`` is further from ``other`` than the tolerance times its size; nowhere where one is NaN."""
    return (one - other).abs() > tolerance * other.abs()


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


def bisect(crossed: Callable[[Tensor], Tensor], inside: Tensor, outside: Tensor) -> Tensor:
    """Return where each element is crossed, between a point that is not and one that is; a bool for each point."""
    for _ in range(60):
        if bool(((outside - inside).abs() <= 1e-13 * outside.abs()).all()):
            break
        middle = (inside + outside) / 2
        beyond = crossed(middle)
        inside, outside = torch.where(beyond, inside, middle), torch.where(beyond, middle, outside)
    return outside


def edges(crossed: Callable[[Tensor], Tensor], points: Tensor, beyond: Tensor) -> Tensor:
    """Return where each element is crossed for good, halved from a grid; inf: nowhere on it.

    Args:
        crossed: takes points (...) and returns a bool for each.
        points: (n, ...), from 0 outwards in either direction.
        beyond: (n, ...), what ``crossed`` is at the points.
    """
    run = beyond.flip(0).long().cumprod(0).sum(0)
    first = (len(points) - run).clamp(max=len(points) - 1)
    outside = points.gather(0, first[None])[0]
    inside = torch.where(first > 0, points.gather(0, (first - 1).clamp(min=0)[None])[0], 0.0)
    return torch.where(run > 0, bisect(crossed, inside, outside), torch.inf)
