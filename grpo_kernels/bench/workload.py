"""Makes what is timed: a batch of logits, or of hidden states and a head, with all that a GRPO loss needs beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linear import linear_token_log_probs
from ..log_probs import token_log_probs
from ..objectives.config import LossConfig
from ..objectives.kl import KL

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BETA = 0.04
CLIP = 0.2
SEQUENCES = 8
KINDS = {
    "all": "every token live, GRPO with k3 KL",
    "half masked": "half of the tokens masked, GRPO with k3 KL",
    "30 % A = 0": "30 % of the sequences with advantage 0, GRPO without KL; ours skips those rows",
}
"""Kinds of workloads: for what part of a batch there is something to compute."""


def form(dtype: str, kind: str, upstream: float) -> str:
    """Return a workload's dtype, and what else it is than the usual one."""
    return dtype + ("" if kind == "all" else f", {kind}") + ("" if upstream == 1 else f", upstream {upstream:g}")


@dataclass(frozen=True)
class Spec:
    """One workload, as text and numbers."""

    tokens: int
    vocab: int
    dtype: str
    hidden: int | None = None
    """The size of the hidden states that it starts from; None where it starts from logits."""
    kind: str = "all"
    upstream: float = 1.0
    """The factor of the loss before backward, which ours is told (``grad_scale``)."""
    device: str = "cpu"

    @property
    def shape(self) -> str:
        """Return tokens × vocabulary as text, with the hidden size between them where there is one."""
        hidden = "" if self.hidden is None else f"×{self.hidden}"
        return f"{self.tokens}{hidden}×{self.vocab}"

    @property
    def sequences(self) -> int:
        """Return how many sequences its tokens are, all of one length: the most up to SEQUENCES that divide them."""
        return max(count for count in range(1, SEQUENCES + 1) if self.tokens % count == 0)

    def check(self) -> None:
        """Raise a ValueError where its batch would not be what its kind says."""
        if self.kind == "30 % A = 0" and round(0.3 * self.sequences) == 0:
            expected = f"tokens that 2 to {SEQUENCES} sequences share"
            raise ValueError(f"a batch of {self.kind} needs {expected}; got {self.tokens}.")

    def __str__(self) -> str:
        return f"{self.shape} {form(self.dtype, self.kind, self.upstream)}"

    @property
    def logits_bytes(self) -> int:
        """Return the size of the logits, whether the workload starts from them or not."""
        return self.tokens * self.vocab * DTYPES[self.dtype].itemsize

    def bytes(self) -> int:
        """Return what the workload takes: logits twice (they are restored), or head, hidden states and gradients."""
        if self.hidden is None:
            return 2 * self.logits_bytes
        return 2 * (self.tokens + self.vocab) * self.hidden * DTYPES[self.dtype].itemsize


class Workload:
    """Tensors of a Spec: 8 sequences of one length; old and ref are 0.2 from the policy, so that some ratios clip."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        self.spec = spec
        B = spec.sequences
        self.shape = B, spec.tokens // B
        generator = torch.Generator(spec.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": spec.device}
        dtype = DTYPES[spec.dtype]
        self.ids = torch.randint(spec.vocab, self.shape, **options)
        self.advantages = torch.randn(B, **options)
        if spec.kind == "30 % A = 0":
            self.advantages[: round(0.3 * B)] = 0
        self.mask = torch.rand(self.shape, **options) < (0.5 if spec.kind == "half masked" else 2.0)
        self.beta = 0.0 if spec.kind == "30 % A = 0" else BETA
        self.config = LossConfig.preset("grpo", kl=KL(self.beta))
        self.longer: Tensor | None = None
        self.handed: dict[int, Tensor] = {}
        """The gradients of the last backward by place, in whatever order they came."""
        with torch.no_grad():
            if spec.hidden is None:
                self.kept = torch.randn(*self.shape, spec.vocab, **options).mul_(2).to(dtype)
                self.buffer = self.kept.clone()
                log_probs = token_log_probs(self.kept, self.ids).log_probs
            else:
                # Logits of the same spread, as a trained model's have it.
                scale = 2 * spec.hidden**-0.5
                self.hidden = torch.randn(*self.shape, spec.hidden, **options).to(dtype)
                self.weight = (scale * torch.randn(spec.vocab, spec.hidden, **options)).to(dtype)
                log_probs = linear_token_log_probs(self.hidden, self.weight, self.ids).log_probs
        self.old, self.ref = (log_probs + 0.2 * torch.randn(self.shape, **options) for _ in range(2))

    def shortened(self) -> Workload:
        """Return the same with sequences shorter by a token: a length that nothing was compiled for."""
        other = object.__new__(Workload)
        other.__dict__ |= self.__dict__
        other.handed = {}
        T = self.shape[1] - 1
        other.shape = self.shape[0], T
        for name in ("ids", "mask", "old", "ref"):
            setattr(other, name, getattr(self, name)[:, :T].contiguous())
        for name in ("kept", "buffer", "hidden"):
            if hasattr(self, name):
                setattr(other, name, getattr(self, name)[:, :T].contiguous())
        return other

    def restore(self) -> None:
        """Bring back the logits that a gradient in place has overwritten."""
        self.handed = {}
        if self.spec.hidden is None:
            self.buffer.copy_(self.kept)

    def logits(self, extra_row: bool = False) -> Tensor:
        """Return the buffer as a model would: not a leaf; its backward takes the gradient and does no work.

        With ``extra_row`` it is (B, T+1, V) with an unused last row, from a buffer of its own that is made once.
        """
        tensor = self.buffer
        if extra_row:
            if self.longer is None or self.longer.shape[1] != self.shape[1] + 1:
                self.longer = torch.cat([self.kept, self.kept[:, :1]], 1)
            tensor = self.longer
        handed: Tensor = _Handed.apply(_anchor(tensor), self, 0, tensor)
        return handed

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return hidden states and weight, in the same way."""
        anchor = _anchor(self.hidden)
        return _Handed.apply(anchor, self, 0, self.hidden), _Handed.apply(anchor, self, 1, self.weight)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """Return what the last backward gave: the gradient of the logits, or those of hidden states and weight."""
        return tuple(self.handed[place] for place in sorted(self.handed))

    def rest(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Return what a loss takes beside log-probs: advantages, mask, old and reference log-probs, KL coefficient."""
        return self.advantages, self.mask, self.old, self.ref, self.beta

    def known(self) -> dict[str, Any]:
        """Return the log-probs that our functions take by name."""
        return {"old_log_probs": self.old, "ref_log_probs": self.ref}


def _anchor(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device, requires_grad=True)


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, work: Workload, place: int, tensor: Tensor) -> Tensor:
        ctx.work, ctx.place = work, place
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.work.handed[ctx.place] = gradients[0]
        return None, None, None, None
