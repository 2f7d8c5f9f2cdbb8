"""What a call of a loss may ask for, as data: ``table.py`` runs every pair.

A new row of the table is one entry of ``features()``, and one of ``FUNCTIONS`` or ``AROUND`` in ``table.py`` where it
is another way to call or to run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_kernels import (
    KL,
    Divergence,
    Gmpo,
    MaskedIS,
    OffPolicyMask,
    Reinforce,
    Rejection,
    Surrogate,
    TopK,
    TruncatedIS,
    Vespo,
    register_surrogate,
)
from grpo_kernels.objectives.rollout import Rollout


@dataclass(frozen=True)
class Drawn:
    """A tensor of the batch, by its name there."""

    name: str


@dataclass(frozen=True)
class Taught:
    """A teacher of the batch, by its form."""

    form: str


@dataclass(frozen=True, eq=False)
class Feature:
    """What one feature changes of a plain call: GRPO's clip at token level, fp32, padded, with old log-probs."""

    name: str
    asked: str
    """How a user asks for it, as code."""
    function: str | None = None
    """A key of ``table.FUNCTIONS``."""
    dtype: torch.dtype | None = None
    """Of the logits, or of hidden states and head."""
    packed: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LossConfig."""
    kl: Mapping[str, Any] = field(default_factory=dict)
    """Fields of KL."""
    rollout: tuple[Rollout, ...] = ()
    """Schemes; those of several features multiply."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the call."""
    around: tuple[str, ...] = ()
    """Keys of ``table.AROUND``."""
    unknown: str | None = None
    """Why nothing here can tell."""


SCALE = 4.0
"""Announced by whatever announces a factor, so that such features go together."""
_TEMPERATURES = ("temperatures of sequences", "temperatures of tokens")
_LEVELS = ("sequence", "sequence_token", "sequence_product", "prefix_product", "prefix_min")
"""Those that pool ratios."""
_ROLLOUT = {"rollout_log_probs": Drawn("rollout_log_probs")}
_REFERENCE = {"ref_log_probs": Drawn("ref_log_probs")}


def _rollout(name: str, *schemes: Rollout) -> Feature:
    asked = f"`rollout={schemes if len(schemes) > 1 else schemes[0]!r}`"
    return Feature(name, asked, rollout=schemes, arguments=_ROLLOUT)


def _kl(name: str, **fields: Any) -> Feature:
    written = "".join(f", {field}={value!r}" for field, value in fields.items())
    return Feature(name, f"`kl=KL(0.1{written})`", kl={"coef": 0.1, **fields}, arguments=_REFERENCE)


def _level(name: str) -> Feature:
    return Feature(f"level {name}", f'`level="{name}"`', config={"level": name})


def _surrogate(surrogate: Surrogate, name: str | None = None) -> Feature:
    return Feature(name or type(surrogate).__name__, f"`surrogate={surrogate!r}`", config={"surrogate": surrogate})


def _keyword(keyword: str, value: Any) -> Feature:
    return Feature(keyword, f"`{keyword}={value!r}`", arguments={keyword: value})


def _drawn(keyword: str, asked: str, tensor: str | None = None, name: str | None = None) -> Feature:
    return Feature(name or keyword, asked, arguments={keyword: Drawn(tensor or keyword)})


def _teacher(name: str, form: str, teacher: Taught) -> Feature:
    divergence = Divergence("reverse_kl", 0.5)
    asked = f"`teacher={form}`, `divergence={divergence!r}`"
    return Feature(name, asked, config={"divergence": divergence}, arguments={"teacher": teacher})


def _function(name: str, asked: str) -> Feature:
    return Feature(name, asked, function=name)


class Tempered(Surrogate):
    """-A·√r·2: one that is registered."""

    name = "compositions_tempered"

    def value(self, t: Any) -> torch.Tensor:
        value: torch.Tensor = -2 * t.advantage * (0.5 * t.log_ratio).exp()
        return value


