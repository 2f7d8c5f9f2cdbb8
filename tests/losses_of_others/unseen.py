"""Losses that ``match`` is judged on: of the same kinds as those of ``seen``, and none of them is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from grpo_kernels import KL, Cispo, Clip, DppoKL, Dro, LossConfig, MaskedIS, Reinforce, Sapo, Unclipped

from . import FREE, Batch, Truth, fault, is_one, masked_mean, no_config, plain, ppo_terms, sequence_means

# No config is one of these


def bounds_by_progress(lp, old, A, mask):
    """Tight at the begin of an answer, wide at its end, whatever its length."""
    done = mask.cumsum(-1) / mask.sum(-1, keepdim=True).clamp(min=1)
    low, high = 0.1 + 0.1 * done, 0.15 + 0.25 * done
    return sequence_means(ppo_terms(lp - old, A[:, None], low, high), mask).mean()


def kl_coef_of_a_controller(logps, old_logps, ref_logps, adv, mask):
    """A proportional controller inside of the loss, on k2."""
    k2 = 0.5 * (logps - ref_logps) ** 2
    error = ((masked_mean(k2, mask) / 0.2 - 1).detach()).clamp(-0.5, 0.5)
    return masked_mean(ppo_terms(logps - old_logps, adv[:, None]), mask) + 0.1 * (1 + error) * masked_mean(k2, mask)


def tempered_ratio(lp, old, A, mask):
    """The ratio to the power of a half."""
    return masked_mean(ppo_terms((lp - old) / 2.0, A[:, None], 0.1, 0.1), mask)


def squares_of_log_probs(lp, old, A, mask):
    """Weight decay on log-probs: k2 towards a reference whose log-probs are all 0."""
    return masked_mean(ppo_terms(lp - old, A[:, None]) + 0.005 * lp**2, mask)


def median_of_log_ratios(lp, old, A, mask):
    """One ratio a sequence, that of its middle token."""
    x = torch.where(mask > 0, lp - old, torch.inf)
    middle = ((mask.sum(-1) - 1).clamp(min=0) // 2).long()[:, None]
    x = x.sort(-1).values.gather(-1, middle).squeeze(-1)
    present = mask.sum(-1) > 0
    return (ppo_terms(torch.where(present, x, 0.0), A) * present).mean()


def exponential_weights(logprobs, advantages, mask):
    """Advantage-weighted regression."""
    weights = torch.exp(advantages / 0.5).clamp(max=20.0)
    return -masked_mean(weights[:, None] * logprobs, mask)


def reports_distance_in_its_value(lp, old, A, mask):
    """A term of old log-probs that has a value and no slope."""
    drift = 0.5 * (lp.detach() - old) ** 2
    return sequence_means(ppo_terms(lp - old, A[:, None], 0.2, 0.28) + drift, mask).mean()


def dropped_on_both_sides(lp, old, A, mask):
    """-r·A inside of (0.5, 2) and nothing outside. On-policy, with old as the sampler's, it is IcePop's mask."""
    r = (lp - old).exp()
    kept = ((r >= 0.5) & (r <= 2.0)).detach()
    return -masked_mean(torch.where(kept, r, 0.0) * A[:, None], mask)


# Faults, and options beside the config


def sequence_log_ratio_as_ratio(lp, old, A, mask):
    """exp() forgotten, of a ratio of sequences."""
    ratio = 1 + sequence_means(lp - old, mask)
    losses = torch.max(-ratio * A, -ratio.clamp(0.9, 1.1) * A)
    return (losses * (mask.sum(-1) > 0)).mean()


def skips_far_batches(logprobs, old_logprobs, advantages, mask):
    """The same stop, by k1, as a loss of its own."""
    approx_kl = masked_mean(old_logprobs - logprobs, mask).abs()
    if approx_kl.item() > 1.5 * 0.01:
        return (logprobs * 0).sum()
    return masked_mean(ppo_terms(logprobs - old_logprobs, advantages[:, None], 0.1, 0.1), mask)


def softmax_in_bf16(logits, token_ids, old_log_probs, advantages, mask):
    """Not a fault of the objective: what a loss under autocast computes."""
    log_p = F.log_softmax(logits[:, : token_ids.shape[1]].bfloat16(), dim=-1)
    lp = log_p.gather(-1, token_ids[..., None]).squeeze(-1).double()
    return -masked_mean((lp - old_log_probs).exp() * advantages[:, None], mask)


def without_one_token(lp, old, token_ids, A, mask):
    """Tokens with id 2 do not count, as if it were the end of a text."""
    mask = mask * (token_ids != 2)
    return (ppo_terms(lp - old, A[:, None]) * mask).sum() / mask.sum().clamp(min=1)


def top_fifth_by_entropy(lp, old, A, mask, entropy):
    """Only the fifth of the tokens that has the most entropy has a policy term."""
    threshold = torch.quantile(entropy.detach()[mask.bool()], 0.8)
    kept = entropy.detach() >= threshold
    return masked_mean(ppo_terms(lp - old, A[:, None], 0.2, 0.28) * kept, mask)


def weighed_by_index(lp, old, A, mask):
    """Sequences of the first half of the batch count twice."""
    weights = torch.where(torch.arange(len(lp)) < len(lp) // 2, 2.0, 1.0)
    return (sequence_means(ppo_terms(lp - old, A[:, None]), mask) * weights).mean()


def masked_importance(lp, old, sampling_logps, A, mask):
    weight = (old - sampling_logps).exp()
    weight = weight * ((weight >= 0.4) & (weight <= 3.0))
    return masked_mean(ppo_terms(lp - old, A[:, None]) * weight.detach(), mask)


def rewards_distance(lp, old, ref, A, mask):
    """The objective's minus, before a penalty that is a part of a loss already."""
    kl = 0.5 * (lp - ref).square()
    return sequence_means(ppo_terms(lp - old, A[:, None]) - 0.05 * kl, mask).mean()


