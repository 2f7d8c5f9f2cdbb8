"""verl's policy losses by verl's names: each as a ``LossConfig``, and through ``policy_loss`` with verl's metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import fail, read_mask
from ..objectives.config import LossConfig
from ..objectives.kl import ESTIMATORS, KL
from ..objectives.maths import clamp, log_ratio_of
from ..objectives.names import AGGREGATIONS
from ..objectives.names import ESTIMATORS as VERL_ESTIMATORS
from ..objectives.settings import check_name
from ..objectives.surrogates import Cispo, Clip, DppoKL, DppoTV, Dro, Gmpo, Reinforce, Sapo, Surrogate
from ..objectives.surrogates.base import Point
from ..policy import policy_loss
from .policy_losses import Step, clip_of, refuse, sequence_means

MODES = {**AGGREGATIONS, "token-sum": "token_mean"}
"""Our aggregation for every ``loss_agg_mode``; a token-sum is a mean over one token."""
PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]


Bounded = tuple[Tensor, Tensor]
"""The tokens that verl counts in ``pg_clipfrac`` and in ``pg_clipfrac_lower``, bool (B, T)."""


class _Loss(NamedTuple):
    surrogate: Callable[[Any], Surrogate]
    """Of verl's options."""
    bounded: Callable[[Any, Step], Bounded] | None = None
    """None: verl reports neither fraction."""
    level: str = "token"
    log_ratio_limit: float | None = 20.0
    agg_mode: str | None = None
    """The one that verl takes whatever is asked for."""
    metrics: bool = True


def _number(options: Any, name: str, default: Any = None) -> Any:
    value = getattr(options, name, None)
    return default if value is None else value


def _band(options: Any) -> tuple[float, float]:
    """Return clip_ratio_low and clip_ratio_high, each clip_ratio where it is None."""
    low, high = (_number(options, f"clip_ratio_{side}", options.clip_ratio) for side in ("low", "high"))
    return low, high


def _vanilla(options: Any) -> Clip:
    return clip_of("verl", *_band(options), _number(options, "clip_ratio_c", 3.0), "clip_ratio_c")


def _gspo(options: Any) -> Clip:
    """verl clamps the pooled log-ratio at +10 and nowhere else: that bounds tokens of A < 0, as a dual clip does; those
    of A > 0 are clipped before."""
    return clip_of("verl", *_band(options), math.exp(10.0), "the clamp")


def _cispo(options: Any) -> Cispo:
    low, high = _band(options)
    return Cispo(low=min(low, 1.0), high=high)


def _dppo(kind: type[DppoTV] | type[DppoKL]) -> Callable[[Any], Surrogate]:
    return lambda options: kind(*_band(options), cap=_number(options, "clip_ratio_c", 20.0))


def _dro(options: Any) -> Dro:
    beta = _number(options.policy_loss, "dro_beta")
    if beta is None or beta <= 0:
        refuse("verl", f"dro with policy_loss.dro_beta={beta!r}", "a number above 0")
    return Dro(beta)


def _nothing(options: Any, step: Step) -> Bounded:
    nowhere = torch.zeros_like(step.live)
    return nowhere, nowhere


def _clipped(options: Any, step: Step) -> Bounded:
    low, high = step.outside(step.log_ratio, *_band(options))
    dual = step.log_ratio.exp() > _number(options, "clip_ratio_c", 3.0)
    return low | high, dual & (step.advantages < 0)


def _clipped_sequences(options: Any, step: Step) -> Bounded:
    low, high = step.outside(sequence_means(step.log_ratio, step.live), *_band(options))
    return low | high, torch.zeros_like(step.live)


def _capped(options: Any, step: Step) -> Bounded:
    """Outside of the band whatever the advantage is."""
    (low, high), ratio = _band(options), step.log_ratio.exp()
    return (ratio < 1 - low) | (ratio > 1 + high), torch.zeros_like(step.live)


def _left_region(kind: type[DppoTV] | type[DppoKL]) -> Callable[[Any, Step], Bounded]:
    def bounded(options: Any, step: Step) -> Bounded:
        ratio = step.log_ratio.exp()
        point = Point(step.log_prob, step.log_ratio, ratio, step.advantages, step.old)
        fallen, risen = kind(*_band(options)).moved_too_far(point)
        left = torch.where(step.advantages > 0, risen, fallen)
        return left, (ratio > _number(options, "clip_ratio_c", 20.0)) & ~left

    return bounded


