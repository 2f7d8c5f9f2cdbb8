"""The LM head's GEMMs over one chunk of rows, and its gradients gathered over chunks. All GEMMs are PyTorch's.

A chunk costs 2·rows·H·V FLOPs for its logits and as many for each gradient that is wanted, nothing else. The weight's
gradient is summed in fp32 and rounded once; a single chunk needs no sum.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    bias: Tensor | None
    """(V,)"""


class HeadGradients(NamedTuple):
    """The gradients in ``HeadTensors``; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Wants(NamedTuple):
    """Which gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, head: HeadTensors) -> Wants:
        enabled = torch.is_grad_enabled()
        return cls(*(enabled and tensor is not None and tensor.requires_grad for tensor in head))


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
    mixed = device == "cpu" and operands != logits  # PyTorch has no such GEMM for CPUs
    return SlicedHead if mixed or not has_native_gemm(device, operands) else Head


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute total += a @ b in place."""
    return torch.addmm(total, a, b, out=total)


class Head:
    """weight (V, H) and bias (V,), cast to ``dtype``; GEMMs on the whole of it. ``wide``: gradients stay in fp32.

    Logits have the same dtype, or are fp32; their gradient is rounded to ``dtype`` then.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunks: int, wants: Wants, wide: bool
    ) -> None:
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.wants = wants
        self.single = chunks <= 1
        self._real = torch.float64 if dtype == torch.float64 else torch.float32
        self._weight_dtype = self._real if wide else weight.dtype
        self._bias_dtype = self._real if wide or bias is None else bias.dtype
        self._weight_sum: Tensor | None = None
        self._bias_sum: Tensor | None = None

    @staticmethod
    def bytes(hidden_size: int, vocab: int, operands: torch.dtype, logits: torch.dtype) -> tuple[int, int]:
        """Return those of a call, and of each row of a chunk: its logits, its hidden state and that one's gradient."""
        rounded = 0 if operands == logits else operands.itemsize
        return 0, vocab * (logits.itemsize + rounded) + 2 * hidden_size * operands.itemsize

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write hidden (C, H) @ weight.T + bias into ``out`` (C, V)."""
        if out.dtype != hidden.dtype:
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
            if self.bias is not None:
                out += self.bias
        elif self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def backward(self, gradient: Tensor, hidden: Tensor) -> Tensor | None:
        """Add the logits' gradient (C, V) to the weight's and the bias's, and return the hidden states' (C, H)."""
        if self.wants.bias:
            self._add_bias(gradient)
        gradient = gradient.to(self.weight.dtype)
        if self.wants.weight:
            self._add_weight(gradient, hidden)
        return gradient @ self.weight if self.wants.hidden else None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the weight's and bias's gradients in their own dtypes, zeros where no chunk came."""
        weight, bias = self._weight_sum, self._bias_sum
        if self.wants.weight and weight is None:
            weight = torch.zeros_like(self.weight)
        if self.wants.bias and bias is None:
            bias = torch.zeros_like(self.weight[:, 0])
        return (
            None if weight is None else weight.to(self._weight_dtype),
            None if bias is None else bias.to(self._bias_dtype),
        )

    def _add_bias(self, gradient: Tensor) -> None:
        part = gradient.sum(0, dtype=self._real)
        self._bias_sum = part if self._bias_sum is None else self._bias_sum.add_(part)

    def _add_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        transposed, total = gradient.t(), self._weight_sum
        if gradient.dtype == self._real or (self.single and gradient.dtype == self._weight_dtype):
            if total is None:
                self._weight_sum = torch.mm(transposed, hidden)
            else:
                _add_product(total, transposed, hidden)
        elif gradient.device.type == "cuda":
            if total is None:
                self._weight_sum = torch.mm(transposed, hidden, out_dtype=self._real)
            else:
                torch.addmm(total, transposed, hidden, out_dtype=self._real, out=total)
        else:
            total = torch.zeros_like(self.weight, dtype=self._real) if total is None else total
            for first, last in self._slices():
                _add_product(total[first:last], transposed[first:last].to(self._real), hidden.to(self._real))
            self._weight_sum = total

    def _slices(self) -> list[tuple[int, int]]:
        vocab = self.weight.shape[0]
        return [(first, min(first + SLICE_COLUMNS, vocab)) for first in range(0, vocab, SLICE_COLUMNS)]


class SlicedHead(Head):
    """For CPUs without half-precision instructions: fp32 GEMMs on slices of the weight. Half-precision GEMMs
    take 5 times as long there for the logits, 8 for the weight's gradient, 120 for the hidden states' (measured: Zen 3,
    torch 2.13)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunks: int, wants: Wants, wide: bool
    ) -> None:
        super().__init__(weight, bias, dtype, chunks, wants, wide)
        self._slice = weight.new_empty(SLICE_COLUMNS, weight.shape[1], dtype=torch.float32)
        self._part: Tensor | None = None
        if wants.weight:
            like = weight.dtype if self.single and not wide else torch.float32
            make = torch.empty_like if chunks == 1 else torch.zeros_like
            self._weight_sum = make(weight, dtype=like, requires_grad=False)

    @staticmethod
    def bytes(hidden_size: int, vocab: int, operands: torch.dtype, logits: torch.dtype) -> tuple[int, int]:
        """Return those of the slice; of logits, fp32 rows of hidden states, their gradient and a slice's."""
        states = 2 * hidden_size * (operands.itemsize + 4)
        return SLICE_COLUMNS * hidden_size * 4, vocab * logits.itemsize + states + SLICE_COLUMNS * 4

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        wide = hidden.float()
        for first, last in self._slices():
            columns = self._part_of(hidden.shape[0], last - first)
            torch.mm(wide, self._wide(first, last).t(), out=columns)
            if self.bias is not None:
                columns += self.bias[first:last]
            out[:, first:last] = columns

    def backward(self, gradient: Tensor, hidden: Tensor) -> Tensor | None:
        if self.wants.bias:
            self._add_bias(gradient)
        if not (self.wants.weight or self.wants.hidden):
            return None
        wide = hidden.float()
        result = torch.zeros_like(wide) if self.wants.hidden else None
        for first, last in self._slices():
            columns = self._part_of(gradient.shape[0], last - first).copy_(gradient[:, first:last])
            if result is not None:
                _add_product(result, columns, self._wide(first, last))
            if self._weight_sum is not None:
                target = self._weight_sum[first:last]
                if self.single:
                    target.copy_(torch.mm(columns.t(), wide, out=self._slice[: last - first]))
                else:
                    _add_product(target, columns.t(), wide)
        return None if result is None else result.to(gradient.dtype)

    def _part_of(self, rows: int, columns: int) -> Tensor:
        """Return room for some columns of a chunk."""
        if self._part is None or self._part.shape[0] < rows:
            self._part = self._slice.new_empty(rows, SLICE_COLUMNS)
        return self._part[:rows, :columns]

    def _wide(self, first: int, last: int) -> Tensor:
        return self._slice[: last - first].copy_(self.weight[first:last])
