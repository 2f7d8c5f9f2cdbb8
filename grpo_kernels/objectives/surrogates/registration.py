"""Surrogates of a user's own: ``register_surrogate``, and the check of their slopes against their values."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..compiler import outside_graphs
from . import BUILT_IN, SURROGATES, Point, Surrogate, Terms
from .base import no_flags

_RTOL = 1e-6
_Class = TypeVar("_Class", bound=type)


def register_surrogate(cls: _Class) -> _Class:
    """Register a surrogate of your own for ``LossConfig``: it runs on every device, in two passes.

    The class derives from ``Surrogate`` and has

    - its parameters, as annotated fields (it becomes a frozen dataclass);
    - ``name`` and ``equation``; ``paper``, ``uses_ratio`` and ``flat_at_zero_advantage`` where the defaults do not fit;
    - ``value(t)``: f at every token of ``t``, a ``Point`` (log_prob, log_ratio, ratio, advantage, old_log_prob), with
      ``detach()`` where a paper stops the gradient;
    - ``slopes(t)``, if you like: (∂f/∂log_ratio, ∂f/∂log_prob at a fixed ratio). Without it autograd makes them.

    ``slopes`` that are not the derivatives of ``value`` are refused, at once if the class can be made without
    arguments, else by the ``LossConfig`` that takes it.

    Raises:
        TypeError: not a Surrogate, no ``value``, an ``__init__`` of its own; methods that return no tensors, or not two
            slopes.
        ValueError: a name that is taken; a value of another shape, NaN or random; slopes that are wrong, with the worst
            point.
    """
    if not (isinstance(cls, type) and issubclass(cls, Surrogate)):
        raise TypeError(f"register_surrogate decorates a class that derives from Surrogate; got {cls!r}.")
    if not callable(getattr(cls, "value", None)):
        raise TypeError(f"{cls.__name__} needs value(self, t), the surrogate at every token of a Point.")
    if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):
        raise TypeError(
            f"{cls.__name__} becomes a frozen dataclass: annotate its parameters as fields, without __init__."
        )
    made: Any = cls if "__dataclass_fields__" in vars(cls) else dataclasses.dataclass(frozen=True, repr=False)(cls)
    made.name = getattr(made, "name", cls.__name__.lower())
    defaults = {"equation": f"{cls.__name__}(ℓ, r, A)", "slope_equation": "by autograd", "paper": "registered"}
    for attribute, default in defaults.items():  # not those of a base class, which is another objective
        setattr(made, attribute, vars(cls).get(attribute, default))
    made.found_in, made.written = "registered", Surrogate.written
    taken = SURROGATES.get(made.name)
    if taken is not None and (taken in BUILT_IN or taken.__qualname__ != made.__qualname__):
        raise ValueError(f"a surrogate named {made.name!r} exists already ({taken.__qualname__}): choose another name.")
    made.terms, made.kernel_id = _terms, None
    if made.takes_rollout or made.clip_log_ratios is not Surrogate.clip_log_ratios:
        raise TypeError(f"{cls.__name__}: takes_rollout and clip_log_ratios are for surrogates of the package alone.")
    if not any(field.default is field.default_factory is dataclasses.MISSING for field in dataclasses.fields(made)):
        check_slopes(made())
    SURROGATES[made.name] = made
    registered: _Class = made
    return registered


def check_surrogate(surrogate: Surrogate) -> None:
    """Raise unless a surrogate is one that can be computed and its slopes are right."""
    if type(surrogate) in BUILT_IN:
        return
    if SURROGATES.get(getattr(surrogate, "name", "")) is not type(surrogate):
        raise TypeError(f"{type(surrogate).__name__} is not registered: decorate it with @register_surrogate.")
    try:
        hash(surrogate)
    except TypeError as error:
        raise TypeError(
            f"{surrogate!r}: the fields of a surrogate must be numbers, strings or tuples of such, for what is made "
            f"of a config is kept by its value; got an {error}."
        ) from error
    check_slopes(surrogate)


@outside_graphs
def _terms(surrogate: Any, t: Point) -> Terms:
    """Compute ``Surrogate.terms`` for a registered class."""
    flags = no_flags(t.log_prob)
    if hasattr(surrogate, "slopes"):
        value = _at_every_token(surrogate, "value(t)", surrogate.value(_copy(t)), t)
        return Terms(value, *_slopes(surrogate, t), flags)
    value, (slope, direct) = by_autograd(surrogate, t)
    return Terms(value, slope, direct, flags)


def _copy(t: Point) -> Point:
    """Return what a method may write into, without harm to the caller or to the other method."""
    return Point(*(x.detach().clone() for x in t))


def _slopes(surrogate: Any, t: Point) -> tuple[Tensor, Tensor]:
    """Return the class's ``slopes`` at every token."""
    parts = surrogate.slopes(_copy(t))
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        got = f"{len(parts)} of them" if isinstance(parts, (tuple, list)) else type(parts).__name__
        raise TypeError(f"{surrogate!r}: slopes(t) must return two, ∂f/∂log_ratio and ∂f/∂log_prob; got {got}.")
    slope, direct = (_at_every_token(surrogate, "each of slopes(t)", part, t) for part in parts)
    return slope, direct


