"""Ctrl-C while ``python -m grpo_kernels`` is still being imported, for a second or more: imported before PyTorch. And a
scheduler's SIGTERM, which ends a command as Ctrl-C does."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # an exception would be a traceback through PyTorch, or be caught in it


def leave_quietly() -> None:
    """Let Ctrl-C end the process without a traceback, if it is this program: Python imports a program's package before
    the program, whose arguments are not known then."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as a shell starts what runs in its background
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name == "grpo-kernels" or (name == "-m" and ("-m", __package__) in itertools.pairwise(sys.orig_argv)):
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, where it did not."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stays(number: int) -> bool:
    """Whether a signal is ignored, as nohup does with SIGHUP, or handled by what is not Python: it stays so."""
    return signal.getsignal(number) in (signal.SIG_IGN, None)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, unless it stays what it is: commands keep what they have and leave no half
    of a file."""
    if stays(signal.SIGTERM) or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


leave_quietly()
