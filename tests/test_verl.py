"""verl's registered policy losses and ours. make nightly PART=verl installs verl for them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)

from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig, PolicyLossConfig

from grpo_kernels import (  # fmt: skip
    KL,
    Cispo,
    Clip,
    DppoKL,
    DppoTV,
    Dro,
    Gmpo,
    LossConfig,
    MaskedIS,
    Reinforce,
    Sapo,
    TruncatedIS,
    grpo_loss,
)

pytestmark = [pytest.mark.peers, pytest.mark.nightly]
B, T, V = 5, 9, 60
MODES = {
    "token-mean": {"aggregation": "token_mean"},
    "token-sum": {"aggregation": "token_mean", "normalizer": 1.0},
    "seq-mean-token-mean": {"aggregation": "sequence_mean"},
    "seq-mean-token-sum": {"aggregation": "sequence_sum"},
    "seq-mean-token-sum-norm": {"aggregation": "constant", "constant_length": T},
}


class Batch:
    def __init__(self, spread: float = 0.5) -> None:
        torch.manual_seed(0)
        self.logits = (2 * torch.randn(B, T, V)).requires_grad_()
        self.ids = torch.randint(V, (B, T))
        self.mask = (torch.arange(T) < torch.tensor([9, 5, 7, 1, 3])[:, None]).float()
        self.advantages = torch.randn(B, T)
        log_probs = self.log_probs().detach()
        self.old, self.ref = (log_probs + spread * torch.randn(B, T) for _ in range(2))
        self.weights = 2 * torch.rand(B, T)

    def log_probs(self) -> torch.Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)


def config_of(**options) -> ActorConfig:
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


def assert_same(batch, theirs, **options):
    mode = dict(options.pop("mode"))
    normalizer = mode.pop("normalizer", None)
    config = LossConfig(**mode, **options.pop("config"))
    out = grpo_loss(
        batch.logits, batch.ids, batch.advantages, batch.mask, config=config, normalizer=normalizer, **options
    )
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
    mine, wanted = (torch.autograd.grad(loss, batch.logits)[0] for loss in (out.loss, theirs))
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    return out


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_vanilla(mode, weighted, spread):
    batch = Batch(spread)
    weights = batch.weights if weighted else None
    theirs, metrics = get_policy_loss_fn("vanilla")(
        batch.old, batch.log_probs(), batch.advantages, batch.mask, mode,
        config_of(clip_ratio_low=0.2, clip_ratio_high=0.28), weights,
    )  # fmt: skip
    surrogate = Clip(0.2, 0.28, dual=3.0)
    options = {"old_log_probs": batch.old, "token_weights": weights}
    out = assert_same(batch, theirs, mode=MODES[mode], config={"surrogate": surrogate}, **options)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(out.metrics.clip_dual), abs=1e-6)
    assert metrics["actor/ppo_kl"] == pytest.approx(-float(out.metrics.k1_old), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gspo(mode):
    """verl's gspo is GSPO-token."""
    batch = Batch()
    theirs, _ = get_policy_loss_fn("gspo")(
        batch.old, batch.log_probs(), batch.advantages, batch.mask, mode,
        config_of(clip_ratio_low=0.1, clip_ratio_high=0.15),
    )  # fmt: skip
    config = {"surrogate": Clip(0.1, 0.15), "level": "sequence_token"}
    assert_same(batch, theirs, mode=MODES[mode], config=config, old_log_probs=batch.old)


@pytest.mark.parametrize(
    ("kind", "kl"),
    [
        ("low_var_kl", KL(0.3, limit=(20.0, 10.0))),
        ("kl", KL(0.3, "k1", limit=(None, None))),
        ("mse", KL(0.3, "k2", limit=(None, None))),
        ("abs", KL(0.3, "abs", limit=(None, None))),
        ("k3+", KL(0.3, gradient="straight_through_k2", limit=(20.0, 10.0))),
    ],
)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_kl(kind, kl, spread):
    batch = Batch(spread)
    losses = kl_penalty(logprob=batch.log_probs(), ref_logprob=batch.ref, kl_penalty=kind)
    theirs = 0.3 * agg_loss(losses, batch.mask, "token-mean")
    batch.advantages.zero_()
    options = {"old_log_probs": batch.old, "ref_log_probs": batch.ref}
    assert_same(batch, theirs, mode=MODES["token-mean"], config={"kl": kl}, **options)


