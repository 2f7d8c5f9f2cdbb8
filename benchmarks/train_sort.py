"""Measures the training loop: mean reward and time of `python -m grpo_kernels train` for several seeds.

    python benchmarks/train_sort.py --out DIR     # train_sort.json, .md and .png, 3 minutes a seed

Runs go to runs/sort-seed-<n>; one that is complete there is not run again, one that was cut is resumed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from outputs import Outputs

from grpo_kernels.bench.plot import bare, head, new_figure
from grpo_kernels.bench.report import environment, table_head

STEPS, LAST = 900, 50
COLORS, DASHES = ("#00734f", "#0072b2", "#d55e00"), ("-", "--", ":")


def complete_run(seed: int) -> list[dict]:
    """Return the log of the default run with this seed, which is run or resumed where it is not complete."""
    folder = Path("runs") / f"sort-seed-{seed}"
    log = folder / "log.jsonl"
    if not log.exists() or log.read_text().count("\n") < STEPS:
        start = ["--resume", str(folder)] if (folder / "checkpoint.safetensors").exists() else ["--out", str(folder)]
        seeded = [] if start[0] == "--resume" else ["--seed", str(seed)]
        subprocess.run([sys.executable, "-m", "grpo_kernels", "train", *start, *seeded], check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def mean_reward(rewards: list[float], step: int) -> float:
    """Return the mean over the last steps until this one."""
    last = rewards[max(0, step - LAST) : step]
    return sum(last) / len(last)


def table(found: dict[str, Any]) -> str:
    """Return a line for each seed: the reward at some steps, and the time of the run."""
    env = found["environment"]
    marks = (100, 300, 600, STEPS)
    lines = [
        f"{env['machine']}, {env['threads']} threads, torch {env['torch']}. Mean reward of the {LAST} steps until a "
        "step: the share of digits that stand where they should.",
        "", *table_head(["seed", *(f"step {mark}" for mark in marks), "time of the run, seconds"]),
    ]  # fmt: skip
    for seed, run in found["runs"].items():
        cells = [f"{mean_reward(run['rewards'], mark):.3f}" for mark in marks]
        lines.append(f"| {seed} | {' | '.join(cells)} | {run['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw every seed's mean reward against the step."""
    figure = new_figure(8, 4.4)
    panel = figure.subplots()
    for place, (seed, run) in enumerate(found["runs"].items()):
        steps = range(LAST, len(run["rewards"]) + 1)
        label = f"seed {seed}: {run['seconds'] / 60:.1f} minutes"
        color, dash = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
        panel.plot(steps, [mean_reward(run["rewards"], step) for step in steps], dash, lw=1.8, color=color, label=label)
    panel.set_ylim(0, 1.02)
    panel.set_xlim(0, None)
    panel.set_xlabel("training step", fontsize=9)
    panel.set_ylabel(f"mean reward of the last {LAST} steps", fontsize=9)
    panel.tick_params(labelsize=9)
    panel.grid(alpha=0.25)
    panel.legend(loc="lower right", frameon=False, fontsize=9)
    bare(panel)
    env = found["environment"]
    text = (
        f"Reward: the share of digits in their place. {env['machine']}, {env['threads']} threads, torch {env['torch']}"
    )
    head(figure, "A small model learns to sort four digits, from random weights", text)
    figure.savefig(path, dpi=150)


OUTPUTS = Outputs("train_sort", table, plot, indent=None)


def main() -> None:
    """Run every seed, print the table, and write table and plot."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    found: dict[str, Any] = {"environment": environment("cpu"), "runs": {}}
    for seed in arguments.seeds:
        records = complete_run(seed)
        rewards = [round(record["reward"], 4) for record in records]
        found["runs"][str(seed)] = {"seconds": sum(record["seconds"] for record in records), "rewards": rewards}
    OUTPUTS.finish(found, arguments.out)


if __name__ == "__main__":
    main()
