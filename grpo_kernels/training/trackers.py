"""Where the records of a run go as it trains, beside its log: the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from ..files import write_text
from ..objectives.settings import first_line
from ..streams import say
from ..verification.progress import progress_bar
from .options import Options
from .report import RunFolder

LETTERS = 40
"""Of a sample on the terminal, its last ones."""


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Shown:
    """Progress on stderr, with what the policy writes. A run goes on where its terminal is gone."""

    def __init__(self, steps: int, name: str, done: int) -> None:
        self._bar = progress_bar(steps, name, "step", done, leave=True)

    def log(self, record: dict[str, Any]) -> None:
        shown = {name: f"{record[name]:.3f}" for name in ("reward", "loss", "entropy") if name in record}
        with contextlib.suppress(OSError):
            self._bar.set_postfix(shown | {"sample": repr(record["sample"][-LETTERS:])})
            self._bar.update()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()


class Unfailing:
    """A tracker whose errors end no run: the first is told."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._told = name, tracker, False

    def log(self, record: dict[str, Any]) -> None:
        self._try(self._tracker.log, record)

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, action: Callable[..., None], *given: Any) -> None:
        try:
            action(*given)
        except Exception as error:  # the package's own, as of a network
            if not self._told:
                self._told = True
                say(f"note: --{self._name}: {first_line(error)}; the run goes on, with its log")


class TensorBoard:
    """In the run's folder; steps that are done again are drawn once."""

    def __init__(self, folder: RunFolder, options: Options, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)

    def log(self, record: dict[str, Any]) -> None:
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.add_text("sample", record["sample"], record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project of ``--wandb``, one and the same when it is resumed: it knows steps that are done again."""

    def __init__(self, folder: RunFolder, options: Options, step: int) -> None:
        import wandb

        kept = folder.path / "wandb_id"
        if not kept.exists():
            write_text(kept, secrets.token_hex(8))
        told = {"config": dataclasses.asdict(options), "dir": str(folder.path), "name": folder.path.name}
        self._run: Any = wandb.init(project=options.wandb, id=kept.read_text(), resume="allow", **told)

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({**numbers(record), "sample": record["sample"]}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[RunFolder, Options, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""By the option that asks for one, which is the name of its package."""


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return what of a record is a curve."""
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}


def check_trackers(options: Options) -> None:
    """Exit where a package is missing, before a run that would need it."""
    for name in TRACKERS:
        if getattr(options, name):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise SystemExit(f"--{name} needs the {name} package: pip install {name}") from error


def start_trackers(options: Options, folder: RunFolder, step: int, until: contextlib.ExitStack) -> list[Tracker]:
    """Return the terminal's and those that the options ask for; ``until`` closes them."""
    trackers: list[Tracker] = []
    for name, start in TRACKERS.items():
        if getattr(options, name):
            try:
                trackers.append(Unfailing(name, start(folder, options, step)))
            except Exception as error:  # the package's own, as of a login
                raise SystemExit(f"--{name}: {error}") from error
            until.callback(trackers[-1].close)
    trackers.append(Shown(options.steps, folder.path.name, step))
    until.callback(trackers[-1].close)
    return trackers
