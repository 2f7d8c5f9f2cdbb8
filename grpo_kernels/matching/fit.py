"""From measured curves to the numbers of a config: clip bounds, limits, KL estimator and coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives.kl import KL
from ..objectives.surrogates import Clip, Point, Reinforce, Surrogate, Unclipped

Curve = Callable[[Tensor, int], Tensor]
"""(n,) log-ratios and the sign of the advantage to (n,) slopes over weight and |A|: -r·sign for an unclipped ratio."""
NEAR = torch.cat([torch.logspace(-5, 0, 26), torch.linspace(1.25, 8, 28)]).double()
FAR = torch.tensor([11.0, 15, 19, 22, 30, 45, 60], dtype=torch.float64)
LARGEST = 60.0


@dataclass(frozen=True)
class Edges:
    """Where the slope of one sign of the advantage becomes 0, as log-ratios; None: nowhere up to ±60."""

    low: float | None
    high: float | None


def plain(value: float, tolerance: float) -> float:
    """The shortest decimal within the tolerance."""
    for digits in range(10):
        short = float(f"{value:.{digits}e}")
        if abs(short - value) <= tolerance * max(abs(value), 1e-3):
            return short
    return value


def reach(direction: int, tolerance: float) -> Tensor:
    """Distances up to which a slope can be told from rounding: downwards the ratio gets small, or k3 large."""
    if direction > 0:
        return torch.cat([NEAR, FAR])
    return torch.cat([NEAR, FAR[FAR <= 22]]) if tolerance < 1e-6 else NEAR


def find_edge(curve: Curve, sign: int, direction: int, tolerance: float) -> float | None:
    """The log-ratio at which the slope becomes 0 and stays so; found on a grid, then by cutting into nine."""
    points = direction * reach(direction, tolerance)
    zero = _is_zero(curve(points, sign), points)
    if not bool(zero[-1]):
        return None
    first = int(len(points) - zero.flip(0).long().cumprod(0).sum())
    below, above = (0.0 if first == 0 else float(points[first - 1])), float(points[first])
    for _ in range(30):
        inner = torch.linspace(below, above, 10, dtype=torch.float64)[1:-1]
        cut = int((~_is_zero(curve(inner, sign), inner)).long().cumprod(0).sum())
        bounds = [below, *inner.tolist(), above]
        if (bounds[cut], bounds[cut + 1]) == (below, above):
            break
        below, above = bounds[cut], bounds[cut + 1]
    return above


def _is_zero(slopes: Tensor, log_ratios: Tensor) -> Tensor:
    """Smaller than a ratio this side of the bounds can make it."""
    return slopes.abs() <= 1e-3 * torch.exp(log_ratios.clamp(max=0))


def edges(curve: Curve, tolerance: float) -> dict[int, Edges]:
    return {sign: Edges(*(find_edge(curve, sign, direction, tolerance) for direction in (-1, 1))) for sign in (1, -1)}


@dataclass(frozen=True)
class Surrogates:
    """What the curves look like."""

    surrogate: Surrogate
    log_ratio_limit: float | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def fit_surrogate(curve: Curve, tolerance: float) -> Surrogates:
    """The surrogate whose slopes these are; where none fits, the nearest in shape."""
    near = torch.tensor([-0.3, -1e-4, 1e-4, 0.2], dtype=torch.float64)
    if all(float((curve(near, s) + s).abs().max()) < 1e3 * tolerance for s in (1, -1)):
        return Surrogates(Reinforce(), None)
    found = edges(curve, tolerance)
    return from_edges(found[1], found[-1], tolerance)


def misfit(curve: Curve, found: Surrogates, tolerance: float) -> float:
    """Largest relative distance of a slope from the fitted surrogate's, away from its edges."""
    far = min(8.0, found.log_ratio_limit or 8.0) - 1e-3
    points = torch.cat([-NEAR[far > NEAR], NEAR[far > NEAR]])
    bounds = [math.log(b) for b in found.surrogate.parameters() if 0 < b < math.inf]
    clear = torch.stack([(points - b).abs() > 1e-6 + 10 * tolerance for b in bounds] or [points.isfinite()]).all(0)
    worst = 0.0
    for sign in (1, -1):
        ours = slopes_of(found.surrogate, points, sign)
        theirs = curve(points, sign)
        size = torch.maximum(theirs.abs(), ours.abs()).clamp(min=1e-300)
        worst = max(worst, float(((theirs - ours).abs() / size)[clear & (size > 1e-8)].max()))
    return worst


