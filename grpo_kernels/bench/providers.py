"""Who is timed: ours, and the loss as people write it in PyTorch. Peers' packages are in benchmarks/peers.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear import linear_grpo_loss
from ..loss import grpo_loss
from .workload import CLIP, Spec, Workload

OURS, IN_PLACE = "ours", "ours, in place"
"""The call as it is pasted, which allocates its gradient, and the one that writes it over the logits."""
SMALL_CHUNKS = 2**25


@dataclass(frozen=True)
class Provider:
    """One way to the loss.

    ``loss`` returns the scalar, differentiable; ``bytes`` estimates its peak beyond the workload, so that what does
    not fit is skipped before it is allocated; ``same_outputs`` says that it gives loss, gradient, log-probs and
    entropy, as ours does.
    """

    name: str
    loss: Callable[[Workload], Tensor]
    bytes: Callable[[Spec], float]
    same_outputs: bool = True
    ours: bool = False
    call: str = ""
    """What a reader pastes to have it, where it is ours."""


def loss_of_log_probs(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, ref: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn (B, T) log-probs into loss, ratios and k3 KL, in the shortest eager PyTorch; see ``Workload.rest``."""
    ratio, A = (log_probs - old).exp(), advantages[:, None]
    terms = -torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    u = ref - log_probs
    kl = u.exp() - u - 1
    if beta:
        terms = terms + beta * kl
    lengths = mask.sum(-1).clamp(min=1)
    return ((terms * mask).sum(-1) / lengths).mean(), ratio, kl


def eager_loss(
    logits: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, ref: Tensor, beta: float, upcast: bool
) -> tuple[Tensor, Tensor]:
    """Compute loss and metrics as people write them today, entropy among them, without a needless pass over the logits.

    ``upcast`` does the softmax in fp32.
    """
    log_p = torch.log_softmax(logits.float() if upcast else logits, -1)
    log_probs = log_p.gather(-1, ids[..., None]).squeeze(-1).float()
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).float()
    loss, ratio, kl = loss_of_log_probs(log_probs, advantages, mask, old, ref, beta)
    with torch.no_grad():
        tokens, A = mask.sum(), advantages[:, None]
        low, high = (ratio < 1 - CLIP) & (A < 0), (ratio > 1 + CLIP) & (A > 0)
        columns = torch.stack([kl, entropy, ratio, low, high, log_probs - old])
        metrics = (columns * mask).sum((-1, -2)) / tokens
    return loss, metrics


def _ours(inplace: bool, backend: str | None = None) -> Callable[[Workload], Tensor]:
    def loss(work: Workload) -> Tensor:
        skip = work.spec.kind == "30 % A = 0"
        out = grpo_loss(
            work.logits(), work.ids, work.advantages, work.mask, **work.known(), config=work.config,
            inplace=inplace and torch.is_grad_enabled(), grad_scale=work.spec.upstream, skip_zero_advantage=skip,
            backend=backend,
        )  # fmt: skip
        return out.loss

    return loss


def _ours_linear(chunk_bytes: int, backend: str | None) -> Callable[[Workload], Tensor]:
    def loss(work: Workload) -> Tensor:
        skip = work.spec.kind == "30 % A = 0"
        out = linear_grpo_loss(
            *work.operands(), work.ids, work.advantages, work.mask, **work.known(), config=work.config,
            grad_scale=work.spec.upstream, skip_zero_advantage=skip, chunk_bytes=chunk_bytes,
            backend=backend,
        )  # fmt: skip
        return out.loss

    return loss


def _logits(work: Workload) -> Tensor:
    return work.logits() if work.spec.hidden is None else torch.nn.functional.linear(*work.operands())


def _eager(upcast: bool) -> Callable[[Workload], Tensor]:
    return lambda work: eager_loss(_logits(work), work.ids, *work.rest(), upcast)[0]


def _compiled(spec: Spec) -> Callable[[Workload], Tensor]:
    compiled = _compiled_loss(spec)
    return lambda work: compiled(_logits(work), work.ids, *work.rest(), True)[0]


@functools.lru_cache(maxsize=1)
def _compiled_loss(spec: Spec) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile eager_loss anew for each workload, or it would be a slower one for all of them."""
    torch.compiler.reset()
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(eager_loss)
    return compiled


def _fp32_copies(count: float) -> Callable[[Spec], float]:
    """Estimate ``count`` fp32 tensors of the logits' size, and from hidden states the logits and the gradients too."""

    def estimate(spec: Spec) -> float:
        logits = 0 if spec.hidden is None else 2 * spec.logits_bytes
        return 4 * count * spec.tokens * spec.vocab + logits

    return estimate


def ours_by_name(backend: str) -> list[Provider]:
    """Return ours on a backend beside that of automatic choice; summaries leave it out."""
    return _from_logits(backend, f"{OURS} ({backend})", chosen=False)


def _from_logits(backend: str | None, name: str, *, chosen: bool) -> list[Provider]:
    fresh, over, pasted = _ours(False, backend), _ours(True, backend), "grpo_loss(..., inplace=True)"
    return [
        Provider(name, fresh, lambda s: 1.05 * s.logits_bytes, chosen, chosen, "grpo_loss(...)"),
        Provider(f"{name}, in place", over, lambda s: 0.05 * s.logits_bytes, chosen, chosen, pasted),
    ]


def from_logits(spec: Spec, backend: str | None = None) -> list[Provider]:
    """Return ours, in place and not, and PyTorch's, on a workload of logits."""
    return [
        *_from_logits(backend, OURS, chosen=True),
        Provider("eager, fp32 upcast", _eager(True), _fp32_copies(4)),
        Provider("eager, logits' dtype", _eager(False), _fp32_copies(3)),
        Provider("torch.compile, fp32 upcast", _compiled(spec), _fp32_copies(2)),
    ]


def from_hidden(spec: Spec, backend: str | None = None) -> list[Provider]:
    """Return ours, with its default chunks and with small ones, and PyTorch's, on a workload of hidden states."""
    whole, small = _ours_linear(2**30, backend), _ours_linear(SMALL_CHUNKS, backend)
    pasted = "linear_grpo_loss(..., chunk_bytes=2**25)"
    return [
        Provider(OURS, whole, lambda s: min(2**30, 2 * s.logits_bytes), ours=True, call="linear_grpo_loss(...)"),
        Provider("ours, chunks of 32 MB", small, lambda s: SMALL_CHUNKS, ours=True, call=pasted),
        Provider("eager, fp32 upcast", _eager(True), _fp32_copies(4)),
        Provider("torch.compile, fp32 upcast", _compiled(spec), _fp32_copies(2)),
    ]


def providers(spec: Spec, backend: str | None = None) -> list[Provider]:
    """Return ours (on the backend of automatic choice, or the one named), eager PyTorch and torch.compile."""
    return from_logits(spec, backend) if spec.hidden is None else from_hidden(spec, backend)
