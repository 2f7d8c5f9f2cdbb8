"""Builds csrc/cuda for the CPU: the kernels themselves, over emulator.h."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = [
    *("-O2", "-std=c++17", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
    *("-fvisibility=hidden", "-DGRPO_EMULATED", f"-I{HERE}"),
    "-U_FORTIFY_SOURCE",  # or longjmp between fibers is taken for a fault
    # Beside an array the process ends by a signal; not beside one that ends a struct behind a pointer.
    *("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"),
]


def build(sources: Path = ROOT / "csrc", library: Path | None = None, *more: str) -> Path | None:
    """The library of these sources, compiled with ``more`` flags if it is not there; None without a C++ compiler that
    knows _Float16.

    Raises RuntimeError where such a compiler refuses them: every test of theirs would be skipped otherwise.
    """
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None or not _knows_float16(compiler):
        return None
    library = library or ROOT / "build" / "cuda_emulator" / f"{_digest(sources)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, *more, "-x", "c++", str(sources / "cuda" / "library.cu"), "-o", str(fresh)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{sources} does not compile over the emulator:\n{result.stderr[:4000]}")
        fresh.replace(library)
    return library


def _knows_float16(compiler: str) -> bool:
    command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="_Float16 x;", capture_output=True, text=True).returncode == 0


def _digest(sources: Path) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*(sources / "cuda").glob("*"), *(sources / "common").glob("*"), HERE / "emulator.h"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
