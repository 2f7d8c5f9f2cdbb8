"""Surrogates whose slopes do not just stop at a bound: plateaus, gates, springs, bounds in probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..objectives.surrogates import Cispo, DppoKL, DppoTV, Sapo, Surrogate, Vespo
from .fit import NEAR, Curve, plain, slopes_of

Everywhere = Callable[[Tensor], Tensor]
"""A log-ratio, 0-d, to the factors of -A in the slopes of all tokens, (B, T), NaN where there is none."""
FALLBACK = 0.2
"""A bound that no token of the batch reaches."""


def soft(curve: Curve, tolerance: float, product: bool) -> Surrogate | None:
    """The one of CISPO, SAPO and VESPO whose slopes these are."""
    fits: tuple[Callable[[Curve, float], Surrogate | None], ...] = (_vespo,) if product else (_cispo, _sapo)
    for fit in fits:
        found = fit(curve, tolerance)
        if found is not None and follows(curve, found, tolerance):
            return found
    return None


def follows(curve: Curve, surrogate: Surrogate, tolerance: float) -> bool:
    """Whether the slopes are the surrogate's where neither is next to nothing."""
    points = torch.cat([-NEAR, NEAR])
    for sign in (1, -1):
        ours, theirs = slopes_of(surrogate, points, sign), curve(points, sign)
        size = torch.maximum(theirs.abs(), ours.abs())
        if bool(((theirs - ours).abs() > 1e3 * tolerance * size.clamp(min=1e-6)).any()):
            return False
    return True


def _weight(curve: Curve, at: list[float], sign: int) -> list[float]:
    """The factor of -A in the slope."""
    found: list[float] = (-sign * curve(torch.tensor(at, dtype=torch.float64), sign)).tolist()
    return found


def _cispo(curve: Curve, tolerance: float) -> Surrogate | None:
    """Plateaus: the largest weight, and perhaps a smallest that is not 0."""
    weights = [_weight(curve, [-8.0, -6.0, 6.0, 8.0], sign) for sign in (1, -1)]
    lowest, low, high, highest = weights[0]
    near = max(1e-6, 10 * tolerance) * highest
    if highest <= 0 or abs(high - highest) > near or abs(weights[1][3] - highest) > near:
        return None
    digits = max(1e-9, 10 * tolerance)
    if lowest < 1e-2 or abs(low - lowest) > near:
        return Cispo(cap=plain(highest, digits))
    low_number, high_number = plain(1 - lowest, digits), plain(highest - 1, digits)
    return Cispo(low=low_number, high=high_number) if 0 <= low_number <= 1 and high_number >= 0 else None


def _sapo(curve: Curve, tolerance: float) -> Surrogate | None:
    """At one ratio the gate of each sign tells its temperature: it falls with it."""
    at = 0.4
    ratio = math.exp(at)
    found = []
    for sign in (1, -1):
        wanted = _weight(curve, [at], sign)[0] / ratio
        low, high = 1e-3, 1e3
        for _ in range(80):
            tau = math.sqrt(low * high)
            low, high = (tau, high) if 1 / math.cosh(tau * (ratio - 1) / 2) ** 2 > wanted else (low, tau)
        found.append(plain(tau, max(1e-8, 100 * tolerance)))
    return Sapo(*found)


def _vespo(curve: Curve, tolerance: float) -> Surrogate | None:
    """log φ = k·x + λ·(1 - e^x): two points for two numbers, of each sign."""
    at = torch.tensor([-0.7, 0.5], dtype=torch.float64)
    numbers = []
    for sign in (1, -1):
        weights = torch.tensor(_weight(curve, at.tolist(), sign), dtype=torch.float64)
        if not bool((weights > 0).all()):
            return None
        k, lam = torch.linalg.solve(torch.stack([at, -torch.expm1(at)], 1), weights.log()).tolist()
        numbers += [plain(k, max(1e-8, 100 * tolerance)), plain(lam, max(1e-8, 100 * tolerance))]
    if min(numbers) < 0 or min(numbers[1::2]) < 1e-4:
        return None
    return Vespo(*numbers)