def over_a_constant(lp, old, A, mask):
    """The sum over the batch, over a number that knows neither its tokens nor its sequences."""
    return (ppo_terms(lp - old, A[:, None]) * mask).sum() / 4096


# Configs in other words


def ppo_added_up(lp, old, ref, advantages, mask):
    """A Python loop over sequences; advantages by token; k2."""
    total = lp.new_zeros(())
    for row in range(len(lp)):
        live = mask[row].bool()
        terms = ppo_terms((lp - old)[row, live], advantages[row, live], 0.1, 0.3)
        total = total + terms.sum() + 0.1 * ((lp - ref)[row, live] ** 2 / 2).sum()
    return total / mask.sum()


def grpo_of_shifted_logits(logits, input_ids, old_log_probs, ref_log_probs, advantages, loss_mask):
    """cross_entropy as the log-prob, with the shift of causal models; the penalty is the absolute difference."""
    shifted, targets = logits[:, :-1], input_ids[:, 1:]
    lp = -F.cross_entropy(shifted.reshape(-1, shifted.shape[-1]), targets.reshape(-1), reduction="none")
    lp, mask = lp.view(targets.shape), loss_mask[:, 1:]
    losses = ppo_terms(lp - old_log_probs, advantages[:, None]) + 0.02 * (lp - ref_log_probs).abs()
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def cispo_of_a_band(lp, old, A, mask):
    """Token means inside of groups of four, as DAPO's paper has them; the band by torch.where."""
    r = (lp - old).exp().detach()
    r = torch.where(r < 0.7, 0.7, torch.where(r > 1.5, 1.5, r))
    losses = (-r * A[:, None] * lp * mask).view(-1, 4 * lp.shape[1]).sum(-1)
    return (losses / mask.view(-1, 4 * lp.shape[1]).sum(-1).clamp(min=1)).mean()


def dppo_of_kl(log_probs, old_log_probs, advantages, mask):
    """The divergence of two Bernoulli distributions, with a gradient through the ratio."""
    p, q = log_probs.detach().exp(), old_log_probs.exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    A = advantages[:, None]
    far = (kl > 0.05) & ((p - q) * A > 0)
    return -masked_mean(torch.where(far, 0.0, (log_probs - old_log_probs).exp() * A), mask)


def dro_of_flat_tensors(logprobs, old_logprobs, advantages, mask):
    """One dimension; advantages by token."""
    assert logprobs.dim() == 1
    x = logprobs - old_logprobs
    return -((advantages * logprobs - 0.03 / 2 * x.pow(2)) * mask).sum() / mask.sum()


def rloo_of_sequences(logps, old_logps, advantages, mask):
    """Log-probs of whole answers."""
    new, old = (logps * mask).sum(1), (torch.where(mask > 0, old_logps, 0.0)).sum(1)
    surr = torch.stack([(new - old).exp(), (new - old).exp().clamp(0.8, 1.2)]) * advantages
    return -torch.where(mask.any(-1), surr.amin(0), 0.0).mean()


def weighed_likelihood(logits, labels, advantages):
    """Supervised fine-tuning on answers, weighed; labels are -100 where nothing counts."""
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return (nll.sum(-1) * advantages).mean()


def sapo_of_sequences(lp, old, ref, A, mask, entropy):
    """The gate on GSPO's ratio; k1 in value and k2 in gradient; an entropy bonus with the same weights."""
    r = sequence_means(lp - old, mask).exp()
    tau = torch.where(A > 0, 1.0, torch.full_like(A, 1.05))
    gate = torch.sigmoid(tau * (r - 1)) * 4 / tau * A
    x = lp - ref
    kl = x.detach() + (x**2 - (x**2).detach()) / 2
    present = mask.sum(-1) > 0
    return (-gate * present + sequence_means(0.04 * kl - 0.003 * entropy, mask)).mean()


PPO = plain(Clip())


