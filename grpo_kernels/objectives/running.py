"""Running levels: what a ratio takes of the tokens up to it, and how slopes get back to these.

Scans take log2(T) steps of whole tensors. Over ranks each scans its own tokens; what the earlier ones (of slopes the
later ones) hold of a sequence comes to it as a number, which travels with what else ranks tell each other:

    sum_{s<=t} x_s = sum of earlier pieces + sum of this piece up to t

and so for the least; slopes the other way. A piece is what one rank holds of a sequence without a token of another rank
between: its part, or half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import Joined, Packed, Padded, Sequences, accumulate_dtype


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

    def after(self, before: Least) -> Tensor:
        """Return where the least of tokens ``before`` these is that of both: not of equal ones."""
        smaller = (before.value < self.value) | before.value.isnan() | (self.column < 0)
        return (before.column >= 0) & smaller


def running_least(values: Tensor, live: Tensor, links: Tensor) -> Least:
    """Return the least of the ``live`` values (B, T) up to each token, of links (B, T-1) that say, by not 0, which
    token belongs with the next; in log2(T) steps."""
    length, step = values.shape[-1], 1
    value = torch.where(live, values, torch.inf)
    column = torch.where(live, torch.arange(length, device=values.device), -1)
    reach = links != 0
    while step < length:
        before, behind = Least(value[:, :-step], column[:, :-step]), Least(value[:, step:], column[:, step:])
        taken = reach & behind.after(before)
        value = torch.cat([value[:, :step], torch.where(taken, before.value, behind.value)], -1)
        column = torch.cat([column[:, :step], torch.where(taken, before.column, behind.column)], -1)
        reach = reach[:, :-step] & reach[:, step:]
        step *= 2
    return Least(value, column)


class Origin(NamedTuple):
    """Whose value a running least is."""

    column: Tensor
    """The token's, among those of this rank, of the shape in which its pieces lie; -1: none of them."""
    piece: Tensor | None = None
    """(S, pieces) over ranks: which of the earlier pieces has the least of them; -1: none."""


class Running(NamedTuple):
    """What a running level makes of values."""

    values: Tensor
    """(B, T) in the accumulation dtype."""
    origin: Origin | None = None
    """Where each is the value of one token."""


def begin_up_to(values: Tensor, live: Tensor, sequences: Sequences, least: bool) -> Callable[[], Running]:
    """Begin the sums of (B, T) values, 0 at dead tokens, up to each token, or the ``least`` of the live ones. What it
    returns gives them; over ranks, what was begun before the first is asked for travels together."""
    real = values.to(accumulate_dtype(values.device))
    if isinstance(sequences, Joined):
        pieces = _Pieces.of(sequences, real)
        return _begin_least(real, live, pieces) if least else _begin_sums(real, pieces)
    links = sequences.links(real)
    if least:
        found = running_least(real, live, links)
        running = Running(found.value, Origin(found.column))
    else:
        running = Running(forward_scan(real, links))
    return lambda: running


def begin_back_from(slopes: Tensor, sequences: Sequences, origin: Origin | None) -> Callable[[], Tensor]:
    """Begin what slopes (B, T) in the values of ``begin_up_to``, 0 at dead tokens, come to in each token's own: those
    from it on; those of the tokens whose ``origin`` it is, which follow one another, the first of them it. What it
    returns gives them, in the slopes' dtype."""
    real = slopes.to(accumulate_dtype(slopes.device))
    if isinstance(sequences, Joined):
        pieces = _Pieces.of(sequences, real)
        finish = _begin_sums_behind(real, pieces) if origin is None else _begin_sums_of_least(real, pieces, origin)
        return lambda: finish().to(slopes.dtype)
    shared = backward_scan(real, sequences.links(real)) if origin is None else _of_runs(real, origin.column)
    return lambda: shared.to(slopes.dtype)


def _of_runs(slopes: Tensor, column: Tensor) -> Tensor:
    """Return the slopes of the tokens that took a ``column``, at that column."""
    of_runs = backward_scan(slopes, (column[:, 1:] == column[:, :-1]).to(slopes.dtype))
    return torch.where(column == torch.arange(column.shape[-1], device=column.device), of_runs, 0.0)


