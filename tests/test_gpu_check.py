"""benchmarks/gpu_check.py without a GPU: what hangs, faults, is refused, left out, resumed and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_commands
import gpu_library
import gpu_machine
import gpu_parts
import gpu_process
import pytest
import torch
from gpu_cards import as_predicted, computed_ms
from gpu_commands import PARTS, ROWS, Command, Part
from gpu_record import PROOF, Record, markdown, proves_cuda

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
    before, handler = dict(PARTS), signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)
    PARTS.clear()
    PARTS.update(before)


def recorded(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


# Processes


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


# The run


def test_minutes_leave_parts_out(check, tmp_path):
    """What does not fit is named before anything runs, a shorter part behind it may; the first must fit."""
    parts = {"smoke": part(script("")), "long": part(script(""), expected=500), "short": part(script(""), expected=30)}
    status, text = check(parts, "--minutes", "2")
    assert status == 0
    assert "to run: smoke, short\nleft out, there is no time for them: long\nsmoke: " in text
    assert list(recorded(tmp_path / "out")) == ["environment", "smoke", "short"]
    status, text = check({"long": parts["long"]}, "--minutes", "2")
    assert (status, text) == (2, "gpu_check: --minutes 2 is less than long needs: at least 8.8\n")


def test_the_real_parts_fit():
    """Each of the two commands of gpu_check.py's docstring ends within ten minutes, whatever hangs; the default run
    proves the CUDA kernels and times them."""
    for line in gpu_check.__doc__.splitlines():
        if line.strip().startswith("timeout"):
            words = line.split()
            assert 60 * float(words[words.index("--minutes") + 1]) + gpu_process.GRACE <= 570 < int(words[1])
    first = gpu_check.names_of("smoke,verify,suite,sanitizer")
    rest = [name for name in PARTS if name not in first]
    assert f"--only {','.join(first)}" in gpu_check.__doc__
    for names in (first, rest):
        assert gpu_check.fitting(names, 9 * 60 - gpu_check.LOOK - gpu_check.LAST) == names
        assert sum(PARTS[name].deadline for name in names) <= 570
    default = gpu_check.fitting(list(PARTS), 8 * 60 - gpu_check.LOOK - gpu_check.LAST)
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
        status, text = check(goes_on, *again, *options, out="third", **other)
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


def test_resume_without_a_commit(check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "commit", lambda: None)
    parts = {"smoke": part(script(""))}
    status, text = check(parts, "--commit", "")
    assert "there is no .git and no --commit" in text
    assert "to run: smoke" in check(parts, "--commit", "", "--resume", str(tmp_path / "out"))[1]


def test_resume_after_the_smoke_part_was_mended(check, tmp_path):
    """A part that ran on Triton alone is run again on both."""
    parts = {"smoke": part(script("raise SystemExit(1)"), cuda=True), "large": part(script(""))}
    assert check(parts)[0] == 1
    parts["smoke"] = part(script(""), cuda=True)
    status, text = check(parts, "--resume", str(tmp_path / "out"), out="second")
    assert "passed before: none\nto run: smoke, large" in text
    assert recorded(tmp_path / "second")["large"]["backends"] == ["cuda", "triton"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_killed(tmp_path, number):
    """Rows are kept, the children end, the status is 130."""
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
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        file = tmp_path / "out" / "gpu_check.json"
        if file.exists() and recorded(file.parent).get("part", {}).get("rows"):
            break
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 130, text
    assert "interrupted; what was measured is kept" in text
    found = recorded(tmp_path / "out")["part"]
    assert found["passed"] is False
    assert found["stopped"] == "before its end"
    assert not any(alive(pid) for pid in found["rows"][0]["pids"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu_check.json",
        "gpu_check.log",
        "gpu_check.md",
    ]


# What is refused


def test_bad_input(check, tmp_path):
    """One line each, before anything runs."""
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "gpu_check.json").write_text("{")
    ran = {"smoke": part(script("row('it ran')"), cuda=True), "triton": part(script("row('it ran')"))}
    no_driver = {"torch": "2.11.0", "no_gpu": "Found no NVIDIA driver on your system."}
    too_old = {"torch": "2.11.0", "no_gpu": "The NVIDIA driver on your system is too old (found version 12020)."}
    for arguments, machine, words in (
        (("--only", "smoke,fast"), {}, "--only: there is no part fast; there are smoke, triton"),
        (("--minutes", "0.2"), {}, "--minutes 0.2 is less than smoke needs: at least 0.5"),
        (("--resume", str(tmp_path / "none")), {}, "none is no folder with the record of a run"),
        (("--resume", str(tmp_path / "broken")), {}, "broken is no folder with the record of a run"),
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
    status, _ = check(ran, "--only", "triton", gpu="NVIDIA A100", capability=[8, 0])
    assert status == 0
    assert recorded(tmp_path / "out")["triton"]["backends"] == ["triton"]


def test_a_driver_that_does_not_answer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_machine, "LOOK_DEADLINE", 0.5)
    monkeypatch.setattr(gpu_machine, "python", lambda *arguments: python("import time; time.sleep(60)"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "the GPU could not be looked at (stopped at its deadline, after 1 s" in capsys.readouterr().err


def test_why_there_is_no_gpu(monkeypatch):
    """In the words of PyTorch, which knows an old driver from none."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(gpu_parts.torch.cuda, "init", init)
    found = gpu_parts.environment("cuda")
    assert found["no_gpu"] == "The NVIDIA driver on your system is too old (found version 12020)."


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A library's file and record in another folder, as ``library(**record)``; builds go there too."""
    path = ROOT / "build" / f"gpu_check_test_{os.getpid()}" / "libgrpo_cuda.so"
    monkeypatch.delenv(gpu_library.NAMED, raising=False)
    monkeypatch.setattr(gpu_library, "LIBRARY", path)
    monkeypatch.setattr(gpu_machine, "python", lambda script, *rest: python(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); sys.argv = ['', {rest[0]!r}]\n"
        f"import gpu_library, pathlib; gpu_library.LIBRARY = pathlib.Path({str(path)!r})\n"
        "raise SystemExit(gpu_library.main())"
    ))  # fmt: skip

    path.parent.mkdir(parents=True)

    def make(**record: str) -> None:
        path.write_text("")
        path.with_suffix(".json").write_text(json.dumps(record))

    yield make
    shutil.rmtree(path.parent)


