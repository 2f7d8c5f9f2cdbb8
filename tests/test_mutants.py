"""The suite tested (tests/mutants): faults of every source are noticed, and what makes and judges them is right."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutants import table
from mutants.judge import Judge, Verdict, _failed, _judging, _read, _without, digest_of
from mutants.rules import faults_of, sample
from mutants.written import TOPICS, WRITTEN, path_of
from test_cuda import UNDEFINED

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = {mutant.name: mutant for mutant in table.mutants()}
FIRST = ("cpp token_sums.h", "cuda sums.h", "triton surrogates.py", "python kl.py")
"""The files of which the first fault by rule is judged in every run."""
SAMPLED = {
    "written python: clip: slope kept",
    *(next(name for name in MUTANTS if name.startswith(file)) for file in FIRST),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLED else pytest.mark.nightly) for name in MUTANTS]
)
def test_mutant_is_noticed(name):
    judge, mutant = Judge(), MUTANTS[name]
    verdict = judge.verdict(mutant)
    if verdict.outcome == "broken" and not name.startswith("written"):
        pytest.skip(f"it does not compile, or nothing can be collected: {verdict.said}")
    assert verdict.outcome == "killed", f"{mutant.place}\n- {mutant.before}\n+ {mutant.after}\n{verdict.said}"
    if name not in SAMPLED:  # whose tests run beside this one
        assert not _unsound(judge, mutant), f"{verdict.said} fails without the fault too"


def _unsound(judge: Judge, mutant: table.Mutant) -> list[table.Mutant]:
    for tests in judge.unchecked([mutant]):
        judge.check(tests)
    return judge.unsound([mutant])


@pytest.mark.parametrize("name", WRITTEN)
def test_written_mutant_is_of_this_code(name):
    file, old, _ = WRITTEN[name]
    assert (ROOT / path_of(file)).read_text().count(old) == 1, f"{file} has changed: write this mutant anew"


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_the_emulator_refuses_is_of_this_code(name):
    """Not beside the emulator's tests, which would notice a planted fault by its text."""
    file, old, *_ = UNDEFINED[name]
    assert (ROOT / "csrc" / "cuda" / file).read_text().count(old) == 1, f"{file} has changed: write this fault anew"


def test_topics_are_of_written_mutants():
    assert all(any(name.startswith(topic) for name in WRITTEN) for topic in TOPICS)


def test_listed_survivors_are_of_this_code():
    """And each has a reason."""
    survivors = table.read_survivors()
    known = {table.key_of(file, fault) for file in table.files() for fault in table.faults(file)}
    assert not set(survivors) - known, "no rule makes these faults any more: take them off the list"
    assert all(len(reason) > 10 for reason in survivors.values())


def test_every_kernel_and_every_file_of_maths_is_met():
    """At least 150 by rule, of each language a fair part; one of each file that rules find anything in."""
    by_rule = [mutant for mutant in MUTANTS.values() if not mutant.name.startswith("written")]
    assert len(by_rule) >= 150
    for language, least in (("python", 50), ("triton", 20), ("cpp", 30), ("cuda", 25)):
        assert sum(mutant.suite.language == language for mutant in by_rule) >= least
    met = {mutant.file for mutant in by_rule}
    assert all(file in met or not table.faults(file) for file in table.files())
    folders = ("csrc", "grpo_kernels/objectives", "grpo_kernels/calls", "grpo_kernels/backends")
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    }
    others = {
        "csrc/common/call.h": "a struct",
        "csrc/common/elements.h": "types",
        "csrc/cpu/api.h": "structs",
        "csrc/cuda/api.h": "a struct",
        "csrc/cuda/port.h": "what only a GPU has: tests/ptx/faults.py",
        "grpo_kernels/objectives/compiler.py": "what torch.compile is told",
    }
    left_out = {file for file in sources - set(table.files()) if not file.endswith("__init__.py")}
    assert left_out == set(others)


def test_the_tests_of_a_suite_exist():
    named = {test for mutant in MUTANTS.values() for test in mutant.tests}
    assert not [test for test in named if not (ROOT / "tests" / f"{test}.py").exists()]


