"""What this machine is, and what was verified on it: shared by info, verify and bench."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import cpu, cuda, native


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


def state(names: Iterable[str]) -> dict[str, str]:
    """Return what computes on these backends: a hash of the package's files and of the libraries' bytes, the
    instruction set in use, and the versions of what is beneath them."""
    names = sorted(names)
    package = Path(__file__).parent.parent
    files = [path for path in sorted(package.rglob("*")) if path.suffix == ".py" or path.name == "blocks.json"]
    libraries = [place for name, place in (("cpu", cpu.LIBRARY), ("cuda", cuda.library_path())) if name in names]
    digest = hashlib.sha256()
    for path in [*files, *libraries]:
        digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    found = {"code": digest.hexdigest(), "grpo_kernels": __version__, "torch": torch.__version__}
    if "cpu" in names:
        with contextlib.suppress(native.Unavailable):
            found["instruction set"] = cpu.instruction_set()
    if "triton" in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["triton"] = importlib.metadata.version("triton")
    return found


def changed(record: dict[str, Any]) -> list[str]:
    """Return what of a record's state is another one here: what it says is true of nothing else."""
    now = state(record["backends"])
    return [name for name in now if record.get(name) != now[name]]


def write(device: str, backends: list[str], checks: int, broken: int) -> None:
    """Remember a run of verify, in place of a smaller one; a machine whose home cannot be written has no record."""
    record = {
        "kind": device_kind(device),
        "backends": backends,
        "checks": checks,
        "broken": broken,
        "date": datetime.date.today().isoformat(),
        **state(backends),
    }
    same = [r for r in read() if (r["kind"], r["backends"]) == (record["kind"], backends)]
    if not broken and any(r["checks"] > checks and not changed(r) for r in same):
        return
    kept = [r for r in read() if r not in same]
    fresh = folder() / f"verified.{os.getpid()}"  # whole or not at all: the file has the runs of other machines too
    try:
        folder().mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps([*kept, record], indent=1) + "\n")
        fresh.replace(folder() / "verified.json")
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def read() -> list[dict[str, Any]]:
    """Every remembered run of verify, newest last. What is no record, as in a file that was edited, is left out."""
    try:
        found = json.loads((folder() / "verified.json").read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [record for record in found if _is_record(record)] if isinstance(found, list) else []


def _is_record(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    names, counts = found.get("backends"), (found.get("checks"), found.get("broken"))
    whole = isinstance(found.get("kind"), str) and all(type(count) is int for count in counts)
    return whole and isinstance(names, list) and all(isinstance(name, str) for name in names)
