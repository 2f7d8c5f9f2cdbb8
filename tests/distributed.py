"""Ranks for tests: pools of gloo processes that live as long as the tests' own, and threads that stand for ranks.

A function that runs on ranks is one of a module; it finds its rank and its groups by ``torch.distributed``, or by
``world``, ``mesh`` and ``subgroup``, which make each group once.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

GROUP_SECONDS = 8
"""A collective that a rank does not come to fails on the others after so long."""
PRELOADED = ("conftest", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.qwen3")
"""Imported once, by the process that ranks are forked from."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a call on one rank: a value, or an error."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    text: str = ""
    """The error's traceback, or where a rank was when it was given up."""


class Pool:
    """A process group of gloo ranks, one thread each, which start at the first run and stay for the next."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.starts = 0
        """How often its processes were started: once, and again after each fault that its groups did not survive."""
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder = Path()
        self._suspect = False

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
        """Return what ``function(*args)`` returned on each rank, in rank order; both ways go by pickle.

        Raises:
            The exception of the rank that failed first, its traceback and the other ranks' in its notes: TimeoutError
            for one that did not return within ``seconds``, ChildProcessError for one that died. The processes are
            then started anew for the next run.
        """
        return self._values(self._call(function, args, seconds))

    def errors_of(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[BaseException | None]:
        """Return the exception that each rank raised, in rank order; None for a rank that returned."""
        outcomes = self._call(function, args, seconds)
        errors = [outcome.error for outcome in sorted(outcomes, key=lambda each: each.rank)]
        self._suspect = any(error is not None for error in errors)
        return errors

    def refusal_of(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> str:
        """Return the one message that every rank raised with one type of error, after which its groups still work."""
        errors = self.errors_of(function, *args, seconds=seconds)
        said = {f"{type(error).__name__}: {error}" for error in errors}
        assert None not in errors, errors
        assert len(said) == 1, errors
        assert self.usable(), f"no group of the {self.ranks} ranks may be used after {said}"
        return str(errors[0])

    def usable(self) -> bool:
        """Return whether the ranks still meet in each of their groups; where they do not, they are started anew."""
        if not self._processes:
            return False
        token = time.monotonic_ns()
        outcomes = self._exchange(_meet, (token,), GROUP_SECONDS + 5)
        self._suspect = False
        usable = all(outcome.error is None for outcome in outcomes)
        if not usable:
            self.stop()
        return usable

    def stop(self, seconds: float = 0.0) -> None:
        """End the processes, by force those that do not end by themselves within some seconds; the next run starts
        others."""
        for connection in self._connections:
            connection.close()  # whoever waits for it ends
        for process in self._processes:
            process.join(seconds)
            process.kill()
            process.join()
        self._processes, self._connections, self._suspect = [], [], False

    def _call(self, function: Callable[..., Any], args: tuple, seconds: float) -> list[Outcome]:
        if self._suspect:
            self.usable()
        if not self._processes:
            self._start()
        return self._exchange(function, args, seconds)

    def _values(self, outcomes: list[Outcome]) -> list[Any]:
        if any(outcome.error is not None for outcome in outcomes):
            self.stop()
        return _values(outcomes, self.ranks)

    def _start(self) -> None:
        folder = tempfile.mkdtemp(prefix="grpo_kernels_ranks_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        context = _server()
        for rank in range(self.ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, f"{folder}/{rank}.stack"), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        self._folder = Path(folder)
        self.starts += 1
        self._values(self._exchange(_join, (f"{folder}/store", self.ranks), 120))

    def _exchange(self, function: Callable[..., Any], args: tuple, seconds: float) -> list[Outcome]:
        """Return the outcomes in the order in which they came. No rank begins before all have read what to do:
        importing a test's module takes one longer than another."""
        message = pickle.dumps((function, args))
        try:
            self._send(message)
            read = self._receive(seconds)
            able = all(outcome.error is None for outcome in read)
            self._send(b"go" if able else b"")
            return self._receive(seconds) if able else read
        except BaseException:  # the test was interrupted: what ranks are at is not known
            self.stop()
            raise

    def _send(self, message: bytes) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it died: seen when its answer is read
                connection.send_bytes(message)

    def _receive(self, seconds: float) -> list[Outcome]:
        """Return an outcome for every rank. Where a rank died or is not heard of in time, all are stopped; those that
        wait for a rank that failed get no longer than their groups' timeout."""
        deadline = time.monotonic() + seconds
        outcomes: list[Outcome] = []
        left = dict(zip(self._connections, range(self.ranks), strict=True))
        lost = False
        while left and (ready := wait(list(left), max(deadline - time.monotonic(), 0))):
            for connection in ready:
                rank = left.pop(connection)
                try:
                    outcomes.append(pickle.loads(connection.recv_bytes()))
                except (EOFError, OSError):
                    outcomes.append(self._died(rank))
                    lost = True
                if outcomes[-1].error is not None:
                    deadline = min(deadline, time.monotonic() + GROUP_SECONDS + 2)
        outcomes += [self._given_up(rank, seconds) for rank in left.values()]
        if lost or left:
            self.stop()
        return outcomes

    def _died(self, rank: int) -> Outcome:
        self._processes[rank].join()
        message = f"rank {rank} of {self.ranks} died with exit code {self._processes[rank].exitcode}"
        return Outcome(rank, error=ChildProcessError(message))

    def _given_up(self, rank: int, seconds: float) -> Outcome:
        os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.2)  # for its stack
        stack = (self._folder / f"{rank}.stack").read_text()
        message = f"rank {rank} of {self.ranks} did not return within {seconds:g} s, or after another's fault"
        return Outcome(rank, error=TimeoutError(message), text=stack)


