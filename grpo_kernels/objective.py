"""The [tokens]-sized half of the loss: log-probs to records (two-pass route), records to loss and metrics (both).

``token_terms`` is the twin of the function of that name in csrc/common/surrogates.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .config import LossConfig
from .metrics import FIELDS, Metrics
from .ops import accumulate_dtype
from .rows import Sequences
from .spec import objective_spec
from .surrogates import (
    CLIPPED_DUAL,
    CLIPPED_HIGH,
    CLIPPED_LOW,
    ESTIMATORS,
    clamp,
    kl_terms,
    log_ratio_of,
    times,
    within,
)


@dataclass(frozen=True)
class TokenBatch:
    """The token-sized inputs of one loss, all contiguous (B, T). Where ``live`` is not, they hold anything."""

    live: Tensor
    """bool: counts in the loss and is read."""
    masked_in: Tensor
    """bool: counts in the denominators (live or skipped)."""
    sequences: Sequences
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None
    policy_weight: Tensor
    """The aggregation's weight and the token's own; this and the next two are 0 where ``masked_in`` is not."""
    kl_weight: Tensor | None
    entropy_weight: Tensor | None


class Records(NamedTuple):
    """What the loss and its metrics are reduced from, all (B, T), 0 at dead rows."""

    log_prob: Tensor
    entropy: Tensor
    policy: Tensor
    """The surrogate's value, unweighted."""
    kl: Tensor
    """The KL term's value, unweighted, ratio included."""
    flags: Tensor
    """uint8, CLIPPED_* of surrogates.py."""


