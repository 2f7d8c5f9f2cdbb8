"""Every pair of features gives the reference's numbers or is refused by name, as the committed table says."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from compositions import table as compositions
from compositions.features import REFUSALS, Feature, features
from compositions.table import (
    EITHER,
    REFUSED,
    RIGHT,
    UNKNOWN,
    Call,
    Verdict,
    WrongNumbers,
    compose,
    pairs,
    table,
    verdict_of,
    verdict_of_pair,
)

from grpo_kernels.calls import batch as calls_batch
from grpo_kernels.verification.tolerance import truth_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compositions.md"
REASONS = {pair: refusal.reason for refusal in REFUSALS for pair in refusal.pairs}
BY_NAME = {feature.name: feature for feature in features()}


@functools.cache
def committed() -> dict[tuple[str, str], Verdict]:
    """The page's cells; the reason of a refused one is the listed one."""
    rows = re.findall(r"^\| \d+ \| ([^|]+) \| (.*) \|$", PAGE.read_text(), re.M)
    cells: dict[tuple[str, str], Verdict] = {}
    names = list(BY_NAME)
    for name, line in rows[: len(names)]:
        for other, cell in zip(names, line.split("|"), strict=True):
            cell = cell.strip()
            if cell:
                reason = REASONS.get(frozenset({name, other}), "") if cell.startswith(REFUSED) else ""
                cells[other, name] = Verdict(cell.rstrip("0123456789") or cell, reason)
    return cells


def cases() -> list:
    """Every pair. Of those that are compiled, which take half of the time, two of three are nightly."""
    every = list(pairs())
    compiled = [pair for pair in every if any("compile" in feature.around for feature in pair)]
    nightly = [pair for i, pair in enumerate(compiled) if i % 3]
    return [pytest.param(*pair, marks=[pytest.mark.nightly] if pair in nightly else []) for pair in every]


@pytest.mark.parametrize(("one", "other"), cases(), ids=lambda feature: feature.name)
def test_pair(one, other):
    verdict = verdict_of_pair(one, other)
    listed = REASONS.get(frozenset({one.name, other.name}))
    assert (verdict.cell == REFUSED) == (listed is not None), verdict
    if listed is not None:
        assert verdict.reason == listed
    assert committed()[one.name, other.name].cell == verdict.cell


def test_the_page_is_the_generated_one():
    """Its cells are tested above; everything else follows from them and from the data."""
    assert list(committed()) == [(one.name, other.name) for one, other in pairs()]
    assert table(committed()) == PAGE.read_text()


def test_cells_are_of_every_kind():
    counts = {kind: sum(v.cell == kind for v in committed().values()) for kind in ("1", "2", RIGHT, REFUSED, EITHER)}
    assert min(counts.values()) > 10, counts
    assert counts["1"] + counts["2"] > len(committed()) / 2
    assert {v.cell for v in committed().values()} <= {*counts, UNKNOWN}


def words_of(feature: Feature) -> set[str]:
    """By which a message may call a feature."""
    words = {(feature.function or "").partition(",")[0], *feature.around, *feature.arguments}
    words |= {"config", *map(str, feature.config.values())} if feature.config else set()
    words |= {type(value).__name__ for value in feature.config.values()}
    words |= {"config", "KL", *feature.kl} if feature.kl else set()
    words |= {"config", *(type(scheme).__name__ for scheme in feature.rollout)} if feature.rollout else set()
    words |= {"entropy"} if "entropy_coef" in feature.config else set()
    words |= {"divergence"} if "divergence" in feature.config else set()
    words |= {"fp16"} if feature.dtype == torch.float16 else set()
    words |= {"attach"} if feature.function == "hf.attach" else set()
    return {word for word in words if word}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.feature}: {', '.join(refusal.others)}")
def test_a_refusal_names_both(refusal):
    for name in (refusal.feature, *refusal.others):
        assert any(word in refusal.reason for word in words_of(BY_NAME[name])), name


