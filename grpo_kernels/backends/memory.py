"""Memory for gradients of logits, its rows aligned as the logits' own; on a CPU in huge pages: a fresh tensor faults in
page by page, and 4 kB pages take as long as the kernel that writes them (25 of 30 ms for a gradient of 65 MB). GEMMs,
which write slowly, gain nothing (measured)."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_LARGE = 8 << 20
_PAGE = 4096
_MADV_HUGEPAGE = 14


def row_strides(logits: Tensor) -> tuple[int, ...]:
    """Return the strides, in elements, of a gradient of (..., N, V) ``logits``: those of dense rows, longer by what
    it takes for each row to begin as far from a multiple of 16 bytes as the logits' own, so that kernels move the same
    vectors in and out. They are dense wherever the logits are, or their strides are whole
    vectors more than dense ones."""
    width = 16 // logits.element_size()
    strides = [1]
    for extent, stride in zip(logits.shape[:0:-1], logits.stride()[-2::-1], strict=True):
        dense = extent * strides[0]
        strides.insert(0, dense + (stride - dense) % width)
    return tuple(strides)


def gradient_like(logits: Tensor, length: int | None = None) -> Tensor:
    """Return uninitialised memory of the logits' shape, with ``row_strides``; the first row is as far from a multiple
    of 16 bytes as theirs. Rows after ``length``, which predict no token, are zeros."""
    strides, size = row_strides(logits), logits.element_size()
    skew = logits.data_ptr() % 16 // size
    count = skew + sum((extent - 1) * stride for extent, stride in zip(logits.shape, strides, strict=True)) + 1
    storage = torch.empty(count if logits.numel() else skew, dtype=logits.dtype, device=logits.device)
    if logits.device.type == "cpu" and count * size >= _LARGE and (advise := _madvise()):
        start = -(-storage.data_ptr() // _PAGE) * _PAGE
        end = (storage.data_ptr() + count * size) // _PAGE * _PAGE
        advise(start, end - start, _MADV_HUGEPAGE)  # advice: a system that does not know it takes small pages
    gradient = storage.new_empty(0).set_(storage.untyped_storage(), skew, logits.shape, strides)  # no view of another
    if length is not None and length < logits.shape[-2]:
        gradient.narrow(-2, length, logits.shape[-2] - length).zero_()
    return gradient


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
