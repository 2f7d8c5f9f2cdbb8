"""A progress bar where tqdm is installed, and silence where it is not."""

from __future__ import annotations

import sys
from typing import Any


class Silent:
    """What a bar is asked to do, done by nobody."""

    def update(self) -> None:
        return

    def set_description(self, text: str) -> None:
        return

    def close(self) -> None:
        return


def progress_bar(total: int, description: str, unit: str) -> Any:
    """On stderr, gone when it is closed; tqdm is no dependency of the package."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Silent()
    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, leave=False)
