"""A copy of the sources with a fault in it, compiled where it must be."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from .table import ROOT, Mutant

COPIED = ("grpo_kernels", "tests", "csrc", "benchmarks", "setup.py", "pyproject.toml")
OF_LIBRARY = (
    *("csrc/cpu/library.cpp", "csrc/cpu/blocks.h", "csrc/cpu/checks.h", "csrc/cpu/token_sums.h"),
    "csrc/common/checks.h",
)
"""What the kernels' object is not made of."""

Run = Callable[[Sequence[str], Path], tuple[int, str]]
"""Runs a command in a folder: its exit status and what it said."""


class DoesNotCompile(Exception):
    pass


def plant(tree: Path, mutant: Mutant, sound: bool) -> None:
    """Copy the sources to an empty folder, with the fault unless they are to be sound."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns(".hypothesis", "libgrpo_cuda.*", "results")
            shutil.copytree(ROOT / name, tree / name, ignore=left_out)
        else:
            shutil.copy2(ROOT / name, tree)
    (tree / "tmp").mkdir()
    if not sound:
        path = tree / mutant.file
        path.write_text(mutant.planted(path.read_text()))
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()  # whatever its time says


def compile_tree(tree: Path, mutant: Mutant, objects: Path, run: Run) -> dict[str, str]:
    """Compile what the suite needs; the environment that its tests need, where the interpreter has to be told."""
    build = mutant.suite.build
    if build.startswith("cpu"):
        _compile_cpu(tree, build.removeprefix("cpu "), objects, run)
    if build != "cuda":
        return {"GRPO_KERNELS_CUDA_LIBRARY": ""}  # nor is it compiled by conftest.py
    _say_what_made(tree)  # the CPU's, of csrc/common without the fault: that it is stale is no kill
    library, source = str(tree / "emulated.so"), str(tree / "csrc" / "cuda" / "library.cu")
    flags = _unoptimized(_module(tree / "tests" / "cuda_emulator" / "__init__.py").FLAGS)
    _checked(run, [os.environ.get("CXX", "c++"), *flags, "-x", "c++", source, "-o", library], tree)
    return {"GRPO_KERNELS_CUDA_LIBRARY": library}


def _checked(run: Run, command: Sequence[str], tree: Path) -> None:
    status, said = run(command, tree)
    if status:
        raise DoesNotCompile(said[-2000:])


def _module(path: Path) -> ModuleType:
    """A file of the tree, whatever is imported under its name."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_tree", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unoptimized(flags: Sequence[str]) -> list[str]:
    """A compilation takes a third of the time or less; the rows of the suite are short."""
    return ["-O0" if flag.startswith("-O") else flag for flag in flags]


def _compile_cpu(tree: Path, instruction_set: str, objects: Path, run: Run) -> None:
    """The library with one instruction set, in the place of the generic one. The object of the kernels is kept where
    all that it is made of is sound."""
    setup = _module(tree / "setup.py")
    compiler = [os.environ.get("CXX", "c++"), *_unoptimized(setup.FLAGS), "-fopenmp", "-w", "-Wno-psabi"]
    paths = [path for folder in ("cpu", "common") for path in sorted((tree / "csrc" / folder).rglob("*.*"))]
    paths = [path for path in paths if path.relative_to(tree).as_posix() not in OF_LIBRARY]
    contents = b"\0".join([instruction_set.encode(), *(path.read_bytes() for path in paths)])
    kept = objects / f"{hashlib.sha256(contents).hexdigest()[:16]}.o"
    made = kept if kept.exists() else tree / "kernels.o"
    if made != kept:
        source = str(tree / "csrc" / "cpu" / "kernels.cpp")
        _checked(run, [*compiler, *_flags_of(instruction_set, setup, tree), "-c", source, "-o", str(made)], tree)
        if all(path.read_bytes() == (ROOT / path.relative_to(tree)).read_bytes() for path in paths):
            objects.mkdir(parents=True, exist_ok=True)
            made = made.replace(kept)
    library = tree / "grpo_kernels" / "native" / "libgrpo_cpu.so"
    library.unlink(missing_ok=True)
    source = str(tree / "csrc" / "cpu" / "library.cpp")
    _checked(run, [*compiler, "-shared", source, str(made), "-lm", "-o", str(library)], tree)
    _say_what_made(tree)


def _say_what_made(tree: Path) -> None:
    """Write the CPU library's record: of the sources of this tree."""
    sources = _module(tree / "setup.py").sources_hash("cpu")
    (tree / "grpo_kernels" / "native" / "libgrpo_cpu.json").write_text(json.dumps({"sources": sources}))


def _flags_of(instruction_set: str, setup: ModuleType, tree: Path) -> list[str]:
    name = ["-DGRPO_ISA_NAME=generic"]
    if instruction_set == "generic":
        return name
    name.append(f"-DGRPO_ISA_{instruction_set.upper()}")
    if instruction_set != "avx512":
        return [*setup.INSTRUCTION_SETS[instruction_set], *name]
    import simde_py  # AVX-512 on processors that have none

    shim, include = tree / "tests" / "simde_avx512.h", Path(simde_py.__file__).parent / "simde"
    return [*setup.INSTRUCTION_SETS["avx2"], *name, f"-I{include}", "-include", str(shim)]
