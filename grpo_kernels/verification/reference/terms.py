"""The terms of a token, in plain PyTorch: log-ratios, rollout factors, surrogates, the KL penalty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...objectives.config import LossConfig
from ...objectives.kl import KL
from ...objectives.rollout import MaskedIS, OffPolicyMask, Rejection, TruncatedIS
from ...objectives.surrogates import Point


def difference(log_prob: Tensor, other: Tensor | None) -> Tensor:
    """log_prob - other: 0 where they are equal (-inf too), without gradient at tokens of probability 0.

    ``other`` None is log_prob itself, detached: the value is 0, the derivative 1.
    """
    other = log_prob.detach() if other is None else other
    value = torch.where(log_prob == other, 0.0, log_prob - other).detach()
    finite = torch.where(log_prob.isinf(), 0.0, log_prob)
    return value + (finite - finite.detach())


def pool(level: str, log_ratio: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """The log-ratio that stands for each token."""
    if level == "token":
        return log_ratio
    if level.startswith("prefix"):
        parts = [up_to(level, log_ratio[sequence == i]) for i in range(sequences)]
        return torch.cat([log_ratio[:0], *parts])  # tokens lie in the order of their sequences
    total = sum_by(sequence, log_ratio, sequences)
    if level == "sequence_product":
        return total[sequence]
    mean = (total / sum_by(sequence, torch.ones_like(log_ratio), sequences).clamp(min=1))[sequence]
    if level == "sequence":
        return mean
    finite = torch.where(log_ratio.isinf(), 0.0, log_ratio)
    return mean.detach() + (finite - finite.detach())  # sequence_token


def up_to(level: str, own: Tensor) -> Tensor:
    """What stands for each token of one sequence: the sum up to it, or the least (of equal ones the last)."""
    if level == "prefix_product":
        return torch.stack([own[: t + 1].sum() for t in range(len(own))]) if len(own) else own
    frozen = own.detach().tolist()
    unknown = next((t for t, value in enumerate(frozen) if math.isnan(value)), len(frozen))  # it is every later one's
    least = [min(range(t, -1, -1), key=frozen.__getitem__) for t in range(unknown)]
    return own[least + [unknown] * (len(frozen) - unknown)]


def clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def sum_by(index: Tensor, values: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, index, values)


# Rollout correction: the product of the schemes' factors, by their classes.


def rollout_weights(
    schemes: Sequence[Any],
    log_prob: Tensor,
    old: Tensor | None,
    rollout: Tensor | None,
    A: Tensor,
    sequence: Tensor,
    sequences: int,
    limit: float | None,
) -> Tensor:
    """Of each token; 0 wins over infinity."""
    if not schemes:
        return torch.ones_like(log_prob)
    assert rollout is not None, "a rollout correction needs rollout_log_probs"
    unknown = rollout.isnan()

    def known_difference(a: Tensor) -> Tensor:
        return torch.where(unknown, 0.0, difference(a, torch.where(unknown, 0.0, rollout)))

    total = torch.ones_like(log_prob)
    for scheme in schemes:
        kind, options = type(scheme), vars(scheme)
        if isinstance(scheme, OffPolicyMask):
            behind = -pool("sequence", known_difference(log_prob), sequence, sequences)
            kept = (A >= 0) | ~(behind > options["threshold"])
            factor = kept.to(total) if kind is OffPolicyMask else scheme.factor(A, behind)
            total = torch.where((total == 0) | (factor == 0), 0.0, total * factor)
            continue
        level = {"token": "token", "sequence": "sequence_product", "geometric": "sequence"}[options["level"]]
        log_rho = pool(level, known_difference(log_prob if old is None else old), sequence, sequences)
        rho = clamp(log_rho, limit).exp()
        low, high = options["low"], options["high"]
        kept = (rho >= low) & (rho <= high)
        factors = {
            TruncatedIS: rho.clamp(low, high),
            MaskedIS: torch.where(kept, rho, 0.0),
            Rejection: kept.to(rho),
        }
        factor = factors[kind] if kind in factors else scheme.factor(rho)  # of a class of somebody's own
        factor = torch.where(unknown, 1.0, factor) if level == "token" else factor
        total = torch.where((total == 0) | (factor == 0), 0.0, total * factor)
    return total


# Surrogates: value of each token, and which of (low, high, dual) bounded it.


@dataclass(frozen=True)
class Inputs:
    """What a surrogate's value is made of, one entry for each live token."""

    log_prob: Tensor
    old: Tensor | None
    A: Tensor
    own: Tensor
    """log_prob - old, differentiable."""
    sequence: Tensor
    sequences: int
    config: LossConfig
    folded: Tensor
    """Rollout factors that are part of the ratio."""

    def log_ratio(self, own: Tensor | None = None, level: str | None = None) -> Tensor:
        """Pooled as the level says, saturated; of other log-ratios than the tokens' own if they are given."""
        own, level = self.own if own is None else own, self.config.level if level is None else level
        return clamp(pool(level, own, self.sequence, self.sequences), self.config.log_ratio_limit)

    def old_log_prob(self) -> Tensor:
        return self.log_prob.detach() if self.old is None else self.old


def _times_log_prob(weight: Tensor, t: Inputs) -> Tensor:
    """weight * log_prob with the weight detached; a weight of 0 wins over a log-prob of -inf."""
    weight = weight.detach()
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, t.log_prob))


def _times_ratio(factor: Tensor, log_ratio: Tensor) -> Tensor:
    # A factor of 0 must give 0 also where the ratio is infinite, in value and gradient: replace its log-ratio first.
    return factor * torch.where(factor == 0, 0.0, log_ratio).exp()


