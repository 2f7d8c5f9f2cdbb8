"""Which kernels serve a call.

A backend is a module with ``log_probs``, ``log_probs_backward``, ``fused_loss`` over ``Rows``, ``token_terms`` and
``token_sums`` over their records, ``rescale``, and ``unsupported(request) -> str | None``, the reason why it cannot
serve a call; torch.py has no ``fused_loss`` and no ``token_terms``: objective.py serves it. Functions write into
tensors that the caller allocated, (B, T) fp32 or fp64 like ``rows.numbers``; only ``token_sums`` reduces over rows:

    log_probs(rows, log_prob, entropy, lse)
    log_probs_backward(rows, log_prob, entropy, lse, grad_log_prob, grad_entropy, out)
    fused_loss(rows, advantage, policy_weight, old, ref, rollout, kl_weight, entropy_weight, spec,
               log_prob, entropy, lse, policy, kl, flags, rollout_weight, out)
    token_sums(log_prob, entropy, policy, kl, flags, live, masked_in, policy_weight, kl_weight, entropy_weight,
               old, ref, rollout, rollout_weight, kl_estimator, sequences, loss, sums)
    token_terms(log_prob, entropy, live, numbers, advantage, policy_weight, old, ref, rollout, kl_weight, spec,
                policy, kl, flags, rollout_weight, slope)
    rescale(gradient, upstream, announced)       # gradient *= upstream / announced, unless they are equal

``out`` is shaped like the logits and may be the logits. A dead row's outputs are 0, its gradient is 0 and its
logits are not looked at. ``rollout_weight`` is empty unless ``spec`` has a rollout scheme. A new backend is one module
and one line in ``_MODULES``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch as pytorch  # this package's own torch.py takes the plain name here once it is imported

from ..checks import check_name, fail

_MODULES = {"cpu": "cpu", "cuda": "cuda", "triton": "triton", "torch": "torch"}
"""Backends in the order of automatic choice, and their modules here."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked whether it can serve."""

    device: pytorch.device
    """Of the logits."""
    dtype: pytorch.dtype = pytorch.float32
    vocab: int = 1
    fused: bool = False
    """The one-pass loss, not log-probs and their backward."""
    softcap: bool = False
    by_name: bool = False
    """Not in automatic choice, where ``cuda`` has to be proven on such a device."""


def names() -> tuple[str, ...]:
    return tuple(_MODULES)


@pytorch.compiler.assume_constant_result
def has_token_terms(name: str) -> bool:
    return hasattr(get(name), "token_terms")


@functools.cache
def get(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def on_device(device: pytorch.device) -> AbstractContextManager[Any]:
    """Launches go to that GPU."""
    return pytorch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def choose(function: str, request: Request, name: str | None) -> tuple[str, bool]:
    """The backend asked for by name, or the first that can serve the call, and whether it can fuse it.

    A backend that has no one-pass loss for the call still serves it in two passes.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend asked for cannot serve the call, and why.
    """
    if name is not None:
        check_name("backend", name, _MODULES)
    device = request.device
    what = (request.dtype, request.vocab, request.fused, request.softcap)
    chosen, fuses, reasons = _choose(device.type, device.index, *what, name)
    if chosen:
        return chosen, fuses
    logits = f"{request.vocab} columns of {str(request.dtype).removeprefix('torch.')} logits on {device}"
    expected = "a call that some backend can serve" if name is None else f"a call that backend={name!r} can serve"
    fail(function, expected, f"{logits} ({reasons})", error=RuntimeError)


@pytorch.compiler.assume_constant_result
def _choose(
    device: str, index: int | None, dtype: pytorch.dtype, vocab: int, fused: bool, softcap: bool, name: str | None
) -> tuple[str, bool, str]:
    """Name ("" for none), whether it fuses, else the reasons why not. torch.compile runs it instead of tracing it."""
    where = pytorch.device(device) if index is None else pytorch.device(device, index)
    request = Request(where, dtype, vocab, fused, softcap, by_name=name is not None)
    reasons = {}
    for candidate in _MODULES if name is None else (name,):
        unsupported = get(candidate).unsupported
        if fused and unsupported(request) is None:
            return candidate, True, ""
        reason = unsupported(dataclasses.replace(request, fused=False))
        if reason is None:
            return candidate, False, ""
        reasons[candidate] = reason
    if name is not None:
        return "", False, reasons[name]
    return "", False, "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
