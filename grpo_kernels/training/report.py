"""The run's folder: options, a JSONL log, curves, checkpoints. Curves and checkpoints are whole or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..files import clear, is_there, is_utf8, replaced, sync, write_text
from ..objectives.settings import first_line, is_number
from ..streams import say
from . import checkpoint
from .options import Options

RUNS = Path("runs")
OPTIONS, CHECKPOINT, CURVES_FILE, PROBE = "options.json", "checkpoint.safetensors", "curves.png", ".writable"
"""Files of a run's folder; the last is gone when it is opened."""
REDRAWN_AFTER = 30.0
"""Seconds."""
CURVES = {
    "reward": "reward (mean over responses)",
    "length": "response length (tokens)",
    "entropy": "entropy (nats)",
    "loss": "loss",
    "k3_old": "k3 to the old policy (nats)",
    "kl": "KL to the reference (nats)",
    "divergence": "divergence from the teacher (nats)",
    "clip_fraction": "clipped tokens (fraction)",
    "grad_norm": "gradient norm, before clipping",
}
"""What of the log is drawn, where a run has it, and the titles."""


class RunFolder:
    """Where a run writes. Opening it checks that it can be written before any work is done, and that nobody else does.

    Raises:
        SystemExit: in every method, with what is wrong and what is left, where the folder cannot be read or written.
    """

    def __init__(self, path: Path, options: Options, resume: bool, alone: bool = False) -> None:
        if not is_utf8(path):
            raise SystemExit(f"the run folder {str(path)!r} has no name in UTF-8, as safetensors needs it.")
        self._place(path)
        self._made: list[Path] = []
        self._begun = resume or is_there(self.log_path)
        self._own = set() if is_there(path / OPTIONS) else {OPTIONS}
        try:
            self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=not alone)
            self._options = (path / OPTIONS).open("a")  # held open and locked as long as this writes
            _lock(self._options, path)
            if not resume:
                self._begin(options)
            self._own.add(PROBE)
            (path / PROBE).touch()
            (path / PROBE).unlink()
        except SystemExit:
            self._options.close()
            raise
        except OSError as error:
            if alone and isinstance(error, FileExistsError):
                raise
            self._forget()
            raise SystemExit(f"the run folder {path} cannot be written: {error}. Choose another with --out.") from error

    def _begin(self, options: Options) -> None:
        has_checkpoint = is_there(self.checkpoint_path)
        if has_checkpoint or is_there(self.log_path):
            goes_on = f"Continue it with --resume {self.path}"
            if not has_checkpoint:
                goes_on = f"It has no checkpoint to go on from: remove its {self.log_path.name}"
            raise SystemExit(f"{self.path} already holds a run. {goes_on}, or choose another --out.")
        if (self.path / OPTIONS).stat().st_size and not _is_of_a_run(self.path):
            raise SystemExit(f"{self.path / OPTIONS} is there already, and no run's: choose another --out.")
        self._own.add(OPTIONS)
        (self.path / OPTIONS).write_text(json.dumps(dataclasses.asdict(options), indent=2) + "\n")
        for each in (self.path / OPTIONS, self.path):  # not replaced: its lock is held
            sync(each)

    def _place(self, path: Path) -> None:
        self.path = path
        self.log_path, self.checkpoint_path = path / "log.jsonl", path / CHECKPOINT
        self._saved: int | None = None
        self._drawn = time.monotonic()
        self._told = False

    @classmethod
    def fresh(cls, options: Options, parent: Path = RUNS) -> RunFolder:
        """Return the next free folder runs/<task>-<loss>-<n>."""
        stem = f"{options.task.replace(':', '-')}-{options.loss}"
        for number in itertools.count():
            path = parent / f"{stem}-{number}"
            if not is_there(path):
                try:
                    return cls(path, options, resume=False, alone=True)
                except FileExistsError as error:  # another run has begun at this moment
                    if not is_there(path):
                        raise SystemExit(f"{parent} is no folder: {error}. Choose another with --out.") from error
        raise AssertionError("there is always a next number")

    def close(self) -> None:
        """Let another process write. Of a run that never began, what opening the folder has made goes."""
        self._forget()
        self._options.close()

    def _forget(self) -> None:
        if self._begun or is_there(self.checkpoint_path):
            return
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            for name in (*self._own, self.log_path.name):
                (self.path / name).unlink(missing_ok=True)
            for folder in self._made[1:]:
                folder.rmdir()

    def log(self, record: dict[str, Any]) -> None:
        with self._writing(), self.log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._begun = True

    def records(self) -> list[dict[str, Any]]:
        """Return what was logged, without lines that an accident has cut short or overwritten."""
        with self._reading():
            return self._read_log()[0]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Exit where the log is no file, or one that may not be read."""
        try:
            yield
        except OSError as error:
            raise SystemExit(
                f"the log {self.log_path} cannot be read: {error}. Make it readable, or move it away: --resume goes on "
                "without it."
            ) from error

    def _read_log(self) -> tuple[list[dict[str, Any]], int]:
        """Return the log's records, one a step in their order, and how many lines are none, or of a step again."""
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        of_step = {record["step"]: record for line in lines if (record := _record(line)) is not None}
        return [of_step[step] for step in sorted(of_step)], len(lines) - len(of_step)

    def rewind(self, step: int) -> None:
        """Forget what was logged from ``step`` on: the run continues there."""
        with self._reading():
            records, damaged = self._read_log()
        kept = [json.dumps(record) for record in records if record["step"] < step]
        with self._writing():
            clear(self.checkpoint_path.resolve())  # of a run at its end there is no next checkpoint to do so
            write_text(self.log_path, "".join(line + "\n" for line in kept))
        if damaged:
            print(f"note: {damaged} unreadable or repeated line{'s' * (damaged > 1)} of {self.log_path} are left out")
        if len(kept) < step:
            print(f"note: {self.log_path} has {len(kept)} of the {step} steps before the checkpoint")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        with self._writing():
            if self.log_path.exists():
                sync(self.log_path)  # the log of every step that the checkpoint has
            checkpoint.write(self.checkpoint_path, *checkpoint.flatten(state))
        self._saved = state["step"]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Exit with what is left, where the disk is full, became read-only or is gone."""
        try:
            yield
        except OSError as error:
            left = "There was no checkpoint yet: start again, in another --out"
            if self._saved is not None:
                left = f"The checkpoint of step {self._saved} is as it was; continue from it with --resume {self.path}"
            raise SystemExit(f"the run folder {self.path} cannot be written any more: {error}. {left}.") from error

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the last checkpoint. Exit with a message where there is none or it cannot be read."""
        if not self.checkpoint_path.exists():
            raise SystemExit(
                f"{self.path} holds no checkpoint to resume from ({self.checkpoint_path.name} is missing): it ended "
                "before its first one, or the file was removed. Start again without --resume, in another --out."
            )
        try:
            state = checkpoint.read(self.checkpoint_path)
            missing = {"step", "model", "optimizer", "schedule", "reference", "teacher", "rng"} - state.keys()
        except OSError as error:
            raise SystemExit(f"{self.checkpoint_path} cannot be read: {error}. Nothing was changed.") from error
        except Exception as error:  # reading fails in many ways on a damaged file
            raise SystemExit(
                f"{self.checkpoint_path} is damaged ({type(error).__name__}: {first_line(error)}). "
                "Nothing was changed; start again without --resume, in another --out."
            ) from error
        if missing:
            raise SystemExit(f"{self.checkpoint_path} is not a checkpoint of this loop: {sorted(missing)} are missing.")
        self._saved = state["step"]
        return state

    def plot_now_and_then(self) -> None:
        """Draw the curves anew, where the last ones are old."""
        if time.monotonic() - self._drawn > REDRAWN_AFTER:
            self.plot()

    def plot(self) -> Path | None:
        """Draw curves.png from the log, if matplotlib is there, and return its path. A run goes on without curves."""
        self._drawn = time.monotonic()
        target = self.path / CURVES_FILE
        try:
            records, _ = self._read_log()
            names = [name for name in CURVES if any(name in record for record in records)]
            with replaced(target) as file:
                draw(records, names, self.path.name, file)
        except ImportError:
            return None
        except Exception as error:  # of the disk, or of what matplotlib cannot do here: no picture is worth a run
            if not self._told:
                say(f"note: {target} cannot be drawn: {first_line(error)}")
            self._told = True
            return None
        return target