@functools.cache
def pool(ranks: int) -> Pool:
    """Return the session's pool of so many ranks."""
    made = Pool(ranks)
    atexit.register(made.stop, 5.0)  # a coverage run hears of what ranks did when they end
    return made


def _values(outcomes: list[Outcome], ranks: int) -> list[Any]:
    """Return the values in rank order, or raise the error that came first, with what happened on all in its notes."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if not failed:
        return [outcome.value for outcome in sorted(outcomes, key=lambda each: each.rank)]
    first = failed[0].error
    for outcome in failed:
        first.add_note(f"on rank {outcome.rank} of {ranks}: {outcome.text or outcome.error}".rstrip())
    raise first


@functools.cache
def _server() -> Any:
    """Return the context whose processes are forked from one that has imported what they need.

    That process does not get the tests' ``sys.path`` before Python 3.13.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _serve(rank: int, connection: Connection, stack: str) -> None:
    """Do what the pool says until it is gone."""
    global _rank
    _rank = rank
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own process decides
    with Path(stack).open("w") as file, contextlib.suppress(EOFError, OSError):
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        while True:
            read = _outcome_of(rank, pickle.loads, connection.recv_bytes())
            connection.send_bytes(_packed(dataclasses.replace(read, value=None)))
            if connection.recv_bytes() == b"go":
                connection.send_bytes(_packed(_outcome_of(rank, _prepared, *read.value)))


_rank = 0
"""Of this process in its pool."""


def _join(store: str, ranks: int) -> None:
    """Make the group of all ranks."""
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, ranks),
        rank=_rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=GROUP_SECONDS),
    )


def _meet(token: int) -> None:
    """Raise unless the ranks of each group that was made are in it with the same token."""
    for group in (world(), *vars(_made).get("groups", {}).values()):
        for each in group.get_all_groups() if hasattr(group, "get_all_groups") else [group]:
            if each is not torch.distributed.GroupMember.NON_GROUP_MEMBER:
                mine = torch.tensor([token, torch.distributed.get_rank(each)])
                everyones = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(each))]
                torch.distributed.all_gather(everyones, mine, group=each)
                assert torch.stack(everyones).tolist() == [[token, rank] for rank in range(len(everyones))]


