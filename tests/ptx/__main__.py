"""The executor's commands: see the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # its kernels are compiled here

import numpy as np
import torch

import tests.ptx as package
from tests.ptx import counters, faults, launches, sweep


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.ptx", description=package.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="kernels against fp64")
    check.add_argument("words", nargs="*", metavar="WORD", help="of the names of the cases; quick: a sample of them")
    check.add_argument("--first", action="store_true", help="stop at the first case that fails")
    check.add_argument("--sources", type=Path, default=launches.SOURCES, help="another folder than csrc")
    counts = commands.add_parser("counts", help="instructions, wavefronts, sectors, bytes; the settler's chain")
    counts.add_argument("words", nargs="*", metavar="WORD")
    counts.add_argument("--json", action="store_true", help="one object, by name")
    commands.add_parser("faults", help="planted faults").add_argument("words", nargs="*", metavar="WORD")
    given = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # kernels overflow and divide as they mean to
    try:
        return run(given)
    except launches.CompileError as error:
        sys.exit(str(error))


def run(given: argparse.Namespace) -> int:
    if given.command == "counts":
        counters.show(given.words, given.json)
        return 0
    if given.command == "faults":
        return int(faults.plant(given.words) > 0)
    if given.sources != launches.SOURCES:
        launches.SOURCES, launches.BUILD = given.sources, given.sources.parent / "build"
    words = [word for word in given.words if word != "quick"]
    return int(sweep.check("quick" in given.words, words, given.first) > 0)


if __name__ == "__main__":
    sys.exit(main())
