"""An hour of random calls and accidents, in which nothing may be lost but the step in flight (Linux).

    make soak                          # an hour; what is interrupted is taken up by the same command
    make soak ARGS="--minutes 10"
    python -m tests.soak --minutes 1 --seed 7

Two processes call on several threads, with results that are known to the bit, fork, and run out of memory. Beside them
runs of the training loop and benchmarks are stopped, killed, and left without a disk. Counts stand in build/soak.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from grpo_kernels.verification.progress import progress_bar

from . import benchmarks, training
from .calls import serve
from .processes import PATIENCE, Fault, open_files, start, wait
from .record import Record

RECORD = Path(__file__).resolve().parent.parent.parent / "build" / "soak.json"
WORKERS = 2
BURST = 2.0
"""Seconds of calls between forks, and of rounds."""
GROWTH = 48.0
"""MB that a process may grow by after its first minute: pages of threads, and of what an allocator has kept."""


class Callers:
    """The processes that call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipes: list[Any] = []
        self.children: list[int] = []

    def start(self, seed: int) -> None:
        for number in range(WORKERS):
            here, there = multiprocessing.Pipe()
            work = lambda there=there, number=number: serve(seed + number, self.folder, there)  # noqa: E731
            self.children.append(start(work, self.folder / f"caller-{number}.txt"))
            there.close()
            self.pipes.append(here)
        known = [self._answer(pipe) for pipe in self.pipes]
        if any(each != known[0] for each in known):
            raise Fault("two processes have other bits")

    def _answer(self, pipe: Any) -> Any:
        if not pipe.poll(PATIENCE):
            raise Fault("a process that calls hangs")
        try:
            return pipe.recv()
        except EOFError as error:
            said = "".join(path.read_text()[-1500:] for path in self.folder.glob("caller-*.txt"))
            raise Fault(f"a process that calls has died: {said}") from error

    def begin(self, seconds: float) -> None:
        for pipe in self.pipes:
            pipe.send(seconds)

    def answers(self) -> list[dict[str, Any]]:
        answers = [self._answer(pipe) for pipe in self.pipes]
        for answer in answers:
            if "fault" in answer:
                raise Fault(answer["fault"])
        return answers

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        while self.children:
            if status := wait(self.children.pop()):
                raise Fault(f"a process that calls ended with {status}")

    def kill(self) -> None:
        while self.children:
            os.kill(self.children[-1], signal.SIGKILL)
            os.waitpid(self.children.pop(), 0)


def soak(record: Record, minutes: float, folder: Path) -> None:
    """Rounds until the minutes are over, those of an earlier run counted."""
    torch.set_num_threads(1)  # a fork of a process with more hangs in PyTorch
    (folder / "tmp").mkdir()
    os.environ |= {"TMPDIR": str(folder / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    tempfile.tempdir = None
    rng = random.Random(record.seed + int(record.seconds))
    accidents, callers = Accidents(folder, rng), Callers(folder)
    try:
        callers.start(rng.randrange(2**31))
        accidents.files = open_files()
        rounds(record, minutes, callers, accidents)
        callers.end()
    finally:
        callers.kill()
    record.check_growth(GROWTH)


class Accidents:
    """Of the training loop, every kind in turn, in random order, a few to each run; and of benchmarks."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rng, self.folder = rng, folder
        self.runs, self.benches = training.Training(folder, rng), benchmarks.Benchmarks(folder, rng)
        self.kinds: list[str] = []
        self.files = open_files()

    def happen(self, record: Record) -> None:
        if not self.kinds:
            self.kinds = self.rng.sample(training.ACCIDENTS, len(training.ACCIDENTS))
        happened, self.kinds = self.kinds[:3], self.kinds[3:]
        record.faults += self.runs.accidents(happened)
        record.runs += 1
        record.faults += self.benches.accident(self.rng.choice(list(benchmarks.ENDS)))
        if open_files() != self.files:
            raise Fault(f"{open_files() - self.files} files were left open")
        if left := [path.name for path in (self.folder / "tmp").iterdir()]:
            raise Fault(f"temporary files are left: {left}")


class Stop:
    """Ctrl-C and SIGTERM, between rounds: what a handler raises is lost where it interrupts a fork's own callbacks."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def rounds(record: Record, minutes: float, callers: Callers, accidents: Accidents) -> None:
    stop = Stop()
    shown = int(record.seconds)
    bar = progress_bar(max(1, int(60 * minutes)), "soak", "second", shown)
    began, before = time.monotonic(), record.seconds
    while record.seconds < 60 * minutes:
        callers.begin(BURST)
        deadline = time.monotonic() + BURST
        while time.monotonic() < deadline:
            accidents.happen(record)
        for number, answer in enumerate(callers.answers()):
            record.add(number, answer)
        record.seconds = before + time.monotonic() - began
        record.save()
        for _ in range(shown, int(min(record.seconds, 60 * minutes))):
            bar.update()
        shown = int(record.seconds)
        if stop.asked:
            raise KeyboardInterrupt
    bar.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of what happens when; default: another one each time")
    parser.add_argument("--record", type=Path, default=RECORD, help="what an interrupted run has done")
    arguments = parser.parse_args()
    record = Record.taken_up(arguments.record, arguments.seed, secrets.randbelow(10**6))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"soak: seed {record.seed}, {record.seconds / 60:.1f} of {arguments.minutes:g} minutes are done", flush=True)
    try:
        soak(record, arguments.minutes, folder)
    except Fault as fault:
        print(
            f"FAULT (seed {record.seed}, {record.seconds:.0f} s; files in {folder}): {fault}\n{record}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        print(f"interrupted; the same command goes on\n{record}", file=sys.stderr)
        return 130
    shutil.rmtree(folder)
    record.path.unlink()
    print(record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
