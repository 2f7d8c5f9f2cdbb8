"""Logits that are not made: what a model's own forward does with them, as it does it.

Inside a ``HeadTrace`` a linear layer over the vocabulary gives ``TracedLogits``, which know what they would be and hold
no memory: logits = cap · tanh(scale · (Σ states Wᵀ + bias)). What the model, its wrappers and hooks do to them,
adding an adapter, a bias, scaling, capping, casting, cutting, is kept in that form; anything else raises
``Untraceable``.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


class Untraceable(Exception):
    """Something is done to logits that the form does not have; says what."""


class Product(NamedTuple):
    """columns ⊙ (states @ weight.T)"""

    states: Tensor
    """(..., K)"""
    weight: Tensor
    """(V, K)"""
    columns: Tensor | None
    """(V,); None is 1."""
    version: int
    """Of the states: what is written into them later was not in the product."""

    @classmethod
    def of(cls, states: Tensor, weight: Tensor, columns: Tensor | None = None) -> Product:
        return cls(states, weight, columns, 0 if states.is_inference() else states._version)

    @property
    def current(self) -> bool:
        return self.states.is_inference() or self.states._version == self.version

    def times(self, factor: float | Tensor) -> Product:
        return Product.of(self.states * factor, self.weight, self.columns)

    def plus(self, other: Product) -> Product:
        """Add a product of the same states and weight."""
        ones = [1.0 if columns is None else columns for columns in (self.columns, other.columns)]
        columns: float | Tensor = ones[0] + ones[1]
        return self._replace(columns=columns) if isinstance(columns, Tensor) else self.times(columns)

    def like(self, other: Product) -> bool:
        return self.states is other.states and self.weight is other.weight


class Autocast(NamedTuple):
    """What was around the head's products."""

    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Autocast:
        return cls(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def around(self, device: str, **options: Any) -> Any:
        return torch.autocast(device, dtype=self.dtype, enabled=self.enabled, **options)


@dataclass(frozen=True)
class Form:
    """scale · (Σ products + bias) where ``cap`` is None, else cap · tanh(scale · (Σ products + bias))."""

    products: tuple[Product, ...]
    bias: Tensor | None
    """(V,)"""
    dtype: torch.dtype
    """Of the logits."""
    autocast: Autocast
    trained: bool
    """Whether autograd was on around the head's products."""
    scale: float = 1.0
    """Positive."""
    cap: float | None = None
    """Positive."""
    roundings: int = 0
    """Steps that the model's own logits take behind the head, each rounded."""
    eps: float = 0.0
    """Of the coarsest dtype that they are rounded to."""
    wide_bias: bool = False
    """Whether the bias, of a wider dtype than the head's logits, has widened them."""

    @classmethod
    def of_linear(cls, states: Tensor, weight: Tensor, bias: Tensor | None) -> Form:
        autocast = Autocast.now(states.device.type)
        dtype = autocast.dtype if autocast.enabled and states.dtype != torch.float64 else states.dtype
        eps, products = torch.finfo(dtype).eps, (Product.of(states, weight),)
        return cls(products, bias, dtype, autocast, torch.is_grad_enabled(), eps=eps)

    @property
    def vocab(self) -> int:
        return self.products[0].weight.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.products[0].states.shape[:-1], self.vocab)

    def times(self, factor: float | Tensor) -> Form:
        """Multiply by a number, or by (V,) before the cap."""
        if isinstance(factor, Tensor) and factor.numel() > 1:
            columns = self._columns(factor, "a product with")
            scaled = (
                product.columns * columns if product.columns is not None else columns for product in self.products
            )
            products = tuple(product._replace(columns=c) for product, c in zip(self.products, scaled, strict=True))
            bias, dtype = None if self.bias is None else self.bias * columns, self._promoted(factor)
            return replace(self, products=products, bias=bias, dtype=dtype)
        if isinstance(factor, Tensor):
            factor = _number_of(factor)
        if self.cap is not None:
            if isinstance(factor, Tensor) or factor == 0:
                raise Untraceable("a factor behind a cap is trained, on a device, or 0")
            turned = self if factor > 0 else self.weighed(-1.0)  # tanh is odd
            return replace(turned, cap=self.cap * abs(factor))
        if isinstance(factor, Tensor) or factor <= 0:  # a scale may be trained, and its sign is not looked at
            return self.weighed(factor)
        return replace(self, scale=self.scale * factor)

    def plus(self, other: Form | Tensor | float) -> Form:
        """Add other logits, or (V,), before the cap."""
        if self.cap is not None or (isinstance(other, Form) and other.cap is not None):
            raise Untraceable("something is added behind a cap")
        if not isinstance(other, Form):
            if not isinstance(other, Tensor):
                device = self.products[0].weight.device
                other = torch.full((self.vocab,), float(other), device=device, dtype=self.dtype)
            dtype = self._promoted(other)
            added = self._columns(other, "a sum with") / self.scale
            wide = self.wide_bias or dtype != self.dtype
            total = added if self.bias is None else self.bias + added
            return replace(self, bias=total, dtype=dtype, wide_bias=wide)
        if self.trained != other.trained:
            raise Untraceable("only some of their parts are made with autograd on")
        if self.autocast != other.autocast:
            raise Untraceable("only some of their parts are made inside autocast")
        if self.shape != other.shape:
            raise Untraceable(f"logits {self.shape} and {other.shape} are added")
        if other.scale != self.scale:
            other = other.weighed(other.scale / self.scale)
        products = list(self.products)
        for new in other.products:
            same = next((i for i, old in enumerate(products) if old.like(new)), None)
            if same is None:
                products.append(new)
            else:
                products[same] = products[same].plus(new)
        bias = self.bias if other.bias is None else other.bias if self.bias is None else self.bias + other.bias
        dtype, eps = torch.promote_types(self.dtype, other.dtype), max(self.eps, other.eps)
        wide = self.wide_bias or other.wide_bias or (other.bias is not None and dtype != self.dtype)
        return replace(self, products=tuple(products), bias=bias, dtype=dtype, eps=eps, wide_bias=wide)

    def weighed(self, factor: float | Tensor) -> Form:
        """Multiply the products and the bias, not the scale."""
        products = tuple(product.times(factor) for product in self.products)
        return replace(self, products=products, bias=None if self.bias is None else self.bias * factor)

    def tanh(self) -> Form:
        if self.cap is not None:
            raise Untraceable("logits are capped twice")
        return replace(self, cap=1.0)

    def cut(self, key: Any) -> Form:
        """Index as a tensor of logits is: rows in any way, columns by a slice."""
        keys = list(key) if isinstance(key, tuple) else [key]
        dims = len(self.shape)
        if Ellipsis in [each for each in keys if not isinstance(each, Tensor)]:
            place = next(i for i, each in enumerate(keys) if each is Ellipsis)
            keys[place : place + 1] = [slice(None)] * (dims - len(keys) + 1)
        if None in [each for each in keys if not isinstance(each, Tensor)] or len(keys) > dims:
            raise Untraceable("logits are given another dimension")
        columns = keys.pop() if len(keys) == dims else slice(None)
        if not isinstance(columns, slice) or columns.step not in (None, 1):
            raise Untraceable("some columns of the logits are taken, not a slice")
        products = self.products
        if any(not isinstance(each, slice) or each != slice(None) for each in keys):
            cut: dict[int, Tensor] = {}
            for product in products:  # what is one tensor stays one
                cut.setdefault(id(product.states), product.states[tuple(keys)])
            products = tuple(Product.of(cut[id(each.states)], each.weight, each.columns) for each in products)
        if columns.indices(self.vocab) != (0, self.vocab, 1):
            products = tuple(
                each._replace(
                    weight=each.weight[columns], columns=None if each.columns is None else each.columns[columns]
                )
                for each in products
            )
            if self.bias is not None:
                return replace(self, products=products, bias=self.bias[columns])
        return replace(self, products=products)

    def without(self, columns: Any) -> Form:
        """Return logits that are -inf in some columns."""
        weight = self.products[0].weight
        bias = torch.zeros(self.vocab, device=weight.device, dtype=weight.dtype) if self.bias is None else self.bias
        if self.cap is not None:
            raise Untraceable("columns are set behind a cap")
        bias = bias.clone()
        bias[columns] = -math.inf
        return replace(self, bias=bias)

    def _promoted(self, other: Tensor) -> torch.dtype:
        """Return the dtype of an operation with ``other``, as PyTorch has it: a number's dtype does not count."""
        return torch.promote_types(self.dtype, other.dtype) if other.dim() > 0 else self.dtype

    def _columns(self, values: Tensor, what: str) -> Tensor:
        """Return (V,) of (..., 1, V)."""
        if self.cap is not None:
            raise Untraceable(f"{what} one number for each column stands behind a cap")
        if values.numel() == 1:
            return values.reshape(()).expand(self.vocab)
        if values.shape[-1:] != (self.vocab,) or values.numel() != self.vocab:
            raise Untraceable(f"{what} a tensor {tuple(values.shape)} is taken")
        return values.reshape(-1)

    @property
    def logit_scale(self) -> float:
        """As the linear functions take it."""
        return self.scale if self.cap is None else self.scale * self.cap


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

    placements = None
    """Hooks of tensor parallelism ask a DTensor for them; these are on no mesh, and go wherever logits are whole."""

    def redistribute(self, *, placements: Any, **options: Any) -> TracedLogits:
        if not all(placement.is_replicate() for placement in placements):
            raise Untraceable("they stay sharded over ranks")
        return self

    def to_local(self) -> TracedLogits:
        return self

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
        except (TypeError, IndexError) as error:
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