def _reinforce(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    return _times_log_prob(-t.A, t), None


def _unclipped(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    return _times_ratio(-t.A, t.log_ratio()), None


def _clip(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    low, high = 1 - surrogate.low, 1 + surrogate.high
    dual = float("inf") if surrogate.dual is None else surrogate.dual
    log_ratio, A = t.log_ratio(), t.A
    r = log_ratio.detach().exp()
    clipped = torch.stack([(A < 0) & (r < low), (A > 0) & (r > high), (A < 0) & (r > dual)])
    bounds = torch.tensor([low, high, dual], dtype=r.dtype, device=r.device)[:, None].expand(3, *r.shape)
    bound = torch.where(clipped, bounds, 0.0).sum(0)
    free = torch.where(clipped.any(0) | (A == 0), 0.0, log_ratio)
    return -A * torch.where(clipped.any(0), bound, free.exp()), clipped


def _cispo(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    low, high = (0.0, surrogate.cap) if surrogate.high is None else (1 - surrogate.low, 1 + surrogate.high)
    r = t.log_ratio().detach().exp()
    acts = t.A != 0
    return _times_log_prob(-r.clamp(low, high) * t.A, t), torch.stack(
        [acts & (r < low), acts & (r > high), acts & False]
    )


def _sapo(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    tau = torch.where(t.A > 0, surrogate.tau_pos, torch.full_like(t.A, surrogate.tau_neg))
    return -t.A * torch.sigmoid(tau * (t.log_ratio().exp() - 1)) * 4 / tau, None


def _dppo(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    p, p_old = t.log_prob.detach().exp(), t.old_log_prob().exp()
    if surrogate.name == "dppo_tv":
        low, high = p - p_old < -surrogate.low, p - p_old > surrogate.high
    else:
        q, q_old = (-torch.expm1(x.clamp(max=0.0)) + 0.0 for x in (t.log_prob.detach(), t.old_log_prob()))  # never -0
        kl = torch.where(p_old == 0, 0.0, -p_old * difference(t.log_prob, t.old).detach())
        kl = kl + torch.where(q_old <= 0, 0.0, q_old * (q_old / q).log())
        low, high = (kl > surrogate.low) & (p < p_old), (kl > surrogate.high) & (p > p_old)
    low, high = low & (t.A < 0), high & (t.A > 0)
    A = torch.where(low | high, 0.0, t.A)
    if surrogate.cap is None:
        return _times_ratio(-A, t.log_ratio()), torch.stack([low, high, low & False])
    r = t.log_ratio().detach().exp()
    return _times_log_prob(-r.clamp(max=surrogate.cap) * A, t), torch.stack([low, high, (r > surrogate.cap) & (A != 0)])


def _dro(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    return _times_log_prob(-t.A, t) + surrogate.beta / 2 * t.log_ratio() ** 2, None


def _vespo(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    own = t.own.detach() + t.folded.clamp(1e-8, math.exp(20)).log()
    log_w = t.log_ratio(own).clamp(math.log(1e-8), 20)
    k = torch.where(t.A >= 0, surrogate.k_pos, torch.full_like(own, surrogate.k_neg))
    lam = torch.where(t.A >= 0, surrogate.lam_pos, torch.full_like(own, surrogate.lam_neg))
    return _times_log_prob(-(log_w.exp() ** k * (lam * (1 - log_w.exp())).exp()) * t.A, t), None


def _gmpo(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    low = (t.A < 0) & (t.own.detach() < -surrogate.low)
    high = (t.A > 0) & (t.own.detach() > surrogate.high)
    own = torch.where(high, surrogate.high, torch.where(low, -surrogate.low, t.own))
    return _times_ratio(-t.A, t.log_ratio(own)), torch.stack([low, high, low & False])


def registered(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    """A user's: its own value is the truth, differentiated by autograd."""
    log_ratio = t.log_ratio()
    return surrogate.value(Point(t.log_prob, log_ratio, log_ratio.exp(), t.A, t.old_log_prob())), None


VALUES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reinforce": _reinforce,
    "unclipped": _unclipped,
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "dppo_tv": _dppo,
    "dppo_kl": _dppo,
    "dro": _dro,
    "vespo": _vespo,
    "gmpo": _gmpo,
}
"""The value of every surrogate, by its name in ``surrogates.SURROGATES``."""


def estimate(name: str, x: Tensor) -> Tensor:
    if name == "k3":
        return torch.expm1(-x) + torch.where(x == -math.inf, 0.0, x)
    return {"k1": x, "k2": x * x / 2, "abs": x.abs()}[name]


def penalty_of(kl: KL, x: Tensor, t: Inputs) -> Tensor:
    """The penalty of each token from x = log_prob - ref, with the ratio in it where that weighs it."""
    log_ratio = t.log_ratio(level=kl.level_beside(t.config.level))
    penalty = kl_penalty(kl, x, log_ratio.detach().exp())
    return penalty * log_ratio.exp() if kl.ratio_weighted else penalty


def kl_penalty(kl: KL, x: Tensor, ratio: Tensor) -> Tensor:
    """The penalty of each token from x = log_prob - ref and the ratio to the old policy."""
    finite = torch.where(x.isinf(), 0.0, x)
    x = clamp(x, kl.limit[0])
    value = clamp(estimate(kl.estimator, x), kl.limit[1])
    if kl.gradient == "pathwise":
        return value
    if kl.gradient == "score_function":
        return value * (finite - finite.detach()).exp()
    square = x * x / 2
    if kl.gradient == "weighted_k2":
        square = ratio.clamp(max=kl.ratio_cap) * square
    return value.detach() + square - square.detach()
