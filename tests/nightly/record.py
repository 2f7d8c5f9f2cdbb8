"""What has run: the table of results, a run's progress, and a digest of files that tells whether either still holds."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "benchmarks" / "results" / "nightly.md"
HEAD = """# The nightly suite

`make nightly` writes a row for each part, `make nightly PART=list` says which are stale: those of another digest, which
is of the files that a part guards. A + behind a commit: some of them were not as committed.

"""


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        message = f"tests.nightly needs a git checkout, by which it knows what has changed; got: {str(why).strip()}"
        raise SystemExit(message) from None


def _magic(guards: tuple[str, ...]) -> list[str]:
    """As git takes them; with a ! before it, what is left out."""
    return [f":(glob,exclude){glob[1:]}" if glob.startswith("!") else f":(glob){glob}" for glob in guards]


def guarded_files(guards: tuple[str, ...]) -> list[str]:
    """What these globs match, committed or not."""
    names = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_magic(guards)).split("\0")
    return sorted(name for name in set(names) if name and (ROOT / name).is_file())


def digest_of(guards: tuple[str, ...]) -> str:
    """Of the names and contents of the files."""
    total = hashlib.sha256()
    for name in guarded_files(guards):
        total.update(name.encode() + b"\0" + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return total.hexdigest()[:12]


def commit_of(guards: tuple[str, ...]) -> str:
    changed = _git("status", "--porcelain", "--", *_magic(guards))
    return _git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


class Progress:
    """The outcomes of a part's tests, how many examples those drew that say so (``record_property``), the seconds of
    its runs, in a file that git ignores; other contents of the guarded files have another file."""

    def __init__(self, part: str, digest: str) -> None:
        self.path = ROOT / "build" / "nightly" / f"{part}-{digest}.jsonl"
        self.outcomes: dict[str, str] = {}
        self.seconds = 0.0
        self.examples: dict[str, int] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # the end of a run that was killed
                continue
            if "seconds" in entry:
                self.seconds += entry["seconds"]
            else:
                self.outcomes[entry["test"]] = entry["outcome"]
                self.examples[entry["test"]] = entry.get("examples", 0)

    def add(self, **entry: str | float) -> None:
        """A test with its outcome, the last of which counts, and its examples, or a run's seconds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
                file.write(b"\n")  # a line that was cut short stays alone
            file.write(json.dumps(entry).encode() + b"\n")

    def count(self, outcome: str) -> int:
        return list(self.outcomes.values()).count(outcome)


@dataclasses.dataclass(frozen=True)
class Row:
    part: str
    commit: str
    date: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    digest: str

    @classmethod
    def of(cls, part: str, commit: str, digest: str) -> Row:
        """What the part's progress adds up to."""
        progress = Progress(part, digest)
        counts = {outcome: progress.count(outcome) for outcome in ("passed", "failed", "skipped")}
        minutes = round(progress.seconds / 60, 1)
        return cls(part, commit, datetime.date.today().isoformat(), **counts, minutes=minutes, digest=digest)

    @property
    def green(self) -> bool:
        return self.passed > 0 and self.failed == 0


FIELDS = dataclasses.fields(Row)
RULE = "| --- |"


def read_rows() -> dict[str, Row]:
    """The table's rows by their part."""
    rows = {}
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and not line.startswith(RULE) and cells[0] != "part":
            part, commit, date, passed, failed, skipped, minutes, digest = cells
            rows[part] = Row(part, commit, date, int(passed), int(failed), int(skipped), float(minutes), digest)
    return rows


def write_row(row: Row) -> None:
    """In the place of the part's former one."""
    rows = {**read_rows(), row.part: row}
    lines = [[field.name for field in FIELDS], ["---"] * len(FIELDS)]
    lines += [[str(value) for value in dataclasses.astuple(rows[part])] for part in sorted(rows)]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines))
