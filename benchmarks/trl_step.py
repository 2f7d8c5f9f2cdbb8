"""Times a loss step of TRL's GRPOTrainer, with its own loss and with ours, and measures its peak memory.

    python benchmarks/trl_step.py                  # about five minutes on two cores
    python benchmarks/trl_step.py --rounds 3 --out DIR

A two-layer Qwen3 with a vocabulary of 151,936 and 512 completion tokens, GRPO with KL, fp32: loss, backward through the
model, metrics. Providers take turns inside each round, medians; memory is what PyTorch's allocator hands out beyond the
model, gradients included. Needs TRL.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from outputs import Outputs
from tqdm import tqdm

from grpo_kernels.bench import report
from grpo_kernels.bench.measure import peak_bytes, quiet
from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch_trl

SIZES = {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512}
SEQUENCES, PROMPT, COMPLETION = 8, 16, 64
OPTIONS = {"beta": 0.04, "max_completion_length": COMPLETION}
PROVIDERS = ("TRL", "TRL, patch_trl", "FusedGRPOTrainer", "FusedGRPOTrainer, from_logits")


def save_policy(folder: Path | str, **sizes: Any) -> None:
    """Save a random Qwen3, and a tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<pad>", "<eos>", *(chr(ord("A") + i) for i in range(min(sizes["vocab_size"], 1000) - 2))]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def make_trainer(kind: type, folder: Path | str, options: dict[str, Any], **keywords: Any) -> Any:
    """Make a trainer of ``kind`` on the policy in ``folder``, with ``options`` of GRPOConfig."""
    fixed = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "bf16": False}
    fixed |= {"dataloader_pin_memory": False, "disable_tqdm": True, "num_generations": 4}
    prompts = datasets.Dataset.from_dict({"prompt": ["ABC", "HELLO", "Q", "XYZW", "AB", "LM", "PQRS", "T"]})
    keywords.setdefault("model", transformers.AutoModelForCausalLM.from_pretrained(folder))
    return kind(
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
        args=trl.GRPOConfig(**{**fixed, **options}),
        train_dataset=prompts,
        **keywords,
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Reward the letter A, and length a little."""
    return [text.count("A") - 0.3 * text.count("B") + 0.01 * len(text) for text in completions]


class Step:
    """One provider's trainer, and the batch that its loss is computed on."""

    def __init__(self, provider: str, folder: Path | str) -> None:
        kind = FusedGRPOTrainer if provider.startswith("Fused") else trl.GRPOTrainer
        keywords = {"from_logits": True} if provider.endswith("from_logits") else {}
        options = {**OPTIONS, "per_device_train_batch_size": SEQUENCES}
        self.trainer = make_trainer(kind, folder, options, **keywords)
        self.trainer.current_gradient_accumulation_steps = 1
        self.patched = patch_trl if provider.endswith("patch_trl") else contextlib.nullcontext
        torch.manual_seed(0)
        ids = torch.randint(2, SIZES["vocab_size"], (SEQUENCES, PROMPT + COMPLETION))
        ones = torch.ones_like(ids)
        near = -12 + 0.3 * torch.randn(2, SEQUENCES, COMPLETION)  # of a random policy
        self.inputs = {"prompt_ids": ids[:, :PROMPT], "prompt_mask": ones[:, :PROMPT]}
        self.inputs |= {"completion_ids": ids[:, PROMPT:], "completion_mask": ones[:, PROMPT:]}
        self.inputs |= {"old_per_token_logps": near[0], "ref_per_token_logps": near[1]}
        self.inputs |= {"advantages": torch.randn(SEQUENCES), "num_items_in_batch": ones[:, PROMPT:].sum().float()}

    def run(self) -> None:
        """Compute the loss and its backward."""
        self.trainer._compute_loss(self.trainer.model, self.inputs).backward()

    def restore(self) -> None:
        """Drop the gradients of the last run."""
        self.trainer.model.zero_grad(set_to_none=True)


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each; a first round warms up."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for k in tqdm(range(rounds + 1), unit="round"):
        names = list(steps)
        for i in range(len(names)):
            name = names[(i + k) % len(names)]
            step = steps[name]
            step.restore()
            with step.patched():
                start = time.perf_counter()
                step.run()
                if k:
                    samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def extra_bytes(step: Step) -> int:
    """Return the peak memory of a step beyond the model, its gradients included."""
    with step.patched(), quiet():
        step.run()
        step.restore()
        return peak_bytes(step.run, "cpu")


def table(found: dict[str, Any]) -> str:
    """Return a line for each provider: its time, how many times as long TRL's own loss takes, and its memory."""
    sizes = found["sizes"]
    lines = [
        f"{report.caption(found['environment'])}, TRL {found['trl']}. Loss and backward of {found['tokens']} tokens "
        f"through a Qwen3 with {sizes['num_hidden_layers']} layers of {sizes['hidden_size']} and a vocabulary of "
        f"{sizes['vocab_size']:,}; memory is the peak beyond the model, of which {found['gradient_bytes'] / 1e6:.0f} "
        "MB are its gradients; `from_logits` writes the gradient of the logits over them.",
        "", "|  | median ms of a step | TRL's own takes | peak memory, MB |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, ms in found["ms"].items():
        memory = found["bytes"][name] / 1e6
        lines.append(f"| {name} | {ms:.0f} | {found['ms']['TRL'] / ms:.1f}x | {memory:.0f} |")
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("trl_step", table)


def main() -> int:
    """Measure every provider, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(folder, **SIZES)
        steps = {name: Step(name, folder) for name in PROVIDERS}
        memory = {name: extra_bytes(step) for name, step in steps.items()}
        gradients = sum(p.numel() * p.element_size() for p in steps["TRL"].trainer.model.parameters())
        times = in_turns(steps, arguments.rounds)
    found = {"environment": report.environment("cpu"), "trl": trl.__version__, "ms": times, "bytes": memory}
    found |= {"gradient_bytes": gradients, "sizes": SIZES, "tokens": SEQUENCES * COMPLETION}
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
