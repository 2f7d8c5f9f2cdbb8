"""The parts of gpu_check.py that measure in Python: rows to a file, one after the other, so that a killed run has
them. Rows that are in the file already are not measured again."""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_exact
import gpu_rows
import gpu_timing
import torch
from gpu_rows import Rows
from torch import Tensor

import grpo_kernels
from grpo_kernels import Divergence, LossConfig, Teacher, backends, grpo_loss, token_divergence, token_log_probs
from grpo_kernels.bench.measure import Clock
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.objectives.settings import first_line


def environment(device: str) -> dict[str, Any]:
    """Return versions, the GPU and which backends serve it; ``no_gpu`` says why there is none."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"grpo_kernels": grpo_kernels.__version__, "gpu": "CPU", "capability": None, "triton": _triton()}
    if device == "cuda":
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return {**found, "no_gpu": str(error).splitlines()[0]}
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"capability": [properties.major, properties.minor], "l2_bytes": properties.L2_cache_size}
        found |= {"memory_bytes": properties.total_memory, "torch_cuda": torch.version.cuda}
    request = backends.Request(torch.device(device), by_name=True)
    found["triton_refused"] = backends.get("triton").unsupported(request)
    return found


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def large(device: str, names: Sequence[str]) -> Rows:
    """Compare log-probs and gradients of shapes that overflow 32-bit indices or grid limits, beside float64."""
    shapes = {"vocab 262144": (64, 262144), "vocab 50257": (64, 50257), "70000 rows": (70_000, 3)}
    shapes |= {"2.3e9 elements": (15_200, 151_936)}
    shapes = {"rehearsal": (4, 50257)} if device == "cpu" else shapes
    for backend, (what, shape) in itertools.product(names, shapes.items()):  # Triton's last
        yield f"{what}, {backend}", partial(_large, device, backend, *shape)


def _large(device: str, backend: str, rows: int, vocab: int) -> dict[str, Any]:
    logits = torch.randn(1, rows, vocab, dtype=torch.bfloat16, device=device)
    ids = torch.randint(vocab, (1, rows), device=device)
    before, one = logits[0].clone(), torch.ones(1, device=device)
    error = gpu_exact.log_prob_error(before, ids[0], token_log_probs(logits, ids, backend=backend).log_probs[0])
    logits += torch.zeros_like(one, dtype=logits.dtype, requires_grad=True)  # no leaf any more, and no copy
    given: dict[str, Any] = {"grad_scale": float(rows), "inplace": True, "backend": backend}
    grpo_loss(logits, ids, one, **given)
    gradient = gpu_exact.gradient_error(before, ids[0], -one.expand(rows), logits.detach()[0])
    allowed, of_gradient = gpu_exact.allowed(logits.dtype)
    return {"error": error, "gradient_error": gradient, "passed": error < allowed and gradient < of_gradient}


def pairs(device: str, names: Sequence[str]) -> Rows:
    """Compare divergences from a teacher and their gradients, beside float64; then time them."""
    tokens, vocab = (4, 9001) if device == "cpu" else (256, 151_936)
    for backend, kind in itertools.product(names, KINDS):
        yield f"{kind}, {backend}", partial(_pairs, device, backend, kind, tokens, vocab)
    for (tokens, vocab), kind, backend in itertools.product(TIMED, ("reverse_kl", "jsd"), names):
        if device == "cuda":
            yield f"{kind} {tokens}x{vocab}, {backend}", partial(_time_of_pairs, backend, kind, tokens, vocab)


TIMED = ((8192, 151_936), (16_384, 32_000))
"""Shapes whose divergences are timed."""


def _pairs(device: str, backend: str, kind: str, rows: int, vocab: int) -> dict[str, Any]:
    """In every other row one column has all but 1e-7 of the policy, and another one was drawn."""
    logits, teacher, ids = _beside_teacher(device, rows, vocab)
    logits[0, ::2, 7], teacher[0, ::2, 7], ids[0, ::2] = 28.0, 27.5, 5
    divergence, before = Divergence(kind), logits[0].clone()
    found = token_divergence(logits, Teacher(logits=teacher), ids, divergence=divergence, backend=backend).divergence
    _loss_beside(logits.requires_grad_(), teacher, ids, backend, divergence, float(rows)).backward()
    error, gradient = gpu_exact.divergence_errors(divergence, before, teacher[0], found[0], logits.grad[0])
    _, allowed = gpu_exact.allowed(logits.dtype)
    return {"error": error, "gradient_error": gradient, "passed": error < 1e-4 and gradient < 2 * allowed}


def _time_of_pairs(backend: str, kind: str, rows: int, vocab: int) -> dict[str, Any]:
    """Loss and gradient of a divergence alone, the median of nine calls after two."""
    logits, teacher, ids = _beside_teacher("cuda", rows, vocab)
    given = logits.requires_grad_(), teacher, ids, backend, Divergence(kind)
    for _ in range(2):
        _loss_beside(*given)
    clock = Clock("cuda")
    for _ in range(9):
        _loss_beside(*given)
        clock.mark()
    return {"ms": 1e3 * sorted(clock.seconds())[4], "logits_bytes": logits.nbytes}


def _beside_teacher(device: str, rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make logits, a teacher's half a unit away, and ids."""
    logits = torch.randn(1, rows, vocab, dtype=torch.bfloat16, device=device)
    return logits, logits + 0.5 * torch.randn_like(logits), torch.randint(vocab, (1, rows), device=device)


