"""Writes the tables and plots of a results folder anew from its .json files; nothing is measured.

python benchmarks/redraw.py                                # the folder that README shows
python benchmarks/redraw.py benchmarks/results/MACHINE     # another one
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import loss
from readme import MACHINE

from grpo_kernels.bench import command

BENCHMARKS = ("surrogates", "train_sort", "training_step", "trl_step")
"""The modules here that write NAME.json and, by ``write``, what is made of it."""


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
            importlib.import_module(name).write(folder, json.loads(path.read_text()))
        else:
            continue
        done.append(path.name)
    return done


def main() -> int:
    """Redraw one folder, and say what was found in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=MACHINE)
    arguments = parser.parse_args()
    print(f"redrawn in {arguments.folder}: {', '.join(redraw(arguments.folder)) or 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
