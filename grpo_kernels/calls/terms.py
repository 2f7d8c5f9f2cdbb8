"""The [tokens]-sized half of the loss: log-probs to records (two-pass route), records to loss and metrics (both).

``token_terms`` is the twin of the function of that name in csrc/common/surrogates.h:

    log-ratio → ratio, pooled and saturated → weight, rollout factors in it → policy part + KL part
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..backends.contract import RowGradients, TokenInputs, TokenRecords, TokenValues
from ..backends.spec import in_kernel, objective_spec
from ..objectives.config import LossConfig
from ..objectives.kl import ESTIMATORS, KLTerms, kl_terms
from ..objectives.levels import Level
from ..objectives.maths import clamp, log_ratio_of, times, weighed, within
from ..objectives.metrics import FIELDS, Metrics, reduce_ratios
from ..objectives.rollout import FOLDED, Rollout, rollout_weights
from ..objectives.sequences import Sequences, accumulate_dtype
from ..objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, Point


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
        """Return sums or means over each sequence's live tokens, at every token."""
        live = torch.where(self.live, values, 0.0)
        return self.sequences.expand(self.per_sequence(live, mean)).expand_as(values)

    def per_sequence(self, values: Tensor, mean: bool) -> Tensor:
        """Return sums (or means over live tokens) of (B, T) values that are 0 at dead rows; 0 for an empty sequence."""
        dtype = accumulate_dtype(values.device)
        total = self.sequences.sum(values.to(dtype))
        if mean:
            total = total / self.sequences.sum(self.live.to(dtype)).clamp(min=1)
        return total.to(values.dtype)

    def factors(self, config: LossConfig, log_prob: Tensor, schemes: tuple[Rollout, ...]) -> Tensor:
        """Return the product of the factors of these rollout schemes."""
        inputs = self.inputs
        assert inputs.rollout is not None
        others = (inputs.old, inputs.rollout, inputs.advantage, config.log_ratio_limit)
        return rollout_weights(schemes, log_prob, *others, self.pool)


def with_known_factors(config: LossConfig, batch: TokenBatch) -> TokenBatch:
    """Multiply those rollout factors into the weights that follow from old log-probs, unless a kernel applies them: so
    the one-pass loss stays one pass."""
    inputs = batch.inputs
    if inputs.old is None or config.surrogate.takes_rollout or in_kernel(batch.schemes):
        return batch
    of_old = tuple(scheme for scheme in batch.schemes if not scheme.of_policy)
    if len(of_old) == 0:
        return batch
    factors = torch.where(batch.live, batch.factors(config, inputs.old, of_old), 0.0)
    inputs = inputs._replace(policy_weight=weighed(inputs.policy_weight, factors))
    of_policy = tuple(scheme for scheme in batch.schemes if scheme.of_policy)
    return dataclasses.replace(batch, inputs=inputs, schemes=of_policy, rollout_weight=factors)


def pools(config: LossConfig, batch: TokenBatch) -> bool:
    """Whether a token's slope needs the other tokens of its sequence."""
    return config.pooling.pools or config.kl_pooling.pools or any(scheme.pooled for scheme in batch.schemes)


class Settled(NamedTuple):
    """A loss whose log-probs are known."""

    loss: Tensor
    """0-d, detached."""
    metrics: Metrics
    gradients: RowGradients


def settle(config: LossConfig, batch: TokenBatch, values: TokenValues, numbers: Tensor, backend: str) -> Settled:
    """Return loss, metrics and the slopes in log-probs and entropies."""
    records, slope = fast_token_terms(config, batch, values, numbers, backend)
    loss, metrics = reduce_records(config, batch, values, records, backend)
    weight = batch.inputs.entropy_weight
    return Settled(loss, metrics, RowGradients(slope, None if weight is None else -weight))


def fast_token_terms(
    config: LossConfig, batch: TokenBatch, values: TokenValues, numbers: Tensor, backend: str
) -> tuple[TokenRecords, Tensor]:
    """Return ``token_terms``, by the backend's kernel where it has one: on a GPU one launch in place of sixty."""
    by_token = not pools(config, batch)
    spec = objective_spec(config, batch.inputs.kl_weight is not None, batch.schemes) if by_token else None
    if spec is None or not backends.has_token_terms(backend):
        return token_terms(config, batch, values.log_prob, values.entropy)
    return ops.token_terms(values, numbers, batch.inputs, spec, backend)


