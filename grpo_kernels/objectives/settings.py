"""What users set by a name, a number or a path: options of configs, of calls and of commands."""

from __future__ import annotations

import argparse
import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch
from torch import Tensor

_Number = TypeVar("_Number", bound=float | Tensor)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""The range in which fp32 has all of its digits; below and above, kernels would compute with 0 and infinity."""
HELD = f"in [{SMALLEST:.4g}, {LARGEST:.4g}], as fp32 holds it"


def check_name(kind: str, name: object, allowed: Iterable[str], meant: str | None = None) -> None:
    """Raise a ValueError unless ``name`` is one of ``allowed``: with what was ``meant``, or the nearest valid name of
    what is a name at all."""
    names = list(allowed)
    if not isinstance(name, str) or name not in names:
        if meant is None and isinstance(name, str) and (near := nearest(name, names, cutoff=0.4)) is not None:
            meant = repr(near)
        suggestion = "" if meant is None else f" Did you mean {meant}?"
        raise ValueError(f"{kind} must be one of {', '.join(names)}; got {name!r}.{suggestion}")


def nearest(name: object, names: Sequence[str], cutoff: float = 0.0) -> str | None:
    """Return the valid name that one resembles most, None where none does by more than ``cutoff``, of 1."""
    lowered = {valid.lower(): valid for valid in reversed(names)}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None


def read_name(kind: str, name: object, allowed: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """Return the one of ``allowed`` that ``name`` is, whatever its case. Raise as ``check_name`` where it is none, with
    ours for a name that other packages have (``elsewhere``)."""
    names = list(allowed)
    if isinstance(name, str) and name not in names:
        name = {valid.lower(): valid for valid in names}.get(name.lower(), name)
    meant = (elsewhere or {}).get(str(name))
    check_name(kind, name, names, None if meant is None else repr(meant))
    return str(name)


def settle_name(
    instance: object, field: str, kind: str, allowed: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Put the valid name (``read_name``) in the place of what a field of a frozen dataclass holds."""
    object.__setattr__(instance, field, read_name(kind, getattr(instance, field), allowed, elsewhere))


def plain(value: Any) -> Any:
    """Return the Python number, or bool, that a scalar of numpy's is; anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def as_float(number: _Number) -> _Number:
    """Return what to compute with: a 0-d tensor as it is, of any other number the Python float. One of numpy's would be
    multiplied in its own dtype, an integer beyond 64 bits not at all."""
    return number if isinstance(number, Tensor) else float(number)  # type: ignore[return-value]


def read_integer(value: object) -> int | None:
    """Return the Python int that an integer of any type is; None for bools, tensors and what is none."""
    if type(value) is int:  # before what torch.compile does not trace for its symbols
        return value
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # an array of numpy's has an __index__ that raises, too
        return None


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: float) -> bool:
    """Whether fp32, in which kernels compute, has a finite number for this one."""
    return -LARGEST <= value <= LARGEST


def shown(value: object) -> str:
    """Return what came in the place of a number, as text."""
    if type(value) is int and value.bit_length() > 10_000:  # Python writes no such numbers
        return f"an integer of {value.bit_length()} bits"
    beyond = is_number(value) and LARGEST < abs(value) < math.inf
    return repr(value) + ", beyond fp32" if beyond else repr(value)


def read_limit(what: str, limit: float | None) -> float | None:
    """Return the Python float that a limit of a config is, or None. Raise unless it is finite and > 0."""
    value = plain(limit)
    if value is not None and not (is_number(value) and value > 0 and is_finite(value)):
        raise ValueError(f"{what} must be a finite number > 0, or None for no limit; got {shown(value)}.")
    return None if value is None else float(value)


def settle_number(
    instance: object,
    field: str,
    what: str,
    at_least: float = -math.inf,
    above: float = -math.inf,
    infinite: bool = False,
) -> None:
    """Put the Python float in the place of what a field of a frozen dataclass holds. Raise unless it is inside its
    bounds, and finite or ``infinite`` allowed."""
    value = plain(getattr(instance, field))
    endless = infinite and value == math.inf
    if is_number(value) and value >= at_least and value > above and (is_finite(value) or endless):
        object.__setattr__(instance, field, float(value))
        return
    bound = f" >= {at_least:g}" if at_least > -math.inf else f" > {above:g}" if above > -math.inf else ""
    raise ValueError(f"{what} must be a {'' if infinite else 'finite '}number{bound}; got {shown(value)}.")


def settle_count(instance: object, field: str, what: str) -> None:
    """Put the Python int in the place of what a field of a frozen dataclass holds. Raise unless it is > 0, or None."""
    value = plain(getattr(instance, field))
    object.__setattr__(instance, field, value)
    if value is not None and not (type(value) is int and 0 < value < 2**63):
        raise ValueError(f"{what} must be a positive integer, of 64 bits at most; got {shown(value)}.")


def no_subclass(derived: type, base: type) -> NoReturn:
    """Raise where a class is derived from one whose kind kernels read by its fields alone: they would compute the
    other's, in silence."""
    raise TypeError(
        f"{derived.__name__} is derived from {base.__name__}, which kernels know by its fields: it has none."
    )


def read_device(option: str, name: torch.device | str) -> torch.device:
    """Return the device that an option names. Raise unless one can compute there, and give numbers back."""
    try:
        torch.zeros(1, device=name).item()  # of meta tensors there are no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{option} {name} cannot be used here: {first_line(error)}. cpu always can.") from None
    return torch.device(name)


def read_folder(text: str) -> Path:
    """Return the path that the command line names, where a variable of the shell may have been empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a folder; got ''")
    return Path(text)


def check_seed(option: str, seed: int) -> None:
    """Raise unless PyTorch's generators take a seed of the command line."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{option} must be a number of 64 bits, from -2^63 to 2^63 - 1; got {seed}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the error's name where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
