"""Truncated support: log-probs renormalised over the tokens that a sampler could draw.

A sampler with top-k, top-p or min-p draws from p restricted to a set S and renormalised. Its log-prob of a token is
ℓ - log Σ_{j∈S} p_j; compared with a policy's ℓ over the whole vocabulary, every ratio is off by the kept mass. Here
log-probs, entropies and gradients are those of the renormalised distribution, exactly. Rows are copied some at a time,
with -inf outside of S, and handed to the kernels: two passes, and no second tensor of the logits' size. A softcap is
applied to the copies first: it would turn the -inf into -cap, and bring every column back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..backends.contract import RowGradients, Rows, RowStats
from ..backends.eager_rows import capped
from ..backends.spec import LogitArgs, numbers_vector, without_softcap
from ..objectives.checks import check_device, check_no_transforms, check_shape, fail, ordinary, read_mask
from ..objectives.compiler import outside_graphs
from ..objectives.groups import gather, ordered_sum
from ..objectives.maths import weighed
from ..objectives.settings import is_number, plain, shown
from .autograd import once
from .contents import check_ids
from .recorded import READ, Recorded, check_recorded
from .tokens import RowTokens
from .vocabulary import VocabShard, row_gradient_, row_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_ELEMENTS = 1 << 22
"""Logits copied at a time."""


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens; ties with the last of them stay, as in vLLM and transformers."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", plain(self.k))
        if not (isinstance(self.k, int) and not isinstance(self.k, bool) and self.k >= 1):
            raise ValueError(f"TopK(k) must be an integer >= 1; got {shown(self.k)}.")

    def lowest(self, z: Tensor, shard: VocabShard | None) -> Tensor:
        """Return (n, 1): the smallest of each row that is kept, of z (n, V), or of this rank's columns of it."""
        largest = z.topk(min(self.k, z.shape[-1]), -1).values
        if shard is not None and shard.group is not None:  # each rank's k largest have the whole row's among them
            missing = min(self.k, shard.vocab) - largest.shape[-1]
            padded = torch.nn.functional.pad(largest, (0, missing), value=float("-inf"))
            everyones = gather(padded, shard.group).transpose(0, 1).flatten(1)
            largest = everyones.topk(padded.shape[-1], -1).values
        return largest[:, -1:]


@dataclass(frozen=True)
class TopP:
    """The smallest set of the most likely tokens whose probability is at least p; ties with the last stay."""

    p: float

    def __post_init__(self) -> None:
        _check_share(self)

    def lowest(self, z: Tensor, shard: VocabShard | None) -> Tensor:
        if self.p == 1:  # everything: rounded, masses reach 1 before the last token
            return z.new_full((len(z), 1), float("-inf"))
        if shard is not None and shard.group is not None:
            return _lowest_by_mass(z, self.p, shard.group)
        ordered = z.sort(-1, descending=True).values
        p = torch.softmax(ordered, -1)
        shares = (p * _WHOLE).to(torch.int64)  # CUDA has no deterministic running sum of floats
        before = shares.cumsum(-1) - shares
        last = ((before < int(self.p * _WHOLE)) & (p > 0)).sum(-1, keepdim=True).clamp(min=1) - 1
        return ordered.gather(-1, last)


@dataclass(frozen=True)
class MinP:
    """Tokens at least p times as likely as the most likely one."""

    p: float

    def __post_init__(self) -> None:
        _check_share(self)

    def lowest(self, z: Tensor, shard: VocabShard | None) -> Tensor:
        return _largest(z, None if shard is None else shard.group) + math.log(self.p)


_WHOLE = 2.0**60
"""A probability of 1, where masses are counted in integers: their sums do not depend on an order."""


