"""LossConfig.to_dict and from_dict: every objective comes back from YAML and JSON, and a stored one never changes."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest
import yaml

from grpo_kernels import (
    KL,
    Clip,
    Constant,
    Divergence,
    Dro,
    GroupMean,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    Rejection,
    Surrogate,
    TokenMean,
    TruncatedIS,
    register_surrogate,
)
from grpo_kernels.objectives.stored import SCHEMA, SCHEMES
from grpo_kernels.objectives.surrogates import BUILT_IN, SURROGATES

FIELDS_OF_SCHEMA_1 = {
    "LossConfig": "surrogate level aggregation kl rollout entropy_coef entropy_aggregation log_ratio_limit "
    "constant_length group_size divergence rollout_kl",
    "KL": "coef estimator gradient ratio_weighted limit ratio_cap level",
    "Divergence": "kind coef mix to teacher_temperature rest",
    "TruncatedIS": "high low level",
    "MaskedIS": "low high level",
    "Rejection": "low high level",
    "OffPolicyMask": "threshold",
    "Constant": "length",
    "GroupMean": "size",
    "reinforce": "",
    "unclipped": "",
    "clip": "low high dual",
}
CONFIGS = {
    **{name: preset.config for name, preset in LossConfig.presets().items()},
    **{cls.name: LossConfig(cls(0.5) if cls is Dro else cls()) for cls in BUILT_IN},
    "numbers": LossConfig(
        Clip(0.1, 0.3, dual=3.0),
        aggregation=Constant(1024),
        kl=KL(0.04, "k2", ratio_weighted=True, limit=(None, 10.0), level="sequence"),
        rollout=(TruncatedIS(2.0), MaskedIS(0.5, math.inf), Rejection(0.9, 1.1, level="geometric"), OffPolicyMask(0.1)),
        entropy_coef=0.01,
        entropy_aggregation="token_mean",
        log_ratio_limit=None,
        divergence=Divergence("jsd", 0.5, mix=0.1, to="ref", teacher_temperature=2.0, rest="renormalize"),
        rollout_kl=KL(0.01, "abs"),
    ),
    "groups": LossConfig(aggregation=GroupMean(8)),
    "distillation": LossConfig(surrogate=None, divergence=Divergence()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name):
    config = CONFIGS[name]
    stored = config.to_dict()
    assert LossConfig.from_dict(stored) == config
    assert LossConfig.from_dict(json.loads(json.dumps(stored, allow_nan=False))) == config
    assert LossConfig.from_dict(yaml.safe_load(yaml.safe_dump(stored))) == config
    assert stored == config.to_dict()  # reading wrote nothing into it


@pytest.mark.parametrize("scheme", SCHEMES.values())
def test_every_scheme_has_its_name(scheme):
    made = scheme(0.5) if scheme is OffPolicyMask else scheme(high=3.0) if scheme is TruncatedIS else scheme(0.5, 2.0)
    config = LossConfig(rollout=made)
    assert config.to_dict()["rollout"][0]["name"] == scheme.__name__
    assert LossConfig.from_dict(config.to_dict()).rollout == (made,)


def test_what_is_written():
    """All fields, a schema, plain types; YAML's own infinity is read too."""
    config = LossConfig(rollout=MaskedIS(0.5, math.inf))
    stored = config.to_dict()
    assert stored["schema"] == SCHEMA
    assert set(stored) == {"schema", *(field.name for field in dataclasses.fields(LossConfig))}
    assert stored["rollout"] == [{"name": "MaskedIS", "low": 0.5, "high": ".inf", "level": "token"}]
    written = yaml.safe_dump(stored).replace("'.inf'", ".inf")
    assert yaml.safe_load(written)["rollout"][0]["high"] == math.inf
    assert LossConfig.from_dict(yaml.safe_load(written)) == config


def test_fields_of_the_schema():
    """A stored config has them all: a new one needs a new number, and a meaning for what is stored without it."""
    assert SCHEMA == 1
    kinds = {kind.__name__: kind for kind in (LossConfig, KL, Divergence, Constant, GroupMean)}
    kinds |= {**SCHEMES, **{name: SURROGATES[name] for name in ("reinforce", "unclipped", "clip")}}
    found = {name: " ".join(field.name for field in dataclasses.fields(kind)) for name, kind in kinds.items()}
    assert found == FIELDS_OF_SCHEMA_1


