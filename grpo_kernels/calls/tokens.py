"""Which vocabulary row predicts which token.

Logits stay as they came: kernels take the whole tensor and its strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.checks import check_tensors, fail, read_mask
from ..objectives.sequences import Packed


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
