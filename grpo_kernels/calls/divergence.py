"""Rows beside a teacher's: what a call says of the teacher, their divergence, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..backends import ops
from ..backends.contract import DivergenceStats, RowGradients, Rows, RowStats
from ..backends.spec import LogitArgs, numbers_vector
from ..objectives.checks import check_device, fail, fits, ordinary
from ..objectives.divergence import Divergence
from .arguments import check_logit_args, check_logits
from .autograd import backward_rows, once
from .contents import TeacherRows, check_teacher_shift
from .recorded_teacher import read_recorded
from .sharding import is_dtensor
from .teacher import Teacher, teacher_args
from .temperature import check_quotients
from .tokens import RowTokens

if TYPE_CHECKING:
    from ..objectives.groups import Group

Stats = tuple[Tensor, ...]
"""What is known of every row, (B, T) each; of which fields depends on the teacher's form, the policy's come first."""


class Beside(Protocol):
    """A teacher beside rows of logits."""

    fields: ClassVar[int]
    """Of its ``Stats``."""

    def stats(self, rows: Rows, backend: str) -> Stats:
        """Return what is known of rows and their teacher."""

    @staticmethod
    def known(stats: Stats) -> Stats:
        """Return log-probs, entropies, divergences and the teacher's entropies."""

    def gradient(
        self, rows: Rows, stats: Stats, slopes: RowGradients, grad_divergence: Tensor, backend: str, inplace: bool
    ) -> Tensor:
        """Return the logits' gradient, in a tensor of its own or over the logits."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What backward saves, and ``of`` makes it of again."""

    def of(self, tensors: tuple[Tensor | None, ...]) -> Beside:
        """Return the same of other tensors."""

    def from_row(self, first: int, tokens: RowTokens, divergence: Divergence) -> Beside:
        """Return the rows from ``first`` on beside other tokens, as many, for another divergence."""


@dataclass(frozen=True)
class Whole:
    """A teacher's logits beside the policy's."""

    teacher: Rows
    kind: int

    fields: ClassVar[int] = 2 * len(RowStats._fields) + len(DivergenceStats._fields)

    def stats(self, rows: Rows, backend: str) -> Stats:
        policy, teacher = ops.log_probs(rows, backend), ops.log_probs(self.teacher, backend)
        return (*policy, *teacher, *ops.divergence(rows, policy, self.teacher, teacher, self.kind, backend))

    @staticmethod
    def known(stats: Stats) -> Stats:
        policy, teacher, divergence = _parts(stats)
        return policy.log_prob, policy.entropy, divergence.divergence, teacher.entropy

    def gradient(
        self, rows: Rows, stats: Stats, slopes: RowGradients, grad_divergence: Tensor, backend: str, inplace: bool
    ) -> Tensor:
        policy, teacher, divergence = _parts(stats)
        arguments = (policy, self.teacher, teacher, self.kind, divergence, slopes, grad_divergence, backend)
        if not inplace:
            return ops.divergence_backward(rows, *arguments)
        target = rows._replace(logits=rows.logits.detach())
        ops.divergence_backward_(target, *arguments)
        return target.logits

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.teacher[:4], self.teacher.temperature

    def of(self, tensors: tuple[Tensor | None, ...]) -> Whole:
        logits, ids, live, numbers, temperature = tensors
        rows = Rows(logits, ids, live, numbers, self.teacher.softcap, temperature)  # type: ignore[arg-type]
        return replace(self, teacher=rows)

    def from_row(self, first: int, tokens: RowTokens, divergence: Divergence) -> Whole:
        logits = self.teacher.logits[..., first : first + tokens.live.shape[1], :]
        own = None if self.teacher.temperature is None else tokens.temperature
        rows = Rows(logits, tokens.token_ids, tokens.live, self.teacher.numbers, self.teacher.softcap, own)
        return Whole(rows, divergence.kernel_id)


def _parts(stats: Stats) -> tuple[RowStats, RowStats, DivergenceStats]:
    rows = len(RowStats._fields)
    return RowStats(*stats[:rows]), RowStats(*stats[rows : 2 * rows]), DivergenceStats(*stats[2 * rows :])


