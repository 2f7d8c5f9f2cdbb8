"""The library that runs is the one of this tree; the package installs with and without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import gpu_library
import pytest
import torch
from gpu_library import sources_hash

import grpo_kernels
from grpo_kernels import backends
from grpo_kernels.backends import cpu, native

ROOT = Path(__file__).resolve().parent.parent


def test_compiled_backend_is_in_use():
    """Where there is a compiler there is no excuse for the fallback."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler here")
    assert backends.get("cpu").unsupported(backends.Request(torch.device("cpu"))) is None
    assert backends.choose("test", backends.Request(torch.device("cpu"), fused=True), None)[:2] == ("cpu", True)
    assert Path(grpo_kernels.__file__).parent == ROOT / "grpo_kernels"
    assert native.build_record(cpu.LIBRARY)["sources"] == sources_hash("cpu"), (
        "the library is stale: make test rebuilds it"
    )


def test_cuda_library_is_built_where_it_was_asked_for():
    """Of these sources, for Hopper and Blackwell, where there is nvcc; elsewhere the record says why it is not."""
    record = native.build_record(native.FOLDER / "libgrpo_cuda.so")
    assert record.get("sources") == sources_hash("cuda"), "the library is stale: make test rebuilds it"
    assert (native.FOLDER / "libgrpo_cuda.so").exists() == ("error" not in record)
    if "error" in record:
        asked = re.search(r"ARCHITECTURES=\d", record["choices"])
        assert record["error"].startswith("no nvcc found" if asked else "not asked for")
        assert not (asked and shutil.which("nvcc"))
    else:
        assert record["architectures"] in ("90", "90 100")


@pytest.mark.parametrize("architectures", [None, "", " "])
def test_nvcc_is_not_started_unasked(tmp_path, monkeypatch, architectures):
    """Whose toolkit is on the search path has not asked for minutes of it."""
    started = tmp_path / "started"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {started}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("GRPO_KERNELS_CUDA_ARCHITECTURES", raising=False)
    if architectures is not None:
        monkeypatch.setenv("GRPO_KERNELS_CUDA_ARCHITECTURES", architectures)
    setup = gpu_library.setup()
    with pytest.raises(setup.CompileError, match=r"not asked for: GRPO_KERNELS_CUDA_ARCHITECTURES=90,100 asks nvcc"):
        setup.build_cuda(tmp_path / "libgrpo_cuda.so", tmp_path)
    assert not started.exists()


@pytest.mark.parametrize("architectures", ["sm_90", "90a", "9.0", "90;100"])
def test_what_names_no_architecture_does_not_fail_an_installation(tmp_path, monkeypatch, architectures):
    monkeypatch.setenv("GRPO_KERNELS_CUDA_ARCHITECTURES", architectures)
    gpu_library.setup().build_library("cuda", tmp_path, tmp_path)
    told = native.build_record(tmp_path / "libgrpo_cuda.so")["error"]
    assert told == f"GRPO_KERNELS_CUDA_ARCHITECTURES must be numbers such as 90,100; got '{architectures}'"


def test_what_nvcc_will_take_is_said_before_it_starts(tmp_path, monkeypatch, capfd):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 && exit\necho out of registers >&2\nexit 1\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("GRPO_KERNELS_CUDA_ARCHITECTURES", "100, 90")
    setup = gpu_library.setup()
    with pytest.raises(setup.CompileError, match="out of registers"):
        setup.build_cuda(tmp_path / "libgrpo_cuda.so", tmp_path)
    assert capfd.readouterr().err == f"{nvcc} compiles csrc/cuda for sm_90: 1 to 2 minutes\n"


