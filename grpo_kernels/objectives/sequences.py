"""The layout of a batch: which tokens form a sequence, and which ranks hold them.

Token tensors are (B, T) inside the package; a packed batch is one row of N tokens, B = 1, with sequence bounds in
``cu_seqlens``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .checks import check_bounds, fail, read_mask
from .compiler import define
from .groups import ordered_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, unsafe=True)


def _sequence_sum_fake(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1)


sequence_sum = define("sequence_sum(Tensor values, Tensor cu_seqlens) -> Tensor", _sequence_sum, _sequence_sum_fake)


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over tokens: fp64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def backward_scan(values: Tensor, links: Tensor) -> Tensor:
    """Return out_t = values_t + links_t * out_{t+1} over (B, T), of links (B, T-1), in log2(T) steps.

    A link of 0 ends a sequence: whatever lies behind it has no part, NaN neither. Which sums are added to which follows
    from the distances of tokens alone, so that a sequence has its bits wherever it lies, and on every run: a cumulative
    sum of floats promises neither on CUDA.
    """
    length, step = values.shape[-1], 1
    out, reach = values.clone(), links
    while step < length:
        # reach is the product of the links from t to t + step
        out[:, :-step] += torch.where(reach == 0, 0.0, reach * out[:, step:])
        reach = reach[:, :-step] * reach[:, step:]
        step *= 2
    return out


def forward_scan(values: Tensor, links: Tensor) -> Tensor:
    """Return out_t = values_t + links_{t-1} * out_{t-1}, as ``backward_scan`` the other way."""
    return backward_scan(values.flip(-1), links.flip(-1)).flip(-1)


class Least(NamedTuple):
    """The least value of a sequence up to each token, (B, T)."""

    value: Tensor
    """NaN from the first NaN on."""
    column: Tensor
    """Where it is, of equal ones the last, int64; -1, and a value of +inf, before the first live token."""


def running_least(values: Tensor, live: Tensor, links: Tensor) -> Least:
    """Return the least of the ``live`` values (B, T) up to each token, of links (B, T-1) that say, by not 0, which
    token belongs with the next; in log2(T) steps."""
    length, step = values.shape[-1], 1
    value = torch.where(live, values, torch.inf)
    column = torch.where(live, torch.arange(length, device=values.device), -1)
    reach = links != 0
    while step < length:
        before, there = value[:, :-step], column[:, :-step]
        smaller = (before < value[:, step:]) | before.isnan() | (column[:, step:] < 0)
        taken = reach & (there >= 0) & smaller
        value = torch.cat([value[:, :step], torch.where(taken, before, value[:, step:])], -1)
        column = torch.cat([column[:, :step], torch.where(taken, there, column[:, step:])], -1)
        reach = reach[:, :-step] & reach[:, step:]
        step *= 2
    return Least(value, column)


class Whole:
    """Sequences whose tokens are all here."""

    owner: ClassVar[bool] = True
    """Whether this rank counts what is counted once for each sequence."""

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return per-sequence sums (S,) of (B, T) values, added in ``dtype``."""
        raise NotImplementedError

    def sums(self, values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return ``sum`` of each."""
        return [self.sum(one, dtype) for one in values]

    def tokens(self, mask: Tensor) -> Tensor:
        """Return how many tokens of all sequences a mask counts, 0-d."""
        return mask.sum()


@dataclass(frozen=True)
class Padded(Whole):
    """Sequences that are the rows of (B, T) token tensors."""

    count: int

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).sum(-1)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """Return (B,) values, one a sequence, so that they broadcast to (B, T)."""
        return per_sequence.unsqueeze(-1)

    def links(self, values: Tensor) -> Tensor:
        """Return, (B, T-1) like (B, T) ``values``, 1 where a token and the next are of one sequence, else 0."""
        return torch.ones_like(values[:, 1:])


@dataclass(frozen=True)
class Packed(Whole):
    """Sequences that lie one after the other in (1, N) token tensors; sums run in a fixed order."""

    cu_seqlens: Tensor
    sequence_of: Tensor
    """The index of each token's sequence, int64 (N,)."""

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

    def inside(self) -> Tensor:
        """Return, bool (1, N), which tokens belong to a sequence, neither before the first bound nor past the last.
        Whoever asks which tokens of a packed batch count asks here."""
        positions = torch.arange(self.sequence_of.shape[0], device=self.cu_seqlens.device)
        return ((positions >= self.cu_seqlens[0]) & (positions < self.cu_seqlens[-1])).unsqueeze(0)


@dataclass(frozen=True)
class Joined:
    """Sequences of which each rank of a group holds some tokens, in any order, this one those of ``part``.

    Sums are those of whole sequences: of every rank's own, added in rank order. What is asked for travels with the
    next sum that is needed, so that all ranks, which ask and need the same, meet as seldom as can be.
    """

    part: Padded | Packed
    group: ProcessGroup
    _asked: list[Tensor] = field(default_factory=list)
    _known: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(B, T) values beside their sums (S,)."""

    @property
    def count(self) -> int:
        return self.part.count

    @property
    def owner(self) -> bool:
        return torch.distributed.get_rank(self.group) == 0

    def ask(self, *values: Tensor) -> None:
        """Let the sums of (B, T) values travel with the next one that is needed."""
        for one in values:
            if not any(one is other for other in (*self._asked, *(known for known, _ in self._known))):
                self._asked.append(one)

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return per-sequence sums (S,) over all ranks of (B, T) values, added in ``dtype``."""
        self.ask(values)
        if any(values is one for one in self._asked):
            sums = ordered_sum(torch.stack(self.part.sums(self._asked, dtype)), self.group)
            self._known.extend(zip(self._asked, sums.unbind(), strict=True))
            self._asked.clear()
        return next(total for known, total in self._known if known is values)

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
    """Spread an aggregation's weights: contiguous (B, T) in ``real``, rounded once; 0 where the mask is."""
    weights = weights.to(real)
    return (mask * (sequences.expand(weights) if weights.dim() else weights)).contiguous()


def read_live(function: str, mask: Tensor, cu_seqlens: Tensor | None, check: bool | None = None) -> Tensor:
    """Return, bool of the mask's shape, which tokens count: these lie in a sequence where sequences have bounds."""
    tensors = {"mask": mask, "cu_seqlens": cu_seqlens}
    live = read_mask(function, mask, tensors, check)
    if cu_seqlens is None:
        return live
    if mask.dim() not in (1, 2) or mask.numel() != mask.shape[-1]:
        fail(function, "packed masks (N,) or (1, N) with cu_seqlens", f"shape {tuple(mask.shape)}", tensors)
    return live & Packed.read(function, cu_seqlens, mask.shape[-1], tensors, check).inside().view(mask.shape)
