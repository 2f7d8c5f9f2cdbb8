"""verl's registered policy losses and ours. verl (it needs ray) is no dependency of the tests: install it first."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)

from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.workers.config import ActorConfig

from grpo_kernels import KL, LossConfig, grpo_loss
from grpo_kernels.surrogates import Clip

pytestmark = pytest.mark.peers
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
