"""A KL to the sampler beside that to the reference: ``LossConfig(rollout_kl=...)`` and ``rollout_kl_coef=``."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import KLS, RUNNING, Case, configs, label, make, sampler
from test_loss import check
from test_oracle import assert_same, problem_of, sampled

from grpo_kernels import (
    KL,
    Clip,
    DppoTV,
    LossConfig,
    Reinforce,
    TruncatedIS,
    grpo_loss,
    hf,
    linear_grpo_loss,
    match,
    policy_loss,
)

BOTH = LossConfig(Clip(0.2, 0.28), kl=KL(0.1), rollout_kl=KL(0.3, "k2"))


def with_sampler(**options) -> Case:
    case = make(**options)
    case.options["rollout_log_probs"] = sampler(case)
    return case


# By hand


def test_by_hand():
    """k2 of two tokens beside k3 to the reference; a third token's sampler is unknown."""
    log_probs = torch.tensor([[-1.0, -2.0, -1.5]], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([[-1.5, -1.0, math.nan]], dtype=torch.float64)
    ref = torch.tensor([[-1.0, -1.0, -1.5]], dtype=torch.float64)
    config = LossConfig(Reinforce(), aggregation="sequence_sum", kl=KL(0.1), rollout_kl=KL(0.5, "k2"))
    out = policy_loss(log_probs, torch.zeros(1), rollout_log_probs=rollout, ref_log_probs=ref, config=config)
    out.loss.backward()
    k3 = math.e - 2
    assert out.loss.item() == pytest.approx(0.1 * k3 + 0.5 * (0.125 + 0.5))
    expected = [0.5 * 0.5, 0.5 * -1.0 + 0.1 * (1 - math.e), 0.0]
    assert log_probs.grad[0].tolist() == pytest.approx(expected)
    m = out.metrics
    assert float(m.kl_loss) == pytest.approx(0.1 * k3)
    assert float(m.rollout_kl_loss) == pytest.approx(0.5 * 0.625)
    assert (float(m.rollout_unknown), float(m.rollout_count)) == (1, 2)
    assert "0.5·k2(ℓ - rollout)" in repr(config)


def test_the_old_policy_stands_for_the_sampler():
    case = with_sampler(dtype=torch.float64)
    old = case.options["old_log_probs"]
    expected, gradient = case.run(config=BOTH, rollout_log_probs=old)
    out, found = case.run(config=BOTH, rollout_log_probs=None)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(found, gradient)
    assert out.metrics.rollout_unknown == 0
    assert (case.run(config=BOTH)[1] != gradient).any()  # with the sampler's own


@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss", "policy_loss"])
def test_neither_of_them(function):
    log_probs = -torch.rand(2, 3)
    calls = {
        "grpo_loss": lambda **o: grpo_loss(
            torch.randn(2, 3, 7), torch.ones(2, 3, dtype=torch.int64), torch.ones(2), **o
        ),
        "linear_grpo_loss": lambda **o: linear_grpo_loss(
            torch.randn(2, 3, 4), torch.randn(7, 4), torch.ones(2, 3, dtype=torch.int64), torch.ones(2), **o
        ),
        "policy_loss": lambda **o: policy_loss(log_probs, torch.ones(2), **o),
    }
    expected = rf"{function}: expected rollout_log_probs \(the sampler's\), or else old_log_probs, for the KL term"
    for options in ({"config": LossConfig(rollout_kl=KL(0.1))}, {"rollout_kl_coef": 0.1}):
        with pytest.raises(ValueError, match=expected):
            calls[function](**options)
        calls[function](**options, rollout_log_probs=log_probs)
        calls[function](**options, old_log_probs=log_probs)


# Against the reference, and the reference against the loops of 40 digits


@pytest.mark.parametrize(
    "kl", [pytest.param(kl, marks=pytest.mark.nightly if n % 2 else ()) for n, kl in enumerate(KLS[1:])], ids=str
)
def test_reference_is_the_formula(kl):
    case = sampled()
    for level in ("token", "sequence", *RUNNING):
        config = LossConfig(Clip(), level=level, kl=KL(0.1), rollout_kl=kl)
        assert_same(case, config, problem_of(case, config))


OF_SAMPLER = [config for config in configs() if config.rollout_kl.coef]


@pytest.mark.parametrize("config", OF_SAMPLER, ids=label)
def test_every_form(backend, config):
    """configs() have it with old log-probs in the sampler's place; here with the sampler's."""
    check(with_sampler(noise=0.2, dtype=torch.float64), backend, config=config)


@pytest.mark.parametrize("rollout", [(), TruncatedIS(1.1)], ids=str)
@pytest.mark.parametrize("old", [True, False])
def test_beside_a_rollout_scheme(backend, rollout, old):
    """It is never multiplied by the scheme's factor."""
    case = with_sampler(**({} if old else {"old_log_probs": None}))
    check(case, backend, config=dataclasses.replace(BOTH, rollout=rollout))
    check(case, backend, config=dataclasses.replace(BOTH, rollout=rollout), token_weights=torch.rand(case.mask.shape))


@pytest.mark.parametrize("level", ["sequence_product", *RUNNING])
def test_a_level_of_its_own(backend, level):
    case = with_sampler(noise=0.2)
    of_sampler = KL(0.2, ratio_weighted=True, level=level)
    for policy in ("token", "sequence"):
        config = LossConfig(level=policy, kl=KL(0.1, ratio_weighted=True), rollout_kl=of_sampler)
        check(case, backend, config=config)
        out, _ = case.run("cpu", config=config)
        assert (out.route.passes, f"pooled at level '{level}'" in out.route.reason) == (2, True)


def test_it_keeps_the_one_pass():
    case = with_sampler()
    for config in (BOTH, LossConfig(rollout_kl=KL(0.1, ratio_weighted=True))):
        for options in ({}, {"rollout_log_probs": None}, {"old_log_probs": None}):
            assert case.run("cpu", config=config, require="fused", **options)[0].route.passes == 1


@pytest.mark.parametrize("function", ["hidden", "log_probs"])
def test_other_functions(function):
    case = with_sampler(vocab=19, dtype=torch.float64, extra_row=False)
    expected, wanted = case.reference(config=BOTH)
    leaf = case.logits.clone().requires_grad_()
    options = {**case.options, "config": BOTH}
    if function == "hidden":
        out = linear_grpo_loss(leaf, torch.eye(19, dtype=torch.float64), *case.arguments, chunk_bytes=4000, **options)
    else:
        log_p = leaf.log_softmax(-1)
        log_probs = log_p.gather(-1, case.token_ids[..., None]).squeeze(-1)
        out = policy_loss(log_probs, case.advantages, case.mask, **options)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-9, atol=1e-13)
    for name in ("kl_loss", "rollout_kl_loss", "rollout_unknown", "k3_rollout"):
        torch.testing.assert_close(getattr(out.metrics, name), getattr(expected.metrics, name).double())


