"""One comparison of two losses of one batch while training: what was seen, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import fail

LOG = logging.getLogger("grpo_kernels.shadow")

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""Gradient differences that rounding may make, relative.

Losses that compute in fp32 were 5e-7 apart in fp32 and 1e-5 in bf16 and fp16, at logits of spreads from 1 to 20; behind
a head of half precision the states' gradients round as well. A loss that computes in bf16 itself is 1e-1 from one that
does not, and is told."""


class Sighting(NamedTuple):
    """One comparison."""

    call: int
    yours: float
    ours: float
    """Times ``factor``."""
    gradient_difference: float
    """Relative L2 distance of the gradients: with respect to the logits, or the largest of those of hidden states and
    head."""
    rounding: float
    """What rounding may make of it."""
    whose: str = "yours"
    """What ours was compared with."""

    @property
    def differs(self) -> bool:
        """Whether it is more than rounding; a NaN is."""
        return not self.gradient_difference <= self.rounding

    @property
    def level(self) -> int:
        """At which the line is logged."""
        return logging.WARNING if self.differs else logging.INFO

    def __str__(self) -> str:
        line = (
            f"shadow, call {self.call}: loss {self.yours:.8g} ({self.whose}) {self.ours:.8g} (ours), "
            f"gradient difference {self.gradient_difference:.1e}"
        )
        return f"{line}: more than rounding ({self.rounding:.0e})" if self.differs else line


class Turns:
    """Counts the losses that are watched; every ``every``-th one is compared, 0 is none."""

    def __init__(self, every: int, failed: str = "not compared:") -> None:
        self.every, self._failed = every, failed
        self.calls = 0

    def take(self, compare: Callable[[int], Sighting]) -> Sighting | None:
        """Return what ``compare`` saw of this call, by its number, where its turn has come, and log it. What it raises
        is logged too: watching must not stop training."""
        if not self.every or not torch.is_grad_enabled():
            return None
        call, self.calls = self.calls, self.calls + 1
        if call % self.every:
            return None
        try:
            sighting = compare(call)
        except Exception as error:
            LOG.warning("shadow, call %d: %s %s: %s", call, self._failed, type(error).__name__, error)
            return None
        LOG.log(sighting.level, "%s", sighting)
        return sighting


def check_every(function: str, shadow: object) -> int:
    """Return ``shadow=``, if it is a number of calls."""
    if type(shadow) is not int or shadow < 0:
        fail(function, "shadow to be an int >= 0, of calls between two comparisons (0: none)", repr(shadow))
    return shadow


def seen(
    call: int,
    yours: tuple[Tensor, Sequence[Tensor]],
    ours: tuple[Tensor, Sequence[Tensor]],
    dtype: torch.dtype,
    whose: str = "yours",
) -> Sighting:
    """Compare two losses with their gradients, by tensors of any shape that are alike in both.

    Args:
        dtype: that of the least precise tensor in either.
    """
    distances = [_distance(a.detach(), b.detach()) for a, b in zip(yours[1], ours[1], strict=True)]
    largest = torch.stack(distances).amax()  # which is NaN where one is
    return Sighting(
        call, float(yours[0].detach()), float(ours[0].detach()), float(largest), ROUNDING.get(dtype, 3e-2), whose
    )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b| / max(|a|, |b|) of L2 norms, 0 of zeros."""
    a, b = a.float(), b.float()
    distance: Tensor = (a - b).norm() / torch.maximum(a.norm(), b.norm()).clamp(min=1e-38)
    return distance
