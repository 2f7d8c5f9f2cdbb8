"""The CUDA C++ kernels of csrc/cuda through their C ABI: a row stays on chip between its one read and its one write.

The [tokens]-sized work is Triton's. GRPO_KERNELS_CUDA_LIBRARY names another library to load; one that was built for
tests/cuda_emulator serves CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_char_p, c_int32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .contract import (
    DivergenceStats,
    FusedBackend,
    Request,
    RowGradients,
    Rows,
    RowStats,
    TokenInputs,
    TokenRecords,
    TokenValues,
    batch_and_row_stride,
    on_device,
)
from .spec import ObjectiveSpec

_ABI_VERSION = 7
_OLDEST_CAPABILITY = (9, 0)
CLUSTERS = (1, 2, 4, 8, 16)

SHORT_ROW_BYTES = 32768
"""The length below which rows are Triton's in automatic choice. The settlers finish a row in some 1,800 cycles whatever
its length (computed from estimated latencies), in which a multiprocessor of an H200 moves 33 KB in and out; Triton's
one pass reads a row of up to 32,768 columns once, too, and has as many of them in flight as fit."""

PROVEN: frozenset[str] = frozenset()
"""Kinds of GPU, as torch.cuda.get_device_name has them, that benchmarks/results/ holds a green run of
benchmarks/gpu_check.py for. There this backend is the automatic choice."""


def library_path() -> Path:
    return Path(os.environ.get("GRPO_KERNELS_CUDA_LIBRARY") or native.library_path("cuda"))


class _Params(native.Call):
    """GrpoCudaParams of csrc/cuda/api.h, field by field."""

    _fields_ = (
        *((name, c_int32) for name in ("device", "cluster", "clusters", "tiles")),
        *((name, c_void_p) for name in ("stream", "order", "partials")),
    )


class Device(ctypes.Structure):
    """GrpoCudaDevice of csrc/cuda/api.h: the capabilities of a device."""

    _fields_ = (
        *((name, c_int32) for name in ("major", "minor", "driver", "runtime", "shared_bytes", "local_bytes")),
        ("clusters", c_int32 * len(CLUSTERS)),
    )


class Plan(ctypes.Structure):
    """GrpoCudaPlan of csrc/cuda/api.h: the layout of a row on a device."""

    _fields_ = tuple((name, c_int32) for name in ("cluster", "clusters", "tiles"))


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none."""
    sizes = [ctypes.sizeof(struct) for struct in (_Params, Device, Plan)]
    expected = _ABI_VERSION << 48 | sizes[0] << 32 | sizes[1] << 16 | sizes[2]
    try:
        library = native.load(library_path(), "grpo_cuda_abi", expected)
    except native.Unavailable as error:
        return str(error)
    library.grpo_cuda_error.restype = c_char_p
    return library


def library() -> ctypes.CDLL:
    """Return the loaded library. Raise native.Unavailable, with the reason, where there is none."""
    if isinstance(loaded := _loaded(), str):
        raise native.Unavailable(loaded)
    return loaded


@functools.cache
def emulated() -> bool:
    """Whether the library is there and runs on the CPU."""
    loaded = _loaded()
    return not isinstance(loaded, str) and bool(loaded.grpo_cuda_emulated())


@functools.cache
def device(index: int) -> Device:
    """Return what the GPU offers. Raise native.Unavailable where the driver refuses, which the next call asks again: it
    may report an earlier fault of the process."""
    offered = Device()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu", index)
    with on_device(where):  # the library leaves it current
        error = library().grpo_cuda_device(index, ctypes.byref(offered))
    if error:
        raise native.Unavailable(f"the CUDA driver refuses: {_text(error)}")
    return offered


@functools.cache
def plan(index: int, dtype: torch.dtype, vocab: int, rows: int = 1) -> Plan:
    """Return the layout of ``rows`` of ``vocab`` columns, one or a pair; its cluster is 0 if they do not fit."""
    layout = Plan()
    code, columns = native.DTYPES[dtype], ctypes.c_int64(vocab)
    library().grpo_cuda_plan(ctypes.byref(device(index)), code, columns, rows, ctypes.byref(layout))
    return layout


def _streamed(index: int, dtype: torch.dtype, vocab: int) -> Plan:
    """Return the layout of a pair that is not kept: as if it were, or else in the slices of a row alone."""
    pair = plan(index, dtype, vocab, 2)
    if pair.cluster:
        return pair
    alone = plan(index, dtype, vocab)
    return Plan(alone.cluster, alone.clusters, pair.tiles)


def _text(error: int) -> str:
    return f"{library().grpo_cuda_error(error).decode()} (error {error})"


def unsupported(request: Request) -> str | None:
    if request.device.type == "cpu" and emulated():
        return _lacking(request, 0, "the emulator") if request.by_name else "emulated: ask for it by name"
    if request.device.type != "cuda" or torch.version.hip:
        return f"it serves NVIDIA GPUs, not {'ROCm' if torch.version.hip else request.device.type}"
    if not torch.cuda.is_available():
        return "no GPU driver is active"
    index = torch.cuda.current_device() if request.device.index is None else request.device.index
    name = torch.cuda.get_device_name(index)
    if not request.by_name and name not in PROVEN:
        return f"not yet proven on {name}: ask for it by name, backend='cuda'"
    row_bytes = request.vocab * request.dtype.itemsize
    if not request.by_name and row_bytes < SHORT_ROW_BYTES:
        return f"rows of {row_bytes} bytes are short, and Triton's below {SHORT_ROW_BYTES}: ask for it by name"
    try:
        return _lacking(request, index, name)
    except native.Unavailable as error:
        return str(error)


