"""Which surrogate the policy term has: bounds that slopes stop at (fit.py), or other shapes (soft.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..objectives.config import LossConfig
from ..objectives.surrogates import Cispo, Clip, Dro, Gmpo, Reinforce, Surrogate, Unclipped
from . import fit, soft

if TYPE_CHECKING:
    from .search import Search


def find_surrogate(search: Search) -> None:
    """The surrogate, its limit, and what is wrong or strange about it."""
    search.surrogate = _found(search)
    for key in search.surrogate.faults:
        search.faults[key] = {}
    for key in search.surrogate.notes:
        search.notes[key] = {"limit": search.surrogate.log_ratio_limit}


def _found(search: Search) -> fit.Surrogates:
    limit, tolerance = LossConfig().log_ratio_limit, search.probe.tolerance
    if search.cap != 1.0:
        return fit.Surrogates(Cispo(cap=search.cap), limit)
    if not search.uses_ratio:
        return fit.Surrogates(_without_ratio(search), limit)
    found = soft.soft(search.curve, tolerance, search.level == "sequence_product")
    if found is not None:
        return fit.Surrogates(found, limit)
    fitted = fit.fit_surrogate(search.curve, tolerance)
    error = fit.misfit(search.curve, fitted, tolerance)
    fits = error <= 1e3 * tolerance
    if search.level == "token" and not fits:
        log_probs = search.probe.log_probs(search.probe.batch)
        found = soft.dppo(lambda x: _factors(search, x), log_probs, _signs(search) > 0, tolerance)
    if search.level == "sequence" and isinstance(fitted.surrogate, Clip):
        found = _bounds_before_the_mean(search, fitted.surrogate)
    if found is not None:
        return fit.Surrogates(found, fitted.log_ratio_limit if fits else limit)
    if not fits and not fitted.faults:
        search.strange["unknown_surrogate"] = {"error": error}
    return fitted


def _without_ratio(search: Search) -> Surrogate:
    """Where no ratio moves a slope: a policy gradient, perhaps with a spring."""
    spring = _spring(search) if search.probe.caller.takes("old_log_probs") else None
    if spring is not None:
        search.uses_ratio = True
        for told in (search.faults, search.notes):
            told.pop("old_ignored", None)
    return Unclipped() if search.value_is_a_ratio() else spring or Reinforce()


def _signs(search: Search) -> Tensor:
    """(B, T) of the effective advantages of ``probe.signs``."""
    probe = search.probe
    return probe.effective(probe.signs())[:, None].expand(probe.batch.shape)


def _factors(search: Search, log_ratio: Tensor) -> Tensor:
    """``soft.Everywhere``"""
    weights, live, _ = search.at_rest()
    slopes = -search.probe.policy(log_ratio, search.probe.signs()) / (weights * _signs(search))
    return torch.where(live & (weights != 0), slopes, torch.nan)


def _bounds_before_the_mean(search: Search, clip: Clip) -> Surrogate | None:
    """GMPO: a token that is far out on its own has no slope, although the mean of its sequence is not."""
    if clip.dual is not None or clip.low == 1:
        return None
    low, high = -math.log1p(-clip.low), math.log1p(clip.high)
    _, live, _ = search.at_rest()
    lengths = live.sum(-1)
    sign = _signs(search).sign()
    row = next((i for i in torch.argsort(-lengths).tolist() if sign[i, 0] > 0 and lengths[i] > 2), None)
    if row is None:
        return None
    place = int(live[row].nonzero()[0])
    moved = torch.zeros(search.probe.batch.shape, dtype=torch.float64)
    moved[row, place] = 1.5 * high
    factor = _factors(search, moved)[row]
    others = [t for t in live[row].nonzero().flatten().tolist() if t != place]
    if abs(float(factor[place])) > 1e-6 or float(factor[others].min()) < 0.5:
        return None
    digits = max(1e-7, 10 * search.probe.tolerance)
    return Gmpo(fit.plain(low, digits), fit.plain(high, digits))


def _spring(search: Search) -> Surrogate | None:
    """DRO: without an advantage, a pull towards the old policy that is proportional to the log-ratio."""
    probe = search.probe
    weights, live, _ = search.at_rest()
    zero = torch.zeros(probe.batch.shape[0], dtype=torch.float64)
    at = (-1.0, 0.0, 0.5, 2.0)
    pulls = [(probe.at(x, zero).slope / weights)[live] for x in at]
    if not all(bool(pull.isfinite().all()) for pull in pulls):
        return None
    strengths = [(pull - pulls[1]) / x for pull, x in zip(pulls, at, strict=True) if x]
    beta = float(strengths[0].mean())
    apart = max(float((strength - beta).abs().max()) for strength in strengths)
    if beta < 1e-6 or apart > 1e3 * probe.tolerance * beta:
        return None
    return Dro(fit.plain(beta, max(1e-9, 10 * probe.tolerance)))
