"""A teacher beside hidden states: its logits of some live rows at a time, of its own states and head, or gathered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from ..backends.contract import Rows
from ..backends.spec import LogitArgs, numbers_vector
from ..objectives.checks import check_device
from ..objectives.divergence import Divergence
from .arguments import check_head, check_logit_args, check_logits
from .chunks import LiveRows
from .divergence import Beside, Stats, Whole, check_columns, check_rows, refuse_shards, teacher_temperatures
from .head import HeadTensors, Wants, head_kind, operand_dtype
from .recorded_teacher import read_recorded
from .teacher import Teacher, check_is_teacher, first_columns, teacher_args
from .tokens import RowTokens

if TYPE_CHECKING:
    from ..objectives.groups import Group

RowsOf = Callable[[int, int, Tensor, Tensor], Beside]
"""The teacher's rows of live rows [first, last), of their token ids and which of them are none; until the next call."""


class SweptTeacher(Protocol):
    """A teacher beside a sweep over hidden states."""

    fields: ClassVar[int]
    """Of its ``Stats``."""

    @staticmethod
    def known(stats: Stats) -> Stats:
        """As that of ``Beside``."""

    @property
    def row_bytes(self) -> int:
        """Of a row of a chunk."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a walk reads, and ``of`` makes it of again."""

    def of(self, tensors: tuple[Tensor | None, ...]) -> SweptTeacher:
        """Return the same of other tensors."""

    def from_row(self, first: int, tokens: RowTokens, divergence: Divergence) -> SweptTeacher:
        """As that of ``Beside``."""

    def walk(self, live_rows: LiveRows) -> RowsOf:
        """Return what gives the rows of chunk after chunk."""


_Adapter = tuple[Tensor, Tensor] | None


def beside_teacher(
    function: str,
    teacher: Teacher,
    head: tuple[Tensor, Tensor | None, _Adapter],
    hidden: Tensor,
    vocab_group: Group | None,
    vocab_start: int | None,
    vocab_size: int | None,
) -> tuple[Teacher, tuple[Tensor, Tensor | None, _Adapter]]:
    """Return teacher and head (weight, bias, adapter) over the columns that count."""
    weight, bias, adapter = head
    check_is_teacher(function, teacher)
    refuse_shards(function, vocab_group, vocab_start, (weight, hidden))
    if vocab_size is None:
        return teacher, head
    paired = isinstance(adapter, (tuple, list)) and len(adapter) == 2 and isinstance(adapter[1], Tensor)
    of_adapter = adapter[1] if adapter is not None and paired else None  # or it is refused with what it should be
    teacher, (own, own_bias, own_adapter) = first_columns(function, vocab_size, teacher, 0, weight, bias, of_adapter)
    assert own is not None
    return teacher, (own, own_bias, adapter if own_adapter is None or adapter is None else (adapter[0], own_adapter))


def dtype_beside(teacher: Teacher, logits_dtype: torch.dtype | None) -> torch.dtype | None:
    """Return that of a teacher's logits as a call makes them, by autocast and ``logits_dtype``; None where there are
    none."""
    return teacher.dtype if teacher.hidden is None else _dtype_of(operand_dtype(teacher.hidden), logits_dtype)


def _dtype_of(operands: torch.dtype, logits_dtype: torch.dtype | None) -> torch.dtype:
    """Return that of the logits of a GEMM of such operands."""
    return logits_dtype if logits_dtype is not None and operands.itemsize == 2 else operands


def read_teacher_states(
    tokens: RowTokens,
    teacher: Teacher,
    divergence: Divergence,
    logit_args: LogitArgs,
    logits_dtype: torch.dtype | None,
    check: bool | None,
) -> SweptTeacher:
    """Return a teacher in any of its forms. Raises as ``read_teacher``."""
    if teacher.token_ids is not None:
        return read_recorded(tokens, teacher, divergence, logit_args)
    return TeacherStates.read(tokens, teacher, divergence, logit_args, logits_dtype, check)


