"""SkyRL 0.3.0 patched beside itself: its policy losses with every correction for the sampler, its log-probs and
entropies, its model wrapper's forward and its worker's step. make nightly PART=skyrl installs SkyRL for it.

Three modules are stand-ins: flash-attn's library (an empty one, so that its Python imports), its Triton cross-entropy
(absent, so that SkyRL takes PyTorch's way), and ``skyrl.backends.backend``, which does not import on Python 3.11.
"""

from __future__ import annotations

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from system_steps import without_gpu_modules
from systems import (
    KINDS,
    assert_shadow_sees_rounding,
    batch,
    cast,
    close_losses,
    gradient_of,
    last_line_in_ray,
    model,
    rows,
    tolerance_of,
    with_garbage,
    with_gradients,
)

pytest.importorskip("skyrl", exc_type=ImportError)
without_gpu_modules()

from skyrl.backends.skyrl_train.utils import torch_utils  # noqa: E402
from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: E402
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
    compute_approx_kl,
)
from skyrl.backends.skyrl_train.utils.torch_utils import (  # noqa: E402
    chunked_entropy_from_logits,
    logprobs_from_logits,
    masked_mean,
)
from skyrl.backends.skyrl_train.workers import model_wrapper  # noqa: E402
from skyrl.train.config import AlgorithmConfig, OffPolicyCorrectionConfig  # noqa: E402
from skyrl.train.config.config import CISPOConfig, DPPOConfig, SAPOConfig  # noqa: E402

from grpo_kernels import policy_loss  # noqa: E402
from grpo_kernels.integrations.skyrl import loss_config, patch_skyrl  # noqa: E402
from grpo_kernels.integrations.skyrl_losses import LOSSES, MISSING, REDUCTIONS  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.nightly]

OPTIONS = {
    "regular": [dict(eps_clip_low=0.2, eps_clip_high=0.28)],
    "dual_clip": [dict(eps_clip_low=0.2, eps_clip_high=0.28, clip_ratio_c=1.6)],
    "gspo": [dict(eps_clip_low=0.1, eps_clip_high=0.15)],
    "cispo": [dict(cispo=CISPOConfig(0.1, 0.2)), {}],
    "sapo": [dict(sapo=SAPOConfig(0.8, 1.3))],
    "dppo": [dict(dppo=DPPOConfig("binary_tv", 0.02, 0.03)), dict(dppo=DPPOConfig("binary_kl", 0.02, 0.03))],
    "rollout_is": [dict(eps_clip_low=0.3, eps_clip_high=0.4)],
    "importance_sampling": [{}],
    "cross_entropy": [{}],
}
CORRECTIONS = {
    "none": {},
    "token": dict(tis_ratio_type="token", token_tis_ratio_clip_high=1.3),
    "sequence": dict(tis_ratio_type="sequence", sequence_tis_ratio_clip_high=1.5),
    "geometric": dict(sequence_mask_metric="geometric", geo_mask_low=0.8, geo_mask_high=1.2),
    "product": dict(sequence_mask_metric="product", product_mask_low=0.4, product_mask_high=2.5),
    "masked tokens": dict(token_mask_is_threshold_low=0.6, token_mask_is_threshold_high=1.7),
    "outliers": dict(outlier_token_is_threshold_low=0.3, outlier_token_is_threshold_high=3.0),
    "all": dict(
        tis_ratio_type="sequence",
        sequence_mask_metric="geometric",
        geo_mask_low=0.8,
        geo_mask_high=1.2,
        token_mask_is_threshold_low=0.5,
        token_mask_is_threshold_high=2.0,
        outlier_token_is_threshold_high=5.0,
    ),
}


def algorithm(name: str, correction: str = "none", **options) -> AlgorithmConfig:
    corrected = OffPolicyCorrectionConfig(**CORRECTIONS[correction])
    return AlgorithmConfig(policy_loss_type=name, off_policy_correction=corrected, **options)


def evaluated(name, known, config, dtype, sampler=True, mask="mask"):
    """Return loss, gradient and metrics of what is registered under ``name`` now."""
    given = cast(known, dtype)
    log_prob = given["log_prob"].requires_grad_()
    loss, metrics = PolicyLossRegistry.get(name)(
        log_prob,
        given["old"],
        given["advantages"],
        config=config,
        loss_mask=given[mask].to(dtype),
        rollout_logprobs=given["rollout"] if sampler else None,
    )
    return loss.detach(), torch.autograd.grad(loss, log_prob)[0], metrics


