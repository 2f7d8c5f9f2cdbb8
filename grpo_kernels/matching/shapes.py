"""Which surrogate a policy term is: a table of shapes, each of which reads its numbers off the slopes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.config import LossConfig
from ..objectives.surrogates import (
    Cispo,
    Clip,
    DppoKL,
    DppoTV,
    Dro,
    Gmpo,
    Reinforce,
    Sapo,
    Surrogate,
    Unclipped,
    Vespo,
)
from .field import AT, GRID, LARGEST, Field
from .known import Known, Said, said
from .numbers import bisect, follows, plain, spread
from .probe import Probe
from .scoring import properties
from .weighing import measure

Step = tuple[Known, list[Said]]
FALLBACK = 0.2
"""A bound that no token of the batch reaches."""


class Fit(NamedTuple):
    """A surrogate with its numbers, and what was noticed."""

    surrogate: Surrogate
    limit: float | None = LossConfig().log_ratio_limit
    says: tuple[Said, ...] = ()
    scale: float = 1.0
    """On-policy slopes are this times the surrogate's weights: a cap below 1."""


class Shape(NamedTuple):
    """A row of the table: at which levels a surrogate is looked for, and how its numbers are read."""

    levels: tuple[str, ...]
    fit: Callable[[Field], Fit | None]
    proven: bool = False
    """``fit`` compares tokens itself; a curve at one log-ratio for all of them does not show the shape."""


POOLED = ("sequence", "sequence_token")
EVERY = ("token", *POOLED, "sequence_product")


def find_surrogate(probe: Probe, known: Known) -> Step:
    """Find the surrogate, its limit, and what is wrong or strange about it."""
    if not known.uses_ratio:
        return _without_ratio(probe, known)
    field = Field(probe, known)
    precise = known.precision
    for shape in SHAPES:
        fit = shape.fit(field) if known.level in shape.levels else None
        if fit is None:
            continue
        if shape.proven or field.misfit(fit.surrogate, fit.limit, fit.scale) <= min(0.1, 10 * precise.close):
            return _with(known, fit), [*fit.says, *_follows_size(probe, _with(known, fit))]
    fit, says = _nearest(field)
    if not says:
        says = [said("unknown_surrogate", error=field.misfit(fit.surrogate, fit.limit))]
    return _with(known, fit), says


def _with(known: Known, fit: Fit) -> Known:
    return _rescaled(known, fit).but(surrogate=fit.surrogate, log_ratio_limit=fit.limit)


def _rescaled(known: Known, fit: Fit) -> Known:
    w = known.weights
    assert w is not None
    return known.but(weights=dataclasses.replace(w, factor=w.factor / fit.scale))


def _digits(field: Field) -> float:
    return max(1e-9, field.known.precision.digits)


# Shapes that do not just stop at a bound


def _vespo(field: Field) -> Fit | None:
    """Read log φ = k·x + λ·(1 - e^x): two points for two numbers, of each sign."""
    at = torch.tensor([float(GRID[k]) for k in (AT[-1.0], AT[1.0])], dtype=torch.float64)
    numbers = []
    for sign in (1, -1):
        weights = torch.stack([field.on_grid(sign)[AT[float(x)]] for x in at])
        if not bool((weights > 0).all()):
            return None
        k, lam = torch.linalg.solve(torch.stack([at, -torch.expm1(at)], 1), weights.log()).tolist()
        numbers += [plain(k, 10 * _digits(field)), plain(lam, 10 * _digits(field))]
    fits = min(numbers) >= 0 and min(numbers[1::2]) >= 1e-4
    return Fit(Vespo(*numbers)) if fits else None


def _cispo(field: Field) -> Fit | None:
    """Read plateaus: the largest weight, and perhaps a smallest that is not 0."""
    ends = {sign: field.on_grid(sign)[[AT[-8.0], AT[-6.0], AT[6.0], AT[8.0]]].tolist() for sign in (1, -1)}
    lowest, low, high, highest = ends[1]
    near = max(1e-6, field.known.precision.digits) * highest
    if highest <= 0 or abs(high - highest) > near or abs(ends[-1][3] - highest) > near:
        return None
    if lowest < 1e-2 or abs(low - lowest) > near:
        # Relative to the slopes on-policy, which a cap below 1 bounds already.
        scale = plain(math.exp(-8.0) / lowest, 10 * _digits(field)) if lowest > 0 else 1.0
        if abs(scale - 1) < 1e-3:
            return Fit(Cispo(cap=plain(highest, _digits(field))))
        cap = plain(scale * highest, 10 * _digits(field))
        return Fit(Cispo(cap=cap), says=(said("cap_below_one", cap=cap),), scale=scale) if 0 < cap < 1 else None
    low_number, high_number = plain(1 - lowest, _digits(field)), plain(highest - 1, _digits(field))
    return Fit(Cispo(low=low_number, high=high_number)) if 0 <= low_number <= 1 and high_number >= 0 else None


