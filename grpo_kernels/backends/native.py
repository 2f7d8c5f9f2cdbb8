"""The common part of the compiled libraries' backends: finding, loading and calling them (csrc/common/call.h)."""

from __future__ import annotations

import ctypes
import json
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .contract import RowGradients, Rows, RowStats, TokenInputs, TokenRecords, batch_and_row_stride
from .spec import ObjectiveSpec

FOLDER = Path(__file__).resolve().parent.parent / "native"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def pointers(*kinds: Any) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a struct that holds the tensors of these named tuples."""
    return tuple((name, c_void_p) for kind in kinds for name in kind._fields)


class Call(ctypes.Structure):
    """GrpoCall, field by field; a library's own parameters follow."""

    _fields_ = (
        *pointers(RowStats, RowGradients, TokenInputs, TokenRecords),
        *((name, c_int32) for name in ("dtype", *ObjectiveSpec._fields)),
        *((name, c_int64) for name in ("rows", "length", "vocab")),
        ("logits", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "row_stride")),
        *((name, c_void_p) for name in ("token_ids", "live", "numbers", "out")),
        *((name, c_int64) for name in ("out_batch_stride", "out_row_stride")),
    )


_Params = TypeVar("_Params", bound=Call)


def call_of(
    params: type[_Params], rows: Rows, parts: tuple[tuple[Any, ...], ...], out: Tensor | None, **extra: Any
) -> _Params:
    """Return the parameters of a call over rows; ``extra`` are the library's own."""
    logits = rows.logits
    call = params(
        dtype=DTYPES[logits.dtype],
        rows=rows.token_ids.numel(),
        length=rows.token_ids.shape[1],
        vocab=logits.shape[-1],
        logits=logits.data_ptr(),
        token_ids=rows.token_ids.data_ptr(),
        live=rows.live.data_ptr(),
        numbers=rows.numbers.data_ptr(),
        **extra,
    )
    fill(call, *parts)
    call.batch_stride, call.row_stride = batch_and_row_stride(logits)
    if out is not None:
        call.out = out.data_ptr()
        call.out_batch_stride, call.out_row_stride = batch_and_row_stride(out)
    return call


def fill(params: ctypes.Structure, *parts: Any) -> None:
    """Set the fields of named tuples: addresses of tensors, numbers as they are, null where there is nothing."""
    for part in parts:
        for name, value in zip(part._fields, part, strict=True):
            if value is not None:
                setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)


class Unavailable(RuntimeError):
    """Raised where a library is not usable; the message says why."""


def load(path: Path, abi_function: str, expected: int) -> ctypes.CDLL:
    """Return the library at ``path``. Raise Unavailable, with the reason, where it is not usable."""
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
    """Return the record of a library's build: compiler, flags, sources' hash, or the error; empty without one."""
    try:
        record: dict[str, str] = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return record
