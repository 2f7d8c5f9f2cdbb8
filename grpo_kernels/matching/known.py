"""What has been learnt of a loss so far, as one frozen value that each step of the search adds to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..objectives.config import LossConfig
from ..objectives.divergence import Divergence
from ..objectives.kl import KL
from ..objectives.levels import LevelName
from ..objectives.rollout import Rollout
from ..objectives.surrogates import Surrogate, Unclipped
from .batch import Batch
from .weights import Weights
from .whitening import Whitening


class Precision(NamedTuple):
    """How exactly a loss computes, and so what can be told of it. Differences are relative.

    Honest losses in float64 part from the config that they are by 1e-15 to 1e-11, those that round to fp32 on the way
    by 1e-6, to bf16 by 1e-2 (its last bit is 2⁻⁸).
    """

    name: str
    same: float
    """Differences that count as none."""
    close: float
    """Differences of tokens' weights that count as none."""
    digits: float
    """Errors of a number that is read off a curve."""
    matched: float
    """Largest difference of a token's gradient in a loss that counts as reproduced."""
    step: float
    """The smallest log-ratio whose effect is told from rounding; 1e-4 is inside of every clip, GSPO's 3e-4 too."""
    order: float
    """The smallest difference of two log-ratios of which one is the lower to the loss as well."""

    @property
    def floor(self) -> float:
        """The size, relative to the largest, below which a slope is what subtraction left of it."""
        return min(0.1, 10 * self.matched) if self.name else 1e-6


EXACT = Precision("", 1e-9, 1e-7, 1e-8, 1e-6, 1e-4, 1e-12)
SINGLE = Precision("fp32", 5e-6, 2e-2, 2e-3, 1e-3, 1e-4, 2e-5)
HALF = Precision("bf16 or fp16", 1e-2, 8e-2, 5e-2, 0.1, 5e-2, 0.2)


RUNNING = ("prefix_product", "prefix_min")
"""The levels of prefixes."""


class Said(NamedTuple):
    """One thing to say: a key of report.TEXTS, with what the sentence mentions."""

    key: str
    values: dict[str, Any]


def said(key: str, **values: Any) -> Said:
    return Said(key, values)


Step: TypeAlias = "tuple[Known, list[Said]]"
"""What a step of the search returns."""


class Ratio(NamedTuple):
    """How a loss compares a log-prob with the old one."""

    name: str
    old: Callable[[Tensor, Tensor], Tensor]
    """The old log-prob at which the ratio of ``log_prob`` is exp(log_ratio)."""
    jacobian: Callable[[Tensor], Tensor]
    """d log(ratio) / d log_prob."""
    as_difference: Callable[[Tensor, Tensor], Tensor]
    """The old log-prob at which a ratio exp(ℓ - old) has the value that this one has, from ℓ and the old log-prob."""


DIFFERENCE = Ratio("difference", lambda lp, x: lp - x, torch.ones_like, lambda lp, old: old)
QUOTIENT = Ratio("quotient", lambda lp, x: lp * torch.exp(-x), lambda lp: 1 / lp, lambda lp, old: lp - (lp / old).log())
INVERTED = Ratio("inverted", lambda lp, x: lp + x, lambda lp: -torch.ones_like(lp), lambda lp, old: 2 * lp - old)


class TokenSet(NamedTuple):
    """Which tokens a loss counts, as (B, T) bool of a batch."""

    select: Callable[[Batch], Tensor]
    says: Said | None = None
    """What is wrong with it."""


class Threshold(NamedTuple):
    """Tokens of less entropy have no policy term: below a number of nats, or below a quantile of the mask's tokens."""

    kind: Literal["number", "quantile"]
    value: float

    def of(self, entropy: Tensor, mask: Tensor) -> float:
        return self.value if self.kind == "number" else float(entropy[mask].quantile(self.value))

    def source(self) -> str:
        if self.kind == "number":
            return f"{self.value:.6g}"
        return f"token_log_probs(logits, token_ids, mask).entropy.detach()[mask > 0].quantile({self.value:g})"


