"""The timing parts of gpu_check.py: loss.py's engine and peers on a GPU's shapes, within a number of seconds; and the
limits of the device that the figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import peers
import torch
import triton
import triton.language as tl

from grpo_kernels import backends
from grpo_kernels.backends import cuda
from grpo_kernels.bench import measure, report
from grpo_kernels.bench.providers import Provider, ours_by_name
from grpo_kernels.bench.workload import Spec

ROUNDS = 9
LOGITS = ((8192, 151936), (16384, 32000), (8192, 128256), (8192, 262144))
HIDDEN = ((8192, 151936, 4096), (8192, 151936, 2048), (16384, 32000, 2048))


def logits(device: str) -> list[Spec]:
    """What matters most first: time may run out."""
    if device == "cpu":
        return [Spec(16, 3000, "bf16"), Spec(16, 3000, "bf16", upstream=0.25)]
    first, *others = (Spec(n, v, "bf16", device=device) for n, v in LOGITS)
    variants = [Spec(*LOGITS[0], "bf16", upstream=0.25, device=device)]
    variants += [Spec(*LOGITS[0], "bf16", kind=kind, device=device) for kind in ("half masked", "30 % A = 0")]
    return [first, *variants, *others, *(Spec(n, v, "fp32", device=device) for n, v in (LOGITS[0], (4096, 262144)))]


def hidden(device: str) -> list[Spec]:
    if device == "cpu":
        return [Spec(64, 3000, "bf16", 32)]
    first, *others = (Spec(n, v, "bf16", h, device=device) for n, v, h in HIDDEN)
    return [first, Spec(*HIDDEN[0][:2], "bf16", HIDDEN[0][2], "half masked", device=device), *others]


def usable(device: str) -> list[str]:
    """Compiled GPU backends that serve it, asked for by name."""
    request = backends.Request(torch.device(device), by_name=True)
    return [name for name in ("triton", "cuda") if backends.get(name).unsupported(request) is None]


def providers(spec: Spec) -> list[Provider]:
    """Ours as chosen, ours on the GPU backends that are not, by name, PyTorch's, and peers'."""
    found = peers.providers(spec)
    if spec.hidden is None:
        request = backends.Request(torch.device(spec.device), fused=True)
        chosen = backends.choose("providers", request, None).backend
        found += [other for name in usable(spec.device) if name != chosen for other in ours_by_name(name)]
    return found


def limits(device: str) -> dict[str, Any]:
    """What this device can do: bytes per second of a copy, of reading alone, and of reading again what its second-level
    cache may hold; how many clusters of the CUDA kernel run at once."""
    if device != "cuda":
        return {"skipped": "a GPU's"}
    source = torch.zeros(2**29, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"copy_gb_per_s": 2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9}
    found["read_gb_per_s"] = _reading(source, 1)
    sizes = (8, 16, 24, 32, 40, 48, 64, 96, 128)
    found["reread_gb_per_s"] = {f"{mb} MB": _reading(source[: mb * 2**18], 100) for mb in sizes}
    if "cuda" in usable(device):
        offered = cuda.device(torch.cuda.current_device())
        found["clusters_at_once"] = dict(zip(map(str, cuda.CLUSTERS), offered.clusters, strict=True))
        found |= {"driver": offered.driver, "shared_bytes": offered.shared_bytes}
    return found


@triton.jit
def reading_kernel(source, out, columns, repeats, BLOCK: tl.constexpr):
    """Reads everything ``repeats`` times, past the first-level cache."""
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(repeats):
        for start in tl.range(tl.program_id(0) * BLOCK, columns, tl.num_programs(0) * BLOCK, num_stages=4):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(source + at, mask=at < columns, other=0.0, cache_modifier=".cg")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def _reading(values: torch.Tensor, repeats: int) -> float:
    """GB/s."""
    programs = 8 * torch.cuda.get_device_properties(values.device).multi_processor_count
    out = torch.empty(programs, device=values.device)
    arguments = (values, out, values.numel(), repeats)
    seconds = _seconds(lambda: reading_kernel[(programs,)](*arguments, BLOCK=2048, num_warps=4))
    return repeats * values.nbytes / seconds / 1e9


def _seconds(function: Callable[[], object]) -> float:
    """The median of some calls, after two to warm up."""
    function(), function()
    clock = measure.Clock("cuda")
    for _ in range(11):
        function()
        clock.mark()
    return sorted(clock.seconds())[5]


def run(specs: list[Spec], device: str, seconds: float) -> dict[str, Any]:
    deadline = time.perf_counter() + seconds
    found: dict[str, Any] = {"environment": report.environment(device), "rows": [], "missing": peers.missing(device)}
    found["peers"] = {package: version for package, version in peers.versions().items() if version}
    for spec in specs:
        if time.perf_counter() > deadline:
            return {**found, "stopped": f"before {spec}"}
        try:
            found["rows"] += measure.run([spec], providers, ROUNDS)
        except measure.TooLarge as error:
            found["missing"].append(str(error))
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = [report.markdown(found["rows"], found["environment"])]
    if found["missing"]:
        lines.append(f"Left out: {'; '.join(found['missing'])}.")
    return lines
