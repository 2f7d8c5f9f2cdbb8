"""What the public functions return."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..objectives.metrics import Metrics
from .provenance import Made
from .routes import Route


class LossOutput(NamedTuple):
    """A loss and what came with it."""

    loss: Tensor
    """0-d, fp32 (fp64 for fp64 logits); differentiable. With ``token_losses=True`` there is none: it raises."""
    metrics: Metrics
    log_probs: Tensor
    """Shape of token_ids, detached; 0 at masked positions."""
    entropy: Tensor
    """Shape of token_ids, nats, detached; 0 at masked positions."""
    route: Route | None = None
    """Backend, passes and the reason for them; None of the reference."""
    token_losses: Tensor | None = None
    """With ``token_losses=True``: u·ρ·f + kl_coef·k + rollout_kl_coef·k - entropy_coef·H of every token, without the
    aggregation's weight, shape of token_ids, 0 at masked positions; differentiable under any reduction of the
    caller's."""
    aux_loss: Tensor | None = None
    """Of a call of an attached mixture of experts that asked for it: the model's own, unscaled, outside of ``loss``."""
    model_output: Any = None
    """Of a call of an attached model that asked for more than the loss: the model's own output, without logits."""


class TokenLosses(LossOutput):
    """What a call with ``token_losses=True`` returns."""

    __slots__ = ()

    def __new__(cls, *values: Any, **named: Any) -> TokenLosses:
        # torch.compile reads every field of a plain named tuple that crosses a graph break, and loss raises; a class
        # with a constructor of its own is no such tuple to it.
        return super().__new__(cls, *values, **named)

    @property
    def loss(self) -> NoReturn:
        raise AttributeError(
            "token_losses=True gives out.token_losses, for the caller to reduce, like (out.token_losses * w).sum(), "
            "and no loss. Leave token_losses out for the config's own aggregation."
        )

    @classmethod
    def of(cls, token_losses: Tensor, **others: Any) -> TokenLosses:
        return cls(None, **others, token_losses=token_losses)


class Outcome(NamedTuple):
    """What a route came to, (B, T)."""

    loss: Tensor
    """0-d, or losses of tokens; differentiable."""
    metrics: Metrics
    log_prob: Tensor
    entropy: Tensor

    def of_loss(self, shape: torch.Size, route: Route) -> LossOutput:
        packed = self.log_prob.dim() != len(shape)
        log_prob, entropy = (x.view(shape) if packed else x for x in (self.log_prob, self.entropy))
        return LossOutput(self.loss, self.metrics, log_prob, entropy, route)

    def of_tokens(self, shape: torch.Size, route: Route) -> TokenLosses:
        outputs = {"log_probs": self.log_prob.view(shape), "entropy": self.entropy.view(shape)}
        losses = self.loss if self.loss.shape == shape else self.loss.view(shape)  # a view refuses writes in place
        return TokenLosses.of(losses, metrics=self.metrics, route=route, **outputs)


class _TokenLogProbs(NamedTuple):
    log_probs: Tensor
    """Shape of token_ids, fp32 (fp64 for fp64 logits); differentiable; 0 at masked positions."""
    entropy: Tensor
    """Shape of token_ids, nats; differentiable; 0 at masked positions."""


class TokenLogProbs(_TokenLogProbs):
    """Log-probs and entropies of tokens: ``log_probs, entropy = token_log_probs(...)``.

    As a whole they are taken for ``old_log_probs``, and know how they were made: a loss that is computed otherwise
    warns, once.
    """

    made: Made | None = None
    """None where nobody knows: after ``_replace`` or ``tree_map``, or in a compiled graph."""

    @classmethod
    def by(cls, log_probs: Tensor, entropy: Tensor, made: Made | None) -> TokenLogProbs:
        out = cls(log_probs, entropy)
        if not torch.compiler.is_compiling():
            out.made = made
        return out
