"""The nightly suite's parts are the whole of it, and a run that is cut short is taken up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COLLECTED
from nightly.parts import PARTS
from nightly.record import ROOT, guarded_files

HERE = Path(__file__).resolve().parent


def test_every_nightly_test_is_in_one_part(request):
    """Of all files that this run collects; `make test` collects every one."""
    nightly = [item for item in request.config.stash[COLLECTED] if item.get_closest_marker("nightly")]
    if not nightly:
        pytest.skip("no nightly test is among the collected files")
    parts = {item.nodeid: [name for name, part in PARTS.items() if part.takes(item)] for item in nightly}
    assert not {test: names for test, names in parts.items() if len(names) != 1}


@pytest.mark.parametrize("name", PARTS)
def test_parts_name_what_exists(name):
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    part = PARTS[name]
    for glob in part.guards:
        assert guarded_files((glob.removeprefix("!"),)), glob
    everything, left_out = guarded_files(part.guards), [glob[1:] for glob in part.guards if glob.startswith("!")]
    assert {f"tests/{file}.py" for file in part.files} <= set(everything)
    assert not left_out or not set(everything) & set(guarded_files(tuple(left_out)))
    assert part.minutes <= 25


@pytest.mark.parametrize(
    ("name", "guarded"),
    [
        ("match", "tests/losses_of_others/seen.py"),
        ("compositions", "tests/distributed.py"),
        ("cpu", "tests/cuda_emulator/__init__.py"),
        ("cuda", "tests/oracle.py"),
        ("skyrl", "benchmarks/system_steps.py"),
        ("commands", "tests/resident.py"),
        ("ptx", "tests/ptx/cases.py"),
    ],
)
def test_parts_guard_what_their_tests_import(name, guarded):
    """The truths that a test compares with, and the programs that it runs: a change there leaves no part passed."""
    assert guarded in PARTS[name].guards


def test_mutants_are_judged_anew_by_another_fuzzer():
    assert all("tests/fuzz_abi/**" in part.guards for name, part in PARTS.items() if name.startswith("mutants-"))


def test_parts_know_the_folders_that_make_installs():
    named = {part.folder for part in PARTS.values() if part.folder}
    assert named == {path.stem for path in (HERE / "nightly").glob("*.txt")}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("named", "installed"), [("list", ()), ("cuda skyrl", ("skyrl",)), ("", None)])
def test_make_installs_what_the_named_parts_need(named, installed, tmp_path):
    """Listing them installs no system, and nothing but the package and what its tests need."""
    command = ["make", "-n", f"VENV={tmp_path}", "nightly", f"PART={named}"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    every = {path.stem for path in (HERE / "nightly").glob("*.txt")}
    wanted = every if installed is None else set(installed)
    assert {name for name in every if f"--target {tmp_path}/{name}" in told} == wanted
    package = 3  # itself, PyTorch beside it, the rest of what it needs
    assert told.count("pip install") == package + (0 if named == "list" else 2 + len(wanted))


DEMO = """
import os, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent

@pytest.mark.nightly
@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_nightly(name, record_property):
    record_property("examples", 700)
    import of_this_part, subprocess, sys
    subprocess.run([sys.executable, "-c", "import of_this_part"], check=True)
    with (HERE / "log").open("a") as log:
        print(name, file=log)
    while (HERE / f"{name} waits").exists():
        time.sleep(0.05)
    if (HERE / "all are skipped").exists():
        pytest.skip("no such interpreter here")
    assert not (HERE / f"{name} fails").exists()

def test_of_every_day():
    raise AssertionError
