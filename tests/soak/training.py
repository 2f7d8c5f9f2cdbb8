"""Runs of the training loop that accidents happen to, until one comes to its end: which is that of an unbroken run."""

from __future__ import annotations

import ctypes
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_kernels.__main__ import main
from grpo_kernels.training import checkpoint, report
from grpo_kernels.training.loop import Trainer

from .processes import Fault, failed, quiet, start, wait

TINY = {"prompts": 2, "group": 2, "minibatch": 4, "hidden": 16, "layers": 1, "numbers": 2, "steps": 6}
FLAGS = ["train", *(f"--{name}={value}" for name, value in TINY.items())]
WHOLE = ["checkpoint.safetensors", "curves.png", "log.jsonl", "options.json"]
LOG, CHECKPOINT = "log.jsonl", "checkpoint.safetensors"
CANNOT = "cannot be written"

Prepare, Kill = Callable[[], None], Callable[[int], None]


def command(arguments: list[str], prepare: Prepare | None = None) -> Callable[[], int]:
    """What a child does: a fault prepared, and the command."""

    def run() -> int:
        if prepare is not None:
            prepare()
        return main(arguments)

    return run


def log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: r[name] for name in r if name not in ("seconds", "tokens_per_second")} for r in records]


def before_step(number: int, action: Prepare) -> None:
    """Do something before a step, in the child that this is called in."""
    step = Trainer.train_step

    def run(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == number:
            action()
        return step(trainer)

    Trainer.train_step = run  # type: ignore[method-assign]


# What is prepared in a child


def full_disk(rng: random.Random) -> Prepare:
    """No file can grow beyond a size, from some step on."""
    step, size = rng.randrange(TINY["steps"]), rng.randrange(70_000)
    limit = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    return lambda: before_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


def read_only(rng: random.Random, folder: Path) -> Prepare:
    """The folder cannot be written from some step on: by its mode, or for root, whom no mode binds, in a mount of its
    own."""
    step = rng.randrange(TINY["steps"])
    return lambda: before_step(step, lambda: make_read_only(folder))


def make_read_only(folder: Path) -> None:
    if os.geteuid():
        folder.chmod(0o555)
        return
    libc, path = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    namespace, private, bind, remount, only_read = 0x20000, 0x44000, 0x1000, 0x20, 0x1
    for status in (
        libc.unshare(namespace),
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(path, path, None, bind, None),
        libc.mount(path, path, None, bind | remount | only_read, None),
    ):
        if status:
            raise OSError(ctypes.get_errno(), "no mount of its own")


WRITES = ("os.fsync", "pathlib.Path.replace", "pathlib.Path.mkdir", "pathlib.Path.chmod", "shutil.rmtree")


def kill_in_a_write(rng: random.Random) -> Prepare:
    """kill -9 at one of the operations of files, before or after it; or of safetensors."""
    name = rng.choice([*WRITES, "safetensors.torch.save_file"])
    left, after = rng.randrange(1, 12), rng.random() < 0.5
    owner, _, operation = name.rpartition(".")

    def prepare() -> None:
        target = pkgutil.resolve_name(owner)
        original = getattr(target, operation)

        def counted(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            found = original(*given, **named) if left or after else None
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(target, operation, counted)

    return prepare


def jumping_clock(rng: random.Random) -> Prepare:
    def prepare() -> None:
        time.time = lambda: 1e9 + rng.uniform(-9e8, 9e8)  # type: ignore[assignment]

    return prepare


SIGNALS = {
    "Ctrl-C": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM twice": [signal.SIGTERM] * 2,
    "SIGHUP": [signal.SIGHUP],
    "kill -9": [signal.SIGKILL],
}
ENDS = {
    "Ctrl-C": {130},
    "SIGTERM": {130, -15},  # the latter before the command has begun
    "SIGTERM twice": {130, -15},
    "SIGHUP": {130, -1},  # before the loop has
    "kill -9": {-9},
    "kill -9 in a write": {-9},
    "full disk": {1},
    "read-only folder": {1},
    "clock jumps": set[int](),
}
"""How a run may end that did not come to its end before."""
DAMAGE = ("zeroed checkpoint", "torn log")
ACCIDENTS = [*ENDS, *DAMAGE]


class Training:
    """Runs in a folder, beside the unbroken one."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.output = folder / "output.txt"
        report.draw = lambda records, names, title, file: file.write_text(title)  # half of a run's time
        with quiet():
            main([*FLAGS, "--out", str(folder / "whole")])  # here: what a run imports, its children have
        self.expected = log(folder / "whole")
        began = time.monotonic()
        self._run([*FLAGS, "--out", str(folder / "again")])
        self.seconds = time.monotonic() - began
        self.number = 0

    def _run(
        self, arguments: list[str], prepare: Prepare | None = None, kill: Callable[[int], None] | None = None
    ) -> int:
        self.output.unlink(missing_ok=True)
        child = start(command(arguments, prepare), self.output)
        if kill is not None:
            kill(child)
        return wait(child)

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def accidents(self, kinds: list[str]) -> Counter[str]:
        """One run, to its end, with these accidents: files are damaged last, when there are some."""
        self.number += 1
        folder = self.folder / f"run-{self.number}"
        happened = Counter[str]()
        for kind in sorted(kinds, key=lambda kind: kind in DAMAGE):
            held = step_of(folder)
            if self._accident(kind, folder):
                happened[kind] += 1
            if step_of(folder) < held:
                raise Fault(f"{kind}: the checkpoint of step {held} is lost")
            if failed(self.said()):
                raise Fault(f"{kind}: {self.said()[-1500:]}")
        status = self._run(self._arguments(folder))
        if status or failed(self.said()):
            raise Fault(f"after {kinds} the run ends with {status}: {self.said()[-1500:]}")
        if log(folder) != self.expected:
            raise Fault(f"after {kinds} {folder} is not the unbroken run")
        if (names := sorted(path.name for path in folder.iterdir())) != WHOLE:
            raise Fault(f"after {kinds} {folder} has {names}")
        shutil.rmtree(folder)
        return happened

    def _arguments(self, folder: Path) -> list[str]:
        if (folder / CHECKPOINT).exists():
            return ["train", "--resume", str(folder)]
        shutil.rmtree(folder, ignore_errors=True)  # killed in its first step
        every = self.rng.choice([1, 1, 3, 100])  # at the last there is none but those of signals
        return [*FLAGS, f"--checkpoint-every={every}", "--out", str(folder)]

    def _accident(self, kind: str, folder: Path) -> bool:
        """Whether it happened: a run may have ended before."""
        if kind == "zeroed checkpoint":
            return self._zeroed(folder)
        if kind == "torn log":
            return self._torn(folder)
        prepare = {
            "full disk": full_disk(self.rng),
            "read-only folder": read_only(self.rng, folder),
            "kill -9 in a write": kill_in_a_write(self.rng),
            "clock jumps": jumping_clock(self.rng),
        }.get(kind)

        def kill(child: int) -> None:
            for number in SIGNALS.get(kind, []):
                time.sleep(self.rng.uniform(0, 1.2 * self.seconds))
                os.kill(child, number)  # it may have ended: until it is waited for, nobody else has its number

        status = self._run(self._arguments(folder), prepare, kill)
        if folder.exists():
            folder.chmod(0o755)
        if status not in ENDS[kind] | {0}:
            raise Fault(f"{kind}: exit status {status}: {self.said()[-1500:]}")
        if status == 1 and CANNOT not in self.said():
            raise Fault(f"{kind}: {self.said()[-1500:]}")
        done = re.search(r"^step (\d+), ", self.said(), re.M)
        if done and status == 130 and step_of(folder) != int(done[1]):
            raise Fault(f"{kind}: {done[1]} steps are done, {step_of(folder)} saved")
        return status != 0 or kind == "clock jumps"

    def _zeroed(self, folder: Path) -> bool:
        file = folder / CHECKPOINT
        if not file.exists():
            return False
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        content = bytearray(before[CHECKPOINT])
        at, size = self.rng.randrange(len(content)), self.rng.randrange(1, 4096)
        lost = content[at : at + size]
        content[at : at + size] = bytes(len(lost))
        if content == before[CHECKPOINT]:
            return False
        file.write_bytes(content)
        status = self._run(["train", "--resume", str(folder)])
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        if status != 1 or "is damaged" not in self.said() or after != {**before, CHECKPOINT: bytes(content)}:
            raise Fault(f"{size} zeros at {at} of a checkpoint: exit status {status}: {self.said()[-1500:]}")
        file.write_bytes(before[CHECKPOINT])
        return True

    def _torn(self, folder: Path) -> bool:
        """A line that was not finished, behind the steps of the checkpoint."""
        if not (folder / CHECKPOINT).exists():
            return False
        with (folder / LOG).open("ab") as file:
            file.write(self.rng.choice([b'{"step": 6, "rewa', b"\0" * 100, b"\xff{", b"[]\n"]))
        return True


def step_of(folder: Path) -> int:
    """The step of a folder's checkpoint, which is always whole; 0 without one."""
    if not (folder / CHECKPOINT).exists():
        return 0
    return int(checkpoint.read(folder / CHECKPOINT)["step"])
