"""From the project's own Python to launches: its backends run as they are, and what they launch is executed.

The host code of csrc/cuda/library.cu is compiled around capture.h; Triton's launcher is replaced by one that
specialises the arguments as Triton does and compiles for sm_90. Pointers are those of CPU tensors; whatever is not a
tensor of the call is out of bounds. In a process of its own: one process cannot both interpret and compile Triton.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import Machine
from .memory import Global
from .parser import Kernel, Module

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "ptx"
PROCESSORS = 132
"""Of the GPU that Triton's grids are made for."""
SOURCES = ROOT / "csrc"
"""Whose kernels run; faults.py names a copy."""


class CompileError(RuntimeError):
    pass


def nvcc() -> str | None:
    """Its path, found as setup.py does."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    names = [os.environ["NVCC"]] if os.environ.get("NVCC") else ["nvcc"]
    names += [] if os.environ.get("NVCC") else [f"{home}/bin/nvcc" for home in (*homes, "/usr/local/cuda")]
    return next(filter(None, map(shutil.which, names)), None)


def host_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


def _flags() -> list[str]:
    """Those that setup.py gives nvcc, but for what makes a library of it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "CUDA_FLAGS"]
    kept = [flag for flag in ast.literal_eval(values[0]) if not flag.startswith(("-shared", "--cudart", "-Xcompiler"))]
    return [*kept, "-lineinfo", "-arch=compute_90", "--ptx"]


@functools.cache
def build() -> tuple[Path, Path]:
    """PTX of the CUDA kernels, and their host code as a library that hands launches over; compiled once for the same
    sources and compilers. Raises CompileError."""
    source, emulator = SOURCES / "cuda" / "library.cu", HERE.parent / "cuda_emulator" / "emulator.h"
    if not source.exists():
        raise CompileError(f"there is no {source}")
    if not nvcc() or not host_compiler():
        raise CompileError("the kernels of csrc/cuda need nvcc and a C++ compiler: set NVCC, CUDA_HOME and CXX")
    compiler = [nvcc(), *_flags()]
    version = subprocess.run([compiler[0], "--version"], capture_output=True).stdout
    digest = hashlib.sha256(" ".join(compiler).encode() + version)
    for path in sorted([*SOURCES.rglob("*.h"), source, emulator, HERE / "capture.h"]):
        digest.update(path.read_bytes())
    text, library = (BUILD / f"{digest.hexdigest()[:16]}{end}" for end in (".ptx", ".so"))
    host = [
        host_compiler() or "c++",
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-w",
        "-ffp-contract=off",
        "-DGRPO_EMULATED",
    ]
    host += ["-U_FORTIFY_SOURCE", "-include", str(HERE / "capture.h"), f"-I{emulator.parent}", "-x", "c++"]
    _compile([*compiler, str(source)], text)
    _compile([*host, str(source), "-ldl"], library)
    return text, library


def _compile(command: list[str], target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line][:10]
        text = "\n".join(errors) or result.stderr[-2000:]
        raise CompileError(f"{command[0]} makes no {target.suffix} of {SOURCES} (with tests/ptx/capture.h):\n{text}")
    fresh.replace(target)


class Watch(TorchDispatchMode):
    """Maps what PyTorch allocates while it is on; memory of torch.empty is uninitialised until it is written."""

    def __init__(self, memory: Global) -> None:
        super().__init__()
        self.memory, self.kept = memory, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            map_tensor(self.memory, str(function), result, "empty" in str(function))
            self.kept.append(result)
        return result


def map_tensor(memory: Global, name: str, tensor: torch.Tensor, fresh: bool = False) -> None:
    """What the tensor spans, not its whole storage."""
    if tensor.numel():
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory.map(f"{name}{tuple(tensor.shape)}", tensor.data_ptr(), (last + 1) * tensor.element_size(), fresh)