class DivergedLogProbs(torch.autograd.Function):
    """Log-probs, entropies and divergences of rows, differentiable in all three; and the teacher's entropies."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, beside: Beside, backend: str, inplace: bool
    ) -> tuple[Tensor, ...]:
        stats = beside.stats(rows._replace(logits=logits), backend)
        of_teacher = beside.tensors
        if ctx.needs_input_grad[0]:
            of_teacher = tuple(None if tensor is None else ordinary(tensor)[0] for tensor in of_teacher)
        ctx.save_for_backward(logits, *rows[1:4], rows.temperature, *of_teacher, *stats)
        ctx.set_materialize_grads(False)
        # Without its tensors: what is saved is given back after backward, though somebody keeps the loss.
        ctx.beside = beside.of((None,) * len(of_teacher))
        ctx.softcap, ctx.count = rows.softcap, 5 + len(of_teacher)
        ctx.backend, ctx.inplace = backend, inplace
        known = beside.known(stats)
        ctx.mark_non_differentiable(known[3])
        return known

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, d: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if g is None and h is None and d is None:
            return None, *nothing
        logits, ids, live, numbers, temperature, *others = ctx.saved_tensors  # once: checkpointing packs anew
        rows = Rows(logits, ids, live, numbers, ctx.softcap, temperature)
        beside, stats = ctx.beside.of(tuple(others[: ctx.count - 5])), tuple(others[ctx.count - 5 :])
        slopes = RowGradients(*(None if slope is None else slope.contiguous() for slope in (g, h)))
        if d is None:
            return backward_rows(rows, RowStats(*stats[:4]), slopes, ctx.backend, ctx.inplace), *nothing
        return beside.gradient(rows, stats, slopes, d.contiguous(), ctx.backend, ctx.inplace), *nothing


def refuse_support(tokens: RowTokens, support: object) -> NoReturn:
    """Raise: there is no divergence of a part of the vocabulary."""
    hint = "a divergence is of the whole vocabulary: leave support= to a call without teacher="
    fail(tokens.function, "no support= with teacher=", type(support).__name__, tokens.tensors, hint)


def read_teacher(
    tokens: RowTokens,
    teacher: Teacher,
    divergence: Divergence,
    logit_args: LogitArgs,
    support: object,
    check: bool | None,
) -> Beside:
    """Return a teacher of logits, or of recorded log-probs.

    Raises:
        ValueError, TypeError: tensors that do not fit the tokens, or another number of columns than the policy's;
            ``support=``.
    """
    function, logits = tokens.function, teacher.logits
    if support is not None:
        refuse_support(tokens, support)
    if teacher.token_ids is not None:
        return read_recorded(tokens, teacher, divergence, logit_args)
    if logits is None:
        hint = "linear_grpo_loss takes them; here, teacher logits = hidden @ weight.T + bias"
        fail(function, "a teacher of logits beside logits", f"one of {teacher.form}", tokens.tensors, hint)
    named = {**tokens.tensors, "teacher.logits": logits}
    check_logits(function, logits, named, name="teacher.logits")
    check_device(function, named)
    check_rows(tokens, "teacher.logits", logits, named)
    check_columns(tokens, logits.shape[-1], named)
    args = teacher_args(teacher, divergence, logit_args.temperature)
    check_logit_args(f"{function}: teacher", args, check)
    numbers = numbers_vector(args, 1.0, None, tokens.real, logits.device)
    own = teacher_temperatures(tokens, divergence, args)
    rows = Rows(logits.detach(), tokens.token_ids, tokens.live, numbers, args.logit_softcap is not None, own)
    return Whole(rows, divergence.kernel_id)


TOTAL_VARIATION = Divergence("tvd")


def check_teacher_rows(tokens: RowTokens, beside: Beside, backend: str, logit_args: LogitArgs) -> None:
    """With checks on, raise where a teacher's rows look shifted. Waits for the device."""
    if not (tokens.checks and tokens.looks) or tokens.live.shape[1] < 3:
        return
    inner, where = tokens.inner(), tokens.states.device
    numbers = numbers_vector(logit_args, 1.0, None, tokens.real, where, divergence=TOTAL_VARIATION)

    def rows_beside(first: int, ids: Tensor) -> TeacherRows:
        part = replace(inner, token_ids=ids)
        rows = part.rows(numbers, logit_args.logit_softcap is not None)
        teacher = beside.from_row(first, part, TOTAL_VARIATION)
        log_prob, _, apart, _ = teacher.known(teacher.stats(rows._replace(logits=rows.logits.detach()), backend))
        return TeacherRows(apart, log_prob)

    check_teacher_shift(tokens, inner, rows_beside)


