"""Gradients attached to values that are already computed: a few small ``autograd.Function``s.

The forward work of a loss happens before them, under ``no_grad``; a Function only ties its result to the logits.
``LogProbs`` and ``LinearLogProbs`` run their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import ops
from ..backends.contract import Rows
from .arguments import ordinary

_SPENT = (
    "{function}: a second backward through one call. Its gradient was computed during forward and has been handed "
    "over. Call {function} again, or sum the losses before one backward; for repeated backward use {alternative} with "
    "your own loss on log-probs."
)


class _Final(torch.autograd.Function):
    """A gradient that was asked for with create_graph=True: differentiating it raises, instead of giving nothing."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> NoReturn:
        raise RuntimeError("grpo_kernels: the gradient in the logits cannot be differentiated a second time.")


def once(backward: Callable[..., Any]) -> Any:
    """``once_differentiable`` whose result refuses a second derivative also where nothing upstream requires grad."""
    differentiable = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = differentiable(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if g is None else _Final.apply(g.detach().requires_grad_()) for g in gradients)

    return wrapped


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients in ``tensors`` exist already, multiplied by ``announced`` (one pass; hidden states).

    ``tensors`` are those that the loss depends on and then their gradients, None where none is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        announced: Tensor,
        token_ids: Tensor,
        backend: str,
        function: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        gradients = tensors[len(tensors) // 2 :]
        ctx.save_for_backward(announced, token_ids, *gradients)
        ctx.backend, ctx.function, ctx.spent = backend, function, False
        return loss.clone()

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            alternative = ctx.function.replace("grpo_loss", "token_log_probs")
            raise RuntimeError(_SPENT.format(function=ctx.function, alternative=alternative))
        ctx.spent = True
        announced, token_ids, *gradients = ctx.saved_tensors
        for gradient in gradients:
            if gradient is not None:
                rows = gradient if gradient.dim() > 1 else gradient[None]
                ops.rescale_(rows, token_ids, upstream, announced, ctx.backend)
        return *(None,) * 5, *gradients, *(None,) * len(gradients)


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
        anchor: Tensor,
        log_sum: Tensor,
        slope: Tensor,
        entropy_slope: Tensor | None,
        backend: str,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            logits, token_ids, live, numbers, log_prob, entropy, anchor, log_sum, slope, entropy_slope
        )
        ctx.softcap, ctx.backend, ctx.inplace = softcap, backend, inplace
        return loss.clone()

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, live, numbers, log_prob, entropy, anchor, log_sum, slope, entropy_slope = ctx.saved_tensors
        slope = slope * upstream
        entropy_slope = None if entropy_slope is None else entropy_slope * upstream
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap)
        gradient = backward_rows(
            rows, log_prob, entropy, anchor, log_sum, slope, entropy_slope, ctx.backend, ctx.inplace
        )
        return gradient, *(None,) * 13


class LossOfLogProbs(torch.autograd.Function):
    """A loss whose slopes in log-prob and entropy are known, of log-probs that make their own gradient."""

    @staticmethod
    def forward(
        ctx: Any, log_prob: Tensor, entropy: Tensor, loss: Tensor, slope: Tensor, entropy_slope: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(slope, entropy_slope)
        return loss.clone()

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slope, entropy_slope = ctx.saved_tensors
        return slope * upstream, None if entropy_slope is None else entropy_slope * upstream, None, None, None


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
        log_prob, entropy, anchor, log_sum = ops.log_probs(logits, token_ids, live, numbers, softcap, backend)
        ctx.save_for_backward(logits, token_ids, live, numbers, log_prob, entropy, anchor, log_sum)
        ctx.set_materialize_grads(False)
        ctx.softcap, ctx.backend, ctx.inplace = softcap, backend, inplace
        return log_prob, entropy

    @staticmethod
    @once
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 7
        logits, token_ids, live, numbers, log_prob, entropy, anchor, log_sum = ctx.saved_tensors
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap)
        g, h = (None if upstream is None else upstream.contiguous() for upstream in (grad_log_prob, grad_entropy))
        gradient = backward_rows(rows, log_prob, entropy, anchor, log_sum, g, h, ctx.backend, ctx.inplace)
        return gradient, *(None,) * 6


class LinearLogProbs(torch.autograd.Function):
    """Log-probs and entropies from hidden states; ``sweep`` (linear.py) computes both ways, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, sweep: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        stats = sweep.log_probs(hidden, weight, bias)
        if any(ctx.needs_input_grad):
            head = (None if tensor is None else ordinary(tensor) for tensor in (hidden, weight, bias))
            ctx.save_for_backward(*head, *stats)
        ctx.set_materialize_grads(False)
        ctx.sweep = sweep
        return sweep.live_rows.scatter(stats[0]), sweep.live_rows.scatter(stats[1])

    @staticmethod
    @once
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 4
        hidden, weight, bias, *stats = ctx.saved_tensors
        gradients = ctx.sweep.gradients(
            ctx.needs_input_grad[1:], hidden, weight, bias, stats, grad_log_prob, grad_entropy
        )
        return None, *gradients


def backward_rows(
    rows: Rows,
    log_prob: Tensor,
    entropy: Tensor,
    anchor: Tensor,
    log_sum: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
    inplace: bool,
) -> Tensor:
    """The logits' gradient, in a tensor of its own or over the logits."""
    arguments = (*rows.arguments, log_prob, entropy, anchor, log_sum, grad_log_prob, grad_entropy, backend)
    if not inplace:
        return ops.log_probs_backward(rows.logits, *arguments)
    target = rows.logits.detach()
    ops.log_probs_backward_(target, *arguments)
    return target
