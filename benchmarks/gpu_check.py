"""Prove and time the GPU kernels on this machine in one command, in some twelve minutes, without a network.

    python benchmarks/gpu_check.py --out benchmarks/results/h200
    python benchmarks/gpu_check.py --out DIR --only verify,timing

Parts, in order: environment; verify (every preset and dtype against float64); suite (the tests that take a backend, on
the GPU); large (vocabularies up to 262,144, more than 2^31 elements, more than 65,535 rows); sanitizer (memcheck,
racecheck, synccheck); limits (bandwidths, clusters); timing, from logits; traffic (bytes that kernels move, by ncu);
linear, from hidden states. All of them cover each GPU backend that is usable, asked for by name. DIR/gpu_check.json is
written after each part, so that a killed run keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_timing
import torch

import grpo_kernels
from grpo_kernels import token_log_probs

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"environment": 10, "verify": 80, "suite": 240, "large": 80, "sanitizer": 120, "limits": 20}
BUDGETS |= {"timing": 120, "traffic": 60, "linear": 70}
"""Seconds of each part; a part that runs longer is stopped where it can be."""


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
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not nightly", "--timeout", "60", "tests"]
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
        del logits
    return {"shapes": results, "passed": all(result["holds"] for result in results.values())}


SANITIZED = """
import sys
sys.path.insert(0, "tests")
from cases import make
for vocab in (97, 9000, 40000):
    for options in ({}, {"kl_coef": 0.1, "entropy_coef": 0.01}, {"config": "gspo"}):
        case = make(batch=3, length=4, vocab=vocab)
        case.run(sys.argv[1], **options)
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
            seconds = BUDGETS["sanitizer"] / len(CHECKS) / len(backends)
            results[f"{check}, {backend}"] = _command(command, seconds, {"GRPO_KERNELS_TEST_DEVICE": "cuda"})
    return {**results, "passed": all(result["passed"] for result in results.values())}


def timing(device: str) -> dict[str, Any]:
    return gpu_timing.run(gpu_timing.logits(device), device, BUDGETS["timing"])


def linear(device: str) -> dict[str, Any]:
    return gpu_timing.run(gpu_timing.hidden(device), device, BUDGETS["linear"])


def limits(device: str) -> dict[str, Any]:
    return gpu_timing.limits(device)


MOVED = """
import sys, torch
from grpo_kernels import grpo_loss
vocab = 151936
logits = torch.randn(1, 1024, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
ids = torch.randint(vocab, (1, 1024), device="cuda")
for _ in range(2):
    loss = grpo_loss(logits, ids, torch.ones(1, device="cuda"), grad_scale=1.0, backend=sys.argv[1]).loss
    loss.backward()
    logits.grad = None
print("units of", logits.numel() * 2, "bytes")
"""


def traffic(device: str) -> dict[str, Any]:
    """Bytes that each kernel reads from memory and writes to it, as the hardware counts them."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if device != "cuda" or not Path(tool).exists():
        return {"skipped": "ncu is not here"}
    results = {}
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    backends = gpu_timing.usable(device)
    for backend in backends:
        names = "regex:row_kernel|one_pass|log_probs|gradient"
        command = [tool, "--csv", "--metrics", metrics, "--kernel-name", names, sys.executable, "-c", MOVED, backend]
        results[backend] = _command(command, BUDGETS["traffic"] / len(backends))
    return {**results, "passed": all(result["passed"] for result in results.values())}


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
    """Run it; the end of what it printed, and whether it passed."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        environment = {**os.environ, **paths, **(environment or {})}
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        return {"passed": False, "stopped_after": seconds, "tail": text[-6000:]}
    except OSError as error:
        return {"passed": False, "tail": str(error)}
    return {"passed": result.returncode == 0, "tail": (result.stdout + result.stderr)[-6000:]}


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
    for name in ("timing", "linear"):
        if "rows" in results.get(name, {}):
            lines += ["", *gpu_timing.table(results[name])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal on tiny shapes")
    arguments = parser.parse_args()
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
        try:
            results[name] = PARTS[name](arguments.device)
        except Exception as error:  # the next part may still run
            results[name] = {"passed": False, "tail": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = time.perf_counter() - start
        (arguments.out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "gpu_check.md").write_text(markdown(results))
    print(markdown(results))
    return 0 if all(part.get("passed", True) for part in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