def dppo(everywhere: Everywhere, log_prob: Tensor, positive: Tensor, tolerance: float) -> Surrogate | None:
    """A bound in probabilities, not in ratios: at one ratio some tokens have a slope and others have none.

    Args:
        log_prob: (B, T) of the tokens.
        positive: (B, T), advantages above 0.
    """
    points = torch.cat([torch.linspace(-3, -0.02, 60), torch.linspace(0.02, 6, 120)]).double()
    factors = torch.stack([everywhere(x) for x in points])
    x = points[:, None, None].expand_as(factors)
    known = ~factors.isnan() & (x >= log_prob)  # the old log-prob is no more than 0
    stopped = known & (factors.abs() <= 1e-3 * torch.exp(x.clamp(max=0)))
    away = torch.where(positive, x > 0, x < 0)
    if bool((stopped & ~away).any()) or not bool(stopped.any()):
        return None
    for kind in (DppoTV, DppoKL):
        moved = _moved(kind, log_prob.expand_as(x), x)
        bounds = []
        for side in (~positive, positive):
            bound = _bound(moved, known & away & side, stopped, everywhere, kind, log_prob, x, tolerance)
            if bound is None:
                break
            bounds.append(bound)
        if len(bounds) == 2:
            low, high = (FALLBACK if bound == math.inf else bound for bound in bounds)
            return kind(low, high, _cap(everywhere, positive, tolerance))
    return None


def _moved(kind: type[Surrogate], log_prob: Tensor, x: Tensor) -> Tensor:
    """The divergence that the bound is put to, at old log-probs log_prob - x."""
    old = (log_prob - x).clamp(max=0.0)
    p, p_old = log_prob.exp(), old.exp()
    if kind is DppoTV:
        return (p - p_old).abs()
    q, q_old = -torch.expm1(log_prob), -torch.expm1(old)
    return -p_old * x + torch.where(q_old > 0, q_old * (q_old / q).log(), 0.0)


def _bound(
    moved: Tensor,
    counted: Tensor,
    stopped: Tensor,
    everywhere: Everywhere,
    kind: type[Surrogate],
    log_prob: Tensor,
    x: Tensor,
    tolerance: float,
) -> float | None:
    """The divergence at which tokens stop, cut down between the nearest two of one token; inf: none stops; None: their
    order is another."""
    if not bool((counted & stopped).any()):
        return math.inf
    free, beyond = moved[counted & ~stopped].amax().item(), moved[counted & stopped].amin().item()
    if free >= beyond:
        return None
    place = (counted & stopped & (moved == beyond)).nonzero()[0]
    token = tuple(place[1:].tolist())
    here = (slice(None), *token)
    column, own = x[here], (counted & ~stopped)[here]
    if not bool(own.any()):
        return None
    outside = float(x[tuple(place)])
    inside = float(column[own][(column[own] - outside).abs().argmin()])
    for _ in range(60):
        middle = (inside + outside) / 2
        factor = float(everywhere(torch.tensor(middle, dtype=torch.float64))[token])
        inside, outside = (inside, middle) if abs(factor) <= 1e-3 * min(1.0, math.exp(middle)) else (middle, outside)
    at = torch.tensor(outside, dtype=torch.float64)
    return plain(float(_moved(kind, log_prob[token], at)), max(1e-8, 10 * tolerance))


def _cap(everywhere: Everywhere, positive: Tensor, tolerance: float) -> float | None:
    """Of the ratio, where no bound stops it: tokens of A < 0 that became likelier."""
    near, far = (everywhere(torch.tensor(at, dtype=torch.float64))[~positive].nan_to_num(nan=0.0) for at in (6.0, 9.0))
    found = float(far.max())
    if found <= 0 or abs(float(near.max()) - found) > 1e-3 * found:
        return None
    return plain(found, max(1e-9, 10 * tolerance))