def _controlled(batch: Batch) -> dict[str, Any]:
    k2 = masked_mean(0.5 * (batch.log_probs - batch.ref) ** 2, batch.mask.double())
    return {"kl_coef": 0.1 * (1 + (k2 / 0.2 - 1).clamp(-0.5, 0.5))}


def _of_zeros(batch: Batch) -> dict[str, Any]:
    return {"ref_log_probs": torch.zeros_like(batch.ref)}


def _as_the_samplers(batch: Batch) -> dict[str, Any]:
    return {"old_log_probs": None, "rollout_log_probs": batch.old}


def _without_twos(batch: Batch) -> dict[str, Any]:
    return {"mask": batch.mask & (batch.token_ids != 2)}


def _top_fifth(batch: Batch) -> dict[str, Any]:
    return {"entropy_threshold": torch.quantile(batch.entropy[batch.mask], 0.8)}


def _by_index(batch: Batch) -> dict[str, Any]:
    rows = torch.arange(len(batch.mask))[:, None].expand(batch.mask.shape)
    return {"token_weights": torch.where(rows < len(batch.mask) // 2, 2.0, 1.0).double()}


BOUNDS = ("bound", "clip range")
LOSSES: dict[Callable[..., Any], Truth] = {
    bounds_by_progress: no_config(plain(Clip(), "sequence_mean"), "position", "length", *BOUNDS),
    kl_coef_of_a_controller: no_config(plain(Clip(), kl=KL(0.1, "k2", limit=FREE)), "kl", given=_controlled),
    tempered_ratio: no_config(plain(Clip(0.2, 0.2)), "surrogate", "power", "temper"),
    squares_of_log_probs: no_config(
        PPO, "log-prob", "reference", "zero", config=plain(Clip(), kl=KL(0.01, "k2", limit=FREE)), given=_of_zeros
    ),
    median_of_log_ratios: no_config(plain(Clip(), "sequence_mean", level="sequence"), "pool", "other tokens", "level"),
    exponential_weights: no_config(
        plain(Reinforce()),
        "advantages",
        given=lambda batch: {"advantages": torch.exp(batch.advantages / 0.5).clamp(max=20.0)},
    ),
    reports_distance_in_its_value: no_config(plain(Clip(0.2, 0.28), "sequence_mean"), "value", gradient_alone=True),
    dropped_on_both_sides: no_config(
        plain(Unclipped()),
        "maskedis",
        "surrogate",
        "dropped",
        config=plain(Unclipped(), rollout=MaskedIS(0.5, 2.0)),
        given=_as_the_samplers,
    ),
    sequence_log_ratio_as_ratio: fault(plain(Clip(0.1, 0.1), "sequence_mean", level="sequence"), "exp", "log-ratio"),
    skips_far_batches: fault(plain(Clip(0.1, 0.1)), "stop", "target", "approx_kl", "skip"),
    softmax_in_bf16: is_one(plain(Unclipped()), "B", rounds=0.1, far=False, say=("bf16", "round")),
    without_one_token: fault(PPO, "id 2", "token_ids", "ids", given=_without_twos),
    top_fifth_by_entropy: Truth("B", plain(Clip(0.2, 0.28)), say=("entropy_threshold",), proven=True, given=_top_fifth),
    weighed_by_index: Truth("B", plain(Clip(), "sequence_mean"), say=("token_weights",), proven=True, given=_by_index),
    masked_importance: is_one(plain(Clip(), rollout=MaskedIS(0.4, 3.0)), "B", say=("maskedis(0.4, 3.0)",)),
    rewards_distance: fault(
        plain(Clip(), "sequence_mean", kl=KL(0.05, "k2", limit=FREE)),
        "sign",
        "rewards",
        given=lambda batch: {"kl_coef": -0.05},
    ),
    over_a_constant: is_one(PPO, "B", say=("normalizer", "constant"), given=lambda batch: {"normalizer": 4096}),
    ppo_added_up: is_one(plain(Clip(0.1, 0.3), kl=KL(0.1, "k2", limit=FREE)), advantages="token"),
    grpo_of_shifted_logits: is_one(plain(Clip(), "sequence_mean", kl=KL(0.02, "abs", limit=FREE)), layout="unshifted"),
    cispo_of_a_band: is_one(plain(Cispo(low=0.3, high=0.5), "group_mean", group_size=4)),
    dppo_of_kl: is_one(plain(DppoKL(0.05, 0.05))),
    dro_of_flat_tensors: is_one(plain(Dro(0.03)), layout="flat", advantages="token"),
    rloo_of_sequences: is_one(plain(Clip(), "sequence_mean", level="sequence_product")),
    weighed_likelihood: is_one(LossConfig(Reinforce(), aggregation="sequence_sum"), layout="unshifted"),
    sapo_of_sequences: is_one(
        plain(
            Sapo(),
            "sequence_mean",
            level="sequence",
            entropy_coef=0.003,
            kl=KL(0.04, "k1", gradient="straight_through_k2", limit=FREE),
        )
    ),
}
