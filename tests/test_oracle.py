"""The reference against the 40-digit loops: it is the truth that everything else is compared with."""

from __future__ import annotations

import ast
import math
from dataclasses import fields, replace
from pathlib import Path

import oracle
import pytest
import torch
from cases import ROLLOUTS, configs, exact_log_probs, label, make

from grpo_kernels import KL, Cispo, Gmpo, LossConfig, MaskedIS, OffPolicyMask, TruncatedIS, Vespo
from grpo_kernels.objectives.surrogates import BUILT_IN, Clip
from grpo_kernels.verification import reference


def problem_of(case, config: LossConfig, **changes) -> oracle.Problem:
    """A padded case in the oracle's words."""
    batch, length = case.token_ids.shape
    surrogate = (config.surrogate.name, *(getattr(config.surrogate, f.name) for f in fields(config.surrogate)))
    options = case.options
    rollout = options.get("rollout_log_probs")
    if rollout is not None:
        rollout = [[None if math.isnan(x) else x for x in row] for row in rollout.tolist()]
    given = dict(
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
        kl_gradient=config.kl.gradient,
        kl_ratio_weighted=config.kl.ratio_weighted,
        kl_ratio_cap=config.kl.ratio_cap,
        kl_level=config.kl.level,
        kl_limit=config.kl.limit,
        schemes=tuple((type(scheme).__name__, vars(scheme)) for scheme in config.schemes),
        entropy_threshold=options.get("entropy_threshold"),
        rollout=rollout,
        entropy_coef=config.entropy_coef,
        entropy_token_mean=config.entropy_aggregation == "token_mean",
        log_ratio_limit=config.log_ratio_limit,
        temperature=options.get("temperature", 1.0),
        logit_scale=options.get("logit_scale", 1.0),
        logit_softcap=options.get("logit_softcap"),
    )
    return oracle.Problem(**{**given, **changes})


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
    """It may import its options, the containers of its inputs and results and the checks of what users pass; nothing
    else of the package."""
    names = set()
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 3:
                names |= {alias.name for alias in node.names}
    options = {"KL", "Divergence", "LossConfig", "Normalizer", "resolve_config"}
    containers = {"DIVERGENCE_SUMS", "LossOutput", "Metrics", "Point", "Teacher"}
    assert names == options | containers | {"check_pooled", "read_mask"}


def test_reference_knows_every_surrogate():
    assert reference.VALUES.keys() == {cls.name for cls in BUILT_IN}


@pytest.mark.parametrize("schemes", ROLLOUTS, ids=str)
@pytest.mark.parametrize("old", [True, False])
def test_rollout_correction(schemes, old):
    case = sampled(old_log_probs=None) if not old else sampled()
    config = LossConfig(Clip(), rollout=schemes)
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("level", ["sequence", "sequence_product"])
@pytest.mark.parametrize("scheme", [TruncatedIS(1.1), MaskedIS(0.8, 1.3), OffPolicyMask(0.05)], ids=str)
def test_rollout_correction_of_pooled_ratios(scheme, level):
    case = sampled()
    config = LossConfig(Clip(), level=level, rollout=scheme)
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize(
    "schemes", [TruncatedIS(1.1), MaskedIS(0.8, 1.3), (TruncatedIS(1.1), OffPolicyMask(0.02))], ids=str
)
def test_vespo_multiplies_rollout_weights_into_its_ratio(schemes):
    case = sampled()
    config = LossConfig(Vespo(), level="sequence_product", rollout=schemes)
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("kl_level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("surrogate", "level"), [(Vespo(), "sequence_product"), (Gmpo(0.1, 0.1), "sequence"), (Clip(), "token")]
)
@pytest.mark.parametrize("kl", [KL(0.1, ratio_weighted=True), KL(0.1, "k1", "weighted_k2", ratio_cap=1.1)], ids=str)
def test_a_kl_has_a_level_of_its_own(surrogate, level, kl, kl_level):
    case = sampled()
    config = LossConfig(surrogate, level=level, kl=replace(kl, level=kl_level), rollout=TruncatedIS(1.1))
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("surrogate", [Clip(), Cispo()], ids=str)
def test_entropy_threshold(surrogate):
    case = small()
    entropy = case.reference(config="grpo")[0].entropy[case.mask]
    case.options["entropy_threshold"] = float(entropy.median() + 1e-3)
    config = LossConfig(surrogate, kl=KL(0.1))
    assert_same(case, config, problem_of(case, config))


def sampled(**options):
    """A small case with the sampler's log-probs, one of them unknown."""
    case = small(**options)
    near = exact_log_probs(case.logits[:, :3], case.token_ids)
    noise = torch.randn(near.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rollout = near + 0.25 * noise
    b, t = case.mask.nonzero()[1].tolist()
    rollout[b, t] = math.nan
    case.options["rollout_log_probs"] = rollout
    return case
