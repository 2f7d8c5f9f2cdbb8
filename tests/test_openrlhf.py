"""OpenRLHF 0.11.2 patched beside itself: its policy loss, its log-probs and entropies, its actor's forward and its
trainer's step. make nightly PART=openrlhf installs OpenRLHF for it.

Three modules are stand-ins, since nothing of them can run on a CPU: flash-attn's library (an empty one, so that its
Python imports), its Triton cross-entropy (absent, so that OpenRLHF takes PyTorch's way), and OpenRLHF's own module of
vLLM engines, which imports vLLM.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import types
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

pytest.importorskip("openrlhf", exc_type=ImportError)
without_gpu_modules()
engines = types.ModuleType("openrlhf.trainer.ray.vllm_engine")
engines.batch_vllm_engine_call = engines.create_vllm_engines = None
sys.modules[engines.__name__] = engines

from openrlhf.models import Actor, PolicyLoss, aggregate_loss  # noqa: E402
from openrlhf.models import actor as actor_module  # noqa: E402
from openrlhf.models import utils as openrlhf_utils  # noqa: E402
from openrlhf.models.utils import compute_approx_kl, compute_entropy, log_probs_from_logits  # noqa: E402

from grpo_kernels import Clip, LossConfig, match, policy_loss  # noqa: E402
from grpo_kernels.integrations.openrlhf import loss_config, patch_openrlhf  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.nightly]

CORRECTIONS = {
    "off": {},
    "token clip": dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=[0.7, 1.4]),
    "token mask": dict(is_correction_level="token", is_correction_threshold=[0.6, 1.6]),
    "sequence mask": dict(is_correction_level="seq", is_correction_threshold=[0.8, 1.15]),
    **{
        f"{level} {gating}": dict(
            is_correction_level=level, is_correction_gating=gating, is_correction_threshold=[0.0, bound]
        )
        for gating, bound in (("binary_kl", 0.01), ("tv", 0.02))
        for level in ("token", "seq")
    },
}
WHOLE = dict(dp_size=4, batch_num_tokens=torch.tensor(77.0), global_batch_size=torch.tensor(13.0))
COUNTS = ({}, WHOLE, {**WHOLE, "dp_size": 1}, dict(dp_size=2, batch_num_tokens=50, global_batch_size=9))
LOSSES = [
    dict(policy_loss_type=kind, dual_clip=dual, token_level_loss=by_tokens)
    for kind, dual, by_tokens in itertools.product(("ppo", "gspo"), (None, 1.6), (True, False))
]


def loss_of(**options) -> PolicyLoss:
    low, high = (0.1, 0.15) if options.get("policy_loss_type") == "gspo" else (0.2, 0.28)
    return PolicyLoss(low, high, **options)


def evaluated(loss, known, counts, dtype):
    """Return loss, gradient and the four other results of ``loss`` as it is now."""
    given = cast(known, dtype)
    log_prob = given["log_prob"].requires_grad_()
    value, *others = loss(
        log_prob,
        given["old"],
        given["advantages"],
        action_mask=given["mask"],
        rollout_log_probs=given["rollout"],
        **counts,
    )
    return value.detach(), torch.autograd.grad(value, log_prob)[0], others


def compare(loss, known, counts):
    """Ours in fp32 beside OpenRLHF's own in fp64, on the same numbers."""
    known = cast(known, torch.float32)
    theirs = evaluated(loss, known, counts, torch.float64)
    with patch_openrlhf(operators=False):
        mine = evaluated(loss, known, counts, torch.float32)
    close_losses(mine, theirs)
    for own, wanted in zip(mine[2], theirs[2], strict=True):
        assert (own is None) == (wanted is None)
        assert own is None or own.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_losses(correction, kind):
    """Every loss with every correction, of the global batch and of its own."""
    for seed, options, counts in itertools.product(range(3), LOSSES, COUNTS):
        compare(loss_of(**options, **CORRECTIONS[correction]), batch(kind, seed), counts)


