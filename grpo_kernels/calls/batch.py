"""From what users pass to the tensors of tokens: one function a tensor, each checked, detached, contiguous (B, T)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backends.contract import TokenInputs
from ..objectives.aggregation import AGGREGATIONS, Aggregation
from ..objectives.checks import (
    check_finite,
    check_flag,
    check_held,
    check_scalar,
    check_shape,
    fail,
    fits,
    of_tokens,
    read_scalar,
)
from ..objectives.config import LossConfig
from ..objectives.divergence import Divergence
from ..objectives.groups import in_words
from ..objectives.maths import weighed
from ..objectives.normalizer import Normalizer
from ..objectives.sequences import Joined, Layout, Packed, Padded, Sequences, on_tokens
from ..objectives.settings import as_float
from ..objectives.surrogates import NoSurrogate
from .arguments import check_pooled
from .over_ranks import NUMBERS, Agreed
from .teacher import Teacher, check_teacher
from .token_batch import KnownSchemes, TokenBatch, pools
from .tokens import Tokens

if TYPE_CHECKING:
    from ..objectives.groups import Group

_Tokens = TypeVar("_Tokens", bound=Tokens)
_POSITIVE_NATS = 1e-3  # rounding of somebody else's log-softmax


class LossArguments(NamedTuple):
    """What a loss is given beside its rows, as its users name it."""

    advantages: Tensor | None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    normalizer: float | Tensor | Normalizer | None = None
    kl_coef: float | Tensor | None = None
    rollout_kl_coef: float | Tensor | None = None
    entropy_coef: float | Tensor | None = None
    entropy_threshold: float | Tensor | None = None
    divergence_coef: float | Tensor | None = None
    teacher: Teacher | None = None
    temperature: Tensor | None = None
    """Of every sequence or token; None: one number for all, which is no argument of tokens."""
    skip_zero_advantage: bool = False
    token_losses: bool = False
    sequence_group: Group | Agreed | None = None
    """The ranks that hold the other tokens of these sequences, once they have agreed."""
    sequence_layout: Layout | None = None
    """Which of them."""

    @property
    def tensors(self) -> dict[str, object]:
        """The tensors that were given, by name."""
        named = {
            "advantages": self.advantages,
            "old_log_probs": self.old_log_probs,
            "ref_log_probs": self.ref_log_probs,
            "rollout_log_probs": self.rollout_log_probs,
            "token_weights": self.token_weights,
            "cu_seqlens": self.cu_seqlens,
            "temperature": self.temperature,
        }
        return {name: value for name, value in named.items() if value is not None}

    def numbers(self, grad_scale: float | Tensor | None) -> dict[str, str]:
        """Return the numbers of a call in words, for ranks to compare."""
        return {"grad_scale": in_words(grad_scale)} | {name: in_words(getattr(self, name)) for name in NUMBERS}

    @property
    def given(self) -> str:
        """The names of what was given."""
        values = self._asdict().items()
        return ", ".join(name for name, value in values if value is not None and value is not False)


def read_batch(tokens: _Tokens, config: LossConfig, arguments: LossArguments) -> tuple[_Tokens, TokenBatch]:
    """Return the tokens, with skipped ones no longer live, and every tensor of tokens that the loss takes."""
    part, tokens = _read_sequences(tokens, arguments.cu_seqlens)
    ranks = arguments.sequence_group
    if ranks is None and arguments.sequence_layout is not None:
        hint = "without a group, of ranks that hold the other tokens, these are whole sequences"
        got = repr(arguments.sequence_layout)
        fail(tokens.function, "sequence_group= beside sequence_layout=", f"sequence_layout={got} alone", hint=hint)
    sequences: Sequences = part
    if isinstance(ranks, Agreed):
        if arguments.sequence_layout is None:
            _check_order(tokens, config)
        sequences = Joined(part, ranks.group, arguments.sequence_layout)
    masked_in = tokens.live
    advantage = _read_advantages(tokens, config, sequences, arguments.advantages)
    kl_coef: float | Tensor | None = config.kl.coef or None
    entropy_coef: float | Tensor | None = config.entropy_coef or None
    rollout_kl_coef: float | Tensor | None = config.rollout_kl.coef or None
    if arguments.kl_coef is not None:
        kl_coef = _read_coefficient(tokens, "kl_coef", arguments.kl_coef)
    if arguments.entropy_coef is not None:
        entropy_coef = _read_coefficient(tokens, "entropy_coef", arguments.entropy_coef)
    if arguments.rollout_kl_coef is not None:
        rollout_kl_coef = _read_coefficient(tokens, "rollout_kl_coef", arguments.rollout_kl_coef)
    _check_needed(tokens, config, arguments, kl_coef is not None, rollout_kl_coef is not None)
    divergence = config.divergence
    if divergence is not None or arguments.teacher is not None:
        check_teacher(tokens.function, arguments.teacher, divergence)
    elif arguments.divergence_coef is not None:
        hint = "LossConfig(divergence=Divergence('reverse_kl')) says of what it is the coefficient"
        expected = "a divergence in the config beside divergence_coef="
        fail(tokens.function, expected, "none", tokens.tensors, hint)
    threshold = arguments.entropy_threshold
    if threshold is not None:
        threshold = read_scalar(tokens.function, "entropy_threshold", threshold, tokens.checks)
    if arguments.skip_zero_advantage:
        check_flag(tokens.function, "skip_zero_advantage", arguments.skip_zero_advantage)
        per_sequence = advantages_per_sequence(sequences, arguments.advantages)
        policy_only = kl_coef is None and rollout_kl_coef is None and entropy_coef is None and divergence is None
        _check_skip(tokens, config, policy_only, per_sequence)
        tokens = _replace_live(tokens, tokens.live & (advantage != 0))

    old, ref, rollout = arguments.old_log_probs, arguments.ref_log_probs, arguments.rollout_log_probs
    old = None if old is None else _read_log_probs(tokens, "old_log_probs", old)
    ref = None if ref is None else _read_log_probs(tokens, "ref_log_probs", ref)
    rollout = None if rollout is None else _read_log_probs(tokens, "rollout_log_probs", rollout)
    known = KnownSchemes.of(config, old, rollout, tokens.live) if config.schemes else None
    if isinstance(sequences, Joined):
        sequences.ask(masked_in, tokens.live, *(() if known is None else known.pooled))
    weight, entropy_weight = _read_weights(tokens, config, arguments, masked_in, sequences)
    policy_weight = torch.zeros_like(weight) if isinstance(config.policy_term, NoSurrogate) else weight
    if arguments.token_weights is not None:
        policy_weight = _times_token_weights(tokens, policy_weight, arguments.token_weights)
    if tokens.checks and tokens.looks:
        if isinstance(part, Padded):
            _check_columns(tokens, masked_in, advantage)
        _check_log_probs(tokens, {"old": old, "rollout": rollout}, policy_weight)
        _check_log_probs(tokens, {"ref": ref}, weight)
    inputs = TokenInputs(
        advantage=advantage,
        policy_weight=policy_weight,
        old=old,
        ref=ref,
        rollout=rollout,
        kl_weight=None if kl_coef is None else _scaled(weight, kl_coef),
        entropy_weight=None if entropy_coef is None else _scaled(entropy_weight, entropy_coef),
        rollout_kl_weight=None if rollout_kl_coef is None else _scaled(weight, rollout_kl_coef),
    )
    batch = TokenBatch(
        live=tokens.live,
        masked_in=masked_in,
        sequences=sequences,
        inputs=inputs,
        schemes=config.schemes,
        entropy_threshold=threshold,
        divergence_weight=None if divergence is None else _divergence_weight(tokens, divergence, arguments, weight),
    )
    if known is not None:
        batch = known.applied(config, batch)
    if arguments.token_losses and isinstance(sequences, Joined):
        _check_losses_of_a_part(tokens, config, batch)
    if tokens.looks and arguments.advantages is not None:
        _check_advantages(tokens, batch, arguments.advantages)
    return tokens, batch


def advantages_per_sequence(sequences: Sequences, advantages: Tensor | None) -> bool:
    """Whether the advantage is one number for each sequence (not one for each token). (S, 1) of a part of sequences is
    none: of one token each it is both, and ranks would differ."""
    if advantages is None:
        return True
    shapes = ((sequences.count,), (sequences.count, 1))[: 1 if isinstance(sequences, Joined) else 2]
    return fits(advantages, *shapes)


def _read_sequences(tokens: _Tokens, cu_seqlens: Tensor | None) -> tuple[Padded | Packed, _Tokens]:
    function, (batch, length) = tokens.function, tokens.live.shape
    if cu_seqlens is None:
        if len(tokens.shape) == 1:
            expected = f"cu_seqlens with packed {next(iter(tokens.tensors))} (N, ...)"
            hint = "cu_seqlens=torch.tensor([0, N]) if the tokens are one sequence"
            fail(function, expected, "none", tokens.tensors, hint)
        return Padded(batch), tokens
    packed = Packed.read(function, cu_seqlens, length, tokens.tensors, tokens.checks)
    if batch != 1:
        fail(function, "packed tensors (N,) or (1, N) with cu_seqlens", f"{batch} rows", tokens.tensors)
    return packed, _replace_live(tokens, tokens.live & packed.inside())


def _replace_live(tokens: _Tokens, live: Tensor) -> _Tokens:
    return dataclasses.replace(tokens, live=live.contiguous())


def _read_advantages(tokens: Tokens, config: LossConfig, sequences: Sequences, advantages: Tensor | None) -> Tensor:
    """Return advantages at every token; 0 where there is no policy term, and none were given."""
    if advantages is None:
        if not isinstance(config.policy_term, NoSurrogate):
            hint = "LossConfig(surrogate=None, divergence=...) has no policy term and needs none"
            fail(tokens.function, "advantages to be a tensor", "None", tokens.tensors, hint, TypeError)
        return torch.zeros_like(tokens.live, dtype=tokens.real)
    count, shape = sequences.count, tuple(tokens.live.shape)
    per_sequence = fits(advantages, (count,), (count, 1))
    if not per_sequence:
        allowed = ((count,), (count, 1), tuple(tokens.shape), shape)
        check_shape(tokens.function, "advantages", advantages, allowed, tokens.tensors, tokens.shift_hint)
    if advantages.dtype == torch.bool:
        hint = f"the order is ({'log_probs' if 'log_probs' in tokens.tensors else 'token_ids'}, advantages, mask)"
        fail(tokens.function, "advantages that are numbers", "torch.bool", tokens.tensors, hint, TypeError)
    if advantages.is_complex():
        fail(tokens.function, "advantages of real numbers", str(advantages.dtype), tokens.tensors, error=TypeError)
    if not per_sequence:
        return of_tokens(advantages, tokens.real)
    values = advantages.detach() if advantages.dtype == tokens.real else advantages.detach().to(tokens.real)
    return sequences.expand(values if values.dim() == 1 else values.squeeze(1)).expand(shape).contiguous()


_COLUMN_ROWS, _COLUMN_RUN, _COLUMN_DEAD = 32, 8, 0.05
"""Sequences of one token that are evidence at all; how many in a row have one advantage on average, and the share that
is masked, from which on they are tokens of a packed batch."""


def _check_columns(tokens: Tokens, live: Tensor, advantage: Tensor) -> None:
    """Raise where a packed batch as Megatron has it, (T, 1, ...), is read as T sequences of one token: advantages come
    in runs and prompts are masked, as in no batch of answers of one token."""
    if live.shape[1] != 1 or live.shape[0] < _COLUMN_ROWS:
        return
    values = advantage[live]
    runs = 1 + int((values.diff() != 0).sum())
    if runs == 1 or runs * _COLUMN_RUN > values.numel() or float(live.double().mean()) > 1 - _COLUMN_DEAD:
        return
    what = next(iter(tokens.tensors))
    fail(
        tokens.function,
        f"{what} (B, T, ...), or packed ones with cu_seqlens=",
        f"{live.shape[0]} sequences of one token, {values.numel()} of them live, with {runs} runs of advantages",
        tokens.tensors,
        f"Megatron has packed {what} (T, 1, ...): {what}.transpose(0, 1), and ids, mask and advantages (1, T)",
    )


def _check_advantages(tokens: Tokens, batch: TokenBatch, advantages: Tensor) -> None:
    """Raise where tokens that have a part in the loss have none: a group of which nothing counts may have any."""
    values = batch.inputs.advantage
    if math.isfinite(float(advantages.detach().sum(dtype=tokens.real))):
        return
    counts = batch.live & (batch.inputs.policy_weight != 0)
    hint = "mask what has none: a group without a reward, or whose rewards are not finite"
    check_finite(tokens.function, "advantages", values, counts, tokens.tensors, hint)


def _divergence_weight(tokens: Tokens, divergence: Divergence, arguments: LossArguments, weight: Tensor) -> Tensor:
    """Return the weight of each token's divergence: 0 where its coefficient is, then it is a metric alone."""
    coef: float | Tensor | None = divergence.coef or None
    if arguments.divergence_coef is not None:
        coef = _read_coefficient(tokens, "divergence_coef", arguments.divergence_coef)
    return torch.zeros_like(weight) if coef is None else _scaled(weight, coef)


