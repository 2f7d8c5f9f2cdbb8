"""Sequences cut into the parts that ranks of a sequence group hold: ids are shifted first, so that nothing is later."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from ..objectives.checks import check_tensors, fail
from ..objectives.groups import is_initialised, read_group
from ..objectives.sequences import LAYOUTS, Layout
from ..objectives.settings import check_name
from .recorded import Recorded
from .tokens import align

if TYPE_CHECKING:
    from ..objectives.groups import Group


@dataclass(frozen=True)
class ContextPart:
    """One rank's tokens of every sequence: (B, T) or packed as the ids were, (T,) or (1, T)."""

    input_ids: Tensor
    """What the model reads; 0 where the part was padded."""
    token_ids: Tensor
    """What each row predicts, for the loss."""
    mask: Tensor
    """bool: the loss mask of these; False where the part was padded, and at the last token of a sequence."""
    position_ids: Tensor
    """int64: places in the whole sequence, going on behind its last token where the part was padded."""
    cu_seqlens: Tensor | None
    """(S+1,) bounds of the sequences in this part, where they are packed; times the number of ranks, those of the
    padded whole."""
    index: Tensor
    """int64 (T,): the column of the whole tensors that each token of the part has; past their end where it is
    padding."""
    layout: Layout
    """How the sequences were cut, as ``sequence_layout=`` of the losses takes it."""
    _columns: int
    _packed: bool

    @overload
    def take(self, values: Tensor) -> Tensor: ...

    @overload
    def take(self, values: Recorded) -> Recorded: ...

    def take(self, values: Tensor | Recorded) -> Tensor | Recorded:
        """Return this part of a token-sized tensor, 0 where it was padded, differentiable; or of recorded sets, empty
        where it was padded, which waits for a device.

        Args:
            values: of rows of the model or of what they predict, as ``align`` has it: (B, L, ...) or (B, L-1, ...);
                packed (N, ...) or (1, N, ...).
        """
        if isinstance(values, Recorded):
            count, offsets = math.prod(values.shape), values.offsets
            numbers = torch.arange(1, count + 1, device=offsets.device).view(values.shape)
            # Number 0, of padding, is the last: a token without a set.
            return Recorded(values.ids, torch.cat([offsets, offsets[-1:]]))[self.take(numbers) - 1]
        check_tensors("ContextPart.take", {"values": values}, needed=("values",))
        first = self._packed and not (values.dim() > 1 and values.shape[:2] == (1, self._columns))
        dim, rows = 0 if first else 1, self.mask.shape[0]
        columns = values.shape[dim] if values.dim() > dim else -1
        allowed = (self._columns,) if self._packed else (self._columns, self._columns - 1)
        if columns not in allowed or not (self._packed or values.shape[0] == rows):
            whole = f"({self._columns}, ...) or (1, {self._columns}, ...)"
            padded = f"({rows}, {self._columns}, ...) or ({rows}, {self._columns - 1}, ...)"
            expected = f"values {whole if self._packed else padded}"
            fail("ContextPart.take", expected, str(tuple(values.shape)), hint="values of whole sequences, not yet cut")
        if columns == 0:
            return values.new_zeros(*values.shape[:dim], len(self.index), *values.shape[dim + 1 :])
        padding = self.index >= columns
        cut = values.index_select(dim, self.index.masked_fill(padding, 0))
        shape = [1] * cut.dim()
        shape[dim] = len(padding)
        return cut.masked_fill(padding.view(shape), 0)


