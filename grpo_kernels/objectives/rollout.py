"""Rollout correction: factors of the policy term that undo the mismatch of the sampler and the trained policy.

ρ = π_old / π_rollout (π / π_rollout where there is no old policy), detached. A scheme is one small class;
``LossConfig(rollout=...)`` takes one, or several whose factors multiply. Where the sampler's log-prob is NaN it is
unknown: such a token's own factor is 1, and it adds nothing to a pooled log ρ. Factors are not applied to the KL, and
rejected tokens stay in the denominators, as in TRL, Liger and AReaL.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .levels import Share
from .maths import clamp, log_ratio_of, times
from .settings import settle_name, settle_number

RolloutLevel = Literal["token", "sequence", "geometric"]
ROLLOUT_LEVELS = {
    "token": "ρ of every token by itself",
    "sequence": "the product of a sequence's ρ",
    "geometric": "their geometric mean",
}
_SHARES: Mapping[str, Share] = MappingProxyType({"token": "own", "sequence": "sum", "geometric": "mean"})
"""What of the log-ratios stands for each token, by level."""
FOLDED = (math.log(1e-8), 20.0)
"""Bounds of the logarithm of a factor that is part of a ratio, and of that ratio's (TRL's, of VESPO)."""


@dataclass(frozen=True)
class Rollout(abc.ABC):
    """A scheme of correction: it gives every token a factor of its policy term."""

    equation: ClassVar[str]
    paper: ClassVar[str]
    kernel_id: ClassVar[int] = 0
    """The scheme's number in csrc/common/surrogates.h at level "token"; 0: [tokens]-sized maths in PyTorch."""
    of_policy: ClassVar[bool] = False
    """Whether the factor follows from the current policy even where there is an old one."""

    def __init_subclass__(cls) -> None:
        """A class that is made of another one's has no kernel of its own: that computes the other's factor."""
        super().__init_subclass__()
        cls.kernel_id = vars(cls).get("kernel_id", 0)

    @property
    def share(self) -> Share:
        """Return which log-ratio a token's factor follows from: its own, or the mean or sum of its sequence's."""
        return "mean"

    @property
    def pooled(self) -> bool:
        """Whether a token's factor needs the other tokens of its sequence."""
        return self.share != "own"

    def bounds(self) -> tuple[float, float]:
        """Return the two numbers that a kernel is told: the lowest and the highest ρ that keeps its weight."""
        return 0.0, math.inf

    @abc.abstractmethod
    def written(self) -> str:
        """Return the equation with this instance's numbers."""


class _Band(Rollout):
    """A scheme of ρ and two bounds; the fields are its subclasses', in their own order."""

    low: float
    high: float
    level: RolloutLevel

    def __post_init__(self) -> None:
        kind = type(self).__name__
        settle_number(self, "low", f"{kind}(low=...)", at_least=0)
        settle_number(self, "high", f"{kind}(high=...)", above=0, infinite=True)
        if self.high < self.low:
            raise ValueError(f"{kind}: high must be at least low; got low={self.low!r}, high={self.high!r}.")
        settle_name(self, "level", f"{kind}(level=...)", ROLLOUT_LEVELS)

    @property
    def share(self) -> Share:
        return _SHARES[self.level]

    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def written(self) -> str:
        rho = {"token": "ρ", "sequence": "Πρ", "geometric": "mean ρ"}[self.level]
        text = self.equation.replace("low", f"{self.low:g}").replace("high", f"{self.high:g}")
        return text.replace("ρ", rho)

    @abc.abstractmethod
    def factor(self, rho: Tensor) -> Tensor:
        """Return each token's factor, of the shape of ``rho``: ρ = exp(log-ratio) as the level pools it."""

    def inside(self, rho: Tensor) -> Tensor:
        return ~((rho < self.low) | (rho > self.high))


@dataclass(frozen=True)
class TruncatedIS(_Band):
    """clip(ρ, low, high): truncated importance sampling. At level "sequence" TRL's ``sequence_truncate``.

    Args:
        high: the largest factor, > 0 and at least ``low``; inf: unbounded. The default is verl's and slime's, 2.
        low: the smallest factor, >= 0; the default 0 leaves ρ as small as it is, as in TIS.
        level: what is bounded: "token" ρ of every token by itself (default, as in TIS), "sequence" the product of a
            sequence's ρ, "geometric" their geometric mean.
    """

    high: float = 2.0
    low: float = 0.0
    level: RolloutLevel = "token"

    equation = "clip(ρ, low, high)"
    paper = "TIS: Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    kernel_id = 1

    def factor(self, rho: Tensor) -> Tensor:
        return rho.clamp(self.low, self.high)


@dataclass(frozen=True)
class MaskedIS(_Band):
    """ρ where low <= ρ <= high, else 0: MIS, IcePop. ``MaskedIS(0, 3, "sequence")`` is TRL's default, its
    ``sequence_mask``.

    Args:
        low: the smallest ρ that counts, >= 0. The default 0.5 is OpenRLHF's and verl's.
        high: the largest ρ that counts, > 0 and at least ``low``; inf: no upper bound. The default 5 is theirs too.
        level: what is masked: "token" every token by its own ρ (default, as in IcePop), "sequence" all tokens of a
            sequence by the product of its ρ, "geometric" by their geometric mean.
    """

    low: float = 0.5
    high: float = 5.0
    level: RolloutLevel = "token"

    equation = "ρ·1[low <= ρ <= high]"
    paper = "IcePop: Ling team 2025, Small leak can sink a great ship; bounds of OpenRLHF and verl"
    kernel_id = 2

    def factor(self, rho: Tensor) -> Tensor:
        return torch.where(self.inside(rho), rho, 0.0)


