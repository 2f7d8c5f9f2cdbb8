"""Runs processes with a deadline: polled, killed when it passes, and not waited for where the driver holds them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0
"""Seconds in which SIGKILL ends a process, unless a call of the driver holds it: tearing down a context in which a
kernel still runs takes some."""
POLL = 0.01
"""Seconds between looks at a process: what its time is known to."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
MARK = "GRPO_KERNELS_GPU_CHECK_RUN"
"""In the environment of all that a run starts, and so of what that starts, in whatever session or group it is."""


@dataclass(frozen=True)
class Ended:
    """Is how a process ended; ``code`` is its exit status, -N for signal N, None if it was stopped at its deadline."""

    code: int | None
    seconds: float
    held: bool = False
    """It, or something that it started, outlived SIGKILL: a call of the driver does not return."""

    def __str__(self) -> str:
        """Say what went wrong, in words; empty if nothing did."""
        if self.held:
            return f"held by the driver: SIGKILL after {self.seconds:.0f} s did not end it"
        if self.code is None:
            return f"stopped at its deadline, after {self.seconds:.0f} s"
        if self.code < 0:
            known = -self.code in set(signal.Signals)
            return f"killed by {signal.Signals(-self.code).name if known else f'signal {-self.code}'}"
        return f"exit status {self.code}" if self.code else ""


def run(
    argv: list[str],
    seconds: float,
    log: Path,
    environment: dict[str, str] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a command in the tree, its output appended to ``log``; ``tick`` is called ten times a second.

    Whatever it has started ends with it, also when this is interrupted.
    """
    mark = uuid.uuid4().hex
    everything = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _paths(), **(environment or {}), MARK: mark}
    start, process = time.monotonic(), None
    try:
        with log.open("ab") as sink:
            # A group of its own: Ctrl-C reaches this process alone, which ends the others. Not a session of its own,
            # which would outlive this one where only the session is ended.
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT,
                                       env=everything, preexec_fn=partial(_apart, os.getpid()))  # fmt: skip
        code = _polled(process.poll, seconds, tick)
        taken = time.monotonic() - start
    finally:
        end = time.monotonic() + GRACE
        try:
            left = sweep(mark)
        except KeyboardInterrupt:  # the one that end_on_signals lets through
            sweep(mark)
            raise
        # A process that dies inside a call of the driver has no environment any more: only its parent still sees it.
        gone = process is None or _polled(process.poll, end - time.monotonic(), lambda: None) is not None
        tick()
    return Ended(code, taken, bool(left) or not gone)


def logged(argv: list[str], seconds: float, log: Path, *rest: Any) -> tuple[Ended, str]:
    """Run a command, and return what was printed meanwhile."""
    offset = log.stat().st_size if log.exists() else 0
    ended = run(argv, seconds, log, *rest)
    with log.open("rb") as file:
        file.seek(offset)
        return ended, file.read().decode(errors="replace")


def last_lines(text: str, count: int) -> list[str]:
    """Return the last lines, none of which is longer than a screen takes."""
    return [line[:300] for line in text.splitlines()[-count:]]


def output(command: list[str]) -> str | None:
    """Return what a command prints, not waited for where the driver holds it; None if it fails or says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended, text = logged(command, 20.0, Path(folder, "output"))
        except OSError:
            return None
        return None if str(ended) else text.strip() or None


def _apart(parent: int) -> None:
    os.setpgrp()
    _end_with(parent)


def _end_with(parent: int) -> None:
    """In a child: the kernel kills it when its parent ends, however that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


class Interrupted(KeyboardInterrupt):
    """Raised by a signal, whose shell's exit status it has."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def end_on_signals() -> None:
    """The first signal that ends a program raises Interrupted; further ones, while it cleans up, are ignored. One that
    is ignored already (nohup) stays so."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def say(text: str) -> None:
    """At once. What reads the output may have ended (``| head``): the record and the log go on without it."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _paths() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _polled(poll: Callable[[], int | None], seconds: float, tick: Callable[[], object]) -> int | None:
    """Return the exit status, None at the deadline."""
    end = time.monotonic() + seconds
    next_tick = 0.0
    while (code := poll()) is None and (now := time.monotonic()) < end:
        if now >= next_tick:
            tick()
            next_tick = now + 0.1
        time.sleep(POLL)
    return code


def sweep(mark: str) -> list[int]:
    """Kill every process that has this mark; those that are still there after GRACE seconds."""
    end = time.monotonic() + GRACE
    while (found := _marked(mark)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return found


def _marked(mark: str) -> list[int]:
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in path.read_bytes().split(b"\0"):  # a zombie's is empty
                found.append(int(path.parent.name))
    return found


def fork(function: Callable[[], bool], seconds: float) -> Ended:
    """A function in a forked process: exit status 0 for True, 1 for False, 2 for an exception, which is printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        _child(function, parent)
    code: list[int] = []

    def poll() -> int | None:
        if not code and (found := os.waitpid(pid, os.WNOHANG))[0]:
            code.append(os.waitstatus_to_exitcode(found[1]))
        return code[0] if code else None

    ended = None
    try:
        ended = _polled(poll, seconds, lambda: None)
        taken = time.monotonic() - start
    finally:
        if ended is None:
            os.kill(pid, signal.SIGKILL)
            _polled(poll, GRACE, lambda: None)
    return Ended(ended, taken, held=not code)


def _child(function: Callable[[], bool], parent: int) -> None:
    """Never returns, whatever happens: the parent's code is not the child's to run."""
    code = 2
    try:
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        _end_with(parent)
        code = 0 if function() else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
