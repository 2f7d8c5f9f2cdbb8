"""match: losses as people write them, the configs that they are, and the faults that they have."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import random
import re
from unittest import mock

import pytest
import torch
from cases import RUNNING
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import (
    KL,
    Cispo,
    Clip,
    Divergence,
    DppoKL,
    DppoTV,
    Dro,
    Gmpo,
    LossConfig,
    Reinforce,
    Sapo,
    Teacher,
    TruncatedIS,
    Unclipped,
    Vespo,
    align,
    grpo_loss,
    match,
    policy_loss,
    shadow,
    token_log_probs,
)
from grpo_kernels.__main__ import main
from grpo_kernels.matching.batch import Inputs, standard_batch, users_batch
from grpo_kernels.matching.call import Caller, role_of
from grpo_kernels.matching.report import source_of
from grpo_kernels.verification import reference

DIGITS = 1e-8
"""Of confident tokens (ℓ = -1e-9) a softmax in float64 keeps seven digits; of others fifteen."""

# Losses as they are found in the wild, in our own words


def clipped(log_ratio, A, low=0.2, high=0.2):
    r = log_ratio.exp()
    return -torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)


def mean(x, mask):
    return (x * mask).sum() / mask.sum()


def rows(x, mask):
    return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def k3(lp, ref):
    return (ref - lp).exp() - (ref - lp) - 1


def hand_written(log_probs, old_log_probs, ref_log_probs, advantages, mask):
    terms = clipped(log_probs - old_log_probs, advantages[:, None], 0.2, 0.28) + 0.04 * k3(log_probs, ref_log_probs)
    return rows(terms, mask) / 4


def as_trl(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask, num_items_in_batch):
    """loss_type "dapo" with the bias-corrected KL."""
    x = per_token_logps - old_per_token_logps
    terms = clipped(x, advantages.unsqueeze(1)) + 0.04 * k3(per_token_logps, ref_per_token_logps) * x.exp()
    return (terms * completion_mask).sum() / num_items_in_batch


def as_trl_gspo(per_token_logps, old_per_token_logps, advantages, completion_mask):
    x = per_token_logps - old_per_token_logps
    pooled = ((x * completion_mask).sum(-1) / completion_mask.sum(-1).clamp(min=1)).unsqueeze(-1)
    return rows(clipped(pooled, advantages.unsqueeze(1), 3e-4, 4e-4), completion_mask)


def as_verl(old_log_prob, log_prob, advantages, response_mask):
    """vanilla: clamped log-ratio, dual clip, advantages of tokens."""
    inside = clipped((log_prob - old_log_prob).clamp(-20, 20), advantages, 0.2, 0.28)
    dual = torch.minimum(-3.0 * advantages, inside)
    return mean(torch.where(advantages < 0, dual, inside), response_mask), {"metric": 1.0}


def as_verl_gspo(old_log_prob, log_prob, advantages, response_mask):
    lengths = response_mask.sum(-1).clamp(min=1)
    pooled = ((log_prob - old_log_prob) * response_mask).sum(-1) / lengths
    x = (log_prob - log_prob.detach() + pooled.detach().unsqueeze(-1)).clamp(max=10.0)
    per_row = (clipped(x, advantages) * response_mask).sum(-1) / lengths
    return per_row.sum() / (response_mask.sum(-1) > 0).sum()


class AsOpenRLHF(torch.nn.Module):
    def forward(self, log_probs, old_log_probs, advantages, action_mask=None):
        terms = clipped((log_probs - old_log_probs).clamp(-20, 20), advantages, 0.1, 0.3)
        return mean(terms, action_mask), 0.0


def as_cleanrl(newlogprob, b_logprobs, mb_advantages, entropy):
    """Flat, without a mask; advantages whitened inside."""
    A = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    return clipped(newlogprob - b_logprobs, A, 0.1, 0.1).mean() - 0.01 * entropy.mean()


def from_logits(logits, input_ids, old_log_probs, advantages, loss_mask, temperature=1.0):
    lp = torch.log_softmax(logits[:, :-1] / temperature, -1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return mean(clipped(lp - old_log_probs, advantages[:, None]), loss_mask[:, 1:])


def from_a_dict(batch):
    terms = clipped(batch["logps"] - batch["old_per_token_logps"], batch["advantages"][:, None])
    return {"loss": mean(terms, batch["completion_mask"]), "other": 1}


def rloo(lp, old, A, mask):
    pooled = ((lp - old) * mask).sum(-1)
    present = (mask.sum(-1) > 0).double()
    return (clipped(pooled, A) * present).mean()


def reinforce(logps, advantages, mask):
    return -(logps * advantages[:, None] * mask).sum() / 64 / len(logps)


def on_policy(logps, advantages, mask):
    return -mean((logps - logps.detach()).exp() * advantages[:, None], mask)


def indexing(logprobs, old_logprobs, advantages, action_mask):
    """Wants a bool mask."""
    return clipped(logprobs - old_logprobs, advantages[:, None].expand_as(logprobs))[action_mask].mean()


def gmpo(lp, old, A, mask):
    """A clip of tokens inside of the pooled ratio; on tokens that all agree it is GSPO."""
    x, A = lp - old, A[:, None]
    kept = torch.where(A > 0, torch.minimum(x, x.clamp(-0.4, 0.4)), torch.maximum(x, x.clamp(-0.4, 0.4)))
    pooled = ((kept * mask).sum(-1) / mask.sum(-1).clamp(min=1)).exp()
    return -(pooled * A.squeeze(-1) * (mask.sum(-1) > 0)).mean()


def as_trl_cispo(lp, old, A, mask):
    return mean(-(lp - old).exp().clamp(max=5).detach() * A[:, None] * lp, mask)


def truncated_weights(lp, old, rollout_log_probs, A, mask):
    """verl's correction for the sampler."""
    weight = (old - rollout_log_probs).exp().clamp(max=2.0)
    return mean(clipped(lp - old, A[:, None]) * weight, mask)


NO_LIMIT = {"log_ratio_limit": None}
FREE = (None, None)
KNOWN = {
    hand_written: (LossConfig(Clip(0.2, 0.28), kl=KL(0.04, limit=FREE), **NO_LIMIT), 0.25, None),
    as_trl: (
        LossConfig(Clip(), aggregation="token_mean", kl=KL(0.04, ratio_weighted=True, limit=FREE), **NO_LIMIT),
        1.0,
        "num_items_in_batch",
    ),
    as_trl_gspo: (LossConfig(Clip(3e-4, 4e-4), level="sequence", **NO_LIMIT), 1.0, None),
    as_verl: (LossConfig(Clip(0.2, 0.28, dual=3.0), aggregation="token_mean"), 1.0, None),
    as_verl_gspo: (
        LossConfig(Clip(dual=math.exp(10)), level="sequence_token", **NO_LIMIT),
        1.0,
        "mask.any(-1).sum()",
    ),
    AsOpenRLHF(): (LossConfig(Clip(0.1, 0.3), aggregation="token_mean"), 1.0, None),
    as_cleanrl: (LossConfig(Clip(0.1, 0.1), aggregation="token_mean", entropy_coef=0.01, **NO_LIMIT), 1.0, None),
    from_logits: (LossConfig(Clip(), aggregation="token_mean", **NO_LIMIT), 1.0, None),
    from_a_dict: (LossConfig(Clip(), aggregation="token_mean", **NO_LIMIT), 1.0, None),
    gmpo: (LossConfig(Gmpo(0.4, 0.4), level="sequence", **NO_LIMIT), 1.0, None),
    as_trl_cispo: (LossConfig(Cispo(5.0), aggregation="token_mean"), 1.0, None),
    rloo: (LossConfig(Clip(), level="sequence_product", **NO_LIMIT), 1.0, None),
    reinforce: (LossConfig(Reinforce(), aggregation="constant", constant_length=64), 1.0, None),
    on_policy: (LossConfig(Unclipped(), aggregation="token_mean"), 1.0, None),
    indexing: (LossConfig(Clip(), aggregation="token_mean", **NO_LIMIT), 1.0, None),
    truncated_weights: (
        LossConfig(Clip(), aggregation="token_mean", rollout=TruncatedIS(2.0), **NO_LIMIT),
        1.0,
        None,
    ),
}


@pytest.mark.parametrize("loss", KNOWN, ids=lambda loss: getattr(loss, "__name__", type(loss).__name__))
def test_losses_of_the_wild(loss):
    config, factor, normalizer = KNOWN[loss]
    report = match(loss)
    assert report.matched, str(report)
    assert report.config == config
    assert report.factor == factor
    assert report.normalizer == normalizer
    assert report.gradient_difference < DIGITS
    assert report.loss_difference < DIGITS
    assert str(report).startswith(f"your loss is {source_of(config)}")


def test_the_sentence_of_the_first_screen():
    text = str(match(hand_written))
    kl = "kl=KL(0.04, limit=(None, None)), log_ratio_limit=None)"
    first = f'your loss is LossConfig(Clip(0.2, 0.28), aggregation="sequence_mean", {kl}, divided by 4'
    assert text.splitlines()[0] == first
    assert (
        eval(match(hand_written).paste(), {"LossConfig": LossConfig, "Clip": Clip, "KL": KL}) == KNOWN[hand_written][0]
    )


