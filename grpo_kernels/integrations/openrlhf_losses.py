"""OpenRLHF's policy loss: its options as a ``LossConfig``, and its forward through ``policy_loss``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import fail, read_mask
from ..objectives.config import LossConfig
from ..objectives.kl import KL
from ..objectives.maths import clamp, log_ratio_of
from ..objectives.rollout import MaskedIS, Rejection, Rollout, TruncatedIS
from ..objectives.settings import check_name
from ..policy import policy_loss
from .policy_losses import Step, clip_of, refuse, sequence_means, token_mean

TYPES = ("ppo", "gspo")
LIMIT = 20.0
"""PPO's log-ratios saturate there, GSPO's nowhere."""
AGGREGATIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean"}
"""Ours for every ``actor.loss_agg_mode``."""


class Options(NamedTuple):
    """The options of OpenRLHF's ``PolicyLoss``, by its attributes."""

    clip_eps_low: float
    clip_eps_high: float
    dual_clip: float | None
    token_level_loss: bool
    policy_loss_type: str
    is_correction_level: str
    is_correction_mode: str
    is_correction_gating: str
    is_correction_threshold: Sequence[float]


def loss_config(args: Any) -> LossConfig:
    """Return the config of OpenRLHF's options: policy term, aggregation, correction for the sampler, KL and bonus.

    With ``policy_loss_type="gspo"`` and a correction OpenRLHF takes the ratio to the sampler: there the sampler's
    log-probs are ``old_log_probs=`` of a loss.

    Args:
        args: what ``openrlhf.cli.train_ppo_ray`` parses, or anything with its ``actor``, ``algo.advantage`` and
            ``algo.kl``.

    Raises:
        ValueError: an option that has no counterpart, by name, with those that have one.
    """
    actor, advantage, kl = args.actor, args.algo.advantage, args.algo.kl
    check_name("OpenRLHF: actor.loss_agg_mode", actor.loss_agg_mode, AGGREGATIONS)
    low, high = actor.eps_clip_low_high or (actor.eps_clip, actor.eps_clip)
    options = Options(
        *(low, high, actor.dual_clip),
        actor.loss_agg_mode == "token-mean" and actor.policy_loss_type != "gspo",
        actor.policy_loss_type,
        *(advantage.is_correction_level, advantage.is_correction_mode, advantage.is_correction_gating),
        advantage.is_correction_threshold,
    )
    config = _policy_config(options)
    if options.policy_loss_type == "ppo" and options.is_correction_level != "off":
        config = dataclasses.replace(config, rollout=_schemes(options))
    by_tokens = options.token_level_loss
    if kl.use_loss and kl.init_coef > 0:
        if not by_tokens:
            refuse("OpenRLHF", "algo.kl.use_loss, a mean over tokens, beside a mean over sequences", "token-mean")
        if kl.target:
            refuse("OpenRLHF", "a config for algo.kl.target, by which the coefficient moves", "algo.kl.init_coef alone")
        config = dataclasses.replace(config, kl=_kl(kl))
    if actor.entropy_coef:
        config = dataclasses.replace(
            config, entropy_coef=actor.entropy_coef, entropy_aggregation=None if by_tokens else "token_mean"
        )
    return config


def _policy_config(options: Any) -> LossConfig:
    """Return the policy term and its aggregation, without the correction."""
    for name, known in _KNOWN.items():
        check_name(f"OpenRLHF: {name}", getattr(options, name), known)
    by_sequence = options.policy_loss_type == "gspo"
    return LossConfig(
        clip_of("OpenRLHF", options.clip_eps_low, options.clip_eps_high, options.dual_clip, "dual_clip"),
        level="sequence" if by_sequence else "token",
        aggregation="token_mean" if options.token_level_loss else "sequence_mean",
        log_ratio_limit=None if by_sequence else LIMIT,
    )


def _schemes(options: Options) -> Rollout | tuple[Rollout, ...]:
    threshold = options.is_correction_threshold
    if not isinstance(threshold, (list, tuple)) or len(threshold) not in (1, 2):
        raise ValueError(f"OpenRLHF: is_correction_threshold must be HIGH, or LOW and HIGH; got {threshold!r}.")
    low, high = (0.0, *threshold)[-2:]
    if options.is_correction_gating != "ratio":
        refuse("OpenRLHF", f'a config for is_correction_gating="{options.is_correction_gating}"', '"ratio"')
    if options.is_correction_level == "seq":
        if options.is_correction_mode == "clip":
            refuse("OpenRLHF", 'is_correction_mode="clip" with is_correction_level="seq"', '"mask" there, as OpenRLHF')
        return TruncatedIS(math.inf), Rejection(low, high, "geometric")
    return TruncatedIS(high, low) if options.is_correction_mode == "clip" else MaskedIS(low, high)


