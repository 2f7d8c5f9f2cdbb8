"""What people write today: the GRPO loss with k3 KL, entropy and clip metrics in eager PyTorch, as short as it gets.

It makes no pass over the logits that it does not need: the fused loss is compared with the best plain version.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_of_log_probs(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, ref: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) log-probs to loss, ratios and k3 KL."""
    ratio, A = (log_probs - old).exp(), advantages[:, None]
    policy = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    u = ref - log_probs
    kl = u.exp() - u - 1
    lengths = mask.sum(-1).clamp(min=1)
    return (((policy + beta * kl) * mask).sum(-1) / lengths).mean(), ratio, kl


def eager_loss(
    logits: Tensor, ids: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, ref: Tensor, beta: float, upcast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, T, V) logits to loss, log-probs, entropy and metrics; ``upcast`` does the softmax in fp32."""
    log_p = torch.log_softmax(logits.float() if upcast else logits, -1)
    log_probs = log_p.gather(-1, ids[..., None]).squeeze(-1).float()
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).float()
    loss, ratio, kl = loss_of_log_probs(log_probs, advantages, mask, old, ref, beta)
    with torch.no_grad():
        tokens, A = mask.sum(), advantages[:, None]
        low, high = (ratio < 0.8) & (A < 0), (ratio > 1.2) & (A > 0)
        columns = torch.stack([kl, entropy, ratio, low, high, log_probs - old])
        metrics = (columns * mask).sum((-1, -2)) / tokens
    return loss, log_probs.detach(), entropy, metrics
