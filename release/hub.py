"""Write the package as a kernel of the Hugging Face Hub, in the layout that the ``kernels`` package loads.

    python release/hub.py build/hub                 # says what it wrote, and what it left out and why
    python release/hub.py build/hub --glibc 2.29    # a library that machines with that glibc load is enough

A kernel is what ``grpo_kernels.__all__`` leads to: the modules that ``__init__.py`` imports, at once or when they are
asked for. Programs and integrations are not among them: they are run and imported by the package's name, and some need
packages that a kernel may not import.

The variants hold the same modules. ``torch-universal`` is Python alone (Triton's kernels, plain PyTorch); the other one
has the CPU library of the platform that this runs on, built or taken over as an installation does it. The library knows
nothing of PyTorch, so one serves every version from the oldest that the package takes on, which is what a name with
``stable-abi`` says. The CUDA library is in none: it serves where it is asked for by name, and has not run on a GPU yet.

It needs setuptools 77 or later, and no PyTorch.
"""

from __future__ import annotations

import argparse
import ast
import base64
import functools
import hashlib
import json
import platform
import re
import runpy
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unfinished import workspace

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "grpo_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MANYLINUX = (2, 28)
"""The newest glibc that a kernel's libraries may need (manylinux_2_28)."""
LOADER = "0.17.0"
"""The oldest ``kernels`` that may load it: older ones were not tried."""
UNIVERSAL = "torch-universal"
NO_CPU_LIBRARY = (
    "this variant of the kernel is Python alone; get_kernel(..., backend='cpu') loads the one with the library, where "
    "there is one for the platform"
)
NO_CUDA_LIBRARY = "a kernel of the Hub has none; an installation of the package has, if it was asked for"
"""What backends give as their reasons, in place of a compiler's."""


def imported(module: Path) -> Iterator[Path]:
    """Yield the files that a module's relative imports lead to, inside of functions and for types as well."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = module.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in (place, *(place / alias.name for alias in node.names)):
                yield from filter(Path.is_file, (target.with_suffix(".py"), target / "__init__.py"))


def contents() -> list[Path]:
    """Return the files of a kernel: modules, the packages that they are in, and the data beside them."""
    found: set[Path] = set()
    waiting = [PACKAGE / "__init__.py"]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [*imported(module), *_packages(module)]
    return sorted(found | {data for module in found for data in module.parent.glob("*.json")})


def _packages(module: Path) -> list[Path]:
    folders = module.relative_to(PACKAGE).parents
    return [PACKAGE / folder / "__init__.py" for folder in folders]


def newest_glibc(library: Path) -> tuple[int, int]:
    """Return the newest version of glibc that a library asks for; (0, 0) where it asks for none."""
    versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library.read_bytes())
    return max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))


def card() -> str:
    """Return the repository's page, with versions and addresses filled in."""
    text = (ROOT / "release" / "CARD.md").read_text(encoding="utf-8")
    version = PROJECT["version"]
    text = text.replace("OWNER/grpo-kernels", addresses().get("hub", "OWNER/grpo-kernels"))
    return text.replace("{version}", version).replace("{major}", version.split(".")[0])


def addresses() -> dict[str, str]:
    """Return what a publisher has filled in, by the first word of its row."""
    return _setup()["published"]((ROOT / "PUBLISHING.md").read_text(encoding="utf-8"))


def native_variant() -> str:
    """Return the name of the variant for this platform."""
    oldest = next(need for need in PROJECT["dependencies"] if need.startswith("torch>="))
    version = oldest.removeprefix("torch>=").replace(".", "")
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi{version}-cpu-{machine}-{platform.system().lower()}"


