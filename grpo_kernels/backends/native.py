"""The common part of the compiled libraries' backends: finding, loading and calling them (csrc/common/call.h)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .contract import DivergenceStats, RowGradients, Rows, RowStats, TokenInputs, TokenRecords, batch_and_row_stride
from .spec import ObjectiveSpec

FOLDER = Path(__file__).parent.parent.resolve() / "native"
"""Beside this module as it is imported: in a cache of the Hub every file is a link to somewhere else."""
TREE = FOLDER.parent.parent
"""The folder that holds the package: site-packages, or a source tree, where what libraries are made of is beside it."""
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def pointers(*kinds: Any) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a struct that holds the tensors of these named tuples."""
    return tuple((name, c_void_p) for kind in kinds for name in kind._fields)


TEACHER: tuple[tuple[str, Any], ...] = (
    *((f"teacher_{name}", c_void_p) for name in (*RowStats._fields, "logits")),
    *((f"teacher_{name}_stride", c_int64) for name in ("batch", "row")),
    *((name, c_void_p) for name in ("teacher_numbers", "teacher_temperature", "grad_divergence")),
    *((name, c_int32) for name in ("teacher_dtype", "divergence_kind")),
)
"""The fields of GrpoTeacher."""


class Call(ctypes.Structure):
    """GrpoCall, field by field; a library's own parameters follow."""

    _fields_ = (
        *pointers(RowStats, RowGradients, TokenInputs, TokenRecords, DivergenceStats),
        *TEACHER,
        *((name, c_int32) for name in ("dtype", *ObjectiveSpec._fields, "reserved")),
        *((name, c_int64) for name in ("rows", "length", "vocab")),
        ("logits", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "row_stride")),
        *((name, c_void_p) for name in ("token_ids", "live", "numbers", "out")),
        *((name, c_int64) for name in ("out_batch_stride", "out_row_stride")),
        ("temperature", c_void_p),
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
    if not (call.logits and call.token_ids):
        _refuse_freed(logits=logits, token_ids=rows.token_ids)
    fill(call, *parts)
    call.batch_stride, call.row_stride = batch_and_row_stride(logits)
    if rows.temperature is not None:
        call.temperature = rows.temperature.data_ptr()
        if not call.temperature:
            _refuse_freed(temperature=rows.temperature)
    if out is not None:
        call.out = out.data_ptr()
        if not call.out:
            _refuse_freed(out=out)
        call.out_batch_stride, call.out_row_stride = batch_and_row_stride(out)
    return call


def fill_teacher(call: Call, teacher: Rows, stats: RowStats, kind: int, grad_divergence: Tensor | None) -> None:
    """Set the fields of GrpoTeacher."""
    call.teacher_logits, call.teacher_numbers = teacher.logits.data_ptr(), teacher.numbers.data_ptr()
    if not call.teacher_logits:
        _refuse_freed(teacher_logits=teacher.logits)
    call.teacher_batch_stride, call.teacher_row_stride = batch_and_row_stride(teacher.logits)
    call.teacher_dtype, call.divergence_kind = DTYPES[teacher.logits.dtype], kind
    for name, value in zip(stats._fields, stats, strict=True):
        setattr(call, f"teacher_{name}", value.data_ptr())
    if teacher.temperature is not None:
        call.teacher_temperature = teacher.temperature.data_ptr()
    if grad_divergence is not None:
        call.grad_divergence = grad_divergence.data_ptr()


def fill(params: ctypes.Structure, *parts: tuple[Any, ...]) -> None:
    """Set the fields of named tuples: addresses of tensors, null where there is none, numbers as they are.

    Raises:
        TypeError: a tensor of floats in another dtype than the library would read there.
    """
    real = torch.float64 if params.dtype == DTYPES[torch.float64] else torch.float32
    for part in parts:
        pack, place = _place(type(params), type(part))
        if type(part) is ObjectiveSpec:
            pack(params, place, *part)
        else:
            addresses = [0 if value is None else value.data_ptr() for value in part]
            kind: Any = type(part)
            for name, value, address in zip(kind._fields, part, addresses, strict=True):
                if value is None:
                    continue
                if not address and value.numel() > 0:  # null means that nothing was given
                    _refuse_freed(**{name: value})
                if value.dtype is not real and value.dtype.is_floating_point:
                    raise TypeError(f"{name}: the kernel reads {real} here; got {value.dtype}")
            pack(params, place, *addresses)


