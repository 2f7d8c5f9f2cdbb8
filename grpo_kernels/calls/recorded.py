"""Recorded sampling sets: the ids that a sampler kept of every row, as it kept them.

What top-k, top-p and min-p leave depends on the sampler's own logits: computed again by a trainer, ties and rounding
move tokens in and out, the drawn one among them. vLLM, SGLang and others therefore return the set of every token that
they draw ("Keep Sampling Mask", DeepSeek-V3.2, arXiv:2512.02556). With K the set of token t,

    ℓ_t = z_y - log Σ_{j∈K} exp(z_j),

and of a row only K is read and has a gradient; backends/sets.py has the maths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, Rows, RowStats
from ..backends.sets import Sets
from ..backends.sets import outside as outside_set
from ..objectives.checks import (
    INTEGER_DTYPES,
    check_device,
    check_no_transforms,
    check_tensors,
    fail,
    may_look,
    ordinary,
    read_mask,
)
from ..objectives.settings import read_integer, shown
from .autograd import once
from .tokens import RowTokens

READ = "support=Recorded(...) reads a row at its ids alone, in PyTorch; rows without a set take two passes"
"""The reason of a route."""
_SHOWN = 8
"""Ids of a set in a message."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """The ids that a sampler could draw from, of every token: ``support=`` of the losses and of log-probs.

    Log-probs, entropies and gradients are those of the distribution over a token's set; what is outside of it has no
    probability and a gradient of exactly 0. A token of an empty set was not recorded: it has the whole vocabulary.

    Args:
        ids: (n,) int32 or int64, the sets one after the other, in any order inside of one, none twice.
        offsets: (N+1,) integers, not falling, from 0 to n: token t of the flattened ``token_ids`` has
            ids[offsets[t]:offsets[t + 1]].
        shape: of the token tensors, whose product N is; left out: (N,). ``recorded[key]`` is of ``token_ids[key]``.

    Raises:
        ValueError, TypeError: shapes and dtypes that do not fit; on a CPU, or with checks on, offsets that do not.
    """

    ids: Tensor
    offsets: Tensor
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named = {"ids": self.ids, "offsets": self.offsets}
        for name, value in named.items():
            if not isinstance(value, Tensor):
                hint = "Recorded.from_lists(sets) takes a list of ids for every token"
                fail("Recorded", f"{name} to be a tensor", type(value).__name__, hint=hint, error=TypeError)
            check_tensors("Recorded", {name: value})
            if value.dtype not in INTEGER_DTYPES:
                fail("Recorded", f"integer {name}", str(value.dtype), named, error=TypeError)
            if value.dim() != 1:
                hint = "rows of ids padded with -1 are Recorded.from_counts(ids[ids >= 0], (ids >= 0).sum(-1))"
                fail("Recorded", f"{name} of one dimension", f"shape {tuple(value.shape)}", named, hint)
        check_device("Recorded", named)
        tokens = self.offsets.shape[0] - 1
        if tokens < 0 or (tokens == 0 and self.ids.shape[0] > 0):
            fail("Recorded", "offsets (N+1,) for N tokens", f"shape {tuple(self.offsets.shape)}", named)
        shape = tuple(self.shape) or (tokens,)
        object.__setattr__(self, "shape", shape)
        if (count := math.prod(shape)) != tokens:
            fail("Recorded", f"offsets ({count + 1},) for tokens {shape}", str(tuple(self.offsets.shape)), named)
        if may_look(self.offsets):
            self._check_offsets("Recorded", named)

    @classmethod
    def from_lists(cls, sets: Sequence[Any], mask: Tensor | None = None) -> Recorded:
        """Make them of lists of ids, on the CPU.

        Args:
            sets: a list of ids for every token, or for every sequence a list of these; an empty one where a token was
                not recorded. Arrays, tensors, sets and what has ids as its keys are as good as lists.
            mask: (B, T) or packed (N,), non-zero at the tokens that there are sets for, in their order: those that an
                engine drew, as the loss's mask where all of these count. None: there is one for every token.
        """
        check_tensors("Recorded.from_lists", {"mask": mask})
        lists = _read_lists(sets)
        first = next((one for one in lists if one), [0])
        nested = _has_length(first[0])
        if nested:
            _check_lengths([len(of_sequence) for of_sequence in lists], mask)
        tokens = _read_lists([one for of_sequence in lists for one in of_sequence]) if nested else lists
        counts = torch.tensor([len(one) for one in tokens], dtype=torch.int64)
        if nested and mask is None and len({len(of_sequence) for of_sequence in lists}) == 1:
            counts = counts.view(len(lists), -1)
        return cls.from_counts(_read_ids(tokens), counts, None if mask is None else mask.cpu())

    @classmethod
    def from_counts(cls, ids: Tensor, counts: Tensor, mask: Tensor | None = None) -> Recorded:
        """Make them of ids (n,) one after the other, and how many each token has.

        Args:
            ids: (n,) integers.
            counts: integers, of the shape of the token tensors, 0 where a token was not recorded; with a ``mask``, of
                its tokens alone, in their order.
            mask: as of ``from_lists``.
        """
        named = {"ids": ids, "counts": counts, "mask": mask}
        if not isinstance(counts, Tensor) or counts.dtype not in INTEGER_DTYPES:
            got = str(getattr(counts, "dtype", type(counts).__name__))
            fail("Recorded.from_counts", "counts to be an integer tensor", got, named, error=TypeError)
        check_tensors("Recorded.from_counts", {"counts": counts, "mask": mask})
        counts = counts.to(torch.int64)
        if mask is not None:
            live = read_mask("Recorded.from_counts", mask, named)
            if may_look(live) and int(live.sum()) != counts.numel():
                expected = f"a count for each of the mask's {int(live.sum())} tokens"
                hint = "the mask is of what the engine drew and returned sets for: no prompts, no padding"
                fail("Recorded.from_counts", expected, str(counts.numel()), named, hint)
            counts = torch.zeros_like(live, dtype=torch.int64).masked_scatter(live, counts.reshape(-1))
        if may_look(counts) and bool((counts < 0).any()):
            fail("Recorded.from_counts", "counts >= 0", str(int(counts.min())), named)
        ends = counts.reshape(-1).cumsum(0)
        return cls(ids, torch.cat([ends.new_zeros(1), ends]), tuple(counts.shape))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Recorded:
        """Return them on a device."""
        ids, offsets = (x.to(device, non_blocking=non_blocking) for x in (self.ids, self.offsets))
        return Recorded(ids, offsets, self.shape)

    def __getitem__(self, key: Any) -> Recorded:
        """Return the sets of ``token_ids[key]``, for any key that a tensor of their shape takes. Waits for a device."""
        tokens = torch.arange(self.offsets.shape[0] - 1, device=self.offsets.device).view(self.shape)[key]
        first, flat = self.offsets[:-1].to(torch.int64), tokens.reshape(-1)
        counts = self.offsets.to(torch.int64).diff()[flat]
        ends = counts.cumsum(0)
        places = torch.arange(int(counts.sum()), device=flat.device)
        places = places + torch.repeat_interleave(first[flat] - (ends - counts), counts)
        return Recorded.from_counts(self.ids[places], counts.view(tokens.shape))

    def __len__(self) -> int:
        """Return the first extent of ``shape``."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Recorded({self.ids.shape[0]} ids of tokens {self.shape}, {self.ids.device})"

    def _check_offsets(self, function: str, named: Mapping[str, object]) -> None:
        offsets, count = self.offsets, self.ids.shape[0]
        expected = f"offsets that do not fall, from 0 to {count}, the number of ids"
        if bool((falling := offsets[1:] < offsets[:-1]).any()):
            at = int(falling.nonzero()[0])
            fail(function, expected, f"offsets[{at}:{at + 2}] = {offsets[at : at + 2].tolist()}", named)
        if int(offsets[0]) != 0 or int(offsets[-1]) != count:
            fail(function, expected, f"from {int(offsets[0])} to {int(offsets[-1])}", named)


