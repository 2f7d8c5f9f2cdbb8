"""Liger's signatures: ``triton_grpo_loss`` and ``LigerFusedLinearGRPOLoss`` of liger-kernel 0.8, one import changed.

Arguments, defaults and results are Liger's; Liger itself is not needed. Where they differ on purpose:

- ``luspo`` is the sum over a sequence's tokens, averaged over sequences, as TRL has it (Liger's also counts padding).
- per-token advantages (B, L) are taken as such (Liger's Triton loss reads the first B numbers).
- ``dapo`` without ``num_items_in_batch`` divides by this call's tokens: no hidden all-reduce over all ranks.
- ratios and log-probs that are infinite give no NaN to other tokens.
- ``delta`` below 1 + eps_high has the gradient of its value (Liger's Triton loss has 0 there); below 1 it is refused.
- VESPO's rollout ratios of masked tokens do not count (Liger adds their logarithms too).
- shapes are checked: nothing broadcasts by accident. Hidden states and weight have one dtype, or autocast.
- ``compiled`` and ``chunk_size`` are accepted and have no meaning here.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.batch import LossArguments, read_batch
from ..calls.terms import TokenBatch, token_terms
from ..calls.tokens import read_linear_tokens, read_tokens
from ..linear import linear_grpo_loss, linear_token_log_probs
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.checks import check_shape
from ..objectives.config import LossConfig
from ..objectives.maths import weighed
from ..objectives.sequences import on_tokens
from ..objectives.surrogates import Cispo
from .objectives import OVER_ITEMS, UNBOUNDED, Objective, sampler_log_probs


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
        any reduction of your own.

    ``inplace=True`` (Liger's default) writes the gradient over the logits during backward, as Liger does, unless they
    are a leaf; ``reduce=True, inplace=False`` is the one pass of ``grpo_loss``, for the memory of a second tensor.

    Raises:
        ValueError: an unknown ``loss_type``, a KL term without ``ref_logp``, shapes that do not fit.
    """
    function = "triton_grpo_loss"
    length = max_completion_length or completion_ids.shape[1]
    asked = Objective(
        *(loss_type, importance_sampling_level, eps_low, eps_high, delta, beta, use_bias_correction_kl, length),
        sapo=(sapo_temperature_pos, sapo_temperature_neg),
        vespo=(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )
    _check(asked)
    rollout, weights = _rollout(function, asked, old_logp, vllm_is_ratio, completion_ids, completion_mask)
    config, counting = asked.config(rollout is not None), dataclasses.replace(asked, delta=None).config()
    normalizer, ref = _normalizer(loss_type, num_items_in_batch), ref_logp if beta != 0 else None
    given = LossArguments(advantages, old_logp, ref, rollout, weights, normalizer=normalizer)
    tokens = read_tokens(function, logits, completion_ids, completion_mask, given.tensors)
    _, batch = read_batch(tokens, config, given)
    if reduce and not inplace:
        out = grpo_loss(
            *(logits, completion_ids, advantages, completion_mask),
            old_log_probs=old_logp,
            ref_log_probs=ref,
            rollout_log_probs=rollout,
            token_weights=weights,
            config=config,
            normalizer=normalizer,
            temperature=temperature,
        )
        return out.loss, _metrics(counting, batch, out.log_probs)
    rows: dict[str, Any] = {"temperature": temperature, "inplace": inplace and not logits.is_leaf}
    log_probs = token_log_probs(logits, completion_ids, completion_mask, **rows).log_probs
    alone = _each_counts_once(batch, weights, beta)
    records, _ = token_terms(config, alone, log_probs.detach())
    value, kl = weighed(alone.inputs.policy_weight, records.policy) + beta * records.kl, records.kl
    losses = _PerToken.apply(log_probs, config, alone, value)
    if not reduce:
        return losses, kl if beta != 0 else None, _counted(counting, batch, log_probs)[1].float()
    counted = (batch.masked_in, batch.sequences)
    share = on_tokens(config.weighting.weights(*counted, normalizer), *counted, losses.dtype)
    return (losses * share).sum(), _metrics(counting, batch, log_probs)


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
        self.beta, self.use_ref_model, self.use_bias_correction_kl = beta, use_ref_model, use_bias_correction_kl
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.max_completion_length, self.temperature = max_completion_length, temperature
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self._objective().config()

    def _objective(self) -> Objective:
        """Of the attributes as they are now. Without a reference model the policy is its own: a KL of 0."""
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be provided for loss_type 'dr_grpo'.")
        beta = self.beta if self.use_ref_model else 0.0
        asked = Objective(
            *(self.loss_type, self.importance_sampling_level, self.epsilon_low, self.epsilon_high, self.delta),
            *(beta, self.use_bias_correction_kl, self.max_completion_length),
            sapo=(self.sapo_temperature_pos, self.sapo_temperature_neg),
            vespo=(self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg),
        )
        _check(asked)
        return asked

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
        function, ids, asked = "LigerFusedLinearGRPOLoss", selected_token_ids, self._objective()
        rollout, weights = _rollout(function, asked, old_per_token_logps, vllm_is_ratio, ids, attention_mask)
        config = asked.config(rollout is not None)
        if ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(f"{function}: both references were given. Using ref_per_token_logps.", stacklevel=2)
        if config.kl.coef == 0:
            ref_per_token_logps = None
        elif ref_per_token_logps is None and ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                options: dict[str, Any] = {"bias": ref_bias, "temperature": self.temperature}
                out = linear_token_log_probs(ref_input, ref_weight, ids, attention_mask, **options)
                ref_per_token_logps = out.log_probs
        normalizer = _normalizer(self.loss_type, num_items_in_batch)
        known = (advantages, old_per_token_logps, ref_per_token_logps)
        given = LossArguments(*known, rollout, weights, normalizer=normalizer)
        head = (_input, lin_weight, bias)
        tokens = read_linear_tokens(function, *head, ids, attention_mask, None, given.tensors)
        _, batch = read_batch(tokens, config, given)
        loss = linear_grpo_loss(
            *(_input, lin_weight, ids, advantages, attention_mask),
            bias=bias,
            old_log_probs=old_per_token_logps,
            ref_log_probs=ref_per_token_logps,
            rollout_log_probs=rollout,
            token_weights=weights,
            config=config,
            normalizer=normalizer,
            temperature=self.temperature,
        )
        metrics = _metrics(dataclasses.replace(asked, delta=None).config(), batch, loss.log_probs)
        if self.beta != 0 and config.kl.coef == 0:
            metrics.insert(0, torch.zeros_like(metrics[0]))
        return loss.loss, tuple(metrics)


def _check(asked: Objective) -> None:
    """What Liger refuses, and why ours has nothing else to offer there."""
    if asked.loss_type in UNBOUNDED and (asked.delta is not None or asked.level != "token"):
        raise ValueError(
            f"loss_type={asked.loss_type!r} takes importance_sampling_level='token' and no delta, as in Liger; got "
            f"{asked.level!r} and delta={asked.delta!r}. grpo_loss has every surrogate at every level."
        )


def _rollout(
    function: str, asked: Objective, old: Tensor | None, ratio: Tensor | None, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``vllm_is_ratio`` (B,), (B, 1) or (B, L), as log-probs of the sampler where it is part of the ratio (VESPO), or
    as factors of the tokens."""
    if ratio is None:
        return None, None
    count, length = ids.shape
    check_shape(function, "vllm_is_ratio", ratio, ((count,), (count, 1), (count, length)), {"vllm_is_ratio": ratio})
    weights = ratio.unsqueeze(-1) if ratio.dim() == 1 else ratio
    if asked.loss_type != "vespo":
        return None, weights.expand(ids.shape)
    if old is None:
        raise ValueError(f"{function}: loss_type='vespo' with vllm_is_ratio needs old log-probs to apply it to.")
    return sampler_log_probs(old, weights, torch.ones_like(ids) if mask is None else mask), None


def _normalizer(loss_type: str, items: float | Tensor | None) -> float | Tensor | None:
    """Of the whole batch: gradients are averaged over ranks, so each takes its share of the tokens."""
    if items is None or loss_type not in OVER_ITEMS:
        return None
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return items.clamp(min=1) / ranks if isinstance(items, Tensor) else max(items, 1) / ranks


def _each_counts_once(batch: TokenBatch, weights: Tensor | None, beta: float) -> TokenBatch:
    """Whatever the tokens are reduced to afterwards."""
    ones = batch.live.to(batch.inputs.advantage)
    policy = ones if weights is None else torch.where(batch.live, weights.to(ones), 0.0)
    inputs = batch.inputs._replace(policy_weight=policy, kl_weight=beta * ones if beta != 0 else None)
    return dataclasses.replace(batch, inputs=inputs)


@torch.no_grad()
def _counted(counting: LossConfig, batch: TokenBatch, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L): the KL (its ratio included), and which tokens are bounded. Liger counts those outside of the band, so
    ``counting`` is the objective without delta; of CISPO's capped ones those of A > 0."""
    records, _ = token_terms(counting, dataclasses.replace(batch, schemes=()), log_probs.detach())
    bounded = records.flags != 0
    return records.kl, bounded & (batch.inputs.advantage > 0) if isinstance(counting.surrogate, Cispo) else bounded


def _metrics(counting: LossConfig, batch: TokenBatch, log_probs: Tensor) -> list[Tensor]:
    """Means over live tokens: the KL where there is one, and how many are bounded."""
    count = batch.live.sum().clamp(min=1)
    kl, bounded = (values.sum() / count for values in _counted(counting, batch, log_probs))
    return [bounded] if batch.inputs.kl_weight is None else [kl, bounded]


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
        inputs = ctx.batch.inputs
        kl = inputs.kl_weight
        weighted = inputs._replace(
            policy_weight=inputs.policy_weight * upstream, kl_weight=None if kl is None else kl * upstream
        )
        slope = token_terms(ctx.config, dataclasses.replace(ctx.batch, inputs=weighted), log_probs)[1]
        return slope, None, None, None