def token_terms(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor | None = None
) -> tuple[TokenRecords, Tensor]:
    """Return the records of every token and ∂loss/∂ℓ, weights included in the last.

    ``entropy`` is needed with a threshold alone.
    """
    ratio = _ratio_of(config, batch, log_prob)
    policy = _policy_part(config, batch, log_prob, entropy, ratio)
    kl_value, kl_slope = _kl_part(config, batch, log_prob, ratio)
    live, dead = batch.live, torch.zeros_like(log_prob)
    applied = ratio.applied
    records = TokenRecords(
        policy=torch.where(live, policy.value, dead),
        kl=torch.where(live, kl_value, dead),
        flags=torch.where(live, policy.flags, 0),
        rollout_weight=log_prob.new_empty(0) if applied is None else torch.where(live, applied, dead),
    )
    return records, torch.where(live, policy.slope + kl_slope, dead)


class _Ratio(NamedTuple):
    """The ratio to the old policy of every token, and the rollout factors beside it."""

    old: Tensor
    """Log-probs that the ratio is taken to; the policy's own on-policy."""
    own: Tensor
    """Log-ratio of the token by itself, unbounded."""
    bounded: Tensor
    """The same with the surrogate's bounds and the rollout factors that are part of the ratio."""
    pooled: _Pooled
    """``bounded`` as the level pools it."""
    possible: Tensor
    """bool: the token's probability is not 0. One of probability 0 has no direction to give: it saturates."""
    passes: Tensor
    """bool: ``possible``, and not at one of the surrogate's own bounds."""
    flags: Tensor | None
    """Of these bounds, where the surrogate has any."""
    in_value: Tensor | None
    """The rollout factors of the surrogate's value."""
    applied: Tensor | None
    """All rollout factors."""


class _Pooled(NamedTuple):
    """A log-ratio pooled and saturated, at every token."""

    log: Tensor
    ratio: Tensor
    inside: Tensor
    """bool: where it does not saturate."""

    @classmethod
    def of(cls, level: Level, log_ratio: Tensor, limit: float | None, batch: TokenBatch) -> _Pooled:
        raw = level.pool(log_ratio, batch.pool)
        saturated = clamp(raw, limit)
        return cls(saturated, saturated.exp(), within(raw, limit))


def _ratio_of(config: LossConfig, batch: TokenBatch, log_prob: Tensor) -> _Ratio:
    inputs = batch.inputs
    old = log_prob if inputs.old is None else inputs.old
    own = torch.where(batch.live, log_ratio_of(log_prob, old), 0.0)  # NaN stays NaN
    bounded, free, flags = config.surrogate.clip_log_ratios(own, inputs.advantage)
    in_ratio, in_value, applied = _rollout_factors(config, batch, log_prob)
    if in_ratio is not None:
        bounded = bounded + torch.where(batch.live, in_ratio.log().clamp(*FOLDED), 0.0)
    pooled = _Pooled.of(config.pooling, bounded, config.log_ratio_limit, batch)
    possible = log_prob != float("-inf")
    passes = possible if free is None else possible & free
    return _Ratio(old, own, bounded, pooled, possible, passes, flags, in_value, applied)


