"""benchmarks/gpu_process.py: what hangs, faults and starts others ends, and how is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_process
import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def defaults() -> None:
    """In a child: what nohup and shells in the background leave ignored ends it again."""
    for number in gpu_process.ENDING:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('fine')", ""),
        ("raise SystemExit(7)", "exit status 7"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
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


def test_what_a_process_prints(tmp_path):
    """Of a log that others wrote to before; lines of a megabyte are cut."""
    log = tmp_path / "log"
    log.write_text("an earlier line\n")
    ended, text = gpu_process.logged(python("print('x' * 10**6); print('end')"), 10.0, log)
    assert (str(ended), len(text)) == ("", 10**6 + 5)
    assert gpu_process.last_lines(text, 15) == ["x" * 300, "end"]
    assert gpu_process.last_lines("", 1) == []


def test_the_time_of_a_step_is_not_rounded():
    """It was, to the next tenth of a second."""
    found = [gpu_process.fork(lambda: time.sleep(0.13) is None, 5.0).seconds for _ in range(3)]
    assert min(found) >= 0.13
    assert any(abs(10 * seconds - round(10 * seconds)) > 0.01 for seconds in found)


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


def test_a_process_that_dies_inside_the_driver(tmp_path, monkeypatch):
    """It has no environment any more, so that it is not found by its mark, and it does not end."""
    monkeypatch.setattr(gpu_process, "GRACE", 0.3)
    monkeypatch.setattr(gpu_process, "_marked", lambda mark: [])
    ended = gpu_process.run(python("import time; time.sleep(3)"), 0.2, tmp_path / "log")
    assert str(ended).startswith("held by the driver")


PARENT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_process
from pathlib import Path
log, pid = Path(sys.argv[1]), Path(sys.argv[2])
code = f"import os, time; open({{str(pid)!r}}, 'w').write(str(os.getpid())); time.sleep(60)"
def started():
    pid.write_text(str(os.getpid()))
    time.sleep(60)
def again(mark):
    os.kill(os.getpid(), signal.SIGTERM)
    return sweep(mark)
sweep, how = gpu_process.sweep, sys.argv[3]
if how == "a signal while it sweeps":
    gpu_process.sweep = again
gpu_process.end_on_signals()
try:
    if how == "fork":
        gpu_process.fork(started, 60.0)
    else:
        gpu_process.run([sys.executable, "-c", code], 60.0, log)
except gpu_process.Interrupted as interrupted:
    raise SystemExit(interrupted.status)
"""


@pytest.mark.parametrize("how", ["run", "fork", "a signal while it sweeps"])
@pytest.mark.parametrize("number", [*gpu_process.ENDING, signal.SIGKILL], ids=lambda number: number.name)
def test_no_child_outlives_a_killed_parent(tmp_path, how, number):
    """However it is killed, and a second time while it ends its children."""
    pid = tmp_path / "pid"
    parent = subprocess.Popen([*python(PARENT), str(tmp_path / "log"), str(pid), how], preexec_fn=defaults)
    assert until(lambda: pid.exists() and pid.read_text())
    parent.send_signal(number)
    assert parent.wait(10) == (-number if number == signal.SIGKILL else 128 + number)
    assert until(lambda: not alive(int(pid.read_text())))


def until(holds) -> bool:
    end = time.monotonic() + 5
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(found)


def test_a_reader_that_ends(tmp_path):
    """The run goes on without it, as `| head` leaves it; the status is its own."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from gpu_process import say
say("first")
sys.stdin.readline()
say("second")
say("third")
open({str(tmp_path / "ended")!r}, "w").close()
raise SystemExit(7)
"""
    process = subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(10) == 7
    assert (tmp_path / "ended").exists()
