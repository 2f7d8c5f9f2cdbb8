"""The LM head's GEMMs over one chunk of rows, and its gradients gathered over chunks. All GEMMs are PyTorch's.

A chunk costs 2·rows·H·V FLOPs for its logits and as many for each gradient that is wanted, nothing else. The weight's
gradient is summed in fp32 and rounded once; a single chunk needs no sum. An adapter of rank r costs 2·rows·r·V for each
of its own: its product is added to the logits where they are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import memory

SLICE_COLUMNS = 1024
"""Vocabulary columns that ``SlicedHead`` works on at a time, at least: 4 MB of fp32 weight at H = 1024, which stay in
cache."""
SLICE_LOGITS = 1 << 20
"""Logits of a slice about which it has more columns for, up to ``MOST_COLUMNS``: each slice is a barrier for all
threads."""
MOST_COLUMNS = 8192
BATCHED_ROWS = 256
"""Rows of a chunk up to which a batch of GEMMs is faster than one, where nothing is converted."""
PIECES = 4
"""Products that its GEMMs are cut into, as one batch: see ``SlicedHead``."""
_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), torch.float16: ("amx_fp16",)}
"""Those that multiply and add in fp32. With avx512_fp16 alone oneDNN converts to fp32 as well."""


class HeadTensors(NamedTuple):
    """What logits are made of, or their gradients, in the callers' dtypes."""

    hidden: Tensor
    """(B, T or T+1, H) or (N, H)"""
    weight: Tensor
    """(V, H)"""
    bias: Tensor | None = None
    """(V,)"""
    adapter_states: Tensor | None = None
    """(B, T or T+1, r) or (N, r); None without an adapter, as is ``adapter_weight``."""
    adapter_weight: Tensor | None = None
    """(V, r)"""

    @property
    def states(self) -> list[Tensor]:
        """What the rows of a chunk are taken of: the logits are the sum of their products with ``weights``."""
        return [self.hidden] if self.adapter_states is None else [self.hidden, self.adapter_states]

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight] if self.adapter_weight is None else [self.weight, self.adapter_weight]

    @property
    def width(self) -> int:
        """H + r"""
        return sum(states.shape[-1] for states in self.states)


class HeadGradients(NamedTuple):
    """The gradients in ``HeadTensors``; None where none is wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    adapter_states: Tensor | None = None
    adapter_weight: Tensor | None = None


class Wants(NamedTuple):
    """Which gradients are computed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    adapter_states: bool = False
    adapter_weight: bool = False

    @classmethod
    def of(cls, head: HeadTensors) -> Wants:
        enabled = torch.is_grad_enabled()
        return cls(*(enabled and tensor is not None and tensor.requires_grad for tensor in head))

    @property
    def states(self) -> tuple[bool, bool]:
        return self.hidden, self.adapter_states

    @property
    def weights(self) -> tuple[bool, bool]:
        return self.weight, self.adapter_weight