PYTHON = '''
def area(width, height=2):
    """a < b"""
    if width < 0 and height:
        raise ValueError(f"{width < 0} is less than {0}")
    ℓ = -width * height + 1.5
    return max(ℓ, 0)
'''
CPP = """
template <class T>
inline float area(const float* p, int n) {
  // a < b
  float sum = 0.5f;
  for (int i = 0; i < n && p[i] != 0; ++i) sum += -p[i] * 2;
  return fmax(sum, p[0]);
}
"""


def test_rules_of_python():
    made = {fault.after for fault in faults_of(PYTHON, python=True) if fault.scope == "area"}
    assert made == {
        "def area(width, height=3):",
        *(f"if width {other} and height:" for other in ("<= 0", "> 0", "< 1")),
        *("if width < 0 or height:", "if width < 0:"),
        *(f"ℓ = {other}" for other in ("width * height + 1.5", "-width / height + 1.5", "-width + 1.5")),
        *(f"ℓ = -width * height{other}" for other in (" - 1.5", " + 3.0", "")),
        *("return min(ℓ, 0)", "return max(ℓ, 1)"),
    }


def test_rules_of_cpp():
    made = {fault.after for fault in faults_of(CPP, python=False)}
    loop = "for (int i = 0; i < n && p[i] != 0; ++i) sum += -p[i] * 2;"
    assert made == {
        "float sum = 1.0f;",
        loop.replace("i = 0", "i = 1"),
        *(loop.replace("i < n", other) for other in ("i <= n", "i > n")),
        *(loop.replace("!= 0", other) for other in ("== 0", "!= 1")),
        *(loop.replace(" && p[i] != 0", other) for other in ("", " || p[i] != 0")),
        *(loop.replace("+= -p[i] * 2", other) for other in ("-= -p[i] * 2", "+= p[i] * 2", "+= -p[i] / 2")),
        *(loop.replace("* 2", other) for other in ("* 3",)),
        loop.replace(" * 2", ""),
        *("return fmin(sum, p[0]);", "return fmax(sum, p[1]);"),
    }


def test_a_sample_outlives_edits_elsewhere():
    """Of each line at most one fault; a line before them, or a fault more in another function, changes no rank."""
    faults = faults_of(PYTHON, python=True)
    chosen = sample(faults, 3, seed=0)
    assert len({fault.line for fault in chosen}) == 3
    later = faults_of("\n\n\ndef other(x):\n    return x + x\n" + PYTHON, python=True)
    assert {fault.rank(0) for fault in faults} < {fault.rank(0) for fault in later}
    assert sample(faults, 3, seed=1) != chosen


