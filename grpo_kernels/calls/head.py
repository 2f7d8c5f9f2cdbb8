"""The LM head's GEMMs over one chunk of rows, and its gradients gathered over chunks. All GEMMs are PyTorch's.

A chunk costs 2·rows·H·V FLOPs for its logits and as many for each gradient that is wanted, nothing else. The weight's
gradient is summed in fp32 and rounded once; a single chunk needs no sum. An adapter of rank r costs 2·rows·r·V for each
of its own: its product is added to the logits where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import memory

SLICE_COLUMNS = 1024
"""Vocabulary columns that ``SlicedHead`` converts to fp32 at a time: 4 MB of a weight with H = 1024, which stay in
cache."""
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


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


@functools.cache
def has_native_gemm(device: str, dtype: torch.dtype) -> bool:
    """Whether GEMMs of ``dtype`` run at full speed: on CPUs, half precision does only with instructions for it."""
    if device != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    return dtype == torch.bfloat16 and bool(cpu_bf16_instructions())


@functools.cache
def cpu_bf16_instructions() -> tuple[str, ...]:
    """Return this CPU's, by name. Read once; the choice never depends on a timing, so results reproduce."""
    read: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return tuple(name for name in _NATIVE if read.get(name))


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in, autocast included."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def head_kind(device: str, operands: torch.dtype, logits: torch.dtype) -> type[Head]:
    """Return the GEMMs for this kind of device and these dtypes."""
    mixed = device != "cuda" and operands != logits  # PyTorch has such a GEMM for CUDA alone
    return SlicedHead if mixed or not has_native_gemm(device, operands) else Head


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b in place; on a GPU an fp32 total of factors in half precision, too."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _slices(vocab: int) -> list[tuple[int, int]]:
    return [(first, min(first + SLICE_COLUMNS, vocab)) for first in range(0, vocab, SLICE_COLUMNS)]


class Factor:
    """A weight (V, K), cast to ``dtype``, that states (C, K) are multiplied by, and its gradient, summed over chunks.

    ``Head`` works on the whole of it, ``SlicedHead`` on some of its V at a time.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, chunks: int, wide: bool, wants_states: bool, wants_weight: bool
    ) -> None:
        self.weight = weight.detach().to(dtype)
        self.wants_states, self.wants_weight = wants_states, wants_weight
        self._single = chunks <= 1
        self._real = torch.float64 if dtype == torch.float64 else torch.float32
        self._dtype = self._real if wide else weight.dtype
        self._sum: Tensor | None = None
        self._room: Tensor | None = None

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

    def add_slice(self, columns: Tensor, states: Tensor, first: int, last: int) -> None:
        """Add that of columns [first, last) of the logits alone, in fp32."""
        if self._sum is None:
            self._sum = self._new(self._dtype if self._single else torch.float32)
            if not self._single:
                self._sum.zero_()
        target = self._sum[first:last]
        if self._single:
            target.copy_(torch.mm(columns.t(), states, out=self._slice_room(last - first)))
        else:
            _add_product(target, columns.t(), states)

    def slice(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the weight in fp32, until the next call of ``slice`` or ``add_slice``."""
        return self._slice_room(last - first).copy_(self.weight[first:last])

    def _new(self, dtype: torch.dtype) -> Tensor:
        """Return room for the gradient, or for its sum."""
        return memory.new(tuple(self.weight.shape), dtype, self.weight.device, memory.Kind.WEIGHT)

    def gradient(self) -> Tensor | None:
        """Return the weight's gradient in its own dtype, zeros where no chunk came; None where it is not wanted."""
        if not self.wants_weight:
            return None
        return (torch.zeros_like(self.weight) if self._sum is None else self._sum).to(self._dtype)

    def _slice_room(self, rows: int) -> Tensor:
        if self._room is None:
            self._room = self.weight.new_empty(SLICE_COLUMNS, self.weight.shape[1], dtype=torch.float32)
        return self._room[:rows]


class Head:
    """Weights (V, H), (V, r), cast to ``dtype``, and bias (V,), to that of the ``logits``; GEMMs on the whole of them.
    ``wide``: gradients stay in fp32.

    Logits have the same dtype, or are fp32; their gradient is rounded to ``dtype`` then.
    """

    def __init__(
        self, head: HeadTensors, dtype: torch.dtype, logits: torch.dtype, chunks: int, wants: Wants, wide: bool
    ) -> None:
        wanted = zip(head.weights, wants.states, wants.weights, strict=False)
        self.factors = [Factor(weight, dtype, chunks, wide, *of_it) for weight, *of_it in wanted]
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
    """For CPUs without half-precision instructions: fp32 GEMMs on slices of the weights. Half-precision GEMMs
    take 5 times as long there for the logits, 8 for the weight's gradient, 120 for the hidden states' (measured: Zen 3,
    torch 2.13)."""

    _part: Tensor | None = None

    @staticmethod
    def bytes(width: int, vocab: int, operands: torch.dtype, logits: torch.dtype) -> tuple[int, int]:
        """Return those of the slices; of logits, fp32 rows of states, their gradients and a slice's."""
        states = 2 * width * (operands.itemsize + 4)
        return SLICE_COLUMNS * width * 4, vocab * logits.itemsize + states + SLICE_COLUMNS * 4

    def logits(self, states: list[Tensor], out: Tensor) -> None:
        wide = [rows.float() for rows in states]
        for first, last in _slices(out.shape[1]):
            columns = self._part_of(len(out), last - first)
            torch.mm(wide[0], self.factors[0].slice(first, last).t(), out=columns)
            for rows, factor in zip(wide[1:], self.factors[1:], strict=True):
                _add_product(columns, rows, factor.slice(first, last).t())
            if self.bias is not None:
                columns += self.bias[first:last]
            out[:, first:last] = columns

    def backward(
        self, gradient: Tensor, states: list[Tensor], over_ranks: Callable[[Tensor], Callable[[], Tensor]] | None
    ) -> list[Tensor | None]:
        if self._wants_bias:
            self._add_bias(gradient)
        if not any(factor.wants_states or factor.wants_weight for factor in self.factors):
            return [None] * len(states)
        wide = [rows.float() for rows in states]
        results = [
            torch.zeros_like(rows) if factor.wants_states else None
            for rows, factor in zip(wide, self.factors, strict=True)
        ]
        for first, last in _slices(gradient.shape[1]):
            columns = self._part_of(len(gradient), last - first).copy_(gradient[:, first:last])
            for rows, factor, result in zip(wide, self.factors, results, strict=True):
                if result is not None:
                    _add_product(result, columns, factor.slice(first, last))
                if factor.wants_weight:
                    factor.add_slice(columns, rows, first, last)
        parts = [None if result is None else result.to(gradient.dtype) for result in results]
        return [part if part is None or over_ranks is None else over_ranks(part)() for part in parts]

    def _part_of(self, rows: int, columns: int) -> Tensor:
        """Return room for some columns of a chunk."""
        if self._part is None or self._part.shape[0] < rows:
            self._part = self.factors[0].weight.new_empty(rows, SLICE_COLUMNS, dtype=torch.float32)
        return self._part[:rows, :columns]
