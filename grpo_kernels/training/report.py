"""The run's folder: options, a JSONL log, curves, checkpoints; each file whole or absent, never half-written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from . import checkpoint
from .options import Options

OPTIONS, CHECKPOINT = "options.json", "checkpoint.safetensors"
"""Files of a run's folder."""
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
    """Where a run writes. Opening it checks that it can be written before any work is done."""

    def __init__(self, path: Path, options: Options, resume: bool) -> None:
        self._place(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SystemExit(f"the run folder {path} cannot be written: {error}. Choose another with --out.") from error
        if not resume and self.log_path.exists():
            raise SystemExit(f"{path} already holds a run. Continue it with --resume {path}, or choose another --out.")
        if not resume:
            self._write(path / OPTIONS, json.dumps(dataclasses.asdict(options), indent=2) + "\n")

    def _place(self, path: Path) -> None:
        self.path = path
        self.log_path, self.checkpoint_path = path / "log.jsonl", path / CHECKPOINT

    @classmethod
    def fresh(cls, options: Options, parent: Path = Path("runs")) -> RunFolder:
        """Return the next free folder runs/<task>-<loss>-<n>."""
        stem = f"{options.task.replace(':', '-')}-{options.loss}"
        number = next(n for n in range(10**6) if not (parent / f"{stem}-{n}").exists())
        return cls(parent / f"{stem}-{number}", options, resume=False)

    def log(self, record: dict[str, Any]) -> None:
        with self.log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        if not self.log_path.exists():
            return []
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def rewind(self, step: int) -> None:
        """Forget what was logged from ``step`` on: the run continues there."""
        kept = [json.dumps(record) for record in self.records() if record["step"] < step]
        self._write(self.log_path, "".join(line + "\n" for line in kept))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        checkpoint.write(self.checkpoint_path, *checkpoint.flatten(state))

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the last checkpoint. Exit with a message where there is none or it cannot be read."""
        if not self.checkpoint_path.exists():
            raise SystemExit(
                f"{self.path} holds no checkpoint to resume from ({self.checkpoint_path.name} is missing): it ended "
                "before its first one. Start again without --resume, in another --out."
            )
        try:
            state = checkpoint.read(self.checkpoint_path)
            missing = {"step", "model", "optimizer", "schedule", "reference", "teacher", "rng"} - state.keys()
        except Exception as error:  # reading fails in many ways on a damaged file
            raise SystemExit(
                f"{self.checkpoint_path} is damaged ({type(error).__name__}: {str(error).splitlines()[0][:200]}). "
                "Nothing was changed; start again without --resume, in another --out."
            ) from error
        if missing:
            raise SystemExit(f"{self.checkpoint_path} is not a checkpoint of this loop: {sorted(missing)} are missing.")
        return state

    def plot(self) -> Path | None:
        """Draw curves.png from the log, if matplotlib is there, and return its path."""
        records = self.records()
        try:
            import matplotlib
        except ImportError:
            return None
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = [name for name in CURVES if any(name in record for record in records)]
        columns = -(-max(len(names), 1) // 2)
        figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 6), constrained_layout=True, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            steps, values = zip(*((r["step"], r[name]) for r in records if name in r), strict=True)
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
            axis.plot(steps, _smooth(list(values)), color="tab:blue", linewidth=1.6)
            axis.set_title(CURVES[name])
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        figure.suptitle(self.path.name)
        target = self.path / "curves.png"
        figure.savefig(target.with_suffix(".tmp.png"), dpi=110)
        plt.close(figure)
        target.with_suffix(".tmp.png").replace(target)
        return target

    @staticmethod
    def _write(path: Path, text: str) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(path)


class SilentFolder(RunFolder):
    """The folder of a run that another rank writes."""

    def __init__(self, path: Path) -> None:
        self._place(path)

    def log(self, record: dict[str, Any]) -> None:
        return

    def rewind(self, step: int) -> None:
        return

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        checkpoint.flatten(state, keep=False)  # its parts go to the rank that writes

    def plot(self) -> Path | None:
        return None


def _smooth(values: list[float], window: int = 25) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def read_saved_options(path: Path) -> Options:
    """Return the options that a run was started with. Exit with a message where they cannot be read."""
    try:
        saved = json.loads((path / OPTIONS).read_text())
        return Options(**saved)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} is not the folder of a run: its options.json cannot be read ({error}).") from error
