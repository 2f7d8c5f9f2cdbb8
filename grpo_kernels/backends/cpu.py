"""The C++ kernels of csrc/cpu through their C ABI: one struct per call, no PyTorch at build time."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ..rows import Rows, batch_and_row_stride
from . import Request
from .torch import rescale as rescale
from .torch import token_id_message

INSTRUCTION_SETS = ("generic", "avx2", "avx512")
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ABI_VERSION = 2
_OK, _TOKEN_ID_OUT_OF_RANGE = 0, 1
_TOKENS_PER_CHUNK = 512

LIBRARY = Path(__file__).resolve().parent.parent / "native" / "libgrpo_cpu.so"
BUILD_RECORD = LIBRARY.with_name("build.json")
"""What setup.py wrote about the build: compiler, sources' hash, or why there is no library."""


_SPEC = ("surrogate", "kl_estimator", "kl_gradient", "kl_ratio_weighted", "rollout_scheme")
"""spec.ObjectiveSpec, as the struct names it."""


class _Params(ctypes.Structure):
    """GrpoCpuParams of csrc/cpu/api.h, field by field."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "instruction_set", "threads")),
        *((name, c_int32) for name in _SPEC),
        *((name, c_int64) for name in ("rows", "length", "vocab")),
        ("logits", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "row_stride")),
        *((name, c_void_p) for name in ("token_ids", "live", "numbers", "out")),
        *((name, c_int64) for name in ("out_batch_stride", "out_row_stride")),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
        *((name, c_void_p) for name in ("log_prob", "entropy", "lse", "grad_log_prob", "grad_entropy")),
        *((name, c_void_p) for name in ("advantage", "policy_weight", "old", "ref", "kl_weight", "entropy_weight")),
        *((name, c_void_p) for name in ("rollout", "policy", "kl", "flags", "rollout_weight")),
        ("bad_row", c_int64),
    ]


class _TokenSums(ctypes.Structure):
    """GrpoCpuTokenSums of csrc/cpu/api.h, field by field."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "threads", "kl_estimator", "reserved")),
        *((name, c_int64) for name in ("rows", "sequences")),
        *((name, c_void_p) for name in ("live", "masked_in", "flags", "log_prob", "entropy", "policy", "kl")),
        *((name, c_void_p) for name in ("policy_weight", "kl_weight", "entropy_weight", "old", "ref", "rollout")),
        ("rollout_weight", c_void_p),
        *((name, c_void_p) for name in ("partials", "sums", "loss")),
    ]


class Unavailable(RuntimeError):
    """The library is not usable here; the message says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises Unavailable with the reason."""
    if not LIBRARY.exists():
        raise Unavailable(_why_not_built())
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise Unavailable(f"{LIBRARY.name} does not load: {error}") from error
    expected = (_ABI_VERSION << 32) | (ctypes.sizeof(_Params) << 16) | ctypes.sizeof(_TokenSums)
    abi = getattr(loaded, "grpo_cpu_abi", None)
    if abi is not None:
        abi.restype = c_int64
    if abi is None or abi() != expected:
        raise Unavailable(f"{LIBRARY.name} was built from other sources than this package: reinstall grpo_kernels")
    loaded.grpo_cpu_scratch.restype = c_int64
    loaded.grpo_cpu_scratch.argtypes = [c_int64, c_int32]
    return loaded


def _why_not_built() -> str:
    try:
        reason = json.loads(BUILD_RECORD.read_text())["error"]
    except (OSError, ValueError, KeyError):
        return f"no compiled library ({LIBRARY.name}): install with `pip install .`, which builds it"
    return f"its compilation failed during installation: {reason}"


def build_record() -> dict[str, str]:
    """What the build wrote: compiler, flags, sources' hash; empty without one."""
    try:
        record: dict[str, str] = json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return record


@functools.cache
def available_instruction_sets() -> tuple[str, ...]:
    """What the library has and this processor runs, slowest first."""
    bits = library().grpo_cpu_instruction_sets()
    return tuple(name for i, name in enumerate(INSTRUCTION_SETS) if bits >> i & 1)


def instruction_set() -> str:
    """The one in use: the fastest, or GRPO_KERNELS_CPU_ISA."""
    available = available_instruction_sets()
    forced = os.environ.get("GRPO_KERNELS_CPU_ISA")
    if forced and forced not in available:
        raise Unavailable(f"GRPO_KERNELS_CPU_ISA={forced}: this machine runs {', '.join(available)}")
    return forced or available[-1]


