"""OpenRLHF's options, and calls of its loss and operators that are patched, on a stand-in; test_patches.py has the
patch, test_openrlhf.py OpenRLHF itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from stand_ins.openrlhf import ACTOR, LOSS, OPENRLHF

from grpo_kernels import KL, Clip, LossConfig, MaskedIS, Rejection, TruncatedIS
from grpo_kernels.integrations.openrlhf import loss_config, patch_openrlhf


@pytest.fixture
def openrlhf(monkeypatch):
    yield from OPENRLHF.installed(monkeypatch)


def arguments(**changes):
    """What OpenRLHF's command line parses, its defaults, as far as a loss reads it."""
    actor = dict(eps_clip=0.2, eps_clip_low_high=None, dual_clip=None, loss_agg_mode="token-mean")
    actor |= dict(policy_loss_type="ppo", entropy_coef=None)
    advantage = dict(is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio")
    advantage |= dict(is_correction_threshold=[0.5, 5.0])
    kl = dict(use_loss=False, init_coef=0.01, estimator="k1", unbiased_gradient=False, target=None)
    groups = [
        SimpleNamespace(**{name: changes.get(name, value) for name, value in fields.items()})
        for fields in (actor, advantage, kl)
    ]
    return SimpleNamespace(actor=groups[0], algo=SimpleNamespace(advantage=groups[1], kl=groups[2]))


def test_options_make_a_config():
    given = dict(eps_clip_low_high=(0.2, 0.28), dual_clip=3.0, is_correction_level="token")
    given |= dict(use_loss=True, estimator="k3", unbiased_gradient=True, entropy_coef=0.01)
    assert loss_config(arguments(**given)) == LossConfig(
        Clip(0.2, 0.28, dual=3.0),
        aggregation="token_mean",
        rollout=MaskedIS(0.5, 5.0),
        kl=KL(0.01, "k3", "weighted_k2", limit=(None, 10.0), ratio_cap=10.0),
        entropy_coef=0.01,
    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(policy_loss_type="gspo"), LossConfig(level="sequence", log_ratio_limit=None)),
        (
            dict(policy_loss_type="gspo", is_correction_level="token"),
            LossConfig(level="sequence", log_ratio_limit=None),
        ),
        (
            dict(loss_agg_mode="seq-mean-token-mean", entropy_coef=0.01),
            LossConfig(entropy_coef=0.01, entropy_aggregation="token_mean"),
        ),
        (
            dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=[0.0, 2.0]),
            LossConfig(aggregation="token_mean", rollout=TruncatedIS(2.0)),
        ),
        (
            dict(is_correction_level="seq"),
            LossConfig(aggregation="token_mean", rollout=(TruncatedIS(math.inf), Rejection(0.5, 5.0, "geometric"))),
        ),
        (
            dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=[2.0]),
            LossConfig(aggregation="token_mean", rollout=TruncatedIS(2.0)),
        ),
        (dict(use_loss=True, init_coef=0.0), LossConfig(aggregation="token_mean")),
    ],
)
def test_configs(options, wanted):
    assert loss_config(arguments(**options)) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_agg_mode="token_mean"), "OpenRLHF: actor.loss_agg_mode must be one of .* got 'token_mean'"),
        (dict(policy_loss_type="gpso"), "Did you mean 'gspo'"),
        (dict(is_correction_level="sequence"), "is_correction_level must be one of off, token, seq; got 'sequence'"),
        (dict(is_correction_level=None), "is_correction_level must be one of off, token, seq; got None"),
        (
            dict(is_correction_level="token", is_correction_mode="truncate"),
            "mode must be one of clip, mask; got 'trunc",
        ),
        (dict(is_correction_level="token", is_correction_gating="kl"), "is_correction_gating must be one of .*'kl'"),
        (dict(is_correction_level="seq", is_correction_mode="clip"), 'is_correction_mode="clip" with .*level="seq"'),
        (dict(is_correction_level="token", is_correction_threshold=[]), r"must be HIGH, or LOW and HIGH; got \[\]"),
        (dict(is_correction_level="token", is_correction_threshold=2.0), "must be HIGH, or LOW and HIGH; got 2.0"),
        (dict(is_correction_level="token", is_correction_threshold="23"), "must be HIGH, or LOW and HIGH; got '23'"),
        (dict(dual_clip=1.1), r"do not have dual_clip=1\.1 with an upper bound of 1 \+ 0\.2"),
        (
            dict(is_correction_level="seq", is_correction_gating="tv", is_correction_threshold=[0, 0.1]),
            'a config for is_correction_gating="tv"',
        ),
        (
            dict(use_loss=True, loss_agg_mode="seq-mean-token-mean"),
            "algo.kl.use_loss, a mean over tokens, beside a mean over sequences",
        ),
        (dict(use_loss=True, target=6.0), "a config for algo.kl.target, by which the coefficient moves"),
    ],
)
def test_what_has_no_counterpart_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss_config(arguments(**options))