def write(folder: Path, glibc: tuple[int, int] = MANYLINUX) -> dict[str, str]:
    """Write every variant that can be built here; return the reason for each that cannot.

    Args:
        folder: where ``build`` is made; a ``build`` that is there already is refused.
        glibc: the newest version that the library may need.
    """
    build = folder / "build"
    if build.exists():
        raise SystemExit(f"hub.py: expected a folder without build/; {build} is there: remove it, or name another.")
    with workspace(folder, "hub.py") as room:  # renamed when it is whole: what an interrupted run leaves is no build/
        made = room / "build"
        library = room / "libgrpo_cpu.so"
        _setup()["build_library"]("cpu", room, room / "objects")
        record = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
        needed = newest_glibc(library) if library.exists() else (0, 0)
        _write_variant(made / UNIVERSAL, {"error": NO_CPU_LIBRARY}, None)
        (made / "CARD.md").write_text(card())
        reason = record.get("error") or too_new(needed, glibc)
        if not reason:
            _write_variant(made / native_variant(), record, library)
        made.rename(build)
    return {native_variant(): reason} if reason else {}


def too_new(needed: tuple[int, int], may: tuple[int, int]) -> str:
    """Return why a library that needs one glibc is left out where it may need another at most; "" where it is not."""
    if needed <= may:
        return ""
    needs, most = (".".join(map(str, version)) for version in (needed, may))
    mend = f"build it on manylinux_2_28, or --glibc {needs} where every machine has that"
    return f"its library needs glibc {needs}, and may need {most} at most: {mend}"


@functools.cache
def _setup() -> dict[str, Any]:
    """Return what setup.py defines, which runs only as a script."""
    return runpy.run_path(str(ROOT / "setup.py"))


def _write_variant(variant: Path, record: dict[str, str], library: Path | None) -> None:
    for path in contents():
        _copy(path, variant / path.relative_to(PACKAGE))
    for name in PROJECT["license-files"]:
        _copy(ROOT / name, variant / name)
    native = variant / "native"
    native.mkdir()
    _write_json(native / "libgrpo_cpu.json", record)
    _write_json(native / "libgrpo_cuda.json", {"error": NO_CUDA_LIBRARY})
    if library is not None:
        shutil.copy(library, native)
    _write_json(variant / "metadata.json", metadata(variant))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def metadata(variant: Path) -> dict[str, object]:
    """Return what the loader reads of a variant, and checks.

    ``id`` is the name that it imports the kernel by, and so the namespace of its operators: it is made of the files, so
    that two builds share one where they are the same in every bit, and only there. ``version`` is the major one, 0 for
    as long as calls may change.
    """
    digests = {
        path.relative_to(variant).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    whole = hashlib.sha256(b"".join(name.encode() + b"\0" + digest for name, digest in digests.items()))
    kind = "universal" if variant.name == UNIVERSAL else "cpu"
    known = addresses()
    upstream = {"upstream": known["repository"]} if "repository" in known else {}
    return {
        "name": PROJECT["name"],
        "id": f"_{PACKAGE.name}_{kind}_{whole.hexdigest()[:16]}",
        "version": int(PROJECT["version"].split(".")[0]),
        "license": PROJECT["license"],
        **upstream,
        "kernels-minver": LOADER,
        "python-depends": [],
        "backend": {"type": "cpu"},  # the loader has no word for any of them; a variant is chosen by its name
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def _version(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"expected two numbers, as 2.28; got {text!r}")
    major, minor = text.split(".")
    return int(major), int(minor)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the package as a kernel of the Hugging Face Hub.")
    parser.add_argument("folder", type=Path, help="where build/ is made")
    parser.add_argument(
        "--glibc", type=_version, default=MANYLINUX, metavar="VERSION", help="the newest that it may need (2.28)"
    )
    options = parser.parse_args()
    left_out = write(options.folder, options.glibc)
    for variant in sorted(filter(Path.is_dir, (options.folder / "build").iterdir())):
        files = [path for path in variant.rglob("*") if path.is_file()]
        print(f"{variant}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    for name, reason in left_out.items():
        print(f"{name}: left out: {reason}")


if __name__ == "__main__":
    main()
