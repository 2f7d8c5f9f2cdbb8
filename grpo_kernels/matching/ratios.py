"""How a loss compares with the old policy: through which ratio, and how log-ratios are pooled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .known import INVERTED, Known, Said, said
from .probe import Probe

Step = tuple[Known, list[Said]]
SIZES = (5e-2, 0.6, 4.0)
"""Log-ratios that are tried after the smallest one: a cap below 1 shows far below 1 only."""


def find_missing_exp(probe: Probe, known: Known) -> Step:
    """Find a log-ratio in the ratio's place: its slope does not follow it, and its value is a line in it."""
    if not probe.caller.takes("old_log_probs"):
        return known, []
    A = probe.signs()
    for A in (probe.signs(), *(torch.where(probe.signs() == s, probe.signs(), 0.0) for s in (1, -1))):
        near, far = (probe.policy(known, x, A) for x in (1.0, 1.25))
        both = near.isfinite() & far.isfinite() & (near != 0) & (far != 0)
        if not bool(both.any()) or bool(((far - near).abs() > 1e-2 * near.abs())[both].any()):
            continue
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
    rest = probe.policy(known, 0.0, probe.signs())
    near = max(1e-3, known.precision.same)
    for size in (0.05, 0.2, 1.0, 3.0):
        for still in (rows % 2 == 0, (rows // 2) % 2 == 0, (rows // 4) % 2 == 0):
            for direction in (1, -1):
                moved = torch.where(still, 0.0, direction * size).double()[:, None]
                slopes = probe.policy(known, moved, probe.signs())[still]
                apart = (slopes - rest[still]).abs() > near * rest[still].abs()
                if bool((apart & slopes.isfinite()).any()):
                    stopped = not bool(slopes.nan_to_num().any())
                    return known, [said("early_stop" if stopped else "coupled_ratios", size=size)]
    return known, []


def find_level(probe: Probe, known: Known) -> Step:
    """Find whether a token's slope follows its own log-ratio or its sequence's, their mean or their sum."""
    if not probe.caller.takes("old_log_probs"):
        return known.but(uses_ratio=False), []
    rest = probe.policy(known, 0.0, probe.signs())
    live = known.live(probe.batch) & (rest != 0) & rest.isfinite()
    sign = known.effective(probe.signs(), probe.batch).sign()[:, None]
    size = _effective_size(probe, known, rest, live)
    if size is None:
        return known.but(uses_ratio=False), []
    inside = -size * sign  # where no clip stops a slope
    change = probe.policy(known, inside, probe.signs()) / rest - 1
    growth = [(change / inside)[live & (sign == s)].mean() for s in (1, -1)]
    rises = float((rest * sign)[live].mean()) > 0
    if rises and all(bool(g < 0) or bool(g.isnan()) for g in growth):
        known = known.but(ratio=INVERTED)
        rest = probe.policy(known, 0.0, probe.signs())
    return _pooling(probe, known, rest, live, size, inside)


def _effective_size(probe: Probe, known: Known, rest: Tensor, live: Tensor) -> float | None:
    """Return the smallest log-ratio that moves a slope; None: none does."""
    for size in (known.precision.step, *(s for s in SIZES if s > known.precision.step)):
        change = probe.policy(known, size * _coins(probe, 0), probe.signs()) / rest - 1
        if float(change[live].nan_to_num().abs().max() if bool(live.any()) else 0.0) > 0.02 * size:
            return size
    return None


def _coins(probe: Probe, seed: int) -> Tensor:
    """Return (B, T) numbers ±1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, probe.batch.shape, generator=generator).double() * 2 - 1


def _pooling(probe: Probe, known: Known, rest: Tensor, live: Tensor, size: float, inside: Tensor) -> Step:
    """Find the level: at each one, other inputs that it cannot tell apart change no slope."""
    near = max(known.precision.same, 1e-3 * size)
    several = live & (live.sum(-1, keepdim=True) > 1)
    counted = known.counted(probe.batch)
    coins, still = size * _coins(probe, 1), _coins(probe, 2) > 0

    def apart(one: Tensor, other: Tensor, where: Tensor) -> bool:
        slopes = [probe.policy(known, x, probe.signs()) / rest for x in (one, other)]
        return bool(((slopes[0] - slopes[1]).abs() > near * slopes[0].abs())[several & where].any())

    half = inside / 2
    if not apart(half + coins / 2, half + torch.where(still, coins, -coins) / 2, still):
        return known, []
    noise = torch.where(counted, coins, 0.0)
    noise = noise - noise.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    if apart(half + noise / 2, half - noise / 2, torch.ones_like(live)):
        return known, [said("level_unknown")]
    lengths = counted.sum(-1, keepdim=True).clamp(min=1).double()
    if not _is_product(probe, known, rest, several, lengths, half):
        return known.but(level="sequence"), []
    growth = (probe.policy(known, half / lengths, probe.signs()) / rest - 1) / half
    carries = bool(((growth - 1).abs() < max(0.05, size))[several].all())
    return known.but(level="sequence_product", carries=carries), []


def _is_product(probe: Probe, known: Known, rest: Tensor, several: Tensor, lengths: Tensor, half: Tensor) -> bool:
    """Whether sequences of any length have one slope where the sums of log-ratios are equal, not their means."""
    sign = half.sign()

    def spread(x: Tensor) -> tuple[float, float]:
        change = probe.policy(known, x, probe.signs()) / rest - 1
        parts = [change[several & (sign == s)] for s in (1, -1)]
        largest = max(float(part.abs().max()) for part in parts if part.numel())
        if largest == 0:
            return math.inf, 0.0
        return max(float(part.max() - part.min()) for part in parts if part.numel()) / largest, largest

    (by_mean, growth), (by_sum, _) = spread(half), spread(half / lengths)
    if abs(by_mean - by_sum) > 1e-3:
        return by_sum < by_mean
    expected = [float(torch.expm1((half * n).abs()).max()) for n in (torch.ones_like(lengths), lengths)]
    return abs(growth - expected[1]) < abs(growth - expected[0])