def _at_every_token(surrogate: Any, what: str, given: Any, t: Point) -> Tensor:
    """Return what a class's method gave, in the dtype and the shape of the tokens: kernels read it as such. A number
    stands for all of them."""
    like = t.log_prob
    if not isinstance(given, (Tensor, int, float)):
        raise TypeError(
            f"{surrogate!r}: {what} must be a tensor, of a number for every token; got {type(given).__name__}."
        )
    values = torch.as_tensor(given, dtype=like.dtype, device=like.device)
    try:
        return values.expand_as(like)
    except RuntimeError:
        rule = f"the shape of t.log_prob, {tuple(like.shape)}"
        raise ValueError(f"{surrogate!r}: {what} must have {rule}; got {tuple(values.shape)}.") from None


_IN_PLACE = re.compile(r"__(get|set|setitem|delitem|i\w+)__|[^_].*_")
"""Attribute access and functions that write in place: these need the tensor itself."""


class _Step(torch.autograd.Function):
    """The identity, put before one operation's use of a tensor: a gradient that comes back NaN through that operation
    is 0 from here on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return torch.where(upstream.isnan(), 0.0, upstream)


class _BranchByBranch(TorchFunctionMode):
    """A mode in which autograd takes the derivatives of the chosen branches alone.

    ``torch.where``, ``minimum`` and ``clamp`` hand a gradient of 0 to the branch they did not choose, and the chain
    rule multiplies it by that branch's own derivative. Where the branch overflowed this is 0·inf = NaN, which would
    spoil the tensor's gradient, a sum over all operations that took the tensor:

        f = where(x > 50, x, exp(x)), x = 1000:  ∂f/∂x = 1 (branch x) + 0·exp(1000) = 1 + NaN

    The mode puts a ``_Step`` before every use of a tensor by an operation. It is that one summand which passes the
    step on the way back, so a NaN is taken out (here exp's, to 0) before it is added to the others. A value that is
    NaN itself has slopes of NaN: ``by_autograd`` puts those back.
    """

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        # A step is a view made by an autograd function: PyTorch refuses to write into such a one.
        if not _IN_PLACE.fullmatch(getattr(function, "__name__", "__get__")):
            arguments = tree_map(_step, arguments)
        return function(*arguments, **(options or {}))


def _step(x: Any) -> Any:
    return _Step.apply(x) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad else x


def by_autograd(surrogate: Any, t: Point) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the value and its derivatives in log-ratio and log-prob: those of the chosen branches, NaN where the value
    is."""
    with torch.enable_grad(), torch.inference_mode(False):
        log_prob, log_ratio = (x.detach().clone().requires_grad_() for x in (t.log_prob, t.log_ratio))
        others = (x.detach().clone() for x in (t.advantage, t.old_log_prob))
        with _BranchByBranch():
            t = Point(log_prob, log_ratio, log_ratio.exp(), *others)
            value = _at_every_token(surrogate, "value(t)", surrogate.value(t), t)
        if not value.requires_grad:
            return value.detach(), (torch.zeros_like(value), torch.zeros_like(value))
        inputs = (log_ratio, log_prob)
        slope, direct = torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)
    unknown = value.detach().isnan()
    return value.detach(), (slope.masked_fill(unknown, math.nan), direct.masked_fill(unknown, math.nan))


