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
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..backends import memory, ops
from ..backends.contract import RowGradients, Rows, RowStats, TokenRecords, TokenValues
from ..backends.spec import NUMBERS, LogitArgs, numbers_vector
from ..objectives.checks import ordinary
from ..objectives.config import LossConfig
from ..objectives.metrics import Metrics
from ..objectives.sequences import Sequences
from .autograd import once
from .chunks import LiveRows, cut
from .contents import TeacherRows, check_teacher_shift
from .divergence import TOTAL_VARIATION, Beside, Stats, Whole
from .head import HeadGradients, HeadTensors, Wants, head_kind, operand_dtype, without_autocast
from .reduction import Diverged, reduce_records
from .routes import Plan, Route
from .teacher_rows import SweptTeacher
from .terms import Terms, fast_token_terms
from .token_batch import TokenBatch, pools
from .tokens import RowTokens
from .vocabulary import VocabShard, row_gradient_, row_stats


class Chunk(NamedTuple):
    """Some live rows with their logits; whoever wants gradients leaves the logits' gradient in their place."""

    rows: Rows
    first: int
    last: int
    """Its rows among the live ones are [first, last)."""
    beside: Beside | None
    """The teacher's rows."""


class Slopes(NamedTuple):
    """The loss's slopes in what is known of every row; None: 0."""

    log_prob: Tensor | None
    entropy: Tensor | None
    divergence: Tensor | None = None


@dataclass(frozen=True)
class Sweep:
    """What every walk over the rows of one call needs."""

    live_rows: LiveRows
    token_ids: Tensor
    """(1, n)"""
    temperature: Tensor | None
    """Of each row, (1, n); None: the one among the numbers."""
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
    teacher: SweptTeacher | None = None

    @property
    def announced(self) -> Tensor:
        return self.numbers[NUMBERS.index("grad_scale")]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a walk reads of the size of a vocabulary or of states, beside the head: backward saves it, and ``of``
        makes a sweep of it again."""
        return () if self.teacher is None else self.teacher.tensors

    def of(self, tensors: tuple[Tensor | None, ...]) -> Sweep:
        """Return the same of other tensors."""
        return self if self.teacher is None else dataclasses.replace(self, teacher=self.teacher.of(tensors))

    def of_its_own(self) -> Self:
        """Return the same without views of the caller's tensors, which may be written before backward."""
        if not self.live_rows.everything:
            return self  # what was gathered is a copy
        live_rows = dataclasses.replace(self.live_rows, live=self.live_rows.live.clone())
        return dataclasses.replace(self, live_rows=live_rows, token_ids=self.token_ids.clone())

    def valid(self, value: Tensor) -> Tensor:
        """Return NaN, and so its gradient, where rows were cut off; else the value."""
        too_many = self.live_rows.cut
        return value if too_many is None else value * torch.where(too_many, torch.nan, 1.0).to(value.dtype)

    def log_probs(self, head: HeadTensors) -> Stats:
        """Return what is known of the live rows, (1, n): ``RowStats``, or what a teacher's form has."""
        count = len(RowStats._fields) if self.teacher is None else self.teacher.fields
        stats = tuple(torch.zeros_like(self.token_ids, dtype=self.numbers.dtype) for _ in range(count))
        with without_autocast(head.hidden.device.type):
            for chunk in Walk(self, Wants(), head).chunks():
                for total, output in zip(stats, self.stats(chunk), strict=True):
                    total[:, chunk.first : chunk.last] = output
        return stats

    def gradients(self, wants: Wants, head: HeadTensors, stats: Stats, slopes: Slopes) -> HeadGradients:
        """Return those of (B, T) slopes in log-probs, entropies and divergences, with ``log_probs``'s ``stats``; the
        logits are computed again."""
        at_rows = Slopes(*(None if slope is None else self.live_rows.take(slope) for slope in slopes))
        with without_autocast(head.hidden.device.type):
            walk = Walk(self, wants, head)
            for chunk in walk.chunks():
                first, last = chunk.first, chunk.last
                self.gradient_(chunk, tuple(value[:, first:last] for value in stats), cut(at_rows, first, last))
            return walk.gradients()

    def stats(self, chunk: Chunk) -> Stats:
        """Return the statistics of a chunk's rows."""
        if chunk.beside is None:
            return row_stats(chunk.rows, self.shard, self.backend)
        return chunk.beside.stats(chunk.rows, self.backend)

    def gradient_(self, chunk: Chunk, stats: Stats, slopes: Slopes) -> None:
        """Write the gradient over a chunk's logits."""
        gradients = RowGradients(slopes.log_prob, slopes.entropy)
        if chunk.beside is None:
            row_gradient_(chunk.rows, RowStats(*stats), gradients, self.shard, self.backend)
            return
        grad_divergence = torch.zeros_like(stats[0]) if slopes.divergence is None else slopes.divergence
        chunk.beside.gradient(chunk.rows, stats, gradients, grad_divergence, self.backend, inplace=True)

    def known(self, stats: Stats) -> Stats:
        """Return log-probs and entropies; with a teacher also divergences and the teacher's entropies."""
        return stats[:2] if self.teacher is None else self.teacher.known(stats)


