"""How much resident memory a call takes, native allocations too; run in a process of its own (Linux)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the process's peak resident memory grows while the function runs."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = field("VmRSS")
    function()
    return field("VmHWM") - before


def run(code: str) -> float:
    """What the code prints last, run with this module at hand."""
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom resident import peak_growth\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])