def _largest(z: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return (n, 1): the largest of each row, over the columns of all ranks."""
    none = z.new_full((z.shape[0], 1), float("-inf"))
    largest = torch.cat([z, none], -1).amax(-1, keepdim=True)
    return largest if group is None else gather(largest, group).amax(0)


def _lowest_by_mass(z: Tensor, p: float, group: ProcessGroup) -> Tensor:
    """Return (n, 1): the smallest value of each row with less than ``p`` of the probability above it.

    By bisection over the numbers of the dtype: as many collectives of one number a row as it has bits, none of columns.
    """
    largest = _largest(z, group)
    powers = (z - largest).exp()
    probability = powers / ordered_sum(powers.sum(-1, keepdim=True), group)
    shares, wanted = (probability * _WHOLE).to(torch.int64), int(p * _WHOLE)
    keys = _keys(z)
    possible = torch.where(probability > 0, keys, _keys(largest))
    low = -gather(torch.cat([-possible, -_keys(largest)], -1).amax(-1, keepdim=True), group).amax(0)
    high = _keys(largest)  # nothing is above it
    for _ in range(z.dtype.itemsize * 8):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        mass = ordered_sum(torch.where(keys > middle, shares, 0).sum(-1, keepdim=True), group)
        low, high = torch.where(mass < wanted, low, middle + 1), torch.where(mass < wanted, middle, high)
        low = torch.minimum(low, high)
    return _values(high, z.dtype)


def _keys(values: Tensor) -> Tensor:
    """Return integers, int64, in the order of floating-point numbers: the bits of negative ones count downwards."""
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).to(torch.int64)


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    bits = keys.to(torch.int64 if dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).view(dtype)


def _check_share(support: TopP | MinP) -> None:
    object.__setattr__(support, "p", plain(support.p))
    if not (is_number(support.p) and 0 < support.p <= 1):
        raise ValueError(f"{type(support).__name__}(p) must be in (0, 1]; got {shown(support.p)}.")


Filter: TypeAlias = TopK | TopP | MinP
Filtered: TypeAlias = Filter | tuple[Filter, ...] | Tensor
"""One filter, several in the sampler's order (each renormalises what the one before left), or a bool mask."""
Support: TypeAlias = Filtered | Recorded


def how_read(support: Support) -> str:
    """Return why a call with ``support=`` takes two passes."""
    return READ if isinstance(support, Recorded) else "support= works on copies of the rows"


def check_support(tokens: RowTokens, support: Support, inplace: bool = False) -> None:
    """Raise for what a support does not go with."""
    if isinstance(support, Recorded):
        check_recorded(tokens, inplace)
    elif inplace:
        expected = "inplace=False with support=, whose gradient is made of copies"
        fail(tokens.function, expected, "inplace=True", tokens.tensors)


def said_of(tokens: RowTokens, support: Support | None, logit_args: LogitArgs) -> str:
    """Return a support in words, for ranks of a vocabulary to compare; raise for one that does not fit."""
    none = support is None or isinstance(support, Recorded)  # of a vocabulary over ranks: check_recorded
    return "None" if none else Supported.of(tokens, support, logit_args).said  # type: ignore[arg-type]


@dataclass(frozen=True)
class Supported:
    """Rows, and which columns of them count. The drawn token always does: the sampler had it in its set."""

    rows: Rows
    shard: VocabShard | None
    filters: tuple[Filter, ...]
    mask: Tensor | None
    """(B·T, V)"""
    lowest: Tensor
    """(B·T, 1), of each row the smallest z that the filters keep, found with the log-probs: backward asks no rank."""

    @classmethod
    def of(cls, tokens: RowTokens, support: Filtered, logit_args: LogitArgs) -> Supported:
        numbers = numbers_vector(logit_args, 1.0, None, tokens.real, tokens.states.device)
        rows = tokens.rows(numbers, logit_args.logit_softcap is not None)
        check_ids(tokens, always=rows.logits.device.type == "cpu")  # rows are numbered anew below
        lowest = torch.full((rows.token_ids.numel(), 1), float("-inf"), dtype=tokens.real, device=numbers.device)
        if isinstance(support, Tensor):
            shape, named = (*tokens.shape, tokens.columns), {**tokens.tensors, "support": support}
            check_shape(tokens.function, "support", support, (shape,), named)
            check_device(tokens.function, named)
            check_no_transforms(tokens.function, (support,))
            mask = read_mask(tokens.function, support, named, name="support").reshape(-1, tokens.columns)
            return cls(rows, tokens.shard, (), mask, lowest)
        filters = support if isinstance(support, tuple) else (support,)
        if not filters or not all(isinstance(one, (TopK, TopP, MinP)) for one in filters):
            expected = "support=TopK(k), TopP(p), MinP(p), a tuple of them, a bool mask (*token_ids.shape, V), Recorded"
            fail(tokens.function, expected, repr(support), tokens.tensors, error=TypeError)
        return cls(rows, tokens.shard, filters, None, lowest)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What is the caller's, beside the logits: backward saves it, and ``of_tensors`` takes it again."""
        return self.mask, self.rows.token_ids, self.rows.live, self.rows.temperature

    def of_tensors(self, logits: Tensor, mask: Tensor | None, *of_rows: Tensor | None) -> Supported:
        """Return the same of other logits, mask and tensors of rows."""
        named = dict(zip(("token_ids", "live", "temperature"), of_rows, strict=True))
        return dataclasses.replace(self, rows=self.rows._replace(logits=logits, **named), mask=mask)  # type: ignore[arg-type]

    def log_probs(self, backend: str) -> RowStats:
        """Return the statistics (B, T) of the renormalised distribution, which temperature is part of."""
        stats = [torch.zeros_like(self.rows.token_ids, dtype=self.rows.numbers.dtype) for _ in range(4)]
        for part, index, _ in self._parts(find=True):
            for total, values in zip(stats, row_stats(part, self.shard, backend), strict=True):
                total.view(-1)[index] = values[0]
        return RowStats(*stats)

    def gradient(self, backend: str, stats: RowStats, gradients: RowGradients) -> Tensor:
        """Return that in the logits, from slopes in log-probs and entropies, (B, T)."""
        rows = self.rows
        out = torch.zeros_like(rows.logits, memory_format=torch.contiguous_format)
        target, length = rows.row_view(out)[..., : self._columns], rows.token_ids.shape[1]
        for part, index, slope in self._parts(find=False):
            values = [None if x is None else x.reshape(-1)[index][None] for x in (*stats, *gradients)]
            row_gradient_(part, RowStats(*values[:4]), RowGradients(*values[4:]), self.shard, backend)  # type: ignore[arg-type]
            gradient = part.logits[0] if slope is None else weighed(part.logits[0], slope)
            target[index // length, index % length] = gradient.to(out.dtype)
        return out

    @property
    def said(self) -> str:
        """Return the filters in words, or that it is a mask."""
        return "a mask" if self.mask is not None else repr(self.filters)

    @property
    def _columns(self) -> int:
        """Return how many of the columns here count."""
        return self.rows.vocab if self.shard is None else self.shard.columns

    def _parts(self, find: bool) -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        """Give some rows at a time, copied, -inf outside of the support; their places in the flattened (B, T); under a
        softcap the slope of the copied values, which are capped. ``find``: what the filters keep is to be found."""
        rows = self.rows
        numbers = rows.numbers if not rows.softcap else without_softcap(rows.numbers)
        whole = rows.row_view(rows.logits)[..., : self._columns]
        length, count = rows.token_ids.shape[1], rows.token_ids.numel()
        widest = rows.vocab if self.shard is None else self.shard.even  # all ranks have to cut rows alike
        size = max(1, CHUNK_ELEMENTS // max(widest, 1))
        for index in torch.arange(count, device=rows.logits.device).split(size):
            logits = whole[index // length, index % length]
            ids, live = (x.reshape(-1)[index] for x in (rows.token_ids, rows.live))
            values, slope = (logits, None) if not rows.softcap else capped(logits.to(numbers.dtype), rows.numbers)
            kept = self._kept(values, numbers, index, find) if self.mask is None else self._masked(index)
            self._keep_drawn(kept, ids)
            values = values.masked_fill_(~kept, float("-inf"))[None]
            own = None if rows.temperature is None else rows.temperature.reshape(-1)[index][None]
            yield Rows(values, ids[None], live[None], numbers, softcap=False, temperature=own), index, slope

    def _kept(self, values: Tensor, numbers: Tensor, index: Tensor, find: bool) -> Tensor:
        """Return (n, V) bool, of logits without a softcap."""
        temperature, scale, _ = numbers[:3].unbind()
        if self.rows.temperature is not None:
            temperature = self.rows.temperature.reshape(-1)[index, None]
        z = values.to(numbers.dtype) * scale / temperature
        if find:
            filtered = z
            for one in self.filters:
                lowest = one.lowest(filtered, self.shard)
                self.lowest[index] = torch.maximum(self.lowest[index], lowest)
                filtered = filtered.masked_fill(filtered < lowest, float("-inf"))
        return ~(z < self.lowest[index]) & (z != float("-inf"))  # NaN stays: it is to be seen

    def _masked(self, index: Tensor) -> Tensor:
        assert self.mask is not None
        return self.mask[index, : self._columns]

    def _keep_drawn(self, kept: Tensor, ids: Tensor) -> None:
        """Let the drawn tokens count whose columns are here."""
        first = 0 if self.shard is None else self.shard.start
        here = ids - first
        held = (here >= 0) & (here < self._columns)
        if self._columns:
            column = torch.where(held, here, 0)[:, None]
            kept.scatter_(1, column, kept.gather(1, column) | held[:, None])


class SupportedLogProbs(torch.autograd.Function):
    """Log-probs and entropies over a truncated support, differentiable in both."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, supported: Supported, backend: str) -> tuple[Tensor, Tensor]:
        stats = supported.log_probs(backend)
        read = tuple(None if tensor is None else ordinary(tensor)[0] for tensor in supported.tensors)
        ctx.save_for_backward(logits, *read, *stats)
        ctx.set_materialize_grads(False)
        # Without its tensors: what is saved is given back after backward, though somebody keeps the loss.
        ctx.supported, ctx.backend = supported.of_tensors(logits.new_empty(0), *(None,) * len(read)), backend
        return stats[0], stats[1]

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None and h is None:
            return None, None, None
        *read, log_prob, entropy, anchor, log_sum = ctx.saved_tensors
        supported, stats = ctx.supported.of_tensors(*read), RowStats(log_prob, entropy, anchor, log_sum)
        return supported.gradient(ctx.backend, stats, RowGradients(g, h)), None, None


@outside_graphs
def supported_log_probs(
    logits: Tensor, tokens: RowTokens, support: Filtered, logit_args: LogitArgs, backend: str
) -> tuple[Tensor, Tensor]:
    """Return (B, T) log-probs and entropies, differentiable in ``logits`` where gradients are on."""
    supported = Supported.of(tokens, support, logit_args)
    if torch.is_grad_enabled() and logits.requires_grad:
        log_probs: tuple[Tensor, Tensor] = SupportedLogProbs.apply(logits, supported, backend)
        return log_probs
    with torch.no_grad():
        log_prob, entropy, *_ = supported.log_probs(backend)
        return log_prob, entropy
