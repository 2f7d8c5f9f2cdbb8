"""Metrics of one or many micro-batches, as one small device vector of sums, counts and extremes.

Ratios of sums are formed on access, so merged metrics are those of the merged batch; nothing waits for the
device until a value is printed. Nothing counted gives 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from .checks import fail
from .groups import check_initialised, gather, read_group

if TYPE_CHECKING:
    from .groups import Group

_LOSSES = ("policy_loss", "kl_loss", "entropy_loss", "rollout_kl_loss")
_TOKENS = ("tokens", "skipped_tokens", "impossible_tokens", "entropy_sum")
_SAMPLED_KLS = (
    *("kl_sum", "kl_count", "k1_old_sum", "k3_old_sum", "k1_rollout_sum", "k3_rollout_sum", "rollout_count"),
    "rollout_unknown",
)
_ROLLOUT_RATIOS = ("rollout_ratio_sum", "rollout_ratio_square_sum")
_ROLLOUT_WEIGHTS = ("rollout_weight_sum", "rollout_weight_square_sum", "rollout_rejected_count")
TOKEN_SUMS = (*_LOSSES, *_TOKENS, *_SAMPLED_KLS, *_ROLLOUT_RATIOS, *_ROLLOUT_WEIGHTS)
"""Sums over tokens."""
RATIO_SUMS = ("ratio_sum", "ratio_count", "clipped_low", "clipped_high", "clipped_dual")
"""Sums over tokens, or over sequences at the sequence levels."""
SUMS = (*TOKEN_SUMS, "sequences", *RATIO_SUMS)
EXTREMES = ("ratio_min", "ratio_max", "rollout_ratio_max", "rollout_weight_max")
OF_KERNELS = SUMS + EXTREMES
"""The fields that a backend's ``token_sums`` writes (csrc/cpu/token_sums.h has the same), which come first."""
DIVERGENCE_SUMS = (
    "divergence_loss",
    "divergence_sum",
    "divergence_count",
    "infinite_divergences",
    "teacher_entropy_sum",
)
"""Sums over tokens that have a divergence, 0 elsewhere."""
FIELDS = (*OF_KERNELS, "outside_support", *DIVERGENCE_SUMS)
"""The fields of a ``Metrics``'s vector, in order."""


class Metric:
    """A reported metric: its meaning, and what it is of a vector's sums; by default the field of its name."""

    def __init__(self, meaning: str, of: Callable[[Metrics], Tensor] | None = None) -> None:
        self.__doc__ = self.meaning = meaning
        self._of = of

    def __set_name__(self, owner: type[Metrics], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, metrics: None, owner: type[Metrics]) -> Metric: ...
    @overload
    def __get__(self, metrics: Metrics, owner: type[Metrics]) -> Tensor: ...
    def __get__(self, metrics: Metrics | None, owner: type[Metrics]) -> Metric | Tensor:
        if metrics is None:
            return self
        return metrics._field(self._name) if self._of is None else self._of(metrics)


def _mean(total: str, *counts: str) -> Callable[[Metrics], Tensor]:
    """Return the quotient of a sum and of counts, added up."""

    def quotient(metrics: Metrics) -> Tensor:
        count = metrics._field(counts[0])
        for name in counts[1:]:
            count = count + metrics._field(name)
        return _ratio(metrics._field(total), count)

    return quotient


def _mean_of_tokens(total: str) -> Callable[[Metrics], Tensor]:
    """Return the mean over the live tokens that were read."""
    return lambda metrics: _ratio(metrics._field(total), metrics._field("tokens") - metrics._field("skipped_tokens"))


def _extreme(name: str, count: str) -> Callable[[Metrics], Tensor]:
    """Return an extreme, 0 where nothing was counted."""
    return lambda metrics: torch.where(metrics._field(count) > 0, metrics._field(name), 0.0)


def _effective_sample_size(name: str) -> Callable[[Metrics], Tensor]:
    """Return (Σw)² / (n·Σw²), of sums of w and w²."""

    def size(metrics: Metrics) -> Tensor:
        squares = metrics._field("rollout_count") * metrics._field(f"{name}_square_sum")
        return _ratio(metrics._field(f"{name}_sum") ** 2, squares)

    return size


