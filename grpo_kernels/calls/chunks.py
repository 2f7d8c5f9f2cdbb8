"""Which rows of hidden states are worked on, and how many at a time.

Masked rows cost nothing: live ones are gathered, chunk by chunk, and results scattered back. The most rows of a chunk
follow from shapes, dtypes and ``chunk_bytes`` alone, never from free memory, so that results reproduce.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from ..backends.contract import TokenInputs
from ..objectives.checks import check_scalar, fail, may_look
from ..objectives.compiler import computed_once
from ..objectives.sequences import Packed, Padded, Sequences, accumulate_dtype, has_every_operator
from .head import HeadTensors, head_kind, operand_dtype
from .token_batch import TokenBatch
from .tokens import RowTokens

CHUNK_BYTES = 1 << 30
_GPU_MULTIPLE = 128
"""Rows of a GEMM on a GPU are padded to this with dead ones."""


_Tuple = TypeVar("_Tuple", bound=NamedTuple)


def cut(values: _Tuple, first: int, last: int) -> _Tuple:
    """Return the tokens [first, last) of a named tuple of (1, n) tensors, or of what is None."""
    parts = (None if value is None else value[:, first:last] for value in values)
    return values._make(parts)


def chunk_rows(tokens: RowTokens, head: HeadTensors, chunk_bytes: int, beside: int = 0) -> int:
    """Return how many rows' logits, states of the head's width and their gradients fit ``chunk_bytes``, and ``beside``
    bytes a row of a teacher's."""
    check_scalar(tokens.function, "chunk_bytes", chunk_bytes)
    chunk_bytes, operands = int(chunk_bytes), operand_dtype(head.hidden)
    kind = head_kind(tokens.states.device.type, operands, tokens.dtype)
    # Not this rank's own columns: all ranks have to cut rows alike.
    columns = tokens.columns if tokens.shard is None else tokens.shard.even
    fixed, per_row = kind.bytes(head.width, columns, operands, tokens.dtype)
    per_row += beside
    rows = (chunk_bytes - fixed) // per_row
    if rows < 1:
        got = f"chunk_bytes={chunk_bytes}"
        fail(tokens.function, f"chunk_bytes >= {fixed + per_row}, the room of one row", got, tokens.tensors)
    return rows // _GPU_MULTIPLE * _GPU_MULTIPLE if rows >= _GPU_MULTIPLE else rows


def pads(device: str) -> bool:
    """Whether chunks are padded on this kind of device."""
    return device == "cuda"


