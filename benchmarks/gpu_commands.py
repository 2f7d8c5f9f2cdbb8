"""Lists the parts of gpu_check.py: what each runs, how long it is expected to take, and when it is stopped."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gpu_process

ROWS = "{rows}"
"""In a command: the file that it appends measured rows to."""
SECONDS = "{seconds}"
"""In a command: how long it may take."""


@dataclass(frozen=True)
class Setting:
    """Says where a part runs."""

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
    """Whether the part fails with it; what does not gate is shown and recorded all the same."""
    read: Callable[[str], dict[str, Any]] = lambda text: {}
    """Figures from what it printed; ``passed`` among them is another condition."""


@dataclass(frozen=True)
class Part:
    """``commands`` may be a reason why there are none. ``cuda``: it runs the CUDA kernels alone, so that it is left out
    where smoke has failed; other parts then run on Triton."""

    what: str
    expected: float
    """Seconds on a Hopper GPU, estimated."""
    deadline: float
    commands: Callable[[Setting], list[Command] | str]
    cuda: bool = False


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(script)), *arguments]


def measured(name: str, rehearsed: bool = True) -> Callable[[Setting], list[Command] | str]:
    """Make a part of gpu_parts.py."""

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


SUITE = ("tests/test_cuda.py", "tests/test_divergence_cuda.py")


def suite(setting: Setting) -> list[Command]:
    argv = [sys.executable, "-m", "pytest", "-rs", "-x", *SUITE, "-m", "gpu and not nightly"]
    argv += ["--timeout", "40", "--timeout-method", "thread"]
    argv += ["-k", "one_bad_column"] if setting.rehearsal else ["-n", "12"]
    environment = {"GRPO_KERNELS_TEST_DEVICE": setting.device}
    return [Command(" ".join(SUITE), argv, environment=environment, read=tests_run)]


def tests_run(text: str) -> dict[str, Any]:
    """By pytest's last lines. Tests that are skipped because the backend does not serve prove nothing."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)\b", text)}
    tests = counts.get("passed", 0)
    return {
        "tests": tests,
        "tests_skipped": counts.get("skipped", 0),
        "passed": tests > 0 and "not served: " not in text,
    }


CHECKS = ("memcheck", "racecheck", "synccheck")
FOUND = 9
"""Exit status of a check that found something; another is of the smoke script or of the tool."""
SANITIZER = "COMPUTE_SANITIZER"
"""The environment's variable that names another compute-sanitizer than the one that is found."""
RACECHECK = (2026, 3)
"""The first version whose racecheck knows transactions of mbarriers and clusters: earlier ones name hazards that are
none, so that theirs is shown and is no gate. tests/ptx looks for races on shared memory meanwhile."""


def sanitizer(setting: Setting) -> list[Command] | str:
    """Run compute-sanitizer over the smoke script, whose other kernels (PyTorch's) are left alone."""
    tool = _tool("compute-sanitizer", SANITIZER)
    if setting.rehearsal or tool is None:
        return "compute-sanitizer is not here" if tool is None else "compute-sanitizer needs a GPU"
    version = sanitizer_version(gpu_process.output([tool, "--version"]) or "")
    # PyTorch asks the driver for functions that it may not have, which is no error of the kernels.
    options = {"memcheck": ["--report-api-errors", "no"]}
    smoke = python("gpu_smoke.py", "--no-fork", "--small", "--skip", "races", "--skip", "times", "--patience", "60")

    def command(check: str) -> Command:
        argv = [
            tool,
            "--tool",
            check,
            "--kernel-name",
            "kns=grpo",
            "--error-exitcode",
            f"{FOUND}",
            *options.get(check, []),
        ]
        gates = check != "racecheck" or version >= RACECHECK
        return Command(check, [*argv, *smoke], 80.0, gates=gates, read=partial(sanitized, version))

    return [command(check) for check in CHECKS]


def sanitizer_version(text: str) -> tuple[int, ...]:
    """Read the version that --version prints; nothing is older than all."""
    found = re.search(r"\bVersion (\d+(?:\.\d+)+)", text)
    return tuple(map(int, found[1].split("."))) if found else ()


def sanitized(version: tuple[int, ...], text: str) -> dict[str, Any]:
    return {"tool": ".".join(map(str, version)) or "of unknown version", **unsupported(text)}


REFUSALS = re.compile(
    r"device (?:is )?not supported|(?:unable|failed|cannot) to attach|cannot attach|ERR_NVGPUCTRPERM|"
    r"not supported on (?:this|the) (?:device|GPU)|failed to initialize the profiler|LibraryNotLoaded",
    re.IGNORECASE,
)
"""What compute-sanitizer and ncu say where they cannot look: nothing is known of the kernels then."""


def unsupported(text: str) -> dict[str, Any]:
    """Return the line in which a tool says that it cannot look, as the reason to skip the part."""
    line = next((line for line in text.splitlines() if REFUSALS.search(line)), None)
    return {} if line is None else {"skip": line.strip("= ")[:200], "passed": False}


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
    return {"units": units, "passed": bool(units), **unsupported(text)}


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


def _tool(name: str, named: str = "") -> str | None:
    beside = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin", name)
    return os.environ.get(named) or shutil.which(name) or (str(beside) if beside.exists() else None)


PARTS = {
    "smoke": Part("steps from least to most risk", 60, 200, smoke, cuda=True),
    "verify": Part("presets in bf16 and fp32 beside float64", 40, 80, verify("cuda"), cuda=True),
    "suite": Part("the CUDA kernels' tests on the GPU", 65, 100, suite, cuda=True),
    "sanitizer": Part("memcheck, racecheck, synccheck", 150, 220, sanitizer, cuda=True),
    "limits": Part("bandwidths", 15, 30, measured("limits", rehearsed=False)),
    "large": Part("vocabularies up to 262,144, more than 2^31 elements", 30, 60, measured("large")),
    "triton": Part("Triton's presets in bf16 and fp32 beside float64", 60, 120, verify("triton")),
    "timing": Part("from logits, beside PyTorch and peers", 90, 170, measured("timing")),
    "pairs": Part("divergences beside float64, and their times", 30, 60, measured("pairs")),
    "traffic": Part("bytes that kernels move, by ncu", 40, 80, traffic),
    "linear": Part("from hidden states, beside PyTorch and peers", 60, 100, measured("linear")),
}
"""In the order in which they run: what proves the CUDA kernels is before what times them."""
