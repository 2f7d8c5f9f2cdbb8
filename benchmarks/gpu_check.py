"""Prove and time the GPU kernels on this machine in one command, in at most twenty minutes, without a network.

    python benchmarks/gpu_check.py --out benchmarks/results/h200
    python benchmarks/gpu_check.py --out DIR --only verify,timing

Parts, in order: environment; verify (every preset and dtype against float64); suite (the tests that take a backend, on
the GPU); large (vocabularies up to 262,144, more than 2^31 elements, more than 65,535 rows); sanitizer (memcheck,
racecheck, synccheck); limits (bandwidths, clusters); timing, from logits; traffic (bytes that kernels move, by ncu);
linear, from hidden states. All but limits and linear cover each GPU backend that is usable, asked for by name. Each
part is a process of its own with a limit of time: one that hangs or faults takes no other with it. DIR/gpu_check.json
is written after each part, so that a killed run keeps what it had.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_timing
import torch

import grpo_kernels
from grpo_kernels import grpo_loss, token_log_probs

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"environment": 20, "verify": 100, "suite": 300, "large": 90, "sanitizer": 300, "limits": 30}
BUDGETS |= {"timing": 150, "traffic": 90, "linear": 90}
"""Seconds of each part, after which it is stopped."""
WORKERS = 6
"""Processes of the suite: Triton's compilers take most of its time."""


def environment(device: str) -> dict[str, Any]:
    import triton

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "grpo_kernels": grpo_kernels.__version__, "commit": _commit()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
        found["nvidia_smi"] = _output(query)
    return found


def verify(device: str) -> dict[str, Any]:
    return _command([sys.executable, "-m", "grpo_kernels", "verify", "--device", device], BUDGETS["verify"])


