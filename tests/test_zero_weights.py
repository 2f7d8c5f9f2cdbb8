"""What is masked or weighs 0 has no part in a loss, whatever its other inputs hold; a finite loss has finite gradients.

Both hold over every preset, level, rollout scheme, route, dtype and backend: each case is the plain batch with poison
put where nothing may look, and its loss and gradients must be those of the plain batch, bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cases import DTYPES, LEVELS, ROLLOUTS, RUNNING, SURROGATES, label, make, one_of_each, sampler

from grpo_kernels import KL, Clip, LossConfig, TopK, grpo_loss, linear_grpo_loss
from grpo_kernels.objectives.presets import PRESETS

POISON = (math.nan, math.inf, -math.inf, 3e38)
PER_TOKEN = ("logits", "advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights")


def every_config():
    lengths = {"constant_length": 11, "group_size": 2}
    named = [dataclasses.replace(preset.config, **lengths) for preset in PRESETS.values()]
    crossed = [LossConfig(Clip(), level=level, rollout=scheme) for level in LEVELS for scheme in ROLLOUTS]
    return list(dict.fromkeys([*named, *one_of_each(), *crossed]))


def with_everything(config, dtype=torch.float32, **options):
    """A batch with every per-token tensor, KL and entropy bonus; weights of the user's on every token."""
    case = make(dtype=dtype, **{"config": config, "kl_coef": 0.05, "entropy_coef": 0.01, "grad_scale": 1.0} | options)
    case.options["rollout_log_probs"] = sampler(case)
    case.options["token_weights"] = 0.5 + torch.rand(case.token_ids.shape)
    case.advantages = case.advantages[:, None] + 0.1 * torch.randn(case.token_ids.shape)
    return case


def poisoned(case, where, bad, names=PER_TOKEN):
    """The same with ``bad`` in these inputs of the tokens ``where``."""
    again = dataclasses.replace(case, logits=case.logits.clone(), token_ids=case.token_ids.clone())
    if "logits" in names:
        again.logits[:, : case.token_ids.shape[1]][where] = bad
    if "advantages" in names:
        again.advantages = case.advantages.masked_fill(where, bad)
    filled = {name: case.options[name].masked_fill(where, bad) for name in names if name in case.options}
    again.options = {**case.options, **filled}
    return again


def assert_equal(found, wanted):
    (out, gradient), (plain, expected) = found, wanted
    assert plain.loss.isfinite()
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("bad", POISON)
@pytest.mark.parametrize("config", every_config(), ids=label)
def test_masked_tokens(backend, config, bad):
    case = with_everything(config)
    again = poisoned(case, ~case.mask, bad)
    again.token_ids[~case.mask] = -100
    assert_equal(again.run(backend), case.run(backend))


