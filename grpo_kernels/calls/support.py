"""Truncated support: log-probs renormalised over the tokens that a sampler could draw.

A sampler with top-k, top-p or min-p draws from p restricted to a set S and renormalised. Its log-prob of a token is
ℓ - log Σ_{j∈S} p_j; compared with a policy's ℓ over the whole vocabulary, every ratio is off by the kept mass. Here
log-probs, entropies and gradients are those of the renormalised distribution, exactly. Rows are copied some at a time,
with -inf outside of S, and handed to the kernels: two passes, and no second tensor of the logits' size. A softcap is
applied to the copies first: it would turn the -inf into -cap, and bring every column back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, Rows, RowStats
from ..backends.spec import NUMBERS, LogitArgs, numbers_vector
from ..objectives.checks import check_device, check_shape, fail, plain, read_mask
from ..objectives.compiler import outside_graphs
from ..objectives.maths import weighed
from .autograd import once
from .contents import check_ids
from .tokens import RowTokens

CHUNK_ELEMENTS = 1 << 22
"""Logits copied at a time."""


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens; ties with the last of them stay, as in vLLM and transformers."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", plain(self.k))
        if not (isinstance(self.k, int) and not isinstance(self.k, bool) and self.k >= 1):
            raise ValueError(f"TopK(k) must be an integer >= 1; got {self.k!r}.")

    def lowest(self, z: Tensor) -> Tensor:
        """Return (n, 1): the smallest of each row that is kept, of z (n, V)."""
        return z.topk(min(self.k, z.shape[-1]), -1).values[:, -1:]


@dataclass(frozen=True)
class TopP:
    """The smallest set of the most likely tokens whose probability is at least p; ties with the last stay."""

    p: float

    def __post_init__(self) -> None:
        _check_share(self)

    def lowest(self, z: Tensor) -> Tensor:
        ordered = z.sort(-1, descending=True).values
        p = torch.softmax(ordered, -1)
        shares = (p * 2.0**60).to(torch.int64)  # CUDA has no deterministic running sum of floats
        before = shares.cumsum(-1) - shares
        last = ((before < int(self.p * 2**60)) & (p > 0)).sum(-1, keepdim=True).clamp(min=1) - 1
        return ordered.gather(-1, last)


@dataclass(frozen=True)
class MinP:
    """Tokens at least p times as likely as the most likely one."""

    p: float

    def __post_init__(self) -> None:
        _check_share(self)

    def lowest(self, z: Tensor) -> Tensor:
        largest = z.amax(-1, keepdim=True)
        return largest + math.log(self.p)


def _check_share(support: TopP | MinP) -> None:
    object.__setattr__(support, "p", plain(support.p))
    if not (isinstance(support.p, (int, float)) and 0 < support.p <= 1):
        raise ValueError(f"{type(support).__name__}(p) must be in (0, 1]; got {support.p!r}.")


Filter: TypeAlias = TopK | TopP | MinP
Support: TypeAlias = Filter | tuple[Filter, ...] | Tensor
"""One filter, several in the sampler's order (each renormalises what the one before left), or a bool mask."""


def check_not_inplace(function: str, inplace: bool, tensors: Mapping[str, object]) -> None:
    if inplace:
        fail(function, "inplace=False with support=, whose gradient is made of copies", "inplace=True", tensors)


