"""LossConfig: what a paper defines, and nothing else. Frozen, hashable, validated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from . import names, stored
from .aggregation import AGGREGATIONS, Aggregation, AggregationName, numbers_elsewhere, refuse_class
from .compiler import computed_once
from .divergence import Divergence
from .kl import KL
from .levels import LEVELS, Level, LevelName
from .names import check_options, translates_fields
from .rollout import Rollout, check_scheme
from .settings import read_limit, read_name, settle_count, settle_name, settle_number
from .surrogates import Clip, NoSurrogate, Surrogate
from .surrogates.registration import check_surrogate


@translates_fields
@dataclass(frozen=True, repr=False)
class LossConfig:
    """An objective of the GRPO family.

    loss = Σ_t w_t·( u_t·ρ_t·f(ℓ_t, r_t, A_t) + kl.coef·k(ℓ_t - ref_t) + rollout_kl.coef·k(ℓ_t - rollout_t)
                     + divergence.coef·D_t ) - entropy_coef·Σ_t w'_t·H_t

    Args:
        surrogate: f, a class of ``grpo_kernels.surrogates`` with its own parameters; None: no policy term, for
            distillation alone, which needs no advantages.
        level: how log-ratios are pooled into r: "token", "sequence", "sequence_token", "sequence_product",
            "prefix_product", "prefix_min" (of the tokens up to each; over ranks with ``sequence_layout=``).
        aggregation: the weights w: "token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"; or an
            instance such as ``Constant(1024)``, which is the name with its number in the field below.
        kl: the penalty k towards the reference policy.
        rollout: ρ, the correction of the sampler's mismatch: a scheme such as ``TruncatedIS(2.0)``, or several whose
            factors multiply; needs ``rollout_log_probs``.
        entropy_coef: factor of the entropy bonus.
        entropy_aggregation: None gives entropy the weights of the aggregation; "token_mean" its own, of each
            call's tokens whatever the ``normalizer=``.
        log_ratio_limit: log-ratios saturate at ± this, once, after pooling, with slope 0 outside. None: no limit
            (TRL, Liger). verl and OpenRLHF use 20.
        constant_length: the length in the "constant" aggregation (Dr. GRPO: the longest completion).
        group_size: consecutive sequences that share a prompt, for "group_mean".
        divergence: D, a divergence over the whole vocabulary from the ``teacher=`` of a call; None: no such term.
        rollout_kl: the penalty towards the sampler (``rollout_log_probs``; 0 where its log-prob is unknown), or towards
            the old policy where no rollout log-probs are given. Weighed as ``kl``, beside which it may stand.

    Raises:
        ValueError: an unknown name (the nearest one is suggested) or a number out of its range.
    """

    surrogate: Surrogate | None = Clip()
    level: LevelName = "token"
    aggregation: AggregationName | Aggregation = "sequence_mean"
    kl: KL = KL()
    rollout: Rollout | tuple[Rollout, ...] = ()
    entropy_coef: float = 0.0
    entropy_aggregation: Literal["token_mean"] | None = None
    log_ratio_limit: float | None = 20.0
    constant_length: int | None = None
    group_size: int | None = None
    divergence: Divergence | None = None
    rollout_kl: KL = KL()

    def __post_init__(self) -> None:
        if not isinstance(self.policy_term, Surrogate):
            expected = "a Surrogate such as Clip(), or None for no policy term"
            raise TypeError(f"LossConfig(surrogate=...) must be {expected}; got {self.surrogate!r}.")
        if self.surrogate is not None:
            check_surrogate(self.surrogate)
        for name, kl in (("kl", self.kl), ("rollout_kl", self.rollout_kl)):
            if not isinstance(kl, KL):
                raise TypeError(f"LossConfig({name}=...) must be a KL such as KL(0.04); got {kl!r}.")
        if not (self.divergence is None or isinstance(self.divergence, Divergence)):
            expected = "a Divergence such as Divergence('reverse_kl'), or None"
            raise TypeError(f"LossConfig(divergence=...) must be {expected}; got {self.divergence!r}.")
        settle_name(self, "level", "level", LEVELS)
        self._read_aggregation()
        if self.entropy_aggregation is not None:
            settle_name(self, "entropy_aggregation", "entropy_aggregation", ("token_mean",))
        settle_number(self, "entropy_coef", "entropy_coef")
        object.__setattr__(self, "log_ratio_limit", read_limit("log_ratio_limit", self.log_ratio_limit))
        for name in ("constant_length", "group_size"):
            settle_count(self, name, name)
        if self.pooling.pools and not self.policy_term.uses_ratio:
            term = "surrogate=None" if self.surrogate is None else repr(self.surrogate)
            raise ValueError(
                f'level="{self.level}" pools ratios, and {term} has none. Use level="token", or '
                "Unclipped() for a policy gradient with a ratio."
            )
        self._check_rollout()

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone, without what ``computed_once`` keeps."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _read_aggregation(self) -> None:
        """Replace an instance by its name, and its number in the config's field for it, where those say all of it."""
        aggregation = self.aggregation
        refuse_class("LossConfig(aggregation=...)", aggregation)
        if not isinstance(aggregation, Aggregation):
            settle_name(self, "aggregation", "aggregation", AGGREGATIONS, names.AGGREGATIONS)
            return
        for field, option in aggregation.options.items():
            number, beside = getattr(aggregation, field), getattr(self, option)
            if number is not None and beside is not None and number != beside:
                raise ValueError(
                    f"aggregation={aggregation!r} has its own {option}; got {option}={beside!r} beside it, which "
                    f"dataclasses.replace keeps. Give one of them: {option}={number!r} alone changes a config that has "
                    f"one, {option}=None beside the instance leaves it to that."
                )
            object.__setattr__(self, option, beside if number is None else number)
        if numbers_elsewhere(aggregation):
            object.__setattr__(self, "aggregation", aggregation.name)

    def _check_rollout(self) -> None:
        if not isinstance(self.rollout, tuple):
            object.__setattr__(self, "rollout", (self.rollout,))
        for scheme in self.schemes:
            check_scheme(scheme)
            if self.policy_term.folds(scheme) and scheme.pooled:
                raise ValueError(
                    f"{self.policy_term!r} multiplies token weights into its ratio, and {scheme!r} weighs sequences. "
                    'Use level="token", as in TruncatedIS(2.0) or MaskedIS(0.5, 5.0).'
                )

    @computed_once
    def schemes(self) -> tuple[Rollout, ...]:
        """Return ``rollout`` as a tuple, whatever was given."""
        return self.rollout if isinstance(self.rollout, tuple) else (self.rollout,)

    @computed_once
    def policy_term(self) -> Surrogate:
        """Return the surrogate; ``NoSurrogate()`` where there is none."""
        return NoSurrogate() if self.surrogate is None else self.surrogate

    @computed_once
    def pooling(self) -> Level:
        """Return the ``Level`` that ``level`` names."""
        return LEVELS[self.level]

    @computed_once
    def kl_pooling(self) -> Level:
        """Return the ``Level`` of the ratio that weighs the KL."""
        return LEVELS[self.kl.level_beside(self.level)]

    @computed_once
    def rollout_kl_pooling(self) -> Level:
        """Return the ``Level`` of the ratio that weighs the KL to the sampler."""
        return LEVELS[self.rollout_kl.level_beside(self.level)]

    @computed_once
    def weighting(self) -> Aggregation:
        """Return the ``Aggregation`` that ``aggregation`` names, with its numbers."""
        if isinstance(self.aggregation, Aggregation):
            return self.aggregation
        kind = AGGREGATIONS[self.aggregation]
        return kind(**{field: getattr(self, option) for field, option in kind.options.items()})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """Return a published objective by name, with ``changes`` to its fields: ``preset("grpo", kl=KL(0.04))``."""
        name = read_name("preset", name, PRESETS)
        return PRESETS[name].config._changed(f"preset({name!r}, ...)", changes)

    def replace(self, **changes: Any) -> LossConfig:
        """Return this objective with ``changes`` to its fields, as ``dataclasses.replace`` does, with hints for names
        that other packages have."""
        return self._changed("LossConfig.replace(...)", changes)

    def _changed(self, what: str, changes: Mapping[str, Any]) -> LossConfig:
        fields = [field.name for field in dataclasses.fields(self)]
        check_options(f"{what}: the field", changes, fields, self.policy_term)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every field and the format's number, ``schema``, as plain dicts, lists, strings, numbers and None, for
        YAML, JSON or Hydra; an infinity is ".inf". ``from_dict`` makes the same config of it.

        Raises:
            TypeError: an aggregation or a rollout scheme of a class of your own, which no name finds.
        """
        return stored.to_dict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LossConfig:
        """Return the config of ``to_dict``. Registered surrogates are found by name; nothing is imported. A mapping
        without ``schema``, as people write them, may leave fields out, which are then today's defaults.

        Raises:
            TypeError: no mapping where one belongs.
            ValueError: another schema, a name that is not known, a field that is missing from a stored config.
        """
        return stored.from_dict(cls, fields)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return every preset by name, with its paper and the paper's coefficients."""
        return MappingProxyType(PRESETS)

    def equation(self) -> str:
        """Return the objective as one line of maths (ℓ log-prob, A advantage, m mask, f the bracket)."""
        folded = [s.written() for s in self.schemes if self.policy_term.folds(s)]
        factors = [s.written() for s in self.schemes if not self.policy_term.folds(s)]
        term = self.policy_term.written()
        terms = ["·".join([*(f"[{factor}]" for factor in factors), f"({term})"]) if factors else term]
        if self.surrogate is None:
            terms = []
        if self.kl.coef:
            terms.append(f"{self.kl.coef:g}·{self.kl.written()}")
        if self.rollout_kl.coef:
            terms.append(f"{self.rollout_kl.coef:g}·{self.rollout_kl.written('rollout')}")
        if self.divergence is not None:
            terms.append(f"{self.divergence.coef:g}·{self.divergence.written()}")
        where = "".join(f", {equation}" for equation in self._ratios())
        where += "".join(f", r of ratios times {factor}" for factor in folded)
        sign = "+" if self.entropy_coef < 0 else "-"
        entropy = f" {sign} {abs(self.entropy_coef):g}·entropy" if self.entropy_coef else ""
        return f"loss = {self.weighting.written()}{entropy}, f = {' + '.join(terms) or '0'}{where}"

    def _ratios(self) -> list[str]:
        """Return the equation of every ratio r that a term has."""
        weighing = [kl for kl in (self.kl, self.rollout_kl) if kl.coef and kl.ratio_weighted]
        of_policy = self.policy_term.uses_ratio or any(kl.level is None for kl in weighing)
        others = dict.fromkeys(kl.level for kl in weighing if kl.level is not None)
        named = [LEVELS[level].equation.replace("r =", f"r at level {level} =", 1) for level in others]
        return [self.pooling.equation, *named] if of_policy else named

    def __repr__(self) -> str:
        default = LossConfig()
        shown = [f"surrogate={self.surrogate!r}"]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != getattr(default, field.name) or field.name in ("level", "aggregation"):
                shown.append(f"{field.name}={value!r}")
        return f"LossConfig({', '.join(shown)})  # {self.equation()}"


@dataclass(frozen=True)
class Preset:
    """A published objective."""

    config: LossConfig
    paper: str
    coefficients: str
    """The paper's choices beside the objective; presets leave KL and entropy at 0."""


PRESETS: dict[str, Preset] = {}
"""Published objectives by name: presets.py fills it, and is imported with the package."""


def resolve_config(config: LossConfig | str) -> LossConfig:
    """Return a LossConfig as it is, or the preset of that name."""
    if isinstance(config, LossConfig):
        return config
    if not isinstance(config, str):
        kind = type(config)  # with its module: of another copy of the package, it is a LossConfig and yet none
        got = f"{kind.__name__} of {kind.__module__}"
        raise TypeError(f"config must be a LossConfig or the name of a preset; got {got}.")
    name = config if config in PRESETS else read_name("preset", config, PRESETS)
    return PRESETS[name].config