class Walk:
    """One walk: chunk by chunk, logits come of hidden states and leave as gradients of those that are wanted."""

    def __init__(self, sweep: Sweep, wants: Wants, head: HeadTensors) -> None:
        self._sweep, self._wants, self._states = sweep, wants, head.states
        device = head.hidden.device
        kind = head_kind(device.type, sweep.operands, sweep.dtype)
        self._head = kind(head, sweep.operands, sweep.dtype, len(sweep.live_rows.chunks), wants, sweep.wide)
        self._teacher = None if sweep.teacher is None else sweep.teacher.walk(sweep.live_rows)
        self._logits = memory.new((sweep.live_rows.longest, sweep.columns), sweep.dtype, device, memory.Kind.LOGITS)
        self._gradients: list[Tensor | None] = [None] * len(head.states)

    def chunks(self) -> Iterator[Chunk]:
        """Give each chunk with its logits; when the next one is asked for, they are taken as their gradient."""
        sweep, live_rows = self._sweep, self._sweep.live_rows
        for first, last in live_rows.chunks:
            states = [live_rows.gather(whole, first, last).to(sweep.operands) for whole in self._states]
            logits = self._logits[: last - first]
            self._head.logits(states, logits)
            ids, live = sweep.token_ids[:, first:last], live_rows.live[:, first:last]
            beside = None if self._teacher is None else self._teacher(first, last, ids, live)
            own = None if sweep.temperature is None else sweep.temperature[:, first:last]
            yield Chunk(Rows(logits, ids, live, sweep.numbers, sweep.softcap, own), first, last, beside)
            if any(self._wants):
                parts = self._head.backward(logits, states, sweep.states_sum)
                for place, part in enumerate(parts):
                    if part is not None:
                        self._keep(place, part, first, last)

    def gradients(self) -> HeadGradients:
        """Return what has been gathered."""
        each = zip(self._gradients, self._states, self._wants.states, strict=False)
        hidden, *adapter_states = (self._of_states(rows, whole) if wanted else None for rows, whole, wanted in each)
        (weight, *adapter_weight), bias = self._head.gradients()
        return HeadGradients(hidden, weight, bias, *adapter_states, *adapter_weight)

    def _keep(self, place: int, part: Tensor, first: int, last: int) -> None:
        """Keep the gradient of a chunk's states."""
        states, live_rows = self._states[place], self._sweep.live_rows
        if last - first == live_rows.count and live_rows.holds(states):
            self._gradients[place] = part.to(self._dtype(states)).view(states.shape)
            return
        rows = self._gradients[place]
        if rows is None:
            rows = self._gradients[place] = self._room(states)
        live_rows.put(part, rows, states, first, last)

    def _of_states(self, rows: Tensor | None, states: Tensor) -> Tensor:
        """Return the gradient of ``states``, from that of its rows, if there were any."""
        rows = self._room(states) if rows is None else rows
        return rows if rows.shape == states.shape else rows[:-1].view(states.shape)

    def _room(self, states: Tensor) -> Tensor:
        """Return zeros for the gradient of ``states``, and a spare row."""
        return states.new_zeros(states.shape[:-1].numel() + 1, states.shape[-1], dtype=self._dtype(states))

    def _dtype(self, states: Tensor) -> torch.dtype:
        return torch.float32 if self._sweep.wide else states.dtype


