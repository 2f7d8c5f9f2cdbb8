"""Ids and mask of a call, and which vocabulary row predicts which token.

Logits stay as they came: kernels take the whole tensor and its strides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.contract import Rows
from ..objectives.checks import (
    INTEGER_DTYPES,
    check_device,
    check_ids_dtype,
    check_no_transforms,
    check_shape,
    check_tensors,
    checks_enabled,
    fail,
    fits,
    may_look,
    of_tokens,
    ordinary,
    read_mask,
    read_token_mask,
)
from ..objectives.maths import real_dtype
from ..objectives.sequences import Packed
from .arguments import check_head, check_logits
from .head import HeadTensors, operand_dtype
from .vocabulary import VocabShard


@dataclass(frozen=True)
class Tokens:
    """The tokens of a call, and which of them count."""

    function: str
    live: Tensor
    """bool (B, T), contiguous."""
    shape: torch.Size
    """Of token tensors as the user gave them: the shape of outputs."""
    real: torch.dtype
    """Of what is computed of them: fp64 for fp64 logits, else fp32."""
    tensors: Mapping[str, object]
    """The user's tensors by name, for messages; what the rows are made of comes first."""
    checks: bool
    """Whether contents are looked at wherever that is possible: ``check=``, else GRPO_KERNELS_CHECK."""
    looks: bool
    """Whether the contents of this call's tensors may be looked at: ``may_look``."""

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """Return a user's token-sized tensor as detached, contiguous (B, T)."""
        allowed = (tuple(self.shape), tuple(self.live.shape))
        check_shape(self.function, name, value, allowed, self.tensors, self.shift_hint)
        if value.is_complex():  # else half of it would be dropped
            fail(self.function, f"{name} of real numbers", str(value.dtype), self.tensors, error=TypeError)
        return of_tokens(value, self.real)

    def shift_hint(self, name: str, value: Tensor) -> str | None:
        """Return what to do where ids are shifted and another tensor is not, or the other way round."""
        return _shift_hint(name, value, self.shape, next(iter(self.tensors)))


@dataclass(frozen=True)
class RowTokens(Tokens):
    """Tokens with their ids, beside the vocabulary rows that predict them."""

    states: Tensor
    """The logits, or the hidden states that they are computed from: the dimensions before the last are the rows'."""
    vocab: int
    """Columns of the whole vocabulary, which token ids are numbers of."""
    columns: int
    """Of the logits that are here."""
    dtype: torch.dtype
    """Of the logits."""
    token_ids: Tensor
    """int64 (B, T), contiguous."""
    shard: VocabShard | None = None
    """Which columns are here, where other ranks hold others or some do not count."""
    temperature: Tensor | None = None
    """Of each token's row, (B, T), real, > 0, 1 where it is not live; None: one number for all, beside the tokens."""

    def rows(self, numbers: Tensor, softcap: bool) -> Rows:
        """Return the rows, where the states are the logits."""
        return Rows(self.states, self.token_ids, self.live, numbers, softcap, self.temperature)

    def inner(self) -> RowTokens:
        """Return all but the first and the last of each sequence of T >= 2, live where both neighbours are as well."""
        count, live = self.live.shape[1] - 2, self.live
        return dataclasses.replace(
            self,
            states=self.states[..., 1 : 1 + count, :],
            token_ids=self.token_ids[:, 1:-1].contiguous(),
            live=(live[:, :-2] & live[:, 1:-1] & live[:, 2:]).contiguous(),
            temperature=None if self.temperature is None else self.temperature[:, 1:-1].contiguous(),
        )


def read_tokens(
    function: str,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
    shard: VocabShard | None = None,
) -> RowTokens:
    """Check logits, ids and mask against each other and bring ids and mask to (B, T)."""
    named = {"logits": logits, "token_ids": token_ids, "mask": mask, **tensors}
    check_logits(function, logits, named, may_be_empty=shard is not None)
    check_no_transforms(function, named.values())
    return _read_ids(function, logits, logits.shape[-1], shard, logits.dtype, token_ids, mask, named, check)


def read_linear_tokens(
    function: str,
    head: HeadTensors,
    token_ids: Tensor,
    mask: Tensor | None,
    logits_dtype: torch.dtype | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
    shard: VocabShard | None = None,
) -> RowTokens:
    """As ``read_tokens``, for hidden states and the head that makes logits of them."""
    named = {**head._asdict(), "token_ids": token_ids, "mask": mask, **tensors}
    check_head(function, head, named, may_be_empty=shard is not None)
    operands = operand_dtype(head.hidden)
    dtype = operands if logits_dtype is None else logits_dtype
    if dtype != operands and (dtype != torch.float32 or operands.itemsize != 2):
        expected = f"logits_dtype=torch.float32 (with half precision) or None for that of the GEMM ({operands})"
        fail(function, expected, repr(logits_dtype), named)
    check_no_transforms(function, named.values())
    return _read_ids(function, head.hidden, head.weight.shape[0], shard, dtype, token_ids, mask, named, check)