def test_what_an_attached_model_is_given():
    """Its numbers are those of docs/compositions.md."""
    given = hf.batch(token_ids=torch.ones(1, 2), advantages=torch.ones(1), rollout_kl_coef=0.3)
    assert given["rollout_kl_coef"] == 0.3


# What an unknown token is, and what weighs nothing


@pytest.mark.parametrize(
    "kl", [KL(0.3, "k2"), KL(0.3, ratio_weighted=True), KL(0.3, gradient="score_function")], ids=str
)
def test_an_unknown_token_has_no_part(backend, kl):
    """As if its term were not there: value, gradient and every other token's bits."""
    case = with_sampler(dtype=torch.float64)
    config = LossConfig(rollout_kl=kl)
    rollout = case.options["rollout_log_probs"]
    unknown = case.mask & (torch.rand(case.mask.shape) < 0.4)
    case.options["rollout_log_probs"] = torch.where(unknown, math.nan, rollout)
    out, gradient = case.run(backend, config=config)
    plain, without = case.run(backend, config=LossConfig())
    rows = gradient[:, : case.mask.shape[1]], without[:, : case.mask.shape[1]]
    assert torch.equal(rows[0][unknown], rows[1][unknown])
    known = case.mask & ~case.options["rollout_log_probs"].isnan()
    assert (rows[0][known] != rows[1][known]).any(-1).all()
    assert out.metrics.rollout_unknown == (case.mask & ~known).sum()
    assert float(out.loss) == pytest.approx(float(plain.loss) + float(out.metrics.rollout_kl_loss), rel=1e-12)
    everything = torch.full_like(rollout, math.nan)
    out, gradient = case.run(backend, config=config, rollout_log_probs=everything)
    assert torch.equal(gradient, without)
    assert (out.loss == plain.loss, out.metrics.rollout_kl_loss == 0) == (True, True)


