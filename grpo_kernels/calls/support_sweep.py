"""A support from hidden states: sweeps whose log-probs are those over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, Rows, RowStats
from ..backends.sets import Sets, gather, outside, scatter_, set_gradient
from ..backends.spec import LogitArgs
from .chunks import LiveRows
from .divergence import Stats
from .head import HeadTensors
from .recorded import Recorded, read_sets
from .recorded_head import CPU_IDS, Gathered, GatheredSweep, gathers
from .support import Support, Supported, how_read
from .sweep import Chunk, Slopes, Sweep
from .tokens import RowTokens


def how_swept(tokens: RowTokens, support: Support) -> str:
    """Return how rows of hidden states are worked on with ``support=``, in words."""
    if not isinstance(support, Recorded):
        return how_read(support)
    ids, count = support.ids.shape[0], tokens.token_ids.numel()
    if gathers(tokens.states.device.type, ids, count, tokens.vocab):
        return "support=Recorded(...) gathers its ids' rows of the head; rows without a set take two passes"
    return f"support=Recorded(...) has {ids} ids in {count} rows, too many to gather: whole rows take two passes"


def supported_sweep(
    sweep: Sweep,
    tokens: RowTokens,
    support: Support,
    head: HeadTensors,
    logit_args: LogitArgs,
    chunk_bytes: int,
    rows_of_chunk: int,
) -> tuple[Sweep, Tensor | None]:
    """Return a sweep over the same live rows whose log-probs are those over a support, and how many live tokens are
    outside of their recorded set, 0-d.

    Raises:
        ValueError, TypeError, IndexError: as ``token_log_probs`` with ``support=``.
    """
    given = {field.name: getattr(sweep, field.name) for field in dataclasses.fields(Sweep)}
    if not isinstance(support, Recorded):
        supported = Supported.of(tokens, support, logit_args)
        lowest = supported.lowest.new_full((sweep.live_rows.count, 1), float("-inf"))
        supported = dataclasses.replace(supported, rows=_without_states(supported.rows), lowest=lowest)
        return FilteredSweep(**given, supported=supported), None
    sets = read_sets(tokens, support)
    missing, filled = outside(tokens.token_ids, tokens.live, sets).sum(), sets.filled.view_as(tokens.live)
    if not gathers(tokens.states.device.type, len(sets.ids), filled.numel(), tokens.vocab):
        return SweepOfSets(**given, sets=_sets_of_chunks(sweep.live_rows, tokens, sets)), missing
    rows = _without_states(tokens.rows(sweep.numbers, sweep.softcap))
    others = dataclasses.replace(tokens, live=tokens.live & ~filled)
    live_rows, unrecorded = LiveRows.of(others, rows_of_chunk, None), None
    if live_rows.count > 0:
        ids, temperature = live_rows.take(tokens.token_ids), live_rows.take(tokens.temperature)
        wide = sweep.operands != torch.float64
        unrecorded = dataclasses.replace(sweep, live_rows=live_rows, token_ids=ids, temperature=temperature, wide=wide)
    # A row of the head and one of states, in their dtype, as fp32 (fp64) and their product.
    bytes_of_id = head.width * (2 * sweep.operands.itemsize + 3 * sweep.numbers.itemsize)
    at_once = max(1, chunk_bytes // bytes_of_id)
    at_once = min(at_once, CPU_IDS) if tokens.states.device.type == "cpu" else at_once
    gathered = Gathered(rows, sets, at_once, unrecorded)
    return GatheredSweep(**given, gathered=gathered), missing


def _without_states(rows: Rows) -> Rows:
    """Return rows of no logits: those of a chunk are put in, and what lives as long as an output holds no states."""
    return rows._replace(logits=rows.logits.new_empty(0))


def _sets_of_chunks(live_rows: LiveRows, tokens: RowTokens, sets: Sets) -> dict[int, Sets]:
    """Return the sets of each chunk's rows, by the first. Waits for the device, to know where they begin."""
    counts = torch.where(live_rows.live[0], sets.offsets.diff()[live_rows.index], 0)
    ids = sets.ids[tokens.live.view(-1)[sets.row]]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    starts = [first for first, _ in live_rows.chunks]
    bounds = [*offsets[starts].tolist(), len(ids)]
    each = zip(live_rows.chunks, bounds, bounds[1:], strict=False)
    return {first: Sets(ids[begin:end], offsets[first : last + 1] - begin) for (first, last), begin, end in each}


@dataclass(frozen=True)
class FilteredSweep(Sweep):
    """A sweep over whole rows, of which filters or a mask take some columns."""

    supported: Supported | None = None
    """Of the whole call; what the filters keep is of live rows."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        assert self.supported is not None
        return (self.supported.mask,)

    def of(self, tensors: tuple[Tensor | None, ...]) -> FilteredSweep:
        assert self.supported is not None
        return dataclasses.replace(self, supported=dataclasses.replace(self.supported, mask=tensors[0]))

    def stats(self, chunk: Chunk) -> Stats:
        return self._of(chunk).log_probs(self.backend)

    def gradient_(self, chunk: Chunk, stats: Stats, slopes: Slopes) -> None:
        gradients = RowGradients(slopes.log_prob, slopes.entropy)
        chunk.rows.logits.copy_(self._of(chunk).gradient(self.backend, RowStats(*stats), gradients))

    def _of(self, chunk: Chunk) -> Supported:
        assert self.supported is not None
        first, last, mask = chunk.first, chunk.last, self.supported.mask
        mask = None if mask is None else mask[self.live_rows.index[first:last]]
        return dataclasses.replace(self.supported, rows=chunk.rows, mask=mask, lowest=self.supported.lowest[first:last])


@dataclass(frozen=True)
class SweepOfSets(Sweep):
    """A sweep over whole rows, of which recorded sets are taken."""

    sets: Mapping[int, Sets] = dataclasses.field(default_factory=dict)
    """Of each chunk, by its first row."""

    def stats(self, chunk: Chunk) -> Stats:
        return ops.set_log_probs(chunk.rows, self.sets[chunk.first], self.backend)

    def gradient_(self, chunk: Chunk, stats: Stats, slopes: Slopes) -> None:
        rows, sets, known = chunk.rows, self.sets[chunk.first], RowStats(*stats)
        gradients = RowGradients(slopes.log_prob, slopes.entropy)
        at = gather(rows, sets)
        values = set_gradient(rows, sets, at, known, gradients)
        whole = rows._replace(live=rows.live & ~sets.filled)
        ops.log_probs_backward_(whole, known, gradients, self.backend)
        scatter_(rows.logits, rows, at, values)
