"""The training loop's figure: mean reward and time of `python -m grpo_kernels train` for several seeds.

    python benchmarks/train_sort.py --out DIR     # DIR/train_sort.md and DIR/train_sort.png, 3 minutes a seed

Runs go to runs/sort-seed-<n>; one that is complete there is not run again, one that was cut is resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from grpo_kernels.bench.report import environment

STEPS, LAST = 900, 50


def complete_run(seed: int) -> list[dict]:
    """The log of the default run with this seed."""
    folder = Path("runs") / f"sort-seed-{seed}"
    log = folder / "log.jsonl"
    if not log.exists() or log.read_text().count("\n") < STEPS:
        start = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else ["--out", str(folder)]
        seeded = [] if start[0] == "--resume" else ["--seed", str(seed)]
        subprocess.run([sys.executable, "-m", "grpo_kernels", "train", *start, *seeded], check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def mean_reward(records: list[dict], step: int) -> float:
    """Over the last steps before this one."""
    rewards = [record["reward"] for record in records[max(0, step - LAST) : step]]
    return sum(rewards) / len(rewards)


def table(runs: dict[int, list[dict]]) -> str:
    env = environment("cpu")
    marks = (100, 300, 600, STEPS)
    lines = [
        f"{env['machine']}, {env['threads']} threads, torch {env['torch']}; mean per-position reward over {LAST} steps",
        "",
        "| seed | " + " | ".join(f"step {mark}" for mark in marks) + " | seconds |",
        "| --- |" + " --- |" * (len(marks) + 1),
    ]
    for seed, records in runs.items():
        cells = [f"{mean_reward(records, mark):.3f}" for mark in marks]
        lines.append(f"| {seed} | {' | '.join(cells)} | {sum(r['seconds'] for r in records):.0f} |")
    return "\n".join(lines)


def plot(runs: dict[int, list[dict]], target: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for seed, records in runs.items():
        axis.plot([mean_reward(records, i + 1) for i in range(len(records))], label=f"seed {seed}")
    axis.axhline(0.95, color="gray", linestyle=":", linewidth=1)
    axis.set(
        xlabel="step", ylabel=f"mean reward of {LAST} steps", title="sort: 4 digits, from random weights", ylim=(0, 1)
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder for train_sort.md and train_sort.png")
    arguments = parser.parse_args()
    runs = {seed: complete_run(seed) for seed in arguments.seeds}
    text = table(runs)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "train_sort.md").write_text(text + "\n")
        plot(runs, arguments.out / "train_sort.png")


if __name__ == "__main__":
    main()
