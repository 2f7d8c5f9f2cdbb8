"""The layout of a batch: which tokens form a sequence, and which ranks hold them.

Token tensors are (B, T) inside the package; a packed batch is one row of N tokens, B = 1, with sequence bounds in
``cu_seqlens``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .checks import check_bounds, fail, read_mask
from .compiler import define
from .groups import add_in_order, gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Layout = Literal["zigzag", "contiguous"]
"""Which tokens of every sequence the ranks of a group hold, in which order: of 2·ranks chunks of equal length rank i
those numbered i and 2·ranks-1-i, one behind the other; of one chunk a rank the i-th."""
LAYOUTS = ("zigzag", "contiguous")
_COMPLETE = ("cpu", "cuda", "meta")
_SINGLE = ("mps",)


def has_every_operator(device: torch.device) -> bool:
    """Whether PyTorch has ``segment_reduce`` and ``nonzero_static`` for this kind of device; others are given what
    takes their place."""
    return device.type in _COMPLETE


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over tokens: fp64 wherever the device has it."""
    return torch.float32 if device.type in _SINGLE else torch.float64


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums (S, ...) of values (n, ...) between consecutive offsets (S+1,), 0 of nothing."""
    if has_every_operator(values.device):
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, axis=0)
    sums = values.new_zeros(offsets.shape[0], *values.shape[1:])
    return sums.index_add_(0, _segment(values, offsets), values)[:-1]


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the largest (S,) of values (n,) between consecutive offsets (S+1,), -inf of nothing."""
    if has_every_operator(values.device):
        return torch.segment_reduce(values, "max", offsets=offsets, unsafe=True, initial=-math.inf)
    largest = values.new_full((offsets.shape[0],), -math.inf)
    return largest.scatter_reduce_(0, _segment(values, offsets), values, "amax")[:-1]


