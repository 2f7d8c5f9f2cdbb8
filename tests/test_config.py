"""LossConfig: presets, equality, the equation it prints, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
import typing

import numpy as np
import pytest
import torch
from cases import SURROGATES

import grpo_kernels
from grpo_kernels import (  # fmt: skip
    KL,
    Cispo,
    Clip,
    Constant,
    Divergence,
    DppoKL,
    DppoTV,
    Dro,
    Gmpo,
    GroupMean,
    GRPOLoss,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    Reinforce,
    Sapo,
    TokenMean,
    TopK,
    TopP,
    TruncatedIS,
    Unclipped,
    Vespo,
    normalizer,
)
from grpo_kernels.objectives.config import AGGREGATIONS, LEVELS
from grpo_kernels.objectives.levels import LevelName
from grpo_kernels.objectives.names import ELSEWHERE, translated
from grpo_kernels.objectives.presets import PRESETS
from grpo_kernels.objectives.rollout import Rollout
from grpo_kernels.objectives.surrogates import BUILT_IN


def test_is_a_value():
    config = LossConfig(Clip(0.2, 0.28), kl=KL(0.04))
    assert config == LossConfig(Clip(0.2, 0.28), kl=KL(0.04))
    assert hash(config) == hash(LossConfig(Clip(0.2, 0.28), kl=KL(0.04)))
    assert config != LossConfig(Clip(0.2, 0.2), kl=KL(0.04))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.level = "sequence"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    preset = LossConfig.presets()[name]
    assert LossConfig.preset(name) == preset.config
    assert preset.config.kl.coef == preset.config.entropy_coef == 0
    assert any(year in preset.paper for year in ("1992", "2017", "2024", "2025", "2026"))
    assert preset.coefficients
    changed = LossConfig.preset(name, kl=KL(0.04))
    assert changed.kl == KL(0.04)
    assert changed.surrogate == preset.config.surrogate


def test_presets_are_the_papers():
    got = {name: (p.config.surrogate, p.config.level, p.config.aggregation) for name, p in PRESETS.items()}
    clip = Clip(0.2, 0.2)
    assert got == {
        "reinforce": (Reinforce(), "token", "sequence_sum"),
        "ppo": (clip, "token", "token_mean"),
        "grpo": (clip, "token", "sequence_mean"),
        "dapo": (Clip(0.2, 0.28), "token", "token_mean"),
        "dapo_paper": (Clip(0.2, 0.28), "token", "group_mean"),
        "dr_grpo": (clip, "token", "constant"),
        "bnpo": (clip, "token", "token_mean"),
        "gspo": (Clip(3e-4, 4e-4), "sequence", "sequence_mean"),
        "luspo": (Clip(3e-4, 4e-4), "sequence", "sequence_sum"),
        "gmpo": (Gmpo(0.4, 0.4), "sequence", "sequence_mean"),
        "rloo": (clip, "sequence_product", "sequence_mean"),
        "gpg": (Reinforce(), "token", "token_mean"),
        "cispo": (Cispo(cap=5.0), "token", "token_mean"),
        "sapo": (Sapo(1.0, 1.05), "token", "sequence_mean"),
        "vespo": (Vespo(2.0, 3.0, 3.0, 2.0), "sequence_product", "token_mean"),
        "dppo_tv": (DppoTV(0.2, 0.2, cap=20.0), "token", "token_mean"),
        "dppo_kl": (DppoKL(0.2, 0.2, cap=20.0), "token", "token_mean"),
        "prime": (DppoTV(0.2, 0.2), "token", "token_mean"),
        "intellect2": (Clip(0.2, 0.2, dual=4.0), "token", "token_mean"),
        "dro": (Dro(0.1), "token", "token_mean"),
    }


def test_presets_cannot_be_changed_in_place():
    with pytest.raises(TypeError):
        LossConfig.presets()["grpo"] = None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equation_names_every_part(level, aggregation):
    config = LossConfig(
        Clip(0.1, 0.3, dual=4.0),
        level,
        aggregation,
        KL(0.07, "k2"),
        entropy_coef=0.25,
        constant_length=77,
        group_size=3,
    )
    text = repr(config)
    for part in ("0.9", "1.3", "min(r, 4)", "0.07·k2", "0.25·entropy", "77" if aggregation == "constant" else "f"):
        assert part in text, part
    assert text.startswith("LossConfig(")
    assert " - 0.25·entropy" in text
    assert " + 0.25·entropy" in repr(dataclasses.replace(config, entropy_coef=-0.25))
    equations = {LossConfig(Clip(), level=a, aggregation=b).equation() for a in LEVELS for b in AGGREGATIONS}
    assert len(equations) == len(LEVELS) * len(AGGREGATIONS)


def test_an_equation_says_what_every_ratio_in_it_is():
    """Without a ratio of the policy term too."""
    own, other = KL(0.1, ratio_weighted=True), KL(0.2, "k1", ratio_weighted=True, level="sequence")
    token, sequence = ", r = exp(ℓ - old)", ", r at level sequence = exp(mean_t(ℓ - old))"
    for surrogate in (None, Reinforce()):
        assert LossConfig(surrogate, kl=own).equation().endswith(f"0.1·r·k3(ℓ - ref){token}")
        assert LossConfig(surrogate, kl=other).equation().endswith(f"0.2·r at level sequence·k1(ℓ - ref){sequence}")
        assert LossConfig(surrogate, kl=own, rollout_kl=other).equation().endswith(token + sequence)
        assert "r =" not in LossConfig(surrogate, kl=KL(0.1)).equation()
        assert "r =" not in LossConfig(surrogate, kl=KL(0.0, ratio_weighted=True)).equation()
    assert LossConfig(kl=other).equation().endswith(token + sequence)


def test_every_surrogate_has_a_case():
    assert {type(surrogate) for surrogate in SURROGATES} == set(BUILT_IN)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_every_surrogate_has_its_papers(surrogate):
    assert all((surrogate.equation, surrogate.slope_equation, surrogate.found_in, type(surrogate).__doc__))
    assert any(digit.isdigit() for digit in surrogate.paper)
    assert len(surrogate.parameters()) <= 8
    assert repr(surrogate) in repr(LossConfig(surrogate))
    assert surrogate.written() in LossConfig(surrogate).equation()


def test_rollout_schemes():
    one = LossConfig(rollout=TruncatedIS(2.0))
    assert one == LossConfig(rollout=(TruncatedIS(2.0),))
    assert hash(one) == hash(LossConfig(rollout=(TruncatedIS(2.0),)))
    assert "[clip(ρ, 0, 2)]·" in one.equation()
    assert "rollout=(TruncatedIS(high=2.0" in repr(one)
    assert Cispo() == Cispo(cap=5.0) != Cispo(low=1.0, high=4.0)


BAD = [
    (lambda: LossConfig(level="tokens"), r"level must be one of token, .*'tokens'.*Did you mean 'token'"),
    (lambda: LossConfig(aggregation="seq_mean"), r"aggregation must be one of .*Did you mean 'sequence_mean'"),
    (lambda: LossConfig.preset("dappo"), r"preset must be .*'dappo'.*Did you mean 'dapo'"),
    (
        lambda: LossConfig.preset("grpo", levels="token"),
        r"preset\('grpo', ...\): the field must be .*Did you mean 'level'",
    ),
    (lambda: LossConfig(entropy_aggregation="mean"), r"entropy_aggregation must be one of token_mean"),
    (lambda: KL(0.1, "k4"), r"KL\(estimator=...\) must be one of k1, k2, k3, abs; got 'k4'"),
    (lambda: KL(0.1, gradient="path"), r"KL\(gradient=...\).*Did you mean 'pathwise'"),
    (lambda: KL(math.nan), r"KL\(coef=...\) must be a finite number; got nan"),
    (lambda: KL(1e300), r"KL\(coef=...\) must be a finite number; got 1e\+300, beyond fp32"),
    (lambda: LossConfig(entropy_coef=-3.5e38), "entropy_coef must be a finite number; got -3.5e\\+38, beyond fp32"),
    (
        lambda: Divergence("reverse_kl", coef=1e40),
        r"Divergence\(coef=...\) must be a finite number; got 1e\+40, beyond",
    ),
    (lambda: KL(limit=(-1.0, None)), r"the input limit must be a finite number > 0, or None.*-1.0"),
    (lambda: KL(limit=5.0), r"a pair \(input, output\)"),
    (lambda: KL(0.1, gradient="straight_through_k2", ratio_weighted=True), 'needs gradient="pathwise"'),
    (lambda: LossConfig(entropy_coef=math.inf), "entropy_coef must be a finite number; got inf"),
    (lambda: LossConfig(log_ratio_limit=0.0), "log_ratio_limit must be a finite number > 0"),
    (lambda: LossConfig(constant_length=0), "constant_length must be a positive integer, of 64 bits at most; got 0"),
    (lambda: LossConfig(group_size=2.5), "group_size must be a positive integer, of 64 bits at most; got 2.5"),
    (
        lambda: LossConfig(group_size=2**63),
        "group_size must be a positive integer, .*; got 9223372036854775808",
    ),
    (lambda: KL(10**5000), r"KL\(coef=...\) must be a finite number; got an integer of 16610 bits"),
    (lambda: LossConfig(log_ratio_limit=True), "log_ratio_limit must be a finite number > 0.*; got True"),
    (lambda: LossConfig(log_ratio_limit=10**400), "log_ratio_limit must be a finite number > 0.*; got 1000"),
    (lambda: Clip(10**400), r"Clip\(low=...\) must be a finite number >= 0; got 1000"),
    (lambda: Clip(-0.1), r"Clip\(low=...\) must be a finite number >= 0; got -0.1"),
    (lambda: Clip(1.5), r"Clip\(low=...\) must be at most 1"),
    (lambda: Clip(0.2, math.nan), r"Clip\(high=...\) must be a finite number"),
    (lambda: Clip(0.2, 0.28, dual=1.1), r"Clip\(dual=...\) must be finite and at least 1 \+ high = 1.28.*1.1"),
    (lambda: Cispo(cap=5.0, high=0.2), "takes a cap, or low and high, not both"),
    (lambda: Cispo(high=0.2), "band needs both low and high"),
    (lambda: Cispo(cap=0.0), r"Cispo\(cap=...\) must be a finite number > 0; got 0.0"),
    (lambda: Sapo(tau_neg=-1.0), r"Sapo\(tau_neg=...\) must be a finite number > 0"),
    (lambda: Dro(beta=0), r"Dro\(beta=...\) must be a finite number > 0"),
    (lambda: DppoTV(-0.1), r"DppoTV\(low=...\) must be a finite number >= 0"),
    (lambda: DppoKL(0.1, 0.1, math.inf), r"DppoKL\(cap=...\) must be a finite number > 0"),
    (lambda: Vespo(lam_neg=0), r"Vespo\(lam_neg=...\) must be a finite number >= 0.0001"),
    (lambda: Gmpo(high=math.nan), r"Gmpo\(high=...\) must be a finite number >= 0; got nan"),
    (lambda: TruncatedIS(0.5, low=0.6), "TruncatedIS: high must be at least low"),
    (lambda: MaskedIS(level="tokens"), r"MaskedIS\(level=...\) must be one of .*Did you mean 'token'"),
    (lambda: MaskedIS(-1.0), r"MaskedIS\(low=...\) must be a finite number >= 0"),
    (lambda: OffPolicyMask(-1.0), r"OffPolicyMask\(threshold=...\)"),
    (lambda: LossConfig(Vespo(), rollout=MaskedIS(0, 3, "sequence")), 'Use level="token", as in TruncatedIS'),
    (lambda: KL(ratio_cap=0), r"KL\(ratio_cap=...\) must be a number > 0"),
    (lambda: LossConfig(Reinforce(), level="sequence"), r'level="sequence" pools ratios, and Reinforce\(\) has none'),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match=r"must be a Surrogate such as Clip\(\), or None .*; got 'clip'"):
        LossConfig("clip")
    with pytest.raises(TypeError, match=r"must be a KL such as KL\(0.04\); got 0.04"):
        LossConfig(kl=0.04)
    with pytest.raises(TypeError, match=r"schemes such as TruncatedIS\(2.0\); got 2.0"):
        LossConfig(rollout=2.0)
    with pytest.raises(TypeError, match=r"schemes such as TruncatedIS\(2.0\); got the class TruncatedIS"):
        LossConfig(rollout=TruncatedIS)


def test_classes_of_ones_own():
    """What kernels know by its fields is not derived from: they computed the other's. A scheme is, from one of ours."""
    for base in (KL, Divergence):
        with pytest.raises(TypeError, match=f"Mine is derived from {base.__name__}, which kernels know by its fields"):
            type("Mine", (base,), {})

    @dataclasses.dataclass(frozen=True)
    class Mine(Rollout):
        equation = paper = ""

        def written(self):
            return "ρ"

    with pytest.raises(TypeError, match=r"one of your own derives from TruncatedIS, MaskedIS or Rejection; got .*Mine"):
        LossConfig(rollout=Mine())


