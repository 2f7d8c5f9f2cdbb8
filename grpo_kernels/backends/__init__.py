"""The backends by name, and the choice of the one that serves a call. ``contract.py`` has their functions."""

from __future__ import annotations

import functools
import importlib
import operator
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from ..objectives.checks import fail, warn_caller
from ..objectives.compiler import constant_in_graphs
from ..objectives.settings import check_name
from .contract import Backend, FusedBackend, PairBackend
from .contract import Request as Request

if TYPE_CHECKING:
    from . import cpu, cuda, eager, triton

    _PLAIN: Backend = eager
    _FUSED: tuple[FusedBackend, ...] = (cpu, cuda, triton)

_MODULES = {"cpu": "cpu", "cuda": "cuda", "triton": "triton", "torch": "eager"}
"""Backends in the order of automatic choice, and their modules here."""


class Choice(NamedTuple):
    """The backend that serves a call."""

    backend: str
    fuses: bool
    """Whether it has the one-pass loss that was asked for."""
    unfused: str = ""
    """The reason why it does not fuse; empty where it does or need not."""
    passed_over: str = ""
    """The reasons why it is none of those before it in the order of automatic choice."""


_SWITCH = "GRPO_KERNELS_BACKEND"
"""The environment's variable that every call takes its backend from, whatever it asks for: =torch stops all kernels."""


def switched() -> str | None:
    """Return the backend that the environment names for every call, or None."""
    name = os.environ.get(_SWITCH) or None
    if name is not None:
        check_name(_SWITCH, name, _MODULES)
    return name


def check_not_switched(what: str) -> None:
    """Refuse to report on backends by name while the environment puts one in the place of all."""
    if (name := switched()) is not None:
        raise ValueError(f"{what}, and {_SWITCH}={name} takes the place of every one: unset it first.")


def names() -> tuple[str, ...]:
    return tuple(_MODULES)


def unsupported(name: str, device: str) -> str | None:
    """Return the reason why a backend, asked for by name, cannot serve a device, or None."""
    return get(name).unsupported(Request(torch.device(device), by_name=True))


def check_serves(option: str, name: str, device: str) -> None:
    """Refuse a backend of a command line that cannot serve the device."""
    if (reason := unsupported(name, device)) is not None:
        raise ValueError(f"{option} {name} cannot serve {device}: {reason}")


@functools.cache
def get(name: str) -> Backend:
    """Return the backend of that name, imported when it is first asked for."""
    backend: Backend = importlib.import_module(f".{_MODULES[name]}", __package__)
    return backend


get_fused = cast(Callable[[str], FusedBackend], get)
"""Returns a backend that was chosen for one pass."""


get_pair = cast(Callable[[str], PairBackend], get)
"""Returns a backend that was chosen for one pass over pairs of rows."""


@constant_in_graphs
def fuses_divergences(name: str) -> bool:
    return hasattr(get(name), "fused_divergence")


@constant_in_graphs
def has_token_terms(name: str) -> bool:
    return hasattr(get(name), "token_terms")


def choose(function: str, request: Request, name: str | None) -> Choice:
    """Choose the backend that the environment names, else the one asked for, else the first that can serve the call.

    A backend that has no one-pass loss for the call still serves it in two passes.

    Raises:
        ValueError: no backend of that name, or of the environment's.
        RuntimeError: the backend asked for cannot serve the call, and why.
    """
    if name is not None:
        check_name("backend", name, _MODULES)
    device = request.device
    vocab = operator.index(request.vocab)  # a graph's symbol becomes its number: a model has one vocabulary
    what = (request.dtype, vocab, request.fused, request.softcap, request.teacher)
    chosen, fuses, unfused, reasons = _choose(device.type, device.index, *what, name)
    if chosen:
        return Choice(chosen, fuses, unfused, reasons)
    dtype = str(request.dtype).removeprefix("torch.")
    rows = f"{request.vocab} columns of {dtype} logits" if request.vocab else f"{dtype} log-probs"
    expected = "a call that some backend can serve" if name is None else f"a call that backend={name!r} can serve"
    fail(function, expected, f"{rows} on {device} ({reasons})", error=RuntimeError)


@constant_in_graphs
def _choose(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    vocab: int,
    fused: bool,
    softcap: bool,
    teacher: torch.dtype | None,
    name: str | None,
) -> tuple[str, bool, str, str]:
    """Return the fields of a ``Choice``, its name "" for none. torch.compile runs this instead of tracing it."""
    named, name = name, switched() or name
    where = torch.device(device) if index is None else torch.device(device, index)
    request = Request(where, dtype, vocab, fused, softcap, teacher, by_name=name is not None)
    reasons: dict[str, str] = {}
    for candidate in _MODULES if name is None else (name,):
        unsupported = get(candidate).unsupported
        unfused = reason = unsupported(request)
        if fused and unfused is not None:
            reason = unsupported(request._replace(fused=False))
        elif fused and teacher is not None and not fuses_divergences(candidate):
            unfused = "no kernel of it reads a row and its teacher's at once"
        if reason is None:
            passed_over = "; ".join(f"{other}: {why}" for other, why in reasons.items())
            if name != named:
                passed_over = f"{_SWITCH}={name}"
            elif candidate == "torch" and name is None and device == "cpu":
                _warn_of_fallback(reasons["cpu"])
            return candidate, fused and unfused is None, f"{candidate}: {unfused}" if unfused else "", passed_over
        reasons[candidate] = reason
    if name is not None:
        return "", False, "", reasons[name]
    return "", False, "", "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    """Warn once: CPU tensors have kernels, and nobody asked for anything else."""
    hint = "install a C++ compiler, then grpo_kernels with pip"
    if reason.startswith("GRPO_KERNELS_CPU_ISA"):
        hint = "unset it, or name one of these"
    message = (
        "grpo_kernels: expected compiled kernels for CPU tensors; got the plain PyTorch backend, which is several "
        f"times slower ({reason}).\n  hint: {hint}; `python -m "
        "grpo_kernels info` says what is missing. backend='torch' asks for plain PyTorch and does not warn."
    )
    warn_caller(message)
