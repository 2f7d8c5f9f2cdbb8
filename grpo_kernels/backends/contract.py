"""What passes between calls and kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