class _Pieces(NamedTuple):
    """The pieces of every sequence, in their order: those of a rank, and what all ranks tell of theirs."""

    joined: Joined
    here: Padded | Packed
    """Those of this rank as sequences."""
    shape: torch.Size
    """Of this rank's tokens, (B, T)."""

    @classmethod
    def of(cls, joined: Joined, values: Tensor) -> _Pieces:
        part = joined.part
        if joined.layout == "contiguous":
            return cls(joined, part, values.shape)
        rows, length = values.shape
        whole = torch.arange(rows + 1, device=values.device) * length
        bounds = part.cu_seqlens if isinstance(part, Packed) else whole
        halves = torch.stack([bounds[:-1], bounds[:-1] + bounds.diff() // 2], -1).flatten()
        return cls(joined, Packed.of(torch.cat([halves, bounds[-1:]]), values.numel()), values.shape)

    @property
    def of_a_rank(self) -> int:
        return 1 if self.here is self.joined.part else 2

    def cut(self, values: Tensor) -> Tensor:
        """Return token-sized values in the shape of the pieces."""
        return values.reshape(1, -1) if isinstance(self.here, Packed) else values

    def tell(self, name: Tensor, numbers: Tensor) -> None:
        """Let a number of each of this rank's pieces travel by this name."""
        self.joined.tell(name, numbers.view(-1, self.of_a_rank).T)

    def told(self, name: Tensor) -> Tensor:
        """Return the numbers of all pieces that travelled by this name, (S, pieces) in the order of the sequence."""
        everyones = self.joined.everyones(name)
        first, second = everyones[:, :1].flatten(0, 1), everyones[:, 1:].flatten(0, 1)
        return torch.cat([first, second.flip(0)]).T

    @property
    def own(self) -> list[int]:
        """The numbers of this rank's pieces."""
        group = self.joined.group
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        return [rank, 2 * ranks - 1 - rank][: self.of_a_rank]

    def expand(self, of_pieces: Tensor) -> Tensor:
        """Return numbers of all pieces (S, pieces) at the tokens of this rank's."""
        return self.here.expand(of_pieces[:, self.own].reshape(-1))


def _begin_sums(values: Tensor, pieces: _Pieces) -> Callable[[], Running]:
    values = pieces.cut(values)
    sums = forward_scan(values, pieces.here.links(values))
    pieces.tell(sums, pieces.here.last(sums, 0.0))

    def finish() -> Running:
        of_pieces = pieces.told(sums)
        before = _shifted(forward_scan(of_pieces, torch.ones_like(of_pieces[:, 1:])), 0.0)
        return Running((sums + pieces.expand(before)).view(pieces.shape))

    return finish


def _begin_least(values: Tensor, live: Tensor, pieces: _Pieces) -> Callable[[], Running]:
    values = pieces.cut(values)
    own = running_least(values, pieces.cut(live), pieces.here.links(values))
    pieces.tell(own.value, pieces.here.last(own.value, torch.inf))

    def finish() -> Running:
        value = pieces.told(own.value)
        # A piece without live tokens has +inf, which no live token takes: its own is not larger.
        of_pieces = running_least(value, torch.ones_like(value, dtype=torch.bool), torch.ones_like(value[:, 1:]))
        piece = _shifted(of_pieces.column, -1)
        before = Least(pieces.expand(_shifted(of_pieces.value, torch.inf)), pieces.expand(piece))
        taken = own.after(before)
        least = torch.where(taken, before.value, own.value).view(pieces.shape)
        return Running(least, Origin(torch.where(taken, -1, own.column), piece))

    return finish


def _begin_sums_behind(slopes: Tensor, pieces: _Pieces) -> Callable[[], Tensor]:
    slopes = pieces.cut(slopes)
    sums = backward_scan(slopes, pieces.here.links(slopes))
    pieces.tell(sums, pieces.here.sum(slopes, slopes.dtype))

    def finish() -> Tensor:
        of_pieces = pieces.told(sums)
        behind = _shifted(backward_scan(of_pieces, torch.ones_like(of_pieces[:, 1:])).flip(-1), 0.0).flip(-1)
        return (sums + pieces.expand(behind)).view(pieces.shape)

    return finish


def _begin_sums_of_least(slopes: Tensor, pieces: _Pieces, origin: Origin) -> Callable[[], Tensor]:
    """Slopes of tokens whose least is another piece's go there, to the token that is the least of all of that piece."""
    column, source = origin.column, origin.piece
    assert source is not None
    slopes = pieces.cut(slopes)
    sums = _of_runs(slopes, column)
    pieces.tell(sums, pieces.here.sum(torch.where(column < 0, slopes, 0.0), slopes.dtype))

    def finish() -> Tensor:
        of_pieces = pieces.told(sums)
        each = torch.arange(of_pieces.shape[1], device=source.device)
        to_each = torch.where(source[:, :, None] == each, of_pieces[:, :, None], 0.0).sum(1)
        takes = column == pieces.here.expand(pieces.here.last(column, -1))
        takes &= column == torch.arange(column.shape[-1], device=column.device)
        return torch.where(takes, sums + pieces.expand(to_each), sums).view(pieces.shape)

    return finish


def _shifted(of_pieces: Tensor, first: float) -> Tensor:
    """Return what is true of all pieces up to each, of those before it: ``first`` where there are none."""
    return torch.nn.functional.pad(of_pieces, (1, 0), value=first)[:, :-1]
