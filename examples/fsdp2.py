"""FSDP2 on several ranks: weights are cut, and the loss runs inside the forward that gathers them.

torchrun --nproc-per-node 2 examples/fsdp2.py                            # a tiny model of random weights
torchrun --nproc-per-node 8 examples/fsdp2.py --model PATH --lr 2e-6     # a pretrained one, on GPUs

Every rank samples and learns from prompts of its own. ``normalizer`` counts the tokens of all ranks, so that the step
is that of one process with the whole batch.
"""

from __future__ import annotations

import os
import random

import common
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from grpo_kernels import LossConfig, advantages, collate, hf, normalizer


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the mean reward of all ranks at every fifth step."""
    options = common.options(__doc__, arguments, steps=20, lr=3e-3)
    if "RANK" not in os.environ:
        raise SystemExit("this needs several ranks: torchrun --nproc-per-node 2 examples/fsdp2.py")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    config = LossConfig.preset("dapo")
    model, tokenizer = common.load(options.model, options.device)  # of one seed: equal on all ranks
    hf.attach(model, config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    random.seed(options.seed + rank)
    torch.manual_seed(options.seed + rank)
    for step in range(options.steps):
        samples, rewards = common.sample(model, tokenizer, synced_gpus=True)
        inputs, tokens = collate(samples)
        tokens["advantages"] = advantages.group_normalized(rewards, common.GROUP)
        count = normalizer(tokens["mask"], config, world_size=ranks, group=distributed.group.WORLD)
        out = model(**inputs, grpo=hf.batch(**tokens, normalizer=count))  # hf.batch: mixed precision leaves it alone
        out.loss.backward()  # FSDP takes the mean over the ranks, which the normalizer knows
        optimizer.step()
        optimizer.zero_grad()

        mean = rewards.mean()
        distributed.all_reduce(mean)
        entropy = out.metrics.all_reduce(distributed.group.WORLD).entropy.item()
        if rank == 0 and common.is_shown(step, options):
            print(f"step {step + 1}: reward {mean.item() / ranks:.3f}, entropy {entropy:.2f}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