def suite(device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not nightly", "-n", str(WORKERS), "tests"]
    return _command(command, BUDGETS["suite"], {"GRPO_KERNELS_TEST_DEVICE": device})


def large(device: str) -> dict[str, Any]:
    """Log-probs of shapes that overflow 32-bit indices or grid limits, against PyTorch on some of their rows."""
    names = gpu_timing.usable(device)
    if not names:
        return {"skipped": "no GPU backend serves this device"}
    shapes = {"vocab 262144": (64, 262144), "vocab 50257": (64, 50257), "70000 rows": (70_000, 3)}
    shapes |= {"2.3e9 elements": (15_200, 151_936)}
    if device == "cpu":
        shapes = {"rehearsal": (4, 50257)}
    results = {}
    for name, (rows, vocab) in shapes.items():
        logits = torch.randn(1, rows, vocab, dtype=torch.bfloat16, device=device)
        ids = torch.randint(vocab, (1, rows), device=device)
        some = torch.tensor([0, rows // 2, rows - 1], device=device)
        exact = torch.log_softmax(logits[0, some].double(), -1).gather(-1, ids[0, some, None]).squeeze(-1)
        for backend in names:
            out = token_log_probs(logits, ids, backend=backend)
            error = float((out.log_probs[0, some].double() - exact).abs().max())
            results[f"{name}, {backend}"] = {"error": error, "holds": error < 1e-5}
        probabilities = torch.softmax(logits[0, some].double(), -1)
        wanted = probabilities.scatter_add_(-1, ids[0, some, None], -torch.ones_like(probabilities))
        for backend in names:
            leaf = logits.clone().requires_grad_()
            given = {"grad_scale": float(rows), "inplace": True, "backend": backend}
            grpo_loss(leaf.view_as(leaf), ids, torch.ones(1, device=device), **given)
            error = float((leaf.detach()[0, some].double() - wanted).abs().max())
            results[f"{name}, gradient in place, {backend}"] = {"error": error, "holds": error < 0.01}
        del logits, leaf
    return {"shapes": results, "passed": all(result["holds"] for result in results.values())}


SANITIZED = """
import sys, torch
torch.set_default_device("cuda")
sys.path.insert(0, "tests")
from cases import make
for vocab, options in ((97, {}), (9000, {"kl_coef": 0.1, "entropy_coef": 0.01}), (40000, {"config": "gspo"})):
    make(batch=3, length=4, vocab=vocab).run(sys.argv[1], **options)
torch.cuda.synchronize()
"""
CHECKS = ("memcheck", "racecheck", "synccheck")


def sanitizer(device: str) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if device != "cuda" or not Path(tool).exists():
        return {"skipped": "compute-sanitizer is not here"}
    results = {}
    backends = gpu_timing.usable(device)
    for backend in backends:
        for check in CHECKS:
            command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, backend]
            results[f"{check}, {backend}"] = _command(command, BUDGETS["sanitizer"] / len(CHECKS) / len(backends))
    return {**results, "passed": bool(results) and all(result["passed"] for result in results.values())}


def timing(device: str) -> dict[str, Any]:
    return gpu_timing.run(gpu_timing.logits(device), device, BUDGETS["timing"])


def linear(device: str) -> dict[str, Any]:
    return gpu_timing.run(gpu_timing.hidden(device), device, BUDGETS["linear"])


def limits(device: str) -> dict[str, Any]:
    return gpu_timing.limits(device)


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


def traffic(device: str) -> dict[str, Any]:
    """What each kernel of a loss and its gradient reads from memory and writes to it, as the hardware counts it, in
    units of the logits. The CUDA kernels may move one of each."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    backends = gpu_timing.usable(device)
    if device != "cuda" or not Path(tool).exists() or not backends:
        return {"skipped": "ncu is not here"}
    results = {}
    for backend in backends:
        command = [tool, "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", ",".join(METRICS)]
        command += ["--kernel-name", "regex:row_kernel|one_pass|log_probs|gradient"]
        command += [sys.executable, "-c", MOVED, backend]
        results[backend] = _command(command, BUDGETS["traffic"] / len(backends))
        if "ERR_NVGPUCTRPERM" in results[backend]["tail"]:
            return {"skipped": "this machine forbids the hardware's counters (ERR_NVGPUCTRPERM)"}
        results[backend]["units"] = units_of(results[backend]["tail"])
    once = results["cuda"]["units"].values() if "cuda" in results else ()
    counted = all(result["units"] for result in results.values())
    return {**results, "passed": counted and all(units < 1.05 for kernel in once for units in kernel.values())}


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


def proves_cuda(results: dict[str, Any]) -> bool:
    """Whether a run lets the CUDA kernels be the automatic choice on its GPU (PROVEN of backends/cuda.py)."""
    passed = all(results.get(name, {}).get("passed") is True for name in ("verify", "suite", "large", "sanitizer"))
    return passed and all(f"{check}, cuda" in results["sanitizer"] for check in CHECKS)


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "environment": environment,
    "verify": verify,
    "suite": suite,
    "large": large,
    "sanitizer": sanitizer,
    "limits": limits,
    "timing": timing,
    "traffic": traffic,
    "linear": linear,
}


def _command(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run it; the end of what it printed, and whether it passed. Its children end with it."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment = {**os.environ, **paths, **(environment or {})}
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                                   env=environment, start_new_session=True)  # fmt: skip
    except OSError as error:
        return {"passed": False, "tail": str(error)}
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": False, "stopped_after": seconds, "tail": _stop(process)[-6000:]}
    except KeyboardInterrupt:
        _stop(process)
        raise
    return {"passed": process.returncode == 0, "tail": text[-6000:]}


def _stop(process: subprocess.Popen[str]) -> str:
    """Ask first: a part stops what it has started itself."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def _apart(name: str, device: str) -> dict[str, Any]:
    """A part in a process of its own: what it found, or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, "--part", name, "--device", device, "--out", str(result)]
        ended = _command(command, BUDGETS[name] + 30)
        return json.loads(result.read_text()) if result.exists() else {**ended, "passed": False}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def _commit() -> str:
    return _output(["git", "rev-parse", "--short", "HEAD"])


def markdown(results: dict[str, Any]) -> str:
    found = results.get("environment", {})
    versions = ", ".join(f"{name} {found.get(name)}" for name in ("torch", "triton", "commit"))
    lines = [f"{found.get('gpu', 'no GPU')}, {versions}", ""]
    for name, part in results.items():
        if "passed" in part:
            lines.append(f"- {name}: {'passed' if part['passed'] else '**failed**'} in {part['seconds']:.0f} s")
        elif "skipped" in part:
            lines.append(f"- {name}: skipped, {part['skipped']}")
    if "copy_gb_per_s" in results.get("limits", {}):
        lines += ["", *(f"- {name}: {value}" for name, value in results["limits"].items() if name != "seconds")]
    for backend, part in results.get("traffic", {}).items():
        if isinstance(part, dict):
            for kernel, moved in part.get("units", {}).items():
                lines.append(f"- {backend}, {kernel}: {moved} times the logits")
    lines.append(f"- the CUDA kernels are proven here: {'yes' if proves_cuda(results) else 'no'}")
    for name in ("timing", "linear"):
        if "rows" in results.get(name, {}):
            lines += ["", *gpu_timing.table(results[name])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process, to the file --out
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal on tiny shapes")
    arguments = parser.parse_args()
    if arguments.part:
        found = PARTS[arguments.part](arguments.device)
        arguments.out.write_text(json.dumps(found))
        return 0
    names = arguments.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is usable here (torch.cuda.is_available() is False); --device cpu rehearses")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in names:
        print(f"{name} (budget {BUDGETS[name]} s) ...", flush=True)
        start = time.perf_counter()
        results[name] = _apart(name, arguments.device)
        results[name]["seconds"] = time.perf_counter() - start
        (arguments.out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "gpu_check.md").write_text(markdown(results))
    print(markdown(results))
    return 0 if all(part.get("passed", True) for part in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
