"""Losses that ``match`` may be tried on while it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import KL, Cispo, Clip, DppoTV, Gmpo, Reinforce, Sapo, TruncatedIS, Vespo

from . import FREE, Batch, Truth, fault, is_one, k3, masked_mean, no_config, plain, ppo_terms, sequence_means

# No config is one of these, however much it looks like it


def bounds_by_position(lp, old, A, mask):
    """Later tokens may move further."""
    steps = torch.arange(lp.shape[1], dtype=lp.dtype)
    high = 0.2 + 0.03 * steps
    return masked_mean(ppo_terms(lp - old, A[:, None], 0.2, high), mask)


def bounds_by_token(log_probs, old_log_probs, token_ids, advantages, mask):
    """Some tokens of the vocabulary are held closer: digits, say."""
    eps = torch.where(token_ids < 5, 0.1, 0.3)
    r, A = torch.exp(log_probs - old_log_probs), advantages[:, None]
    losses = torch.max(-A * r, -A * torch.min(torch.max(r, 1 - eps), 1 + eps))
    return (losses * mask).sum() / mask.sum()


def bounds_by_row(lp, old, A, mask):
    """Every second sequence has tighter bounds: two prompts of different difficulty."""
    eps = torch.tensor([0.1, 0.3], dtype=lp.dtype)[torch.arange(len(lp)) % 2][:, None]
    return masked_mean(ppo_terms(lp - old, A[:, None], eps, eps), mask)


def bounds_by_entropy(logprobs, old_logprobs, entropy, advantages, mask):
    """Where the policy is unsure it may move further."""
    eps = (0.1 * entropy.detach()).clamp(0.1, 0.4)
    return masked_mean(ppo_terms(logprobs - old_logprobs, advantages[:, None], 0.2, eps), mask)


def bounds_by_length(lp, old, A, mask):
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    eps = 0.4 / lengths.sqrt()
    return sequence_means(ppo_terms(lp - old, A[:, None], eps, eps), mask).mean()


def bounds_by_advantage(lp, old, A, mask):
    """A larger advantage buys a larger step."""
    A = A[:, None]
    eps = 0.1 * (1 + A.abs())
    r = (lp - old).exp()
    return masked_mean(-torch.min(r * A, torch.clamp(r, 1 - eps, 1 + eps) * A), mask)


def bounds_by_old_probability(lp, old, A, mask):
    """Rare tokens get room to grow; not as 1/p, which would be a bound on probabilities."""
    high = 0.1 + 0.4 * (1 - old.exp())
    return masked_mean(ppo_terms(lp - old, A[:, None], 0.2, high), mask)


def adaptive_kl(lp, old, ref, A, mask):
    """The coefficient follows the batch's own divergence."""
    kl = k3(lp, ref)
    coef = 0.04 * (masked_mean(kl, mask).detach() / 0.1).clamp(0.5, 2.0)
    return masked_mean(ppo_terms(lp - old, A[:, None]) + coef * kl, mask)


def kl_beside_advantages(lp, old, ref, A, mask):
    """The penalty keeps pace with the size of the policy term."""
    coef = 0.1 * A.abs().mean()
    return masked_mean(ppo_terms(lp - old, A[:, None]) + coef * k3(lp, ref), mask)


def max_before_advantage(lp, old, A, mask):
    """In gradient, not in value, a mask of what fell below 0.8."""
    r = (lp - old).exp()
    return -masked_mean(torch.maximum(r, r.clamp(0.8, 1.2)) * A[:, None], mask)


def dual_of_the_batch(lp, old, A, mask):
    """The third bound is a multiple of the batch's mean ratio."""
    r, A = (lp - old).exp(), A[:, None]
    c = (2 * masked_mean(r, mask).detach()).clamp(min=1.5)
    inside = torch.minimum(r * A, r.clamp(0.8, 1.2) * A)
    return -masked_mean(torch.where(A < 0, torch.maximum(inside, c * A), inside), mask)


