"""Where a model's weights live: whole on every rank, or cut over them; and what is done to such weights as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ..objectives.groups import begin_total
from .ranks import Ranks, Several

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return what is called in the model's place, so that gradients are averaged over ranks."""
    if ranks.group is None:
        return model
    return nn.parallel.DistributedDataParallel(model, process_group=ranks.group)


def shard(model: nn.Module, ranks: Several) -> None:
    """Cut the weights over the ranks (FSDP2), in units: every layer; the norm and the head behind them, with the
    embedding where it is the head's weight; what is left."""
    from torch.distributed.fsdp import fully_shard

    mesh = ranks.mesh["dp"]
    layers, behind = _layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    tied = [embedding] if embedding.weight is head.weight else []
    fully_shard([*behind, *tied, head], mesh=mesh)
    fully_shard(model, mesh=mesh)


def cut_vocabulary(model: Any, ranks: Several) -> None:
    """Cut the head's weight over the ranks of a "tp" row; everything else is on all of them. Its own forward, which
    samples, returns the logits of the whole vocabulary."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        raise ValueError(f"--tp needs a head with a weight of its own; {type(model).__name__}'s is the embedding.")
    parallelize_module(head, ranks.mesh["tp"], ColwiseParallel(output_layouts=Replicate()))


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Average what each rank has of the gradients over those with the same part of the weights. DDP takes no model of
    which a weight is cut."""
    if ranks.group is None or ranks.count == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            held = parameter.grad.to_local() if is_cut(parameter.grad) else parameter.grad
            held.copy_(begin_total(held, ranks.group)() / ranks.count)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs every rank."""
    return hasattr(model, "set_requires_gradient_sync")


def _layers(model: Any) -> tuple[nn.ModuleList, list[nn.Module]]:
    """Return a model's layers, and the modules behind them that have weights: the norm."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
                children = dict(parent.named_children())
                after = [children[other] for other in list(children)[list(children).index(name) + 1 :]]
                return module, [other for other in after if any(True for _ in other.parameters())]
    raise ValueError(f"--fsdp needs a model with a list of layers; {type(model).__name__} has none.")


def accumulation(policy: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Return what a micro-batch's forward and backward are to be inside of: only a step's last averages gradients.
    FSDP, which is there to save memory, holds no whole ones and averages with each."""
    if last or not isinstance(policy, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = policy.no_sync()
    return context


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece. Every rank must ask."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def is_cut(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which a rank has a part."""
    return hasattr(tensor, "full_tensor")


def cut_as(values: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor what this rank holds of ``like``."""
    values = values.to(like.device)
    if not is_cut(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a joint norm of at most ``limit``, and return the norm that they had."""
    units = by_mesh(parameters)
    norms = [
        whole(torch.nn.utils.get_total_norm([each.grad for each in unit if each.grad is not None])) for unit in units
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for unit in units:
        torch.nn.utils.clip_grads_with_norm_(unit, limit, norm)
    return norm


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in lists that one operator takes together: those that lie whole on each rank, those that are
    cut."""
    units: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        units.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(units.values())