@dataclass(frozen=True)
class Rejection(_Band):
    """1 where low <= ρ <= high, else 0: drops what is too far away and weighs the rest evenly.

    With ``TruncatedIS(high=inf)`` beside it, kept tokens have weight ρ: NeMo-RL's ``seq-mask-tis`` and OpenRLHF's
    ``seq`` masks are ``(TruncatedIS(high=inf), Rejection(0.999, 1.002, "geometric"))``.

    Args:
        low: the smallest ρ that is kept, >= 0. The default 0.5 is that of ``MaskedIS``.
        high: the largest ρ that is kept, > 0 and at least ``low``; inf: no upper bound. The default 5 is also its.
        level: what is kept or dropped: "token" every token by its own ρ (default), "sequence" whole sequences by the
            product of their ρ, "geometric" by its geometric mean.
    """

    low: float = 0.5
    high: float = 5.0
    level: RolloutLevel = "token"

    equation = "1[low <= ρ <= high]"
    paper = "verl's rollout_rs (seq_mean_k1 is level geometric); NeMo-RL"
    kernel_id = 3

    def factor(self, rho: Tensor) -> Tensor:
        return self.inside(rho).to(rho.dtype)


@dataclass(frozen=True)
class OffPolicyMask(Rollout):
    """1[A >= 0 or mean_t(rollout - ℓ) <= threshold]: drops sequences of A < 0 that the policy left.

    The mean is over a sequence's live tokens, of the current policy whatever the old one is. With advantages by token,
    tokens of A >= 0 are kept.

    Args:
        threshold: the largest mean fall of a sequence's log-probs that is kept, in nats a token, >= 0 (δ in the
            paper); it has no default.
    """

    threshold: float

    equation = "1[A >= 0 or mean(rollout - ℓ) <= threshold]"
    paper = "DeepSeek-V3.2 2025, arXiv:2512.02556"
    of_policy = True

    def __post_init__(self) -> None:
        settle_number(self, "threshold", "OffPolicyMask(threshold=...)", at_least=0)

    def written(self) -> str:
        return self.equation.replace("threshold", f"{self.threshold:g}")

    def factor(self, advantages: Tensor, mean_fall: Tensor) -> Tensor:
        return ((advantages >= 0) | ~(mean_fall > self.threshold)).to(advantages.dtype)


def rollout_log_ratios(
    schemes: Sequence[Rollout], log_prob: Tensor, old: Tensor | None, rollout: Tensor, live: Tensor
) -> list[Tensor]:
    """Return the log-ratios to the sampler that each scheme's factors follow from, (B, T), before they are pooled; 0
    where the sampler's is unknown or a token is not live.

    Args:
        log_prob, old, rollout: (B, T); ``old`` None: the policy's own log-probs.
        live: bool (B, T).
    """
    known = live & ~rollout.isnan()
    of_old = log_prob if old is None else old
    both = (of_old,) if of_old is log_prob else (of_old, log_prob)
    ratios = [torch.where(known, log_ratio_of(values, rollout), 0.0) for values in both]
    return [ratios[-1 if scheme.of_policy else 0] for scheme in schemes]


def rollout_weights(
    schemes: Sequence[Rollout], log_ratios: Sequence[Tensor], rollout: Tensor, advantages: Tensor, limit: float | None
) -> Tensor:
    """Return the product of the schemes' factors, (B, T); it is anything where a token is not live.

    Args:
        log_ratios: of each scheme, (B, T), pooled as its ``share`` says.
        rollout, advantages: (B, T).
        limit: log ρ saturates at ± this, after pooling; None: nowhere.
    """
    weight = torch.ones_like(advantages)
    for scheme, log_rho in zip(schemes, log_ratios, strict=True):
        if isinstance(scheme, OffPolicyMask):
            weight = times(weight, _read_factor(scheme, scheme.factor(advantages, -log_rho), advantages))
            continue
        assert isinstance(scheme, _Band)
        rho = clamp(log_rho, limit).exp()
        factor = _read_factor(scheme, scheme.factor(rho), rho)
        weight = times(weight, factor if scheme.pooled else torch.where(rollout.isnan(), 1.0, factor))
    return weight


def _read_factor(scheme: Rollout, factor: object, like: Tensor) -> Tensor:
    """Return a scheme's factors in the dtype of ``like``, as kernels read them. Raise where there is none a token."""
    if isinstance(factor, Tensor) and factor.shape == like.shape and not factor.is_complex():
        return factor.to(like.dtype)
    got = f"{factor.dtype} {tuple(factor.shape)}" if isinstance(factor, Tensor) else repr(factor)
    raise TypeError(f"{scheme!r}: factor(...) must return a tensor of reals of shape {tuple(like.shape)}; got {got}.")


def check_scheme(scheme: object) -> None:
    """Raise unless it is a scheme that can be computed: one of ours, or of a class derived from one of ours."""
    if isinstance(scheme, (_Band, OffPolicyMask)):
        return
    got = f"the class {scheme.__name__}" if isinstance(scheme, type) else repr(scheme)
    hint = "; one of your own derives from TruncatedIS, MaskedIS or Rejection" if isinstance(scheme, Rollout) else ""
    raise TypeError(f"LossConfig(rollout=...) takes schemes such as TruncatedIS(2.0){hint}; got {got}.")
