"""The denominator of an optimizer step, counted once and given to its micro-batches, which average over it.

A ``Normalizer`` knows what it counted; a loss that is averaged over something else refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .aggregation import AGGREGATIONS, Aggregation, refuse_class
from .checks import check_positive, check_tensors, fail, may_look
from .config import PRESETS, LossConfig, resolve_config
from .groups import ordered_sum, read_group
from .names import NoKeyword, refuse_keywords
from .sequences import accumulate_dtype, read_live
from .settings import as_float, read_integer, read_name, shown

if TYPE_CHECKING:
    from .groups import Group


# Not a dataclass: FSDP's mixed precision looks into those, and would round the count to bf16.
class Normalizer:
    """A denominator and what it counts: a loss that is averaged over something else refuses it.

    ``n / k``, ``n * k`` and ``n + m`` give another one; ``float(n)`` is the number, and waits for the device.
    """

    def __init__(self, value: Tensor, unit: str, group_size: int | None = None) -> None:
        self._value, self._unit, self._group_size = value, unit, group_size

    @property
    def value(self) -> Tensor:
        """Return the denominator, 0-d on the device of the masks."""
        return self._value

    @property
    def unit(self) -> str:
        """Return what is counted: "tokens", "sequences" or "groups"."""
        return self._unit

    @property
    def group_size(self) -> int | None:
        """Return the number of sequences of a group, where groups are counted."""
        return self._group_size

    def __add__(self, other: object) -> Normalizer:
        """Return the denominator of the micro-batches of both."""
        if not isinstance(other, Normalizer):
            return self if isinstance(other, int) and other == 0 else NotImplemented  # where sum() begins
        if other._counted != self._counted:
            fail("normalizer", f"another one in {self._counted} to add", f"one in {other._counted}")
        return Normalizer(self._value + other._value, self._unit, self._group_size)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Normalizer:
        return Normalizer(self._value * _positive("factor", factor), self._unit, self._group_size)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Normalizer:
        return Normalizer(self._value / _positive("divisor", divisor), self._unit, self._group_size)

    def __float__(self) -> float:
        return float(self._value)

    def __repr__(self) -> str:
        return f"Normalizer({self._value!r}, {self._counted!r})"

    @property
    def _counted(self) -> str:
        return self._unit if self._group_size is None else f"{self._unit} of {self._group_size}"

    def of_loss(self, function: str, config: LossConfig, tensors: Mapping[str, object] | None = None) -> Tensor:
        """Return the value for the loss of ``config``. Raise where that loss is averaged over something else."""
        aggregation = config.weighting
        needed = Normalizer(self._value, aggregation.unit, aggregation.group_size)
        if needed._counted != self._counted:
            expected = f'a normalizer in {needed._counted}, which aggregation="{aggregation.name}" divides by'
            fail(function, expected, f"one in {self._counted}", tensors, "normalizer(masks, config): the loss's config")
        return self._value


def normalizer(
    masks: Tensor | Sequence[Tensor],
    config: LossConfig | Aggregation | str | None = None,
    world_size: int = 1,
    group: Group | None = None,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    sequence_group: Group | None = None,
    **unknown: NoKeyword,
) -> Normalizer:
    """Return the denominator of one optimizer step, to pass as ``normalizer=`` to each of its micro-batches.

    Their losses then *add up* to the loss of the whole batch (but for ``entropy_aggregation="token_mean"``, which keeps
    each call's own denominator), and gradients averaged over ``world_size`` ranks (DDP, FSDP) to its gradient; the
    shares of ranks that hold parts of one sequence add up as well. Where the framework divides by the number of
    micro-batches k itself (accelerate, DeepSpeed), pass ``normalizer / k`` and ``grad_scale=1 / k``.

    Args:
        masks: the loss masks of this rank's micro-batches (one or several), as given to the loss.
        config: the loss's own: a LossConfig, a preset's name, or an aggregation or its name. It says what is counted.
        world_size: what the reduction of gradients divides by, and nothing else: the ranks P of DDP, FSDP2 or ZeRO-3,
            context parallel ones among them; 1 where gradients are summed.
        group: the ranks that hold other tokens of the step, data parallel and sequence parallel ones, and none that
            hold the same (shards of a vocabulary): a process group or a device mesh of one dimension. None: those of
            ``sequence_group``; without that the masks are all there is (or every rank has the same).
        cu_seqlens: bounds (S+1,) of each packed micro-batch, (N,) or (1, N); what lies outside of them does not count.
        sequence_group: as for the loss, the ranks that hold parts of the same sequences: each sequence counts once.

    Returns:
        Normalizer on the masks' device: live tokens ("token_mean"), groups ("group_mean") or sequences, over all
        micro-batches and ranks, divided by P.
    """
    if unknown:
        refuse_keywords(normalizer, unknown)
    if config is None:
        hint = 'a LossConfig, "grpo" or "token_mean": whether tokens or sequences are counted follows from it'
        fail("normalizer", "the config of the loss, normalizer(masks, config)", "none", hint=hint, error=TypeError)
    if not isinstance(masks, Iterable):
        fail("normalizer", "a mask, or a list of the micro-batches' masks", type(masks).__name__, error=TypeError)
    micro_batches = [masks] if isinstance(masks, Tensor) else list(masks)
    bounds = [cu_seqlens] if isinstance(cu_seqlens, Tensor) else cu_seqlens
    _check_micro_batches(micro_batches, bounds)
    divisor = _read_world_size(world_size)
    aggregation = _aggregation_of(config)
    unit, group_size = aggregation.unit, aggregation.group_size
    each = [None] * len(micro_batches) if bounds is None else bounds
    live = [read_live("normalizer", *part) for part in zip(micro_batches, each, strict=True)]
    if unit == "tokens":
        counts = [tokens.sum() for tokens in live]
    else:
        if unit == "groups" and group_size is None:
            fail("normalizer", f'a LossConfig with group_size for "{aggregation.name}"', repr(config))
        sizes = [b.shape[0] - 1 for b in bounds] if bounds is not None else [m.shape[0] for m in micro_batches]
        if bounds is None and any(mask.dim() == 1 for mask in micro_batches):
            fail("normalizer", "cu_seqlens with packed masks (N,)", "none", {"mask": micro_batches[0]})
        if any(size % (group_size or 1) for size in sizes):
            fail("normalizer", f"whole groups of {group_size} sequences in every micro-batch", f"{sizes} sequences")
        counts = [torch.tensor(size // (group_size or 1), device=micro_batches[0].device) for size in sizes]
    total = torch.stack(counts).sum().to(accumulate_dtype(micro_batches[0].device))
    of_sequences = read_group("normalizer", "sequence_group", sequence_group)
    if unit != "tokens" and of_sequences is not None and torch.distributed.get_rank(of_sequences) > 0:
        total = torch.zeros_like(total)  # the first rank counts what all of them hold parts of
    ranks = of_sequences if group is None else read_group("normalizer", "group", group)
    total = total if ranks is None else ordered_sum(total, ranks)
    return Normalizer(total / divisor, unit, group_size)


def _check_micro_batches(masks: list[Tensor], bounds: Sequence[Tensor] | None) -> None:
    if not masks:
        fail("normalizer", "at least one mask", "none")
    _check_each("mask", masks)
    for mask in masks:
        if mask.dim() not in (1, 2):
            hint = "normalizer(list(masks), ...) takes micro-batches that are stacked" if mask.dim() == 3 else None
            expected = "masks (B, T), or packed (N,) or (1, N)"
            fail("normalizer", expected, f"shape {tuple(mask.shape)}", {"mask": mask}, hint)
        if mask.dim() == 1 and bounds is None and mask.numel() > 0 and may_look(mask) and float(mask.max()) > 1:
            hint = "the mask itself, not its sums; of a packed mask of segments, mask != 0"
            fail("normalizer", "a packed mask (N,) of 0 and 1, or cu_seqlens", "larger numbers", {"mask": mask}, hint)
    if any(hasattr(mask, "device_mesh") for mask in masks):
        hint = "to_local(), and group= of the ranks that have other tokens"
        fail("normalizer", "masks that are plain tensors", "a DTensor", hint=hint)
    if bounds is not None and len(bounds) != len(masks):
        fail("normalizer", f"cu_seqlens of each of the {len(masks)} micro-batches", f"{len(bounds)}")
    if bounds is not None:
        _check_each("cu_seqlens", bounds)


def _positive(name: str, number: float) -> float:
    """Return what a denominator is multiplied or divided by. Raise unless it is > 0."""
    check_positive("normalizer", name, number)
    return as_float(number)


def _read_world_size(world_size: int) -> int:
    ranks = read_integer(world_size)
    if ranks is None or not 0 < ranks < 2**63:
        fail("normalizer", "world_size to be an integer, at least 1", shown(world_size))
    return ranks


def _check_each(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise for the first that is no dense tensor, with its micro-batch where there are several."""
    for number, tensor in enumerate(tensors):
        of = f"normalizer, micro-batch {number}" if len(tensors) > 1 else "normalizer"
        check_tensors(of, {name: tensor}, needed=(name,))


def _aggregation_of(config: LossConfig | Aggregation | str) -> Aggregation:
    if isinstance(config, Aggregation):
        return config
    refuse_class("normalizer: config", config)
    if isinstance(config, str):
        name = read_name("normalizer: config", config, [*PRESETS, *AGGREGATIONS])
        if name in AGGREGATIONS:
            return AGGREGATIONS[name]()
    return resolve_config(config).weighting