# Whatever a config can say, match reads back

SURROGATES = (Clip(0.2, 0.2), Clip(0.1, 0.3, dual=3.0), Clip(3e-4, 4e-4), Clip(1.0, 5.0), Unclipped(), Reinforce())
LEVELS = ("token", "sequence", "sequence_product")
AGGREGATIONS = (
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "sequence_sum"},
    {"aggregation": "constant", "constant_length": 64},
    {"aggregation": "group_mean", "group_size": 2},
    {"aggregation": "group_mean", "group_size": 4},
)
PENALTIES = (
    KL(), KL(0.04), KL(0.04, limit=(None, None)), KL(0.1, "k1"), KL(0.1, "k2"), KL(0.5, limit=(20.0, 10.0)),
    KL(0.04, ratio_weighted=True), KL(0.1, "k1", ratio_weighted=True), KL(0.1, "k2", ratio_weighted=True),
    KL(0.02, gradient="straight_through_k2"), KL(0.02, "k1", gradient="straight_through_k2"),
)  # fmt: skip


def every_config():
    """Pruned to what differs: a product of levels and surrogates that have no ratio is refused anyway."""
    for surrogate, level, aggregation, kl in itertools.product(SURROGATES, LEVELS, AGGREGATIONS, PENALTIES):
        if surrogate.uses_ratio or (level == "token" and not kl.ratio_weighted):
            for limit, entropy in ((20.0, 0.0), (None, 0.01), (10.0, 0.0)):
                limit = limit if surrogate.uses_ratio else 20.0
                yield LossConfig(surrogate, level, kl=kl, log_ratio_limit=limit, entropy_coef=entropy, **aggregation)


def no_metrics(*given):
    """A sixth of the reference's time, and nobody reads them."""