def test_levels_accept_ratio_surrogates():
    for level in LEVELS:
        assert LossConfig(Unclipped(), level=level).level == level


@pytest.mark.parametrize("config", [preset.config for preset in PRESETS.values()], ids=list(PRESETS))
def test_copies_are_equal(config):
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert (other, hash(other), repr(other)) == (config, hash(config), repr(config))
        assert (type(other.level), type(other.aggregation)) == (str, str)


def test_levels_say_how_they_pool_and_spread():
    got = {name: (level.pooled, level.spread) for name, level in LEVELS.items()}
    own, mean, total = "own", "mean", "sum"
    assert got == {
        "token": (own, own),
        "sequence": (mean, mean),
        "sequence_token": (mean, own),
        "sequence_product": (total, total),
        "prefix_product": ("sum_before", "sum_behind"),
        "prefix_min": ("least_before", "sum_of_least"),
    }
    assert [name for name, level in LEVELS.items() if not level.pools] == ["token"]
    assert [name for name, level in LEVELS.items() if not level.spreads] == ["token", "sequence_token"]
    assert [name for name, level in LEVELS.items() if level.running] == ["prefix_product", "prefix_min"]
    assert typing.get_args(LevelName) == tuple(LEVELS)


def test_level_of_the_kl():
    """Its own where it has a ratio to weigh with, else the policy's."""
    for kl, name in ((KL(0.1), "sequence"), (KL(0.1, level="token"), "sequence")):
        assert LossConfig(level="sequence", kl=kl).kl_pooling is LEVELS[name]
    weighted = LossConfig(level="sequence", kl=KL(0.1, ratio_weighted=True, level="token"))
    assert (weighted.pooling, weighted.kl_pooling) == (LEVELS["sequence"], LEVELS["token"])


