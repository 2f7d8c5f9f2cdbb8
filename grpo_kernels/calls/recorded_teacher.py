"""A teacher of which some log-probs a token were recorded: of its likeliest tokens, and so the mass of the others.

The policy's row becomes as many outcomes, the recorded tokens and the rest in one. With G = ∂D/∂(log-mass of an
outcome), that of a softmax over outcomes,

    ∂D/∂z_j = G_j at a recorded token,    p_j·G_rest/p_rest at the others:

the gradient is that of log-probs with another slope, which the kernels write, and some columns a row written anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..backends.contract import RowGradients, Rows, RowStats
from ..backends.eager_rows import capped, factor_of
from ..backends.spec import LogitArgs, without_softcap
from ..objectives.checks import INTEGER_DTYPES, check_device, check_shape, fail
from ..objectives.compiler import outside_graphs
from ..objectives.divergence import KINDS, Divergence
from ..objectives.maths import weighed
from ..objectives.sequences import accumulate_dtype
from .autograd import backward_rows
from .chunks import LiveRows
from .teacher import Teacher
from .tokens import RowTokens

CHUNK_ELEMENTS = 1 << 22
"""Columns of rows that are copied at a time to sum their rest."""
LEAST_REST = 2.0**-24
"""The mass below which fp32 log-probs say nothing of the rest: with a rounded sum's 0 a reverse KL is infinite."""
_ALIKE = 1e-6
"""How far apart, relatively, two temperatures are one."""
_MORE_THAN_ALL = 1e-3
"""Of the mass of recorded log-probs above 1: rounding of theirs."""


class _Outcomes(NamedTuple):
    """The outcomes of N rows with k recorded tokens, in the accumulation dtype."""

    log_p: Tensor
    """(N, k) of the policy, over the whole vocabulary; -inf where absent."""
    gradient: Tensor
    """(N, k): G"""
    rest: Tensor
    """(N,): G_rest/p_rest"""
    divergence: Tensor
    """(N,)"""