def _loss_beside(
    logits: Tensor, teacher: Tensor, ids: Tensor, backend: str, divergence: Divergence, scale: float = 1.0
) -> Tensor:
    """A divergence's mean over tokens times ``scale``, whose gradient is there already."""
    config = LossConfig(surrogate=None, divergence=divergence)
    given: dict[str, Any] = {"teacher": Teacher(logits=teacher), "config": config, "backend": backend}
    return scale * grpo_loss(logits, ids, None, grad_scale=scale, **given).loss


def limits(device: str, names: Sequence[str]) -> Rows:
    from gpu_limits import limits as of_this_gpu  # Triton, which may be missing

    yield from of_this_gpu()


def timing(device: str, names: Sequence[str]) -> Rows:
    yield from gpu_timing.workloads(gpu_timing.logits(device), names)


def linear(device: str, names: Sequence[str]) -> Rows:
    yield from gpu_timing.workloads(gpu_timing.hidden(device), names)


MEASURED: dict[str, Callable[[str, Sequence[str]], Rows]] = {
    "large": large,
    "limits": limits,
    "timing": timing,
    "pairs": pairs,
    "linear": linear,
}


def run(rows: Rows, file: Path, seconds: float) -> bool:
    """Return whether every row was measured and passed; one begins only before the time is over. A row that raises has
    failed, with its reason."""
    end = time.monotonic() + seconds
    known = {row["name"] for row in gpu_rows.read(file) if row.get("passed", True)}
    for name, measure in rows:
        if name in known:
            continue
        if time.monotonic() > end:
            print(f"no time is left for {name}", flush=True)
            return False
        start = time.monotonic()
        try:
            figures = {"passed": True, **measure()}
        except Exception as error:  # of one backend, or of one shape: the next is measured all the same
            traceback.print_exc()
            figures = {"passed": False, "how": f"{type(error).__name__}: {first_line(error)}"}
        gpu_rows.write(file, name, **figures, seconds=time.monotonic() - start)
        if not figures["passed"] and not _works():
            print(f"the GPU takes no more work after {name}", flush=True)
            return False
    return all(row.get("passed", True) for row in gpu_rows.read(file))


def _works() -> bool:
    """Whether a GPU, if one is in use, still computes: after an illegal access no call of its process does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["environment", *MEASURED])
    parser.add_argument("--device", required=True, choices=["cuda", "cpu"])
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--backend", action="append", default=[], help="that are measured by name")
    arguments = parser.parse_args()
    if arguments.part == "environment":
        gpu_rows.write(arguments.rows, "environment", **environment(arguments.device))
        return 0
    rows = MEASURED[arguments.part](arguments.device, arguments.backend)
    return 0 if run(rows, arguments.rows, arguments.seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
