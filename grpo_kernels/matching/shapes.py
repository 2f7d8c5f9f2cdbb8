"""Which surrogate a policy term is: a table of shapes, each of which reads its numbers off the slopes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import surrogates
from ..objectives.config import LossConfig
from ..objectives.maths import others_of
from ..objectives.surrogates import Clip, DppoTV, Surrogate, Unclipped
from .field import Field
from .known import RUNNING, Known, Said, Step, said
from .numbers import apart, follows, plain, spread
from .probe import Probe
from .scoring import properties
from .weighing import measure

FALLBACK = 0.2
"""A bound that no token of the batch reaches."""


class Fit(NamedTuple):
    """A surrogate with its numbers, and what was noticed."""

    surrogate: Surrogate
    limit: float | None = LossConfig().log_ratio_limit
    scale: float = 1.0
    """On-policy slopes are this times the surrogate's weights: a cap below 1."""
    says: tuple[Said, ...] = ()


class Shape(NamedTuple):
    """A row of the table: at which levels a surrogate is looked for, and how its numbers are read."""

    levels: tuple[str, ...]
    fit: Callable[[Field], Fit | None]
    proven: bool = False
    """``fit`` compares tokens itself; a curve at one log-ratio for all of them does not show the shape."""


POOLED = ("sequence", "sequence_token", *RUNNING)
EVERY = ("token", *POOLED, "sequence_product")


def find_surrogate(probe: Probe, known: Known) -> Step:
    """Find the surrogate, its limit, and what is wrong or strange about it."""
    if not known.uses_ratio:
        return _without_ratio(probe, known)
    field = Field(probe, known)
    for shape in SHAPES:
        fit = shape.fit(field) if known.level in shape.levels else None
        proven = fit is not None and (shape.proven or field.misfit(*fit[:3]) <= min(0.1, 10 * known.precision.close))
        if fit is not None and proven:
            known = _with(known, fit)
            return known, [*fit.says, *_follows_size(probe, known)]
    fit = _nearest(field)
    return _with(known, fit), list(fit.says) or [said("unknown_surrogate", error=field.misfit(*fit[:3]))]


def _with(known: Known, fit: Fit) -> Known:
    weights = dataclasses.replace(known.weights, factor=known.weights.factor / fit.scale)
    return known.but(weights=weights, surrogate=fit.surrogate, log_ratio_limit=fit.limit)


def _number(known: Known, value: float, times: float = 10) -> float:
    """Return the shortest decimal that is a number read off slopes, to some ``times`` their digits."""
    return plain(value, times * max(1e-9, known.precision.digits))


# Shapes that do not just stop at a bound


def _vespo(field: Field) -> Fit | None:
    """Read log φ = k·x + λ·(1 - e^x): two points for two numbers, of each sign."""
    at = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    numbers = []
    for sign in (1, -1):
        weights = torch.tensor(field.read(sign, -1.0, 1.0), dtype=torch.float64)
        if not bool((weights > 0).all()):
            return None
        solved = torch.linalg.solve(torch.stack([at, -torch.expm1(at)], 1), weights.log())
        numbers += [_number(field.known, value) for value in solved.tolist()]
    return Fit(surrogates.Vespo(*numbers)) if min(numbers) >= 0 and min(numbers[1::2]) >= 1e-4 else None


def _cispo(field: Field) -> Fit | None:
    """Read plateaus: the largest weight, and perhaps a smallest that is not 0."""
    lowest, low, high, highest = field.read(1, -8.0, -6.0, 6.0, 8.0)
    near = max(1e-6, field.known.precision.digits) * highest
    if highest <= 0 or abs(high - highest) > near or abs(field.read(-1, 8.0)[0] - highest) > near:
        return None
    if lowest >= 1e-2 and abs(low - lowest) <= near:
        low, high = _number(field.known, 1 - lowest, 1), _number(field.known, highest - 1, 1)
        return Fit(surrogates.Cispo(low=low, high=high)) if 0 <= low <= 1 and high >= 0 else None
    # Relative to the slopes on-policy, which a cap below 1 bounds already.
    scale = _number(field.known, math.exp(-8.0) / lowest) if lowest > 0 else 1.0
    if abs(scale - 1) < 1e-3:
        return Fit(surrogates.Cispo(cap=_number(field.known, highest, 1)))
    cap = _number(field.known, scale * highest)
    return Fit(surrogates.Cispo(cap=cap), scale=scale, says=(said("cap_below_one", cap=cap),)) if 0 < cap < 1 else None


