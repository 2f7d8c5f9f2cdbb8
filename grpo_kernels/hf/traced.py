"""Logits that are not made: what a model's own forward does with them, as it does it.

Inside a ``HeadTrace`` a linear layer over the vocabulary gives ``TracedLogits``, which know what they would be and hold
no memory: logits = cap · tanh(scale · (Σ states Wᵀ + bias)). What the model, its wrappers and hooks do to them,
adding an adapter, a bias, scaling, capping, casting, cutting, is kept in that form; anything else raises
``Untraceable``.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..calls.sharding import is_dtensor
from .form import IN_A_UNIT, Form, Untraceable


class TracedLogits(Tensor):
    """Logits (..., V) as a ``Form``, without memory."""

    form: Form
    shared: bool
    """A view of others, or others are views of it: what is written into one is not written into the other."""

    @staticmethod
    def __new__(cls, form: Form, shared: bool = False) -> TracedLogits:
        device = form.products[0].states.device
        made: TracedLogits = Tensor._make_wrapper_subclass(
            cls, form.shape, dtype=form.dtype, device=device, requires_grad=form.trained
        )
        made.form, made.shared = form, shared
        return made

    placements: Any = None
    """What tensor parallelism has asked for; first nothing, so that it asks. They are on no mesh, and go anywhere."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Where the head's weight is a DTensor its logits would be one, and are asked what they are."""
        if not is_dtensor(self.form.products[0].weight):
            return TracedLogits
        from torch.distributed.tensor import DTensor

        return DTensor

    def redistribute(self, *, placements: Any, **options: Any) -> TracedLogits:
        columns = len(self.form.shape) - 1
        cut = [placement for placement in placements if not placement.is_replicate()]
        if not all(placement.is_shard() and placement.dim in (-1, columns) for placement in cut):
            raise Untraceable(f"tensor parallelism makes them {placements}, neither whole nor some columns of all rows")
        placed = TracedLogits(self.form, self.shared)
        placed.placements = placements
        return placed

    def to_local(self) -> TracedLogits:
        spread = any(not placement.is_replicate() for placement in self.placements or ())
        return TracedLogits(replace(self.form, spread=spread), self.shared)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"TracedLogits({tuple(self.form.shape)}, {self.form.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        if name in _READ or (name == "__get__" and func.__self__.__name__ in _ATTRIBUTES):
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **kwargs)
            if isinstance(found, Tensor):
                raise Untraceable("their contents are looked at")
            return found
        rule = _RULES.get(name)
        if name == "__get__":
            raise Untraceable(f"their {func.__self__.__name__} is read")
        if rule is None:
            raise Untraceable(f"{name} is called with them")
        if any(isinstance(value, cls) and value.form.trained != torch.is_grad_enabled() for value in args):
            raise Untraceable(f"{name} is called with them where autograd is switched off")
        try:
            return rule(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, IndexError, RuntimeError, ArithmeticError) as error:
            raise Untraceable(f"{name} is called with them, and {error}") from error

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise Untraceable(f"{func} is called with them")


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


_READ = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "get_device", "__len__", "is_contiguous")
)
_ATTRIBUTES = frozenset(
    ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta")
)
"""Of shape, dtype and device."""


def _number(value: Any) -> float | Tensor:
    if not isinstance(value, Tensor) and isinstance(value, numbers.Real):
        return float(value)  # a scalar of numpy, too
    if not isinstance(value, Tensor):
        raise Untraceable(f"a {type(value).__name__} meets them")
    return value


def _multiplied(a: Any, b: Any) -> TracedLogits:
    if isinstance(a, TracedLogits) and isinstance(b, TracedLogits):
        raise Untraceable("they are multiplied with each other")
    logits, factor = (a, b) if isinstance(a, TracedLogits) else (b, a)
    return _step(logits.form.times(_number(factor)))


