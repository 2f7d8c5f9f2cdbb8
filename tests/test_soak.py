"""Random calls and accidents: a few seconds of them for every change, ten minutes nightly, an hour by ``make soak``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from soak import __main__ as of_command
from soak import processes
from soak.record import WARM, Record

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and memory are counted in /proc")


def command(record: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.soak", "--record", str(record), *arguments]


def soak(tmp_path: Path, *arguments: str) -> str:
    process = subprocess.run(command(tmp_path / "soak.json", *arguments), cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert not (tmp_path / "soak.json").exists()
    return process.stdout


def counted(text: str, what: str) -> int:
    return int(re.search(rf"^{what}: ([\d,]+)", text, re.M)[1].replace(",", ""))


@pytest.mark.slow
def test_a_few_seconds(tmp_path):
    text = soak(tmp_path, "--minutes", "0.05", "--seed", "1")
    assert counted(text, "calls") > 50
    assert counted(text, "faults") > 3
    assert "seed 1" in text


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_ten_minutes(tmp_path):
    text = soak(tmp_path, "--minutes", "10")
    print(text)
    assert counted(text, "faults") > 100
    for kind in (
        "Ctrl-C",
        "SIGTERM",
        "kill -9",
        "kill -9 in a write",
        "full disk",
        "read-only folder",
        "out of memory",
    ):
        assert re.search(rf"\d {kind}\b", text), kind


@pytest.mark.nightly
def test_it_is_taken_up(tmp_path):
    """By the same command, which counts what was done before."""
    path = tmp_path / "soak.json"
    process = subprocess.Popen(command(path, "--minutes", "5"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "interrupted; the same command goes on" in process.communicate(timeout=100)[1]
    assert process.returncode == 130
    done = Record.taken_up(path, None, 0)
    assert done.calls.total() > 0
    text = soak(tmp_path, "--minutes", str(done.seconds / 60 + 0.02))
    assert f"seed {done.seed}, " in text
    assert counted(text, "calls") > done.calls.total()


def test_an_interrupted_soak_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted(record, minutes, folder):
        (folder / "tmp").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(of_command, "soak", interrupted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["soak", "--record", str(tmp_path / "soak.json")])
    assert of_command.main() == 130
    assert not list(tmp_path.iterdir())


def test_a_child_that_hangs_before_its_session_is_killed():
    if not (child := os.fork()):
        time.sleep(60)
        os._exit(0)
    with pytest.raises(processes.Fault, match="did not end"):
        processes.wait(child, patience=0.0)


def test_what_is_a_fault(tmp_path):
    """A child that hangs, a process that is left, an exception in a child, memory that grows."""
    with pytest.raises(processes.Fault, match=r"did not end in 0\.3 seconds"):
        processes.wait(processes.start(lambda: time.sleep(60), tmp_path / "out"), patience=0.3)
    leaves = processes.start(lambda: bool(subprocess.Popen(["sleep", "30"])) and 0, tmp_path / "out")
    with pytest.raises(processes.Fault, match=r"processes \[\d+\] of a child") as fault:
        processes.wait(leaves)
    os.kill(int(re.search(r"\[(\d+)\]", str(fault.value))[1]), signal.SIGKILL)
    assert processes.wait(processes.start(lambda: 1 // 0, tmp_path / "said")) == 70
    assert processes.failed((tmp_path / "said").read_text())
    assert not processes.failed("Exception ignored in: <function>\nTraceback (most recent call last):")
    record = Record(tmp_path / "record.json", 0)
    record.resident = [[300.0] * (3 * WARM), [300.0] * WARM + [10.0 * n for n in range(30, 30 + 2 * WARM)]]
    with pytest.raises(processes.Fault, match="grew from 300 to 490 MB"):
        record.check_growth(100.0)
    record.check_growth(200.0)