def _refuse_freed(**tensors: Tensor | None) -> None:
    """Raise where one of these tensors has elements and no memory for them, as a parameter has that FSDP has not
    gathered. The names are ours, which begin as the users' do."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() > 0 and tensor.data_ptr() == 0:
            name = f"{name}_log_probs" if name in ("old", "ref", "rollout") else name
            raise RuntimeError(
                f"{name}: the memory of this {tuple(tensor.shape)} tensor was freed (untyped_storage().resize_(0)), as "
                "FSDP frees a parameter: call inside the forward that gathers it, or give a copy made there."
            )


@functools.cache
def _place(params: type[ctypes.Structure], kind: Any) -> tuple[Callable[..., None], int]:
    """Return what writes the fields of a named tuple into a struct, where they follow one another, and where they
    begin: one call in the place of a field's at a time."""
    first = getattr(params, kind._fields[0])
    places = [getattr(params, name).offset for name in kind._fields]
    if places != [first.offset + i * first.size for i in range(len(places))]:
        raise TypeError(f"{params.__name__} has the fields of {kind.__name__} in other places than one after another")
    return struct.Struct(f"{len(places)}{'i' if kind is ObjectiveSpec else 'Q'}").pack_into, first.offset


class Unavailable(RuntimeError):
    """Raised where a library is not usable; the message says why."""


def library_path(name: str) -> Path:
    """Return the path of the package's library, "cpu" or "cuda".

    In a source tree it is a library of that tree's sources: the package's own, or else that of an installation which
    the tree's folder shadows (``pip install .`` leaves none in the tree). Where neither is, the package's own path.
    """
    own = FOLDER / f"libgrpo_{name}.so"
    if not _in_source_tree():
        return own
    tried = list(filter(_of_these_sources, [own, *_shadowed(own.name)]))
    return next((path for path in tried if path.exists()), next(iter(tried), own))


def _in_source_tree() -> bool:
    return (TREE / "csrc" / "common" / "call.h").is_file()


def _shadowed(file: str) -> Iterator[Path]:
    """Yield the libraries, built or not, of installations that the module search path has behind this package."""
    for entry in sys.path:
        path = Path(entry or ".", FOLDER.parent.name, FOLDER.name, file).resolve()
        with contextlib.suppress(PermissionError):
            if path.parent != FOLDER and path.with_suffix(".json").exists():
                yield path


def _of_these_sources(path: Path) -> bool:
    """Whether a library's record says that it was made, or tried, of the source tree's files as they are."""
    return build_record(path).get("sources") == sources_hash(path.stem.removeprefix("libgrpo_"))


@functools.cache
def sources_hash(name: str) -> str:
    """Return the hash of the files in the source tree that a library is made of, as setup.py writes it."""
    digest = hashlib.sha256()
    folders = (TREE / "csrc" / name, TREE / "csrc" / "common")
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(TREE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def load(path: Path, abi_function: str, expected: int) -> ctypes.CDLL:
    """Return the library at ``path``. Raise Unavailable, with the reason, where it is not usable."""
    if not path.exists():
        raise Unavailable(_why_not_built(path))
    if path.parent == FOLDER and _in_source_tree() and not _of_these_sources(path):
        other = f"{path} was built from other sources than {TREE / 'csrc'}"
        raise Unavailable(f"{other}: `pip install -e .` builds it again")
    try:
        loaded = ctypes.CDLL(str(path.absolute()))  # a bare name is looked for elsewhere
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
    if reason is not None:
        return f"it was not compiled: {reason}"
    if path.parent == FOLDER and (other := next(_shadowed(path.name), None)):
        return (
            f"no compiled library of the sources in {TREE}, whose package comes before the installed one "
            f"({other.parent.parent}), which was built from others: `pip install .` builds it again"
        )
    return f"no compiled library ({path}): install with `pip install .`, which builds it"


def build_record(path: Path) -> dict[str, str]:
    """Return the record of a library's build: compiler, flags, sources' hash, or the error; empty without one."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
