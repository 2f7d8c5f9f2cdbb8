"""The C++ kernels of csrc/cpu through their C ABI: one struct per call, no PyTorch at build time."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .contract import DivergenceStats, Request, RowGradients, Rows, RowStats, TokenInputs, TokenRecords, TokenValues
from .eager import rescale as rescale
from .eager_rows import token_id_message
from .spec import ObjectiveSpec

INSTRUCTION_SETS = ("generic", "avx2", "avx512")
_ABI_VERSION = 10
_OK, _TOKEN_ID_OUT_OF_RANGE = 0, 1

LIBRARY = native.library_path("cpu")


class _Params(native.Call):
    """GrpoCpuParams of csrc/cpu/api.h, field by field."""

    _fields_ = (
        *((name, c_int32) for name in ("instruction_set", "threads")),
        ("scratch", c_void_p),
        *((name, c_int64) for name in ("scratch_stride", "bad_row")),
    )


class _TokenSums(ctypes.Structure):
    """GrpoCpuTokenSums of csrc/cpu/api.h, field by field."""

    _fields_ = (
        *native.pointers(TokenInputs, TokenRecords, TokenValues),
        *((name, c_void_p) for name in ("masked_in", "partials", "sums", "loss")),
        *((name, c_int64) for name in ("rows", "sequences")),
        *((name, c_int32) for name in ("dtype", "threads", "kl_estimator", "reserved")),
    )


class BlockBytes(ctypes.Structure):
    """GrpoBlockBytes of csrc/cpu/api.h, field by field."""

    kept: int
    used: int
    _fields_ = tuple((name, c_int64) for name in ("kept", "used"))


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library. Raise native.Unavailable, with the reason, where there is none."""
    expected = (_ABI_VERSION << 32) | (ctypes.sizeof(_Params) << 16) | ctypes.sizeof(_TokenSums)
    return declared(native.load(LIBRARY, "grpo_cpu_abi", expected))


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library whose functions are known by what they take and return, where that is not an int."""
    loaded.grpo_cpu_scratch.restype = c_int64
    loaded.grpo_cpu_scratch.argtypes = [c_int64, c_int32, c_int32]
    loaded.grpo_cpu_partial_sums.restype = c_int64
    loaded.grpo_cpu_partial_sums.argtypes = [c_int64]
    loaded.grpo_cpu_new_block.restype = None
    loaded.grpo_cpu_new_block.argtypes = [c_int64, c_int32, c_int32, ctypes.POINTER(c_void_p)]
    loaded.grpo_cpu_give_back.restype = None
    loaded.grpo_cpu_give_back.argtypes = [c_void_p]
    loaded.grpo_cpu_drop_kept.restype = c_int64
    loaded.grpo_cpu_block_bytes.restype = BlockBytes
    return loaded


@functools.cache
def available_instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the library has and this processor runs, slowest first."""
    bits = library().grpo_cpu_instruction_sets()
    return tuple(name for i, name in enumerate(INSTRUCTION_SETS) if bits >> i & 1)


def instruction_set() -> str:
    """Return the instruction set in use: the fastest, or the one that GRPO_KERNELS_CPU_ISA names."""
    available = available_instruction_sets()
    forced = os.environ.get("GRPO_KERNELS_CPU_ISA")
    if forced and forced not in available:
        raise native.Unavailable(f"GRPO_KERNELS_CPU_ISA={forced}: this machine runs {', '.join(available)}")
    return forced or available[-1]


