"""Put the committed results into the documents: every table between `figures: NAME` and `end` is a results file, whole.

python benchmarks/readme.py            # after a benchmark has written benchmarks/results/MACHINE/NAME.md

A table and the plot beside it are those of the first machine of MACHINES that has the figure.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("amd-epyc-zen3-2-cores", "amd-epyc-zen4-2-cores")
"""Folders of benchmarks/results, the one whose figures are shown first."""
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)
ADDRESS = re.compile(rf"benchmarks/results/(?:{'|'.join(MACHINES)})/([\w.]+)")


def result(name: str) -> Path:
    """Return the file of that name of the first machine that has it."""
    files = [ROOT / "benchmarks" / "results" / machine / name for machine in MACHINES]
    found = next((path for path in files if path.exists()), None)
    if found is None:
        raise FileNotFoundError(f"no folder of {', '.join(MACHINES)} in benchmarks/results has {name}")
    return found


def documents() -> list[Path]:
    """Return every Markdown file that may hold figures: those of the repository's root, of docs/ and beside this."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def filled(text: str) -> str:
    """Return a document with the results of today between its marks, and links to the files that they are from."""
    text = SECTION.sub(lambda m: f"{m[1]}{result(f'{m[2]}.md').read_text().strip()}\n{m[3]}", text)
    return ADDRESS.sub(lambda m: result(m[1]).relative_to(ROOT).as_posix(), text)


def main() -> int:
    for path in documents():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