def _sapo(field: Field) -> Fit | None:
    """Read the temperature of each sign's gate at one ratio: it falls with it."""
    at = GRID[AT[min(AT, key=lambda x: abs(x - 0.4))]]
    ratio = math.exp(float(at))
    taus = []
    for sign in (1, -1):
        wanted = float(field.on_grid(sign)[AT[float(at)]]) / ratio
        low, high = torch.tensor(math.log(1e-3)).double(), torch.tensor(math.log(1e3)).double()

        def closed(log_tau: Tensor, wanted: float = wanted) -> Tensor:
            return 1 / torch.cosh(log_tau.exp() * (ratio - 1) / 2) ** 2 <= wanted

        taus.append(plain(float(bisect(closed, low, high, 80).exp()), 10 * _digits(field)))
    return Fit(Sapo(*taus))


def _dppo(field: Field) -> Fit | None:
    """Read bounds in probabilities: tokens stop at ratios of their own, where one divergence is equal.

    The old policy's probability is at most 1, so a token's log-ratio is at least its log-prob.
    """
    falling = torch.where(field.side(-1), field.edges(-1, -field.log_prob), torch.inf)
    rising = torch.where(field.side(1), field.edges(1), torch.inf)
    rising = torch.where((rising > 5) & ((rising - rising.round()).abs() < 1e-4), torch.inf, rising)  # a limit in nats
    if not bool((falling.isfinite() | rising.isfinite()).any()):
        return None
    for kind in (DppoTV, DppoKL):
        bounds = []
        for edges in (falling, rising):
            stopped = edges.isfinite()
            moved = _moved(kind, field.log_prob[stopped], edges[stopped])
            if spread(moved) > max(1e-6, field.known.precision.close):
                break
            bounds.append(plain(float(moved.median()), 10 * _digits(field)) if len(moved) else FALLBACK)
        if len(bounds) == 2 and min(bounds) > 0:
            return Fit(kind(bounds[0], bounds[1], _cap(field)))
    return None


def _moved(kind: type[Surrogate], log_prob: Tensor, x: Tensor) -> Tensor:
    """Return the divergence that the bound is put to, at old log-probs log_prob - x."""
    old = (log_prob - x).clamp(max=0.0)
    p, p_old = log_prob.exp(), old.exp()
    if kind is DppoTV:
        return (p - p_old).abs()
    q, q_old = -torch.expm1(log_prob), -torch.expm1(old)
    return -p_old * x + torch.where(q_old > 0, q_old * (q_old / q).log(), 0.0)


def _cap(field: Field) -> float | None:
    """Return the cap of the ratio, where no bound stops it: of tokens of A < 0 that became likelier."""
    near, far = (float(field.on_grid(-1)[AT[x]]) for x in (6.0, 8.0))
    return plain(far, _digits(field)) if far > 0 and abs(near - far) <= 1e-3 * far else None


def _gmpo(field: Field) -> Fit | None:
    """Read a clip before the mean: a token that is far out on its own has no slope, although its sequence is not."""
    fit, says = _nearest(field)
    clip = fit.surrogate
    if says or not isinstance(clip, Clip) or clip.dual is not None or clip.low == 1:
        return None
    low, high = -math.log1p(-clip.low), math.log1p(clip.high)
    rows = [i for i in range(len(field.live)) if int(field.side(1)[i].sum()) > 2]
    if not rows:
        return None
    row = max(rows, key=lambda i: int(field.live[i].sum()))
    places = field.live[row].nonzero().flatten()
    moved = torch.zeros_like(field.log_prob)
    moved[row, places[0]] = 1.5 * high
    factor = field.factor(moved)[row]
    if abs(float(factor[places[0]])) > 1e-6 or float(factor[places[1:]].min()) < 0.5:
        return None
    return Fit(Gmpo(plain(low, 10 * _digits(field)), plain(high, 10 * _digits(field))), fit.limit)


# Slopes that stop at bounds of the ratio


def _clip(field: Field) -> Fit | None:
    fit, says = _nearest(field)
    return None if any(s.key in ("bounds_differ", "unknown_bounds") for s in says) else fit._replace(says=tuple(says))


