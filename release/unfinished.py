"""What an interrupted run leaves does not look finished."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def workspace(folder: Path, program: str) -> Iterator[Path]:
    """Make a folder inside of ``folder`` that is gone afterwards, however the block ends: what is moved out of it is
    whole, and of one run. ``program`` is who says that it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-")
    except OSError as error:
        raise SystemExit(f"{program}: expected a folder that can be written; got {folder}: {error.strerror}.") from None
    with made as path:
        yield Path(path)
