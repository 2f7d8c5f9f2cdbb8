"""What match says: the config that reproduces a loss, or what is known of it and where the nearest config parts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives.config import LossConfig
from ..objectives.kl import KL
from ..objectives.rollout import Rollout
from ..objectives.surrogates import Surrogate
from .field import Field
from .known import Known, Said
from .numbers import apart, plain
from .probe import Probe, describe
from .proof import Difference, Proof

FAULTS: dict[str, str] = {
    "empty_sequence": "a sequence without tokens makes the loss or its gradient NaN (0/0): clamp the length, "
    "mask.sum(-1).clamp(min=1). The rest was measured without such a sequence",
    "unknown_tokens": "rows of the logits score tokens that are not near theirs in the batch",
    "shifted_ids": "tokens shifted by one: row t of the logits is scored with {which}",
    "shifted_old": "tokens shifted by one: the log-prob at t is compared with the old log-prob at t{away:+d}",
    "shifted_mask": "tokens shifted by one: the mask at t{away:+d} decides about the token at t",
    "no_temperature": "missing temperature: the sampler's is {asked:g}, and the logits are not divided by it",
    "other_temperature": "another temperature: the sampler's is {asked:g}, the logits are divided by {found:g}",
    "padding": "mask in the denominator only, or nowhere: masked tokens get a gradient",
    "inverted_mask": "the mask is taken for the padding: tokens count where it is 0, and only there",
    "last_left_out": "the last token of every sequence is left out (EOS masked?): if that is meant, leave it out of "
    "the mask",
    "first_left_out": "the first token of every sequence is left out: if that is meant, leave it out of the mask",
    "ids_left_out": "tokens of id {ids} are left out (EOS or padding masked?): if that is meant, leave them out of the "
    "mask",
    "mask_in_numerator": "mask in the numerator only: masked terms are 0 but count in the mean over all {positions} "
    "positions, so the loss shrinks with padding. Divide by mask.sum(), or by the longest length given once "
    "(Dr. GRPO, aggregation=Constant(longest))",
    "missing_exp": "the ratio has no exp: log_probs - old_log_probs stands where exp(log_probs - old_log_probs) "
    "belongs. Nothing behind it was measured; mend it and ask again",
    "early_stop": "an early stop: once other sequences' log-ratios have moved by {size:g}, no token has a gradient (a "
    "bound on the batch's KL?). Ask again without it; a training loop can stop by out.metrics.k3_old instead",
    "quotient": "the ratio is a quotient of log-probs, ℓ / old; it must be exp(ℓ - old)",
    "inverted": "the ratio is inverted: exp(old - ℓ); it must be exp(ℓ - old)",
    "sign": "the sign is wrong: minimising this loss makes tokens with a positive advantage less likely",
    "optimistic_clip": "the clip takes the larger of the two objectives; PPO takes the smaller (the larger loss)",
    "clip_without_min": "the ratio is clipped without the minimum with the unclipped term: tokens that left the trust "
    "region in the wrong direction get no gradient to come back",
    "min_before_advantage": "the minimum is taken of the ratios, before the advantage: min(r, clip(r))·A stops tokens "
    "of A < 0 where they should be pushed back; PPO's is min(r·A, clip(r)·A)",
    "max_before_advantage": "the maximum is taken of the ratios, before the advantage: max(r, clip(r))·A stops tokens "
    "of A > 0 where they should come back; PPO's is the minimum, min(r·A, clip(r)·A)",
    "kl_reversed": "the KL term has log-probs and reference exchanged: k3 is exp(ref - ℓ) - (ref - ℓ) - 1",
    "dropped": "the {columns} column of the batch is left out: log-probs that are aligned already lose a token",
    "old_ignored": "old_log_probs have no effect on the gradient: without a ratio to them nothing is ever clipped",
    "divergence_sign": "the sign of the divergence is wrong: it rewards distance from the teacher",
    "kl_sign": "the sign of the KL term is wrong: it rewards distance",
    "kl_unmasked": "the KL term is not masked: masked tokens get a gradient from it",
    "entropy_unmasked": "the entropy term is not masked: masked tokens get a gradient from it",
}
STRANGE: dict[str, str] = {
    "advantages_not_linear": "the loss is not proportional to the advantages (are they clamped, or weighed by sign?)",
    "advantages_scaled": "the loss divides the advantages by a size of their own (a std?) and does not centre them: "
    "pass them so",
    "bounds_differ": "the clip bound differs from token to token (ratios {low:.4g} to {high:.4g}){by}",
    "bounds_follow_advantages": "the bounds move with the size of the advantage (at ratio {ratio:.4g})",
    "unknown_bounds": "slopes stop at ratios where none of our surrogates stops",
    "dropped_outside": "tokens whose ratio leaves the band are dropped, whichever way they left: to us that is a mask "
    "of the sampler's ratio, rollout=Rejection(low, high)",
    "coupled_ratios": "a token's slope follows the ratios of other sequences (are ratios normalised over the batch, or "
    "counted in its denominator?): no config couples sequences",
    "level_unknown": "a token's slope follows the ratios of its sequence, and neither their mean nor their sum "
    "decides, nor the product or the least of those up to it",
    "level_ties": "of equal ratios of a prefix another than the last has the slope: on the policy itself, where all "
    "are 1, tokens have none (torch.cummin takes the last)",
    "kl_elsewhere": "the reference enters elsewhere than in a KL term (the advantages?)",
    "kl_follows_batch": "the KL coefficient follows the batch's own KL (an adaptive controller?): compute it outside "
    "and give it as {coef}=",
    "kl_follows_advantages": "the KL term follows the advantages: compute its coefficient outside and give it as "
    "kl_coef=",
    "kl_weights": "the KL term has weights of its own, which follow no known aggregation",
    "bent_logits": "the logits are bent before the softmax (a softcap? ours is logit_softcap=), or something else than "
    "log-prob and entropy of a token enters the loss",
    "other_tokens": "other tokens than the mask's get a gradient: {missing} of it get none (as {places}), {extra} "
    "outside of it do{why}",
    "entropy_threshold": "tokens of low entropy have no policy term: give entropy_threshold={source}",
    "own_term": "a term of the log-probs themselves has a gradient without advantages, ratio or reference (a penalty "
    "on log-probs? k2 towards a reference of zeros is one)",
    "sequence_weights": "every sequence has a weight of its own{by}: give it as token_weights=",
    "no_pattern": "the tokens' weights follow no known aggregation (off by {spread:.1%}){by}: give them as "
    "token_weights=",
    "unknown_surrogate": "the policy term is none of the surrogates of grpo_kernels (off by {error:.1%})",
    "unknown_divergence": "the teacher's rows enter in no way that match knows (off by {error:.1%}): in none of our "
    "divergences of the whole vocabulary, or with other weights than the policy term's, or another temperature",
    "unknown_kl": "the KL term is none of k1, k2, k3, |x| (off by {error:.1%})",
    "kl_aggregation": "the KL term has an aggregation of its own ({name}); ours has that of the policy term",
    "kl_limit": "the KL term is clamped on one side, or where no limit of ours is",
    "rollout_weights": "tokens are weighed by the sampler's log-probs, as none of our schemes does: give those weights "
    "as token_weights=",
    "denominator": "the denominator is no count of tokens or sequences that match knows",
    "whitening_unknown": "the loss centres or scales the advantages itself, in no way that match knows",
    "unknown_entropy": "the entropy bonus has weights that follow no known aggregation",
    "value": "the gradient is that of the config, the value is not, by more than a constant (by {share:.0e} of it)",
    "no_second_batch": "your loss takes no other batch, so nothing proves that it is more than like the nearest config",
    "unproven": "it parts from the nearest config where {apart} vary",
    "old_term": "a term pulls to the old policy without advantages: a KL to it is rollout_kl=KL(coef)",
}
NOTES: dict[str, str] = {
    "whitening": "the loss changes the advantages first: {text}. Pass them so",
    "temperature_unseen": "on log-probs the temperature cannot be seen: it is in the call that makes them",
    "on_policy": "your loss has no old log-probs: leave old_log_probs out",
    "old_unused": "your loss takes old log-probs, and they have no effect on its gradient",
    "limit_as_dual": "your log-ratios are clamped at {limit:g} from above alone: the dual bound exp({limit:g})",
    "one_sided_limit": "your log-ratios are clamped at {limit:g} from above only; ours on both sides, where the ratio "
    "is next to 0",
    "dual_below_high": "the dual clip lies below 1 + high, where grpo_kernels has none",
    "cap_below_one": "the cap of the ratio is {cap:g}, below 1: every token that is at least as likely as before has "
    "that weight. TRL's and Liger's epsilon_high is the cap itself with loss_type='cispo' (ScaleRL: 5)",
    "rounded": "your loss rounds to {name} on the way: differences below {same:.0e} count as none, and numbers are as "
    "exact",
    "entropy_penalty": "your loss penalises entropy; a bonus has the other sign",
    "left_out": "left at their defaults: {names}",
    "ids_as_predicted": "{name} was handed over as the tokens that the rows predict: with the ids of the model's input "
    "your loss, which shifts nothing, is off by one",
    "one_batch": "aggregations that are the same on your batch cannot be told apart: give one with ragged lengths",
    "no_limit": "your loss does not bound log-ratios; our default of 20 would change nothing below that and keep exp() "
    "finite beyond",
    "same_without_mask": "without a mask, means over tokens and over sequences are the same",
    "empty_value": "a sequence without tokens has a part in your loss's value (its ratio is 1), and none in ours; no "
    "gradient follows from it",
    "constant": "the gradients are those of the config, the value is not: it is more by the constant {constant:.6g}",
}
BESIDE = {"entropy_threshold"}
"""What no config expresses, and an argument beside it does."""
TEXTS = FAULTS | STRANGE | NOTES
"""What is said, by key; braces are filled from what was measured."""
LINES = 14
"""No answer is longer."""


def texts_of(says: list[Said]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(TEXTS[one.key].format(**one.values) for one in says))


@dataclass(frozen=True)
class MatchReport:
    """What ``match`` found. ``print(report)`` says it; ``bool(report)`` is whether a config is the loss.

    Attributes:
        matched: the config has the loss's gradient on every batch that was tried, and its value but for a constant or
            for empty sequences, which the notes tell; and there is no fault.
        config: the LossConfig that is the loss, or the nearest; a fault's part as it should be.
        factor: the loss is this times ours.
        normalizer: what to give as ``normalizer=``, as text; None: nothing.
        threshold: what to give as ``entropy_threshold=``, as text; None: nothing.
        temperature: of the logits, where the loss takes logits; ``temperature_source`` what to write for it. Of a loss
            that lacks it, what it should be.
        gradient_difference: largest relative difference of a token's gradient.
        loss_difference: largest relative difference of the value.
        batches: on how many batches the two were compared.
        faults: what is wrong with the loss, in sentences.
        strange: what no config expresses.
        notes: what else to know.
        regions: for a loss without a config, where in (ratio, advantage) the slopes part.
        tokens: tokens that differ.
        form: how the loss was called.
        lines: the Python that computes the same with grpo_loss; empty where nothing does.
    """

    matched: bool
    config: LossConfig
    factor: float
    normalizer: str | None
    threshold: str | None
    temperature: float
    temperature_source: str
    form: str
    faults: tuple[str, ...]
    strange: tuple[str, ...]
    notes: tuple[str, ...]
    gradient_difference: float = math.inf
    loss_difference: float = math.inf
    batches: int = 0
    regions: tuple[str, ...] = ()
    tokens: tuple[Difference, ...] = ()
    lines: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.matched

    def paste(self) -> str:
        """Return the config as an expression."""
        return source_of(self.config)

    def call(self) -> str:
        """Return arguments of ``grpo_loss`` beyond the tensors."""
        arguments = {"config": self.paste()} | self._beside()
        if self.temperature != 1.0:
            arguments["temperature"] = self.temperature_source
        if self.factor != 1.0:
            arguments["grad_scale"] = _written(self.factor)
        return ", ".join(f"{name}={value}" for name, value in arguments.items())

    def _beside(self) -> dict[str, str]:
        arguments = {"normalizer": self.normalizer, "entropy_threshold": self.threshold}
        return {name: value for name, value in arguments.items() if value is not None}

    def __str__(self) -> str:
        where = "two batches" if self.batches > 1 else "one batch"
        how = f"  on {where}, gradients differ by up to {self.gradient_difference:.0e}, the loss by "
        how += f"{self.loss_difference:.0e}"
        reasons = [f"  ! {reason}" for reason in (*self.faults, *self.strange)][:4]
        if self.matched:
            head = [f"your loss is {self.paste()}{self._scale()}", how]
        elif self.lines:
            told = "your loss has a fault:" if len(self.faults) == 1 else "your loss has faults:"
            head = [told if self.faults else "no config alone is your loss:", *reasons]
            head += [f"{'but for' if self.faults else 'with'} that it is {self.paste()}{self._scale()}", how]
        else:
            head = ["no config reproduces your loss", *reasons]
            if self.batches and not self.faults:
                head += [f"the nearest is {self.paste()}{self._scale()}", how]
                head += [f"  {region}" for region in self.regions[:2]]
                head += [f"  {token}" for token in self.tokens[:1]]
        tail = ["", *self.lines] if self.lines else []
        notes = [f"  - {note}" for note in self.notes][: LINES - len(head) - len(tail)]
        return "\n".join([*head, *notes, *tail])

    def _scale(self) -> str:
        text = "".join(f" with {name}={value}" for name, value in self._beside().items())
        if self.factor == 1.0:
            return text
        divisor = _divisor(self.factor)
        return f"{text}, divided by {divisor}" if divisor else f"{text}, times {self.factor:g}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON; None for a number that is not finite."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tokens = [_finite(dataclasses.asdict(token)) for token in self.tokens]
        return _finite(fields) | {"config": self.paste(), "tokens": tokens, "call": self.call()}


def _written(factor: float) -> str:
    """Return a factor as Python that loses no digit: one over a number, where it is that and no short decimal."""
    divisor = _divisor(factor)
    return f"(1 / {divisor})" if divisor and len(repr(factor)) > 8 else repr(factor)


def _divisor(factor: float) -> int | None:
    """Return the whole number that a factor is one over; None where it is not, or is one of more digits than are
    known."""
    inverse = round(1 / factor) if abs(factor) > 1e-7 else 0
    return inverse if abs(inverse) > 1 and abs(inverse * factor - 1) < 1e-6 else None


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def report_of(probe: Probe, known: Known, proof: Proof | None, says: list[Said]) -> MatchReport:
    faults, strange, notes = ([one for one in says if one.key in texts] for texts in (FAULTS, STRANGE, NOTES))
    reproduced = proof is not None and proof.gradient <= known.precision.matched
    reproduced = reproduced and all(one.key in BESIDE for one in strange)
    mended = _mended(known, faults) if reproduced else known
    report = MatchReport(
        matched=reproduced and not faults and not strange,
        config=mended.config,
        factor=plain(mended.factor, max(1e-7, known.precision.digits), 0.0),
        normalizer=mended.weights.divisor.normalizer,
        threshold=known.threshold.source() if known.threshold else None,
        temperature=mended.temperature,
        temperature_source="temperature" if "temperature" in probe.caller.roles.values() else f"{mended.temperature:g}",
        form=describe(probe.form, probe.batch),
        faults=texts_of(faults),
        strange=texts_of(strange),
        notes=texts_of(notes),
    )
    if proof is None:
        return report
    report = dataclasses.replace(
        report,
        gradient_difference=proof.gradient,
        loss_difference=proof.value,
        batches=proof.batches,
        tokens=tuple(proof.tokens),
    )
    if reproduced:
        return dataclasses.replace(report, lines=_lines(report, proof))
    return dataclasses.replace(report, regions=tuple(_regions(probe, known)))


def _mended(known: Known, faults: list[Said]) -> Known:
    """Return the loss that was meant: signs as they should be, tokens divided by tokens, the sampler's temperature."""
    weights, keys = known.weights, {one.key for one in faults}
    of_the_mask = {"mask_in_numerator", "padding", "inverted_mask", "last_left_out", "first_left_out", "dropped"}
    if keys & of_the_mask and weights.denominator in ("positions", "tokens of the mask"):
        weights = dataclasses.replace(weights, denominator="tokens")
    if "sign" in keys:
        weights = dataclasses.replace(weights, factor=abs(weights.factor))
    if "kl_sign" in keys:
        kls = {"kl": known.kl, "rollout_kl": known.rollout_kl}
        known = known.but(**{name: dataclasses.replace(kl, coef=abs(kl.coef)) for name, kl in kls.items()})
    if "divergence_sign" in keys and known.divergence is not None:
        known = known.but(divergence=dataclasses.replace(known.divergence, coef=abs(known.divergence.coef)))
    temperature = next((one.values["asked"] for one in faults if "asked" in one.values), known.temperature)
    return known.but(weights=weights, temperature=temperature)