def read_log_prob_tokens(
    function: str,
    log_probs: Tensor,
    entropy: Tensor | None,
    mask: Tensor | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """As ``read_tokens``, where log-probs (B, T), packed (N,) or (1, N) are there already."""
    named = {"log_probs": log_probs, "entropy": entropy, "mask": mask, **tensors}
    check_tensors(function, named)
    for name, tensor in (("log_probs", log_probs), ("entropy", entropy)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            fail(function, f"{name} of a floating dtype", str(tensor.dtype), named, error=TypeError)
    check_no_transforms(function, named.values())
    if log_probs.dim() not in (1, 2):
        fail(function, "log_probs (B, T), packed (N,) or (1, N)", f"{log_probs.dim()} dimensions", named)
    check_device(function, named)
    if entropy is not None:
        check_shape(function, "entropy", entropy, (tuple(log_probs.shape),), named)
    checks = checks_enabled(check)
    hint = functools.partial(_shift_hint, shape=log_probs.shape, what="log_probs")
    live = read_token_mask(function, mask, log_probs, named, checks, hint)
    shared = (log_probs.shape, real_dtype(log_probs.dtype), named, checks, may_look(log_probs, checks))
    return Tokens(function, live, *shared)


def _read_ids(
    function: str,
    states: Tensor,
    columns: int,
    shard: VocabShard | None,
    dtype: torch.dtype,
    token_ids: Tensor,
    mask: Tensor | None,
    named: Mapping[str, object],
    check: bool | None = None,
) -> RowTokens:
    check_tensors(function, named)
    check_device(function, named)
    if token_ids.dtype not in INTEGER_DTYPES:
        fail(function, "integer token_ids", str(token_ids.dtype), named, error=TypeError)
    *leading, length = states.shape[:-1]  # T rows, or T+1 with the last one unused
    shapes = [(*leading, length), (*leading, length - 1)][: 1 + (length > 0)]
    if not fits(token_ids, *shapes):
        what, wanted = next(iter(named)), " or ".join(map(str, shapes))
        todo = f"align(input_ids, mask) gives ids for {what} (B, L, ...) as a causal model returns them"
        if fits(token_ids, (length, *leading), *([tuple(leading)] if length == 1 else [])):
            view = f"{what}.transpose(0, 1)" if token_ids.dim() == 2 else f"{what}.squeeze(1)"
            todo = f"Megatron has {what} (T, B, ...), packed ones (T, 1, ...): {view} is a view"
        fail(function, f"token_ids of shape {wanted}", str(tuple(token_ids.shape)), named, todo)
    checks = checks_enabled(check)
    hint = functools.partial(_shift_hint, shape=token_ids.shape, what=next(iter(named)))
    looks, live = may_look(token_ids, checks), read_token_mask(function, mask, token_ids, named, checks, hint)
    (ids,) = ordinary(of_tokens(token_ids, torch.int64))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    vocab = columns if shard is None else shard.vocab
    of_rows = (states, vocab, columns, dtype, ids, shard)
    return RowTokens(function, live, token_ids.shape, real, named, checks, looks, *of_rows)


def _shift_hint(name: str, value: Tensor, shape: torch.Size, what: str) -> str | None:
    """``shape`` is that of token_ids. Packed tensors keep their length when they are shifted."""
    if value.dim() != 2 or len(shape) != 2 or value.shape[0] != shape[0]:
        return None
    if what == "log_probs":
        near = abs(value.shape[1] - shape[1]) == 1
        return f"one of log_probs and {name} is shifted: both belong to the predicted tokens" if near else None
    if value.shape[1] == shape[1] - 1:
        return f"token_ids are not shifted: align(input_ids, mask) gives ids for {what} (B, L, ...) as they are"
    if value.shape[1] != shape[1] + 1:
        return None
    if name == "mask":
        return "token_ids are shifted and the mask is not: align(input_ids, mask) shifts both"
    return (
        f"token_ids are shifted and {name} is not: {name}[:, :-1] of what belongs to the rows of a model, "
        f"{name}[:, 1:] of what belongs to its tokens (align shifts ids and mask)"
    )


def align(input_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shift ids and mask so that position t names the token that row t of the logits *predicts*.

    Padded: ``input_ids`` and ``loss_mask`` (B, L) give (B, L-1), for logits (B, L, V) as a causal model
    returns them (the last row is unused). Packed (``cu_seqlens`` given): (N,) or (1, N) give the same shape,
    rolled by one; the last token of each sequence predicts nothing and is masked, as is what belongs to no sequence.

    Args:
        input_ids: integer ids, prompt and response.
        loss_mask: bool or numbers >= 0, non-zero where the *token* counts (the response).
        cu_seqlens: (S+1,) bounds of packed sequences.

    Returns:
        token_ids, mask: mask is bool.
    """
    tensors = {"input_ids": input_ids, "loss_mask": loss_mask, "cu_seqlens": cu_seqlens}
    check_tensors("align", {"input_ids": input_ids, "loss_mask": loss_mask})
    if input_ids.shape != loss_mask.shape:
        fail("align", "input_ids and loss_mask of one shape", "two different shapes", tensors)
    check_ids_dtype("align", input_ids, tensors)
    mask = read_mask("align", loss_mask, tensors, name="loss_mask")
    if cu_seqlens is None:
        if input_ids.dim() != 2:
            fail(
                "align",
                "input_ids (B, L)",
                f"{input_ids.dim()} dimensions",
                tensors,
                hint="packed ids need cu_seqlens=",
            )
        return input_ids[:, 1:], mask[:, 1:]
    if input_ids.dim() not in (1, 2) or (input_ids.dim() == 2 and input_ids.shape[0] != 1):
        fail("align", "packed input_ids (N,) or (1, N)", f"shape {tuple(input_ids.shape)}", tensors)
    packed = Packed.read("align", cu_seqlens, input_ids.shape[-1], tensors)
    last = torch.isin(torch.arange(input_ids.shape[-1], device=input_ids.device), packed.cu_seqlens[1:] - 1)
    return input_ids.roll(-1, -1), mask.roll(-1, -1) & (packed.inside() & ~last).view(mask.shape)
