"""From hidden states: a walk over chunks of rows, whose logits exist one chunk at a time.

Where a row's slope is known from that row alone, a chunk's logits become their gradient in place and leave as the
gradients of hidden states and weight, all in the forward call: 6·N·H·V FLOPs, nothing is computed twice. Pooled ratios
need the log-probs of a whole sequence first: chunks of whole sequences keep their logits meanwhile; only where the
longest does not fit one, all are computed again (8·N·H·V).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, Rows, RowStats, TokenRecords, TokenValues
from ..backends.spec import NUMBERS
from ..objectives.config import LossConfig
from ..objectives.metrics import Metrics
from .chunks import LiveRows, cut
from .head import HeadGradients, HeadTensors, Wants, head_kind
from .routes import Plan
from .terms import Terms, TokenBatch, fast_token_terms, pools, reduce_records
from .vocabulary import VocabShard, row_gradient_, row_stats


class Chunk(NamedTuple):
    """Some live rows with their logits; whoever wants gradients leaves the logits' gradient in their place."""

    rows: Rows
    first: int
    last: int
    """Its rows among the live ones are [first, last)."""


@dataclass(frozen=True)
class Sweep:
    """What every walk over the rows of one call needs."""

    live_rows: LiveRows
    token_ids: Tensor
    """(1, n)"""
    numbers: Tensor
    softcap: bool
    operands: torch.dtype
    """Of the GEMMs."""
    dtype: torch.dtype
    """Of the logits."""
    columns: int
    """Of the logits that are computed here."""
    shard: VocabShard | None
    """Which of the vocabulary's they are, where other ranks have others."""
    states_sum: Callable[[Tensor], Callable[[], Tensor]] | None
    """Begins to add gradients of states over ranks; None: they are whole here, or the caller's to add."""
    backend: str
    wide: bool
    """Gradients stay in fp32 until they are scaled, not yet in the dtypes of what they belong to."""

    @property
    def announced(self) -> Tensor:
        return self.numbers[NUMBERS.index("grad_scale")]

    def valid(self, value: Tensor) -> Tensor:
        """Return NaN, and so its gradient, where rows were cut off; else the value."""
        too_many = self.live_rows.cut
        return value if too_many is None else value * torch.where(too_many, torch.nan, 1.0).to(value.dtype)

    def log_probs(self, head: HeadTensors) -> RowStats:
        """Return the statistics of the live rows, (1, n)."""
        stats = RowStats(*(torch.zeros_like(self.token_ids, dtype=self.numbers.dtype) for _ in RowStats._fields))
        with torch.autocast(head.hidden.device.type, enabled=False):
            for chunk in Walk(self, Wants(), head).chunks():
                outputs = row_stats(chunk.rows, self.shard, self.backend)
                for total, output in zip(stats, outputs, strict=True):
                    total[:, chunk.first : chunk.last] = output
        return stats

    def gradients(self, wants: Wants, head: HeadTensors, stats: RowStats, gradients: RowGradients) -> HeadGradients:
        """Return those of (B, T) slopes in log-probs and entropies, with ``log_probs``'s ``stats``; the logits are
        computed again."""
        slopes = RowGradients(*(None if slope is None else self.live_rows.take(slope) for slope in gradients))
        with torch.autocast(head.hidden.device.type, enabled=False):
            walk = Walk(self, wants, head)
            for rows, first, last in walk.chunks():
                row_gradient_(rows, cut(stats, first, last), cut(slopes, first, last), self.shard, self.backend)
            return walk.gradients()


class Walk:
    """One walk: chunk by chunk, logits come of hidden states and leave as gradients of those that are wanted."""

    def __init__(self, sweep: Sweep, wants: Wants, head: HeadTensors) -> None:
        self._sweep, self._wants, self._states = sweep, wants, head.states
        device = head.hidden.device
        kind = head_kind(device.type, sweep.operands, sweep.dtype)
        self._head = kind(head, sweep.operands, sweep.dtype, len(sweep.live_rows.chunks), wants, sweep.wide)
        self._logits = torch.empty(sweep.live_rows.longest, sweep.columns, dtype=sweep.dtype, device=device)
        wanted = zip(head.states, wants.states, strict=False)
        self._gradients = [self._room(states) if wants_states else None for states, wants_states in wanted]

    def chunks(self) -> Iterator[Chunk]:
        """Give each chunk with its logits; when the next one is asked for, they are taken as their gradient."""
        sweep, live_rows = self._sweep, self._sweep.live_rows
        for first, last in live_rows.chunks:
            states = [live_rows.gather(whole, first, last).to(sweep.operands) for whole in self._states]
            logits = self._logits[: last - first]
            self._head.logits(states, logits)
            ids, live = sweep.token_ids[:, first:last], live_rows.live[:, first:last]
            yield Chunk(Rows(logits, ids, live, sweep.numbers, sweep.softcap), first, last)
            if any(self._wants):
                parts = self._head.backward(logits, states, sweep.states_sum)
                for part, out, whole in zip(parts, self._gradients, self._states, strict=True):
                    if part is not None and out is not None:
                        live_rows.put(part, out, whole, first, last)

    def gradients(self) -> HeadGradients:
        """Return what has been gathered."""
        both = zip(self._gradients, self._states, strict=True)
        hidden, *adapter_states = (None if rows is None else rows[:-1].view(whole.shape) for rows, whole in both)
        (weight, *adapter_weight), bias = self._head.gradients()
        return HeadGradients(hidden, weight, bias, *adapter_states, *adapter_weight)

    def _room(self, states: Tensor) -> Tensor:
        """Return zeros for the gradient of ``states``, and a spare row."""
        dtype = torch.float32 if self._sweep.wide else states.dtype
        return states.new_zeros(states.shape[:-1].numel() + 1, states.shape[-1], dtype=dtype)


