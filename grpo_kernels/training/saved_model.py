"""The policy as a folder that transformers' ``from_pretrained`` loads, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import replaced
from .policy import Tokenizer
from .sharding import whole


def check_free(folder: Path) -> None:
    """Exit where there is something already, before a run that would end with it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SystemExit(f"--save-model {folder}: there is something already; choose a new folder.")


def save_policy(model: Any, tokenizer: Tokenizer, folder: Path, writes: bool) -> None:
    """Write a model and its tokenizer, whole or not at all. Every rank must ask, of which one ``writes``."""
    weights = {name: whole(values.detach()).cpu() for name, values in model.state_dict().items()}
    if not writes:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replaced(folder) as made:
            model.save_pretrained(made, state_dict=weights)
            tokenizer.save_pretrained(made)
    except Exception as error:  # of many kinds where a disk is full
        raise SystemExit(
            f"--save-model {folder}: the model cannot be written: {error}. The run is in its checkpoint: --resume its "
            "folder with another --save-model."
        ) from error