def sweep_of(
    tokens: RowTokens,
    numbers: Tensor,
    logit_args: LogitArgs,
    route: Route,
    head: HeadTensors,
    live_tokens: int | None,
    rows: int,
    sum_of_states: Callable[[Tensor], Callable[[], Tensor]] | None,
    sequences: Sequences | None = None,
    wide: bool = False,
    teacher: SweptTeacher | None = None,
) -> Sweep:
    """Return the sweep of a call: ``live_tokens`` as a user says, chunks of ``rows``, of whole ``sequences`` where they
    are given."""
    live_rows = LiveRows.of(tokens, rows, live_tokens, sequences)
    return Sweep(
        live_rows=live_rows,
        token_ids=live_rows.take(tokens.token_ids),
        temperature=live_rows.take(tokens.temperature),
        numbers=numbers,
        softcap=logit_args.logit_softcap is not None,
        operands=operand_dtype(head.hidden),
        dtype=tokens.dtype,
        columns=tokens.columns,
        shard=tokens.shard,
        states_sum=sum_of_states,
        backend=route.backend,
        wide=wide,
        teacher=teacher,
    )


def check_swept_teacher(
    tokens: RowTokens, head: HeadTensors, logit_args: LogitArgs, route: Route, rows: int, teacher: SweptTeacher
) -> None:
    """As ``check_teacher_rows``, of hidden states: both models' logits are computed three times more."""
    if not (tokens.checks and tokens.looks) or tokens.live.shape[1] < 3:
        return
    inner, where = tokens.inner(), tokens.states.device
    adapter = head.adapter_states
    adapter = None if adapter is None else adapter[..., 1 : 1 + inner.live.shape[1], :]
    own = head._replace(hidden=inner.states, adapter_states=adapter)
    numbers = numbers_vector(logit_args, 1.0, None, tokens.real, where, divergence=TOTAL_VARIATION)

    def rows_beside(first: int, ids: Tensor) -> TeacherRows:
        part = dataclasses.replace(inner, token_ids=ids)
        other = teacher.from_row(first, part, TOTAL_VARIATION)
        sweep = sweep_of(part, numbers, logit_args, route, own, None, rows, None, teacher=other)
        with torch.no_grad():
            log_prob, _, apart, _ = (sweep.live_rows.scatter(values) for values in sweep.known(sweep.log_probs(own)))
        return TeacherRows(apart, log_prob)

    check_teacher_shift(tokens, inner, rows_beside)


