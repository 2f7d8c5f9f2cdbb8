"""The readable truth: the loss in plain PyTorch, its gradient by autograd.

Kernels, ``verify`` and the test suite are compared with this file in float64. It takes its options from
``config.py`` and shares no maths with the rest of the package. Read it top to bottom to know what
``grpo_kernels`` computes; it holds several tensors of the logits' size, so do not train with it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...calls.arguments import check_pooled
from ...calls.outputs import LossOutput, TokenLogProbs
from ...calls.teacher import Teacher, check_teacher
from ...objectives.aggregation import AGGREGATIONS
from ...objectives.checks import check_flag, checks_enabled, fail, read_mask
from ...objectives.config import LossConfig, resolve_config
from ...objectives.normalizer import Normalizer
from ...objectives.rollout import OffPolicyMask
from .divergences import divergence_of
from .metrics import metrics_of
from .terms import VALUES as VALUES
from .terms import Inputs as Inputs
from .terms import difference, penalty_of, pool, registered, rollout_weights, sum_by
from .terms import kl_penalty as kl_penalty


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    old_log_probs: Tensor | TokenLogProbs | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    teacher: Teacher | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig | str = "grpo",
    normalizer: float | Tensor | Normalizer | None = None,
    kl_coef: float | Tensor | None = None,
    rollout_kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    divergence_coef: float | Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    vocab_size: int | None = None,
    support: Any = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    skip_zero_advantage: bool = False,
    check: bool | None = None,
    backend: str | None = None,
    require: str | None = None,
) -> LossOutput:
    """The same call as ``grpo_kernels.grpo_loss``, for any dtype (computed in at least fp32).

    ``grad_scale``, ``inplace``, ``check``, ``backend`` and ``require`` change no value and are ignored. See there for
    arguments.
    """
    if isinstance(old_log_probs, TokenLogProbs):
        old_log_probs = old_log_probs.log_probs
    config = resolve_config(config)
    check_flag("reference.grpo_loss", "skip_zero_advantage", skip_zero_advantage)
    if AGGREGATIONS.get(config.weighting.name) is not type(config.weighting):
        expected = "an aggregation of the package's: what one of your own computes has no truth here"
        fail("reference.grpo_loss", expected, repr(config.weighting))
    kl_coef = config.kl.coef if kl_coef is None else kl_coef
    rollout_kl_coef = config.rollout_kl.coef if rollout_kl_coef is None else rollout_kl_coef
    entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
    if isinstance(normalizer, Normalizer):
        normalizer = normalizer.of_loss("reference.grpo_loss", config)
    log_probs = {"old_log_probs": old_log_probs, "rollout_log_probs": rollout_log_probs}
    check_pooled("reference.grpo_loss", config, old_log_probs, rollout_log_probs, log_probs)
    shape = token_ids.shape
    logits = logits[..., :vocab_size]
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32

    # Everything below is flat: one entry for each token that counts, with the index of its sequence.
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
    if advantages is None:
        advantages = torch.zeros(shape, dtype=real, device=logits.device)
    mask = read_mask("reference.grpo_loss", mask, {"advantages": advantages, "mask": mask}, checks_enabled(check))
    sequence, sequences, mask = _sequences(shape, mask, cu_seqlens)
    counted = mask.reshape(-1).nonzero().squeeze(-1)
    advantages = _per_token(advantages.detach().to(real), sequences, sequence, shape)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = _per_token(temperature.detach().to(real), sequences, sequence, shape)
    weight = _weights(config.weighting.name, sequence[counted], sequences, config, normalizer, real)
    entropy_weight = weight
    if config.entropy_aggregation is not None:
        entropy_weight = _weights(config.entropy_aggregation, sequence[counted], sequences, config, None, real)
    read = (advantages[counted] != 0) if skip_zero_advantage else torch.ones_like(counted, dtype=torch.bool)
    live, weight, entropy_weight = counted[read], weight[read], entropy_weight[read]
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature[live, None]
    sequence = sequence[live]

    def at_live(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1)[live].to(real)

    old, ref, rollout = at_live(old_log_probs), at_live(ref_log_probs), at_live(rollout_log_probs)
    sampler = old if rollout is None else rollout
    A = advantages[live]
    ids = token_ids.reshape(-1)[live].long()
    log_p = _log_softmax(logits, ids, live, shape, real, temperature, logit_scale, logit_softcap, support)
    log_prob, entropy = log_p.gather(-1, ids[:, None]).squeeze(-1), _entropy(log_p)

    given = at_live(token_weights)
    u = torch.ones_like(log_prob) if given is None else given
    nothing = (u == 0) & (config.level == "token")
    if config.surrogate is None:  # no policy term; metrics have the ratios that there are
        u = torch.zeros_like(log_prob)
    own = difference(log_prob, old)
    log_ratio = pool(config.level, own, sequence, sequences)
    sampled = (log_prob.detach(), old, rollout, A, sequence, sequences, config.log_ratio_limit)
    in_ratio = [s for s in config.schemes if config.policy_term.takes_rollout and not isinstance(s, OffPolicyMask)]
    rho = rollout_weights([s for s in config.schemes if s not in in_ratio], *sampled)
    folded = rollout_weights(in_ratio, *sampled)
    inputs = Inputs(log_prob, old, A, own, sequence, sequences, config, folded)
    surrogate = VALUES.get(config.policy_term.name, registered)
    clipped = surrogate(config.policy_term, inputs)[1]  # as the ratios that metrics report: of every token
    # A token that weighs nothing has no part, not even by 0 times NaN.
    on_policy = None if old is None else torch.where(nothing, log_prob.detach(), old)
    weighing = replace(inputs, old=on_policy, own=difference(log_prob, on_policy))
    weighing = replace(weighing, A=torch.where(nothing, 0.0, A), folded=torch.where(nothing, 1.0, folded))
    policy = surrogate(config.policy_term, weighing)[0]
    u = torch.where((u == 0) | (rho == 0), 0.0, u * rho)
    if entropy_threshold is not None:
        u = u * ~(entropy.detach() < entropy_threshold)
    policy_loss = torch.where(u == 0, 0.0, weight * u * torch.where(u == 0, 0.0, policy)).sum()
    loss = policy_loss
    kl_loss = rollout_kl_loss = entropy_loss = torch.zeros_like(loss)
    if isinstance(kl_coef, Tensor) or kl_coef != 0:
        assert ref is not None, "a KL term needs ref_log_probs"
        kl_loss = kl_coef * (weight * penalty_of(config.kl, difference(log_prob, ref), inputs)).sum()
        loss = loss + kl_loss
    if isinstance(rollout_kl_coef, Tensor) or rollout_kl_coef != 0:
        assert sampler is not None, "a KL term to the sampler needs rollout_log_probs or old_log_probs"
        unknown = sampler.isnan()
        x = difference(log_prob, torch.where(unknown, log_prob.detach(), sampler))
        penalty = torch.where(unknown, 0.0, penalty_of(config.rollout_kl, x, inputs))
        rollout_kl_loss = rollout_kl_coef * (weight * penalty).sum()
        loss = loss + rollout_kl_loss
    if isinstance(entropy_coef, Tensor) or entropy_coef != 0:
        entropy_loss = -entropy_coef * (entropy_weight * entropy).sum()
        loss = loss + entropy_loss

    of_teacher: dict[str, Tensor | float] = {}
    if config.divergence is not None:
        check_teacher("reference.grpo_loss", teacher, config.divergence)
        if teacher is None or teacher.logits is None:
            hint = "of hidden states, Teacher(logits=hidden @ weight.T + bias); of recorded log-probs it has no truth"
            fail("reference.grpo_loss", "a teacher of logits", repr(teacher), hint=hint)
        tau = temperature
        if config.divergence.teacher_temperature is not None:
            tau = config.divergence.teacher_temperature
        forms = (tau, teacher.logit_scale, teacher.logit_softcap, None)
        log_q = _log_softmax(teacher.logits[..., :vocab_size], ids, live, shape, real, *forms)
        divergence = divergence_of(config.divergence, log_p, log_q)
        coef = config.divergence.coef if divergence_coef is None else divergence_coef
        divergence_loss = (weight * coef * divergence).sum()
        loss = loss + divergence_loss
        of_teacher = {"divergence_loss": divergence_loss, "teacher_entropy_sum": _entropy(log_q).double().sum()}
        of_teacher["divergence_sum"] = divergence[~divergence.isinf()].double().sum()
        of_teacher["infinite_divergences"] = divergence.isinf().double().sum()
        of_teacher["divergence_count"] = (~divergence.isinf()).double().sum()

    with torch.no_grad():
        terms: dict[str, Tensor | float] = {"policy_loss": policy_loss, "kl_loss": kl_loss}
        terms |= {"rollout_kl_loss": rollout_kl_loss, "entropy_loss": entropy_loss, **of_teacher}
        terms |= {"tokens": float(len(counted)), "sequences": float(sequences)}
        terms["skipped_tokens"] = float(len(counted) - len(live))
        others = (old, ref, rollout, torch.where(rho == 0, 0.0, rho * folded))
        metrics = metrics_of(config, terms, log_prob, entropy, log_ratio, clipped, *others, sequence, sequences)
    return LossOutput(loss, metrics, _scatter(log_prob, live, shape), _scatter(entropy, live, shape))


def _log_softmax(
    logits: Tensor,
    ids: Tensor,
    live: Tensor,
    shape: torch.Size,
    real: torch.dtype,
    temperature: float | Tensor,  # or (tokens, 1)
    logit_scale: float | Tensor,
    logit_softcap: float | Tensor | None,
    support: Any,
) -> Tensor:
    """Log-probs of the rows of live tokens, (tokens, V)."""
    if logits.dim() == 3:
        logits = logits[:, : shape[-1]]
    z = logits.reshape(-1, logits.shape[-1])[live].to(real) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    z = z / temperature
    return torch.log_softmax(z if support is None else z.masked_fill(~allowed(z, ids, live, support), -math.inf), -1)


def allowed(z: Tensor, ids: Tensor, live: Tensor, support: Any) -> Tensor:
    """Which columns of the rows z (tokens, V) of live tokens a support leaves, the drawn one always."""
    if isinstance(support, Tensor):
        kept = support.reshape(-1, z.shape[-1])[live] != 0
    elif hasattr(support, "offsets"):
        kept = _recorded(support.ids, support.offsets, z.shape[-1])[live]
    else:
        kept = _kept(z, support)
    return kept.scatter(-1, ids[:, None], True)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)


def _kept(z: Tensor, support: Any) -> Tensor:
    """Which columns a sampler keeps that applies these filters in turn, ties with the last one included."""
    kept = torch.ones_like(z, dtype=torch.bool)
    for one in support if isinstance(support, tuple) else (support,):
        p = torch.softmax(z.detach().masked_fill(~kept, -math.inf), -1)
        ordered = p.sort(-1, descending=True).values
        if type(one).__name__ == "TopK":
            lowest = ordered[:, min(one.k, z.shape[-1]) - 1]
        elif type(one).__name__ == "TopP":
            running = ordered.cpu().cumsum(-1).to(z.device)  # CUDA's is not deterministic
            reached = (running < one.p).sum(-1).clamp(max=z.shape[-1] - 1)
            lowest = ordered.gather(-1, reached[:, None]).squeeze(-1)
        else:
            lowest = one.p * ordered[:, 0]
        kept = kept & (p >= lowest[:, None]) & (p > 0)
    return kept


def _recorded(ids: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Which columns the recorded set of each token has, (N, V): all where it is empty."""
    allowed = torch.zeros(len(offsets) - 1, columns, dtype=torch.bool, device=ids.device)
    for row, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        allowed[row, ids[first:last].long() if last > first else slice(None)] = True
    return allowed


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