def teacher_temperatures(tokens: RowTokens, divergence: Divergence, args: LogitArgs) -> Tensor | None:
    """Return those of the teacher's rows, (B, T): the policy's; None where the teacher has a number. Raise where they
    do not go with its ``args``."""
    if tokens.temperature is None or divergence.teacher_temperature is not None:
        return None
    check_quotients(tokens, tokens.temperature, args)
    return tokens.temperature


def check_rows(tokens: RowTokens, name: str, states: Tensor, named: dict[str, object]) -> None:
    """Raise unless a teacher has a row for every token, or one more a sequence."""
    batch, length = tokens.live.shape
    packed = ((1,), ()) if batch == 1 else ((batch,),)  # (1, N, V) and (N, V) alike
    shapes = [(*leading, length + more) for leading in packed for more in (0, 1)]
    if not fits(states[..., 0], *shapes):
        expected = f"{name} with rows {tuple(tokens.shape)}, those of the tokens, or one more a sequence"
        fail(tokens.function, expected, str(tuple(states.shape[:-1])), named)


def check_columns(tokens: RowTokens, columns: int, named: dict[str, object]) -> None:
    """Raise unless a teacher has the policy's vocabulary."""
    if columns != tokens.columns:
        hint = f"vocab_size={min(columns, tokens.columns)}: both softmaxes run over the first columns, padding has none"
        expected = f"a teacher of the policy's {tokens.columns} columns, or vocab_size="
        fail(tokens.function, expected, f"{columns}", named, hint)


def refuse_columns_inplace(function: str, inplace: bool) -> bool:
    """Raise where the gradient should lie over logits of which some columns do not count; return False."""
    if inplace:
        fail(function, "inplace=False with vocab_size= beside a teacher", "inplace=True")
    return False


def refuse_shared_memory(tokens: RowTokens, teacher: Teacher) -> None:
    """Raise where the policy's gradient would be written over a teacher's logits, which rows that follow are to read.
    Logits of both models that lie one behind the other, as of one batch, share nothing."""
    other = teacher.logits
    if other is None or other.is_meta or isinstance(other, FakeTensor) or torch.compiler.is_compiling():
        return
    (first, last), (start, end) = _extent(tokens.states), _extent(other)
    if first < end and start < last:
        hint = "inplace=False, or Teacher(logits=teacher_logits.clone())"
        expected = "a teacher's logits in memory of their own with inplace=True"
        got = "some in that of the policy's, which its gradient overwrites"
        fail(tokens.function, expected, got, {**tokens.tensors, "teacher.logits": other}, hint)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of that behind its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def refuse_shards(
    function: str, vocab_group: Group | None, vocab_start: int | None, tensors: tuple[object, ...]
) -> None:
    """Raise where a call with a teacher has a vocabulary that lies on several ranks."""
    if vocab_group is not None or vocab_start is not None or any(is_dtensor(tensor) for tensor in tensors):
        hint = "without a teacher= a vocabulary may lie on several ranks; ref_log_probs= with KL(...) works there"
        fail(function, "no vocabulary over ranks with teacher=", "vocab_group=, vocab_start= or DTensors", hint=hint)


UNREAD = "a recorded teacher: its columns are written beside the kernels' gradient"
"""Why such a call takes two passes."""


def why_unfused(teacher: Teacher | None) -> str | None:
    """Return why a call takes two passes whatever its backend has; None where it may take one."""
    return UNREAD if teacher is not None and teacher.form == "token_ids" else None