ROUTES = (
    *({}, {"support": TopK(5)}, {"logit_softcap": 5.0}, {"support": TopK(5), "logit_softcap": 5.0}),
    *({"grad_scale": None}, {"temperature": 0.7, "logit_scale": 1.5}),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_masked_tokens_of_every_dtype_and_route(backend, dtype, options):
    case = with_everything("gspo" if dtype == torch.bfloat16 else "grpo", dtype, **options)
    assert_equal(poisoned(case, ~case.mask, math.nan).run(backend), case.run(backend))


@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_a_row_of_weight_zero_on_every_route(backend, options):
    """NaN in its logits too."""
    case, where = weightless("dapo", **options)
    found = poisoned(case, where, math.nan, ["logits", "old_log_probs"]).run(backend)
    assert_equal(found, case.run(backend))
    assert (found[1][:, : case.token_ids.shape[1]][where] == 0).all()


def weightless(config, dtype=torch.float32, **options):
    """A case, and its token that weighs 0: by the user's factor, with no other term of the loss."""
    case = with_everything(config, dtype, **options)
    where = torch.zeros_like(case.mask)
    where[0, case.mask[0].nonzero()[1]] = True
    case.options |= {"kl_coef": None, "entropy_coef": None}
    case.options["token_weights"] = case.options["token_weights"].masked_fill(where, 0.0)
    return case, where


def of_tokens(config):
    """Whether a token's terms concern nobody else."""
    alone = config.level == "token" and not any(scheme.pooled for scheme in config.schemes)
    return alone and not config.kl.coef and not config.rollout_kl.coef


@pytest.mark.parametrize("bad", POISON)
@pytest.mark.parametrize("name", [name for name in PER_TOKEN if name != "token_weights"])
@pytest.mark.parametrize("config", [config for config in every_config() if of_tokens(config)], ids=label)
def test_a_weight_of_zero(backend, config, name, bad):
    config = dataclasses.replace(config, entropy_coef=0.0)
    case, where = weightless(config)
    found = poisoned(case, where, bad, [name]).run(backend)
    assert_equal(found, case.run(backend))
    assert (found[1][:, : case.token_ids.shape[1]][where] == 0).all()


@pytest.mark.parametrize("bad", POISON)
@pytest.mark.parametrize("name", ["old_log_probs", "advantages"])
def test_the_reference_leaves_it_out_too(name, bad):
    case, where = weightless(LossConfig(Clip(0.2, 0.28)))
    out, gradient = poisoned(case, where, bad, [name]).reference(grad_scale=None)
    plain, expected = case.reference(grad_scale=None)
    assert_equal((out, gradient), (plain, expected))
    assert (gradient[:, : case.token_ids.shape[1]][where] == 0).all()


@pytest.mark.parametrize("config", [*one_of_each(), *(LossConfig(rollout=one) for one in ROLLOUTS)], ids=label)
def test_metrics_count_tokens_of_weight_zero(config):
    """Ratios, their bounds and the factors of a sequence are of all live tokens, whatever the policy term weighs."""
    case = make(dtype=torch.float64, config=config, noise=0.4)
    case.options["rollout_log_probs"] = sampler(case)
    case.options["token_weights"] = (torch.arange(case.mask.numel()).view(case.mask.shape) % 3 != 0).double()
    case.advantages = case.advantages[:, None] + 0.1 * torch.randn(case.mask.shape, dtype=torch.float64)
    (out, gradient), (expected, exact) = case.run(None), case.reference()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(out.metrics.vector, expected.metrics.vector, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "token"])
@pytest.mark.parametrize("rollout", [(), *ROLLOUTS], ids=str)
def test_a_sequence_of_weight_zero(backend, level, rollout):
    """Pooled ratios are NaN in such a sequence alone, which weighs nothing."""
    case, _ = weightless(LossConfig(Clip(), level=level, rollout=rollout))
    where = torch.zeros_like(case.mask)
    where[3] = True
    case.options["token_weights"] = case.options["token_weights"].masked_fill(where, 0.0)
    found = poisoned(case, where, math.nan, PER_TOKEN[1:-1]).run(backend)
    assert_equal(found, case.run(backend))
    assert (found[1][3] == 0).all()


def test_an_entropy_below_the_threshold(backend):
    case = make(kl_coef=None, config="dapo")
    entropy = case.run(backend)[0].entropy
    threshold = float(entropy[case.mask].median())
    case.options |= {"entropy_threshold": threshold, "ref_log_probs": None}
    below = case.mask & (entropy < threshold)
    assert 5 < below.sum() < case.mask.sum() - 5
    assert_equal(poisoned(case, below, math.nan, ["old_log_probs"]).run(backend), case.run(backend))


