"""A divergence from a teacher's rows: which one, from the gradient's rows without advantages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..calls.teacher import Teacher
from ..divergences import token_divergence
from ..objectives.divergence import Divergence, KindName
from .known import Known, Step, said
from .numbers import plain
from .probe import Probe
from .weighing import weights_of_tokens

MIXTURES: tuple[KindName, ...] = ("jsd", "skew_forward_kl", "skew_reverse_kl")
"""The kinds whose gradient is not linear in ``mix``."""


def find_divergence(probe: Probe, known: Known) -> Step:
    """Find the kind, mix and coefficient of which the rows are a multiple."""
    if not (probe.caller.takes("teacher_logits") and probe.on_logits):
        return known, []
    weights, inputs = weights_of_tokens(probe, known), probe.inputs(known, 0.0, probe.zeros())
    noise = torch.randn(probe.batch.logits.shape, generator=torch.Generator().manual_seed(8)).double()
    teacher = probe.batch.logits + 0.7 * noise
    beside, alone = (probe.run(known, dataclasses.replace(inputs, teacher=one)) for one in (teacher, None))
    rows = beside.gradient - alone.gradient
    if not bool((rows.abs() >= max(1e-9, known.precision.same) * weights.abs().max()).any()):
        return known, []

    if not bool(rows.isfinite().all()):
        return known, [said("unknown_divergence", error=math.inf)]

    def rows_of(kind: KindName, mix: float = 0.5) -> Tensor:
        """Return (B, T, V), the gradient of a divergence with the coefficient 1 in the logits."""
        leaf = probe.batch.logits[:, : probe.batch.shape[1]].clone().requires_grad_()
        of_teacher = Teacher(logits=teacher[:, : probe.batch.shape[1]].contiguous())
        ids, counted = known.ids(probe.batch), known.counted(probe.batch)
        divergence, tau = Divergence(kind, mix=mix), known.temperature
        found = token_divergence(leaf, of_teacher, ids, counted, divergence=divergence, temperature=tau)
        (gradient,) = torch.autograd.grad((found.divergence * weights).sum(), leaf)
        return gradient

    divergence, error = _fit(rows, rows_of, known)
    known = known.but(divergence=divergence)
    if error > max(1e-6, known.precision.close):
        return known, [said("unknown_divergence", error=error)]
    return known, [said("divergence_sign")] if divergence.coef < 0 else []


def _fit(rows: Tensor, rows_of: Callable[..., Tensor], known: Known) -> tuple[Divergence, float]:
    """Return the divergence whose rows these are, of several the simplest, and how far they are from it."""
    digits, same = max(1e-6, known.precision.digits), max(1e-6, known.precision.close)
    kinds: tuple[KindName, ...] = ("reverse_kl", "forward_kl", "tvd")
    of_kinds = {kind: _multiples(rows, rows_of(kind)) for kind in kinds}
    found = [(Divergence(kind, coef), error) for kind, ((coef,), error) in of_kinds.items()]
    (forward, reverse), error = _multiples(rows, rows_of("forward_kl"), rows_of("reverse_kl"))
    if forward * reverse > 0 and min(forward / reverse, reverse / forward) > digits:
        coef = forward + reverse
        found.append((Divergence("mixed_kl", coef, plain(forward / coef, digits)), error))
    for kind in MIXTURES:
        mix = _least(lambda mix, kind=kind: _multiples(rows, rows_of(kind, mix))[1])  # type: ignore[misc]
        (coef,), error = _multiples(rows, rows_of(kind, mix))
        found.append((Divergence(kind, coef, plain(mix, digits)), error))
    divergence, error = min(found, key=lambda one: max(one[1], same))
    return dataclasses.replace(divergence, coef=plain(divergence.coef, digits)), error


def _multiples(rows: Tensor, *kinds: Tensor) -> tuple[list[float], float]:
    """Return the factors with which kinds add up to rows, and how far they are from them."""
    basis = torch.stack([kind.flatten() for kind in kinds], -1)
    factors = torch.linalg.lstsq(basis, rows.flatten()[:, None]).solution
    apart = rows.flatten() - (basis @ factors).squeeze(-1)
    return factors.flatten().tolist(), float(apart.norm() / rows.norm())


def _least(error: Callable[[float], float]) -> float:
    """Return where in (0, 1) an error is least: the best of a grid, then thirds."""
    best = min((k / 20 for k in range(1, 20)), key=error)
    low, high = max(best - 0.05, 1e-3), min(best + 0.05, 1 - 1e-3)
    for _ in range(50):
        one, other = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, other) if error(one) <= error(other) else (one, high)
    return (low + high) / 2
