"""TRL's GRPOTrainer with the fused loss, on a task of reasoning_gym: one other class, the same arguments and metrics.

python examples/trl_trainer.py                              # a tiny model of random weights learns to answer in digits
python examples/trl_trainer.py --model PATH --lr 2e-6       # a pretrained one, to answer right
"""

from __future__ import annotations

import argparse
import tempfile

import common
import datasets
import reasoning_gym
import trl

from grpo_kernels.integrations.trl import FusedGRPOTrainer

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print TRL's metrics of every fifth step, and return the mean reward of each step."""
    options = common.options(__doc__, arguments, steps=15, lr=3e-3)
    with tempfile.TemporaryDirectory() as folder:
        return train(options, folder)


def train(options: argparse.Namespace, folder: str) -> list[float]:
    """Train as ``main`` says; TRL asks for a folder of its own."""
    model, tokenizer = common.load(options.model, options.device)
    task = reasoning_gym.create_dataset("chain_sum", size=1000, seed=options.seed, **SUMS)

    def right(completions: list[str], index: list[int], **_: object) -> list[float]:
        return [task.score_answer(text.strip(), task[i]) for text, i in zip(completions, index, strict=True)]

    def digits(completions: list[str], **_: object) -> list[float]:
        return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]

    prompts = {"prompt": [f"{entry['question']} " for entry in task], "index": list(range(len(task)))}
    settings = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=options.device == "cpu",
        bf16=False,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=4,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        loss_type="dapo",
        reward_weights=[1.0, 0.2],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=options.seed,
    )
    trainer = FusedGRPOTrainer(  # trl.GRPOTrainer takes the same arguments
        model=model,
        processing_class=tokenizer,
        reward_funcs=[right, digits],
        args=settings,
        train_dataset=datasets.Dataset.from_dict(prompts),
    )
    trainer.remove_callback(trainer.callback_handler.callbacks[-1])  # which prints every metric of every step
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    for row in (row for row in log if common.is_shown(row["step"] - 1, options)):
        shown = {name: row[name] for name in ("reward", "rewards/right/mean", "rewards/digits/mean", "entropy")}
        print(f"step {row['step']}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    return [row["reward"] for row in log]


if __name__ == "__main__":
    main()
