"""The C++ kernels of csrc/cpu through their C ABI: one struct per call, no PyTorch at build time."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import Request, native
from .contract import Rows
from .eager import rescale as rescale
from .eager import token_id_message

INSTRUCTION_SETS = ("generic", "avx2", "avx512")
_ABI_VERSION = 4
_OK, _TOKEN_ID_OUT_OF_RANGE = 0, 1
_TOKENS_PER_CHUNK = 512

LIBRARY = native.FOLDER / "libgrpo_cpu.so"


class _Params(native.Call):
    """GrpoCpuParams of csrc/cpu/api.h, field by field."""

    _fields_ = (
        *((name, c_int32) for name in ("instruction_set", "threads")),
        ("scratch", c_void_p),
        *((name, c_int64) for name in ("scratch_stride", "bad_row")),
    )


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


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises native.Unavailable with the reason."""
    expected = (_ABI_VERSION << 32) | (ctypes.sizeof(_Params) << 16) | ctypes.sizeof(_TokenSums)
    loaded = native.load(LIBRARY, "grpo_cpu_abi", expected)
    loaded.grpo_cpu_scratch.restype = c_int64
    loaded.grpo_cpu_scratch.argtypes = [c_int64, c_int32]
    return loaded


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
        raise native.Unavailable(f"GRPO_KERNELS_CPU_ISA={forced}: this machine runs {', '.join(available)}")
    return forced or available[-1]


def unsupported(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"it serves CPU tensors, not {request.device.type}"
    try:
        instruction_set()
    except native.Unavailable as error:
        return str(error)
    return None


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
    params = _TokenSums(native.DTYPES[log_prob.dtype], torch.get_num_threads(), kl_estimator, 0, tokens, sequences)
    records = {"log_prob": log_prob, "entropy": entropy, "policy": policy, "kl": kl, "flags": flags}
    masks = {"live": live, "masked_in": masked_in, "old": old, "ref": ref, "rollout": rollout}
    masks["rollout_weight"] = rollout_weight
    weights = {"policy_weight": policy_weight, "kl_weight": kl_weight, "entropy_weight": entropy_weight}
    native.point(params, {**records, **masks, **weights, "partials": partials, "sums": sums, "loss": loss})
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
    params = _Params(rows=log_prob.numel(), dtype=native.DTYPES[numbers.dtype], numbers=numbers.data_ptr())
    inputs: dict[str, Tensor | None] = {
        "log_prob": log_prob,
        "entropy": entropy,
        "live": live,
        "advantage": advantage,
        "policy_weight": policy_weight,
    }
    inputs |= {"old": old, "ref": ref, "rollout": rollout, "kl_weight": kl_weight}
    outputs = {"policy": policy, "kl": kl, "flags": flags, "rollout_weight": rollout_weight, "grad_log_prob": slope}
    native.fill(params, spec, {**inputs, **outputs})
    library().grpo_cpu_token_terms(ctypes.byref(params))


def _call(
    function: str,
    rows: Rows,
    per_row: Mapping[str, Tensor | None],
    spec: list[int] | None = None,
    out: Tensor | None = None,
) -> None:
    loaded = library()
    threads = torch.get_num_threads()
    exponentials = spec is not None and rows.logits.dtype != rows.numbers.dtype
    stride = loaded.grpo_cpu_scratch(rows.vocab, exponentials)
    scratch = torch.empty(threads * stride, dtype=rows.numbers.dtype)
    own = {"threads": threads, "scratch": scratch.data_ptr(), "scratch_stride": stride}
    own["instruction_set"] = INSTRUCTION_SETS.index(instruction_set())
    params = native.call_of(_Params, rows, per_row, spec, out, **own)
    status = getattr(loaded, function)(ctypes.byref(params))
    if status == _TOKEN_ID_OUT_OF_RANGE:
        raise IndexError(token_id_message(rows, params.bad_row))
    if status != _OK:
        raise RuntimeError(f"{function} failed with status {status}: reinstall grpo_kernels and report this.")


log_probs, log_probs_backward, fused_loss = native.row_functions("grpo_cpu", _call)