def clamped_advantages(lp, old, advantages, mask):
    A = advantages.clamp(-5, 5)[:, None]
    return masked_mean(ppo_terms(lp - old, A), mask)


def adaptive_entropy(lp, old, A, mask, entropy):
    """More bonus as the entropy falls below its target."""
    mean_entropy = masked_mean(entropy, mask)
    coef = 0.02 * (2.5 - mean_entropy.detach()).clamp(min=0)
    return masked_mean(ppo_terms(lp - old, A[:, None]), mask) - coef * mean_entropy


def reports_kl_in_its_value(lp, old, ref, A, mask):
    """The penalty is in the number that is logged, and not in the gradient."""
    with torch.no_grad():
        kl = masked_mean(k3(lp, ref), mask)
    return masked_mean(ppo_terms(lp - old, A[:, None]), mask) + 0.1 * kl


def mean_of_free_tokens(lp, old, A, mask):
    """Divided by the number of tokens that still have a gradient."""
    r, A = (lp - old).exp(), A[:, None]
    free = ((r * A <= r.clamp(0.8, 1.2) * A) & (mask > 0)).sum()
    return (ppo_terms(lp - old, A) * mask).sum() / free.clamp(min=1)


def ratios_over_their_mean(lp, old, A, mask):
    """Self-normalised importance sampling, under a clip."""
    r = (lp - old).exp()
    r = r / masked_mean(r, mask).detach()
    return masked_mean(-torch.minimum(r * A[:, None], r.clamp(0.8, 1.2) * A[:, None]), mask)


def ratio_of_the_group(lp, old, A, mask):
    """One ratio for the four answers to a prompt."""
    x = ((lp - old) * mask).view(-1, 4, lp.shape[1]).sum((1, 2))
    counts = mask.view(-1, 4 * lp.shape[1]).sum(-1).clamp(min=1)
    pooled = (x / counts).repeat_interleave(4)
    return (ppo_terms(pooled, A) * (mask.sum(-1) > 0)).mean()


def sequences_that_stayed(lp, old, A, mask):
    """Whole sequences are left out, of the denominator too, when their mean ratio is out of bounds."""
    mean_ratio = sequence_means((lp - old).exp(), mask).detach()
    kept = ((mean_ratio > 0.5) & (mean_ratio < 2.0)).to(lp.dtype)
    losses = sequence_means(ppo_terms(lp - old, A[:, None]), mask)
    return (losses * kept).sum() / kept.sum().clamp(min=1)


def clipped_and_dropped(lp, old, A, mask):
    """A clip, and beyond ratios of 0.5 and 2 nothing at all, whatever the advantage's sign."""
    r = (lp - old).exp()
    kept = ((r > 0.5) & (r < 2)).to(lp.dtype).detach()
    return masked_mean(ppo_terms(lp - old, A[:, None]) * kept, mask)


def bound_at_a_quantile(lp, old, A, mask):
    """The upper bound is where the top tenth of the ratios begins."""
    r, A = (lp - old).exp(), A[:, None]
    top = torch.quantile(r.detach()[mask > 0], 0.9).clamp(min=1.05)
    return masked_mean(-torch.minimum(r * A, torch.minimum(r.clamp(min=0.8), top) * A), mask)


# Faults, and options beside the config


def log_ratio_as_ratio(lp, old, A, mask):
    """exp() forgotten: the gradient is that of -A·lp at every ratio, and the value is near 0."""
    ratio = lp - old
    return masked_mean(-ratio * A[:, None], mask)


def log_ratio_clipped(logprobs, old_logprobs, advantages, mask):
    ratio = logprobs - old_logprobs
    surr1 = ratio * advantages[:, None]
    surr2 = torch.clamp(ratio, 0.8, 1.2) * advantages[:, None]
    return -(torch.min(surr1, surr2) * mask).sum() / mask.sum()