def _clipped_log_ratios(options: Any, step: Step) -> Bounded:
    low, high = _band(options)
    outside = (step.log_ratio < -low) | (step.log_ratio > high)
    return outside & (step.advantages > 0), outside & (step.advantages < 0)


LOSSES: Mapping[str, _Loss] = {
    "vanilla": _Loss(_vanilla, _clipped),
    "dppo_tv": _Loss(_dppo(DppoTV), _left_region(DppoTV)),
    "dppo_kl": _Loss(_dppo(DppoKL), _left_region(DppoKL)),
    "gspo": _Loss(_gspo, _clipped_sequences, level="sequence_token", log_ratio_limit=None),
    "sapo": _Loss(lambda options: Sapo(options.tau_pos, options.tau_neg), _nothing, agg_mode="seq-mean-token-mean"),
    "gpg": _Loss(lambda options: Reinforce(), metrics=False),
    "geo_mean": _Loss(
        lambda options: Gmpo(*_band(options)),
        _clipped_log_ratios,
        level="sequence",
        log_ratio_limit=None,
        agg_mode="seq-mean-token-mean",
    ),
    "dro": _Loss(_dro, log_ratio_limit=None),
    "cispo": _Loss(_cispo, _capped),
}
"""verl's ``policy_loss.loss_mode`` that there is a config for."""
MISSING = ("clip_cov", "kl_cov", "bypass_mode")
"""Those that there is none for: two draw tokens from the whole batch's covariance, one rejects them."""


def loss_config(actor: Any) -> LossConfig:
    """Return the config of verl's actor options: policy term, aggregation, KL and entropy bonus.

    What verl divides by follows from the batch: ``normalizer=`` of a loss; for ``loss_agg_mode="token-sum"`` that is 1.

    Args:
        actor: verl's ``ActorConfig``, or anything with its fields.

    Raises:
        ValueError: an option that has no counterpart, by name, with those that have one.
    """
    mode = _number(actor.policy_loss, "loss_mode", "vanilla")
    config = _policy_config(mode, actor, actor.loss_agg_mode, actor.loss_scale_factor)
    fixed = LOSSES[mode].agg_mode
    if fixed not in (None, actor.loss_agg_mode) and (actor.use_kl_loss or actor.entropy_coeff):
        refuse(
            "verl", f'loss_mode="{mode}" beside a KL or entropy in loss_agg_mode="{actor.loss_agg_mode}"', f'"{fixed}"'
        )
    kl = _kl(actor.kl_loss_type, actor.kl_loss_coef) if actor.use_kl_loss else KL()
    return dataclasses.replace(config, kl=kl, entropy_coef=actor.entropy_coeff)


def _policy_config(mode: str, options: Any, agg_mode: str, length: int | None) -> LossConfig:
    if mode in MISSING:
        refuse("verl", f'loss_mode="{mode}"', ", ".join(LOSSES))
    check_name("verl: loss_mode", mode, LOSSES)
    loss = LOSSES[mode]
    agg_mode = loss.agg_mode or agg_mode
    check_name("verl: loss_agg_mode", agg_mode, MODES)
    return LossConfig(
        loss.surrogate(options),
        level=loss.level,  # type: ignore[arg-type]
        aggregation=MODES[agg_mode],  # type: ignore[arg-type]
        log_ratio_limit=loss.log_ratio_limit,
        constant_length=length if agg_mode == "seq-mean-token-sum-norm" else None,
    )


def _kl(kind: str, coef: float) -> KL:
    """Return verl's ``kl_loss_type``; a + binds the slope of k2 to the value. verl leaves that slope unclamped, here
    the clamp of k3's input stops it too."""
    base = kind.removesuffix("+")
    estimator = VERL_ESTIMATORS.get(base, base)
    if estimator not in ESTIMATORS:
        refuse("verl", f'kl_loss_type="{kind}"', "kl, k1, abs, mse, k2, low_var_kl, k3, each with a + or without")
    straight = kind.endswith("+") and estimator != "k2"
    limit = (20.0, 10.0) if estimator == "k3" else (None, None)
    return KL(coef, estimator, "straight_through_k2" if straight else "pathwise", limit=limit)


