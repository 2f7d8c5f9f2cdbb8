"""The readable truth: the loss in plain PyTorch, its gradient by autograd.

Kernels, ``verify`` and the test suite are compared with this file in float64. It takes its options from
``config.py`` and shares no maths with the rest of the package. Read it top to bottom to know what
``grpo_kernels`` computes; it holds several tensors of the logits' size, so do not train with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import LossConfig
from .kl import KL
from .metrics import Metrics
from .outputs import LossOutput
from .presets import resolve_config
from .surrogates import Point


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig | str = "grpo",
    normalizer: float | Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    support: Any = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    skip_zero_advantage: bool = False,
    check: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """The same call as ``grpo_kernels.grpo_loss``, for any dtype (computed in at least fp32).

    ``grad_scale``, ``inplace``, ``check`` and ``backend`` change no value and are ignored. See there for arguments.
    """
    config = resolve_config(config)
    kl_coef = config.kl.coef if kl_coef is None else kl_coef
    entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
    shape = token_ids.shape
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32

    # Everything below is flat: one entry for each token that counts, with the index of its sequence.
    mask = torch.ones(shape, dtype=torch.bool, device=logits.device) if mask is None else mask != 0
    sequence, sequences, mask = _sequences(shape, mask, cu_seqlens)
    counted = mask.reshape(-1).nonzero().squeeze(-1)
    advantages = _per_token(advantages.detach().to(real), sequences, sequence, shape)
    weight = _weights(config.aggregation, sequence[counted], sequences, config, normalizer, real)
    entropy_weight = weight
    if config.entropy_aggregation is not None:
        entropy_weight = _weights(config.entropy_aggregation, sequence[counted], sequences, config, None, real)
    read = (advantages[counted] != 0) if skip_zero_advantage else torch.ones_like(counted, dtype=torch.bool)
    live, weight, entropy_weight = counted[read], weight[read], entropy_weight[read]
    sequence = sequence[live]

    def at_live(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1)[live].to(real)

    old, ref, rollout = at_live(old_log_probs), at_live(ref_log_probs), at_live(rollout_log_probs)
    A = advantages[live]
    log_prob, entropy = _log_probs(
        logits, token_ids.reshape(-1)[live], live, shape, real, temperature, logit_scale, logit_softcap, support
    )

    own = _difference(log_prob, old)
    log_ratio = _pool(config.level, own, sequence, sequences)
    rho = _rollout_weights(config, log_prob.detach(), old, rollout, A, sequence, sequences)
    inputs = Inputs(log_prob, old, A, own, sequence, sequences, config, rho)
    policy, clipped = VALUES.get(config.surrogate.name, _registered)(config.surrogate, inputs)
    u = torch.ones_like(policy) if token_weights is None else token_weights.detach().reshape(-1)[live].to(real)
    if rho is not None and not config.surrogate.takes_rollout:
        u = u * rho
    if entropy_threshold is not None:
        u = u * (entropy.detach() >= entropy_threshold)
    policy_loss = torch.where(u == 0, 0.0, weight * u * torch.where(u == 0, 0.0, policy)).sum()
    loss = policy_loss
    kl_loss = entropy_loss = torch.zeros_like(loss)
    if isinstance(kl_coef, Tensor) or kl_coef != 0:
        assert ref is not None, "a KL term needs ref_log_probs"
        saturated = inputs.log_ratio(level=config.kl.level_beside(config.level))
        penalty = _kl(config.kl, _difference(log_prob, ref), saturated.detach().exp())
        if config.kl.ratio_weighted:
            penalty = penalty * saturated.exp()
        kl_loss = kl_coef * (weight * penalty).sum()
        loss = loss + kl_loss
    if isinstance(entropy_coef, Tensor) or entropy_coef != 0:
        entropy_loss = -entropy_coef * (entropy_weight * entropy).sum()
        loss = loss + entropy_loss

    with torch.no_grad():
        terms: dict[str, Tensor | float] = {"policy_loss": policy_loss, "kl_loss": kl_loss}
        terms |= {"entropy_loss": entropy_loss}
        terms |= {"tokens": float(len(counted)), "sequences": float(sequences)}
        terms["skipped_tokens"] = float(len(counted) - len(live))
        others = (old, ref, rollout, rho)
        metrics = _metrics(config, terms, log_prob, entropy, log_ratio, clipped, *others, sequence, sequences)
    return LossOutput(loss, metrics, _scatter(log_prob, live, shape), _scatter(entropy, live, shape))


def _log_probs(
    logits: Tensor,
    ids: Tensor,
    live: Tensor,
    shape: torch.Size,
    real: torch.dtype,
    temperature: float | Tensor,
    logit_scale: float | Tensor,
    logit_softcap: float | Tensor | None,
    support: Any,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each live token and entropy of its row."""
    if logits.dim() == 3:
        logits = logits[:, : shape[-1]]
    z = logits.reshape(-1, logits.shape[-1])[live].to(real) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    z = z / temperature
    if support is not None:
        allowed = support.reshape(-1, z.shape[-1])[live] != 0 if isinstance(support, Tensor) else _kept(z, support)
        z = z.masked_fill(~allowed.scatter(-1, ids[:, None].long(), True), -math.inf)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)
    return log_p.gather(-1, ids[:, None].long()).squeeze(-1), entropy


