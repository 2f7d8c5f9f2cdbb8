"""LossConfig: what a paper defines, and nothing else. Frozen, hashable, validated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .checks import check_limit, check_name, check_number
from .kl import KL, LEVELS
from .rollout import Rollout
from .surrogates import Clip, Surrogate
from .surrogates.registration import check_surrogate

if TYPE_CHECKING:
    from .presets import Preset

Level = Literal["token", "sequence", "sequence_token", "sequence_product"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"]

AGGREGATIONS: Mapping[str, str] = MappingProxyType(
    {
        "token_mean": "Σ m·f / max(Σ m, 1)",
        "sequence_mean": "Σ_i (Σ_t m·f / max(Σ_t m, 1)) / B",
        "sequence_sum": "Σ_i Σ_t m·f / B",
        "constant": "Σ m·f / (B·constant_length)",
        "group_mean": "Σ_groups (Σ m·f / max(Σ m, 1)) / groups",
    }
)


@dataclass(frozen=True, repr=False)
class LossConfig:
    """An objective of the GRPO family.

    loss = Σ_t w_t·( u_t·ρ_t·f(ℓ_t, r_t, A_t) + kl.coef·k(ℓ_t - ref_t) ) - entropy_coef·Σ_t w'_t·H_t

    Args:
        surrogate: f, a class of ``grpo_kernels.surrogates`` with its own parameters.
        level: how log-ratios are pooled into r: "token", "sequence", "sequence_token", "sequence_product".
        aggregation: the weights w: "token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean".
        kl: the penalty k towards the reference policy.
        rollout: ρ, the correction of the sampler's mismatch: a scheme such as ``TruncatedIS(2.0)``, or several whose
            factors multiply; needs ``rollout_log_probs``.
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
    rollout: Rollout | tuple[Rollout, ...] = ()
    entropy_coef: float = 0.0
    entropy_aggregation: Literal["token_mean"] | None = None
    log_ratio_limit: float | None = 20.0
    constant_length: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.surrogate, Surrogate):
            raise TypeError(f"LossConfig(surrogate=...) must be a Surrogate such as Clip(); got {self.surrogate!r}.")
        check_surrogate(self.surrogate)
        if not isinstance(self.kl, KL):
            raise TypeError(f"LossConfig(kl=...) must be a KL such as KL(0.04); got {self.kl!r}.")
        check_name("level", self.level, LEVELS)
        check_name("aggregation", self.aggregation, AGGREGATIONS)
        if self.entropy_aggregation is not None:
            check_name("entropy_aggregation", self.entropy_aggregation, ("token_mean",))
        check_number("entropy_coef", self.entropy_coef)
        check_limit("log_ratio_limit", self.log_ratio_limit)
        for name in ("constant_length", "group_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name} must be a positive integer; got {value!r}.")
        if self.level != "token" and not self.surrogate.uses_ratio:
            raise ValueError(
                f'level="{self.level}" pools ratios, and {self.surrogate!r} has none. Use level="token", or '
                "Unclipped() for a policy gradient with a ratio."
            )
        self._check_rollout()

    def _check_rollout(self) -> None:
        if not isinstance(self.rollout, tuple):
            object.__setattr__(self, "rollout", (self.rollout,))
        for scheme in self.schemes:
            if not isinstance(scheme, Rollout):
                raise TypeError(f"LossConfig(rollout=...) takes schemes such as TruncatedIS(2.0); got {scheme!r}.")
            if self.surrogate.folds(scheme) and scheme.pooled:
                raise ValueError(
                    f"{self.surrogate!r} multiplies token weights into its ratio, and {scheme!r} weighs sequences. "
                    'Use level="token", as in TruncatedIS(2.0) or MaskedIS(0.5, 5.0).'
                )

    @property
    def schemes(self) -> tuple[Rollout, ...]:
        """``rollout`` as a tuple, whatever was given."""
        return self.rollout if isinstance(self.rollout, tuple) else (self.rollout,)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """A published objective by name, with ``changes`` to its fields: ``preset("grpo", kl=KL(0.04))``."""
        from .presets import PRESETS

        check_name("preset", name, PRESETS)
        known = [f.name for f in dataclasses.fields(cls)]
        for field in changes:
            check_name(f"preset({name!r}, ...): the field", field, known)
        return dataclasses.replace(PRESETS[name].config, **changes)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Every preset by name, with its paper and the paper's coefficients."""
        from .presets import PRESETS

        return MappingProxyType(PRESETS)

    def equation(self) -> str:
        """The objective as one line of maths (ℓ log-prob, A advantage, m mask, f the bracket)."""
        folded = [s.written() for s in self.schemes if self.surrogate.folds(s)]
        factors = [s.written() for s in self.schemes if not self.surrogate.folds(s)]
        term = self.surrogate.written()
        terms = ["·".join([*(f"[{factor}]" for factor in factors), f"({term})"]) if factors else term]
        if self.kl.coef:
            terms.append(f"{self.kl.coef:g}·{self.kl.written()}")
        pooled = {"token": "r = exp(ℓ - old)", "sequence": "r = exp(mean_t(ℓ - old))"}
        pooled["sequence_token"] = "r = exp(sg(mean_t(ℓ - old)) + ℓ - sg(ℓ))"
        pooled["sequence_product"] = "r = exp(Σ_t(ℓ - old))"
        where = f", {pooled[self.level]}" if self.surrogate.uses_ratio else ""
        where += "".join(f", r of ratios times {factor}" for factor in folded)
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
