"""Rows at some columns alone, a set of columns for each row: of a row's V logits only the set's are read.

With K the set of a row, z_j = value_j·factor and y its token,

    ℓ_y = z_y - log Σ_{j∈K} exp(z_j),    H = -Σ_{j∈K} p_j log p_j,    ∂ℓ_y/∂z_j = 1[j = y] - p_j on K, 0 elsewhere.

Plain PyTorch on every device: what is computed has the size of the sets. Sums run in one order, in fp64 wherever the
device has it. ``gather`` and ``scatter_`` are the two ways between rows and sets; what lies between them takes logits
from wherever they come (``calls/recorded_head.py`` makes them of hidden states).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.maths import weighed
from ..objectives.sequences import accumulate_dtype, segment_max, sequence_sum
from .contract import RowGradients, Rows, RowStats
from .eager_rows import capped, factor_of


class Sets(NamedTuple):
    """Columns of the vocabulary, some for each of the rows (B, T), one after the other: compressed rows (CSR)."""

    ids: Tensor
    """int64 (n,)"""
    offsets: Tensor
    """int64 (B·T+1,), not falling, from 0 to n: row r has ids[offsets[r]:offsets[r + 1]]."""

    @property
    def filled(self) -> Tensor:
        """Return, bool (B·T,), which rows have any."""
        return self.offsets[1:] > self.offsets[:-1]

    @property
    def row(self) -> Tensor:
        """Return the row of each id, int64 (n,), among the flattened (B, T)."""
        positions = torch.arange(self.ids.shape[0], device=self.ids.device)
        row = torch.searchsorted(self.offsets[1:], positions, right=True)
        return row.clamp(max=max(self.offsets.shape[0] - 2, 0))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums (B·T,) of values (n,) over each row's set, in the accumulation dtype; 0 of an empty one."""
        return sequence_sum(values.to(accumulate_dtype(values.device)), self.offsets)

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of values (n,) in each row's set, (B·T,); -inf of an empty one."""
        return segment_max(values, self.offsets)

    def any(self, flags: Tensor) -> Tensor:
        """Return, bool (B·T,), in which row's set a flag (n,) is true."""
        return self.largest(flags.to(torch.float32)) > 0


class Entries(NamedTuple):
    """The ids of all sets beside what their rows have there, (n,) each."""

    row: Tensor
    """int64, among the flattened (B, T)."""
    column: Tensor
    """int64: the id, 0 where it is none of the vocabulary."""
    inside: Tensor
    """bool: where it is one."""
    value: Tensor
    """The logit, under a softcap the capped one; fp32, fp64 where logits are."""
    factor: Tensor
    """z over the value."""
    slope: Tensor
    """∂z/∂logit"""


def places(sets: Sets, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Entries.row``, ``column`` and ``inside``."""
    inside = (sets.ids >= 0) & (sets.ids < vocab)
    return sets.row, torch.where(inside, sets.ids, 0), inside


def gather(rows: Rows, sets: Sets) -> Entries:
    """Return what the rows' logits are at their sets' ids."""
    row, column, inside = places(sets, rows.vocab)
    length = max(rows.token_ids.shape[1], 1)
    return entries(rows, row, column, inside, rows.row_view(rows.logits)[row // length, row % length, column])


def entries(rows: Rows, row: Tensor, column: Tensor, inside: Tensor, logits: Tensor) -> Entries:
    """Return entries of the logits (n,) at these places; ``rows`` say what z is made of them, without their logits."""
    value = logits.to(rows.numbers.dtype)
    factor = factor_of(rows).view(-1)[row]
    if not rows.softcap:
        return Entries(row, column, inside, value, factor, factor)
    value, slope = capped(value, rows.numbers)
    return Entries(row, column, inside, value, factor, factor * slope)


def scatter_(out: Tensor, rows: Rows, at: Entries, values: Tensor) -> None:
    """Write values (n,) into ``out``, shaped like the logits, at the places of the entries: each is rounded once."""
    length = max(rows.token_ids.shape[1], 1)
    rows.row_view(out)[at.row // length, at.row % length, at.column] = values.to(out.dtype)


def outside(token_ids: Tensor, live: Tensor, sets: Sets) -> Tensor:
    """Return, bool (B·T,), which live rows' token is not in their set, where they have one."""
    drawn = sets.ids == token_ids.view(-1)[sets.row]
    return live.view(-1) & sets.filled & ~sets.any(drawn)


def set_stats(rows: Rows, sets: Sets, at: Entries) -> RowStats:
    """Return the statistics of every row over its set, (B, T).

    0 where a row is dead or its set is empty; NaN, all four, where the token or an id is outside (an id of the
    vocabulary, the token of its set).
    """
    ids, live = rows.token_ids.view(-1), rows.live.view(-1) & sets.filled
    drawn = sets.ids == ids[at.row]
    anchor = sets.largest(at.value)
    power = (at.value - anchor[at.row]) * at.factor
    own = (sets.largest(torch.where(drawn, at.value, -math.inf)) - anchor) * factor_of(rows).view(-1)
    p = power.exp()
    # Where the token is the largest it stays out of the sum: a confident one keeps its digits.
    others = sets.sum(torch.where(drawn, 0.0, p))
    log_sum = torch.where(own == 0, torch.log1p(others), torch.log(others + own.exp()))
    spread = sets.sum(torch.where(p == 0, 0.0, p * -power))
    entropy = log_sum + spread / (others + own.exp())
    wrong = outside(rows.token_ids, rows.live, sets) | sets.any(~at.inside)
    stats = []
    for values in (own - log_sum, entropy, anchor, log_sum):
        values = torch.where(wrong, math.nan, values.to(rows.numbers.dtype))
        stats.append(torch.where(live, values, 0.0).view_as(rows.token_ids))
    return RowStats(*stats)


def set_gradient(rows: Rows, sets: Sets, at: Entries, stats: RowStats, gradients: RowGradients) -> Tensor:
    """Return the loss's gradient in the logit of every entry, (n,), 0 in dead rows.

    With g = ∂loss/∂ℓ and h = ∂loss/∂H: [g·(1[j = y] - p_j) - h·p_j·(log p_j + H)]·∂z_j/∂logit_j, where 1 - p_y is
    -expm1(ℓ), which keeps its digits where p_y is near 1. A slope of 0 wins over what its row may hold.
    """
    log_prob, entropy, anchor, log_sum = (values.view(-1)[at.row] for values in stats)
    live = rows.live.view(-1)[at.row]
    drawn = sets.ids == rows.token_ids.view(-1)[at.row]
    log_p = torch.where(drawn, log_prob, (at.value - anchor) * at.factor - log_sum)
    p = log_p.exp()
    total = torch.zeros_like(p)
    for slope, direction in (
        (gradients.grad_log_prob, torch.where(drawn, -torch.expm1(log_prob), -p)),
        (gradients.grad_entropy, torch.where(p == 0, 0.0, -p * (log_p + entropy))),
    ):
        if slope is not None:
            total = total + weighed(slope.view(-1)[at.row], direction * at.slope)
    return torch.where(live, total, 0.0)