def _has_length(one: object) -> bool:
    return hasattr(one, "__len__") and not isinstance(one, (str, bytes)) and getattr(one, "ndim", 1) > 0


def _read_lists(sets: Sequence[Any]) -> list[list[Any]]:
    """Return lists, of ids or of lists of them. Raise for what has no length."""
    if not _has_length(sets):
        expected = "lists of ids, one for every token or for every sequence"
        fail("Recorded.from_lists", expected, type(sets).__name__, error=TypeError)
    for place, one in enumerate(sets):
        if not _has_length(one):
            expected = "a list of ids for every token, or of such lists for every sequence"
            hint = "a token without a set has an empty list"
            fail("Recorded.from_lists", expected, f"{one!r} at {place}", hint=hint, error=TypeError)
    return [one.tolist() if hasattr(one, "tolist") else list(one) for one in sets]


def _read_ids(tokens: list[list[Any]]) -> Tensor:
    """Return the ids of all tokens, one after the other. Raise where one is no integer."""
    flat = []
    for place, one in enumerate(tokens):
        for token in one:
            number = read_integer(token)
            if number is None or not -(2**63) <= number < 2**63:
                got = f"{shown(token)} in the set of token {place}"
                fail("Recorded.from_lists", "ids that are integers, of 64 bits at most", got, error=TypeError)
            flat.append(number)
    return torch.tensor(flat, dtype=torch.int64)