def split_context(
    input_ids: Tensor,
    loss_mask: Tensor,
    rank: int | None = None,
    size: int | None = None,
    *,
    group: Group | None = None,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "zigzag",
) -> ContextPart:
    """Return one rank's part of sequences that are split over several, as ``sequence_group=`` of the losses takes it.

    ``layout="zigzag"`` is that of Megatron, TransformerEngine and ring attention: each sequence is padded behind its
    end to a multiple of 2·size tokens and cut into 2·size chunks, of which rank i has those numbered i and
    2·size-1-i, so that causal attention costs every rank the same. ``"contiguous"`` pads to a multiple of size and
    gives rank i the i-th part. What is padded is masked, and no token before it attends to it.

    Waits for the device, to count; on the way to a model, call it where batches are made.

    Args:
        input_ids, loss_mask: whole, as for ``align``: (B, L), or packed (N,) or (1, N) with ``cu_seqlens``. The mask is
            of tokens, not of what is predicted: ids and mask are shifted here.
        rank, size: whose part, of how many.
        group: the group that has them, in their place: a process group or a mesh of one dimension.
        cu_seqlens: (S+1,) bounds of packed sequences; tokens outside of them go to no rank.
        layout: "zigzag" or "contiguous".

    Returns:
        ContextPart; ``part.take(old_log_probs)`` cuts whatever else has a column for each token.
    """
    rank, size = _read_rank(rank, size, group)
    check_name("split_context: layout", layout, LAYOUTS)
    token_ids, mask = align(input_ids, loss_mask, cu_seqlens)
    columns, device, packed = input_ids.shape[-1], input_ids.device, cu_seqlens is not None
    if cu_seqlens is None:
        places = _places(torch.tensor([columns], device=device), rank, size, layout).place
        position_ids, bounds, index = places.expand(input_ids.shape[0], -1), None, places
    else:
        starts = cu_seqlens.to(torch.int64).clamp(0, columns)
        places, sequence, lengths = _places(starts.diff(), rank, size, layout)
        index = torch.where(places < starts.diff()[sequence], starts[sequence] + places, columns)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(cu_seqlens.dtype)
        position_ids = places.view(*input_ids.shape[:-1], -1)
    whole = ContextPart(input_ids, token_ids, mask, position_ids, bounds, index, layout, columns, packed)
    ids, targets, counts = (whole.take(values) for values in (input_ids, token_ids, mask))
    return dataclasses.replace(whole, input_ids=ids, token_ids=targets, mask=counts)


def _read_rank(rank: int | None, size: int | None, group: Group | None) -> tuple[int, int]:
    if group is not None:
        if rank is not None or size is not None:
            fail("split_context", "rank= and size=, or group=", "both")
        ranks = read_group("split_context", "group", group)
        return (0, 1) if ranks is None else (torch.distributed.get_rank(ranks), torch.distributed.get_world_size(ranks))
    if rank is None or size is None or not 0 <= rank < size:
        got = f"rank={rank!r}, size={size!r}, group=None"
        early = rank is None and size is None and not is_initialised()
        hint = "torch.distributed.group.WORLD is None before torch.distributed.init_process_group(...)"
        fail("split_context", "0 <= rank < size, or a group of ranks", got, hint=hint if early else None)
    return rank, size


class _Places(NamedTuple):
    """One rank's tokens, sequence by sequence."""

    place: Tensor
    """In its padded sequence."""
    sequence: Tensor
    """Its number."""
    lengths: Tensor
    """(S,) tokens of each sequence."""


def _places(lengths: Tensor, rank: int, size: int, layout: Layout) -> _Places:
    """Return the places of one rank's tokens of sequences with ``lengths`` (S,)."""
    each = 2 if layout == "zigzag" else 1
    chunks = each * size
    chunk = (lengths + chunks - 1) // chunks
    own = each * chunk
    sequence = torch.repeat_interleave(torch.arange(len(own), device=own.device), own)
    offset = torch.arange(len(sequence), device=own.device) - (own.cumsum(0) - own)[sequence]
    length = chunk[sequence]
    # The first chunk is that numbered rank, the second, whose offsets begin at its length, chunks - 1 - rank.
    number = torch.where(offset < length, rank, chunks - 2 - rank)
    return _Places(number * length + offset, sequence, own)