def _segment(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the segment of each value, int64 (n,); of those before the first offset and behind the last, one of their
    own."""
    positions = torch.arange(values.shape[0], device=values.device)
    segment = torch.searchsorted(offsets[1:].to(torch.int64), positions, right=True)
    return torch.where(positions < offsets[:1], offsets.shape[0] - 1, segment)


def _sequence_sum_fake(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1)


sequence_sum = define("sequence_sum(Tensor values, Tensor cu_seqlens) -> Tensor", segment_sum, _sequence_sum_fake)


class Whole:
    """Sequences whose tokens are all here."""

    owner: ClassVar[bool] = True
    """Whether this rank counts what is counted once for each sequence."""
    _counted: list[tuple[Tensor, Tensor]]
    """Masks, and the ``lengths`` that they count."""

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return per-sequence sums (S,) of (B, T) values, added in ``dtype``."""
        raise NotImplementedError

    def sums(self, values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return ``sum`` of each."""
        return [self.sum(one, dtype) for one in values]

    def lengths(self, mask: Tensor) -> Tensor:
        """Return how many tokens of each sequence a mask counts, (S,) in the accumulation dtype: counted once."""
        if torch.compiler.is_compiling():
            return self.sum(mask, accumulate_dtype(mask.device))
        for known, lengths in self._counted:
            if known is mask:
                return lengths
        lengths = self.sum(mask, accumulate_dtype(mask.device))
        self._counted.append((mask, lengths))
        return lengths

    def tokens(self, mask: Tensor) -> Tensor:
        """Return how many tokens of all sequences a mask counts, 0-d in the accumulation dtype."""
        return mask.sum(dtype=accumulate_dtype(mask.device))


@dataclass(frozen=True)
class Padded(Whole):
    """Sequences that are the rows of (B, T) token tensors."""

    count: int
    _counted: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.sum(-1, dtype=dtype)

    def sums(self, values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """As that of ``Whole``; what is counted, of which every sum is exact, in one."""
        counts = [one for one in values if not one.is_floating_point()]
        if len(counts) < 2:
            return super().sums(values, dtype)
        counted = iter(self.sum(torch.stack(counts), dtype).unbind())
        return [self.sum(one, dtype) if one.is_floating_point() else next(counted) for one in values]

    def expand(self, per_sequence: Tensor) -> Tensor:
        """Return (B,) values, one a sequence, so that they broadcast to (B, T)."""
        return per_sequence.unsqueeze(-1)

    def links(self, values: Tensor) -> Tensor:
        """Return, (B, T-1) like (B, T) ``values``, 1 where a token and the next are of one sequence, else 0."""
        return torch.ones_like(values[:, 1:])

    def last(self, values: Tensor, empty: float) -> Tensor:
        """Return (S,) the values of each sequence's last token, ``empty`` where it has none."""
        return torch.nn.functional.pad(values, (1, 0), value=empty)[:, -1]


@dataclass(frozen=True)
class Packed(Whole):
    """Sequences that lie one after the other in (1, N) token tensors; sums run in a fixed order."""

    cu_seqlens: Tensor
    sequence_of: Tensor
    """The index of each token's sequence, int64 (N,)."""
    _counted: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def read(
        cls,
        function: str,
        cu_seqlens: Tensor,
        tokens: int,
        tensors: Mapping[str, object],
        check: bool | None = None,
    ) -> Packed:
        """Read the bounds that a user gave; whatever they are, nothing is read outside of the tokens."""
        check_bounds(function, cu_seqlens, tokens, tensors, check)
        return cls.of(cu_seqlens.to(torch.int64).clamp(0, tokens), tokens)

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> Packed:
        positions = torch.arange(tokens, device=cu_seqlens.device)
        index = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
        return cls(cu_seqlens, index.clamp(max=cu_seqlens.shape[0] - 2))

    @property
    def count(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return sequence_sum(values.reshape(-1).to(dtype), self.cu_seqlens)

    def expand(self, per_sequence: Tensor) -> Tensor:
        return per_sequence[self.sequence_of].unsqueeze(0)

    def links(self, values: Tensor) -> Tensor:
        """As that of ``Padded``."""
        return (self.sequence_of[1:] == self.sequence_of[:-1]).to(values.dtype).unsqueeze(0)

    def last(self, values: Tensor, empty: float) -> Tensor:
        """As that of ``Padded``."""
        ends = torch.where(self.cu_seqlens.diff() > 0, self.cu_seqlens[1:] - 1, values.shape[1])
        return torch.nn.functional.pad(values, (0, 1), value=empty)[0, ends]

    def inside(self) -> Tensor:
        """Return, bool (1, N), which tokens belong to a sequence, neither before the first bound nor past the last.
        Whoever asks which tokens of a packed batch count asks here."""
        positions = torch.arange(self.sequence_of.shape[0], device=self.cu_seqlens.device)
        return ((positions >= self.cu_seqlens[0]) & (positions < self.cu_seqlens[-1])).unsqueeze(0)


@dataclass(frozen=True)
class Joined:
    """Sequences of which each rank of a group holds some tokens, this one those of ``part``.

    Sums are those of whole sequences: of every rank's own, added in rank order. What is asked for travels with the
    next numbers that are needed, so that all ranks, which ask and need the same, meet as seldom as can be.
    """

    part: Padded | Packed
    group: ProcessGroup
    layout: Layout | None = None
    """None: the tokens lie in any order, which sums do not ask for."""
    _asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """What will travel: by the tensor that they are asked for by, this rank's numbers, (n, S)."""
    _known: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """What has: those of all ranks, (ranks, n, S)."""

    @property
    def count(self) -> int:
        return self.part.count

    @property
    def owner(self) -> bool:
        return torch.distributed.get_rank(self.group) == 0

    def ask(self, *values: Tensor) -> None:
        """Let the sums of (B, T) values travel with the next numbers that are needed."""
        for one in values:
            if not any(one is other for other, _ in (*self._asked, *self._known)):
                self.tell(one, self.part.sum(one, accumulate_dtype(one.device)).unsqueeze(0))

    def tell(self, name: Tensor, numbers: Tensor) -> None:
        """Let numbers of this rank, (n, S) in the accumulation dtype, travel too; ``everyones`` gives them by the
        tensor ``name``."""
        self._asked.append((name, numbers))

    def everyones(self, name: Tensor) -> Tensor:
        """Return the numbers of every rank, (ranks, n, S)."""
        if any(name is one for one, _ in self._asked):
            names, numbers = zip(*self._asked, strict=True)
            told = gather(torch.cat(numbers), self.group).split([len(own) for own in numbers], dim=1)
            self._known.extend(zip(names, told, strict=True))
            self._asked.clear()
        return next(told for known, told in self._known if known is name)

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return per-sequence sums (S,) over all ranks of (B, T) values, in ``dtype``."""
        self.ask(values)
        return add_in_order(self.everyones(values)[:, 0]).to(dtype)

    def lengths(self, mask: Tensor) -> Tensor:
        """As that of ``Whole``, over all ranks."""
        return self.sum(mask, accumulate_dtype(mask.device))

    def sums(self, values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return ``sum`` of each, in one collective."""
        self.ask(*values)
        return [self.sum(one, dtype) for one in values]

    def tokens(self, mask: Tensor) -> Tensor:
        """Return how many tokens of all sequences the masks of all ranks count, 0-d."""
        return self.sum(mask, accumulate_dtype(mask.device)).sum()

    def expand(self, per_sequence: Tensor) -> Tensor:
        """As that of ``part``: values of this rank's tokens."""
        return self.part.expand(per_sequence)


Sequences = Padded | Packed | Joined


def on_tokens(weights: Tensor, mask: Tensor, sequences: Sequences, real: torch.dtype) -> Tensor:
    """Spread an aggregation's weights, (S,) or 0-d: contiguous (B, T) in ``real``, rounded once, 0 where masked."""
    weights = sequences.expand(weights) if weights.dim() else weights
    return torch.mul(mask, weights, out=torch.empty_like(mask, dtype=real))


def read_live(function: str, mask: Tensor, cu_seqlens: Tensor | None, check: bool | None = None) -> Tensor:
    """Return, bool of the mask's shape, which tokens count: these lie in a sequence where sequences have bounds."""
    tensors = {"mask": mask, "cu_seqlens": cu_seqlens}
    live = read_mask(function, mask, tensors, check)
    if cu_seqlens is None:
        return live
    if mask.dim() not in (1, 2) or mask.numel() != mask.shape[-1]:
        fail(function, "packed masks (N,) or (1, N) with cu_seqlens", f"shape {tuple(mask.shape)}", tensors)
    return live & Packed.read(function, cu_seqlens, mask.shape[-1], tensors, check).inside().view(mask.shape)