def _read_coefficient(tokens: Tokens, name: str, argument: float | Tensor) -> float | Tensor | None:
    """Return the factor of a term that a call gives, None where the term is out."""
    coefficient = read_scalar(tokens.function, name, argument, tokens.checks)
    return coefficient if isinstance(coefficient, Tensor) or coefficient != 0 else None


def _scaled(weight: Tensor, coefficient: float | Tensor) -> Tensor:
    return weight * (coefficient.detach().to(weight) if isinstance(coefficient, Tensor) else coefficient)


def _check_needed(
    tokens: Tokens, config: LossConfig, arguments: LossArguments, with_kl: bool, with_rollout_kl: bool
) -> None:
    """Raise where log-probs are missing that a term compares with, or have too few digits for it."""
    if with_kl and arguments.ref_log_probs is None:
        hint = "kl=KL(0.0) and no kl_coef= leaves it out"
        fail(tokens.function, "ref_log_probs for the KL term", "none", tokens.tensors, hint)
    if with_rollout_kl and arguments.rollout_log_probs is None and arguments.old_log_probs is None:
        expected = "rollout_log_probs (the sampler's), or else old_log_probs, for the KL term to the sampler"
        hint = "rollout_kl=KL(0.0) and no rollout_kl_coef= leaves it out"
        fail(tokens.function, expected, "none", tokens.tensors, hint)
    if config.schemes and arguments.rollout_log_probs is None:
        expected = f"rollout_log_probs (the sampler's) for {', '.join(map(repr, config.schemes))}"
        fail(tokens.function, expected, "none", tokens.tensors, "rollout=() leaves the correction out")
    if config.pooling.pools or config.kl_pooling.pools or config.rollout_kl_pooling.pools or config.schemes:
        check_pooled(tokens.function, config, arguments.old_log_probs, arguments.rollout_log_probs, tokens.tensors)


