"""The standard streams of a command: closed, full or narrow ones change neither its work nor its status."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def mend() -> None:
    """Put something in the place of streams that the process was started without, before a file of ours gets their
    number; and let none fail for a letter that its encoding lacks."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            null = Path(os.devnull).open("w", encoding="utf-8", errors="replace")  # noqa: SIM115 (until the end)
            setattr(sys, name, null)
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line to standard error, if anybody can read it there."""
    with contextlib.suppress(OSError):  # a terminal that is gone, a disk that is full
        print(text, file=sys.stderr, flush=True)


def what_failed(error: OSError) -> str:
    """Return the error, and that it is of standard output where that takes nothing: what it writes has no name."""
    try:
        if error.filename is None:
            print()  # what failed may have left nothing to write
        sys.stdout.flush()
    except OSError:
        drop_output()
        return f"standard output cannot be written: {error.strerror}"
    return str(error)


def drop_output() -> None:
    """Let what the interpreter flushes at its end go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
