"""Runs a function on several ranks that are threads of this process: hundreds of cases in the time of one process.

The group is PyTorch's own for its tests, which is private: where it is missing, tests that need it are skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

threaded = pytest.importorskip(
    "torch.testing._internal.distributed.multi_threaded_pg",
    reason="PyTorch's process group of threads is not in this version",
    exc_type=ImportError,
)


def run_threads(ranks: int, function: Callable[[int], Any], deadline: float = 20.0) -> list[Any]:
    """``function(rank)`` on every rank of the default group; what each returned.

    Raises:
        TimeoutError: ranks that have not come back before ``deadline``, seconds.
        Exception: the first error of a rank; the others are let go.
    """
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []
    store = torch.distributed.HashStore()

    def of_rank(rank: int) -> None:
        torch.distributed.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
        try:
            results[rank] = function(rank)
        except SystemExit:  # let go
            pass
        except BaseException as error:  # of any kind: it is raised in the test's own thread
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            torch.distributed.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=of_rank, args=(rank,), daemon=True) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(deadline)
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if late:
            threaded.ProcessLocalGroup.exception_handle(None)
            for thread in threads:
                thread.join(deadline)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    if late:
        raise TimeoutError(f"ranks {late} of {ranks} had not come back after {deadline:g} s")
    return results


def errors_of(ranks: int, function: Callable[[int], Any], deadline: float = 20.0) -> list[str | None]:
    """The type and text of what ``function(rank)`` raises on every rank, None where nothing."""

    def caught(rank: int) -> str | None:
        try:
            function(rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    return run_threads(ranks, caught, deadline)