@functools.cache
def features() -> tuple[Feature, ...]:
    """The rows of the table, in order. A function, for it registers a surrogate."""
    registered = register_surrogate(Tempered)
    return (
        *(
            _function("linear_grpo_loss", "from hidden states and head"),
            _function("linear_grpo_loss, adapter", "`adapter=`, beside hidden states and head"),
            _function("hf.attach", "`hf.attach(model)`: from hidden states, inside of the model"),
            _function("hf.attach, from_logits", "`hf.attach(model, from_logits=True)`: the model's own head"),
            _function("token_log_probs", "and a loss of one's own on log-probs and entropies"),
            _function("linear_token_log_probs", "and a loss of one's own on log-probs and entropies"),
            _function("policy_loss", "on the log-probs and entropies of `token_log_probs`"),
            _function("grpo_loss, vocab_group", "`vocab_group=`: two ranks, each with some of the columns"),
            _function("linear_grpo_loss, vocab_group", "`vocab_group=`: two ranks, each with some of the head's rows"),
            _function("grpo_loss, sequence_group", "`sequence_group=`: two ranks, each with some of the tokens"),
        ),
        Feature("packed", "`cu_seqlens=`", packed=True),
        *(
            Feature("bf16", "bfloat16 logits, or states and head", dtype=torch.bfloat16),
            Feature("fp16", "float16 logits, or states and head", dtype=torch.float16),
            Feature(
                "fp16, announced", "float16, and `grad_scale=`", dtype=torch.float16, arguments={"grad_scale": SCALE}
            ),
            Feature("fp64", "float64 logits, or states and head", dtype=torch.float64),
        ),
        *(
            Feature("torch.compile", "`torch.compile` of the function that calls", around=("compile",)),
            Feature("autocast", "`torch.autocast` to bfloat16 around the call", around=("autocast",)),
            Feature("checkpoint", "`torch.utils.checkpoint` around the call, not reentrant", around=("checkpoint",)),
            Feature(
                "CUDA graph",
                "`torch.cuda.graph` around call and backward",
                unknown="a graph is captured on a GPU alone",
            ),
        ),
        *(
            _keyword("inplace", True),
            _keyword("grad_scale", SCALE),
            _keyword("require", "fused"),
            _keyword("token_losses", True),
            _keyword("support", TopK(5)),
            _drawn("support", "`support=` a bool mask (B, T, V)", "allowed", name="support, a mask"),
            _drawn("support", "`support=Recorded(...)`", "recorded", name="support, recorded"),
            _keyword("entropy_threshold", 1.2),
            _keyword("skip_zero_advantage", True),
            _drawn("token_weights", "`token_weights=` (B, T)"),
            _drawn("advantages", "`advantages` (B, T)", "token_advantages", name="advantages by token"),
            _keyword("normalizer", 7.0),
            _drawn("temperature", "`temperature=` (B,), packed (S,)", "temperatures", name=_TEMPERATURES[0]),
            _drawn("temperature", "`temperature=` (B, T), packed (1, N)", "token_temperatures", name=_TEMPERATURES[1]),
            _keyword("logit_softcap", 5.0),
            Feature("on-policy", "no `old_log_probs`", arguments={"old_log_probs": None}),
        ),
        *(_level(name) for name in _LEVELS),
        *(_surrogate(Reinforce()), _surrogate(Vespo()), _surrogate(Gmpo())),
        _surrogate(registered(), "registered surrogate"),
        *(
            _kl("KL"),
            _kl("KL, ratio_weighted", ratio_weighted=True),
            _kl("KL, weighted_k2", gradient="weighted_k2"),
            Feature(
                *("KL to the sampler", '`rollout_kl=KL(0.3, "k2")`'),
                config={"rollout_kl": KL(0.3, "k2")},
                arguments=_ROLLOUT,
            ),
            Feature("entropy bonus", "`entropy_coef=0.05`", config={"entropy_coef": 0.05}),
        ),
        *(
            _rollout("rollout, of tokens", TruncatedIS(1.1)),
            _rollout("rollout, of sequences", MaskedIS(0.2, 1.3, level="sequence")),
            _rollout("rollout, OffPolicyMask", OffPolicyMask(0.02)),
            _rollout("rollout, several", TruncatedIS(1.2, 0.9), Rejection(0.5, 2.0, level="geometric")),
        ),
        *(
            _teacher("teacher", "Teacher(logits=)", Taught("logits")),
            dataclasses.replace(
                _teacher("teacher, hidden states", "Teacher(hidden=, weight=)", Taught("hidden")),
                function="linear_grpo_loss",
            ),
        ),
    )


