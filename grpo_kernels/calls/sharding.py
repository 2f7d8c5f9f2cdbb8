"""What users say of a vocabulary over several ranks: a process group and bounds, or DTensors, and that ranks agree."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor

from ..backends.spec import LogitArgs
from ..objectives.checks import check_tensors, describe, fail
from ..objectives.compiler import outside_graphs
from ..objectives.groups import agreement, begin_total, checksum, forget, gather, get_ranks, in_words, meets, read_group
from ..objectives.settings import check_name, read_integer, shown
from .batch import LossArguments
from .head import HeadTensors
from .tokens import RowTokens
from .vocabulary import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that are whole, or say nothing of other ranks."""


def is_whole(group: object, start: object, size: object) -> bool:
    """Whether a call's ``vocab_group``, ``vocab_start`` and ``vocab_size`` say that its vocabulary is all here."""
    return group is None and start is None and size is None


@outside_graphs
def read_shard(
    function: str,
    tensor: Tensor,
    dim: int,
    group: Any,
    start: int | None,
    size: int | None,
    check: bool | None,
    states: object = None,
) -> tuple[Tensor, VocabShard | None]:
    """Return this rank's part of a tensor, and which columns of the vocabulary it has; None: all of them.

    Args:
        tensor: a plain one whose dimension ``dim`` is the vocabulary's, or a DTensor.
        group: what a user gave for the ranks that share the vocabulary, ``start`` and ``size`` for the first of this
            rank's columns and the number of all that count. Where one of the two is missing every rank tells how many
            columns it has; this waits for the device.
        states: of a weight, what it is multiplied with, whose placements say on which ranks its gradient is a part.
    """
    if is_dtensor(tensor):
        if group is not None or start is not None:
            got = "vocab_group=" if group is not None else "vocab_start="
            hint = "a DTensor says itself which ranks hold what; to_local() gives the part that these belong to"
            fail(function, "no vocab_group= and vocab_start= beside a DTensor", got, hint=hint)
        return _shard_of_dtensor(function, tensor, dim, size, states)
    if is_whole(group, start, size):
        return tensor, None
    members = read_group(function, "vocab_group", group)
    if members is None:
        name = "logits" if dim else "weight"
        check_tensors(function, {name: tensor}, needed=(name,))
        if tensor.dim() == 0:  # refused with what it should be
            return tensor, None
        return tensor, _columns_that_count(function, tensor.shape[dim], start, size)
    what = f"{function}, columns"
    telling = meets(what, "vocab_group", members, check)
    with agreement(what, "vocab_group", members, check) as facts:
        if facts is not None:
            facts |= {"vocab_start (given or not)": str(start is not None), "vocab_size": str(size)}
        start, size = _read_layout(function, start, size)
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.dim() < 2:
            got = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            fail(function, "a tensor of columns (..., V) or of rows (V, H) of the vocabulary", got, error=TypeError)
    try:
        return tensor, _shard_of_rank(function, tensor.shape[dim], members, start, size, telling, tensor.device)
    except ValueError:
        forget(what, "vocab_group", members)
        raise


def _read_layout(function: str, start: int | None, size: int | None) -> tuple[int | None, int | None]:
    """Return them as Python's own ints. Raise unless they are integers in range, or None."""
    read = []
    for name, value, least in (("vocab_start", start, 0), ("vocab_size", size, 1)):
        number = None if value is None else read_integer(value)
        if value is not None and (number is None or number < least):
            error = TypeError if number is None else ValueError
            fail(function, f"{name} to be an int >= {least}", shown(value), error=error)
        read.append(number)
    return read[0], read[1]


def _columns_that_count(function: str, width: int, start: int | None, size: int | None) -> VocabShard | None:
    """Return what counts of a vocabulary that one rank holds."""
    start, size = _read_layout(function, start, size)
    if start:
        hint = "vocab_group= says which ranks hold the other columns"
        fail(function, "vocab_start=0 where one rank holds the vocabulary", repr(start), hint=hint)
    if size is not None and size > width:
        fail(function, f"vocab_size <= {width}, the columns that are here", shown(size))
    return None if size in (None, width) else VocabShard(None, 0, size or 0, size or 0)