def _check_skip(tokens: Tokens, config: LossConfig, policy_only: bool, per_sequence: bool) -> None:
    """Raise unless a zero advantage means a zero gradient and no other row needs the token: then skipping is exact."""
    reason = None
    if not policy_only:
        reason = "a KL term, an entropy bonus or a divergence, whose gradient is not 0 at A = 0"
    elif not config.policy_term.flat_at_zero_advantage:
        reason = f"{config.policy_term!r}, whose slope is not 0 at A = 0"
    elif (config.pooling.pools or any(scheme.pooled for scheme in config.schemes)) and not per_sequence:
        reason = "ratios pooled over sequences with an advantage per token: they need every token of their sequence"
    if reason:
        expected = "skip_zero_advantage=True with a loss that ignores tokens of A = 0"
        fail(tokens.function, expected, reason, tokens.tensors)


def _check_order(tokens: Tokens, config: LossConfig) -> None:
    """Raise where a ratio follows from the tokens before it, and nobody says which of them other ranks hold."""
    of_kl = "KL(level=...)"
    levels = (("level", config.pooling), (of_kl, config.kl_pooling), (of_kl, config.rollout_kl_pooling))
    for name, level in levels:
        if level.running:
            expected = f"sequence_layout= beside sequence_group= and {name}={level.name!r}, which asks for the order"
            hint = "that of split_context, part.layout; 'contiguous': rank i of the group holds the i-th part"
            fail(tokens.function, expected, "none: tokens in any order", tokens.tensors, hint)


