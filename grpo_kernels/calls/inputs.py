"""From what users pass to what kernels read: canonical (B, T) tensors, checked, detached, masked."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..backends.contract import Rows
from ..backends.spec import LogitArgs, in_kernel, numbers_vector
from ..objectives.aggregation import Normalizer, on_tokens, sequence_weights
from ..objectives.checks import (
    INTEGER_DTYPES,
    LARGEST,
    SMALLEST,
    asked_to_look,
    check_device,
    check_finite,
    check_positive,
    check_scalar,
    check_shape,
    check_tensors,
    fail,
    has_shape,
    may_look,
    read_mask,
)
from ..objectives.config import LossConfig
from ..objectives.maths import weighed
from ..objectives.sequences import Packed, Padded, Sequences
from .arguments import check_head, check_logits, check_no_transforms, check_pooled, ordinary
from .head import operand_dtype
from .terms import TokenBatch


@dataclass(frozen=True)
class Tokens:
    """Ids and mask of a call, (B, T), beside the vocabulary rows they belong to."""

    function: str
    states: Tensor
    """The logits, or the hidden states that they are computed from: the dimensions before the last are the rows'."""
    vocab: int
    dtype: torch.dtype
    """Of the logits."""
    token_ids: Tensor
    """int64, contiguous."""
    live: Tensor
    """bool, contiguous."""
    shape: torch.Size
    """Of token_ids as the user gave them: the shape of outputs."""
    tensors: Mapping[str, object]
    """The user's tensors by name, for messages."""

    @property
    def real(self) -> torch.dtype:
        return ops.real_dtype(self.dtype)

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """A user's token-sized tensor as detached, contiguous (B, T)."""
        allowed = (tuple(self.shape), tuple(self.token_ids.shape))
        check_shape(self.function, name, value, allowed, self.tensors, self.shift_hint)
        return value.detach().to(self.real).reshape(self.token_ids.shape).contiguous()

    def shift_hint(self, name: str, value: Tensor) -> str | None:
        """What to do where ids are shifted and another tensor is not, or the other way round."""
        return _shift_hint(name, value, self.shape, next(iter(self.tensors)))

    def numbers(
        self,
        logit_args: LogitArgs,
        grad_scale: float | Tensor = 1.0,
        config: LossConfig | None = None,
        entropy_threshold: float | Tensor | None = None,
    ) -> Tensor:
        return numbers_vector(logit_args, grad_scale, config, self.real, self.states.device, entropy_threshold)

    def rows(
        self,
        logit_args: LogitArgs,
        grad_scale: float | Tensor = 1.0,
        config: LossConfig | None = None,
        entropy_threshold: float | Tensor | None = None,
    ) -> Rows:
        """Where the states are the logits."""
        numbers = self.numbers(logit_args, grad_scale, config, entropy_threshold)
        return Rows(self.states, self.token_ids, self.live, numbers, logit_args.logit_softcap is not None)


