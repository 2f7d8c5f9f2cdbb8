"""Block sizes and launches: from tensors to grids."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...rows import Rows, batch_and_row_stride

_PROGRAMS_PER_PROCESSOR = 4
_GRADIENT_COLUMNS = 32768
"""Of a row, for one program of the gradient kernel."""


class Blocks(NamedTuple):
    """How a row is cut. All kernels of a vocabulary, dtype and softcap take the same, or their bits would
    differ: the order of a sum depends on the block and the number of warps."""

    span: int
    """Columns whose sums are added lane by lane."""
    block: int
    warps: int
    """Of 32 threads."""
    stages: int

    def held(self, vocab: int) -> int:
        """How many blocks of a row stay in registers, which is then read once; 0: it is longer than a span."""
        return triton.cdiv(vocab, self.block) if vocab <= self.span else 0


@functools.cache
def blocks_for(vocab: int, dtype: torch.dtype, softcap: bool = False) -> Blocks:
    """From what the row is alone, never from the number of rows. Chosen by counting instructions and by
    compiling for sm_80 to sm_100 without spills; not yet tuned on a GPU."""
    whole = triton.next_power_of_2(vocab)
    if dtype == torch.float64:
        return Blocks(span=4096, block=min(whole, 1024), warps=8, stages=3)
    if 8192 < vocab <= 32768 and not softcap:
        return Blocks(span=32768, block=4096, warps=16, stages=4)
    return Blocks(span=32768, block=min(whole, 2048), warps=8 if whole > 1024 else 4, stages=4)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads that run together: 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def programs_wanted(device: torch.device) -> int:
    return _PROGRAMS_PER_PROCESSOR * processors(device)


def gradient_parts(rows: int, vocab: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many programs share a row's gradient, and how many blocks each takes."""
    blocks = triton.cdiv(vocab, block)
    parts = max(triton.cdiv(vocab, _GRADIENT_COLUMNS), triton.cdiv(programs_wanted(device), max(rows, 1)))
    share = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, share), share


def row_arguments(rows: Rows) -> tuple[Any, ...]:
    return rows.logits, *rows.strides, rows.token_ids, rows.live, rows.numbers


def row_constants(rows: Rows, blocks: Blocks) -> dict[str, Any]:
    sizes = {"SPAN": blocks.span, "BLOCK": blocks.block, "STAGES": blocks.stages, "warps": blocks.warps}
    return sizes | {"SOFTCAP": rows.softcap}


def held_blocks(rows: Rows, blocks: Blocks) -> int:
    """A softcap's arithmetic leaves no registers to hold a row in."""
    return 0 if rows.softcap else blocks.held(rows.vocab)


def out_arguments(out: Tensor) -> tuple[Any, ...]:
    return out, *batch_and_row_stride(out)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """On the current stream of ``device``. Contraction is off: kernels spell out their fused multiply-adds."""
    if programs == 0:
        return
    with on_device(device):
        warps = max(1, warps * 32 // warp_size(device))
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