def test_both_libraries_are_built_at_once(tmp_path):
    """Each compiler waits for the other one to be started."""
    for name, other, answers in (("c++", "nvcc", ""), ("nvcc", "c++", "--list-gpu-code) echo sm_90; exit;;")):
        compiler = tmp_path / name
        compiler.write_text(
            f"#!/bin/sh\ncase $1 in --version|-fopenmp) exit;; {answers} esac\ntouch '{tmp_path}/{name} runs'\n"
            f"for i in $(seq 100); do [ -e '{tmp_path}/{other} runs' ] && touch '{tmp_path}/{name} met' && exit 1\n"
            "sleep 0.1; done; exit 1\n"
        )
        compiler.chmod(0o755)
    places = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    build = [sys.executable, "setup.py", "--quiet", "build_ext", *places]
    chosen = {"CXX": str(tmp_path / "c++"), "NVCC": str(tmp_path / "nvcc"), "GRPO_KERNELS_CUDA_ARCHITECTURES": "90"}
    subprocess.run(build, cwd=ROOT, env={**os.environ, **chosen}, check=True, capture_output=True)
    assert {path.name for path in tmp_path.glob("* met")} == {"c++ met", "nvcc met"}


def test_every_instruction_set_was_compiled():
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("one instruction set here")
    record = native.build_record(cpu.LIBRARY)
    assert record["instruction_sets"].split() == ["generic", "avx2", "avx512"]
    assert record["openmp"] == "yes"


def test_versions_agree():
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert project
    assert project[1] == grpo_kernels.__version__
    assert f"## {project[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_python_is_one_version_everywhere():
    """What pip, ruff and mypy hold the code to, and what the texts promise."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    assert settings["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert settings["tool"]["mypy"]["python_version"] == oldest
    for name in ("Makefile", ".ci/run", "README.md"):
        assert re.findall(r"[Pp]ython3? >= ([\d.]+)", (ROOT / name).read_text()) == [oldest], name


def test_the_pythons_of_the_metadata_are_those_that_were_run():
    """A classifier for each minor version of docs/versions.md, and for no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = set(re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"])))
    (row,) = re.findall(r"^\| Python \|(.*)$", (ROOT / "docs" / "versions.md").read_text(), re.M)
    assert told == set(re.findall(r"3\.\d+", row))
    assert project["requires-python"].removeprefix(">=") == min(told, key=lambda version: int(version[2:]))
    assert len(project["keywords"]) >= 5


def tracked_files() -> list[str]:
    """What git tracks and is here."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    return [name for name in filter(None, files.stdout.split("\0")) if (ROOT / name).exists()]


def test_the_source_distribution_is_the_tree(tmp_path):
    """Every tracked file but git's own, tests and what the documents link to among them; and no library."""
    pytest.importorskip("setuptools")
    for name in tracked_files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "grpo_kernels" / "native").mkdir()
    (tmp_path / "grpo_kernels" / "native" / "libgrpo_cpu.so").write_text("built here")
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(next(name for name in archive.getnames() if name.endswith("PKG-INFO"))).read()
    assert {*tracked_files()} - {".gitignore"} <= held
    links = re.findall(
        r"\]\((?![a-z]+:|#)([^)#]+)", re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    )
    assert len(links) > 20
    assert not [link for link in links if link not in held]
    assert not [name for name in held if name.startswith("grpo_kernels/native") or "__pycache__" in name]
    assert b"License-File: NOTICE" in metadata


def isolated_tree(folder: Path) -> Path:
    """What git tracks, without tests, copied: no library, no build folder."""
    for name in tracked_files():
        if not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def lend_library(tree: Path) -> None:
    """The CPU library of this tree: setup.py takes it over, as long as it was built as it would build it."""
    folder = tree / "grpo_kernels" / "native"
    folder.mkdir()
    for path in (cpu.LIBRARY, cpu.LIBRARY.with_suffix(".json")):
        shutil.copy2(path, folder)


def build_wheel(tree: Path, **environment: str) -> Path:
    """`pip wheel` in build isolation: torch is not there. Skips without pip, and where it cannot fetch setuptools."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", "wheels", "--quiet"]
    environment = {**os.environ, "GRPO_KERNELS_CUDA_ARCHITECTURES": "", **environment}  # a minute less
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    if "No module named pip" in result.stderr:  # importing it here would change distutils for the whole process
        pytest.skip("pip is not here")
    if result.returncode and re.search("No matching distribution found for setuptools", result.stderr):
        pytest.skip("pip cannot fetch setuptools here")
    assert result.returncode == 0, result.stderr[-2000:]
    return next((tree / "wheels").glob("*.whl"))


def unpacked(wheel: Path, folder: Path) -> Path:
    """A folder with a wheel's content, and with what uses every public name of it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    shutil.copy2(ROOT / "tests" / "installed.py", folder)
    return folder


