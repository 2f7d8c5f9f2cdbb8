"""Every mutant: by rule of each file of a suite, and by hand."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

from .rules import Fault, faults_of, sample
from .suites import Suite, suite_of
from .written import TOPICS, WRITTEN, path_of

ROOT = Path(__file__).resolve().parent.parent.parent
SURVIVORS = Path(__file__).with_name("survivors.txt")


class Mutant(NamedTuple):
    name: str
    """Begins with the language, or with "written" and the language."""
    file: str
    before: str
    after: str
    start: int
    """Where ``before`` is in the file."""
    suite: Suite
    tests: tuple[str, ...]

    def planted(self, source: str) -> str:
        return source[: self.start] + self.after + source[self.start + len(self.before) :]

    @property
    def place(self) -> str:
        source = (ROOT / self.file).read_text()
        return f"{self.file}:{source.count(chr(10), 0, self.start) + 1}"


def key_of(file: str, fault: Fault) -> tuple[str, str, str, str]:
    """What a listed survivor is known by: the file with the function, the line, the line with the fault."""
    repeated = f" ({fault.occurrence + 1})" if fault.occurrence else ""
    return file, f"{fault.scope}{repeated}", fault.before, fault.after


def read_survivors() -> dict[tuple[str, str, str, str], str]:
    """Reasons by key. A block is: file and function, the line after "- ", with the fault after "+ ", the reason."""
    reasons = {}
    blocks = [block.splitlines() for block in SURVIVORS.read_text().split("\n\n")]
    for place, before, after, *reason in (block for block in blocks if not block[0].startswith("#")):
        file, _, scope = place.partition(" ")
        assert before.startswith("- "), place
        assert after.startswith("+ "), place
        reasons[file, scope, before[2:], after[2:]] = " ".join(reason)
    return reasons


@functools.cache
def files() -> dict[str, Suite]:
    """Every file of which faults are made, sorted."""
    paths = itertools.chain((ROOT / "grpo_kernels").rglob("*.py"), (ROOT / "csrc").rglob("*.*"))
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return {name: suite for name in names if (suite := suite_of(name))}


@functools.cache
def faults(file: str) -> list[Fault]:
    return faults_of((ROOT / file).read_text(), python=file.endswith(".py"))


def by_rule(seed: int) -> list[Mutant]:
    """A sample of the faults of every file but of those listed; of each language the lowest ranks first."""
    listed, ranked = read_survivors(), []
    for file, suite in files().items():
        source = (ROOT / file).read_text()
        starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
        found = [fault for fault in faults(file) if key_of(file, fault) not in listed]
        count = -(-len({fault.line for fault in found}) // suite.every)
        for fault in sample(found, count, seed):
            rank = fault.rank(seed)
            scope = fault.scope or "file"
            name = f"{suite.language} {Path(file).name} {scope}: {fault.rule} {rank[:6]}"
            start = source.index(fault.before, starts[fault.line])
            ranked.append((rank, Mutant(name, file, fault.before, fault.after, start, suite, suite.tests)))
    return [mutant for _, mutant in sorted(ranked)]


def by_hand() -> list[Mutant]:
    found = []
    for name, (file, before, after) in WRITTEN.items():
        path = path_of(file)
        suite = suite_of(path)
        assert suite, path
        own = next((tests.split() for topic, tests in TOPICS.items() if name.startswith(topic)), [])
        start = (ROOT / path).read_text().find(before)
        tests = tuple(dict.fromkeys([*own, *suite.tests]))
        found.append(Mutant(f"written {suite.language}: {name}", path, before, after, start, suite, tests))
    return found


def mutants(seed: int = 0) -> list[Mutant]:
    """All: by rule, languages in turns, then by hand."""
    found = by_rule(seed)
    languages = [[m for m in found if m.suite.language == name] for name in ("cpp", "cuda", "triton", "python")]
    return [m for turn in itertools.zip_longest(*languages) for m in turn if m] + by_hand()