@functools.lru_cache(maxsize=256)
def check_slopes(surrogate: Any) -> None:
    """Compare ``slopes`` with autograd's of ``value``, on a grid away from round numbers, where bounds lie; and check
    what the class says of itself: flat at A = 0, a function of the ratio."""
    t = _grid()
    value, wanted = by_autograd(surrogate, t)
    unknown = value.isnan()
    if bool(unknown.any()):
        raise ValueError(f"{surrogate!r}: its value is NaN at {_place(t, int(unknown.int().argmax()))}.")
    if not torch.equal(by_autograd(surrogate, t)[0], value):
        raise ValueError(f"{surrogate!r}: its value is another one at the next call: draw no random numbers in it.")
    few = by_autograd(surrogate, Point(*(x[:7] for x in t)))[0]
    if not torch.allclose(few, value[:7], rtol=1e-9, atol=1e-12):
        raise ValueError(
            f"{surrogate!r}: its value at a token depends on the other tokens: return f of every token by itself, "
            "without means or sums. Sequences are pooled by level=, tokens by aggregation=."
        )
    if not any(bool((part != 0).any()) for part in wanted):
        raise ValueError(
            f"{surrogate!r}: its value has no gradient in log_prob, log_ratio or ratio: leave out detach(), no_grad "
            "and numpy, but where a paper stops the gradient."
        )
    idle = t.advantage == 0
    if surrogate.flat_at_zero_advantage and any(bool((part[idle] != 0).any()) for part in (value, *wanted)):
        raise ValueError(f"{surrogate!r}: its value is not 0 at advantages of 0: say flat_at_zero_advantage = False.")
    if not surrogate.uses_ratio and bool((wanted[0] != 0).any()):
        raise ValueError(f"{surrogate!r}: its value has a slope in the ratio: leave uses_ratio = False out.")
    if not hasattr(surrogate, "slopes"):
        return
    claimed = _slopes(surrogate, t)
    for what, slope, derivative in zip(("log_ratio", "log_prob"), claimed, wanted, strict=True):
        size = torch.maximum(slope.abs(), derivative.abs()).clamp(min=1e-9)
        error = torch.where(slope == derivative, 0.0, (slope - derivative).abs() / size).nan_to_num(nan=math.inf)
        worst = int(error.argmax())
        if float(error[worst]) > _RTOL:
            raise ValueError(
                f"{surrogate!r}: slopes() is not the derivative of value(): ∂f/∂{what} should be "
                f"{float(derivative[worst]):.8g} and is {float(slope[worst]):.8g} at {_place(t, worst)}. Mend "
                "slopes(), put detach() into value() where the gradient stops, or leave slopes() out: autograd makes "
                "them."
            )


def _place(t: Point, index: int) -> str:
    return ", ".join(f"{name}={float(getattr(t, name)[index]):.6g}" for name in Point._fields)


def _grid() -> Point:
    """Return points in fp64: ratios from 1e-4 to 1e4, advantages of both signs and 0, likely and unlikely tokens."""
    log_ratio = torch.cat([torch.linspace(-9.2, 9.2, 41), torch.linspace(-0.9, 0.9, 41)]).double() + 1e-3 * math.pi
    advantage = torch.tensor([-1.7, -0.31, 0.0, 0.47, 2.3], dtype=torch.float64)
    log_prob = torch.tensor([-12.3, -2.71, -0.0123], dtype=torch.float64)
    grid = torch.meshgrid(log_prob, log_ratio, advantage, indexing="ij")
    ell, x, A = (axis.flatten() for axis in grid)
    return Point(ell, x, x.exp(), A, ell - x)
