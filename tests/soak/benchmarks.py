"""Benchmarks that are stopped at random moments: what was measured is there, and no half of a file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

from grpo_kernels.__main__ import main
from grpo_kernels.bench import command
from grpo_kernels.files import write_text

from .processes import Fault, failed, quiet, start, wait

COMMAND = ["bench", "--shapes", "8x64,8x65,8x66", "--rounds", "1", "--dtype", "fp32", "--out"]
FILES = {"bench.json", "bench.csv", "bench.md", "bench.png"}
ENDS = {"Ctrl-C": (signal.SIGINT, {130}), "SIGTERM": (signal.SIGTERM, {130, -15}), "kill -9": (signal.SIGKILL, {-9})}


def bench(out: Path) -> int:
    """The command, without what takes ten seconds a shape, and without drawing."""
    with (
        mock.patch.object(torch, "compile", lambda body: body),
        mock.patch.object(command, "plot", lambda rows, path, heading: write_text(path, heading)),
    ):
        return main([*COMMAND, str(out)])


class Benchmarks:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        with quiet():
            bench(folder / "bench")  # here once: what a command imports, its children have
            began = time.monotonic()
            bench(folder / "bench")
            self.seconds = time.monotonic() - began
        shutil.rmtree(folder / "bench")

    def accident(self, kind: str) -> Counter[str]:
        number, ends = ENDS[kind]
        out = self.folder / "bench"

        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        child = start(lambda: bench(out), output)
        time.sleep(self.rng.uniform(0, 1.1 * self.seconds))
        os.kill(child, number)  # it may have ended: until it is waited for, nobody else has its number
        status = wait(child)
        said = output.read_text() if output.exists() else ""
        if status not in ends | {0} or failed(said):
            raise Fault(f"a benchmark after {kind} ends with {status}: {said[-1500:]}")
        if (out / "bench.json").exists():
            rows = json.loads((out / "bench.json").read_text())["rows"]
            if not 1 <= len(rows) <= 3:
                raise Fault(f"a benchmark after {kind} has {len(rows)} rows")
        left = {path.name for path in out.iterdir()} if out.exists() else set()
        if number != signal.SIGKILL and not left <= FILES:
            raise Fault(f"a benchmark after {kind} leaves {sorted(left)}")
        shutil.rmtree(out, ignore_errors=True)
        return Counter({f"{kind}, benchmark": int(status != 0)})
