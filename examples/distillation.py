"""Distillation from a teacher on the student's own samples: the exact reverse KL, and neither model makes logits.

python examples/distillation.py                                          # a tiny teacher, twice as wide, and student
python examples/distillation.py --model SMALL --teacher BIG --lr 1e-5    # of one family: they need one vocabulary
"""

from __future__ import annotations

import common
import torch

from grpo_kernels import Divergence, LossConfig, collate, hf


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print every tenth step, and return the mean divergence of each."""
    options = common.options(__doc__, arguments, steps=60, lr=3e-3, teacher=True)
    student, tokenizer = common.load(options.model, options.device)
    teacher, _ = common.load(options.teacher, options.device, hidden=128)
    ask = hf.teacher(teacher)  # its states and head, in the place of its logits
    hf.attach(student, LossConfig(surrogate=None, divergence=Divergence("reverse_kl")))
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, weight_decay=0.0)
    curve = []
    for step in range(options.steps):
        samples, _ = common.sample(student, tokenizer)
        inputs, tokens = collate(samples)
        out = student(**inputs, grpo={**tokens, "teacher": ask(**inputs)})
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(out.metrics.divergence.item())
        if common.is_shown(step, options, every=10):
            unsure = out.metrics.teacher_entropy.item()
            print(f"step {step + 1}: divergence {curve[-1]:.3f} of a teacher with an entropy of {unsure:.2f}")
    return curve


if __name__ == "__main__":
    main()
