"""The token-sized tensors of one call, and what is pooled over their sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import TokenInputs
from ..backends.spec import in_kernel
from ..objectives.compiler import computed_once
from ..objectives.config import LossConfig
from ..objectives.levels import Share
from ..objectives.maths import weighed
from ..objectives.rollout import Rollout, rollout_log_ratios, rollout_weights
from ..objectives.running import Running, begin_up_to
from ..objectives.sequences import Sequences, accumulate_dtype


@dataclass(frozen=True)
class TokenBatch:
    """The token-sized inputs of one loss, all contiguous (B, T). Where ``live`` is not, they hold anything."""

    live: Tensor
    """bool: counts in the loss and is read."""
    masked_in: Tensor
    """bool: counts in the denominators (live or skipped)."""
    sequences: Sequences
    inputs: TokenInputs
    """Weights are 0 where ``masked_in`` is not."""
    schemes: tuple[Rollout, ...] = ()
    """Rollout schemes that are still to be applied."""
    rollout_weight: Tensor | None = None
    """The factors of those already applied, for the metrics."""
    entropy_threshold: Tensor | float | None = None
    """Tokens of less entropy have no policy term."""
    divergence_weight: Tensor | None = None
    """The weight in the loss of the divergence from a teacher, coefficient included; None: no such term."""

    def totals(self, requests: Sequence[tuple[Tensor, Share]]) -> list[Tensor | None]:
        """Return the sums, or means over live tokens, of each sequence, (S,) in the accumulation dtype; 0 for an empty
        one, None for other shares. Values are (B, T), 0 at dead rows."""
        each: list[Tensor] = []
        places = [_place(values, each) if share in ("mean", "sum") else None for values, share in requests]
        if not each:
            return [None] * len(requests)
        sums = self.sequences.sums(each, accumulate_dtype(self.live.device))
        totals: list[Tensor | None] = []
        for place, (_, share) in zip(places, requests, strict=True):
            total = None if place is None else sums[place]
            totals.append(total / self.live_lengths if total is not None and share == "mean" else total)
        return totals

    @computed_once
    def live_lengths(self) -> Tensor:
        """The live tokens of each sequence, (S,), at least 1."""
        return self.sequences.lengths(self.live).clamp(min=1)

    @computed_once
    def dead(self) -> Tensor:
        """bool (B, T): where a token is not live."""
        return ~self.live

    def begin_up_to(self, requests: Sequence[tuple[Tensor, Share]]) -> list[Callable[[], Running] | None]:
        """Begin what running levels make of values (B, T), 0 at dead rows; None for other shares. To be begun before
        ``totals`` of the same, so that all travel together."""
        each: list[Tensor] = []
        keys = [(_place(values, each), share) for values, share in requests]
        begun: dict[tuple[int, Share], Callable[[], Running]] = {}
        for place, share in keys:
            if share in ("sum_before", "least_before") and (place, share) not in begun:
                begun[place, share] = begin_up_to(each[place], self.live, self.sequences, share == "least_before")
        return [begun.get(key) for key in keys]

    def at_tokens(self, values: Tensor, total: Tensor | None) -> Tensor:
        """Return a total (S,) of ``values`` at every token, in their dtype; the values where it is None."""
        return values if total is None else self.sequences.expand(total.to(values.dtype)).expand_as(values)

    def pool(self, requests: Sequence[tuple[Tensor, Share]]) -> list[Tensor]:
        """Return ``totals``, each at every token."""
        totals = self.totals(requests)
        return [self.at_tokens(values, total) for (values, _), total in zip(requests, totals, strict=True)]

    def factors(self, config: LossConfig, schemes: Sequence[Rollout], log_ratios: Sequence[Tensor]) -> Tensor:
        """Return the product of the factors of rollout schemes, from the log-ratio of each before it is pooled."""
        shares = (scheme.share for scheme in schemes)
        pooled = self.pool(list(zip(log_ratios, shares, strict=True)))
        inputs = self.inputs
        assert inputs.rollout is not None
        return rollout_weights(schemes, pooled, inputs.rollout, inputs.advantage, config.log_ratio_limit)


def _place(values: Tensor, among: list[Tensor]) -> int:
    """Return the place of this very tensor in a list, at whose end it is put where it is not there. PyTorch 2.11 does
    not compile ``id`` of what a graph makes."""
    for place, one in enumerate(among):
        if one is values:
            return place
    among.append(values)
    return len(among) - 1


class KnownSchemes(NamedTuple):
    """Rollout schemes whose factors follow from old log-probs alone."""

    schemes: tuple[Rollout, ...]
    log_ratios: list[Tensor]
    """(B, T) of each, before they are pooled."""
    others: tuple[Rollout, ...]
    """The config's other schemes."""

    @classmethod
    def of(cls, config: LossConfig, old: Tensor | None, rollout: Tensor | None, live: Tensor) -> KnownSchemes | None:
        """Return None where there are no such schemes, or a kernel applies them."""
        if old is None or rollout is None or config.policy_term.takes_rollout or in_kernel(config.schemes):
            return None
        of_old = tuple(scheme for scheme in config.schemes if not scheme.of_policy)
        if not of_old:
            return None
        others = tuple(scheme for scheme in config.schemes if scheme.of_policy)
        return cls(of_old, rollout_log_ratios(of_old, old, old, rollout, live), others)

    @property
    def pooled(self) -> list[Tensor]:
        """Return the log-ratios that are to be pooled."""
        return [values for scheme, values in zip(self.schemes, self.log_ratios, strict=True) if scheme.pooled]

    def applied(self, config: LossConfig, batch: TokenBatch) -> TokenBatch:
        """Multiply the factors into the batch's weights: so the one-pass loss stays one pass."""
        factors = torch.where(batch.live, batch.factors(config, self.schemes, self.log_ratios), 0.0)
        inputs = batch.inputs._replace(policy_weight=weighed(batch.inputs.policy_weight, factors))
        return dataclasses.replace(batch, inputs=inputs, schemes=self.others, rollout_weight=factors)


def pools(config: LossConfig, batch: TokenBatch) -> bool:
    """Whether a token's slope needs the other tokens of its sequence."""
    of_kls = config.kl_pooling.pools or config.rollout_kl_pooling.pools
    return config.pooling.pools or of_kls or any(scheme.pooled for scheme in batch.schemes)