def has_native_gemm(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's GEMMs of ``dtype`` run at full speed: on CPUs, half precision does only with instructions for
    it."""
    return device != "cpu" or dtype in (torch.float32, torch.float64) or bool(cpu_instructions(dtype))


@functools.cache
def cpu_instructions(dtype: torch.dtype) -> tuple[str, ...]:
    """Return this CPU's for GEMMs of a half precision, by name. Read once; the choice never depends on a timing, so
    results reproduce."""
    read: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return tuple(name for name in _INSTRUCTIONS[dtype] if read.get(name))


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in, autocast included."""
    return torch.get_autocast_dtype(hidden.device.type) if is_autocast(hidden) else hidden.dtype


def is_autocast(hidden: Tensor) -> bool:
    """Whether autocast decides on the dtype; some kinds of devices, meta among them, have none to ask for."""
    device = hidden.device.type
    known = torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which nothing is cast."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def head_kind(device: str, operands: torch.dtype, logits: torch.dtype) -> type[Head]:
    """Return the GEMMs for this kind of device and these dtypes."""
    mixed = device != "cuda" and operands != logits  # PyTorch has such a GEMM for CUDA alone
    sliced = mixed or (device == "cpu" and not (operands.itemsize == 2 and has_native_gemm(device, operands)))
    return SlicedHead if sliced else Head


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b in place; on a GPU an fp32 total of factors in half precision, too."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _pieces(tensor: Tensor, dim: int) -> Tensor:
    """Return a view whose first dimension is that of up to ``PIECES`` equal parts of dimension ``dim``."""
    parts: Tensor = tensor.unflatten(dim, (math.gcd(tensor.shape[dim], PIECES), -1))
    return parts.movedim(dim, 0)


def _joined(parts: Tensor, out: Tensor) -> Tensor:
    """Write (n, C, K / n) parts of (C, K) into ``out``."""
    _pieces(out, 1).copy_(parts)
    return out


def _slices(vocab: int, columns: int = SLICE_COLUMNS) -> list[tuple[int, int]]:
    return [(first, min(first + columns, vocab)) for first in range(0, vocab, columns)]


def _converted_columns(width: int) -> int:
    """Return the most columns of a slice of a weight (V, width) that is converted: at most 6 MB of them in fp32, unless
    the least are more."""
    return 2 * SLICE_COLUMNS if width <= 768 else SLICE_COLUMNS


class Factor:
    """A weight (V, K), cast to ``dtype``, that states (C, K) are multiplied by; its gradient, summed over chunks."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, chunks: int, wide: bool, wants_states: bool, wants_weight: bool
    ) -> None:
        self.weight = self._operand(weight.detach(), dtype)
        self.wants_states, self.wants_weight = wants_states, wants_weight
        self._single = chunks <= 1
        self._real = torch.float64 if dtype == torch.float64 else torch.float32
        self._dtype = self._real if wide else weight.dtype
        self._sum: Tensor | None = None

    @staticmethod
    def _operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def add(self, gradient: Tensor, states: Tensor) -> None:
        """Add the weight's gradient from that of the logits, (C, V)."""
        transposed, total = gradient.t(), self._sum
        if gradient.dtype == self._real or (self._single and gradient.dtype == self._dtype):
            if total is None:
                self._sum = torch.mm(transposed, states, out=self._new(gradient.dtype))
            else:
                _add_product(total, transposed, states)
        elif gradient.device.type == "cuda":
            if total is None:
                self._sum = torch.mm(transposed, states, out_dtype=self._real)
            else:
                _add_product(total, transposed, states)
        else:
            total = torch.zeros_like(self.weight, dtype=self._real) if total is None else total
            for first, last in _slices(len(total)):
                _add_product(total[first:last], transposed[first:last].to(self._real), states.to(self._real))
            self._sum = total

    def _new(self, dtype: torch.dtype) -> Tensor:
        """Return room for the gradient, or for its sum."""
        return memory.new(tuple(self.weight.shape), dtype, self.weight.device, memory.Kind.WEIGHT)

    def gradient(self) -> Tensor | None:
        """Return the weight's gradient in its own dtype, zeros where no chunk came; None where it is not wanted."""
        if not self.wants_weight:
            return None
        return (torch.zeros_like(self.weight) if self._sum is None else self._sum).to(self._dtype)


class SlicedFactor(Factor):
    """The same, some of the weight's V rows at a time, in fp32 (fp64)."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, chunks: int, wide: bool, wants_states: bool, wants_weight: bool
    ) -> None:
        super().__init__(weight, dtype, chunks, wide, wants_states, wants_weight)
        self._operands = dtype
        self.converts = not weight.dtype == dtype == self._real
        self._room: Tensor | None = None

    @staticmethod
    def _operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight  # cast by ``slice``

    def slice(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the weight, until the next call of ``slice`` or ``add_slice``."""
        rows = self.weight[first:last].to(self._operands)
        return rows if rows.dtype == self._real else self._slice_room(last - first).copy_(rows)

    def add_slice(self, columns: Tensor, states: Tensor, first: int, last: int) -> None:
        """Add the gradient of rows [first, last) from that of these columns of the logits, (C, last - first)."""
        if self._sum is None:
            self._sum = self._new(self._dtype if self._single else self._real)
            if not self._single:
                self._sum.zero_()
        target = self._sum[first:last]
        direct = target.dtype == self._real
        product = _pieces(target if direct else self._slice_room(last - first), 0)
        factors = _pieces(columns, 1).mT, states.expand(len(product), *states.shape)
        if self._single:
            torch.bmm(*factors, out=product)
        else:
            torch.baddbmm(product, *factors, out=product)
        if not direct:
            target.copy_(self._slice_room(last - first))

    def _slice_room(self, rows: int) -> Tensor:
        if self._room is None or len(self._room) < rows:
            self._room = self.weight.new_empty(rows, self.weight.shape[1], dtype=self._real)
        return self._room[:rows]


class Head:
    """Weights (V, H), (V, r), cast to ``dtype``, and bias (V,), to that of the ``logits``; GEMMs on the whole of them.
    ``wide``: gradients stay in fp32.

    Logits have the same dtype, or are fp32; their gradient is rounded to ``dtype`` then.
    """

    factor: type[Factor] = Factor

    def __init__(
        self, head: HeadTensors, dtype: torch.dtype, logits: torch.dtype, chunks: int, wants: Wants, wide: bool
    ) -> None:
        wanted = zip(head.weights, wants.states, wants.weights, strict=False)
        self.factors = [self.factor(weight, dtype, chunks, wide, *of_it) for weight, *of_it in wanted]
        bias = head.bias
        self.bias = None if bias is None else bias.detach().to(logits)
        self._wants_bias = wants.bias
        self._real = torch.float64 if dtype == torch.float64 else torch.float32
        self._bias_dtype = self._real if wide or bias is None else bias.dtype
        self._bias_sum: Tensor | None = None

    @staticmethod
    def bytes(width: int, vocab: int, operands: torch.dtype, logits: torch.dtype) -> tuple[int, int]:
        """Return those of a call, and of each row of a chunk: its logits, its states, H + r wide, and their
        gradients."""
        rounded = 0 if operands == logits else operands.itemsize
        return 0, vocab * (logits.itemsize + rounded) + 2 * width * operands.itemsize

    def logits(self, states: list[Tensor], out: Tensor) -> None:
        """Write Σ states (C, K) @ weight (V, K).T + bias into ``out`` (C, V)."""
        hidden, weight = states[0], self.factors[0].weight
        if out.dtype != hidden.dtype:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
            if self.bias is not None:
                out += self.bias
        elif self.bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, weight.t(), out=out)
        for rows, factor in zip(states[1:], self.factors[1:], strict=True):
            _add_product(out, rows, factor.weight.t())

    def backward(
        self, gradient: Tensor, states: list[Tensor], over_ranks: Callable[[Tensor], Callable[[], Tensor]] | None
    ) -> list[Tensor | None]:
        """Add the logits' gradient (C, V) to the weights' and the bias's, and return those of the states (C, K).

        ``over_ranks`` begins to add one of the latter over ranks, beside which the weights' are computed.
        """
        if self._wants_bias:
            self._add_bias(gradient)
        gradient = gradient.to(self.factors[0].weight.dtype)
        parts = [gradient @ factor.weight if factor.wants_states else None for factor in self.factors]
        sums = [None if part is None or over_ranks is None else over_ranks(part) for part in parts]
        for factor, rows in zip(self.factors, states, strict=True):
            if factor.wants_weight:
                factor.add(gradient, rows)
        return [part if total is None else total() for part, total in zip(parts, sums, strict=True)]

    def gradients(self) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the weights' and the bias's gradients in their own dtypes, zeros where no chunk came."""
        bias = self._bias_sum
        if self._wants_bias and bias is None:
            bias = torch.zeros_like(self.factors[0].weight[:, 0])
        return [factor.gradient() for factor in self.factors], None if bias is None else bias.to(self._bias_dtype)

    def _add_bias(self, gradient: Tensor) -> None:
        part = gradient.sum(0, dtype=self._real)
        self._bias_sum = part if self._bias_sum is None else self._bias_sum.add_(part)


class SlicedHead(Head):
    """On CPUs: fp32 (fp64) GEMMs on slices of the weights, each of which a batch of ``PIECES`` smaller ones makes. MKL
    spreads a batch over its threads evenly, and one small GEMM not: on two, a batch takes 0.65 of its time at 8 rows,
    0.85 at 64 and 0.92 at 128. Without instructions for them, operands in half precision are converted as they are
    needed: GEMMs of their own take 5 times as long there for the logits, 8 for the weight's gradient, 120 for the
    hidden states' (measured: Zen 3, torch 2.13)."""

    factor = SlicedFactor
    factors: list[SlicedFactor]  # type: ignore[assignment]
    _part: Tensor | None = None

    @staticmethod
    def bytes(width: int, vocab: int, operands: torch.dtype, logits: torch.dtype) -> tuple[int, int]:
        """Return those of a converted slice; of logits, rows of states, their gradients, what these are made of, and a
        slice's logits."""
        real = max(4, operands.itemsize)
        converted = operands.itemsize < real
        columns = min(_converted_columns(width) if converted else MOST_COLUMNS, vocab)
        states = width * (2 * operands.itemsize + (1 + converted) * real)
        return columns * width * real * converted, vocab * logits.itemsize + states + columns * real

    def logits(self, states: list[Tensor], out: Tensor) -> None:
        if self._whole(out):
            super().logits(states, out)
            return
        wide = [rows.to(self._real) for rows in states]
        for first, last in _slices(out.shape[1], self._columns(len(out))):
            target = _pieces(out[:, first:last], 1)
            columns = self._part_of(target.shape)
            for rows, factor in zip(wide, self.factors, strict=True):
                factors = rows.expand(len(target), *rows.shape), _pieces(factor.slice(first, last), 0).mT
                if factor is self.factors[0]:
                    torch.bmm(*factors, out=columns)
                else:
                    torch.baddbmm(columns, *factors, out=columns)
            if self.bias is not None:
                columns += _pieces(self.bias[None, first:last], 1)
            target.copy_(columns)

    def backward(
        self, gradient: Tensor, states: list[Tensor], over_ranks: Callable[[Tensor], Callable[[], Tensor]] | None
    ) -> list[Tensor | None]:
        if self._whole(gradient):
            return super().backward(gradient, states, over_ranks)
        if self._wants_bias:
            self._add_bias(gradient)
        wide = [rows.to(self._real) for rows in states]
        if over_ranks is None:
            return self._walk(gradient, wide, of_states=True, of_weights=True)
        parts = self._walk(gradient, wide, of_states=True, of_weights=False)
        sums = [None if part is None else over_ranks(part) for part in parts]
        self._walk(gradient, wide, of_states=False, of_weights=True)
        return [None if total is None else total() for total in sums]

    def _walk(self, gradient: Tensor, states: list[Tensor], of_states: bool, of_weights: bool) -> list[Tensor | None]:
        """Return the gradients of the states, where they are asked for and wanted, and add those of the weights: of all
        columns at once where nothing is converted."""
        wanted = [(of_states and factor.wants_states, of_weights and factor.wants_weight) for factor in self.factors]
        if not any(map(any, wanted)):
            return [None] * len(states)
        totals = [
            torch.zeros_like(_pieces(rows, 1), memory_format=torch.contiguous_format) if wants_states else None
            for rows, (wants_states, _) in zip(states, wanted, strict=True)
        ]
        whole = gradient.dtype == self._real and not self._converts
        at_once = max(1, gradient.shape[1]) if whole else self._columns(len(gradient))
        for first, last in _slices(gradient.shape[1], at_once):
            columns = gradient[:, first:last]
            if columns.dtype != self._real:
                columns = self._part_of(columns.shape).copy_(columns)
            for rows, factor, total, (_, wants_weight) in zip(states, self.factors, totals, wanted, strict=True):
                if total is not None:
                    each = columns.expand(len(total), *columns.shape)
                    torch.baddbmm(total, each, _pieces(factor.slice(first, last), 1), out=total)
                if wants_weight:
                    factor.add_slice(columns, rows, first, last)
        return [
            None if total is None else _joined(total, torch.empty_like(rows, dtype=gradient.dtype))
            for rows, total in zip(states, totals, strict=True)
        ]

    @property
    def _converts(self) -> bool:
        return any(factor.converts for factor in self.factors)

    def _whole(self, logits: Tensor) -> bool:
        """Whether the GEMMs of these logits, or of their gradient, are those of ``Head``: many rows, or few columns."""
        rows, columns = logits.shape
        return (rows > BATCHED_ROWS or columns <= SLICE_COLUMNS) and not self._converts

    def _columns(self, rows: int) -> int:
        """Return those of a slice of so many rows."""
        columns = min(max(1, SLICE_LOGITS // (SLICE_COLUMNS * max(1, rows))) * SLICE_COLUMNS, MOST_COLUMNS)
        width = sum(factor.weight.shape[1] for factor in self.factors)
        return min(columns, _converted_columns(width)) if self._converts else columns

    def _part_of(self, shape: torch.Size) -> Tensor:
        """Return room for some columns of a chunk."""
        if self._part is None or self._part.numel() < shape.numel():
            self._part = self.factors[0].weight.new_empty(shape.numel(), dtype=self._real)
        return self._part[: shape.numel()].view(shape)
