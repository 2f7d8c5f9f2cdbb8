"""Rows beside a teacher's: what a call says of the teacher, their divergence, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import DivergenceStats, RowGradients, Rows, RowStats
from ..backends.spec import LogitArgs, numbers_vector
from ..objectives.checks import check_device, fail, fits
from ..objectives.divergence import Divergence
from .arguments import check_logit_args, check_logits
from .autograd import backward_rows, once
from .sharding import is_dtensor
from .teacher import Teacher, teacher_args
from .tokens import RowTokens

if TYPE_CHECKING:
    from ..objectives.groups import Group


class PairStats(NamedTuple):
    """The statistics of rows beside a teacher's, (B, T)."""

    policy: RowStats
    teacher: RowStats
    divergence: DivergenceStats


Stats = tuple[Tensor, ...]
"""``RowStats``, or the fields of ``PairStats`` one after the other."""
PAIR_FIELDS = 2 * len(RowStats._fields) + len(DivergenceStats._fields)


def flat(stats: PairStats) -> Stats:
    return (*stats.policy, *stats.teacher, *stats.divergence)


def nested(stats: Stats) -> PairStats:
    """Return what ``flat`` was given."""
    rows = len(RowStats._fields)
    return PairStats(RowStats(*stats[:rows]), RowStats(*stats[rows : 2 * rows]), DivergenceStats(*stats[2 * rows :]))


def known_of(stats: Stats) -> Stats:
    """Return log-probs and entropies; with a teacher also divergences and the teacher's entropies."""
    if len(stats) != PAIR_FIELDS:
        return stats[:2]
    pair = nested(stats)
    return *pair.policy[:2], pair.divergence.divergence, pair.teacher.entropy


@dataclass(frozen=True)
class Pair:
    """Rows beside a teacher's, of one vocabulary and for the same tokens."""

    rows: Rows
    teacher: Rows
    kind: int
    backend: str

    def stats(self) -> PairStats:
        policy, teacher = (ops.log_probs(rows, self.backend) for rows in (self.rows, self.teacher))
        values = ops.divergence(self.rows, policy, self.teacher, teacher, self.kind, self.backend)
        return PairStats(policy, teacher, values)

    def gradient(self, stats: PairStats, gradients: RowGradients, grad_divergence: Tensor) -> Tensor:
        """Return the policy's logits' gradient."""
        return ops.divergence_backward(*self._known(stats), gradients, grad_divergence, self.backend)

    def gradient_(self, stats: PairStats, gradients: RowGradients, grad_divergence: Tensor) -> None:
        """Write it over the logits."""
        ops.divergence_backward_(*self._known(stats), gradients, grad_divergence, self.backend)

    def _known(self, stats: PairStats) -> tuple[Rows, RowStats, Rows, RowStats, int, DivergenceStats]:
        return self.rows, stats.policy, self.teacher, stats.teacher, self.kind, stats.divergence


class DivergedLogProbs(torch.autograd.Function):
    """Log-probs, entropies and divergences of rows, differentiable in all three; and the teacher's entropies."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, teacher: Rows, kind: int, backend: str, inplace: bool
    ) -> tuple[Tensor, ...]:
        stats = Pair(rows._replace(logits=logits), teacher, kind, backend).stats()
        ctx.save_for_backward(logits, *rows[1:4], rows.temperature, *teacher[:4], teacher.temperature, *flat(stats))
        ctx.set_materialize_grads(False)
        ctx.softcaps, ctx.kind, ctx.backend, ctx.inplace = (rows.softcap, teacher.softcap), kind, backend, inplace
        ctx.mark_non_differentiable(stats.teacher.entropy)
        return known_of(flat(stats))

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, d: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if g is None and h is None and d is None:
            return None, *nothing
        saved = ctx.saved_tensors
        of_policy, of_teacher = ctx.softcaps
        logits, ids, live, numbers, temperature, *others = saved[:10]
        rows = Rows(logits, ids, live, numbers, of_policy, temperature)
        logits, ids, live, numbers, temperature = others
        teacher = Rows(logits, ids, live, numbers, of_teacher, temperature)
        stats = nested(saved[10:])
        gradients = RowGradients(*(None if slope is None else slope.contiguous() for slope in (g, h)))
        if d is None:
            return backward_rows(rows, stats.policy, gradients, ctx.backend, ctx.inplace), *nothing
        if not ctx.inplace:
            pair = Pair(rows, teacher, ctx.kind, ctx.backend)
            return pair.gradient(stats, gradients, d.contiguous()), *nothing
        target = rows._replace(logits=rows.logits.detach())
        Pair(target, teacher, ctx.kind, ctx.backend).gradient_(stats, gradients, d.contiguous())
        return target.logits, *nothing


class Beside(NamedTuple):
    """A teacher's logits beside the policy's."""

    teacher: Rows
    kind: int


def read_teacher(
    tokens: RowTokens,
    teacher: Teacher,
    divergence: Divergence,
    logit_args: LogitArgs,
    support: object,
    check: bool | None,
) -> Beside:
    """Return the rows of a teacher's logits.

    Raises:
        ValueError, TypeError: logits that do not fit the tokens, or another number of columns than the policy's;
            ``support=``.
    """
    function, logits = tokens.function, teacher.logits
    if support is not None:
        hint = "a divergence is of the whole vocabulary: leave support= to a call without teacher="
        fail(function, "no support= with teacher=", type(support).__name__, tokens.tensors, hint)
    if logits is None:
        hint = "linear_grpo_loss takes them; here, teacher logits = hidden @ weight.T + bias"
        fail(function, "a teacher of logits beside logits", f"one of {teacher.form}", tokens.tensors, hint)
    named = {**tokens.tensors, "teacher.logits": logits}
    check_logits(function, logits, named)
    check_device(function, named)
    check_rows(tokens, "teacher.logits", logits, named)
    check_columns(tokens, logits.shape[-1], named)
    args = teacher_args(teacher, divergence, logit_args.temperature)
    check_logit_args(function, args, check)
    numbers = numbers_vector(args, 1.0, None, tokens.real, logits.device)
    rows = Rows(logits.detach(), tokens.token_ids, tokens.live, numbers, args.logit_softcap is not None)
    return Beside(rows, divergence.kernel_id)


def check_rows(tokens: RowTokens, name: str, states: Tensor, named: dict[str, object]) -> None:
    """Raise unless a teacher has a row for every token, or one more a sequence."""
    *leading, length = tokens.shape
    if not fits(states[..., 0], (*leading, length), (*leading, length + 1)):
        expected = f"{name} with rows {(*leading, length)}, those of the tokens, or one more a sequence"
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


def refuse_shards(
    function: str, vocab_group: Group | None, vocab_start: int | None, tensors: tuple[object, ...]
) -> None:
    """Raise where a call with a teacher has a vocabulary that lies on several ranks."""
    if vocab_group is not None or vocab_start is not None or any(is_dtensor(tensor) for tensor in tensors):
        hint = "without a teacher= a vocabulary may lie on several ranks; ref_log_probs= with KL(...) works there"
        fail(function, "no vocabulary over ranks with teacher=", "vocab_group=, vocab_start= or DTensors", hint=hint)