def slopes_of(surrogate: Surrogate, log_ratio: Tensor, sign: int) -> Tensor:
    """∂f/∂ℓ at a token of probability ½, over |A|."""
    log_prob = torch.full_like(log_ratio, math.log(0.5))
    point = Point(log_prob, log_ratio, log_ratio.exp(), torch.full_like(log_ratio, sign), log_prob - log_ratio)
    terms = surrogate.terms(point)
    return terms.slope + terms.direct


def from_edges(positive: Edges, negative: Edges, tolerance: float) -> Surrogates:
    """PPO's clip stops A > 0 above and A < 0 below; whatever else stops is a limit, a dual clip or a fault."""
    limit = None
    faults: list[str] = []
    notes: list[str] = []
    low, high, dual = negative.low, positive.high, negative.high
    if dual is not None and positive.low is not None and abs(positive.low + dual) < 1e-3:
        limit = plain(dual, 1e-6)  # both signs stop there: a clamp of the log-ratio, however narrow
    elif positive.low is not None and positive.low > -4.9:
        if low is None and high is None and dual is not None:
            low, high, dual = positive.low, negative.high, None
            faults.append("optimistic_clip")
        else:
            faults.append("clip_without_min")
            dual = None
    elif positive.low is not None:
        limit = plain(-positive.low, 1e-6)
    if dual is not None and _is_limit(dual, limit):
        if limit is None:
            limit = plain(dual, 1e-6)
            notes += ["one_sided_limit"] if tolerance < 1e-6 else []
        dual = None
    if high is not None and _is_limit(high, limit):
        high = None
    if low is not None and limit is not None and abs(-low - limit) < 1e-3:
        low = None
    if low is None and high is None and dual is None:
        return Surrogates(Unclipped(), limit, tuple(faults), tuple(notes))
    digits = max(1e-9, 10 * tolerance)
    low_number = 1.0 if low is None else plain(-math.expm1(low), digits)
    high_number = plain(math.expm1(LARGEST if high is None else high), digits)
    surrogate = Clip(min(1.0, max(0.0, low_number)), max(0.0, high_number))
    if dual is not None and (ratio := plain(math.exp(dual), digits)) >= 1 + surrogate.high:
        surrogate = Clip(surrogate.low, surrogate.high, ratio)
    elif dual is not None:
        notes.append("dual_below_high")
    return Surrogates(surrogate, limit, tuple(faults), tuple(notes))


def _is_limit(edge: float, limit: float | None) -> bool:
    """A clamp of the log-ratio, not of the ratio: the same on the other side, or a round number of nats."""
    if limit is not None:
        return abs(edge - limit) < 1e-3
    return edge >= 5 and abs(edge - round(edge)) < 1e-4


KLCurve = Callable[[Tensor], Tensor]
"""(n,) distances ℓ - ref to (n,) slopes over weight."""
SHAPES: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("k3", "pathwise"): lambda x: -torch.expm1(-x),
    ("k2", "pathwise"): lambda x: x,
    ("k1", "pathwise"): torch.ones_like,
    ("k1", "ratio_weighted"): lambda x: 1 + x,
    ("k2", "ratio_weighted"): lambda x: x + x * x / 2,
    ("abs", "pathwise"): torch.sign,
    ("abs", "ratio_weighted"): lambda x: torch.sign(x) + x.abs(),
    ("k3", "reversed"): torch.expm1,
}
"""Slopes at a ratio of 1, by what makes them; x alone is k2, or k3 with a ratio, or straight through."""


@dataclass(frozen=True)
class KLFit:
    kl: KL
    strange: str = ""
    """A key of report.TEXTS where no KL of ours has these slopes."""
    error: float = 0.0


