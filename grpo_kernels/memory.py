"""Large tensors on a CPU, in huge pages: a fresh tensor faults in page by page, and 4 kB pages take as long as the
kernel that writes them (25 of 30 ms for a gradient of 65 MB). GEMMs, which write slowly, gain nothing (measured)."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LARGE = 8 << 20
_PAGE = 4096
_MADV_HUGEPAGE = 14


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, dense."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    bytes = tensor.numel() * tensor.element_size()
    if device.type == "cpu" and bytes >= _LARGE and (advise := _madvise()):
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + bytes) // _PAGE * _PAGE
        advise(start, end - start, _MADV_HUGEPAGE)  # advice: a system that does not know it takes small pages
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
