"""An objective as kernels know it: choices that select code, and one vector of numbers.

Numbers travel in memory, on the device: annealing one recompiles nothing and a captured CUDA graph
replays with new values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..objectives.config import LossConfig
from ..objectives.divergence import Divergence
from ..objectives.kl import ESTIMATORS, GRADIENTS
from ..objectives.rollout import Rollout

NUMBERS = (
    "temperature",
    "logit_scale",
    "logit_softcap",  # 0: none
    "grad_scale",
    "log_ratio_limit",  # inf: none
    "kl_input_limit",  # inf: none
    "kl_output_limit",  # inf: none
    "kl_ratio_cap",
    "rollout_low",
    "rollout_high",
    "entropy_threshold",  # -inf: none
    "divergence_mix",
    "rollout_kl_input_limit",  # inf: none
    "rollout_kl_output_limit",  # inf: none
    "rollout_kl_ratio_cap",
)
"""The order of the vector; up to eight parameters of the surrogate follow (csrc/common/surrogates.h)."""
SURROGATE_PARAMETERS = 8


class ObjectiveSpec(NamedTuple):
    """The choices that select code."""

    surrogate: int
    kl_estimator: int
    """1 + the estimator's place in ESTIMATORS; 0: no KL term."""
    kl_gradient: int
    """The gradient's place in GRADIENTS."""
    kl_ratio_weighted: int
    rollout_scheme: int
    """The scheme's ``kernel_id``; 0: no rollout correction in the kernel."""
    rollout_kl_estimator: int = 0
    """As those of the KL, of the KL to the sampler."""
    rollout_kl_gradient: int = 0
    rollout_kl_ratio_weighted: int = 0


def objective_spec(
    config: LossConfig, with_kl: bool, schemes: tuple[Rollout, ...] = (), with_rollout_kl: bool = False
) -> ObjectiveSpec | None:
    """Return the choices of an objective; None where the surrogate, or the rollout ``schemes`` that are still to be
    applied, have no one-pass arm."""
    kl, of_rollout, surrogate = config.kl, config.rollout_kl, config.policy_term.kernel_id
    if surrogate is None or not (schemes == () or in_kernel(schemes)):
        return None
    estimator = 1 + ESTIMATORS.index(kl.estimator) if with_kl else 0
    rollout = schemes[0].kernel_id if schemes else 0
    forms = (estimator, GRADIENTS.index(kl.gradient), int(kl.ratio_weighted))
    if not with_rollout_kl:
        return ObjectiveSpec(surrogate, *forms, rollout)
    estimator = 1 + ESTIMATORS.index(of_rollout.estimator)
    of_sampler = (estimator, GRADIENTS.index(of_rollout.gradient), int(of_rollout.ratio_weighted))
    return ObjectiveSpec(surrogate, *forms, rollout, *of_sampler)


def in_kernel(schemes: tuple[Rollout, ...]) -> bool:
    """Whether a kernel applies these schemes: a single one, of a token's own ratio."""
    return len(schemes) == 1 and schemes[0].kernel_id != 0 and not schemes[0].pooled


class LogitArgs(NamedTuple):
    """The map from logits to those of the softmax: z = softcap(logit * scale) / temperature. Numbers or 0-d tensors."""

    temperature: float | Tensor = 1.0
    logit_scale: float | Tensor = 1.0
    logit_softcap: float | Tensor | None = None


def numbers_vector(
    logit_args: LogitArgs,
    grad_scale: float | Tensor,
    config: LossConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    entropy_threshold: float | Tensor | None = None,
    divergence: Divergence | None = None,
) -> Tensor:
    """Return the vector of NUMBERS and the surrogate's parameters, ``dtype`` on ``device``; the divergence's number is
    the config's, where there is one.

    Python numbers alone give a cached tensor: nothing is copied to the device twice.
    """
    what = (logit_args, grad_scale, config, dtype, device, entropy_threshold, divergence)
    plain = {type(entropy_threshold), type(grad_scale), *map(type, logit_args)} <= _PLAIN
    stream = _stream_of(device) if plain else None
    return _vector(*what) if stream is None else _vector_of_plain(stream, *what)