class Executor:
    """Runs what the project's backends launch, on one machine."""

    def __init__(self, seed: int = 0, races: bool = False, traced: int = sys.maxsize) -> None:
        self.memory = Global()
        self.machine = Machine(self.memory, seed, races, traced)
        self.error: Exception | None = None

    @contextlib.contextmanager
    def cuda(self, plan: tuple[int, int, int] | None = None) -> Iterator[Any]:
        """grpo_kernels.backends.cuda over CPU tensors; ``plan`` = cluster, clusters, tiles instead of its own."""
        library = str(build()[1])
        os.environ["GRPO_KERNELS_CUDA_LIBRARY"] = library
        from grpo_kernels.backends import cuda

        if cuda.library()._name != library:
            raise RuntimeError(f"{cuda.library()._name} is loaded already; {library} needs a process of its own")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *(ctypes.c_int,) * 4, ctypes.c_void_p, ctypes.c_int)
        callback = kind(self._captured)
        cuda.library().capture_with(callback)
        own = cuda.plan

        def laid_out(*arguments: Any) -> Any:
            found = cuda.Plan.from_buffer_copy(own(*arguments))
            found.cluster, found.clusters, found.tiles = plan
            return found

        cuda.plan = laid_out if plan else own
        try:
            with Watch(self.memory):
                yield cuda
        except RuntimeError as error:
            raise self.error or error from None
        finally:
            cuda.plan = own

    def _captured(
        self, name: bytes, blocks: int, cluster: int, threads: int, shared: int, where: int, size: int
    ) -> int:
        """capture.h's Capture: 0, or 1 for an error."""
        try:
            parameters = ctypes.string_at(where, size)
            self.machine.launch(_cuda_kernel(name.decode()), blocks, threads, shared, parameters, cluster)
        except Exception as error:  # not through C++
            self.error = error
            return 1
        return 0

    @contextlib.contextmanager
    def triton(self, processors: int = PROCESSORS) -> Iterator[Any]:
        """grpo_kernels.backends.triton over CPU tensors, as if on so many multiprocessors."""
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise RuntimeError("TRITON_INTERPRET=1: this process interprets Triton's kernels, so it compiles none")
        from grpo_kernels.backends import triton as backend
        from grpo_kernels.backends.triton import launch

        if reason := launcher_differs():
            raise RuntimeError(reason)
        kept = launch.launch, launch.processors, backend._interpreted
        launch.launch, launch.processors, backend._interpreted = self._launch_triton, lambda _: processors, lambda: True
        try:
            with Watch(self.memory):
                yield backend
        finally:
            launch.launch, launch.processors, backend._interpreted = kept

    def _launch_triton(
        self, kernel: Any, programs: int, device: Any, *arguments: Any, warps: int = 4, **constants: Any
    ) -> None:
        if not programs:
            return
        compiled, values = _compiled(kernel, arguments, constants, warps)
        found = _triton_kernel(compiled.asm["ptx"])
        data = bytearray(found.parameter_bytes)
        for (offset, size), value in zip(found.parameters.values(), [*values, 0, 0], strict=True):  # two of scratch
            value = value.data_ptr() if isinstance(value, torch.Tensor) else int(value)
            data[offset : offset + size] = (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        meta = compiled.metadata
        if meta.num_ctas != 1 or meta.global_scratch_size:
            raise NotImplementedError(f"{kernel.__name__} uses clusters or global scratch")
        self.machine.launch(found, programs, 32 * meta.num_warps, meta.shared, bytes(data))


def launcher_differs() -> str | None:
    """How triton/launch.py's launcher differs from the one that replaces it."""
    from grpo_kernels.backends.triton import launch

    functions = (launch.launch, Executor._launch_triton)
    found, here = ([name for name in inspect.signature(f).parameters if name != "self"] for f in functions)
    return None if found == here else f"triton/launch.py launches with {found}, tests/ptx/launches.py with {here}"


@functools.cache
def _cuda_kernels() -> Module:
    return Module(build()[0].read_text())


def _cuda_kernel(name: str) -> Kernel:
    if name not in _cuda_kernels():
        raise NotImplementedError(f"nvcc made no kernel {name}, only {', '.join(_cuda_kernels())}")
    return _cuda_kernels()[name]


@functools.cache
def _triton_kernel(text: str) -> Kernel:
    (kernel,) = Module(text).values()
    return kernel


def _compiled(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], warps: int) -> tuple[Any, list[Any]]:
    """Compiled for sm_90 as Triton's own launch would, and the arguments that the compiled kernel takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
    options, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return compiled, [bound[name] for name, kind in signature.items() if kind != "constexpr"]
