"""Checks of contents that wait for the device: ids in range, ids that are not shifted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.spec import LogitArgs, numbers_vector
from ..objectives.checks import fail, may_look
from .tokens import RowTokens
from .vocabulary import row_stats


def check_contents(tokens: RowTokens, backend: str, logit_args: LogitArgs) -> None:
    """With checks on, raise where ids are out of range or look shifted by one row. Waits for the device."""
    if not (tokens.checks and tokens.looks):
        return
    check_ids(tokens)
    numbers = numbers_vector(logit_args, 1.0, None, tokens.real, tokens.states.device)
    rows = tokens.rows(numbers, logit_args.logit_softcap is not None)

    def log_probs(ids: Tensor, live: Tensor) -> Tensor:
        logits = tokens.states.detach()
        return row_stats(rows._replace(logits=logits, token_ids=ids, live=live), tokens.shard, backend).log_prob

    check_shift(tokens, log_probs)


def check_ids(tokens: RowTokens, always: bool = False) -> None:
    """With checks on, or always, raise where live ids are not in the vocabulary."""
    if not ((always or tokens.checks) and may_look(tokens.token_ids, True)):
        return
    function, ids, live = tokens.function, tokens.token_ids, tokens.live
    if ids.numel() == 0:
        return
    low, high = map(int, torch.aminmax(ids))
    if low >= 0 and high < tokens.vocab:
        return
    bad = live & ((ids < 0) | (ids >= tokens.vocab))
    if bool(bad.any()):
        position = tuple(int(i) for i in bad.nonzero()[0])
        got = f"token_ids[{position[0]}, {position[1]}] = {int(ids[position])} at a live position"
        fail(function, f"token ids in [0, {tokens.vocab})", got, tokens.tensors, "mask that position", IndexError)


_SHIFT_TOKENS, _SHIFT_NATS, _SHIFT_ERRORS = 16, 1.0, 6.0
"""Tokens that are evidence at all; their mean gain, and how many of its standard errors it must be."""


def check_shift(tokens: RowTokens, log_probs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Ids that were not shifted, or cut at the wrong end (``ids[:, :-1]``), have an accepted shape and the wrong
    meaning: every token is likelier one row earlier, which saw what comes before it and not the token itself.
    ``log_probs`` gives those of (ids, live).

    Tokens drawn from the policy are less likely there on average, whatever it is; of tokens that have nothing to do
    with it, and of a few that it would never draw, the standard error tells. One row later is no evidence: an untrained
    model with tied embeddings predicts the token that it has just read.
    """
    ids, live = tokens.token_ids, tokens.live.clone()
    live[:, :1] = False
    here = log_probs(ids, live).view_as(ids)
    earlier = log_probs(ids.roll(-1, 1), live.roll(-1, 1)).view_as(ids).roll(1, 1)
    found = _clear_gain((earlier - here)[live], _SHIFT_NATS)
    if found is not None:
        gain, count = found
        fail(
            tokens.function,
            f"token_ids[:, t] to be the token that row t of the {next(iter(tokens.tensors))} predicts",
            f"tokens that are {gain:.2f} nats likelier one row earlier, on average over {count}",
            tokens.tensors,
            "align(input_ids, mask) shifts ids and mask (ids[:, 1:], not ids[:, :-1]); what the model returned stays",
        )


def _clear_gain(gains: Tensor, least: float) -> tuple[float, int] | None:
    """Return the mean of the finite gains (n,) and their number, if it is above ``least`` and what chance explains."""
    gains = gains[gains.isfinite()].double()
    if gains.numel() < _SHIFT_TOKENS:
        return None
    gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(gains.numel())
    return (gain, gains.numel()) if gain > max(least, _SHIFT_ERRORS * error) else None


_TEACHER_GAIN = 0.1
"""Of total variation, which is at most 1."""
_SHIFTS = (
    (0, "earlier", "the rows that predict the first tokens come first: teacher_logits[:, :-1], not [:, 1:]"),
    (2, "later", "the first token of a sequence has no row: prompt_logprobs[1:]; of a model, logits of the same ids"),
)


def check_teacher_shift(tokens: RowTokens, inner: RowTokens, beside: Callable[[int, Tensor], TeacherRows]) -> None:
    """A teacher whose rows begin one too early or too late has an accepted shape and another token's distribution in
    every row: each is nearer to the policy's one row away.

    Their distance is the total variation, which has no infinities, whatever is minimised. Rows of two models of one
    kind are nearest at the same token, and unrelated ones nowhere. An untrained policy with tied embeddings predicts
    what it has just read, as a teacher does one row earlier: rows that find it likelier than the token have no part.

    Args:
        inner: the tokens between others (``RowTokens.inner``).
        beside: gives these rows beside the teacher's from row 0, 1 (their own) or 2 on, and log-probs of ids there.
    """
    own, previous = beside(1, inner.token_ids), tokens.token_ids[:, :-2].contiguous()
    apart = {0: beside(0, previous), 2: beside(2, inner.token_ids)}
    counts = inner.live & ~(apart[0].log_prob > own.log_prob)
    for first, place, hint in _SHIFTS:
        found = _clear_gain((own.total_variation - apart[first].total_variation)[counts], _TEACHER_GAIN)
        if found is not None:
            gain, count = found
            fail(
                tokens.function,
                "row t of the teacher to be of the token that row t of the policy predicts",
                f"rows nearer by {gain:.2f} of total variation one row {place}, on average over {count}",
                tokens.tensors,
                hint,
            )


class TeacherRows(NamedTuple):
    """What is known of rows beside a teacher's, (B, T - 2) each."""

    total_variation: Tensor
    log_prob: Tensor
    """Of the policy."""