def test_library(library, monkeypatch, tmp_path):
    """Missing, of other sources, for other GPUs; and what is missing to build it."""
    assert "it is missing" in gpu_library.lacking(90)
    assert gpu_library.sources() == "libgrpo_cuda.so"
    library(sources="others", architectures="90 100")
    assert "other sources than this tree's" in gpu_library.lacking(90)
    mine = gpu_library.sources_hash("cuda")
    library(sources=mine, architectures="100")
    assert gpu_library.lacking(90) == "it is built for sm_100 and this GPU is sm_90"
    assert gpu_library.lacking(120) is None
    library(sources=mine, architectures="90 100")
    assert gpu_library.lacking(90) is None
    assert gpu_library.sources() == mine
    monkeypatch.setenv("NVCC", str(tmp_path / "no nvcc"))
    library(sources=mine, architectures="100")
    with pytest.raises(gpu_machine.Refused, match=r"built for sm_100 and this GPU is sm_90; nor built: no nvcc found"):
        gpu_machine.prepare_library([9, 0], tmp_path / "log")
    monkeypatch.setitem(sys.modules, "setuptools", None)
    with pytest.raises(gpu_library.Unbuildable, match="pip install setuptools"):
        gpu_library.check_buildable()


def test_library_that_fails_to_build(library, monkeypatch, tmp_path, capsys):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'no host compiler' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("NVCC", str(broken))
    with pytest.raises(gpu_machine.Refused, match=r"was not built \(exit status 1\): .*no host compiler"):
        gpu_machine.prepare_library([9, 0], tmp_path / "log")
    assert "building the CUDA library for sm_90 alone, about 20 s: it is missing" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_library_is_built_for_one_gpu(library, monkeypatch, tmp_path):
    """A minute less than for all of them."""
    gpu_machine.prepare_library([9, 0], tmp_path / "log")
    assert gpu_library.record()["architectures"] == "90"
    assert gpu_library.lacking(90) is None
    assert "is built for sm_90 and this GPU is sm_80" in gpu_library.lacking(80)


# Parts


