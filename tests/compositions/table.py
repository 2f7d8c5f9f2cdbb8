"""Does X go with Y? Every pair of features (``features.py``) in one small call, compared with the float64 reference.

A verdict is what the public function did: right numbers in one pass or two, or a refusal by its own message. Wrong
numbers raise. ``REFUSALS`` lists every refusal with its reason, so that a new one is noticed, and a lifted one too.

    python -m tests.compositions > docs/compositions.md
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    KL,
    LossConfig,
    LossOutput,
    Recorded,
    Reinforce,
    Teacher,
    TokenLogProbs,
    grpo_loss,
    hf,
    linear_grpo_loss,
    linear_token_log_probs,
    policy_loss,
    token_log_probs,
)
from grpo_kernels.objectives.rollout import Rollout
from grpo_kernels.verification.progress import progress_bar
from grpo_kernels.verification.tolerance import OUTPUT_UNIT, Truth, compare, smallest, truth_of

from .features import Drawn, Feature, Taught, features
from .ranks import linear_over_vocabulary, over_sequences, over_vocabulary

VOCAB, WIDTH, LENGTH = 11, 4, 4
SEED = 15
"""Of a batch on which every feature shows, and no token is at a bound."""


class WrongNumbers(AssertionError):
    """Features that are accepted together and give something else than the reference."""


# A batch


@dataclass(frozen=True)
class Batch:
    """Hidden states, a head, and the tensors of every argument. States and head are multiples of 1/4 and small, so
    that their logits are exact in every dtype: the same numbers reach each function."""

    hidden: Tensor
    """(B, T+1, H), or packed (1, N, H), float64."""
    weight: Tensor
    """(V, H), float64."""
    named: Mapping[str, Tensor]
    teacher_hidden: Tensor
    """Of a teacher, like ``hidden`` but for their width."""
    teacher_weight: Tensor

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T

    def packed(self) -> Batch:
        """The same sequences in one row; the last of each, which predicts nothing, is masked."""

        def joined(values: Tensor) -> Tensor:
            if values.dim() == 1:
                return values
            last = torch.zeros_like(values[:, :1])
            return torch.cat([values, last], 1).flatten(0, 1)[None]

        named = {name: joined(values) for name, values in self.named.items()}
        bounds = torch.arange(self.hidden.shape[0] + 1) * self.hidden.shape[1]
        inputs = self.named["input_ids"].flatten()[None]
        positions = torch.arange(self.hidden.shape[1]).repeat(self.hidden.shape[0])[None]
        named |= {"input_ids": inputs, "position_ids": positions, "cu_seqlens": bounds}
        hidden, taught = (states.flatten(0, 1)[None] for states in (self.hidden, self.teacher_hidden))
        return Batch(hidden, self.weight, named, taught, self.teacher_weight)


def draw() -> Batch:
    """Six sequences of 4, 0, 3, 4, 2 and 4 tokens, one with a hole; advantages of both signs and one of 0."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def quarters(*shape: int) -> Tensor:
        return torch.round(4 * normal(*shape)) / 4

    lengths = torch.tensor([LENGTH, 0, LENGTH - 1, LENGTH, 2, LENGTH])
    count = len(lengths)
    hidden, weight = quarters(count, LENGTH + 1, WIDTH), quarters(VOCAB, WIDTH)
    inputs = torch.randint(VOCAB, (count, LENGTH + 1), generator=generator, device="cpu")
    ids = inputs[:, 1:]
    mask = torch.arange(LENGTH) < lengths[:, None]
    mask[0, 1] = False
    advantages = torch.tensor([1.1, 0.4, -0.8, 0.0, 0.6, -0.5])
    log_p = torch.log_softmax((hidden @ weight.T)[:, :LENGTH], -1)
    log_probs = log_p.gather(-1, ids[..., None]).squeeze(-1)
    rollout = log_probs + 0.25 * normal(*ids.shape)
    rollout[0, 2] = float("nan")
    named = {
        "input_ids": inputs,
        "token_ids": ids,
        "mask": mask,
        "advantages": advantages,
        "token_advantages": advantages[:, None] + 0.3 * normal(*ids.shape).float() * (advantages != 0)[:, None],
        "old_log_probs": log_probs + 0.3 * normal(*ids.shape),
        "ref_log_probs": log_probs + 0.3 * normal(*ids.shape),
        "rollout_log_probs": rollout,
        "token_weights": 0.5 + torch.rand(ids.shape, generator=generator, device="cpu"),
        "allowed": log_p > -3.5,
        "temperatures": torch.tensor([0.7, torch.nan, 1.3, 0.9, 1.6, 1.1]),
        "token_temperatures": torch.where(
            mask, 0.6 + torch.rand(ids.shape, generator=generator, device="cpu"), torch.nan
        ),
    }
    return Batch(hidden, weight, named, quarters(count, LENGTH + 1, WIDTH - 1), quarters(VOCAB, WIDTH - 1))