def read_tokens(
    function: str,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """Check logits, ids and mask against each other and bring ids and mask to (B, T)."""
    named = {"logits": logits, "token_ids": token_ids, "mask": mask, **tensors}
    check_logits(function, logits, named)
    return read_ids(function, logits, logits.shape[-1], logits.dtype, token_ids, mask, named, check)


def read_linear_tokens(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    logits_dtype: torch.dtype | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """``read_tokens`` for hidden states and the head that makes logits of them."""
    named = {"hidden": hidden, "weight": weight, "bias": bias, "token_ids": token_ids, "mask": mask, **tensors}
    check_head(function, hidden, weight, bias, named)
    operands = operand_dtype(hidden)
    dtype = operands if logits_dtype is None else logits_dtype
    if dtype != operands and (dtype != torch.float32 or operands.itemsize != 2):
        expected = f"logits_dtype=torch.float32 (with half precision) or None for that of the GEMM ({operands})"
        fail(function, expected, repr(logits_dtype), named)
    for tensor in (weight, bias):
        if tensor is not None:
            check_no_transforms(function, tensor)
    return read_ids(function, hidden, weight.shape[0], dtype, token_ids, mask, named, check)


def read_ids(
    function: str,
    states: Tensor,
    vocab: int,
    dtype: torch.dtype,
    token_ids: Tensor,
    mask: Tensor | None,
    named: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """As ``read_tokens``, for logits or for what they are computed from (``named`` has it first)."""
    what = next(iter(named))
    check_tensors(function, named)
    check_no_transforms(function, states)
    check_device(function, named)
    if token_ids.dtype not in INTEGER_DTYPES:
        fail(function, "integer token_ids", str(token_ids.dtype), named, error=TypeError)
    rows = states.shape[:-1]
    fitting = any(has_shape(token_ids, shape) for shape in _token_shapes(tuple(rows)))
    if not fitting:
        wanted = " or ".join(str(shape) for shape in _token_shapes(tuple(rows)))
        hint = f"align(input_ids, mask) gives ids for {what} (B, L, ...) as a causal model returns them"
        fail(function, f"token_ids of shape {wanted}", str(tuple(token_ids.shape)), named, hint)
    ids = token_ids.reshape(1, -1) if token_ids.dim() == 1 else token_ids
    if mask is None:
        live = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    else:
        shifted = functools.partial(_shift_hint, shape=token_ids.shape, what=what)
        check_shape(function, "mask", mask, (tuple(token_ids.shape),), named, shifted)
        live = read_mask(function, mask, named, check).reshape(ids.shape).contiguous()
    ids = ordinary(ids.to(torch.int64).contiguous())
    return Tokens(function, states, vocab, dtype, ids, ordinary(live), token_ids.shape, named)


def _token_shapes(rows: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of token_ids for rows of these leading dimensions: T, or T+1 with the last row unused."""
    shorter = (*rows[:-1], rows[-1] - 1)
    return (rows, shorter) if rows[-1] > 0 else (rows,)


def _shift_hint(name: str, value: Tensor, shape: torch.Size, what: str) -> str | None:
    """``shape`` is that of token_ids. Packed tensors keep their length when they are shifted."""
    if value.dim() != 2 or len(shape) != 2 or value.shape[0] != shape[0]:
        return None
    if value.shape[1] == shape[1] - 1:
        return f"token_ids are not shifted: align(input_ids, mask) gives ids for {what} (B, L, ...) as they are"
    if value.shape[1] != shape[1] + 1:
        return None
    if name == "mask":
        return "token_ids are shifted and the mask is not: align(input_ids, mask) shifts both"
    return (
        f"token_ids are shifted and {name} is not: {name}[:, :-1] of what belongs to the rows of a model, "
        f"{name}[:, 1:] of what belongs to its tokens (align shifts ids and mask)"
    )


def check_logit_args(function: str, args: LogitArgs, check: bool | None = None) -> None:
    """Each a positive number that fp32 holds, and so are the quotients that kernels form of them."""
    temperature = check_positive(function, "temperature", args.temperature, check)
    scale = check_positive(function, "logit_scale", args.logit_scale, check)
    _check_quotient(function, "logit_scale / temperature", scale, temperature)
    if args.logit_softcap is not None:
        cap = check_positive(function, "logit_softcap", args.logit_softcap, check)
        _check_quotient(function, "logit_scale / logit_softcap", scale, cap)
        _check_quotient(function, "logit_softcap / temperature", cap, temperature)


def _check_quotient(function: str, names: str, over: float | None, under: float | None) -> None:
    if over is not None and under is not None and not SMALLEST <= over / under <= LARGEST:
        expected = f"{names} in [{SMALLEST:.4g}, {LARGEST:.4g}], as fp32 holds it"
        fail(function, expected, f"{over!r} / {under!r}")


def check_contents(tokens: Tokens, backend: str, logit_args: LogitArgs, check: bool | None) -> None:
    """With checks on: ids in range, and ids that look shifted by one row. Waits for the device."""
    check_ids(tokens, check)
    if not asked_to_look(tokens.states, check):
        return
    rows = tokens.rows(logit_args)

    def log_probs(ids: Tensor, live: Tensor) -> Tensor:
        return ops.log_probs(tokens.states.detach(), ids, live, rows.numbers, rows.softcap, backend)[0]

    check_shift(tokens, log_probs)


def check_ids(tokens: Tokens, check: bool | None) -> None:
    """With checks on: that live ids are in the vocabulary."""
    if not asked_to_look(tokens.token_ids, check):
        return
    function, ids, live = tokens.function, tokens.token_ids, tokens.live
    bad = live & ((ids < 0) | (ids >= tokens.vocab))
    if bool(bad.any()):
        position = tuple(int(i) for i in bad.nonzero()[0])
        got = f"token_ids[{position[0]}, {position[1]}] = {int(ids[position])} at a live position"
        fail(function, f"token ids in [0, {tokens.vocab})", got, tokens.tensors, "mask that position", IndexError)


_POSITIVE_NATS = 1e-3  # rounding of somebody else's log-softmax
_SHIFT_TOKENS, _SHIFT_NATS, _SHIFT_ERRORS = 16, 1.0, 6.0
"""Tokens that are evidence at all; their mean gain, and how many of its standard errors it must be."""


def check_shift(tokens: Tokens, log_probs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Ids that were not shifted, or cut at the wrong end (``ids[:, :-1]``), have an accepted shape and the wrong
    meaning: every token is likelier one row earlier, which saw what comes before it and not the token itself.
    ``log_probs`` gives those of (ids, live).

    Tokens drawn from the policy are less likely there on average, whatever it is; of tokens that have nothing to do
    with it, and of a few that it would never draw, the standard error tells. One row later is no evidence: an untrained
    model with tied embeddings predicts the token that it has just read.
    """
    ids, live = tokens.token_ids, tokens.live.clone()
    live[:, :1] = False
    here = log_probs(ids, live).view_as(ids)
    earlier = log_probs(ids.roll(-1, 1), live.roll(-1, 1)).view_as(ids).roll(1, 1)
    gains = (earlier - here)[live].double()
    gains = gains[gains.isfinite()]
    if gains.numel() < _SHIFT_TOKENS:
        return
    gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(gains.numel())
    if gain > max(_SHIFT_NATS, _SHIFT_ERRORS * error):
        fail(
            tokens.function,
            f"token_ids[:, t] to be the token that row t of the {next(iter(tokens.tensors))} predicts",
            f"tokens that are {gain:.2f} nats likelier one row earlier, on average over {gains.numel()}",
            tokens.tensors,
            "align(input_ids, mask) shifts ids and mask (ids[:, 1:], not ids[:, :-1]); what the model returned stays",
        )


@dataclass(frozen=True)
class LossInputs:
    """The optional tensors and numbers of a loss call, as the user gave them."""

    advantages: Tensor
    old: Tensor | None = None
    ref: Tensor | None = None
    rollout: Tensor | None = None
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    normalizer: float | Tensor | Normalizer | None = None
    kl_coef: float | Tensor | None = None
    entropy_coef: float | Tensor | None = None
    skip_zero_advantage: bool = False
    check: bool | None = None
    entropy_threshold: float | Tensor | None = None

    @property
    def tensors(self) -> dict[str, object]:
        """By the names that users know, for messages."""
        log_probs = {"old_log_probs": self.old, "ref_log_probs": self.ref, "rollout_log_probs": self.rollout}
        rest = {"token_weights": self.token_weights, "cu_seqlens": self.cu_seqlens}
        return {"advantages": self.advantages, **log_probs, **rest}


def read_batch(tokens: Tokens, config: LossConfig, given: LossInputs) -> tuple[Tokens, TokenBatch]:
    """Every token-sized tensor of the loss; the tokens with skipped rows no longer live."""
    function = tokens.function
    sequences, tokens = _read_sequences(tokens, given.cu_seqlens, given.check)
    masked_in = tokens.live
    advantages = _read_advantages(tokens, sequences, given.advantages)
    per_sequence = advantages_per_sequence(sequences, given.advantages)
    kl_coef = _coefficient(function, "kl_coef", given.kl_coef, config.kl.coef, given.check)
    entropy_coef = _coefficient(function, "entropy_coef", given.entropy_coef, config.entropy_coef, given.check)
    if kl_coef is not None and given.ref is None:
        fail(
            function,
            "ref_log_probs for the KL term",
            "none",
            tokens.tensors,
            "kl=KL(0.0) and no kl_coef= leaves it out",
        )
    if config.schemes and given.rollout is None:
        expected = f"rollout_log_probs (the sampler's) for {', '.join(map(repr, config.schemes))}"
        fail(function, expected, "none", tokens.tensors, "rollout=() leaves the correction out")
    check_pooled(function, config, given.old, given.rollout, tokens.tensors)
    if given.entropy_threshold is not None:
        check_scalar(function, "entropy_threshold", given.entropy_threshold, given.check)
    if given.skip_zero_advantage:
        _check_skip(tokens, config, kl_coef is None and entropy_coef is None, per_sequence)
        tokens = _replace_live(tokens, tokens.live & (advantages != 0))

    denominator = _read_normalizer(tokens, config, given)
    options = (config.constant_length, config.group_size)
    weights = sequence_weights(config.aggregation, masked_in, sequences, denominator, *options)
    token_weight = policy_weight = on_tokens(weights, masked_in, sequences, tokens.real)
    entropy_weight = token_weight
    if config.entropy_aggregation is not None:
        own = sequence_weights(config.entropy_aggregation, masked_in, sequences)
        entropy_weight = on_tokens(own, masked_in, sequences, tokens.real)
    if given.token_weights is not None:
        # Where the mask is, the weight stays 0 whatever the user's number is.
        factor = tokens.per_token("token_weights", given.token_weights)
        policy_weight = torch.where(tokens.live, policy_weight * factor, 0.0)
        _check_weights(tokens, factor, policy_weight, given.check)
    per_token = {
        name: None if value is None else _read_log_probs(tokens, f"{name}_log_probs", value, weight, given.check)
        for name, value, weight in (
            ("old", given.old, policy_weight),
            ("ref", given.ref, token_weight),
            ("rollout", given.rollout, policy_weight),
        )
    }
    batch = TokenBatch(
        live=tokens.live,
        masked_in=masked_in,
        sequences=sequences,
        advantages=advantages,
        policy_weight=policy_weight,
        kl_weight=_scaled(token_weight, kl_coef),
        entropy_weight=_scaled(entropy_weight, entropy_coef),
        schemes=config.schemes,
        entropy_threshold=given.entropy_threshold,
        **per_token,
    )
    batch = _apply_known(config, batch)
    _check_advantages(tokens, batch, given)
    return tokens, batch


def _read_normalizer(tokens: Tokens, config: LossConfig, given: LossInputs) -> float | Tensor | None:
    value = given.normalizer
    if isinstance(value, Normalizer):
        value = value.of_loss(tokens.function, config, tokens.tensors)
    if value is None:
        return None
    number = check_scalar(tokens.function, "normalizer", value, given.check)
    if number is not None and number < 0:
        fail(tokens.function, "normalizer >= 0", repr(number))
    return value


def _check_weights(tokens: Tokens, factor: Tensor, weight: Tensor, check: bool | None) -> None:
    """Of live tokens; ``weight`` has the factors in it, and 0 elsewhere."""
    if not may_look(factor, check):
        return
    named = (tokens.function, "token_weights", factor, tokens.live, tokens.tensors)
    if not math.isfinite(float(weight.sum())):  # one number says most often that all are
        check_finite(*named, "a token that is to have no part has weight 0, or is masked")
    if asked_to_look(factor, check) and bool((tokens.live & (factor < 0)).any()):
        fail(tokens.function, "token_weights >= 0", "negative ones", tokens.tensors, "the sign is the advantages'")


def _check_advantages(tokens: Tokens, batch: TokenBatch, given: LossInputs) -> None:
    """Of tokens that have a part in the loss: a group of which nothing counts may have any."""
    if not may_look(batch.advantages, given.check) or math.isfinite(
        float(given.advantages.detach().to(tokens.real).sum())
    ):
        return
    counts = batch.live & (batch.policy_weight != 0)
    hint = "mask what has none: a group without a reward, or whose rewards are not finite"
    check_finite(tokens.function, "advantages", batch.advantages, counts, tokens.tensors, hint)


def _apply_known(config: LossConfig, batch: TokenBatch) -> TokenBatch:
    """With the rollout factors in the weights that follow from old log-probs, unless a kernel applies them: so the
    one-pass loss stays one pass."""
    if batch.old is None or config.surrogate.takes_rollout or in_kernel(batch.schemes):
        return batch
    known = tuple(scheme for scheme in batch.schemes if not scheme.of_policy)
    if len(known) == 0:
        return batch
    factors = torch.where(batch.live, batch.factors(config, batch.old, known), 0.0)
    left = tuple(scheme for scheme in batch.schemes if scheme.of_policy)
    weight = weighed(batch.policy_weight, factors)
    return dataclasses.replace(batch, policy_weight=weight, schemes=left, rollout_weight=factors)


def _read_sequences(tokens: Tokens, cu_seqlens: Tensor | None, check: bool | None) -> tuple[Sequences, Tokens]:
    function, ids = tokens.function, tokens.token_ids
    if cu_seqlens is None:
        if len(tokens.shape) == 1:
            hint = "cu_seqlens=torch.tensor([0, N]) if the tokens are one sequence"
            fail(
                function, f"cu_seqlens with packed {next(iter(tokens.tensors))} (N, ...)", "none", tokens.tensors, hint
            )
        return Padded(ids.shape[0]), tokens
    packed = Packed.read(function, cu_seqlens, ids.shape[1], tokens.tensors, check)
    if ids.shape[0] != 1:
        fail(function, "packed tensors (N,) or (1, N) with cu_seqlens", f"{ids.shape[0]} rows", tokens.tensors)
    return packed, _replace_live(tokens, tokens.live & packed.inside())


def _read_log_probs(tokens: Tokens, name: str, value: Tensor, weight: Tensor, check: bool | None) -> Tensor:
    """``weight``: 0 where they have no part in the loss."""
    if not value.is_floating_point():
        fail(tokens.function, f"{name} of a floating dtype", str(value.dtype), tokens.tensors, error=TypeError)
    out = tokens.per_token(name, value)
    if asked_to_look(out, check):
        known = out if name != "rollout_log_probs" else out.nan_to_num(nan=0.0)
        wrong = tokens.live & (weight != 0) & ~(known <= _POSITIVE_NATS)
        if bool(wrong.any()):
            got = f"{float(out[wrong][0]):.6g} (and as bad at {int(wrong.sum()) - 1} other live tokens)"
            fail(tokens.function, f"{name} <= 0", got, tokens.tensors, "it takes log-probs, not probabilities")
    return out


def _replace_live(tokens: Tokens, live: Tensor) -> Tokens:
    return dataclasses.replace(tokens, live=live.contiguous())


def _read_advantages(tokens: Tokens, sequences: Sequences, advantages: Tensor) -> Tensor:
    """Contiguous (B, T)."""
    count = sequences.count
    shape = tuple(tokens.token_ids.shape)
    allowed = ((count,), (count, 1), tuple(tokens.shape), shape)
    check_shape(tokens.function, "advantages", advantages, allowed, tokens.tensors, tokens.shift_hint)
    if advantages.dtype == torch.bool:
        hint = "the order is (token_ids, advantages, mask)"
        fail(tokens.function, "advantages that are numbers", "torch.bool", tokens.tensors, hint, TypeError)
    values = advantages.detach().to(tokens.real)
    if advantages_per_sequence(sequences, advantages):
        return sequences.expand(values.reshape(count)).expand(shape).contiguous()
    return values.reshape(shape).contiguous()


def advantages_per_sequence(sequences: Sequences, advantages: Tensor) -> bool:
    """Whether the advantage is one number for each sequence (not one for each token)."""
    return any(has_shape(advantages, shape) for shape in ((sequences.count,), (sequences.count, 1)))


def _coefficient(
    function: str, name: str, given: float | Tensor | None, configured: float, check: bool | None
) -> float | Tensor | None:
    """The factor of a term, None where the term is out."""
    value = configured if given is None else given
    check_scalar(function, name, value, check)
    return value if isinstance(value, Tensor) or value != 0 else None


def _scaled(weight: Tensor, coefficient: float | Tensor | None) -> Tensor | None:
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.detach().to(weight)
    return None if coefficient is None else weight * coefficient


def _check_skip(tokens: Tokens, config: LossConfig, policy_only: bool, per_sequence: bool) -> None:
    """Skipping is exact only where a zero advantage means a zero gradient and no other row needs the token."""
    reason = None
    if not policy_only:
        reason = "a KL term or an entropy bonus, whose gradient is not 0 at A = 0"
    elif not config.surrogate.flat_at_zero_advantage:
        reason = f"{config.surrogate!r}, whose slope is not 0 at A = 0"
    elif (config.level != "token" or any(scheme.pooled for scheme in config.schemes)) and not per_sequence:
        reason = "ratios pooled over sequences with an advantage per token: they need every token of their sequence"
    if reason:
        expected = "skip_zero_advantage=True with a loss that ignores tokens of A = 0"
        fail(tokens.function, expected, reason, tokens.tensors)


def choose_backend(tokens: Tokens, backend: str | None, args: LogitArgs, fused: bool = False) -> backends.Choice:
    """The backend, and whether it serves the one-pass loss where that is wanted (``fused``)."""
    softcap = args.logit_softcap is not None
    request = backends.Request(tokens.states.device, tokens.dtype, tokens.vocab, fused, softcap)
    return backends.choose(tokens.function, request, backend)
