"""Runs a function on several gloo ranks of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def run_ranks(ranks: int, folder: Path, function: Callable[[int], object]) -> list:
    """``function(rank)`` in ``ranks`` processes of one process group; what each returned. It must be picklable."""
    torch.multiprocessing.spawn(_rank, (ranks, str(folder), function), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, function: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