def fast_token_terms(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, numbers: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``token_terms`` by the backend's kernel where it has one for them: on a GPU one launch in place of sixty."""
    spec = objective_spec(config, batch.kl_weight is not None) if config.level == "token" else None
    if spec is None or not backends.has_token_terms(backend):
        return token_terms(config, batch, log_prob)
    inputs = (batch.advantages, batch.policy_weight, batch.old, batch.ref, batch.kl_weight, list(spec))
    return ops.token_terms(log_prob, batch.live, numbers, *inputs, backend)


def token_terms(config: LossConfig, batch: TokenBatch, log_prob: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy value, KL value, flags and d loss / d log_prob of every token, weights included in the last."""
    live = batch.live
    raw = log_ratio_of(log_prob, log_prob if batch.old is None else batch.old)  # NaN stays NaN
    raw = _pool(config.level, torch.where(live, raw, 0.0), batch)
    possible = log_prob != float("-inf")  # a token of probability 0 has no direction to give: it saturates
    inside = within(raw, config.log_ratio_limit)
    ratio = clamp(raw, config.log_ratio_limit).exp()

    policy = config.surrogate.terms(log_prob, ratio, batch.advantages)
    slope = torch.where(inside, policy.slope, 0.0) if config.surrogate.uses_ratio else policy.slope
    slope = _distribute(config.level, times(batch.policy_weight, slope), batch)
    if config.surrogate.uses_ratio:
        slope = torch.where(possible, slope, 0.0)
    kl_value = torch.zeros_like(log_prob)
    if batch.kl_weight is not None and batch.ref is not None:
        kl = kl_terms(config.kl, log_ratio_of(log_prob, batch.ref))
        kl = kl._replace(slope=torch.where(possible, kl.slope, 0.0))
        kl_value, kl_slope = kl.value, times(batch.kl_weight, kl.slope)
        if config.kl.ratio_weighted:
            kl_value = times(ratio, kl.value)
            kl_slope = _ratio_weighted_slope(config.level, ratio, inside & possible, kl, batch)
        slope = slope + kl_slope
    dead = torch.zeros_like(log_prob)
    return (
        torch.where(live, policy.value, dead),
        torch.where(live, kl_value, dead),
        torch.where(live, policy.flags, 0),
        torch.where(live, slope, dead),
    )


def _ratio_weighted_slope(level: str, ratio: Tensor, inside: Tensor, kl: NamedTuple, batch: TokenBatch) -> Tensor:
    """Of weight * ratio * k: through k by every token alone, through the ratio as the level spreads it."""
    value, slope, slope_with_ratio = kl
    assert batch.kl_weight is not None
    if level in ("token", "sequence_token"):
        return times(batch.kl_weight, times(ratio, torch.where(inside, slope_with_ratio, slope)))
    weighted = times(batch.kl_weight, times(ratio, value))
    through_ratio = _distribute(level, torch.where(inside, weighted, 0.0), batch)
    return times(batch.kl_weight, times(ratio, slope)) + through_ratio


def _pool(level: str, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
    """Log-ratios as the level pools them, at every token."""
    if level == "token":
        return log_ratio
    return batch.sequences.expand(_per_sequence(level != "sequence_product", log_ratio, batch)).expand_as(log_ratio)


def _distribute(level: str, slope: Tensor, batch: TokenBatch) -> Tensor:
    """d loss / d (pooled log-ratio) of every token -> d loss / d log_prob of every token."""
    if level in ("token", "sequence_token"):
        return slope
    slope = torch.where(batch.live, slope, 0.0)
    return batch.sequences.expand(_per_sequence(level == "sequence", slope, batch)).expand_as(slope)


def _per_sequence(mean: bool, values: Tensor, batch: TokenBatch) -> Tensor:
    """Sums (or means over live tokens) of (B, T) values that are 0 at dead rows; 0 for an empty sequence."""
    dtype = accumulate_dtype(values.device)
    total = batch.sequences.sum(values.to(dtype))
    if mean:
        total = total / batch.sequences.sum(batch.live.to(dtype)).clamp(min=1)
    return total.to(values.dtype)


def reduce_records(config: LossConfig, batch: TokenBatch, records: Records, backend: str) -> tuple[Tensor, Metrics]:
    """The loss (0-d, the records' dtype) and its metrics: the one place where records are summed."""
    loss, vector = ops.token_sums(
        *records,
        *(batch.live, batch.masked_in, batch.policy_weight, batch.kl_weight, batch.entropy_weight),
        *(batch.old, batch.ref, batch.rollout),
        *(ESTIMATORS.index(config.kl.estimator) + 1, batch.sequences.count, backend),
    )
    if config.level != "token":
        ratios = _sequence_ratios(config, batch, records)
        vector = torch.cat([vector[: len(FIELDS) - len(ratios)], ratios])
    return loss, Metrics(vector)


def _sequence_ratios(config: LossConfig, batch: TokenBatch, records: Records) -> Tensor:
    """metrics.RATIO_SUMS and EXTREMES over non-empty sequences. One counts as clipped where one of its tokens does."""
    dtype = accumulate_dtype(records.log_prob.device)
    live = batch.sequences.sum(batch.live.to(dtype)) > 0
    ratio = torch.ones(live.shape, dtype=dtype, device=live.device)
    if batch.old is not None:
        log_ratio = torch.where(batch.live, log_ratio_of(records.log_prob, batch.old), 0.0).to(dtype)
        ratio = _per_sequence(config.level != "sequence_product", log_ratio, batch).exp()
    flags = [(records.flags & bit) != 0 for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]
    clipped = [batch.sequences.sum(flag.to(dtype)) > 0 for flag in flags]
    return reduce_ratios(ratio, live, clipped)


def reduce_ratios(ratio: Tensor, counted: Tensor, clipped: list[Tensor]) -> Tensor:
    """metrics.RATIO_SUMS and EXTREMES of flat tensors, in the ratio's dtype."""
    sums = torch.stack([torch.where(counted, ratio, 0.0), counted, *clipped]).to(ratio.dtype).sum(-1)
    bounds = torch.stack([torch.where(counted, ratio, float("inf")), torch.where(counted, -ratio, float("inf"))])
    infinity = torch.full((2, 1), float("inf"), dtype=ratio.dtype, device=ratio.device)
    smallest, largest = torch.cat([bounds, infinity], 1).amin(1)
    return torch.cat([sums, torch.stack([smallest, -largest])])