def _shard_of_rank(
    function: str,
    width: int,
    members: ProcessGroup,
    start: int | None,
    size: int | None,
    telling: bool,
    device: torch.device,
) -> VocabShard:
    """Return the columns of this rank; where ranks tell each other theirs, make sure that these are a vocabulary."""
    if start is not None and size is not None and not telling:
        return VocabShard(members, start, max(0, min(width, size - start)), size)
    own = torch.tensor([-1 if start is None else start, width], device=device)
    firsts, widths = (column.tolist() for column in gather(own, members).unbind(-1))
    if start is None:
        firsts = [sum(widths[:rank]) for rank in range(len(widths))]
    vocab = max(map(sum, zip(firsts, widths, strict=True))) if size is None else size
    if min(widths) >= vocab:
        got = f"{min(widths)} columns on each rank, of {vocab} that count"
        hint = "whole logits or a whole head (gather_output=True, output_layouts=Replicate()) need no vocab_group="
        fail(function, "each rank of vocab_group to hold a part of the vocabulary", got, hint=hint)
    end = 0
    for first, last in sorted((first, min(first + count, vocab)) for first, count in zip(firsts, widths, strict=True)):
        if last > first:
            if first != end:
                end = -1
                break
            end = last
    if end != vocab:
        got = ", ".join(f"[{first}, {first + count})" for first, count in zip(firsts, widths, strict=True))
        hint = "vocab_start= is the first column of a rank; without it ranks hold columns one after the other"
        fail(function, f"ranks of vocab_group to hold columns [0, {vocab}), each of them once", got, hint=hint)
    first = firsts[torch.distributed.get_rank(members)]
    return VocabShard(members, first, max(0, min(width, vocab - first)), vocab)


HiddenGrad = Literal["all_reduce", "overlapped", "partial"]


def local_head(
    function: str, head: HeadTensors, weight: Tensor, shard: VocabShard | None, hidden_grad: HiddenGrad
) -> HeadTensors:
    """Return a head with this rank's part of what are DTensors; ``weight`` is its own, the rows of ``shard``."""
    if weight is head.weight and not any(map(is_dtensor, head)):
        return head
    parts: dict[str, Any] = {"weight": weight}
    for name, rows in (("bias", head.bias), ("adapter_weight", head.adapter_weight)):
        if rows is None or not (is_dtensor(rows) or (is_dtensor(head.weight) and shard is not None)):
            continue
        size = None if shard is None else shard.vocab
        own = is_dtensor(rows)
        here, of_rows = _shard_of_dtensor(function, rows, 0, size, head.hidden) if own else (rows, None)
        if of_rows != shard:
            hint = "distribute_tensor(tensor, weight.device_mesh, weight.placements) cuts it likewise"
            fail(function, f"{name} in the shards of the weight", f"{type(rows).__name__} in others", hint=hint)
        parts[name] = here
    partial = None if shard is None or hidden_grad != "partial" else shard.group
    for name in ("hidden", "adapter_states"):
        parts[name] = local(function, name, getattr(head, name), partial)
    return head._replace(**parts)


def read_hidden_grad(
    function: str, shard: VocabShard | None, hidden_grad: HiddenGrad
) -> Callable[[Tensor], Callable[[], Tensor]] | None:
    """Return what begins to add gradients of states over ranks; None: nobody does here."""
    check_name(f"{function}: hidden_grad", hidden_grad, get_args(HiddenGrad))
    if shard is None or shard.group is None or hidden_grad == "partial":
        return None
    return functools.partial(begin_total, group=shard.group, overlapped=hidden_grad == "overlapped")


