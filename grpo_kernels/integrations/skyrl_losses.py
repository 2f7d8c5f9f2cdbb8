"""SkyRL's policy losses by SkyRL's names: each as a ``LossConfig``, and through ``policy_loss`` with SkyRL's metrics.

A loss of SkyRL's is a sum: what it divides by is in its advantages. Its correction for the sampler stays SkyRL's own
function, whose factors are the token weights of ``policy_loss``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import fail
from ..objectives.config import LossConfig
from ..objectives.kl import ESTIMATORS, KL
from ..objectives.maths import clamp, log_ratio_of
from ..objectives.rollout import Rejection, Rollout, TruncatedIS
from ..objectives.settings import check_name
from ..objectives.surrogates import Cispo, DppoKL, DppoTV, Reinforce, Sapo, Surrogate, Unclipped
from ..objectives.surrogates.base import Point
from ..policy import policy_loss
from .policy_losses import Step, clip_of, refuse, sequence_means, token_mean

Correction = Callable[..., tuple[Tensor | None, dict[str, float], Tensor]]
"""SkyRL's ``compute_off_policy_correction``: factors or None, metrics, and the mask that is left."""
Counted = Callable[[Any, Step], Tensor]
"""Which tokens SkyRL's ``clip_ratio`` counts, bool (B, T)."""


def _clip(algorithm: Any) -> Surrogate:
    dual = algorithm.clip_ratio_c if algorithm.policy_loss_type == "dual_clip" else None
    return clip_of("SkyRL", algorithm.eps_clip_low, algorithm.eps_clip_high, dual, "clip_ratio_c")


def _gspo(algorithm: Any) -> Surrogate:
    """SkyRL clamps the pooled log-ratio at +10, as verl does: a bound of tokens of A < 0, the others are clipped."""
    return clip_of("SkyRL", algorithm.eps_clip_low, algorithm.eps_clip_high, math.exp(10.0), "the clamp")


def _cispo(algorithm: Any) -> Cispo:
    return Cispo(low=min(algorithm.cispo.cispo_eps_clip_low, 1.0), high=algorithm.cispo.cispo_eps_clip_high)


def _dppo(algorithm: Any) -> DppoTV | DppoKL:
    check_name("SkyRL: dppo.dppo_type", algorithm.dppo.dppo_type, _DIVERGENCES)
    return _DIVERGENCES[algorithm.dppo.dppo_type](algorithm.dppo.delta_low, algorithm.dppo.delta_high)


_DIVERGENCES: Mapping[str, type[DppoTV] | type[DppoKL]] = {"binary_tv": DppoTV, "binary_kl": DppoKL}


def _nowhere(algorithm: Any, step: Step) -> Tensor:
    return torch.zeros_like(step.live)


def _clipped(algorithm: Any, step: Step) -> Tensor:
    low, high = step.outside(step.log_ratio, algorithm.eps_clip_low, algorithm.eps_clip_high)
    return low | high


def _clipped_sequences(algorithm: Any, step: Step) -> Tensor:
    return _clipped(algorithm, step._replace(log_ratio=sequence_means(step.log_ratio, step.live)))


def _capped(algorithm: Any, step: Step) -> Tensor:
    ratio, bounds = step.log_ratio.exp(), algorithm.cispo
    return (ratio < 1 - bounds.cispo_eps_clip_low) | (ratio > 1 + bounds.cispo_eps_clip_high)


def _left_region(algorithm: Any, step: Step) -> Tensor:
    point = Point(step.log_prob, step.log_ratio, step.log_ratio.exp(), step.advantages, step.old)
    fallen, risen = _dppo(algorithm).moved_too_far(point)
    return torch.where(step.advantages > 0, risen, fallen & (step.advantages < 0))


def _outside(algorithm: Any, step: Step) -> Tensor:
    ratio = step.log_ratio.exp()
    return ~((ratio > 1 - algorithm.eps_clip_low) & (ratio < 1 + algorithm.eps_clip_high))


class _Loss(NamedTuple):
    surrogate: Callable[[Any], Surrogate]
    """Of SkyRL's ``AlgorithmConfig``."""
    counted: Counted = _nowhere
    level: str = "token"
    log_ratio_limit: float | None = 20.0
    to_sampler: bool = False
    """Whether the ratio is to the sampler, where its log-probs are given."""
    weighs: bool = False
    """Whether the ratio inside of the band is a weight, that of the others 0."""
    corrects: bool = True
    """Whether SkyRL corrects it for the sampler."""


