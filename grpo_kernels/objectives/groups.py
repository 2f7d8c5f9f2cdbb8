"""Process groups: what a call may be given, and what ranks tell each other, in an order that is the same on all.

Everything here works on detached values: nothing is differentiated through a collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .checks import fail

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
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        hint = "torch.distributed.init_process_group(...), or torchrun and the same"
        fail(function, f"torch.distributed to be initialised with {name}=", "no process group", hint=hint)
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
    total, *others = gather(values, group).unbind()
    for other in others:
        total = total + other
    return total
