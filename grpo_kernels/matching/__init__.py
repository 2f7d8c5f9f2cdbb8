"""Which LossConfig is the loss that you have: ``match`` finds it by measuring, ``shadow`` watches in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, standard_batch, users_batch
from .call import Caller, Response
from .finding import NORMALIZERS, Finding, Inputs, differences, measured
from .fit import slopes_of
from .probe import EXACT, ROUNDED, Probe, describe, start
from .report import Difference, MatchReport, text_of
from .search import Search
from .shadowing import shadow

__all__ = ["MatchReport", "match", "shadow"]

MATCHED = {EXACT: 1e-6, ROUNDED: 1e-3}
"""Largest relative gradient difference of a loss that counts as reproduced; honest ones give 1e-15 and 1e-6."""


def match(
    loss_fn: Callable[..., Any],
    batch: Mapping[str, Tensor] | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    temperature: float | None = None,
    device: torch.device | str | None = None,
) -> MatchReport:
    """Find the ``LossConfig`` that is your loss, by calling it in float64 on a small batch made to tell options apart.

    Your function is called some hundred times with ragged sequences (one of them empty), ratios on both sides of
    every bound, advantages of both signs and distances from the reference; its slopes are read off, and the result is
    compared with ``grpo_loss``, value and gradient.

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
        MatchReport: print it. True in an ``if`` when a config reproduces your gradient and no fault was found.

    Raises:
        ValueError: the function cannot be called (unknown parameters, nothing that runs), does not return a
            differentiable scalar, or is not finite on plain inputs; the message says what was tried.
    """
    if device is None:
        device = next((v.device for v in (batch or {}).values() if isinstance(v, Tensor)), "cpu")
    caller = Caller(loss_fn, arguments, temperature, device)
    chosen = standard_batch() if batch is None else users_batch(batch)
    if not caller.masks:
        chosen = chosen.unmasked()
    probe, faults = start(caller, chosen)
    search = Search(probe, temperature)
    search.faults |= {name: {} for name in faults}
    finding = search.run()
    return _report(search, finding)


def _report(search: Search, finding: Finding) -> MatchReport:
    probe = search.probe
    inputs = verification(search)
    worst_gradient, worst_loss, tokens = 0.0, 0.0, []
    for given in inputs:
        (theirs, their_gradient), (ours, our_gradient) = measured(probe, given), finding.predict(probe, given)
        share = torch.nan_to_num(differences(our_gradient, their_gradient), nan=math.inf, posinf=math.inf)
        worst_gradient = max(worst_gradient, float(share.max()))
        size = max(abs(ours), abs(theirs), 1e-3 * abs(finding.factor))
        loss_difference = abs(ours - theirs) / size
        if not loss_difference <= worst_loss:
            worst_loss = math.inf if math.isnan(loss_difference) else loss_difference
            values = {"theirs": theirs, "ours": ours}
        tokens += _tokens(probe, given, our_gradient, their_gradient, share, MATCHED[probe.tolerance])
    reproduced = worst_gradient <= MATCHED[probe.tolerance]
    if reproduced and worst_loss > MATCHED[probe.tolerance]:
        search.notes["value"] = values
    _add_notes(search, finding)
    form = probe.caller.form
    assert form is not None
    return MatchReport(
        matched=reproduced and not search.faults and not search.strange,
        config=finding.config,
        factor=finding.factor,
        normalizer=NORMALIZERS.get(finding.denominator),
        temperature=probe.temperature,
        temperature_source="temperature" if probe.caller.takes("temperature") else f"{probe.temperature:g}",
        gradient_difference=worst_gradient,
        loss_difference=worst_loss,
        faults=_said(search.faults),
        strange=_said(search.strange),
        notes=_said(search.notes),
        regions=() if reproduced else tuple(regions(search, finding)),
        tokens=tuple(tokens),
        form=describe(form, probe.batch),
    )


def _said(found: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    return tuple(text_of(key, values) for key, values in found.items())


def _add_notes(search: Search, finding: Finding) -> None:
    if finding.config.log_ratio_limit is None and search.uses_ratio:
        search.notes["no_limit"] = {}
    caller = search.probe.caller
    if not caller.masks and finding.config.aggregation == "token_mean":
        search.notes["same_without_mask"] = {}
    elif search.probe.batch.own and len(set(search.probe.live(search.probe.batch).sum(-1).tolist())) < 2:
        search.notes["one_batch"] = {}


def verification(search: Search) -> list[Inputs]:
    """Inputs on which finding and loss are compared: ratios around every bound that was found; other batches; own."""
    probe = search.probe
    generator = torch.Generator().manual_seed(5)
    limits = [limit for limit in (search.surrogate.log_ratio_limit, search.kl.limit[0]) if limit and limit < 15]
    bounds = [math.log(b) for b in search.surrogate.surrogate.parameters() if 0 < b < math.exp(5)] + limits
    points = [e * f for e in bounds for f in (0.5, 1.5)] + [-2.5, -0.6, 0.5, 2.5, 1e-3]
    found = [_drawn(search, probe.batch, points, generator) for _ in range(3)]
    zeros = found[-1].advantages * (torch.arange(len(found[-1].advantages)) % 2)
    found.append(dataclasses.replace(found[-1], advantages=zeros))
    for batch in search.batches()[1:]:
        given = _drawn(search, batch, points, generator)
        try:
            measured(probe, given)
        except Exception:  # a loss may insist on its first batch's sizes
            continue
        found.append(given)
    values = probe.batch.values
    if values:
        first = found[0]
        drawn = {"old_log_probs": first.old, "ref_log_probs": first.ref, "advantages": first.advantages}
        found.append(Inputs(probe.batch, *(values.get(name, value) for name, value in drawn.items())))
    return found


def _drawn(search: Search, batch: Batch, points: list[float], generator: torch.Generator) -> Inputs:
    probe = search.probe
    log_probs, live = probe.log_probs(batch), probe.live(batch)
    log_ratio = torch.tensor(points, dtype=torch.float64)[torch.randint(len(points), batch.shape, generator=generator)]
    if search.level != "token":
        # A pooled log-ratio from the points, of tokens that differ by far more than any bound.
        lengths = live.sum(-1, keepdim=True).clamp(min=1)
        noise = 0.5 * torch.randn(batch.shape, generator=generator).double() * live
        pooled = log_ratio[:, :1] / (lengths if search.level == "sequence_product" else 1)
        log_ratio = pooled + noise - noise.sum(-1, keepdim=True) / lengths * live
    A = torch.randn(batch.shape[0], generator=generator).double()
    spread = 1.0 if search.kl.limit[0] is None else min(1.0, search.kl.limit[0] / 2)
    distance = spread * torch.randn(batch.shape, generator=generator).double()
    return Inputs(batch, probe.ratio.old(log_probs, log_ratio), log_probs - distance, A)


def _tokens(
    probe: Probe, inputs: Inputs, ours: Tensor, theirs: Tensor, share: Tensor, allowed: float
) -> list[Difference]:
    batch = inputs.batch
    log_probs = probe.log_probs(batch)
    slopes = [probe.tokens(batch, Response(0.0, g, None, torch.float64)).slope for g in (theirs, ours)]
    advantages = probe.effective(inputs.advantages, batch) if inputs.advantages.dim() == 1 else inputs.advantages[:, 0]
    ratio = torch.exp(log_probs - inputs.old)
    return [
        Difference(i, t, float(ratio[i, t]), float(advantages[i]), float((log_probs - inputs.ref)[i, t]),
                   float(slopes[0][i, t]), float(slopes[1][i, t]))
        for i, t in (share > allowed).nonzero().tolist()
    ]  # fmt: skip


def regions(search: Search, finding: Finding) -> list[str]:
    """Where the slope of a loss parts from the config's, in ratio and sign of the advantage; a sentence each."""
    if not search.uses_ratio:
        return []
    found = []
    points = torch.linspace(-3, 3, 121, dtype=torch.float64)
    limit = finding.config.log_ratio_limit or math.inf
    for sign in (1, -1):
        theirs = search.curve(points, sign)
        ours = slopes_of(finding.config.surrogate, points.clamp(-limit, limit), sign)
        apart = ((theirs - ours).abs() > 1e-3 * torch.maximum(theirs.abs(), ours.abs())).tolist()
        begin = None
        for k, differs in enumerate([*apart, False]):
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
