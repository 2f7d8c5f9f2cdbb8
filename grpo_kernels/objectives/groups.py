"""Process groups: what a call may be given, and what ranks tell each other, in an order that is the same on all.

Everything here works on detached values: nothing is differentiated through a collective.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

import torch
from torch import Tensor

from .checks import checks_enabled, fail

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh
    """What users pass: a process group, or a device mesh of one dimension."""


def read_group(function: str, name: str, group: Any) -> ProcessGroup | None:
    """Return the process group that a user gave; None where none was given, or where this rank is alone in it.

    Raises:
        ValueError: a mesh of several dimensions, a group that this process is not in, no process group at all.
        TypeError: something that is neither.
    """
    if group is None:
        return None
    check_initialised(function, name)
    if isinstance(group, torch.distributed.device_mesh.DeviceMesh):
        if group.ndim != 1:
            hint = f'one dimension of it: mesh["{(group.mesh_dim_names or ("tp",))[-1]}"]'
            fail(function, f"{name}= of one dimension", f"a mesh of {group.ndim}", hint=hint)
        group = group.get_group()
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        hint = "only its members call; new_group() gives the others an object that is no group"
        fail(function, f"{name}= that this process is in", "a group of other ranks", hint=hint)
    if not isinstance(group, torch.distributed.ProcessGroup):
        hint = "torch.distributed.group.WORLD is the group of all ranks"
        expected = f"{name}= a process group or a device mesh of one dimension"
        fail(function, expected, type(group).__name__, hint=hint, error=TypeError)
    return group if torch.distributed.get_world_size(group) > 1 else None


def is_initialised() -> bool:
    """Whether there are process groups at all: before, torch.distributed.group.WORLD is None."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_initialised(function: str, name: str) -> None:
    """Raise where there are no process groups yet."""
    if not is_initialised():
        hint = "torch.distributed.init_process_group(...), or torchrun and the same"
        fail(function, f"torch.distributed to be initialised with {name}=", "no process group", hint=hint)


def get_ranks(group: ProcessGroup) -> list[int]:
    """Return the ranks of a group, by their numbers among all."""
    ranks: list[int] = torch.distributed.get_process_group_ranks(group)
    return ranks


def checksum(values: Tensor) -> str:
    """Return a number of 64 bits that other values, or the same in another order, have hardly."""
    values = values.detach().reshape(-1)
    bits = values.to(torch.float64).view(torch.int64) if values.is_floating_point() else values.to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return hex(int(((bits ^ (bits >> 29)) * (places * 0x9E3779B1 + 1)).sum()))


