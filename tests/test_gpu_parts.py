"""What gpu_check.py's parts measure, and the library that they measure, without a GPU."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_commands
import gpu_library
import gpu_machine
import gpu_parts
import gpu_process
import gpu_rows
import pytest
import torch
from test_gpu_process import python

from grpo_kernels.backends import cuda

ROOT = Path(__file__).resolve().parent.parent


def test_why_there_is_no_gpu(monkeypatch):
    """In the words of PyTorch, which knows an old driver from none."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(gpu_parts.torch.cuda, "init", init)
    found = gpu_parts.environment("cuda")
    assert found["no_gpu"] == "The NVIDIA driver on your system is too old (found version 12020)."


def test_skipped_tests_prove_nothing():
    """Neither all of them nor those of one worker that found no library."""
    assert gpu_commands.tests_run("....\n62 passed in 31.2s") == {"tests": 62, "tests_skipped": 0, "passed": True}
    other = "SKIPPED [1] tests/test_cuda.py:124: the device takes no clusters of 16\n"
    assert gpu_commands.tests_run(other + "61 passed, 1 skipped in 31.2s")["passed"]
    mine = "SKIPPED [5] tests/test_cuda.py:155: not served: it is missing\n"
    assert not gpu_commands.tests_run(mine + "57 passed, 5 skipped in 31.2s")["passed"]
    assert not gpu_commands.tests_run("62 skipped in 3.1s")["passed"]
    assert not gpu_commands.tests_run("no tests ran in 0.1s")["passed"]