@dataclass(frozen=True)
class Supported:
    """Rows, and which columns of them count. The drawn token always does: the sampler had it in its set."""

    rows: Rows
    filters: tuple[Filter, ...]
    mask: Tensor | None
    """(B·T, V)"""

    @classmethod
    def of(cls, tokens: RowTokens, support: Support, logit_args: LogitArgs) -> Supported:
        numbers = numbers_vector(logit_args, 1.0, None, tokens.real, tokens.states.device)
        rows = tokens.rows(numbers, logit_args.logit_softcap is not None)
        check_ids(tokens, always=rows.logits.device.type == "cpu")  # rows are numbered anew below
        if isinstance(support, Tensor):
            shape, named = (*tokens.shape, tokens.vocab), {**tokens.tensors, "support": support}
            check_shape(tokens.function, "support", support, (shape,), named)
            check_device(tokens.function, named)
            return cls(rows, (), read_mask(tokens.function, support, named, name="support").reshape(-1, tokens.vocab))
        filters = support if isinstance(support, tuple) else (support,)
        if not filters or not all(isinstance(one, (TopK, TopP, MinP)) for one in filters):
            expected = "support=TopK(k), TopP(p), MinP(p), a tuple of them, or a bool mask (*token_ids.shape, V)"
            fail(tokens.function, expected, repr(support), tokens.tensors, error=TypeError)
        return cls(rows, filters, None)

    def log_probs(self, backend: str) -> RowStats:
        """Return the statistics (B, T) of the renormalised distribution, which temperature is part of."""
        stats = [torch.zeros_like(self.rows.token_ids, dtype=self.rows.numbers.dtype) for _ in range(4)]
        for part, index, _ in self._parts():
            for total, values in zip(stats, ops.log_probs(part, backend), strict=True):
                total.view(-1)[index] = values[0]
        return RowStats(*stats)

    def gradient(self, backend: str, stats: RowStats, gradients: RowGradients) -> Tensor:
        """Return that in the logits, from slopes in log-probs and entropies, (B, T)."""
        rows = self.rows
        out = torch.zeros_like(rows.logits, memory_format=torch.contiguous_format)
        target, length = rows.row_view(out), rows.token_ids.shape[1]
        for part, index, slope in self._parts():
            values = [None if x is None else x.reshape(-1)[index][None] for x in (*stats, *gradients)]
            ops.log_probs_backward_(part, RowStats(*values[:4]), RowGradients(*values[4:]), backend)  # type: ignore[arg-type]
            gradient = part.logits[0] if slope is None else weighed(part.logits[0], slope)
            target[index // length, index % length] = gradient.to(out.dtype)
        return out

    def _parts(self) -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        """Give some rows at a time, copied, -inf outside of the support; their places in the flattened (B, T); under a
        softcap the slope of the copied values, which are capped."""
        rows = self.rows
        numbers = rows.numbers if not rows.softcap else _without_softcap(rows.numbers)
        whole, length, count = rows.row_view(rows.logits), rows.token_ids.shape[1], rows.token_ids.numel()
        size = max(1, CHUNK_ELEMENTS // max(rows.vocab, 1))
        for index in torch.arange(count, device=rows.logits.device).split(size):
            logits = whole[index // length, index % length]
            ids, live = (x.reshape(-1)[index] for x in (rows.token_ids, rows.live))
            values, slope = (logits, None) if not rows.softcap else _capped(logits.to(numbers.dtype), rows.numbers)
            kept = self._kept(values, numbers) if self.mask is None else self.mask[index]
            safe = torch.where((ids >= 0) & (ids < rows.vocab), ids, 0)
            kept.scatter_(1, safe[:, None], True)
            values = values.masked_fill_(~kept, float("-inf"))[None]
            yield Rows(values, ids[None], live[None], numbers, softcap=False), index, slope

    def _kept(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Return (n, V) bool, of logits without a softcap."""
        temperature, scale, _ = numbers[:3].unbind()
        z = values.to(numbers.dtype) * scale / temperature
        for one in self.filters:
            z = z.masked_fill(z < one.lowest(z), float("-inf"))
        return z != float("-inf")  # NaN stays: it is to be seen


def _without_softcap(numbers: Tensor) -> Tensor:
    """Return numbers for values that are scaled and capped already."""
    numbers = numbers.clone()
    numbers[NUMBERS.index("logit_scale")], numbers[NUMBERS.index("logit_softcap")] = 1.0, 0.0
    return numbers


def _capped(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return cap·tanh(logit·scale/cap), and its derivative in the logit: scale·(1 - tanh²) as 4q/(1+q)², which keeps
    its precision where tanh is nearly 1."""
    _, scale, cap = numbers[:3].unbind()
    inner = logits * (scale / cap)
    q = torch.exp(-2 * inner.abs())
    return cap * torch.tanh(inner), 4 * q / (1 + q) ** 2 * scale


class SupportedLogProbs(torch.autograd.Function):
    """Log-probs and entropies over a truncated support, differentiable in both."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, supported: Supported, backend: str) -> tuple[Tensor, Tensor]:
        stats = supported.log_probs(backend)
        ctx.save_for_backward(logits, *stats)
        ctx.set_materialize_grads(False)
        ctx.supported, ctx.backend = supported, backend
        return stats[0], stats[1]

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None and h is None:
            return None, None, None
        _, *stats = ctx.saved_tensors  # the logits: so that a write to them in between is noticed
        return ctx.supported.gradient(ctx.backend, RowStats(*stats), RowGradients(g, h)), None, None


@outside_graphs
def supported_log_probs(
    logits: Tensor, tokens: RowTokens, support: Support, logit_args: LogitArgs, backend: str
) -> tuple[Tensor, Tensor]:
    """Return (B, T) log-probs and entropies, differentiable in ``logits`` where gradients are on."""
    supported = Supported.of(tokens, support, logit_args)
    if torch.is_grad_enabled() and logits.requires_grad:
        log_probs: tuple[Tensor, Tensor] = SupportedLogProbs.apply(logits, supported, backend)
        return log_probs
    with torch.no_grad():
        log_prob, entropy, *_ = supported.log_probs(backend)
        return log_prob, entropy