def read_back(config, temperature=0.8):
    def loss(logits, token_ids, advantages, mask, old_log_probs, ref_log_probs):
        known = {"old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs, "temperature": temperature}
        return reference.grpo_loss(logits, token_ids, advantages, mask, config=config, **known).loss

    with mock.patch.object(reference, "metrics_of", no_metrics):
        report = match(loss)
    assert report.matched, str(report)
    assert source_of(report.config) == source_of(config), str(report)
    assert report.temperature == temperature
    assert report.gradient_difference < 1e-9


CONFIGS = random.Random(0).sample(list(every_config()), 18)


@pytest.mark.parametrize(
    "config",
    [pytest.param(config, marks=pytest.mark.nightly if n % 6 else ()) for n, config in enumerate(CONFIGS)],
    ids=source_of,
)
def test_configs_are_read_back(config):
    """The reference is the loss: the search must find the config that it was given."""
    read_back(config)


@pytest.mark.nightly
@pytest.mark.parametrize("config", random.Random(1).sample(list(every_config()), 600), ids=source_of)
def test_more_configs_are_read_back(config):
    read_back(config)


OTHERS = (
    *((Cispo(5.0), "token"), (Cispo(0.2), "token"), (Cispo(low=0.2, high=0.28), "token"), (Cispo(3.0), "sequence")),
    *((Sapo(), "token"), (Sapo(0.7, 2.0), "sequence"), (Vespo(), "sequence_product"), (Dro(0.01), "token")),
    *((Vespo(1.5, 2.0, 2.5, 1.0), "sequence_product"), (Gmpo(), "sequence"), (Gmpo(0.1, 0.2), "sequence")),
    *((DppoTV(0.2, 0.15), "token"), (DppoTV(0.1, 0.05, cap=3.0), "token"), (DppoKL(0.05, 0.02, cap=20.0), "token")),
)


def others():
    """The first of each class for every change."""
    for n, (surrogate, level) in enumerate(OTHERS):
        met = any(type(other) is type(surrogate) for other, _ in OTHERS[:n])
        yield pytest.param(surrogate, level, marks=[pytest.mark.nightly] if met else [], id=f"{surrogate}-{level}")


@pytest.mark.parametrize(("surrogate", "level"), others())
def test_other_surrogates_are_read_back(surrogate, level):
    """Curves that do not just stop at a bound of the ratio."""
    aggregation = "token_mean" if level == "token" else "sequence_mean"
    read_back(LossConfig(surrogate, level, aggregation, KL(0.04, limit=FREE)), temperature=1.0)


OTHER_KLS = (
    KL(0.1, "abs", limit=FREE), KL(0.1, "k1", "score_function", limit=FREE), KL(0.1, "k1", "weighted_k2", limit=FREE),
    KL(0.1, "abs", ratio_weighted=True, limit=FREE), KL(0.1, "k2", "score_function", limit=FREE),
    KL(0.1, "k3", "weighted_k2", limit=FREE, ratio_cap=5.0),
)  # fmt: skip
"""The first of each gradient for every change."""


@pytest.mark.parametrize(
    "kl", [*OTHER_KLS[:3], *(pytest.param(kl, marks=pytest.mark.nightly) for kl in OTHER_KLS[3:])], ids=str
)
def test_other_kl_gradients_are_read_back(kl):
    read_back(LossConfig(kl=kl, log_ratio_limit=None))


def prefixes():
    """Surrogates and levels of prefixes, in turn with aggregations, KLs, limits and entropy bonuses."""
    surrogates = [*(one for one in SURROGATES if one.uses_ratio), Vespo(), Sapo(), Cispo(low=0.2, high=0.28)]
    for n, (surrogate, level) in enumerate(itertools.product(surrogates, RUNNING)):
        kl, aggregation = PENALTIES[n % len(PENALTIES)], AGGREGATIONS[n % len(AGGREGATIONS)]
        limit = 20.0 if isinstance(surrogate, (Vespo, Sapo, Cispo)) else (20.0, None, 10.0)[n % 3]
        more = {"log_ratio_limit": limit, "entropy_coef": 0.01 * (n % 2)}
        config = LossConfig(surrogate, level, kl=kl, **more, **aggregation)
        yield pytest.param(config, marks=[] if n % 16 == 0 else [pytest.mark.nightly], id=source_of(config))


@pytest.mark.parametrize("config", prefixes())
def test_levels_of_prefixes_are_read_back(config):
    read_back(config)


SAMPLERS = (
    KL(0.1), KL(0.1, "k2", limit=FREE), KL(0.1, "k1", limit=FREE), KL(0.1, "abs", limit=FREE),
    KL(0.5, limit=(20.0, 10.0)), KL(0.1, ratio_weighted=True, limit=FREE), KL(0.02, gradient="straight_through_k2"),
    KL(0.1, "k2", "score_function", limit=FREE), KL(0.1, "k3", "weighted_k2", limit=FREE, ratio_cap=5.0),
)  # fmt: skip


def samplers():
    for n, kl in enumerate(SAMPLERS):
        yield pytest.param(kl, marks=[] if n in (0, 4) else [pytest.mark.nightly], id=str(kl))


@pytest.mark.parametrize("to", ["rollout_log_probs", "old_log_probs"])
@pytest.mark.parametrize("kl", samplers())
def test_kls_to_the_sampler_are_read_back(kl, to):
    """Beside one to the reference; to the old policy where the loss knows no other sampler."""
    reference_kl = KL(0.02, "k2", limit=FREE)
    config = LossConfig(Clip(0.2, 0.28), aggregation="token_mean", kl=reference_kl, rollout_kl=kl, log_ratio_limit=None)

    def loss(log_probs, token_ids, advantages, mask, old_log_probs, ref_log_probs, rollout_log_probs=None):
        given = {"old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs, "config": config}
        return policy_loss(log_probs, advantages, mask, rollout_log_probs=rollout_log_probs, **given).loss

    def beside_a_sampler(log_probs, token_ids, advantages, mask, old_log_probs, ref_log_probs, rollout_log_probs):
        return loss(log_probs, token_ids, advantages, mask, old_log_probs, ref_log_probs, rollout_log_probs)

    report = match(loss if to == "old_log_probs" else beside_a_sampler)
    assert report.matched, str(report)
    assert source_of(report.config) == source_of(config), str(report)
    assert ("rollout_log_probs=rollout_log_probs" in report.lines[-1]) == (to == "rollout_log_probs")


def of_rows(p, q, kind, mix=None):
    """Divergences (B, T) of log-probs of whole rows, as they are written by hand."""

    def kl(one, other):
        return (one.exp() * (one - other)).sum(-1)

    if kind == "tvd":
        return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
    if kind in ("reverse_kl", "forward_kl"):
        return kl(p, q) if kind == "reverse_kl" else kl(q, p)
    if kind == "mixed_kl":
        return mix * kl(q, p) + (1 - mix) * kl(p, q)
    if kind == "jsd":
        middle = ((1 - mix) * p.exp() + mix * q.exp()).log()
        return mix * kl(q, middle) + (1 - mix) * kl(p, middle)
    one, other = (q, p) if kind == "skew_forward_kl" else (p, q)
    return kl(one, (mix * one.exp() + (1 - mix) * other.exp()).log())


def beside_a_teacher(divergence, coef=0.05):
    """A loss with a policy term and ``coef`` times what ``divergence`` makes of rows of log-probs, at a temperature."""

    def loss(logits, teacher_logits, input_ids, old_log_probs, advantages, mask):
        policy, other = ((rows[:, :-1] / 0.8).log_softmax(-1) for rows in (logits, teacher_logits))
        lp = policy.gather(-1, input_ids[..., None]).squeeze(-1)
        terms = clipped(lp - old_log_probs, advantages[:, None], 0.2, 0.28) + coef * divergence(policy, other)
        return rows(terms, mask)

    return loss


DIVERGENCES = (
    *(Divergence(kind, 0.05) for kind in ("reverse_kl", "forward_kl", "tvd")),
    *(Divergence(kind, 0.05, 0.3) for kind in ("mixed_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")),
)


def divergences():
    for n, divergence in enumerate(DIVERGENCES):
        yield pytest.param(divergence, marks=[] if n % 4 == 0 else [pytest.mark.nightly], id=divergence.kind)


@pytest.mark.parametrize("divergence", divergences())
def test_divergences_from_a_teacher_are_read_back(divergence):
    report = match(beside_a_teacher(lambda p, q: of_rows(p, q, divergence.kind, divergence.mix)))
    assert report.matched, str(report)
    assert report.config == LossConfig(
        Clip(0.2, 0.28), aggregation="sequence_mean", log_ratio_limit=None, divergence=divergence
    )
    assert report.temperature == 0.8
    assert "teacher=Teacher(logits=teacher_logits)" in report.lines[-1]
    assert "Teacher" in report.lines[0]
    assert eval(report.paste()) == report.config


def test_rows_of_a_teacher_meet_rows_of_the_policy():
    def loss(lp, old, A, mask, teacher_logits):
        return mean(clipped(lp - old, A[:, None]), mask) + 0 * teacher_logits.sum()

    with pytest.raises(ValueError, match="the loss takes teacher_logits beside log-probs: .* the policy's logits"):
        match(loss)
    report = match(lambda lp, old, A, mask, teacher_logits=None: mean(clipped(lp - old, A[:, None]), mask))
    assert report.matched
    assert "left at their defaults: teacher_logits" in report.notes


@pytest.mark.nightly
def test_what_is_no_divergence_of_ours():
    """The wrong sign is a fault; a sum over some columns, another temperature and a cross-entropy's value are told."""

    def likeliest(p, q):
        top, ids = q.topk(4, -1)
        return (top.exp() * (top - p.gather(-1, ids))).sum(-1)

    wrong = match(beside_a_teacher(lambda p, q: of_rows(p, q, "reverse_kl"), -0.05))
    assert wrong.faults == ("the sign of the divergence is wrong: it rewards distance from the teacher",)
    assert wrong.config.divergence == Divergence("reverse_kl", 0.05)
    some = match(beside_a_teacher(likeliest))
    assert not some
    assert "the teacher's rows enter in no way that match knows" in some.strange[0]
    entropy = match(beside_a_teacher(lambda p, q: -(q.exp() * p).sum(-1)))
    assert not entropy
    assert entropy.config.divergence == Divergence("forward_kl", 0.05)
    assert "the gradient is that of the config, the value is not" in entropy.strange[0]
    cut = match(beside_a_teacher(lambda p, q: of_rows(p, q.masked_fill(q < p.detach() - 1, -torch.inf), "reverse_kl")))
    assert "the teacher's rows enter in no way that match knows (off by inf%)" in cut.strange[0]
    assert not match(beside_a_teacher(lambda p, q: of_rows(p, (q / 2).log_softmax(-1), "reverse_kl")))
    assert match(beside_a_teacher(lambda p, q: 0.0 * q.sum(-1))).config.divergence is None


def test_a_cap_below_one_is_told():
    """TRL's loss_type="cispo" with the default of epsilon_high."""
    config = LossConfig(Cispo(0.2), aggregation="token_mean")

    def loss(logits, token_ids, advantages, mask, old_log_probs):
        given = {"old_log_probs": old_log_probs, "config": config}
        return reference.grpo_loss(logits, token_ids, advantages, mask, **given).loss

    report = match(loss)
    assert report.matched
    config = dataclasses.replace(config, level="sequence", aggregation="sequence_mean")
    assert match(loss).config.level == "sequence"
    assert any("the cap of the ratio is 0.2, below 1" in note for note in report.notes)


def test_a_weight_that_stops_on_both_sides_is_no_crash():
    def loss(lp, old, A, mask):
        ratio = (lp - old).exp().detach()
        return -(A[:, None] * lp * ((ratio > 0.5) & (ratio < 2)) * mask).sum() / mask.sum()

    assert not match(loss)


# Faults


def quotient(lp, old, A, mask):
    r = lp / old
    return mean(-torch.minimum(r * A[:, None], r.clamp(0.8, 1.2) * A[:, None]), mask)


def inverted(lp, old, A, mask):
    return mean(clipped(old - lp, A[:, None]), mask)


def ascent(lp, old, A, mask):
    return -mean(clipped(lp - old, A[:, None]), mask)


def optimistic(lp, old, A, mask):
    r = (lp - old).exp()
    return mean(torch.minimum(-r * A[:, None], -r.clamp(0.8, 1.2) * A[:, None]), mask)


def without_min(lp, old, A, mask):
    return mean(-(lp - old).exp().clamp(0.8, 1.2) * A[:, None], mask)


def numerator_only(lp, old, A, mask):
    return (clipped(lp - old, A[:, None]) * mask).mean()


def denominator_only(lp, old, A, mask):
    return clipped(lp - old, A[:, None]).sum() / mask.sum()


def empty_is_nan(lp, old, A, mask):
    return ((clipped(lp - old, A[:, None]) * mask).sum(-1) / mask.sum(-1)).mean()


def shifted_mask(lp, old, A, mask):
    return mean(clipped(lp - old, A[:, None])[:, :-1], mask[:, 1:])


def shifted_old(lp, old, A, mask):
    return mean(clipped(lp[:, 1:] - old[:, :-1], A[:, None]), mask[:, 1:])


def own_tokens(logits, input_ids, old, A, mask):
    lp = torch.log_softmax(logits[:, :-1], -1).gather(-1, input_ids[:, :-1, None]).squeeze(-1)
    return mean(clipped(lp - old, A[:, None]), mask[:, 1:])


def cold(logits, token_ids, old, A, mask, temperature):
    lp = torch.log_softmax(logits[:, : token_ids.shape[1]], -1).gather(-1, token_ids[..., None]).squeeze(-1)
    return mean(clipped(lp - old, A[:, None]), mask)


def exchanged_kl(lp, old, ref, A, mask):
    return mean(clipped(lp - old, A[:, None]) + 0.1 * k3(ref, lp), mask)


def ignores_old(lp, old, A, mask):
    return mean(clipped(lp - lp.detach(), A[:, None]) + 0 * old, mask)


def rewarded_distance(lp, old, ref, A, mask):
    return mean(clipped(lp - old, A[:, None]) - 0.1 * k3(lp, ref), mask)


def unmasked_kl(lp, old, ref, A, mask):
    return mean(clipped(lp - old, A[:, None]), mask) + 0.1 * k3(lp, ref).mean()


def unmasked_entropy(lp, old, A, mask, entropy):
    return mean(clipped(lp - old, A[:, None]), mask) - 0.1 * entropy.mean()


def off_by_one(lp, old, A, mask):
    return mean(clipped(lp - old, A[:, None])[:, :-1], mask[:, :-1])


FAULTS = {
    ignores_old: ("old_log_probs have no effect", True),
    rewarded_distance: ("the sign of the KL term is wrong", True),
    unmasked_kl: ("the KL term is not masked", False),
    unmasked_entropy: ("the entropy term is not masked", False),
    off_by_one: ("the last column of the batch is left out", True),
    quotient: ("quotient of log-probs", True),
    inverted: ("inverted", True),
    ascent: ("the sign is wrong", True),
    optimistic: ("the clip takes the larger", False),
    without_min: ("clipped without the minimum", False),
    numerator_only: ("mask in the numerator only", True),
    denominator_only: ("mask in the denominator only", True),
    empty_is_nan: ("a sequence without tokens makes the loss", True),
    shifted_mask: ("tokens shifted by one: the mask at t+1", True),
    shifted_old: ("tokens shifted by one: the log-prob at t is compared with the old log-prob at t-1", True),
    own_tokens: ("tokens shifted by one: row t of the logits is scored with its own input token", True),
    cold: ("missing temperature: the sampler's is 0.7", True),
    exchanged_kl: ("the KL term has log-probs and reference exchanged", False),
}


@pytest.mark.parametrize("loss", FAULTS, ids=lambda loss: loss.__name__)
def test_faults_are_named(loss):
    """And reproduced where ours can be given the same fault, so that the name is proven, not guessed."""
    said, reproduced = FAULTS[loss]
    report = match(loss)
    assert not report
    assert len(report.faults) == 1, report.faults
    assert report.faults[0].startswith(said) or said in report.faults[0]
    assert (report.gradient_difference < DIGITS) == reproduced, str(report)
    assert loss is ignores_old or report.config.surrogate == Clip(0.2, 0.2), str(report)
    text = str(report)
    assert said in text
    assert text.startswith("your loss has a fault" if reproduced else "no config reproduces your loss")


@pytest.mark.nightly
def test_temperature_that_was_said():
    """A loss on logits without the sampler's temperature is a fault only if the sampler had one."""

    def undivided(logits, input_ids, old_log_probs, advantages, loss_mask):
        return from_logits(logits, input_ids, old_log_probs, advantages, loss_mask)

    def divided(logits, input_ids, old_log_probs, advantages, loss_mask):
        return from_logits(logits, input_ids, old_log_probs, advantages, loss_mask, 0.9)

    assert match(divided, temperature=0.9)
    assert match(divided).temperature == 0.9
    assert "missing temperature: the sampler's is 0.9" in str(match(undivided, temperature=0.9))
    assert match(undivided)
    assert "another temperature" in str(match(divided, temperature=0.8))
    for loss in (divided, undivided):
        assert "temperature=0.8)" in match(loss, temperature=0.8).lines[-1]
    assert "temperature=temperature)" in match(cold).lines[-1]


# The nearest config, and where it parts


def test_unknown_surrogate():
    def halved(lp, old, A, mask):
        ratio = (lp - old).exp().detach()
        return mean(-torch.where(ratio > 5, 2.5, ratio) * A[:, None] * lp, mask)

    report = match(halved)
    assert not report
    assert not report.faults
    assert report.strange[0].startswith("the policy term is none of the surrogates")
    assert any("ratio > 5.21 and A > 0: your slope is -2.5·|A|" in region for region in report.regions)
    assert report.tokens
    assert all(token.ratio > 5 for token in report.tokens)


def test_tokens_that_differ():
    def dual_too_low(lp, old, A, mask):
        inside = clipped(lp - old, A[:, None])
        return mean(torch.where(A[:, None] < 0, torch.minimum(-1.1 * A[:, None], inside), inside) * (1 + 0 * lp), mask)

    report = match(dual_too_low)
    assert not report
    assert report.tokens
    assert all(token.ratio > 1.1 and token.advantage < 0 and token.yours == 0 for token in report.tokens)
    assert any("A < 0: yours is clipped" in region for region in report.regions)


def test_kl_with_weights_of_its_own():
    def loss(lp, old, ref_logprobs, A, mask):
        return rows(clipped(lp - old, A[:, None]), mask) + 0.05 * mean(k3(lp, ref_logprobs), mask)

    report = match(loss)
    assert not report
    assert "aggregation of its own (per token, over tokens)" in report.strange[0]
    assert report.config.kl.coef == 0.05


def by_the_longest(lp, old, A, mask):
    return (clipped(lp - old, A[:, None]) * mask).sum() / (len(mask) * mask.sum(-1).max())


def by_the_root(lp, old, A, mask):
    return (clipped(lp - old, A[:, None]) * mask).sum() / mask.sum().sqrt()


def by_position(lp, old, A, mask):
    """Later tokens weigh less."""
    discount = 0.9 ** torch.arange(lp.shape[1])
    return mean(clipped(lp - old, A[:, None]) * discount, mask)


def floored_weights(lp, old, rollout_log_probs, A, mask):
    """Beyond the bound something is left, and it is not the bound."""
    weight = (old - rollout_log_probs).exp()
    return mean(clipped(lp - old, A[:, None]) * torch.where(weight > 2, 0.1, weight), mask)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (by_the_longest, "the denominator is no count"),
        (by_the_root, "the denominator is no count"),
        (by_position, "follow no known aggregation"),
        (floored_weights, "weighed by the sampler's log-probs"),
    ],
)
def test_losses_that_only_look_like_one_of_ours(loss, said):
    report = match(loss)
    assert not report, str(report)
    assert str(report).startswith("no config reproduces your loss")
    if said is not None:
        assert any(said in reason for reason in report.strange), report.strange