def _lines(report: MatchReport, proof: Proof) -> tuple[str, ...]:
    """Return the Python that computes the loss with ours."""
    probe, known = proof.probe, proof.known
    caller = probe.caller
    used = {"old_log_probs": known.takes_old and caller.takes("old_log_probs")}
    used |= {"ref_log_probs": known.kl.coef != 0, "rollout_log_probs": known.takes_rollout}
    used |= {"cu_seqlens": "cu_seqlens" in caller.roles.values()}
    named = {"old_log_probs": "rollout_log_probs"} if caller.sampler_is_old else {}
    tensors = [f"{name}={named.get(name, name)}" for name, is_used in used.items() if is_used]
    tensors += ["teacher=Teacher(logits=teacher_logits)"] if known.divergence is not None else []
    arguments = ["logits", "token_ids", "advantages", "mask", *tensors, report.call()]
    factor = "" if report.factor == 1 else f" * {_written(report.factor)}"
    factor += f" + {proof.constant!r}" if proof.constant else ""
    classes = set(re.findall(r"\b([A-Z]\w*)\(", " ".join((report.paste(), *tensors))))
    names = sorted(classes, key=lambda name: (not name.isupper(), name))
    names += ["grpo_loss"]
    names += ["token_log_probs"] if report.threshold is not None and "(" in report.threshold else []
    before = known.whitening.lines(probe.form.advantages)
    call = f"loss = grpo_loss({', '.join(arguments)}).loss{factor}"
    return f"from grpo_kernels import {', '.join(names)}", *before, call


