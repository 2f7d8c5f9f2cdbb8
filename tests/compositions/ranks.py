"""The losses over two ranks, which are threads: to the table they are functions like others.

A value that all ranks have, and whose gradient each makes a part of, is joined so that autograd sees the parts; shares
are added.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import LossOutput, Recorded, Teacher, grpo_loss, linear_grpo_loss
from grpo_kernels.calls.outputs import TokenLosses
from grpo_kernels.objectives.config import resolve_config

RANKS = 2


def _on_ranks(function: Callable[[int], Any]) -> list[Any]:
    """``function(rank)`` on every rank, in the caller's autocast."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    try:
        from distributed import on_threads
    finally:
        sys.path.pop(0)
    autocast = torch.is_autocast_enabled("cpu")

    def of_rank() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return function(torch.distributed.get_rank())

    return on_threads(RANKS, of_rank)


def _joined(outs: list[LossOutput], together: Callable[[list[Tensor]], Tensor], of_tokens: bool = False) -> LossOutput:
    """The first rank's output with what ranks make together; ``of_tokens``: log-probs and entropies too."""
    loss = "token_losses" if isinstance(outs[0], TokenLosses) else "loss"
    names = (loss, *(("log_probs", "entropy") if of_tokens else ()))
    return outs[0]._replace(**{name: together([getattr(out, name) for out in outs]) for name in names})


def _parts_of_one(values: list[Tensor]) -> Tensor:
    """One value that every rank has, with the gradients of all."""
    assert all(torch.equal(value, values[0]) for value in values)
    return sum(values[1:], values[0]) - sum((value.detach() for value in values[1:]), torch.zeros_like(values[0]))


@torch.compiler.disable
def over_vocabulary(logits: Tensor, token_ids: Tensor, *, support: Any = None, **keywords: Any) -> LossOutput:
    """grpo_loss of two ranks, which have four columns and the others."""
    cut = 4

    def of_rank(rank: int) -> LossOutput:
        columns = slice(0, cut) if rank == 0 else slice(cut, None)
        own = support[..., columns] if isinstance(support, Tensor) else support
        group = torch.distributed.group.WORLD
        return grpo_loss(logits[..., columns].clone(), token_ids, vocab_group=group, support=own, **keywords)

    return _joined(_on_ranks(of_rank), _parts_of_one)


@torch.compiler.disable
def linear_over_vocabulary(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, support: Any = None, **keywords: Any
) -> LossOutput:
    """linear_grpo_loss of two ranks; each makes its part of the gradient of the states, which autograd adds."""
    cut = 4

    def of_rank(rank: int) -> LossOutput:
        columns = slice(0, cut) if rank == 0 else slice(cut, None)
        own = support[..., columns] if isinstance(support, Tensor) else support
        over = {"vocab_group": torch.distributed.group.WORLD, "hidden_grad": "partial"}
        return linear_grpo_loss(hidden, weight[columns], token_ids, support=own, **over, **keywords)

    return _joined(_on_ranks(of_rank), _parts_of_one)


@torch.compiler.disable
def over_sequences(logits: Tensor, token_ids: Tensor, *, mask: Tensor, **keywords: Any) -> LossOutput:
    """grpo_loss of two ranks, which have the even and the odd tokens of every sequence; where a level asks for their
    order, the first and the last ones."""
    config = resolve_config(keywords["config"])
    places = [torch.arange(rank, token_ids.shape[1], RANKS) for rank in range(RANKS)]
    if config.pooling.running:
        places = list(torch.arange(token_ids.shape[1]).tensor_split(RANKS))
        keywords["sequence_layout"] = "contiguous"
    bounds = keywords.pop("cu_seqlens", None)

    def of_rank(rank: int) -> LossOutput:
        at = places[rank]

        def own(value: Any) -> Any:
            if isinstance(value, Teacher):
                return Teacher(logits=value.logits[:, at])
            is_of_tokens = isinstance(value, (Tensor, Recorded)) and value.shape[:2] == token_ids.shape
            return value[:, at] if is_of_tokens else value

        given = {name: own(value) for name, value in keywords.items()}
        if bounds is not None:
            given["cu_seqlens"] = torch.searchsorted(at, bounds)
        rows = logits[:, at].clone()
        return grpo_loss(rows, own(token_ids), mask=own(mask), sequence_group=torch.distributed.group.WORLD, **given)

    return _joined(_on_ranks(of_rank), functools.partial(_add_or_scatter, places=places), of_tokens=True)


def _add_or_scatter(parts: list[Tensor], places: list[Tensor]) -> Tensor:
    """The sum of shares of a loss; tokens where they belong."""
    if parts[0].dim() == 0:
        return sum(parts[1:], parts[0])
    order = torch.cat(places).argsort()
    return torch.cat(parts, 1)[:, order]