def _kl(kl: Any) -> KL:
    """Values are bounded at ±10; the clamp of k3's input lies where that of its value bites already."""
    gradient = "weighted_k2" if kl.unbiased_gradient else "pathwise"
    return KL(kl.init_coef, kl.estimator, gradient, limit=(None, 10.0), ratio_cap=10.0)


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``PolicyLoss.forward``: return the loss, and by OpenRLHF's definitions ``clip_ratio``, ``ppo_kl``, and with a
    correction of PPO ``vllm_kl`` and ``is_filter_ratio``. A mean over no token is 0, where OpenRLHF's is NaN."""
    config = _policy_config(self)
    live = torch.ones_like(log_probs, dtype=torch.bool)
    if action_mask is not None:
        live = read_mask("OpenRLHF: PolicyLoss.forward", action_mask, {"action_mask": action_mask}, name="action_mask")
    anchor, gate = old_log_probs, None
    if self.is_correction_level != "off":
        if rollout_log_probs is None:
            expected = f'rollout_log_probs= with is_correction_level="{self.is_correction_level}"'
            fail("OpenRLHF: PolicyLoss.forward", expected, "None")
        if config.pooling.pools:
            anchor = rollout_log_probs
        else:
            gate = _gate(self, old_log_probs, rollout_log_probs, live)
    out = policy_loss(
        log_probs,
        advantages,
        live,
        old_log_probs=anchor,
        token_weights=None if gate is None else gate.weights,
        config=config,
        normalizer=_normalizer(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size, live),
    )
    known, advantages = out.log_probs, _zeroed(advantages, live)
    log_ratio = log_ratio_of(known, _zeroed(anchor, live))
    pooled = sequence_means(log_ratio, live) if config.pooling.pools else clamp(log_ratio, LIMIT)
    low, high = Step(known, anchor, log_ratio, advantages, live).outside(pooled, self.clip_eps_low, self.clip_eps_high)
    ppo_kl = token_mean(-log_ratio_of(known, _zeroed(old_log_probs, live)), live)
    clip_ratio = token_mean(low | high, live)
    kind = known.dtype
    if gate is None:
        return out.loss, clip_ratio.to(kind), ppo_kl.to(kind), None, None
    return out.loss, clip_ratio.to(kind), ppo_kl.to(kind), gate.distance.to(kind), gate.filtered.to(kind)


def _zeroed(values: Tensor, live: Tensor) -> Tensor:
    return torch.where(live, values.detach(), 0.0)


def _normalizer(
    by_tokens: bool, ranks: int, tokens: float | Tensor | None, sequences: float | Tensor | None, live: Tensor
) -> float | Tensor | None:
    """Return OpenRLHF's denominator: that of the batch, over the ranks that gradients are averaged over; without one,
    of this call, of sequences that have a token."""
    count = tokens if by_tokens else sequences
    if count is not None:
        return count / ranks
    return None if by_tokens else live.any(-1).sum().clamp(min=1).float()


class _Gate(NamedTuple):
    weights: Tensor
    """Of each token, (B, T)."""
    filtered: Tensor
    distance: Tensor
    """OpenRLHF's ``is_filter_ratio`` and ``vllm_kl``."""


@torch.no_grad()
def _gate(options: Any, old: Tensor, rollout: Tensor, live: Tensor) -> _Gate:
    """Return what ``is_correction_*`` makes of the sampler's log-probs, in fp64: a binary KL cancels. To OpenRLHF the
    mean of a sequence without a token is outside (0/0), and counts among those that are dropped."""
    kind, old, rollout = old.dtype, _zeroed(old, live).double(), _zeroed(rollout, live).double()
    log_ratio, (low, high) = log_ratio_of(old, rollout), options.is_correction_threshold
    by_sequence = options.is_correction_level == "seq"
    by_ratio = options.is_correction_gating == "ratio"
    statistic = log_ratio if by_ratio else _DIVERGENCES[options.is_correction_gating](rollout.exp(), old.exp())
    statistic = sequence_means(statistic, live) if by_sequence else statistic
    statistic = statistic.exp() if by_ratio else statistic
    inside = (statistic >= low) & (statistic <= high)
    clips = options.is_correction_mode == "clip"
    weights = statistic.clamp(low, high) if clips else torch.where(inside, log_ratio.exp(), 0.0)
    dropped = (~inside | ~live.any(-1, keepdim=True))[:, :1]
    filtered = dropped.double().mean() if by_sequence else token_mean(~inside, live)
    return _Gate(weights.to(kind), filtered, token_mean(-log_ratio, live))


def _bounded(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return p.clamp(1e-6, 1 - 1e-6), q.clamp(1e-6, 1 - 1e-6)


def _binary_kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = _bounded(p, q)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _total_variation(p: Tensor, q: Tensor) -> Tensor:
    p, q = _bounded(p, q)
    return (p - q).abs()


_DIVERGENCES = {"binary_kl": _binary_kl, "tv": _total_variation}
"""Of the sampler's probability and the policy's: what OpenRLHF gates by, bounded away from 0 and 1 as it does."""
_KNOWN: dict[str, Collection[str]] = {
    "policy_loss_type": TYPES,
    "is_correction_level": ("off", "token", "seq"),
    "is_correction_mode": ("clip", "mask"),
    "is_correction_gating": ("ratio", *_DIVERGENCES),
}
"""The names of its options' values."""