def _sapo(field: Field) -> Fit | None:
    """Read the temperature of each sign's gate at one ratio r: its slope is r / cosh²(τ(r - 1)/2)."""
    x = 0.4
    gates = [field.read(sign, x)[0] / math.exp(x) for sign in (1, -1)]
    if not all(1e-30 < gate < 1 - 1e-9 for gate in gates):
        return None
    return Fit(surrogates.Sapo(*(_number(field.known, 2 * math.acosh(gate**-0.5) / math.expm1(x)) for gate in gates)))


def _dppo(field: Field) -> Fit | None:
    """Read bounds in probabilities: tokens stop at ratios of their own, where one divergence is equal.

    The old policy's probability is at most 1, so a token's log-ratio is at least its log-prob.
    """
    falling = torch.where(field.side(-1), field.down_to(-field.log_prob), torch.inf)
    rising = torch.where(field.side(1), field.up, torch.inf)
    rising = torch.where((rising > 5) & ((rising - rising.round()).abs() < 1e-4), torch.inf, rising)  # a limit in nats
    edges = [(end[end.isfinite()], field.log_prob[end.isfinite()]) for end in (falling, rising)]
    for kind in (DppoTV, surrogates.DppoKL):
        moved = [_moved(kind, log_prob, x) for x, log_prob in edges]
        bounds = [_number(field.known, float(m.median())) if len(m) else FALLBACK for m in moved]
        alike = max(map(spread, moved)) <= max(1e-6, field.known.precision.close)
        if any(map(len, moved)) and alike and min(bounds) > 0:
            return Fit(kind(bounds[0], bounds[1], _cap(field)))
    return None


def _moved(kind: type[Surrogate], log_prob: Tensor, x: Tensor) -> Tensor:
    """Return the divergence that the bound is put to, at old log-probs log_prob - x."""
    old = (log_prob - x).clamp(max=0.0)
    p, p_old = log_prob.exp(), old.exp()
    if kind is DppoTV:
        return (p - p_old).abs()
    q, q_old = others_of(log_prob), others_of(old)
    return -p_old * x + torch.where(q_old > 0, q_old * (q_old / q).log(), 0.0)


def _cap(field: Field) -> float | None:
    """Return the cap of the ratio, where no bound stops it: of tokens of A < 0 that became likelier."""
    near, far = field.read(-1, 6.0, 8.0)
    return _number(field.known, far, 1) if far > 0 and abs(near - far) <= 1e-3 * far else None


def _gmpo(field: Field) -> Fit | None:
    """Read a clip before the mean: a token that is far out on its own has no slope, although its sequence is not."""
    fit = _nearest(field)
    clip = fit.surrogate
    if fit.says or not isinstance(clip, Clip) or clip.dual is not None or clip.low == 1:
        return None
    low, high = -math.log1p(-clip.low), math.log1p(clip.high)
    rows = (field.side(1).sum(-1) > 2) * field.live.sum(-1)
    if not bool(rows.any()):
        return None
    places = field.live[row := int(rows.argmax())].nonzero().flatten()
    moved = torch.zeros_like(field.log_prob)
    moved[row, places[0]] = 1.5 * high
    factor = field.factor(moved)[row]
    if abs(float(factor[places[0]])) > 1e-6 or float(factor[places[1:]].min()) < 0.5:
        return None
    return Fit(surrogates.Gmpo(_number(field.known, low), _number(field.known, high)), fit.limit)


# Slopes that stop at bounds of the ratio


def _clip(field: Field) -> Fit | None:
    fit = _nearest(field)
    return None if {"bounds_differ", "unknown_bounds"} & {one.key for one in fit.says} else fit


class Edges(NamedTuple):
    """Where slopes become 0, as log-ratios by sign of the advantage and direction; None: nowhere up to ±60."""

    rising: float | None
    """A > 0, ratios that grow: PPO's upper bound."""
    falling: float | None
    """A < 0, ratios that fall: its lower bound."""
    positive_low: float | None
    negative_high: float | None