def _check_lengths(lengths: list[int], mask: Tensor | None) -> None:
    """Raise unless every sequence of a padded mask has as many sets as it has live tokens."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != len(lengths):
        return
    live = (mask != 0).sum(-1).tolist()
    for sequence, (wanted, length) in enumerate(zip(live, lengths, strict=True)):
        if wanted != length:
            expected = f"{wanted} lists of ids in sequence {sequence}, one for each of the mask's tokens"
            hint = "the mask is of what the engine drew and returned sets for: no prompts, no padding"
            fail("Recorded.from_lists", expected, str(length), {"mask": mask}, hint)


def check_recorded(tokens: RowTokens, inplace: bool = False) -> None:
    """Raise for what recorded sets do not go with."""
    if inplace:
        expected = "inplace=False with support=Recorded(...), whose gradient is zeros but at its ids"
        fail(tokens.function, expected, "inplace=True", tokens.tensors)
    if tokens.shard is not None:
        hint = "leave vocab_group= and vocab_size= out: logits of the whole vocabulary, whose ids are in the sets"
        expected = "support=Recorded(...) with a whole vocabulary"
        fail(tokens.function, expected, "one over several ranks, or cut at vocab_size=", tokens.tensors, hint)


def read_sets(tokens: RowTokens, support: Recorded) -> Sets:
    """Return the sets of a call's tokens. Nothing is read outside of them, whatever the offsets are."""
    function, named = tokens.function, {**tokens.tensors, "ids": support.ids, "offsets": support.offsets}
    check_device(function, named)
    check_no_transforms(function, (support.ids, support.offsets))
    count = tokens.token_ids.numel()
    if support.shape != (count,):
        allowed = {tuple(tokens.shape), tuple(tokens.live.shape), (count,)}
        if support.shape not in allowed:
            expected = f"support=Recorded(...) of tokens {tuple(tokens.shape)}"
            hint = "sets belong to predicted tokens: recorded[:, 1:] beside token_ids that align shifted"
            fail(function, expected, str(support.shape), named, hint)
    looks = may_look(support.ids, tokens.checks)
    if looks:
        support._check_offsets(function, named)
    offsets = support.offsets.to(torch.int64)
    if not looks:
        offsets = offsets.clamp(0, support.ids.shape[0]).cummax(0).values
    ids, offsets = ordinary(support.ids.to(torch.int64).contiguous(), offsets.contiguous())
    sets = Sets(ids, offsets)
    if looks:
        _check_sets(tokens, sets, named)
    return sets


def _check_sets(tokens: RowTokens, sets: Sets, named: Mapping[str, object]) -> None:
    """Raise where a live token's set has an id outside of the vocabulary or twice, or lacks the token."""
    function, length, row = tokens.function, tokens.token_ids.shape[1], sets.row
    live, drawn = tokens.live.view(-1), tokens.token_ids.view(-1)
    outside = ((sets.ids < 0) | (sets.ids >= tokens.vocab)) & live[row]
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        got = f"{int(sets.ids[at])} in the set of token {list(divmod(int(row[at]), length))}"
        hint = "padding (-1, or 0 beyond a set's size) is no id: Recorded.from_counts(ids[valid], valid.sum(-1))"
        fail(function, f"recorded ids in [0, {tokens.vocab})", got, named, hint, IndexError)
    missing = outside_set(tokens.token_ids, tokens.live, sets)
    if bool(missing.any()):
        at = int(missing.nonzero()[0])
        first, last = sets.offsets[at : at + 2].tolist()
        shown = ", ".join(map(str, sets.ids[first : min(last, first + _SHOWN)].tolist()))
        more = f", ... ({last - first} ids)" if last - first > _SHOWN else ""
        position = ", ".join(map(str, divmod(at, length)))
        got = f"token_ids[{position}] = {int(drawn[at])} and the set {{{shown}{more}}}"
        hint = "is a set one token off? What no sampler drew (a tool's output, a forced token) has an empty set"
        fail(function, "every live token in its recorded set", got, named, hint)
    keys = (row * tokens.vocab + sets.ids)[live[row]].sort().values
    twice = keys[1:] == keys[:-1]
    if bool(twice.any()):
        token, column = divmod(int(keys[1:][twice][0]), tokens.vocab)
        got = f"{column} twice in the set of token {list(divmod(token, length))}"
        fail(function, "recorded sets without an id twice", got, named)


class RecordedLogProbs(torch.autograd.Function):
    """Log-probs and entropies over recorded sets, differentiable in both."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, sets: Sets, backend: str) -> tuple[Tensor, Tensor]:
        stats = ops.set_log_probs(rows._replace(logits=logits), sets, backend)
        ctx.save_for_backward(logits, *rows[1:4], rows.temperature, *sets, *stats)
        ctx.set_materialize_grads(False)
        ctx.softcap, ctx.backend = rows.softcap, backend
        return stats.log_prob, stats.entropy

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None and h is None:
            return None, None, None, None
        logits, token_ids, live, numbers, temperature, ids, offsets, *stats = ctx.saved_tensors
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap, temperature)
        gradients = RowGradients(*(None if slope is None else slope.contiguous() for slope in (g, h)))
        sets, known = Sets(ids, offsets), RowStats(*stats)
        return ops.set_log_probs_backward(rows, sets, known, gradients, ctx.backend), None, None, None


def recorded_log_probs(rows: Rows, sets: Sets, backend: str) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies over recorded sets, (B, T), differentiable in the rows' logits where gradients
    are on; NaN where a token is outside of its set."""
    if torch.is_grad_enabled() and rows.logits.requires_grad:
        outputs: tuple[Tensor, Tensor] = RecordedLogProbs.apply(rows.logits, rows, sets, backend)
        return outputs
    stats = ops.set_log_probs(rows._replace(logits=rows.logits.detach()), sets, backend)
    return stats.log_prob, stats.entropy
