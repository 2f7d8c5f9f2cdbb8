"""Memory for what has a vocabulary's size: gradients of logits and heads, and the logits of chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import blocks
from .blocks import Kind as Kind


def row_strides(logits: Tensor) -> tuple[int, ...]:
    """Return the strides, in elements, of a gradient of (..., N, V) ``logits``: those of dense rows, longer by what
    it takes for each row to begin as far from a multiple of 16 bytes as the logits' own, so that kernels move the same
    vectors in and out. They are dense wherever the logits are, or their strides are whole vectors more than dense ones;
    the stride of a dimension of size 1 says nothing."""
    width = 16 // logits.element_size()
    strides = [1]
    for inner, outer, stride in zip(logits.shape[:0:-1], logits.shape[-2::-1], logits.stride()[-2::-1], strict=True):
        dense = inner * strides[0]
        strides.insert(0, dense + ((stride - dense) % width if outer > 1 else 0))
    return tuple(strides)


def gradient_like(logits: Tensor, length: int | None = None) -> Tensor:
    """Return uninitialised memory of the logits' shape, with ``row_strides``; the first row is as far from a multiple
    of 16 bytes as theirs. Rows after ``length``, which predict no token, are zeros."""
    size = logits.element_size()
    skew = logits.data_ptr() % 16 // size
    if skew == 0 and logits.is_contiguous() and logits.numel() * size < blocks.LARGE:
        gradient = torch.empty_like(logits)  # what follows takes longer than the kernel of a short call
    else:
        strides = row_strides(logits)
        count = skew + sum((extent - 1) * stride for extent, stride in zip(logits.shape, strides, strict=True)) + 1
        count = count if logits.numel() else skew
        if logits.device.type == "cpu":
            flat = blocks.empty(count, logits.dtype, Kind.LOGITS)
        else:
            flat = torch.empty(count, dtype=logits.dtype, device=logits.device)
        gradient = _of(flat, skew, logits.shape, strides)
    if length is not None and length < logits.shape[-2]:
        gradient.narrow(-2, length, logits.shape[-2] - length).zero_()
    return gradient


def new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: Kind) -> Tensor:
    """Return an uninitialised dense tensor, of blocks on a CPU."""
    count = math.prod(shape)
    if device.type != "cpu" or count * dtype.itemsize < blocks.LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    flat = blocks.empty(count, dtype, kind)
    return _of(flat, 0, shape, flat.view(shape).stride())


def _of(flat: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Return a tensor of this memory that is no view of another."""
    tensor: Tensor = flat.new_empty(0).set_(flat.untyped_storage(), offset, shape, strides)
    return tensor