def test_the_suite_says_that_it_is_not_served():
    """As the part runs it, without a library."""
    (command,) = gpu_commands.suite(gpu_commands.Setting("cpu", ("cuda",)))
    environment = {**os.environ, **command.environment, gpu_library.NAMED: "/none.so"}
    result = subprocess.run(command.argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert "not served: " in result.stdout
    found = command.read(result.stdout)
    assert found["tests_skipped"] > 0
    assert (found["tests"], found["passed"]) == (0, False)


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
    without = gpu_commands.moved("==ERROR== Failed to initialize the profiler: LibraryNotLoaded")
    assert without["skip"] == "ERROR== Failed to initialize the profiler: LibraryNotLoaded"
    refused = gpu_commands.moved("==ERROR== ERR_NVGPUCTRPERM - no permission")
    assert (refused["passed"], refused["skip"]) == (False, "ERROR== ERR_NVGPUCTRPERM - no permission")
    assert "skip" not in gpu_commands.moved(text(2.0))


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


def test_a_row_that_raises_takes_no_other_with_it(tmp_path):
    """Nor in a run that goes on: Triton's that does not compile stands between those of CUDA."""
    file, measured = tmp_path / "rows", []

    def measure(name):
        measured.append(name)
        if name == "b":
            raise RuntimeError("no kernel\nfor that")
        return {}

    for _ in range(2):
        assert not gpu_parts.run(((name, functools.partial(measure, name)) for name in "abc"), file, 10.0)
    assert measured == ["a", "b", "c", "b"]
    failed = {"name": "b", "passed": False, "how": "RuntimeError: no kernel"}
    assert [{key: row[key] for key in failed} for row in gpu_rows.read(file) if not row["passed"]] == [failed] * 2
    assert [row["name"] for row in gpu_rows.read(file) if row["passed"]] == ["a", "c"]


def test_nothing_is_measured_on_a_gpu_that_is_lost(tmp_path, monkeypatch):
    """After an illegal access every call of the process fails: those are no faults of the rows."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not gpu_parts.run(((name, lost) for name in "ab"), tmp_path / "rows", 10.0)
    assert [row["name"] for row in gpu_rows.read(tmp_path / "rows")] == ["a"]


def test_large_shapes_of_one_backend_come_first():
    """Those of the CUDA kernels prove them whatever becomes of Triton's."""
    for part in (gpu_parts.large, gpu_parts.pairs):
        backends = [name.rpartition(", ")[2] for name, _ in part("cuda", ["cuda", "triton"]) if "x" not in name]
        assert len(backends) > 4
        assert backends == sorted(backends)
        assert set(backends) == {"cuda", "triton"}


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
    assert gpu_library.sources() == "no libgrpo_cuda.so"
    library(sources="others", architectures="90 100")
    assert "other sources than this tree's" in gpu_library.lacking(90)
    mine = gpu_library.sources_hash("cuda")
    library(sources=mine, architectures="100")
    assert gpu_library.lacking(90) == "it is built for sm_100 and this GPU is sm_90"
    assert gpu_library.lacking(120) is None
    library(sources=mine, architectures="90 100")
    assert gpu_library.lacking(90) is None
    assert gpu_library.sources() == mine
    library(sources=mine, architectures="90a")
    assert gpu_library.lacking(90) is None
    assert gpu_library.lacking(100) == "it is built for sm_90a and this GPU is sm_100"
    monkeypatch.setenv("NVCC", str(tmp_path / "no nvcc"))
    library(sources=mine, architectures="100")
    with pytest.raises(gpu_machine.Refused, match=r"built for sm_100 and this GPU is sm_90; nor built: no nvcc found"):
        gpu_machine.prepare_library([9, 0], tmp_path / "log")
    monkeypatch.setitem(sys.modules, "setuptools", None)
    with pytest.raises(gpu_library.Unbuildable, match="pip install setuptools"):
        gpu_library.check_buildable()


def test_library_without_a_record(library, monkeypatch, tmp_path):
    """One that the environment names is known by what is in it; a broken record is none."""
    library()
    for broken in ("{", "[1]", '{"sources": 3}'):
        gpu_library.LIBRARY.with_suffix(".json").write_text(broken)
        assert "other sources than this tree's" in gpu_library.lacking(90)
    known = set()
    for code in (b"one", b"two"):
        (tmp_path / "named.so").write_bytes(code)
        monkeypatch.setenv(gpu_library.NAMED, str(tmp_path / "named.so"))
        known.add(gpu_library.sources())
    assert len(known) == 2


def test_commit(tmp_path, monkeypatch):
    """A copy of the tree inside another repository has not that one's."""
    inside = tmp_path / "copy"
    inside.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    for module in (gpu_machine, gpu_process):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert len(gpu_machine.commit()) == 12
    for module in (gpu_machine, gpu_process):
        monkeypatch.setattr(module, "ROOT", inside)
    assert gpu_machine.commit() is None
    assert gpu_process.output(["no such command"]) is None


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


def target_alone(before, ids, gradient):
    """No softmax: every element is right within 1e-4, of a gradient of 1."""
    gradient.zero_().scatter_(-1, ids[..., None], -1.0)


WRONG = {
    "target alone": target_alone,
    "a row is not a number": lambda before, ids, gradient: gradient[0, 3].fill_(torch.nan),
    "a row is unwritten": lambda before, ids, gradient: gradient[0, 2].copy_(before[0, 2]),
}


@pytest.mark.skipif(not cuda.emulated(), reason="it needs the emulator")
@pytest.mark.parametrize("wrong", WRONG)
def test_large_sees_what_is_wrong(monkeypatch, wrong):
    """In every row of a gradient of many small elements."""
    plain = gpu_parts.grpo_loss

    def spoiled(logits, ids, *rest, **options):
        before = logits.detach().clone()
        plain(logits, ids, *rest, **options)
        WRONG[wrong](before, ids, logits.detach())

    assert gpu_parts._large("cpu", "cuda", 6, 40000)["passed"]
    monkeypatch.setattr(gpu_parts, "grpo_loss", spoiled)
    assert not gpu_parts._large("cpu", "cuda", 6, 40000)["passed"]


OF_PAIRS = {
    "divergence": lambda *given: given[-1].divergence[0, 1].mul_(1.001),
    "fused_divergence": lambda *given: given[-1][0, 2, 7].mul_(1.05),
}


@pytest.mark.skipif(not cuda.emulated(), reason="it needs the emulator")
@pytest.mark.parametrize("name", OF_PAIRS)
def test_pairs_see_what_is_wrong(monkeypatch, name):
    """In one row; of the gradient in its likely column alone."""
    function = getattr(cuda, name)

    def spoiled(*arguments):
        function(*arguments)
        OF_PAIRS[name](*arguments)

    assert gpu_parts._pairs("cpu", "cuda", "reverse_kl", 4, 520)["passed"]
    monkeypatch.setattr(cuda, name, spoiled)
    assert not gpu_parts._pairs("cpu", "cuda", "reverse_kl", 4, 520)["passed"]