def fit_kl(
    curve: KLCurve, with_ratio: Callable[[float], float], value: Callable[[float], float], tolerance: float
) -> KLFit | None:
    """The KL term whose slopes these are; None where there is none.

    Args:
        curve: slopes at a ratio of 1.
        with_ratio: how much the slope at x = 0.5 grows when every ratio is the given number.
        value: the loss per weight at a distance x, advantages 0.
    """
    x = torch.tensor([-2.0, -1.0, -0.5, -0.1, 0.1, 0.4, 1.0, 1.7], dtype=torch.float64)
    slopes = curve(x)
    if not bool(slopes.isfinite().all()):
        return KLFit(KL(), "kl_elsewhere")
    if float(slopes.abs().max()) < max(1e-9, 0.1 * tolerance):
        return None
    errors = {}
    for key, shape in SHAPES.items():
        y = shape(x)
        coef = float((slopes * y).sum() / (y * y).sum())
        errors[key] = (float((slopes - coef * y).abs().max() / slopes.abs().max()), coef)
    (estimator, kind), (error, coef) = min(errors.items(), key=lambda item: item[1][0])
    if error > 100 * tolerance and estimator == "abs":
        (estimator, kind), (error, coef) = ("k3", "pathwise"), errors["k3", "pathwise"]
    coef = plain(coef, max(1e-8, 10 * tolerance))
    if kind == "reversed":
        return KLFit(KL(coef), "kl_reversed", error)
    gradient, weighted, shape, cap = "pathwise", kind == "ratio_weighted", SHAPES[estimator, kind], KL().ratio_cap
    grows = abs(with_ratio(1.05) - 1.05) < 1e-3
    if (estimator, kind) == ("k2", "pathwise"):
        if grows and (ceiling := with_ratio(1e3)) < 500:
            estimator, _ = _behind_k2(value, coef)
            gradient, cap = "weighted_k2", plain(ceiling, max(1e-6, 10 * tolerance))
        elif grows:
            estimator, weighted = "k3", True
        else:
            estimator, gradient = _behind_k2(value, coef)
    elif weighted and not grows:
        gradient, weighted = "score_function", False
    limit = _kl_limit(lambda x: curve(x) / coef, shape, estimator, gradient, tolerance)
    if limit is None:
        return KLFit(KL(coef, estimator, gradient, weighted, (None, None), cap), "kl_limit", error)
    return KLFit(KL(coef, estimator, gradient, weighted, limit, cap), "", error)


def _behind_k2(value: Callable[[float], float], coef: float) -> tuple[str, str]:
    """The slope of k2 with the value of k2, or with another one's."""
    x = 0.8
    values = {"k2": x * x / 2, "k3": math.exp(-x) + x - 1, "k1": x, "abs": x}
    found = value(x) / coef
    estimator = min(values, key=lambda name: abs(values[name] - found))
    return estimator, "pathwise" if estimator == "k2" else "straight_through_k2"


def _kl_limit(
    curve: KLCurve, shape: KLCurve, estimator: str, gradient: str, tolerance: float
) -> tuple[float | None, float | None] | None:
    """(input, output) clamps, from where the slope leaves its shape; None where that is no clamp of ours."""

    def follows(x: Tensor, _: int) -> Tensor:
        """In the form that ``find_edge`` reads: 0 where the slope is not the shape's."""
        size = shape(x)
        near = (curve(x) - size).abs() < max(1e-3, 100 * tolerance) * size.abs().clamp(min=1e-12)
        return torch.where(near, torch.exp(x.clamp(max=0)), 0.0)

    low, high = (find_edge(follows, 1, direction, tolerance) for direction in (-1, 1))
    if low is None and high is None:
        return None, None
    if high is not None and (abs(low + high) < 1e-3 * high if low is not None else tolerance > 1e-6):
        return plain(high, 1e-6), None  # a loss that rounds does not show its lower end
    if estimator != "k3" or gradient != "pathwise":
        return None
    one_side = low if low is not None else high
    assert one_side is not None
    output = math.exp(-one_side) + one_side - 1
    if low is None or high is None or abs(math.exp(-high) + high - 1 - output) > 1e-3 * output:
        return None
    return 20.0, plain(output, 1e-6)  # an input clamp behind it cannot be seen
