"""Divergences over the whole vocabulary, of the policy p from a teacher q: options, values and slopes.

Every one is an f-divergence (Csiszár 1967) of the odds r = p_j/q_j, d = log r,

    D = Σ_j q_j·f(r_j),    ∂D/∂z_j = p_j·(a_j - Σ_i p_i·a_i)/τ,    a = f'(r),

with f convex and f(1) = f'(1) = 0: no term is negative, so a small D keeps its digits, and equal rows have a = 0.
The per-column maths is twinned in ``csrc/common/divergences.h`` and ``backends/triton/divergences.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .maths import k3_of, sign_of
from .names import translates_fields
from .settings import no_subclass, settle_name, settle_number

KindName = Literal["forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
Rest = Literal["bucket", "renormalize", "teacher_renormalize"]
RESTS = ("bucket", "renormalize", "teacher_renormalize")
TARGETS = ("teacher", "ref")


class Columns(NamedTuple):
    """A divergence at every column of a row: ∂D/∂z_j·τ = own_j + p_j·(slope_j - Σ_i p_i·slope_i)."""

    term: Tensor
    """q·f(p/q) >= 0, nats; their sum is D."""
    own: Tensor | float
    """The part of the gradient that sums to 0 by itself: p - q, times its share; 0 where there is none."""
    slope: Tensor | float
    """The rest of a = f'(p/q), 0 where p = q."""


def _kl_term(weight: Tensor, log_odds: Tensor, other: Tensor) -> Tensor:
    """Return w·x - w + m, x = log(w/m): a term >= 0 of KL(w‖m), by a series near x = 0; m where w is 0."""
    near = log_odds.abs() < 1
    product = torch.where(weight == 0, 0.0, weight * torch.where(near, 0.0, log_odds))
    return torch.where(near, weight * k3_of(torch.where(near, -log_odds, 0.0)), product - weight + other)


def _over_mixture(d: Tensor, share: float | Tensor) -> Tensor:
    """Return log(p/m), m = share·p + (1 - share)·q, of d = log(p/q); nothing overflows."""
    above = -torch.log1p((1 - share) * torch.expm1(-d.clamp(min=0)))
    below = d.clamp(max=0)
    return torch.where(d >= 0, above, below - torch.log1p(share * torch.expm1(below)))