def _lacking(request: Request, index: int, name: str) -> str | None:
    offered = device(index)
    if (offered.major, offered.minor) < _OLDEST_CAPABILITY:
        return f"it needs compute capability 9.0; {name} has {offered.major}.{offered.minor}"
    if reason := _on_tokens(request.device).unsupported(Request(request.device)):
        return f"its [tokens]-sized kernels are Triton's: {reason}"
    if plan(index, request.dtype, request.vocab).cluster == 0:
        return f"a row of {request.vocab} columns does not fit into the shared memory of a cluster"
    if request.teacher is None:
        return None
    if request.teacher != request.dtype:
        return f"a teacher's logits must be {request.dtype} as the policy's are, not {request.teacher}: cast them"
    if request.fused and plan(index, request.dtype, request.vocab, 2).cluster == 0:
        return f"two rows of {request.vocab} columns do not fit into the shared memory of a cluster"
    return None


def _on_tokens(where: torch.device) -> FusedBackend:
    """Return the backend whose [tokens]-sized kernels serve beside these."""
    if where.type == "cpu":
        from . import cpu

        return cpu
    from . import triton

    return triton


def token_terms(
    values: TokenValues,
    numbers: Tensor,
    inputs: TokenInputs,
    spec: ObjectiveSpec,
    records: TokenRecords,
    grad_log_prob: Tensor,
) -> None:
    _on_tokens(grad_log_prob.device).token_terms(values, numbers, inputs, spec, records, grad_log_prob)


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
    backend = _on_tokens(loss.device)
    backend.token_sums(values, masked_in, inputs, records, kl_estimator, sequences, loss, sums)


def rescale(gradient: Tensor, upstream: Tensor, announced: Tensor) -> None:
    _on_tokens(gradient.device).rescale(gradient, upstream, announced)


def _check_alignment(logits: Tensor, out: Tensor) -> None:
    """Raise unless the rows of both come and go by the same vectors of 16 bytes."""
    strides = zip(batch_and_row_stride(logits), batch_and_row_stride(out), strict=True)
    first = out.data_ptr() - logits.data_ptr()
    if first % 16 or any((b - a) * logits.element_size() % 16 for a, b in strides):
        raise ValueError(
            "the gradient's rows must begin as far from a multiple of 16 bytes as the logits' rows do; got a first row "
            f"{first % 16} bytes off, strides {out.stride()} for {logits.stride()}, {logits.dtype}. "
            "memory.gradient_like(logits) makes such a tensor."
        )


def log_probs(rows: Rows, stats: RowStats) -> None:
    _call("grpo_cuda_log_probs", rows, stats)


def log_probs_backward(rows: Rows, stats: RowStats, gradients: RowGradients, out: Tensor) -> None:
    _call("grpo_cuda_log_probs_backward", rows, stats, gradients, out=out)


def fused_loss(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, stats: RowStats, records: TokenRecords, out: Tensor
) -> None:
    _call("grpo_cuda_fused_loss", rows, inputs, spec, stats, records, out=out)


def divergence(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, out: DivergenceStats
) -> None:
    pair = _Pair(teacher, teacher_stats, kind)
    _call("grpo_cuda_divergence", rows, stats, out, pair=pair)


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
    pair = _Pair(teacher, teacher_stats, kind, grad_divergence)
    _call("grpo_cuda_divergence_backward", rows, stats, divergence, gradients, pair=pair, out=out)


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
    pair = _Pair(teacher, teacher_stats, kind, weight, kept=True)
    _call("grpo_cuda_fused_divergence", rows, inputs, spec, stats, divergence, records, pair=pair, out=out)


class _Pair(NamedTuple):
    """The teacher's part of a call over pairs of rows."""

    teacher: Rows
    stats: RowStats
    kind: int
    grad_divergence: Tensor | None = None
    kept: bool = False
    """Whether both rows stay in the cluster between their one read and the one write."""


def _pair_plan(rows: Rows, index: int, pair: _Pair) -> Plan:
    dtype, vocab = rows.logits.dtype, rows.vocab
    if pair.teacher.logits.dtype != dtype or pair.teacher.vocab != vocab:
        other = pair.teacher
        raise ValueError(
            f"a teacher's logits must be as the policy's, {vocab} columns of {dtype}; got {other.vocab} columns of "
            f"{other.logits.dtype}. Cast them, or use backend='torch'."
        )
    return plan(index, dtype, vocab, 2) if pair.kept else _streamed(index, dtype, vocab)


def _call(
    function: str, rows: Rows, *parts: tuple[Any, ...], pair: _Pair | None = None, out: Tensor | None = None
) -> None:
    where, count = rows.logits.device, rows.token_ids.numel()
    index = where.index or 0
    layout = plan(index, rows.logits.dtype, rows.vocab) if pair is None else _pair_plan(rows, index, pair)
    order = torch.empty(count + 1, dtype=torch.int32, device=where)
    extra = {"device": index, "order": order.data_ptr()}
    extra |= {"cluster": layout.cluster, "clusters": layout.clusters, "tiles": layout.tiles}
    if out is None:
        numbers = 4 if pair is None else 12
        partials = torch.empty(count, layout.cluster, numbers, dtype=rows.numbers.dtype, device=where)
        extra["partials"] = partials.data_ptr()
    else:
        _check_alignment(rows.logits, out)
    if where.type == "cuda":
        extra["stream"] = torch.cuda.current_stream(where).cuda_stream
    params = native.call_of(_Params, rows, parts, out, **extra)
    if pair is not None:
        native.fill_teacher(params, pair.teacher, pair.stats, pair.kind, pair.grad_divergence)
    with on_device(where):
        error = getattr(library(), function)(ctypes.byref(params))
    if error:
        raise RuntimeError(f"{function} on {where}: {_text(error)}. backend='triton' or 'torch' avoids this library.")