def test_sanitizers(check, monkeypatch, tmp_path):
    """Over the smoke script and these kernels alone; racecheck of unaligned rows is shown, and no gate."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *$FAILS*) exit 9;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    part = PARTS["sanitizer"]
    for fails, status in (("nothing", 0), ("detect-level", 0), ("memcheck", 1), ("racecheck", 1), ("synccheck", 1)):
        monkeypatch.setenv("FAILS", fails)
        assert check({"sanitizer": part}, out=fails)[0] == status, fails
    rows = {row["name"]: row["passed"] for row in recorded(tmp_path / "detect-level")["sanitizer"]["rows"]}
    assert rows.pop("racecheck of unaligned rows, errors") is False
    assert rows == {"memcheck": True, "racecheck": True, "synccheck": True}
    lines = [
        line for line in (tmp_path / "nothing" / "gpu_check.log").read_text().splitlines() if line.startswith("--tool")
    ]
    assert len(lines) == 4
    assert all("--no-fork --small" in line and "--kernel-regex kns=grpo --error-exitcode 9" in line for line in lines)
    assert "--skip unaligned" in lines[1]
    assert "--only unaligned" in lines[3]


def test_traffic():
    """ncu's table in units of the logits; the CUDA kernels may move one."""
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'

    def text(read: float) -> str:
        rows = [("dram__bytes_read.sum", read), ("dram__bytes_write.sum", 1.0)]
        lines = [f'"0","row_kernel(int)","{name}","byte","{units * gpu_commands.UNIT:,.0f}"' for name, units in rows]
        return "==PROF== connected\n" + head + "\n".join(lines)

    units = gpu_commands.units_of(text(1.01))["row_kernel"]
    assert units == pytest.approx({"read": 1.01, "written": 1.0})
    assert gpu_commands.moved_once(text(1.01))["passed"]
    assert not gpu_commands.moved_once(text(2.0))["passed"]
    assert gpu_commands.moved(text(2.0))["passed"]
    assert not gpu_commands.moved("==ERROR== ERR_NVGPUCTRPERM")["passed"]


def test_measured_rows(tmp_path):
    """Written one by one; those that are there are not measured again, and none begins when the time is over."""
    file, measured = tmp_path / "rows", []

    def rows(*names):
        for name in names:
            yield name, lambda name=name: measured.append(name) or {"passed": name != "wrong"}

    assert gpu_parts.run(rows("a", "b"), file, 10.0)
    assert gpu_parts.run(rows("a", "b", "c"), file, 10.0)
    assert measured == ["a", "b", "c"]
    assert not gpu_parts.run(rows("d"), file, -1.0)
    assert not gpu_parts.run(rows("wrong"), file, 10.0)
    assert measured == ["a", "b", "c", "wrong"]


def test_torch_compile_once(monkeypatch):
    """In the first workload: it compiles every one anew."""
    import gpu_timing

    from grpo_kernels.bench.providers import providers

    monkeypatch.setattr(gpu_timing.peers, "providers", providers)
    specs = gpu_timing.logits("cpu")
    compiled = [any(p.name.startswith("torch.compile") for p in gpu_timing.providers(specs[0], (), c)) for c in (1, 0)]
    assert compiled == [True, False]
    measures = [measure.args for _, measure in gpu_timing.workloads(gpu_timing.logits("cuda"), ("cuda",))]
    assert [compiled for *_, compiled in measures] == [True] + [False] * (len(measures) - 1)


def test_limits(monkeypatch):
    """Bytes over seconds; what is read again, by its size."""
    limits = pytest.importorskip("gpu_limits")
    monkeypatch.setattr(limits.torch, "zeros", lambda count, device: torch.empty(count, device="meta"))
    monkeypatch.setattr(limits, "_seconds", lambda function: 1e-3)
    monkeypatch.setattr(limits, "_reading", lambda values, repeats: values.nbytes * repeats / 1e9)
    found = {name: measure()["gb_per_s"] for name, measure in limits.limits()}
    assert found["copy"] == pytest.approx(2 * 2**31 / 1e6)
    assert found["read"] == pytest.approx(2**31 / 1e9)
    assert found["64 MB read again"] == pytest.approx(100 * 64 * 2**20 / 1e9)


# The record


MADE = {"gpu": "NVIDIA H200", "commit": "abc", "library": "sources"}
GREEN = {
    "environment": {**H200, **MADE, "driver": "580"},
    **{name: {"passed": True, "backends": ["cuda", "triton"], "made_with": MADE, "rows": []} for name in PROOF},
}
GREEN["sanitizer"]["rows"] = [{"name": check, "passed": True} for check in gpu_commands.CHECKS]


def test_what_proves_the_cuda_kernels():
    """Every part of the proof, on these kernels, all with one card, commit and library."""
    assert proves_cuda(GREEN)
    assert proves_cuda({**GREEN, "timing": {"passed": False}})
    for name in PROOF:
        for other in ({"passed": False}, {"passed": None, "skipped": "not here"}, {"backends": ["triton"]},
                      {"made_with": {**MADE, "commit": "def"}}):  # fmt: skip
            assert not proves_cuda({**GREEN, name: {**GREEN[name], **other}}), (name, other)
        assert not proves_cuda({key: part for key, part in GREEN.items() if key != name})
    for rows in ([], GREEN["sanitizer"]["rows"][:2], [{**row, "passed": False} for row in GREEN["sanitizer"]["rows"]]):
        assert not proves_cuda({**GREEN, "sanitizer": {**GREEN["sanitizer"], "rows": rows}})


