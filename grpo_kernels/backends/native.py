"""What the compiled libraries share: how they are found, loaded and told of a call (csrc/common/call.h)."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .contract import Rows, batch_and_row_stride

FOLDER = Path(__file__).resolve().parent.parent / "native"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SPEC = ("surrogate", "kl_estimator", "kl_gradient", "kl_ratio_weighted", "rollout_scheme")
"""spec.ObjectiveSpec, as the struct names it."""


class Call(ctypes.Structure):
    """GrpoCall, field by field; a library's own parameters follow."""

    _fields_ = (
        ("dtype", c_int32),
        *((name, c_int32) for name in _SPEC),
        *((name, c_int64) for name in ("rows", "length", "vocab")),
        ("logits", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "row_stride")),
        *((name, c_void_p) for name in ("token_ids", "live", "numbers", "out")),
        *((name, c_int64) for name in ("out_batch_stride", "out_row_stride")),
        *((name, c_void_p) for name in ("log_prob", "entropy", "anchor", "log_sum", "grad_log_prob", "grad_entropy")),
        *((name, c_void_p) for name in ("advantage", "policy_weight", "old", "ref", "kl_weight", "entropy_weight")),
        *((name, c_void_p) for name in ("rollout", "policy", "kl", "flags", "rollout_weight")),
    )


_Params = TypeVar("_Params", bound=Call)


class _Run(Protocol):
    """Calls the library's function of that name."""

    def __call__(
        self,
        function: str,
        rows: Rows,
        per_row: Mapping[str, Tensor | None],
        spec: list[int] | None = None,
        out: Tensor | None = None,
    ) -> None: ...


def call_of(
    params: type[_Params],
    rows: Rows,
    per_row: Mapping[str, Tensor | None],
    spec: list[int] | None,
    out: Tensor | None,
    **own: Any,
) -> _Params:
    """The parameters of a call over rows; ``own`` are the library's."""
    batch_stride, row_stride = rows.strides
    call = params(
        dtype=DTYPES[rows.logits.dtype],
        rows=rows.token_ids.numel(),
        length=rows.token_ids.shape[1],
        vocab=rows.vocab,
        logits=rows.logits.data_ptr(),
        batch_stride=batch_stride,
        row_stride=row_stride,
        token_ids=rows.token_ids.data_ptr(),
        live=rows.live.data_ptr(),
        numbers=rows.numbers.data_ptr(),
        **own,
    )
    if out is not None:
        call.out = out.data_ptr()
        call.out_batch_stride, call.out_row_stride = batch_and_row_stride(out)
    fill(call, spec, per_row)
    return call


def row_functions(prefix: str, run: _Run) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """``log_probs``, ``log_probs_backward`` and ``fused_loss`` of a backend whose library calls them ``prefix`` ..."""

    def log_probs(rows: Rows, log_prob: Tensor, entropy: Tensor, anchor: Tensor, log_sum: Tensor) -> None:
        stats = {"log_prob": log_prob, "entropy": entropy, "anchor": anchor, "log_sum": log_sum}
        run(f"{prefix}_log_probs", rows, stats)

    def log_probs_backward(
        rows: Rows,
        log_prob: Tensor,
        entropy: Tensor,
        anchor: Tensor,
        log_sum: Tensor,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        per_row = {"log_prob": log_prob, "entropy": entropy, "anchor": anchor, "log_sum": log_sum}
        gradients = {"grad_log_prob": grad_log_prob, "grad_entropy": grad_entropy}
        run(f"{prefix}_log_probs_backward", rows, {**per_row, **gradients}, out=out)

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
        anchor: Tensor,
        log_sum: Tensor,
        policy: Tensor,
        kl: Tensor,
        flags: Tensor,
        rollout_weight: Tensor,
        out: Tensor,
    ) -> None:
        outputs = {"log_prob": log_prob, "entropy": entropy, "anchor": anchor, "log_sum": log_sum}
        outputs |= {"policy": policy, "kl": kl, "flags": flags, "rollout_weight": rollout_weight}
        weights = {"policy_weight": policy_weight, "kl_weight": kl_weight, "entropy_weight": entropy_weight}
        per_row = {"advantage": advantage, "old": old, "ref": ref, "rollout": rollout, **weights, **outputs}
        run(f"{prefix}_fused_loss", rows, per_row, spec=spec, out=out)

    return log_probs, log_probs_backward, fused_loss


def fill(call: Call, spec: list[int] | None, per_row: Mapping[str, Tensor | None]) -> None:
    if spec is not None:
        for name, value in zip(_SPEC, spec, strict=True):
            setattr(call, name, value)
    point(call, per_row)


def point(params: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(params, name, tensor.data_ptr())


class Unavailable(RuntimeError):
    """The library is not usable here; the message says why."""


def load(path: Path, abi_function: str, expected: int) -> ctypes.CDLL:
    """The library at ``path``. Raises Unavailable with the reason."""
    if not path.exists():
        raise Unavailable(_why_not_built(path))
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path.name} does not load: {error}") from error
    abi = getattr(loaded, abi_function, None)
    if abi is not None:
        abi.restype = c_int64
    if abi is None or abi() != expected:
        raise Unavailable(f"{path} was built from other sources than this package: reinstall grpo_kernels")
    return loaded


def _why_not_built(path: Path) -> str:
    reason = build_record(path).get("error")
    if reason is None:
        return f"no compiled library ({path}): install with `pip install .`, which builds it"
    return f"it was not compiled during installation: {reason}"


def build_record(path: Path) -> dict[str, str]:
    """What the build of a library wrote beside it: compiler, flags, sources' hash, or the error; empty without one."""
    try:
        record: dict[str, str] = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return record
