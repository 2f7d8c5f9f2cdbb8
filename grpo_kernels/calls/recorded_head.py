"""Recorded sampling sets from hidden states: the logits of a set from as many rows of the head.

    z_k = hidden·W[id_k],    ∂loss/∂hidden = Σ_k g_k·W[id_k],    ∂loss/∂W[v] = Σ_{k: id_k = v} g_k·hidden,

k running over the ids of all sets: 2·n·H FLOPs for n ids and 4·n·H backward, where 2·N·H·V make the logits of N whole
rows. What is gathered is read once for each id, while a GEMM reuses what it reads, so that from some share of the
vocabulary on (``SHARES``) whole rows are computed, and the sets taken of them. Which of the two follows from shapes
alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..backends.contract import RowGradients, Rows, RowStats
from ..backends.sets import Entries, Sets, entries, places, set_gradient, set_stats
from ..objectives.sequences import segment_sum
from .divergence import Stats
from .head import HeadGradients, HeadTensors, Wants, without_autocast
from .sweep import Slopes, Sweep

CPU_IDS = 512
"""Ids whose rows are gathered at a time on a CPU, at most: what is made of them stays in its cache."""
SHARES = {"cpu": 256, "cuda": 190}
"""Ids are gathered where all sets together have at most this part of the N·V logits, by kind of device: a GEMM makes
that many logits in the time of one that is gathered. Measured on a CPU; for GPUs from bytes and FLOPs, not yet
measured."""


def gathers(device: str, ids: int, tokens: int, vocab: int) -> bool:
    """Whether the logits of sets are made by gathering rows of the head."""
    return ids * SHARES.get(device, SHARES["cuda"]) <= tokens * vocab


@dataclass(frozen=True)
class Gathered:
    """What a sweep over gathered rows of the head has beside one over whole rows."""

    rows: Rows
    """(B, T), without logits."""
    sets: Sets
    at_once: int
    """Ids whose rows of the head are gathered at a time."""
    unrecorded: Sweep | None
    """Over the live rows without a set; its gradients stay in fp32 (fp64). None where there is none."""


@dataclass(frozen=True)
class GatheredSweep(Sweep):
    """A sweep over live rows, whose log-probs are those over recorded sets."""

    gathered: Gathered | None = None

    def log_probs(self, head: HeadTensors) -> Stats:
        """Return the statistics of the live rows, (1, n)."""
        rows, sets, unrecorded = self._given
        with without_autocast(head.hidden.device.type):
            stats = set_stats(rows, sets, self._entries(head))
        if unrecorded is not None:
            filled = sets.filled.view_as(rows.live)
            whole = map(unrecorded.live_rows.scatter, unrecorded.log_probs(head))
            stats = RowStats(*(torch.where(filled, a, b) for a, b in zip(stats, whole, strict=True)))
        return tuple(map(self.live_rows.take, stats))

    def gradients(self, wants: Wants, head: HeadTensors, stats: Stats, slopes: Slopes) -> HeadGradients:
        """Return those of (B, T) slopes, in the tensors' own dtypes: each is rounded once."""
        rows, sets, unrecorded = self._given
        known, whole = RowStats(*map(self.live_rows.scatter, stats)), HeadGradients()
        if unrecorded is not None:
            of_whole = tuple(map(unrecorded.live_rows.take, known))
            whole = unrecorded.gradients(wants, head, of_whole, slopes)
        with without_autocast(head.hidden.device.type):
            at = self._entries(head)
            of_ids = set_gradient(rows, sets, at, known, RowGradients(slopes.log_prob, slopes.entropy))
            made = self._gradients_of_sets(wants, head, at, of_ids, whole)
        both = zip(made, head, strict=True)
        return HeadGradients(*(g if g is None or t is None else g.to(t.dtype) for g, t in both))

    def of_its_own(self) -> Self:
        """Return the same without tensors of the caller's."""
        rows, sets, unrecorded = self._given
        assert self.gathered is not None
        gathered = dataclasses.replace(
            self.gathered,
            rows=rows._replace(token_ids=rows.token_ids.clone(), live=rows.live.clone()),
            sets=Sets(*(tensor.clone() for tensor in sets)),
            unrecorded=None if unrecorded is None else unrecorded.of_its_own(),
        )
        return dataclasses.replace(super().of_its_own(), gathered=gathered)

    @property
    def _given(self) -> tuple[Rows, Sets, Sweep | None]:
        assert self.gathered is not None
        return self.gathered.rows, self.gathered.sets, self.gathered.unrecorded

    def _entries(self, head: HeadTensors) -> Entries:
        """Return the entries of all sets: products of operands in their dtype, added in fp32, rounded to the logits'
        dtype as those of a whole head are."""
        rows, sets, _ = self._given
        row, column, inside = places(sets, head.weight.shape[0])
        real, logits = rows.numbers.dtype, []
        for part in self._parts(row.shape[0]):
            total = None if head.bias is None else head.bias[column[part]].to(real)
            for states, weight in zip(head.states, head.weights, strict=True):
                products = self._states(states, row[part]).to(real) * self._operand(weight[column[part]]).to(real)
                total = products.sum(-1) if total is None else total + products.sum(-1)
            assert total is not None
            logits.append(total.to(self.dtype))
        return entries(rows, row, column, inside, torch.cat(logits) if logits else head.hidden.new_empty(0))

    def _gradients_of_sets(
        self, wants: Wants, head: HeadTensors, at: Entries, slopes: Tensor, whole: HeadGradients
    ) -> HeadGradients:
        """Return those of the logits' ``slopes`` (n,), added to ``whole``, in fp32 (fp64)."""
        row, column = at.row, at.column
        order = torch.argsort(column, stable=True) if any((*wants.weights, wants.bias)) else column
        real = slopes.dtype

        def total(tensor: Tensor, added: Tensor | None) -> Tensor:
            """Return ``added``, or zeros, flat in front, and a spare row."""
            flat = tensor.new_zeros(tensor.shape[:-1].numel() + 1, tensor.shape[-1], dtype=real)
            if added is not None:
                flat[:-1] = added.flatten(0, -2)
            return flat

        of_states: list[Tensor | None] = []
        of_weights: list[Tensor | None] = []
        each = zip(head.states, head.weights, wants.states, wants.weights, strict=False)
        added = ((whole.hidden, whole.weight), (whole.adapter_states, whole.adapter_weight))
        for (states, weight, wants_states, wants_weight), (from_states, from_weight) in zip(each, added, strict=False):
            of_states.append(None)
            of_weights.append(None)
            if wants_states:
                sums = total(states, from_states)
                for part in self._parts(row.shape[0]):
                    products = self._operand(weight[column[part]]).to(real).mul_(slopes[part, None])
                    add_sorted_(sums, self._state_row(states, row[part]), weighed_rows(products, slopes[part]))
                of_states[-1] = sums[:-1].view(states.shape)
            if wants_weight:
                sums = total(weight, from_weight)
                for part in self._parts(row.shape[0]):
                    some = order[part]
                    products = self._states(states, row[some]).to(real).mul_(slopes[some, None])
                    add_sorted_(sums, column[some], weighed_rows(products, slopes[some]))
                of_weights[-1] = sums[:-1]
        bias = None
        if wants.bias and head.bias is not None:
            sums = total(head.bias[:, None], None if whole.bias is None else whole.bias[:, None])
            for part in self._parts(row.shape[0]):
                add_sorted_(sums, column[order[part]], slopes[order[part], None])
            bias = sums[:-1, 0]
        hidden, *adapter_states = of_states
        weight_gradient, *adapter_weight = of_weights
        return HeadGradients(hidden, weight_gradient, bias, *adapter_states, *adapter_weight)

    def _parts(self, count: int) -> Iterator[slice]:
        assert self.gathered is not None
        at_once = self.gathered.at_once
        return (slice(first, first + at_once) for first in range(0, count, at_once))

    def _operand(self, gathered: Tensor) -> Tensor:
        return gathered.to(self.operands)

    def _states(self, states: Tensor, row: Tensor) -> Tensor:
        return self._operand(states.flatten(0, -2)[self._state_row(states, row)])

    def _state_row(self, states: Tensor, row: Tensor) -> Tensor:
        """Return which of the flattened states, whose last one of a sequence may be unused, a token's row is."""
        length = max(self.live_rows.shape[1], 1)
        return row // length * states.shape[-2] + row % length


def weighed_rows(products: Tensor, slopes: Tensor) -> Tensor:
    """Return products with slopes, in place: 0 where a slope is, whatever its row holds."""
    return products.masked_fill_((slopes == 0)[:, None], 0)


def add_sorted_(total: Tensor, keys: Tensor, values: Tensor) -> None:
    """Add rows of values (c, K), whose keys do not fall, to the rows of ``total`` (one of them spare at the end) with
    these numbers: each sum in one order, so that it repeats bit for bit, and without waiting for how many there are."""
    if total.device.type == "cpu":
        total.index_add_(0, keys, values)  # in order there; segment_reduce of rows takes 60 times as long
        return
    add_segments_(total, keys, values)


def add_segments_(total: Tensor, keys: Tensor, values: Tensor) -> None:
    """Do so where ``index_add_`` has no order of its own."""
    count = keys.shape[0]
    if count == 0:
        return
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    segment = begins.cumsum(0) - 1
    numbers = torch.arange(count + 1, device=keys.device)
    offsets = torch.searchsorted(segment, numbers)
    sums = segment_sum(values, offsets)
    first = offsets[:-1].clamp(max=count - 1)
    target = torch.where(offsets[:-1] < count, keys[first], total.shape[0] - 1)
    total[target] += sums
