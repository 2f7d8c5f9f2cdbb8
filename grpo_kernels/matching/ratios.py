"""How a loss compares with the old policy: through which ratio, and how log-ratios are pooled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..objectives.levels import LevelName
from ..objectives.running import begin_back_from, begin_up_to
from ..objectives.sequences import Padded
from .batch import Inputs
from .known import INVERTED, Known, Step, said
from .numbers import apart
from .probe import Probe

SIZES = (5e-2, 0.6, 4.0)
"""Log-ratios that are tried after the smallest one: a cap below 1 shows far below 1 only."""


def find_missing_exp(probe: Probe, known: Known) -> Step:
    """Find a log-ratio in the ratio's place: its slope does not follow it, and its value is a line in it."""
    if not probe.caller.takes("old_log_probs"):
        return known, []
    signs = probe.signs()
    for A in (signs, signs.clamp(min=0), signs.clamp(max=0)):
        near, far = (probe.policy(known, x, A) for x in (1.0, 1.25))
        both = near.isfinite() & far.isfinite() & (near != 0) & (far != 0)
        if not bool(both.any()) or bool(apart(far, near, 1e-2)[both].any()):
            continue
        pulls = [probe.at(known, x, torch.zeros_like(A)).slope.nan_to_num() for x in (1.0, 1.25)]
        if bool(((pulls[1] - pulls[0]).abs() > 1e-3 * near.abs())[both].any()):
            continue  # a squared distance from the old policy: its slope in the advantage is as constant
        change = probe.policy_value(known, 1.25, A) - probe.policy_value(known, 1.0, A)
        line = 0.25 * float(near[both].sum())
        if abs(change - line) < 1e-2 * abs(line) and torch.equal(near != 0, far != 0):
            return known, [said("missing_exp")]
    return known, []


def find_coupling(probe: Probe, known: Known) -> Step:
    """Find whether a token's slope follows the ratios of other sequences, as an early stop makes it."""
    rows = torch.arange(probe.batch.shape[0])
    if len(rows) < 2 or not probe.caller.takes("old_log_probs"):
        return known, []
    rest = probe.policy(known, 0.0)
    for size, every, direction in itertools.product((0.05, 0.2, 1.0, 3.0), (1, 2, 4), (1, -1)):
        still = rows // every % 2 == 0
        slopes = probe.policy(known, torch.where(still, 0.0, direction * size).double()[:, None])[still]
        if bool((apart(slopes, rest[still], max(1e-3, known.precision.same)) & slopes.isfinite()).any()):
            stopped = not bool(slopes.nan_to_num().any())
            return known, [said("early_stop" if stopped else "coupled_ratios", size=size)]
    return known, []


def find_level(probe: Probe, known: Known) -> Step:
    """Find whether a token's slope follows its own log-ratio or its sequence's, their mean or their sum."""
    if not probe.caller.takes("old_log_probs"):
        return known.but(uses_ratio=False), []
    rest, change = _changes(probe, known)
    live = known.live(probe.batch) & (rest != 0) & rest.isfinite()
    sign = known.effective(probe.signs(), probe.batch).sign()[:, None]

    def moves(size: float) -> bool:
        return bool((change(size * _coins(probe, 0)).nan_to_num().abs() > 0.02 * size)[live].any())

    size = next(filter(moves, (known.precision.step, *(s for s in SIZES if s > known.precision.step))), None)
    if size is None:
        return known.but(uses_ratio=False), []
    inside = -size * sign  # where no clip stops a slope
    growth = [float((change(inside) / inside)[live & (sign == s)].mean()) for s in (1, -1)]
    if float((rest * sign)[live].mean()) > 0 and not any(g >= 0 for g in growth):
        known = known.but(ratio=INVERTED)
    return _pooling(probe, known, live, inside / 2, size)


def _changes(probe: Probe, known: Known) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return on-policy slopes, and by what share of themselves they change with log-ratios; all (B, T)."""
    rest = probe.policy(known, 0.0)
    return rest, lambda log_ratio: probe.policy(known, log_ratio) / rest - 1


def _coins(probe: Probe, seed: int) -> Tensor:
    """Return (B, T) numbers ±1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, probe.batch.shape, generator=generator).double() * 2 - 1


