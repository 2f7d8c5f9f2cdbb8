"""Which weight each token has: what a loss does to advantages, and how it adds tokens up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .batch import Batch
from .known import INVERTED, QUOTIENT, Known, Said, said
from .numbers import follows
from .probe import Probe
from .scoring import properties
from .weights import Measured, Weights, fit_weights, off_plain, on_batches
from .whitening import Whitening, whitenings

Step = tuple[Known, list[Said]]


def find_whitening(probe: Probe, known: Known) -> Step:
    """Find whether the loss centres or scales advantages itself: the transformation that makes weights plain."""
    A = torch.linspace(-1.1, 1.4, probe.batch.shape[0], dtype=torch.float64).roll(3)
    plain, moved, doubled = (probe.policy(known, 0.0, a) for a in (A, A + 0.5, 2 * A))
    near = max(1e-3, known.precision.same) * plain.abs().max()
    scaled = bool(((doubled - plain).abs() <= near).all())
    if bool(((moved - plain).abs() > near).any()):
        if scaled:
            return known, [said("advantages_scaled")]
        linear = all(bool(((probe.policy(known, 0.0, f * A) / f - plain).abs() <= near).all()) for f in (2, 50, -1))
        return known, [] if linear else [said("advantages_not_linear")]
    best: tuple[bool, float, Whitening] = (True, math.inf, known.whitening)
    for candidate in whitenings(scaled, len(A)):
        tried = known.but(whitening=candidate)
        try:
            weights = fit_weights([measure(probe, tried, probe.batch, A)], known.precision.same)
        except RuntimeError:  # it leaves no advantage that is not 0
            continue
        unfit = weights.spread > known.precision.close
        off = weights.spread if unfit else off_plain(weights.factor)
        if (unfit, off) < best[:2]:
            best = unfit, off, candidate
    if best[0]:
        return known, [said("whitening_unknown")]
    return known.but(whitening=best[2]), [said("whitening", text=best[2].text)]


def measure(probe: Probe, known: Known, batch: Batch, advantages: Tensor | None = None) -> Measured:
    """Return the weights of tokens, (B, T): on-policy slopes over -A.

    A product of ratios that carries gradient hands every token the weight of its whole sequence.
    """
    A = probe.signs(batch) if advantages is None else advantages
    effective = known.effective(A, batch)[:, None]
    live = known.live(batch) & (effective != 0)
    weights = torch.where(live, -probe.policy(known, 0.0, A, batch=batch) / effective, 0.0)
    if known.level == "sequence_product" and known.carries:
        weights = weights / known.counted(batch).sum(-1, keepdim=True).clamp(min=1)
    return Measured(weights, live, known.counted(batch), batch.mask)


def find_weights(probe: Probe, known: Known) -> Step:
    """Find pattern and denominator; and, since it shows here, a quotient of log-probs in the ratio's place."""
    weights = _fit(probe, known)
    if weights.spread > known.precision.close and known.uses_ratio:
        tried = known.but(ratio=QUOTIENT)
        other = _fit(probe, tried)
        if other.spread <= known.precision.close:
            return tried.but(weights=other), [said("quotient"), *_denominator_faults(probe, tried, other)]
    known = known.but(weights=weights)
    says = [said("inverted")] if known.ratio is INVERTED else []
    if weights.spread > known.precision.close:
        return known, [*says, _own_weights(probe, known)]
    return known.but(level=_own_slopes(probe, known)), says + _denominator_faults(probe, known, weights)


def _fit(probe: Probe, known: Known) -> Weights:
    measured = on_batches(lambda batch: measure(probe, known, batch), probe.batches())
    return fit_weights(measured, known.precision.same)


def _denominator_faults(probe: Probe, known: Known, weights: Weights) -> list[Said]:
    if weights.apart > max(1e-3, known.precision.close):
        return [said("denominator")]
    if weights.denominator == "positions":
        return [said("mask_in_numerator", positions=probe.batch.mask.numel())]
    return []


def _own_weights(probe: Probe, known: Known) -> Said:
    """Say what weights follow that no aggregation gives."""
    m = measure(probe, known, probe.batch)
    weights, live = m.weights, m.live
    by = follows(weights[live], properties(known, probe.batch, live))
    rows = [weights[i, live[i]] for i in range(len(live)) if int(live[i].sum()) > 1]
    if all(float((row - row.mean()).abs().max()) <= known.precision.close * float(row.abs().mean()) for row in rows):
        return said("sequence_weights", by=f", which follows its {by}" if by else "")
    return said(
        "no_pattern", spread=known.weights.spread if known.weights else 0.0, by=f"; they follow {by}" if by else ""
    )


def _own_slopes(probe: Probe, known: Known) -> str:
    """Return the level: where advantages come by token, a pooled ratio's slope may follow the token's own."""
    form = probe.caller.form
    assert form is not None
    if known.level != "sequence" or form.advantages != "token" or known.whitening.text:
        return known.level
    generator = torch.Generator().manual_seed(2)
    A = 1 + torch.rand(probe.batch.shape, generator=generator, dtype=torch.float64)
    slopes = probe.policy(known, 0.0, A) / measure(probe, known, probe.batch).weights
    row = slopes[int(known.live(probe.batch).sum(-1).argmax())]
    row = row[row.isfinite() & (row != 0)]
    return "sequence_token" if float((row - row.mean()).abs().max()) > 1e-3 * float(row.abs().mean()) else "sequence"
