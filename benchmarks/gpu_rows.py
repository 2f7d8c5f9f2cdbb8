"""Rows that a process measures, one line of JSON each in a file that another reads while it grows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""What is to be measured: names of rows and what finds their figures."""


def write(path: Path | None, name: str, **figures: Any) -> None:
    """Append a row; it is on its way to the disk when this returns."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")


def read(path: Path) -> list[Row]:
    """Every whole line; one that is being written comes next time."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