def test_clamped_advantages():
    def loss(lp, old, A, mask):
        return mean(clipped(lp - old, A.clamp(-5, 5)[:, None]), mask)

    assert "not proportional to the advantages" in str(match(loss))


def test_kl_in_the_advantages():
    def loss(lp, old, ref, A, mask):
        A = A[:, None] - 0.04 * (lp - ref).detach()
        A = (A - mean(A, mask)) / (mean((A - mean(A, mask)) ** 2, mask) + 1e-8).sqrt()
        return mean(clipped(lp - old, A), mask)

    report = match(loss)
    assert not report
    assert report.strange


def test_labels_carry_the_mask():
    def loss(logits, labels, old_log_probs, advantages):
        mask = (labels[:, 1:] != -100).double()
        ids = labels[:, 1:].clamp(min=0)
        lp = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[..., None]).squeeze(-1)
        return rows(clipped(lp - old_log_probs, advantages[:, None]), mask)

    report = match(loss)
    assert report, str(report)
    assert report.config == LossConfig(Clip(), **NO_LIMIT)


@pytest.mark.parametrize("unbiased", [True, False])
def test_advantages_that_are_normalised_by_group(unbiased):
    def loss(lp, old, A, mask):
        groups = A.view(-1, 4)
        spread = groups.std(-1, keepdim=True, unbiased=unbiased) + 1e-4
        A = ((groups - groups.mean(-1, keepdim=True)) / spread).flatten()
        return rows(clipped(lp - old, A[:, None]), mask)

    report = match(loss)
    assert report, str(report)
    std = "sample" if unbiased else "population"
    assert any(f"(A - mean) / (std + 0.0001) over groups of 4, {std} std" in note for note in report.notes)


def test_optional_parameters_are_told():
    def loss(lp, old, A, mask, rollout_log_probs=None):
        return mean(clipped(lp - old, A[:, None]), mask)

    assert "left at their defaults: rollout_log_probs" in str(match(loss))


def test_switches_are_no_tensors():
    """Parameters whose defaults are bools or text stay at them, whatever tensor their names recall."""

    def loss(
        log_probs, old_log_probs, advantages, mask, whiten_advantages=False, return_entropy=False, ids="none",
        use_response_mask=True, return_log_probs=False, ref="sft", rollout="vllm",
    ):  # fmt: skip
        switches = (whiten_advantages, return_entropy, ids, use_response_mask, return_log_probs, ref, rollout)
        assert switches == (False, False, "none", True, False, "sft", "vllm")
        return mean(clipped(log_probs - old_log_probs, advantages[:, None]), mask)

    assert match(loss)
    meant = {"ref": "ref_log_probs"}
    assert Caller(loss, meant).roles == {**Caller(loss).roles, **meant}


@pytest.mark.parametrize("loss", [grpo_loss, policy_loss, reference.grpo_loss], ids=lambda loss: loss.__module__)
def test_our_own_losses(loss):
    report = match(loss)
    assert report, str(report)
    assert report.config == LossConfig()


def test_the_sampler_as_the_old_policy():
    def loss(lp, generation_logprobs, A, mask):
        return mean(clipped(lp - generation_logprobs, A[:, None]), mask)

    assert match(loss).config.surrogate == Clip()


def test_nan_at_masked_tokens():
    """0 · inf: old log-probs of -inf where the mask is 0, as samplers leave them."""
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 1])[:, None]

    def loss(logprobs, old_logprobs, advantages, mask):
        return mean(clipped(logprobs - old_logprobs, advantages[:, None]), mask)

    old = torch.where(mask, -1.0, -torch.inf)
    report = match(loss, {"log_probs": -torch.rand(4, 5) - 0.5, "mask": mask, "old_log_probs": old})
    assert not report
    assert report.gradient_difference == torch.inf
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["gradient_difference"] is None


@pytest.mark.parametrize("limit", [2.0, 5.0])
def test_narrow_limits(limit):
    def loss(lp, old, A, mask):
        return mean(clipped((lp - old).clamp(-limit, limit), A[:, None]), mask)

    report = match(loss)
    assert report, str(report)
    assert report.config.log_ratio_limit == limit
    assert report.config.surrogate == Clip()


@pytest.mark.parametrize("limit", [7.0, 10.0])
def test_a_clamp_of_log_ratios_from_above_alone(limit):
    """It is a dual bound, exactly; clamped on both sides, ratios next to 0 lose a slope that the loss has."""

    def loss(lp, old, A, mask):
        return mean(clipped((lp - old).clamp(max=limit), A[:, None]), mask)

    report = match(loss)
    assert report, str(report)
    assert (report.config.surrogate, report.config.log_ratio_limit) == (Clip(dual=math.exp(limit)), None)
    assert f"clamped at {limit:g} from above alone: the dual bound exp({limit:g})" in str(report)
    assert "does not bound log-ratios" not in str(report)
    config, far = report.config, torch.tensor([[-limit - 1, limit + 1, 0.0]], dtype=torch.float64)
    for advantage in (1.0, -1.0):
        A, mask = torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
        theirs, ours = far.clone().requires_grad_(), far.clone().requires_grad_()
        loss(theirs, torch.zeros_like(far), A, mask).backward()
        policy_loss(ours, A, mask, old_log_probs=torch.zeros_like(far), config=config).loss.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_clamp_from_above_that_is_no_dual_bound():
    """Where A > 0 has no bound of its own, and where its bound lies above the clamp."""

    def without(lp, old, A, mask):
        r = (lp - old).clamp(max=10).exp()
        return -mean(torch.minimum(r * A[:, None], r.clamp(min=0.8) * A[:, None]), mask)

    report = match(without)
    assert report.config.log_ratio_limit == 10
    assert "clamped at 10 from above only; ours on both sides" in str(report)

    def above(lp, old, A, mask):
        A, r = A[:, None], (lp - old).exp()
        stopped = (lp - old).clamp(max=7).exp()
        return -mean(torch.where(A > 0, torch.minimum(r * A, r.clamp(0.8, 1e4) * A), stopped * A), mask)

    assert not match(above)


