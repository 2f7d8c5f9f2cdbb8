"""Writes the tables and plots of a results folder anew from its .json files; nothing is measured.

python benchmarks/redraw.py                                # the folders that the documents show
python benchmarks/redraw.py benchmarks/results/MACHINE     # another one
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import loss
from readme import MACHINES, ROOT

from grpo_kernels.bench import command

BENCHMARKS = (
    "distill_sort",
    "divergence",
    "pages",
    "scaling",
    "short_calls",
    "surrogates",
    "system_steps",
    "thread_scaling",
    "train_sort",
    "training_step",
    "trl_functions",
    "trl_step",
)
"""The modules here that write NAME.json and, by their ``OUTPUTS``, what is made of it."""


def redraw(folder: Path) -> list[str]:
    """Write what the .json files of ``folder`` hold as tables and plots, and return the names of those files."""
    done = []
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        if name == "bench":
            command.redraw(folder, name, json.loads(path.read_text()))
        elif name.startswith("loss_"):
            loss.write(folder, name.removeprefix("loss_"), json.loads(path.read_text()))
        elif name in BENCHMARKS:
            importlib.import_module(name).OUTPUTS.write(folder, json.loads(path.read_text()))
        else:
            continue
        done.append(path.name)
    return done


def main() -> int:
    """Redraw folders, and say what was found in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    shown = [ROOT / "benchmarks" / "results" / machine for machine in MACHINES]
    for folder in parser.parse_args().folders or [path for path in shown if path.is_dir()]:
        print(f"redrawn in {folder}: {', '.join(redraw(folder)) or 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
