"""Temperatures of sequences or of tokens, in the place of one number for all rows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..backends.spec import LogitArgs
from ..objectives.checks import check_no_transforms, check_shape, fail, fits
from ..objectives.sequences import Padded, Sequences
from ..objectives.settings import HELD, LARGEST, SMALLEST
from .arguments import check_transform
from .tokens import RowTokens


def read_temperatures(
    tokens: RowTokens, temperature: Tensor, logit_args: LogitArgs, sequences: Sequences | None = None
) -> RowTokens:
    """Return the tokens with a temperature each, 1 where they are not live, whatever was given there.

    Args:
        temperature: as advantages are: (B,), (B, 1) or (B, T); packed (S,) where the call has bounds, or token-sized.
        logit_args: the others of the map from logits to the softmax's.
        sequences: those of a loss; None: the rows of ids (B, T), while packed ids (N,) have none.

    Raises:
        ValueError, TypeError: another shape or kind of numbers; one that requires grad; at a live token, where
            contents may be looked at, one that is not > 0 or that fp32 does not hold.
    """
    if temperature.dtype == torch.bool or temperature.is_complex():
        dtype = str(temperature.dtype)
        fail(tokens.function, "temperature of real numbers", dtype, tokens.tensors, error=TypeError)
    if temperature.requires_grad and torch.is_grad_enabled():
        expected = "temperature without requires_grad: it gets no gradient"
        fail(tokens.function, expected, "one with", tokens.tensors, "temperature.detach()")
    if sequences is None and len(tokens.shape) > 1:
        sequences = Padded(tokens.live.shape[0])
    values = torch.where(tokens.live, _at_tokens(tokens, temperature, sequences), 1.0).contiguous()
    if tokens.looks and values.numel() > 0:
        _check_contents(tokens, values, logit_args)
    return dataclasses.replace(tokens, temperature=values)


def _at_tokens(tokens: RowTokens, temperature: Tensor, sequences: Sequences | None) -> Tensor:
    """Return (B, T), detached, in the working precision."""
    check_no_transforms(tokens.function, (temperature,))
    shape, values = tuple(tokens.live.shape), temperature.detach().to(tokens.real)
    of_sequences = () if sequences is None else ((sequences.count,), (sequences.count, 1))
    if sequences is not None and fits(temperature, *of_sequences):
        return sequences.expand(values.reshape(sequences.count)).expand(shape)
    allowed = (*of_sequences, tuple(tokens.shape), shape)
    check_shape(tokens.function, "temperature", temperature, allowed, tokens.tensors, tokens.shift_hint)
    return values.reshape(shape)


def _check_contents(tokens: RowTokens, values: Tensor, logit_args: LogitArgs) -> None:
    """Raise as for one number."""
    low, high = (float(extreme) for extreme in torch.aminmax(values))
    if not (low >= SMALLEST and high <= LARGEST):  # NaN is neither
        wrong = ~((values >= SMALLEST) & (values <= LARGEST))
        at = tuple(int(i) for i in wrong.nonzero()[0])
        expected = f"temperature at live tokens > 0 and {HELD}"
        got = f"{float(values[at]):.6g} at token [{at[0]}, {at[1]}]"
        fail(tokens.function, expected, got, tokens.tensors, "where the mask is 0 anything may stand")
    check_quotients(tokens, values, logit_args)


def check_quotients(tokens: RowTokens, temperature: Tensor, logit_args: LogitArgs) -> None:
    """Raise where fp32 does not hold a quotient that kernels form of one of these temperatures, (B, T)."""
    if tokens.looks and temperature.numel() > 0:
        for extreme in torch.aminmax(temperature):
            check_transform(tokens.function, logit_args._replace(temperature=float(extreme)), tokens.checks)