def test_one_sided_kl_clamp():
    def loss(lp, old, ref_logprobs, A, mask):
        return mean(clipped(lp - old, A[:, None]) + 0.1 * (lp - ref_logprobs).clamp(min=-10) ** 2, mask)

    assert "clamped on one side" in str(match(loss))


def test_one_sequence():
    mask = torch.ones(1, 6)

    def loss(lp, old, A, mask):
        assert lp.shape == (1, 6)
        return mean(clipped(lp - old, A[:, None]), mask)

    report = match(loss, {"mask": mask})
    assert report.config.surrogate == Clip()
    assert report.gradient_difference < DIGITS


def test_batches_that_tell_nothing_apart():
    """Without padding of its own the batch is thinned, where the loss takes a mask."""
    assert match(hand_written, {"log_probs": -torch.rand(4, 5) - 0.1}).config.aggregation == "sequence_mean"

    def unmasked(lp, old, A):
        return clipped(lp - old, A[:, None]).mean()

    assert any("are the same" in note for note in match(unmasked, {"log_probs": -torch.rand(4, 5) - 0.1}).notes)


def test_temperature_as_an_argument():
    """Given, bound, or of our choosing: what is pasted is the name."""
    assert "temperature=temperature" in match(from_logits).call()
    assert match(from_logits, temperature=0.9).temperature == 0.9
    bound = match(functools.partial(from_logits, temperature=0.8), temperature=0.8)
    assert bound.temperature == 0.8
    assert "temperature=0.8" in bound.call()


def test_old_log_probs_of_other_tokens():
    """Logits shifted, old log-probs not."""

    def loss(logits, input_ids, old_log_probs, advantages, loss_mask):
        lp = torch.log_softmax(logits[:, :-1], -1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return mean(clipped(lp[:, 1:] - old_log_probs[:, :-1], advantages[:, None]), loss_mask[:, 2:])

    report = match(loss)
    assert report.faults == ("tokens shifted by one: the log-prob at t is compared with the old log-prob at t-1",), str(
        report
    )
    assert report.gradient_difference < DIGITS


def test_bent_logits():
    def loss(logits, token_ids, old, A, mask):
        z = 3 * torch.tanh(logits[:, : token_ids.shape[1]] / 3)
        lp = torch.log_softmax(z, -1).gather(-1, token_ids[..., None]).squeeze(-1)
        return mean(clipped(lp - old, A[:, None]), mask)

    assert "bent before the softmax" in str(match(loss))


def test_absolute_difference():
    def loss(lp, old, ref_logprobs, A, mask):
        return mean(clipped(lp - old, A[:, None]) + 0.1 * (lp - ref_logprobs).abs(), mask)

    report = match(loss)
    assert report.matched
    assert report.config.kl == KL(0.1, "abs", limit=FREE)


def test_loss_that_rounds():
    """fp32 inside: found all the same, with the tolerance that rounding asks for, and said."""

    def loss(log_probs, old_log_probs, advantages, mask):
        return mean(clipped(log_probs.float() - old_log_probs.float(), advantages.float()[:, None]), mask.float())

    report = match(loss)
    assert report
    assert report.config.surrogate == Clip(0.2, 0.2)
    assert any("rounds to fp32" in note for note in report.notes)
    assert 1e-9 < report.gradient_difference < 1e-4


def test_value_without_gradient():
    """A constant in the loss changes nothing that trains; it is said."""

    def loss(lp, old, A, mask):
        return mean(clipped(lp - old, A[:, None]), mask) + 3.0

    report = match(loss)
    assert report
    assert any("the value is not" in note for note in report.notes)


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (1 / 2097152, ", divided by 2097152"),
        (3.7654321e-9, ", times 3.76543e-09"),
        (3.7654321e-12, ", times 3.76543e-12"),
        (1e-300, ", times 1e-300"),
        (1 / 3, ", divided by 3"),
    ],
)
def test_small_factors(factor, told):
    """With seven digits whatever their size, and divisors with no more."""
    report = match(lambda lp, old, A, mask: factor * rows(clipped(lp - old, A[:, None]), mask))
    assert report, str(report)
    assert report.factor == pytest.approx(factor, rel=1e-7, abs=0.0)
    assert str(report).splitlines()[0].endswith(told)
    assert eval(report.lines[-1].rpartition(".loss * ")[2]) == pytest.approx(factor, rel=1e-6, abs=0.0)


def test_a_factor_of_which_float64_keeps_few_digits():
    """Nothing is found, and it is said: one over such a number is infinite."""
    text = str(match(lambda lp, old, A, mask: 1e-320 * rows(clipped(lp - old, A[:, None]), mask)))
    assert text.startswith("no config reproduces your loss")
    assert re.search(r", times \d(\.\d+)?e-32\d\n", text), text


def test_own_batch():
    """Sizes of the user's own; a loss that knows no others."""
    torch.manual_seed(0)
    B, T, V = 4, 5, 11
    mask = torch.arange(T) < torch.tensor([5, 3, 4, 1])[:, None]

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        assert logits.shape == (B, T + 1, V)
        lp = torch.log_softmax(logits[:, :-1], -1).gather(-1, token_ids[..., None]).squeeze(-1)
        return mean(clipped(lp - old_log_probs, advantages[:, None]), mask)

    batch = {"logits": torch.randn(B, T + 1, V), "token_ids": torch.randint(V, (B, T)), "mask": mask}
    report = match(loss, batch | {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0])})
    assert report, str(report)
    assert report.config == LossConfig(Clip(), aggregation="token_mean", **NO_LIMIT)
    assert match(hand_written, {"log_probs": -torch.rand(4, 5), "mask": mask}).factor == 0.25


def test_own_log_probs_of_a_loss_on_logits():
    """The logits that are made for them have these log-probs, and other columns that tell entropy from them."""
    log_probs = -torch.rand(4, 5, dtype=torch.float64) - 0.1
    batch = users_batch({"log_probs": log_probs})
    assert torch.allclose(batch.scored(batch.token_ids, 1.0), log_probs, rtol=1e-12)

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        rows_of = torch.log_softmax(logits[:, : token_ids.shape[1]], -1)
        entropy = -(rows_of.exp() * rows_of).sum(-1)
        lp = rows_of.gather(-1, token_ids[..., None]).squeeze(-1)
        return rows(clipped(lp - old_log_probs, advantages[:, None]) - 0.01 * entropy, mask)

    report = match(loss, {"log_probs": log_probs})
    assert report, str(report)
    assert report.config == LossConfig(Clip(), entropy_coef=0.01, **NO_LIMIT)


def test_own_logits_that_are_equal():
    """As those of a head of zeros are."""

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        lp = torch.log_softmax(logits[:, : token_ids.shape[1]], -1).gather(-1, token_ids[..., None]).squeeze(-1)
        return rows(clipped(lp - old_log_probs, advantages[:, None]), mask)

    batch = {"logits": torch.zeros(4, 5, 11), "token_ids": torch.ones(4, 5).long()}
    with pytest.raises(ValueError, match="no slope of the loss is finite .*: give batch= logits whose other columns"):
        match(loss, batch)


def test_own_logits_with_a_column_that_is_no_token():
    """-inf, as a padded vocabulary's: 0·(-inf) is nothing, in entropies and in slopes."""

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        log_p = torch.log_softmax(logits[:, : token_ids.shape[1]], -1)
        lp = log_p.gather(-1, token_ids[..., None]).squeeze(-1)
        return rows(clipped(lp - old_log_probs, advantages[:, None]), mask)

    torch.manual_seed(0)
    batch = {"logits": torch.randn(4, 6, 11), "token_ids": torch.randint(10, (4, 5))}
    batch["logits"][..., 10] = -math.inf
    report = match(loss, batch)
    assert report, str(report)
    assert report.config == LossConfig(Clip(), **NO_LIMIT)


