"""Per-token weights: how token losses become one loss, padded and packed alike.

An aggregation is nothing but the weight w of each token, built on the device before any kernel runs. Each is one small
class; a config names it, or takes an instance with its number.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .names import translates_fields
from .sequences import Sequences, accumulate_dtype
from .settings import settle_count

AggregationName = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"]
Unit = Literal["tokens", "sequences", "groups"]


@dataclass(frozen=True)
class Aggregation(abc.ABC):
    """A way to make one loss of token losses f, with m the mask and B the number of sequences."""

    name: ClassVar[str]
    equation: ClassVar[str]
    unit: ClassVar[Unit] = "sequences"
    """The things that its denominator counts; a ``normalizer`` replaces their number."""
    options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The config's fields for its numbers, by the names that those have here."""

    @property
    def group_size(self) -> int | None:
        """Return the number of sequences of a group, where its denominator counts groups."""
        return None

    def written(self) -> str:
        """Return the equation with this instance's numbers."""
        return self.equation

    @abc.abstractmethod
    def weights(self, mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None = None) -> Tensor:
        """Return the weight in the loss of every token that counts: (S,), one a sequence, or 0-d for all of them.

        Args:
            mask: bool (B, T), the tokens that count.
            normalizer: replaces the denominator over the batch, in the aggregation's unit.

        Returns:
            The weights in the accumulation dtype; ``on_tokens`` spreads them.
        """


@dataclass(frozen=True)
class TokenMean(Aggregation):
    """The mean over all tokens of the batch: DAPO as trainers compute it."""

    name = "token_mean"
    equation = "Σ m·f / max(Σ m, 1)"
    unit = "tokens"

    def weights(self, mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None = None) -> Tensor:
        if normalizer is None:
            return sequences.tokens(mask).clamp(min=1).reciprocal()
        return _reciprocal(_denominator(normalizer, mask), mask)


@dataclass(frozen=True)
class SequenceMean(Aggregation):
    """The mean over sequences of the mean over their tokens: GRPO."""

    name = "sequence_mean"
    equation = "Σ_i (Σ_t m·f / max(Σ_t m, 1)) / B"

    def weights(self, mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None = None) -> Tensor:
        lengths = sequences.lengths(mask).clamp(min=1)
        return (lengths * (sequences.count if normalizer is None else _denominator(normalizer, mask))).reciprocal()


@dataclass(frozen=True)
class SequenceSum(Aggregation):
    """The mean over sequences of the sum over their tokens: REINFORCE, LUSPO."""

    name = "sequence_sum"
    equation = "Σ_i Σ_t m·f / B"

    def weights(self, mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None = None) -> Tensor:
        return _reciprocal(_sequence_count(mask, sequences, normalizer), mask)


@translates_fields
@dataclass(frozen=True)
class Constant(Aggregation):
    """The sum over tokens, divided by the number of sequences times a constant: Dr. GRPO.

    Args:
        length: the constant, the longest completion allowed; None: not known yet, and needed by a loss.
    """

    length: int | None = None

    name = "constant"
    equation = "Σ m·f / (B·constant_length)"
    options = MappingProxyType({"length": "constant_length"})

    def __post_init__(self) -> None:
        _check_count(self, "length")

    def written(self) -> str:
        return self.equation.replace("constant_length", str(self.length)) if self.length else self.equation

    def weights(self, mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None = None) -> Tensor:
        if self.length is None:
            raise ValueError(
                'aggregation="constant" divides by a constant length: give constant_length (Dr. GRPO: the longest '
                'completion allowed), as in LossConfig.preset("dr_grpo", constant_length=1024).'
            )
        return _reciprocal(_sequence_count(mask, sequences, normalizer) * self.length, mask)


@translates_fields
@dataclass(frozen=True)
class GroupMean(Aggregation):
    """The mean over groups of the mean over the tokens of all their sequences: eq. 8 of DAPO.

    Args:
        size: consecutive sequences that share a prompt; None: not known yet, and needed by a loss.
    """

    size: int | None = None

    name = "group_mean"
    equation = "Σ_groups (Σ m·f / max(Σ m, 1)) / groups"
    unit = "groups"
    options = MappingProxyType({"size": "group_size"})

    def __post_init__(self) -> None:
        _check_count(self, "size")

    @property
    def group_size(self) -> int | None:
        return self.size

    def weights(self, mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None = None) -> Tensor:
        if self.size is None or sequences.count % self.size:
            raise ValueError(
                f'aggregation="group_mean" needs group_size, a divisor of the {sequences.count} sequences of the batch '
                f"(consecutive sequences share a prompt); got {self.size}."
            )
        groups = sequences.count // self.size
        lengths = sequences.lengths(mask)
        tokens = lengths.view(groups, self.size).sum(-1).clamp(min=1)
        count = _denominator(groups if normalizer is None else normalizer, mask)
        return (tokens * count).reciprocal().repeat_interleave(self.size, output_size=sequences.count)


AGGREGATIONS: Mapping[str, type[Aggregation]] = MappingProxyType(
    {cls.name: cls for cls in (TokenMean, SequenceMean, SequenceSum, Constant, GroupMean)}
)
"""Every aggregation by name."""


def refuse_class(what: str, given: object) -> None:
    """Raise where an aggregation's class stands in the place of an instance."""
    if isinstance(given, type) and issubclass(given, Aggregation):
        name = given.__name__
        numbers = ", ".join(f"{field}=..." for field in given.options)
        raise TypeError(f"{what} must be an aggregation or its name; got the class {name}. Write {name}({numbers}).")


def numbers_elsewhere(aggregation: Aggregation) -> bool:
    """Whether a config's other fields hold all of its numbers, so that its name says the rest."""
    named = AGGREGATIONS.get(aggregation.name) is type(aggregation)
    return named and all(field.name in aggregation.options for field in dataclasses.fields(aggregation))


def _sequence_count(mask: Tensor, sequences: Sequences, normalizer: float | Tensor | None) -> float | Tensor:
    return _denominator(sequences.count if normalizer is None else normalizer, mask)


def _denominator(value: float | Tensor, mask: Tensor) -> float | Tensor:
    """Return a denominator, of a tensor one on the mask's device; 0 (nothing to average over) becomes 1."""
    if not isinstance(value, Tensor):
        return value or 1.0
    value = value.detach().to(device=mask.device, dtype=accumulate_dtype(mask.device))
    return torch.where(value == 0, 1.0, value)


def _reciprocal(value: float | Tensor, mask: Tensor) -> Tensor:
    """Return 1 / value, 0-d on the mask's device."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=accumulate_dtype(mask.device), device=mask.device)
    return value.reciprocal()


def _check_count(aggregation: Aggregation, name: str) -> None:
    settle_count(aggregation, name, f"{type(aggregation).__name__}({name}=...)")