class Metrics:
    """Named access to one vector of ``FIELDS``; every value is a 0-d tensor on the device.

    ``a + b`` merges micro-batches, ``all_reduce(group)`` ranks, ``floats()`` is what a logger takes.
    """

    __slots__ = ("vector",)

    policy_loss = Metric("the policy term of the loss")
    kl_loss = Metric("the KL term of the loss, coefficient included")
    entropy_loss = Metric("the entropy term of the loss, coefficient and sign included")
    rollout_kl_loss = Metric("the term of the KL to the sampler (rollout_kl=), coefficient included")
    divergence_loss = Metric("the divergence term of the loss, coefficient included")
    tokens = Metric("live tokens")
    sequences = Metric("sequences, empty ones included; those of a sequence_group are counted on its first rank alone")
    skipped_tokens = Metric("live tokens left unread (skip_zero_advantage)")
    impossible_tokens = Metric("live tokens of probability 0")
    outside_support = Metric("live tokens outside of their recorded set, whose log-prob is NaN")
    kl = Metric("mean of the KL estimator to the reference, unweighted and unclamped", _mean("kl_sum", "kl_count"))
    divergence = Metric(
        "mean divergence from the teacher, nats, unweighted, over tokens where it is finite",
        _mean("divergence_sum", "divergence_count"),
    )
    infinite_divergences = Metric("tokens whose divergence is infinite")
    teacher_entropy = Metric(
        "mean entropy of the teacher, nats; 0 without one",
        _mean("teacher_entropy_sum", "divergence_count", "infinite_divergences"),
    )
    k1_old = Metric("mean of ℓ - old", _mean_of_tokens("k1_old_sum"))
    k3_old = Metric("mean of exp(old - ℓ) - (old - ℓ) - 1", _mean_of_tokens("k3_old_sum"))
    k1_rollout = Metric(
        "mean of ℓ - rollout, over tokens whose rollout log-prob is known", _mean("k1_rollout_sum", "rollout_count")
    )
    k3_rollout = Metric(
        "mean of exp(rollout - ℓ) - (rollout - ℓ) - 1, over the same", _mean("k3_rollout_sum", "rollout_count")
    )
    rollout_unknown = Metric("live tokens whose rollout log-prob is unknown, where there are rollout log-probs")
    rollout_ratio_mean = Metric(
        "mean of ρ = exp(old - rollout) as it is, over the same; 0 without rollout",
        _mean("rollout_ratio_sum", "rollout_count"),
    )
    rollout_ratio_max = Metric("largest such ρ", _extreme("rollout_ratio_max", "rollout_count"))
    rollout_effective_sample_size = Metric(
        "(Σρ)² / (n·Σρ²), over the same; NaN where a ρ² overflows", _effective_sample_size("rollout_ratio")
    )
    rollout_weight_mean = Metric(
        "mean of the factor that the rollout correction makes of it (1 without one; 0 without rollout log-probs)",
        _mean("rollout_weight_sum", "rollout_count"),
    )
    rollout_weight_max = Metric("largest such factor", _extreme("rollout_weight_max", "rollout_count"))
    rollout_weight_effective_sample_size = Metric(
        "(Σw)² / (n·Σw²) of these factors", _effective_sample_size("rollout_weight")
    )
    rollout_rejected = Metric("fraction of factors that are 0", _mean("rollout_rejected_count", "rollout_count"))
    entropy = Metric("mean entropy, nats", _mean_of_tokens("entropy_sum"))
    ratio_mean = Metric(
        "mean ratio to the old policy, over tokens (sequences where level= pools whole ones), unsaturated",
        _mean("ratio_sum", "ratio_count"),
    )
    ratio_min = Metric("smallest such ratio", _extreme("ratio_min", "ratio_count"))
    ratio_max = Metric("largest such ratio", _extreme("ratio_max", "ratio_count"))
    clip_low = Metric(
        "fraction bounded from below: clipped at 1 - low (or the surrogate's own lower bound)",
        _mean("clipped_low", "ratio_count"),
    )
    clip_high = Metric("fraction bounded from above: clipped at 1 + high, capped", _mean("clipped_high", "ratio_count"))
    clip_dual = Metric("fraction bounded at dual (DPPO: at its cap)", _mean("clipped_dual", "ratio_count"))
    clip_fraction = Metric(
        "low + high + dual: fraction at a bound (a sequence may count twice)",
        lambda metrics: metrics.clip_low + metrics.clip_high + metrics.clip_dual,
    )

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    @classmethod
    def of(cls, **values: Tensor | float) -> Metrics:
        """Make metrics of a number for every one of FIELDS, by name."""
        tensors = [torch.as_tensor(values[name]) for name in FIELDS]
        like = max(tensors, key=lambda tensor: (tensor.device.type != "cpu", tensor.dtype == torch.float64))
        return cls(torch.stack([tensor.to(like.device, like.dtype) for tensor in tensors]))

    def with_sum(self, name: str, value: Tensor) -> Metrics:
        """Return metrics with a number, 0-d, in the place of a sum that no kernel makes."""
        at = FIELDS.index(name)
        return Metrics(torch.cat([self.vector[:at], value.to(self.vector)[None], self.vector[at + 1 :]]))

    def __add__(self, other: object) -> Metrics:
        if not isinstance(other, Metrics):
            return NotImplemented
        for metrics in (self, other):
            metrics._check()
        return Metrics(_merge(torch.stack([self.vector, other.vector])))

    def __radd__(self, other: object) -> Metrics:
        """Add to the 0 that sum() begins with."""
        if other == 0:
            return self
        return NotImplemented

    def all_reduce(self, group: Group) -> Metrics:
        """Return the metrics of every rank together: one all-gather, merged in rank order.

        Args:
            group: a process group, or a device mesh of one dimension, of the ranks that hold other tokens: data
                parallel and sequence parallel ones, and none that hold shards of one vocabulary.
        """
        if group is None:
            check_initialised("Metrics.all_reduce", "group")  # before, its WORLD is None
            hint = "torch.distributed.group.WORLD is the group of all ranks"
            fail("Metrics.all_reduce", "a group", "None", hint=hint, error=TypeError)
        ranks = read_group("Metrics.all_reduce", "group", group)
        return self if ranks is None else Metrics(_merge(gather(self.vector, ranks)))

    if not TYPE_CHECKING:  # a name that is no metric is an error to type checkers as well

        def __getattr__(self, name: str) -> Tensor:
            if name in FIELDS:
                return self._field(name)
            raise AttributeError(f"no metric {name!r}; there are {', '.join(REPORTED)}")

    def as_dict(self) -> dict[str, Tensor]:
        """Return every reported metric by name, as 0-d tensors."""
        return {name: getattr(self, name) for name in REPORTED}

    def floats(self, prefix: str = "") -> dict[str, float]:
        """Return every reported metric as Python's float, for a logger: one copy from the device, which waits for it.

        Args:
            prefix: what every name begins with: ``floats("train/")["train/kl"]``.
        """
        if not isinstance(prefix, str):
            fail("Metrics.floats", "a prefix that is text", repr(prefix), error=TypeError)
        here = Metrics(self.vector.cpu())
        return {prefix + name: float(value) for name, value in here.as_dict().items()}

    def _field(self, name: str) -> Tensor:
        self._check()
        return self.vector[FIELDS.index(name)]

    def _check(self) -> None:
        """Raise for the vector of another version, as a pickle may hold it: its numbers have other places."""
        if self.vector.shape != (len(FIELDS),):
            hint = "metrics were saved by another version of the package: save as_dict(), whose numbers have names"
            fail("Metrics", f"a vector of {len(FIELDS)} numbers", str(tuple(self.vector.shape)), hint=hint)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:.6g}" for name, value in self.floats().items())
        return f"Metrics({values})"