def _pooling(probe: Probe, known: Known, live: Tensor, half: Tensor, size: float) -> Step:
    """Find the level: at each one, other inputs that it cannot tell apart change no slope."""
    _, change = _changes(probe, known)
    several = live & (live.sum(-1, keepdim=True) > 1)
    counted, lengths = known.counted(probe.batch), known.lengths(probe.batch)
    coins, still = size / 2 * _coins(probe, 1), _coins(probe, 2) > 0

    def differ(one: Tensor, other: Tensor, where: Tensor) -> bool:
        near = max(known.precision.same, 1e-3 * size)
        return bool(apart(change(other) + 1, change(one) + 1, near)[several & where].any())

    if bool((known.live(probe.batch) & (lengths > 1) & ~live).any()):  # where all ratios are equal, one may have all
        found, says = _of_prefixes(probe, known, 2 * half, size)
        if found is not known:
            return found, says
    if not differ(half + coins, half + torch.where(still, coins, -coins), still):
        return known, []
    noise = torch.where(counted, coins, 0.0)
    noise = noise - noise.sum(-1, keepdim=True) / lengths
    if differ(half + noise, half - noise, several):
        return _of_prefixes(probe, known, 2 * half, size)
    if not _is_product(change, several, lengths, half):
        return known.but(level="sequence"), []
    carries = bool(((change(half / lengths) / half - 1).abs() < max(0.05, size))[several].all())
    return known.but(level="sequence_product", carries=carries), []


def _is_product(change: Callable[[Tensor], Tensor], several: Tensor, lengths: Tensor, half: Tensor) -> bool:
    """Whether sequences of any length have one slope where the sums of log-ratios are equal, not their means."""
    sides = [side for side in (several & (half > 0), several & (half < 0)) if bool(side.any())]

    def scatter(x: Tensor) -> tuple[float, float]:
        parts = [change(x)[side] for side in sides]
        largest = max(float(part.abs().max()) for part in parts)
        return max(float(part.max() - part.min()) for part in parts) / largest if largest else math.inf, largest

    (by_mean, growth), (by_sum, _) = scatter(half), scatter(half / lengths)
    if abs(by_mean - by_sum) > 1e-3:
        return by_sum < by_mean
    expected = [float(torch.expm1((half * n).abs()).max()) for n in (torch.ones_like(lengths), lengths)]
    return abs(growth - expected[1]) < abs(growth - expected[0])


def _of_prefixes(probe: Probe, known: Known, inside: Tensor, size: float) -> Step:
    """Find a level of prefixes: the one of which slopes at log-ratios of any order are a first-order expansion."""
    generator = torch.Generator().manual_seed(4)
    share = torch.rand(probe.batch.shape, generator=generator, dtype=torch.float64) / known.lengths(probe.batch)
    levels: tuple[LevelName, ...] = ("prefix_product", "prefix_min")
    for step, level, carries in itertools.product({size, max(size, 1e-2)}, levels, (True, False)):
        own = inside / size * step * share
        if _expands(probe, known, known.but(level=level, carries=carries), own):
            known = known.but(level=level, carries=carries)
            tied = level == "prefix_min" and carries and not _last_of_equal(probe, known)
            return known, [said("level_ties")] if tied else []
    return known, [said("level_unknown")]


def _expands(probe: Probe, known: Known, pooled: Known, own: Tensor) -> bool:
    """Whether slopes at tokens' own log-ratios are those of a level: on-policy ones, times 1 + a factor of each sign
    of the advantage times the pooled log-ratio."""
    counted, sequences = known.counted(probe.batch), Padded(len(own))
    ratios = begin_up_to(torch.where(counted, own, 0.0), counted, sequences, pooled.level == "prefix_min")()
    rest = probe.policy(pooled, 0.0)
    live = known.live(probe.batch) & rest.isfinite()
    rest = torch.where(live, rest, 0.0)

    def spread(slopes: Tensor) -> Tensor:
        return begin_back_from(slopes, sequences, ratios.origin)() if pooled.carries else slopes

    moved = probe.policy(known, own) - spread(rest)
    first_order = spread(rest * torch.where(live, ratios.values, 0.0))
    near = 0.05 if known.precision.name else 0.03
    for sign in (own > 0, own < 0):
        there = live & sign
        y, x = moved[there], first_order[there]
        if len(x) and not bool(((y - (x @ y) / (x @ x) * x).abs() <= near * y.abs().max()).all()):
            return False
    return True


def _last_of_equal(probe: Probe, known: Known) -> bool:
    """Whether of equal ratios the last has the slope, as on the policy itself, where each token then has its own."""
    batch = probe.batch
    leaf, level = probe.alike()
    pair = [probe.run(known, Inputs(batch, level, level, a * probe.signs()), leaf).gradient for a in (1.0, 0.0)]
    slopes = pair[0] - torch.nan_to_num(pair[1])
    reached = slopes != 0 if slopes.dim() == 2 else (slopes != 0).any(-1)
    return bool(reached[known.live(batch)].all())
