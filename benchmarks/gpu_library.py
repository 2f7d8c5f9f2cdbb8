"""The CUDA library that a run measures: of which sources, for which GPUs; built by setup.py's own functions.

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
    """What is missing to build the library; the message says how to mend it."""


def setup() -> ModuleType:
    """setup.py, which runs only as a script."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources_hash(folder: str) -> str:
    """As setup.py computes it, without the setuptools that it imports: of csrc/FOLDER and csrc/common."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc" / folder).rglob("*"), *(ROOT / "csrc" / "common").rglob("*")]):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def record() -> dict[str, str]:
    """What the build of the library that is used wrote beside it; empty without one."""
    path = Path(os.environ.get(NAMED) or LIBRARY).with_suffix(".json")
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return found


def sources() -> str:
    """A hash of the library's sources: those it was built from or, without a record, its file's name."""
    return record().get("sources") or Path(os.environ.get(NAMED) or LIBRARY).name


def lacking(architecture: int) -> str | None:
    """Why the library cannot serve a GPU of this architecture (90 is compute capability 9.0); None if it can."""
    if os.environ.get(NAMED):
        return None
    if not LIBRARY.exists():
        return f"it is missing ({LIBRARY.relative_to(ROOT)})"
    if record().get("sources") != sources_hash("cuda"):
        return "it was built from other sources than this tree's csrc/"
    built = record().get("architectures", "").split()
    if not built or architecture < min(map(int, built)):  # its PTX, of the oldest, serves newer ones
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
