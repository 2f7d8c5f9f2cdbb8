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

from grpo_kernels import (
    KL,
    Cispo,
    Divergence,
    Gmpo,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    SequenceMean,
    Teacher,
    TruncatedIS,
    Vespo,
    grpo_loss,
    token_divergence,
)
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.objectives.surrogates import BUILT_IN, Clip
from grpo_kernels.verification import reference
from grpo_kernels.verification.reference.divergences import divergence_of


def problem_of(case, config: LossConfig, **changes) -> oracle.Problem:
    """A padded case in the oracle's words."""
    batch, length = case.token_ids.shape
    term = config.surrogate
    surrogate = ("none",) if term is None else (term.name, *(getattr(term, f.name) for f in fields(term)))
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
        rollout_kl={f"kl_{name}": value for name, value in vars(config.rollout_kl).items()}
        if config.rollout_kl.coef
        else None,
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
    if config.divergence is not None:
        teacher, own = options["teacher"], config.divergence.teacher_temperature
        given |= dict(
            teacher=teacher.logits[:, :length].tolist(),
            teacher_form=(own or options.get("temperature", 1.0), teacher.logit_scale, teacher.logit_softcap),
            divergence=(config.divergence.kind, config.divergence.mix),
            divergence_coef=config.divergence.coef,
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


@pytest.mark.parametrize(
    "config",
    [pytest.param(one, marks=pytest.mark.nightly if n % 3 else ()) for n, one in enumerate(configs())],
    ids=label,
)
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


@pytest.mark.parametrize("field", ["kl", "rollout_kl"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_weight_of_zero_is_none_of_the_kls(field, level):
    """A ratio weighs the KL, and what weighs the policy term is not on it."""
    config = LossConfig(Clip(), level=level, **{field: KL(0.3, ratio_weighted=True)})
    weights = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).expand(4, 3)
    case = small(token_weights=weights)
    assert_same(case, config, problem_of(case, config, token_weights=weights.tolist()))


def test_reference_shares_no_maths():
    """It may import its options, the containers of its inputs and results and the checks of what users pass; nothing
    else of the package."""
    names = set()
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 3:
                names |= {alias.name for alias in node.names}
    schemes = {"MaskedIS", "OffPolicyMask", "Rejection", "TruncatedIS"}
    options = {"AGGREGATIONS", "KL", "Divergence", "LossConfig", "Normalizer", "resolve_config", *schemes}
    containers = {"DIVERGENCE_SUMS", "LossOutput", "Metrics", "Point", "Teacher", "TokenLogProbs"}
    assert names == options | containers | {
        "check_flag",
        "check_pooled",
        "check_teacher",
        "checks_enabled",
        "fail",
        "read_mask",
    }


def test_classes_of_ones_own():
    """A scheme made of another is computed by its own factor; an aggregation that only its class knows is refused."""
    case = make(batch=2, length=3, vocab=11, empty=False, dtype=torch.float64)
    log_probs = reference.grpo_loss(case.logits, *case.arguments).log_probs
    given = {"rollout_log_probs": log_probs - torch.tensor([[0.5, -0.5, 0.25]], dtype=torch.float64)}
    ours, others = type("TruncatedIS", (TruncatedIS,), {"factor": lambda self, rho: rho**2}), case.arguments
    losses = [
        function(case.logits, *others, **given, config=LossConfig(rollout=scheme)).loss
        for function in (reference.grpo_loss, grpo_loss)
        for scheme in (ours(2.0), TruncatedIS(2.0))
    ]
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-12, atol=0)
    assert losses[0] != losses[1]
    behind = {"rollout_log_probs": log_probs + 2.0, "old_log_probs": log_probs}
    half = type("Half", (OffPolicyMask,), {"factor": lambda self, A, fall: 0.5 + 0.5 * (A >= 0).to(A)})
    found = [
        function(case.logits, *others, **behind, config=LossConfig(rollout=half(1.0))).loss
        for function in (reference.grpo_loss, grpo_loss)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    mine = type("SequenceMean", (SequenceMean,), {})
    with pytest.raises(ValueError, match=r"reference.grpo_loss: expected an aggregation of the package's"):
        reference.grpo_loss(case.logits, *case.arguments, config=LossConfig(aggregation=mine()))
    for option in ("skip_zero_advantage", "check"):
        with pytest.raises(TypeError, match=f"expected {option}=? to be True or False; got 'no'"):
            reference.grpo_loss(case.logits, *case.arguments, **{option: "no"})


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


# Divergences


def taught(seed: int = 0, form: dict | None = None, **options):
    """A small case beside a teacher at half a nat from it."""
    case = small(seed, **options)
    noise = torch.randn(case.logits.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    case.options["teacher"] = Teacher(logits=case.logits + 0.5 * noise, **(form or {}))
    return case


@pytest.mark.parametrize("surrogate", [Clip(), None], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_divergences(kind, surrogate):
    case = taught()
    config = LossConfig(surrogate, divergence=Divergence(kind, 0.7, mix=0.3), entropy_coef=0.1)
    assert_same(case, config, problem_of(case, config))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("form", "options", "own"),
    [
        ({}, {"temperature": 0.6}, None),
        ({}, {"temperature": 0.6}, 1.4),
        ({"logit_scale": 0.7, "logit_softcap": 3.0}, {"logit_scale": 1.7, "logit_softcap": 2.5}, 1.2),
    ],
    ids=["one temperature", "two temperatures", "scales and softcaps"],
)
def test_divergences_of_both_models_forms(kind, form, options, own):
    case = taught(form=form, **options)
    config = LossConfig(Clip(), divergence=Divergence(kind, 0.7, teacher_temperature=own))
    assert_same(case, config, problem_of(case, config))


def drawn(size: int, spread: float, seed: int) -> torch.Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a policy and of a teacher, float64, where digits are lost or numbers overflow."""
    row, other, spread = drawn(12, 3, 0), drawn(12, 3, 1), drawn(12, 1, 2)
    confident = torch.tensor([20.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    large = drawn(12, 1, 3) * 10.0 ** torch.linspace(0, 4, 12, dtype=torch.float64)
    impossible = row.clone()
    impossible[::3] = -math.inf
    return {
        "apart": (row, other),
        "near": (row, row + 1e-3 * spread),
        "nearer": (row, row + 1e-6 * spread),
        "nearest": (row, row.nextafter(torch.full_like(row, math.inf))),
        "an offset": (row + 700, row + 1e-3 * spread - 900),
        "confident": (confident, confident + torch.tensor([0.0, 1.0, 0.0, 0.0])),
        "saturated": (10 * row, 10 * other),
        "opposite": (torch.tensor([104.0, 0.0, -500.0]).double(), torch.tensor([0.0, 104.0, -300.0]).double()),
        "large": (large, large + spread),
        "large and apart": (large, large.flip(0)),
        "both impossible": (impossible, torch.where(impossible.isinf(), impossible, other)),
        "teacher impossible": (other, impossible),
        "policy impossible": (impossible, other),
    }


PAIRS = _pairs()


def exact_of(kind: str, mix: float, row: torch.Tensor, teacher: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """D, and its gradient in the policy's logits by central differences where D is finite."""
    log_q, z = oracle.log_softmax(teacher.tolist()), row.tolist()

    def value(j: int, step):
        moved = [oracle.mpf(x) + (step if i == j else 0) for i, x in enumerate(z)]
        return oracle.divergence(kind, mix, oracle.log_softmax(moved), log_q)

    known = value(0, 0)
    if known == oracle.mp.inf:
        return math.inf, None
    slopes = [(value(j, oracle.STEP) - value(j, -oracle.STEP)) / (2 * oracle.STEP) for j in range(len(z))]
    return float(known), torch.tensor([float(slope) for slope in slopes], dtype=torch.float64)


LOST = {"an offset": 1e-12, "saturated": 1e-15}
"""Digits of a slope that float64 cannot have: logits 1600 apart are subtracted; p/m of many columns is 1/(1 - w)."""


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_digits_of_divergences(kind, pair):
    """The reference to the last digits of p·log p; the plain backend in float64 to those of D itself."""
    row, teacher = PAIRS[pair]
    value, gradient = exact_of(kind, 0.3, row, teacher)
    config = Divergence(kind, mix=0.3)

    leaf = row.clone().requires_grad_()
    found = divergence_of(config, torch.log_softmax(leaf, -1)[None], torch.log_softmax(teacher, -1)[None])
    size = max(float(z[z.isfinite()].abs().max()) for z in (row, teacher))
    assert found.item() == pytest.approx(value, rel=1e-13, abs=1e-15 * size)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    other = row.clone().view(1, 1, -1).requires_grad_()
    out = token_divergence(other, Teacher(logits=teacher.view(1, 1, -1)), ids, divergence=config, backend="torch")
    lost = LOST.get(pair, 0.0)
    slack = 1e-16 if kind == "tvd" else 1e-30  # of one, the terms are p - q, of the others its squares
    assert out.divergence.item() == pytest.approx(value, rel=1e-12 + 1e3 * lost, abs=slack)
    unsure = kind == "tvd" and pair in ("nearest", "large")  # which of p and q is larger
    if gradient is None or unsure:
        return
    found.sum().backward()
    out.divergence.sum().backward()
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-15 * size)
    error = (other.grad[0, 0] - gradient).abs()
    assert (error <= 1e-10 * gradient.abs() + lost * torch.softmax(row, -1) + 1e-21).all()