def _prepared(function: Callable[..., Any], args: tuple) -> Any:
    """Call a function in the state that ``conftest.py`` gives each test."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    return function(*args)


def _outcome_of(rank: int, function: Callable[..., Any], *args: Any) -> Outcome:
    try:
        return Outcome(rank, function(*args))
    except BaseException as error:  # what ends a process too: the pool decides
        return Outcome(rank, error=error, text=traceback.format_exc())


def _packed(outcome: Outcome) -> bytes:
    """Return its pickle; of what cannot be pickled, the reason."""
    try:
        packed = pickle.dumps(outcome)
        pickle.loads(packed)  # an exception with arguments of its own may be written and not read
        return packed
    except Exception as error:
        said = outcome.error or error
        plain = RuntimeError(f"{type(said).__name__}: {said}")
        return pickle.dumps(Outcome(outcome.rank, error=plain, text=outcome.text))


_made = threading.local()
"""The groups of this rank: a process, or one of the threads of ``on_threads``."""


def _once(key: Any, make: Callable[[], Any]) -> Any:
    kept = vars(_made).setdefault("groups", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def world() -> torch.distributed.ProcessGroup:
    """Return the group of all ranks."""
    return torch.distributed.group.WORLD


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> torch.distributed.device_mesh.DeviceMesh:
    """Return the mesh of all ranks in that shape, made once. Names: ("tp",), ("dp", "tp"), ("dp", "cp", "tp")."""
    names = names or {1: ("tp",), 2: ("dp", "tp"), 3: ("dp", "cp", "tp")}[len(shape)]

    def make() -> torch.distributed.device_mesh.DeviceMesh:
        from torch.distributed import device_mesh, distributed_c10d

        made = device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
        for group in made.get_all_groups():
            if torch.distributed.get_backend(group) == "gloo":  # half an hour otherwise
                distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=GROUP_SECONDS), group)
        return made

    return _once((shape, names), make)


def subgroup(*ranks: int) -> torch.distributed.ProcessGroup:
    """Return the group of these ranks, made once. Every rank calls it; one outside gets PyTorch's non-member."""
    timeout = datetime.timedelta(seconds=GROUP_SECONDS)
    return _once(ranks, lambda: torch.distributed.new_group(list(ranks), timeout=timeout))


def on_threads(ranks: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """Return what ``function(*args)`` returned on each of so many threads that stand for ranks, in rank order.

    For breadth: a group takes milliseconds, and nothing is pickled. One generator of random numbers serves all threads:
    draw before, or from one's own. The process group is PyTorch's private one for tests; without it the test is
    skipped. The exception that came first is raised, TimeoutError where a thread does not return.
    """
    return _values(thread_outcomes(ranks, function, *args, seconds=seconds), ranks)


def thread_errors_of(ranks: int, function: Callable[..., Any], *args: Any) -> list[BaseException | None]:
    """Return the exception that each of so many threads raised, in rank order; None for one that returned."""
    outcomes = thread_outcomes(ranks, function, *args)
    return [outcome.error for outcome in sorted(outcomes, key=lambda each: each.rank)]


def thread_outcomes(ranks: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Outcome]:
    """Return the outcomes in the order in which they came; a thread that waits for one that failed has SystemExit."""
    threaded = pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg", exc_type=ImportError)
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    outcomes: list[Outcome] = []
    store = torch.distributed.HashStore()
    threads = torch.get_num_threads()

    def serve(rank: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("threaded", store=store, rank=rank, world_size=ranks)
        try:
            outcomes.append(_outcome_of(rank, function, *args))
        finally:
            torch.distributed.destroy_process_group()

    threaded._install_threaded_pg()
    isolate(True)
    try:
        workers = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        _wait_for(workers, outcomes, seconds)
        late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        if late and all(outcome.error is None for outcome in outcomes):
            error = TimeoutError(f"ranks {late} of {ranks} did not return within {seconds:g} s")
            outcomes.append(Outcome(late.pop(0), error=error))
        threaded.ProcessLocalGroup.exception_handle(None)  # ends those that wait for another
        _wait_for(workers, [], 5)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        isolate(False)
        torch.set_num_threads(threads)
    return outcomes


def _wait_for(workers: list[threading.Thread], outcomes: list[Outcome], seconds: float) -> None:
    """Wait for threads; once one has failed, two seconds for those that fail or return by themselves."""
    deadline = time.monotonic() + seconds
    while (alive := next(filter(threading.Thread.is_alive, workers), None)) and time.monotonic() < deadline:
        alive.join(0.02)
        if any(outcome.error is not None for outcome in outcomes):
            deadline = min(deadline, time.monotonic() + 2)