def test_an_impossible_token(backend):
    """ℓ = -inf: no slope; the sampler's -inf is as far as its clamp."""
    case = with_sampler(dtype=torch.float64)
    case.logits[0, 0, case.token_ids[0, 0]] = -math.inf
    case.options["rollout_log_probs"][0, 1] = -math.inf
    config = LossConfig(rollout_kl=KL(0.3, "k2"))
    case.mask[0, :2] = True
    expected, wanted = case.reference(config=config)
    out, gradient = case.run(backend, config=config)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-12)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("coefficient", [0.0, torch.tensor(0.0), 0.7, torch.tensor(0.7)], ids=repr)
def test_a_coefficient_of_the_call(backend, coefficient):
    case = with_sampler(dtype=torch.float64)
    out, gradient = case.run(backend, config=LossConfig(), rollout_kl_coef=coefficient)
    expected, wanted = case.run(backend, config=LossConfig(rollout_kl=KL(float(coefficient))))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-18)


def test_a_weight_of_zero(backend):
    """A coefficient of 0 hides what sampler and slopes hold."""
    case = with_sampler()
    case.options["rollout_log_probs"][0, 0] = math.inf
    case.mask[0, 0] = True
    _, expected = case.run(backend, config=LossConfig())
    out, gradient = case.run(backend, config=LossConfig(), rollout_kl_coef=torch.tensor(0.0))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert out.loss.isfinite()


def test_losses_of_tokens():
    case = with_sampler(dtype=torch.float64)
    leaf = case.logits.clone().requires_grad_()
    options = {**case.options, "config": BOTH}
    losses = grpo_loss(leaf, *case.arguments, token_losses=True, **options).token_losses
    counted = (losses.sum(-1) / case.mask.sum(-1).clamp(min=1)).mean()
    counted.backward()
    expected, wanted = case.run(config=BOTH)
    torch.testing.assert_close(counted, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-9, atol=1e-13)


def test_skipping_is_refused():
    case = with_sampler()
    with pytest.raises(ValueError, match="skip_zero_advantage=True .*got a KL term"):
        case.run(config=LossConfig(rollout_kl=KL(0.1)), skip_zero_advantage=True)


def test_what_a_config_takes():
    with pytest.raises(TypeError, match=r"LossConfig\(rollout_kl=...\) must be a KL such as KL\(0.04\); got 0.1"):
        LossConfig(rollout_kl=0.1)
    with pytest.raises((TypeError, ValueError), match=r"config=LossConfig\(rollout_kl="):
        policy_loss(-torch.rand(2, 3), torch.ones(2), rollout_kl=0.1)


# As others write it


