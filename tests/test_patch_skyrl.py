"""SkyRL's options, and calls of its losses and operators that are patched, on a stand-in; test_patches.py has the
patch, test_skyrl.py SkyRL itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from stand_ins.skyrl import CORE, LOGITS, SKYRL

from grpo_kernels import KL, Cispo, Clip, DppoKL, LossConfig, Rejection, TruncatedIS
from grpo_kernels.integrations.skyrl import loss_config, patch_skyrl
from grpo_kernels.integrations.skyrl_losses import MISSING


@pytest.fixture
def skyrl(monkeypatch):
    yield from SKYRL.installed(monkeypatch)


def algorithm(policy_loss_type="regular", **options):
    """SkyRL's AlgorithmConfig, its defaults, as far as a loss reads it."""
    correction = dict(tis_ratio_type=None, token_tis_ratio_clip_high=2.0, sequence_tis_ratio_clip_high=5.0)
    correction |= dict(sequence_mask_metric=None, geo_mask_high=1.01, geo_mask_low=0.99, product_mask_high=2.0)
    correction |= dict(product_mask_low=0.5, outlier_token_is_threshold_low=None, outlier_token_is_threshold_high=None)
    correction |= dict(token_mask_is_threshold_low=None, token_mask_is_threshold_high=None)
    fields = dict(eps_clip_low=0.2, eps_clip_high=0.2, clip_ratio_c=3.0, loss_reduction="token_mean", max_seq_len=None)
    fields |= dict(use_kl_loss=False, kl_loss_coef=0.001, kl_estimator_type="k3", use_entropy_loss=False)
    fields |= dict(entropy_loss_coef=0.01, sapo=SimpleNamespace(tau_pos=1.0, tau_neg=1.05))
    fields |= dict(cispo=SimpleNamespace(cispo_eps_clip_low=0.0, cispo_eps_clip_high=5.0))
    fields |= dict(dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.2, delta_high=0.2))
    corrected = {name: options.pop(name, value) for name, value in correction.items()}
    return SimpleNamespace(
        policy_loss_type=policy_loss_type, off_policy_correction=SimpleNamespace(**corrected), **fields | options
    )


def test_options_make_a_config():
    options = dict(loss_reduction="sequence_mean", use_kl_loss=True, use_entropy_loss=True, tis_ratio_type="token")
    assert loss_config(algorithm("dual_clip", eps_clip_high=0.28, **options)) == LossConfig(
        Clip(0.2, 0.28, dual=3.0),
        rollout=TruncatedIS(2.0),
        kl=KL(0.001, limit=(20.0, 10.0)),
        entropy_coef=0.01,
        entropy_aggregation="token_mean",
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (algorithm(), LossConfig(aggregation="token_mean")),
        (algorithm("cispo"), LossConfig(Cispo(low=0.0, high=5.0), aggregation="token_mean")),
        (
            algorithm("dppo", dppo=SimpleNamespace(dppo_type="binary_kl", delta_low=0.05, delta_high=0.04)),
            LossConfig(DppoKL(0.05, 0.04), aggregation="token_mean"),
        ),
        (
            algorithm(loss_reduction="seq_mean_token_sum_norm", max_seq_len=512),
            LossConfig(aggregation="constant", constant_length=512),
        ),
        (
            algorithm(tis_ratio_type="sequence", sequence_mask_metric="geometric"),
            LossConfig(
                aggregation="token_mean",
                rollout=(TruncatedIS(5.0, level="sequence"), Rejection(0.99, 1.01, "geometric")),
            ),
        ),
        (
            algorithm(token_mask_is_threshold_low=0.5, token_mask_is_threshold_high=2.0),
            LossConfig(aggregation="token_mean", rollout=Rejection(0.5, 2.0)),
        ),
    ],
)
def test_configs(given, wanted):
    assert loss_config(given) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *((algorithm(name), f'do not have policy_loss_type="{name}"; supported: regular') for name in MISSING),
        (algorithm("gsp"), "Did you mean 'gspo'"),
        (algorithm("rollout_is"), 'a config for policy_loss_type="rollout_is"'),
        (algorithm("cross_entropy"), 'a config for policy_loss_type="cross_entropy"'),
        (algorithm("dppo", tis_ratio_type="token"), 'off_policy_correction beside policy_loss_type="dppo"'),
        (algorithm("dppo", sequence_mask_metric="product"), 'off_policy_correction beside policy_loss_type="dppo"'),
        (algorithm("dual_clip", clip_ratio_c=1.1), r"do not have clip_ratio_c=1\.1 with an upper bound of 1 \+ 0\.2"),
        (algorithm(loss_reduction="prompt_mean"), 'a config for loss_reduction="prompt_mean"'),
        (algorithm(use_kl_loss=True), "use_kl_loss, a mean over sequences, beside another reduction"),
        (
            algorithm(use_kl_loss=True, loss_reduction="sequence_mean", kl_estimator_type="k4"),
            "SkyRL: kl_estimator_type must be one of",
        ),
        (algorithm(outlier_token_is_threshold_high=100.0), r"a config for outlier_token_is_threshold_\*"),
        (
            algorithm(
                token_mask_is_threshold_low=0.5, token_mask_is_threshold_high=2.0, sequence_mask_metric="product"
            ),
            r"token_mask_is_threshold_\* beside ratios of sequences",
        ),
    ],
)
def test_what_has_no_counterpart_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        loss_config(given)