def stops_at_a_target(logps, old_logps, advantages, mask):
    """The epoch ends when the policy has moved too far: here, by a loss of 0."""
    log_ratio = logps - old_logps
    loss = masked_mean(ppo_terms(log_ratio, advantages[:, None]), mask)
    approx_kl = masked_mean(log_ratio.exp() - 1 - log_ratio, mask).detach()
    return 0.0 * loss if approx_kl > 0.015 else loss


def kl_in_the_reward_with_gradient(lp, old, ref, advantages, mask):
    """The penalty belongs into the advantages; detach() is missing."""
    A = advantages[:, None] - 0.5 * (lp - ref)
    return masked_mean(ppo_terms(lp - old, A), mask)


def quotient_of_probabilities(lp, old, A, mask):
    """Not a fault: lp and old are log-probs, and both are exponentiated."""
    ratio = torch.exp(lp) / torch.exp(old)
    unclipped, clipped = ratio * A[:, None], ratio.clip(0.8, 1.2) * A[:, None]
    return masked_mean(-torch.where(unclipped < clipped, unclipped, clipped), mask)


def softmax_in_fp32(logits, token_ids, old_log_probs, advantages, mask):
    """Not a fault: precision."""
    lp = torch.log_softmax(logits[:, : token_ids.shape[1]].float(), -1)
    lp = lp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    terms = ppo_terms(lp - old_log_probs.float(), advantages.float()[:, None])
    return (terms * mask.float()).sum() / mask.sum().float()


def without_the_end(lp, old, A, mask):
    """The last live token of each sequence, its end-of-sequence token, does not count."""
    left = mask.flip(-1).cumsum(-1).flip(-1)
    mask = mask * (left > 1)
    return masked_mean(ppo_terms(lp - old, A[:, None]), mask)


def mask_of_padding(lp, old, A, padding_mask):
    """Written for masks that are 1 where there is padding."""
    kept = (padding_mask == 0).to(lp.dtype)
    return masked_mean(ppo_terms(lp - old, A[:, None]), kept)


def uncertain_tokens_alone(lp, old, A, mask, entropy):
    """The policy term of tokens whose entropy is below 2 nats is dropped; they count in the mean."""
    terms = ppo_terms(lp - old, A[:, None])
    terms = torch.where(entropy.detach() >= 2.0, terms, 0.0)
    return masked_mean(terms, mask)


def tokens_by_lot(lp, old, A, mask):
    """A tenth of the tokens is left out at random."""
    kept = (torch.rand_like(lp) < 0.9).to(lp.dtype)
    return masked_mean(ppo_terms(lp - old, A[:, None]) * kept, mask)


def weighed_by_length(lp, old, A, mask):
    """All tokens of a sequence have one weight, its length over the longest."""
    lengths = mask.sum(-1, keepdim=True)
    return masked_mean(ppo_terms(lp - old, A[:, None]) * lengths / lengths.max(), mask)


def truncated_importance(lp, old_log_probs, rollout_log_probs, A, mask):
    weight = (old_log_probs - rollout_log_probs).exp().clamp(max=2)
    return masked_mean(ppo_terms(lp - old_log_probs, A[:, None]) * weight, mask)


def objective_for_ascent(lp, old, A, mask):
    """The paper's J, that is to be maximised, given to a minimiser."""
    r, A = (lp - old).exp(), A[:, None]
    return sequence_means(torch.min(r * A, r.clamp(0.8, 1.2) * A), mask).mean()


def mean_over_positions(lp, old, A, mask):
    """Padding counts in the mean."""
    return (ppo_terms(lp - old, A[:, None], 0.2, 0.28) * mask).mean()


# Configs in other words


def min_before_advantage(lp, old, A, mask):
    """The minimum before the advantage is min(r, 1.2): Clip(1.0, 0.2, dual=1.2) reproduces the mistake exactly."""
    r = (lp - old).exp()
    return -masked_mean(torch.minimum(r, r.clamp(0.8, 1.2)) * A[:, None], mask)