def _per_token(values: Tensor, sequences: int, sequence: Tensor, shape: torch.Size) -> Tensor:
    if values.shape in ((sequences,), (sequences, 1)):
        return values.reshape(-1)[sequence]
    return values.reshape(-1)


def _weights(
    aggregation: str,
    sequence: Tensor,
    sequences: int,
    config: LossConfig,
    normalizer: float | Tensor | None,
    real: torch.dtype,
) -> Tensor:
    """The weight of each counted token; see objectives/aggregation.py."""
    one = torch.ones(len(sequence), dtype=real, device=sequence.device)
    if aggregation == "token_mean":
        return one / (max(len(sequence), 1) if normalizer is None else normalizer)
    if aggregation == "group_mean":
        assert config.group_size is not None, "group_mean needs group_size"
        group = sequence // config.group_size
        groups = sequences // config.group_size
        return one / sum_by(group, one, groups)[group] / (groups if normalizer is None else normalizer)
    count = max(sequences, 1) if normalizer is None else normalizer
    if aggregation == "sequence_mean":
        return one / sum_by(sequence, one, sequences)[sequence] / count
    if aggregation == "constant":
        assert config.constant_length is not None, "constant needs constant_length"
        return one / (count * config.constant_length)
    return one / count  # sequence_sum


def _scatter(values: Tensor, live: Tensor, shape: torch.Size) -> Tensor:
    flat = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    return flat.index_copy(0, live, values.detach()).view(shape)