def call(skyrl, name, given=None, rollout=False, mask=None):
    torch.manual_seed(0)
    log_probs, advantages = -torch.rand(3, 4), torch.randn(3, 4)
    loss = skyrl[CORE].PolicyLossRegistry._functions[name]
    sampler = log_probs - 0.2 if rollout else None
    return loss(log_probs, log_probs - 0.1, advantages, given or algorithm(name), mask, sampler), advantages


def test_a_call(skyrl):
    """Without a mask every token counts; SkyRL's correction weighs tokens and adds its metrics."""
    with patch_skyrl():
        (loss, metrics), advantages = call(skyrl, "regular")
        (twice, more), _ = call(skyrl, "regular", rollout=True)
    torch.testing.assert_close(loss, -(advantages * torch.tensor(0.1).exp()).sum())
    torch.testing.assert_close(twice, 2 * loss)
    assert metrics == {"clip_ratio": 0.0}
    assert more == {"clip_ratio": 0.0, "is_ratio_mean": 1.0}
    assert call(skyrl, "regular")[0] == "SkyRL's"


@pytest.mark.parametrize("name", MISSING)
def test_a_loss_without_a_counterpart_raises_where_it_is_called(skyrl, name):
    with patch_skyrl(), pytest.raises(ValueError, match=rf'"{name}".*patch_skyrl\(losses=False\) keeps SkyRL\'s own'):
        call(skyrl, name)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rollout_is", algorithm("rollout_is"), "rollout_logprobs=; got None"),
        ("regular", algorithm("gspo"), "policy_loss_type regular or dual_clip; got 'gspo'"),
    ],
)
def test_what_a_loss_needs_is_named(skyrl, name, given, message):
    with patch_skyrl(), pytest.raises(ValueError, match=message):
        call(skyrl, name, given)


def test_a_mask_of_other_numbers_is_refused(skyrl):
    with patch_skyrl(), pytest.raises(ValueError, match="loss_mask of 0 and 1; got other numbers"):
        call(skyrl, "regular", mask=torch.full((3, 4), 0.5))


def test_operators(skyrl):
    logits = torch.randn(2, 5, 16, generator=torch.Generator("cpu").manual_seed(0))
    labels = torch.randint(16, (2, 5), generator=torch.Generator("cpu").manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    wanted = logits.log_softmax(-1)
    with patch_skyrl(losses=False):
        log_probs = skyrl[LOGITS].logprobs_from_logits(logits, labels)
        entropy = skyrl[LOGITS].chunked_entropy_from_logits(logits, attention_mask=mask)
        with pytest.raises(ValueError, match=r"expected attention_mask \(2, 5\); got \(5, 2\)"):
            skyrl[LOGITS].chunked_entropy_from_logits(logits, attention_mask=mask.T)
    torch.testing.assert_close(log_probs, wanted.gather(-1, labels[..., None]).squeeze(-1))
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1) * mask)