def policy_loss_of(mode: str) -> PolicyLoss:
    """Return verl's policy loss of that name, with verl's signature, through ``policy_loss``."""
    default = "seq-mean-token-mean" if mode in ("gspo", "sapo") else "token-mean"

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = default,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            fail(f'verl: loss_mode="{mode}"', "config=, the actor's options", "None", error=TypeError)
        given = {"response_mask": response_mask}
        live = read_mask(f'verl: loss_mode="{mode}"', response_mask, given, name="response_mask")
        info = dict(getattr(config, "global_batch_info", None) or {})
        length = info.get("loss_scale_factor") or response_mask.shape[-1]
        objective = _policy_config(mode, config, loss_agg_mode, length)  # which refuses a mode that there is none for
        agg_mode = LOSSES[mode].agg_mode or loss_agg_mode
        weights = rollout_is_weights
        if mode == "geo_mean":  # whose mean is over the rows of this call, whatever the batch is
            info, live_rows = {}, None
            weights = None if weights is None else _geometric_means(weights, live)
        else:
            live_rows = live.any(-1)
        out = policy_loss(
            log_prob,
            advantages,
            live,
            old_log_probs=old_log_prob,
            token_weights=weights,
            config=objective,
            normalizer=_normalizer(agg_mode, info, live_rows),
        )
        return out.loss, _metrics(mode, config, out.log_probs, old_log_prob, advantages, live)

    loss.__name__ = loss.__qualname__ = f"grpo_kernels_{mode}"
    return loss


def _normalizer(agg_mode: str, info: Mapping[str, Any], live_rows: Tensor | None) -> float | Tensor | None:
    """Return the denominator of verl's ``agg_loss``: of the global batch, divided by the ranks that gradients are
    averaged over; without one, of this call, whose sequences count where they have a token (``live_rows``)."""
    ranks = info.get("dp_size") or 1
    if agg_mode == "token-sum":
        return 1 / ranks
    unit = "batch_num_tokens" if agg_mode == "token-mean" else "global_batch_size"
    count = info.get(unit)
    if count is None and ranks > 1:
        fail("verl", f"{unit} of the global batch with dp_size={ranks}", "None")
    if count is None and agg_mode != "token-mean" and live_rows is not None:
        count = live_rows.sum()
    return None if count is None else count / ranks


def _geometric_means(weights: Tensor, live: Tensor) -> Tensor:
    """Return each sequence's geometric mean of its tokens' weights, on every token: (B, T)."""
    return sequence_means(torch.where(live, (weights + 1e-10).log(), 0.0), live).exp()


@torch.no_grad()
def _metrics(
    mode: str, options: Any, log_prob: Tensor, old: Tensor, advantages: Tensor, live: Tensor
) -> dict[str, float]:
    """Return verl's metrics of a loss, means over live tokens, copied from the device at once."""
    loss = LOSSES[mode]
    if not loss.metrics:
        return {}
    old, advantages = (torch.where(live, values, 0.0).to(log_prob.dtype) for values in (old, advantages))
    log_ratio = clamp(log_ratio_of(log_prob, old), loss.log_ratio_limit)
    step = Step(log_prob, old, log_ratio, advantages, live)
    named = {"actor/ppo_kl": -log_ratio}
    if loss.bounded is not None:
        fractions = loss.bounded(options, step)
        named |= dict(zip(("actor/pg_clipfrac", "actor/pg_clipfrac_lower"), fractions, strict=True))
    sums = [torch.where(live, values, 0).sum(dtype=torch.float64) for values in named.values()]
    count = live.sum().clamp(min=1)
    *found, spread = torch.stack([*(total / count for total in sums), _spread(advantages, live)]).tolist()
    if mode == "geo_mean" and spread > 0:
        refuse("verl", "geo_mean with advantages that differ within a sequence", "one advantage for each sequence")
    return dict(zip(named, found, strict=True))


def _spread(advantages: Tensor, live: Tensor) -> Tensor:
    """Return the largest difference of advantages within a sequence, fp64."""
    if not advantages.numel():
        return torch.zeros((), dtype=torch.float64, device=advantages.device)
    highest = torch.where(live, advantages, -math.inf).amax(-1)
    lowest = torch.where(live, advantages, math.inf).amin(-1)
    return (highest - lowest).clamp(min=0).amax().double()
