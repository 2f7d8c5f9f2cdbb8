"""The parts of gpu_check.py: what each runs, how long it is expected to take, and when it is stopped."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = "{rows}"
"""In a command: the file that it appends measured rows to."""
SECONDS = "{seconds}"
"""In a command: how long it may take."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs."""

    device: str
    """cuda, or cpu: a rehearsal on tiny shapes."""
    backends: tuple[str, ...]
    """cuda is not among them after a failed smoke part."""

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Command:
    """One process of a part; its row says whether it passed."""

    name: str
    argv: list[str]
    seconds: float = float("inf")
    environment: dict[str, str] = field(default_factory=dict)
    gates: bool = True
    """Whether the part fails with it."""
    read: Callable[[str], dict[str, Any]] = lambda text: {}
    """Figures from what it printed; ``passed`` among them is another condition."""


@dataclass(frozen=True)
class Part:
    """``commands`` may be a reason why there are none. ``cuda``: it runs the CUDA kernels alone."""

    what: str
    expected: float
    """Seconds on a Hopper GPU, estimated."""
    deadline: float
    commands: Callable[[Setting], list[Command] | str]
    cuda: bool = False


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(script)), *arguments]


def measured(name: str, rehearsed: bool = True) -> Callable[[Setting], list[Command] | str]:
    """A part of gpu_parts.py."""

    def commands(setting: Setting) -> list[Command] | str:
        if setting.rehearsal and not rehearsed:
            return "a GPU's"
        backends = [argument for backend in setting.backends for argument in ("--backend", backend)]
        given = ["--device", setting.device, "--rows", ROWS, "--seconds", SECONDS, *backends]
        return [Command(f"{name}, whole", python("gpu_parts.py", name, *given))]

    return commands


def smoke(setting: Setting) -> list[Command]:
    given = ["--device", setting.device, "--rows", ROWS, "--seconds", SECONDS]
    return [Command("every step", python("gpu_smoke.py", *given))]


def verify(*backends: str) -> Callable[[Setting], list[Command] | str]:
    def commands(setting: Setting) -> list[Command] | str:
        here = [backend for backend in backends if backend in setting.backends]
        if not here:
            return f"{', '.join(backends)} does not serve this device"
        argv = [sys.executable, "-m", "grpo_kernels", "verify", "--device", setting.device]
        argv += ["--dtype", "bf16", "--dtype", "fp32"]
        argv += ["--preset", "grpo", "--vocab", "97", "--tokens", "8"] if setting.rehearsal else []
        argv += [argument for backend in here for argument in ("--backend", backend)]
        return [Command("verify", argv)]

    return commands


def suite(setting: Setting) -> list[Command]:
    argv = [sys.executable, "-m", "pytest", "-q", "-rs", "-x", "tests/test_cuda.py", "-m", "gpu and not nightly"]
    argv += ["--timeout", "40", "--timeout-method", "thread"]
    argv += ["-k", "one_bad_column"] if setting.rehearsal else ["-n", "12"]
    environment = {"GRPO_KERNELS_TEST_DEVICE": setting.device}
    return [Command("tests/test_cuda.py", argv, environment=environment, read=tests_run)]


