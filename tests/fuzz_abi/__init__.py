"""Builds the fuzzers of the C ABIs, a target for each library (cpu.cpp, cuda.cpp) with the driver beside it, against a
library or its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_emulator

HERE = Path(__file__).resolve().parent
CPU = HERE.parent.parent / "csrc" / "cpu"
FLAGS = ["-O1", "-g1", "-fno-var-tracking", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-w"]
SANITIZED = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize-undefined-trap-on-error",  # as the emulator is compiled else: it says nothing
]
COVERED = "-fsanitize-coverage=trace-pc"
SETS = {"generic": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}


def compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build_over(library: Path, program: Path, target: str, *more: str) -> Path:
    """The fuzzer over a built library: buffers end at pages that nobody may touch."""
    sources = [str(HERE / f"{name}.cpp") for name in ("driver", target)]
    _run(*FLAGS, *more, *sources, str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program))
    return program


def build_sanitized(folder: Path) -> Path:
    """The fuzzer over the sources of the CPU library, with both sanitizers and edges counted."""
    jobs = [(CPU / "library.cpp", [f"-DGRPO_HAS_{name.upper()}" for name in SETS])]
    for name, extra in SETS.items():
        jobs.append((CPU / "kernels.cpp", [*extra, f"-DGRPO_ISA_NAME={name}", f"-DGRPO_ISA_{name.upper()}"]))
    objects = [str(folder / f"{i}.o") for i in range(len(jobs))]
    with ThreadPoolExecutor() as pool:
        for job in [
            pool.submit(_run, *FLAGS, *SANITIZED, COVERED, *options, "-c", str(source), "-o", output)
            for (source, options), output in zip(jobs, objects, strict=True)
        ]:
            job.result()
    program = folder / "fuzz_abi"
    _run(*FLAGS, *SANITIZED, str(HERE / "driver.cpp"), str(HERE / "cpu.cpp"), *objects, "-o", str(program))
    return program


def build_emulated_sanitized(folder: Path) -> Path | None:
    """The fuzzer over the CUDA library's, which run over the emulator; None where no compiler makes that. Fibers have
    stacks that no sanitizer knows, and go on where another was: what is counted are blocks, not edges."""
    flags = ("-O1", "-g1", *SANITIZED, COVERED, "--param", "asan-stack=0")
    library = cuda_emulator.build(cuda_emulator.ROOT / "csrc", folder / "sanitized.so", *flags)
    counted = (*SANITIZED, "-DGRPO_FUZZ_FIBERS")
    return library and build_over(library, folder / "fuzz_cuda", "cuda", *counted)


def _run(*arguments: str) -> None:
    chosen = compiler()
    assert chosen is not None
    result = subprocess.run([chosen, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
