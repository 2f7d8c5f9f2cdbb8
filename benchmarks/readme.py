"""Put the committed results into the documents: every table between `figures: NAME` and `end` is a results file, whole.

python benchmarks/readme.py            # after a benchmark has written benchmarks/results/MACHINE/NAME.md
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ROOT / "benchmarks" / "results" / "amd-epyc-zen3-2-cores"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)


def documents() -> list[Path]:
    """Return every Markdown file that may hold figures: those of the repository's root and of docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def filled(text: str) -> str:
    """Return a document with the results of today between its marks."""
    return SECTION.sub(lambda m: f"{m[1]}{(MACHINE / f'{m[2]}.md').read_text().strip()}\n{m[3]}", text)


def main() -> int:
    for path in documents():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