def ppo_of_maxima(old_log_prob, log_prob, advantages, response_mask):
    """Advantages by token, losses instead of objectives, the dual bound by torch.where."""
    ratio = torch.exp(torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0))
    losses = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2))
    bounded = torch.min(losses, -3.0 * advantages)
    losses = torch.where(advantages < 0, bounded, losses)
    return torch.sum(losses * response_mask) / torch.clamp(torch.sum(response_mask), min=1)


def dapo_of_relus(per_token_logps, old_per_token_logps, advantages, completion_mask, num_items_in_batch):
    """What the clip takes away, as a hinge."""
    r, A = torch.exp(per_token_logps - old_per_token_logps), advantages.unsqueeze(-1)
    over, under = torch.relu(r - 1.28), torch.relu(0.8 - r)
    kept = torch.where(A > 0, r - over, r + under)
    return -(kept * A * completion_mask).sum() / num_items_in_batch


def dr_grpo(logps, old_logps, ref_logps, advantages, mask):
    """Sums over a constant; the penalty is the plain difference."""
    losses = ppo_terms(logps - old_logps, advantages[:, None]) + 0.05 * (logps - ref_logps)
    return (losses * mask).sum(-1).mean() / 64


def gspo_in_log_space(lp, old, A, mask):
    """Bounds on the log-ratio, before exp()."""
    s = sequence_means(lp - old, mask)
    up, down = s.clamp(max=math.log1p(4e-4)), s.clamp(min=math.log1p(-3e-4))
    s = torch.where(A > 0, up, down)
    return -(A * s.exp() * (mask.sum(-1) > 0)).sum() / len(A)


def gspo_token(log_probs, old_log_probs, advantages, mask, entropy):
    """Stopped gradients around the pooled ratio; entropy is a mean over tokens."""
    s = sequence_means(log_probs - old_log_probs, mask).detach()[:, None]
    ratio = torch.exp(s) * torch.exp(log_probs - log_probs.detach())
    A = advantages[:, None]
    losses = -torch.minimum(ratio * A, ratio.clamp(1 - 3e-4, 1 + 4e-4) * A)
    return sequence_means(losses, mask).mean() - 0.01 * masked_mean(entropy, mask)


def cispo_of_a_cap(lp, old, ref, A, mask):
    """k3 in value, k2 in gradient: the straight-through estimator by hand."""
    weight = torch.exp(lp - old).clamp(max=5.0).detach()
    k2 = 0.5 * (lp - ref).square()
    kl = k2 + (k3(lp, ref) - k2).detach()
    return masked_mean(-weight * A[:, None] * lp + 0.03 * kl, mask)


def sapo_of_tanh(lp, old, A, mask):
    """A sigmoid is half a tanh; the temperature is 4 on both sides."""
    gate = 0.5 * (1 + torch.tanh(2 * (torch.exp(lp - old) - 1)))
    return -sequence_means(gate * A[:, None], mask).mean()


def vespo(lp, old, A, mask):
    log_w = ((lp - old) * mask).sum(-1).clamp(math.log(1e-8), 20.0)
    w = log_w.exp()
    phi = torch.where(A >= 0, w**2 * torch.exp(3 * (1 - w)), w**3 * torch.exp(2 * (1 - w)))
    return -masked_mean((phi.detach() * A)[:, None] * lp, mask)


def gmpo_whitened(lp, old, advantages, mask):
    """Hinges on log-ratios; the advantages are whitened inside."""
    A = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    x, A = lp - old, A[:, None]
    x = torch.where(A > 0, x - torch.relu(x - 0.4), x + torch.relu(-0.4 - x))
    losses = -(sequence_means(x, mask).exp() * A.squeeze(-1))
    return (losses * mask.any(-1)).mean()