@pytest.mark.parametrize("cut", [lambda x: x[:, 1:], lambda x: x.mT[1:].mT], ids=["a slice", "a transpose"])
def test_own_batch_of_views(cut):
    """Masks and ids as align gives them, and whatever else was cut out of larger tensors."""
    torch.manual_seed(0)
    mask = cut(torch.arange(7) < torch.tensor([7, 4, 6, 2])[:, None])
    log_probs, old, ref = -0.5 - torch.rand(3, 4, 7)
    batch = {"log_probs": cut(log_probs), "mask": mask, "advantages": torch.randn(4, 2)[:, 0]}
    assert not mask.is_contiguous()
    report = match(hand_written, batch | {"old_log_probs": cut(old), "ref_log_probs": cut(ref)})
    assert report, str(report)
    ids, mask = align(torch.randint(11, (4, 7)), torch.ones(4, 7))
    batch = {"logits": torch.randn(4, 7, 11), "token_ids": ids, "mask": mask}
    assert not mask.is_contiguous()
    assert match(lambda lp, old, A, mask: rows(clipped(lp - old, A[:, None]), mask), batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"logprobs": torch.zeros(2, 3)}, "batch= has logprobs; known are logits, log_probs"),
        ({"mask": torch.ones(3)}, r"shape \(B, T\); got \(3,\)"),
        ({"logits": torch.zeros(2, 3, 5), "mask": torch.ones(2, 3)}, "has logits and no token_ids"),
        ({"logits": torch.zeros(2, 5, 5), "token_ids": torch.zeros(2, 3).long()}, r"logits must be \(2, 3 or 4, V\)"),
        ({"mask": torch.ones(2, 3), "old_log_probs": torch.ones(2, 4)}, r"old_log_probs must be \(2, 3\)"),
        ({"mask": torch.ones(2, 3), "advantages": torch.ones(3)}, r"advantages must be \(2,\); got \(3,\)"),
        ({"mask": torch.ones(3, 3)}, "as many sequences as tokens"),
        ({"logits": torch.zeros(1).expand(2, 3000, 2000), "token_ids": torch.zeros(2, 3000)}, "smaller batch"),
        ({"logits": torch.zeros(2, 4, 5), "token_ids": torch.zeros(2, 3)}, "token_ids of integers; got torch.float32"),
        ({"mask": torch.ones(2, 3), "advantages": torch.tensor([1.0, math.nan])}, "advantages must be finite; got nan"),
    ],
)
def test_bad_batches(batch, message):
    with pytest.raises((ValueError, TypeError), match=message):
        match(hand_written, batch)


# Calling


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("per_token_logps", "log_probs"), ("new_logprobs", "log_probs"), ("newlogprob", "log_probs"),
        ("log_prob", "log_probs"), ("action_log_probs", "log_probs"), ("lp", "log_probs"),
        ("old_log_prob", "old_log_probs"), ("old_per_token_logps", "old_log_probs"), ("b_logprobs", "old_log_probs"),
        ("behavior_logprobs", "old_log_probs"), ("prev_logprobs", "old_log_probs"), ("mb_logprobs", "old_log_probs"),
        ("ref_per_token_logps", "ref_log_probs"), ("base_action_log_probs", "ref_log_probs"),
        ("log_probs_base", "ref_log_probs"), ("rollout_log_probs", "rollout_log_probs"),
        ("sampling_per_token_logps", "rollout_log_probs"), ("advantages", "advantages"),
        ("mb_advantages", "advantages"), ("response_mask", "mask"), ("action_mask", "mask"), ("input_ids", "token_ids"),
        ("completion_ids", "token_ids"), ("selected_token_ids", "token_ids"), ("num_items_in_batch", "num_items"),
        ("logits", "logits"), ("entropy", "entropy"), ("entropy_coef", None), ("clip_ratio", None), ("beta", None),
        ("loss_agg_mode", None), ("config", None), ("old_logits", None), ("generation_logprobs", "rollout_log_probs"),
        ("model_logprobs", "log_probs"), ("eps_clip", None), ("kl_weight", None), ("rollout_is_weights", None),
        ("student_logits", "logits"), ("teacher_logits", "teacher_logits"), ("ref_logits", "teacher_logits"),
        ("teacher_temperature", None), ("teacher_log_probs", None),
    ],
)  # fmt: skip
def test_names(name, role):
    assert role_of(name) == role


def test_names_that_do_not_tell():
    def loss(x, y, adv, m):
        return mean(clipped(x - y, adv[:, None]), m)

    with pytest.raises(ValueError, match=r'parameter .x. .*arguments=\{"x": "old_log_probs"\}'):
        match(loss)
    assert match(loss, arguments={"x": "log_probs", "y": "old_log_probs"})
    with pytest.raises(ValueError, match="arguments= names z; the loss takes x, y, adv, m"):
        match(loss, arguments={"z": "log_probs"})
    with pytest.raises(ValueError, match=r"must be one of logits.*Did you mean 'log_probs'"):
        match(loss, arguments={"x": "logprobs"})


def returns(value):
    def loss(log_probs, advantages):
        return value(log_probs * advantages[:, None])

    return loss


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (returns(lambda x: x), r"must return a scalar; got shape \(16, 7\)"),
        (returns(lambda x: 3.0), "must return a scalar tensor; got float"),
        (returns(lambda x: x.sum().detach()), "needs no gradient"),
        (returns(lambda x: x.sum() / 0), "is not finite on plain inputs"),
        (returns(lambda x: x.unknown), "raised AttributeError: .* in every form that was tried"),
        (lambda old_log_probs, advantages: None, "neither log-probs nor logits"),
        (AsOpenRLHF, "AsOpenRLHF is a class: give an instance"),
        (AsOpenRLHF.forward, "^AsOpenRLHF.forward is a method: give that of an instance, or a function.$"),
        (functools.partial(AsOpenRLHF.forward, action_mask=1), "AsOpenRLHF.forward is a method: give that of an inst"),
        (lambda self, batch: None, "<lambda> is a method: give that of an instance, or a function"),
        (lambda *tensors: None, r"the loss takes \*tensors: wrap it in a function"),
        (lambda log_probs, logps, advantages: None, "two parameters seem to be log_probs: logps and log_probs"),
        (lambda log_probs, advantages, beta: None, r"functools.partial\(loss_fn, beta=...\)"),
        (lambda log_probs, advantages: (0 * log_probs).sum(), "no token gets a gradient"),
    ],
)  # fmt: skip
def test_losses_that_cannot_be_called(loss, message):
    with pytest.raises(ValueError, match=message):
        match(loss)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (
            {"low": 0.3, "hihg": 0.3, "a": 1},
            "functools.partial names a, hihg; the loss takes log_probs, old_log_probs, advantages, mask, low, high",
        ),
        ({"log_probs": 1, "old_log_probs": 1, "advantages": 1, "mask": 1}, "neither log-probs nor logits"),
    ],
)
def test_parameters_that_the_loss_has_not(bound, message):
    def loss(log_probs, old_log_probs, advantages, mask, low=0.2, high=0.2):
        return mean(clipped(log_probs - old_log_probs, advantages[:, None], low, high), mask)

    class Loss(torch.nn.Module):
        forward = staticmethod(loss)

    for loss_fn in (loss, Loss(), functools.partial(loss, high=0.2)):
        with pytest.raises(ValueError, match=message):
            match(functools.partial(loss_fn, **bound))


def test_parameters_that_are_bound():
    """To a function that takes any, to a module, and by place."""

    def loss(log_probs, old_log_probs, advantages, mask, **bounds):
        return mean(clipped(log_probs - old_log_probs, advantages[:, None], **bounds), mask)

    class Loss(torch.nn.Module):
        def forward(self, high, log_probs, old_log_probs, advantages, mask):
            return loss(log_probs, old_log_probs, advantages, mask, high=high)

    assert match(functools.partial(loss, low=0.1, high=0.3)).config.surrogate == Clip(0.1, 0.3)
    assert match(functools.partial(Loss(), high=0.3)).config.surrogate == Clip(0.2, 0.3)
    assert match(functools.partial(Loss(), 0.3)).config.surrogate == Clip(0.2, 0.3)
    with pytest.raises(ValueError, match=r"what functools.partial binds cannot .* takes \(high, .*: wrap it"):
        match(functools.partial(Loss(), 0.3, high=0.3))
    with pytest.raises(ValueError, match="AsOpenRLHF is a class: give an instance"):
        match(functools.partial(AsOpenRLHF, high=0.3))


def test_methods_that_are_bound():
    class Losses:
        def method(self, lp, old, A, mask):
            return mean(clipped(lp - old, A[:, None]), mask)

        @classmethod
        def of_the_class(cls, lp, old, A, mask):
            return mean(clipped(lp - old, A[:, None]), mask)

        @staticmethod
        def of_none(lp, old, A, mask):
            return mean(clipped(lp - old, A[:, None]), mask)

    unbound = Losses.method
    with pytest.raises(ValueError, match="^Losses.method is a method"):
        match(unbound)
    bound = (functools.partial(unbound, Losses()), functools.partial(unbound, self=Losses()))
    for loss in (Losses().method, Losses.of_the_class, Losses.of_none, *bound):
        assert "old_log_probs" in Caller(loss).roles.values()
        assert "self" not in Caller(loss).roles
    assert match(bound[1])


def test_not_a_function():
    with pytest.raises(TypeError, match="match needs a function; got int"):
        match(3)


def test_inputs_are_the_losss_own():
    """A loss that writes into what it is given finds the same next time."""

    def loss(log_probs, old_log_probs, advantages, mask):
        old_log_probs.mul_(-1)
        advantages.add_(1)
        return mean(clipped(log_probs + old_log_probs, (advantages - 1)[:, None]), mask)

    assert match(loss)


