"""What this machine is, and what was verified on it: shared by info, verify and bench."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def folder() -> Path:
    """Where records are kept: ``$XDG_CACHE_HOME/grpo_kernels``, by default ``~/.cache/grpo_kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "grpo_kernels"  # noqa: PTH111  never raises


def device_kind(device: str) -> str:
    """A GPU's name, a CPU's model."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that can be had on the device; None where nobody tells."""
    if torch.device(device).type == "cuda":
        place = torch.device(device)
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)  # PyTorch's own cache
        return torch.cuda.mem_get_info(place)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def write(device: str, backends: list[str], checks: int, broken: int) -> None:
    """Remember a run of verify, in place of a smaller one; a machine whose home cannot be written has no record."""
    record = {
        "kind": device_kind(device),
        "backends": backends,
        "checks": checks,
        "broken": broken,
        "date": datetime.date.today().isoformat(),
        "grpo_kernels": __version__,
        "torch": torch.__version__,
    }
    same = [r for r in read() if (r["kind"], r["backends"]) == (record["kind"], backends)]
    if not broken and any(r["checks"] > checks and r.get("grpo_kernels") == __version__ for r in same):
        return
    kept = [r for r in read() if r not in same]
    try:
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / "verified.json").write_text(json.dumps([*kept, record], indent=1) + "\n")
    except OSError:
        return


def read() -> list[dict[str, Any]]:
    """Every remembered run of verify, newest last."""
    try:
        found = json.loads((folder() / "verified.json").read_text())
    except (OSError, ValueError):
        return []
    return [r for r in found if isinstance(r, dict) and {"kind", "backends", "checks", "broken"} <= set(r)]