def test_predictions():
    """By the bytes and the card's own bandwidth; a card that nothing was computed for has none."""
    logits = 8192 * 151936 * 2
    assert computed_ms(logits, "NVIDIA H200") == pytest.approx(1.158, abs=1e-3)
    assert computed_ms(logits, "NVIDIA H100 80GB HBM3") == pytest.approx(1.660, abs=1e-3)
    assert computed_ms(logits, "NVIDIA H100 PCIe") is None
    assert as_predicted(1.25, logits, "NVIDIA H200") == "yes"
    assert as_predicted(1.39, logits, "NVIDIA H200") == "1.20 times it"
    assert as_predicted(1.76, logits, "NVIDIA H100 80GB HBM3") == "1.06 times it"
    assert as_predicted(1.25, logits, "NVIDIA B200") == ""


def test_table():
    """Computed and measured side by side."""
    times = {"name": "8192x151936 bfloat16, k3 KL", "logits_bytes": 8192 * 151936 * 2, "of_copy": 0.9}
    times |= {"one_pass_ms": 1.3, "in_place_ms": 1.25, "log_probs_ms": 0.7, "us_per_row_and_cluster": 5.03}
    smoke = {**GREEN["smoke"], "seconds": 61.0, "rows": [{"name": "copy", "copy_gb_per_s": 4290.0}, times]}
    ours = {"step_ms": 1.3, "gradient_error": 2e-3, "ours": True}
    row = {"name": "8192×151936 bf16", "hidden": None, "kind": "all", "logits_bytes": times["logits_bytes"]}
    row |= {"yardstick_ms": 1.2, "missing": ["Liger"], "providers": {"ours": ours, "TRL": {"skipped": "too large"}}}
    text = markdown({**GREEN, "smoke": smoke, "timing": {**GREEN["smoke"], "rows": [row]}})
    assert text.startswith("NVIDIA H200, driver 580, torch 2.11.0, triton 3.6.0, commit abc, library sources\n")
    assert "| smoke | passed | 61 |" in text
    assert "The CUDA kernels are proven here: yes." in text
    assert "GB/s: copy 4290, assumed 4300." in text
    assert "| 8192x151936 bfloat16, k3 KL | 1.158 | 1.250 | 90% | yes | 1.300 | 0.700 | 5.03 |" in text
    assert "| 8192×151936 bf16 | ours | 1.300 | 1.158 | 1.200 | 92% | 2e-03 |" in text
    assert "| 8192×151936 bf16 | TRL | too large | | | | |" in text
    assert "Not installed: Liger." in text


def test_a_half_written_record_is_none(tmp_path, monkeypatch):
    """Killed while it writes, the file of before is there."""
    record = Record(tmp_path, GREEN["environment"])
    record.begin("smoke", ("cuda",))
    record.save()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.add("smoke", {"name": "a row"})
    assert recorded(tmp_path)["smoke"]["rows"] == []


# The whole of it, over the emulator


def rehearse(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--out", str(folder), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result, recorded(folder)


@pytest.mark.skipif(not os.environ.get(gpu_library.NAMED), reason="no emulator: no C++ compiler that knows _Float16")
def test_rehearsal(tmp_path):
    """From a bare checkout: every line of the smoke part."""
    import gpu_smoke

    result, found = rehearse(tmp_path, "--only", "smoke")
    assert result.returncode == 0, result.stdout + result.stderr
    steps = {name for name, _ in gpu_smoke.steps(small=True)}
    assert {row["name"] for row in found["smoke"]["rows"]} == {"device", "every step", *steps}
    assert found["environment"]["gpu"] == "CPU"
    assert not proves_cuda(found)


@pytest.mark.nightly
@pytest.mark.skipif(not os.environ.get(gpu_library.NAMED), reason="no emulator: no C++ compiler that knows _Float16")
def test_rehearsal_of_every_part(tmp_path):
    result, found = rehearse(tmp_path, "--minutes", "20")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in PARTS:
        assert found[name]["passed"] is (None if name in ("sanitizer", "limits", "triton", "traffic") else True), name
    assert {row["name"] for row in found["large"]["rows"]} >= {"rehearsal, cuda"}
