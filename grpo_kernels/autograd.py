"""Gradients attached to values that are already computed: three small ``autograd.Function``s.

The forward work of a loss happens before them, under ``no_grad``; a Function only ties its result to the logits.
``LogProbs`` alone runs its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .rows import Rows

_SPENT = (
    "grpo_loss: a second backward through one call. Its gradient was computed during forward and has been handed over. "
    "Call grpo_loss again, or sum the losses before one backward; for repeated backward use token_log_probs with your "
    "own loss on log-probs."
)


class _Final(torch.autograd.Function):
    """A gradient that was asked for with create_graph=True: differentiating it raises, instead of giving nothing."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> NoReturn:
        raise RuntimeError("grpo_kernels: the gradient in the logits cannot be differentiated a second time.")


def _once(backward: Callable[..., Any]) -> Any:
    """``once_differentiable`` whose result refuses a second derivative also where nothing upstream requires grad."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, *rest = once(ctx, *upstream)
        if torch.is_grad_enabled() and gradient is not None:
            gradient = _Final.apply(gradient.detach().requires_grad_())
        return gradient, *rest

    return wrapped


class KnownGradient(torch.autograd.Function):
    """A loss whose gradient in the logits exists already, multiplied by ``announced`` (the one-pass route)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor, token_ids: Tensor, announced: Tensor, backend: str
    ) -> Tensor:
        ctx.save_for_backward(gradient, token_ids, announced)
        ctx.backend, ctx.spent = backend, False
        return loss.clone()

    @staticmethod
    @_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(_SPENT)
        ctx.spent = True
        gradient, token_ids, announced = ctx.saved_tensors
        ops.rescale_(gradient, token_ids, upstream, announced, ctx.backend)
        return gradient, *(None,) * 5


class LossGradient(torch.autograd.Function):
    """A loss whose slopes in log-prob and entropy are known; backward makes the logits' gradient (two passes)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        loss: Tensor,
        token_ids: Tensor,
        live: Tensor,
        numbers: Tensor,
        softcap: bool,
        log_prob: Tensor,
        entropy: Tensor,
        lse: Tensor,
        slope: Tensor,
        entropy_slope: Tensor | None,
        backend: str,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, token_ids, live, numbers, log_prob, entropy, lse, slope, entropy_slope)
        ctx.softcap, ctx.backend, ctx.inplace = softcap, backend, inplace
        return loss.clone()

    @staticmethod
    @_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, live, numbers, log_prob, entropy, lse, slope, entropy_slope = ctx.saved_tensors
        slope = slope * upstream
        entropy_slope = None if entropy_slope is None else entropy_slope * upstream
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap)
        gradient = backward_rows(rows, log_prob, entropy, lse, slope, entropy_slope, ctx.backend, ctx.inplace)
        return gradient, *(None,) * 12


class LogProbs(torch.autograd.Function):
    """Log-probs and entropies of rows, differentiable in both."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        live: Tensor,
        numbers: Tensor,
        softcap: bool,
        backend: str,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        log_prob, entropy, lse = ops.log_probs(logits, token_ids, live, numbers, softcap, backend)
        ctx.save_for_backward(logits, token_ids, live, numbers, log_prob, entropy, lse)
        ctx.set_materialize_grads(False)
        ctx.softcap, ctx.backend, ctx.inplace = softcap, backend, inplace
        return log_prob, entropy

    @staticmethod
    @_once
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 7
        logits, token_ids, live, numbers, log_prob, entropy, lse = ctx.saved_tensors
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap)
        g, h = (None if upstream is None else upstream.contiguous() for upstream in (grad_log_prob, grad_entropy))
        gradient = backward_rows(rows, log_prob, entropy, lse, g, h, ctx.backend, ctx.inplace)
        return gradient, *(None,) * 6


def backward_rows(
    rows: Rows,
    log_prob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
    inplace: bool,
) -> Tensor:
    """The logits' gradient, in a tensor of its own or over the logits."""
    arguments = (*rows.arguments, log_prob, entropy, lse, grad_log_prob, grad_entropy, backend)
    if not inplace:
        return ops.log_probs_backward(rows.logits, *arguments)
    target = rows.logits.detach()
    ops.log_probs_backward_(target, *arguments)
    return target
