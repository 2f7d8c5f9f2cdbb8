"""Operators that systems take log-probs and entropies from, on these kernels, and where they are looked up from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls.arguments import keeps_values
from ..log_probs import token_log_probs
from ..objectives.checks import fail


def always(function: Any) -> Callable[[Any], Any]:
    """Return the replacement of a hook that needs nothing of the original."""
    return lambda original: function


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Return the log-probs of ``labels`` (...) in logits (..., V), fp32 (fp64 for fp64): verl's and SkyRL's.

    ``inplace_backward``: backward writes the gradient over the logits, unless they are a leaf or a view of one.
    """
    if [size for size in labels.shape if size != 1] != [size for size in logits.shape[:-1] if size != 1]:
        fail("logprobs_from_logits", f"labels {tuple(logits.shape[:-1])}, one for each row", f"{tuple(labels.shape)}")
    rows = _rows(logits)
    inplace = inplace_backward and logits.grad_fn is not None and not keeps_values(logits)
    return token_log_probs(rows, labels.reshape(-1), inplace=inplace).log_probs.view(labels.shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy of every row of logits (..., V), nats, fp32 (fp64 for fp64); finite beside -inf."""
    rows = _rows(logits)
    some_token = torch.zeros(rows.shape[0], dtype=torch.int64, device=logits.device)
    return token_log_probs(rows, some_token).entropy.view(logits.shape[:-1])


def _rows(logits: Tensor) -> Tensor:
    """Return logits (..., V) as (N, V) whose columns follow each other in memory, copied where theirs do not."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