def test_names_in_any_case():
    assert LossConfig.preset("GRPO", kl=KL(0.1)) == LossConfig.preset("grpo", kl=KL(0.1))
    assert GRPOLoss("Dr_GRPO").config == PRESETS["dr_grpo"].config
    assert LossConfig(level="Sequence", aggregation="TOKEN_MEAN") == LossConfig(
        level="sequence", aggregation="token_mean"
    )
    assert LossConfig(entropy_aggregation="Token_Mean").entropy_aggregation == "token_mean"
    assert KL(0.1, "K1", gradient="Pathwise", level="TOKEN") == KL(0.1, "k1", level="token")
    assert MaskedIS(level="Geometric") == MaskedIS(level="geometric")


ELSEWHERE_CALLED = [
    ({"beta": 0.04}, "kl=KL(0.04)"),
    ({"kl_coef": 0.1}, "kl=KL(0.1)"),
    ({"epsilon": 0.2}, "surrogate=Clip(0.2, 0.2)"),
    ({"epsilon_high": 0.28}, "surrogate=Clip(high=0.28)"),
    ({"clip_ratio_low": 0.1}, "surrogate=Clip(low=0.1)"),
    ({"delta": 4.0}, "surrogate=Clip(dual=4.0)"),
    ({"loss_type": "dapo"}, "config=LossConfig.preset('dapo')"),
    ({"importance_sampling_level": "sequence"}, "level='sequence'"),
    ({"loss_agg_mode": "token-mean"}, "aggregation=..."),
    ({"num_generations": 8}, "group_size=8"),
]