def unsupported(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"it serves CPU tensors, not {request.device.type}"
    try:
        instruction_set()
    except Unavailable as error:
        return str(error)
    return None


def log_probs(rows: Rows, log_prob: Tensor, entropy: Tensor, lse: Tensor) -> None:
    _call("grpo_cpu_log_probs", rows, {"log_prob": log_prob, "entropy": entropy, "lse": lse})


def log_probs_backward(
    rows: Rows,
    log_prob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    per_row = {"log_prob": log_prob, "entropy": entropy, "lse": lse}
    gradients = {"grad_log_prob": grad_log_prob, "grad_entropy": grad_entropy}
    _call("grpo_cpu_log_probs_backward", rows, {**per_row, **gradients}, out=out)


def fused_loss(
    rows: Rows,
    advantage: Tensor,
    policy_weight: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    kl_weight: Tensor | None,
    entropy_weight: Tensor | None,
    spec: list[int],
    log_prob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    policy: Tensor,
    kl: Tensor,
    flags: Tensor,
    rollout_weight: Tensor,
    out: Tensor,
) -> None:
    outputs = {"log_prob": log_prob, "entropy": entropy, "lse": lse, "policy": policy, "kl": kl, "flags": flags}
    outputs["rollout_weight"] = rollout_weight
    weights = {"policy_weight": policy_weight, "kl_weight": kl_weight, "entropy_weight": entropy_weight}
    per_row = {"advantage": advantage, "old": old, "ref": ref, "rollout": rollout, **weights, **outputs}
    _call("grpo_cpu_fused_loss", rows, per_row, spec=spec, out=out)


def token_sums(
    log_prob: Tensor,
    entropy: Tensor,
    policy: Tensor,
    kl: Tensor,
    flags: Tensor,
    live: Tensor,
    masked_in: Tensor,
    policy_weight: Tensor,
    kl_weight: Tensor | None,
    entropy_weight: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    rollout_weight: Tensor | None,
    kl_estimator: int,
    sequences: int,
    loss: Tensor,
    sums: Tensor,
) -> None:
    tokens = log_prob.numel()
    partials = torch.empty((tokens + _TOKENS_PER_CHUNK - 1) // _TOKENS_PER_CHUNK * sums.numel(), dtype=sums.dtype)
    params = _TokenSums(_DTYPES[log_prob.dtype], torch.get_num_threads(), kl_estimator, 0, tokens, sequences)
    records = {"log_prob": log_prob, "entropy": entropy, "policy": policy, "kl": kl, "flags": flags}
    masks = {"live": live, "masked_in": masked_in, "old": old, "ref": ref, "rollout": rollout}
    masks["rollout_weight"] = rollout_weight
    weights = {"policy_weight": policy_weight, "kl_weight": kl_weight, "entropy_weight": entropy_weight}
    _point(params, {**records, **masks, **weights, "partials": partials, "sums": sums, "loss": loss})
    library().grpo_cpu_token_sums(ctypes.byref(params))


def token_terms(
    log_prob: Tensor,
    entropy: Tensor,
    live: Tensor,
    numbers: Tensor,
    advantage: Tensor,
    policy_weight: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    kl_weight: Tensor | None,
    spec: list[int],
    policy: Tensor,
    kl: Tensor,
    flags: Tensor,
    rollout_weight: Tensor,
    slope: Tensor,
) -> None:
    params = _Params(rows=log_prob.numel(), dtype=_DTYPES[numbers.dtype], numbers=numbers.data_ptr())
    inputs: dict[str, Tensor | None] = {
        "log_prob": log_prob,
        "entropy": entropy,
        "live": live,
        "advantage": advantage,
        "policy_weight": policy_weight,
    }
    inputs |= {"old": old, "ref": ref, "rollout": rollout, "kl_weight": kl_weight}
    outputs = {"policy": policy, "kl": kl, "flags": flags, "rollout_weight": rollout_weight, "grad_log_prob": slope}
    _fill(params, spec, {**inputs, **outputs})
    library().grpo_cpu_token_terms(ctypes.byref(params))


def _call(
    function: str,
    rows: Rows,
    per_row: Mapping[str, Tensor | None],
    spec: list[int] | None = None,
    out: Tensor | None = None,
) -> None:
    native = library()
    threads = torch.get_num_threads()
    exponentials = spec is not None and rows.logits.dtype != rows.numbers.dtype
    stride = native.grpo_cpu_scratch(rows.vocab, exponentials)
    scratch = torch.empty(threads * stride, dtype=rows.numbers.dtype)
    batch_stride, row_stride = rows.strides
    params = _Params(
        dtype=_DTYPES[rows.logits.dtype],
        instruction_set=INSTRUCTION_SETS.index(instruction_set()),
        threads=threads,
        rows=rows.token_ids.numel(),
        length=rows.token_ids.shape[1],
        vocab=rows.vocab,
        logits=rows.logits.data_ptr(),
        batch_stride=batch_stride,
        row_stride=row_stride,
        token_ids=rows.token_ids.data_ptr(),
        live=rows.live.data_ptr(),
        numbers=rows.numbers.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_stride=stride,
    )
    if out is not None:
        params.out = out.data_ptr()
        params.out_batch_stride, params.out_row_stride = batch_and_row_stride(out)
    _fill(params, spec, per_row)
    status = getattr(native, function)(ctypes.byref(params))
    if status == _TOKEN_ID_OUT_OF_RANGE:
        raise IndexError(token_id_message(rows, params.bad_row))
    if status != _OK:
        raise RuntimeError(f"{function} failed with status {status}: reinstall grpo_kernels and report this.")


def _fill(params: _Params, spec: list[int] | None, per_row: Mapping[str, Tensor | None]) -> None:
    if spec is not None:
        for name, value in zip(_SPEC, spec, strict=True):
            setattr(params, name, value)
    _point(params, per_row)


def _point(params: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(params, name, tensor.data_ptr())
