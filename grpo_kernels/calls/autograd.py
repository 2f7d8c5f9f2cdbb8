"""Gradients attached to values that are already computed: a few small ``autograd.Function``s.

The forward work of a loss happens before them, under ``no_grad``; a Function only ties its result to the logits.
``LogProbs`` runs its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, Rows, RowStats
from .vocabulary import VocabShard, row_stats

_SPENT = (
    "{function}: a second backward through one call. Its gradient was computed during forward and has been handed "
    "over. Call {function} again, or sum the losses before one backward; for repeated backward use {alternative} with "
    "your own loss on log-probs."
)

_BATCHED = (
    "{function}: several gradients at once (is_grads_batched=True, vectorize=True) of a call whose one gradient was "
    "computed during forward. Ask for one at a time, of a call each, or use {alternative} with your own loss on "
    "log-probs."
)


class _Final(torch.autograd.Function):
    """A gradient that was asked for with create_graph=True: differentiating it in whatever it was ``made_of`` raises,
    instead of giving nothing."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *made_of: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> NoReturn:
        raise RuntimeError("grpo_kernels: a gradient of its own cannot be differentiated a second time.")


class _Unpacked:
    """A Function's ``ctx`` with what it has saved, which checkpointing lets nobody unpack twice."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Tensor | None, ...]) -> None:
        self.__dict__.update(ctx=ctx, saved_tensors=saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["ctx"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["ctx"], name, value)


def once(backward: Callable[..., Any]) -> Any:
    """``once_differentiable`` whose result refuses a second derivative also where nothing upstream requires grad.

    What a Function has saved leads to its inputs: they themselves, or what it returned. A loss may be overwritten by
    the caller, as by ``loss /= n``, and cannot be saved: beside it an ``origin`` without elements is.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...]
        if not torch.is_grad_enabled():
            gradients = backward(ctx, *upstream)
            return gradients
        saved = ctx.saved_tensors
        made_of = [*(tensor for tensor in saved if tensor is not None and tensor.requires_grad), *upstream]
        with torch.no_grad():
            gradients = backward(_Unpacked(ctx, saved), *upstream)
        return tuple(None if g is None else _Final.apply(g.detach(), *made_of) for g in gradients)

    return wrapped


def _output(loss: tuple[Tensor]) -> Tensor:
    """Return the loss that a node was handed as the node's own. A tuple hides it from autograd, which would copy an
    input; from a compiler's tracing it does not, and a graph whose output is an input has no node."""
    return loss[0].clone() if torch.compiler.is_compiling() else loss[0]


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients in ``tensors`` exist already, multiplied by ``announced`` (one pass; hidden states).

    ``tensors`` are those that the loss depends on and then their gradients, None where none is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: tuple[Tensor],
        announced: Tensor,
        token_ids: Tensor,
        backend: str,
        function: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gradients, origin = tensors[len(tensors) // 2 :], loss[0].new_empty(0)
        ctx.save_for_backward(origin, announced, token_ids, *gradients)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.function, ctx.spent = backend, function, False
        return _output(loss), origin

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        alternative = ctx.function.replace("grpo_loss", "token_log_probs")
        if ctx.spent:
            raise RuntimeError(_SPENT.format(function=ctx.function, alternative=alternative))
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream):
            raise RuntimeError(_BATCHED.format(function=ctx.function, alternative=alternative))
        ctx.spent = True
        _, announced, token_ids, *gradients = ctx.saved_tensors
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
        loss: tuple[Tensor],
        rows: Rows,
        stats: RowStats,
        gradients: RowGradients,
        backend: str,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, *rows[1:4], rows.temperature, *stats, *gradients)
        ctx.set_materialize_grads(False)
        ctx.softcap, ctx.backend, ctx.inplace = rows.softcap, backend, inplace
        return _output(loss)

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        logits, token_ids, live, numbers, temperature, *saved = ctx.saved_tensors
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap, temperature)
        stats = RowStats(*saved[:4])
        gradients = RowGradients(*(None if slope is None else slope * upstream for slope in saved[4:]))
        return backward_rows(rows, stats, gradients, ctx.backend, ctx.inplace), *(None,) * 6


class LossOfLogProbs(torch.autograd.Function):
    """A loss whose slopes in log-prob, entropy and divergence are known, of what makes its own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        log_prob: Tensor,
        entropy: Tensor,
        divergence: Tensor | None,
        loss: tuple[Tensor],
        slope: Tensor,
        entropy_slope: Tensor | None,
        divergence_slope: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        origin = loss[0].new_empty(0)
        ctx.save_for_backward(origin, slope, entropy_slope, divergence_slope)
        ctx.set_materialize_grads(False)
        return _output(loss), origin

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        slopes = (None if slope is None else slope * upstream for slope in ctx.saved_tensors[1:])
        return *slopes, None, None, None, None


class LogProbs(torch.autograd.Function):
    """Log-probs and entropies of rows, differentiable in both."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, shard: VocabShard | None, backend: str, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        stats = row_stats(rows._replace(logits=logits), shard, backend)
        ctx.save_for_backward(logits, *rows[1:4], rows.temperature, *stats)
        ctx.set_materialize_grads(False)
        ctx.softcap, ctx.shard, ctx.backend, ctx.inplace = rows.softcap, shard, backend, inplace
        return stats.log_prob, stats.entropy

    @staticmethod
    @once
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(slope is None for slope in upstream):  # PyTorch 2.11 compiles no tensor == None
            return None, None, None, None, None
        logits, token_ids, live, numbers, temperature, *stats = ctx.saved_tensors
        rows = Rows(logits, token_ids, live, numbers, ctx.softcap, temperature)
        gradients = RowGradients(*(None if slope is None else slope.contiguous() for slope in upstream))
        if ctx.shard is None:
            gradient = backward_rows(rows, RowStats(*stats), gradients, ctx.backend, ctx.inplace)
        else:
            gradient = ctx.shard.gradient(rows, RowStats(*stats), gradients, ctx.backend, ctx.inplace)
        return gradient, None, None, None, None


def backward_rows(rows: Rows, stats: RowStats, gradients: RowGradients, backend: str, inplace: bool) -> Tensor:
    """Return the logits' gradient, in a tensor of its own or over the logits."""
    if not inplace:
        return ops.log_probs_backward(rows, stats, gradients, backend)
    target = rows._replace(logits=rows.logits.detach())
    ops.log_probs_backward_(target, stats, gradients, backend)
    return target.logits