def compare(name, known, config, sampler=True, mask="mask"):
    """Ours in fp32 beside SkyRL's own in fp64, on the same numbers."""
    known = cast(known, torch.float32)
    if name == "dppo":  # its divergence is of probabilities: a log-prob above 0 is none
        known |= {values: known[values].clamp(max=-1e-3) for values in ("old", "rollout")}
    theirs = evaluated(name, known, config, torch.float64, sampler, mask)
    with patch_skyrl(operators=False):
        mine = evaluated(name, known, config, torch.float32, sampler, mask)
    close_losses(mine, theirs)
    assert set(mine[2]) == set(theirs[2])
    for metric, value in theirs[2].items():
        assert mine[2][metric] == pytest.approx(value, rel=2e-5, abs=1e-6), metric


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses(name, kind):
    """Every loss with every correction, and without the sampler's log-probs."""
    for options, correction, seed in itertools.product(OPTIONS[name], CORRECTIONS, range(3)):
        compare(name, batch(kind, seed), algorithm(name, correction, **options))
        if name != "rollout_is" and correction == "none":
            compare(name, batch(kind, seed), algorithm(name, **options), sampler=False)


def test_every_loss_is_compared():
    assert set(OPTIONS) == set(LOSSES)


def test_cross_entropy_takes_weights_as_its_mask():
    """As SkyRL's collator makes them, which scales masks so that a sum is a mean."""
    for seed in range(3):
        compare("cross_entropy", batch("ragged", seed), algorithm("cross_entropy"), mask="weights")


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_a_mask_of_other_numbers_is_refused(name):
    with patch_skyrl(), pytest.raises(ValueError, match="loss_mask of 0 and 1; got other numbers"):
        evaluated(name, batch("ragged"), algorithm(name), torch.float32, mask="weights")


