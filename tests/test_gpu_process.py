"""benchmarks/gpu_process.py: what hangs, faults and starts others ends, and how is said."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import gpu_process
import pytest


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('fine')", ""),
        ("raise SystemExit(7)", "exit status 7"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "stopped at its deadline"),
    ],
)
def test_how_a_process_ends(tmp_path, code, words):
    start = time.monotonic()
    ended = gpu_process.run(python(code), 1.0, tmp_path / "log")
    assert str(ended).startswith(words)
    assert bool(str(ended)) == bool(words)
    assert time.monotonic() - start < 4
    assert words or (tmp_path / "log").read_text() == "fine\n"


def test_nothing_outlives_a_process(tmp_path):
    """Not even what went to a session of its own, after a normal end too."""
    pid = tmp_path / "pid"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open({str(pid)!r}, "w").write(str(child.pid))
"""
    assert not str(gpu_process.run(python(code), 20.0, tmp_path / "log"))
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    """Zombies, whose parent is gone or slow, do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_cannot_be_killed(tmp_path, monkeypatch):
    """It costs its deadline and no more; here kill does nothing, as in a call of the driver."""
    kill, pids = os.kill, set()
    monkeypatch.setattr(gpu_process, "GRACE", 0.3)
    monkeypatch.setattr(os, "kill", lambda pid, number: pids.add(pid))
    start = time.monotonic()
    try:
        ended = gpu_process.run(python("import time; time.sleep(60)"), 0.5, tmp_path / "log")
        forked = gpu_process.fork(lambda: time.sleep(60), 0.3)
    finally:
        for pid in pids:
            kill(pid, signal.SIGKILL)
    assert ended.held
    assert forked.held
    assert str(ended).startswith("held by the driver")
    assert time.monotonic() - start < 5
    os.waitpid(-1, 0)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda: True, 0),
        (lambda: False, 1),
        (lambda: 1 / 0, 2),
        (lambda: os._exit(3), 3),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
        (lambda: time.sleep(60), None),
    ],
)
def test_a_forked_function(function, code, capfd):
    ended = gpu_process.fork(function, 0.5)
    assert (ended.code, ended.held) == (code, False)
    assert ended.seconds < 3
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (code == 2)