def test_refusals_are_listed_once():
    every = [pair for refusal in REFUSALS for pair in refusal.pairs]
    assert len(every) == len(set(every))
    assert {name for pair in every for name in pair} <= set(BY_NAME)


WITHOUT_A_VALUE = ("inplace", "grad_scale", "require", "token_losses", "skip_zero_advantage")
"""Features that change how a loss is computed, or what of its gradient is announced."""


def numbers_of(call: Call) -> torch.Tensor:
    inputs = call.batch()
    return truth_of(
        inputs.logits, inputs.named["token_ids"], mask=inputs.named["mask"], **call.keywords(inputs)
    ).gradient.detach()


CHANGING = [
    feature
    for feature in features()
    if (feature.config or feature.kl or feature.rollout or feature.arguments)
    and not set(feature.arguments) & set(WITHOUT_A_VALUE)
]


@pytest.mark.parametrize("feature", CHANGING, ids=lambda feature: feature.name)
def test_the_batch_shows_the_feature(feature):
    """A cell that ignored it would have other numbers."""
    plain, changed = numbers_of(compose()), numbers_of(compose(feature))
    assert (plain - changed).abs().max() > 1e-2 * plain.abs().max()


def test_two_values_of_one_thing():
    assert verdict_of(BY_NAME["bf16"], BY_NAME["fp64"]) == Verdict(EITHER, "two values of dtype")
    assert verdict_of(BY_NAME["support"], BY_NAME["support, a mask"]) == Verdict(EITHER, "two values of support")


def test_more_than_two():
    names = ("packed", "bf16", "token_weights", "KL", "rollout, of tokens", "rollout, OffPolicyMask", "hf.attach")
    call = compose(*(BY_NAME[name] for name in names))
    assert (call.function, call.dtype, call.packed, len(call.rollout)) == ("hf.attach", torch.bfloat16, True, 2)
    assert verdict_of(*(BY_NAME[name] for name in names)).cell == "2"
    names = ("skip_zero_advantage", "advantages by token", "level sequence")
    assert "ratios pooled over sequences" in verdict_of(*(BY_NAME[name] for name in names)).reason


@pytest.mark.parametrize("name", ["packed", "linear_grpo_loss", "hf.attach", "hf.attach, from_logits", "torch.compile"])
def test_a_weight_that_is_dropped_is_seen(monkeypatch, name):
    plain = calls_batch.read_batch

    def forgetful(tokens, config, given):
        return plain(tokens, config, given._replace(token_weights=None))

    for module in ("grpo_kernels.loss", "grpo_kernels.linear"):
        monkeypatch.setattr(f"{module}.read_batch", forgetful)
    with pytest.raises(WrongNumbers, match=f"^{re.escape(name)} with token_weights: "):
        verdict_of(BY_NAME[name], BY_NAME["token_weights"])


@pytest.mark.parametrize("name", list(compositions.FUNCTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_that_is_off_is_seen(name, dtype):
    """Of each leaf, by 2 % in half precision, whose rounding is 0.4 %, and by 1e-4 else."""
    call = Call(function=name, dtype=dtype)
    inputs, function = call.batch(), compositions.FUNCTIONS[name]
    leaves, keywords = function.leaves(inputs, dtype), call.keywords(inputs)
    ran = function.run(inputs, leaves, keywords)(*leaves)
    ran.loss.backward()
    gradients = [leaf.grad for leaf in leaves]
    compositions.judge(call, inputs, keywords, ran, gradients)
    factor = 1.02 if dtype in (torch.bfloat16, torch.float16) else 1.0001
    for i in range(len(leaves)):
        wrong = [gradient * factor if k == i else gradient for k, gradient in enumerate(gradients)]
        with pytest.raises(WrongNumbers):
            compositions.judge(call, inputs, keywords, ran, wrong)
    with pytest.raises(WrongNumbers, match="no gradient"):
        compositions.judge(call, inputs, keywords, ran, [None] * len(leaves))
    with pytest.raises(WrongNumbers):
        compositions.judge(call, inputs, keywords, ran._replace(loss=ran.loss * 1.0001), gradients)