def _check_losses_of_a_part(tokens: Tokens, config: LossConfig, batch: TokenBatch) -> None:
    """Raise where the backward of losses of tokens would need the other ranks, whose backward may never run."""
    if pools(config, batch):
        expected = "no token_losses=True with sequence_group= where slopes are shared over a sequence"
        hint = "the loss itself (token_losses=False), or what follows from a token alone"
        fail(tokens.function, expected, repr(config), tokens.tensors, hint)


def _read_weights(
    tokens: Tokens, config: LossConfig, arguments: LossArguments, masked_in: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Return the weights in the loss of a token and of its entropy, 0 where the mask is; 1 for losses of tokens."""
    if arguments.token_losses:
        check_flag(tokens.function, "token_losses", arguments.token_losses)
        if arguments.normalizer is not None:
            hint = "what the caller makes of token_losses is averaged by the caller"
            fail(tokens.function, "no normalizer= with token_losses=True", "one", tokens.tensors, hint)
        ones = masked_in.to(tokens.real)
        return ones, ones
    denominator = arguments.normalizer
    if denominator is not None:
        denominator = _read_normalizer(tokens, config, denominator)
    aggregation = config.weighting
    weights = aggregation.weights(masked_in, sequences, denominator)
    if AGGREGATIONS.get(aggregation.name) is not type(aggregation):  # PyTorch 2.11 compiles no look through values()
        weights = _read_weights_of(tokens, aggregation, weights, sequences)
    weight = on_tokens(weights, masked_in, sequences, tokens.real)
    if config.entropy_aggregation is None:
        return weight, weight
    of_entropy = AGGREGATIONS[config.entropy_aggregation]().weights(masked_in, sequences)
    return weight, on_tokens(of_entropy, masked_in, sequences, tokens.real)


def _read_weights_of(tokens: Tokens, aggregation: Aggregation, weights: object, sequences: Sequences) -> Tensor:
    """Return what a user's aggregation has given: a weight for every sequence, or one for all tokens."""
    if isinstance(weights, Tensor) and tuple(weights.shape) in ((), (sequences.count,)) and not weights.is_complex():
        return weights.detach()
    got = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
    expected = f"{type(aggregation).__name__}.weights(...) to return a tensor ({sequences.count},), a weight for every"
    hint = "token_weights= takes weights of tokens"
    fail(tokens.function, f"{expected} sequence, or 0-d, one for all tokens", got, tokens.tensors, hint)


def _read_normalizer(tokens: Tokens, config: LossConfig, normalizer: float | Tensor | Normalizer) -> float | Tensor:
    if isinstance(normalizer, Normalizer):
        normalizer = normalizer.of_loss(tokens.function, config, tokens.tensors)
    number = check_scalar(tokens.function, "normalizer", normalizer, tokens.checks)
    if number is not None and number < 0:
        fail(tokens.function, "normalizer >= 0", repr(number))
    if number is not None and number > 0:
        check_held(tokens.function, "normalizer", number)
    if number == 0 and tokens.looks and bool(tokens.live.any()):
        hint = "normalizer(masks, config) counts what the loss is averaged over"
        fail(tokens.function, "normalizer > 0 where tokens count", repr(number), tokens.tensors, hint)
    return as_float(normalizer)


def _times_token_weights(tokens: Tokens, weight: Tensor, token_weights: Tensor) -> Tensor:
    """Return the weights times the user's, 0 where the mask is, whatever the user's number is there."""
    factor = tokens.per_token("token_weights", token_weights)
    weight = torch.where(tokens.live, weighed(weight, factor), 0.0)
    if not tokens.looks:
        return weight
    if not math.isfinite(float(weight.sum())):  # one number says most often that all are
        hint = "a token that is to have no part has weight 0, or is masked"
        check_finite(tokens.function, "token_weights", factor, tokens.live, tokens.tensors, hint)
    if tokens.checks and bool((tokens.live & (factor < 0)).any()):
        fail(tokens.function, "token_weights >= 0", "negative ones", tokens.tensors, "the sign is the advantages'")
    return weight


def _read_log_probs(tokens: Tokens, name: str, log_probs: Tensor) -> Tensor:
    """Return log-probs to compare with."""
    if not log_probs.is_floating_point():
        fail(tokens.function, f"{name} of a floating dtype", str(log_probs.dtype), tokens.tensors, error=TypeError)
    return tokens.per_token(name, log_probs)


def _check_log_probs(tokens: Tokens, log_probs: Mapping[str, Tensor | None], weight: Tensor) -> None:
    """Look at log-probs, by the first word of their name, where they have a part in the loss."""
    for name, values in log_probs.items():
        if values is not None:
            counts = tokens.live & (weight != 0)
            check_log_probs(tokens, f"{name}_log_probs", values, counts, unknown=name == "rollout")


def check_log_probs(tokens: Tokens, name: str, values: Tensor, counts: Tensor, unknown: bool = False) -> None:
    """With checks on, raise where log-probs (B, T) that count are above 0, or NaN unless that means ``unknown``."""
    if not (tokens.checks and tokens.looks):
        return
    numbers = values.nan_to_num(nan=0.0) if unknown else values
    wrong = counts & ~(numbers <= _POSITIVE_NATS)
    if bool(wrong.any()):
        got = f"{float(values[wrong][0]):.6g} (and as bad at {int(wrong.sum()) - 1} other live tokens)"
        fail(tokens.function, f"{name} <= 0", got, tokens.tensors, "it takes log-probs, not probabilities")