@dataclass(frozen=True)
class Known:
    """The properties of a loss; what was not looked at yet is as most losses have it."""

    precision: Precision = EXACT
    temperature: float = 1.0
    offset: int = 1
    """Which token row t of the logits scores: 1 the one that it predicts, 0 its own input."""
    old_shift: int = 0
    """The loss compares the log-prob at t with the old one at t - old_shift."""
    tokens: TokenSet = TokenSet(lambda batch: batch.mask)
    threshold: Threshold | None = None
    ratio: Ratio = DIFFERENCE
    uses_ratio: bool = True
    whitening: Whitening = Whitening()
    level: LevelName = "token"
    carries: bool = True
    """A product of ratios, or a ratio of a prefix, carries gradient: each token gets the weights of all whose ratio it
    is in."""
    weights: Weights = Weights()
    surrogate: Surrogate = Unclipped()
    log_ratio_limit: float | None = None
    kl: KL = KL()
    rollout_kl: KL = KL()
    sampler: Literal["rollout", "old"] = "rollout"
    """Whose log-probs the second KL is taken to."""
    divergence: Divergence | None = None
    entropy_coef: float = 0.0
    entropy_aggregation: Literal["token_mean"] | None = None
    rollout: tuple[Rollout, ...] = ()

    def but(self, **changes: Any) -> Known:
        return dataclasses.replace(self, **changes)

    def ids(self, batch: Batch) -> Tensor:
        """Return the (B, T) tokens that rows are scored with."""
        everything = torch.cat([batch.first[:, None], batch.token_ids, batch.token_ids[:, :1]], 1)
        return everything[:, self.offset : self.offset + batch.shape[1]]

    def log_probs(self, batch: Batch) -> Tensor:
        return batch.scored(self.ids(batch), self.temperature)

    def counted(self, batch: Batch) -> Tensor:
        """Return the (B, T) tokens that the loss counts, of whatever entropy."""
        return self.tokens.select(batch)

    def live(self, batch: Batch) -> Tensor:
        """Return the (B, T) tokens that have a policy term."""
        counted = self.counted(batch)
        if self.threshold is None:
            return counted
        entropy = batch.entropy()
        return counted & (entropy >= self.threshold.of(entropy, counted))

    def lengths(self, batch: Batch) -> Tensor:
        """Return (B, 1), how many tokens of a sequence the loss counts, at least 1."""
        return self.counted(batch).sum(-1, keepdim=True).clamp(min=1).double()

    def own(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        """Return (B, T) log-ratios of tokens whose pooled ones these are, where the level is one of prefixes; of leasts
        those that do not rise, each a little lower than the one before, since of equal ones it is not told which."""
        if self.level == "prefix_product":
            return _less_the_former(log_ratio, self.counted(batch))
        if self.level == "prefix_min":
            return log_ratio.cummin(-1).values - self.precision.order * torch.arange(log_ratio.shape[-1])
        return log_ratio

    def of_pooled(self, slopes: Tensor, batch: Batch) -> Tensor:
        """Return (B, T) slopes in pooled log-ratios from those of tokens, at log-ratios that are ``own``."""
        if self.level == "prefix_product" and self.carries:
            return _less_the_former(slopes.flip(-1), self.counted(batch).flip(-1)).flip(-1)
        return slopes

    def effective(self, advantages: Tensor, batch: Batch) -> Tensor:
        """Return the advantages, (B,) or (B, T), after whatever the loss does to those of sequences."""
        return self.whitening.apply(advantages, self.counted(batch)) if advantages.dim() == 1 else advantages

    def bounds(self) -> list[float]:
        """Return the log-ratios at which the surrogate's slopes may jump."""
        return [math.log(bound) for bound in self.surrogate.parameters() if 0 < bound < math.exp(5)]

    @property
    def takes_old(self) -> bool:
        """Whether ours is given old log-probs."""
        return self.uses_ratio or (self.rollout_kl.coef != 0 and self.sampler == "old")

    @property
    def takes_rollout(self) -> bool:
        """Whether ours is given the sampler's."""
        return bool(self.rollout) or (self.rollout_kl.coef != 0 and self.sampler == "rollout")

    @property
    def factor(self) -> float:
        """What the loss is times ours."""
        return 1.0 if "constant_length" in self._aggregation() else self.weights.factor

    @property
    def config(self) -> LossConfig:
        """The config, with a fault's parts as the loss has them."""
        level = self.level if self.surrogate.uses_ratio else "token"
        return LossConfig(
            self.surrogate, level, kl=self.kl, rollout_kl=self.rollout_kl, entropy_coef=self.entropy_coef,
            rollout=self.rollout, entropy_aggregation=self.entropy_aggregation, log_ratio_limit=self.log_ratio_limit,
            divergence=self.divergence, **self._aggregation(),
        )  # fmt: skip

    def _aggregation(self) -> dict[str, Any]:
        """Return the config's options; a sum over sequences divided by a length is "constant"."""
        w = self.weights
        if w.pattern == "group":
            return {"aggregation": "group_mean", "group_size": w.group_size}
        if w.pattern == "sequence":
            return {"aggregation": "sequence_mean"}
        if w.denominator not in ("sequences", "sequences with tokens", "nothing"):
            return {"aggregation": "token_mean"}
        length = 1 / w.factor if w.factor else 0.0
        if w.denominator == "sequences" and length > 15.5 and abs(length - round(length)) < 1e-6 * length:
            return {"aggregation": "constant", "constant_length": round(length)}
        return {"aggregation": "sequence_sum"}


def _less_the_former(values: Tensor, counted: Tensor) -> Tensor:
    """Return (B, T) values less that of the counted token before, at counted tokens; others as they are."""
    latest = torch.where(counted, torch.arange(values.shape[-1]), -1).cummax(-1).values
    former = torch.nn.functional.pad(latest, (1, 0), value=-1)[:, :-1]
    before = torch.where(former < 0, 0.0, values.gather(-1, former.clamp(min=0)))
    return torch.where(counted, values - before, values)