@dataclass(frozen=True)
class LiveRows:
    """The live tokens of a call in order, then padding: (1, n) tensors, and the way back."""

    shape: tuple[int, int]
    """(B, T) of the token tensors."""
    places: Tensor | None
    """(n,) of each in the flattened (B, T), 0 for padding; None where every token is live and nothing is padded."""
    live: Tensor
    """(1, n) bool, False for padding."""
    cut: Tensor | None
    """0-d bool: there were more than ``live_tokens``; None where they were counted."""
    chunks: tuple[tuple[int, int], ...]
    """First and last + 1 row of each."""
    bounds: Tensor | None
    """(S+1,) of the sequences among the rows, where no chunk cuts one; None where one does, or nobody asked."""

    @classmethod
    def of(cls, tokens: RowTokens, chunk: int, live_tokens: int | None, sequences: Sequences | None = None) -> LiveRows:
        """Cut rows into chunks of ``chunk``, or of as many whole ``sequences`` as fit, if the longest does. Waits
        for the device once, to count, unless told ``live_tokens``."""
        flat = tokens.live.reshape(-1)
        lengths = None if sequences is None else sequences.sum(tokens.live, accumulate_dtype(flat.device))
        counts, cut = _count(tokens, lengths, live_tokens)
        count = padded = sum(counts)
        if pads(flat.device.type):
            padded = -(-count // _GPU_MULTIPLE) * _GPU_MULTIPLE
        places, live = None, flat
        if cut is not None or not count == padded == flat.numel():
            places = _live_positions(flat, padded)
            if padded > count:  # live_tokens may be fewer than there are
                places[count:] = -1
            places, live = places.clamp(min=0), places >= 0
        bounds, chunks = None, [(first, min(first + chunk, padded)) for first in range(0, padded, chunk)]
        room = chunk - (padded - count)
        if lengths is not None and max(counts, default=0) <= room:
            ends = lengths.to(torch.int64).cumsum(0)  # in integers: CUDA has no deterministic running sum of floats
            bounds = torch.cat([ends.new_zeros(1), ends])
            chunks = _chunks_of_sequences(counts, room, padded)
        batch, length = tokens.token_ids.shape
        return cls((batch, length), places, live[None], cut, tuple(chunks), bounds)

    @property
    def count(self) -> int:
        return self.live.shape[1]

    @property
    def everything(self) -> bool:
        """Whether every token is live, and nothing is padded: then nothing is gathered or scattered."""
        return self.places is None

    @computed_once
    def index(self) -> Tensor:
        """(n,) of each row in the flattened (B, T), 0 for padding."""
        return torch.arange(self.count, device=self.live.device) if self.places is None else self.places

    def holds(self, states: Tensor) -> bool:
        """Whether the rows of ``states``, one after the other, are those of the tokens."""
        return self.everything and self.count == states.shape[:-1].numel()

    @property
    def longest(self) -> int:
        return max((last - first for first, last in self.chunks), default=0)

    def gather(self, states: Tensor, first: int, last: int) -> Tensor:
        """Return (last - first, K) rows of ``states`` (B, T or T+1, K) or (N, K), gathered where they lie apart."""
        if self.holds(states) and states.is_contiguous():
            return states.flatten(0, -2)[first:last]
        index = self.index[first:last]
        whole = states.unsqueeze(0) if states.dim() == 2 else states
        rows = whole[index // self.shape[1], index % self.shape[1]]
        if not pads(self.live.device.type):
            return rows
        return rows.masked_fill_(~self.live[0, first:last, None], 0)  # padding repeats some row, which may hold NaN

    def put(self, values: Tensor, out: Tensor, states: Tensor, first: int, last: int) -> None:
        """Write the rows of a chunk into ``out``, (rows of states + 1, H): padding goes to the spare last row."""
        if self.holds(states):
            out[first:last] = values
            return
        index = self.index[first:last]
        row = index // self.shape[1] * states.shape[-2] + index % self.shape[1]
        out[torch.where(self.live[0, first:last], row, out.shape[0] - 1)] = values.to(out.dtype)

    @overload
    def take(self, values: Tensor) -> Tensor: ...
    @overload
    def take(self, values: None) -> None: ...
    def take(self, values: Tensor | None) -> Tensor | None:
        """Return contiguous (1, n) of (B, T): a view of such a one where every token is live."""
        if values is None:
            return None
        flat = values.reshape(-1)  # of one number for all, as a sum's gradient is, no more than a view
        return (flat.contiguous() if self.everything else flat[self.index])[None]

    def scatter(self, values: Tensor) -> Tensor:
        """Return (B, T) of (1, n), 0 elsewhere: a view where every token is live."""
        if self.everything:
            return values.view(self.shape)
        out = values.new_zeros(self.shape[0] * self.shape[1] + 1)
        out[torch.where(self.live[0], self.index, out.shape[0] - 1)] = values[0]  # padding goes to the spare place
        return out[:-1].view(self.shape)

    def batch(self, batch: TokenBatch) -> TokenBatch:
        """Return the batch of the live tokens alone, (1, n); ``narrow`` says which sequences a part of it holds."""
        inputs = TokenInputs(*(None if values is None else self.take(values) for values in batch.inputs))  # type: ignore[arg-type]
        return dataclasses.replace(
            batch,
            live=self.live,
            masked_in=self.take(batch.masked_in),
            inputs=inputs,
            rollout_weight=None,
            divergence_weight=self.take(batch.divergence_weight),
        )

    def narrow(self, batch: TokenBatch, first: int, last: int) -> TokenBatch:
        """Return tokens [first, last) of ``batch``'s result; without ``bounds`` as one sequence."""
        if self.bounds is None and (first, last) == (0, self.count):
            return dataclasses.replace(batch, sequences=Padded(1))
        live, masked_in = batch.live[:, first:last], batch.masked_in[:, first:last]
        sequences: Sequences = Padded(1)
        if self.bounds is not None:
            sequences = Packed.of(self.bounds.clamp(first, last) - first, last - first)
        inputs, weight = cut(batch.inputs, first, last), batch.divergence_weight
        return dataclasses.replace(
            batch,
            live=live,
            masked_in=masked_in,
            sequences=sequences,
            inputs=inputs,
            divergence_weight=None if weight is None else weight[:, first:last],
        )


def _chunks_of_sequences(lengths: list[int], chunk: int, count: int) -> list[tuple[int, int]]:
    """Return chunks of as many whole sequences as fit; the last one ends at ``count``, padding included."""
    starts, end = [0], 0
    for length in lengths:
        if end + length - starts[-1] > chunk:
            starts.append(end)
        end += length
    return list(zip(starts, [*starts[1:], count], strict=True)) if count else []


def _live_positions(live: Tensor, size: int) -> Tensor:
    """Return the first ``size`` positions that are live, (size,), filled up with -1."""
    if has_every_operator(live.device):
        return torch.nonzero_static(live, size=size, fill_value=-1).squeeze(-1)
    found = live.nonzero().squeeze(-1)[:size]
    return torch.nn.functional.pad(found, (0, size - found.shape[0]), value=-1)


def _count(tokens: RowTokens, lengths: Tensor | None, live_tokens: int | None) -> tuple[list[int], Tensor | None]:
    """Return how many rows to work on, sequence by sequence where ``lengths`` can be read, and ``LiveRows.cut``."""
    live = tokens.live
    if live_tokens is not None and (type(live_tokens) is not int or live_tokens < 0):
        error = ValueError if type(live_tokens) is int else TypeError
        fail(tokens.function, "live_tokens to be an int >= 0", repr(live_tokens), error=error)
    if live_tokens is None and live.is_meta:
        live_tokens = live.numel()  # as many as there may be: none can be counted
    if live_tokens is None or may_look(live, tokens.checks):
        counts = [int(live.sum())] if lengths is None else [int(length) for length in lengths.tolist()]
        if live_tokens is not None and sum(counts) > live_tokens:
            expected = f"live_tokens >= {sum(counts)}, the live tokens"
            fail(tokens.function, expected, repr(live_tokens), tokens.tensors)
        return counts, None
    count = min(live_tokens, live.numel())
    return [count], live.sum() > count
