"""Functions of a rank on threads that stand for ranks (``distributed.on_threads``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed import on_threads


def run_threads(ranks: int, function: Callable[[int], Any], deadline: float = 20.0) -> list[Any]:
    """``function(rank)`` on every rank of the default group; what each returned. The first error is raised."""
    return on_threads(ranks, lambda: function(torch.distributed.get_rank()), seconds=deadline)


def errors_of(ranks: int, function: Callable[[int], Any], deadline: float = 20.0) -> list[str | None]:
    """The type and text of what ``function(rank)`` raises on every rank, None where nothing."""

    def caught(rank: int) -> str | None:
        try:
            function(rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    return run_threads(ranks, caught, deadline)