@pytest.mark.parametrize("kl", [KL(0.1), KL(0.1, "k1"), KL(0.1, ratio_weighted=True), KL(0.1, "abs")], ids=str)
def test_a_coefficient_of_zero(backend, kl):
    """``kl_coef`` annealed to 0 on the device: a reference that is NaN has no part any more."""
    case = make(config=LossConfig(Clip(), kl=kl), kl_coef=torch.zeros(()))
    everywhere = torch.ones_like(case.mask)
    assert_equal(poisoned(case, everywhere, math.nan, ["ref_log_probs"]).run(backend), case.run(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", ["grpo", "gspo", "cispo", "vespo"])
def test_hidden_states(backend, dtype, config):
    """A masked sequence of a group without survivors: its advantage is 0/0."""
    case = make(dtype=dtype, vocab=31)
    hidden, weight = torch.randn(6, 9, 8).to(dtype), torch.randn(31, 8).to(dtype)
    case.mask[2:4] = False

    def run(advantages, states, old):
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"old_log_probs": old, "config": config, "backend": backend}
        out = linear_grpo_loss(*leaves, case.token_ids, advantages, case.mask, **options)
        out.loss.backward()
        return [out.loss, *(leaf.grad for leaf in leaves)]

    old = case.options["old_log_probs"]
    plain = run(case.advantages, hidden, old)
    assert all(values.isfinite().all() for values in plain)
    bad = case.advantages.clone()
    bad[2], bad[3] = math.nan, math.inf
    dead = ~case.mask
    found = run(bad, hidden.masked_fill(dead[..., None], math.nan), old.masked_fill(dead, math.nan))
    for values, wanted in zip(found, plain, strict=True):
        assert torch.equal(values, wanted)
    assert (found[1][dead] == 0).all()


EXTREMES = (-1e4, -200.0, -95.0, -60.0, -20.0, -1e-8, 0.0)
"""Log-probs at which fp32 exponentials of differences overflow, underflow or cancel. None lies within a factor of 1e10
of the largest number: there a slope may overflow before its value does."""


@pytest.mark.sample(triton=1, cuda=2, torch=7, cpu=9)
@pytest.mark.parametrize("limit", [20.0, None])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_a_finite_loss_has_finite_gradients(backend, surrogate, limit):
    """Ratios and references of any size, advantages of both signs and 0; what is infinite is the loss as well."""
    combinations = list(itertools.product(EXTREMES, EXTREMES, (-2.0, 0.0, 1.5)))[::7]
    logits, ids = torch.tensor([[[0.0, -1.0, -100.0, 2.0]] * 2]), torch.tensor([[0, 2]])
    finite = 0
    for level in (*LEVELS, *RUNNING) if surrogate.uses_ratio else ["token"]:
        for kl in (KL(), KL(0.1, limit=(limit, None)), KL(0.1, "k1", ratio_weighted=True, limit=(limit, None))):
            config = LossConfig(surrogate, level=level, kl=kl, log_ratio_limit=limit, aggregation="sequence_sum")
            for old, ref, advantage in combinations:  # a call each: an infinite loss hides no other
                leaf = logits.clone().requires_grad_()
                compared = {"old_log_probs": torch.tensor([[old, ref]]), "ref_log_probs": torch.tensor([[ref, old]])}
                out = grpo_loss(leaf, ids, torch.tensor([advantage]), config=config, backend=backend, **compared)
                out.loss.backward()
                if bool(out.loss.isfinite()):
                    finite += 1
                    assert leaf.grad.isfinite().all(), (level, kl, old, ref, advantage)
    assert finite > 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", every_config(), ids=label)
@pytest.mark.sample(torch=80, cpu=172)
def test_every_config_at_extreme_log_probs(backend, config, dtype):
    """Old, reference and sampler's log-probs of any size, in each dtype; fp16 with limits that it can hold."""
    if dtype == torch.float16:
        kls = {name: getattr(config, name) for name in ("kl", "rollout_kl")}
        kls = {name: dataclasses.replace(kl, limit=(4.0, kl.limit[1])) for name, kl in kls.items()}
        config = dataclasses.replace(config, log_ratio_limit=4.0, **kls)
    lengths = {"group_size": 1} if config.aggregation == "group_mean" else {}
    config = dataclasses.replace(config, **lengths)
    logits = torch.tensor([[[0.0, -1.0, -100.0, 2.0]] * 3], dtype=dtype)
    ids, names = torch.tensor([[0, 2, 3]]), ("old_log_probs", "ref_log_probs", "rollout_log_probs")
    finite = 0
    for i, advantage in enumerate((-2.0, 0.0, 1.5) * 3):
        leaf = logits.clone().requires_grad_()
        compared = {name: torch.tensor([EXTREMES[(i + k) % 5 : (i + k) % 5 + 3]]) for k, name in enumerate(names)}
        options = {"config": config, "kl_coef": 0.1, "entropy_coef": 0.01, "grad_scale": 1.0, **compared}
        out = grpo_loss(leaf, ids, torch.tensor([advantage]), backend=backend, **options)
        out.loss.backward()
        if bool(out.loss.isfinite()):
            finite += 1
            assert leaf.grad.isfinite().all(), (i, advantage)
    assert finite >= 2
