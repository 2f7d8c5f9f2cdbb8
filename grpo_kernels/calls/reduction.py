"""The [tokens]-sized end of a loss: records to its value, its metrics and the slopes that rows are given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, TokenRecords, TokenValues
from ..objectives.config import LossConfig
from ..objectives.kl import ESTIMATORS
from ..objectives.maths import log_ratio_of, times, weighed
from ..objectives.metrics import FIELDS, Metrics, reduce_ratios
from ..objectives.sequences import accumulate_dtype
from .terms import PooledRatios, fast_token_terms, sums_at_bounds
from .token_batch import TokenBatch


class Settled(NamedTuple):
    """A loss whose log-probs are known."""

    loss: Tensor
    """0-d, detached."""
    metrics: Metrics
    gradients: RowGradients
    grad_divergence: Tensor | None


class Diverged(NamedTuple):
    """What is known of every token's teacher, (B, T)."""

    divergence: Tensor
    teacher_entropy: Tensor


def settle(
    config: LossConfig,
    batch: TokenBatch,
    values: TokenValues,
    numbers: Tensor,
    backend: str,
    diverged: Diverged | None = None,
) -> Settled:
    """Return loss, metrics and the slopes in log-probs, entropies and divergences."""
    records, slope, ratios = fast_token_terms(config, batch, values, numbers, backend)
    loss, metrics = reduce_records(config, batch, values, records, backend, ratios, diverged)
    weight = batch.inputs.entropy_weight
    gradients = RowGradients(slope, None if weight is None else -weight)
    return Settled(loss, metrics, gradients, batch.divergence_weight)


def reduce_records(
    config: LossConfig,
    batch: TokenBatch,
    values: TokenValues,
    records: TokenRecords,
    backend: str,
    ratios: PooledRatios | None = None,
    diverged: Diverged | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the loss (0-d, the records' dtype) and its metrics: the one place where records are summed. Metrics of
    sequences are those of ``ratios``, or made here."""
    applied = batch.rollout_weight
    if applied is not None:
        weight = times(records.rollout_weight, applied) if batch.schemes else applied
        records = records._replace(rollout_weight=weight)
    estimator, sequences = ESTIMATORS.index(config.kl.estimator) + 1, batch.sequences.count
    if not batch.sequences.owner:
        sequences = 0
    loss, vector = ops.token_sums(values, batch.masked_in, batch.inputs, records, estimator, sequences, backend)
    if config.pooling.pools:
        ratios = ratios or _pooled_ratios(config, batch, values.log_prob, records)
        counted = (_count_tokens if config.pooling.running else _count_sequences)(batch, ratios)
        first = FIELDS.index("ratio_sum")
        vector[first : first + len(counted)] = counted
    if diverged is not None:
        sums = _divergence_sums(batch, diverged).to(vector.dtype)
        vector = torch.cat([vector[: -len(sums)], sums])
        loss = (loss + sums[0]).to(loss.dtype)
    return loss, Metrics(vector)


def _divergence_sums(batch: TokenBatch, diverged: Diverged) -> Tensor:
    """Return metrics.DIVERGENCE_SUMS."""
    weight, live = batch.divergence_weight, batch.live
    assert weight is not None
    dtype = accumulate_dtype(live.device)
    divergence, entropy = (torch.where(live, values, 0.0).to(dtype) for values in diverged)
    infinite = divergence == float("inf")
    finite = torch.where(infinite, 0.0, divergence)
    columns = (weighed(weight.to(dtype), divergence), finite, live & ~infinite, infinite, entropy)
    return torch.stack([column.to(dtype).sum() for column in columns])


def _pooled_ratios(config: LossConfig, batch: TokenBatch, log_prob: Tensor, records: TokenRecords) -> PooledRatios:
    old, level = batch.inputs.old, config.pooling
    own = log_ratio_of(log_prob, log_prob if old is None else old).masked_fill_(batch.dead, 0.0)
    at_bounds = sums_at_bounds(records.flags)
    (running,) = batch.begin_up_to([(own, level.pooled)])
    if running is not None:
        return PooledRatios(running().values, [flag for flag, _ in at_bounds])
    wanted = [*at_bounds, *([] if old is None else [(own, level.pooled)])]
    low, high, dual, *log_ratio = (total for total in batch.totals(wanted) if total is not None)
    return PooledRatios(log_ratio[0] if log_ratio else None, [low, high, dual])


def _count_sequences(batch: TokenBatch, ratios: PooledRatios) -> Tensor:
    """Return metrics.RATIO_SUMS and extremes of the ratio over non-empty sequences. One counts as clipped where one of
    its tokens does."""
    lengths = batch.sequences.lengths(batch.live)
    log_ratio = torch.zeros_like(lengths) if ratios.log_ratio is None else ratios.log_ratio
    counted, clipped = lengths > 0, [total > 0 for total in ratios.clipped]
    if not batch.sequences.owner:
        counted, *clipped = (torch.zeros_like(flag) for flag in (counted, *clipped))
    return reduce_ratios(log_ratio.exp(), counted, clipped)


def _count_tokens(batch: TokenBatch, ratios: PooledRatios) -> Tensor:
    """Return metrics.RATIO_SUMS and extremes of the ratio over tokens."""
    assert ratios.log_ratio is not None
    clipped = [flag.flatten() != 0 for flag in ratios.clipped]
    return reduce_ratios(ratios.log_ratio.exp().flatten(), batch.live.flatten(), clipped)
