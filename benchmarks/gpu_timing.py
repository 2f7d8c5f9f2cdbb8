"""The timing parts of gpu_check.py: loss.py's engine and peers on a GPU's shapes, within a number of seconds; and the
limits of the device that the figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import peers
import torch

from grpo_kernels import backends
from grpo_kernels.backends import cuda
from grpo_kernels.bench import measure, report
from grpo_kernels.bench.providers import Provider, ours
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
    return [name for name in ("cuda", "triton") if backends.get(name).unsupported(request) is None]


def providers(spec: Spec) -> list[Provider]:
    """Ours as chosen, ours on each GPU backend by name, PyTorch's, and peers'."""
    found = peers.providers(spec)
    if spec.hidden is None:
        for name in usable(spec.device):
            for inplace, copies in ((True, 0.05), (False, 1.05)):
                label = f"ours ({name}){', in place' if inplace else ''}"
                found.append(Provider(label, ours(inplace, name), lambda s, c=copies: c * s.logits_bytes, ours=True))
    return found


def limits(device: str) -> dict[str, Any]:
    """What this device can do: bytes per second of a copy and of reading alone, reading again what fits its
    second-level cache, and how many clusters of the CUDA kernel run at once."""
    size = 2**31 if device == "cuda" else 2**24
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"copy_gb_per_s": 2 * size / _seconds(lambda: target.copy_(source), device) / 1e9}
    found["read_gb_per_s"] = size / _seconds(source.sum, device) / 1e9
    if device == "cuda":
        sizes = (8, 16, 24, 32, 40, 48, 64, 96)
        found["reread_gb_per_s"] = {f"{mb} MB": _reread(source[: mb * 2**18]) for mb in sizes}
        if "cuda" in usable(device):
            offered = cuda.device(torch.cuda.current_device())
            found["clusters_at_once"] = dict(zip(map(str, cuda.CLUSTERS), offered.clusters, strict=True))
            found |= {name: getattr(offered, name) for name in ("driver", "runtime", "shared_bytes", "l2_bytes")}
    return found


def _reread(values: torch.Tensor, times: int = 50) -> float:
    """GB/s of reading the same memory many times over, in one CUDA graph: no launch is waited for."""
    values.sum()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            values.sum()
    return times * 4 * values.numel() / _seconds(graph.replay, "cuda") / 1e9


def _seconds(function: Callable[[], object], device: str) -> float:
    """The median of some calls."""
    taken = []
    for _ in range(12):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken[2:])[5]


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
