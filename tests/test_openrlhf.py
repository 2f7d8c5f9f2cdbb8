"""OpenRLHF's policy loss and KL, and ours. OpenRLHF (it needs deepspeed) is no dependency of the tests: install it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("openrlhf.models.loss", exc_type=ImportError)

from openrlhf.models.loss import PolicyLoss, aggregate_loss
from openrlhf.models.utils import compute_approx_kl

from grpo_kernels import KL, Clip, LossConfig, MaskedIS, Rejection, TruncatedIS, grpo_loss

pytestmark = pytest.mark.peers
B, T, V = 5, 9, 60


class Batch:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.logits = (2 * torch.randn(B, T, V)).requires_grad_()
        self.ids = torch.randint(V, (B, T))
        self.mask = (torch.arange(T) < torch.tensor([9, 5, 7, 1, 3])[:, None]).float()
        self.advantages = torch.randn(B, T)
        log_probs = self.log_probs().detach()
        self.old, self.ref = (log_probs + 0.5 * torch.randn(B, T) for _ in range(2))
        self.rollout = self.old + 0.3 * torch.randn(B, T)

    def log_probs(self) -> torch.Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)

    def assert_same(self, theirs, config, **options):
        options = {"old_log_probs": self.old, "ref_log_probs": self.ref, "rollout_log_probs": self.rollout, **options}
        out = grpo_loss(self.logits, self.ids, self.advantages, self.mask, config=config, **options)
        torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
        mine, wanted = (torch.autograd.grad(loss, self.logits)[0] for loss in (out.loss, theirs))
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
        return out


CORRECTIONS = {
    "clip": ({"is_correction_level": "token", "is_correction_mode": "clip"}, TruncatedIS(1.2, 0.8)),
    "mask": ({"is_correction_level": "token", "is_correction_mode": "mask"}, MaskedIS(0.8, 1.2)),
    "sequences": (
        {"is_correction_level": "seq", "is_correction_mode": "mask"},
        (TruncatedIS(math.inf), Rejection(0.8, 1.2, "geometric")),
    ),
    "none": ({}, ()),
}


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("dual", [None, 3.0])
def test_policy_loss(name, dual, token_level):
    batch = Batch()
    options, schemes = CORRECTIONS[name]
    loss = PolicyLoss(0.2, 0.28, dual, token_level, is_correction_threshold=[0.8, 1.2], **options)
    theirs, clip_ratio, ppo_kl, vllm_kl, filtered = loss(
        batch.log_probs(), batch.old, batch.advantages, batch.mask, rollout_log_probs=batch.rollout
    )
    aggregation = "token_mean" if token_level else "sequence_mean"
    config = LossConfig(Clip(0.2, 0.28, dual=dual), aggregation=aggregation, rollout=schemes)
    out = batch.assert_same(theirs, config)
    assert float(clip_ratio) == pytest.approx(float(out.metrics.clip_low + out.metrics.clip_high), abs=1e-6)
    assert float(ppo_kl) == pytest.approx(-float(out.metrics.k1_old), rel=1e-5)
    if name == "mask":
        assert float(filtered) == pytest.approx(float(out.metrics.rollout_rejected), abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_kl(estimator, unbiased, on_policy):
    """Its clamps are (-10, none) before and ±10 after; a token above the reference reaches neither here."""
    batch = Batch()
    batch.advantages.zero_()
    batch.old = batch.log_probs().detach() - 2.5 * torch.rand(B, T)  # ratios up to 12: the cap of 10 bites
    old = None if on_policy else batch.old
    values = compute_approx_kl(batch.log_probs(), batch.ref, old, estimator, unbiased)
    theirs = 0.3 * aggregate_loss(values, batch.mask)
    kl = KL(0.3, estimator, "weighted_k2" if unbiased else "pathwise", limit=(None, 10.0), ratio_cap=10.0)
    batch.assert_same(theirs, LossConfig(aggregation="token_mean", kl=kl), old_log_probs=old)