def _regions(probe: Probe, known: Known) -> list[str]:
    """Return where the slope of a loss parts from the config's, in ratio and sign of the advantage; a sentence each."""
    if not known.uses_ratio:
        return []
    field = Field(probe, known)
    points = torch.linspace(-3, 3, 121, dtype=torch.float64)
    limit = known.log_ratio_limit or math.inf
    ours_of_all = field.of(known.surrogate, points.clamp(-limit, limit))
    found = []
    for sign in (1, -1):
        i, t = field.side(sign).nonzero()[0].tolist()
        theirs = -sign * torch.tensor(field.read(sign, *points.tolist()), dtype=torch.float64)
        ours = -sign * ours_of_all[:, i, t]
        parted = apart(theirs, ours, max(1e-3, known.precision.close))
        if known.level == "token":
            parted &= points > field.log_prob[i, t]  # the old policy's probability is at most 1
        for differs, places in itertools.groupby(range(len(points)), key=parted.tolist().__getitem__):
            if differs:
                found.append(_region(points, list(places), sign, theirs, ours))
    return found


def _region(points: Tensor, places: list[int], sign: int, theirs: Tensor, ours: Tensor) -> str:
    first, middle, last = places[0], places[(len(places) - 1) // 2], places[-1]
    low, at, high = (math.exp(points[k]) for k in (first, middle, last))
    where = f"ratio < {high:.3g}" if first == 0 else f"ratio {low:.3g} to {high:.3g}"
    if last == len(points) - 1:
        where = "any ratio" if first == 0 else f"ratio > {low:.3g}"
    yours, mine = float(theirs[middle]), float(ours[middle])
    kind = "yours is clipped" if abs(yours) < 1e-6 < abs(mine) else f"your slope is {yours:+.3g}·|A|"
    side = ">" if sign > 0 else "<"
    return f"tokens with {where} and A {side} 0: {kind}, ours {mine:+.3g}·|A| (at ratio {at:.3g})"


def source_of(value: Any) -> str:
    """Return an expression that makes the config (or a part of it): fields that are not the default's."""
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(part) for part in value):
        parts = ", ".join(source_of(part) for part in value)
        return parts if len(value) == 1 else f"({parts})"
    if not dataclasses.is_dataclass(value):
        return repr(value).replace("inf", 'float("inf")')
    arguments: list[str] = []
    fields = {f.name: f for f in dataclasses.fields(value)}
    all_shown = isinstance(value, (Surrogate, Rollout))
    beside = [] if all_shown else ["surrogate", "level", "aggregation", "constant_length", "group_size"]
    for f in (fields[name] for name in dict.fromkeys([*(n for n in beside if n in fields), *fields])):
        mine = getattr(value, f.name)
        if mine == f.default and not _always_shown(value, f.name, mine):
            all_shown = False
            continue
        named = source_of(mine).replace("'", '"')
        first = f.name in ("surrogate", "kind") or (f.name == "coef" and isinstance(value, KL))
        by_place = first or (all_shown and f.name not in ("dual", "level"))
        arguments.append(named if by_place else f"{f.name}={named}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _always_shown(value: Any, name: str, number: Any) -> bool:
    """Whether a field is shown although it is the default's."""
    if isinstance(value, Rollout):
        return name in ("low", "high") and number != 0
    return name in ("surrogate", "aggregation", "kind") or (isinstance(value, Surrogate) and number is not None)
