"""Finds out what gpu_check.py must know before it measures: the GPU, the library, the commit; or why it refuses."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_library
import gpu_process
import gpu_rows
from gpu_commands import PARTS, python
from gpu_process import say

ROOT = Path(__file__).resolve().parent.parent
LOOK_DEADLINE = 60.0
BUILD_DEADLINE = 120.0
CUDA_CAPABILITY = (9, 0)
"""The oldest that the CUDA kernels are made for."""


class Refused(Exception):
    """Says why nothing is run, in one line that says what to do."""


def look(device: str, log: Path) -> dict[str, Any]:
    """Find out versions and the GPU in a process that may hang or die."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        argv = python("gpu_parts.py", "environment", "--device", device, "--rows", str(file))
        ended, text = gpu_process.logged(argv, LOOK_DEADLINE, log)
        rows = gpu_rows.read(file)
    if not rows:
        last = "".join(gpu_process.last_lines(text, 1))
        raise Refused(
            f"the GPU could not be looked at ({ended or 'nothing was found'}; {last}): nvidia-smi may say more"
        )
    return rows[0]


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return gpu_process.output(query)


def commit() -> str | None:
    """Return git's commit, marked where the tree differs; None where the tree is no checkout, or inside another's."""
    top = gpu_process.output(["git", "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != ROOT:
        return None
    return gpu_process.output(["git", "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"])


def check_gpu(found: dict[str, Any], names: Sequence[str]) -> None:
    """Raise Refused where the parts that are asked for cannot run."""
    rehearse = "--device cpu rehearses without one"
    if "no_gpu" in found:
        raise Refused(f"no GPU is usable by torch {found['torch']}: {found['no_gpu'].rstrip('.')}; {rehearse}")
    if found["triton_refused"] is not None:
        raise Refused(
            f"Triton does not serve here, and the loss needs it: {found['triton_refused']}; pip install triton"
        )
    if tuple(found["capability"]) < CUDA_CAPABILITY and any(PARTS[name].cuda for name in names):
        others = ",".join(name for name in PARTS if not PARTS[name].cuda)
        capability = ".".join(map(str, found["capability"]))
        raise Refused(
            f"{found['gpu']} has compute capability {capability} and the CUDA kernels need 9.0: --only {others}"
        )


def prepare_emulator(log: Path) -> None:
    """Build the library of a rehearsal, if the environment names none."""
    if os.environ.get(gpu_library.NAMED):
        return
    say("building tests/cuda_emulator, about ten seconds")
    argv = [sys.executable, "-c", "import cuda_emulator; print(cuda_emulator.build() or '')"]
    _, text = gpu_process.logged(argv, BUILD_DEADLINE, log, {"PYTHONPATH": str(ROOT / "tests")})
    library = text.strip().rpartition("\n")[2]
    if not library.endswith(".so"):
        raise Refused("tests/cuda_emulator was not built: CXX must name a C++ compiler that knows _Float16")
    os.environ[gpu_library.NAMED] = library


def prepare_library(capability: Sequence[int], log: Path) -> None:
    """Build it for this GPU alone where what is there cannot serve it."""
    architecture = 10 * capability[0] + capability[1]
    why = gpu_library.lacking(architecture)
    if why is None:
        return
    try:
        gpu_library.check_buildable()
    except gpu_library.Unbuildable as error:
        raise Refused(f"the CUDA library cannot be used: {why}; nor built: {error}") from error
    say(f"building the CUDA library for sm_{architecture} alone, about 20 s: {why}")
    ended = gpu_process.run(python("gpu_library.py", str(architecture)), BUILD_DEADLINE, log)
    if str(ended):
        raise Refused(f"the CUDA library was not built ({ended}): {gpu_library.record().get('error', f'see {log}')}")