def _rollout_factors(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the factors that are part of the ratio, those of the value, and all of them; None where there are none."""
    in_ratio = tuple(s for s in batch.schemes if config.surrogate.folds(s))
    in_value = tuple(s for s in batch.schemes if not config.surrogate.folds(s))
    ratio, value = (
        batch.factors(config, log_prob, schemes) if len(schemes) else None for schemes in (in_ratio, in_value)
    )
    if ratio is None or value is None:
        return ratio, value, value if ratio is None else ratio
    return ratio, value, times(ratio, value)


class _PolicyPart(NamedTuple):
    value: Tensor
    """Unweighted, rollout factors included."""
    slope: Tensor
    """∂loss/∂ℓ, weighted."""
    flags: Tensor


def _policy_part(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor | None, ratio: _Ratio
) -> _PolicyPart:
    """Return the surrogate's part: its slope in the pooled ratio, spread as the level says, and the token's own."""
    inputs, pooled = batch.inputs, ratio.pooled
    terms = config.surrogate.terms(Point(log_prob, pooled.log, pooled.ratio, inputs.advantage, ratio.old))
    weight, value = inputs.policy_weight, terms.value
    if ratio.in_value is not None:
        weight, value = weighed(weight, ratio.in_value), weighed(ratio.in_value, value)
    if batch.entropy_threshold is not None:
        assert entropy is not None
        low = entropy < batch.entropy_threshold
        weight, value = torch.where(low, 0.0, weight), torch.where(low, 0.0, value)
    slope = weighed(weight, torch.where(pooled.inside, terms.slope, 0.0))
    slope = config.pooling.distribute(slope, batch.pool)
    slope = torch.where(ratio.passes, slope, 0.0) + weighed(weight, terms.direct)
    return _PolicyPart(value, slope, terms.flags if ratio.flags is None else terms.flags | ratio.flags)


def _kl_part(config: LossConfig, batch: TokenBatch, log_prob: Tensor, ratio: _Ratio) -> tuple[Tensor, Tensor]:
    """Return the KL's value, unweighted, and its part of ∂loss/∂ℓ, weighted. Its ratio is π/π_old as it is."""
    ref, weight = batch.inputs.ref, batch.inputs.kl_weight
    if weight is None or ref is None:
        zero = torch.zeros_like(log_prob)
        return zero, zero
    pooled = ratio.pooled
    if config.kl_pooling != config.pooling or ratio.bounded is not ratio.own:
        pooled = _Pooled.of(config.kl_pooling, ratio.own, config.log_ratio_limit, batch)
    kl = kl_terms(config.kl, log_ratio_of(log_prob, ref), pooled.ratio)
    kl = kl._replace(slope=torch.where(ratio.possible, kl.slope, 0.0))
    if not config.kl.ratio_weighted:
        return kl.value, weighed(weight, kl.slope)
    slope = _ratio_weighted_slope(config.kl_pooling, pooled, ratio.possible, kl, weight, batch)
    return times(pooled.ratio, kl.value), slope


def _ratio_weighted_slope(
    level: Level, pooled: _Pooled, passes: Tensor, kl: KLTerms, weight: Tensor, batch: TokenBatch
) -> Tensor:
    """Return that of weight * ratio * k: through k by every token alone, through the ratio as the level spreads it."""
    value, slope, slope_with_ratio = kl
    ratio, inside = pooled.ratio, pooled.inside
    if not level.spreads:
        return weighed(weight, times(ratio, torch.where(inside & passes, slope_with_ratio, slope)))
    weighted = weighed(weight, times(ratio, value))
    through_ratio = level.distribute(torch.where(inside, weighted, 0.0), batch.pool)
    return weighed(weight, times(ratio, slope)) + torch.where(passes, through_ratio, 0.0)


def reduce_records(
    config: LossConfig, batch: TokenBatch, values: TokenValues, records: TokenRecords, backend: str
) -> tuple[Tensor, Metrics]:
    """Return the loss (0-d, the records' dtype) and its metrics: the one place where records are summed."""
    applied = batch.rollout_weight
    if applied is not None:
        weight = times(records.rollout_weight, applied) if batch.schemes else applied
        records = records._replace(rollout_weight=weight)
    estimator, sequences = ESTIMATORS.index(config.kl.estimator) + 1, batch.sequences.count
    loss, vector = ops.token_sums(values, batch.masked_in, batch.inputs, records, estimator, sequences, backend)
    if config.pooling.pools:
        ratios = _sequence_ratios(config, batch, values.log_prob, records)
        first = FIELDS.index("ratio_sum")
        vector = torch.cat([vector[:first], ratios, vector[first + len(ratios) :]])
    return loss, Metrics(vector)


def _sequence_ratios(config: LossConfig, batch: TokenBatch, log_prob: Tensor, records: TokenRecords) -> Tensor:
    """Return metrics.RATIO_SUMS and extremes of the ratio over non-empty sequences. One counts as clipped where one of
    its tokens does."""
    dtype = accumulate_dtype(log_prob.device)
    live = batch.sequences.sum(batch.live.to(dtype)) > 0
    ratio = torch.ones(live.shape, dtype=dtype, device=live.device)
    if batch.inputs.old is not None:
        log_ratio = torch.where(batch.live, log_ratio_of(log_prob, batch.inputs.old), 0.0).to(dtype)
        ratio = config.pooling.pool(log_ratio, batch.per_sequence).exp()
    flags = [(records.flags & bit) != 0 for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]
    clipped = [batch.sequences.sum(flag.to(dtype)) > 0 for flag in flags]
    return reduce_ratios(ratio, live, clipped)
