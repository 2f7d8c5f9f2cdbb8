"""Several processes, one run: who has which rows, what they tell each other, and who writes.

Every rank draws the same problems, noise and orders from generators in the same state, and works on its own rows of
them. So what a step is made of does not depend on how many ranks share it, and little has to be agreed on.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..objectives.groups import gather
from ..objectives.metrics import Metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")
LOST = (
    "(closed|reset) by peer|pair closure|Socket closed|Broken pipe|Connection refused|Timed out waiting|"
    "collective operation timeout|ncclRemoteError|remote process exited"
)
"""What gloo and NCCL say of a rank that has ended. Gloo's errors have no type of their own, and NCCL's is that of its
other errors, too."""

PATIENCE = datetime.timedelta(hours=1)
"""How long ranks wait for one another, of which one writes the checkpoint of a large model to a slow disk."""


class Ranks:
    """One process: all rows are its own, and there is nobody to agree with. ``Several`` is the form under torchrun."""

    index, count = 0, 1
    """This rank's place among those that work on different rows, and how many those are."""
    group: ProcessGroup | None = None
    """Those ranks."""
    several = False
    command = "python -m grpo_kernels"
    """What continues a run of as many ranks."""
    writes = True
    """Whether this rank writes the log, the curves and the checkpoint, and prints."""

    def __init__(self, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def share(self, rows: int, block: int = 1) -> int:
        """Return how many of ``rows`` the rank has that has most: whole blocks, spread evenly."""
        return -(-(rows // block) // self.count) * block

    def own(self, rows: Tensor, block: int = 1) -> Tensor:
        """Return this rank's part of ``rows``: the last ranks may have fewer than the others, or none."""
        share = self.share(len(rows), block)
        return rows[self.index * share : (self.index + 1) * share]

    def micro_batches(self, rows: Tensor, size: int, block: int = 1) -> list[tuple[Tensor, bool]]:
        """Return this rank's part of ``rows`` in micro-batches, as many on every rank: each takes part in every forward
        and backward pass. Those after its last row, (rows, False), are to be masked whole."""
        own = self.own(rows, block)
        found = [(part, True) for part in own.split(size)] if len(own) else []
        return found + [(rows[:block], False)] * (-(-self.share(len(rows), block) // size) - len(found))

    def join(self, own: Tensor, rows: int, block: int = 1) -> Tensor:
        """Return the values (rows, ...) of all ranks' parts, in the order of the rows."""
        missing = self.share(rows, block) - len(own)
        padded = torch.cat([own, own.new_zeros(missing, *own.shape[1:])])
        return self.gather(padded).flatten(0, 1)[:rows]

    def gather(self, values: Tensor) -> Tensor:
        """Return every rank's values, (ranks, *shape)."""
        return values[None]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over ranks."""
        return self.gather(values).mean(0)

    def largest(self, value: int) -> int:
        """Return the largest of the ranks' values."""
        return value

    def merge(self, metrics: Metrics) -> Metrics:
        """Return the metrics of all ranks' tokens."""
        return metrics

    def decide(self, action: Callable[[], Result]) -> Result:
        """Return what ``action`` returns on the rank that writes; what it exits with, every rank exits with."""
        return action()

    def wait(self) -> None:
        """Wait until every rank is here."""

    def has_lost_one(self, error: RuntimeError) -> bool:
        """Whether an error is of a collective in which another rank no longer takes part."""
        return False

    def finish(self) -> None:
        """Leave the process group."""


class Several(Ranks):
    """The ranks that torchrun has started, one device each, as a mesh ("dp", "tp"): those of one "tp" row share the
    columns of the vocabulary and work on the same rows."""

    group: ProcessGroup
    several = True

    def __init__(self, device: str | None, tp: int = 1) -> None:
        super().__init__(device)
        self._place()
        if not torch.distributed.is_initialized():
            backend = torch.distributed.get_default_backend_for_device(self.device)
            torch.distributed.init_process_group(backend, timeout=PATIENCE)
        ranks = torch.distributed.get_world_size()
        if ranks % tp:
            torch.distributed.destroy_process_group()
            raise ValueError(f"--tp must divide the {ranks} ranks that torchrun has started; got {tp}.")
        mesh = torch.distributed.device_mesh.init_device_mesh
        self.command = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', ranks)} -m grpo_kernels"
        self.mesh: DeviceMesh = mesh(self.device.type, (ranks // tp, tp), mesh_dim_names=("dp", "tp"))
        self.group = self.mesh.get_group("dp")
        self.index, self.count = self.mesh.get_local_rank("dp"), ranks // tp
        self.writes = torch.distributed.get_rank() == 0

    def _place(self) -> None:
        """Take the device of this rank among its machine's."""
        if self.device.type == "cpu":
            return
        if self.device.index is not None:
            raise ValueError(f"--device must be without a number under torchrun; got {self.device}.")
        self.device = torch.device(self.device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(self.device.index)

    def gather(self, values: Tensor) -> Tensor:
        return gather(values, self.group)

    def largest(self, value: int) -> int:
        values = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return int(values)

    def merge(self, metrics: Metrics) -> Metrics:
        return metrics.all_reduce(self.group)

    def decide(self, action: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.writes:
            try:
                outcome = [action(), None]
            except BaseException as error:  # Ctrl-C among them: the others wait for what was decided
                failure, words = error, f"{type(error).__name__}: {error}"
                outcome = [None, str(error) if isinstance(error, SystemExit) else words]
        torch.distributed.broadcast_object_list(outcome, device=self.device)
        result, message = outcome
        if failure is not None:
            raise failure
        if message is not None:
            raise SystemExit(message)
        decided: Result = result
        return decided

    def wait(self) -> None:
        torch.distributed.barrier()

    def has_lost_one(self, error: RuntimeError) -> bool:
        return re.search(LOST, str(error)) is not None

    def finish(self) -> None:
        torch.distributed.destroy_process_group()


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(device: str | None, fsdp: bool = False, tp: int = 1) -> Ranks:
    """Join the process group that torchrun's environment describes, or return the form for one process."""
    if started_by_torchrun():
        return Several(device, tp)
    if fsdp or tp > 1:
        flag = "--fsdp" if fsdp else f"--tp {tp}"
        raise ValueError(f"{flag} needs several ranks: torchrun --nproc-per-node P -m grpo_kernels train {flag} ...")
    return Ranks(device)
