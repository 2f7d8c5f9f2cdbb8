"""Which kernels serve a call.

A backend is a module with ``log_probs``, ``log_probs_backward``, ``fused_loss`` over ``Rows``, ``token_terms`` and
``token_sums`` over their records, ``rescale``, and ``unsupported(request) -> str | None``, the reason why it cannot
serve a call; eager.py has no ``fused_loss`` and no ``token_terms``: calls/terms.py serves it. Functions write into
tensors that the caller allocated, (B, T) fp32 or fp64 like ``rows.numbers``; only ``token_sums`` reduces over rows:

    log_probs(rows, log_prob, entropy, anchor, log_sum)
    log_probs_backward(rows, log_prob, entropy, anchor, log_sum, grad_log_prob, grad_entropy, out)
    fused_loss(rows, advantage, policy_weight, old, ref, rollout, kl_weight, entropy_weight, spec,
               log_prob, entropy, anchor, log_sum, policy, kl, flags, rollout_weight, out)
    token_sums(log_prob, entropy, policy, kl, flags, live, masked_in, policy_weight, kl_weight, entropy_weight,
               old, ref, rollout, rollout_weight, kl_estimator, sequences, loss, sums)
    token_terms(log_prob, entropy, live, numbers, advantage, policy_weight, old, ref, rollout, kl_weight, spec,
                policy, kl, flags, rollout_weight, slope)
    rescale(gradient, upstream, announced)       # gradient *= upstream / announced, unless they are equal

``out`` is shaped like the logits and may be the logits. A dead row's outputs are 0, its gradient is 0 and its
logits are not looked at. ``anchor`` is the value (a logit, under a softcap the capped one) that a row's powers are
relative to, near its largest, and ``log_sum`` the logarithm of Σ_j exp(z_j - z_anchor): p_j = exp((z_j - z_anchor) -
log_sum) keeps the digits that one log-sum-exp in fp32 loses to a common offset of the logits. ``rollout_weight`` is
empty unless ``spec`` has a rollout scheme. A new backend is one module and one line in ``_MODULES``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..objectives.checks import check_name, fail
from ..objectives.compiler import constant_in_graphs

_MODULES = {"cpu": "cpu", "cuda": "cuda", "triton": "triton", "torch": "eager"}
"""Backends in the order of automatic choice, and their modules here."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked whether it can serve."""

    device: torch.device
    """Of the logits."""
    dtype: torch.dtype = torch.float32
    vocab: int = 32768
    fused: bool = False
    """The one-pass loss, not log-probs and their backward."""
    softcap: bool = False
    by_name: bool = False
    """Not in automatic choice, where ``cuda`` has to be proven on such a device."""


class Choice(NamedTuple):
    """Which backend serves a call."""

    backend: str
    fuses: bool
    """Whether it has the one-pass loss that was asked for."""
    unfused: str = ""
    """Why it does not fuse."""
    passed_over: str = ""
    """Why it is not one before it in the order of automatic choice."""


_SWITCH = "GRPO_KERNELS_BACKEND"
"""The environment's variable that every call takes its backend from, whatever it asks for: =torch stops all kernels."""


def switched() -> str | None:
    """The backend that the environment names for every call."""
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


@constant_in_graphs
def has_token_terms(name: str) -> bool:
    return hasattr(get(name), "token_terms")


@functools.cache
def get(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to that GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def choose(function: str, request: Request, name: str | None) -> Choice:
    """The backend that the environment names, else the one asked for by name, else the first that can serve the call.

    A backend that has no one-pass loss for the call still serves it in two passes.

    Raises:
        ValueError: no backend of that name, or of the environment's.
        RuntimeError: the backend asked for cannot serve the call, and why.
    """
    if name is not None:
        check_name("backend", name, _MODULES)
    device = request.device
    what = (request.dtype, request.vocab, request.fused, request.softcap)
    chosen, fuses, unfused, reasons = _choose(device.type, device.index, *what, name)
    if chosen:
        return Choice(chosen, fuses, unfused, reasons)
    logits = f"{request.vocab} columns of {str(request.dtype).removeprefix('torch.')} logits on {device}"
    expected = "a call that some backend can serve" if name is None else f"a call that backend={name!r} can serve"
    fail(function, expected, f"{logits} ({reasons})", error=RuntimeError)


@constant_in_graphs
def _choose(
    device: str, index: int | None, dtype: torch.dtype, vocab: int, fused: bool, softcap: bool, name: str | None
) -> tuple[str, bool, str, str]:
    """The fields of a ``Choice``, whose name is "" for none. torch.compile runs it instead of tracing it."""
    named, name = name, switched() or name
    where = torch.device(device) if index is None else torch.device(device, index)
    request = Request(where, dtype, vocab, fused, softcap, by_name=name is not None)
    reasons: dict[str, str] = {}
    for candidate in _MODULES if name is None else (name,):
        unsupported = get(candidate).unsupported
        unfused = reason = unsupported(request)
        if fused and unfused is not None:
            reason = unsupported(dataclasses.replace(request, fused=False))
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
    """Once: CPU tensors have kernels, and nobody asked for anything else."""
    message = (
        "grpo_kernels: expected compiled kernels for CPU tensors; got the plain PyTorch backend, which is several "
        f"times slower ({reason}).\n  hint: install a C++ compiler, then grpo_kernels again; `python -m grpo_kernels "
        "info` says what is missing. backend='torch' asks for plain PyTorch and does not warn."
    )
    warnings.warn(message, UserWarning, stacklevel=6)  # at the caller of the public function
