"""Progress on stderr: a bar on a terminal where tqdm is installed, else a few lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..streams import say

LINES = 10


class Lines:
    """What a bar is asked to do, done by at most ``LINES`` lines: a file or a pipe keeps what a bar overwrites."""

    def __init__(self, total: int, description: str, unit: str, done: int = 0) -> None:
        self._total, self._description, self._unit, self._done = total, description, unit, done
        self._numbers = ""

    def update(self) -> None:
        """Count one more, and print a line where another share of the whole is done."""
        before, self._done = self._done, self._done + 1
        if self._done * LINES // self._total > before * LINES // self._total:
            say(f"{self._description}: {self._done} of {self._total} {self._unit}s{self._numbers}")

    def set_description(self, text: str) -> None:
        self._description = text

    def set_postfix(self, numbers: Mapping[str, str]) -> None:
        self._numbers = "".join(f", {name} {number}" for name, number in numbers.items())

    def close(self) -> None:
        return


def progress_bar(total: int, description: str, unit: str, done: int = 0, leave: bool = False) -> Any:
    """Return tqdm's bar, gone when it is closed unless it is to ``leave`` its last state; or ``Lines``. tqdm is no
    dependency of the package."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Lines(total, description, unit, done)
    if not sys.stderr.isatty():
        return Lines(total, description, unit, done)
    return tqdm(total=total, initial=done, desc=description, unit=unit, file=sys.stderr, leave=leave)
