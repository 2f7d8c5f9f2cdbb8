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

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calls.arguments import keeps_values
from ..linear import linear_grpo_loss, linear_token_log_probs
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.checks import check_shape
from ..objectives.maths import k3_of, log_ratio_of, times
from ..policy import policy_loss
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
    """Return the GRPO loss of logits (B, L+1, V), whose last row is unused, with Liger's arguments.

    Returns:
        ``reduce=True``: (loss, [kl, clip_ratio]), without kl where beta is 0.
        ``reduce=False``: (per_token_loss, per_token_kl or None, is_clipped), (B, L); the first is differentiable under
        any reduction of your own.

    ``inplace=True`` (Liger's default) writes the gradient over the logits during backward, as Liger does, unless they
    are a leaf; ``reduce=True, inplace=False`` is the one pass of ``grpo_loss``, for the memory of a second tensor.

    Raises:
        ValueError: an unknown ``loss_type``, a KL term without ``ref_logp``, shapes that do not fit.
    """
    asked = Objective(
        *(loss_type, importance_sampling_level, eps_low, eps_high, delta, beta, use_bias_correction_kl),
        max_completion_length or completion_ids.shape[1],
        sapo=(sapo_temperature_pos, sapo_temperature_neg),
        vespo=(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )
    _check(asked)
    known = _Known(completion_ids, advantages, completion_mask, old_logp, ref_logp if beta != 0 else None)
    options = {**_options("triton_grpo_loss", asked, known, vllm_is_ratio), "token_losses": not reduce}
    if reduce:
        options["normalizer"] = _normalizer(loss_type, num_items_in_batch)
    tokens: dict[str, Any] = {"mask": completion_mask, "temperature": temperature}
    if inplace:
        log_probs = token_log_probs(logits, completion_ids, inplace=not keeps_values(logits), **tokens).log_probs
        out = policy_loss(log_probs, advantages, completion_mask, **options)
    else:
        out = grpo_loss(logits, completion_ids, advantages, **tokens, **options)
    if reduce:
        return out.loss, _metrics(asked, known, out.log_probs)
    assert out.token_losses is not None
    kl, bounded = _counted(asked, known, out.log_probs)
    return out.token_losses, kl, bounded.float()


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
        """Return the objective of the attributes as they are now. Without a reference model the policy is its own: a KL
        of 0."""
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
        asked, name = self._objective(), "LigerFusedLinearGRPOLoss"
        if ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(f"{name}: both references were given. Using ref_per_token_logps.", stacklevel=2)
        tokens: dict[str, Any] = {"mask": attention_mask, "temperature": self.temperature}
        if asked.beta == 0:
            ref_per_token_logps = None
        elif ref_per_token_logps is None and ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                out = linear_token_log_probs(ref_input, ref_weight, selected_token_ids, bias=ref_bias, **tokens)
                ref_per_token_logps = out.log_probs
        known = _Known(selected_token_ids, advantages, attention_mask, old_per_token_logps, ref_per_token_logps)
        options = _options(name, asked, known, vllm_is_ratio)
        options["normalizer"] = _normalizer(self.loss_type, num_items_in_batch)
        loss = linear_grpo_loss(_input, lin_weight, selected_token_ids, advantages, bias=bias, **tokens, **options)
        metrics = _metrics(asked, known, loss.log_probs)
        if self.beta != 0 and asked.beta == 0:
            metrics.insert(0, torch.zeros_like(metrics[0]))
        return loss.loss, tuple(metrics)


class _Known(NamedTuple):
    """What both signatures bring beside the rows."""

    ids: Tensor
    advantages: Tensor
    mask: Tensor | None
    old: Tensor | None
    ref: Tensor | None

    @property
    def live(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask != 0


def _check(asked: Objective) -> None:
    """Raise for what Liger refuses, and say why ours has nothing else to offer there."""
    if asked.loss_type in UNBOUNDED and (asked.delta is not None or asked.level != "token"):
        raise ValueError(
            f"loss_type={asked.loss_type!r} takes importance_sampling_level='token' and no delta, as in Liger; got "
            f"{asked.level!r} and delta={asked.delta!r}. grpo_loss has every surrogate at every level."
        )


def _options(function: str, asked: Objective, known: _Known, ratio: Tensor | None) -> dict[str, Any]:
    """Return keywords of our losses. ``vllm_is_ratio`` (B,), (B, 1) or (B, L) becomes log-probs of the sampler where it
    is part of the ratio (VESPO), else factors of the tokens."""
    options: dict[str, Any] = {"old_log_probs": known.old, "ref_log_probs": known.ref}
    if ratio is None:
        return {**options, "config": asked.config()}
    count, length = known.ids.shape
    check_shape(function, "vllm_is_ratio", ratio, ((count,), (count, 1), (count, length)), {"vllm_is_ratio": ratio})
    weights = ratio.unsqueeze(-1) if ratio.dim() == 1 else ratio
    if asked.loss_type != "vespo":
        return {**options, "config": asked.config(), "token_weights": weights.expand(known.ids.shape)}
    if known.old is None:
        raise ValueError(f"{function}: loss_type='vespo' with vllm_is_ratio needs old log-probs to apply it to.")
    rollout = sampler_log_probs(known.old, weights, known.live)
    return {**options, "config": asked.config(correct_rollout=True), "rollout_log_probs": rollout}


def _normalizer(loss_type: str, items: float | Tensor | None) -> float | Tensor | None:
    """Return the denominator of the whole batch: gradients are averaged over ranks, so each takes its share of the
    tokens."""
    if items is None or loss_type not in OVER_ITEMS:
        return None
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return items.clamp(min=1) / ranks if isinstance(items, Tensor) else max(items, 1) / ranks


@torch.no_grad()
def _counted(asked: Objective, known: _Known, log_probs: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return, (B, L), the KL (its ratio included) where there is one, and which tokens are bounded. Liger counts those
    outside of the band, whatever delta is; of CISPO's capped ones those of A > 0."""
    live, A = known.live, known.advantages if known.advantages.dim() == 2 else known.advantages[:, None]
    log_ratio = torch.zeros_like(log_probs)
    if known.old is not None:
        log_ratio = torch.where(live, log_ratio_of(log_probs, known.old), 0.0)
    if asked.level == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    ratio, (low, high) = log_ratio.exp(), _band(asked)
    bounded = live & (((A < 0) & (ratio < low)) | ((A > 0) & (ratio > high)))
    if known.ref is None:
        return None, bounded
    kl = k3_of(-log_ratio_of(log_probs, known.ref))
    return torch.where(live, times(ratio, kl) if asked.bias_correction else kl, 0.0), bounded


def _band(asked: Objective) -> tuple[float, float]:
    """Return beyond which ratios count as bounded, from below where A < 0 and from above where A > 0."""
    if asked.loss_type in UNBOUNDED:
        return -math.inf, asked.epsilon_high if asked.loss_type == "cispo" else math.inf
    return 1 - asked.epsilon_low, 1 + asked.epsilon_high


def _metrics(asked: Objective, known: _Known, log_probs: Tensor) -> list[Tensor]:
    """Return means over live tokens: the KL where there is one, and how many are bounded."""
    count = known.live.sum().clamp(min=1)
    return [values.sum() / count for values in _counted(asked, known, log_probs) if values is not None]
