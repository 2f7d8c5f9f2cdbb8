"""What match says: the config that reproduces a loss, or the nearest one and where they part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..objectives.config import LossConfig
from ..objectives.surrogates import Surrogate

SHIFTS = {0: "its own input token, not the one after it", 2: "the token after the one that it predicts"}


TEXTS: dict[str, str] = {
    # faults
    "empty_sequence": "a sequence without tokens makes the loss or its gradient NaN (0/0): clamp the length, "
    "mask.sum(-1).clamp(min=1). The rest was measured without such a sequence",
    "unknown_tokens": "rows of the logits score tokens that are not near theirs in the batch",
    "shifted_ids": "tokens shifted by one: row t of the logits is scored with {which}",
    "shifted_old": "tokens shifted by one: the log-prob at t is compared with the old log-prob at t{away:+d}",
    "shifted_mask": "tokens shifted by one: the mask at t{away:+d} decides about the token at t",
    "no_temperature": "missing temperature: the sampler's is {asked:g}, and the logits are not divided by it",
    "other_temperature": "another temperature: the sampler's is {asked:g}, the logits are divided by {found:g}",
    "padding": "mask in the denominator only, or nowhere: masked tokens get a gradient",
    "mask_in_numerator": "mask in the numerator only: masked terms are 0 but count in the mean over all {positions} "
    "positions, so the loss shrinks with padding. With the longest length given once it is Dr. GRPO "
    '(aggregation="constant")',
    "quotient": "the ratio is a quotient of log-probs, ℓ / old; it must be exp(ℓ - old)",
    "inverted": "the ratio is inverted: exp(old - ℓ); it must be exp(ℓ - old)",
    "sign": "the sign is wrong: minimising this loss makes tokens with a positive advantage less likely",
    "optimistic_clip": "the clip takes the larger of the two objectives; PPO takes the smaller (the larger loss)",
    "clip_without_min": "the ratio is clipped without the minimum with the unclipped term: tokens that left the trust "
    "region in the wrong direction get no gradient to come back",
    "kl_reversed": "the KL term has log-probs and reference exchanged: k3 is exp(ref - ℓ) - (ref - ℓ) - 1",
    "dropped": "the {columns} column of the batch is left out: log-probs that are aligned already lose a token",
    "old_ignored": "old_log_probs have no effect on the gradient: without a ratio to them nothing is ever clipped",
    "kl_sign": "the sign of the KL term is wrong: it rewards distance from the reference",
    "kl_unmasked": "the KL term is not masked: masked tokens get a gradient from it",
    "entropy_unmasked": "the entropy term is not masked: masked tokens get a gradient from it",
    # strange to grpo_kernels
    "advantages_not_linear": "the loss is not proportional to the advantages (are they clamped?)",
    "kl_elsewhere": "the reference enters elsewhere than in a KL term (the advantages?)",
    "bent_logits": "the logits are bent before the softmax (a softcap?), or something else than log-prob and entropy "
    "of a token enters the loss",
    "other_tokens": "{missing} tokens of the mask get no gradient (as {places}), {extra} outside of it do",
    "no_pattern": "the tokens' weights follow no known aggregation (off by {spread:.1%})",
    "unknown_surrogate": "the policy term is none of the surrogates of grpo_kernels (off by {error:.1%})",
    "unknown_kl": "the KL term is none of k1, k2, k3, |x| (off by {error:.1%})",
    "kl_aggregation": "the KL term has an aggregation of its own ({name}); ours has that of the policy term",
    "kl_limit": "the KL term is clamped on one side, or where no limit of ours is",
    "rollout_weights": "tokens are weighed by the sampler's log-probs: give those weights as token_weights=",
    "denominator": "the denominator is no count of tokens or sequences that match knows",
    "whitening_unknown": "the loss centres or scales the advantages itself, in no way that match knows",
    "unknown_entropy": "the entropy bonus has weights that follow no known aggregation",
    # notes
    "whitening": "the loss changes the advantages first: {text}. Pass them so",
    "temperature_unseen": "on log-probs the temperature cannot be seen: it is in the call that makes them",
    "on_policy": "your loss has no old log-probs: leave old_log_probs out",
    "one_sided_limit": "your log-ratios are clamped at {limit:g} from above only; ours on both sides, where the ratio "
    "is next to 0",
    "dual_below_high": "the dual clip lies below 1 + high, where grpo_kernels has none",
    "cap_below_one": "the cap of the ratio is {cap:g}, below 1: every token that is at least as likely as before has "
    "that weight. TRL's and Liger's epsilon_high is the cap itself with loss_type='cispo' (ScaleRL: 5)",
    "rounded": "your loss rounds to fp32 on the way: differences below 1e-4 count as none",
    "entropy_penalty": "your loss penalises entropy; a bonus has the other sign",
    "left_out": "left at their defaults: {names}",
    "one_batch": "aggregations that are the same on your batch cannot be told apart: give one with ragged lengths",
    "no_limit": "your loss does not bound log-ratios; our default of 20 would change nothing below that and keep exp() "
    "finite beyond",
    "same_without_mask": "without a mask, means over tokens and over sequences are the same",
    "value": "the gradients are those of the config, the value is not: {theirs:.6g}, ours {ours:.6g}",
}
"""What is said, by key; braces are filled from what was measured."""


def text_of(key: str, values: dict[str, Any]) -> str:
    values = dict(values)
    if "offset" in values:
        values["which"] = SHIFTS[values["offset"]]
    if "shift" in values:
        values["away"] = -values["shift"]
    return TEXTS[key].format(**values)


@dataclass(frozen=True)
class Difference:
    """A token at which the two losses part."""

    sequence: int
    position: int
    ratio: float
    advantage: float
    distance: float
    """ℓ - ref."""
    yours: float
    ours: float
    """Slopes ∂loss/∂ℓ."""

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, token {self.position}: ratio {self.ratio:.4g}, A {self.advantage:+.3g}, "
            f"ℓ - ref {self.distance:+.3g}: slope {self.yours:+.4g}, ours {self.ours:+.4g}"
        )


@dataclass(frozen=True)
class MatchReport:
    """What ``match`` found. ``print(report)`` says all of it; ``bool(report)`` is whether a config reproduces the loss.

    Attributes:
        matched: the config reproduces the gradient, and there is no fault.
        config: the LossConfig that reproduces the loss, or the nearest.
        factor: the loss is this times ours.
        normalizer: what to give as ``normalizer=``, as text; None: nothing.
        temperature: of the logits, where the loss takes logits; ``temperature_source`` what to write for it.
        gradient_difference: largest relative difference of a token's gradient on the batch.
        loss_difference: relative difference of the value.
        faults: what is wrong with the loss, in sentences.
        strange: what no config expresses.
        notes: what else to know.
        regions: for a loss without a config, where in (ratio, advantage) the slopes part.
        tokens: the tokens of the batch that differ.
        form: how the loss was called.
    """

    matched: bool
    config: LossConfig
    factor: float
    normalizer: str | None
    temperature: float
    temperature_source: str
    gradient_difference: float
    loss_difference: float
    faults: tuple[str, ...]
    strange: tuple[str, ...]
    notes: tuple[str, ...]
    regions: tuple[str, ...]
    tokens: tuple[Difference, ...]
    form: str

    def __bool__(self) -> bool:
        return self.matched

    def paste(self) -> str:
        """The config as an expression."""
        return source_of(self.config)

    def call(self) -> str:
        """Arguments of ``grpo_loss`` beyond the tensors."""
        arguments = [f"config={self.paste()}"]
        if self.normalizer is not None:
            arguments.append(f"normalizer={self.normalizer}")
        if self.temperature != 1.0:
            arguments.append(f"temperature={self.temperature_source}")
        if self.factor != 1.0:
            arguments.append(f"grad_scale={self.factor:g}")
        return ", ".join(arguments)

    def __str__(self) -> str:
        how = f"largest relative gradient difference {self.gradient_difference:.0e}"
        how += f", of the loss {self.loss_difference:.0e}"
        if self.matched:
            lines = [f"your loss is {self.paste()}{self._scale()}", f"  {how}"]
        elif self.faults and self.gradient_difference < 1e-3:
            lines = ["your loss has a fault:" if len(self.faults) == 1 else "your loss has faults:"]
            lines += [f"  ! {fault}" for fault in self.faults]
            lines += [f"but for that it is {self.paste()}{self._scale()}", f"  with it: {how}"]
        else:
            lines = [f"no config reproduces your loss; the nearest is {self.paste()}{self._scale()}", f"  {how}"]
            lines += [f"  ! {reason}" for reason in (*self.faults, *self.strange)]
        lines += [f"  {region}" for region in self.regions]
        lines += [f"  {token}" for token in self.tokens[:6]]
        if len(self.tokens) > 6:
            lines.append(f"  ... and {len(self.tokens) - 6} more tokens")
        lines += [f"  - {note}" for note in self.notes]
        if self.gradient_difference < 1e-3:
            factor = "" if self.factor == 1 else f" * {self.factor:g}"
            lines += ["", f"loss = grpo_loss(logits, token_ids, advantages, mask, ..., {self.call()}).loss{factor}"]
        return "\n".join(lines)

    def _scale(self) -> str:
        text = "" if self.normalizer is None else f" with normalizer={self.normalizer}"
        if self.factor == 1.0:
            return text
        inverse = 1 / self.factor if self.factor else 0.0
        if abs(inverse) > 1 and abs(inverse - round(inverse)) < 1e-6 * abs(inverse):
            return f"{text}, divided by {round(inverse)}"
        return f"{text}, times {self.factor:g}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found["config"] = self.paste()
        found["tokens"] = [dataclasses.asdict(token) for token in self.tokens]
        return {**found, "call": self.call()}


def source_of(value: Any) -> str:
    """An expression that makes the config (or a part of it): fields that are not the default's."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    arguments = []
    fields = {f.name: f for f in dataclasses.fields(value)}
    beside = [name for name in ("surrogate", "level", "aggregation", "constant_length", "group_size") if name in fields]
    for f in (fields[name] for name in dict.fromkeys([*beside, *fields])):
        mine = getattr(value, f.name)
        always = (isinstance(value, Surrogate) and f.default is not None) or f.name in ("surrogate", "aggregation")
        if mine == f.default and not always:
            continue
        named = source_of(mine) if dataclasses.is_dataclass(mine) else repr(mine).replace("'", '"')
        positional = (isinstance(value, Surrogate) and f.name != "dual") or f.name in ("surrogate", "coef")
        arguments.append(named if positional else f"{f.name}={named}")
    return f"{type(value).__name__}({', '.join(arguments)})"
