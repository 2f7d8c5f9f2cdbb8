"""verl's own operators on these kernels: entropies in chunks, log-probs and entropies from hidden states, and of logits
whose vocabulary lies on Megatron's ranks."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..calls.outputs import TokenLogProbs
from ..linear import linear_token_log_probs
from ..log_probs import token_log_probs
from .operators import entropy_from_logits


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Return ``entropy_from_logits``, which needs no memory that chunks would save."""
    return entropy_from_logits(logits)


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probs of ``labels`` (...) in logits (..., V/p) of Megatron's ranks, fp32 (fp64 for fp64)."""
    return _over_ranks(logits, labels).log_probs.view(labels.shape)


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """Return the entropy of every row of logits (..., V/p) of Megatron's ranks, nats, fp32 (fp64 for fp64)."""
    some_token = torch.zeros(vocab_parallel_logits.shape[:-1], dtype=torch.int64, device=vocab_parallel_logits.device)
    return _over_ranks(vocab_parallel_logits, some_token).entropy.view(some_token.shape)


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Return ``vocab_parallel_entropy``, which needs no memory that chunks would save."""
    return vocab_parallel_entropy(vocab_parallel_logits)


def _over_ranks(logits: Tensor, labels: Tensor) -> TokenLogProbs:
    """Return log-probs and entropies of rows whose columns lie on tensor-parallel ranks, as many on each."""
    group = importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
    width, ranks = logits.shape[-1], torch.distributed.get_world_size(group)
    return token_log_probs(
        logits.reshape(-1, width),
        labels.reshape(-1),
        vocab_group=group,
        vocab_start=torch.distributed.get_rank(group) * width,
        vocab_size=ranks * width,
    )


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
