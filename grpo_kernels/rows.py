"""Layout: which vocabulary row predicts which token, and which rows form a sequence.

Token tensors are (B, T) inside the package; a packed batch is one row of N tokens, B = 1, with sequence
bounds in ``cu_seqlens``. Logits stay as they came: kernels take the whole tensor and its strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .checks import check_bounds, check_tensors, fail, read_mask


@dataclass(frozen=True)
class Rows:
    """The vocabulary rows of one call: what every backend function reads.

    ``logits`` is (B, T or T+1, V) or (T or T+1, V), any batch and row stride, last stride 1; row (b, t)
    predicts ``token_ids[b, t]``. ``token_ids`` int64 and ``live`` bool are contiguous (B, T); ``numbers``
    is the vector of ``spec.NUMBERS``, fp64 for fp64 logits, else fp32; ``softcap`` says whether its cap is one.
    """

    logits: Tensor
    token_ids: Tensor
    live: Tensor
    numbers: Tensor
    softcap: bool

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """What every operator takes after the logits."""
        return self.token_ids, self.live, self.numbers, self.softcap

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def strides(self) -> tuple[int, int]:
        """Batch and row stride of the logits, in elements."""
        return batch_and_row_stride(self.logits)

    def row_view(self, tensor: Tensor) -> Tensor:
        """(B, T, V) view of a tensor shaped like the logits: the rows that predict a token."""
        batch, length = self.token_ids.shape
        whole = tensor.unsqueeze(0) if tensor.dim() == 2 else tensor
        return whole[:batch, :length]


def batch_and_row_stride(tensor: Tensor) -> tuple[int, int]:
    """Of a tensor shaped like logits; 0 where there is one batch or one row alone, which nothing is so far from."""
    batch = tensor.stride(0) if tensor.dim() == 3 and tensor.shape[0] > 1 else 0
    return batch, tensor.stride(-2) if tensor.shape[-2] > 1 else 0


@dataclass(frozen=True)
class Padded:
    """Sequences that are the rows of (B, T) token tensors."""

    count: int

    def sum(self, values: Tensor) -> Tensor:
        """Per-sequence sums (B,) of (B, T) values."""
        return values.sum(-1)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """(B,) values at every token: broadcastable to (B, T)."""
        return per_sequence.unsqueeze(-1)


@dataclass(frozen=True)
class Packed:
    """Sequences that lie one after the other in (1, N) token tensors; sums run in a fixed order."""

    cu_seqlens: Tensor
    sequence_of: Tensor
    """(N,) index of each token's sequence."""

    @classmethod
    def read(
        cls,
        function: str,
        cu_seqlens: Tensor,
        tokens: int,
        tensors: Mapping[str, object],
        check: bool | None = None,
    ) -> Packed:
        """Of the bounds that a user gave; whatever they are, nothing is read outside of the tokens."""
        check_bounds(function, cu_seqlens, tokens, tensors, check)
        return cls.of(cu_seqlens.to(torch.int64).clamp(0, tokens), tokens)

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> Packed:
        positions = torch.arange(tokens, device=cu_seqlens.device)
        index = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
        return cls(cu_seqlens, index.clamp(max=cu_seqlens.shape[0] - 2))

    @property
    def count(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:
        return ops.sequence_sum(values.reshape(-1), self.cu_seqlens)

    def expand(self, per_sequence: Tensor) -> Tensor:
        return per_sequence[self.sequence_of].unsqueeze(0)

    def inside(self) -> Tensor:
        """(1, N): tokens that belong to a sequence at all, neither before the first bound nor past the last. Whoever
        asks which tokens of a packed batch count asks here."""
        positions = torch.arange(self.sequence_of.shape[0], device=self.cu_seqlens.device)
        return ((positions >= self.cu_seqlens[0]) & (positions < self.cu_seqlens[-1])).unsqueeze(0)


Sequences = Padded | Packed


def read_live(function: str, mask: Tensor, cu_seqlens: Tensor | None, check: bool | None = None) -> Tensor:
    """bool, of the mask's shape: the tokens that count, which lie in a sequence where these have bounds."""
    tensors = {"mask": mask, "cu_seqlens": cu_seqlens}
    live = read_mask(function, mask, tensors, check)
    if cu_seqlens is None:
        return live
    if mask.dim() not in (1, 2) or mask.numel() != mask.shape[-1]:
        fail(function, "packed masks (N,) or (1, N) with cu_seqlens", f"shape {tuple(mask.shape)}", tensors)
    return live & Packed.read(function, cu_seqlens, mask.shape[-1], tensors, check).inside().view(mask.shape)


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