def test_a_mask_is_the_losss_own():
    """bool, as the batch has it; a user's stays as it is."""

    def loss(log_probs, old_log_probs, advantages, mask):
        mask &= advantages[:, None] > -torch.inf
        terms = clipped(log_probs - old_log_probs, advantages[:, None]).masked_fill(~mask, 0).sum() / mask.sum()
        mask.logical_not_()
        return terms

    assert match(loss)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]
    before = mask.clone()
    assert match(loss, {"mask": mask})
    assert torch.equal(mask, before)


@pytest.mark.parametrize("takes", ["log_probs", "logits", "logits, cu_seqlens", "log_probs, cu_seqlens"])
def test_no_form_hands_over_a_tensor_of_the_batch(takes):
    roles = ("token_ids", "old_log_probs", "ref_log_probs", "rollout_log_probs", "advantages", "mask", "entropy")
    names = [*takes.split(", "), *roles, *(["teacher_logits"] if "logits" in takes else [])]
    caller = Caller(eval(f"lambda {', '.join(names)}: None"))
    batch = standard_batch()
    inputs = Inputs(batch, *torch.randn(2, *batch.shape), torch.randn(16), torch.randn(batch.shape), batch.logits * 2)
    kept = [value for part in (batch, inputs) for value in vars(part).values() if isinstance(value, torch.Tensor)]
    owned = {tensor.untyped_storage().data_ptr() for tensor in kept}
    for form in caller.forms():
        leaf = (batch.logits if form.source == "logits" else batch.scored(batch.token_ids, 1.0)).clone()
        handed = caller._lay_out(form, inputs, leaf, batch.entropy())
        shared = {n for n, v in handed.items() if hasattr(v, "data_ptr") and v.untyped_storage().data_ptr() in owned}
        assert not shared, (form, shared)


# On the command line


