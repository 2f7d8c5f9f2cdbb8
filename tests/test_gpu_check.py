"""benchmarks/gpu_check.py without a GPU: what hangs, faults, is refused, left out, resumed and killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_commands
import gpu_library
import gpu_machine
import gpu_process
import pytest
from gpu_commands import PARTS, ROWS, Command, Part
from gpu_record import PROOF
from test_gpu_process import alive, defaults, python

ROOT = Path(__file__).resolve().parent.parent
H200 = {"gpu": "NVIDIA H200", "capability": [9, 0], "triton_refused": None, "torch": "2.11.0", "triton": "3.6.0"}


def script(code: str, name: str = "all", **options) -> Command:
    """A command that runs Python code; ``row(name, **figures)`` in it measures one."""
    row = "import json, os, sys, time\ndef row(name, **f):\n    "
    row += "open(sys.argv[1], 'a').write(json.dumps({'name': name, **f}) + '\\n')\n"
    return Command(name, [sys.executable, "-c", row + code, ROWS], **options)


def part(*commands, expected=1.0, deadline=20.0, cuda=False) -> Part:
    return Part("a test's", expected, deadline, lambda setting: list(commands), cuda)


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Runs the command with other parts on a machine that has an H200, or so it thinks; its status and output."""

    def run(parts: dict[str, Part], *arguments: str, out: str = "out", **machine) -> tuple[int, str]:
        monkeypatch.setattr(gpu_check, "look", lambda device, log: machine if "no_gpu" in machine else H200 | machine)
        PARTS.clear()
        PARTS.update(parts)
        status = gpu_check.main(["--out", str(tmp_path / out), "--commit", "abc", *arguments])
        found = capsys.readouterr()
        return status, found.out + found.err

    monkeypatch.setattr(gpu_check, "prepare_library", lambda capability, log: None)
    monkeypatch.setattr(gpu_check, "driver", lambda: "580.0")
    monkeypatch.setattr(gpu_library, "sources", lambda: "sources")
    monkeypatch.setattr(gpu_process, "GRACE", 1.0)
    monkeypatch.setattr(gpu_process, "ENDING", ())
    before = dict(PARTS)
    yield run
    PARTS.clear()
    PARTS.update(before)


