"""Liger's signatures: ``triton_grpo_loss`` and ``LigerFusedLinearGRPOLoss`` of liger-kernel 0.8, one import changed.

Arguments, defaults and results are Liger's; Liger itself is not needed. Where they differ on purpose:

- ``luspo`` is the sum over a sequence's tokens, averaged over sequences, as TRL has it (Liger's also counts padding).
- per-token advantages (B, L) are taken as such (Liger reads the first B numbers).
- ``dapo`` without ``num_items_in_batch`` divides by this call's tokens: no hidden all-reduce over all ranks.
- a KL term without reference log-probs raises (Liger's linear loss takes the policy for its own reference).
- tokens of probability 0 and ratios that overflow have gradient 0, where Liger's are NaN.
- ``compiled`` and ``chunk_size`` are accepted and have no meaning here; ``inplace`` overwrites the logits during the
  forward pass, and leaves logits that are a leaf as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LossConfig
from ..linear import linear_grpo_loss, linear_token_log_probs
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objective import TokenBatch, token_terms
from ..rows import Padded
from ..surrogates import CLIPPED_HIGH, CLIPPED_LOW
from .objectives import objective


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """The GRPO loss of logits (B, L+1, V), whose last row is unused, with Liger's arguments.

    Returns:
        ``reduce=True``: (loss, [kl, clip_ratio]), without kl where beta is 0.
        ``reduce=False``: (per_token_loss, per_token_kl or None, is_clipped), (B, L); the first is differentiable under
        any reduction of your own. It takes two passes over the logits where the reduced loss takes one.

    Raises:
        ValueError: a ``loss_type`` that is not here yet, a KL term without ``ref_logp``, shapes that do not fit.
    """
    length = max_completion_length or completion_ids.shape[1]
    options = (eps_low, eps_high, delta, beta, use_bias_correction_kl, length)
    config = objective(loss_type, importance_sampling_level, *options)
    weights = _rollout_weights(vllm_is_ratio, completion_ids)
    inplace = inplace and not logits.is_leaf
    if not reduce:
        rows: dict[str, Any] = {"temperature": temperature, "inplace": inplace}
        log_probs = token_log_probs(logits, completion_ids, completion_mask, **rows).log_probs
        batch = _token_batch(config, log_probs, completion_mask, advantages, old_logp, ref_logp, weights)
        return _per_token(config, batch, log_probs)
    out = grpo_loss(
        logits,
        completion_ids,
        advantages,
        completion_mask,
        old_log_probs=old_logp,
        ref_log_probs=None if beta == 0 else ref_logp,
        token_weights=weights,
        config=config,
        normalizer=_normalizer(loss_type, num_items_in_batch),
        temperature=temperature,
        inplace=inplace,
    )
    batch = _token_batch(config, out.log_probs, completion_mask, advantages, old_logp, ref_logp, weights)
    return out.loss, _metrics(config, batch, out.log_probs)


class LigerFusedLinearGRPOLoss(nn.Module):
    """The GRPO loss of hidden states (B, L, H) and an LM head (V, H), with Liger's arguments and defaults.

    ``forward`` returns (loss, (kl, clip_ratio)), without kl where beta is 0.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length must be provided for loss_type 'dr_grpo'.")
        options = (epsilon_low, epsilon_high, delta, beta, use_bias_correction_kl, max_completion_length)
        self.config = objective(loss_type, importance_sampling_level, *options)
        self.beta, self.loss_type, self.temperature = beta, loss_type, temperature

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor | None,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the class; ``ref_input`` and ``ref_weight`` stand in for ``ref_per_token_logps``."""
        tokens = (selected_token_ids, attention_mask)
        if self.beta != 0 and ref_per_token_logps is None and ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                options = {"bias": ref_bias, "temperature": self.temperature}
                ref_per_token_logps = linear_token_log_probs(ref_input, ref_weight, *tokens, **options).log_probs
        out = linear_grpo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            advantages,
            attention_mask,
            bias=bias,
            old_log_probs=old_per_token_logps,
            ref_log_probs=None if self.beta == 0 else ref_per_token_logps,
            token_weights=_rollout_weights(vllm_is_ratio, selected_token_ids),
            config=self.config,
            normalizer=_normalizer(self.loss_type, num_items_in_batch),
            temperature=self.temperature,
        )
        known = (advantages, old_per_token_logps, ref_per_token_logps, None)
        batch = _token_batch(self.config, out.log_probs, attention_mask, *known)
        return out.loss, tuple(_metrics(self.config, batch, out.log_probs))


def _rollout_weights(ratio: Tensor | None, ids: Tensor) -> Tensor | None:
    """(B, L) of (B,), (B, 1) or (B, L)."""
    if ratio is None:
        return None
    return (ratio.unsqueeze(-1) if ratio.dim() == 1 else ratio).expand(ids.shape)


def _normalizer(loss_type: str, items: float | Tensor | None) -> float | Tensor | None:
    """Of the whole batch: gradients are averaged over ranks, so each takes its share of the tokens."""
    if items is None or loss_type != "dapo":
        return None
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return items.clamp(min=1) / ranks if isinstance(items, Tensor) else max(items, 1) / ranks


def _token_batch(
    config: LossConfig,
    log_probs: Tensor,
    mask: Tensor | None,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    weights: Tensor | None,
) -> TokenBatch:
    """Tokens that each count once, whatever they are reduced to afterwards."""
    live = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask != 0
    beta = config.kl.coef
    if beta != 0 and ref is None:
        raise ValueError("triton_grpo_loss: expected ref_logp for the KL term; got None. beta=0.0 leaves it out.")
    kind: dict[str, Any] = {"dtype": log_probs.dtype, "device": log_probs.device}
    ones = torch.ones(log_probs.shape, **kind)
    rows = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    return TokenBatch(
        live=live,
        masked_in=live,
        sequences=Padded(len(live)),
        advantages=rows.to(**kind).expand(live.shape),
        old=old,
        ref=ref if beta != 0 else None,
        rollout=None,
        policy_weight=ones if weights is None else weights.to(**kind),
        kl_weight=beta * ones if beta != 0 else None,
        entropy_weight=None,
    )


@torch.no_grad()
def _metrics(config: LossConfig, batch: TokenBatch, log_probs: Tensor) -> list[Tensor]:
    """Means over live tokens: the KL (its ratio included) where there is one, and how many are clipped."""
    _, kl, flags, _ = token_terms(config, batch, log_probs)
    count = batch.live.sum().clamp(min=1)
    clipped = _is_clipped(flags).sum() / count
    return [clipped] if batch.kl_weight is None else [kl.sum() / count, clipped]


def _is_clipped(flags: Tensor) -> Tensor:
    return ((flags & (CLIPPED_LOW | CLIPPED_HIGH)) != 0).float()


def _per_token(config: LossConfig, batch: TokenBatch, log_probs: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    policy, kl, flags, _ = token_terms(config, batch, log_probs.detach())
    loss = _PerToken.apply(log_probs, config, batch, policy * batch.policy_weight + config.kl.coef * kl)
    return loss, None if batch.kl_weight is None else kl, _is_clipped(flags)


class _PerToken(torch.autograd.Function):
    """Losses of tokens, whose slope is that of the whole under whatever weights come back."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, config: LossConfig, batch: TokenBatch, value: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs)
        ctx.config, ctx.batch = config, batch
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (log_probs,) = ctx.saved_tensors
        kl = ctx.batch.kl_weight
        weights = {
            "policy_weight": ctx.batch.policy_weight * upstream,
            "kl_weight": None if kl is None else kl * upstream,
        }
        slope = token_terms(ctx.config, dataclasses.replace(ctx.batch, **weights), log_probs)[3]
        return slope, None, None, None
