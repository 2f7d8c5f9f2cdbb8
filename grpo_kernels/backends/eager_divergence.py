"""Divergences of plain PyTorch's rows from a teacher's, and their gradient: any device and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.divergence import KINDS, Columns, minus
from .contract import DivergenceStats, RowGradients, Rows, RowStats
from .eager_gradient import row_gradient, row_gradients, times_cap_derivative_
from .eager_rows import Chunk, chunks_of, factor_of, load, several
from .spec import NUMBERS

_KINDS = tuple(KINDS.values())


class _Pair(NamedTuple):
    """Both distributions of a chunk, (rows, V); numbers of rows are (rows, 1)."""

    policy: Tensor
    """Values of the policy's logits."""
    distance: Tensor
    """t, as ``DivergenceStats`` has it; NaN where both columns are impossible."""
    p: Tensor
    q: Tensor
    factor: Tensor
    """s, of the policy's values."""
    shift: Tensor
    """Of the two rows' statistics alone."""

    def log_odds(self, shift: Tensor) -> Tensor:
        """Return d."""
        return torch.where(self.distance.isnan(), 0.0, self.distance * self.factor + shift)


class _Row(NamedTuple):
    """What a pair is made of, (B, T) each."""

    factor: Tensor
    teacher_factor: Tensor
    anchor: Tensor
    teacher_anchor: Tensor
    log_sum: Tensor
    teacher_log_sum: Tensor


def divergence(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, out: DivergenceStats
) -> None:
    mix = rows.numbers[NUMBERS.index("divergence_mix")]
    for chunk, pair, others in _pairs(rows, stats, teacher, teacher_stats, rows.live, *out):
        if pair is None:
            values = DivergenceStats(*[torch.zeros_like(others[0])] * len(out))
        else:
            values = _diverge(pair, kind, mix)
        live = rows.live[chunk.at].reshape(-1, 1)
        for output, value in zip(others, values, strict=True):
            output.copy_(torch.where(live, value, 0.0))


def _diverge(pair: _Pair, kind: int, mix: Tensor) -> DivergenceStats:
    shift = pair.shift - torch.log1p(_sum(minus(pair.p, pair.q, pair.log_odds(pair.shift))))
    d = pair.log_odds(shift)
    columns = _KINDS[kind].columns(pair.p, pair.q, d, mix)
    value = _sum(columns.term) + shift * 0  # NaN where either row has one
    centre = d.gather(-1, pair.policy.argmax(-1, keepdim=True))
    mean = _sum(torch.where(pair.p == 0, 0.0, pair.p * (columns.slope - _slope_at(kind, centre, mix))))
    if not _KINDS[kind].gradient_at_infinity:
        mean = torch.where(value == math.inf, math.nan, mean)
    return DivergenceStats(value, shift, centre, mean)


def divergence_backward(
    rows: Rows,
    stats: RowStats,
    teacher: Rows,
    teacher_stats: RowStats,
    kind: int,
    divergence: DivergenceStats,
    gradients: RowGradients,
    grad_divergence: Tensor,
    out: Tensor,
) -> None:
    mix = rows.numbers[NUMBERS.index("divergence_mix")]
    weight = torch.where(rows.live, grad_divergence, 0.0)
    own = row_gradients(rows, stats, gradients)
    read = own.read | (weight != 0)
    known = (weight, *divergence, *own.per_row)
    for chunk, pair, (weight, _, shift, centre, mean, *per_row) in _pairs(
        rows, stats, teacher, teacher_stats, read, *known
    ):
        place = rows.row_view(out)[chunk.at]
        if pair is None:
            place.zero_()
            continue
        columns = _KINDS[kind].columns(pair.p, pair.q, pair.log_odds(shift), mix)
        relative = (columns.slope - _slope_at(kind, centre, mix)) - mean
        gradient = columns.own + torch.where(pair.p == 0, 0.0, pair.p * relative)
        gradient = gradient + (mean + shift) * 0  # NaN in the whole row, where the row has one
        if rows.softcap:
            times_cap_derivative_(gradient, chunk, chunk.buffers[-1])
        gradient = torch.where(weight == 0, 0.0, gradient * pair.factor * weight)
        gradient += row_gradient(chunk, own.finite, *per_row)
        place.copy_(gradient.view_as(place))


def _pairs(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, read: Tensor, *per_row: Tensor
) -> Iterator[tuple[Chunk, _Pair | None, tuple[Tensor, ...]]]:
    """Walk over all rows and their teachers', chunk by chunk; None for the pair where it is known that none is read.
    ``per_row`` comes as views, (rows, 1) each."""
    known = _Row(
        factor_of(rows), factor_of(teacher), stats.anchor, teacher_stats.anchor, stats.log_sum, teacher_stats.log_sum
    )
    others = chunks_of(teacher, 1, read)
    for chunk, other in zip(chunks_of(rows, 2, read, *known, *per_row), others, strict=True):
        pair = None if chunk.dead else _pair(chunk, other, _Row(*chunk.per_row[: len(known)]))
        yield chunk, pair, chunk.per_row[len(known) :]


def _pair(chunk: Chunk, teacher: Chunk, row: _Row) -> _Pair:
    x, y = load(chunk, chunk.buffers[0].numbers), load(teacher, teacher.buffers[0].numbers)
    ratio = row.teacher_factor / row.factor
    distance = (x - ratio * y) - (row.anchor - ratio * row.teacher_anchor)
    p = torch.exp((x - row.anchor) * row.factor - row.log_sum)
    q = torch.exp((y - row.teacher_anchor) * row.teacher_factor - row.teacher_log_sum)
    return _Pair(x.clone(), distance, p, q, row.factor, row.teacher_log_sum - row.log_sum)


def _slope_at(kind: int, d: Tensor, mix: Tensor) -> Tensor | float:
    """Return the slope at d, which no probability has a part in."""
    columns: Columns = _KINDS[kind].columns(torch.ones_like(d), torch.ones_like(d), d, mix)
    return columns.slope


def _sum(values: Tensor) -> Tensor:
    """Return the sums of rows, (rows, 1)."""
    return several(values).sum(-1, keepdim=True)[: len(values)]