@pytest.mark.parametrize("name", [*LOSSES, *MISSING])
def test_signatures(name):
    """Names, order and defaults are SkyRL's."""
    theirs = inspect.signature(PolicyLossRegistry.get(name)).parameters.values()
    with patch_skyrl(operators=False):
        mine = inspect.signature(PolicyLossRegistry.get(name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_without_a_token(name):
    with patch_skyrl(operators=False):
        loss, gradient, metrics = evaluated(name, batch("nothing"), algorithm(name, **OPTIONS[name][0]), torch.float32)
    assert loss == 0
    assert not gradient.any()
    assert not any(metrics.values())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_is_masked_is_not_read(name, garbage):
    """SkyRL multiplies by the mask, where NaN stays (a listed fault)."""
    known = batch("holes")
    clean, dirty = with_garbage(known, 0.0), with_garbage(known, garbage)
    for correction in CORRECTIONS:
        config = algorithm(name, correction)
        assert not evaluated(name, dirty, config, torch.float64)[0].isfinite()
        with patch_skyrl(operators=False):
            wanted, found = (evaluated(name, given, config, torch.float32) for given in (clean, dirty))
        assert (wanted[0], wanted[2]) == (found[0], found[2])
        assert torch.equal(wanted[1], found[1])


CONFIGURED = [name for name in OPTIONS if name not in ("rollout_is", "cross_entropy")]


@pytest.mark.parametrize("correction", [name for name in CORRECTIONS if name not in ("outliers", "all")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CONFIGURED)
def test_the_config_is_the_loss(name, reduction, correction):
    """``policy_loss`` with ``loss_config`` is SkyRL's sum over advantages that its reduction has scaled."""
    options = dict(loss_reduction=reduction, max_seq_len=32, use_kl_loss=False)
    config = algorithm(name, correction, **OPTIONS[name][0], **options)
    known = cast(batch("ragged"), torch.float32)
    scaled = apply_loss_reduction_to_advantages_minibatch(known["advantages"], known["mask"].float(), reduction, 2, 32)
    theirs = evaluated(name, {**known, "advantages": scaled}, config, torch.float64)
    log_prob = known["log_prob"].clone().requires_grad_()
    if name == "dppo" and correction != "none":
        with pytest.raises(ValueError, match='off_policy_correction beside policy_loss_type="dppo"'):
            loss_config(config)
    wanted = loss_config(algorithm(name, "none" if name == "dppo" else correction, **OPTIONS[name][0], **options))
    out = policy_loss(
        log_prob,
        known["advantages"],
        known["mask"],
        old_log_probs=known["rollout"] if name == "dppo" else known["old"],
        rollout_log_probs=known["rollout"] if wanted.schemes else None,
        config=wanted,
        token_weights=factors_of(config, known) if name == "dppo" else None,
    )
    close_losses((out.loss.detach(), torch.autograd.grad(out.loss, log_prob)[0]), theirs)


def factors_of(config, known):
    """SkyRL's correction is of the old policy, and with "dppo" the old log-probs of our losses are the sampler's."""
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import compute_off_policy_correction

    mask = known["mask"].float()
    ratio, _, mask = compute_off_policy_correction(known["old"], known["rollout"], mask, config.off_policy_correction)
    return mask if ratio is None else mask * ratio


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("kind", ["ragged", "far"])
def test_kl_and_entropy(estimator, kind):
    """SkyRL's whole loss, KL and entropy bonus behind the policy term, and ``loss_config`` alone."""
    options = dict(loss_reduction="sequence_mean", use_kl_loss=True, kl_estimator_type=estimator, kl_loss_coef=0.2)
    config = algorithm("regular", use_entropy_loss=True, entropy_loss_coef=0.05, **options)
    known = batch(kind)
    mask, reference = known["mask"].double(), known["rollout"]
    scaled = apply_loss_reduction_to_advantages_minibatch(known["advantages"], mask, "sequence_mean", 2, 32)

    def theirs(log_prob, entropy):
        loss = PolicyLossRegistry.get("regular")(log_prob, known["old"], scaled, config, mask)[0]
        kl = masked_mean(compute_approx_kl(log_prob, reference, mask, estimator), mask, dim=-1).mean()
        return loss + 0.2 * kl - 0.05 * masked_mean(entropy, mask)

    def mine(log_prob, entropy):
        given = dict(old_log_probs=known["old"], ref_log_probs=reference, config=loss_config(config))
        return policy_loss(log_prob, known["advantages"], known["mask"], entropy=entropy, **given).loss

    wanted, own = with_gradients(theirs, known), with_gradients(mine, known)
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["padded", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators(kind, dtype):
    """Beside SkyRL's own in fp64, on the same logits."""
    logits, labels = rows(kind, dtype)
    logits, labels = logits.view(-1, *logits.shape[-2:]), labels.view(-1, labels.shape[-1])
    exact = logits.double()
    mask = (torch.arange(labels.numel()).view(labels.shape) % 3 != 1).long()
    theirs = gradient_of(lambda x: logprobs_from_logits(x, labels), exact)
    their_entropies = [
        gradient_of(lambda x, m=m: chunked_entropy_from_logits(x, True, m, 2), exact) for m in (None, mask)
    ]
    with patch_skyrl(losses=False):
        for inplace in (False, True):
            mine = gradient_of(lambda x, i=inplace: torch_utils.logprobs_from_logits(x, labels, i), logits)
            for found, wanted in zip(mine, theirs, strict=True):
                torch.testing.assert_close(found.double(), wanted, **tolerance_of(dtype))
        for m, other in zip((None, mask), their_entropies, strict=True):
            mine = gradient_of(lambda x, m=m: torch_utils.chunked_entropy_from_logits(x, True, m), logits)
            for found, wanted in zip(mine, other, strict=True):
                torch.testing.assert_close(found.double(), wanted, **tolerance_of(dtype))
        assert not torch_utils.chunked_entropy_from_logits(logits.clone().requires_grad_()).requires_grad


def test_operators_beside_impossible_columns():
    """SkyRL's entropy is 0 · -inf there, NaN: a listed fault; ours is that of the other columns."""
    logits, possible = rows("masked columns")[0][None], rows("masked columns")[0][0].isfinite()
    assert chunked_entropy_from_logits(logits).isnan().all()
    with patch_skyrl(losses=False):
        found = torch_utils.chunked_entropy_from_logits(logits)
    torch.testing.assert_close(found, chunked_entropy_from_logits(logits[..., possible]), rtol=1e-5, atol=1e-6)


SEQUENCES = torch.randint(120, (3, 12), generator=torch.Generator("cpu").manual_seed(3))
ATTENTION = (torch.arange(12) >= torch.tensor([0, 3, 5])[:, None]).long()
LIVE = (torch.rand(3, 7, generator=torch.Generator("cpu").manual_seed(4)) < 0.8).float()


def wrapped(compiled: bool = False, packed: bool = False):
    """SkyRL's wrapper around a tiny model."""
    wrapper = model_wrapper.HFModelWrapper(model(), use_torch_compile=compiled)
    wrapper.remove_microbatch_padding = packed  # its constructor wants flash attention for that
    return wrapper


@pytest.mark.parametrize(("compiled", "packed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("bonus", [False, True])
def test_forward_of_the_wrapper(compiled, packed, bonus):
    """``HFModelWrapper.forward``, to every parameter's gradient, entropies with one and without."""

    def found():
        wrapper = wrapped(compiled, packed)
        options = dict(attention_mask=ATTENTION, temperature=0.8, return_output=True, compute_entropy=True)
        log_probs, output = wrapper(SEQUENCES, 7, entropy_requires_grad=bonus, **options)
        entropy = output["entropy"][:, -8:-1]
        loss = (log_probs * torch.linspace(-1, 2, 7)).sum() + (0.3 * entropy.sum() if bonus else 0)
        loss.backward()
        return [log_probs.detach(), entropy.detach(), *(p.grad.clone() for p in wrapper.model.parameters())]

    theirs = found()
    with patch_skyrl():
        assert model_wrapper.logprobs_from_logits.__module__ == "grpo_kernels.integrations.operators"
        mine = found()
    for own, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


class Experience(SimpleNamespace):
    def to_device(self, device):
        pass


class Strategy:
    """What a worker's step asks of FSDP, in plain PyTorch."""

    def backward(self, loss, model, optimizer):
        optimizer.zero_grad()
        loss.backward()


def experience(wrapper):
    draw = torch.Generator("cpu").manual_seed(5)
    with torch.no_grad():
        old = wrapper(SEQUENCES, 7, attention_mask=ATTENTION, temperature=0.8)
    noise = 0.2 * torch.randn(2, *old.shape, generator=draw)
    advantages = torch.randn(3, 1, generator=draw).expand(3, 7) / LIVE.sum()
    known = dict(action_log_probs=old, base_action_log_probs=old + noise[0], rollout_logprobs=old + noise[1])
    masks = dict(attention_mask=ATTENTION, loss_mask=LIVE, action_mask=None)
    return Experience(
        sequences=SEQUENCES,
        num_actions=7,
        advantages=advantages,
        pixel_values=None,
        image_grid_thw=None,
        **masks,
        **known,
    )


@pytest.mark.parametrize("correction", ["none", "all"])
@pytest.mark.parametrize("name", ["regular", "gspo", "dppo"])
def test_ten_steps_of_the_worker(name, correction, monkeypatch):
    """``PolicyWorkerBase._forward_backward_micro`` with KL and entropy bonus, patched and not: the same metrics and
    weights."""
    from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    options = dict(temperature=0.8, use_kl_loss=True, kl_loss_coef=0.1, use_entropy_loss=True)
    config = algorithm(name, correction, **OPTIONS[name][0], **options)

    def trained():
        wrapper = wrapped()
        optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-3)
        worker = SimpleNamespace(
            **dict(cfg=SimpleNamespace(algorithm=config), model=wrapper, optimizer=optimizer, strategy=Strategy()),
            policy_loss_fn=PolicyLossRegistry.get(name),
            mesh_rank=SimpleNamespace(dp_size=1),
            scheduler=SimpleNamespace(get_last_lr=lambda: [1e-3]),
        )
        given, statuses = experience(wrapper), []
        for _ in range(10):
            statuses.append(PolicyWorkerBase._forward_backward_micro(worker, given, 1.0))
            optimizer.step()
        return statuses, [parameter.detach().clone() for parameter in wrapper.parameters()]

    theirs = trained()
    with patch_skyrl():
        mine = trained()
    assert theirs[0][-1]["final_loss"] < theirs[0][0]["final_loss"] - 0.02
    for own, wanted in zip(mine[0], theirs[0], strict=True):
        assert set(own) == set(wanted)
        for metric, value in wanted.items():
            if isinstance(value, float):
                assert own[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
    for own, wanted in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5)


IN_A_WORKER = """
import ray

def imports():
    import sys, types
    backend = types.ModuleType("skyrl.backends.backend")
    backend.AbstractBackend = object
    sys.modules[backend.__name__] = backend
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None
    sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")

@ray.remote
def registered(wanted):
    import sys
    if not wanted:
        return str("skyrl" in sys.modules)
    imports()
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    return PolicyLossRegistry.get("gspo").__name__

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get([registered.remote(False), registered.remote(True)]))
"""


def test_ray_patches_its_workers():
    """Where one imports SkyRL's losses, and no other."""
    assert last_line_in_ray("skyrl", IN_A_WORKER) == "['False', 'grpo_kernels_gspo']"


@pytest.mark.parametrize("name", OPTIONS)
def test_shadow_finds_no_difference(name, caplog):
    caplog.set_level("INFO", "grpo_kernels.shadow")
    with patch_skyrl(shadow=1):
        evaluated(name, batch("ragged"), algorithm(name, **OPTIONS[name][0]), torch.float32)
    assert_shadow_sees_rounding(caplog, "SkyRL")