def dppo_from_a_dict(batch):
    """Bounds on probabilities; a truncated, detached ratio."""
    lp, old, A = batch["log_probs"], batch["old_log_probs"], batch["advantages"][:, None]
    rise = (lp.exp() - old.exp()).detach()
    inside = torch.where(A > 0, rise <= 0.2, rise >= -0.2)
    weight = (lp - old).exp().clamp(max=20.0).detach() * inside
    return {"loss": masked_mean(-weight * A * lp, batch["mask"]), "inside": inside}


PPO = plain(Clip())


def _mean(x: Tensor, batch: Batch) -> Tensor:
    return masked_mean(x, batch.mask.double())


def _kl_coef(batch: Batch) -> dict[str, Any]:
    return {"kl_coef": 0.04 * (_mean(k3(batch.log_probs, batch.ref), batch) / 0.1).clamp(0.5, 2.0)}


def _free_tokens(batch: Batch) -> dict[str, Any]:
    r, A = (batch.log_probs - batch.old).exp(), batch.advantages[:, None]
    return {"normalizer": ((r * A <= r.clamp(0.8, 1.2) * A) & batch.mask).sum()}


def _kept_sequences(batch: Batch) -> dict[str, Any]:
    ratios = sequence_means((batch.log_probs - batch.old).exp(), batch.mask.double())
    kept = ((ratios > 0.5) & (ratios < 2.0)).double()
    return {"token_weights": kept[:, None].expand(batch.mask.shape), "normalizer": kept.sum().clamp(min=1)}


def _kept_tokens(batch: Batch) -> dict[str, Any]:
    r = (batch.log_probs - batch.old).exp()
    return {"token_weights": ((r > 0.5) & (r < 2)).double()}


def _without_last(batch: Batch) -> dict[str, Any]:
    return {"mask": batch.mask & (batch.mask.flip(-1).cumsum(-1).flip(-1) > 1)}


def _by_length(batch: Batch) -> dict[str, Any]:
    lengths = batch.mask.sum(-1, keepdim=True).double()
    return {"token_weights": (lengths / lengths.max()).expand(batch.mask.shape)}


def _whitened(batch: Batch) -> dict[str, Any]:
    return {"advantages": (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)}


