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
    source: tuple[str, ...] = ()
    """Lines of Python that do it to ``advantages`` (B,) with ``mask`` (B, T)."""

    def lines(self, form: str) -> tuple[str, ...]:
        """Return lines that do it to advantages by "sequence" (B,), or by "token" (B, T)."""
        if form != "token" or not self.source:
            return self.source
        each = "advantages[mask > 0]" if "mask > 0" in self.source[0] else "advantages"
        return (f"each = {each}", *self.source[1:])


def whitenings(scaled: bool, sequences: int) -> Iterator[Whitening]:
    """Yield what losses do to the advantages of a batch, by what they average over."""
    groups = [f"groups of {size}" for size in range(2, sequences) if sequences % size == 0]
    for where in ("sequences", "tokens", "positions", *groups):
        if not scaled:
            text = f"A - mean over {where}"
            yield Whitening(text, functools.partial(_centre, where=where), _source(where, None, 0.0))
            continue
        for ddof, eps in itertools.product((1, 0), (1e-8, 1e-6, 1e-5, 1e-4)):
            text = f"(A - mean) / (std + {eps:g}) over {where}, {'sample' if ddof else 'population'} std"
            yield Whitening(
                text, functools.partial(_whiten, where=where, ddof=ddof, eps=eps), _source(where, ddof, eps)
            )


def _source(where: str, correction: int | None, eps: float) -> tuple[str, ...]:
    """Return lines that do it; ``correction`` None: the mean is taken off and nothing else is done."""
    each = {
        "sequences": "advantages",
        "tokens": "advantages.repeat_interleave((mask > 0).sum(-1))",
        "positions": "advantages.repeat_interleave(mask.shape[1])",
    }.get(where)
    grouped, along = each is None, "-1, keepdim=True" if each is None else ""
    before = f"each = advantages.view(-1, {where.split()[-1]})" if grouped else f"each = {each}"
    of = "each" if grouped else "advantages"
    spread = f" / (each.std({along}{', ' if grouped else ''}correction={correction}) + {eps:g})"
    centred = f"({of} - each.mean({along}))" if correction is not None or grouped else f"{of} - each.mean()"
    return before, f"advantages = {centred}{spread if correction is not None else ''}{'.flatten()' if grouped else ''}"


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
