"""Measures distillation in the training loop: steps until a student has its teacher's reward, beside GRPO alone.

    python benchmarks/distill_sort.py --out DIR     # distill_sort.json, .md and .png

A teacher is trained by GRPO; then students of half its width, from random weights, on the same problems: by GRPO alone,
by GRPO with the reverse KL to the teacher, and by the reverse KL alone, each with several seeds. Runs go to
runs/distill-<name>-<seed>; one that is complete there is not run again, one that was cut is resumed.
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

TASK = (
    *("--numbers", "2", "--largest", "9", "--prompts", "16", "--minibatch", "64", "--lr", "2e-3", "--warmup", "10"),
    *("--checkpoint-every", "50"),
)
TEACHER_STEPS, STEPS, LAST = 150, 80, 20
WIDTH, TEACHER_SEED = 32, 0
DISTILLED = ("--teacher", "runs/distill-teacher", "--divergence", "reverse_kl")
STUDENTS = {"GRPO alone": (), "GRPO and reverse KL": DISTILLED, "reverse KL alone": (*DISTILLED, "--loss", "none")}
"""What students learn by, and the options of it."""
SHARES = (0.75, 0.9, 0.95, 1.0)
"""Of the teacher's reward."""
COLORS, DASHES = ("#d55e00", "#0072b2", "#00734f"), (":", "--", "-")


def complete_run(folder: Path, steps: int, *options: str) -> dict[str, Any]:
    """Return rewards and seconds of a run, which is run or resumed where it is not complete."""
    log = folder / "log.jsonl"
    if not log.exists() or log.read_text().count("\n") < steps:
        resumes = (folder / "checkpoint.safetensors").exists()
        run = ("--resume", str(folder)) if resumes else ("--out", str(folder), "--steps", str(steps), *TASK, *options)
        subprocess.run([sys.executable, "-m", "grpo_kernels", "train", *run], check=True)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "rewards": [round(record["reward"], 4) for record in records],
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def means(rewards: list[float]) -> list[float]:
    """Return the mean reward of the last steps at each step that has as many."""
    return [sum(rewards[end - LAST : end]) / LAST for end in range(LAST, len(rewards) + 1)]


def level(found: dict[str, Any]) -> float:
    """Return the teacher's reward: the mean of its last steps."""
    return means(found["teacher"]["rewards"])[-1]


def steps_to(rewards: list[float], reward: float) -> int | None:
    """Return the first step by which the mean of the last steps is a reward, None where it never is."""
    return next((step for step, mean in enumerate(means(rewards), LAST) if mean >= reward), None)


def table(found: dict[str, Any]) -> str:
    """Return a line for each seed and way to learn: steps to shares of the teacher's reward, and the last reward."""
    reward, steps = level(found), len(found["teacher"]["rewards"])
    length = max(len(run["rewards"]) for runs in found["students"].values() for run in runs.values())
    lines = [
        f"{machine(found)}. Two digits; the teacher, twice as wide as its students, has a reward of {reward:.3f} after "
        f"{steps} steps of GRPO. Steps of a student until the mean reward of the last {LAST} is a share of that, and "
        f"this mean at the end, of {length} steps.",
        "", *table_head(["learns by", "seed", *(f"{share:.0%}" for share in SHARES), "at the end"]),
    ]  # fmt: skip
    for name, runs in found["students"].items():
        for seed, run in runs.items():
            reached = [steps_to(run["rewards"], share * reward) for share in SHARES]
            cells = [f"not in {length}" if each is None else str(each) for each in reached]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} | {means(run['rewards'])[-1]:.3f} |")
    return "\n".join(lines) + "\n"


def machine(found: dict[str, Any]) -> str:
    """Return where the runs were made."""
    env = found["environment"]
    return f"{env['machine']}, {env['threads']} thread{'s' * (env['threads'] > 1)}, torch {env['torch']}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw every student's mean reward against the step, beside the teacher's."""
    figure = new_figure(8, 4.4)
    panel = figure.subplots()
    for (name, runs), color, dash in zip(found["students"].items(), COLORS, DASHES, strict=True):
        for place, run in enumerate(runs.values()):
            steps = range(LAST, len(run["rewards"]) + 1)
            label = name if place == 0 else None
            panel.plot(steps, means(run["rewards"]), dash, lw=1.6, color=color, label=label)
    panel.axhline(level(found), color="#555555", lw=1.0, label="the teacher")
    panel.set_ylim(0, 1.02)
    panel.set_xlim(0, None)
    panel.set_xlabel("training step", fontsize=9)
    panel.set_ylabel(f"mean reward of the last {LAST} steps", fontsize=9)
    panel.tick_params(labelsize=9)
    panel.grid(alpha=0.25)
    panel.legend(loc="lower right", frameon=False, fontsize=9)
    bare(panel)
    seeds = len(next(iter(found["students"].values())))
    text = f"Two digits to sort, {seeds} seeds each. {machine(found)}"
    head(figure, "A student learns to sort from a teacher of twice its width", text)
    figure.savefig(path, dpi=150)


OUTPUTS = Outputs("distill_sort", table, plot, indent=None)


def main() -> None:
    """Run the teacher and every student, print the table, and write table and plot."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    runs = Path("runs")
    sizes = ("--hidden", str(2 * WIDTH), "--seed", str(TEACHER_SEED))
    teacher = complete_run(runs / "distill-teacher", TEACHER_STEPS, *sizes)
    students: dict[str, dict[str, Any]] = {name: {} for name in STUDENTS}
    for seed in arguments.seeds:
        for name, options in STUDENTS.items():
            folder = runs / f"distill-{name.replace(' ', '-')}-{seed}"
            sizes = ("--hidden", str(WIDTH), "--seed", str(seed))
            students[name][str(seed)] = complete_run(folder, STEPS, *options, *sizes)
    found = {"environment": environment("cpu"), "teacher": teacher, "students": students}
    OUTPUTS.finish(found, arguments.out)


if __name__ == "__main__":
    main()