class SilentFolder(RunFolder):
    """The folder of a run that another rank writes."""

    def __init__(self, path: Path) -> None:
        self._place(path)

    def close(self) -> None:
        return

    def log(self, record: dict[str, Any]) -> None:
        return

    def rewind(self, step: int) -> None:
        return

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        checkpoint.flatten(state, keep=False)  # its parts go to the rank that writes

    def plot(self) -> Path | None:
        return None


def _lock(file: IO[str], folder: Path) -> None:
    """Take a lock that ends with this process or when the file is closed; where the file system knows none, none.

    Raises:
        SystemExit: another process has it, as when a scheduler starts a job again before the first has ended.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SystemExit(f"another process writes into {folder}: wait for its end, or choose another --out.") from error
    except (ImportError, OSError):
        return


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = [record.get(name) for name in ("reward", "seconds")] + [record[name] for name in CURVES if name in record]
    return record if all(map(is_number, numbers)) else None


def draw(records: list[dict[str, Any]], names: list[str], title: str, file: Path) -> None:
    """Draw what of a log has these names."""
    from matplotlib.figure import Figure

    columns = -(-max(len(names), 1) // 2)
    figure = Figure(figsize=(3.6 * columns, 6), layout="constrained")  # nothing of a process keeps it, as pyplot does
    axes = figure.subplots(2, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        steps, values = zip(*((r["step"], r[name]) for r in records if name in r), strict=True)
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps, _smooth(list(values)), color="tab:blue", linewidth=1.6)
        axis.set_title(CURVES[name])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False)  # a folder's name is no formula
    figure.savefig(file, dpi=110)


def _smooth(values: list[float], window: int = 25) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


NO_OPTIONS = (OSError, ValueError, TypeError, RecursionError)
"""What a file that has no options raises."""


def _read_options(path: Path) -> dict[str, Any]:
    saved = json.loads((path / OPTIONS).read_text())
    if not isinstance(saved, dict):
        raise ValueError(f"expected an object of options; got {json.dumps(saved)[:60]}")
    if unknown := saved.keys() - {field.name for field in dataclasses.fields(Options)}:
        raise ValueError(f"it has {', '.join(sorted(unknown))}, which is no option of this version")
    return saved


def _is_of_a_run(path: Path) -> bool:
    """Whether a run has written the folder's options: they have all that it cannot do without."""
    with contextlib.suppress(*NO_OPTIONS):
        saved = _read_options(path)
        Options(**saved)
        return {"task", "steps", "loss", "seed"} <= saved.keys()
    return False


def read_saved_options(path: Path) -> Options:
    """Return the options that a run was started with. Exit with a message where they cannot be read."""
    try:
        return Options(**_read_options(path))
    except NO_OPTIONS as error:
        raise SystemExit(f"{path} is not the folder of a run: its options.json cannot be read ({error}).") from error
