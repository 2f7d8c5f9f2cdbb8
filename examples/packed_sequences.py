"""Packed sequences: one row of tokens with ``cu_seqlens`` in place of padding, with the same loss.

python examples/packed_sequences.py                         # a tiny model of random weights
python examples/packed_sequences.py --model PATH --lr 2e-6  # a pretrained one

``collate(packed=True)`` packs samples, ``pack`` padded tensors, and ``unpack`` brings log-probs back.
"""

from __future__ import annotations

from typing import Any

import common
import torch

from grpo_kernels import advantages, collate, hf, unpack


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Train on packed batches, and print and return at every fifth step what they are beside padded ones."""
    options = common.options(__doc__, arguments, steps=30, lr=3e-3)
    model, tokenizer = common.load(options.model, options.device)
    hf.attach(model, "gspo")  # ratios of whole sequences: their bounds matter
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    found = []
    for step in range(options.steps):
        samples, rewards = common.sample(model, tokenizer)
        inputs, tokens = collate(samples, packed=True)
        tokens["advantages"] = advantages.group_normalized(rewards, common.GROUP)
        with torch.no_grad():
            tokens["old_log_probs"] = model(**inputs, grpo={**tokens, "output": "log_probs"}).log_probs
        for _ in range(2):
            model(**inputs, grpo=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if common.is_shown(step, options):
            found.append({"reward": rewards.mean().item(), **beside_padded(model, samples, inputs, tokens)})
            print(f"step {step + 1}: " + ", ".join(f"{name} {value:.6g}" for name, value in found[-1].items()))
    return found


@torch.no_grad()
def beside_padded(model: Any, samples: list, inputs: dict[str, Any], tokens: dict[str, torch.Tensor]) -> dict:
    """Return the loss and the rows of a batch, packed and padded."""
    padded_inputs, padded = collate(samples)
    old = unpack(tokens["old_log_probs"], tokens["cu_seqlens"])[:, :-1]  # the last row of a sequence predicts nothing
    padded |= {"advantages": tokens["advantages"], "old_log_probs": old}
    losses = [model(**given, grpo=grpo).loss.item() for given, grpo in ((inputs, tokens), (padded_inputs, padded))]
    rows = [given["input_ids"].numel() for given in (inputs, padded_inputs)]
    return dict(zip(("loss", "padded loss", "rows", "padded rows"), losses + rows, strict=True))


if __name__ == "__main__":
    main()