def test_a_verdict_is_of_the_contents(monkeypatch, tmp_path):
    """A file that has changed, or what judges it, is judged anew; other files leave the verdict alone."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    shutil.copytree(ROOT / "grpo_kernels" / "objectives", tmp_path / "grpo_kernels" / "objectives")
    monkeypatch.setattr("mutants.judge.ROOT", tmp_path)
    mutant = next(mutant for name, mutant in MUTANTS.items() if name.startswith("python kl.py"))
    judge = Judge(tmp_path / "verdicts")
    judge._remember(mutant.name, digest_of(mutant), Verdict("killed", "tests/test_x.py::test_y", 1.0))
    with judge.record.open("a") as file:
        file.write('{"name": "cut by an acc')
    assert Judge(tmp_path / "verdicts").recall(mutant) is not None
    test = f"tests/{mutant.tests[0]}.py::test_y"
    sound = _without(mutant, test)
    for changed, holds in (
        ("tests/soak/record.py", True),
        ("tests/test_soak.py", True),
        ("tests/raw_bits.py", True),
        ("tests/cases.py", False),
        ("tests/cuda_emulator/emulator.h", True),
        (f"tests/{mutant.tests[0]}.py", False),
        (mutant.file, False),
    ):
        path = tmp_path / changed
        before = path.read_text()
        path.write_text(before + "# changed\n")
        assert (Judge(tmp_path / "verdicts").recall(mutant) is not None) == holds
        assert (_without(mutant, test) == sound) == holds
        path.write_text(before)


def test_what_judges_is_what_the_tests_import():
    """To any depth, with what is compiled and read beside it; the emulator where its library is."""
    of_abi = _judging(["test_fuzz_abi"], "cuda")
    assert {
        "tests/conftest.py",
        "tests/fuzz_abi/cpu.cpp",
        "tests/corpus/abi/divergence_took_what_is_no_call.txt",
    } < {*of_abi}
    assert "tests/test_loss.py" not in of_abi
    emulator = {"tests/cuda_emulator/__init__.py", "tests/cuda_emulator/emulator.h"}
    assert set(of_abi) - set(_judging(["test_fuzz_abi"], "cpu avx2")) == emulator


def test_a_crash_kills_where_its_suite_ends_without_the_fault(tmp_path, monkeypatch):
    judge, mutant = Judge(tmp_path), MUTANTS["written python: gae: decay"]
    judge._remember(mutant.name, digest_of(mutant), Verdict("killed", "it ends by signal 24", 1.0))
    runs = []

    def tested(self, mutant, tests, sound, chosen):
        runs.append((tests, sound, chosen[:1]))
        return status, "9 passed"

    monkeypatch.setattr(Judge, "_tested", tested)
    for status in (-24, 0):
        assert judge.unsound([mutant]) == [mutant]  # what was not checked is no kill
        assert _unsound(judge, mutant) == ([mutant] if status else [])
        assert _unsound(judge, mutant) == ([mutant] if status else [])
        assert runs == [([f"tests/{test}.py" for test in mutant.tests], True, ["-x"])]
        runs.clear()
        judge = Judge(tmp_path / "again")
        judge._remember(mutant.name, digest_of(mutant), Verdict("killed", "it hangs", 1.0))


def test_tests_of_one_build_are_checked_together(tmp_path, monkeypatch):
    """No more of them than end in the time of one process; one that fails tells on its own mutant alone."""
    mutants = [mutant for mutant in MUTANTS.values() if not mutant.suite.build][:50]
    judge = Judge(tmp_path)
    for i, mutant in enumerate(mutants):
        judge._remember(mutant.name, digest_of(mutant), Verdict("killed", f"tests/test_x.py::test_y[{i}]", 1.0))
    runs = []

    def tested(self, mutant, tests, sound, chosen):
        runs.append(tests)
        failed = "tests/test_x.py::test_y[43]"
        return (1, f"{failed} FAILED  [ 1%]\n") if failed in tests else (0, "")

    monkeypatch.setattr(Judge, "_tested", tested)
    for tests in judge.unchecked(mutants):
        judge.check(tests)
    assert [len(tests) for tests in runs] == [40, 10]
    assert judge.unsound(mutants) == [mutants[43]]
    assert judge.unchecked(mutants) == []


def test_a_test_is_checked_once_whatever_it_killed(tmp_path, monkeypatch):
    """Also faults of files that other suites judge."""
    one, other = MUTANTS["written python: gae: decay"], MUTANTS["written python: mask: read"]
    assert one.tests != other.tests
    judge = Judge(tmp_path)
    for mutant in (one, other):
        judge._remember(mutant.name, digest_of(mutant), Verdict("killed", "tests/test_x.py::test_y", 1.0))
    monkeypatch.setattr(Judge, "_tested", lambda *_, **__: (0, ""))
    assert _unsound(judge, one) == []
    assert judge.unchecked([other]) == judge.unsound([other]) == []


def test_no_verdict_without_a_test():
    """A suite that selects nothing, or names a file that is gone, is no fault that does not compile."""
    for status, said in ((5, "9 deselected"), (4, "ERROR: file or directory not found: tests/test_x.py")):
        with pytest.raises(RuntimeError, match="no test was run"):
            _read(status, said)
    assert _read(4, "ImportError while loading conftest 'tests/conftest.py'.")[0] == "broken"


def test_ids_of_what_failed_are_whole(tmp_path):
    """An id may hold what separates it from a message."""
    path = tmp_path / "tests" / "test_x.py"
    path.parent.mkdir()
    path.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['r - 1 FAILED Σ', 'fine'])\n"
        "def test_y(x):\n    assert x == 'fine', 'one - two'\n"
        "@pytest.fixture\ndef broken():\n    raise ValueError('a - b')\n"
        "def test_z(broken):\n    pass\n"
    )
    (tmp_path / "tests" / "test_w.py").write_text("import nothing_of_that_name\n")
    command = [sys.executable, "-m", "pytest", "--tb=no", "-vv", "-rE", "-p", "no:cacheprovider", "tests"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    for more, ids in (
        (
            ["--continue-on-collection-errors"],
            [r"test_x.py::test_y[r - 1 FAILED \u03a3]", "test_x.py::test_z", "test_w.py"],
        ),
        ([], ["test_w.py"]),
    ):
        run = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert _failed(run.stdout) == [f"tests/{each}" for each in ids], run.stdout
    again = subprocess.run(
        [*command[:-1], r"tests/test_x.py::test_y[r - 1 FAILED \u03a3]"], cwd=tmp_path, env=environment
    )
    assert again.returncode == 1


@pytest.mark.nightly
def test_an_interrupted_run_leaves_nothing_and_is_taken_up(tmp_path):
    """No process, no copy of the sources; the verdicts that were found stay, and the rest is judged."""
    known = MUTANTS["written python: gae: decay"]
    judge = Judge(tmp_path)
    judge._remember(known.name, digest_of(known), Verdict("killed", "it ends by signal 11", 1.0))
    before = judge.record.read_text()
    for how in (signal.SIGINT, signal.SIGTERM):
        run = _start(tmp_path, "written python: gae")
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("tree_*/tmp/*")):  # the tests of the other mutant have begun
            assert time.monotonic() < deadline
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.05)
        run.send_signal(how)
        said = run.communicate(timeout=60)[0]
        assert run.returncode == 130, said
        assert said.splitlines()[-1] == "1 of 2 judged; the same command goes on"
        assert [path.name for path in tmp_path.iterdir()] == ["verdicts.jsonl"]
        assert judge.record.read_text() == before
        assert not _processes_of(tmp_path)
    run = _start(tmp_path, "written python: gae")
    said = run.communicate(timeout=500)[0]
    assert run.returncode == 0, said
    assert "[1/1, " in said
    assert "killed: written python: gae: over a bound" in said
    assert said.splitlines()[-1].startswith(
        "2 mutants: 2 killed (100.0 % of those that run), 0 survive, 0 do not compile"
    )
    assert judge.record.read_text().count("without a fault:") == 2  # the suite of what crashed, and a test


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.mutants", "--folder", str(folder), *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def _said_of_a_failed_run(folder: Path, mutant: table.Mutant, verdict: Verdict) -> str:
    """What the command says of a mutant whose verdict is known."""
    Judge(folder)._remember(mutant.name, digest_of(mutant), verdict)
    run = _start(folder, mutant.name)
    said = run.communicate(timeout=100)[0]
    assert run.returncode == 1
    return said


def test_what_survives_is_shown_and_fails_the_run(tmp_path):
    mutant = MUTANTS["written python: gae: decay"]
    said = _said_of_a_failed_run(tmp_path, mutant, Verdict("survives", "50 passed", 1.0))
    assert f"    - {mutant.before}\n    + {mutant.after}\n" in said
    assert said.splitlines()[-1].startswith("1 mutants: 0 killed (0.0 % of those that run), 1 survive")


def test_a_language_without_a_kill_fails_the_run(tmp_path):
    mutant = MUTANTS["written python: gae: decay"]
    said = _said_of_a_failed_run(tmp_path, mutant, Verdict("broken", "no module named torch", 1.0))
    assert "none is killed of python: what judges them does not run" in said


def _processes_of(folder: Path) -> list[str]:
    """What runs in the folder, or of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(folder) in str((process / "cwd").readlink())
                or str(folder).encode() in (process / "cmdline").read_bytes()
            ):
                found.append(process.name)
        except OSError:
            continue
    return found
