"""Times every one-pass surrogate beside the clip: loss and gradient, by the default call and in place.

    python benchmarks/surrogates.py --out benchmarks/results/MACHINE    # about two minutes on two cores

The same workloads as ``python -m grpo_kernels bench``, with the config's surrogate exchanged; GRPO's KL stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from outputs import Outputs
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
"""What is exchanged in the config of GRPO, by the name in the table."""


def provider(name: str, inplace: bool) -> Provider:
    """Return GRPO with the change of that name, its gradient in a tensor of its own or over the logits."""

    def loss(work: Workload) -> Tensor:
        config: LossConfig = dataclasses.replace(work.config, **CHANGES[name])
        known = {**work.known(), "rollout_log_probs": work.ref}
        arguments = (work.logits(), work.ids, work.advantages, work.mask)
        options = {"inplace": inplace and torch.is_grad_enabled(), "grad_scale": work.spec.upstream}
        return grpo_loss(*arguments, **known, config=config, **options).loss

    copies = 0.05 if inplace else 1.05
    return Provider(label(name, inplace), loss, lambda spec: copies * spec.logits_bytes, same_outputs=False, ours=True)


def label(name: str, inplace: bool) -> str:
    """Return a provider's name in the rows."""
    return f"{name}, in place" if inplace else name


def table(found: dict[str, Any]) -> str:
    """Return a line for each surrogate: its time, and how many times that of the clip it is, by both calls."""
    rows = found["rows"]
    heads = ["", *(label(report.title(row), inplace) for row in rows for inplace in (False, True))]
    lines = [
        f"{report.caption(found['environment'])}. Median milliseconds of loss and gradient, at tokens × vocabulary"
        f", and as a multiple of those of `{CLIP}`.",
        "", *report.table_head(heads),
    ]  # fmt: skip
    for name in CHANGES:
        cells = []
        for row in rows:
            for inplace in (False, True):
                own, clip = (report.milliseconds(row, label(other, inplace)) for other in (name, CLIP))
                cells.append(f"{own:.2f}" if name == CLIP else f"{own:.2f} ({own / clip:.2f}x)")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("surrogates", table)


def main() -> int:
    """Measure every surrogate, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    shapes = ((1024, 4096, "fp32"), (256, 32000, "fp32"), (512, 32000, "bf16"))
    specs = [Spec(tokens, vocab, dtype, device=arguments.device) for tokens, vocab, dtype in shapes]
    made = [provider(name, inplace) for name in CHANGES for inplace in (False, True)]
    rows = list(run(specs, lambda spec: made, arguments.rounds, progress=print))
    found = {"environment": report.environment(arguments.device), "rows": rows}
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