def test_corrections_gate():
    """Of the thresholds that are compared each drops some tokens and keeps some."""
    for correction, options in CORRECTIONS.items():
        if correction != "off":
            known = batch("ragged")
            filtered = evaluated(loss_of(**options), known, {}, torch.float64)[2][3]
            assert 0.1 < filtered < 0.9, correction


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_batch_without_a_token(options):
    """OpenRLHF's 0/0 is NaN where it counts tokens itself; ours is 0."""
    loss, known = loss_of(**options), batch("nothing")
    assert math.isnan(evaluated(loss, known, {}, torch.float64)[0])
    with patch_openrlhf(operators=False):
        value, gradient, others = evaluated(loss, known, {}, torch.float32)
    assert (value, *others[:2]) == (0, 0, 0)
    assert not gradient.any()
    compare_totals = evaluated(loss, known, WHOLE, torch.float64)
    assert compare_totals[0] == 0


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_is_masked_is_not_read(correction, garbage):
    """OpenRLHF multiplies by the mask, where NaN stays (a listed fault)."""
    known = batch("holes")
    clean, dirty = with_garbage(known, 0.0), with_garbage(known, garbage)
    for options in LOSSES:
        loss = loss_of(**options, **CORRECTIONS[correction])
        assert not evaluated(loss, dirty, {}, torch.float64)[0].isfinite()
        with patch_openrlhf(operators=False):
            wanted, found = (evaluated(loss, given, {}, torch.float32) for given in (clean, dirty))
        assert wanted[0] == found[0]
        assert torch.equal(wanted[1], found[1])
        assert wanted[2] == found[2]


def test_a_sequence_without_a_token_counts_as_dropped():
    """OpenRLHF's 0/0 is neither inside of the band nor outside of it: in its metric the sequence is dropped."""
    log_prob, mask = torch.full((2, 2), -1.0), torch.tensor([[True, True], [False, False]])
    loss = PolicyLoss(is_correction_level="seq")
    arguments = dict(old_log_probs=log_prob, advantages=torch.ones(2, 2), action_mask=mask, rollout_log_probs=log_prob)
    assert loss(log_prob, **arguments)[4] == 0.5
    with patch_openrlhf(operators=False):
        assert loss(log_prob, **arguments)[4] == 0.5


def test_signatures():
    """Names, order and defaults are OpenRLHF's."""
    places = ((PolicyLoss, "forward"), (openrlhf_utils, "log_probs_from_logits"), (openrlhf_utils, "compute_entropy"))

    def found():
        signatures = [inspect.signature(getattr(owner, name)).parameters.values() for owner, name in places]
        return [[(p.name, p.default, p.kind) for p in parameters] for parameters in signatures]

    theirs = found()
    with patch_openrlhf():
        assert actor_module.log_probs_from_logits is openrlhf_utils.log_probs_from_logits
        assert actor_module.log_probs_from_logits is not log_probs_from_logits
        mine = found()
    assert mine == theirs


def arguments(correction="off", **changes):
    """What OpenRLHF's command line parses, as far as a loss reads it."""
    advantage = dict(is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio")
    advantage |= dict(is_correction_threshold=[0.5, 5.0]) | CORRECTIONS[correction]
    actor = dict(eps_clip=0.2, eps_clip_low_high=(0.2, 0.28), dual_clip=None, loss_agg_mode="token-mean")
    actor |= dict(policy_loss_type="ppo", entropy_coef=None)
    kl = dict(use_loss=False, init_coef=0.01, estimator="k1", unbiased_gradient=False, target=None)
    for fields in (actor, kl):
        fields |= {name: value for name, value in changes.items() if name in fields}
    algo = SimpleNamespace(advantage=SimpleNamespace(**advantage), kl=SimpleNamespace(**kl))
    return SimpleNamespace(actor=SimpleNamespace(**actor), algo=algo)


RATIO_CORRECTIONS = [name for name in CORRECTIONS if "kl" not in name and "tv" not in name]


@pytest.mark.parametrize("correction", RATIO_CORRECTIONS)
@pytest.mark.parametrize("changes", [{}, {"dual_clip": 2.0}, {"loss_agg_mode": "seq-mean-token-mean"},
                                     {"policy_loss_type": "gspo"}], ids=str)  # fmt: skip
def test_the_config_is_the_loss(changes, correction):
    """``policy_loss`` with ``loss_config`` is OpenRLHF's loss."""
    args, known = arguments(correction, **changes), cast(batch("ragged"), torch.float32)
    loss = PolicyLoss(
        *args.actor.eps_clip_low_high,
        args.actor.dual_clip,
        args.actor.loss_agg_mode == "token-mean",
        args.actor.policy_loss_type,
        **CORRECTIONS[correction],
    )
    theirs = evaluated(loss, known, {}, torch.float64)
    log_prob = known["log_prob"].clone().requires_grad_()
    to_sampler = args.actor.policy_loss_type == "gspo" and correction != "off"
    out = policy_loss(
        log_prob,
        known["advantages"],
        known["mask"],
        old_log_probs=known["rollout"] if to_sampler else known["old"],
        rollout_log_probs=None if correction == "off" or to_sampler else known["rollout"],
        config=loss_config(args),
    )
    close_losses((out.loss.detach(), torch.autograd.grad(out.loss, log_prob)[0]), theirs)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", ["ragged", "on-policy", "far"])
def test_kl_and_entropy(estimator, unbiased, kind):
    """OpenRLHF's whole loss, KL and entropy bonus behind the policy term, and ``loss_config`` alone."""
    args = arguments(use_loss=True, init_coef=0.3, estimator=estimator, unbiased_gradient=unbiased, entropy_coef=0.05)
    known = batch(kind)
    reference = known["rollout"]

    def theirs(log_prob, entropy):
        loss = PolicyLoss(0.2, 0.28)(log_prob, known["old"], known["advantages"], known["mask"])[0]
        kl = compute_approx_kl(log_prob, reference, known["old"], estimator, unbiased)
        bonus = aggregate_loss(entropy, known["mask"])
        return loss + 0.3 * aggregate_loss(kl, known["mask"]) - 0.05 * bonus

    def mine(log_prob, entropy):
        given = dict(old_log_probs=known["old"], ref_log_probs=reference, config=loss_config(args))
        return policy_loss(log_prob, known["advantages"], known["mask"], entropy=entropy, **given).loss

    wanted, own = with_gradients(theirs, known), with_gradients(mine, known)
    scale = 1 if kind != "far" else wanted[1].abs().sum().item()  # compute_approx_kl computes in fp32
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, LossConfig(Clip(0.2, 0.27), aggregation="token_mean")),
        ({"token_level_loss": False}, LossConfig(Clip(0.2, 0.27))),
        ({"dual_clip": 3.0}, LossConfig(Clip(0.2, 0.27, dual=3.0), aggregation="token_mean")),
        ({"policy_loss_type": "gspo"}, LossConfig(Clip(0.2, 0.27), level="sequence", log_ratio_limit=None)),
    ],
)
def test_match_recognises_it(options, wanted):
    report = match(PolicyLoss(0.2, 0.27, **options))
    assert report, str(report)
    assert report.config == wanted
    assert report.gradient_difference < 1e-6