def _step(form: Form) -> TracedLogits:
    return TracedLogits(replace(form, roundings=form.roundings + 1))


def _divided(a: Any, b: Any, *, rounding_mode: str | None = None) -> TracedLogits:
    if not isinstance(a, TracedLogits) or isinstance(b, TracedLogits) or rounding_mode is not None:
        raise Untraceable("something is divided by them")
    divisor = _number(b)
    if not isinstance(divisor, Tensor):
        return _step(a.form.times(1 / divisor))
    return _step(a.form.times(divisor.reciprocal()))


def _added(a: Any, b: Any, *, alpha: float = 1) -> TracedLogits:
    if not isinstance(a, TracedLogits):
        return _step(b.form.times(alpha).plus(_number(a)))
    if isinstance(b, TracedLogits):
        return _step(a.form.plus(b.form.times(alpha)))
    return _step(a.form.plus(_number(b) if alpha == 1 else _number(b) * alpha))


def _subtracted(a: Any, b: Any, *, alpha: float = 1) -> TracedLogits:
    return _added(a, b, alpha=-alpha)


def _cast(logits: TracedLogits, *args: Any, copy: bool = False, **kwargs: Any) -> TracedLogits:
    """Take a dtype from whatever names one; as with tensors, logits of that dtype already are the same ones."""
    dtype = logits.form.dtype
    for value in (*args, *kwargs.values()):
        named = value.dtype if isinstance(value, Tensor) else value
        if isinstance(named, torch.dtype):
            dtype = named
        elif isinstance(named, (str, int, torch.device)) and not isinstance(named, bool):
            device = torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
            if device.type != logits.device.type:
                raise Untraceable(f"they are moved to {device}")
    if dtype == logits.form.dtype and not copy:
        return logits
    form, eps = logits.form, torch.finfo(dtype).eps
    wide = form.wide_bias and eps <= torch.finfo(form.dtype).eps
    return TracedLogits(replace(form, dtype=dtype, eps=max(form.eps, eps), wide_bias=wide))


def _filled(logits: TracedLogits, dim_or_mask: Any, *rest: Any) -> TracedLogits:
    """``masked_fill(mask (V,), value)`` and ``index_fill(-1, columns, value)`` of what no token may be."""
    *where, value = (dim_or_mask, *rest)
    if len(where) == 2 and where[0] not in (-1, len(logits.form.shape) - 1):
        raise Untraceable("rows of them are written")
    columns = where[-1]
    if isinstance(columns, Tensor) and columns.dtype == torch.bool:
        columns = logits.form._columns(columns, "a mask of")
    if not isinstance(value, (int, float)) or value > torch.finfo(logits.form.dtype).min:
        raise Untraceable("columns of them are written")
    return TracedLogits(logits.form.without(columns))


def _set(logits: TracedLogits, key: Any, value: Any) -> None:
    keys = key if isinstance(key, tuple) else (key,)
    whole = all(each is Ellipsis or (isinstance(each, slice) and each == slice(None)) for each in keys[:-1])
    if not whole or (Ellipsis not in keys[:-1] and len(keys) != len(logits.form.shape)):
        raise Untraceable("rows of them are written")
    _write(logits, _filled(logits, keys[-1], value).form)


def _write(logits: TracedLogits, form: Form) -> None:
    """Do in place what gives ``form``."""
    if logits.shared:
        raise Untraceable("they are written in place, and views of them are about")
    if form.dtype != logits.form.dtype:
        raise Untraceable("another dtype is written into them")
    logits.form = form


def _cut(logits: TracedLogits, key: Any) -> TracedLogits:
    logits.shared = True
    return TracedLogits(logits.form.cut(key), shared=True)


def _hooked(logits: TracedLogits, hook: Any) -> RemovableHandle:
    """FSDP2 hooks what its units return, to gather weights before a backward: they are gathered around the loss."""
    if not str(getattr(hook, "__module__", "")).startswith("torch.distributed"):
        raise Untraceable("a hook is put on their gradient")
    return RemovableHandle({})


