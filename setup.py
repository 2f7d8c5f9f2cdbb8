"""Builds csrc/cpu and, if it is asked for, csrc/cuda into grpo_kernels/native/libgrpo_{cpu,cuda}.so: a plain C ABI, no
PyTorch and no Python inside.

A missing or failing compiler never fails the installation: the reason goes to a file beside the library
(native/libgrpo_cpu.json), and `python -m grpo_kernels info` shows it. GRPO_KERNELS_CUDA_ARCHITECTURES=90,100 asks for
the CUDA library: pip hides what a build says, so nobody would know what nvcc's minutes are for. PTX of the first one
serves GPUs that are newer than all of them.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
NATIVE = "grpo_kernels/native"

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
CUDA_FLAGS = [
    "-O3",
    "-std=c++17",
    "-shared",
    "--cudart=static",
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
    "-w",
]
INSTRUCTION_SETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


def sources_of(*paths: Path) -> str:
    """A hash of files, names and all."""
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, paths)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def sources_hash(folder: str) -> str:
    """Of every file that a library is made of; a test compares it with the built library's."""
    return sources_of(*(SOURCES / folder).rglob("*"), *(SOURCES / "common").rglob("*"))


class CompileError(RuntimeError):
    pass


def run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=1200)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{' '.join(command)}: {error}") from error
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}: {result.stderr.strip()[-2000:]}")
    return result.stdout


def _found(name: str) -> list[str] | None:
    """A compiler's path, with what stands before or behind its name in CXX, as in "ccache g++"; None if it is none."""
    if path := shutil.which(name):
        return [path]
    try:
        first, *rest = shlex.split(name) or [""]
    except ValueError:  # a quotation that does not end
        return None
    path = shutil.which(first)
    return None if path is None else [path, *rest]


def _cpp_compiler() -> list[str]:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if found := _found(name):
            return found
    raise CompileError(f"no C++ compiler found (looked for {', '.join(names)}; set CXX to name one)")


class Compiler:
    """The system's C++ compiler, and whether it takes OpenMP."""

    def __init__(self) -> None:
        self.command = _cpp_compiler()
        self.version = next(iter(self.run("--version").splitlines()), "unknown")
        self.openmp = ["-fopenmp"] if self._takes_openmp() else []

    def run(self, *arguments: str) -> str:
        return run(*self.command, *arguments)

    def _takes_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_num_threads() - 1; }\n")
            try:
                self.run("-fopenmp", str(source), "-o", str(Path(folder, "probe")))
            except CompileError:
                return False
            return True


def build_cpu(target: Path, workspace: Path) -> dict[str, str]:
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
    }


NVCC_TAKES = "1 to 2 minutes"


def nvcc() -> str:
    """Its path: NVCC alone if it is set, else the search path, then CUDA's folders."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    names = ["nvcc", *(f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"])]
    names = [os.environ["NVCC"]] if os.environ.get("NVCC") else names
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        toolkit = "the CUDA toolkit, 12.1 or later, has it; set NVCC or CUDA_HOME to name one"
        raise CompileError(f"no nvcc found (looked for {', '.join(names)}): {toolkit}")
    return found


def cuda_targets(named: str) -> tuple[str, list[str], list[str]]:
    """nvcc, and the architectures that it knows and those that it does not, of the numbers in ``named``."""
    wanted = list(filter(None, named.replace(" ", "").split(",")))
    if not wanted:
        asking = "GRPO_KERNELS_CUDA_ARCHITECTURES=90,100 asks nvcc for them at installation"
        raise CompileError(f"not asked for: {asking} ({NVCC_TAKES})")
    if not all(map(str.isdecimal, wanted)):
        raise CompileError(f"GRPO_KERNELS_CUDA_ARCHITECTURES must be numbers such as 90,100; got {named!r}")
    wanted.sort(key=int)
    compiler = nvcc()
    known = run(compiler, "--list-gpu-code").split()
    architectures = [name for name in wanted if f"sm_{name}" in known]
    if not architectures:
        raise CompileError(f"{compiler} knows none of sm_{', sm_'.join(wanted)}; it knows {' '.join(known)}")
    return compiler, architectures, [name for name in wanted if name not in architectures]


def build_cuda(target: Path, workspace: Path) -> dict[str, str]:
    """One library for all architectures that nvcc knows of those wanted."""
    compiler, architectures, _ = cuda_targets(os.environ.get("GRPO_KERNELS_CUDA_ARCHITECTURES", ""))
    oldest = architectures[0]  # its PTX is compiled once for all, and serves newer GPUs
    codes = ",".join([*(f"sm_{name}" for name in architectures), f"compute_{oldest}"])
    targets = f"-gencode=arch=compute_{oldest},code=[{codes}]"
    fresh = target.with_suffix(".new")
    source = str(SOURCES / "cuda" / "library.cu")
    print(f"{compiler} compiles csrc/cuda for sm_{', sm_'.join(architectures)}: {NVCC_TAKES}", file=sys.stderr)
    run(compiler, *CUDA_FLAGS, targets, f"-t{os.cpu_count()}", source, "-o", str(fresh))
    fresh.replace(target)
    version = next((line for line in run(compiler, "--version").splitlines() if "release" in line), "unknown")
    return {"compiler": version, "flags": " ".join(CUDA_FLAGS), "architectures": " ".join(architectures)}


LIBRARIES = {"cpu": build_cpu, "cuda": build_cuda}
CHOICES = {"cpu": ("CXX",), "cuda": ("NVCC", "CUDA_HOME", "CUDA_PATH", "GRPO_KERNELS_CUDA_ARCHITECTURES")}
"""Variables that choose a library's compiler or what it makes."""


