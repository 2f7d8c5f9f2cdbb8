"""What a benchmark ends with: its table printed, and its files written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from grpo_kernels.files import write_text
from grpo_kernels.objectives.settings import read_folder


class Outputs(NamedTuple):
    """What a benchmark found, as NAME.json, the table made of it, and where there is one the plot."""

    name: str
    table: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None] | None = None
    indent: int | None = 1
    """Of the .json; None for long lists of numbers."""

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """Return the arguments of every benchmark, to which its own are added."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        endings = ", .md and .png" if self.plot else " and .md"
        parser.add_argument("--out", type=read_folder, help=f"folder for {self.name}.json{endings}")
        return parser

    def write(self, folder: Path, found: dict[str, Any]) -> None:
        """Write the table and the plot of what NAME.json holds."""
        write_text(folder / f"{self.name}.md", self.table(found))
        if self.plot:
            self.plot(found, folder / f"{self.name}.png")

    def finish(self, found: dict[str, Any], out: Path | None) -> None:
        """Print the table; write all files into ``out`` where it is given."""
        print(self.table(found))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / f"{self.name}.json", json.dumps(found, indent=self.indent) + "\n")
            self.write(out, found)