def unsupported(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"it serves CPU tensors, not {request.device.type}"
    try:
        instruction_set()
    except native.Unavailable as error:
        return str(error)
    if request.teacher is not None and (request.teacher == torch.float64) != (request.dtype == torch.float64):
        return f"it takes no {request.teacher} teacher beside {request.dtype} logits"
    return None


def token_sums(
    values: TokenValues,
    masked_in: Tensor,
    inputs: TokenInputs,
    records: TokenRecords,
    kl_estimator: int,
    sequences: int,
    loss: Tensor,
    sums: Tensor,
) -> None:
    tokens, threads = values.live.numel(), torch.get_num_threads()
    partials = torch.empty(library().grpo_cpu_partial_sums(tokens), dtype=sums.dtype)
    params = _TokenSums(
        dtype=native.DTYPES[loss.dtype],
        threads=threads,
        kl_estimator=kl_estimator,
        rows=tokens,
        sequences=sequences,
        masked_in=masked_in.data_ptr(),
        partials=partials.data_ptr(),
        sums=sums.data_ptr(),
        loss=loss.data_ptr(),
    )
    native.fill(params, values, inputs, records)
    _run("grpo_cpu_token_sums", params)


def token_terms(
    values: TokenValues,
    numbers: Tensor,
    inputs: TokenInputs,
    spec: ObjectiveSpec,
    records: TokenRecords,
    grad_log_prob: Tensor,
) -> None:
    params = _Params(
        dtype=native.DTYPES[numbers.dtype],
        rows=grad_log_prob.numel(),
        numbers=numbers.data_ptr(),
        live=values.live.data_ptr(),
        log_prob=values.log_prob.data_ptr(),
        entropy=values.entropy.data_ptr(),
        grad_log_prob=grad_log_prob.data_ptr(),
    )
    native.fill(params, inputs, spec, records)
    _run("grpo_cpu_token_terms", params)


def log_probs(rows: Rows, stats: RowStats) -> None:
    _call("grpo_cpu_log_probs", rows, stats)


def log_probs_backward(rows: Rows, stats: RowStats, gradients: RowGradients, out: Tensor) -> None:
    _call("grpo_cpu_log_probs_backward", rows, stats, gradients, out=out)


def fused_loss(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, stats: RowStats, records: TokenRecords, out: Tensor
) -> None:
    _call("grpo_cpu_fused_loss", rows, inputs, spec, stats, records, out=out)


def divergence(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, out: DivergenceStats
) -> None:
    _call("grpo_cpu_divergence", rows, stats, out, beside=_Beside(teacher, teacher_stats, kind))


def divergence_backward(
    rows: Rows,
    stats: RowStats,
    teacher: Rows,
    teacher_stats: RowStats,
    kind: int,
    divergence: DivergenceStats,
    gradients: RowGradients,
    grad_divergence: Tensor,
    out: Tensor,
) -> None:
    beside = _Beside(teacher, teacher_stats, kind, grad_divergence)
    _call("grpo_cpu_divergence_backward", rows, stats, divergence, gradients, out=out, beside=beside)


def fused_divergence(
    rows: Rows,
    teacher: Rows,
    kind: int,
    inputs: TokenInputs,
    weight: Tensor,
    spec: ObjectiveSpec,
    stats: RowStats,
    teacher_stats: RowStats,
    divergence: DivergenceStats,
    records: TokenRecords,
    out: Tensor,
) -> None:
    beside = _Beside(teacher, teacher_stats, kind, weight)
    _call("grpo_cpu_fused_divergence", rows, inputs, spec, stats, divergence, records, out=out, beside=beside)


class _Beside(NamedTuple):
    """What ``native.fill_teacher`` takes."""

    teacher: Rows
    stats: RowStats
    kind: int
    grad_divergence: Tensor | None = None


def _call(
    function: str, rows: Rows, *parts: tuple[Any, ...], out: Tensor | None = None, beside: _Beside | None = None
) -> None:
    loaded = library()
    threads = torch.get_num_threads()
    exponentials = function in ("grpo_cpu_fused_divergence", "grpo_cpu_divergence") or (
        function == "grpo_cpu_fused_loss" and rows.logits.dtype != rows.numbers.dtype
    )
    stride = loaded.grpo_cpu_scratch(rows.logits.shape[-1], 1 if beside is None else 2, exponentials)
    scratch = torch.empty(threads * stride, dtype=rows.numbers.dtype)
    extra = {"threads": threads, "scratch": scratch.data_ptr(), "scratch_stride": stride}
    extra["instruction_set"] = INSTRUCTION_SETS.index(instruction_set())
    params = native.call_of(_Params, rows, parts, out, **extra)
    if beside is not None:
        native.fill_teacher(params, *beside)
    if _run(function, params) == _TOKEN_ID_OUT_OF_RANGE:
        raise IndexError(token_id_message(rows, params.bad_row))


def _run(function: str, params: ctypes.Structure) -> int:
    """Return the status, which is one that a user's tensors may have."""
    status: int = getattr(library(), function)(ctypes.byref(params))
    if status not in (_OK, _TOKEN_ID_OUT_OF_RANGE):
        raise RuntimeError(f"{function} failed with status {status}: reinstall grpo_kernels and report this.")
    return status