def _record_of(library: Path) -> dict[str, str]:
    """What a library's record says; nothing where one of the two is missing or an installation was cut short."""
    try:
        record = json.loads(library.with_suffix(".json").read_text(encoding="utf-8")) if library.exists() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def build_library(name: str, folder: Path, workspace: Path) -> None:
    """Build it, or not, and write its record beside it. One of the same making, in the package, is taken over."""
    target = folder / f"libgrpo_{name}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    making = {"sources": sources_hash(name), "made_by": sources_of(Path(__file__))}
    making["choices"] = " ".join(f"{key}={os.environ[key]}" for key in CHOICES[name] if key in os.environ)
    present = ROOT / NATIVE / target.name
    record = _record_of(present)
    if present != target and making.items() <= record.items():
        shutil.copy2(present, target)
    else:
        try:
            record = LIBRARIES[name](target, workspace / name)
        except CompileError as error:
            target.unlink(missing_ok=True)
            record = {"error": str(error)}
            print(
                f"warning: no compiled kernels of csrc/{name}, other backends serve instead: {error}", file=sys.stderr
            )
    target.with_suffix(".json").write_text(json.dumps({**record, **making}, indent=2) + "\n")


class BuildNative(build_ext):
    """Setuptools' build_ext with the compilers called directly; the results have no Python ABI in their names."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(LIBRARIES)  # nvcc's minutes beside those of the C++ compiler

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition("_")[2]
        build_library(name, Path(self.build_lib, NATIVE), Path(self.build_temp))

    def copy_extensions_to_source(self) -> None:
        """Editable installs: libraries and records go into the package's folder; a stale library goes away."""
        for name in LIBRARIES:
            built, package = Path(self.build_lib, NATIVE, f"libgrpo_{name}.so"), ROOT / NATIVE / f"libgrpo_{name}.so"
            package.parent.mkdir(parents=True, exist_ok=True)
            package.with_suffix(".json").unlink(missing_ok=True)  # the record comes last: it vouches for the library
            package.unlink(missing_ok=True)
            if built.exists():
                shutil.copy2(built, package)
            shutil.copyfile(built.with_suffix(".json"), package.with_suffix(".json"))


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: the library knows neither Python nor torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def published(document: str) -> dict[str, str]:
    """The addresses that a publisher has filled in, by the first word of their row in PUBLISHING.md.

    Raises:
        SystemExit: one that a link would lead to is none.
    """
    rows = re.findall(r"^\| (\w+)[^|]*\| [`<]?([^|`>]+)[`>]? \|", document, re.M)
    found = {name: value for name, value in rows if name != "address" and value != "not set"}
    for name in ("repository", "issues", "pages", "files"):
        if name in found and not re.fullmatch(r"https?://\S+", found[name]):
            raise SystemExit(
                f"PUBLISHING.md: {name} must be an address that begins with its protocol; got {found[name]!r}."
            )
    return found


def index_page(readme: str, addresses: dict[str, str], version: str) -> str:
    """README for a page of an index, which has none of the files around it: links and pictures lead to their places
    in the repository, as long as there are addresses for them."""
    places = [addresses.get(kind, "").format(version=version) for kind in ("pages", "files")]
    places = [place and place.rstrip("/") + "/" for place in places]

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        elsewhere = re.match(r"[a-z]+:|#", target)
        return link[0] if elsewhere else f"{picture}[{text}]({places[bool(picture)]}{target})"

    parts = re.split(r"(^```.*?^```)", readme, flags=re.M | re.S)
    prose = [re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, part) for part in parts[::2]]
    return "".join(part for pair in zip(prose, [*parts[1::2], ""]) for part in pair)


def metadata() -> dict[str, object]:
    """What of the metadata depends on where the package is published; the rest is pyproject.toml's."""
    addresses = published((ROOT / "PUBLISHING.md").read_text(encoding="utf-8"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return {
        "long_description": index_page((ROOT / "README.md").read_text(encoding="utf-8"), addresses, version),
        "long_description_content_type": "text/markdown",
        "project_urls": {
            name: addresses[key] for name, key in (("Source", "repository"), ("Issues", "issues")) if key in addresses
        },
    }


if __name__ == "__main__":  # benchmarks/gpu_library.py and tests import the rest
    setup(
        ext_modules=[Extension(f"grpo_kernels.native.libgrpo_{name}", sources=[], optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
        **metadata(),
    )