@dataclass(frozen=True)
class TeacherStates:
    """A teacher beside a sweep over hidden states."""

    states: Tensor
    """Its hidden states, or its logits: (B, T or T+1, K) or (N, K)."""
    head: HeadTensors | None
    """None: the states are the logits."""
    operands: torch.dtype
    dtype: torch.dtype
    """Of its logits."""
    columns: int
    numbers: Tensor
    softcap: bool
    kind: int
    temperature: Tensor | None
    """Of each token's row, (B, T); None: the one among the numbers."""

    fields: ClassVar[int] = Whole.fields

    @staticmethod
    def known(stats: Stats) -> Stats:
        return Whole.known(stats)

    @classmethod
    def read(
        cls,
        tokens: RowTokens,
        teacher: Teacher,
        divergence: Divergence,
        logit_args: LogitArgs,
        logits_dtype: torch.dtype | None,
        check: bool | None,
    ) -> TeacherStates:
        """Read a teacher of logits or of hidden states.

        Raises:
            ValueError, TypeError: tensors that do not fit the tokens or each other, or another vocabulary than the
                policy's.
        """
        function, head = tokens.function, None
        if teacher.hidden is not None and teacher.weight is not None:
            head = HeadTensors(teacher.hidden.detach(), teacher.weight.detach(), teacher.bias)
            name, states, columns = "teacher.hidden", head.hidden, head.weight.shape[0]
        else:
            assert teacher.logits is not None
            name, states, columns = "teacher.logits", teacher.logits.detach(), teacher.logits.shape[-1]
        own = {f"teacher.{name}": value for name, value in teacher.tensors.items() if value is not None}
        named = {**tokens.tensors, **own}
        if head is None:
            check_logits(function, states, named, name=name)
            operands = dtype = states.dtype
        else:
            check_head(f"{function}: teacher", head, named)
            operands = operand_dtype(head.hidden)
            dtype = _dtype_of(operands, logits_dtype)
        check_device(function, named)
        check_rows(tokens, name, states, named)
        check_columns(tokens, columns, named)
        args = teacher_args(teacher, divergence, logit_args.temperature)
        check_logit_args(f"{function}: teacher", args, check)
        numbers = numbers_vector(args, 1.0, None, tokens.real, states.device)
        softcap = args.logit_softcap is not None
        temperature = teacher_temperatures(tokens, divergence, args)
        return cls(states, head, operands, dtype, columns, numbers, softcap, divergence.kernel_id, temperature)

    @property
    def row_bytes(self) -> int:
        """Return those of a row of a chunk: its logits, and its states."""
        states = 0 if self.head is None else self.states.shape[-1] * self.operands.itemsize
        return self.columns * self.dtype.itemsize + states

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.states,) if self.head is None else self.head

    def of(self, tensors: tuple[Tensor | None, ...]) -> TeacherStates:
        head = None if self.head is None else HeadTensors(*tensors)  # type: ignore[arg-type]
        return replace(self, states=tensors[0], head=head)  # type: ignore[arg-type]

    def from_row(self, first: int, tokens: RowTokens, divergence: Divergence) -> TeacherStates:
        states = self.states[..., first : first + tokens.live.shape[1], :]
        head = None if self.head is None else self.head._replace(hidden=states)
        own = None if self.temperature is None else tokens.temperature
        return replace(self, states=states, head=head, kind=divergence.kernel_id, temperature=own)

    def walk(self, live_rows: LiveRows) -> RowsOf:
        """Return what gives the rows of chunk after chunk."""
        make = self._gathered(live_rows) if self.head is None else self._computed(self.head, live_rows)
        temperature = live_rows.take(self.temperature)

        def rows_of(first: int, last: int, token_ids: Tensor, live: Tensor) -> Beside:
            own = None if temperature is None else temperature[:, first:last]
            return Whole(Rows(make(first, last), token_ids, live, self.numbers, self.softcap, own), self.kind)

        return rows_of

    def _gathered(self, live_rows: LiveRows) -> Callable[[int, int], Tensor]:
        return lambda first, last: live_rows.gather(self.states, first, last)

    def _computed(self, head: HeadTensors, live_rows: LiveRows) -> Callable[[int, int], Tensor]:
        device = self.states.device
        gemm = head_kind(device.type, self.operands, self.dtype)(head, self.operands, self.dtype, 1, Wants(), False)
        room = torch.empty(live_rows.longest, self.columns, dtype=self.dtype, device=device)

        def logits(first: int, last: int) -> Tensor:
            gemm.logits([live_rows.gather(self.states, first, last).to(self.operands)], room[: last - first])
            return room[: last - first]

        return logits
