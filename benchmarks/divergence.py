"""Times a divergence from a teacher: beside GRPO and alone, from logits and from hidden states.

    python benchmarks/divergence.py --out benchmarks/results/MACHINE    # about six minutes on two cores

The workloads are those of ``python -m grpo_kernels bench``, with a teacher: other logits, or other hidden states with a
head of their own. The peers compute the divergence alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from outputs import Outputs
from torch import Tensor
from torch.nn.functional import kl_div

from grpo_kernels import Divergence, LossConfig, Teacher, grpo_loss, linear_grpo_loss
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import run
from grpo_kernels.bench.providers import Provider, eager_loss
from grpo_kernels.bench.workload import DTYPES, Spec, Workload

REVERSE, JSD = Divergence("reverse_kl"), Divergence("jsd")
WIDER = 2
"""The teacher's hidden size over the policy's."""
GEMMS = "bare GEMMs"

_TEACHERS: weakref.WeakKeyDictionary[Workload, tuple[Tensor, ...]] = weakref.WeakKeyDictionary()


def teacher_tensors(work: Workload) -> tuple[Tensor, ...]:
    """Return the teacher's logits, near the policy's, or its hidden states and head."""
    spec = work.spec
    if work not in _TEACHERS:
        generator = torch.Generator(spec.device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=spec.device)

        if spec.hidden is None:
            logits = work.kept.float() + 0.3 * normal(*work.kept.shape)
            _TEACHERS[work] = (logits.to(DTYPES[spec.dtype]),)
        else:
            width = WIDER * spec.hidden
            hidden, weight = normal(*work.shape, width), 2 * width**-0.5 * normal(spec.vocab, width)
            _TEACHERS[work] = hidden.to(DTYPES[spec.dtype]), weight.to(DTYPES[spec.dtype])
    return _TEACHERS[work]


def teacher(work: Workload) -> Teacher:
    tensors = teacher_tensors(work)
    return Teacher(logits=tensors[0]) if len(tensors) == 1 else Teacher(hidden=tensors[0], weight=tensors[1])


# Ours


def ours(divergence: Divergence | None, alone: bool, inplace: bool) -> Callable[[Workload], Tensor]:
    """Return GRPO with a divergence or without one, or the divergence ``alone``."""

    def loss(work: Workload) -> Tensor:
        config = LossConfig(surrogate=None) if alone else work.config
        config = config if divergence is None else _with(config, divergence)
        known: dict[str, Any] = {} if alone else work.known()
        known |= {} if divergence is None else {"teacher": teacher(work)}
        arguments = (work.ids, None if alone else work.advantages, work.mask)
        if work.spec.hidden is not None:
            return linear_grpo_loss(*work.operands(), *arguments, **known, config=config).loss
        in_place = inplace and torch.is_grad_enabled()
        return grpo_loss(work.logits(), *arguments, **known, config=config, inplace=in_place).loss

    return loss


def _with(config: LossConfig, divergence: Divergence) -> LossConfig:
    changes = {name: getattr(config, name) for name in ("surrogate", "level", "aggregation", "kl")}
    return LossConfig(**changes, divergence=divergence)


# PyTorch, and the packages that have it


def mean_of(divergence: Tensor, mask: Tensor) -> Tensor:
    """Return the sequences' means of (B, T), averaged."""
    return ((divergence * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def reverse_kl(logits: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Compute KL(p‖q) as people write it, in fp32."""
    log_p, log_q = torch.log_softmax(logits.float(), -1), torch.log_softmax(other.float(), -1)
    return mean_of(kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1), mask)


def jsd(logits: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Compute the JSD of GKD at a half, in fp32."""
    log_p, log_q = torch.log_softmax(logits.float(), -1), torch.log_softmax(other.float(), -1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0))
    values = sum(kl_div(log_m, each, reduction="none", log_target=True) for each in (log_p, log_q))
    return mean_of(0.5 * values.sum(-1), mask)  # type: ignore[union-attr]


def both(logits: Tensor, other: Tensor, ids: Tensor, rest: tuple[Any, ...], mask: Tensor) -> Tensor:
    """Compute GRPO's loss and the reverse KL."""
    return eager_loss(logits, ids, *rest, True)[0] + reverse_kl(logits, other, mask)


def plain(function: Callable[[Tensor, Tensor, Tensor], Tensor], compiled: bool) -> Callable[[Workload], Tensor]:
    made = torch.compile(function) if compiled else function
    return lambda work: made(work.logits(), teacher_tensors(work)[0], work.mask)


def plain_both(compiled: bool) -> Callable[[Workload], Tensor]:
    made = torch.compile(both) if compiled else both
    return lambda work: made(work.logits(), teacher_tensors(work)[0], work.ids, work.rest(), work.mask)


def trl(beta: float) -> Callable[[Workload], Tensor]:
    """TRL's chunked divergence, that of its DistillationTrainer."""
    import trl.trainer.utils  # noqa: F401  its backward needs it
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(work: Workload) -> Tensor:
        hidden, weight = work.operands()
        of_teacher, head = teacher_tensors(work)
        arguments = (hidden.flatten(0, 1), weight, None, of_teacher.flatten(0, 1), head, None, beta)
        return ChunkedDivergenceFunction.apply(*arguments)[0].view(work.shape).float().mean()

    return loss


def liger_jsd() -> Callable[[Workload], Tensor]:
    """Liger's chunked JSD; its Triton kernels need a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

    def loss(work: Workload) -> Tensor:
        hidden, weight = work.operands()
        of_teacher, head = (tensor.flatten(0, -2) for tensor in teacher_tensors(work))
        value = module(hidden.flatten(0, 1), weight, of_teacher, head, work.ids.flatten())
        return value[0] if isinstance(value, tuple) else value

    return loss


class _Product(torch.autograd.Function):
    """The GEMMs of a policy's head and of a teacher's, 6·N·H·V + 2·N·H'·V operations, and nothing between them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, of_teacher: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        other = of_teacher @ head.t()
        ctx.save_for_backward(logits @ weight, logits.t() @ hidden)
        return logits[0, 0] + other[0, 0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None, None


def gemms(work: Workload) -> Tensor:
    hidden, weight = work.operands()
    of_teacher, head = teacher_tensors(work)
    value: Tensor = _Product.apply(hidden.flatten(0, 1), weight, of_teacher.flatten(0, 1), head)
    return value.float()


def made(name: str, loss: Callable[[Workload], Tensor], copies: float, is_ours: bool = False) -> Provider:
    """Return a provider that takes ``copies`` fp32 tensors of the logits' size."""
    return Provider(name, loss, lambda spec: 4 * copies * spec.tokens * spec.vocab, False, is_ours)


def from_logits(spec: Spec) -> list[Provider]:
    """Return ours and PyTorch's on a workload of logits."""
    mine = [
        ("grpo", ours(None, False, False), False), ("grpo, in place", ours(None, False, True), True),
        ("grpo + reverse KL", ours(REVERSE, False, False), False),
        ("grpo + reverse KL, in place", ours(REVERSE, False, True), True),
        ("reverse KL", ours(REVERSE, True, False), False), ("reverse KL, in place", ours(REVERSE, True, True), True),
        ("JSD, in place", ours(JSD, True, True), True),
    ]  # fmt: skip
    torch.compiler.reset()
    return [
        *(made(name, loss, 0.05 if inplace else 1.05, True) for name, loss, inplace in mine),
        made("eager, grpo + reverse KL", plain_both(False), 8),
        made("torch.compile, grpo + reverse KL", plain_both(True), 4),
        made("eager, reverse KL", plain(reverse_kl, False), 7),
        made("torch.compile, reverse KL", plain(reverse_kl, True), 4),
        made("eager, JSD", plain(jsd, False), 9),
    ]


def from_hidden(spec: Spec) -> list[Provider]:
    """Return ours, the GEMMs by themselves, TRL's and Liger's on a workload of hidden states."""
    found = [
        made(GEMMS, gemms, 3),
        made("reverse KL", ours(REVERSE, True, False), 2, True),
        made("JSD", ours(JSD, True, False), 2, True),
        made("grpo + reverse KL", ours(REVERSE, False, False), 2, True),
    ]
    for name, make in (
        ("TRL, reverse KL", lambda: trl(1.0)),
        ("TRL, JSD", lambda: trl(0.5)),
        ("Liger, JSD", liger_jsd),
    ):
        try:
            found.append(made(name, make(), 6))
        except ImportError as error:
            print(f"{name}: left out, {error}")
    return found


def providers(spec: Spec) -> list[Provider]:
    return from_logits(spec) if spec.hidden is None else from_hidden(spec)


def without_errors(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the engine's errors: they are beside GRPO alone, another loss than these."""
    for numbers in row["providers"].values():
        for error in ("loss_error", "gradient_error"):
            numbers.pop(error, None)
    return row


def table(found: dict[str, Any]) -> str:
    """Return two tables, from logits and from hidden states: milliseconds, and multiples of the first line's."""
    environment = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["peers"].items())
    lines = [
        f"{report.caption(environment)}; {versions}. Median milliseconds of loss and gradient, at tokens × vocabulary."
    ]
    for start, rows in (("logits", found["logits"]), ("hidden states", found["hidden"])):
        names = list(rows[0]["providers"])
        lines += ["", *report.table_head([f"from {start}", *(report.title(row) for row in rows)])]
        for name in names:
            cells = []
            for row in rows:
                first, own = (report.milliseconds(row, each) for each in (names[0], name))
                cells.append("–" if own is None or first is None else f"{own:.1f} ({own / first:.2f}x)")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("divergence", table)


def peers() -> dict[str, str]:
    """Return the versions of the packages that ours is beside."""
    import importlib.metadata

    found = {}
    for name in ("torch", "trl", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Measure, print the tables, and write them."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logits = [
        Spec(tokens, vocab, dtype, device=arguments.device)
        for tokens, vocab, dtype in ((256, 151_936, "fp32"), (256, 151_936, "bf16"), (512, 32_000, "fp32"))
    ]
    hidden = [Spec(512, 32_000, dtype, 1024, device=arguments.device) for dtype in ("fp32", "bf16")]
    found: dict[str, Any] = {"environment": report.environment(arguments.device), "peers": peers()}
    for name, specs in (("logits", logits), ("hidden", hidden)):
        found[name] = [without_errors(row) for row in run(specs, providers, arguments.rounds, progress=print)]
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