@dataclass(frozen=True)
class RecordedTeacher:
    """Recorded log-probs of N rows, as the divergence sees them."""

    token_ids: Tensor
    """int64 (N, k), -1 where absent."""
    log_q: Tensor
    """(N, k); -inf where absent, and of a token that the teacher finds impossible."""
    log_rest: Tensor
    """(N,) of all other tokens together; -inf where there are none, or they have no part."""
    divergence: Divergence

    fields: ClassVar[int] = len(RowStats._fields) + 3
    row_bytes: ClassVar[int] = 0

    def stats(self, rows: Rows, backend: str) -> tuple[Tensor, ...]:
        stats = ops.log_probs(rows, backend)
        log_rest = self._policy_rest(rows, stats, backend)
        divergence = self._outcomes(rows, stats, log_rest).divergence
        shape, real = rows.token_ids.shape, rows.numbers.dtype
        own = (values.view(shape).to(real) for values in (divergence, self._entropy(), log_rest))
        return *stats, *(torch.where(rows.live, values, 0.0) for values in own)

    @staticmethod
    def known(stats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *stats[:2], *stats[4:6]

    def gradient(
        self,
        rows: Rows,
        stats: tuple[Tensor, ...],
        slopes: RowGradients,
        grad_divergence: Tensor,
        backend: str,
        inplace: bool,
    ) -> Tensor:
        of_rows, shape = RowStats(*stats[:4]), rows.token_ids.shape
        outcomes = self._outcomes(rows, of_rows, stats[6].reshape(-1))
        dtype = outcomes.rest.dtype

        def flat(slope: Tensor | None) -> Tensor:
            at_rows = torch.zeros(shape, dtype=dtype, device=rows.live.device) if slope is None else slope.to(dtype)
            return torch.where(rows.live, at_rows, 0.0).reshape(-1)

        g, h, weight = flat(slopes.grad_log_prob), flat(slopes.grad_entropy), flat(grad_divergence)
        rest = weighed(weight, outcomes.rest)
        columns, values = self._columns(rows, of_rows, outcomes, g, h, weight, rest)
        moved = (g - rest).view(shape).to(rows.numbers.dtype)
        out = backward_rows(rows, of_rows, slopes._replace(grad_log_prob=moved), backend, inplace)
        columns, values = (each.view(*shape, each.shape[-1]) for each in (columns, values))
        rows.row_view(out).scatter_(-1, columns, values.to(out.dtype))
        return out

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.log_q, self.log_rest

    def of(self, tensors: tuple[Tensor | None, ...]) -> RecordedTeacher:
        token_ids, log_q, log_rest = tensors
        return replace(self, token_ids=token_ids, log_q=log_q, log_rest=log_rest)  # type: ignore[arg-type]

    def from_row(self, first: int, tokens: RowTokens, divergence: Divergence) -> RecordedTeacher:
        batch, count = tokens.live.shape
        own = tuple(values.unflatten(0, (batch, -1))[:, first : first + count].flatten(0, 1) for values in self.tensors)
        return replace(self, divergence=replace(self.divergence, kind=divergence.kind)).of(own)

    def walk(self, live_rows: LiveRows) -> Callable[[int, int, Tensor, Tensor], RecordedTeacher]:
        """Return what gives this of live rows [first, last)."""

        def rows_of(first: int, last: int, _ids: Tensor, _live: Tensor) -> RecordedTeacher:
            index = live_rows.index[first:last]
            return RecordedTeacher(self.token_ids[index], self.log_q[index], self.log_rest[index], self.divergence)

        return rows_of

    def _entropy(self) -> Tensor:
        """Return the teacher's, (N,), of its outcomes."""
        log_q = torch.cat([self.log_q, self.log_rest[:, None]], 1)
        q = log_q.exp()
        return -torch.where(q == 0, 0.0, q * log_q).sum(-1)

    def _policy_rest(self, rows: Rows, stats: RowStats, backend: str) -> Tensor:
        """Return the logarithm, (N,), of the policy's mass on all but the recorded tokens: of its own sum, since 1 less
        their mass has no digits left where they have nearly all."""
        dtype = self.log_q.dtype
        if self.divergence.rest == "renormalize":
            return torch.full_like(self.log_rest, -math.inf)
        whole, length = rows.row_view(rows.logits), max(rows.token_ids.shape[1], 1)
        anchor, log_sum = (torch.zeros_like(values.reshape(-1)) for values in stats[2:])
        numbers = without_softcap(rows.numbers) if rows.softcap else rows.numbers
        count = rows.token_ids.numel()
        for index in torch.arange(count, device=anchor.device).split(max(1, CHUNK_ELEMENTS // rows.vocab)):
            values = whole[index // length, index % length]
            values = capped(values.to(numbers.dtype), rows.numbers)[0] if rows.softcap else values
            ids = self.token_ids[index]
            lost = torch.where(ids < 0, math.inf, -math.inf).to(values.dtype)
            # The least of all that is written there: an absent one's column may be a recorded one's.
            values = values.scatter_reduce(1, ids.clamp(min=0), lost, "amin")
            live = rows.live.reshape(-1)[index][None]
            temperature = None if rows.temperature is None else rows.temperature.reshape(-1)[index][None]
            part = Rows(values[None], torch.zeros_like(index)[None], live, numbers, False, temperature)
            of_rest = ops.log_probs(part, backend)
            anchor[index], log_sum[index] = of_rest.anchor[0], of_rest.log_sum[0]
        distance = (anchor - stats.anchor.reshape(-1)).to(dtype) * factor_of(rows).reshape(-1).to(dtype)
        log_rest = distance + log_sum.to(dtype) - stats.log_sum.reshape(-1).to(dtype)
        return torch.where(anchor == -math.inf, -math.inf, log_rest)

    def _policy(self, rows: Rows, stats: RowStats) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probs at recorded tokens, (N, k), -inf where absent, and dz/dlogit there."""
        dtype = self.log_q.dtype
        ids = self.token_ids.clamp(min=0).view(*rows.token_ids.shape, self.token_ids.shape[-1])
        value = rows.row_view(rows.logits).gather(-1, ids).view(self.token_ids.shape).to(rows.numbers.dtype)
        slope = torch.ones_like(value)
        if rows.softcap:
            value, slope = capped(value, rows.numbers)
        log_prob, _, anchor, log_sum = (values.reshape(-1, 1).to(dtype) for values in stats)
        factor = factor_of(rows).view(-1, 1).to(dtype)
        log_p = (value.to(dtype) - anchor) * factor - log_sum
        log_p = torch.where(self.token_ids == rows.token_ids.reshape(-1, 1), log_prob, log_p)
        return torch.where(self.token_ids < 0, -math.inf, log_p), slope.to(dtype) * factor

    def _outcomes(self, rows: Rows, stats: RowStats, log_rest: Tensor) -> _Outcomes:
        log_p, _ = self._policy(rows, stats)
        seen = torch.cat([log_p, log_rest.to(log_p.dtype)[:, None]], 1)
        log_q = torch.cat([self.log_q, self.log_rest[:, None]], 1)
        if self.divergence.rest == "renormalize":
            total = torch.logsumexp(seen, -1, keepdim=True)
            seen = seen - torch.where(seen == -math.inf, 0.0, total)
            # The policy finds all that was recorded impossible: nothing is left to be renormalised.
            seen = torch.where((total == -math.inf) & (log_q > -math.inf).any(-1, keepdim=True), math.nan, seen)
        p, q = seen.exp(), log_q.exp()
        d = torch.where(seen == log_q, 0.0, seen - log_q)
        columns = self.divergence.columns(p, q, d)
        value = columns.term.sum(-1)
        own = columns.own + torch.zeros_like(p)
        slope = columns.slope + torch.zeros_like(p)
        relative = slope - slope.gather(-1, p.argmax(-1, keepdim=True))
        mean = torch.where(p == 0, 0.0, p * relative).sum(-1, keepdim=True)
        if not KINDS[self.divergence.kind].gradient_at_infinity:
            mean = torch.where(value[:, None] == math.inf, math.nan, mean)
        gradient = own + torch.where(p == 0, 0.0, p * (relative - mean))
        rest = torch.where(p[:, -1] == 0, 0.0, own[:, -1] / p[:, -1] + (relative - mean)[:, -1])
        rest = torch.where(mean[:, 0].isnan(), math.nan, rest)
        return _Outcomes(log_p, gradient[:, :-1], rest, value)

    def _columns(
        self, rows: Rows, stats: RowStats, outcomes: _Outcomes, g: Tensor, h: Tensor, weight: Tensor, rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return columns (N, k+1) of every row that are no softmax's alone, and the gradient there: the drawn token and
        the recorded ones, absent ones as the drawn token again."""
        drawn = rows.token_ids.reshape(-1, 1)
        drawn = torch.where((drawn >= 0) & (drawn < rows.vocab), drawn, 0)
        log_prob, entropy = (values.reshape(-1, 1).to(g.dtype) for values in stats[:2])
        g, h, weight, rest = (values[:, None] for values in (g, h, weight, rest))

        def of_rows(log_p: Tensor, is_drawn: Tensor) -> Tensor:
            p = log_p.exp()
            own = weighed(g, torch.where(is_drawn, -torch.expm1(log_p), -p))
            return own - weighed(h, torch.where(p == 0, 0.0, p * (log_p + entropy)))

        present, is_drawn = self.token_ids >= 0, self.token_ids == drawn
        log_p, slope = self._policy(rows, stats)
        at_recorded = of_rows(log_p, is_drawn) + weighed(weight, outcomes.gradient)
        at_drawn = of_rows(log_prob, torch.ones_like(drawn, dtype=torch.bool)) + weighed(rest, log_prob.exp())
        both = (is_drawn & present).any(-1, keepdim=True)
        recorded_drawn = torch.where(is_drawn & present, at_recorded, 0.0).sum(-1, keepdim=True)
        at_drawn = torch.where(both, recorded_drawn, at_drawn)
        values = torch.cat([at_drawn, torch.where(present, at_recorded, at_drawn)], 1)
        columns = torch.cat([drawn, torch.where(present, self.token_ids, drawn)], 1)
        slopes = self._slope_at(rows, columns, slope.dtype)
        live = rows.live.reshape(-1, 1)
        return torch.where(live, columns, 0), torch.where(live, values * slopes, 0.0)

    @staticmethod
    def _slope_at(rows: Rows, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dz/dlogit at columns (N, c)."""
        factor = factor_of(rows).view(-1, 1).to(dtype)
        if not rows.softcap:
            return factor
        logits = rows.row_view(rows.logits).gather(-1, columns.view(*rows.token_ids.shape, columns.shape[-1]))
        return factor * capped(logits.view(columns.shape).to(rows.numbers.dtype), rows.numbers)[1].to(dtype)


def read_recorded(
    tokens: RowTokens, teacher: Teacher, divergence: Divergence, logit_args: LogitArgs
) -> RecordedTeacher:
    """Return the recorded log-probs of a call's tokens. With ``offsets`` it waits for a device, for the longest.

    Raises:
        ValueError, TypeError, IndexError: shapes, dtypes, ids outside of the vocabulary, log-probs that are none, a
            temperature that they do not have, a divergence that is infinite for what is not recorded.
    """
    function, ids, log_probs, offsets = tokens.function, teacher.token_ids, teacher.log_probs, teacher.offsets
    assert ids is not None
    assert log_probs is not None
    own = {f"teacher.{name}": value for name, value in teacher.tensors.items() if value is not None}
    named = {**tokens.tensors, **own}
    check_device(function, named)
    if ids.dtype not in INTEGER_DTYPES or not log_probs.is_floating_point():
        expected, got = "teacher.token_ids of integers and teacher.log_probs of a floating dtype", f"{ids.dtype}"
        fail(function, expected, f"{got} and {log_probs.dtype}", named, error=TypeError)
    if divergence.rest == "teacher_renormalize" and divergence.kind in ("reverse_kl", "mixed_kl"):
        hint = 'rest="bucket" knows the mass of the rest, rest="renormalize" leaves it out'
        expected = 'a divergence that is finite where the teacher has nothing, with rest="teacher_renormalize"'
        fail(function, expected, divergence.kind, named, hint)
    count = tokens.token_ids.numel()
    if offsets is None:
        if ids.dim() == 0 or tuple(ids.shape[:-1]) not in (tuple(tokens.shape), tuple(tokens.live.shape)):
            expected = f"teacher.token_ids {(*tokens.shape, 'k')}, or offsets="
            fail(function, expected, str(tuple(ids.shape)), named)
        check_shape(function, "teacher.log_probs", log_probs, (tuple(ids.shape),), named)
        k = ids.shape[-1]
        ids, log_q = ids.reshape(count, k), log_probs.detach().reshape(count, k)
    else:
        ids, log_q = _padded(function, ids, log_probs.detach(), offsets, count, named)
    dtype = accumulate_dtype(ids.device)
    absent = ids < 0
    log_q = torch.where(absent, -math.inf, log_q.to(dtype))
    if tokens.looks:
        _check_contents(tokens, ids, log_q, divergence, named)
    log_q = torch.where(ids < tokens.columns, log_q, math.nan)
    ids = torch.where(ids < tokens.columns, ids, 0).to(torch.int64).clamp(min=-1)
    factor = _retempered(tokens, teacher, divergence, logit_args, named)
    return _read_rest(ids, log_q * factor, tokens.columns, divergence)


def _read_rest(ids: Tensor, log_q: Tensor, columns: int, divergence: Divergence) -> RecordedTeacher:
    total = torch.logsumexp(log_q, -1)
    nothing = torch.full_like(total, -math.inf)
    if divergence.rest != "bucket":
        # Only impossible tokens were recorded: nothing is left to be renormalised.
        log_q = torch.where(_without_mass(ids, total)[:, None], math.nan, log_q)
        log_q = log_q - torch.where(total == -math.inf, 0.0, total)[:, None]
        if divergence.rest == "teacher_renormalize":  # nothing was recorded of a row: all is rest, in both
            nothing = torch.where(total == -math.inf, 0.0, nothing)
        return RecordedTeacher(ids, log_q, nothing, divergence)
    rest = (-torch.expm1(total)).clamp(min=LEAST_REST).log()
    rest = torch.where(total.isnan(), total, rest)
    whole = (ids >= 0).sum(-1) >= columns
    return RecordedTeacher(ids, log_q, torch.where(whole, nothing, rest), divergence)


def _without_mass(ids: Tensor, total: Tensor) -> Tensor:
    """Return where tokens (N, k) were recorded, and all of them as impossible."""
    return (total == -math.inf) & (ids >= 0).any(-1)


@outside_graphs
def _padded(
    function: str, ids: Tensor, log_probs: Tensor, offsets: Tensor, count: int, named: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    """Return rows (N, k) of ids and log-probs that lie one after the other, ids -1 behind the last of a row."""
    if ids.dim() != 1 or tuple(log_probs.shape) != tuple(ids.shape):
        got = f"{tuple(ids.shape)} and {tuple(log_probs.shape)}"
        fail(function, "teacher.token_ids and teacher.log_probs (n,) with offsets=", got, named)
    if offsets.dtype not in INTEGER_DTYPES or tuple(offsets.shape) != (count + 1,):
        expected = f"teacher.offsets ({count + 1},) of integers, for {count} tokens"
        fail(function, expected, f"{tuple(offsets.shape)} of {offsets.dtype}", named)
    offsets = offsets.to(torch.int64)
    counts = offsets.diff()
    bounds = [int(offsets[0]), int(offsets[-1]), int(counts.min()) if count else 0, int(counts.max()) if count else 0]
    if bounds[0] != 0 or bounds[1] != ids.shape[0] or bounds[2] < 0:
        expected = f"teacher.offsets that do not fall, from 0 to {ids.shape[0]}, the number of ids"
        fail(function, expected, f"from {bounds[0]} to {bounds[1]}, steps down to {bounds[2]}", named)
    places = torch.arange(bounds[3], device=ids.device)
    inside = places < counts[:, None]
    index = torch.where(inside, offsets[:-1, None] + places, 0)
    if not ids.numel():
        return index.new_full(index.shape, -1), log_probs.new_full(index.shape, -math.inf)
    return torch.where(inside, ids[index], -1), torch.where(inside, log_probs[index], -math.inf)


def _check_contents(
    tokens: RowTokens, ids: Tensor, log_q: Tensor, divergence: Divergence, named: Mapping[str, object]
) -> None:
    """Raise where a live token's record is none of this vocabulary, or no distribution's."""
    function, live = tokens.function, tokens.live.reshape(-1, 1)
    outside = live & (ids >= tokens.columns)
    if bool(outside.any()):
        hint = "an id < 0 says that there are fewer"
        fail(function, f"recorded ids below {tokens.columns}", str(int(ids[outside][0])), named, hint, IndexError)
    if bool((live & log_q.isnan()).any()):
        hint = "what was not recorded has an id < 0, and any log-prob"
        fail(function, "recorded log-probs that are numbers", "NaN at a live token", named, hint)
    ordered = torch.where(live, ids, -1).sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        hint = "engines name the drawn token again beside the likeliest: keep one of the two, give the other an id < 0"
        fail(function, "recorded ids of a token once each", "one twice: it would have its mass twice", named, hint)
    if bool((live & (log_q > _MORE_THAN_ALL)).any()):
        hint = "log-softmax over the vocabulary, not logits or probabilities"
        fail(function, "recorded log-probs <= 0", f"{float(log_q[(live & (log_q > 0))].max()):.6g}", named, hint)
    total = torch.logsumexp(log_q, -1)
    if divergence.rest != "bucket" and bool((live[:, 0] & _without_mass(ids, total)).any()):
        hint = "a token of which nothing was recorded has ids < 0 alone"
        expected = f'recorded tokens of some mass, to be renormalised with rest="{divergence.rest}"'
        fail(function, expected, "-inf alone at a live token", named, hint)
    mass = torch.where(live[:, 0], total, 0.0).exp()
    if bool((mass > 1 + _MORE_THAN_ALL).any()):
        fail(function, "recorded log-probs of one distribution", f"a mass of {float(mass.max()):.6g}", named)


def _retempered(
    tokens: RowTokens,
    teacher: Teacher,
    divergence: Divergence,
    logit_args: LogitArgs,
    named: Mapping[str, object],
) -> float | Tensor:
    """Return what recorded log-probs are multiplied by to have the divergence's temperature, before they are
    renormalised. Raise where they are not."""
    assert teacher.temperature is not None
    own = divergence.teacher_temperature
    wanted = logit_args.temperature if own is None else own
    of_rows = tokens.temperature if own is None else None
    if of_rows is not None:
        wanted = of_rows.reshape(-1, 1).to(accumulate_dtype(of_rows.device))
    if divergence.rest == "renormalize":
        return teacher.temperature / wanted
    if of_rows is not None and tokens.looks:
        others = tokens.live & ((of_rows / teacher.temperature - 1).abs() > _ALIKE)
        wanted = float(of_rows[others][0]) if bool(others.any()) else teacher.temperature
    elif isinstance(wanted, Tensor) and tokens.looks:
        wanted = float(wanted)
    if not isinstance(wanted, Tensor) and abs(wanted / teacher.temperature - 1) > _ALIKE:  # isclose takes no symbol
        expected = f"log-probs recorded at the divergence's temperature, {wanted:g}"
        hint = (
            f"Divergence(teacher_temperature={teacher.temperature:g}) takes them as they are, "
            'rest="renormalize" changes their temperature'
        )
        fail(tokens.function, expected, f"ones at {teacher.temperature:g}", named, hint)
    return 1.0
