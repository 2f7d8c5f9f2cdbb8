"""Times short calls, whose cost is that of their PyTorch operations and their Python: loss and gradient of few tokens.

    python benchmarks/short_calls.py --out benchmarks/results/MACHINE    # about a minute, on one thread

Ours as it is pasted, beside the same loss in the shortest eager PyTorch and that compiled. The rounds are those of
``python -m grpo_kernels bench``; the KL is left out, so that a call has the fewest terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from outputs import Outputs
from torch import Tensor

from grpo_kernels import grpo_loss, linear_grpo_loss
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import run
from grpo_kernels.bench.providers import Provider
from grpo_kernels.bench.workload import CLIP, Spec, Workload

HIDDEN = 32
SHAPES = ((16, 64), (64, 1024))
EAGER, COMPILED = "eager PyTorch", "torch.compile"
CALLS = {
    "`grpo_loss`": ("grpo", False, None),
    "`grpo_loss`, in place": ("grpo", True, None),
    '`grpo_loss`, `config="gspo"`': ("gspo", False, None),
    "`linear_grpo_loss`": ("grpo", False, HIDDEN),
}
"""Config, whether in place, and the size of the hidden states of each of our calls, by the name in the table."""


def eager_loss(logits: Tensor, work: Workload) -> Tensor:
    """Compute GRPO's loss in the fewest lines of PyTorch, without metrics: the code that README begins with."""
    log_probs = torch.log_softmax(logits.float(), -1).gather(-1, work.ids[..., None]).squeeze(-1)
    ratio, A = (log_probs - work.old).exp(), work.advantages[:, None]
    terms = -torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    return ((terms * work.mask).sum(-1) / work.mask.sum(-1)).mean()


def _logits(work: Workload) -> Tensor:
    return work.logits() if work.spec.hidden is None else torch.nn.functional.linear(*work.operands())


def _ours(config: str, inplace: bool) -> Callable[[Workload], Tensor]:
    def loss(work: Workload) -> Tensor:
        rest = (work.ids, work.advantages, work.mask)
        if work.spec.hidden is None:
            options: dict[str, Any] = {"inplace": True} if inplace and torch.is_grad_enabled() else {}
            return grpo_loss(work.logits(), *rest, old_log_probs=work.old, config=config, **options).loss
        return linear_grpo_loss(*work.operands(), *rest, old_log_probs=work.old, config=config).loss

    return loss


def providers(spec: Spec) -> list[Provider]:
    """Return our calls that take such a workload, and PyTorch's."""
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(eager_loss)
    others = {
        EAGER: lambda work: eager_loss(_logits(work), work),
        COMPILED: lambda work: compiled(_logits(work), work),
    }
    ours = {name: _ours(*call[:2]) for name, call in CALLS.items() if call[2] == spec.hidden}
    return [Provider(name, loss, lambda spec: 0.0, same_outputs=False) for name, loss in (ours | others).items()]


def table(found: dict[str, Any]) -> str:
    """Return a line for each of our calls: its microseconds, and how many times those of the others it takes."""
    rows = found["rows"]
    heads = ["", *(f"{tokens}×{vocab}, {what}" for tokens, vocab in SHAPES for what in ("µs", *(EAGER, COMPILED)))]
    lines = [
        f"{report.caption(found['environment'])}. Median microseconds of loss and gradient at tokens × vocabulary, "
        f"fp32 (hidden size {HIDDEN}), and those of the same loss in PyTorch, for `gspo` of GRPO's; in brackets how "
        "many times as long ours takes.",
        "", *report.table_head(heads),
    ]  # fmt: skip
    for name, (_, _, hidden) in CALLS.items():
        cells = []
        for row in (row for row in rows if row["hidden"] == hidden):
            own, *others = (1e3 * (report.milliseconds(row, one) or 0) for one in (name, EAGER, COMPILED))
            cells += [f"{own:.0f}", *(f"{other:.0f} ({own / other:.2f}x)" for other in others)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("short_calls", table)


def main() -> int:
    """Measure every call, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1001)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    specs = [Spec(*shape, "fp32", hidden) for hidden in (None, HIDDEN) for shape in SHAPES]
    rows = list(run(specs, providers, arguments.rounds))
    found = {"environment": report.environment("cpu"), "rows": rows}
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
