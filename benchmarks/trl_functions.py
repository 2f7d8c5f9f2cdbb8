"""Times the functions of TRL's that patch_trl replaces, and measures their memory: TRL's own, and ours in their place.

    python benchmarks/trl_functions.py                  # about ten minutes on two cores
    python benchmarks/trl_functions.py --rounds 3 --out DIR

Forward and backward of a loss of their outputs, at a vocabulary of 151,936, in fp32: from hidden states 256 wide (a
teacher's are as wide), and from logits of fewer tokens. TRL's and ours take turns inside each round, medians; memory is
what PyTorch's allocator hands out beyond the operands, gradients included. Needs TRL.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import trl
from outputs import Outputs
from torch import Tensor
from trl.trainer import distillation_trainer, utils
from trl_step import SIZES, extra_bytes, in_turns

from grpo_kernels.bench import report
from grpo_kernels.integrations import trl_operators

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
FROM_STATES, FROM_LOGITS = 512, 128
"""Tokens."""
VOCAB, WIDTH = SIZES["vocab_size"], SIZES["hidden_size"]


class Case(NamedTuple):
    """A function of TRL's."""

    original: Any
    ours: Callable[[Any], Any]
    """Of the original."""
    loss: Callable[[Any], Tensor]
    """Of either."""
    trained: tuple[Tensor, ...]
    """What gets a gradient."""


def cases() -> dict[str, Callable[[], Case]]:
    """Return what is measured, by name; operands are made where one is asked for."""
    from trl.experimental.gkd import GKDTrainer

    jsd = GKDTrainer.generalized_jsd_loss
    more = ("log_probs", "entropy", "mean_logits")
    return {
        "head: log-probs, entropy": lambda: of_head(more[:2]),
        "head: and mean logit (KTO)": lambda: of_head(more),
        "DistillationTrainer, reverse KL": lambda: of_distillation(1.0),
        "DistillationTrainer, JSD": lambda: of_distillation(0.5),
        "logits: log-probs (CPO, ORPO, A2PO)": lambda: of_logits(
            utils.selective_log_softmax, trl_operators.selective_log_softmax_or
        ),
        "logits: and entropy (TPO)": lambda: of_logits(
            utils.selective_log_softmax_and_entropy, trl_operators.selective_log_softmax_and_entropy_or
        ),
        "GKD, reverse KL": lambda: of_two_logits(jsd, 1.0),
        "GKD, JSD": lambda: of_two_logits(jsd, 0.5),
    }


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head(seed: int) -> tuple[Tensor, Tensor]:
    """Return hidden states (tokens, WIDTH), and a head whose logits are of the size of 2."""
    return drawn(FROM_STATES, WIDTH, seed=seed), 2 * WIDTH**-0.5 * drawn(VOCAB, WIDTH, seed=seed + 1)


def of_head(outputs: tuple[str, ...]) -> Case:
    """Return TRL's fused head with these outputs."""
    hidden, weight = (tensor.requires_grad_() for tensor in head(0))
    ids = torch.arange(FROM_STATES)

    def loss(operator: Any) -> Tensor:
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        log_probs, entropy, *_ = operator.apply(hidden, weight, None, ids, 1.0, chunk, None, 1.0, outputs)
        value: Tensor = (log_probs + 0.01 * entropy).mean()
        return value

    return Case(utils._ChunkedLogProbFunction, trl_operators.HeadLogProbs, loss, (hidden, weight))


def of_distillation(beta: float) -> Case:
    """Return the loss of TRL's DistillationTrainer."""
    hidden, weight = (tensor.requires_grad_() for tensor in head(0))
    teacher, of_teacher = head(7)
    mask = torch.ones(1, FROM_STATES)

    def loss(function: Any) -> Tensor:
        value: Tensor = function(hidden[None], teacher[None], weight, of_teacher, mask, beta)[0]
        return value

    function = distillation_trainer._chunked_divergence_loss
    return Case(function, trl_operators.divergence_loss_or, loss, (hidden, weight))


def of_logits(function: Any, ours: Callable[[Any], Any]) -> Case:
    """Return a function of logits and ids."""
    logits, ids = (2 * drawn(1, FROM_LOGITS, VOCAB)).requires_grad_(), torch.arange(FROM_LOGITS)[None]

    def loss(function: Any) -> Tensor:
        found = function(logits, ids)
        value: Tensor = (found if isinstance(found, Tensor) else sum(found)).mean()
        return value

    return Case(function, ours, loss, (logits,))


def of_two_logits(function: Any, beta: float) -> Case:
    """Return the divergence of GKDTrainer."""
    logits, teacher = (2 * drawn(1, FROM_LOGITS, VOCAB)).requires_grad_(), 2 * drawn(1, FROM_LOGITS, VOCAB, seed=1)
    labels = torch.zeros(1, FROM_LOGITS, dtype=torch.int64)
    return Case(function, trl_operators.generalized_jsd_or, lambda each: each(logits, teacher, labels, beta), (logits,))


class Step:
    """A loss and its backward, as ``in_turns`` runs them."""

    patched = contextlib.nullcontext

    def __init__(self, case: Case, function: Any) -> None:
        self._case, self._function = case, function

    def run(self) -> None:
        """Compute the loss and its gradients."""
        self._case.loss(self._function).backward()

    def restore(self) -> None:
        """Drop the gradients of the last run."""
        for tensor in self._case.trained:
            tensor.grad = None


def measured(make: Callable[[], Case], rounds: int) -> dict[str, Any]:
    """Return milliseconds and bytes of TRL's and ours."""
    case = make()
    steps = {"TRL": Step(case, case.original), "ours": Step(case, case.ours(case.original))}
    memory = {}
    for name, step in steps.items():
        memory[name] = extra_bytes(step)  # type: ignore[arg-type]
        step.restore()
    return {"bytes": memory, "ms": in_turns(steps, rounds)}  # type: ignore[arg-type]


def table(found: dict[str, Any]) -> str:
    """Return a line for each function."""
    lines = [
        f"{report.caption(found['environment'])}, TRL {found['trl']}. Forward and backward in fp32 at a vocabulary of "
        f"{found['vocab']:,}: {found['from_states']} tokens from hidden states {found['width']} wide, "
        f"{found['from_logits']} from logits; memory is the peak beyond the operands, gradients included.",
        "",
        "|  | TRL, ms | ours, ms | TRL's takes | TRL, MB | ours, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        (theirs, ours), (their_bytes, our_bytes) = (
            [row[key][who] for who in ("TRL", "ours")] for key in ("ms", "bytes")
        )
        sizes = f"{their_bytes / 1e6:.0f} | {our_bytes / 1e6:.0f}"
        lines.append(f"| {name} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.1f}x | {sizes} |")
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("trl_functions", table)


def main() -> int:
    """Measure every function, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = {name: measured(make, arguments.rounds) for name, make in cases().items()}
    found: dict[str, Any] = {"environment": report.environment("cpu"), "trl": trl.__version__, "rows": rows}
    found |= {"vocab": VOCAB, "width": WIDTH, "from_states": FROM_STATES, "from_logits": FROM_LOGITS}
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
