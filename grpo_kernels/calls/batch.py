"""From what users pass to what kernels read: canonical (B, T) tensors, checked, detached, masked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.contract import TokenInputs
from ..backends.spec import in_kernel
from ..objectives.aggregation import AGGREGATIONS, on_tokens
from ..objectives.checks import (
    asked_to_look,
    check_finite,
    check_scalar,
    check_shape,
    fail,
    has_shape,
    may_look,
)
from ..objectives.config import LossConfig
from ..objectives.maths import accumulate_dtype, weighed
from ..objectives.normalizer import Normalizer
from ..objectives.rollout import Rollout, rollout_weights
from ..objectives.sequences import Packed, Padded, Sequences
from .arguments import check_pooled
from .tokens import Tokens

_POSITIVE_NATS = 1e-3  # rounding of somebody else's log-softmax


@dataclass(frozen=True)
class TokenBatch:
    """The token-sized inputs of one loss, all contiguous (B, T). Where ``live`` is not, they hold anything."""

    live: Tensor
    """bool: counts in the loss and is read."""
    masked_in: Tensor
    """bool: counts in the denominators (live or skipped)."""
    sequences: Sequences
    inputs: TokenInputs
    """Weights are 0 where ``masked_in`` is not."""
    schemes: tuple[Rollout, ...] = ()
    """Rollout schemes that are still to be applied."""
    rollout_weight: Tensor | None = None
    """The factors of those already applied, for the metrics."""
    entropy_threshold: Tensor | float | None = None
    """Tokens of less entropy have no policy term."""

    def pool(self, values: Tensor, mean: bool) -> Tensor:
        """Sums or means over each sequence's live tokens, at every token."""
        live = torch.where(self.live, values, 0.0)
        return self.sequences.expand(self.per_sequence(live, mean)).expand_as(values)

    def per_sequence(self, values: Tensor, mean: bool) -> Tensor:
        """Sums (or means over live tokens) of (B, T) values that are 0 at dead rows; 0 for an empty sequence."""
        dtype = accumulate_dtype(values.device)
        total = self.sequences.sum(values.to(dtype))
        if mean:
            total = total / self.sequences.sum(self.live.to(dtype)).clamp(min=1)
        return total.to(values.dtype)

    def factors(self, config: LossConfig, log_prob: Tensor, schemes: tuple[Rollout, ...]) -> Tensor:
        """Of these rollout schemes."""
        inputs = self.inputs
        assert inputs.rollout is not None
        others = (inputs.old, inputs.rollout, inputs.advantage, config.log_ratio_limit)
        return rollout_weights(schemes, log_prob, *others, self.pool)


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
    weights = config.weighting.weights(masked_in, sequences, denominator)
    token_weight = policy_weight = on_tokens(weights, masked_in, sequences, tokens.real)
    entropy_weight = token_weight
    if config.entropy_aggregation is not None:
        own = AGGREGATIONS[config.entropy_aggregation]().weights(masked_in, sequences)
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
        inputs=TokenInputs(
            advantage=advantages,
            policy_weight=policy_weight,
            kl_weight=_scaled(token_weight, kl_coef),
            entropy_weight=_scaled(entropy_weight, entropy_coef),
            **per_token,
        ),
        schemes=config.schemes,
        entropy_threshold=given.entropy_threshold,
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
    if not may_look(batch.inputs.advantage, given.check) or math.isfinite(
        float(given.advantages.detach().to(tokens.real).sum())
    ):
        return
    counts = batch.live & (batch.inputs.policy_weight != 0)
    hint = "mask what has none: a group without a reward, or whose rewards are not finite"
    check_finite(tokens.function, "advantages", batch.inputs.advantage, counts, tokens.tensors, hint)


def _apply_known(config: LossConfig, batch: TokenBatch) -> TokenBatch:
    """With the rollout factors in the weights that follow from old log-probs, unless a kernel applies them: so the
    one-pass loss stays one pass."""
    inputs = batch.inputs
    if inputs.old is None or config.surrogate.takes_rollout or in_kernel(batch.schemes):
        return batch
    known = tuple(scheme for scheme in batch.schemes if not scheme.of_policy)
    if len(known) == 0:
        return batch
    factors = torch.where(batch.live, batch.factors(config, inputs.old, known), 0.0)
    left = tuple(scheme for scheme in batch.schemes if scheme.of_policy)
    inputs = inputs._replace(policy_weight=weighed(inputs.policy_weight, factors))
    return dataclasses.replace(batch, inputs=inputs, schemes=left, rollout_weight=factors)


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
    elif (config.pooling.pools or any(scheme.pooled for scheme in config.schemes)) and not per_sequence:
        reason = "ratios pooled over sequences with an advantage per token: they need every token of their sequence"
    if reason:
        expected = "skip_zero_advantage=True with a loss that ignores tokens of A = 0"
        fail(tokens.function, expected, reason, tokens.tensors)
