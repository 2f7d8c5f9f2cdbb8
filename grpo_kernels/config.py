"""LossConfig: what a paper defines, and nothing else. Frozen, hashable, validated once."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from .surrogates import ESTIMATORS, Clip, Reinforce, Surrogate

Level = Literal["token", "sequence", "sequence_token", "sequence_product"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"]

LEVELS: Mapping[str, str] = MappingProxyType(
    {
        "token": "r = exp(ℓ - old), every token by itself",
        "sequence": "s = exp(mean over live tokens of ℓ - old), gradient through the mean (GSPO)",
        "sequence_token": "the value of s, the gradient of each token alone (GSPO-token)",
        "sequence_product": "s = exp(sum over live tokens of ℓ - old) = π(y)/π_old(y)",
    }
)
AGGREGATIONS: Mapping[str, str] = MappingProxyType(
    {
        "token_mean": "Σ m·f / max(Σ m, 1)",
        "sequence_mean": "Σ_i (Σ_t m·f / max(Σ_t m, 1)) / B",
        "sequence_sum": "Σ_i Σ_t m·f / B",
        "constant": "Σ m·f / (B·constant_length)",
        "group_mean": "Σ_groups (Σ m·f / max(Σ m, 1)) / groups",
    }
)
KL_GRADIENTS = ("pathwise", "straight_through_k2")


def check_name(kind: str, name: object, allowed: Iterable[str]) -> None:
    """Raise a ValueError with the nearest valid name unless ``name`` is one of ``allowed``."""
    names = list(allowed)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    raise ValueError(f"{kind} must be one of {', '.join(names)}; got {name!r}. Did you mean {near[0]!r}?")


def _check_limit(what: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be a finite number > 0, or None for no limit; got {value!r}.")


def _check_coefficient(what: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{what} must be a finite number; got {value!r}.")


@dataclass(frozen=True)
class KL:
    """A penalty on the divergence from the reference policy, with x = log_prob - ref_log_prob.

    Args:
        coef: its factor in the loss; 0 leaves the term out. Can be given per call (``kl_coef=``) instead.
        estimator: "k1" x, "k2" x²/2, "k3" exp(-x) + x - 1 (Schulman 2020, "Approximating KL divergence").
        gradient: "pathwise" differentiates the estimator; "straight_through_k2" has its value and the
            slope of k2, which is that of the KL itself on-policy.
        ratio_weighted: multiply by the (differentiable) ratio to the old policy, as TRL's
            ``use_bias_correction_kl`` and DeepSeek-V3.2 do; needs "pathwise". On-policy it changes the
            gradient of k3 from 1 - exp(-x) to x, not the value.
        limit: (input, output) clamps: x to ±input before the estimator, its value to ±output after; the slope
            is 0 where a clamp bites. None: no clamp. verl uses (20, 10), TRL none.
    """

    coef: float = 0.0
    estimator: str = "k3"
    gradient: str = "pathwise"
    ratio_weighted: bool = False
    limit: tuple[float | None, float | None] = (20.0, None)

    def __post_init__(self) -> None:
        _check_coefficient("KL(coef=...)", self.coef)
        check_name("KL(estimator=...)", self.estimator, ESTIMATORS)
        check_name("KL(gradient=...)", self.gradient, KL_GRADIENTS)
        if not (isinstance(self.limit, tuple) and len(self.limit) == 2):
            raise ValueError(f"KL(limit=...) must be a pair (input, output) of limits; got {self.limit!r}.")
        for name, value in zip(("input", "output"), self.limit, strict=True):
            _check_limit(f"KL(limit=...): the {name} limit", value)
        if self.ratio_weighted and self.gradient != "pathwise":
            raise ValueError('KL(ratio_weighted=True) needs gradient="pathwise": the ratio carries gradient itself.')


@dataclass(frozen=True, repr=False)
class LossConfig:
    """An objective of the GRPO family.

    loss = Σ_t w_t·( u_t·f(ℓ_t, r_t, A_t) + kl.coef·k(ℓ_t - ref_t) ) - entropy_coef·Σ_t w'_t·H_t

    Args:
        surrogate: f, a class of ``grpo_kernels.surrogates`` with its own parameters.
        level: how log-ratios are pooled into r: "token", "sequence", "sequence_token", "sequence_product".
        aggregation: the weights w: "token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean".
        kl: the penalty k towards the reference policy.
        entropy_coef: factor of the entropy bonus.
        entropy_aggregation: None gives entropy the weights of the aggregation; "token_mean" its own.
        log_ratio_limit: log-ratios saturate at ± this, once, after pooling, with slope 0 outside. None: no limit
            (TRL, Liger). verl and OpenRLHF use 20.
        constant_length: the length in the "constant" aggregation (Dr. GRPO: the longest completion).
        group_size: consecutive sequences that share a prompt, for "group_mean".

    Raises:
        ValueError: an unknown name (the nearest one is suggested) or a number out of its range.
    """

    surrogate: Surrogate = Clip()
    level: Level = "token"
    aggregation: Aggregation = "sequence_mean"
    kl: KL = KL()
    entropy_coef: float = 0.0
    entropy_aggregation: Literal["token_mean"] | None = None
    log_ratio_limit: float | None = 20.0
    constant_length: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.surrogate, Surrogate):
            raise TypeError(f"LossConfig(surrogate=...) must be a Surrogate such as Clip(); got {self.surrogate!r}.")
        if not isinstance(self.kl, KL):
            raise TypeError(f"LossConfig(kl=...) must be a KL such as KL(0.04); got {self.kl!r}.")
        check_name("level", self.level, LEVELS)
        check_name("aggregation", self.aggregation, AGGREGATIONS)
        if self.entropy_aggregation is not None:
            check_name("entropy_aggregation", self.entropy_aggregation, ("token_mean",))
        _check_coefficient("entropy_coef", self.entropy_coef)
        _check_limit("log_ratio_limit", self.log_ratio_limit)
        for name in ("constant_length", "group_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name} must be a positive integer; got {value!r}.")
        if self.level != "token" and not self.surrogate.uses_ratio:
            raise ValueError(
                f'level="{self.level}" pools ratios, and {self.surrogate!r} has none. Use level="token", or '
                "Unclipped() for a policy gradient with a ratio."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """A published objective by name, with ``changes`` to its fields: ``preset("grpo", kl=KL(0.04))``."""
        check_name("preset", name, PRESETS)
        known = [f.name for f in dataclasses.fields(cls)]
        for field in changes:
            check_name(f"preset({name!r}, ...): the field", field, known)
        return dataclasses.replace(PRESETS[name].config, **changes)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Every preset by name, with its paper and the paper's coefficients."""
        return MappingProxyType(PRESETS)

    def equation(self) -> str:
        """The objective as one line of maths (ℓ log-prob, A advantage, m mask, f the bracket)."""
        terms = [_with_numbers(self.surrogate)]
        if self.kl.coef:
            ratio = "r·" if self.kl.ratio_weighted else ""
            terms.append(f"{self.kl.coef:g}·{ratio}{self.kl.estimator}(ℓ - ref)")
        pooled = {"token": "r = exp(ℓ - old)", "sequence": "r = exp(mean_t(ℓ - old))"}
        pooled["sequence_token"] = "r = exp(sg(mean_t(ℓ - old)) + ℓ - sg(ℓ))"
        pooled["sequence_product"] = "r = exp(Σ_t(ℓ - old))"
        where = f", {pooled[self.level]}" if self.surrogate.uses_ratio else ""
        entropy = f" - {self.entropy_coef:g}·entropy" if self.entropy_coef else ""
        aggregation = AGGREGATIONS[self.aggregation]
        if self.constant_length:
            aggregation = aggregation.replace("constant_length", str(self.constant_length))
        return f"loss = {aggregation}{entropy}, f = {' + '.join(terms)}{where}"

    def __repr__(self) -> str:
        default = LossConfig()
        shown = [f"surrogate={self.surrogate!r}"]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != getattr(default, field.name) or field.name in ("level", "aggregation"):
                shown.append(f"{field.name}={value!r}")
        return f"LossConfig({', '.join(shown)})  # {self.equation()}"