@pytest.mark.parametrize(("options", "meant"), ELSEWHERE_CALLED, ids=str)
def test_names_of_other_packages(options, meant):
    """Of a field, of an option of a module, and of the class itself, which raises Python's own TypeError."""
    (name,) = options
    with pytest.raises(ValueError, match=r"preset\('grpo', ...\): the field must be one of surrogate, ") as raised:
        LossConfig.preset("grpo", **options)
    changed = re.sub(r"Clip\(.*\)", lambda clip: repr(eval(clip[0])), meant)
    assert str(raised.value).endswith(f"; got {name!r}. Did you mean {changed}?")
    with pytest.raises(TypeError) as raised:
        LossConfig(**options)
    expected = f"LossConfig.__init__() got an unexpected keyword argument {name!r}. Did you mean {meant}?"
    assert str(raised.value) == expected
    if name != "kl_coef":
        meant = meant if meant.startswith("config=") else f"config=LossConfig({meant})"
        with pytest.raises(ValueError, match="GRPOLoss: the option must be one of") as raised:
            GRPOLoss("grpo", **options)
        assert str(raised.value).endswith(f"; got {name!r}. Did you mean {meant}?")


def test_no_field_is_called_otherwise():
    """A name in the table that were a field or an option would be accepted before it is looked up."""
    fields = [field.name for field in dataclasses.fields(LossConfig)]
    assert set(ELSEWHERE).isdisjoint(fields)
    assert {ours for ours, _ in ELSEWHERE.values()} <= {*fields, "config"}
    assert translated("level_of_ratios", 1, fields) is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'levels'. Did you mean 'level'?"):
        LossConfig(levels="token")


