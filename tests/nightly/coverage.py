"""Measures how much of the package the suite runs: lines and branches of its Python, lines and branches of its C++.

    make coverage                              # the suite of every change, about an hour on two cores
    make coverage ARGS="tests/test_loss.py"    # of these files

coverage.py follows Python through the suite's workers, the processes that tests start, and Triton's interpreter. The
CPU library is compiled with counters, in build/coverage, and stands in for the package's. There also are the pages that
show every line: python/index.html and cpp.html.
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
SUITE = "not nightly and not peers"


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: take the library with counters in place of the package's."""
    from grpo_kernels.backends import cpu

    cpu.LIBRARY = LIBRARY


def build() -> None:
    """Compile the library with counters, which threads share, and without what would take lines away."""
    making = setup()
    making.FLAGS = [*(flag for flag in making.FLAGS if not flag.startswith("-O")), "-O1", "--coverage"]
    making.FLAGS += ["-fprofile-update=atomic"]
    making.build_cpu(LIBRARY, FOLDER / "objects")
    record = making.ROOT / making.NATIVE / "libgrpo_cpu.json"
    shutil.copy2(record, LIBRARY.with_suffix(".json"))


def measure(arguments: list[str]) -> int:
    """Run the suite; return pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.nightly.coverage", "-n", "2", "--dist", "worksteal"]
    command += ["-m", SUITE, "--cov", f"--cov-report=html:{FOLDER / 'python'}", "--cov-report=term:skip-covered"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "COVERAGE_FILE": str(FOLDER / "python.data")}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode


def report_cpp() -> None:
    """Print what of csrc/cpu and csrc/common ran: a line that several instances of a template have counts once."""
    pages = ["--html-details", str(FOLDER / "cpp.html"), "--markdown", "-"]
    command = [sys.executable, "-m", "gcovr", "--root", str(ROOT), "--filter", "csrc/", "--merge-lines", *pages]
    subprocess.run([*command, str(FOLDER)], cwd=ROOT, check=True)


def main(arguments: list[str]) -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    build()
    status = measure(arguments)
    report_cpp()
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
