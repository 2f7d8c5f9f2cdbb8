"""verl's operators on these kernels: log-probs and entropies from logits, and both from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear import linear_token_log_probs
from ..log_probs import token_log_probs


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Return the log-probs of ``labels`` (...) in logits (..., V), fp32 (fp64 for fp64).

    ``inplace_backward``: backward writes the gradient over the logits, unless they are a leaf.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    inplace = inplace_backward and logits.grad_fn is not None
    return token_log_probs(rows, labels.reshape(-1), inplace=inplace).log_probs.view(labels.shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy of every row of logits (..., V), nats, fp32 (fp64 for fp64); finite beside -inf."""
    rows = logits.reshape(-1, logits.shape[-1])
    some_token = torch.zeros(rows.shape[0], dtype=torch.int64, device=logits.device)
    return token_log_probs(rows, some_token).entropy.view(logits.shape[:-1])


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