def _recorded(batch: Batch) -> Recorded:
    """Sets of what is allowed and the drawn token; every third token has none."""
    ids, allowed = batch.named["token_ids"], batch.named["allowed"]
    kept = allowed.scatter(-1, ids[..., None], True)
    kept &= (torch.arange(ids.numel()).view(ids.shape) % 3 != 2)[..., None]
    return Recorded.from_counts(kept.nonzero()[:, -1], kept.sum(-1))


# A call


class EitherOr(Exception):
    """Two features are two values of one thing."""


@dataclass(frozen=True)
class Call:
    """Features put together."""

    function: str = "grpo_loss"
    dtype: torch.dtype = torch.float32
    packed: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kl: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rollout: tuple[Rollout, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    around: tuple[str, ...] = ()

    @property
    def real(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def batch(self) -> Batch:
        return draw().packed() if self.packed else draw()

    def objective(self) -> LossConfig:
        return LossConfig(**self.config, kl=KL(**self.kl), rollout=self.rollout)

    def keywords(self, batch: Batch) -> dict[str, Any]:
        """What the loss takes beside ids and mask."""
        loss: dict[str, Any] = {}
        if FUNCTIONS[self.function].is_loss:
            loss = {"advantages": Drawn("advantages"), "old_log_probs": Drawn("old_log_probs")}
            loss |= {"cu_seqlens": Drawn("cu_seqlens")} if self.packed else {}
        if FUNCTIONS[self.function].is_loss or self.config or self.kl or self.rollout:
            loss["config"] = self.objective()
        values = {**loss, **self.arguments}
        return {name: self._made(batch, x) for name, x in values.items()}

    def _made(self, batch: Batch, value: Any) -> Any:
        """Return a keyword's value, drawn of the batch if it says so."""
        if isinstance(value, Taught):
            hidden, weight = batch.teacher_hidden.to(self.dtype), batch.teacher_weight.to(self.dtype)
            made = Teacher(logits=hidden @ weight.T)
            return Teacher(hidden=hidden, weight=weight) if value.form == "hidden" else made
        return self._tensor(batch, value.name) if isinstance(value, Drawn) else value

    def _tensor(self, batch: Batch, name: str) -> Tensor | Recorded:
        if name == "recorded":
            return _recorded(batch)
        values = batch.named[name]
        return values.to(self.real) if values.is_floating_point() else values


def compose(*chosen: Feature) -> Call:
    """One call with all of them.

    Raises:
        EitherOr: two want different values of one thing.
    """
    functions = _merge({"function": one.function} for one in chosen if one.function is not None)
    dtypes = _merge({"dtype": one.dtype} for one in chosen if one.dtype is not None)
    return Call(
        **functions,
        **dtypes,
        packed=any(one.packed for one in chosen),
        config=_merge(one.config for one in chosen),
        kl=_merge(one.kl for one in chosen),
        rollout=tuple(dict.fromkeys(scheme for one in chosen for scheme in one.rollout)),
        arguments=_merge(one.arguments for one in chosen),
        around=tuple(name for name in AROUND if any(name in one.around for one in chosen)),
    )


def _merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if merged.setdefault(name, value) != value:
                raise EitherOr(name)
    return merged


# Functions


class Ran(NamedTuple):
    """What a function gave."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    passes: int | None
    """None: it does not say."""


OWN = LossConfig(Reinforce(), aggregation="sequence_sum", entropy_coef=0.05)
"""The objective that is made by hand of log-probs and entropies."""


def _of_log_probs(out: TokenLogProbs, batch: Batch) -> Ran:
    """-Σ_i Σ_t (A·ℓ + 0.05·H) / B over live tokens."""
    per_sequence, mask = batch.named["advantages"], batch.named["mask"]
    advantages = per_sequence[:, None].expand(len(per_sequence), mask.numel() // len(per_sequence)).reshape(mask.shape)
    terms = advantages * out.log_probs + OWN.entropy_coef * out.entropy
    loss = -torch.where(mask, terms, 0.0).sum() / len(per_sequence)
    return Ran(loss, out.log_probs.detach(), out.entropy.detach(), None)


def _reduced(token_losses: Tensor, batch: Batch) -> Tensor:
    """Return (1/B)·Σ_i Σ_t loss_it/n_i over live tokens: ``sequence_mean``, the aggregation of every call here."""
    mask = batch.named["mask"].reshape(len(batch.named["advantages"]), -1)
    weights = mask.to(token_losses) / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return (token_losses.reshape(mask.shape) * weights).sum()


def _policy_loss(logits: Tensor, token_ids: Tensor, *, mask: Tensor, **keywords: Any) -> LossOutput:
    """Return policy_loss of the rows' log-probs and entropies, which token_log_probs computes."""
    rows = token_log_probs(logits, token_ids, mask=mask)
    return policy_loss(rows.log_probs, mask=mask, entropy=rows.entropy, **keywords)


def _adapted(hidden: Tensor, weight: Tensor, states: Tensor, low: Tensor, *args: Any, **keywords: Any) -> LossOutput:
    return linear_grpo_loss(hidden, weight, *args, adapter=(states, low), **keywords)


Public = Callable[..., Any]
"""Of the leaves, then token_ids, then keywords."""
Run = Callable[..., Ran]
"""Of the leaves."""


@dataclass(frozen=True)
class Function:
    """A public function, and what its gradients are of."""

    made: Callable[[Batch, Sequence[nn.Parameter]], Public]
    """Called once for a batch and its leaves."""
    from_states: bool = False
    """Its leaves are hidden states and weight, not logits."""
    rank: int = 0
    """How many columns of both are an adapter's instead: its states and weight are two more leaves."""
    is_loss: bool = True

    def leaves(self, batch: Batch, dtype: torch.dtype) -> list[nn.Parameter]:
        values: Sequence[Tensor] = (batch.hidden, batch.weight) if self.from_states else (batch.logits,)
        if self.rank:
            values = [part for parts in zip(*(self._cut(value) for value in values), strict=True) for part in parts]
        leaves = [nn.Parameter(value.to(dtype)) for value in values]
        assert all(torch.equal(leaf.double(), value) for leaf, value in zip(leaves, values, strict=True))
        return leaves

    def _cut(self, value: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of the head's product, and of the adapter's."""
        return value.split((WIDTH - self.rank, self.rank), -1)

    def of_whole(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return those of the batch's states and weight, or logits, of those of the leaves."""
        if not self.rank:
            return gradients
        return [torch.cat([*parts], -1) for parts in (gradients[::2], gradients[1::2])]

    def run(self, batch: Batch, leaves: Sequence[nn.Parameter], keywords: dict[str, Any]) -> Run:
        public, ids, mask = self.made(batch, leaves), batch.named["token_ids"], batch.named["mask"]

        def run(*leaves: Tensor) -> Ran:
            inputs = leaves if self.from_states else (leaves[0].clone(),)  # in place it may not be a leaf
            out = public(*inputs, ids, mask=mask, **keywords)
            if not self.is_loss:
                return _of_log_probs(out, batch)
            loss = _reduced(out.token_losses, batch) if keywords.get("token_losses") else out.loss
            return Ran(*(loss, out.log_probs, out.entropy), out.route.passes or None)

        return run


class _States(nn.Module):
    """In the place of the last norm: hidden states that are given."""

    def __init__(self, states: nn.Parameter):
        super().__init__()
        self.states = states

    def forward(self, computed: Tensor) -> Tensor:
        return self.states


def _attached(batch: Batch, leaves: Sequence[nn.Parameter], from_logits: bool = False) -> Public:
    """A Llama whose last hidden states and head are the leaves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    model.to(leaves[0].dtype)
    model.model.norm, model.lm_head.weight = _States(leaves[0]), leaves[1]
    hf.attach(model, from_logits=from_logits)
    inputs = {name: batch.named[name] for name in ("input_ids", "position_ids") if name in batch.named}

    def call(hidden: Tensor, weight: Tensor, token_ids: Tensor, **keywords: Any) -> LossOutput:
        out: LossOutput = model(**inputs, grpo={"token_ids": token_ids, **keywords})
        return out

    return call


FUNCTIONS: Mapping[str, Function] = {
    "grpo_loss": Function(lambda batch, leaves: grpo_loss),
    "linear_grpo_loss": Function(lambda batch, leaves: linear_grpo_loss, from_states=True),
    "linear_grpo_loss, adapter": Function(lambda batch, leaves: _adapted, from_states=True, rank=1),
    "hf.attach": Function(_attached, from_states=True),
    "hf.attach, from_logits": Function(functools.partial(_attached, from_logits=True), from_states=True),
    "token_log_probs": Function(lambda batch, leaves: token_log_probs, is_loss=False),
    "linear_token_log_probs": Function(lambda batch, leaves: linear_token_log_probs, from_states=True, is_loss=False),
    "policy_loss": Function(lambda batch, leaves: _policy_loss),
    "grpo_loss, vocab_group": Function(lambda batch, leaves: over_vocabulary),
    "linear_grpo_loss, vocab_group": Function(lambda batch, leaves: linear_over_vocabulary, from_states=True),
    "grpo_loss, sequence_group": Function(lambda batch, leaves: over_sequences),
}


def _checkpointed(run: Run) -> Run:
    return lambda *leaves: checkpoint(run, *leaves, use_reentrant=False)


def _compiled(run: Run) -> Run:
    torch._dynamo.reset()
    compiled: Run = torch.compile(run, backend="aot_eager")
    return compiled


def _autocast(run: Run) -> Run:
    def call(*leaves: Tensor) -> Ran:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(*leaves)

    return call


AROUND: Mapping[str, Callable[[Run], Run]] = {
    "checkpoint": _checkpointed,
    "compile": _compiled,
    "autocast": _autocast,
}
"""What runs a call in its own way, the innermost first."""


# A verdict

RIGHT, REFUSED, EITHER, UNKNOWN = "ok", "–", "·", "?"


@dataclass(frozen=True)
class Verdict:
    """What became of features in one call."""

    cell: str
    """Passes over the logits ("1", "2"), RIGHT of a function that does not count them, REFUSED, EITHER, UNKNOWN."""
    message: str = ""
    """Of a refusal, whole."""

    @property
    def reason(self) -> str:
        return self.message.partition("\n")[0]


def verdict_of(*chosen: Feature) -> Verdict:
    """Run these features in one call.

    Raises:
        WrongNumbers: they are accepted together, and value or gradient is not the reference's.
    """
    unknown = [one.unknown for one in chosen if one.unknown is not None]
    if unknown:
        return Verdict(UNKNOWN, unknown[0])
    try:
        call = compose(*chosen)
    except EitherOr as error:
        return Verdict(EITHER, f"two values of {error}")
    batch, function = call.batch(), FUNCTIONS[call.function]
    leaves = function.leaves(batch, call.dtype)
    try:
        keywords = call.keywords(batch)
        run = function.run(batch, leaves, keywords)
        for name in call.around:
            run = AROUND[name](run)
        ran = run(*leaves)
        (ran.loss * keywords.get("grad_scale", 1.0)).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        return Verdict(REFUSED, str(error))
    try:
        judge(call, batch, keywords, ran, [leaf.grad for leaf in leaves])
    except WrongNumbers as error:
        raise WrongNumbers(f"{' with '.join(one.name for one in chosen) or 'a plain call'}: {error}") from None
    return Verdict(RIGHT if ran.passes is None else str(ran.passes))


def judge(call: Call, batch: Batch, keywords: Mapping[str, Any], ran: Ran, gradients: Sequence[Tensor | None]) -> None:
    """Raise unless value, log-probs, entropies and gradients are the reference's within the ULP rule."""
    function = FUNCTIONS[call.function]
    options = {name: value for name, value in keywords.items() if name != "token_losses"}
    if not function.is_loss:
        options |= {"config": OWN, "advantages": batch.named["advantages"]}
        options |= {"cu_seqlens": batch.named["cu_seqlens"]} if call.packed else {}
    scale = options.get("grad_scale", 1.0)
    truth = truth_of(batch.logits, batch.named["token_ids"], mask=batch.named["mask"], **options)
    if not bool(truth.gradient.abs().amax() > 0):
        raise WrongNumbers("the batch has no gradient, and shows nothing")
    of_leaves = [gradient for gradient in gradients if gradient is not None]
    if len(of_leaves) < len(gradients):
        raise WrongNumbers("a leaf has no gradient")
    of_logits = of_leaves[0] if not function.from_states else _with_last_row(truth.gradient * scale, batch)
    result = compare(truth, ran.loss, ran.log_probs, ran.entropy, of_logits, scale)
    if not result.holds or result.edges > 0:
        raise WrongNumbers(str(result))
    if function.from_states:
        autocast = "autocast" in call.around and call.dtype != torch.float64
        _judge_head(truth, batch, torch.bfloat16 if autocast else call.dtype, scale, function.of_whole(of_leaves))


def _with_last_row(rows: Tensor, batch: Batch) -> Tensor:
    """(B, T, V) with the row that predicts nothing, where there is one."""
    last = rows.new_zeros(rows.shape[0], batch.hidden.shape[1] - rows.shape[1], rows.shape[2])
    return torch.cat([rows, last], 1)


def _through_head(rows: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weight, from one of the logits."""
    return rows @ weight, rows.flatten(0, 1).T @ hidden.flatten(0, 1)


def _judge_head(truth: Truth, batch: Batch, dtype: torch.dtype, scale: float, gradients: Sequence[Tensor]) -> None:
    """The rule's bound of each logit's gradient, taken through the two GEMMs, whose sums and results round as well."""
    rows, bound = (_with_last_row(x.detach(), batch) for x in (truth.gradient, truth.gradient_bound(dtype, scale)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = VOCAB * batch.hidden[..., 0].numel() * OUTPUT_UNIT[wide]
    exact = _through_head(rows, batch.hidden, batch.weight)
    allowed = _through_head(bound + sums * rows.abs(), batch.hidden.abs(), batch.weight.abs())
    for name, gradient, wanted, most in zip(("hidden states", "weight"), gradients, exact, allowed, strict=True):
        limit = most + OUTPUT_UNIT[dtype] * wanted.abs() + smallest(dtype)
        share = ((gradient.double() / scale - wanted).abs() / limit).nan_to_num(nan=torch.inf).amax()
        if share > 1:
            raise WrongNumbers(f"the gradient of {name} errs by {float(share):.3g} times what the rule allows")


# The table

Pair = tuple[str, str]
"""Names of two features in the order of the table; one twice: that feature alone."""


def pairs() -> Iterator[tuple[Feature, Feature]]:
    rows = features()
    return ((one, other) for i, other in enumerate(rows) for one in rows[: i + 1])


def verdict_of_pair(one: Feature, other: Feature) -> Verdict:
    return verdict_of(one) if one is other else verdict_of(one, other)


HEAD = """# What goes with what

This page is for whoever combines features of a call, and wants to know which pairs were run and what came of them.

Every pair of features in one small call, on a CPU with the compiled kernels. A cell that is not refused is a call whose
loss, log-probs, entropies and gradients are those of the reference in float64, by the rule of
`verification/tolerance.py`. Written by `python -m tests.compositions > docs/compositions.md`;
`tests/test_compositions.py` runs each cell again.

- `1`, `2`: passes over the logits; `ok`: right, by a function that does not count passes
- `–` and a number: refused, with that message, below the table
- `·`: two values of one thing
- `?`: not known here; a graph is captured on a GPU alone

The diagonal is a feature by itself. The others of a call are `grpo_loss`'s defaults: GRPO's clip at token level, fp32
logits, padded, with old log-probs. Schemes of two rows of rollout correction multiply.
"""


def table(verdicts: Mapping[Pair, Verdict]) -> str:
    """The committed page, of the verdicts of all pairs."""
    rows = features()
    reasons = list(dict.fromkeys(verdict.reason for verdict in verdicts.values() if verdict.cell == REFUSED))

    def cell(one: Feature, other: Feature) -> str:
        verdict = verdicts[one.name, other.name]
        return verdict.cell + (str(1 + reasons.index(verdict.reason)) if verdict.cell == REFUSED else "")

    lines = [HEAD, f"| | | {' | '.join(str(i) for i in range(1, len(rows) + 1))} |", "| --- " * (len(rows) + 2) + "|"]
    for i, row in enumerate(rows, 1):
        cells = [str(i), row.name, *(cell(other, row) for other in rows[:i]), *("" for _ in rows[i:])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Refused:", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    lines += ["", "Each is asked for by", "", "| | | |", "| --- | --- | --- |"]
    lines += [f"| {i} | {row.name} | {row.asked} |" for i, row in enumerate(rows, 1)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every pair and print the page."""
    every = list(pairs())
    bar = progress_bar(len(every), "pairs", "pair")
    verdicts = {}
    for one, other in every:
        verdicts[one.name, other.name] = verdict_of_pair(one, other)
        bar.update()
    bar.close()
    sys.stdout.write(table(verdicts))
