"""The reference against the 40-digit loops: it is the truth that everything else is compared with."""

from __future__ import annotations

import ast
import inspect

import oracle
import pytest
import torch
from cases import configs, label, make

from grpo_kernels import LossConfig, reference
from grpo_kernels.surrogates import SURROGATES, Clip


def problem_of(case, config: LossConfig, **changes) -> oracle.Problem:
    """A padded case in the oracle's words."""
    batch, length = case.token_ids.shape
    surrogate = (config.surrogate.name,)
    if isinstance(config.surrogate, Clip):
        surrogate += (config.surrogate.low, config.surrogate.high, config.surrogate.dual)
    options = case.options
    fields = dict(
        logits=case.logits[:, :length].tolist(),
        ids=case.token_ids.tolist(),
        advantages=case.advantages[:, None].expand(batch, length).tolist(),
        sequences=[[(b, t) for t in range(length) if case.mask[b, t]] for b in range(batch)],
        old=None if options["old_log_probs"] is None else options["old_log_probs"].tolist(),
        ref=options["ref_log_probs"].tolist(),
        surrogate=surrogate,
        level=config.level,
        aggregation=config.aggregation,
        constant_length=config.constant_length,
        group_size=config.group_size,
        kl_coef=config.kl.coef,
        kl_estimator=config.kl.estimator,
        kl_straight_through=config.kl.gradient != "pathwise",
        kl_ratio_weighted=config.kl.ratio_weighted,
        kl_limit=config.kl.limit,
        entropy_coef=config.entropy_coef,
        entropy_token_mean=config.entropy_aggregation == "token_mean",
        log_ratio_limit=config.log_ratio_limit,
        temperature=options.get("temperature", 1.0),
        logit_scale=options.get("logit_scale", 1.0),
        logit_softcap=options.get("logit_softcap"),
    )
    return oracle.Problem(**{**fields, **changes})


def assert_same(case, config: LossConfig, problem: oracle.Problem) -> None:
    out, gradient = case.reference(config=config)
    assert out.loss.item() == pytest.approx(float(oracle.loss(problem)), rel=1e-13, abs=1e-15)
    expected = torch.tensor(oracle.gradient(problem), dtype=torch.float64)
    length = case.token_ids.shape[1]
    torch.testing.assert_close(gradient[:, :length], expected, rtol=1e-11, atol=1e-15)
    assert (gradient[:, length:] == 0).all()
    for (b, t), (log_prob, entropy) in oracle.log_probs(problem).items():
        assert out.log_probs[b, t].item() == pytest.approx(float(log_prob), rel=1e-13)
        assert out.entropy[b, t].item() == pytest.approx(float(entropy), rel=1e-12)


def small(seed: int = 0, **options):
    return make(batch=4, length=3, vocab=4, dtype=torch.float64, seed=seed, **options)


@pytest.mark.parametrize("config", configs(), ids=label)
def test_reference_is_the_formula(config):
    case = small()
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
def test_on_policy(level):
    config = LossConfig(Clip(), level=level, aggregation="token_mean")
    case = small(old_log_probs=None)
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("transform", [{"temperature": 0.6}, {"logit_scale": 1.7}, {"logit_softcap": 2.5}])
def test_logit_arguments(transform):
    config = LossConfig(Clip(), entropy_coef=0.1)
    case = small(**transform)
    assert_same(case, config, problem_of(case, config))


def test_saturated_log_ratios():
    config = LossConfig(Clip(), log_ratio_limit=0.15)
    case = small()
    saturated = (case.options["old_log_probs"] - case.reference(config=config)[0].log_probs).abs() > 0.15
    assert 0 < (saturated & case.mask).sum() < case.mask.sum()
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"])
def test_normalizer_and_token_weights(aggregation):
    config = LossConfig(Clip(), aggregation=aggregation, constant_length=7, group_size=2)
    weights = torch.rand(4, 3, dtype=torch.float64) * 2
    case = small(normalizer=2.5, token_weights=weights)
    assert_same(case, config, problem_of(case, config, normalizer=2.5, token_weights=weights.tolist()))


def test_reference_shares_no_maths():
    """It may import its options and the containers of its results, nothing else of the package."""
    tree = ast.parse(inspect.getsource(reference))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert imported == {"config", "metrics", "outputs"}


def test_reference_knows_every_surrogate():
    assert reference.VALUES.keys() == SURROGATES.keys()
