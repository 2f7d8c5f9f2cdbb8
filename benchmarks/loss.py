"""Times every provider on every workload in one run, from logits and from hidden states: README's tables and plot.

    python benchmarks/loss.py --out benchmarks/results/MACHINE     # the CPU set, under ten minutes on two cores
    python benchmarks/loss.py --only logits --rounds 3
    python benchmarks/loss.py --only bf16-head                     # eager bf16 GEMMs: minutes a step on old CPUs

Providers take turns inside each round, medians; `python -m grpo_kernels bench` is the same engine without the peers.
gpu_check.py runs the GPU set; redraw.py writes tables and plots anew from the .json files.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import peers

from grpo_kernels.bench import report
from grpo_kernels.bench.command import Files, collect, redraw
from grpo_kernels.bench.workload import Spec
from grpo_kernels.files import write_text
from grpo_kernels.objectives.settings import read_folder

TOKENS, VOCAB = 256, 151936
"""Where the two lines of the plot cross, and what is measured in every variant."""
LENGTHS = (64, 128, 256, 512, 1024)
VOCABULARIES = (32000, 49152, 100352, 151936, 262208)
"""Those of Llama 2, SmolLM2, OLMo 2, Qwen3 and Gemma 3."""
HIDDEN = ((1024, 32000, 512), (128, 151936, 1024))


def logits(device: str) -> list[Spec]:
    """Return lengths and vocabularies in bf16, two shapes in fp32, an upstream gradient of 1/4, and less to do."""
    shapes = dict.fromkeys([*((n, VOCAB) for n in LENGTHS), *((TOKENS, v) for v in VOCABULARIES)])
    found = [Spec(n, v, "bf16", device=device) for n, v in shapes]
    found += [Spec(TOKENS, VOCAB, "bf16", upstream=0.25, device=device)]
    found += [Spec(TOKENS, VOCAB, "bf16", kind=kind, device=device) for kind in ("half masked", "30 % A = 0")]
    return found + [Spec(TOKENS, v, "fp32", device=device) for v in (VOCABULARIES[0], VOCAB)]


def hidden(device: str) -> list[Spec]:
    """Return a small and a large head in fp32, the small one with half of its tokens masked as well."""
    found = [Spec(n, v, "fp32", h, device=device) for n, v, h in HIDDEN]
    return [found[0], dataclasses.replace(found[0], kind="half masked"), *found[1:]]


def bf16_head(device: str) -> list[Spec]:
    """Return heads in bf16 and fp16, which eager PyTorch multiplies slowly where a CPU has no instructions for it, with
    half of the tokens masked as well."""
    kinds = ("all", "half masked")
    return [Spec(128, 32000, dtype, 512, kind, device=device) for dtype in ("bf16", "fp16") for kind in kinds]


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


def write(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Write every file of the set ``name`` but its .json, which holds ``found``."""
    redraw(folder, f"loss_{name}", found)
    rows, environment = found["rows"], found["environment"]
    write_text(folder / f"loss_{name}_summary.md", report.summary(rows, environment, SHOWN[name]))
    if name == "logits" and (sentences := report.headline(rows, HEADLINED)):
        text = f"One GRPO loss with its gradient and metrics ({report.caption(environment)}): {sentences}.\n"
        write_text(folder / "loss_headline.md", text)


def main() -> int:
    """Measure the sets that were asked for, print them, and write their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 5 from logits, 3 from hidden states")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", choices=list(SETS), help="repeatable; default: logits and hidden")
    parser.add_argument("--out", type=read_folder, help="folder for loss_SET.json, .csv, .md, .png and _summary.md")
    arguments = parser.parse_args()
    if missing := peers.missing(arguments.device):
        print(f"not installed, left out: {', '.join(missing)}")
    environment = report.environment(arguments.device)
    environment["peers"] = {package: version for package, version in peers.versions().items() if version}
    for name in arguments.only or DEFAULT:
        sinks = Files(arguments.out, f"loss_{name}", environment)
        rounds = arguments.rounds or (5 if name == "logits" else 3)
        rows, status = collect(SETS[name](arguments.device), peers.providers, rounds, sinks)
        print(report.text(rows), flush=True)
        if arguments.out and rows:
            write(arguments.out, name, {"environment": environment, "rows": rows})
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
