"""What the public functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..objectives.metrics import Metrics
from .routes import Route


class LossOutput(NamedTuple):
    loss: Tensor
    """0-d, fp32 (fp64 for fp64 logits); differentiable."""
    metrics: Metrics
    log_probs: Tensor
    """Shape of token_ids, detached; 0 at masked positions."""
    entropy: Tensor
    """Shape of token_ids, nats, detached; 0 at masked positions."""
    route: Route | None = None
    """Backend, passes and the reason for them; None of the reference."""


class TokenLogProbs(NamedTuple):
    log_probs: Tensor
    """Shape of token_ids, fp32 (fp64 for fp64 logits); differentiable; 0 at masked positions."""
    entropy: Tensor
    """Shape of token_ids, nats; differentiable; 0 at masked positions."""
