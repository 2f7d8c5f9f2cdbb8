"""Policy losses as other people write them, and what each of them is in truth.

``seen`` and ``unseen`` have the losses; ``match`` may be tried on the first while it is written, and is judged on the
second. ``broken`` has what is no loss at all. tests/test_losses_of_others.py compares every truth with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grpo_kernels import LossConfig


@dataclass(frozen=True)
class Batch:
    """One batch of B sequences and T tokens, float64."""

    logits: Tensor
    """(B, T+1, V); row t predicts ``token_ids[:, t]``."""
    token_ids: Tensor
    """(B, T)"""
    mask: Tensor
    """(B, T), bool, ragged; one sequence is empty."""
    old: Tensor
    ref: Tensor
    rollout: Tensor
    """(B, T) log-probs."""
    advantages: Tensor
    """(B,), or (B, T) for a loss that takes them so."""
    entropy: Tensor
    """(B, T), of the rows of the logits."""

    @property
    def log_probs(self) -> Tensor:
        """Return the policy's, (B, T)."""
        rows = torch.log_softmax(self.logits[:, : self.mask.shape[1]], -1)
        return rows.gather(-1, self.token_ids[..., None]).squeeze(-1)

    @property
    def items(self) -> Tensor:
        """Return what ``num_items_in_batch`` is: three times the batch's tokens, so that it is told from them."""
        return 3 * self.mask.sum().double()


def nothing_else(batch: Batch) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Truth:
    """What a loss is.

    Attributes:
        config: the LossConfig that the loss is, or that it would be but for its fault, or together with ``given``;
            None: none. Its log_ratio_limit is the loss's own; where a cap or a dual bound hides it, another is as true.
        factor: the loss is this times that of the config.
        is_config: whether config, factor and at most a ``normalizer=`` or whitened advantages reproduce value and
            gradient. False: it must not be called a config, whatever ``given`` can make of it.
        fault_words: where the loss has a fault, lower-case words of which one must be in its name.
        say: lower-case words of which one must be in the report.
        given: the arguments of ``grpo_loss`` with which the config reproduces the loss, of a batch: proof that a fault
            is the one which is named, or that a number which follows the batch is a number.
        proven: whether config, factor and ``given`` reproduce the loss exactly; False: they differ.
        gradient_alone: the config reproduces the gradient, and not the value.
        looks_like: a config that a careless search would find, and that differs.
        advantages, layout, mask: how the loss wants its tensors; "unshifted" has logits, ids and mask of T+1 positions.
        rounds: relative difference that a lower precision, or a tanh near 1, makes.
        far: whether value and gradient keep their digits at log-ratios beyond 20; a hinge or a tanh cancels them.
        kind: "A" no config, "B" with a fault or an option beside the config, "C" a config in an odd spelling.
    """

    kind: Literal["A", "B", "C"]
    config: LossConfig | None = None
    factor: float = 1.0
    is_config: bool = False
    fault_words: tuple[str, ...] = ()
    say: tuple[str, ...] = ()
    given: Callable[[Batch], Mapping[str, Any]] = nothing_else
    proven: bool = False
    gradient_alone: bool = False
    looks_like: LossConfig | None = None
    advantages: Literal["sequence", "token"] = "sequence"
    layout: Literal["aligned", "unshifted", "flat"] = "aligned"
    mask: torch.dtype = torch.float64
    rounds: float = 1e-9
    far: bool = True


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def sequence_means(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each sequence's live tokens, (B,)."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def ppo_terms(log_ratio: Tensor, A: Tensor, low: float | Tensor = 0.2, high: float | Tensor = 0.2) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * A, ratio.clamp(min=1 - low).clamp(max=1 + high) * A)


def k3(lp: Tensor, ref: Tensor) -> Tensor:
    return torch.expm1(ref - lp) - (ref - lp)


FREE = (None, None)


def plain(surrogate: Any, aggregation: str = "token_mean", **fields: Any) -> LossConfig:
    """Return a config without a limit of the log-ratio: losses of the wild have none."""
    return LossConfig(surrogate, aggregation=aggregation, **({"log_ratio_limit": None} | fields))


def no_config(looks_like: LossConfig, *say: str, **others: Any) -> Truth:
    if "given" in others:
        others = {"config": looks_like, "proven": True} | others
    return Truth("A", looks_like=looks_like, say=say, **others)


def fault(config: LossConfig | None, *words: str, **others: Any) -> Truth:
    """Return the truth of a loss with a fault: with ``given`` or ``factor`` it is proven to be that one."""
    others = {"proven": "given" in others or "factor" in others, "fault_words": words, "say": words} | others
    return Truth("B", config, **others)


def is_one(config: LossConfig, kind: Literal["A", "B", "C"] = "C", **others: Any) -> Truth:
    return Truth(kind, config, is_config=True, proven=True, **others)