def call(openrlhf, rollout=None, mask=None, **options):
    torch.manual_seed(0)
    log_probs, advantages = -torch.rand(3, 4), torch.randn(3, 4)
    loss = openrlhf[LOSS].PolicyLoss(**options)
    return loss.forward(log_probs, log_probs - 0.1, advantages, mask, rollout)


def test_a_call(openrlhf):
    """Without a mask every token counts, and without a correction there is no fourth and fifth result."""
    with patch_openrlhf():
        loss, clip_ratio, ppo_kl, vllm_kl, filtered = call(openrlhf)
    torch.manual_seed(0)
    _, advantages = -torch.rand(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(loss, -(advantages * math.exp(0.1)).mean())
    torch.testing.assert_close(ppo_kl, torch.tensor(-0.1))
    assert (clip_ratio, vllm_kl, filtered) == (0, None, None)
    assert call(openrlhf) == "OpenRLHF's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(policy_loss_type="cispo"), "OpenRLHF: policy_loss_type must be one of"),
        (dict(dual_clip=1.1), r"dual_clip=1\.1.*patch_openrlhf\(losses=False\) keeps OpenRLHF's own"),
        (dict(is_correction_level="token"), 'rollout_log_probs= with is_correction_level="token"; got None'),
        (
            dict(is_correction_level="seq", policy_loss_type="gspo"),
            'rollout_log_probs= with is_correction_level="seq"; got None',
        ),
    ],
)
def test_what_has_no_counterpart_raises_where_it_is_called(openrlhf, options, message):
    with patch_openrlhf(), pytest.raises(ValueError, match=message):
        call(openrlhf, **options)


@pytest.mark.parametrize(("value", "check"), [(math.nan, "0"), (-1.0, "0"), (0.5, "1")])
def test_a_mask_of_other_numbers_is_refused(openrlhf, monkeypatch, value, check):
    """As every mask of this package: fractions where contents are checked."""
    monkeypatch.setenv("GRPO_KERNELS_CHECK", check)
    with patch_openrlhf(), pytest.raises(ValueError, match=r"OpenRLHF: PolicyLoss\.forward: .*action_mask"):
        call(openrlhf, mask=torch.tensor([1.0, value, 1.0, 0.0]).expand(3, 4))


def test_operators(openrlhf):
    """As the actor's module calls them, which imports them by name."""
    logits = torch.randn(2, 5, 16, generator=torch.Generator("cpu").manual_seed(0))
    labels = torch.randint(16, (2, 5), generator=torch.Generator("cpu").manual_seed(1))
    wanted = logits.log_softmax(-1)
    with patch_openrlhf(losses=False):
        log_probs = openrlhf[ACTOR].log_probs_from_logits(logits, labels)
        entropy = openrlhf[ACTOR].compute_entropy(logits)
    torch.testing.assert_close(log_probs, wanted.gather(-1, labels[..., None]).squeeze(-1))
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1))
