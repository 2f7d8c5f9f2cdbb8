"""Checks of contents that wait for the device: ids in range, ids that are not shifted."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    gains = (earlier - here)[live].double()
    gains = gains[gains.isfinite()]
    if gains.numel() < _SHIFT_TOKENS:
        return
    gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(gains.numel())
    if gain > max(_SHIFT_NATS, _SHIFT_ERRORS * error):
        fail(
            tokens.function,
            f"token_ids[:, t] to be the token that row t of the {next(iter(tokens.tensors))} predicts",
            f"tokens that are {gain:.2f} nats likelier one row earlier, on average over {gains.numel()}",
            tokens.tensors,
            "align(input_ids, mask) shifts ids and mask (ids[:, 1:], not ids[:, :-1]); what the model returned stays",
        )


_TEACHER_GAIN = 0.1
"""Of total variation, which is at most 1."""


def check_teacher_shift(tokens: RowTokens, live: Tensor, apart: Callable[[int], Tensor]) -> None:
    """A teacher whose rows begin with that of the first token, which nothing predicts, has an accepted shape and
    another token's distribution in every row: each is nearer to the policy's one row later.

    Args:
        live: bool (B, T - 1), where a token and the next one are.
        apart: gives the total variation, of that shape, of the policy's rows from the teacher's from row 0 or 1 on: a
            divergence without infinities, whatever is minimised.

    A row of the teacher that is right is nearest on average, or none is. One row earlier is no evidence: what a
    teacher expects there is the token that an untrained policy with tied embeddings has just read and predicts again.
    """
    gains = (apart(0) - apart(1))[live].double()
    gains = gains[gains.isfinite()]
    if gains.numel() < _SHIFT_TOKENS:
        return
    gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(gains.numel())
    if gain > max(_TEACHER_GAIN, _SHIFT_ERRORS * error):
        fail(
            tokens.function,
            "row t of the teacher to be of the token that row t of the policy predicts",
            f"rows that are nearer by {gain:.2f} of total variation one row later, on average over {gains.numel()}",
            tokens.tensors,
            "the first token of a sequence has no row: prompt_logprobs[1:]; of a model's logits, those of the same ids",
        )
