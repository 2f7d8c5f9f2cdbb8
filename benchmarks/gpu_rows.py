"""Writes and reads rows that a process measures, one line of JSON each in a file that another reads while it grows."""

from __future__ import annotations

import json
import math
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
            file.write(json.dumps(finite({"name": name, **figures})) + "\n")


def read(path: Path) -> list[Row]:
    """Read every whole line; one that is being written comes next time, one that is no row is one that failed."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").split("\n")[:-1]
    return [_row(line, number) for number, line in enumerate(lines, 1)]


def _row(line: str, number: int) -> Row:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if is_row(found):
        row: Row = found
        return row
    return {"name": f"line {number}", "passed": False, "how": f"it is no row: {line[:100]}"}


def is_row(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("name"), str)


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has not, by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
