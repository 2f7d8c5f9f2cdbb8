"""Builds the fuzzer of the C ABI (target.cpp) with the driver beside it, against a library or its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU = HERE.parent.parent / "csrc" / "cpu"
FLAGS = ["-O1", "-g1", "-fno-var-tracking", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-w"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-coverage=trace-pc"]
SETS = {"generic": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}


def compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build_over(library: Path, program: Path) -> Path:
    """The fuzzer over a built library: buffers end at pages that nobody may touch."""
    _run(*FLAGS, *map(str, HERE.glob("*.cpp")), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program))
    return program


def build_sanitized(folder: Path) -> Path:
    """The fuzzer over the library's sources, with both sanitizers and edges counted."""
    jobs = [(CPU / "library.cpp", [f"-DGRPO_HAS_{name.upper()}" for name in SETS])]
    for name, extra in SETS.items():
        jobs.append((CPU / "kernels.cpp", [*extra, f"-DGRPO_ISA_NAME={name}", f"-DGRPO_ISA_{name.upper()}"]))
    objects = [str(folder / f"{i}.o") for i in range(len(jobs))]
    with ThreadPoolExecutor() as pool:
        for job in [
            pool.submit(_run, *FLAGS, *SANITIZED, *options, "-c", str(source), "-o", output)
            for (source, options), output in zip(jobs, objects, strict=True)
        ]:
            job.result()
    program = folder / "fuzz_abi"
    _run(*FLAGS, *SANITIZED[:2], *map(str, HERE.glob("*.cpp")), *objects, "-o", str(program))
    return program


def _run(*arguments: str) -> None:
    chosen = compiler()
    assert chosen is not None
    result = subprocess.run([chosen, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
