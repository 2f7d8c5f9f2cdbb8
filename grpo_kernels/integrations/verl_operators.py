"""verl's own operators on these kernels: entropies in chunks, and log-probs and entropies from hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..linear import linear_token_log_probs
from .operators import entropy_from_logits


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Return ``entropy_from_logits``, which needs no memory that chunks would save."""
    return entropy_from_logits(logits)


def fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``FusedLinearForPPO.forward``: return log-probs and entropies of hidden states (..., H), both fp32."""
    return _from_hidden(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy_or(original: Any) -> Any:
    """Return verl's ``linear_cross_entropy``; over ranks, or with a reduction, it stays verl's ``original``."""

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if reduction.lower() != "none" or dist_process_group is not None:
            found: tuple[Tensor, Tensor] = original(hidden, weight, labels, temperature, reduction, dist_process_group)
            return found
        log_probs, entropy = _from_hidden(hidden, weight, labels, temperature)
        return log_probs.view(-1), entropy.view(-1)

    return linear_cross_entropy


def _from_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    out = linear_token_log_probs(hidden, weight, labels, temperature=temperature, live_tokens=labels.numel())
    return out.log_probs, out.entropy