_PLAIN = {int, float, type(None)}


def _vector(
    logit_args: LogitArgs,
    grad_scale: float | Tensor,
    config: LossConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    entropy_threshold: float | Tensor | None,
    divergence: Divergence | None,
) -> Tensor:
    softcap = 0.0 if logit_args.logit_softcap is None else logit_args.logit_softcap
    values: list[float | Tensor] = [logit_args.temperature, logit_args.logit_scale, softcap, grad_scale]
    if config is not None:
        divergence = config.divergence
        limits: tuple[float | None, ...] = (config.log_ratio_limit, *config.kl.limit)
        values += [math.inf if limit is None else float(limit) for limit in limits]
        values += [config.kl.ratio_cap, *(config.schemes[0].bounds() if in_kernel(config.schemes) else (0.0, math.inf))]
        values.append(-math.inf if entropy_threshold is None else entropy_threshold)
    else:
        values += [0.0] * (NUMBERS.index("divergence_mix") - len(values))
    values.append(0.0 if divergence is None else divergence.mix)
    if config is not None:
        limits = config.rollout_kl.limit
        values += [math.inf if limit is None else float(limit) for limit in limits]
        values.append(config.rollout_kl.ratio_cap)
    if config is not None and config.policy_term.kernel_id is not None:
        values += config.policy_term.parameters()
    values += [0.0] * (len(NUMBERS) + SURROGATE_PARAMETERS - len(values))
    if any(isinstance(value, Tensor) for value in values):
        return _mixed(values, dtype, device)
    return _plain(tuple(float(value) for value in values), dtype, device)


@functools.lru_cache(maxsize=256)
def _vector_of_plain(stream: int, *what: Any) -> Tensor:
    """Return ``_vector`` of Python's numbers alone: all of it is known already, most of the time."""
    return _vector(*what)


def without_softcap(numbers: Tensor) -> Tensor:
    """Return numbers for values that are scaled and capped already."""
    numbers = numbers.clone()
    numbers[NUMBERS.index("logit_scale")], numbers[NUMBERS.index("logit_softcap")] = 1.0, 0.0
    return numbers


@functools.lru_cache(maxsize=256)
def _cached(stream: int, values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # backward saves it
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=device)
        pinned = torch.tensor(values, dtype=dtype, pin_memory=True)  # a plain copy would wait for the device
        return pinned.to(device, non_blocking=True)


def _filled(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fill a vector by kernels alone, for a CUDA graph in capture: memory of the graph must not be cached."""
    vector = torch.zeros(len(values), dtype=dtype, device=device)
    for i, value in enumerate(values):
        if value:
            vector[i].fill_(value)
    return vector


def _stands_for_another() -> bool:
    """Whether a tensor that is made here is a fake one, or a transform's."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _stream_of(device: torch.device) -> int | None:
    """Return the stream that a tensor which is made now may be kept for; None where it may not be kept: it stands for
    another, or is of a CUDA graph in capture.

    Calls on another stream do not wait until it is filled: each has tensors of its own. The memory of one that is
    dropped is its stream's, whose kernels have read it before it is written again.
    """
    if _stands_for_another() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _plain(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    stream = _stream_of(device)
    if stream is not None:
        return _cached(stream, values, dtype, device)
    if _stands_for_another():
        return torch.tensor(values, dtype=dtype, device=device)
    return _filled(values, dtype, device)


def _mixed(values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    vector = _plain(tuple(0.0 if isinstance(value, Tensor) else float(value) for value in values), dtype, device)
    parts = [
        value.detach().to(device=device, dtype=dtype, non_blocking=True) if isinstance(value, Tensor) else vector[i]
        for i, value in enumerate(values)
    ]
    return torch.stack(parts)
