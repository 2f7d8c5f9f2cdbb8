"""What losses do to the advantages of a batch before they use them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def _same(advantages: Tensor, mask: Tensor) -> Tensor:
    return advantages


@dataclass(frozen=True)
class Whitening:
    """What a loss does to advantages before it uses them; (B,) and mask (B, T) to (B,)."""

    text: str = ""
    apply: Callable[[Tensor, Tensor], Tensor] = _same


def whitenings(scaled: bool, sequences: int) -> Iterator[Whitening]:
    """What losses do to the advantages of a batch, by what they average over."""
    groups = [f"groups of {size}" for size in range(2, sequences) if sequences % size == 0]
    for where in ("sequences", "tokens", "positions", *groups):
        if not scaled:
            yield Whitening(f"A - mean over {where}", functools.partial(_centre, where=where))
            continue
        for ddof, eps in itertools.product((1, 0), (1e-8, 1e-6, 1e-5, 1e-4)):
            text = f"(A - mean) / (std + {eps:g}) over {where}, {'sample' if ddof else 'population'} std"
            yield Whitening(text, functools.partial(_whiten, where=where, ddof=ddof, eps=eps))


def _moments(A: Tensor, live: Tensor, where: str, ddof: int) -> tuple[Tensor, Tensor]:
    if where.startswith("groups"):
        groups = A.view(-1, int(where.split()[-1]))
        centred = groups - groups.mean(-1, keepdim=True)
        variance = (centred**2).sum(-1, keepdim=True) / (groups.shape[1] - ddof)
        return groups.mean(-1, keepdim=True).expand_as(groups).flatten(), variance.expand_as(groups).flatten()
    count = torch.ones_like(A)
    if where != "sequences":
        count = live.sum(-1).double() if where == "tokens" else torch.full_like(A, live.shape[1])
    mean = (A * count).sum() / count.sum()
    return mean, ((A - mean) ** 2 * count).sum() / (count.sum() - ddof)


def _centre(A: Tensor, live: Tensor, where: str) -> Tensor:
    return A - _moments(A, live, where, 1)[0]


def _whiten(A: Tensor, live: Tensor, where: str, ddof: int, eps: float) -> Tensor:
    mean, variance = _moments(A, live, where, ddof)
    return (A - mean) / (variance.sqrt() + eps)