class Edges(NamedTuple):
    """Where slopes become 0, as log-ratios by sign of the advantage and direction; None: nowhere up to ±60."""

    rising: float | None
    """A > 0, ratios that grow: PPO's upper bound."""
    falling: float | None
    """A < 0, ratios that fall: its lower bound."""
    positive_low: float | None
    negative_high: float | None


def _nearest(field: Field) -> tuple[Fit, list[Said]]:
    """Return the nearest clip, with its faults: PPO's stops A > 0 above and A < 0 below, and nothing else."""
    down, up = field.edges(-1), field.edges(1)
    says: list[Said] = []
    ends = []
    for edges, sign in ((up, 1), (down, -1), (down, 1), (up, -1)):
        found = edges[field.side(sign)]
        stopped = found[found.isfinite()]
        ends.append(float(stopped.median()) if 2 * len(stopped) >= len(found) and len(found) else None)
        tolerance = 1e-6 if field.known.precision.same < 1e-6 else 5 * field.known.precision.digits
        apart = len(stopped) and float((stopped - stopped.median()).abs().max()) > tolerance * max(
            1, abs(ends[-1] or 0)
        )
        if (apart or 0 < len(stopped) < len(found)) and not says:
            by = follows(found, properties(field.known, field.probe.batch, field.live & (field.sign == sign)))
            low, high = (math.exp(float(x)) for x in (found.min(), found.max()))
            says.append(said("bounds_differ", low=low, high=high, by=f"; it follows the {by}" if by else ""))
    fit = _from_edges(Edges(*ends), field)
    return fit._replace(says=()), [*says, *fit.says]


def _from_edges(e: Edges, field: Field) -> Fit:
    """Tell a clip, its dual bound and a limit of the log-ratio apart, and name clips that stop the wrong side."""
    says: list[Said] = []
    low, high, dual, limit = e.falling, e.rising, e.negative_high, None
    if dual is not None and e.positive_low is not None and abs(e.positive_low + dual) < 1e-3:
        limit = plain(dual, 1e-6)  # both signs stop there: a clamp of the log-ratio, however narrow
        if dual < 5 and field.known.level == "token" and _dropped(field, dual):
            says.append(said("dropped_outside"))
    elif e.positive_low is not None and e.positive_low <= -4.9:
        limit = plain(-e.positive_low, 1e-6)
    elif e.positive_low is not None or (
        low is None and dual is not None and high is not None and abs(dual - high) < 1e-3
    ):
        key, low, high = _wrong_side(e, field)
        says.append(said(key))
        dual = None
    if dual is not None and _is_limit(dual, limit):
        if limit is None:
            limit = plain(dual, 1e-6)
            says += [said("one_sided_limit", limit=limit)] if field.known.precision.same < 1e-6 else []
        dual = None
    if high is not None and _is_limit(high, limit):
        high = None
    if low is not None and limit is not None and abs(-low - limit) < 1e-3:
        low = None
    if low is None and high is None and dual is None:
        return Fit(Unclipped(), limit, tuple(says))
    low_number = 1.0 if low is None else plain(-math.expm1(low), _digits(field))
    high_number = plain(math.expm1(LARGEST if high is None else high), _digits(field))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* keeps ratios in")  # numbers of a guess are not the user's
        clip = Clip(min(1.0, max(0.0, low_number)), max(0.0, high_number))
    if dual is not None and (ratio := plain(math.exp(dual), _digits(field))) >= 1 + clip.high and ratio < 1e9:
        clip = Clip(clip.low, clip.high, ratio)
    elif dual is not None:
        says.append(said("dual_below_high"))
    return Fit(clip, limit, tuple(says))


def _wrong_side(e: Edges, field: Field) -> tuple[str, float | None, float | None]:
    """Return the name of a clip that stops a sign where PPO's does not, and the bounds that were meant."""
    if e.falling is None and e.rising is None and e.negative_high is not None:
        return "optimistic_clip", e.positive_low, e.negative_high
    if e.positive_low is None:
        return "min_before_advantage", None if e.rising is None else -e.rising, e.rising
    if e.rising is None and e.negative_high is None:
        return "max_before_advantage", e.falling, None if e.falling is None else -e.falling
    both = (e.positive_low, e.falling, e.rising, e.negative_high)
    if None in both or abs(both[0] - both[1]) > 1e-3 or abs(both[2] - both[3]) > 1e-3:  # type: ignore[operator]
        return "unknown_bounds", e.falling, e.rising
    return "dropped_outside" if _dropped(field, e.rising) else "clip_without_min", e.falling, e.rising