def _kept(z: Tensor, support: Any) -> Tensor:
    """Which columns a sampler keeps that applies these filters in turn, ties with the last one included."""
    kept = torch.ones_like(z, dtype=torch.bool)
    for one in support if isinstance(support, tuple) else (support,):
        p = torch.softmax(z.detach().masked_fill(~kept, -math.inf), -1)
        ordered = p.sort(-1, descending=True).values
        if type(one).__name__ == "TopK":
            lowest = ordered[:, min(one.k, z.shape[-1]) - 1]
        elif type(one).__name__ == "TopP":
            reached = (ordered.cumsum(-1) < one.p).sum(-1).clamp(max=z.shape[-1] - 1)
            lowest = ordered.gather(-1, reached[:, None]).squeeze(-1)
        else:
            lowest = one.p * ordered[:, 0]
        kept = kept & (p >= lowest[:, None]) & (p > 0)
    return kept


def _difference(log_prob: Tensor, other: Tensor | None) -> Tensor:
    """log_prob - other: 0 where they are equal (-inf too), without gradient at tokens of probability 0.

    ``other`` None is log_prob itself, detached: the value is 0, the derivative 1.
    """
    other = log_prob.detach() if other is None else other
    value = torch.where(log_prob == other, 0.0, log_prob - other).detach()
    finite = torch.where(log_prob.isinf(), 0.0, log_prob)
    return value + (finite - finite.detach())