def our_presets():
    cispo = {"surrogate": Cispo(low=0.1, high=0.2)}
    yield "cispo", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, cispo, {}
    for name, kind in (("dppo_tv", DppoTV), ("dppo_kl", DppoKL)):
        for cap in (3.0, 1.2):
            options = {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": cap}
            yield name, options, {"surrogate": kind(0.02, 0.03, cap=cap)}, {}
    yield "gpg", {}, {"surrogate": Reinforce()}, {}
    dro = {"policy_loss": PolicyLossConfig(loss_mode="dro", dro_beta=0.3)}
    yield "dro", dro, {"surrogate": Dro(0.3), "log_ratio_limit": None}, {}


@pytest.mark.parametrize(("name", "options", "config", "more"), list(our_presets()), ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_other_losses(name, options, config, more, mode, weighted):
    batch = Batch()
    weights = batch.weights if weighted else None
    arguments = (batch.old, batch.log_probs(), batch.advantages, batch.mask, mode, config_of(**options))
    theirs, metrics = get_policy_loss_fn(name)(*arguments, weights)
    found = {"old_log_probs": batch.old, "token_weights": weights, **more}
    out = assert_same(batch, theirs, mode=MODES[mode], config=config, **found)
    if name.startswith("dppo"):
        clipped = float(out.metrics.clip_low + out.metrics.clip_high)
        assert metrics["actor/pg_clipfrac"] == pytest.approx(clipped, abs=1e-6)
        assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(out.metrics.clip_dual), abs=1e-6)
    if name == "cispo":
        assert metrics["actor/pg_clipfrac"] == pytest.approx(float(out.metrics.clip_fraction), abs=1e-6)


def test_sapo():
    """verl's is a mean over tokens of each sequence, whatever the mode."""
    batch = Batch()
    theirs, _ = get_policy_loss_fn("sapo")(
        batch.old, batch.log_probs(), batch.advantages, batch.mask, "seq-mean-token-mean",
        config_of(tau_pos=0.8, tau_neg=1.3),
    )  # fmt: skip
    mode = MODES["seq-mean-token-mean"]
    assert_same(batch, theirs, mode=mode, config={"surrogate": Sapo(0.8, 1.3)}, old_log_probs=batch.old)


def test_gmpo():
    batch = Batch()
    batch.advantages = batch.advantages[:, :1].expand(B, T).contiguous()
    theirs, _ = get_policy_loss_fn("geo_mean")(
        batch.old, batch.log_probs(), batch.advantages, batch.mask, "token-mean",
        config_of(clip_ratio_low=0.3, clip_ratio_high=0.4),
    )  # fmt: skip
    config = {"surrogate": Gmpo(0.3, 0.4), "level": "sequence"}
    assert_same(batch, theirs, mode=MODES["seq-mean-token-mean"], config=config, old_log_probs=batch.old)


@pytest.mark.parametrize(
    ("level", "threshold", "scheme"),
    [
        ("token", 1.2, TruncatedIS(1.2)),
        ("token", "0.8_1.3", MaskedIS(0.8, 1.3)),
        ("sequence", 1.2, TruncatedIS(1.2, level="sequence")),
        ("sequence", "0.7_1.5", MaskedIS(0.7, 1.5, "sequence")),
    ],
)
def test_rollout_correction(level, threshold, scheme):
    batch = Batch()
    rollout = batch.old + 0.2 * torch.randn(B, T)
    weights, metrics = compute_rollout_correction_weights(batch.old - rollout, batch.mask, level, threshold)
    theirs, _ = get_policy_loss_fn("vanilla")(
        batch.old, batch.log_probs(), batch.advantages, batch.mask, "token-mean",
        config_of(clip_ratio_low=0.2, clip_ratio_high=0.28), weights,
    )  # fmt: skip
    config = {"surrogate": Clip(0.2, 0.28, dual=3.0), "rollout": scheme}
    options = {"old_log_probs": batch.old, "rollout_log_probs": rollout}
    out = assert_same(batch, theirs, mode=MODES["token-mean"], config=config, **options)
    if level == "token":
        assert metrics["rollout_is_max"] == pytest.approx(float(out.metrics.rollout_weight_max), rel=1e-4)