def _nearest(field: Field) -> Fit:
    """Return the nearest clip with its faults, or that its bounds differ from token to token."""
    strange: list[Said] = []
    ends = []
    for found, sign in ((field.up, 1), (field.down, -1), (field.down, 1), (field.up, -1)):
        found = found[field.side(sign)]
        stopped = found[found.isfinite()]
        end = float(stopped.median()) if len(found) and 2 * len(stopped) >= len(found) else None
        ends.append(end)
        near = 1e-6 if field.known.precision.same < 1e-6 else 5 * field.known.precision.digits
        differ = bool(((stopped - stopped.nanmedian()).abs() > near * max(1.0, abs(end or 0.0))).any())
        if (differ or 0 < len(stopped) < len(found)) and not strange:
            by = follows(found, properties(field.known, field.probe.batch, field.side(sign)))
            low, high = math.exp(float(found.min())), math.exp(float(found.max()))
            strange.append(said("bounds_differ", low=low, high=high, by=f"; it follows the {by}" if by else ""))
    fit = _from_edges(Edges(*ends), field)
    return fit._replace(says=(*strange, *fit.says))


def _near(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) < 1e-3


def _from_edges(e: Edges, field: Field) -> Fit:
    """Tell a clip, its dual bound and a limit of the log-ratio apart, and name clips that stop the wrong side.

    PPO's stops A > 0 above and A < 0 below; a dual bound stops A < 0 above, a limit stops both signs on both sides.
    """
    says: list[Said] = []
    low, high, dual, limit = e.falling, e.rising, e.negative_high, None
    mirrored = None if e.positive_low is None else -e.positive_low
    if mirrored is not None and (_near(mirrored, dual) or mirrored >= 4.9):
        limit = plain(mirrored, 1e-6)
        if _near(mirrored, dual) and mirrored < 5 and field.known.level == "token" and _dropped(field, mirrored):
            says.append(said("dropped_outside"))
    elif mirrored is not None or (low is None and _near(dual, high)):
        key, low, high = _wrong_side(e, field)
        says.append(said(key))
        dual = None
    as_dual = False
    if dual is not None and _is_limit(dual, limit):
        clamp = plain(dual, 1e-6) if limit is None else limit
        if limit is None and field.known.precision.same < 1e-6:  # the other side was looked at
            as_dual = high is not None and high < dual - 1e-3  # where A > 0 has stopped before it
            says.append(said("limit_as_dual" if as_dual else "one_sided_limit", limit=clamp))
        limit, dual = (None, clamp) if as_dual else (clamp, None)
    high = None if high is not None and _is_limit(high, limit) else high
    low = None if low is not None and _near(-low, limit) else low
    if low is None and high is None and dual is None:
        return Fit(Unclipped(), limit, says=tuple(says))
    clip = Clip(
        min(1.0, max(0.0, 1.0 if low is None else _number(field.known, -math.expm1(low), 1))),
        1e26 if high is None else max(0.0, _number(field.known, math.expm1(high), 1)),
    )
    if dual is not None:
        ratio = math.exp(dual) if as_dual else _number(field.known, math.exp(dual), 1)
        if 1 + clip.high <= ratio < 1e9:
            clip = Clip(clip.low, clip.high, ratio)
        else:
            says.append(said("dual_below_high"))
    return Fit(clip, limit, says=tuple(says))


def _wrong_side(e: Edges, field: Field) -> tuple[str, float | None, float | None]:
    """Return the name of a clip that stops a sign where PPO's does not, and the bounds that were meant."""
    if e.falling is None and e.rising is None and e.negative_high is not None:
        return "optimistic_clip", e.positive_low, e.negative_high
    if e.positive_low is None:
        if e.rising is None:
            return "unknown_bounds", e.falling, None
        return "dropped_outside" if _dropped(field, e.rising) else "min_before_advantage", -e.rising, e.rising
    if e.rising is None and e.negative_high is None:
        return "max_before_advantage", e.falling, None if e.falling is None else -e.falling
    if e.rising is None or not (_near(e.positive_low, e.falling) and _near(e.rising, e.negative_high)):
        return "unknown_bounds", e.falling, e.rising
    return "dropped_outside" if _dropped(field, e.rising) else "clip_without_min", e.falling, e.rising


def _dropped(field: Field, edge: float) -> bool:
    """Whether the loss has no value either beyond an edge, where a clip or a clamp keeps that of the bound."""
    A = field.probe.signs().clamp(max=0)
    beyond, inside = (field.probe.policy_value(field.known, x, A) for x in (1.5 * edge + 0.1, 0.0))
    return abs(beyond) < 1e-6 * abs(inside)


