"""The [tokens]-sized half of the loss: log-probs to records (two-pass route), records to loss and metrics (both).

``token_terms`` is the twin of the function of that name in csrc/common/surrogates.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..backends.contract import TokenRecords, TokenValues
from ..backends.spec import objective_spec
from ..objectives.config import LossConfig
from ..objectives.kl import ESTIMATORS, KLTerms, kl_terms
from ..objectives.levels import Level
from ..objectives.maths import accumulate_dtype, clamp, log_ratio_of, times, weighed, within
from ..objectives.metrics import FIELDS, Metrics, reduce_ratios
from ..objectives.rollout import FOLDED
from ..objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, Point
from .batch import TokenBatch


def pools(config: LossConfig, batch: TokenBatch) -> bool:
    """Whether a token's slope needs the other tokens of its sequence."""
    return config.pooling.pools or config.kl_pooling.pools or any(scheme.pooled for scheme in batch.schemes)


def fast_token_terms(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor, numbers: Tensor, backend: str
) -> tuple[TokenRecords, Tensor]:
    """``token_terms`` by the backend's kernel where it has one for them: on a GPU one launch in place of sixty."""
    by_token = not pools(config, batch)
    spec = objective_spec(config, batch.inputs.kl_weight is not None, batch.schemes) if by_token else None
    if spec is None or not backends.has_token_terms(backend):
        return token_terms(config, batch, log_prob, entropy)
    return ops.token_terms(TokenValues(log_prob, entropy, batch.live), numbers, batch.inputs, spec, backend)


def token_terms(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor | None = None
) -> tuple[TokenRecords, Tensor]:
    """The records of every token and d loss / d log_prob, weights included in the last.

    ``entropy`` is needed with a threshold alone.
    """
    live, inputs, surrogate = batch.live, batch.inputs, config.surrogate
    old = log_prob if inputs.old is None else inputs.old
    own = torch.where(live, log_ratio_of(log_prob, old), 0.0)  # NaN stays NaN
    bounded, free, own_flags = surrogate.clip_log_ratios(own, inputs.advantage)
    in_ratio, in_value, applied = _rollout_factors(config, batch, log_prob)
    if in_ratio is not None:
        bounded = bounded + torch.where(live, in_ratio.log().clamp(*FOLDED), 0.0)
    pooled = _Ratio.of(config.pooling, bounded, config.log_ratio_limit, batch)
    possible = log_prob != float("-inf")  # a token of probability 0 has no direction to give: it saturates

    policy = surrogate.terms(Point(log_prob, pooled.log, pooled.ratio, inputs.advantage, old))
    weight, value = inputs.policy_weight, policy.value
    if in_value is not None:
        weight, value = weighed(weight, in_value), weighed(in_value, value)
    if batch.entropy_threshold is not None:
        assert entropy is not None
        low = entropy < batch.entropy_threshold
        weight, value = torch.where(low, 0.0, weight), torch.where(low, 0.0, value)
    slope = weighed(weight, torch.where(pooled.inside, policy.slope, 0.0))
    slope = config.pooling.distribute(slope, batch.pool)
    passes = possible if free is None else possible & free
    slope = torch.where(passes, slope, 0.0) + weighed(weight, policy.direct)

    if config.kl_pooling != config.pooling or bounded is not own:  # the KL's ratio is π/π_old as it is
        pooled = _Ratio.of(config.kl_pooling, own, config.log_ratio_limit, batch)
    kl_value, kl_slope = _kl_part(config, batch, log_prob, pooled, possible)
    dead = torch.zeros_like(log_prob)
    flags = policy.flags if own_flags is None else policy.flags | own_flags
    records = TokenRecords(
        torch.where(live, value, dead),
        torch.where(live, kl_value, dead),
        torch.where(live, flags, 0),
        log_prob.new_empty(0) if applied is None else torch.where(live, applied, dead),
    )
    return records, torch.where(live, slope + kl_slope, dead)


class _Ratio(NamedTuple):
    """Pooled and saturated, at every token."""

    log: Tensor
    ratio: Tensor
    inside: Tensor
    """bool: where it does not saturate."""

    @classmethod
    def of(cls, level: Level, own: Tensor, limit: float | None, batch: TokenBatch) -> _Ratio:
        raw = level.pool(own, batch.pool)
        log_ratio = clamp(raw, limit)
        return cls(log_ratio, log_ratio.exp(), within(raw, limit))


def _rollout_factors(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those that are part of the ratio, those of the value, and all of them; None where there are none."""
    in_ratio = tuple(s for s in batch.schemes if config.surrogate.folds(s))
    in_value = tuple(s for s in batch.schemes if not config.surrogate.folds(s))
    ratio, value = (
        batch.factors(config, log_prob, schemes) if len(schemes) else None for schemes in (in_ratio, in_value)
    )
    if ratio is None or value is None:
        return ratio, value, value if ratio is None else ratio
    return ratio, value, times(ratio, value)


def _kl_part(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, pooled: _Ratio, possible: Tensor
) -> tuple[Tensor, Tensor]:
    """The KL's value, unweighted, and its part of the slope."""
    ref, weight = batch.inputs.ref, batch.inputs.kl_weight
    if weight is None or ref is None:
        zero = torch.zeros_like(log_prob)
        return zero, zero
    kl = kl_terms(config.kl, log_ratio_of(log_prob, ref), pooled.ratio)
    kl = kl._replace(slope=torch.where(possible, kl.slope, 0.0))
    if not config.kl.ratio_weighted:
        return kl.value, weighed(weight, kl.slope)
    slope = _ratio_weighted_slope(config.kl_pooling, pooled, possible, kl, weight, batch)
    return times(pooled.ratio, kl.value), slope


def _ratio_weighted_slope(
    level: Level, pooled: _Ratio, passes: Tensor, kl: KLTerms, weight: Tensor, batch: TokenBatch
) -> Tensor:
    """Of weight * ratio * k: through k by every token alone, through the ratio as the level spreads it."""
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
    """The loss (0-d, the records' dtype) and its metrics: the one place where records are summed."""
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
    """metrics.RATIO_SUMS and extremes of the ratio over non-empty sequences. One counts as clipped where one of its
    tokens does."""
    dtype = accumulate_dtype(log_prob.device)
    live = batch.sequences.sum(batch.live.to(dtype)) > 0
    ratio = torch.ones(live.shape, dtype=dtype, device=live.device)
    if batch.inputs.old is not None:
        log_ratio = torch.where(batch.live, log_ratio_of(log_prob, batch.inputs.old), 0.0).to(dtype)
        ratio = config.pooling.pool(log_ratio, batch.per_sequence).exp()
    flags = [(records.flags & bit) != 0 for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]
    clipped = [batch.sequences.sum(flag.to(dtype)) > 0 for flag in flags]
    return reduce_ratios(ratio, live, clipped)
