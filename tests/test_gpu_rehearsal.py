"""The whole of benchmarks/gpu_check.py over the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_library
import pytest
from gpu_commands import PARTS
from gpu_record import proves_cuda
from test_gpu_check import ROOT, recorded


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
