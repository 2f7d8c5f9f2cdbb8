"""pytest -p tests.nightly.plugin --part NAME --digest DIGEST runs what is left of a part, and remembers outcomes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from .parts import PARTS
from .record import Progress


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=list(PARTS), required=True)
    parser.addoption("--digest", required=True, help="of the files that the part guards, now")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After conftest.py's, which decides what is nightly."""
    part = PARTS[config.option.part]
    outcomes = Progress(config.option.part, config.option.digest).outcomes
    chosen, others = [], []
    for item in items:
        left = part.takes(item) and outcomes.get(item.nodeid) != "passed"
        (chosen if left else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    see(PARTS[config.option.part].folder)
    if not hasattr(config, "workerinput"):  # reports of all workers arrive here
        config.pluginmanager.register(Recorder(Progress(config.option.part, config.option.digest)))


def see(folder: str) -> None:
    """Put a folder of the environment on the path of this worker, and of processes that its tests start."""
    if folder and "PYTEST_XDIST_WORKER" in os.environ:
        place = str(Path(sys.prefix, folder))
        sys.path.insert(0, place)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH")]))


class Recorder:
    """Writes each outcome down as it comes: whatever ends the run, what is done stays done."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.began = time.monotonic()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which ends the workers too

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.progress.add(test=report.nodeid, outcome=report.outcome, **dict(report.user_properties))

    def pytest_sessionfinish(self) -> None:
        self.progress.add(seconds=round(time.monotonic() - self.began, 1))