"""


@pytest.fixture
def tree(tmp_path):
    """A repository of one part, whose tests fail and wait on demand."""
    tests = tmp_path / "tests"
    shutil.copytree(HERE / "nightly", tests / "nightly", ignore=shutil.ignore_patterns("__pycache__"))
    source = (HERE / "nightly" / "parts.py").read_text()
    folder = tmp_path / "folder"
    part = f'PARTS = {{"demo": Part(1, ("test_demo",), ("guarded",), folder="{folder}")}}\n'
    folder.mkdir()
    (folder / "of_this_part.py").touch()
    (tests / "nightly" / "parts.py").write_text(source[: source.index("PARTS = {")] + part)
    (tests / "test_demo.py").write_text(DEMO)
    (tmp_path / "guarded").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = nightly\n")
    (tmp_path / ".gitignore").write_text("build/\n__pycache__/\ntests/log\n")
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def start(tree: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.nightly", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=120)[0]
    return process.returncode, said


@pytest.mark.nightly
def test_an_interrupted_part_is_taken_up(tree):
    (tree / "tests" / "third waits").touch()
    process = start(tree)
    log, progress = tree / "tests" / "log", tree / "build" / "nightly"
    deadline = time.monotonic() + 60
    while sum(len(path.read_text().splitlines()) for path in progress.glob("*")) < 2 or "third" not in log.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 1, said
    assert "demo: did not come to its end; the same command takes it up where it stopped" in said
    assert not (tree / "benchmarks").exists()
    assert "of a run to be taken up: 2 passed, 0 failed" in finish(start(tree, "list"))[1]
    (tree / "tests" / "third waits").unlink()
    status, said = finish(start(tree))
    assert status == 0, said
    assert "demo: 3 passed, 0 failed, 0 skipped" in said
    assert "700 examples: tests/test_demo.py::test_nightly[third]" in said
    assert "2,100 examples in all" in said
    assert sorted(log.read_text().split()) == ["first", "second", "third", "third"]
    assert not list(progress.glob("*"))


def test_a_part_is_stale_when_what_it_guards_has_changed(tree):
    (tree / "tests" / "second fails").touch()
    assert finish(start(tree))[0] == 1
    assert "demo: stale: it failed" in finish(start(tree, "list"))[1]
    (tree / "tests" / "second fails").unlink()
    assert finish(start(tree))[0] == 0  # what failed, alone
    log = tree / "tests" / "log"
    assert sorted(log.read_text().split()) == ["first", "second", "second", "third"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True).stdout
    row = (tree / "benchmarks" / "results" / "nightly.md").read_text().splitlines()[-1]
    assert row.startswith(f"| demo | {commit.strip()} | ")
    assert " | 3 | 0 | 0 | " in row
    assert finish(start(tree)) == (0, "")  # nothing is stale
    (tree / "guarded").write_text("changed\n")
    assert "demo: stale: guarded files have changed" in finish(start(tree, "list"))[1]


def test_a_line_that_was_cut_short_takes_no_other_with_it(tree):
    """What fails after it is not lost."""
    (tree / "tests" / "second fails").touch()
    (tree / "tests" / "third fails").touch()
    assert finish(start(tree))[0] == 1
    (progress,) = (tree / "build" / "nightly").glob("*")
    lines = [line for line in progress.read_text().splitlines() if "third" not in line]
    progress.write_text("\n".join([*lines, '{"test": "tests/te']))
    assert "of a run to be taken up: 1 passed, 1 failed" in finish(start(tree, "list"))[1]
    (tree / "tests" / "second fails").unlink()
    status, said = finish(start(tree))
    assert status == 1
    assert "demo: 2 passed, 1 failed, 0 skipped" in said


def test_without_git_it_says_what_is_missing(tree):
    shutil.rmtree(tree / ".git")
    status, said = finish(start(tree, "list"))
    assert status == 1
    assert said.startswith("tests.nightly needs a git checkout, by which it knows what has changed; got: ")


def test_a_part_whose_tests_are_all_skipped_leaves_the_last_row(tree):
    """And says why: an interpreter that is not there must not undo what is known."""
    assert finish(start(tree, "demo"))[0] == 0
    table = tree / "benchmarks" / "results" / "nightly.md"
    before = table.read_text()
    (tree / "tests" / "all are skipped").touch()
    status, said = finish(start(tree, "demo"))
    assert status == 1
    assert "no such interpreter here" in said
    assert "demo: 0 passed, 0 failed, 3 skipped" in said
    assert table.read_text() == before