@outside_graphs
def outside_a_graph(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a function with the arguments that it has, outside of a compiled caller's graph: ranks talk there."""
    return function(**{name: value for name, value in given.items() if name != "unknown"})


def is_dtensor(tensor: object) -> TypeGuard[Any]:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(function: str, name: str, tensor: Any, partial: ProcessGroup | None = None) -> Any:
    """Return this rank's part of a DTensor of tokens or states, which every rank of a vocabulary holds whole, or of its
    own sequences; anything else as it is. ``partial``: the ranks that each give a part of its gradient, which the
    DTensor sums."""
    if not is_dtensor(tensor):
        return tensor
    for placement in tensor.placements:
        if placement.is_partial() or (placement.is_shard() and placement.dim != 0):
            hint = "redistribute it to Replicate() there"
            fail(function, f"{name} replicated, or cut into sequences (Shard(0))", str(placement), hint=hint)
    if partial is None:
        return tensor.to_local()
    mesh, ranks = tensor.device_mesh, get_ranks(partial)
    groups = [get_ranks(mesh.get_group(dim)) for dim in range(mesh.ndim)]
    if ranks not in groups:
        hint = "its mesh has to have them as a dimension, along which its gradient is summed"
        fail(function, f'{name} on a mesh of vocab_group\'s ranks with hidden_grad="partial"', str(mesh), hint=hint)
    sums = torch.distributed.tensor.Partial()
    grads = [sums if of_dim == ranks else each for each, of_dim in zip(tensor.placements, groups, strict=True)]
    return tensor.to_local(grad_placements=grads)


def refuse_inplace(function: str, logits: object, inplace: bool) -> None:
    """Raise for DTensors: what autograd knows of them is not known of their local parts, which would be overwritten."""
    if inplace and is_dtensor(logits):
        hint = "inplace=False, or vocab_group= and logits that are plain tensors"
        fail(function, "inplace=False with a DTensor", "inplace=True", hint=hint)


def local_tokens(function: str, token_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return this rank's part of ids and mask."""
    return local(function, "token_ids", token_ids), local(function, "mask", mask)


def local_arguments(function: str, arguments: LossArguments) -> LossArguments:
    """Return a loss's arguments with this rank's part of those that are DTensors."""
    tensors = {name: local(function, name, tensor) for name, tensor in arguments.tensors.items()}
    return arguments._replace(**tensors)


def _shard_of_dtensor(
    function: str, tensor: Any, dim: int, size: int | None, states: Any
) -> tuple[Tensor, VocabShard | None]:
    """Return the local part of a DTensor, and its columns: a dimension of the mesh cuts the vocabulary, or none."""
    dim %= tensor.dim()
    mesh, cut = tensor.device_mesh, []
    for place, placement in enumerate(tensor.placements):
        plain = type(placement) in (torch.distributed.tensor.Shard, torch.distributed.tensor.Replicate)
        if not plain or (placement.is_shard() and placement.dim not in (0, dim)):
            hint = "redistribute it: Shard over the vocabulary on one dimension of the mesh, Replicate() on the others"
            fail(
                function, "a DTensor in plain shards of the vocabulary or replicated", str(tensor.placements), hint=hint
            )
        if placement.is_shard() and placement.dim == dim:
            cut.append(place)
    if len(cut) > 1:
        fail(function, "a vocabulary cut by one dimension of the mesh", f"{tensor.placements} on {mesh}")
    size = _read_layout(function, None, size)[1]
    vocab = tensor.shape[dim] if size is None else size
    if vocab > tensor.shape[dim]:
        fail(function, f"vocab_size <= {tensor.shape[dim]}, the columns of the DTensor", shown(size))
    here = tensor.to_local() if states is None else tensor.to_local(grad_placements=_parts(function, tensor, states))
    members = read_group(function, "the mesh", mesh.get_group(cut[0])) if cut else None
    if members is None:
        return here, None if vocab == tensor.shape[dim] else VocabShard(None, 0, vocab, vocab)
    widest = -(-tensor.shape[dim] // mesh.size(cut[0]))  # as torch.chunk cuts
    start = min(mesh.get_local_rank(cut[0]) * widest, tensor.shape[dim])
    return here, VocabShard(members, start, max(0, min(here.shape[dim], vocab - start)), vocab)


def _parts(function: str, weight: Any, states: Any) -> list[Any]:
    """Return the placements of a weight's gradient: a part of it where ranks have states of other tokens."""
    mesh = weight.device_mesh
    spread = [dim for dim, each in enumerate(weight.placements) if each.is_replicate() and mesh.size(dim) > 1]
    if spread and not (is_dtensor(states) and states.device_mesh == mesh):
        hint = "DTensor.from_local(hidden, weight.device_mesh, [...]): Shard(0) where ranks have tokens of their own"
        expected = "hidden states on the mesh of a weight that is replicated on one of its dimensions"
        fail(function, expected, type(states).__name__, hint=hint)
    sums = torch.distributed.tensor.Partial()
    parts = {dim for dim in spread if states.placements[dim].is_shard()}
    return [sums if dim in parts else each for dim, each in enumerate(weight.placements)]


ONE_RANK: AbstractContextManager[None] = contextlib.nullcontext()
"""The block of a rank that shares nothing."""


def vocabulary_agreement(
    function: str, shard: VocabShard, check: bool | None
) -> AbstractContextManager[dict[str, int | str] | None]:
    """Return the block in which a call's own checks run: where ranks share a vocabulary, all raise what one does."""
    if shard.group is None:
        return ONE_RANK
    hint = (
        "the ranks of a vocabulary are given the same tokens. Shards of FSDP's are no such ones: there "
        "grpo_kernels.hf.attach computes the loss inside the model's forward, where the head is whole"
    )
    return agreement(function, "vocab_group", shard.group, check, hint)


def facts_of(
    tokens: RowTokens, logit_args: LogitArgs, tensors: Mapping[str, object], **others: object
) -> dict[str, int | str]:
    """Return what is the same on every rank of a vocabulary: checksums of ``tensors``, and ``others`` in words."""
    facts: dict[str, int | str] = {
        "dtype of the logits": str(tokens.dtype),
        "shape of token_ids": str(tuple(tokens.shape)),
        "token_ids and mask": checksum(torch.where(tokens.live, tokens.token_ids, -1)),
    }
    numbers = {name: in_words(value) for name, value in logit_args._asdict().items()}
    sums = {name: checksum(_live(value, tokens)) for name, value in tensors.items() if isinstance(value, Tensor)}
    if tokens.temperature is not None:
        sums["temperature"] = checksum(torch.where(tokens.live, tokens.temperature, 0))
    return facts | numbers | sums | {name.replace("_", " "): str(value) for name, value in others.items()}


def _live(values: Tensor, tokens: RowTokens) -> Tensor:
    """Return values of tokens with 0 where they do not count; others as they are."""
    return torch.where(tokens.live.view(tokens.shape), values, 0) if values.shape == tokens.shape else values