LOSSES: Mapping[str, _Loss] = {
    "regular": _Loss(_clip, _clipped),
    "dual_clip": _Loss(_clip, _clipped),
    "gspo": _Loss(_gspo, _clipped_sequences, level="sequence_token", log_ratio_limit=None),
    "cispo": _Loss(_cispo, _capped),
    "sapo": _Loss(lambda algorithm: Sapo(algorithm.sapo.tau_pos, algorithm.sapo.tau_neg)),
    "dppo": _Loss(_dppo, _left_region, to_sampler=True),
    "rollout_is": _Loss(lambda algorithm: Reinforce(), _outside, to_sampler=True, weighs=True),
    "importance_sampling": _Loss(lambda algorithm: Unclipped(), log_ratio_limit=None, corrects=False),
    "cross_entropy": _Loss(lambda algorithm: Reinforce(), corrects=False),
}
"""SkyRL's ``policy_loss_type`` that there is a config for."""
MISSING = ("clip_cov", "kl_cov")
"""Those that there is none for: they choose tokens by the whole batch's covariance."""
REDUCTIONS = {
    "token_mean": "token_mean",
    "sequence_mean": "sequence_mean",
    "seq_mean_token_sum_norm": "constant",
}
"""Our aggregation for every ``loss_reduction``."""


def loss_config(algorithm: Any) -> LossConfig:
    """Return the config of SkyRL's algorithm options: policy term, reduction, correction, KL and entropy bonus.

    With "dppo" SkyRL takes the ratio to the sampler: there its log-probs are ``old_log_probs=`` of a loss, and the
    factors of ``off_policy_correction``, which are of the old policy, its ``token_weights=``.

    Args:
        algorithm: SkyRL's ``AlgorithmConfig``, or anything with its fields.

    Raises:
        ValueError: an option that has no counterpart, by name, with those that have one.
    """
    name = algorithm.policy_loss_type
    config, reduction = _policy_config(name, algorithm), algorithm.loss_reduction
    if LOSSES[name].weighs or name == "cross_entropy":
        refuse("SkyRL", f'a config for policy_loss_type="{name}", whose weights are the call\'s', "the others")
    if reduction not in REDUCTIONS:
        refuse("SkyRL", f'a config for loss_reduction="{reduction}"', ", ".join(REDUCTIONS))
    if algorithm.use_kl_loss and reduction != "sequence_mean":
        refuse("SkyRL", "use_kl_loss, a mean over sequences, beside another reduction", '"sequence_mean"')
    schemes = _schemes(algorithm.off_policy_correction) if LOSSES[name].corrects else ()
    if schemes and LOSSES[name].to_sampler:
        option = f'a config for off_policy_correction beside policy_loss_type="{name}", whose old policy is the sampler'
        refuse("SkyRL", option, "one without it, beside token_weights=")
    return dataclasses.replace(
        config,
        aggregation=REDUCTIONS[reduction],  # type: ignore[arg-type]
        constant_length=algorithm.max_seq_len if reduction == "seq_mean_token_sum_norm" else None,
        rollout=schemes,
        kl=_kl(algorithm) if algorithm.use_kl_loss else KL(),
        entropy_coef=algorithm.entropy_loss_coef if algorithm.use_entropy_loss else 0.0,
        entropy_aggregation="token_mean" if algorithm.use_entropy_loss else None,
    )


def _policy_config(name: str, algorithm: Any) -> LossConfig:
    """Return the policy term, whose aggregation is a sum over tokens (``normalizer=1``)."""
    if name in MISSING:
        refuse("SkyRL", f'policy_loss_type="{name}"', ", ".join(LOSSES))
    check_name("SkyRL: policy_loss_type", name, LOSSES)
    loss = LOSSES[name]
    return LossConfig(
        loss.surrogate(algorithm),
        level=loss.level,  # type: ignore[arg-type]
        aggregation="token_mean",
        log_ratio_limit=loss.log_ratio_limit,
    )


def _kl(algorithm: Any) -> KL:
    check_name("SkyRL: kl_estimator_type", algorithm.kl_estimator_type, ESTIMATORS)
    limit = (20.0, 10.0) if algorithm.kl_estimator_type == "k3" else (None, None)
    return KL(algorithm.kl_loss_coef, algorithm.kl_estimator_type, limit=limit)


def _schemes(options: Any) -> tuple[Rollout, ...]:
    """Return the schemes of ``off_policy_correction``. A token that is masked has no part in a sequence's statistics
    there, which no scheme of ours says."""
    of_tokens = None not in (options.token_mask_is_threshold_low, options.token_mask_is_threshold_high)
    of_sequences = options.sequence_mask_metric is not None or options.tis_ratio_type == "sequence"
    if (options.outlier_token_is_threshold_low, options.outlier_token_is_threshold_high) != (None, None):
        refuse("SkyRL", "a config for outlier_token_is_threshold_*", "the other off_policy_correction options")
    if of_tokens and of_sequences:
        refuse("SkyRL", "a config for token_mask_is_threshold_* beside ratios of sequences", "either of them")
    found: list[Rollout] = []
    if of_tokens:
        found.append(Rejection(options.token_mask_is_threshold_low, options.token_mask_is_threshold_high))
    if options.tis_ratio_type is not None:
        check_name("SkyRL: tis_ratio_type", options.tis_ratio_type, ("token", "sequence"))
        of_token = options.tis_ratio_type == "token"
        high = options.token_tis_ratio_clip_high if of_token else options.sequence_tis_ratio_clip_high
        found.append(TruncatedIS(high, level=options.tis_ratio_type))
    if options.sequence_mask_metric is not None:
        check_name("SkyRL: sequence_mask_metric", options.sequence_mask_metric, ("geometric", "product"))
        if options.sequence_mask_metric == "geometric":
            found.append(Rejection(options.geo_mask_low, options.geo_mask_high, "geometric"))
        else:
            found.append(Rejection(options.product_mask_low, options.product_mask_high, "sequence"))
    return tuple(found)


