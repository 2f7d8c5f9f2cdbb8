"""Which kernels a call takes, and why: decided before anything is computed, of logits and of hidden states alike."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .. import backends
from ..backends import Choice
from ..backends.spec import ObjectiveSpec, objective_spec
from ..objectives.checks import fail
from ..objectives.config import LossConfig
from ..objectives.settings import check_name
from .batch import LossArguments, advantages_per_sequence
from .token_batch import TokenBatch
from .tokens import RowTokens, Tokens

Require = Literal["fused"]
REQUIREMENTS = ("fused",)


class Route(NamedTuple):
    """How a call was computed."""

    backend: str
    """Whose kernels: "cpu", "cuda", "triton", "torch"."""
    passes: int
    """How often the logits are read: once for loss and gradient together where a row's slope follows from that row."""
    reason: str
    """Why it is not fewer passes, or not a faster backend."""


class Plan(NamedTuple):
    """What is to be done for a loss."""

    route: Route
    spec: ObjectiveSpec | None
    """What to tell a one-pass kernel; None where a row's slope does not follow from the row, or no kernel has it."""
    fused: bool
    """Whether loss and gradient come in that one pass."""


def choose_backend(
    tokens: RowTokens, backend: str | None, softcap: bool, fused: bool, teacher: torch.dtype | None = None
) -> Choice:
    """Choose the backend, and whether it serves the one-pass loss where that is wanted (``fused``); ``teacher``: the
    dtype of the logits that are beside. Raise where fp64 is beside another dtype: no backend is to be blamed for it."""
    if teacher is not None and (teacher == torch.float64) != (tokens.real == torch.float64):
        policy = "fp64" if tokens.real == torch.float64 else "fp32, bf16 or fp16"
        hint = f"cast the teacher's logits, or its hidden states and weight: .to({tokens.dtype})"
        expected = f"a teacher's logits of {policy}, as the policy's"  # what is known of both has one dtype
        fail(tokens.function, expected, str(teacher), tokens.tensors, hint, TypeError)
    request = backends.Request(tokens.states.device, tokens.dtype, max(tokens.columns, 1), fused, softcap, teacher)
    return backends.choose(tokens.function, request, backend)


def choose(
    tokens: RowTokens,
    config: LossConfig,
    batch: TokenBatch,
    arguments: LossArguments,
    choice: Choice,
    *,
    require: Require | None,
    wants_gradient: bool,
    reading: str | None = None,
    unknown: str | None = None,
) -> Plan:
    """Choose the passes of a loss.

    Args:
        choice: of the backend.
        require: "fused": raise where compiled kernels would not compute loss and gradient in one pass.
        wants_gradient: whether any of what the loss depends on requires one.
        reading: how rows of a truncated support are read, in two passes; None: there is none.
        unknown: why a row's slope is not known in forward, whatever the objective; None where it may be.

    Raises:
        RuntimeError: a call that is not served as required.
    """
    spec, reason = _one_pass_spec(config, batch, arguments)
    if reading is not None:
        passes, reason = 2, reading
    elif not wants_gradient:
        passes, reason = 1, "no gradient is wanted"
    elif unknown is not None or reason is not None:
        passes, reason = 2, unknown or reason
    elif not choice.fuses:
        passes, reason = 2, choice.unfused
    else:
        passes, reason = 1, "every row's slope follows from that row"
    route = Route(choice.backend, passes, f"{reason}; {choice.passed_over}" if choice.passed_over else str(reason))
    if require is not None:
        _check_require(tokens, require, route)
    return Plan(route, spec, fused=wants_gradient and passes == 1)


def choose_log_probs(
    tokens: RowTokens,
    *,
    backend: str | None,
    softcap: bool,
    require: Require | None,
    reading: str | None = None,
    teacher: torch.dtype | None = None,
) -> Route:
    """Choose the backend of log-probs alone, beside a ``teacher``'s logits of that dtype."""
    choice = choose_backend(tokens, backend, softcap, fused=False, teacher=teacher)
    reason = "no gradient is wanted" if reading is None else reading
    if choice.passed_over:
        reason = f"{reason}; {choice.passed_over}"
    route = Route(choice.backend, 1 if reading is None else 2, reason)
    if require is not None:
        _check_require(tokens, require, route)
    return route


def _one_pass_spec(
    config: LossConfig, batch: TokenBatch, arguments: LossArguments
) -> tuple[ObjectiveSpec | None, str | None]:
    """Return what to tell the one-pass kernel, or why it cannot serve.

    A row's slope is known from that row alone at token level; on-policy also at the sequence levels, if the mean of the
    slopes over a sequence is each of them (one advantage, one weight), but not for the sum ("sequence_product").
    """
    pooling = config.pooling
    if not (config.kl_pooling is pooling is config.rollout_kl_pooling):
        level = (config.rollout_kl if config.kl_pooling is pooling else config.kl).level
        return None, f"the KL's ratio is pooled at level {level!r}, the policy's at {config.level!r}"
    if pooling.pools and batch.inputs.old is not None:
        return None, f"level {config.level!r} pools the ratios of a sequence before any of its slopes is known"
    if pooling.spreads:
        uniform = pooling.spread == "mean" and arguments.token_weights is None
        uniform &= advantages_per_sequence(batch.sequences, arguments.advantages)
        uniform &= batch.inputs.kl_weight is None or not config.kl.ratio_weighted
        uniform &= batch.inputs.rollout_kl_weight is None or not config.rollout_kl.ratio_weighted
        uniform &= len(config.schemes) == 0 and arguments.entropy_threshold is None
        if not uniform:
            return None, f"level {config.level!r} spreads the slopes of a sequence over its tokens, which differ here"
    with_rollout_kl = batch.inputs.rollout_kl_weight is not None
    spec = objective_spec(config, batch.inputs.kl_weight is not None, batch.schemes, with_rollout_kl)
    if spec is not None:
        return spec, None
    if config.policy_term.kernel_id is None:
        return None, f"{type(config.policy_term).__name__} has no one-pass kernel"
    return None, f"no one-pass kernel applies {', '.join(map(repr, batch.schemes))} inside of a row"


def _check_require(tokens: Tokens, require: Require, route: Route) -> None:
    """Refuse a call that would not be computed as it is required to be."""
    check_name(f"{tokens.function}: require", require, REQUIREMENTS)
    if route.backend == "torch" or route.passes > 1:
        expected = "a call that compiled kernels serve in one pass (require='fused')"
        got = f"{route.passes} pass{'es' * (route.passes > 1)} of backend {route.backend!r}: {route.reason}"
        hint = "without require= the call takes this route; `python -m grpo_kernels info` tells what is usable here"
        fail(tokens.function, expected, got, tokens.tensors, hint, RuntimeError)
