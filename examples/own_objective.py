"""An objective of one's own: one function of a token's ratio and advantage, on the fused kernels.

python examples/own_objective.py                            # a tiny model of random weights
python examples/own_objective.py --model PATH --lr 2e-6     # a pretrained one

A surrogate is its value; autograd makes the slopes, and level, aggregation, KL and the rest of a config go with it.
"""

from __future__ import annotations

import common
import torch
from torch import Tensor

from grpo_kernels import LossConfig, Surrogate, advantages, collate, grpo_loss, register_surrogate, token_log_probs
from grpo_kernels.surrogates import Point


@register_surrogate
class SoftClip(Surrogate):
    """PPO with a smooth bound: a ratio's gain levels off at ``1 + width`` and at ``1 - width``."""

    width: float = 0.4
    equation = "-A·(1 + width·tanh((r - 1)/width))"

    def value(self, t: Point) -> Tensor:
        return -t.advantage * (1 + self.width * torch.tanh((t.ratio - 1) / self.width))


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print every fifth step, and return the mean reward of each."""
    options = common.options(__doc__, arguments, steps=30, lr=3e-3)
    config = LossConfig(SoftClip(0.4), level="token", aggregation="token_mean", entropy_coef=0.001)
    print(config)
    model, tokenizer = common.load(options.model, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    curve = []
    for step in range(options.steps):
        samples, rewards = common.sample(model, tokenizer)
        inputs, tokens = collate(samples)
        tokens["advantages"] = advantages.group_normalized(rewards, common.GROUP)
        with torch.no_grad():
            old = token_log_probs(model(**inputs).logits, tokens["token_ids"], tokens["mask"])
        for _ in range(2):
            out = grpo_loss(model(**inputs).logits, **tokens, old_log_probs=old, config=config)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(rewards.mean().item())
        if common.is_shown(step, options):
            largest, entropy = out.metrics.ratio_max.item(), out.metrics.entropy.item()
            print(f"step {step + 1}: reward {curve[-1]:.3f}, largest ratio {largest:.2f}, entropy {entropy:.2f}")
    return curve


if __name__ == "__main__":
    main()