def tests_run(text: str) -> dict[str, Any]:
    """By pytest's last lines. Tests that are skipped because the backend does not serve prove nothing."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)\b", text)}
    tests = counts.get("passed", 0)
    return {"tests": tests, "skipped": counts.get("skipped", 0), "passed": tests > 0 and "not served: " not in text}


CHECKS = ("memcheck", "racecheck", "synccheck")


def sanitizer(setting: Setting) -> list[Command] | str:
    """compute-sanitizer over the smoke script, whose other kernels (PyTorch's) are left alone.

    Racecheck is a gate for aligned rows. A thread of an unaligned row reads whole words of shared memory whose outer
    elements are its neighbours', who may be overwriting them, and shifts them out: hazards that change nothing, so
    there only what racecheck calls an error is shown, and it is no gate.
    """
    tool = _tool("compute-sanitizer")
    if setting.rehearsal or tool is None:
        return "compute-sanitizer is not here" if tool is None else "compute-sanitizer needs a GPU"

    def command(check: str, name: str, *options: str, skip: str = "", only: str = "", gates: bool = True) -> Command:
        argv = [tool, "--tool", check, "--kernel-regex", "kns=grpo", "--error-exitcode", "9", *options]
        argv += python("gpu_smoke.py", "--no-fork", "--small", "--skip", "races", "--skip", "times")
        argv += ["--skip", skip] if skip else []
        argv += ["--only", only] if only else []
        return Command(name, argv, 60.0, gates=gates)

    level = ("--racecheck-detect-level", "error")
    return [
        command("memcheck", "memcheck"),
        command("racecheck", "racecheck", skip="unaligned"),
        command("synccheck", "synccheck"),
        command("racecheck", "racecheck of unaligned rows, errors", *level, only="unaligned", gates=False),
    ]


MOVED = """
import sys, torch
from grpo_kernels import grpo_loss
logits = torch.randn(1, 1024, 151936, device="cuda", dtype=torch.bfloat16).requires_grad_()
ids = torch.randint(151936, (1, 1024), device="cuda")
grpo_loss(logits, ids, torch.ones(1, device="cuda"), grad_scale=1.0, backend=sys.argv[1]).loss.backward()
torch.cuda.synchronize()
"""
UNIT = 1024 * 151936 * 2
METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}


def traffic(setting: Setting) -> list[Command] | str:
    """Bytes that each kernel of a loss and its gradient reads from memory and writes to it, as the hardware counts
    them, in units of the logits. The CUDA kernels may move one of each."""
    tool = _tool("ncu")
    if setting.rehearsal or tool is None:
        return "ncu is not here" if tool is None else "ncu needs a GPU"
    profile = [tool, "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    profile += ["--kernel-name", "regex:row_kernel|one_pass|log_probs|gradient", sys.executable, "-c", MOVED]
    reads = {"cuda": moved_once, "triton": moved}
    return [Command(f"traffic, {name}", [*profile, name], 45.0, read=reads[name]) for name in setting.backends]


def moved(text: str) -> dict[str, Any]:
    units = units_of(text)
    return {"units": units, "passed": bool(units)}


def moved_once(text: str) -> dict[str, Any]:
    found = moved(text)
    once = all(units < 1.05 for kernel in found["units"].values() for units in kernel.values())
    return {**found, "passed": found["passed"] and once}


def units_of(text: str) -> dict[str, dict[str, float]]:
    """ncu's CSV: for each kernel, bytes read and written over those of the logits."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[header:]):
        if row.get("Metric Name") in METRICS:
            kernel = found.setdefault(row["Kernel Name"].split("(")[0], {})
            name = METRICS[row["Metric Name"]]
            kernel[name] = kernel.get(name, 0.0) + float(row["Metric Value"].replace(",", "")) / UNIT
    return found


def _tool(name: str) -> str | None:
    beside = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin", name)
    return shutil.which(name) or (str(beside) if beside.exists() else None)


PARTS = {
    "smoke": Part("steps from least to most risk", 60, 200, smoke, cuda=True),
    "verify": Part("presets in bf16 and fp32 beside float64", 40, 80, verify("cuda"), cuda=True),
    "suite": Part("tests/test_cuda.py on the GPU", 60, 100, suite, cuda=True),
    "sanitizer": Part("memcheck, racecheck, synccheck", 90, 160, sanitizer, cuda=True),
    "limits": Part("bandwidths", 15, 30, measured("limits", rehearsed=False)),
    "large": Part("vocabularies up to 262,144, more than 2^31 elements", 30, 60, measured("large")),
    "triton": Part("Triton's presets in bf16 and fp32 beside float64", 60, 120, verify("triton")),
    "timing": Part("from logits, beside PyTorch and peers", 90, 170, measured("timing")),
    "traffic": Part("bytes that kernels move, by ncu", 40, 80, traffic),
    "linear": Part("from hidden states, beside PyTorch and peers", 60, 100, measured("linear")),
}
"""In the order in which they run: what proves the CUDA kernels is before what times them."""
