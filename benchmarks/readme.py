"""Put the committed results into README: every table between `figures: NAME` and `end` is a results file, whole.

python benchmarks/readme.py            # after a benchmark has written benchmarks/results/MACHINE/NAME.md
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ROOT / "benchmarks" / "results" / "amd-epyc-zen3-2-cores"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)


def filled(readme: str) -> str:
    return SECTION.sub(lambda m: f"{m[1]}{(MACHINE / f'{m[2]}.md').read_text().strip()}\n{m[3]}", readme)


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