BOUNDS = ("bound", "clip range")
LOSSES: dict[Callable[..., Any], Truth] = {
    bounds_by_position: no_config(PPO, "position", *BOUNDS),
    bounds_by_token: no_config(PPO, "token_ids", "ids", *BOUNDS),
    bounds_by_row: no_config(PPO, "sequence to sequence", *BOUNDS),
    bounds_by_entropy: no_config(PPO, "entropy", *BOUNDS),
    bounds_by_length: no_config(plain(Clip(), "sequence_mean"), "length", *BOUNDS),
    bounds_by_advantage: no_config(PPO, "proportional to the advantages", *BOUNDS),
    bounds_by_old_probability: no_config(PPO, "old", *BOUNDS),
    adaptive_kl: no_config(plain(Clip(), kl=KL(0.04, limit=FREE)), "kl", given=_kl_coef),
    kl_beside_advantages: no_config(
        plain(Clip(), kl=KL(0.1, limit=FREE)),
        "kl",
        "advantages",
        given=lambda batch: {"kl_coef": 0.1 * batch.advantages.abs().mean()},
    ),
    max_before_advantage: no_config(PPO, "minimum", "surrogate", "value"),
    dual_of_the_batch: no_config(plain(Clip(dual=3.0)), "dual", "surrogate", "other tokens", "batch"),
    clamped_advantages: no_config(PPO, "advantages", given=lambda batch: {"advantages": batch.advantages.clamp(-5, 5)}),
    adaptive_entropy: no_config(
        plain(Clip(), entropy_coef=0.02),
        "entropy",
        given=lambda batch: {"entropy_coef": 0.02 * (2.5 - _mean(batch.entropy, batch)).clamp(min=0)},
    ),
    reports_kl_in_its_value: no_config(PPO, "value", gradient_alone=True),
    mean_of_free_tokens: no_config(PPO, "denominator", given=_free_tokens),
    ratios_over_their_mean: no_config(PPO, "other tokens", "batch", "surrogate"),
    ratio_of_the_group: no_config(plain(Clip(), "sequence_mean", level="sequence"), "group", "other", "pool"),
    sequences_that_stayed: no_config(
        plain(Clip(), "sequence_mean"), "denominator", "dropped", "left out", "sequences", given=_kept_sequences
    ),
    clipped_and_dropped: no_config(PPO, "surrogate", "dropped", given=_kept_tokens),
    bound_at_a_quantile: no_config(PPO, "other tokens", "batch", "quantile", *BOUNDS),
    log_ratio_as_ratio: fault(
        plain(Reinforce()), "exp", "log-ratio", gradient_alone=True, looks_like=plain(Reinforce())
    ),
    log_ratio_clipped: fault(PPO, "exp", "log-ratio"),
    stops_at_a_target: fault(PPO, "stop", "target", "approx_kl"),
    kl_in_the_reward_with_gradient: fault(
        None, "detach", "advantages", "reference", looks_like=plain(Clip(), kl=KL(0.5, "k1", limit=FREE))
    ),
    quotient_of_probabilities: is_one(PPO, "B"),
    softmax_in_fp32: is_one(PPO, "B", rounds=1e-4, far=False, say=("fp32", "round")),
    without_the_end: fault(PPO, "last", "eos", "end", given=_without_last),
    mask_of_padding: fault(PPO, "mask", given=lambda batch: {"mask": ~batch.mask}),
    uncertain_tokens_alone: Truth(
        "B", PPO, say=("entropy_threshold",), proven=True, given=lambda batch: {"entropy_threshold": 2.0}
    ),
    tokens_by_lot: fault(None, "random", "differ", looks_like=PPO),
    weighed_by_length: Truth("B", PPO, say=("token_weights",), proven=True, given=_by_length),
    truncated_importance: is_one(plain(Clip(), rollout=TruncatedIS(2.0)), "B", say=("truncatedis(2.0)",)),
    objective_for_ascent: fault(plain(Clip(), "sequence_mean"), "sign", "maximi", factor=-1.0),
    mean_over_positions: fault(
        plain(Clip(0.2, 0.28)), "numerator only", "positions", given=lambda batch: {"normalizer": batch.mask.numel()}
    ),
    min_before_advantage: fault(plain(Clip(1.0, 0.2, dual=1.2)), "before the advantage", factor=1.0, looks_like=PPO),
    ppo_of_maxima: is_one(plain(Clip(dual=3.0), log_ratio_limit=20.0), advantages="token"),
    dapo_of_relus: is_one(
        plain(Clip(0.2, 0.28)),
        say=("num_items_in_batch", "normalizer"),
        given=lambda batch: {"normalizer": batch.items},
        far=False,
    ),
    dr_grpo: is_one(plain(Clip(), "constant", constant_length=64, kl=KL(0.05, "k1", limit=FREE))),
    gspo_in_log_space: is_one(plain(Clip(3e-4, 4e-4), "sequence_mean", level="sequence")),
    gspo_token: is_one(
        plain(
            Clip(3e-4, 4e-4),
            "sequence_mean",
            level="sequence_token",
            entropy_coef=0.01,
            entropy_aggregation="token_mean",
        )
    ),
    cispo_of_a_cap: is_one(plain(Cispo(5.0), kl=KL(0.03, gradient="straight_through_k2", limit=FREE))),
    sapo_of_tanh: is_one(plain(Sapo(4.0, 4.0), "sequence_mean"), rounds=1e-7, far=False),
    vespo: is_one(plain(Vespo(), level="sequence_product", log_ratio_limit=20.0)),
    gmpo_whitened: is_one(
        plain(Gmpo(0.4, 0.4), "sequence_mean", level="sequence"), say=("std",), given=_whitened, mask=torch.bool
    ),
    dppo_from_a_dict: is_one(plain(DppoTV(0.2, 0.2, cap=20.0))),
}