def _number_of(factor: Tensor) -> float | Tensor:
    """Return the number in a tensor, where reading it waits for nothing and nobody trains it."""
    trained = factor.requires_grad and torch.is_grad_enabled()
    return float(factor) if factor.is_cpu and not trained else factor.reshape(())


def _logits(value: Any) -> Any:
    return value.form if isinstance(value, TracedLogits) else value


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
        a, b = (b, a) if alpha == 1 else (b.form.times(alpha), a)
    elif alpha != 1:
        b = TracedLogits(b.form.times(alpha)) if isinstance(b, TracedLogits) else _number(b) * alpha
    return _step(_logits(a).plus(_logits(b) if isinstance(b, TracedLogits) else _number(b)))


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


IN_A_UNIT = "a part of it besides weight and bias is sharded, in an FSDP2 unit of its own: the root's unit serves it"


class HeadTrace(TorchFunctionMode):
    """Around the forward of a head: its linear layers over the vocabulary, of ``states``' rows, make no logits."""

    def __init__(self, vocab: int, rows: torch.Size) -> None:
        super().__init__()
        self._vocab, self._rows = vocab, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            states, weight, bias = _linear(*args, **kwargs)
            if hasattr(states, "full_tensor") and states.shape[:-1] == self._rows:
                states = states.full_tensor()
            if weight.shape[0] == self._vocab and states.shape[:-1] == self._rows:
                return TracedLogits(Form.of_linear(states, weight, bias))
            if hasattr(weight, "full_tensor") and not hasattr(states, "full_tensor"):
                raise Untraceable(IN_A_UNIT)
        elif func in _MATMULS and len(args) == 2 and not kwargs:
            states, right = args
            if right.dim() == 2 and right.shape[1] == self._vocab and states.shape[:-1] == self._rows:
                return TracedLogits(Form.of_linear(states, right.t(), None))
        return func(*args, **kwargs)


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bind the arguments of ``torch.nn.functional.linear``."""
    return input, weight, bias
