"""The base class of surrogates: functions of a token's log-prob, its ratio and its advantage, with two slopes each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import warn_caller
from ..settings import settle_number

if TYPE_CHECKING:
    from ..rollout import Rollout

CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL = 1, 2, 4
"""Flags of a token at which a bound took effect: its slope is 0, or its weight is not its ratio."""


class Point(NamedTuple):
    """The arguments of a surrogate at every token; all of one shape."""

    log_prob: Tensor
    log_ratio: Tensor
    """The log-ratio to the old policy, pooled as the level says, saturated at the config's limit."""
    ratio: Tensor
    """exp(log_ratio)"""
    advantage: Tensor
    old_log_prob: Tensor
    """The token's own under the old policy, whatever the level; log_prob on-policy."""


class Terms(NamedTuple):
    """A surrogate f at every token."""

    value: Tensor
    slope: Tensor
    """∂f/∂log_ratio: pooled levels spread it over the sequence, and it is 0 where the log-ratio saturates."""
    direct: Tensor | None
    """∂f/∂log_prob at a fixed ratio, the token's own at every level; None: 0."""
    flags: Tensor
    """uint8, CLIPPED_* bits."""

    @property
    def own_slope(self) -> Tensor:
        """∂f/∂log_prob of a token by itself."""
        return self.slope if self.direct is None else self.slope + self.direct


class Clipped(NamedTuple):
    """Log-ratios bounded token by token, before they are pooled."""

    log_ratio: Tensor
    free: Tensor | None
    """Where the slope passes, bool; None: everywhere."""
    flags: Tensor | None
    """uint8, CLIPPED_* bits; None: no bound took effect anywhere."""


@dataclass(frozen=True)
class Surrogate:
    """An objective's per-token function f(log_prob, ratio, advantage).

    A subclass is a frozen dataclass of its own parameters with the class attributes below and ``terms``; or, if it is
    registered with ``register_surrogate``, with ``value`` and perhaps ``slopes``. At most eight numbers reach a kernel
    (``parameters``).
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    slope_equation: ClassVar[str]
    """∂f/∂ℓ of a token by itself."""
    paper: ClassVar[str]
    found_in: ClassVar[str]
    """The training systems that have it, by their names for it."""
    kernel_id: ClassVar[int | None] = None
    """The surrogate's number in csrc/common/surrogates.h; None: it has no one-pass arm and takes two passes."""
    uses_ratio: ClassVar[bool] = True
    """Whether f is a function of the ratio; old log-probs and levels do not concern one of the log-prob alone."""
    flat_at_zero_advantage: ClassVar[bool] = True
    """Whether value and slope are 0 where the advantage is 0."""
    takes_rollout: ClassVar[bool] = False
    """Whether rollout weights are part of its ratio, not factors of its value; masks of the current policy are not."""

    def terms(self, t: Point) -> Terms:
        """Return f, its slopes and its flags at every token."""
        raise NotImplementedError(f"{type(self).__name__} has no terms: register it with @register_surrogate.")

    def clip_log_ratios(self, log_ratio: Tensor, advantage: Tensor) -> Clipped:
        """Bound every token's own log-ratio, before pooling; most surrogates do not."""
        return Clipped(log_ratio, None, None)

    def folds(self, scheme: Rollout) -> bool:
        """Whether the factors of a rollout scheme are part of its ratio."""
        return self.takes_rollout and not scheme.of_policy

    def parameters(self) -> tuple[float, ...]:
        """Return the numbers that a kernel is told: formed in float64, rounded once."""
        return ()

    def written(self) -> str:
        """Return the equation with this instance's numbers."""
        fields = self._set_fields().items()
        shown = (f"{name} = {x:g}" if isinstance(x, (int, float)) else f"{name} = {x!r}" for name, x in fields)
        numbers = ", ".join(shown)
        return f"{self.equation}, {numbers}" if numbers else self.equation

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={x!r}' for name, x in self._set_fields().items())})"

    def _set_fields(self) -> dict[str, Any]:
        """Return the surrogate's numbers by name, without those that are None."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def chosen(condition: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """Return one of two numbers at every token; torch.where on two of them would round both to fp32."""
    return torch.where(condition, one, torch.full_like(like, other))


def as_flags(low: Tensor, high: Tensor, dual: Tensor | None = None) -> Tensor:
    flags = torch.add(low.to(torch.uint8), high, alpha=CLIPPED_HIGH)
    return flags if dual is None else torch.add(flags, dual, alpha=CLIPPED_DUAL)


def no_flags(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.uint8)


def check_field(surrogate: Surrogate, name: str, **bounds: Any) -> None:
    """Raise unless a number of the surrogate is inside its bounds (``settle_number``)."""
    settle_number(surrogate, name, f"{type(surrogate).__name__}({name}=...)", **bounds)


def check_band(surrogate: Surrogate, low: float, high: float) -> None:
    """Raise unless the fields low and high make a band [1 - low, 1 + high] of ratios; warn where they look like the
    bounds themselves."""
    check_field(surrogate, "low", at_least=0)
    check_field(surrogate, "high", at_least=0)
    kind = type(surrogate).__name__
    if low > 1:
        raise ValueError(f"{kind}(low=...) must be at most 1 (the bound is 1 - low); got {low!r}.")
    if 0.5 < low < 1 < high < 1.5:  # as bounds an ordinary band around 1, as distances from 1 a wide one
        warn_caller(
            f"{kind}(low={low:g}, high={high:g}) keeps ratios in [1 - low, 1 + high] = [{1 - low:g}, {1 + high:g}]. If "
            f"[{low:g}, {high:g}] is meant, it is {kind}(low={1 - low:g}, high={high - 1:g})."
        )
