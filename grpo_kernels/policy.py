"""``policy_loss``: the loss of log-probs that are there already, for systems whose losses never see logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends
from .backends.contract import TokenValues
from .backends.spec import LogitArgs, numbers_vector
from .calls import autograd
from .calls.arguments import check_pooled
from .calls.batch import LossArguments, check_log_probs, read_batch
from .calls.outputs import LossOutput, Outcome, TokenLogProbs
from .calls.over_ranks import Agreed, over_ranks
from .calls.reduction import settle
from .calls.routes import Route
from .calls.token_losses import token_losses as losses_of_tokens
from .calls.tokens import Tokens, read_log_prob_tokens
from .objectives.checks import fail
from .objectives.config import LossConfig, resolve_config
from .objectives.names import NoKeyword, refuse_keywords
from .objectives.normalizer import Normalizer

if TYPE_CHECKING:
    from .objectives.groups import Group
    from .objectives.sequences import Layout


def policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    old_log_probs: Tensor | TokenLogProbs | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig | str = "grpo",
    normalizer: float | Tensor | Normalizer | None = None,
    kl_coef: float | Tensor | None = None,
    rollout_kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    skip_zero_advantage: bool = False,
    token_losses: bool = False,
    sequence_group: Group | None = None,
    sequence_layout: Layout | None = None,
    check: bool | None = None,
    backend: str | None = None,
    **unknown: NoKeyword,
) -> LossOutput:
    """The loss of ``config``, and its metrics, from log-probs: the [tokens]-sized half of ``grpo_loss``.

    For trainers whose policy losses take log-probs (verl, OpenRLHF, NeMo-RL, slime, SkyRL), and for models whose logits
    are not in one place. Every objective, level, aggregation, KL, rollout correction and metric is that of
    ``grpo_loss``, whose equation and arguments these are; it is differentiable in log-probs and entropies, as often as
    the caller likes.

    Args:
        log_probs: ℓ of the policy, (B, T), or packed (N,) or (1, N); floating, computed in fp32 (fp64 for fp64).
        advantages: (B,), (B, 1) or (B, T); packed (S,) or token-sized.
        mask: shape of log_probs, bool or numbers >= 0, non-zero where live.
        entropy: H of each row, nats, shape of log_probs: for the bonus, ``entropy_threshold`` and the metric, which is
            0 without it.
        old_log_probs, ref_log_probs, rollout_log_probs, token_weights, cu_seqlens, config, normalizer, kl_coef,
            rollout_kl_coef, entropy_coef, entropy_threshold, skip_zero_advantage, token_losses, sequence_group,
            sequence_layout, check: as for ``grpo_loss``.
        backend: whose [tokens]-sized kernels; None: the fastest for the device.

    Returns:
        LossOutput; ``log_probs`` and ``entropy`` are those given, detached, 0 at masked positions.

    Raises:
        ValueError, TypeError: as ``grpo_loss``; an entropy bonus or threshold without ``entropy``.
        RuntimeError: a backend that cannot serve the device; a torch.func transform.
    """
    if unknown:
        refuse_keywords(policy_loss, unknown)
    if sequence_group is not None and not isinstance(sequence_group, Agreed):
        return over_ranks(policy_loss, locals())
    config = resolve_config(config)
    if config.divergence is not None:
        hint = "token_divergence gives the divergence of every token, differentiable, to be added to token_losses"
        fail("policy_loss", "a config without a divergence, which needs rows", repr(config.divergence), hint=hint)
    if isinstance(old_log_probs, TokenLogProbs):
        old_log_probs = old_log_probs.log_probs
    arguments = LossArguments(
        advantages=advantages,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        rollout_log_probs=rollout_log_probs,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        kl_coef=kl_coef,
        rollout_kl_coef=rollout_kl_coef,
        entropy_coef=entropy_coef,
        entropy_threshold=entropy_threshold,
        skip_zero_advantage=skip_zero_advantage,
        token_losses=token_losses,
        sequence_group=sequence_group,
        sequence_layout=sequence_layout,
    )
    tokens = read_log_prob_tokens("policy_loss", log_probs, entropy, mask, arguments.tensors, check)
    tokens, batch = read_batch(tokens, config, arguments)
    if entropy is None:
        _check_without_entropy(tokens, batch.inputs.entropy_weight is not None, entropy_threshold is not None)
    choice = backends.choose("policy_loss", backends.Request(log_probs.device, tokens.real, vocab=0), backend)
    route = Route(choice.backend, 0, "; ".join(["log-probs are given", *filter(None, [choice.passed_over])]))
    numbers = numbers_vector(LogitArgs(), 1.0, config, tokens.real, log_probs.device, entropy_threshold)
    log_prob, entropies = _of_tokens(tokens, log_probs), _of_tokens(tokens, entropy)
    check_pooled("policy_loss", config, old_log_probs, rollout_log_probs, tokens.tensors, log_probs)
    check_log_probs(tokens, "log_probs", log_prob.detach(), tokens.live)
    with torch.no_grad():
        values = TokenValues(log_prob.detach(), entropies.detach(), batch.live)
        settled = settle(config, batch, values, numbers, choice.backend)
    if token_losses:
        losses = losses_of_tokens(config, batch, log_prob, entropies)
        return Outcome(losses, settled.metrics, *values[:2]).of_tokens(tokens.shape, route)
    loss, _ = autograd.LossOfLogProbs.apply(log_prob, entropies, None, (settled.loss,), *settled.gradients, None)
    return Outcome(loss, settled.metrics, *values[:2]).of_loss(tokens.shape, route)


def _of_tokens(tokens: Tokens, values: Tensor | None) -> Tensor:
    """Return (B, T) in the computation's dtype, differentiable, 0 where a token is not live or nothing is given."""
    if values is None:
        return torch.zeros(tokens.live.shape, dtype=tokens.real, device=tokens.live.device)
    return torch.where(tokens.live, values.reshape(tokens.live.shape).to(tokens.real), 0.0)


def _check_without_entropy(tokens: Tokens, bonus: bool, threshold: bool) -> None:
    for wanted, what, hint in (
        (bonus, "an entropy bonus", "entropy_coef=0 leaves it out"),
        (threshold, "entropy_threshold=", "token_log_probs returns entropies beside log-probs"),
    ):
        if wanted:
            fail(tokens.function, f"entropy= with {what}", "none", tokens.tensors, hint)
