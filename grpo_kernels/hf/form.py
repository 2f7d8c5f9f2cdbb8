"""What logits would be that are not made: cap · tanh(scale · (Σ states Wᵀ + bias)), and what may become of them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls.sharding import is_dtensor

IN_A_UNIT = "a part of it besides weight and bias is sharded, in an FSDP2 unit of its own: the root's unit serves it"
"""Why a sharded head is not traced."""
ON_RANKS = "while every rank has some of them: ColwiseParallel(output_layouts=Replicate()) gives a model them all"
"""Why columns of logits are left alone."""


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
    """What was around the head's products; some kinds of devices, meta among them, have none."""

    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Autocast:
        if not torch.amp.is_autocast_available(device):
            return cls(False, torch.float32)
        return cls(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def around(self, device: str, **options: Any) -> AbstractContextManager[Any]:
        if not torch.amp.is_autocast_available(device):
            return nullcontext()
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
    spread: bool = False
    """Whether the model's own would be, on each rank of tensor parallelism, the columns of that rank alone."""

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
        if self.spread != other.spread:
            raise Untraceable(f"others are added to them {ON_RANKS}")
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
        dims, used = len(self.shape), sum(map(_dimensions, keys))
        if Ellipsis in [each for each in keys if not isinstance(each, Tensor)]:
            place = next(i for i, each in enumerate(keys) if each is Ellipsis)
            keys[place : place + 1] = [slice(None)] * (dims - used + 1)
            used = dims
        if None in [each for each in keys if not isinstance(each, Tensor)] or used > dims:
            raise Untraceable("logits are given another dimension")
        columns = keys.pop() if used == dims else slice(None)
        if not isinstance(columns, slice) or columns.step not in (None, 1):
            raise Untraceable("some columns of the logits are taken, not a slice")
        products = self.products
        if any(not isinstance(each, slice) or each != slice(None) for each in keys):
            cut: dict[int, Tensor] = {}
            for product in products:  # what is one tensor stays one
                cut.setdefault(id(product.states), product.states[tuple(keys)])
            products = tuple(Product.of(cut[id(each.states)], each.weight, each.columns) for each in products)
        if columns.indices(self.vocab) != (0, self.vocab, 1):
            if self.spread or is_dtensor(self.products[0].weight):
                raise Untraceable(
                    "columns of a head are cut that is sharded over ranks by tensor parallelism, or in an FSDP2 unit "
                    "of its own: the root's unit serves it"
                )
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
        if self.spread:
            raise Untraceable(f"columns are set {ON_RANKS}")
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
        if self.spread and values.numel() > 1:
            raise Untraceable(f"{what} one number for each column is taken {ON_RANKS}")
        if values.numel() == 1:
            return values.reshape(()).expand(self.vocab)
        if values.shape[-1:] != (self.vocab,) or values.numel() != self.vocab:
            raise Untraceable(f"{what} a tensor {tuple(values.shape)} is taken")
        return values.reshape(-1)

    @property
    def logit_scale(self) -> float:
        """As the linear functions take it."""
        return self.scale if self.cap is None else self.scale * self.cap


def _number_of(factor: Tensor) -> float | Tensor:
    """Return the number in a tensor, where reading it waits for nothing and nobody trains it."""
    trained = factor.requires_grad and torch.is_grad_enabled()
    return float(factor) if factor.is_cpu and not trained else factor.reshape(())


def _dimensions(key: Any) -> int:
    """Return how many dimensions a key indexes: a mask all that it has."""
    return key.dim() if isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8) else 1
