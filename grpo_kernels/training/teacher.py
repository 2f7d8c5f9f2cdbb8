"""The teacher: the policy of another run of this loop, or any causal language model of the same vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..objectives.settings import first_line
from . import checkpoint
from .policy import Tokenizer, load_policy
from .report import CHECKPOINT, OPTIONS, read_saved_options
from .tasks import Task, make_task


def load_teacher(path: str, task: Task, policy: Any, tokenizer: Tokenizer, device: torch.device) -> Any:
    """Return the model of ``--teacher``, frozen and in evaluation mode. Nothing is drawn: the run samples what it does
    without.

    Raises:
        SystemExit: a path that holds no model, a run without a checkpoint, another vocabulary than the policy's.
    """
    folder = Path(path)
    if folder.is_file():
        raise SystemExit(f"--teacher {path} is a file: give its folder, which says what it is of: {folder.parent}")
    if (
        not folder.exists()
        and (folder.is_absolute() or path.startswith(".") or folder.parent != Path())
        and (folder.parent.is_dir())
    ):  # else it may be a name of the hub
        raise SystemExit(f"--teacher {path}: there is no such folder in {folder.parent}")
    with torch.random.fork_rng(devices=[]):
        if (Path(path) / OPTIONS).exists():
            model, own = _of_run(Path(path), device)
        else:
            model, own = load_policy(path, task, 0, 0, device, "--teacher")
    counts = [each.config.get_text_config().vocab_size for each in (model, policy)]
    ids = [each.vocabulary() for each in (own, tokenizer)]
    if counts[0] != counts[1] or ids[0] != ids[1]:
        other = {token for token in (*ids[0], *ids[1]) if ids[0].get(token) != ids[1].get(token)}
        example = ""
        if other:  # the first by its id, as vocabularies have no order
            token = min(other, key=lambda token: [each.get(token, math.inf) for each in ids])
            example = f"; {token!r} is {ids[0].get(token)} there and {ids[1].get(token)} here"
        raise SystemExit(
            f"--teacher {path} has another vocabulary ({counts[0]} columns) than the policy ({counts[1]}{example}): "
            "both need one tokenizer and as many columns."
        )
    return model.eval().requires_grad_(False)


def _of_run(path: Path, device: torch.device) -> tuple[Any, Tokenizer]:
    """Return the policy of a run's last checkpoint, of whatever size it was."""
    saved = read_saved_options(path)
    file = path / CHECKPOINT
    if not file.exists():
        raise SystemExit(f"--teacher {path}: the run holds no checkpoint ({CHECKPOINT}); let it reach its first one.")
    task = make_task(saved.task, saved.numbers, saved.largest, saved.reward)
    model, tokenizer = load_policy(saved.model, task, saved.hidden, saved.layers, device)
    try:
        model.load_state_dict(checkpoint.read(file)["model"])
    except OSError as error:
        raise SystemExit(f"--teacher {path}: {CHECKPOINT} cannot be read: {error}.") from error
    except Exception as error:  # reading fails in many ways on a damaged file
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SystemExit(f"--teacher {path}: {CHECKPOINT} is not a checkpoint of its run ({reason}).") from error
    return model, tokenizer
