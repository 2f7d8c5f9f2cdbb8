"""Finds the CUDA library that a run measures: of which sources, for which GPUs; built by setup.py's own functions.

python benchmarks/gpu_library.py 90        # builds it for compute capability 9.0 alone
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "grpo_kernels" / "native" / "libgrpo_cuda.so"
NAMED = "GRPO_KERNELS_CUDA_LIBRARY"
"""The environment's variable that names another library, which is taken as it is."""


class Unbuildable(RuntimeError):
    """Says what is missing to build the library; the message says how to mend it."""


def setup() -> ModuleType:
    """Load setup.py, which runs only as a script."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources_hash(folder: str) -> str:
    """Hash csrc/FOLDER and csrc/common as setup.py does, without the setuptools that it imports."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc" / folder).rglob("*"), *(ROOT / "csrc" / "common").rglob("*")]):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def record() -> dict[str, str]:
    """Read what the build of the library that is used wrote beside it; empty without one."""
    try:
        found = json.loads(_used().with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _used() -> Path:
    return Path(os.environ.get(NAMED) or LIBRARY)


def sources() -> str:
    """Return a hash of the library's sources: those it was built from or, without a record, of its file."""
    if known := record().get("sources"):
        return known
    try:
        return f"file {hashlib.sha256(_used().read_bytes()).hexdigest()}"
    except OSError:
        return f"no {_used().name}"


def lacking(architecture: int) -> str | None:
    """Say why the library cannot serve a GPU of this architecture (90: compute capability 9.0); None if it can."""
    if os.environ.get(NAMED):
        return None
    if not LIBRARY.exists():
        return f"it is missing ({LIBRARY.relative_to(ROOT)})"
    if record().get("sources") != sources_hash("cuda"):
        return "it was built from other sources than this tree's csrc/"
    built = record().get("architectures", "").split()
    portable = [int(name) for name in built if name.isdigit()]  # 90a serves 9.0 alone
    # The PTX of the oldest serves newer ones.
    if f"{architecture}a" not in built and (not portable or architecture < min(portable)):
        return f"it is built for sm_{', sm_'.join(built)} and this GPU is sm_{architecture}"
    return None


def check_buildable() -> None:
    """Raise Unbuildable if there is no compiler."""
    try:
        module = setup()
    except ImportError as error:
        raise Unbuildable(f"setuptools is needed to build it: pip install setuptools ({error})") from error
    try:
        module.nvcc()
    except module.CompileError as error:
        raise Unbuildable(str(error)) from error


def main() -> int:
    os.environ["GRPO_KERNELS_CUDA_ARCHITECTURES"] = sys.argv[1]
    setup().build_library("cuda", LIBRARY.parent, ROOT / "build")
    return 1 if "error" in record() else 0


if __name__ == "__main__":
    raise SystemExit(main())
