"""Which kernels a loss takes, and why: decided before anything is computed."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .. import backends
from ..backends import Choice
from ..backends.spec import LogitArgs, ObjectiveSpec, objective_spec
from ..objectives.checks import check_name, fail
from ..objectives.config import LossConfig
from .batch import LossInputs, TokenBatch, advantages_per_sequence
from .tokens import Tokens

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


def one_pass_spec(config: LossConfig, batch: TokenBatch, given: LossInputs) -> ObjectiveSpec | str:
    """What to tell the one-pass kernel; or why it cannot serve, where a row's slope is not known from that row alone.

    It is at token level; on-policy also at the sequence levels, if the mean of the slopes over a sequence is each of
    them (one advantage, one weight), but not for the sum ("sequence_product").
    """
    if config.kl_pooling != config.pooling:
        return f"the KL's ratio is pooled at level {config.kl.level!r}, the policy's at {config.level!r}"
    if config.pooling.pools and batch.inputs.old is not None:
        return f"level {config.level!r} pools the ratios of a sequence before any of its slopes is known"
    if config.pooling.spreads:
        uniform = config.pooling.spread == "mean" and given.token_weights is None
        uniform &= advantages_per_sequence(batch.sequences, given.advantages)
        uniform &= batch.inputs.kl_weight is None or not config.kl.ratio_weighted
        uniform &= len(config.schemes) == 0 and given.entropy_threshold is None
        if not uniform:
            return f"level {config.level!r} spreads the slopes of a sequence over its tokens, which differ here"
    spec = objective_spec(config, batch.inputs.kl_weight is not None, batch.schemes)
    if spec is None and config.surrogate.kernel_id is None:
        return f"{type(config.surrogate).__name__} has no one-pass kernel"
    return spec or f"no one-pass kernel applies {', '.join(map(repr, batch.schemes))} inside of a row"


def route_of(chosen: Choice, two_passes: str | None, wants_gradient: bool, copies: bool = False) -> Route:
    """``two_passes`` is the reason for them, None if the objective takes one. ``copies``: rows are copied first."""
    if copies:
        passes, reason = 2, "support= works on copies of the rows"
    elif not wants_gradient:
        passes, reason = 1, "no gradient is wanted"
    elif two_passes is not None:
        passes, reason = 2, two_passes
    elif not chosen.fuses:
        passes, reason = 2, chosen.unfused
    else:
        passes, reason = 1, "every row's slope follows from that row"
    return Route(chosen.backend, passes, "; ".join([reason, *([chosen.passed_over] if chosen.passed_over else [])]))


def check_require(tokens: Tokens, require: Require | None, route: Route) -> None:
    """Refuse a call that would not be computed as it is required to be."""
    if require is None:
        return
    check_name(f"{tokens.function}: require", require, REQUIREMENTS)
    if route.backend == "torch" or route.passes > 1:
        expected = "a call that compiled kernels serve in one pass (require='fused')"
        got = f"{route.passes} pass{'es' * (route.passes > 1)} of backend {route.backend!r}: {route.reason}"
        hint = "without require= the call takes this route; `python -m grpo_kernels info` tells what is usable here"
        fail(tokens.function, expected, got, tokens.tensors, hint, RuntimeError)


def choose_backend(tokens: Tokens, backend: str | None, args: LogitArgs, fused: bool = False) -> backends.Choice:
    """The backend, and whether it serves the one-pass loss where that is wanted (``fused``)."""
    softcap = args.logit_softcap is not None
    request = backends.Request(tokens.states.device, tokens.dtype, tokens.vocab, fused, softcap)
    return backends.choose(tokens.function, request, backend)
