"""Files that an accident leaves as they were: each is written beside its place, is on the disk, and then takes it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

NOT_OF_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
"""What a file system says that cannot put the names in a folder on the disk when it is asked to."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give the path of a new file or folder that takes the place of ``path`` when it is whole, or is removed.

    It lies in a folder of a known name, which the next writer empties: a process may be killed in between, and what a
    library writes before may have any name. A symbolic link stays one: what it points to is replaced.
    """
    path = path.resolve()
    unfinished = clear(path)
    unfinished.mkdir()
    try:
        made = unfinished / path.name
        yield made
        for file in [made, *made.rglob("*")]:
            if file.is_file():
                file.chmod(unfinished.stat().st_mode & 0o666)  # as any new file's; safetensors' are their owner's alone
            sync(file)
        made.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(OSError):  # the new one is there: nobody may be told that it is not
        sync(path.parent)


def clear(path: Path) -> Path:
    """Remove the folder in which a new ``path`` is made, which a writer that was killed has left; return its path."""
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    return unfinished


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a machine may lose its power."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NOT_OF_FOLDERS):
            raise


def is_there(path: Path) -> bool:
    """Whether anything is; False too where that cannot be asked, as in a folder that may not be read."""
    return os.path.exists(path)  # noqa: PTH110 (Path.exists raises)


def is_utf8(path: Path) -> bool:
    """Whether safetensors can read a file there, by the path as it is given."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write_text(text)
