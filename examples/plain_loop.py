"""GRPO in a plain loop: sample, reward, advantages, old log-probs, two updates; the loss reads the logits once.

python examples/plain_loop.py                               # a tiny model of random weights learns to repeat a digit
python examples/plain_loop.py --model PATH --lr 2e-6        # a pretrained one
"""

from __future__ import annotations

import common
import torch

from grpo_kernels import advantages, collate, grpo_loss, token_log_probs


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print every fifth step, and return the mean reward of each."""
    options = common.options(__doc__, arguments, steps=30, lr=3e-3)
    model, tokenizer = common.load(options.model, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    curve = []
    for step in range(options.steps):
        samples, rewards = common.sample(model, tokenizer)
        inputs, tokens = collate(samples)  # padded, and shifted so that row t predicts token_ids[:, t]
        tokens["advantages"] = advantages.group_normalized(rewards, common.GROUP)
        with torch.no_grad():  # of the policy that has sampled; nothing of the vocabulary's size is kept
            old = token_log_probs(model(**inputs).logits, tokens["token_ids"], tokens["mask"])
        for _ in range(2):
            out = grpo_loss(model(**inputs).logits, **tokens, old_log_probs=old, config="grpo", inplace=True)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        curve.append(rewards.mean().item())
        if common.is_shown(step, options):
            clipped, entropy = out.metrics.clip_fraction.item(), out.metrics.entropy.item()
            print(f"step {step + 1}: reward {curve[-1]:.3f}, entropy {entropy:.2f}, clipped {clipped:.3f}")
    return curve


if __name__ == "__main__":
    main()