REPORTED: Mapping[str, str] = {
    name: metric.meaning for name, metric in vars(Metrics).items() if isinstance(metric, Metric)
}
"""The entries of ``as_dict`` and ``floats``, and their meaning."""


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count == 0, 0.0, total / count)


def _merge(vectors: Tensor) -> Tensor:
    """Merge vectors (n, FIELDS) into one: sums are added in order, extremes taken over all (a vector that counted no
    ratio has infinite ones)."""
    sums = vectors[0]
    for vector in vectors[1:]:
        sums = sums + vector
    first, last = len(SUMS), len(OF_KERNELS)
    smallest = vectors[:, FIELDS.index("ratio_min")].amin(0)
    largest = vectors[:, FIELDS.index("ratio_max") : last].amax(0)
    return torch.cat([sums[:first], smallest[None], largest, sums[last:]])


def reduce_ratios(ratio: Tensor, counted: Tensor, clipped: list[Tensor]) -> Tensor:
    """Return RATIO_SUMS and the two extremes of ``ratio`` where it is ``counted``, (7,) in the ratio's dtype.

    All tensors are flat, (n,); ``clipped`` are bool, for the low, the high and the dual bound.
    """
    others, infinity = ~counted, float("inf")
    sums = torch.stack([ratio.masked_fill(others, 0.0), counted, *clipped]).sum(-1, dtype=ratio.dtype)
    if ratio.numel() == 0:
        return torch.cat([sums, ratio.new_tensor([infinity, -infinity])])
    smallest = ratio.masked_fill(others, infinity).amin(0, keepdim=True)
    largest = ratio.masked_fill(others, -infinity).amax(0, keepdim=True)
    return torch.cat([sums, smallest, largest])
