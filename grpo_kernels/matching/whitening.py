"""What losses do to the advantages of a batch before they use them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """What a loss does to advantages before it uses them; (B,) and mask (B, T) to (B,)."""

    text: str = ""
    apply: Callable[[Tensor, Tensor], Tensor] = lambda advantages, mask: advantages
    source: tuple[str, ...] = ()
    """Lines of Python that do it to ``advantages`` (B,) with ``mask`` (B, T)."""

    def lines(self, form: str) -> tuple[str, ...]:
        """Return lines that do it to advantages by "sequence" (B,), or by "token" (B, T)."""
        if form != "token" or not self.source:
            return self.source
        each = "advantages[mask > 0]" if "mask > 0" in self.source[0] else "advantages"
        return (f"each = {each}", *self.source[1:])


def whitenings(scaled: bool, sequences: int) -> Iterator[Whitening]:
    """Yield what losses do to the advantages of a batch, by what they average over; ``scaled``: they divide as well."""
    groups = {f"groups of {size}": size for size in range(2, sequences) if sequences % size == 0}
    for where, size in (dict.fromkeys(("sequences", "tokens", "positions"), 0) | groups).items():
        mean = f"each.mean({'-1, keepdim=True' if size else ''})"
        each = "each" if size else "advantages"
        before, after = f"each = {_each(where, size)}", ".flatten()" if size else ""
        if not scaled:
            apply = functools.partial(_whiten, where=where, size=size, ddof=1, eps=None)
            centred = f"({each} - {mean})" if size else f"{each} - {mean}"
            yield Whitening(f"A - mean over {where}", apply, (before, f"advantages = {centred}{after}"))
            continue
        for ddof, eps in itertools.product((1, 0), (1e-8, 1e-6, 1e-5, 1e-4)):
            apply = functools.partial(_whiten, where=where, size=size, ddof=ddof, eps=eps)
            text = f"(A - mean) / (std + {eps:g}) over {where}, {'sample' if ddof else 'population'} std"
            std = f"each.std({'-1, keepdim=True, ' if size else ''}correction={ddof})"
            whole = f"({each} - {mean}) / ({std} + {eps:g})"
            yield Whitening(text, apply, (before, f"advantages = {f'({whole}){after}' if size else whole}"))


def _each(where: str, size: int) -> str:
    """Return the Python of what is averaged over."""
    repeats = {"tokens": ".repeat_interleave((mask > 0).sum(-1))", "positions": ".repeat_interleave(mask.shape[1])"}
    return f"advantages{f'.view(-1, {size})' if size else repeats.get(where, '')}"


def _whiten(A: Tensor, live: Tensor, where: str, size: int, ddof: int, eps: float | None) -> Tensor:
    """Return advantages less their mean, over their standard deviation unless ``eps`` is None."""
    groups = A.view(-1, size or len(A))
    count = live.sum(-1).double().view_as(groups) if where == "tokens" else torch.ones_like(groups)
    count = count * live.shape[1] if where == "positions" else count
    centred = groups - (groups * count).sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    if eps is None:
        return centred.flatten()
    variance = (centred**2 * count).sum(-1, keepdim=True) / (count.sum(-1, keepdim=True) - ddof)
    return (centred / (variance.sqrt() + eps)).flatten()
