"""Builds csrc/cpu into grpo_kernels/native/libgrpo_cpu.so: a plain C ABI, no PyTorch and no Python inside.

A missing or failing compiler never fails the installation: the reason goes to native/build.json, and
`python -m grpo_kernels info` shows it.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
LIBRARY = "grpo_kernels/native/libgrpo_cpu.so"

# -ffp-contract=off: the clip's comparison must be the same in every language; kernels say fma where they mean it.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-math-errno",
]
INSTRUCTION_SETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


def sources_hash() -> str:
    """Of every file that the library is made of; a test compares it with the built library's."""
    digest = hashlib.sha256()
    for path in sorted([*(SOURCES / "cpu").rglob("*"), *(SOURCES / "common").rglob("*")]):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class CompileError(RuntimeError):
    pass


class Compiler:
    """The system's C++ compiler, and whether it takes OpenMP."""

    def __init__(self) -> None:
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        self.path = next((found for name in names if (found := shutil.which(name))), None)
        if self.path is None:
            raise CompileError(f"no C++ compiler found (looked for {', '.join(names)}; set CXX to name one)")
        self.version = self.run("--version").splitlines()[0]
        self.openmp = ["-fopenmp"] if self._takes_openmp() else []

    def run(self, *arguments: str) -> str:
        command = [str(self.path), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"{' '.join(command)}: {error}") from error
        if result.returncode != 0:
            raise CompileError(f"{' '.join(command)}: {result.stderr.strip()[-2000:]}")
        return result.stdout

    def _takes_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_num_threads() - 1; }\n")
            try:
                self.run("-fopenmp", str(source), "-o", str(Path(folder, "probe")))
            except CompileError:
                return False
            return True


def build_library(target: Path, workspace: Path) -> dict[str, str]:
    """Compile one object for each instruction set that the compiler knows, link them, describe the build."""
    compiler = Compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = dict(INSTRUCTION_SETS) if x86 else {"generic": []}
    workspace.mkdir(parents=True, exist_ok=True)

    def compile_kernels(name: str) -> Path | None:
        output = workspace / f"kernels_{name}.o"
        defines = [f"-DGRPO_ISA_NAME={name}", f"-DGRPO_ISA_{name.upper()}"]
        source = str(SOURCES / "cpu" / "kernels.cpp")
        try:
            compiler.run(*FLAGS, *compiler.openmp, "-w", *sets[name], *defines, "-c", source, "-o", str(output))
        except CompileError:
            if name == "generic":
                raise
            return None  # an older compiler: the other instruction sets serve
        return output

    with ThreadPoolExecutor() as pool:
        objects = {name: output for name, output in zip(sets, pool.map(compile_kernels, sets)) if output}
    defines = [f"-DGRPO_HAS_{name.upper()}" for name in objects]
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")  # never a half-written library, nor one overwritten while loaded
    library_source = str(SOURCES / "cpu" / "library.cpp")
    linked = [str(path) for path in objects.values()]
    compiler.run(*FLAGS, *compiler.openmp, "-w", "-shared", *defines, library_source, *linked, "-lm", "-o", str(fresh))
    fresh.replace(target)
    return {
        "compiler": compiler.version,
        "flags": " ".join(FLAGS),
        "openmp": "yes" if compiler.openmp else "no: the compiler does not take -fopenmp; one thread",
        "instruction_sets": " ".join(objects),
        "sources": sources_hash(),
    }


class BuildNative(build_ext):
    """Setuptools' build_ext with the compiler called directly; the result has no Python ABI in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return LIBRARY

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.build_lib) / LIBRARY
        record: dict[str, str]
        try:
            record = build_library(target, Path(self.build_temp))
        except CompileError as error:
            target.unlink(missing_ok=True)
            record = {"error": str(error), "sources": sources_hash()}
            self.warn(f"no compiled CPU kernels, plain PyTorch serves instead: {error}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name("build.json").write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: library and record go into the package's folder; a stale library goes away."""
        built, package = Path(self.build_lib, LIBRARY), ROOT / LIBRARY
        package.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built.with_name("build.json"), package.with_name("build.json"))
        package.unlink(missing_ok=True)
        if built.exists():
            shutil.copy2(built, package)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: the library knows neither Python nor torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("grpo_kernels.native.libgrpo_cpu", sources=["csrc/cpu/library.cpp"], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