def _is_limit(edge: float, limit: float | None = None) -> bool:
    """Whether an edge is a clamp of the log-ratio, not of the ratio: as on the other side, or round in nats."""
    return _near(edge, limit) if limit is not None else edge >= 5 and abs(edge - round(edge)) < 1e-4


def has_limit_as_dual(surrogate: Surrogate) -> bool:
    """Whether the dual bound is a clamp of log-ratios: of what overflows, as our limit."""
    return isinstance(surrogate, Clip) and surrogate.dual is not None and _is_limit(math.log(surrogate.dual))


def _follows_size(probe: Probe, known: Known) -> list[Said]:
    """Say it where advantages of another size move the bounds."""
    if known.whitening.text or not (known.level != "token" or isinstance(known.surrogate, (Clip, surrogates.Cispo))):
        return []
    near = 1e-3 + 5 * known.precision.digits
    points = [bound + sign * near * (abs(bound) + 1e-2) for bound in known.bounds() for sign in (-1, 1)]
    fields = [Field(probe, known, scale) for scale in (0.1, 7.0, 1.0)] if points else []
    for x in points:
        *others, at = (field.factor(x) for field in fields)
        for other in others:
            moved = apart(other, at, max(1e-2, 2 * known.precision.close)) & ((at - other).abs() > 1e-9)
            if bool(moved[fields[-1].live].any()):
                return [said("bounds_follow_advantages", ratio=math.exp(x))]
    return []


# Where no ratio moves a slope


def _without_ratio(probe: Probe, known: Known) -> Step:
    """Find a policy gradient, perhaps with a spring, or a ratio to itself."""
    known = known.but(log_ratio_limit=LossConfig().log_ratio_limit)
    takes_old = probe.caller.takes("old_log_probs")
    spring = _spring(probe, known) if takes_old else None
    if spring is not None:
        return known.but(surrogate=spring, uses_ratio=True), []
    is_ratio = _value_is_a_ratio(probe, known)
    named = takes_old and probe.caller.container is None and not _pulls(probe, known)
    says = [said("old_ignored" if is_ratio else "old_unused")] if named else []
    return known.but(surrogate=Unclipped() if is_ratio else surrogates.Reinforce()), says


def _spring(probe: Probe, known: Known) -> Surrogate | None:
    """Read DRO: without an advantage, a pull towards the old policy that is proportional to the log-ratio."""
    m = measure(probe, known, probe.batch)
    rest, *pulls = ((probe.at(known, x, probe.zeros()).slope / m.weights)[m.live] for x in (0.0, -1.0, 0.5, 2.0))
    strengths = torch.stack([(pull - rest) / x for pull, x in zip(pulls, (-1.0, 0.5, 2.0), strict=True)])
    beta = float(strengths.mean())
    found = beta >= 1e-6 and spread(strengths) <= 1e3 * known.precision.same
    return surrogates.Dro(_number(known, beta, 1)) if found else None


def _pulls(probe: Probe, known: Known) -> bool:
    """Whether slopes without an advantage follow the old policy, as those of a KL to it do."""
    near, far = (probe.at(known, x, probe.zeros()).slope.nan_to_num() for x in (0.5, -1.0))
    return bool(((far - near).abs() > 1e-6 * probe.policy(known, 0.0).nan_to_num().abs().max()).any())


def _value_is_a_ratio(probe: Probe, known: Known) -> bool:
    """Whether the value is -A, as of -A·exp(ℓ - sg(ℓ)), or -A·ℓ, which has the same slope."""
    value = probe.policy_value(known, 0.0, probe.signs())
    m = measure(probe, known, probe.batch)
    terms = -m.weights * known.effective(probe.signs(), probe.batch)[:, None]
    as_ratio, as_log_prob = ((terms * of)[m.live].sum() for of in (1.0, known.log_probs(probe.batch)))
    return abs(value - float(as_ratio)) < abs(value - float(as_log_prob))


SHAPES: tuple[Shape, ...] = (
    Shape(("sequence_product", *RUNNING), _vespo),
    Shape(("token", *POOLED), _cispo),
    Shape(("token", *POOLED), _sapo),
    Shape(("sequence",), _gmpo, proven=True),
    Shape(EVERY, _clip),
    Shape(("token",), _dppo),
)
"""One row for each surrogate with a ratio, in the order in which they are tried."""