@dataclass(frozen=True)
class Refusal:
    """Pairs that a call refuses, and the first line of its message."""

    reason: str
    feature: str
    others: tuple[str, ...]

    @property
    def pairs(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset({self.feature, other}) for other in self.others)


def _absent(function: str, keyword: str, *features: str) -> Refusal:
    """By a function without that keyword."""
    return Refusal(f"{function}() got an unexpected keyword argument '{keyword}'", function, features)


def _two_passes(why: str, *features: str, function: str = "grpo_loss") -> Refusal:
    """Of ``require="fused"``."""
    expected = "a call that compiled kernels serve in one pass (require='fused')"
    return Refusal(f"{function}: expected {expected}; got 2 passes of backend 'cpu': {why}.", "require", features)


def _over_a_vocabulary(function: str) -> Refusal:
    """Of ``require="fused"``, told by every rank."""
    why = "vocab_group=: a row's slope follows from the columns of every rank"
    return _two_passes(why, f"{function}, vocab_group", function=f"rank 0 of 2: {function}")


def _pools(level: str) -> tuple[Refusal, ...]:
    no_ratio = f'level="{level}" pools ratios, and Reinforce() has none.'
    instead = 'Use level="token", or Unclipped() for a policy gradient with a ratio.'
    return (
        Refusal(f"{no_ratio} {instead}", f"level {level}", ("Reinforce",)),
        _two_passes(
            f"level '{level}' pools the ratios of a sequence before any of its slopes is known", f"level {level}"
        ),
    )


def _of_the_loss(function: str) -> tuple[Refusal, ...]:
    """What log-probs alone have not."""
    alone = ("entropy_threshold", "skip_zero_advantage", "token_weights", "normalizer", "token_losses")
    in_config = (
        *(f"level {name}" for name in _LEVELS),
        *("Reinforce", "Vespo", "Gmpo", "registered surrogate"),
        *("KL", "KL, ratio_weighted", "KL, weighted_k2", "KL to the sampler", "entropy bonus", "teacher"),
        *("rollout, of tokens", "rollout, of sequences", "rollout, OffPolicyMask", "rollout, several"),
    )
    return (
        _absent(function, "grad_scale", "grad_scale", "fp16, announced"),
        *(_absent(function, keyword, keyword) for keyword in alone),
        _absent(function, "advantages", "advantages by token"),
        _absent(function, "old_log_probs", "on-policy"),
        _absent(function, "config", *in_config),
    )


def _folded(scheme: str, feature: str) -> Refusal:
    vespo = "Vespo(k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0) multiplies token weights into its ratio"
    instead = 'Use level="token", as in TruncatedIS(2.0) or MaskedIS(0.5, 5.0).'
    return Refusal(f"{vespo}, and {scheme} weighs sequences. {instead}", "Vespo", (feature,))


def _without_a_loss(what: str, got: str, *features: str) -> Refusal:
    """Of ``token_losses``, whose loss and its factors are the caller's."""
    return Refusal(f"grpo_loss: expected {what} with token_losses=True; got {got}.", "token_losses", features)


def _beside_a_teacher(name: str, function: str) -> tuple[Refusal, ...]:
    """What a divergence of whole rows does not go with."""
    kinds = {"support": "TopK", "support, a mask": "Tensor", "support, recorded": "Recorded"}
    return (
        *(
            Refusal(f"{function}: expected no support= with teacher=; got {kind}.", name, (support,))
            for support, kind in kinds.items()
        ),
        Refusal(
            f"{function}: expected skip_zero_advantage=True with a loss that ignores tokens of A = 0; got {_NOT_FLAT}.",
            *("skip_zero_advantage", (name,)),
        ),
    )


_TEACHERS = {"teacher": "grpo_loss", "teacher, hidden states": "linear_grpo_loss"}
_COPIED = ("support", "support, a mask")
_SUPPORTS = (*_COPIED, "support, recorded")
_NOT_FLAT = "a KL term, an entropy bonus or a divergence, whose gradient is not 0 at A = 0"