@pytest.mark.parametrize("kind", ["padded", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators(kind, dtype):
    """Beside OpenRLHF's own in fp64, on the same logits."""
    logits, labels = rows(kind, dtype)
    exact = logits.double()
    theirs = gradient_of(lambda x: log_probs_from_logits(x, labels), exact)
    their_entropy = gradient_of(compute_entropy, exact)
    with patch_openrlhf(losses=False):
        mine = gradient_of(lambda x: openrlhf_utils.log_probs_from_logits(x, labels), logits)
        entropy = gradient_of(openrlhf_utils.compute_entropy, logits)
    for found, wanted in zip((*mine, *entropy), (*theirs, *their_entropy), strict=True):
        torch.testing.assert_close(found.double(), wanted, **tolerance_of(dtype))


def test_operators_beside_impossible_columns():
    """OpenRLHF's entropy is 0 · -inf there, NaN: a listed fault; ours is that of the other columns."""
    logits, labels = rows("masked columns")
    possible = logits[0].isfinite()
    assert compute_entropy(logits).isnan().all()
    with patch_openrlhf(losses=False):
        values, gradient = gradient_of(openrlhf_utils.compute_entropy, logits)
    wanted = gradient_of(compute_entropy, logits[:, possible])
    torch.testing.assert_close(values, wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, possible], wanted[1], rtol=1e-5, atol=1e-6)
    assert not gradient[:, ~possible].any()


def test_a_temperature_divides_the_logits_themselves():
    logits, labels = rows("padded")
    theirs, mine = logits.clone(), logits.clone()
    wanted = log_probs_from_logits(theirs, labels, temperature=0.7)
    with patch_openrlhf(losses=False):
        found = openrlhf_utils.log_probs_from_logits(mine, labels, temperature=0.7)
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def actor_of(packing: bool, temperature: float = 0.8) -> Actor:
    """OpenRLHF's actor around a tiny model."""
    actor = Actor(model(), temperature=temperature)
    actor.packing_samples = packing
    return actor


SEQUENCES = torch.randint(120, (3, 12), generator=torch.Generator("cpu").manual_seed(3))
ATTENTION = torch.arange(12) >= torch.tensor([0, 3, 5])[:, None]
ACTIONS = torch.rand(3, 7, generator=torch.Generator("cpu").manual_seed(4)) < 0.8


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("wants_entropy", [False, True])
def test_forward_of_the_actor(packing, wants_entropy):
    """``Actor.forward``, to every parameter's gradient. Packed, sequences attend across each other on a CPU, in
    both."""
    actor = actor_of(packing)

    def found():
        actor.zero_grad()
        arguments = dict(attention_mask=ATTENTION.long(), return_output=True, return_entropy=wants_entropy)
        log_probs, output = actor(SEQUENCES, ACTIONS, **arguments)
        loss = (log_probs * torch.linspace(-1, 2, 7)).sum()
        values = [log_probs.detach()]
        if wants_entropy:
            values.append(output.entropy.detach())
            loss = loss + 0.3 * output.entropy[:, -7:].sum()
        loss.backward()
        return [*values, *(parameter.grad.clone() for parameter in actor.parameters())]

    theirs = found()
    with patch_openrlhf():
        mine = found()
    for own, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


class Strategy:
    """What a trainer's step asks DeepSpeed for, in plain PyTorch."""

    ring_attn_group = None

    def backward(self, loss, actor, optimizer):
        optimizer.zero_grad()
        loss.backward()

    def optimizer_step(self, optimizer, actor, scheduler, name):
        optimizer.step()

    def get_grad_norm(self, actor):
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in actor.parameters()]).item()


