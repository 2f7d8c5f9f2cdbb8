"""LoRA with the loss inside the model's forward: no logits, and the base model as the reference of a KL.

python examples/lora.py                                     # adapters on a tiny model of random weights
python examples/lora.py --model PATH --lr 1e-5              # on a pretrained one

The head has an adapter too: what PEFT adds to the logits is traced, and no merged weight is made.
"""

from __future__ import annotations

import common
import peft
import torch

from grpo_kernels import KL, LossConfig, advantages, collate, hf

PLACES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print every fifth step, and return the mean reward of each."""
    options = common.options(__doc__, arguments, steps=30, lr=1e-2)
    base, tokenizer = common.load(options.model, options.device)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=PLACES))
    hf.attach(model, LossConfig.preset("dapo", kl=KL(0.001)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    curve = []
    for step in range(options.steps):
        samples, rewards = common.sample(model, tokenizer)
        inputs, tokens = collate(samples)
        asked = {"token_ids": tokens["token_ids"], "mask": tokens["mask"], "output": "log_probs"}
        with torch.no_grad():
            old = model(**inputs, grpo=asked).log_probs
            with model.disable_adapter():
                ref = model(**inputs, grpo=asked).log_probs
        tokens |= {"advantages": advantages.group_normalized(rewards, common.GROUP)}
        tokens |= {"old_log_probs": old, "ref_log_probs": ref}
        for _ in range(2):
            out = model(**inputs, grpo=tokens)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(rewards.mean().item())
        if common.is_shown(step, options):
            kl, entropy = out.metrics.kl.item(), out.metrics.entropy.item()
            print(f"step {step + 1}: reward {curve[-1]:.3f}, KL {kl:.3f}, entropy {entropy:.2f}")
    return curve


if __name__ == "__main__":
    main()