class Swept(NamedTuple):
    """What the walks of a loss came to."""

    loss: Tensor
    metrics: Metrics
    values: TokenValues
    """(B, T)"""
    gradients: HeadGradients
    """Times the announced scale."""


@dataclass(frozen=True)
class LinearLoss:
    """The loss of hidden states, by the route that was planned."""

    config: LossConfig
    batch: TokenBatch
    sweep: Sweep
    plan: Plan

    def compute(self, wants: Wants, head: HeadTensors) -> Swept:
        gradients, ratios = HeadGradients(), None
        if not any(wants):
            values, (records, _, ratios) = self._terms(self.sweep.log_probs(head))
        elif self._of_rows or self.sweep.live_rows.bounds is not None:
            values, records, gradients = self._one_sweep(wants, head)
        else:
            stats = self.sweep.log_probs(head)
            values, (records, slope, ratios) = self._terms(stats)
            gradients = self.sweep.gradients(wants, head, stats, self._announced(slope, self.batch))
        loss, metrics = reduce_records(self.config, self.batch, values, records, self.sweep.backend, ratios)
        return Swept(loss, metrics, values, gradients)

    @property
    def _of_rows(self) -> bool:
        """Whether every row's slope follows from the row."""
        return self.plan.spec is not None or not pools(self.config, self.batch)

    def _one_sweep(self, wants: Wants, head: HeadTensors) -> tuple[TokenValues, TokenRecords, HeadGradients]:
        """Compute loss and gradients chunk by chunk: every row's slope follows from the rows of its chunk."""
        sweep = self.sweep
        live_batch = sweep.live_rows.batch(self.batch)
        real = torch.zeros_like(sweep.token_ids, dtype=sweep.numbers.dtype)
        flags = torch.zeros_like(real, dtype=torch.uint8)
        weight = torch.zeros_like(real) if self.batch.schemes else real.new_empty(0)
        log_prob, entropy = torch.zeros_like(real), torch.zeros_like(real)
        records = TokenRecords(torch.zeros_like(real), torch.zeros_like(real), flags, weight)
        with torch.autocast(head.hidden.device.type, enabled=False):
            walk = Walk(sweep, wants, head)
            for rows, first, last in walk.chunks():
                part = sweep.live_rows.narrow(live_batch, first, last)
                values, chunk_records = self._fused(rows, part) if self.plan.fused else self._two_passes(rows, part)
                for total, chunk in zip((log_prob, entropy, *records), (*values, *chunk_records), strict=True):
                    if total.dim() > 1:
                        total[:, first:last] = chunk
            gradients = walk.gradients()
        scatter = sweep.live_rows.scatter
        everywhere = TokenRecords(*(scatter(total) if total.dim() > 1 else total for total in records))
        return TokenValues(scatter(log_prob), scatter(entropy), self.batch.live), everywhere, gradients

    def _fused(self, rows: Rows, part: TokenBatch) -> tuple[tuple[Tensor, Tensor], TokenRecords]:
        assert self.plan.spec is not None
        log_prob, entropy, records = ops.fused_loss_(rows, part.inputs, self.plan.spec, self.sweep.backend)
        return (log_prob, entropy), records

    def _two_passes(self, rows: Rows, part: TokenBatch) -> tuple[tuple[Tensor, Tensor], TokenRecords]:
        backend = self.sweep.backend
        stats = row_stats(rows, self.sweep.shard, backend)
        # On-policy, what pools can be the token's own.
        config = dataclasses.replace(self.config, level="token") if self._of_rows else self.config
        values = TokenValues(stats.log_prob, stats.entropy, part.live)
        records, slope, _ = fast_token_terms(config, part, values, rows.numbers, backend, report=False)
        row_gradient_(rows, stats, self._announced(slope, part), self.sweep.shard, backend)
        return stats[:2], records

    def _terms(self, stats: RowStats) -> tuple[TokenValues, Terms]:
        """Return values and terms, (B, T), of statistics (1, n)."""
        sweep = self.sweep
        log_prob, entropy = (sweep.live_rows.scatter(values) for values in stats[:2])
        values = TokenValues(log_prob, entropy, self.batch.live)
        return values, fast_token_terms(self.config, self.batch, values, sweep.numbers, sweep.backend)

    def _announced(self, slope: Tensor, batch: TokenBatch) -> RowGradients:
        scale, weight = self.sweep.announced, batch.inputs.entropy_weight
        return RowGradients(slope * scale, None if weight is None else -weight * scale)