def _pool(level: str, log_ratio: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """The log-ratio that stands for each token."""
    if level == "token":
        return log_ratio
    total = _sum_by(sequence, log_ratio, sequences)
    if level == "sequence_product":
        return total[sequence]
    mean = (total / _sum_by(sequence, torch.ones_like(log_ratio), sequences).clamp(min=1))[sequence]
    if level == "sequence":
        return mean
    finite = torch.where(log_ratio.isinf(), 0.0, log_ratio)
    return mean.detach() + (finite - finite.detach())  # sequence_token


def _clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


# Rollout correction: the product of the schemes' factors, by the names of their classes.


def _rollout_weights(
    config: LossConfig,
    log_prob: Tensor,
    old: Tensor | None,
    rollout: Tensor | None,
    A: Tensor,
    sequence: Tensor,
    sequences: int,
) -> Tensor | None:
    if not config.schemes:
        return None
    assert rollout is not None, "a rollout correction needs rollout_log_probs"
    unknown = rollout.isnan()

    def known_difference(a: Tensor) -> Tensor:
        return torch.where(unknown, 0.0, _difference(a, torch.where(unknown, 0.0, rollout)))

    total = torch.ones_like(log_prob)
    for scheme in config.schemes:
        kind, options = type(scheme).__name__, vars(scheme)
        if kind == "OffPolicyMask":
            behind = -_pool("sequence", known_difference(log_prob), sequence, sequences)
            total = total * ((A >= 0) | ~(behind > options["threshold"]))
            continue
        level = {"token": "token", "sequence": "sequence_product", "geometric": "sequence"}[options["level"]]
        log_rho = _pool(level, known_difference(log_prob if old is None else old), sequence, sequences)
        rho = _clamp(log_rho, config.log_ratio_limit).exp()
        low, high = options["low"], options["high"]
        kept = (rho >= low) & (rho <= high)
        factor = {
            "TruncatedIS": rho.clamp(low, high),
            "MaskedIS": torch.where(kept, rho, 0.0),
            "Rejection": kept.to(rho),
        }[kind]
        total = total * (torch.where(unknown, 1.0, factor) if level == "token" else factor)
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
    rho: Tensor | None

    def log_ratio(self, own: Tensor | None = None, level: str | None = None) -> Tensor:
        """Pooled as the level says, saturated; of other log-ratios than the tokens' own if they are given."""
        own, level = self.own if own is None else own, self.config.level if level is None else level
        return _clamp(_pool(level, own, self.sequence, self.sequences), self.config.log_ratio_limit)

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
        q, q_old = -torch.expm1(t.log_prob.detach()), -torch.expm1(t.old_log_prob())
        kl = torch.where(p_old == 0, 0.0, -p_old * _difference(t.log_prob, t.old).detach())
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
    own = t.own.detach()
    if t.rho is not None:
        own = own + t.rho.clamp(1e-8, math.exp(20)).log()
    log_w = t.log_ratio(own).clamp(math.log(1e-8), 20)
    k = torch.where(t.A >= 0, surrogate.k_pos, torch.full_like(own, surrogate.k_neg))
    lam = torch.where(t.A >= 0, surrogate.lam_pos, torch.full_like(own, surrogate.lam_neg))
    return _times_log_prob(-(log_w.exp() ** k * (lam * (1 - log_w.exp())).exp()) * t.A, t), None


def _gmpo(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
    low = (t.A < 0) & (t.own.detach() < -surrogate.low)
    high = (t.A > 0) & (t.own.detach() > surrogate.high)
    own = torch.where(high, surrogate.high, torch.where(low, -surrogate.low, t.own))
    return _times_ratio(-t.A, t.log_ratio(own)), torch.stack([low, high, low & False])


def _registered(surrogate: Any, t: Inputs) -> tuple[Tensor, Tensor | None]:
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


def _estimator(name: str, x: Tensor) -> Tensor:
    if name == "k3":
        return torch.expm1(-x) + torch.where(x == -math.inf, 0.0, x)
    return {"k1": x, "k2": x * x / 2, "abs": x.abs()}[name]


def _kl(kl: KL, x: Tensor, ratio: Tensor) -> Tensor:
    """The penalty of each token from x = log_prob - ref and the ratio to the old policy."""
    finite = torch.where(x.isinf(), 0.0, x)
    x = _clamp(x, kl.limit[0])
    value = _clamp(_estimator(kl.estimator, x), kl.limit[1])
    if kl.gradient == "pathwise":
        return value
    if kl.gradient == "score_function":
        return value * (finite - finite.detach()).exp()
    square = x * x / 2
    if kl.gradient == "weighted_k2":
        square = ratio.clamp(max=kl.ratio_cap) * square
    return value.detach() + square - square.detach()


# Sequences and weights


def _sequences(shape: torch.Size, mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int, Tensor]:
    """Index of each token's sequence (flat), how many there are, and the mask without tokens outside of all."""
    if cu_seqlens is None:
        return torch.arange(shape[0], device=mask.device).repeat_interleave(shape[1]), shape[0], mask
    positions = torch.arange(mask.numel(), device=mask.device)
    sequence = torch.bucketize(positions, cu_seqlens, right=True) - 1
    count = len(cu_seqlens) - 1
    inside = (sequence >= 0) & (sequence < count)
    return sequence.clamp(0, count - 1), count, mask & inside.view(shape)


def _per_token(advantages: Tensor, sequences: int, sequence: Tensor, shape: torch.Size) -> Tensor:
    if advantages.shape in ((sequences,), (sequences, 1)):
        return advantages.reshape(-1)[sequence]
    return advantages.reshape(-1)


def _sum_by(index: Tensor, values: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, index, values)


def _weights(
    aggregation: str,
    sequence: Tensor,
    sequences: int,
    config: LossConfig,
    normalizer: float | Tensor | None,
    real: torch.dtype,
) -> Tensor:
    """The weight of each counted token; see config.AGGREGATIONS."""
    one = torch.ones(len(sequence), dtype=real, device=sequence.device)
    if aggregation == "token_mean":
        return one / (max(len(sequence), 1) if normalizer is None else normalizer)
    if aggregation == "group_mean":
        assert config.group_size is not None, "group_mean needs group_size"
        group = sequence // config.group_size
        groups = sequences // config.group_size
        return one / _sum_by(group, one, groups)[group] / (groups if normalizer is None else normalizer)
    count = max(sequences, 1) if normalizer is None else normalizer
    if aggregation == "sequence_mean":
        return one / _sum_by(sequence, one, sequences)[sequence] / count
    if aggregation == "constant":
        assert config.constant_length is not None, "constant needs constant_length"
        return one / (count * config.constant_length)
    return one / count  # sequence_sum


# Metrics


def _metrics(
    config: LossConfig,
    terms: dict[str, Tensor | float],
    log_prob: Tensor,
    entropy: Tensor,
    log_ratio: Tensor,
    clipped: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    rho: Tensor | None,
    sequence: Tensor,
    sequences: int,
) -> Metrics:
    sums = dict(terms)
    sums["impossible_tokens"] = (log_prob == float("-inf")).sum().double()
    sums["entropy_sum"] = entropy.double().sum()

    def divergence(name: str, other: Tensor | None, estimators: tuple[str, ...], keep: Tensor | None = None) -> None:
        x = None if other is None else _difference(log_prob, other).double()
        x = x if x is None or keep is None else x[keep]
        for estimator in estimators:
            key = "kl_sum" if name == "ref" else f"{estimator}_{name}_sum"
            sums[key] = 0.0 if x is None else _estimator(estimator, x).sum()

    divergence("ref", ref, (config.kl.estimator,))
    sums["kl_count"] = 0.0 if ref is None else float(len(log_prob))
    divergence("old", old, ("k1", "k3"))
    known = None if rollout is None else ~rollout.isnan()
    divergence("rollout", rollout, ("k1", "k3"), known)
    ratios = weights = log_prob.new_zeros(0).double()
    if known is not None:
        ratios = _difference(log_prob if old is None else old, rollout)[known].double().exp()
        weights = torch.ones_like(ratios) if rho is None else rho[known].double()
    sums["rollout_count"] = float(len(ratios))
    for name, values in (("rollout_ratio", ratios), ("rollout_weight", weights)):
        sums[f"{name}_sum"], sums[f"{name}_square_sum"] = values.sum(), (values * values).sum()
        sums[f"{name}_max"] = values.max() if len(values) else float("-inf")
    sums["rollout_rejected_count"] = (weights == 0).sum().double()

    clipped = torch.zeros(3, len(log_prob), dtype=torch.bool, device=log_prob.device) if clipped is None else clipped
    ratio = log_ratio.double().exp()
    if config.level != "token":  # one ratio for each sequence that has a token
        present = _sum_by(sequence, torch.ones_like(ratio), sequences) > 0
        ratio = torch.zeros(sequences, dtype=ratio.dtype, device=ratio.device).index_copy(0, sequence, ratio)[present]
        clipped = torch.stack([_sum_by(sequence, flag.double(), sequences) > 0 for flag in clipped])
    sums["ratio_sum"], sums["ratio_count"] = ratio.sum(), float(len(ratio))
    sums["ratio_min"] = ratio.min() if len(ratio) else float("inf")
    sums["ratio_max"] = ratio.max() if len(ratio) else float("-inf")
    sums["clipped_low"], sums["clipped_high"], sums["clipped_dual"] = clipped.sum(-1).double()
    return Metrics.of(**sums)


def _scatter(values: Tensor, live: Tensor, shape: torch.Size) -> Tensor:
    flat = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    return flat.index_copy(0, live, values.detach()).view(shape)
