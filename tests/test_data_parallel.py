"""Ranks and micro-batches of any lengths give the gradient of the one batch that they are parts of."""

from __future__ import annotations

import contextlib
import os
import types

import pytest
import torch
from distributed import mesh, pool, world
from test_fsdp import assert_close_to, policy, shard

from grpo_kernels import grpo_loss, normalizer

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]
LENGTHS = (9, 4, 7, 0, 3, 9, 0, 0, 5, 8, 2, 1, 6, 0, 0, 0)
"""Of the answers: the second micro-batch of the second of two ranks has none, the last rank of four one alone."""
CONFIGS = ("dapo", "grpo", "gspo")


def sequences() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (len(LENGTHS), 12), generator=g)
    mask = torch.arange(11) - 2 < torch.tensor(LENGTHS)[:, None]
    return {
        "ids": ids,
        "advantages": torch.randn(len(LENGTHS), generator=g),
        "mask": mask & (torch.arange(11) >= 2),
        "old": -4.5 + 0.1 * torch.randn(len(LENGTHS), 11, generator=g),
    }


def part(rows: slice) -> tuple[torch.Tensor, dict]:
    """A micro-batch, no longer than its longest answer."""
    batch = {name: values[rows] for name, values in sequences().items()}
    longest = max(int(batch["mask"].sum(-1).max()) + 3, 3)
    ids, cut = batch["ids"][:, :longest], slice(0, longest - 1)
    grpo = {"token_ids": ids[:, 1:], "advantages": batch["advantages"]}
    return ids, grpo | {"mask": batch["mask"][:, cut], "old_log_probs": batch["old"][:, cut]}


def loss_of(model, ids, grpo, config: str, from_hidden: bool, **options):
    if from_hidden:
        return model(input_ids=ids, grpo=types.MappingProxyType({**grpo, **options})).loss, None
    out = grpo_loss(model(input_ids=ids).logits, **grpo, config=config, **options)
    return out.loss, out.metrics


def window(rank: int, ranks: int, micro_batches: int) -> list[tuple[torch.Tensor, dict]]:
    """This rank's micro-batches of a step."""
    size = len(LENGTHS) // (ranks * micro_batches)
    first = rank * micro_batches
    return [part(slice(size * (first + i), size * (first + i + 1))) for i in range(micro_batches)]


def step(model, config: str, from_hidden: bool, micro_batches: int, group, unsynced=contextlib.nullcontext) -> tuple:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = window(rank, ranks, micro_batches)
    masks = [grpo["mask"] for _, grpo in parts]
    denominator = normalizer(masks, config, world_size=ranks, group=group)
    total, metrics = torch.zeros(()), []
    for i, (ids, grpo) in enumerate(parts):
        last = i == micro_batches - 1
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last else unsynced():
            loss, of_part = loss_of(model, ids, grpo, config, from_hidden, normalizer=denominator)
            loss.backward()
        total, metrics = total + loss.detach(), [*metrics, of_part]
    torch.distributed.all_reduce(total)
    merged = None if from_hidden else sum(metrics).all_reduce(group).vector
    return total / ranks, merged


def wrapped(kind: str, model):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "hsdp":
        return shard(model, "head", mesh=mesh(2, 2, names=("replicate", "shard")))
    return shard(model, "norm and head")


def gradients_of(kind: str, config: str, from_hidden: bool, micro_batches: int) -> tuple:
    model = policy(config=config)
    run = wrapped(kind, model)
    unsynced = getattr(run, "no_sync", contextlib.nullcontext)
    loss, metrics = step(run, config, from_hidden, micro_batches, world(), unsynced)
    return loss, metrics, full_gradients(model)


def full_gradients(model) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def whole(config: str) -> tuple:
    """The same step as one batch of one process."""
    model = policy(config=config)
    ids, grpo = part(slice(None))
    out = grpo_loss(model(input_ids=ids).logits, **grpo, config=config)
    out.loss.backward()
    return out.loss.detach(), out.metrics.vector, full_gradients(model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
@pytest.mark.parametrize("from_hidden", [True, False], ids=["hidden", "logits"])
def test_a_step_over_ranks_is_one_batch(kind, ranks, config, from_hidden):
    """2 ranks of 1 micro-batch too; ranks and micro-batches without a live token take part."""
    loss, metrics, gradients = whole(config)
    for micro_batches in (1, 2):
        for of_rank, merged, found in pool(ranks).run(gradients_of, kind, config, from_hidden, micro_batches):
            torch.testing.assert_close(of_rank, loss, rtol=2e-6, atol=2e-6)
            assert_close_to(found, {name: g.double() for name, g in gradients.items()}, 4e-6, f"{kind} {config}")
            if merged is not None:
                merged[:3] /= ranks  # terms of the loss, which is written for a mean of gradients
                torch.testing.assert_close(merged, metrics, rtol=2e-6, atol=2e-6)


def accelerated(config: str, micro_batches: int) -> tuple:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in named.items()}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    try:
        model = policy(config=config)
        prepared = accelerator.prepare(model)
        assert isinstance(prepared, torch.nn.parallel.DistributedDataParallel)
        parts = window(rank, ranks, micro_batches)
        masks = [grpo["mask"] for _, grpo in parts]
        denominator = normalizer(masks, config, world_size=ranks, group=world()) / micro_batches
        for ids, grpo in parts:
            with accelerator.accumulate(prepared):
                scale = 1 / micro_batches
                out = prepared(
                    input_ids=ids,
                    grpo=types.MappingProxyType({**grpo, "normalizer": denominator, "grad_scale": scale}),
                )
                accelerator.backward(out.loss)
        return full_gradients(model)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        for name in named:
            os.environ.pop(name)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_accelerate(micro_batches):
    pytest.importorskip("accelerate")
    _, _, gradients = whole("dapo")
    for found in pool(2).run(accelerated, "dapo", micro_batches):
        assert_close_to(found, {name: g.double() for name, g in gradients.items()}, 4e-6, "accelerate")
