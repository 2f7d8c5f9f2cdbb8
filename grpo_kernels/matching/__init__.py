"""Which LossConfig is the loss that you have: ``match`` finds it by measuring, ``shadow`` watches in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import standard_batch, users_batch
from .call import PYTHON, Caller, Words
from .field import Field
from .known import Known, Said, said
from .numbers import plain
from .probe import Probe, describe, start
from .proof import Proof, beside_the_config, prove
from .report import BESIDE, FAULTS, NOTES, STRANGE, MatchReport, lines_of, text_of
from .search import learn
from .shadowing import shadow

__all__ = ["MatchReport", "match", "shadow"]


def match(
    loss_fn: Callable[..., Any],
    batch: Mapping[str, Tensor] | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    temperature: float | None = None,
    device: torch.device | str | None = None,
) -> MatchReport:
    """Find the ``LossConfig`` that is your loss, by calling it in float64 on a small batch made to tell options apart.

    Your function is called some thousand times with ragged sequences (one of them empty), ratios on both sides of
    every bound, advantages of both signs and distances from the reference; its slopes are read off. What was found is
    then compared with ``grpo_loss``, value and gradient, on that batch and on a second one of other lengths, logits,
    ratios and advantages.

    Args:
        loss_fn: takes log-probs or logits and whatever else of a batch it wants, by parameter name (``old_logprobs``,
            ``response_mask``, ``advantages``, ... in the spellings of TRL, verl, OpenRLHF, CleanRL; or one dict).
            Returns the scalar to be minimised, alone or as the first tensor or the ``loss`` of what it returns.
            Bind everything else: ``functools.partial(loss, clip=0.2)``.
        batch: tensors of your own instead of the built-in ones, where sizes matter: ``mask`` (B, T), ``logits``
            (B, T or T+1, V) with ``token_ids`` (B, T), or ``log_probs`` (B, T); ``advantages`` (B,),
            ``old_log_probs``, ``ref_log_probs`` (B, T). Values are varied; the given ones are compared as well.
        arguments: meaning of parameters whose names do not tell, ``{"x": "log_probs"}``.
        temperature: the sampler's, for a loss on logits: one that does not divide by it is then a fault.
        device: where your function wants its tensors; by default where those of ``batch`` are.

    Returns:
        MatchReport: print it, 14 lines at most. True in an ``if`` when a config has your loss's gradient and value and
        no fault was found.

    Raises:
        ValueError: the function cannot be called (unknown parameters, nothing that runs), does not return a
            differentiable scalar, draws random numbers, or is not finite on plain inputs; the message says what to do.
    """
    return match_in_words(PYTHON, loss_fn, batch, arguments, temperature, device)


def match_in_words(
    words: Words,
    loss_fn: Callable[..., Any],
    batch: Mapping[str, Tensor] | None,
    arguments: Mapping[str, str] | None,
    temperature: float | None,
    device: torch.device | str | None,
) -> MatchReport:
    """Do what ``match`` does; ``words`` is how messages tell the reader what to do."""
    if device is None:
        device = next((v.device for v in (batch or {}).values() if isinstance(v, Tensor)), "cpu")
    caller = Caller(loss_fn, arguments, temperature, device, words)
    chosen = standard_batch() if batch is None else users_batch(batch)
    if not caller.masks:
        chosen = chosen.unmasked()
    probe, known, says = start(caller, chosen, temperature)
    known, found, whole = learn(probe, known)
    says += found
    proof = prove(probe, known) if whole else None
    if proof is not None:
        says += _proven(probe, known, proof, says)
    says += _asides(probe, known, proof)
    return _report(probe, known, proof, says)


def _proven(probe: Probe, known: Known, proof: Proof, says: list[Said]) -> list[Said]:
    """Return what the proof adds to what was measured."""
    matched = known.precision.matched
    if proof.gradient > matched:
        named = any(one.key in STRANGE.keys() - BESIDE or one.key in FAULTS for one in says)
        return [] if named else [beside_the_config(probe, known) or said("unproven", apart=proof.apart)]
    if proof.value > matched:
        return [said("value", share=proof.value)]
    if proof.batches < 2:
        return [said("no_second_batch")]
    return [said("constant", constant=proof.constant)] if proof.constant else []


def _asides(probe: Probe, known: Known, proof: Proof | None) -> list[Said]:
    """Return faults of sign, and what else to know of a loss whose every property was looked at."""
    says = [said("rounded", name=known.precision.name, same=known.precision.matched)] if known.precision.name else []
    if proof is None:
        return says
    caller = probe.caller
    if known.factor < 0:
        says.append(said("sign"))
    if proof.gradient > known.precision.matched:
        return says
    if not caller.takes("old_log_probs") and known.surrogate.uses_ratio:
        says.append(said("on_policy"))
    if known.log_ratio_limit is None and known.uses_ratio:
        says.append(said("no_limit"))
    if not caller.masks and known.config.aggregation == "token_mean":
        says.append(said("same_without_mask"))
    elif probe.batch.own and len(set(known.counted(probe.batch).sum(-1).tolist())) < 2:
        says.append(said("one_batch"))
    return says


def _report(probe: Probe, known: Known, proof: Proof | None, says: list[Said]) -> MatchReport:
    faults, strange, notes = ([one for one in says if one.key in texts] for texts in (FAULTS, STRANGE, NOTES))
    reproduced = proof is not None and proof.gradient <= known.precision.matched
    reproduced = reproduced and all(one.key in BESIDE for one in strange)
    form = probe.caller.form
    assert form is not None
    mended = _mended(known, {one.key for one in faults}) if reproduced else known
    weights = mended.weights
    report = MatchReport(
        matched=reproduced and not faults and not strange,
        config=mended.config,
        factor=_plain_factor(mended),
        normalizer=weights.normalizer().normalizer if weights else None,
        threshold=known.threshold.source() if known.threshold else None,
        temperature=known.temperature,
        temperature_source="temperature" if probe.caller.takes("temperature") else f"{known.temperature:g}",
        gradient_difference=math.inf if proof is None else proof.gradient,
        loss_difference=math.inf if proof is None else proof.value,
        batches=0 if proof is None else proof.batches,
        faults=_texts(faults),
        strange=_texts(strange),
        notes=_texts(notes),
        regions=() if reproduced or proof is None else tuple(regions(probe, known)),
        tokens=() if proof is None else tuple(proof.tokens),
        form=describe(form, probe.batch),
        lines=(),
    )
    if not reproduced:
        return report
    names = {"old_log_probs": known.uses_ratio and probe.caller.takes("old_log_probs")}
    names |= {"ref_log_probs": known.kl.coef != 0, "rollout_log_probs": bool(known.rollout)}
    lines = lines_of(report, [name for name, used in names.items() if used], known.whitening.lines(form.advantages))
    return dataclasses.replace(report, lines=lines)


def _texts(says: list[Said]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text_of(one.key, one.values) for one in says))


def _plain_factor(known: Known) -> float:
    return plain(known.factor, max(1e-7, known.precision.digits))


def _mended(known: Known, faults: set[str]) -> Known:
    """Return the loss that was meant: signs as they should be, tokens divided by tokens, a temperature where asked."""
    weights = known.weights
    assert weights is not None
    of_the_mask = {"mask_in_numerator", "padding", "inverted_mask", "last_left_out", "first_left_out", "dropped"}
    if faults & of_the_mask and weights.denominator in ("positions", "tokens of the mask"):
        weights = dataclasses.replace(weights, denominator="tokens")
    if "sign" in faults:
        weights = dataclasses.replace(weights, factor=abs(weights.factor))
    kl = dataclasses.replace(known.kl, coef=abs(known.kl.coef)) if "kl_sign" in faults else known.kl
    return known.but(weights=weights, kl=kl)


def regions(probe: Probe, known: Known) -> list[str]:
    """Return where the slope of a loss parts from the config's, in ratio and sign of the advantage; a sentence each."""
    if not known.uses_ratio:
        return []
    field = Field(probe, known)
    points = torch.linspace(-3, 3, 121, dtype=torch.float64)
    limit = known.log_ratio_limit or math.inf
    curves = field.curve(points)
    ours_of_all = field.of(known.surrogate, points.clamp(-limit, limit))
    found = []
    for sign in (1, -1):
        i, t = field.side(sign).nonzero()[0].tolist()
        theirs, ours = -sign * curves[sign], -sign * ours_of_all[:, i, t]
        apart = (theirs - ours).abs() > max(1e-3, known.precision.close) * torch.maximum(theirs.abs(), ours.abs())
        if known.level == "token":
            apart &= points > field.log_prob[i, t]  # the old policy's probability is at most 1
        begin = None
        for k, differs in enumerate([*apart.tolist(), False]):
            if differs and begin is None:
                begin = k
            elif not differs and begin is not None:
                found.append(_region(points, begin, k - 1, sign, theirs, ours))
                begin = None
    return found


def _region(points: Tensor, begin: int, end: int, sign: int, theirs: Tensor, ours: Tensor) -> str:
    low, high = math.exp(points[begin]), math.exp(points[end])
    if begin == 0:
        where = f"ratio < {high:.3g}" if end < len(points) - 1 else "any ratio"
    else:
        where = f"ratio > {low:.3g}" if end == len(points) - 1 else f"ratio {low:.3g} to {high:.3g}"
    middle = (begin + end) // 2
    yours, mine = (float(slopes[middle]) for slopes in (theirs, ours))
    kind = "yours is clipped" if abs(yours) < 1e-6 < abs(mine) else f"your slope is {yours:+.3g}·|A|"
    side = ">" if sign > 0 else "<"
    at = math.exp(points[middle])
    return f"tokens with {where} and A {side} 0: {kind}, ours {mine:+.3g}·|A| (at ratio {at:.3g})"