def run_wheel(site: Path, *arguments: str) -> str:
    """A program with the wheel's content before everything else, and no source tree."""
    environment = {**os.environ, "PYTHONPATH": str(site), "GRPO_KERNELS_CUDA_LIBRARY": "", "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=site, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


REPORT = """
import json, torch, grpo_kernels
from grpo_kernels import info
x = torch.randn(1, 3, 50, requires_grad=True)
grpo_kernels.grpo_loss(x, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1)).loss.backward()
print(json.dumps({**info.collect(), "file": grpo_kernels.__file__, "gradient": x.grad.abs().sum().item()}))
"""


@pytest.mark.parametrize("library", ["built before", pytest.param("compiled", marks=pytest.mark.nightly)])
def test_wheel(tmp_path, library):
    """One wheel for every Python, without PyTorch at build time, and it works; in every run with the CPU library that
    `make test` has compiled in the same isolation."""
    tree = isolated_tree(tmp_path / "tree")
    if library == "built before":
        lend_library(tree)
    wheel = build_wheel(tree)
    assert re.fullmatch(r"grpo_kernels-[\d.]+-py3-none-\w+\.whl", wheel.name)
    site = unpacked(wheel, tmp_path / "site")
    report = json.loads(run_wheel(site, "-c", REPORT))
    assert report["file"].startswith(str(site))
    assert report["backends"]["cpu"] == "usable"
    asking = "not asked for: GRPO_KERNELS_CUDA_ARCHITECTURES=90,100 asks nvcc for them at installation (1 to 2 minutes)"
    assert asking in report["cuda_library"]["unusable"]
    assert report["gradient"] > 0
    assert run_wheel(site, "installed.py", "cpu").startswith(f"{site}/grpo_kernels/__init__.py: ")
    names = zipfile.ZipFile(wheel).namelist()
    assert "grpo_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]


def run_in_clone(clone: Path, site: Path, *arguments: str) -> str:
    """`python -m grpo_kernels ...` in a clone's folder, which comes before the installation."""
    environment = {**os.environ, "PYTHONPATH": str(site), "GRPO_KERNELS_CUDA_LIBRARY": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "grpo_kernels", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=clone, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.nightly
def test_a_clone_uses_the_library_of_its_own_installation(tmp_path):
    """`pip install .` leaves none in the clone, whose package `python -m` imports there; one of other sources serves
    nobody, and info says what to do."""
    clone, site = isolated_tree(tmp_path / "clone"), tmp_path / "site"
    installed = site / "grpo_kernels" / "native" / cpu.LIBRARY.name
    installed.parent.mkdir(parents=True)
    for path in (cpu.LIBRARY, cpu.LIBRARY.with_suffix(".json")):
        shutil.copy2(path, installed.parent)
    report = json.loads(run_in_clone(clone, site, "info", "--json"))
    assert report["folder"] == str(clone / "grpo_kernels")
    assert (report["backends"]["cpu"], report["cpu_library"]["path"]) == ("usable", str(installed))
    some = ["--preset", "grpo", "--dtype", "fp32", "--vocab", "50", "--tokens", "8"]
    assert re.search("fp32 +grpo +cpu ", run_in_clone(clone, site, "verify", *some))

    changed = clone / "csrc" / "cpu" / "row.h"
    changed.write_text(changed.read_text() + "// another source\n")
    report = json.loads(run_in_clone(clone, site, "info", "--json"))
    assert f"no compiled library of the sources in {clone}, whose package" in report["backends"]["cpu"]
    assert f"({site / 'grpo_kernels'}), which was built from others: `pip install .`" in report["backends"]["cpu"]
    text = run_in_clone(clone, site, "verify", *some)
    assert text.endswith("plain PyTorch alone: no compiled kernels serve cpu here, for the reasons above\n")

    own = clone / "grpo_kernels" / "native"
    shutil.copytree(installed.parent, own)
    report = json.loads(run_in_clone(clone, site, "info", "--json"))
    assert f"was built from other sources than {clone / 'csrc'}: `pip install -e .`" in report["backends"]["cpu"]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_sources_are_hashed_as_they_were_when_built(name):
    assert native.sources_hash(name) == sources_hash(name)


@pytest.mark.parametrize("compiler", [pytest.param("missing", marks=pytest.mark.nightly), "failing"])
def test_wheel_without_a_working_compiler(tmp_path, compiler):
    """The installation succeeds, plain PyTorch serves, and info says why."""
    broken = tmp_path / "broken-c++"
    if compiler == "failing":
        broken.write_text("#!/bin/sh\necho 'the linker is out for lunch' >&2\nexit 3\n")
        broken.chmod(0o755)
    cuda = {"NVCC": str(broken), "GRPO_KERNELS_CUDA_ARCHITECTURES": "90"}
    wheel = build_wheel(isolated_tree(tmp_path / "tree"), CXX=str(broken), **cuda)
    site = unpacked(wheel, tmp_path / "site")
    report = json.loads(run_wheel(site, "-c", REPORT))
    assert report["backends"]["torch"] == "usable"
    reason = "no C++ compiler found" if compiler == "missing" else "the linker is out for lunch"
    assert reason in report["backends"]["cpu"]
    assert reason.replace("C++ compiler", "nvcc") in report["cuda_library"]["unusable"]
    assert report["gradient"] > 0
    if compiler == "missing":
        told = run_wheel(site, "installed.py", "torch")
        assert "got the plain PyTorch backend, which is several times slower (it was not compiled: no C++ comp" in told
        assert "hint: install a C++ compiler, then grpo_kernels with pip; `python -m grpo_kernels info` says" in told


@pytest.fixture
def replaced_library(tmp_path, monkeypatch):
    """Why the cpu backend is unusable with another file, of this content, in the library's place."""

    def reason(build) -> str:
        library = tmp_path / "libgrpo_cpu.so"
        build(library)
        monkeypatch.setattr(cpu, "LIBRARY", library)
        return cpu.unsupported(backends.Request(torch.device("cpu")))

    cpu.library.cache_clear()
    cpu.available_instruction_sets.cache_clear()
    yield reason
    cpu.library.cache_clear()
    cpu.available_instruction_sets.cache_clear()


@pytest.mark.parametrize("functions", ["long grpo_cpu_abi(void) { return 42; }", "int unrelated;"])
def test_library_of_other_sources_is_refused(replaced_library, functions):
    """Its parameter struct may differ: say so instead of reading garbage."""

    def build(library: Path) -> None:
        source = library.with_suffix(".c")
        source.write_text(functions + "\nlong grpo_cpu_scratch(long v, int e) { return 0; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)

    assert "was built from other sources than this package: reinstall grpo_kernels" in replaced_library(build)


def test_damaged_library(replaced_library):
    assert "libgrpo_cpu.so does not load: " in replaced_library(lambda library: library.write_text("no library"))


def test_missing_library(replaced_library):
    reason = replaced_library(lambda library: None)
    assert "libgrpo_cpu.so): install with `pip install .`, which builds it" in reason


def test_generic_variant_compiles_without_openmp_and_x86(tmp_path):
    """What other processors build: no intrinsics, one thread."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    flags = ["-O0", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off"]
    for name, define in (("kernels.cpp", "-DGRPO_ISA_NAME=generic"), ("library.cpp", "-DGRPO_HAS_GENERIC")):
        command = [compiler, *flags, define, "-c", str(ROOT / "csrc" / "cpu" / name), "-o", str(tmp_path / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:2000]
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.[ch]*"))
    assert "immintrin.h" not in text  # intrinsics live in simd/avx*.h alone


@pytest.mark.nightly
def test_sanitizers(tmp_path):
    """Address and undefined-behaviour sanitizers over every kernel, dtype and instruction set."""
    code = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from grpo_kernels.backends import cpu
cpu.LIBRARY = Path({library!r})
from cases import DTYPES, make
from grpo_kernels import token_log_probs
for dtype in DTYPES:
    for vocab in (1, 31, 97, 4097):
        case = make(batch=3, length=4, vocab=vocab, dtype=dtype)
        for options in ({{"grad_scale": 1.0}}, {{"config": "gspo"}}, {{"entropy_coef": 0.1}}, {{"logit_softcap": 4.0}}):
            case.run("cpu", **options)
print("done")
"""
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O1", "-g", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fopenmp", "-w", "-fsanitize=address,undefined"]
    arch = {"generic": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
    objects = []
    for name, extra in arch.items():
        defines = [f"-DGRPO_ISA_NAME={name}", f"-DGRPO_ISA_{name.upper()}"]
        objects.append(str(tmp_path / f"{name}.o"))
        source = str(ROOT / "csrc/cpu/kernels.cpp")
        subprocess.run([compiler, *flags, *extra, *defines, "-c", source, "-o", objects[-1]], check=True)
    library = tmp_path / "sanitized.so"
    defines = [f"-DGRPO_HAS_{name.upper()}" for name in arch]
    source = str(ROOT / "csrc/cpu/library.cpp")
    subprocess.run([compiler, *flags, "-shared", *defines, source, *objects, "-o", str(library)], check=True)
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    code = code.format(tests=str(ROOT / "tests"), root=str(ROOT), library=str(library))
    for name in arch:
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",
            "GRPO_KERNELS_CPU_ISA": name,
        }
        environment["UBSAN_OPTIONS"] = "halt_on_error=1"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert "done" in result.stdout, result.stderr[:3000]
        assert "ERROR" not in result.stderr
        assert "runtime error" not in result.stderr, result.stderr[:3000]


def told_of(tmp_path, compiler: str) -> str:
    """What the record says where the CPU library is made by a program of that text."""
    program = tmp_path / "c++"
    program.write_text(f"#!/bin/sh\n{compiler}\n")
    program.chmod(0o755)
    gpu_library.setup().build_library("cpu", tmp_path, tmp_path)
    return native.build_record(tmp_path / "libgrpo_cpu.so")["error"]


def test_what_a_compiler_writes_may_be_in_any_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    said = told_of(tmp_path, "printf 'internal \\351rreur\\n' >&2; exit 1")
    assert "internal \N{REPLACEMENT CHARACTER}rreur" in said


def test_a_compiler_behind_another_program(tmp_path, monkeypatch):
    """As ccache's and conda's: CXX="ccache g++"."""
    monkeypatch.setenv("CXX", f"{tmp_path / 'c++'} 'a word'")
    said = told_of(tmp_path, '[ "$1" = "a word" ] && echo called >&2; exit 3')
    assert said.endswith("called")
    spaced = tmp_path / "my tools"
    spaced.mkdir()
    monkeypatch.setenv("CXX", str(spaced / "c++"))
    assert told_of(spaced, "echo called too >&2; exit 3").endswith("called too")


@pytest.mark.parametrize("name", ["'g++", " ", "no such compiler"])
def test_a_name_of_no_compiler(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CXX", name)
    gpu_library.setup().build_library("cpu", tmp_path, tmp_path)
    said = native.build_record(tmp_path / "libgrpo_cpu.so")["error"]
    assert said == f"no C++ compiler found (looked for {name}; set CXX to name one)"


@pytest.mark.parametrize("record", [None, "", "[1]", "{", "[" * 100_000])
def test_a_record_that_an_accident_left_is_none(tmp_path, record):
    """Every later installation ended in a traceback until the library was removed by hand."""
    library = tmp_path / "libgrpo_cpu.so"
    library.write_bytes(b"half of it")
    if record is not None:
        library.with_suffix(".json").write_text(record)
    assert gpu_library.setup()._record_of(library) == {}
    library.with_suffix(".json").write_text('{"sources": "0"}')
    assert gpu_library.setup()._record_of(library) == {"sources": "0"}
