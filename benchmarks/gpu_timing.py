"""Has the timing parts of gpu_check.py: loss.py's engine and peers on a GPU's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import peers
import torch
from gpu_rows import Rows

from grpo_kernels import backends
from grpo_kernels.bench import measure
from grpo_kernels.bench.providers import Provider, ours_by_name
from grpo_kernels.bench.workload import Spec

ROUNDS = 9
LOGITS = ((8192, 151936), (16384, 32000), (8192, 128256), (8192, 262144))
HIDDEN = ((8192, 151936, 4096), (8192, 151936, 2048), (16384, 32000, 2048))


def logits(device: str) -> list[Spec]:
    """Return what matters most first: time may run out."""
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


def providers(spec: Spec, names: Sequence[str], compiled: bool) -> list[Provider]:
    """Ours as chosen, ours by name on those of ``names`` that are not, PyTorch's, and peers'. Without ``compiled``
    torch.compile is left out: it compiles each workload anew, which takes longer than to measure it."""
    found = peers.providers(spec)
    if spec.hidden is None:
        request = backends.Request(torch.device(spec.device), fused=True)
        chosen = backends.choose("providers", request, None).backend
        found += [other for name in names if name != chosen for other in ours_by_name(name)]
    return [provider for provider in found if compiled or not provider.name.startswith("torch.compile")]


def workloads(specs: Sequence[Spec], names: Sequence[str]) -> Rows:
    """Yield a row for each workload; torch.compile is timed in the first."""
    for spec in specs:
        yield str(spec), partial(_workload, spec, names, spec is specs[0])


def _workload(spec: Spec, names: Sequence[str], compiled: bool) -> dict[str, Any]:
    """Return the engine's row, what it was measured beside, and what was not installed."""
    found: dict[str, Any] = {"missing": peers.missing(spec.device)}
    found |= {"peers": {package: version for package, version in peers.versions().items() if version}}
    try:
        return {**found, **next(measure.run([spec], lambda spec: providers(spec, names, compiled), ROUNDS))}
    except measure.TooLarge as error:
        return {**found, "skipped": str(error)}
