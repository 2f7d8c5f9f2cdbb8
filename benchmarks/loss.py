"""Every provider on every workload in one run, from logits and from hidden states: README's tables.

    python benchmarks/loss.py --out benchmarks/results/MACHINE     # the CPU set, under ten minutes on two cores
    python benchmarks/loss.py --only logits --rounds 3
    python benchmarks/loss.py --only bf16-head                     # eager bf16 GEMMs: minutes a step on old CPUs

Providers take turns inside each round, medians; `python -m grpo_kernels bench` is the same engine without the peers.
gpu_check.py runs the GPU set.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import peers

from grpo_kernels.bench import report
from grpo_kernels.bench.command import Files, collect
from grpo_kernels.bench.workload import Spec

LOGITS = ((256, 32000), (512, 32000), (256, 151936))
HIDDEN = ((1024, 32000, 512), (128, 151936, 1024))


def logits(device: str) -> list[Spec]:
    """Shapes and dtypes; then an upstream gradient of 1/4, and workloads with less to do, at one shape."""
    found = [Spec(n, v, dtype, device=device) for dtype, (n, v) in itertools.product(("fp32", "bf16"), LOGITS)]
    # The last shape again, compiled already.
    found += [Spec(256, 151936, "bf16", upstream=0.25, device=device)]
    return found + [Spec(256, 151936, "bf16", kind=kind, device=device) for kind in ("half masked", "30 % A = 0")]


def hidden(device: str) -> list[Spec]:
    found = [Spec(n, v, "fp32", h, device=device) for n, v, h in HIDDEN]
    return [found[0], dataclasses.replace(found[0], kind="half masked"), *found[1:]]


def bf16_head(device: str) -> list[Spec]:
    return [Spec(128, 32000, "bf16", 512, device=device)]


SETS = {"logits": logits, "hidden": hidden, "bf16-head": bf16_head}
DEFAULT = ("logits", "hidden")
SHOWN = {
    "logits": (
        "eager, fp32 upcast", "eager, logits' dtype", "torch.compile, fp32 upcast",
        "TRL selective_log_softmax + eager loss",
    ),
    "hidden": (
        "eager, fp32 upcast", "torch.compile, fp32 upcast", "TRL ChunkedLogProbFunction + eager loss",
        "Liger LigerFusedLinearGRPOLoss, not compiled", "PyTorch linear_cross_entropy + eager loss",
    ),
}  # fmt: skip
HEADLINED = ("torch.compile, fp32 upcast", "eager, fp32 upcast")
SHOWN["bf16-head"] = SHOWN["hidden"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 5 from logits, 3 from hidden states")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", choices=list(SETS), help="repeatable; default: logits and hidden")
    parser.add_argument("--out", type=Path, help="folder for loss_SET.json, .csv, .md, .png and _summary.md")
    arguments = parser.parse_args()
    if missing := peers.missing(arguments.device):
        print(f"not installed, left out: {', '.join(missing)}")
    for name in arguments.only or DEFAULT:
        sinks = Files(arguments.out, f"loss_{name}", arguments.device)
        rows, status = collect(
            SETS[name](arguments.device), peers.providers, arguments.rounds or (5 if name == "logits" else 3), sinks
        )
        print(report.text(rows), flush=True)
        if arguments.out and rows:
            installed = {package: version for package, version in peers.versions().items() if version}
            path = arguments.out / f"loss_{name}.json"
            found = json.loads(path.read_text())
            found["environment"]["peers"] = installed
            path.write_text(json.dumps(found, indent=1) + "\n")
            summary = report.summary(rows, found["environment"], SHOWN[name])
            (arguments.out / f"loss_{name}_summary.md").write_text(summary)
            if name == "logits":
                place = report.caption(found["environment"])
                text = f"Loss, gradient and metrics of GRPO ({place}): {report.headline(rows, HEADLINED)}.\n"
                (arguments.out / "loss_headline.md").write_text(text)
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
