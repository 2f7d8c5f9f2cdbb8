"""The way from tensors to launches: arguments, compile-time constants and grids."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..contract import Rows, RowStats, batch_and_row_stride, on_device
from .blocks import Blocks, blocks_for, target_of

_PROGRAMS_PER_PROCESSOR = 4
_GRADIENT_COLUMNS = 32768
"""The columns of a row that one program of the gradient kernel takes."""
_PAIR_BLOCK, _PAIR_WARPS = 2048, 8
"""At most, of kernels that read rows in pairs."""


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def warp_size(device: torch.device) -> int:
    """Return the number of threads that run together: 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def programs_wanted(device: torch.device) -> int:
    return _PROGRAMS_PER_PROCESSOR * processors(device)


def gradient_parts(rows: int, vocab: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return how many programs share a row's gradient, and how many blocks each takes."""
    blocks = triton.cdiv(vocab, block)
    parts = max(triton.cdiv(vocab, _GRADIENT_COLUMNS), triton.cdiv(programs_wanted(device), max(rows, 1)))
    share = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, share), share


def blocks_of(rows: Rows) -> Blocks:
    return blocks_for(rows.vocab, rows.logits.dtype, rows.softcap, target_of(rows.logits.device))


def row_arguments(rows: Rows) -> tuple[Any, ...]:
    return rows.logits, *rows.strides, rows.token_ids, rows.live, rows.numbers, rows.temperature


def softmax_arguments(rows: Rows, stats: RowStats) -> tuple[Any, ...]:
    """Return what probabilities are made of."""
    return rows.logits, *rows.strides, rows.numbers, rows.temperature, stats.anchor, stats.log_sum


def row_constants(rows: Rows, blocks: Blocks, *written: Tensor) -> dict[str, Any]:
    sizes = {"SPAN": blocks.span, "BLOCK": blocks.block, "STAGES": blocks.stages, "warps": blocks.warps}
    sizes["SWEEP"] = _sweep(rows, blocks.warps)
    return sizes | {"SOFTCAP": rows.softcap} | vector_constants(rows.logits, *written)


def one_pass_constants(rows: Rows, blocks: Blocks, *written: Tensor) -> dict[str, Any]:
    """Return constants of the kernel that may hold a row's blocks in registers. On addresses that 8 bytes do
    not divide it takes twice the warps: a vector is several loads there, and with all of them under way 16 warps spill
    some 300 bytes a thread (measured by tests/triton_offline.py). The order of sums is SWEEP's, not the warps'."""
    constants = row_constants(rows, blocks, *written) | {"HELD": blocks.held(rows.vocab)}
    if constants["HELD"] and constants["ALIGNMENT"] < 8:
        constants["warps"] *= 2
    return constants


def pair_constants(rows: Rows, teacher: Rows, *written: Tensor) -> dict[str, Any]:
    """Return constants of a kernel that reads two rows at a time: shorter blocks, as a lane of sums takes seven
    registers of a thread."""
    blocks = blocks_of(rows)
    block, warps = min(blocks.block, _PAIR_BLOCK), min(blocks.warps, _PAIR_WARPS)
    sizes = {"BLOCK": block, "STAGES": blocks.stages, "warps": warps}
    sizes["SWEEP"] = _sweep(rows, warps)
    softcaps = {"SOFTCAP": rows.softcap, "TEACHER_SOFTCAP": teacher.softcap}
    return sizes | softcaps | vector_constants(rows.logits, teacher.logits, *written)


def _sweep(rows: Rows, warps: int) -> int:
    """Return the columns that are a vector of 16 bytes for each thread."""
    return warps * 32 * 16 // rows.logits.element_size()


def vector_constants(*tensors: Tensor) -> dict[str, int]:
    """Return ALIGNMENT: bytes, at most 16, at whose multiples all rows of the tensors (shaped like logits) begin; and
    VECTOR: columns, at most as many as fit 16 bytes, that divide a row."""
    places = [t.data_ptr() for t in tensors]
    places += [t.element_size() * stride for t in tensors for stride in batch_and_row_stride(t)]
    columns = 16 // min(t.element_size() for t in tensors)
    return {"ALIGNMENT": math.gcd(16, *places), "VECTOR": math.gcd(columns, tensors[0].shape[-1])}


def out_arguments(out: Tensor) -> tuple[Any, ...]:
    return out, *batch_and_row_stride(out)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Launch a kernel on the current stream of ``device``. Contraction is off: kernels spell out multiply-adds."""
    if programs == 0:
        return
    with on_device(device):
        warps = max(1, warps * 32 // warp_size(device))
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
