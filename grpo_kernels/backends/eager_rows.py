"""The rows of plain PyTorch's kernels, a few at a time: their chunks, buffers and values.

A chunk of rows goes through a few operations in place, over one or two buffers; numbers of which a row has one are
computed for all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Rows

CHUNKS = 16
"""The number of chunks that the rows are cut into, so that buffers are small beside the logits ..."""
CHUNK_ELEMENTS = (7 << 16, 1 << 20)
"""... within these bounds of a chunk's logits on a CPU, where chunks cost time in Python and buffers belong in the
cache, ..."""
LAUNCHED_ELEMENTS = (1 << 20, 1 << 24)
"""... and within these on other devices, where every operation is a launch."""
LOG2_E = math.log2(math.e)


class Buffer:
    """Memory for the numbers of a chunk, (rows, V).

    PyTorch computes 2^x of the last few numbers of a thread's share with other instructions, which round otherwise.
    For a row to have the same bits wherever it lies, shares are made whole vectors by numbers behind the rows.
    """

    def __init__(self, memory: Tensor, count: int, vocab: int) -> None:
        self.numbers = memory[: count * vocab].view(count, vocab)
        self._whole = memory[: _whole_vectors(count * vocab)]

    def exp2_(self, exponents: Buffer) -> None:
        """Write 2 to the power of another buffer's numbers, or of its own."""
        torch.exp2(exponents._whole, out=self._whole)


def _whole_vectors(count: int) -> int:
    """Return a size of at least ``count`` that TensorIterator shares among threads without cutting a vector."""
    vector, least_share = 64, 1 << 15
    shares = max(1, min(torch.get_num_threads(), -(-count // least_share)))
    return -(-count // (vector * shares)) * vector * shares


class Chunk(NamedTuple):
    """A part of the rows: whole sequences, or some tokens of one."""

    rows: Rows
    at: tuple[slice, slice]
    buffers: list[Buffer]
    per_row: tuple[Tensor, ...]
    """Numbers of the chunk's rows, (rows, 1) each: views, so that statistics are written through them."""
    dead: bool
    """Whether it is known that no row counts: on a CPU alone, as other devices would have to be waited for."""

    @property
    def logits(self) -> Tensor:
        """Return the chunk's logits, (rows, V), in their own dtype."""
        return self.rows.row_view(self.rows.logits)[self.at].flatten(0, 1)


def chunks_of(rows: Rows, buffers: int, read: Tensor, *per_row: Tensor) -> Iterator[Chunk]:
    """Walk over all rows chunk by chunk; ``read``, bool (B, T), are the rows whose logits count."""
    places = _places(rows)
    counts = [(b.stop - b.start) * (t.stop - t.start) for b, t in places]
    size = _whole_vectors(max(counts, default=0) * rows.vocab)
    memory = [torch.empty(size, dtype=rows.numbers.dtype, device=rows.logits.device) for _ in range(buffers)]
    made = {count: [Buffer(room, count, rows.vocab) for room in memory] for count in set(counts)}
    views = [values.view(-1, 1).split(counts) for values in per_row if counts]
    may_be_dead = read.device.type == "cpu" and not all_of(read)
    for at, count, *parts in zip(places, counts, *views, strict=True):
        yield Chunk(rows, at, made[count], tuple(parts), may_be_dead and not bool(read[at].any()))


def _places(rows: Rows) -> list[tuple[slice, slice]]:
    """Return the sequences and the tokens of each chunk."""
    batch, length = rows.token_ids.shape
    fewest, most = CHUNK_ELEMENTS if rows.logits.device.type == "cpu" else LAUNCHED_ELEMENTS
    elements = min(max(fewest, batch * length * rows.vocab // CHUNKS), most)
    size = max(1, elements // rows.vocab)
    return [(b, t) for b in _parts(batch, max(1, size // max(1, length))) for t in _parts(length, size)]


def _parts(length: int, most: int) -> list[slice]:
    """Cut ``length`` into parts of at most ``most``, equal but for a difference of one."""
    count = -(-length // most)
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


def all_of(read: Tensor) -> bool:
    """Whether it is known that all rows are read: on a CPU alone (``Chunk.dead``)."""
    return read.device.type == "cpu" and bool(read.all())


def columns_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the sampled tokens' columns, 0 for ids outside the vocabulary, and where ids are inside. Raise IndexError,
    on a CPU, for a live token outside."""
    ids = rows.token_ids
    in_range = (ids >= 0) & (ids < rows.vocab)
    if ids.device.type == "cpu" and bool((bad := rows.live & ~in_range).any()):
        raise IndexError(token_id_message(rows, int(bad.flatten().nonzero()[0])))
    return torch.where(in_range, ids, 0), in_range


def factor_of(rows: Rows) -> Tensor:
    """Return each row's factor, (B, T), that makes z of the values that ``load`` returns."""
    temperature, scale, _ = rows.numbers[:3].unbind()
    if rows.temperature is not None:
        temperature = torch.where(rows.live, rows.temperature, 1.0)
    return ((1.0 if rows.softcap else scale) / temperature).expand(rows.token_ids.shape).contiguous()


def load(chunk: Chunk, buffer: Tensor) -> Tensor:
    """Return logits in fp32 (fp64), capped where there is a cap: in the buffer, or where they are."""
    logits, rows = chunk.logits, chunk.rows
    if logits.dtype == buffer.dtype and not rows.softcap:
        return logits
    buffer.copy_(logits)
    if rows.softcap:
        _, scale, cap = rows.numbers[:3].unbind()
        buffer.mul_(scale / cap).tanh_().mul_(cap)
    return buffer


def capped(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return cap·tanh(logit·scale/cap), and its derivative in the logit: scale·(1 - tanh²) as 4q/(1+q)², which keeps
    its precision where tanh is nearly 1."""
    _, scale, cap = numbers[:3].unbind()
    inner = logits * (scale / cap)
    q = torch.exp(-2 * inner.abs())
    return cap * torch.tanh(inner), 4 * q / (1 + q) ** 2 * scale


def several(values: Tensor) -> Tensor:
    """Return rows as they are, but a lone one twice: PyTorch adds it up in another order than one of several."""
    return values if len(values) > 1 else values.expand(2, -1)


def token_id_message(rows: Rows, row: int) -> str:
    length = rows.token_ids.shape[1]
    batch, token = divmod(row, length)
    token_id = int(rows.token_ids[batch, token])
    return (
        f"token_ids[{batch}, {token}] = {token_id} at a live position is outside the vocabulary [0, {rows.vocab}). "
        "Mask that position, or check that ids and logits come from one tokenizer (ids of -100 need mask=0)."
    )