def recorded(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


# The run


def test_minutes_leave_parts_out(check, tmp_path):
    """What is not expected to fit is named before anything runs, and left out when its turn comes and no time is left;
    a shorter part behind it may run; the first must fit."""
    parts = {"smoke": part(script("")), "long": part(script(""), expected=500), "short": part(script(""), expected=30)}
    status, text = check(parts, "--minutes", "2")
    assert status == 0
    assert "to run: smoke, short\nto run if others take less than expected: long\nsmoke: " in text
    assert "long: left out, it takes about 500 s and " in text
    assert list(recorded(tmp_path / "out")) == ["environment", "smoke", "short"]
    status, text = check({"long": parts["long"]}, "--minutes", "2", out="other")
    assert (status, text) == (2, "gpu_check: --minutes 2 is less than long needs: at least 8.8\n")


def test_a_part_that_takes_less_leaves_time(check, tmp_path):
    """What was not expected to fit runs where it does after all."""
    parts = {"smoke": part(script(""), expected=60), "timing": part(script(""), expected=60)}
    status, text = check(parts, "--minutes", "2")
    assert status == 0
    assert "to run: smoke\nto run if others take less than expected: timing\n" in text
    assert recorded(tmp_path / "out")["timing"]["passed"] is True


def test_status_of_an_incomplete_proof(check):
    """1 where a part of it that was asked for was left out or skipped, and the last lines name it; not for timing."""
    long, skipped = part(script(""), expected=500), Part("a test's", 1, 20, lambda setting: "no tool here", True)
    for name, there, status in (("suite", long, 1), ("sanitizer", skipped, 1), ("timing", long, 0)):
        found, text = check({"smoke": part(script("")), name: there}, "--minutes", "2", out=name)
        assert found == status, text
        last = f"of the proof that was asked for there lacks: {name} was "
        *_, asked, proven = text.splitlines()
        assert asked.startswith(last) == bool(status)
        assert proven.startswith("The CUDA kernels are not proven here: ")
    assert check({"smoke": part(script("")), "timing": skipped}, "--only", "smoke", out="asked")[0] == 0


def test_the_real_parts_fit():
    """Each of the two commands of gpu_check.py's docstring ends before its timeout, whatever hangs, and all of its
    parts are expected to fit; both take 800 s. The default run proves the CUDA kernels and times them."""
    commands = [line.split() for line in gpu_check.__doc__.splitlines() if line.strip().startswith("timeout")]
    assert len(commands) == 2
    first = gpu_check.names_of(commands[0][commands[0].index("--only") + 1])
    rest = [name for name in PARTS if name not in first]
    assert set(PROOF) <= set(first)
    for words, names in zip(commands, (first, rest), strict=True):
        seconds = 60 * float(words[words.index("--minutes") + 1])
        assert seconds + gpu_process.GRACE <= int(words[1])
        assert gpu_check.fitting(names, seconds - gpu_check.LOOK - gpu_check.LAST) == names
    assert sum(int(words[1]) for words in commands) <= 800
    default = gpu_check.fitting(list(PARTS), 9 * 60 - gpu_check.LOOK - gpu_check.LAST)
    assert {*PROOF, "timing"} <= set(default)
    assert all(part.expected < part.deadline for part in PARTS.values())


def test_a_hang_costs_its_own_deadline(check, tmp_path):
    """Its rows are kept, the part after it runs, and the whole fails."""
    parts = {
        "hangs": part(script("row('first', ms=1.5)\ntime.sleep(60)"), deadline=1.0),
        "next": part(script("row('fine')")),
    }
    start = time.monotonic()
    status, text = check(parts)
    assert status == 1
    assert time.monotonic() - start < 10
    assert "hangs: a test's; about 1 s, at most 1\n   first\n" in text
    assert "FAILED stopped at its deadline, after 1 s" in text
    found = recorded(tmp_path / "out")
    assert found["hangs"]["rows"][0] == {"name": "first", "ms": 1.5}
    assert found["hangs"]["passed"] is False
    assert found["next"]["passed"] is True
    assert (
        "| hangs | **failed**: all: stopped at its deadline, after 1 s |" in (tmp_path / "out/gpu_check.md").read_text()
    )


def test_every_part_ends_with_the_run(check, monkeypatch):
    """However long its own deadline is."""
    monkeypatch.setattr(gpu_check, "LOOK", 0)
    monkeypatch.setattr(gpu_check, "LAST", 1.0)
    start = time.monotonic()
    status, text = check({"hangs": part(script("time.sleep(60)"), deadline=600.0)}, "--minutes", "0.05")
    assert status == 1
    assert 1.5 < time.monotonic() - start < 8
    assert "stopped at its deadline" in text


def test_failed_smoke_stops_the_cuda_kernels(check, tmp_path):
    """Their parts are left out; the others run without the library, which automatic choice might take."""
    seen = "row('seen', library=os.environ.get('GRPO_KERNELS_CUDA_LIBRARY'))"
    parts = {
        "smoke": part(script("row('step', passed=False, how='a wrong result')\nraise SystemExit(1)"), cuda=True),
        "verify": part(script(""), cuda=True),
        "large": part(script(seen)),
    }
    status, text = check(parts)
    assert status == 1
    assert "verify: left out, the smoke part failed" in text
    found = recorded(tmp_path / "out")
    assert "verify" not in found
    assert found["large"]["backends"] == ["triton"]
    assert found["large"]["rows"][0]["library"].endswith("no library after a failed smoke part")
    assert "step: a wrong result" in (tmp_path / "out" / "gpu_check.md").read_text()


def test_a_driver_that_does_not_let_go_stops_the_run(check, tmp_path):
    held = "row('a step', passed=False, how='held by the driver: SIGKILL did not end it')\nraise SystemExit(1)"
    status, text = check({"smoke": part(script(held), cuda=True), "next": part(script(""))})
    assert status == 1
    assert "stopped, the driver does not answer: smoke" in text
    assert "next" not in recorded(tmp_path / "out")


def test_what_an_uncounted_command_finds_is_shown(check, tmp_path):
    parts = {"sanitizer": part(script("", "gate"), script("raise SystemExit(9)", "shown", gates=False))}
    status, text = check(parts)
    assert status == 0
    assert "shown (0." in text
    assert recorded(tmp_path / "out")["sanitizer"]["passed"] is True
    failing = {"sanitizer": part(script("raise SystemExit(9)", "gate"), script("", "shown", gates=False))}
    assert check(failing, out="other")[0] == 1


def test_resume(check, tmp_path):
    """Passed parts are not repeated, nor rows of one that was stopped; with another card, commit or library, all is."""
    measured = "held = open(sys.argv[1]).read()\nif 'one' not in held:\n    row('one', ms=1)\n"
    stopped = part(script(measured + "time.sleep(60)"), deadline=1.5)
    parts = {"smoke": part(script("row('smoke ran')")), "timing": stopped}
    assert check(parts)[0] == 1
    again = ("--resume", str(tmp_path / "out"))
    goes_on = {"smoke": parts["smoke"], "timing": part(script(measured + "row('two', ms=2)"))}
    status, text = check(goes_on, *again, out="second")
    assert status == 0
    assert "passed before: smoke\nto run: timing\n" in text
    found = recorded(tmp_path / "second")
    assert [row["name"] for row in found["timing"]["rows"]] == ["one", "two", "all"]
    assert found["smoke"] == recorded(tmp_path / "out")["smoke"]
    for other in ({"gpu": "NVIDIA H100 80GB HBM3"}, {"commit": "def"}):
        options = ("--commit", other["commit"]) if "commit" in other else ()
        status, text = check(goes_on, *again, *options, out=f"third {len(options)}", **other)
        assert "another card, commit or library, not taken over: smoke, timing" in text
        assert "to run: smoke, timing" in text


def test_resume_of_a_part_of_several_commands(check, tmp_path):
    """Those that have passed are not repeated; a row that failed is gone."""
    failing = script("row('a step', passed=False)\nraise SystemExit(9)", "racecheck")
    assert check({"sanitizer": part(script("row('by memcheck')", "memcheck"), failing)})[0] == 1
    mended = {"sanitizer": part(script("row('again')", "memcheck"), script("", "racecheck"))}
    assert check(mended, "--resume", str(tmp_path / "out"), out="second")[0] == 0
    rows = recorded(tmp_path / "second")["sanitizer"]["rows"]
    assert [row["name"] for row in rows] == ["by memcheck", "memcheck", "racecheck"]


def test_resume_of_other_code(check, tmp_path, monkeypatch):
    """Two trees that differ from one commit may differ from each other; without a commit nothing is known."""
    parts = {"smoke": part(script(""))}
    status, text = check(parts, "--commit", "abc-dirty", out="changed")
    assert "abc-dirty: the tree was changed: this proves nothing" in text
    resumed = check(parts, "--commit", "abc-dirty", "--resume", str(tmp_path / "changed"), out="again")[1]
    assert "not taken over: smoke" in resumed
    assert "to run: smoke" in resumed
    monkeypatch.setattr(gpu_check, "commit", lambda: None)
    status, text = check(parts, "--commit", "")
    assert "there is no .git and no --commit: this proves nothing" in text
    assert "to run: smoke" in check(parts, "--commit", "", "--resume", str(tmp_path / "out"), out="second")[1]


def test_resume_after_the_smoke_part_was_mended(check, tmp_path):
    """A part that ran on Triton alone is run again on both."""
    parts = {"smoke": part(script("raise SystemExit(1)"), cuda=True), "large": part(script(""))}
    assert check(parts)[0] == 1
    parts["smoke"] = part(script(""), cuda=True)
    status, text = check(parts, "--resume", str(tmp_path / "out"), out="second")
    assert "passed before: none\nto run: smoke, large" in text
    assert recorded(tmp_path / "second")["large"]["backends"] == ["cuda", "triton"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_killed(tmp_path, number):
    """Rows are kept, the children end, the status is the signal's."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}]
import gpu_check, gpu_commands, gpu_library
from gpu_commands import Command, Part
gpu_check.look = lambda device, log: {H200!r}
gpu_check.prepare_library = lambda capability, log: None
gpu_library.sources = lambda: "sources"
code = '''
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open(sys.argv[1], "a").write(json.dumps({{"name": "first", "pids": [os.getpid(), child.pid]}}) + chr(10))
time.sleep(60)
'''
command = Command("sleeps", [sys.executable, "-c", code, gpu_commands.ROWS])
gpu_commands.PARTS.clear()
gpu_commands.PARTS["part"] = Part("a test's", 1, 60, lambda setting: [command])
raise SystemExit(gpu_check.main(["--out", {str(tmp_path / "out")!r}]))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(python(code), **pipes, preexec_fn=defaults)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        file = tmp_path / "out" / "gpu_check.json"
        if file.exists() and recorded(file.parent).get("part", {}).get("rows"):
            break
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number, text
    assert f"interrupted by {number.name}; what was measured is kept" in text
    found = recorded(tmp_path / "out")["part"]
    assert found["passed"] is False
    assert found["stopped"] == "before its end"
    assert not any(alive(pid) for pid in found["rows"][0]["pids"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu_check.json",
        "gpu_check.log",
        "gpu_check.md",
    ]


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"ms": 1}', "\\udcff"])
def test_a_row_that_is_none(check, tmp_path, line):
    """It is a row that failed, and the part goes on."""
    code = f"open(sys.argv[1], 'a', errors='surrogateescape').write({line!r} + chr(10))\nrow('next')"
    assert check({"smoke": part(script(code))})[0] == 1
    rows = recorded(tmp_path / "out")["smoke"]["rows"]
    assert [row["name"] for row in rows] == ["line 1", "next", "all"]
    assert rows[0]["how"].startswith("it is no row: ")


def test_a_full_disk(check, tmp_path, monkeypatch):
    """The run goes on, and says at its end that its record is not there; a later row may find space again."""
    write = Path.write_text

    def written(self, text, *rest):
        if self.parent.name == "full":
            raise OSError(28, "No space left on device")
        return write(self, text, *rest)

    monkeypatch.setattr(Path, "write_text", written)
    status, text = check({"smoke": part(script("row('it ran')"))}, out="full")
    assert status == 1
    assert "   it ran\n" in text
    assert "the record could not be written: [Errno 28] No space left on device" in text
    assert not list((tmp_path / "full").glob("*.json*"))
    monkeypatch.setattr(gpu_process, "run", lambda *rest: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    status, text = check({"smoke": part(script("")), "next": part(script(""))}, out="log")
    assert status == 1
    assert recorded(tmp_path / "log")["next"]["rows"] == [
        {"name": "all", "passed": False, "how": "not run: [Errno 28] No space left on device"}
    ]


def test_earlier_results_are_not_lost(check, tmp_path):
    """A folder holds one run: no other writes there, at the same time or later, nor that run with another commit."""
    parts = {"smoke": part(script("row('it ran')"))}
    assert check(parts)[0] == 0
    out, before = tmp_path / "out", recorded(tmp_path / "out")
    log = (out / "gpu_check.log").read_text()
    for options, words in (
        ((), "holds an earlier run: --resume"),
        (("--resume", str(out), "--commit", "def"), "holds smoke of another card, commit or library: take another"),
    ):
        status, text = check(parts, *options)
        assert status == 2
        assert words in text
        assert recorded(out) == before
        assert (out / "gpu_check.log").read_text().startswith(log)
    assert check({**parts, "next": part(script(""))}, "--resume", str(out))[0] == 0
    assert recorded(out)["smoke"] == before["smoke"]
    with gpu_check.lock(tmp_path / "other", None):
        status, text = check(parts, out="other")
    assert status == 2
    assert "is another run's, which goes on" in text


# What is refused


def test_bad_input(check, tmp_path):
    """One line each, before anything runs."""
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "gpu_check.json").write_text("{")
    for k, other in enumerate(([], None, {"smoke": 3}, {"smoke": {"passed": True, "backends": ["cuda"], "rows": [1]}})):
        (tmp_path / f"other{k}").mkdir()
        (tmp_path / f"other{k}" / "gpu_check.json").write_text(json.dumps(other))
    ran = {"smoke": part(script("row('it ran')"), cuda=True), "triton": part(script("row('it ran')"))}
    no_driver = {"torch": "2.11.0", "no_gpu": "Found no NVIDIA driver on your system."}
    too_old = {"torch": "2.11.0", "no_gpu": "The NVIDIA driver on your system is too old (found version 12020)."}
    for arguments, machine, words in (
        (("--only", "smoke,fast"), {}, "--only: there is no part fast; there are smoke, triton"),
        (("--minutes", "0.2"), {}, "--minutes 0.2 is less than smoke needs: at least 0.5"),
        (("--minutes", "nan"), {}, "--minutes nan is less than smoke needs: at least 0.5"),
        (("--resume", str(tmp_path / "none")), {}, "none is no folder with the record of a run"),
        (("--resume", str(tmp_path / "broken")), {}, "broken is no folder with the record of a run"),
        *((("--resume", str(tmp_path / f"other{k}")), {}, "it is not the record of a run") for k in range(4)),
        (("--out", str(tmp_path / "file" / "out")), {}, "cannot be written"),
        ((), no_driver, "no GPU is usable by torch 2.11.0: Found no NVIDIA driver on your system; --device cpu"),
        ((), too_old, "is too old (found version 12020); --device cpu rehearses without one"),
        ((), {"gpu": "NVIDIA A100", "capability": [8, 0]}, "8.0 and the CUDA kernels need 9.0: --only triton"),
        ((), {"triton_refused": "triton is not installed"}, "the loss needs it: triton is not installed"),
    ):
        status, text = check(ran, *arguments, **machine)
        lines = [line for line in text.splitlines() if not line.startswith("looking at")]
        assert status == 2, text
        assert len(lines) == 1, text
        assert lines[0].startswith("gpu_check: ")
        assert words in lines[0]
    with pytest.raises(SystemExit, match="2"):
        check(ran, "--out", "")
    status, _ = check(ran, "--only", "triton, triton", gpu="NVIDIA A100", capability=[8, 0])
    assert status == 0
    assert recorded(tmp_path / "out")["triton"]["backends"] == ["triton"]


def test_a_driver_that_does_not_answer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_machine, "LOOK_DEADLINE", 0.5)
    monkeypatch.setattr(gpu_machine, "python", lambda *arguments: python("import time; time.sleep(60)"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "the GPU could not be looked at (stopped at its deadline, after 1 s" in capsys.readouterr().err


# Parts


def test_sanitizers(check, monkeypatch, tmp_path):
    """Over the smoke script and these kernels alone. An old racecheck is shown, and no gate; a tool that cannot look at
    the device leaves the part out."""
    tool = tmp_path / "another sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Compute Sanitizer" && echo "Version $VERSION (build 1)" && exit\n'
        'echo "$@"\necho "$SAYS"\ncase "$*" in *$FAILS*) exit 9;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv(gpu_commands.SANITIZER, str(tool))
    old, new = "2025.3.1.0", "2026.3.0.0"

    def run(fails: str, version: str, says: str = "") -> tuple[int, dict]:
        for name, value in (("FAILS", fails), ("VERSION", version), ("SAYS", says)):
            monkeypatch.setenv(name, value)
        out = f"{fails} {version} {len(says)}"
        return check({"sanitizer": sanitizer}, out=out)[0], recorded(tmp_path / out)["sanitizer"]

    sanitizer = PARTS["sanitizer"]
    cases = [("nothing", new, 0), ("memcheck", new, 1), ("racecheck", new, 1), ("racecheck", old, 0)]
    for fails, version, status in [*cases, ("synccheck", old, 1)]:
        found, part = run(fails, version)
        assert found == status, (fails, version)
        assert {row["name"]: row["passed"] for row in part["rows"]} == {n: n != fails for n in gpu_commands.CHECKS}
        assert {row["tool"] for row in part["rows"]} == {version}
        assert {row["name"] for row in part["rows"] if row.get("gates") is False} == (
            {"racecheck"} if version == old else set()
        )
    text = (tmp_path / f"racecheck {old} 0" / "gpu_check.md").read_text()
    assert "racecheck of compute-sanitizer 2025.3.1.0 failed: it is no gate before 2026.3." in text
    lines = (tmp_path / f"nothing {new} 0" / "gpu_check.log").read_text().splitlines()
    lines = [line for line in lines if line.startswith("--tool")]
    assert len(lines) == 3
    assert all("--no-fork --small" in line and "--kernel-name kns=grpo --error-exitcode 9" in line for line in lines)
    assert ["--report-api-errors no" in line for line in lines] == [True, False, False]
    found, part = run("check", new, "========= Error: Device not supported. Please refer to the documentation")
    assert (found, part["passed"]) == (1, None)
    assert part["skipped"] == "Error: Device not supported. Please refer to the documentation"