def test_prime_rl_beside_a_reference():
    """-M·A·r + kl_tau·(ℓ - rollout)², and a KL to a reference beside it."""
    case = with_sampler(dtype=torch.float64)
    rollout = case.options["rollout_log_probs"] = case.options["rollout_log_probs"].nan_to_num(-1.0)
    config = LossConfig(
        DppoTV(0.2, 0.2), aggregation="sequence_sum", kl=KL(0.01), rollout_kl=KL(2e-3, "k2", limit=(None, None))
    )
    out, gradient = case.run(config=config, old_log_probs=rollout, normalizer=1.0)
    leaf = case.logits.clone().requires_grad_()
    log_p = leaf[:, : case.mask.shape[1]].log_softmax(-1).gather(-1, case.token_ids[..., None]).squeeze(-1)
    A = case.advantages[:, None].double()
    moved = log_p.exp() - rollout.exp()
    kept = ~(((A > 0) & (moved > 0.2)) | ((A < 0) & (moved < -0.2)))
    u = case.options["ref_log_probs"] - log_p
    losses = -A * (log_p - rollout).exp() * kept + 1e-3 * (log_p - rollout) ** 2 + 0.01 * (u.exp() - u - 1)
    loss = (losses * case.mask).sum()
    loss.backward()
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-8, atol=1e-12)


# As match finds it


def k3(log_probs, other):
    return (other - log_probs).exp() - (other - log_probs) - 1


def clipped(log_probs, old, advantages):
    ratio, advantages = (log_probs - old).exp(), advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def mean(values, mask):
    return (values * mask).sum() / mask.sum()


def weighed(lp, old, rollout_logps, A, mask):
    rho = (old - rollout_logps).exp().clamp(max=2.0)
    return mean(rho * clipped(lp, old, A) + 0.05 * (lp - rollout_logps) ** 2, mask)


def without_a_ratio(lp, old, A, mask):
    return mean(0.1 * k3(lp, old) - lp * A[:, None], mask)


def of_a_sampler_alone(lp, rollout_logps, A, mask):
    return mean(clipped(lp, rollout_logps, A) + 0.1 * k3(lp, rollout_logps), mask)


def of_prefixes(lp, old, A, mask):
    products = ((lp - old) * mask).cumsum(-1)
    return mean(clipped(products, torch.zeros_like(old), A) + 0.1 * k3(lp, old), mask)


TOKENS = {"aggregation": "token_mean", "log_ratio_limit": None}
FREE = {"limit": (None, None)}


@pytest.mark.parametrize(
    ("loss", "config", "given"),
    [
        (weighed, LossConfig(rollout=TruncatedIS(2.0), rollout_kl=KL(0.1, "k2", **FREE), **TOKENS), "old rollout"),
        (
            without_a_ratio,
            LossConfig(Reinforce(), rollout_kl=KL(0.1, **FREE), aggregation="token_mean"),
            "old",
        ),
        (of_a_sampler_alone, LossConfig(rollout_kl=KL(0.1, **FREE), **TOKENS), "old"),
        (of_prefixes, LossConfig(level="prefix_product", rollout_kl=KL(0.1, **FREE), **TOKENS), "old"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_match_finds_it(loss, config, given):
    report = match(loss)
    assert report.matched, str(report)
    assert report.config == config, str(report)
    for name in ("old", "rollout"):
        assert (f"{name}_log_probs=" in report.lines[-1].replace("=rollout_log_probs", "=")) == (name in given.split())


def test_match_names_faults_of_it():
    def wrong_sign(lp, old, rollout_logps, A, mask):
        return mean(clipped(lp, old, A) - 0.1 * k3(lp, rollout_logps), mask)

    def adaptive(lp, old, rollout_logps, A, mask):
        kl = k3(lp, rollout_logps)
        return mean(clipped(lp, old, A) + 0.1 * (1 + mean(kl, mask).detach()) * kl, mask)

    def of_its_own(lp, old, rollout_logps, A, mask):
        kl = (k3(lp, rollout_logps) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        return mean(clipped(lp, old, A), mask) + 0.1 * kl.mean()

    reports = [match(loss) for loss in (wrong_sign, adaptive, of_its_own)]
    assert not any(reports)
    assert reports[0].faults == ("the sign of the KL term is wrong: it rewards distance",)
    assert reports[0].config.rollout_kl == KL(0.1, **FREE)
    assert "give it as rollout_kl_coef=" in reports[1].strange[0]
    assert "the KL term has an aggregation of its own" in reports[2].strange[0]
