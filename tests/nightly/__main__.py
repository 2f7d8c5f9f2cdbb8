"""Runs the nightly suite part by part, and writes a row for each to benchmarks/results/nightly.md.

python -m tests.nightly           every stale part: it never passed, or not with what it guards as it is now
python -m tests.nightly PART...   these, stale or not
python -m tests.nightly list      the parts, what they guard, when they ran, which are stale

The same command takes up a part that was interrupted where it stopped, and one that failed with what failed, as long as
the files that it guards stay as they are.
"""

from __future__ import annotations

import os
import sys

import pytest

from .parts import PARTS
from .record import ROOT, Progress, Row, commit_of, digest_of, read_rows, write_row

COMPLETE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
"""The last: every test had passed before the run was interrupted."""


def state(name: str, row: Row | None) -> str:
    if row is None:
        return "stale: it never ran"
    if not row.green:
        return "stale: it failed" if row.failed else "stale: nothing passed"
    return "passed" if row.digest == digest_of(PARTS[name].guards) else "stale: guarded files have changed"


def print_parts() -> None:
    rows = read_rows()
    for name, part in PARTS.items():
        row, progress = rows.get(name), Progress(name, digest_of(part.guards))
        print(f"{name}: {state(name, row)}")
        if row:
            print(f"    {row.passed} passed, {row.failed} failed, {row.skipped} skipped, {row.date}, {row.commit}")
        if progress.outcomes:
            print(f"    of a run to be taken up: {progress.count('passed')} passed, {progress.count('failed')} failed")
        print(f"    guards {' '.join(part.guards)}; about {part.minutes} min")


def print_examples(progress: Progress) -> None:
    """Of the tests that draw them, and all together."""
    drawn = {test: count for test, count in progress.examples.items() if count}
    for test, count in sorted(drawn.items()):
        print(f"    {count:,} examples: {test}")
    if drawn:
        print(f"    {sum(drawn.values()):,} examples in all")


def run(name: str) -> Row | None:
    """The part's row; None where the run did not come to its end. Where every test was skipped, for want of what it
    needs here, the last run's stays in the table."""
    part = PARTS[name]
    commit, digest = commit_of(part.guards), digest_of(part.guards)
    arguments = ["-n", "2", "--dist", "worksteal", "-p", "tests.nightly.plugin", "--part", name, "--digest", digest]
    if pytest.main(["-rs", *arguments, *(f"tests/{file}.py" for file in part.files)]) not in COMPLETE:
        return None
    row, progress = Row.of(name, commit, digest), Progress(name, digest)
    print_examples(progress)
    if row.passed or row.failed:
        write_row(row)
    if row.green:
        progress.path.unlink()
    return row


def main(names: list[str]) -> int:
    if names == ["list"]:
        print_parts()
        return 0
    if unknown := [name for name in names if name not in PARTS]:
        print(f"expected `list` or names of {', '.join(PARTS)}; got {', '.join(unknown)}: see `list`", file=sys.stderr)
        return 2
    rows = read_rows()
    names = names or [name for name in PARTS if state(name, rows.get(name)) != "passed"]
    os.chdir(ROOT)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads must not spin beside the other worker
    green = True
    for i, name in enumerate(names, start=1):
        print(f"part {i} of {len(names)}: {name}, about {PARTS[name].minutes} min", flush=True)
        row = run(name)
        if row is None:
            print(f"{name}: did not come to its end; the same command takes it up where it stopped")
            return 1
        print(f"{name}: {row.passed} passed, {row.failed} failed, {row.skipped} skipped, {row.minutes} min", flush=True)
        green = green and row.green
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