def test_command(tmp_path, capsys):
    path = tmp_path / "my_losses.py"
    path.write_text(
        "import torch\n"
        "def good(logps, old_logps, adv, mask):\n"
        "    print('called')\n"
        "    r = (logps - old_logps).exp()\n"
        "    terms = -torch.minimum(r * adv[:, None], r.clamp(0.8, 1.2) * adv[:, None])\n"
        "    return (terms * mask).sum() / mask.sum()\n"
        "def bad(logps, old_logps, adv, mask):\n"
        "    return -good(logps, old_logps, adv, mask)\n"
        "def capped(logps, old_logps, adv, mask, cap):\n"
        "    return good(logps, old_logps, adv.clamp(max=cap), mask)\n"
        "class Held:\n"
        "    inner = staticmethod(good)\n"
    )
    assert main(["match", f"{path}:good"]) == 0
    assert capsys.readouterr().out.startswith("your loss is LossConfig(Clip(0.2, 0.2)")
    assert main(["match", f"{path}:bad"]) == 1
    assert "! the sign is wrong" in capsys.readouterr().out
    assert main(["match", f"{path}:good", "--set", "nope=1"]) == 2
    assert "error: --set names nope; the loss takes logps, old_logps, adv, mask.\n" in capsys.readouterr().err
    for given, said in (
        (["--set", "=1"], "--set must be NAME=VALUE; got '=1'"),
        (["--set", "cap=--nan"], "--set names cap"),
        (["--set", "adv=1", "--set", "adv=2"], "--set adv is given twice: '1' and '2'"),
    ):
        assert main(["match", f"{path}:good", *given]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "dir.py").mkdir()
    assert main(["match", f"{tmp_path / 'dir.py'}:good"]) == 2
    assert "dir.py is a folder, no file here" in capsys.readouterr().err
    assert main(["match", f"{path}:capped", "--set", "cap=inf"]) == 0
    capsys.readouterr()
    assert main(["match", f"{path}:good", "--argument", "nope=mask"]) == 2
    assert "error: --argument names nope; the loss takes logps, old_logps, adv, mask.\n" in capsys.readouterr().err
    assert main(["match", f"{path}:Held.inner", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["matched"] is True
    assert report["config"].startswith("LossConfig(")


def test_command_says_what_it_runs_before_it_does(tmp_path, capfd):
    """Also where the file ends the process on the spot."""
    path = tmp_path / "its_own.py"
    path.write_text("import os, sys\nos.write(2, b'the file runs\\n')\nsys.exit(3)\n")
    assert main(["match", f"{path}:loss"]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    notice, ran = error.splitlines()[:2]
    assert notice == f"match runs {path}, as importing it does, then loss on batches of its own"
    assert ran == "the file runs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "FILE.py:FUNCTION"),
        (["nowhere.py:loss"], "there is no file nowhere.py"),
        (["no_such_package.x:loss"], "module no_such_package.x cannot be imported"),
        (["math:sinn"], "must be one of .*Did you mean 'sin'"),
        (["math:sin", "--argument", "x"], "NAME=MEANING; got 'x'"),
        (["math:sin", "--temperature", "-1"], "match: expected temperature to be a finite number > 0; got -1.0"),
    ],
)
def test_bad_command(capsys, arguments, message):
    assert main(["match", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


# Shadow


def training_batch():
    torch.manual_seed(0)
    logits = torch.randn(4, 7, 50).requires_grad_()
    ids, advantages = torch.randint(50, (4, 6)), torch.tensor([1.0, -1.0, 0.5, 2.0])
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]
    old, ref = -3.9 + 0.3 * torch.randn(2, 4, 6)
    return logits, ids, advantages, mask, {"old_log_probs": old, "ref_log_probs": ref}


def test_shadow():
    logits, ids, advantages, mask, known = training_batch()
    config, factor, _ = KNOWN[hand_written]
    lines = []
    watched = shadow(hand_written, config, factor=factor, every=3, log=lines.append)
    for _ in range(7):
        out = watched(logits, ids, advantages, mask, **known)
    assert [sighting.call for sighting in watched.history] == [0, 3, 6]
    assert len(lines) == 3
    assert all(s.gradient_difference < 1e-5 and s.yours == pytest.approx(s.ours, rel=1e-5) for s in watched.history)
    assert watched.history[0].ours == pytest.approx(0.25 * out.loss.item())
    out.loss.backward()
    assert logits.grad is not None


def test_shadow_sees_a_difference():
    logits, ids, advantages, mask, known = training_batch()
    watched = shadow(ascent, "grpo", log=lambda line: None)
    watched(logits, ids, advantages, mask, **known)
    assert watched.history[0].gradient_difference > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", ["nothing", "a slope", "a NaN"])
def test_shadow_warns_above_rounding(caplog, dtype, wrong):
    """At WARNING a loss that is another, by the tenth of a slope or a NaN; at INFO one that rounds in its own dtype."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 8, 500)).to(dtype)
    ids, A, old = torch.randint(500, (4, 8)), torch.randn(4), torch.full((4, 8), -9.0)

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        z = logits if dtype == torch.float64 else logits.float()
        lp = torch.log_softmax(z, -1).gather(-1, token_ids[..., None]).squeeze(-1)
        factor = {"nothing": 1.0, "a slope": 1.1, "a NaN": float("nan")}[wrong]
        return factor * rows(clipped(lp - old_log_probs, advantages[:, None]), mask)

    watched = shadow(loss, "grpo")
    with caplog.at_level(logging.INFO, logger="grpo_kernels.shadow"):
        watched(logits.requires_grad_(), ids, A, torch.ones(4, 8), old_log_probs=old)
    (record,), (sighting,) = caplog.records, watched.history
    assert record.levelno == (logging.INFO if wrong == "nothing" else logging.WARNING), record.message
    assert ("more than rounding" in record.message) == sighting.differs == (wrong != "nothing")
    if wrong == "nothing":
        assert sighting.gradient_difference < sighting.rounding / 3


def test_shadow_on_logits_in_place():
    """The watched call must not see logits that ours has overwritten."""
    logits, ids, advantages, mask, known = training_batch()

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        lp = torch.log_softmax(logits[:, :-1], -1).gather(-1, token_ids[..., None]).squeeze(-1)
        return rows(clipped(lp - old_log_probs, advantages[:, None]), mask)

    watched = shadow(loss, "grpo", log=lambda line: None)
    out = watched(logits * 1, ids, advantages, mask, old_log_probs=known["old_log_probs"], inplace=True)
    out.loss.backward()
    assert watched.history[0].gradient_difference < 1e-5


def writes_into_logits(logits, token_ids, old_log_probs, advantages, mask, temperature):
    logits /= temperature
    lp = torch.log_softmax(logits[:, : token_ids.shape[1]], -1).gather(-1, token_ids[..., None]).squeeze(-1)
    return writes_into_log_probs(lp, old_log_probs, advantages, mask)


def writes_into_log_probs(log_probs, old_log_probs, advantages, mask):
    log_probs.sub_(old_log_probs)
    return rows(clipped(log_probs, advantages[:, None]), mask)


def writes_into_entropy(log_probs, entropy, old_log_probs, advantages, mask):
    entropy *= 0.01
    return writes_into_log_probs(log_probs, old_log_probs, advantages, mask) - rows(entropy, mask)


@pytest.mark.parametrize(
    ("loss", "entropy_coef"),
    [(writes_into_logits, 0.0), (writes_into_log_probs, 0.0), (writes_into_entropy, 0.01)],
    ids=["logits", "log-probs", "entropy"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shadow_of_a_loss_that_writes_into_its_tensors(loss, entropy_coef, dtype):
    logits, ids, advantages, mask, known = training_batch()
    logits = logits.detach().to(dtype).requires_grad_()
    config = LossConfig(Clip(), entropy_coef=entropy_coef)
    watched = shadow(loss, config, every=1)
    watched(logits, ids, advantages, mask, old_log_probs=known["old_log_probs"], temperature=0.7).loss.backward()
    (sighting,) = watched.history
    assert not sighting.differs, str(sighting)


@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_shadow_keeps_the_batch_of_training(config):
    """A loss that overwrites all that it is handed: what trains is what it is without a watch, to the bit."""
    logits, ids, advantages, mask, known = training_batch()
    temperature, seen = torch.tensor(0.7), []

    def loss(logits, log_probs, entropy, token_ids, old_log_probs, ref_log_probs, advantages, mask, temperature):
        value = log_probs.sum() + logits.sum() + entropy.sum()
        given = (token_ids, old_log_probs, ref_log_probs, advantages, mask, temperature)
        seen.append([tensor.clone() for tensor in given])
        with torch.no_grad():
            for tensor in (logits, log_probs, entropy, *given):
                tensor.zero_()
        return value

    given = {**known, "temperature": temperature, "config": LossConfig.preset(config, kl=KL(0.1))}
    tensors = (logits, ids, advantages, mask, *known.values(), temperature)
    before = [tensor.clone() for tensor in tensors]
    plain = grpo_loss(logits, ids, advantages, mask, **given)
    wanted = torch.autograd.grad(plain.loss, logits)[0]
    watched = shadow(loss, given.pop("config"), every=1)
    for _ in range(2):
        out = watched(logits, ids, advantages, mask, **given)
        assert torch.equal(out.loss, plain.loss)
        assert torch.equal(torch.autograd.grad(out.loss, logits)[0], wanted)
    assert all(map(torch.equal, tensors, before))
    assert all(map(torch.equal, seen[0], seen[1]))
    assert len(watched.history) == 2


def test_shadow_of_old_log_probs_as_they_are_made():
    """Ours takes what token_log_probs returns; the loss gets the tensor in it."""
    logits, ids, advantages, mask, _ = training_batch()
    old = token_log_probs(logits.detach(), ids, mask)
    watched = shadow(writes_into_log_probs, LossConfig(Clip()), every=1)
    watched(logits, ids, advantages, mask, old_log_probs=old)
    (sighting,) = watched.history
    assert not sighting.differs, str(sighting)


def test_shadow_of_logits_and_log_probs():
    """The gradient is of both, also where one of them is overwritten after the other was made."""
    logits, ids, advantages, mask, known = training_batch()

    def loss(batch):
        logits = batch["logits"]
        logits /= batch["temperature"]
        p = logits[:, : batch["mask"].shape[1]].softmax(-1)
        terms = clipped(batch["log_probs"] - batch["old_log_probs"], batch["advantages"][:, None])
        return rows(terms + 0.1 * (p * p.log()).sum(-1), batch["mask"])

    watched = shadow(loss, LossConfig(Clip(), entropy_coef=0.1), every=1)
    watched(logits, ids, advantages, mask, old_log_probs=known["old_log_probs"], temperature=0.7)
    (sighting,) = watched.history
    assert not sighting.differs, str(sighting)


def test_shadow_of_a_loss_beside_a_teacher():
    logits, ids, advantages, mask, known = training_batch()

    def loss(logits, teacher_logits, mask):
        """forward KL"""
        apart = teacher_logits.log_softmax(-1) - logits.log_softmax(-1)
        of_rows = (teacher_logits.softmax(-1) * apart).sum(-1)
        return of_rows[:, : mask.shape[1]][mask > 0].mean()

    teacher = Teacher(logits=torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)))
    watched = shadow(loss, LossConfig(None, aggregation="token_mean", divergence=Divergence("forward_kl")), every=1)
    watched(logits, ids, advantages, mask, teacher=teacher, **known)
    assert watched.history[0].gradient_difference < 1e-5


def test_shadow_copies_a_teacher_for_those_alone_that_take_it():
    logits, ids, advantages, mask, known = training_batch()
    teacher = Teacher(logits=torch.randn(logits.shape))
    watched = shadow(lambda log_probs, mask: (log_probs * mask).sum(), LossConfig(None, divergence=Divergence("tvd")))

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.clone.default:
                assert args[0].data_ptr() != teacher.logits.data_ptr()
            return function(*args, **(kwargs or {}))

    with Copies():
        watched(logits, ids, advantages, mask, teacher=teacher)
    assert len(watched.history) == 1


def test_shadow_never_stops_training(caplog):
    logits, ids, advantages, mask, known = training_batch()

    def loss(log_probs, advantages):
        raise RuntimeError("out of memory")

    watched = shadow(loss)
    with caplog.at_level(logging.WARNING, logger="grpo_kernels.shadow"):
        out = watched(logits, ids, advantages, mask, **known)
    out.loss.backward()
    assert "your loss raised RuntimeError: out of memory" in caplog.text
    assert watched.history == []
    with pytest.raises(ValueError, match=r"every=...\) must be an integer, at least 1; got 0"):
        shadow(loss, every=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "x"}, r"shadow\(every=...\) must be an integer, at least 1; got 'x'"),
        ({"every": 1.5}, r"shadow\(every=...\) must be an integer, at least 1; got 1.5"),
        ({"factor": float("nan")}, "shadow: expected factor to be a finite number or a 0-d tensor; got nan"),
        ({"factor": "x"}, "shadow: expected factor to be a finite number or a 0-d tensor; got 'x'"),
        ({"factor": 0}, "shadow: expected a factor other than 0; got 0"),
    ],
)
def test_numbers_that_no_shadow_has(options, message):
    with pytest.raises(ValueError, match=message):
        shadow(lambda lp, old, adv, mask: lp.sum(), **options)


def test_numbers_that_a_device_holds_are_read(monkeypatch):
    """Calls leave those alone, whose reading waits; here nothing else has them."""
    monkeypatch.setattr("grpo_kernels.objectives.checks.may_look", lambda tensor, check=None: bool(check))
    given = {"temperature": torch.tensor(0.5)}
    assert Caller(lambda lp, old, adv, mask: lp.sum(), **given).temperature == 0.5
    assert shadow(lambda lp, old, adv, mask: lp.sum(), factor=torch.tensor(2.0)).factor == 2.0


def test_shadow_outlives_a_log_that_raises(caplog):
    """The comparison has its own line and is kept; the fault is named for what it is."""
    logits, ids, advantages, mask, known = training_batch()

    def full(line):
        raise OSError("disk full")

    config, factor, _ = KNOWN[hand_written]
    watched = shadow(hand_written, config, factor=factor, log=full)
    with caplog.at_level(logging.INFO, logger="grpo_kernels.shadow"):
        watched(logits, ids, advantages, mask, **known).loss.backward()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages[0] == str(watched.history[0])
    assert caplog.messages[1] == "shadow, call 0: log= raised OSError: disk full"


def test_roles_of_a_module():
    assert Caller(AsOpenRLHF()).roles["action_mask"] == "mask"


def unshifted(logits, input_ids, old_logprobs, advantages, mask):
    """Everything as long as the ids of the model's input, and shifted here."""
    log_probs = torch.gather(logits[:, :-1].log_softmax(-1), 2, input_ids[:, 1:, None]).squeeze(2)
    ratio, A = (log_probs - old_logprobs[:, 1:]).exp(), advantages if advantages.dim() == 2 else advantages[:, None]
    A = A[:, 1:] if A.shape[1] > 1 else A
    losses, mask = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A), mask[:, 1:]
    return (losses * mask).sum() / mask.sum()


def unshifted_of_tokens(logits, input_ids, old_logprobs, advantages, mask):
    return unshifted(logits, input_ids, old_logprobs, advantages[:, :], mask)


def not_shifted(logits, input_ids, old_logprobs, advantages, mask):
    log_probs = torch.gather(logits.log_softmax(-1), 2, input_ids[..., None]).squeeze(2)
    ratio, A = (log_probs - old_logprobs).exp(), advantages[:, None]
    return -(torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * mask).sum() / mask.sum()


@pytest.mark.parametrize("loss", [unshifted, unshifted_of_tokens, not_shifted], ids=lambda f: f.__name__)
def test_a_loss_that_shifts_everything_itself(loss):
    """It was accused of three faults: gather takes ids that are shorter than the logits. Where nothing is shifted the
    ids may be either; the answer says which it took."""
    report = match(loss)
    assert report.matched
    assert report.config == LossConfig(Clip(0.2, 0.2), aggregation="token_mean", log_ratio_limit=None)
    noted = any("is off by one" in note for note in report.notes)
    assert noted == (loss is not_shifted)
