"""The policy as a folder that transformers' ``from_pretrained`` loads, with its tokenizer."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from ..files import is_utf8, replaced
from .policy import Tokenizer
from .sharding import whole


def check_free(folder: Path, run: Path) -> None:
    """Exit where there is something already, the folder ``run`` will be, or nothing can be written, before a run that
    would end with it."""
    place = Path(os.path.realpath(folder))  # Path.resolve raises for a link to itself
    if not is_utf8(place):
        raise SystemExit(f"--save-model {str(folder)!r} is no name in UTF-8, as safetensors needs it.")
    try:
        if place in (run.resolve(), *run.resolve().parents):
            raise SystemExit(f"--save-model {folder}: the run's own folder {run} will be there; choose a new folder.")
        if place == Path.cwd() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
            raise SystemExit(f"--save-model {folder}: there is something already; choose a new folder.")
        if any(parent.is_symlink() for parent in place.parents):  # none is left but those that lead to themselves
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with tempfile.TemporaryDirectory(dir=next(parent for parent in place.parents if parent.exists())):
            pass  # what is not there yet can be made in it
    except OSError as error:
        raise SystemExit(f"--save-model {folder} cannot be written: {error.strerror or error}.") from error


def save_policy(model: Any, tokenizer: Tokenizer, folder: Path, writes: bool) -> None:
    """Write a model and its tokenizer, whole or not at all. Every rank must ask, of which one ``writes``."""
    weights = {}
    for name, values in model.state_dict().items():
        tensor = whole(values.detach())  # every rank's parts of it, one tensor at a time
        if writes:
            weights[name] = tensor.cpu()
    if not writes:
        return
    try:
        folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        with replaced(folder) as made:
            model.save_pretrained(made, state_dict=weights)
            tokenizer.save_pretrained(made)
    except Exception as error:  # of many kinds where a disk is full
        raise SystemExit(
            f"--save-model {folder}: the model cannot be written: {error}. The run is in its checkpoint: --resume its "
            "folder with another --save-model."
        ) from error
