"""A verdict on a mutant: the tests that run over it, the record of verdicts, and processes that end with us."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .table import ROOT, Mutant
from .trees import DoesNotCompile, compile_tree, plant

SECONDS = 240
"""Of a process's own time: a fault may make a loop endless. The suites take less."""
PATIENCE = 1800
"""Of the clock, for those that wait for ever."""
TOGETHER = 40
"""Tests of one process without a fault: it has SECONDS."""
CORPORA = {"raw_bits": ("tests/corpus/raw_bits/*",), "fuzz_abi": ("tests/corpus/abi/*", "tests/corpus/abi_cuda/*")}
"""What a module of tests reads besides what it imports."""


class Verdict(NamedTuple):
    outcome: str
    """killed, survives, or broken: it does not compile, or no test can be collected."""
    said: str
    """The test that failed, or why there is none."""
    seconds: float


class Stopped(Exception):
    pass


class Judge:
    """Judges mutants, from several threads, and keeps what it found."""

    def __init__(self, folder: Path = ROOT / "build" / "mutants") -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = folder / "verdicts.jsonl"
        self.known: dict[tuple[str, str], Verdict] = {}
        self.stopped = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        for line in self.record.read_text().splitlines() if self.record.exists() else []:
            with contextlib.suppress(ValueError):  # a line that an accident cut
                entry = json.loads(line)
                self.known[entry["name"], entry["digest"]] = Verdict(**entry["verdict"])

    def stop(self) -> None:
        """Whatever runs ends, and nothing else is started."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                _end(process)

    def recall(self, mutant: Mutant) -> Verdict | None:
        """The verdict on the same fault, in the same file, by the same tests."""
        return self.known.get((mutant.name, digest_of(mutant)))

    def verdict(self, mutant: Mutant) -> Verdict:
        known = self.recall(mutant)
        if known is None:
            began = time.monotonic()
            try:
                outcome, said = _read(*self._tested(mutant, _files(mutant), sound=False, chosen=_chosen(mutant)))
            except DoesNotCompile as error:
                outcome, said = "broken", str(error)[-300:]
            known = Verdict(outcome, said, round(time.monotonic() - began, 1))
            self._remember(mutant.name, digest_of(mutant), known)
        return known

    def _remember(self, name: str, digest: str, verdict: Verdict) -> None:
        with self._lock:
            self.known[name, digest] = verdict
            with self.record.open("a") as file:
                file.write(json.dumps({"name": name, "digest": digest, "verdict": verdict._asdict()}) + "\n")

    def unchecked(self, mutants: Sequence[Mutant]) -> list[dict[str, Mutant]]:
        """What is still to run without a fault, for ``check``: the tests that killed, TOGETHER of one build at a time;
        for what crashed or hung, and names no test, its whole suite."""
        suites: dict[str, dict[str, Mutant]] = {}
        named: dict[str, dict[str, Mutant]] = {}
        for mutant, test in self._killed(mutants):
            if self._sound(mutant, test) is None:
                together, key = named, mutant.suite.build
                if not _is_test(test):
                    together, key = suites, _without(mutant, test)[0]
                together.setdefault(key, {})[test] = mutant
        builds = [[*tests.items()] for tests in named.values()]
        pieces = [dict(tests[i : i + TOGETHER]) for tests in builds for i in range(0, len(tests), TOGETHER)]
        return [*suites.values(), *pieces]

    def check(self, tests: dict[str, Mutant]) -> None:
        """Run what killed these mutants without their faults, and keep which fail all the same."""
        began, mutant = time.monotonic(), next(iter(tests.values()))
        if all(map(_is_test, tests)):
            status, said = self._tested(mutant, [*tests], sound=True, chosen=[])
            failed = set(_failed(said))
            if status not in (0, 1) or not failed <= set(tests):
                raise RuntimeError(f"what was killed does not run without a fault (status {status}):\n{said[-2000:]}")
        else:
            status, said = self._tested(mutant, _files(mutant), sound=True, chosen=_chosen(mutant))
            failed = set(tests) if status else set()
        seconds = round((time.monotonic() - began) / len(tests), 1)
        for test, mutant in tests.items():
            outcome, why = ("fails", said[-300:]) if test in failed else ("passes", "")
            self._remember(*_without(mutant, test), Verdict(outcome, why, seconds))

    def unsound(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Of those killed, the ones whose test fails without the fault too, or was not checked."""
        return [mutant for mutant, test in self._killed(mutants) if not self._sound(mutant, test)]

    def _killed(self, mutants: Sequence[Mutant]) -> list[tuple[Mutant, str]]:
        """Each with the test, or the accident, that killed it."""
        return [(m, known.said) for m in mutants if (known := self.recall(m)) and known.outcome == "killed"]

    def _sound(self, mutant: Mutant, test: str) -> bool | None:
        known = self.known.get(_without(mutant, test))
        return None if known is None else known.outcome == "passes"

    def _tested(self, mutant: Mutant, tests: list[str], sound: bool, chosen: list[str]) -> tuple[int, str]:
        """What pytest returns and says of these tests, over the fault or without it, with options that choose cases."""
        tree = Path(tempfile.mkdtemp(prefix="tree_", dir=self.folder))
        try:
            plant(tree, mutant, sound)
            environment = _environment(tree)
            compiled = compile_tree(tree, mutant, self.folder / "objects", lambda *what: self._run(*what, environment))
            command = [sys.executable, "-m", "pytest", "--no-header", "--tb=no", "-vv", "-rE", "-m", "not nightly"]
            return self._run([*command, *chosen, *tests], tree, environment | compiled)
        finally:
            shutil.rmtree(tree, ignore_errors=True)

    def _run(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
        limited = ["sh", "-c", f'ulimit -t {SECONDS}; exec "$0" "$@"', *command]
        with self._lock:
            if self.stopped:
                raise Stopped
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
            process = subprocess.Popen(limited, cwd=folder, env=environment, process_group=0, **pipes)
            self._running.add(process)
        try:
            said = process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            said = "it hangs"
        finally:
            _end(process)  # with what its tests have left
            with self._lock:
                self._running.discard(process)
        if self.stopped:
            raise Stopped
        return process.wait(), said


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(tree: Path) -> dict[str, str]:
    """Ours without what a run of pytest says to its own processes; temporary files go with the tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "GRPO_KERNELS"))}
    own = {"PYTHONPATH": str(tree), "TMPDIR": str(tree / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    return {"OMP_WAIT_POLICY": "passive", **kept, **own}


def _failed(said: str) -> list[str]:
    """The ids of what failed, which may hold anything, from the lines of every test; then files without tests."""
    tests = re.findall(r"^(tests/.+) (?:FAILED|ERROR)(?: +\[ *\d+%\])?$", said, re.M)
    return tests + re.findall(r"^ERROR (tests/[^:\s]+)(?: - .*)?$", said, re.M)


def _read(status: int, said: str) -> tuple[str, str]:
    """An outcome, and the test that failed."""
    if status == 0:
        return "survives", said.strip().splitlines()[-1] if said.strip() else ""
    if status == 1 and (failed := _failed(said)):
        return "killed", failed[0]
    if status < 0 or status > 127:
        return "killed", f"it ends by signal {-status if status < 0 else status - 128}"
    if status in (4, 5) and "while loading conftest" not in said:  # which a fault can make fail
        raise RuntimeError(f"no test was run (status {status}):\n{said[-2000:]}")
    return "broken", said[-300:]


def _files(mutant: Mutant) -> list[str]:
    return [f"tests/{test}.py" for test in mutant.tests]


def _chosen(mutant: Mutant) -> list[str]:
    """pytest's options: the cases of the suite, to the first that fails."""
    return ["-x", *(["-k", mutant.suite.cases] if mutant.suite.cases else [])]


def _contents(names: Iterable[str]) -> bytes:
    return b"".join(hashlib.sha256((ROOT / name).read_bytes()).digest() for name in names)


def _matching(*globs: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for glob in globs for path in ROOT.glob(glob) if path.is_file())


def _judging(tests: Iterable[str], build: str) -> list[str]:
    """What modules of tests are made of: conftest.py, what they import of the folder, what they compile and read. The
    emulator is of those builds alone that run over it."""
    left, found = ["conftest", *tests], set(_matching("tests/*.h"))
    modules = set() if build == "cuda" else {"cuda_emulator"}
    while left:
        module = left.pop()
        if module not in modules:
            modules.add(module)
            globs = [f"tests/{module}/*.{suffix}" for suffix in ("py", "h", "cpp")]
            files = _matching(f"tests/{module}.py", *globs, *CORPORA.get(module, ()))
            left += [name for file in files if file.endswith(".py") for name in _imported((ROOT / file).read_text())]
            found.update(files)
    return sorted(found)


@functools.cache
def _imported(source: str) -> set[str]:
    """The modules, or the packages that they are of, wherever a source imports them."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def _is_test(said: str) -> bool:
    """Whether a kill is by a test that failed; else the whole process ended or hung."""
    return said.startswith("tests/")


def _without(mutant: Mutant, test: str) -> tuple[str, str]:
    """What is known of a test without a fault is known by this, whatever it killed; of the whole suite, for what is no
    test."""
    modules = [Path(test.partition("::")[0]).stem] if _is_test(test) else [*mutant.tests]
    test = test if _is_test(test) else " ".join([*_files(mutant), *_chosen(mutant)])
    names = [*_judging(modules, mutant.suite.build), *_matching("grpo_kernels/**/*.py", "csrc/**/*.*")]
    return f"without a fault: {mutant.suite.build} {test}", hashlib.sha256(_contents(names)).hexdigest()[:16]


def digest_of(mutant: Mutant) -> str:
    """Of the contents of the file and of all that judges it, and of the fault."""
    fault = "\0".join((mutant.before, mutant.after, mutant.suite.build, mutant.suite.cases, *mutant.tests))
    names = [mutant.file, *_judging(mutant.tests, mutant.suite.build)]
    return hashlib.sha256(fault.encode() + _contents(names)).hexdigest()[:16]