def _with_numbers(surrogate: Surrogate) -> str:
    if not isinstance(surrogate, Clip):
        return surrogate.equation
    low, high, dual = surrogate.parameters()
    first = "r·A" if surrogate.dual is None else f"min(r, {dual:g})·A"
    return f"-min({first}, clip(r, {low:g}, {high:g})·A)"


@dataclass(frozen=True)
class Preset:
    config: LossConfig
    paper: str
    coefficients: str
    """What the paper uses beside the objective; presets leave KL and entropy at 0."""


_CLIP = Clip(0.2, 0.2)
PRESETS: dict[str, Preset] = {
    "reinforce": Preset(
        LossConfig(Reinforce(), aggregation="sequence_sum"),
        "Williams 1992, Machine Learning 8",
        "no KL; advantages with a baseline",
    ),
    "ppo": Preset(
        LossConfig(_CLIP, aggregation="token_mean"),
        "Schulman et al. 2017, arXiv:1707.06347",
        "clip 0.2; GAE advantages; for language models KL in the reward (InstructGPT: 0.02)",
    ),
    "grpo": Preset(
        LossConfig(_CLIP, aggregation="sequence_mean"),
        "Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300",
        "k3 KL with coefficient 0.04; clip 0.2; advantages: group mean and std",
    ),
    "dapo": Preset(
        LossConfig(Clip(0.2, 0.28), aggregation="token_mean"),
        "Yu et al. 2025 (DAPO), arXiv:2503.14476, token mean over the whole batch as trainers compute it",
        "no KL; clip 0.2 / 0.28; soft over-long penalty; dynamic sampling",
    ),
    "dapo_paper": Preset(
        LossConfig(Clip(0.2, 0.28), aggregation="group_mean"),
        "Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 8: token mean inside each group",
        "no KL; clip 0.2 / 0.28; group_size 16 (give it: preset('dapo_paper', group_size=16))",
    ),
    "dr_grpo": Preset(
        LossConfig(_CLIP, aggregation="constant"),
        "Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783",
        "no KL; centred advantages without std; constant_length = the longest completion (give it)",
    ),
    "bnpo": Preset(
        LossConfig(_CLIP, aggregation="token_mean"),
        "Xiao et al. 2025 (BNPO), arXiv:2506.02864, as TRL's loss_type='bnpo' aggregates it",
        "clip 0.2; token mean over the local batch",
    ),
    "gspo": Preset(
        LossConfig(Clip(3e-4, 4e-4), level="sequence", aggregation="sequence_mean"),
        "Zheng et al. 2025 (GSPO), arXiv:2507.18071",
        "no KL; clip 3e-4 / 4e-4 on the length-normalised sequence ratio",
    ),
}


def resolve_config(config: LossConfig | str) -> LossConfig:
    """A LossConfig, or the preset of that name."""
    if isinstance(config, LossConfig):
        return config
    if not isinstance(config, str):
        raise TypeError(f"config must be a LossConfig or the name of a preset; got {type(config).__name__}.")
    check_name("preset", config, PRESETS)
    return PRESETS[config].config