def test_a_changed_default_changes_no_stored_run():
    @dataclass(frozen=True, repr=False)
    class Later(LossConfig):
        surrogate: Surrogate | None = Clip(0.5)

    assert Later.from_dict(LossConfig().to_dict()).surrogate == Clip()
    assert Later.from_dict({}).surrogate == Clip(0.5)  # written by hand: today's


def test_by_hand():
    """Without a schema fields may be left out, of the config and of its parts; one scheme stands for a list of one."""
    found = LossConfig.from_dict(yaml.safe_load("{kl: {coef: 0.04}, rollout: {name: TruncatedIS, high: 2.0}}"))
    assert found == LossConfig(kl=KL(0.04), rollout=TruncatedIS(2.0))
    assert LossConfig.from_dict({"surrogate": None}).surrogate is None
    constant = {"aggregation": {"name": "constant", "length": 8}}
    assert LossConfig.from_dict(constant) == LossConfig(aggregation=Constant(8))


def test_a_registered_surrogate_is_found_by_name():
    @register_surrogate
    class Halved(Surrogate):
        factor: float = 0.5

        def value(self, t):
            return self.factor * t.ratio * t.advantage

    try:
        config = LossConfig(Halved(0.25))
        assert LossConfig.from_dict(config.to_dict()) == config
        stored = config.to_dict()
    finally:
        del SURROGATES["halved"]
    with pytest.raises(ValueError, match=r"LossConfig.surrogate must be one of .*; got 'halved'"):
        LossConfig.from_dict(stored)


def test_what_no_name_finds_is_not_written():
    @dataclass(frozen=True)
    class Mine(TokenMean):
        pass

    @dataclass(frozen=True)
    class Twice(TruncatedIS):
        pass

    for config in (LossConfig(aggregation=Mine()), LossConfig(rollout=Twice(2.0))):
        with pytest.raises(TypeError, match="which no name finds"):
            config.to_dict()


@pytest.mark.parametrize(
    ("stored", "error", "match"),
    [
        ({"schema": 2}, ValueError, "expected schema 1; got 2"),
        ({"schema": True}, ValueError, "expected schema 1; got True"),
        ({"schema": 1}, ValueError, "got no surrogate"),
        ({**LossConfig().to_dict(), "kl": {"coef": 0.1}}, ValueError, "LossConfig.kl .*got no estimator"),
        ({"levle": "token"}, ValueError, "got 'levle'. Did you mean 'level'?"),
        ({"kl": {"coeff": 0.1}}, ValueError, "LossConfig.kl: the field must be one of .*'coeff'"),
        ({"beta": 0.1}, ValueError, r"Did you mean kl=KL\(0.1\)"),
        ({"surrogate": {"name": "clop"}}, ValueError, "got 'clop'. Did you mean 'clip'?"),
        ({"surrogate": {"low": 0.1}}, ValueError, "LossConfig.surrogate with its name"),
        ({"surrogate": {"name": "clip", "lo": 0.1}}, ValueError, "got 'lo'"),
        ({"surrogate": "clip"}, TypeError, "LossConfig.surrogate: expected a mapping of fields; got str 'clip'"),
        ({"rollout": "TruncatedIS"}, TypeError, "LossConfig.rollout, a list of schemes"),
        ({"rollout": ["TruncatedIS"]}, TypeError, "LossConfig.rollout: expected a mapping"),
        ({"rollout": [{"name": "TIS"}]}, ValueError, "must be one of TruncatedIS, "),
        ({"entropy_coef": "a lot"}, (TypeError, ValueError), "entropy_coef"),
        ("dapo", TypeError, "expected a mapping of fields; got str 'dapo'"),
    ],
)
def test_bad_input(stored, error, match):
    with pytest.raises(error, match=match):
        LossConfig.from_dict(stored)


def test_replace():
    config = LossConfig.preset("dapo")
    assert config.replace(kl=KL(0.1)) == dataclasses.replace(config, kl=KL(0.1))
    with pytest.raises(ValueError, match=r"LossConfig.replace\(...\): the field .*Did you mean surrogate=Clip"):
        config.replace(epsilon=0.1)
