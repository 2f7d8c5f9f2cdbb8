"""The timing parts of gpu_check.py: loss.py's engine and peers on a GPU's shapes, within a number of seconds."""

from __future__ import annotations

import time
from typing import Any

import peers

from grpo_kernels.bench import measure, report
from grpo_kernels.bench.workload import Spec

ROUNDS = 9
LOGITS = ((8192, 151936), (16384, 32000), (8192, 128256))
HIDDEN = ((8192, 151936, 4096), (8192, 151936, 2048), (16384, 32000, 2048))


def logits(device: str) -> list[Spec]:
    """What matters most first: time may run out."""
    if device == "cpu":
        return [Spec(16, 3000, "bf16"), Spec(16, 3000, "bf16", upstream=0.25)]
    first, *others = (Spec(n, v, "bf16", device=device) for n, v in LOGITS)
    variants = [Spec(*LOGITS[0], "bf16", upstream=0.25, device=device)]
    variants += [Spec(*LOGITS[0], "bf16", kind=kind, device=device) for kind in ("half masked", "30 % A = 0")]
    return [first, *variants, *others, Spec(*LOGITS[0], "fp32", device=device)]


def hidden(device: str) -> list[Spec]:
    if device == "cpu":
        return [Spec(64, 3000, "bf16", 32)]
    first, *others = (Spec(n, v, "bf16", h, device=device) for n, v, h in HIDDEN)
    return [first, Spec(*HIDDEN[0][:2], "bf16", HIDDEN[0][2], "half masked", device=device), *others]


def run(specs: list[Spec], device: str, seconds: float) -> dict[str, Any]:
    deadline = time.perf_counter() + seconds
    found: dict[str, Any] = {"environment": report.environment(device), "rows": [], "missing": peers.missing(device)}
    found["peers"] = {package: version for package, version in peers.versions().items() if version}
    for spec in specs:
        if time.perf_counter() > deadline:
            return {**found, "stopped": f"before {spec}"}
        try:
            found["rows"] += measure.run([spec], peers.providers, ROUNDS)
        except measure.TooLarge as error:
            found["missing"].append(str(error))
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = [report.markdown(found["rows"], found["environment"])]
    if found["missing"]:
        lines.append(f"Left out: {'; '.join(found['missing'])}.")
    return lines