def _dropped(field: Field, edge: float | None) -> bool:
    """Whether the loss has no value either beyond an edge, where a clip or a clamp keeps that of the bound."""
    assert edge is not None
    A = torch.where(field.probe.signs() < 0, field.probe.signs(), 0.0)
    beyond, inside = (field.probe.policy_value(field.known, x, A) for x in (1.5 * edge + 0.1, 0.0))
    return abs(beyond) < 1e-6 * abs(inside)


def _is_limit(edge: float, limit: float | None) -> bool:
    """Whether an edge is a clamp of the log-ratio, not of the ratio: as on the other side, or a round number of nats."""
    if limit is not None:
        return abs(edge - limit) < 1e-3
    return edge >= 5 and abs(edge - round(edge)) < 1e-4


def _follows_size(probe: Probe, known: Known) -> list[Said]:
    """Say it where advantages of another size move the bounds."""
    if known.whitening.text:
        return []
    bounds = (
        [math.log(b) for b in known.surrogate.parameters() if 0 < b < math.exp(5)]
        if known.level != "token" or (isinstance(known.surrogate, (Clip, Cispo)))
        else []
    )
    near = 1e-3 + 5 * known.precision.digits
    points = [bound * (1 + d * near) + d * near * 1e-2 for bound in bounds for d in (-1, 1)]
    if not points:
        return []
    plain_size, *others = (Field(probe, known, scale) for scale in (1.0, 0.1, 7.0))
    for x in points:
        at = plain_size.factor(x)
        for field in others:
            other = field.factor(x)
            apart = (at - other).abs() > max(1e-2, 2 * known.precision.close) * torch.maximum(at.abs(), other.abs())
            if bool((apart & ((at - other).abs() > 1e-9))[field.live].any()):
                return [said("bounds_follow_advantages", ratio=math.exp(x))]
    return []


# Where no ratio moves a slope


def _without_ratio(probe: Probe, known: Known) -> Step:
    """Find a policy gradient, perhaps with a spring, or a ratio to itself."""
    limit = LossConfig().log_ratio_limit
    known = known.but(log_ratio_limit=limit)
    takes_old = probe.caller.takes("old_log_probs")
    spring = _spring(probe, known) if takes_old else None
    if spring is not None:
        return known.but(surrogate=spring, uses_ratio=True), []
    is_ratio = _value_is_a_ratio(probe, known)
    says = []
    if takes_old and "old_log_probs" in probe.caller.roles.values():
        says.append(said("old_ignored" if is_ratio else "old_unused"))
    return known.but(surrogate=Unclipped() if is_ratio else Reinforce()), says


def _spring(probe: Probe, known: Known) -> Surrogate | None:
    """Read DRO: without an advantage, a pull towards the old policy that is proportional to the log-ratio."""
    m = measure(probe, known, probe.batch)
    at = (-1.0, 0.0, 0.5, 2.0)
    pulls = [(probe.at(known, x, probe.zeros()).slope / m.weights)[m.live] for x in at]
    if not all(bool(pull.isfinite().all()) for pull in pulls):
        return None
    strengths = torch.stack([(pull - pulls[1]) / x for pull, x in zip(pulls, at, strict=True) if x])
    beta = float(strengths.mean())
    if beta < 1e-6 or float((strengths - beta).abs().max()) > 1e3 * known.precision.same * beta:
        return None
    return Dro(plain(beta, max(1e-9, known.precision.digits)))


def _value_is_a_ratio(probe: Probe, known: Known) -> bool:
    """Whether the value is -A, as of -A·exp(ℓ - sg(ℓ)), or -A·ℓ, which has the same slope."""
    A = probe.signs()
    value = probe.policy_value(known, 0.0, A)
    m = measure(probe, known, probe.batch)
    terms = -m.weights * known.effective(A, probe.batch)[:, None]
    log_probs = known.log_probs(probe.batch)
    return abs(value - float(terms[m.live].sum())) < abs(value - float((terms * log_probs)[m.live].sum()))


SHAPES: tuple[Shape, ...] = (
    Shape(("sequence_product",), _vespo),
    Shape(("token", *POOLED), _cispo),
    Shape(("token", *POOLED), _sapo),
    Shape(("sequence",), _gmpo, proven=True),
    Shape(EVERY, _clip),
    Shape(("token",), _dppo),
)
"""One row for each surrogate with a ratio, in the order in which they are tried."""