def experience(actor: Actor):
    from openrlhf.trainer.ppo_utils.experience import Experience

    draw = torch.Generator("cpu").manual_seed(5)
    with torch.no_grad():
        old = actor(SEQUENCES, ACTIONS, attention_mask=ATTENTION.long())
    noise = 0.2 * torch.randn(2, *old.shape, generator=draw)
    known = dict(action_log_probs=old, base_action_log_probs=old + noise[0], rollout_log_probs=old + noise[1])
    advantages = torch.randn(3, 1, generator=draw).expand(3, 7).clone()
    masks = dict(attention_mask=ATTENTION.long(), action_mask=ACTIONS)
    return Experience(sequences=SEQUENCES, advantages=advantages, **masks, **known, info={})


@pytest.mark.parametrize("correction", ["off", "token clip", "seq binary_kl"])
@pytest.mark.parametrize("policy_loss_type", ["ppo", "gspo"])
def test_ten_steps_of_the_trainer(policy_loss_type, correction):
    """``ActorPPOTrainer.training_step`` with KL and entropy bonus, patched and not: the same metrics and weights."""
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    args = arguments(correction, policy_loss_type=policy_loss_type, use_loss=True, estimator="k3", entropy_coef=0.01)
    args.train = SimpleNamespace(dynamic_batch_enable=False)

    def trained():
        actor = actor_of(False)
        optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3)
        trainer = SimpleNamespace(
            **dict(args=args, actor=actor, actor_optim=optimizer, strategy=Strategy(), aux_loss=False, ema_model=None),
            replay_buffer=None,
            actor_scheduler=SimpleNamespace(get_last_lr=lambda: [1e-3]),
            actor_loss_fn=loss_of(policy_loss_type=policy_loss_type, **CORRECTIONS[correction]),
        )
        given, statuses = experience(actor), []
        for step in range(10):
            statuses.append(ActorPPOTrainer.training_step(trainer, given, 0.1, step)["metrics"])
            given.info.clear()
        return statuses, [parameter.detach().clone() for parameter in actor.parameters()]

    theirs = trained()
    with patch_openrlhf():
        mine = trained()
    assert theirs[0][-1]["policy_loss"] < theirs[0][0]["policy_loss"] - 0.02
    for own, wanted in zip(mine[0], theirs[0], strict=True):
        assert set(own) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5)
    for own, wanted in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5)


IN_A_WORKER = """
import sys, types
import ray

sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")

@ray.remote
def forward(wanted):
    sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
    if wanted:
        import openrlhf.models
        return openrlhf.models.PolicyLoss.forward.__module__
    return str("openrlhf" in sys.modules)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get([forward.remote(False), forward.remote(True)]))
"""


def test_ray_patches_its_workers():
    """Where one imports OpenRLHF's models, and no other."""
    assert last_line_in_ray("openrlhf", IN_A_WORKER) == "['False', 'grpo_kernels.integrations.openrlhf_losses']"


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_shadow_finds_no_difference(correction, caplog):
    caplog.set_level("INFO", "grpo_kernels.shadow")
    with patch_openrlhf(shadow=1):
        evaluated(loss_of(**CORRECTIONS[correction]), batch("ragged"), {}, torch.float32)
    assert_shadow_sees_rounding(caplog, "OpenRLHF")
