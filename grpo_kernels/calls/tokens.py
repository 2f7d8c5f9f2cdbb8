"""Ids and mask of a call, and which vocabulary row predicts which token.

Logits stay as they came: kernels take the whole tensor and its strides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.contract import Rows
from ..backends.spec import LogitArgs, numbers_vector
from ..objectives.checks import (
    INTEGER_DTYPES,
    check_device,
    check_shape,
    check_tensors,
    fail,
    has_shape,
    read_mask,
)
from ..objectives.config import LossConfig
from ..objectives.maths import real_dtype
from ..objectives.sequences import Packed
from .arguments import check_head, check_logits, check_no_transforms, ordinary
from .head import operand_dtype


@dataclass(frozen=True)
class Tokens:
    """Ids and mask of a call, (B, T), beside the vocabulary rows they belong to."""

    function: str
    states: Tensor
    """The logits, or the hidden states that they are computed from: the dimensions before the last are the rows'."""
    vocab: int
    dtype: torch.dtype
    """Of the logits."""
    token_ids: Tensor
    """int64, contiguous."""
    live: Tensor
    """bool, contiguous."""
    shape: torch.Size
    """Of token_ids as the user gave them: the shape of outputs."""
    tensors: Mapping[str, object]
    """The user's tensors by name, for messages."""

    @property
    def real(self) -> torch.dtype:
        return real_dtype(self.dtype)

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """A user's token-sized tensor as detached, contiguous (B, T)."""
        allowed = (tuple(self.shape), tuple(self.token_ids.shape))
        check_shape(self.function, name, value, allowed, self.tensors, self.shift_hint)
        return value.detach().to(self.real).reshape(self.token_ids.shape).contiguous()

    def shift_hint(self, name: str, value: Tensor) -> str | None:
        """What to do where ids are shifted and another tensor is not, or the other way round."""
        return _shift_hint(name, value, self.shape, next(iter(self.tensors)))

    def numbers(
        self,
        logit_args: LogitArgs,
        grad_scale: float | Tensor = 1.0,
        config: LossConfig | None = None,
        entropy_threshold: float | Tensor | None = None,
    ) -> Tensor:
        return numbers_vector(logit_args, grad_scale, config, self.real, self.states.device, entropy_threshold)

    def rows(
        self,
        logit_args: LogitArgs,
        grad_scale: float | Tensor = 1.0,
        config: LossConfig | None = None,
        entropy_threshold: float | Tensor | None = None,
    ) -> Rows:
        """Where the states are the logits."""
        numbers = self.numbers(logit_args, grad_scale, config, entropy_threshold)
        return Rows(self.states, self.token_ids, self.live, numbers, logit_args.logit_softcap is not None)


def read_tokens(
    function: str,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """Check logits, ids and mask against each other and bring ids and mask to (B, T)."""
    named = {"logits": logits, "token_ids": token_ids, "mask": mask, **tensors}
    check_logits(function, logits, named)
    return read_ids(function, logits, logits.shape[-1], logits.dtype, token_ids, mask, named, check)


def read_linear_tokens(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    logits_dtype: torch.dtype | None,
    tensors: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """``read_tokens`` for hidden states and the head that makes logits of them."""
    named = {"hidden": hidden, "weight": weight, "bias": bias, "token_ids": token_ids, "mask": mask, **tensors}
    check_head(function, hidden, weight, bias, named)
    operands = operand_dtype(hidden)
    dtype = operands if logits_dtype is None else logits_dtype
    if dtype != operands and (dtype != torch.float32 or operands.itemsize != 2):
        expected = f"logits_dtype=torch.float32 (with half precision) or None for that of the GEMM ({operands})"
        fail(function, expected, repr(logits_dtype), named)
    for tensor in (weight, bias):
        if tensor is not None:
            check_no_transforms(function, tensor)
    return read_ids(function, hidden, weight.shape[0], dtype, token_ids, mask, named, check)


def read_ids(
    function: str,
    states: Tensor,
    vocab: int,
    dtype: torch.dtype,
    token_ids: Tensor,
    mask: Tensor | None,
    named: Mapping[str, object],
    check: bool | None = None,
) -> Tokens:
    """As ``read_tokens``, for logits or for what they are computed from (``named`` has it first)."""
    what = next(iter(named))
    check_tensors(function, named)
    check_no_transforms(function, states)
    check_device(function, named)
    if token_ids.dtype not in INTEGER_DTYPES:
        fail(function, "integer token_ids", str(token_ids.dtype), named, error=TypeError)
    rows = states.shape[:-1]
    fitting = any(has_shape(token_ids, shape) for shape in _token_shapes(tuple(rows)))
    if not fitting:
        wanted = " or ".join(str(shape) for shape in _token_shapes(tuple(rows)))
        hint = f"align(input_ids, mask) gives ids for {what} (B, L, ...) as a causal model returns them"
        fail(function, f"token_ids of shape {wanted}", str(tuple(token_ids.shape)), named, hint)
    ids = token_ids.reshape(1, -1) if token_ids.dim() == 1 else token_ids
    if mask is None:
        live = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    else:
        shifted = functools.partial(_shift_hint, shape=token_ids.shape, what=what)
        check_shape(function, "mask", mask, (tuple(token_ids.shape),), named, shifted)
        live = read_mask(function, mask, named, check).reshape(ids.shape).contiguous()
    ids = ordinary(ids.to(torch.int64).contiguous())
    return Tokens(function, states, vocab, dtype, ids, ordinary(live), token_ids.shape, named)


def _token_shapes(rows: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of token_ids for rows of these leading dimensions: T, or T+1 with the last row unused."""
    shorter = (*rows[:-1], rows[-1] - 1)
    return (rows, shorter) if rows[-1] > 0 else (rows,)


def _shift_hint(name: str, value: Tensor, shape: torch.Size, what: str) -> str | None:
    """``shape`` is that of token_ids. Packed tensors keep their length when they are shifted."""
    if value.dim() != 2 or len(shape) != 2 or value.shape[0] != shape[0]:
        return None
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