def _forward_kl(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    return Columns(_kl_term(q, -d, p), minus(p, q, d), 0.0)


def _reverse_kl(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    return Columns(_kl_term(p, d, q), 0.0, d)


def _mixed_kl(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    term = mix * _kl_term(q, -d, p) + (1 - mix) * _kl_term(p, d, q)
    return Columns(term, mix * minus(p, q, d), (1 - mix) * d)


def _jsd(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    log_p, log_q = _over_mixture(d, 1 - mix), _over_mixture(-d, mix)
    m = (1 - mix) * p + mix * q
    return Columns(mix * _kl_term(q, log_q, m) + (1 - mix) * _kl_term(p, log_p, m), 0.0, (1 - mix) * log_p)


def _skew_forward_kl(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    log_q = _over_mixture(-d, mix)
    return Columns(_kl_term(q, log_q, mix * q + (1 - mix) * p), 0.0, -(1 - mix) * torch.expm1(log_q))


def _skew_reverse_kl(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    log_p = _over_mixture(d, mix)
    return Columns(_kl_term(p, log_p, mix * p + (1 - mix) * q), 0.0, log_p - mix * torch.expm1(log_p))


def _tvd(p: Tensor, q: Tensor, d: Tensor, mix: float | Tensor) -> Columns:
    return Columns(minus(p, q, d).abs() / 2, 0.0, sign_of(d) / 2)


def minus(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return p - q, with all its digits where they are close."""
    near = d.abs() < 1
    return torch.where(near, q * torch.expm1(torch.where(near, d, 0.0)), p - q)


@dataclass(frozen=True)
class Kind:
    """A divergence by name."""

    name: KindName
    columns: Callable[[Tensor, Tensor, Tensor, float | Tensor], Columns]
    """Of p, q, d = log(p/q), which is 0 where both are 0, and mix."""
    written: str
    """The equation, q the teacher's distribution, w the ``mix``."""
    mixes: bool
    """Whether ``mix`` has a part in it."""
    gradient_at_infinity: bool = False
    """Whether the gradient is finite where D is infinite."""


_KINDS = (
    Kind("forward_kl", _forward_kl, "KL(q‖p)", False, True),
    Kind("reverse_kl", _reverse_kl, "KL(p‖q)", False),
    Kind("mixed_kl", _mixed_kl, "w·KL(q‖p) + (1-w)·KL(p‖q)", True),
    Kind("jsd", _jsd, "w·KL(q‖m) + (1-w)·KL(p‖m), m = (1-w)·p + w·q", True),  # arXiv:2306.13649
    Kind("skew_forward_kl", _skew_forward_kl, "KL(q‖w·q + (1-w)·p)", True),  # arXiv:2402.03898
    Kind("skew_reverse_kl", _skew_reverse_kl, "KL(p‖w·p + (1-w)·q)", True),
    Kind("tvd", _tvd, "½·Σ|p - q|", False),
)
KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""Divergences by name; kernels know them by their place here."""


@translates_fields
@dataclass(frozen=True)
class Divergence:
    """A divergence D of the policy p from a teacher q over the whole vocabulary, at every live token.

    It is added to the loss as coef·Σ_t w_t·D_t, w the aggregation's weights (never u or ρ). Its gradient is that of
    each token's own distribution, exact over what might have been drawn; what the drawn token changes for later ones
    is not in it (Agarwal et al. 2023, arXiv:2306.13649).

    Args:
        kind: "reverse_kl" KL(p‖q), mode-seeking, the KL penalty of RL; "forward_kl" KL(q‖p), mass-covering; "mixed_kl"
            mix·KL(q‖p) + (1-mix)·KL(p‖q); "jsd" mix·KL(q‖m) + (1-mix)·KL(p‖m), m = (1-mix)·p + mix·q (GKD: mix is its
            beta); "skew_forward_kl" KL(q‖mix·q + (1-mix)·p); "skew_reverse_kl" KL(p‖mix·p + (1-mix)·q) (DistiLLM);
            "tvd" ½·Σ|p - q|.
        coef: its factor in the loss, a finite number. Can be given per call (``divergence_coef=``) instead.
        mix: inside (0, 1), where the kind has one. "jsd" tends to 0 at both ends, where other packages switch to the
            KLs: these are "forward_kl" and "reverse_kl" here.
        to: "teacher", or "ref": the same of the reference policy, as the exact KL penalty; the ``teacher=`` of the call
            is then the reference's.
        teacher_temperature: what the teacher's logits are divided by, > 0; None: the call's temperature.
        rest: what a top-k teacher says of the tokens that it does not name: "bucket": their mass in one, so that D is a
            divergence of k+1 outcomes, never above that of the whole vocabulary; "renormalize": nothing, both are
            renormalised over the named; "teacher_renormalize": that they are impossible.
    """

    kind: KindName = "reverse_kl"
    coef: float = 1.0
    mix: float = 0.5
    to: Literal["teacher", "ref"] = "teacher"
    teacher_temperature: float | None = None
    rest: Rest = "bucket"

    options: ClassVar[Mapping[str, str]] = MappingProxyType({"mix": "beta", "teacher_temperature": "temperature"})
    """Others' names of fields, TRL's and Liger's."""

    def __init_subclass__(cls) -> None:
        no_subclass(cls, Divergence)

    def __post_init__(self) -> None:
        settle_name(self, "kind", "Divergence(kind=...)", KINDS, ELSEWHERE)
        settle_number(self, "coef", "Divergence(coef=...)")
        settle_number(self, "mix", "Divergence(mix=...)", above=0)
        if not self.mix < 1:
            ends = "mix=0 is forward_kl and mix=1 reverse_kl by the convention of TRL and Liger: name them"
            hint = f" ({ends})" if self.kind == "jsd" else ""
            raise ValueError(f"Divergence(mix=...) must be inside (0, 1){hint}; got {self.mix!r}.")
        settle_name(self, "to", "Divergence(to=...)", TARGETS)
        settle_name(self, "rest", "Divergence(rest=...)", RESTS)
        if self.teacher_temperature is not None:
            settle_number(self, "teacher_temperature", "Divergence(teacher_temperature=...)", above=0)

    @property
    def kernel_id(self) -> int:
        """The kind's place in KINDS."""
        return list(KINDS).index(self.kind)

    def columns(self, p: Tensor, q: Tensor, d: Tensor) -> Columns:
        """Return the divergence at every column of rows p, q, d = log(p/q), 0 where both are 0."""
        return KINDS[self.kind].columns(p, q, d, self.mix)

    def written(self) -> str:
        """Return the divergence of a token as maths."""
        mix = f", w = {self.mix:g}" if KINDS[self.kind].mixes else ""
        name = "π_ref" if self.to == "ref" else "teacher"
        return f"{self.kind}({name}{mix})"


ELSEWHERE = {
    "forward": "forward_kl",
    "fkl": "forward_kl",
    "kl": "reverse_kl",
    "reverse": "reverse_kl",
    "rkl": "reverse_kl",
    "mixed": "mixed_kl",
    "symmetric_kl": "mixed_kl",
    "generalized_jsd": "jsd",
    "skl": "skew_forward_kl",
    "srkl": "skew_reverse_kl",
}
"""Our name for a divergence of TRL, NeMo-RL, torchtune or DistiLLM."""
