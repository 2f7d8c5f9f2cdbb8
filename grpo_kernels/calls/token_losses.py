"""Losses of tokens, for callers that reduce them themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import TokenInputs
from ..objectives.checks import fail, ordinary
from ..objectives.config import LossConfig
from ..objectives.maths import weighed
from .autograd import once
from .terms import token_terms
from .token_batch import TokenBatch
from .tokens import Tokens

ON_DEMAND = "token_losses=True: a row's slope follows from what the caller makes of its loss"
"""Why such a call takes two passes."""


def refuse_what_losses_of_tokens_lack(tokens: Tokens, grad_scale: float | Tensor | None, inplace: bool = False) -> None:
    """Raise for options that belong to a loss which is computed with its gradient."""
    if grad_scale is not None:
        hint = "whatever the losses are multiplied by is in their gradient"
        fail(tokens.function, "no grad_scale= with token_losses=True", repr(grad_scale), tokens.tensors, hint)
    if inplace:
        hint = "token_log_probs(..., inplace=True) and policy_loss of what it returns"
        fail(tokens.function, "inplace=False with token_losses=True", "inplace=True", tokens.tensors, hint)


def token_losses(config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor) -> Tensor:
    """Return u·ρ·f + kl_coef·k + rollout_kl_coef·k - entropy_coef·H of every token, (B, T), 0 where it is not live;
    differentiable in log-probs and entropies. The weights of ``batch`` are those of one token: no aggregation is in
    them."""
    inputs = batch.inputs
    with torch.no_grad():
        records, _ = token_terms(config, batch, log_prob.detach(), entropy.detach())
        value = weighed(inputs.policy_weight, records.policy)
        if inputs.kl_weight is not None:
            value = value + weighed(inputs.kl_weight, records.kl)
        if inputs.rollout_kl_weight is not None:
            value = value + weighed(inputs.rollout_kl_weight, records.rollout_kl)
        if inputs.entropy_weight is not None:
            value = value - weighed(inputs.entropy_weight, entropy.detach())
        value = torch.where(batch.live, value, 0.0)
    losses: Tensor = _TokenLosses.apply(log_prob, entropy, value, config, batch)
    return losses


class _TokenLosses(torch.autograd.Function):
    """Known losses of tokens. Their slopes are those of a loss whose weights are the upstream gradients, so that what a
    level spreads over a sequence is spread as the caller weighs its tokens."""

    @staticmethod
    def forward(
        ctx: Any, log_prob: Tensor, entropy: Tensor, value: Tensor, config: LossConfig, batch: TokenBatch
    ) -> Tensor:
        # Not in ctx.batch: where the caller has overwritten one of them before backward, autograd notices.
        threshold = batch.entropy_threshold
        known = (batch.live, *batch.inputs, threshold if isinstance(threshold, Tensor) else None)
        ctx.save_for_backward(log_prob, entropy, *(None if tensor is None else ordinary(tensor)[0] for tensor in known))
        ctx.set_materialize_grads(False)
        ctx.config, ctx.batch = config, batch
        return value.clone()  # an input that is handed back refuses writes in place

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, None
        log_prob, entropy, live, *known, threshold = ctx.saved_tensors
        inputs = TokenInputs(*known)
        policy = weighed(inputs.policy_weight, upstream)
        kl, to_sampler, bonus = (
            None if weight is None else weighed(weight, upstream)
            for weight in (inputs.kl_weight, inputs.rollout_kl_weight, inputs.entropy_weight)
        )
        weighted = inputs._replace(
            policy_weight=policy, kl_weight=kl, rollout_kl_weight=to_sampler, entropy_weight=bonus
        )
        batch = dataclasses.replace(ctx.batch, inputs=weighted, live=live)
        if threshold is not None:
            batch = dataclasses.replace(batch, entropy_threshold=threshold)
        _, slope = token_terms(ctx.config, batch, log_prob, entropy)
        of_entropy = None if bonus is None else torch.where(live, -bonus, 0.0)
        return slope, of_entropy, None, None, None