def gather(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return the values of every rank, (ranks, *shape), in rank order; shape and dtype are the same on all ranks."""
    ranks = torch.distributed.get_world_size(group)
    everyones = values.new_empty(ranks * values.numel())
    newer = getattr(torch.distributed, "all_gather_single", None)  # PyTorch 2.13 warns of the older name
    gather_flat = torch.distributed.all_gather_into_tensor if newer is None else newer
    gather_flat(everyones, values.detach().reshape(-1), group=group)
    return everyones.view(ranks, *values.shape)


def ordered_sum(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over ranks, added in rank order: the same bits on every rank, whatever the network does."""
    return add_in_order(gather(values, group))


def add_in_order(everyones: Tensor) -> Tensor:
    """Return the sum over the first dimension, added in its order."""
    total, *others = everyones.unbind()
    for other in others:
        total = total + other
    return total


def begin_total(values: Tensor, group: ProcessGroup, overlapped: bool = False) -> Callable[[], Tensor]:
    """Begin to add large tensors of one shape over ranks; what it returns gives the sum, in their dtype.

    Every rank adds one slice of them, in fp32 (fp64) and in rank order, and hands it to the others. It moves what an
    all-reduce moves, 2·(ranks - 1)/ranks of the tensor, and rounds once: a ring that adds in bf16 has 2.4 times the
    error at 8 ranks. The bits are the same on every rank, and do not depend on how rows are grouped.

    Args:
        overlapped: the slices travel until the sum is asked for, beside whatever the caller computes in between.
    """
    ranks, count = torch.distributed.get_world_size(group), values.numel()
    slice_size = -(-count // ranks)
    flat = values.reshape(-1)
    if spare := ranks * slice_size - count:
        flat = torch.nn.functional.pad(flat, (0, spare))
    slices = torch.empty_like(flat)
    work = torch.distributed.all_to_all_single(slices, flat, group=group, async_op=overlapped)

    def total() -> Tensor:
        if work is not None:
            work.wait()
        real = torch.float64 if values.dtype == torch.float64 else torch.float32
        own, *others = slices.view(ranks, slice_size).to(real).unbind()
        for other in others:
            own = own + other
        return gather(own.to(values.dtype), group).view(-1)[:count].view(values.shape)

    return total


_AGREED: weakref.WeakKeyDictionary[Any, set[tuple[str, str]]] = weakref.WeakKeyDictionary()
"""The functions whose ranks have agreed, with the keyword that names the group there, by process group."""
_ERRORS = (ValueError, TypeError, IndexError, RuntimeError)
"""What ``agree`` raises on every rank as what it is on one."""


def agree(
    function: str,
    name: str,
    group: ProcessGroup | None,
    facts: Mapping[str, int | str],
    error: Exception | None = None,
    check: bool | None = None,
    hint: str | None = None,
) -> None:
    """Raise one error on all ranks, where one of them has an ``error`` of its own or where their facts differ.

    Ranks tell each other at the first call of a function on a group, and at every call with checks on: conditions that
    are the same on all of them, as shapes are not. At calls in between, in a captured graph, and without a group, a
    rank raises its own error alone. Facts are told in words, in two collectives that wait for the device.

    Args:
        function, name: the function and its keyword for the group, for messages.
        group: the ranks; None: this one.
        facts: what is the same on all ranks, by name: numbers, or words such as a config's repr.
        error: what this rank's own checks have raised, caught so that the others do not wait for it.
        check: whether checks are on, the same on all ranks; None: the environment's GRPO_KERNELS_CHECK.
        hint: what to do where facts differ.

    Raises:
        ValueError: facts that differ, with those of every rank.
        Exception: the errors of ranks, each with its rank, as the type of the first; that of this rank as it is where
            nothing is told, or where all ranks have the same.
    """
    if group is not None and meets(function, name, group, check):
        _tell(function, name, group, facts, error, hint)
    elif error is not None:
        raise error


def _tell(
    function: str,
    name: str,
    group: ProcessGroup,
    facts: Mapping[str, int | str],
    error: Exception | None,
    hint: str | None,
) -> None:
    told: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(told, (_error_in_words(error), {"function": function, **facts}), group=group)
    errors = [words for words, _ in told]
    if any(errors):
        _raise_together(errors, error)
    _compare(function, name, [of_rank for _, of_rank in told], hint)
    _AGREED.setdefault(group, set()).add((function, name))


def forget(function: str, name: str, group: ProcessGroup) -> None:
    """Let ranks meet again at the next call: what they found out together has failed, on all of them."""
    _AGREED.get(group, set()).discard((function, name))


@contextlib.contextmanager
def agreement(
    function: str, name: str, group: ProcessGroup, check: bool | None, hint: str | None = None
) -> Iterator[dict[str, int | str] | None]:
    """Run a rank's own checks, and let its group know what they raise, and whether their facts differ: ``agree``.

    Gives a mapping for the facts; None at a call that tells nothing.
    """
    if not meets(function, name, group, check):
        yield None
        return
    facts: dict[str, int | str] = {}
    try:
        yield facts
    except Exception as error:
        _tell(function, name, group, facts, error, hint)
    else:
        _tell(function, name, group, facts, None, hint)


def meets(function: str, name: str, group: ProcessGroup, check: bool | None) -> bool:
    """Whether ``agree`` lets ranks tell each other at this call."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return checks_enabled(check) or (function, name) not in _AGREED.get(group, ())


def in_words(value: object) -> str:
    """Return a fact as ranks tell it, of one number its value as a float, whatever holds it and wherever: ranks that
    tell each other wait anyway."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return "a tensor"
    if isinstance(value, SupportsFloat) and not isinstance(value, bool):
        return repr(float(value))
    return repr(value)


def _error_in_words(error: Exception | None) -> tuple[str, str] | None:
    """Return the name of an error's type and its text, which travel; its object might not."""
    if error is None:
        return None
    kind = next((kind.__name__ for kind in _ERRORS if isinstance(error, kind)), "RuntimeError")
    return kind, str(error) or type(error).__name__


def _raise_together(errors: list[tuple[str, str] | None], own: Exception | None) -> None:
    if own is not None and all(words == errors[0] for words in errors):
        raise own
    texts = [f"rank {rank} of {len(errors)}: {words[1]}" for rank, words in enumerate(errors) if words is not None]
    first = next(words[0] for words in errors if words is not None)
    kind = next(kind for kind in _ERRORS if kind.__name__ == first)
    raise kind("\n".join(texts)) from own


def _compare(function: str, name: str, facts: list[Mapping[str, int | str]], hint: str | None) -> None:
    for what in dict.fromkeys(what for of_rank in facts for what in of_rank):
        values = [of_rank.get(what, "none") for of_rank in facts]
        if any(value != values[0] for value in values):
            got = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            fail(function, f"the same {what} on every rank of {name}", got, hint=hint)