def test_a_pickle_has_the_fields_alone():
    """Not what a config keeps of itself once it was used."""
    config = LossConfig(level="sequence", aggregation="constant", constant_length=8)
    before = pickle.dumps(config)
    assert config.pooling.pools
    assert config.weighting.unit == "sequences"
    assert pickle.dumps(config) == before
    assert pickle.loads(before) == config
    assert pickle.loads(before).pooling is config.pooling


HINTS = {
    "another number of the preset's clip stays": ("gspo", {"epsilon_high": 0.001}, "Clip(low=0.0003, high=0.001)"),
    "and its dual bound": ("intellect2", {"epsilon": 0.1}, "Clip(low=0.1, high=0.1, dual=4.0)"),
    "a surrogate without such a number": ("sapo", {"epsilon": 0.1}, "Sapo(...)"),
    "a cap, which is no upper clip": ("cispo", {"epsilon_high": 3.0}, "Cispo(...)"),
}


@pytest.mark.parametrize("hint", HINTS)
def test_a_hint_changes_the_presets_own_surrogate(hint):
    """Whoever follows it has the same loss with one number changed, or is not told a number."""
    name, option, meant = HINTS[hint]
    with pytest.raises(ValueError, match=re.escape(f"Did you mean surrogate={meant}?")):
        LossConfig.preset(name, **option)


def test_names_of_verl_are_told_ours():
    with pytest.raises(ValueError, match="Did you mean 'sequence_mean'"):
        LossConfig(aggregation="seq-mean-token-mean")
    with pytest.raises(ValueError, match="Did you mean 'k2'"):
        KL(0.1, estimator="mse")