REFUSALS = (
    *_of_the_loss("token_log_probs"),
    *_of_the_loss("linear_token_log_probs"),
    *(_absent("policy_loss", keyword, keyword) for keyword in ("inplace", "require", "logit_softcap")),
    _absent("policy_loss", "grad_scale", "grad_scale", "fp16, announced"),
    _absent("policy_loss", "support", *_SUPPORTS),
    _absent("policy_loss", "temperature", *_TEMPERATURES),
    _absent("policy_loss", "teacher", "teacher"),
    dataclasses.replace(_absent("linear_grpo_loss", "inplace", "inplace"), feature="teacher, hidden states"),
    *(
        dataclasses.replace(_absent(function.partition(",")[0], "inplace", "inplace"), feature=function)
        for function in (
            *("linear_grpo_loss", "linear_grpo_loss, adapter", "linear_grpo_loss, vocab_group"),
            "linear_token_log_probs",
        )
    ),
    Refusal(
        "attach: expected keywords of linear_grpo_loss; got inplace=, which grpo_loss alone has.",
        *("hf.attach", ("inplace",)),
    ),
    Refusal(
        "attach: expected the model's own scale and cap, which are traced; got logit_softcap=5.0.",
        *("hf.attach", ("logit_softcap",)),
    ),
    Refusal(
        "grpo_loss: inplace=True inside activation checkpointing's recomputation: the logits that it was given may "
        "already be the gradient. Keep the loss outside the checkpointed region, or use inplace=False.",
        *("inplace", ("checkpoint",)),
    ),
    Refusal(
        "grpo_loss: expected inplace=False with support=, whose gradient is made of copies; got inplace=True.",
        *("inplace", _COPIED),
    ),
    Refusal(
        "grpo_loss: expected inplace=False with support=Recorded(...), whose gradient is zeros but at its ids; got "
        "inplace=True.",
        *("inplace", ("support, recorded",)),
    ),
    *(
        Refusal(
            f"rank 0 of 2: {function}: expected support=Recorded(...) with a whole vocabulary; got one over several "
            "ranks, or cut at vocab_size=.",
            *(f"{function}, vocab_group", ("support, recorded",)),
        )
        for function in ("grpo_loss", "linear_grpo_loss")
    ),
    Refusal(
        f"grpo_loss: expected skip_zero_advantage=True with a loss that ignores tokens of A = 0; got {_NOT_FLAT}.",
        *("skip_zero_advantage", ("KL", "KL, ratio_weighted", "KL, weighted_k2", "KL to the sampler", "entropy bonus")),
    ),
    *(
        Refusal(
            f"{function}: expected no vocabulary over ranks with teacher=; got vocab_group=, vocab_start= or DTensors.",
            *(f"{function}, vocab_group", ("teacher",)),
        )
        for function in ("grpo_loss", "linear_grpo_loss")
    ),
    *(one for name, function in _TEACHERS.items() for one in _beside_a_teacher(name, function)),
    *(one for level in _LEVELS for one in _pools(level)),
    _two_passes("an fp16 gradient is written once its factor is known: announce it, grad_scale=", "fp16"),
    _two_passes(
        "token_losses=True: a row's slope follows from what the caller makes of its loss",
        "token_losses",
    ),
    _without_a_loss("inplace=False", "inplace=True", "inplace"),
    _without_a_loss("no normalizer=", "one", "normalizer"),
    _without_a_loss("no grad_scale=", str(SCALE), "grad_scale", "fp16, announced"),
    _two_passes("support= works on copies of the rows", *_COPIED),
    _two_passes(
        "support=Recorded(...) reads a row at its ids alone, in PyTorch; rows without a set take two passes",
        "support, recorded",
    ),
    *(_over_a_vocabulary(function) for function in ("grpo_loss", "linear_grpo_loss")),
    _two_passes("Vespo has no one-pass kernel", "Vespo"),
    _two_passes("Gmpo has no one-pass kernel", "Gmpo"),
    _two_passes("Tempered has no one-pass kernel", "registered surrogate"),
    _two_passes("no one-pass kernel applies OffPolicyMask(threshold=0.02) inside of a row", "rollout, OffPolicyMask"),
    _folded("MaskedIS(low=0.2, high=1.3, level='sequence')", "rollout, of sequences"),
    _folded("Rejection(low=0.5, high=2.0, level='geometric')", "rollout, several"),
    Refusal(
        'KL(ratio_weighted=True) needs gradient="pathwise": the ratio carries gradient itself. With a detached ratio, '
        'the gradient is "weighted_k2".',
        *("KL, ratio_weighted", ("KL, weighted_k2",)),
    ),
)
"""Every pair that is refused, and why. One that is not listed fails the tests, and so does one that is lifted."""
