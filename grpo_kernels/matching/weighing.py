"""Which weight each token has: what a loss does to advantages, and how it adds tokens up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objectives.levels import LevelName
from .batch import Batch, taken
from .known import INVERTED, QUOTIENT, Known, Said, Step, said
from .numbers import follows, spread
from .probe import Probe
from .scoring import properties
from .weights import Measured, fit_weights, off_plain, patterns
from .whitening import Whitening, whitenings


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
        m = measure(probe, known.but(whitening=candidate), probe.batch, A)
        if not bool(m.live.any()):
            continue
        weights = fit_weights([m], known.precision.same)
        unfit = weights.spread > known.precision.close
        best = min(
            best, (unfit, weights.spread if unfit else off_plain(weights.factor), candidate), key=lambda b: b[:2]
        )
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
        weights = weights / known.lengths(batch)
    return Measured(weights, live, known.counted(batch), batch.mask)


def weights_of_tokens(probe: Probe, known: Known) -> Tensor:
    """Return the (B, T) weights of tokens that count, with or without a policy term."""
    m = measure(probe, known, probe.batch)
    w = known.weights
    if w.spread > known.precision.close:
        return m.weights
    pattern = patterns(m.counted, m.counted)[w.pattern, w.group_size]
    return pattern * w.factor / w.divisor.of(m.counted, m.mask)


def find_weights(probe: Probe, known: Known) -> Step:
    """Find pattern and denominator; and, since it shows here, a quotient of log-probs in the ratio's place."""
    close, found = known.precision.close, _fitted(probe, known)
    if found.weights.spread > close and known.uses_ratio:
        quotient = _fitted(probe, known.but(ratio=QUOTIENT))
        found = quotient if quotient.weights.spread <= close else found
    says = [said(found.ratio.name)] if found.ratio in (QUOTIENT, INVERTED) else []
    weights = found.weights
    if weights.spread > close:
        return found, [*says, _own_weights(probe, found)]
    if weights.apart > max(1e-3, close):
        says.append(said("denominator"))
    elif weights.denominator == "positions":
        says.append(said("mask_in_numerator", positions=probe.batch.mask.numel()))
    return found.but(level=_own_slopes(probe, found)), says


def _fitted(probe: Probe, known: Known) -> Known:
    measured = taken(lambda batch: measure(probe, known, batch), probe.batches())
    return known.but(weights=fit_weights(list(measured), known.precision.same))


def _own_weights(probe: Probe, known: Known) -> Said:
    """Say what weights follow that no aggregation gives."""
    m = measure(probe, known, probe.batch)
    by = follows(m.weights[m.live], properties(known, probe.batch, m.live))
    if all(spread(row[live]) <= known.precision.close for row, live in zip(m.weights, m.live, strict=True)):
        return said("sequence_weights", by=f", which follows its {by}" if by else "")
    return said("no_pattern", spread=known.weights.spread, by=f"; they follow {by}" if by else "")


def _own_slopes(probe: Probe, known: Known) -> LevelName:
    """Return the level: where advantages come by token, a pooled ratio's slope may follow the token's own."""
    if known.level != "sequence" or probe.form.advantages != "token" or known.whitening.text:
        return known.level
    generator = torch.Generator().manual_seed(2)
    A = 1 + torch.rand(probe.batch.shape, generator=generator, dtype=torch.float64)
    slopes = probe.policy(known, 0.0, A) / measure(probe, known, probe.batch).weights
    row = slopes[int(known.live(probe.batch).sum(-1).argmax())]
    return "sequence_token" if spread(row[row.isfinite() & (row != 0)]) > 1e-3 else "sequence"