class LinearLogProbs(torch.autograd.Function):
    """Log-probs and entropies from hidden states, with a teacher also divergences and its entropies; the sweep
    computes both ways, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, *head: Tensor | None) -> tuple[Tensor, ...]:
        stats = sweep.log_probs(HeadTensors(*head))  # type: ignore[arg-type]
        read = sweep.tensors
        if any(ctx.needs_input_grad):
            head_and_read = (None if tensor is None else ordinary(tensor)[0] for tensor in (*head, *read))
            ctx.save_for_backward(*head_and_read, *stats)
        ctx.set_materialize_grads(False)
        # Without its tensors: what is saved is given back after backward, though somebody keeps an output.
        ctx.sweep, ctx.read = sweep.of((None,) * len(read)).of_its_own(), len(read)
        known = sweep.known(stats)
        if sweep.live_rows.everything:
            known = tuple(value.clone() for value in known)  # these are the caller's, and saved ones are not
        outputs = tuple(map(sweep.live_rows.scatter, known))
        ctx.mark_non_differentiable(*outputs[3:])
        return outputs

    @staticmethod
    @once
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes = upstream[:3]
        if not any(slope is not None for slope in slopes) and ctx.sweep.states_sum is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, count = ctx.saved_tensors, len(HeadTensors._fields)
        wants, head = Wants(*ctx.needs_input_grad[1:]), HeadTensors(*saved[:count])
        sweep, stats = ctx.sweep.of(saved[count : count + ctx.read]), saved[count + ctx.read :]
        return None, *sweep.gradients(wants, head, stats, Slopes(*slopes))


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
        if any(wants) and (self._of_rows or self.sweep.live_rows.bounds is not None):
            values, diverged, records, gradients = self._one_sweep(wants, head)
        else:
            stats = self.sweep.log_probs(head)
            values, diverged, (records, slope, ratios) = self._terms(stats)
            if any(wants):
                gradients = self.sweep.gradients(wants, head, stats, self._announced(slope, self.batch))
        loss, metrics = reduce_records(self.config, self.batch, values, records, self.sweep.backend, ratios, diverged)
        return Swept(loss, metrics, values, gradients)

    @property
    def _of_rows(self) -> bool:
        """Whether every row's slope follows from the row."""
        return self.plan.spec is not None or not pools(self.config, self.batch)

    def _one_sweep(
        self, wants: Wants, head: HeadTensors
    ) -> tuple[TokenValues, Diverged | None, TokenRecords, HeadGradients]:
        """Compute loss and gradients chunk by chunk: every row's slope follows from the rows of its chunk."""
        sweep = self.sweep
        live_batch = sweep.live_rows.batch(self.batch)
        of_chunks: list[tuple[tuple[Tensor, ...], TokenRecords]] = []
        with without_autocast(head.hidden.device.type):
            walk = Walk(sweep, wants, head)
            for chunk in walk.chunks():
                part = sweep.live_rows.narrow(live_batch, chunk.first, chunk.last)
                of_chunks.append(self._fused(chunk, part) if self.plan.fused else self._two_passes(chunk, part))
            gradients = walk.gradients()
        known, records = of_chunks[0] if len(of_chunks) == 1 else self._joined(of_chunks)
        scatter = sweep.live_rows.scatter
        everywhere = TokenRecords(*(scatter(total) if total.dim() > 1 else total for total in records))
        log_prob, entropy, *diverged = map(scatter, known)
        values_of_all = TokenValues(log_prob, entropy, self.batch.live)
        return values_of_all, Diverged(*diverged) if diverged else None, everywhere, gradients

    def _joined(
        self, of_chunks: list[tuple[tuple[Tensor, ...], TokenRecords]]
    ) -> tuple[tuple[Tensor, ...], TokenRecords]:
        """Return what is known of all rows, (1, n), from chunk to chunk."""
        if of_chunks:
            known, records = (zip(*parts, strict=True) for parts in zip(*of_chunks, strict=True))
            joined = [torch.cat(parts, -1) for parts in known]
            return tuple(joined), TokenRecords(*(torch.cat(parts, -1) for parts in records))
        nothing = torch.zeros_like(self.sweep.token_ids, dtype=self.sweep.numbers.dtype)
        count = 2 if self.sweep.teacher is None else 4
        flags, none = torch.zeros_like(nothing, dtype=torch.uint8), nothing.new_empty(0)
        weight = nothing if self.batch.schemes else none
        to_sampler = none if self.batch.inputs.rollout_kl_weight is None else nothing
        return (nothing,) * count, TokenRecords(nothing, nothing, flags, weight, to_sampler)

    def _fused(self, chunk: Chunk, part: TokenBatch) -> tuple[tuple[Tensor, ...], TokenRecords]:
        """Return log-probs and entropies, with a teacher also divergences and its entropies, and records."""
        spec, backend = self.plan.spec, self.sweep.backend
        assert spec is not None
        if chunk.beside is None:
            log_prob, entropy, records = ops.fused_loss_(chunk.rows, part.inputs, spec, backend)
            return (log_prob, entropy), records
        assert part.divergence_weight is not None
        assert isinstance(chunk.beside, Whole)
        arguments = (chunk.beside.teacher, chunk.beside.kind, part.inputs, part.divergence_weight, spec, backend)
        *stats, records = ops.fused_divergence_(chunk.rows, *arguments)
        return self.sweep.known(tuple(value for part in stats for value in part)), records

    def _two_passes(self, chunk: Chunk, part: TokenBatch) -> tuple[tuple[Tensor, ...], TokenRecords]:
        stats = self.sweep.stats(chunk)
        # On-policy, what pools can be the token's own.
        config = dataclasses.replace(self.config, level="token") if self._of_rows else self.config
        values = TokenValues(stats[0], stats[1], part.live)
        numbers, backend = chunk.rows.numbers, self.sweep.backend
        records, slope, _ = fast_token_terms(config, part, values, numbers, backend, report=False)
        self.sweep.gradient_(chunk, stats, self._announced(slope, part))
        return self.sweep.known(stats), records

    def _terms(self, stats: Stats) -> tuple[TokenValues, Diverged | None, Terms]:
        """Return values and terms, (B, T), of statistics (1, n)."""
        sweep = self.sweep
        log_prob, entropy, *diverged = map(sweep.live_rows.scatter, sweep.known(stats))
        values = TokenValues(log_prob, entropy, self.batch.live)
        terms = fast_token_terms(self.config, self.batch, values, sweep.numbers, sweep.backend)
        return values, Diverged(*diverged) if diverged else None, terms

    def _announced(self, slope: Tensor, batch: TokenBatch) -> Slopes:
        scale, weight, of_divergence = self.sweep.announced, batch.inputs.entropy_weight, batch.divergence_weight
        bonus = None if weight is None else -weight * scale
        return Slopes(slope * scale, bonus, None if of_divergence is None else of_divergence * scale)
