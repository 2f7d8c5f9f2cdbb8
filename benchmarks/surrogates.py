"""Every one-pass surrogate beside the clip: time of loss and gradient, in place.

    python benchmarks/surrogates.py --out benchmarks/results/MACHINE    # about a minute on two cores

The same workloads as ``python -m grpo_kernels bench``, with the config's surrogate exchanged; GRPO's KL stays.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import Cispo, Clip, DppoKL, DppoTV, Dro, Reinforce, Sapo, TruncatedIS, Unclipped, grpo_loss
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import run
from grpo_kernels.bench.providers import Provider
from grpo_kernels.bench.workload import Spec, Workload
from grpo_kernels.objectives.config import LossConfig

CLIP = "Clip()"
SURROGATES = (Clip(), Reinforce(), Unclipped(), Cispo(), Sapo(), DppoTV(), DppoTV(cap=3.0), DppoKL(), Dro(0.1))
CHANGES: dict[str, dict[str, Any]] = {
    **{CLIP if i == 0 else repr(surrogate): {"surrogate": surrogate} for i, surrogate in enumerate(SURROGATES)},
    "Clip() with TruncatedIS(2.0)": {"rollout": TruncatedIS(2.0)},
}
"""By the name in the table: what is exchanged in the config of GRPO."""


def provider(name: str) -> Provider:
    def loss(work: Workload) -> Tensor:
        config: LossConfig = dataclasses.replace(work.config, **CHANGES[name])
        known = {**work.known(), "rollout_log_probs": work.ref}
        inplace = torch.is_grad_enabled()
        arguments = (work.logits(), work.ids, work.advantages, work.mask)
        return grpo_loss(*arguments, **known, config=config, inplace=inplace, grad_scale=work.spec.upstream).loss

    return Provider(name, loss, lambda spec: 0.05 * spec.logits_bytes, same_outputs=False, ours=True)


def table(rows: list[dict[str, Any]], caption: str) -> str:
    lines = [
        caption,
        "",
        "| | " + " | ".join(report.title(row) for row in rows) + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    for name in CHANGES:
        steps = [(row["providers"][name]["step_ms"], row["providers"][CLIP]["step_ms"]) for row in rows]
        cells = (f"{own:.2f}" if name == CLIP else f"{own:.2f} ({own / clip:.2f}x)" for own, clip in steps)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for surrogates.md")
    arguments = parser.parse_args()
    shapes = ((1024, 4096, "fp32"), (256, 32000, "fp32"), (512, 32000, "bf16"))
    specs = [Spec(tokens, vocab, dtype, device=arguments.device) for tokens, vocab, dtype in shapes]
    rows = list(run(specs, lambda spec: [provider(name) for name in CHANGES], arguments.rounds, progress=print))
    text = table(rows, f"{report.caption(report.environment(arguments.device))}; median ms of loss and gradient")
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "surrogates.md").write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
