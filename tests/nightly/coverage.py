"""Measures how much of the package the suite runs: lines and branches of its Python, lines and branches of its C++.

    make coverage                              # the suite of every change, 25 minutes on two cores
    make coverage ARGS="tests/test_loss.py"    # of these files

Left out is what takes long and shows nothing here: tests of the tests and of releases, and of each test all but a few
cases. So it is at least this much. coverage.py follows Python through the suite's
workers, the processes that tests start, and Triton's interpreter. The CPU library is compiled with counters, in
build/coverage, and stands in for the package's. There also are the pages that show every line: python/index.html and
cpp.html.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_library import setup

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "coverage"
LIBRARY = FOLDER / "libgrpo_cpu.so"
PAGES = str(FOLDER / "python")
ENVIRONMENT = {**os.environ, "COVERAGE_FILE": str(FOLDER / "python.data")}
SUITE = "not nightly"
OTHERS = ("fuzz_abi", "mutants", "nightly", "ptx", "release", "soak", "versions")
"""Tests of the tests, of the kernels as they are compiled, and of the package in other environments."""
CASES = 6
"""Of each test, evenly spread."""


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: take the library with counters in place of the package's."""
    from grpo_kernels.backends import cpu

    cpu.LIBRARY = LIBRARY


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """And keep a few cases of each test."""
    tests: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        tests.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = {cases[i * (len(cases) - 1) // max(CASES - 1, 1)] for cases in tests.values() for i in range(CASES)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def build() -> None:
    """Compile the library with counters, and without what would take lines away. A counter may miss some of what
    threads count at once, which matters to no line; atomic ones make them wait for one another."""
    making = setup()
    making.FLAGS = [*(flag for flag in making.FLAGS if not flag.startswith("-O")), "-O1", "--coverage"]
    making.FLAGS += ["-fprofile-update=single"]
    making.build_cpu(LIBRARY, FOLDER / "objects")
    record = making.ROOT / making.NATIVE / "libgrpo_cpu.json"
    shutil.copy2(record, LIBRARY.with_suffix(".json"))


def measure(arguments: list[str]) -> int:
    """Run the suite; return pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.nightly.coverage", "-n", "2", "--dist", "worksteal"]
    command += ["-m", SUITE, *(f"--ignore=tests/test_{name}.py" for name in OTHERS), "--cov", "--cov-report="]
    environment = {**ENVIRONMENT, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode


def report_python() -> None:
    """Print what of the package ran, in processes that ended after pytest too: pools of ranks."""
    coverage = [sys.executable, "-m", "coverage"]  # -i: a test compiles a file of the package that there is not
    subprocess.run([*coverage, "combine", "--append", "--quiet"], cwd=ROOT, env=ENVIRONMENT)  # there may be no more
    for command in (["report", "-i", "--skip-covered"], ["html", "-iq", "-d", PAGES]):
        subprocess.run([*coverage, *command], cwd=ROOT, env=ENVIRONMENT, check=True)


def report_cpp() -> None:
    """Print what of csrc/cpu and csrc/common ran: a line that several instances of a template have counts once."""
    pages = ["--html-details", str(FOLDER / "cpp.html"), "--markdown", "-"]
    command = [sys.executable, "-m", "gcovr", "--root", str(ROOT), "--filter", "csrc/", "--merge-lines", *pages]
    for odd in ("negative_hits.warn", "suspicious_hits.warn"):  # counts of which some were missed, and large ones
        command += ["--gcov-ignore-parse-errors", odd]
    subprocess.run([*command, str(FOLDER)], cwd=ROOT, check=True)


def main(arguments: list[str]) -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    build()
    status = measure(arguments)
    report_python()
    report_cpp()
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
