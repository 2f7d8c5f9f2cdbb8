"""Children that something happens to, and what they leave behind (Linux)."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 120.0
"""Seconds that a child may take beside a busy machine."""


class Fault(AssertionError):
    """What this looks for: something was lost, hung, or left behind."""


def start(action: Callable[[], int | None], output: Path) -> int:
    """A forked child in a session of its own, which writes what it prints into a file."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 70
    try:
        os.setsid()
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = action() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        print(error, file=sys.stderr)
    except KeyboardInterrupt:  # before the command or after it
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def wait(child: int, patience: float = PATIENCE) -> int:
    """A child's exit status, minus the signal that ended it. A child that does not end is a fault."""
    deadline = time.monotonic() + patience
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):  # it may not have its session yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Fault(f"a child did not end in {patience:g} seconds")
        time.sleep(0.002)
    if left := of_session(child):
        raise Fault(f"processes {left} of a child that has ended are still there")
    return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def failed(said: str) -> bool:
    """Whether an exception was not caught; one that a signal raised in a destructor is Python's to swallow."""
    return said.count("Traceback") > said.count("Exception ignored in")


def of_session(session: int) -> list[int]:
    """The processes of a session, but for zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def resident() -> float:
    """This process's resident memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])
