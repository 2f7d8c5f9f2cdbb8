"""Megatron's output layer under the losses: the functions of docs/several-devices.md, in steps like Megatron's.

Where megatron-core is installed its own layer and schedule run; everywhere stand-ins do, of what it does on a GPU alone
(sequence parallelism, gradients added into ``main_grad``) or with packages of its own.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import mesh, pool

from grpo_kernels import grpo_loss, normalizer

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "several-devices.md"
VOCAB, PADDED, HIDDEN, LENGTH = 200, 256, 16, 10
"""256 is the multiple of 128 · 2 that Megatron pads to."""
MICRO_BATCHES = 2


def recipe() -> dict[str, Any]:
    """The functions of the page's section."""
    section = PAGE.read_text().split("\n## Megatron's output layer\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)
    namespace: dict[str, Any] = {}
    exec(compile(block, "several-devices.md", "exec"), namespace)
    namespace["VOCAB"] = VOCAB
    return namespace


class CopyToRanks(torch.autograd.Function):
    """Stands for the all-reduce of the states' gradient in Megatron's ``ColumnParallelLinear``."""

    @staticmethod
    def forward(ctx, states, group):
        ctx.group = group
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class GatherSequence(torch.autograd.Function):
    """Stands for ``gather_from_sequence_parallel_region``: all-gather along s, and reduce-scatter in its backward."""

    @staticmethod
    def forward(ctx, states, group):
        ctx.group, ctx.rows = group, states.shape[0]
        parts = [torch.empty_like(states) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, states.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        rank = torch.distributed.get_rank(ctx.group)
        return gradient[rank * ctx.rows : (rank + 1) * ctx.rows], None


def gather(states: torch.Tensor, group: Any) -> torch.Tensor:
    return GatherSequence.apply(states, group)


class OutputLayer(torch.nn.Module):
    """Stands for ``ColumnParallelLinear(gather_output=False)``: logits [s, b, V/p] and no bias."""

    def __init__(self, weight: torch.Tensor, group: Any, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight, self.group = torch.nn.Parameter(weight), group
        self.into = gather if sequence_parallel else CopyToRanks.apply

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(self.into(states, self.group), self.weight), None


def layer_of(kind: str, weight: torch.Tensor, group: Any, sequence_parallel: bool) -> torch.nn.Module:
    """This rank's rows of the head, in a layer."""
    rank, rows = torch.distributed.get_rank(group), PADDED // 2
    own = weight[rank * rows : (rank + 1) * rows].clone()
    if kind == "stand-in":
        return OutputLayer(own, group, sequence_parallel)
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    config = ModelParallelConfig(
        tensor_model_parallel_size=2, use_cpu_initialization=True, perform_initialization=False
    )
    options = dict(config=config, init_method=torch.nn.init.zeros_, bias=False, gather_output=False, tp_group=group)
    layer = ColumnParallelLinear(HIDDEN, PADDED, **options)
    with torch.no_grad():
        layer.weight.copy_(own)
    return layer


def stand_in_schedule(outputs: tuple, per_token: bool, cp: int) -> torch.Tensor:
    """Stands for what Megatron's ``forward_step_calc_loss`` does to the loss, in place."""
    loss, *tokens, _ = outputs
    if tokens and not per_token:
        loss /= torch.clamp(tokens[0], min=1)
        loss /= MICRO_BATCHES
    elif not tokens:
        loss *= cp
        loss /= MICRO_BATCHES
    return loss


def megatron_schedule(outputs: tuple, per_token: bool, cp: int) -> torch.Tensor:
    from megatron.core import ModelParallelConfig
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

    config = ModelParallelConfig()
    config.calculate_per_token_loss = per_token
    options = dict(cp_group_size=cp, is_last_stage=True)
    found = forward_step_calc_loss(None, None, lambda _: outputs, config, None, False, MICRO_BATCHES, [], **options)
    return found[0]


def head() -> torch.Tensor:
    """(V padded, H); what pads it would win every token."""
    weight = torch.randn(PADDED, HIDDEN, generator=torch.Generator().manual_seed(3)) / 2
    weight[VOCAB:] = 10
    return weight


def micro_batch(rank: int, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """States [s, b, H] and the loss's tensors, (b, s - 1)."""
    g = torch.Generator().manual_seed(10 * rank + step)
    states = torch.randn(LENGTH, 2, HIDDEN, generator=g)
    ids = torch.randint(VOCAB, (2, LENGTH - 1), generator=g)
    mask = torch.arange(LENGTH - 1) < torch.tensor([[9], [2 + 3 * rank + step]])
    logits = (states.transpose(0, 1) @ head()[:VOCAB].T)[:, :-1]
    old = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] + 0.3 * torch.randn(ids.shape, generator=g)
    advantages = torch.tensor([1.0, -0.5 - rank])
    return states, {"token_ids": ids, "advantages": advantages, "mask": mask, "old_log_probs": old}


def whole_step(config: str) -> tuple[float, dict[tuple[int, int], torch.Tensor], torch.Tensor]:
    """One process with every token: loss, gradients of states by rank and micro-batch, gradient of the head."""
    places = [(rank, step) for rank in range(2) for step in range(MICRO_BATCHES)]
    leaves = {place: micro_batch(*place)[0].requires_grad_() for place in places}
    batches = [micro_batch(*place)[1] for place in places]
    weight = head()[:VOCAB].requires_grad_()
    logits = torch.cat([leaf.transpose(0, 1) @ weight.T for leaf in leaves.values()])
    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    out = grpo_loss(logits, **batch, config=config)
    out.loss.backward()
    return out.loss.item(), {place: leaf.grad for place, leaf in leaves.items()}, weight.grad


def step_of(kind: str, way: str, sequence_parallel: bool, returns: str, config: str, fused: bool) -> tuple:
    """This rank's step on a mesh of 2 × 2: loss summed over the step, gradients of its states, of its rows."""
    groups, functions = mesh(2, 2), recipe()
    dp, tp = groups["dp"].get_group(), groups["tp"].get_group()
    rank = groups["dp"].get_local_rank()
    layer = layer_of(kind, head(), tp, sequence_parallel)
    schedule = stand_in_schedule if kind == "stand-in" else megatron_schedule
    if fused:
        add_into_main_grad(layer.weight)
    masks = [micro_batch(rank, step)[1]["mask"] for step in range(MICRO_BATCHES)]
    per_token = returns == "sums"
    denominator: Any = 1.0
    if not per_token:
        denominator = normalizer(masks, config, world_size=2, group=dp) / MICRO_BATCHES
    total, of_states = torch.zeros(()), []
    for step in range(MICRO_BATCHES):
        states, batch = micro_batch(rank, step)
        if sequence_parallel:
            states = states.chunk(2)[groups["tp"].get_local_rank()]
        leaf = states.clone().requires_grad_()
        options = {"config": config, "normalizer": denominator}
        if way == "logits":
            out = functions["from_logits"](layer(leaf)[0], batch, tp, **options)
        else:
            region = gather if sequence_parallel else None
            out = functions["from_states"](leaf, layer.weight, batch, tp, region, **options)
        outputs = functions["loss_func"](
            out,
            {"tokens": batch["mask"].sum(), "one": torch.tensor(1)}.get(
                {"sums": "tokens", "means": "one"}.get(returns, "none")
            ),
        )
        loss = schedule(outputs, per_token, 1)
        total += loss.detach()
        loss.backward()
        of_states.append(leaf.grad)
    gradient = layer.weight.main_grad if fused else layer.weight.grad
    divisor = torch.tensor(2.0)
    if per_token:  # finalize_model_grads divides sums by the tokens of the step
        divisor = sum(mask.sum() for mask in masks).float()
        torch.distributed.all_reduce(divisor, group=dp)
    for each in (gradient, total):
        torch.distributed.all_reduce(each, group=dp)
        each /= divisor
    return total.item(), [each / divisor for each in of_states], gradient


def add_into_main_grad(weight: torch.nn.Parameter) -> None:
    """Stands for the hook of Megatron's DDP where gradient_accumulation_fusion is on: a gradient that a fused layer
    has added by itself is passed over."""
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False

    def hook(parameter: torch.nn.Parameter) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)


def steps_of(cases: list) -> list:
    return [step_of(*case) for case in cases]


def assert_whole(cases: list[tuple]) -> None:
    ranks = pool(4).run(steps_of, cases)
    for i, case in enumerate(cases):
        loss, of_states, of_head = whole_step(case[4])
        for rank, found in enumerate(ranks):
            data, shard = divmod(rank, 2)
            total, states, gradient = found[i]
            assert total == pytest.approx(loss, rel=1e-5), case
            own = torch.nn.functional.pad(of_head, (0, 0, 0, PADDED - VOCAB)).chunk(2)[shard]
            torch.testing.assert_close(gradient, own, rtol=0, atol=float(2e-6 * of_head.abs().max()))
            assert bool((gradient[max(VOCAB - shard * PADDED // 2, 0) :] == 0).all()), case
            for step, each in enumerate(states):
                wanted = of_states[data, step]
                wanted = wanted.chunk(2)[shard] if case[2] else wanted
                torch.testing.assert_close(each, wanted, rtol=0, atol=float(2e-6 * wanted.abs().max()))


WAYS: list[tuple[str, bool]] = [(way, parallel) for way in ("logits", "states") for parallel in (False, True)]
RETURNS = ("pair", "sums", "means")
"""(loss, report); (loss, tokens, report) with calculate_per_token_loss, and without."""


def test_a_step_is_one_process():
    """From logits and from states, with sequence parallelism and without, whatever the loss function returns."""
    cases = [("stand-in", *way, returns, "dapo", False) for way in WAYS for returns in RETURNS]
    cases += [("stand-in", *way, "pair", "gspo", False) for way in WAYS]
    assert_whole(cases)


def test_gradients_reach_main_grad():
    """The layer is not called, so nothing of it is fused, and Megatron's hook adds what autograd brings."""
    assert_whole([("stand-in", "states", parallel, "pair", "dapo", True) for parallel in (False, True)])


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatrons_own_layer_and_schedule():
    """What of them runs on a CPU."""
    assert_whole(
        [("megatron", way, False, returns, "dapo", False) for way in ("logits", "states") for returns in RETURNS]
    )
