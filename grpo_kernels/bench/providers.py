"""Who is timed: ours, and the loss as people write it in PyTorch. Peers' packages are benchmarks/peers.py's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear import linear_grpo_loss
from ..loss import grpo_loss
from .workload import CLIP, Spec, Workload


@dataclass(frozen=True)
class Provider:
    """One way to the loss.

    ``loss`` returns the scalar, differentiable; ``bytes`` estimates its peak beyond the workload, so that what does
    not fit is skipped before it is allocated; ``same_outputs``: loss, gradient, log-probs and entropy, as ours.
    """

    name: str
    loss: Callable[[Workload], Tensor]
    bytes: Callable[[Spec], float]
    same_outputs: bool = True
    ours: bool = False


def loss_of_log_probs(log_probs: Tensor, work: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) log-probs to loss, ratios and k3 KL, in eager PyTorch as short as it gets."""
    ratio, A = (log_probs - work.old).exp(), work.advantages[:, None]
    terms = -torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    u = work.ref - log_probs
    kl = u.exp() - u - 1
    if work.beta:
        terms = terms + work.beta * kl
    lengths = work.mask.sum(-1).clamp(min=1)
    return ((terms * work.mask).sum(-1) / lengths).mean(), ratio, kl


def eager_loss(logits: Tensor, work: Workload, upcast: bool) -> Tensor:
    """What people write today, with entropy and clip metrics; it makes no pass over the logits that it does not need.

    ``upcast`` does the softmax in fp32.
    """
    log_p = torch.log_softmax(logits.float() if upcast else logits, -1)
    log_probs = log_p.gather(-1, work.ids[..., None]).squeeze(-1).float()
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).float()
    loss, ratio, kl = loss_of_log_probs(log_probs, work)
    with torch.no_grad():
        tokens, A = work.mask.sum(), work.advantages[:, None]
        low, high = (ratio < 1 - CLIP) & (A < 0), (ratio > 1 + CLIP) & (A > 0)
        columns = torch.stack([kl, entropy, ratio, low, high, log_probs - work.old])
        (columns * work.mask).sum((-1, -2)) / tokens  # the metrics that a training loop logs
    return loss


def _ours(inplace: bool) -> Callable[[Workload], Tensor]:
    def loss(work: Workload) -> Tensor:
        skip = work.spec.kind == "30 % A = 0"
        out = grpo_loss(
            work.logits(), work.ids, work.advantages, work.mask, **work.known(), config=work.config,
            inplace=inplace and torch.is_grad_enabled(), grad_scale=work.spec.upstream, skip_zero_advantage=skip,
        )  # fmt: skip
        return out.loss

    return loss


def _ours_linear(chunk_bytes: int) -> Callable[[Workload], Tensor]:
    def loss(work: Workload) -> Tensor:
        skip = work.spec.kind == "30 % A = 0"
        out = linear_grpo_loss(
            *work.operands(), work.ids, work.advantages, work.mask, **work.known(), config=work.config,
            grad_scale=work.spec.upstream, skip_zero_advantage=skip, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        return out.loss

    return loss


def _eager(upcast: bool) -> Callable[[Workload], Tensor]:
    def loss(work: Workload) -> Tensor:
        if work.spec.hidden is None:
            return eager_loss(work.logits(), work, upcast)
        return eager_loss(torch.nn.functional.linear(*work.operands()), work, upcast)

    return loss


def _compiled(spec: Spec) -> Callable[[Workload], Tensor]:
    body = _compiled_body(spec)

    def loss(work: Workload) -> Tensor:
        logits = work.logits() if spec.hidden is None else torch.nn.functional.linear(*work.operands())
        return body(logits, work.ids, work.advantages, work.mask, work.old, work.ref, work.beta)[0]

    return loss


@functools.lru_cache(maxsize=1)
def _compiled_body(spec: Spec) -> Callable[..., tuple[Tensor, ...]]:
    """torch.compile of eager_loss's maths, anew for each workload, or it would be a slower one for all of them."""
    torch.compiler.reset()

    def body(
        logits: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, ref: Tensor, beta: float
    ) -> tuple[Tensor, ...]:
        log_p = torch.log_softmax(logits.float(), -1)
        log_probs = log_p.gather(-1, ids[..., None]).squeeze(-1)
        entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
        ratio, A = (log_probs - old).exp(), advantages[:, None]
        terms = -torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
        u = ref - log_probs
        kl = u.exp() - u - 1
        loss = (((terms + beta * kl) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
        low, high = (ratio < 1 - CLIP) & (A < 0), (ratio > 1 + CLIP) & (A > 0)
        columns = torch.stack([kl, entropy, ratio, low, high, log_probs - old]).detach()
        return loss, (columns * mask).sum((-1, -2)) / mask.sum()

    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(body)
    return compiled


def _fp32_copies(count: float) -> Callable[[Spec], float]:
    """``count`` fp32 tensors of the logits' size, and from hidden states the logits and the gradients."""

    def estimate(spec: Spec) -> float:
        logits = 0 if spec.hidden is None else 2 * spec.logits_bytes
        return 4 * count * spec.tokens * spec.vocab + logits

    return estimate


def from_logits(spec: Spec) -> list[Provider]:
    """Ours and PyTorch's."""
    return [
        Provider("ours, in place", _ours(True), lambda s: 0.05 * s.logits_bytes, ours=True),
        Provider("ours", _ours(False), lambda s: 1.05 * s.logits_bytes, ours=True),
        Provider("eager, fp32 upcast", _eager(True), _fp32_copies(4)),
        Provider("eager, logits' dtype", _eager(False), _fp32_copies(3)),
        Provider("torch.compile, fp32 upcast", _compiled(spec), _fp32_copies(2)),
    ]


SMALL_CHUNKS = 2**25


def from_hidden(spec: Spec) -> list[Provider]:
    return [
        Provider("ours", _ours_linear(2**30), lambda s: min(2**30, 2 * s.logits_bytes), ours=True),
        Provider("ours, chunks of 32 MB", _ours_linear(SMALL_CHUNKS), lambda s: SMALL_CHUNKS, ours=True),
        Provider("eager, fp32 upcast", _eager(True), _fp32_copies(4)),
        Provider("torch.compile, fp32 upcast", _compiled(spec), _fp32_copies(2)),
    ]


def providers(spec: Spec) -> list[Provider]:
    """Of a workload: ours, eager PyTorch, torch.compile."""
    return from_logits(spec) if spec.hidden is None else from_hidden(spec)