SCALARS = {
    "Clip": (lambda n: Clip(n(0.25), n(0.5), dual=n(3))),
    "Cispo": (lambda n: Cispo(cap=n(4))),
    "Gmpo": (lambda n: Gmpo(n(0.25), n(0.5))),
    "KL": (lambda n: KL(n(0.125), limit=(n(16), None), ratio_cap=n(4))),
    "TruncatedIS": (lambda n: TruncatedIS(n(2))),
    "OffPolicyMask": (lambda n: OffPolicyMask(n(0.5))),
    "LossConfig": (lambda n: LossConfig(entropy_coef=n(0.5), log_ratio_limit=n(16))),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_of_numpy_are_numbers(name):
    """Equal, of one hash and repr, and Python's own."""
    theirs, ours = SCALARS[name](np.float32), SCALARS[name](float)
    assert (theirs, hash(theirs), repr(theirs)) == (ours, hash(ours), repr(ours))
    assert pickle.dumps(theirs) == pickle.dumps(ours)


def test_counts_and_flags_of_numpy():
    assert LossConfig(constant_length=np.int64(8), group_size=np.int32(2)) == LossConfig(
        constant_length=8, group_size=2
    )
    assert type(Constant(np.int64(8)).length) is type(GroupMean(np.int16(2)).size) is type(TopK(np.int64(3)).k) is int
    assert type(TopP(np.float32(0.5)).p) is float
    assert KL(0.1, ratio_weighted=np.True_).ratio_weighted is True
    for wrong in (np.ones(2), np.float32("nan"), np.str_("x")):
        with pytest.raises(ValueError, match=r"Clip\(low=...\) must be a finite number >= 0; got "):
            Clip(wrong)
    with pytest.raises(TypeError, match="expected ratio_weighted to be True or False; got 'yes'"):
        KL(0.1, ratio_weighted="yes")
    with pytest.raises(ValueError, match=r"Clip\(dual=...\) must be a finite number; got inf"):
        Clip(dual=math.inf)


OWN_NUMBERS = [
    (lambda: Constant(constant_length=8), "Constant.__init__() got", "'constant_length'. Did you mean length=8?"),
    (lambda: GroupMean(group_size=4), "GroupMean.__init__() got", "'group_size'. Did you mean size=4?"),
    (lambda: Constant(lenght=8), "Constant.__init__() got", "'lenght'. Did you mean 'length'?"),
    (lambda: Clip(epsilon=0.2), "Clip.__init__() got", "'epsilon'. Did you mean low=0.2, high=0.2?"),
    (lambda: Clip(clip_ratio_high=0.28), "Clip.__init__() got", "'clip_ratio_high'. Did you mean high=0.28?"),
    (lambda: Clip(delta=4.0), "Clip.__init__() got", "'delta'. Did you mean dual=4.0?"),
]


@pytest.mark.parametrize(("make", "begin", "end"), OWN_NUMBERS, ids=[end[:20] for *_, end in OWN_NUMBERS])
def test_names_of_a_class_of_its_own_numbers(make, begin, end):
    with pytest.raises(TypeError) as raised:
        make()
    assert str(raised.value) == f"{begin} an unexpected keyword argument {end}"


def test_a_class_in_the_place_of_an_instance():
    for given, meant in ((TokenMean, "TokenMean()"), (Constant, "Constant(length=...)")):
        with pytest.raises(TypeError, match=re.escape(f"got the class {given.__name__}. Write {meant}.")):
            LossConfig(aggregation=given)
        with pytest.raises(TypeError, match=re.escape(f"got the class {given.__name__}. Write {meant}.")):
            normalizer(torch.ones(2, 3), given)


def test_an_instance_in_the_place_of_another():
    """Both ways that the refusal names make the change, and nothing else."""
    before, after = LossConfig(aggregation=Constant(8)), LossConfig(aggregation=Constant(16))
    with pytest.raises(
        ValueError, match="beside it, which dataclasses.replace keeps. .*constant_length=16 alone .*=None"
    ):
        dataclasses.replace(before, aggregation=Constant(16))
    assert dataclasses.replace(before, constant_length=16) == after
    assert dataclasses.replace(before, aggregation=Constant(16), constant_length=None) == after


@pytest.mark.parametrize("kind", [Clip, Cispo])
def test_bounds_in_the_place_of_distances(kind, recwarn):
    """[0.8, 1.28] is what people clip to, [0.2, 2.28] is not."""
    kind(low=0.8, high=1.28)
    (warning,) = recwarn
    assert warning.filename == __file__
    told = str(warning.message)
    assert told.startswith(f"{kind.__name__}(low=0.8, high=1.28) keeps ratios in [1 - low, 1 + high] = [0.2, 2.28]. ")
    assert told.endswith(f"If [0.8, 1.28] is meant, it is {kind.__name__}(low=0.2, high=0.28).")


def test_wide_bands_warn_of_nothing(recwarn):
    for low, high in ((0.2, 0.28), (0.5, 0.5), (1.0, 4.0), (1.0, 1.2), (0.8, 4.0), (0.2, 1.2), (0.9, 0.9)):
        Clip(low, high)
    assert not recwarn.list


BAND = {"low": 0.5, "high": 5.0, "level": "token"}
DEFAULTS = {
    "Clip": {"low": 0.2, "high": 0.2, "dual": None},
    "DppoKL": {"low": 0.2, "high": 0.2, "cap": None},
    "DppoTV": {"low": 0.2, "high": 0.2, "cap": None},
    "Gmpo": {"low": 0.4, "high": 0.4},
    "Sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "Vespo": {"k_pos": 2.0, "lam_pos": 3.0, "k_neg": 3.0, "lam_neg": 2.0},
    "TruncatedIS": {"high": 2.0, "low": 0.0, "level": "token"},
    "MaskedIS": BAND,
    "Rejection": BAND,
    "Divergence": {
        "kind": "reverse_kl",
        "coef": 1.0,
        "mix": 0.5,
        "to": "teacher",
        "teacher_temperature": None,
        "rest": "bucket",
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_that_are_documented(name):
    """What is asked for without arguments; whoever changes one changes every run that relies on it."""
    assert dataclasses.asdict(getattr(grpo_kernels, name)()) == DEFAULTS[name]