def _in_place(rule: Callable[..., TracedLogits]) -> Callable[..., TracedLogits]:
    def inside(logits: Any, *args: Any, **kwargs: Any) -> TracedLogits:
        if not isinstance(logits, TracedLogits):
            raise Untraceable("they are written into another tensor")
        _write(logits, rule(logits, *args, **kwargs).form)
        return logits

    return inside


_OUT_OF_PLACE: dict[str, Callable[..., TracedLogits]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _multiplied),
    **dict.fromkeys(("div", "divide", "true_divide", "__div__", "__truediv__"), _divided),
    **dict.fromkeys(("add", "__add__", "__radd__"), _added),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _subtracted),
    **dict.fromkeys(("rsub", "__rsub__"), lambda a, b: _subtracted(b, a)),
    **dict.fromkeys(("neg", "negative", "__neg__"), lambda logits: _multiplied(logits, -1)),
    "tanh": lambda logits: _step(logits.form.tanh()),
    **dict.fromkeys(("masked_fill", "index_fill"), _filled),
}
_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_RULES: dict[str, Callable[..., Any]] = {
    **_OUT_OF_PLACE,
    **{f"{name}_": _in_place(rule) for name, rule in _OUT_OF_PLACE.items() if not name.startswith("_")},
    **{f"__i{name}__": _in_place(_OUT_OF_PLACE[f"__{name}__"]) for name in ("mul", "truediv", "add", "sub")},
    **{name: (lambda logits, *_, _dtype=dtype: _cast(logits, _dtype)) for name, dtype in _DTYPES.items()},
    **dict.fromkeys(("to", "type", "type_as"), _cast),
    "contiguous": lambda logits, **_: logits,
    "clone": lambda logits, **_: TracedLogits(logits.form),
    "__getitem__": _cut,
    "register_hook": _hooked,
    "__setitem__": _set,
}
"""What may be done to traced logits, by the name of the function."""


class HeadTrace(TorchFunctionMode):
    """Around the forward of a head: its linear layers over the vocabulary, of ``states``' rows, make no logits.

    ``units``: whether FSDP2 shards the head at this moment, too, so that its parameters are known by identity alone.
    """

    def __init__(self, head: torch.nn.Module, vocab: int, rows: torch.Size, units: bool) -> None:
        super().__init__()
        self._vocab, self._rows, self._units = vocab, rows, units
        self._shared_out = [each for part in head.modules() for each in part._parameters.values() if is_dtensor(each)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            states, weight, bias = _linear(*args, **kwargs)
            if is_dtensor(states) and states.shape[:-1] == self._rows:
                states = states.full_tensor()
            whole = self._parameter(weight)
            if whole.shape[0] == self._vocab and states.shape[:-1] == self._rows:
                bias = None if bias is None else self._parameter(bias)
                if is_dtensor(bias) and not self._units:
                    bias = bias.full_tensor()
                return TracedLogits(Form.of_linear(states, whole, bias))
            if is_dtensor(weight) and not is_dtensor(states):
                raise Untraceable(IN_A_UNIT)
        elif func in _MATMULS and len(args) == 2 and not kwargs:
            states, right = args
            if right.dim() == 2 and right.shape[1] == self._vocab and states.shape[:-1] == self._rows:
                return TracedLogits(Form.of_linear(states, right.t(), None))
        return func(*args, **kwargs)

    def _parameter(self, tensor: Any) -> Any:
        """Return the DTensor whose local part a tensor is: transformers puts these in their places without autograd."""
        if is_dtensor(tensor):
            return tensor
        for parameter in self._shared_out:
            here = parameter.to_local()
            if here.shape == tensor.shape and here.data_ptr() == tensor.data_ptr():
                return parameter
        return tensor


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bind the arguments of ``torch.nn.functional.linear``."""
    return input, weight, bias