def policy_loss_of(name: str, correction: Correction) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Return SkyRL's policy loss of that name, with SkyRL's signature, through ``policy_loss``.

    Args:
        correction: SkyRL's ``compute_off_policy_correction``.
    """

    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        objective = _policy_config(_meant(name, config), config)  # which refuses a name that there is none for
        kind = LOSSES[name]
        live = torch.ones_like(log_probs, dtype=torch.bool) if loss_mask is None else loss_mask != 0
        if name == "cross_entropy":
            out = policy_loss(
                *(log_probs, torch.ones_like(log_probs), live),
                token_weights=loss_mask,
                config=objective,
                normalizer=1.0,
            )
            return out.loss, {"clip_ratio": 0.0}
        if kind.weighs and rollout_logprobs is None:
            fail(f'SkyRL: policy_loss_type="{name}"', "rollout_logprobs=", "None")
        anchor = rollout_logprobs if kind.to_sampler and rollout_logprobs is not None else old_log_probs
        step = _step_of(log_probs, anchor, advantages, live, objective.log_ratio_limit)
        weights = torch.ones_like(step.log_ratio)
        metrics: dict[str, float] = {}
        if kind.weighs:
            weights = torch.where(_outside(config, step), 0.0, step.log_ratio.exp())
        if kind.corrects and rollout_logprobs is not None:
            factors, metrics = _corrected(correction, old_log_probs, rollout_logprobs, live, config)
            weights = weights * factors
        out = policy_loss(
            *(log_probs, advantages, live),
            old_log_probs=anchor,
            token_weights=weights,
            config=objective,
            normalizer=1.0,
        )
        return out.loss, _metrics(name, kind, config, step, loss_mask) | metrics

    loss.__name__ = loss.__qualname__ = f"grpo_kernels_{name}"
    return loss


def _meant(name: str, algorithm: Any) -> str:
    """Return which loss a registered name is: SkyRL's two clipped ones are one function, which reads the options."""
    if name not in ("regular", "dual_clip"):
        return name
    if algorithm.policy_loss_type not in ("regular", "dual_clip"):
        fail(f'SkyRL: the loss "{name}"', "policy_loss_type regular or dual_clip", repr(algorithm.policy_loss_type))
    return str(algorithm.policy_loss_type)


@torch.no_grad()
def _step_of(log_probs: Tensor, anchor: Tensor, advantages: Tensor, live: Tensor, limit: float | None) -> Step:
    known, old, A = (torch.where(live, values.detach(), 0.0) for values in (log_probs, anchor, advantages))
    return Step(known, old, clamp(log_ratio_of(known, old), limit), A, live)


@torch.no_grad()
def _corrected(
    correction: Correction, old: Tensor, rollout: Tensor, live: Tensor, algorithm: Any
) -> tuple[Tensor, dict[str, float]]:
    """Return SkyRL's factor of every token, and its metrics. It multiplies by masks: what is masked is 0 to it."""
    old, rollout = (torch.where(live, values, 0.0) for values in (old, rollout))
    options = algorithm.off_policy_correction
    ratio, metrics, mask = correction(old, rollout, live.to(old.dtype), options)
    factors = mask if ratio is None else mask * ratio
    return factors, metrics


@torch.no_grad()
def _metrics(name: str, kind: _Loss, algorithm: Any, step: Step, mask: Tensor | None) -> dict[str, float]:
    """Return SkyRL's metric of a loss, a mean over live tokens, copied from the device with what a mask must be."""
    counted = step.log_ratio.exp() if name == "importance_sampling" else kind.counted(algorithm, step)
    fractions = (
        torch.zeros((), device=step.live.device) if mask is None else (mask.to(torch.float64) != step.live).any()
    )
    found, fraction = torch.stack([token_mean(counted, step.live), fractions.double()]).tolist()
    if fraction:
        fail(f'SkyRL: policy_loss_type="{name}"', "loss_mask of 0 and 1", "other numbers")
    return {"importance_ratio" if name == "importance_sampling" else "clip_ratio": found}
