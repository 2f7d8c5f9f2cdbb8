"""Hostile calls of the C ABIs: sizes, strides, ids, layouts, pointers, numbers (fuzz_abi/cpu.cpp and cuda.cpp say what
must hold).

CI replays tests/corpus over the built libraries, the CUDA sources over the emulator, with buffers that end at forbidden
pages, and tries thousands of new inputs, the same ones every time; nightly the sources under both sanitizers, for
minutes, from another seed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cuda_emulator
import fuzz_abi
import pytest
from cases import make

from grpo_kernels.backends import cpu, cuda

CORPUS, CUDA_CORPUS = (
    sorted((Path(__file__).parent / "corpus" / folder).glob("*.txt")) for folder in ("abi", "abi_cuda")
)
NIGHTLY = "240s"

pytestmark = pytest.mark.skipif(fuzz_abi.compiler() is None, reason="needs a C++ compiler")


def driven(program: Path, *arguments: str) -> str:
    """What the driver says; a failure has the input that made it."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:handle_segv=0:allow_user_segv_handler=1",
        "UBSAN_OPTIONS": "abort_on_error=1",  # it does not call __asan_on_error
    }
    command = [str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=program.parent)
    found = "".join(f"\n{path.read_text()}" for path in program.parent.glob("found-*.txt"))
    assert result.returncode == 0, f"{result.stderr[-4000:]}{found}"
    return result.stdout


def executions(said: str) -> int:
    return int(re.search(r"(\d+) executions", said).group(1))


@pytest.fixture(scope="module")
def over_the_library(tmp_path_factory):
    cpu.library()  # or the reason why there is none
    return fuzz_abi.build_over(cpu.LIBRARY, tmp_path_factory.mktemp("fuzz") / "fuzz_abi", "cpu")


@pytest.fixture(scope="module")
def over_the_cuda_library(tmp_path_factory):
    if not cuda.emulated():
        pytest.skip("needs the emulator: on a GPU its memory is not looked at")
    return fuzz_abi.build_over(cuda.library_path(), tmp_path_factory.mktemp("fuzz") / "fuzz_cuda", "cuda")


def test_what_once_failed(over_the_library):
    said = driven(over_the_library, "replay", *map(str, CORPUS))
    assert len(said.splitlines()) == len(CORPUS)


def test_new_inputs(over_the_library):
    assert executions(driven(over_the_library, "run", "3000", "1", ".")) == 3000


def test_what_once_failed_of_cuda(over_the_cuda_library):
    said = driven(over_the_cuda_library, "replay", *map(str, CUDA_CORPUS))
    assert len(said.splitlines()) == len(CUDA_CORPUS)


def test_new_inputs_of_cuda(over_the_cuda_library):
    assert executions(driven(over_the_cuda_library, "run", "800", "1", ".")) == 800


OVERFLOW = """
#include <stddef.h>
#include <stdint.h>
int last = INT32_MAX - 1;
extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t size) { return last + int(size); }
"""


def test_undefined_behaviour_is_told_with_its_input_and_seed(tmp_path):
    target, program = tmp_path / "target.cpp", tmp_path / "program"
    target.write_text(OVERFLOW)
    command = [fuzz_abi.compiler(), *fuzz_abi.SANITIZED, str(fuzz_abi.HERE / "driver.cpp"), str(target)]
    subprocess.run([*command, "-o", str(program)], check=True)
    with pytest.raises(AssertionError, match=r"(?s)seed 7\n.*signed integer overflow.*\s[0-9a-f]{20,}\s"):
        driven(program, "run", "100", "7", ".")


BESIDE = """
#include <stddef.h>
#include <stdint.h>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t size) {
  volatile int row[4] = {};
  return row[size + 4];
}
"""


def test_a_trap_is_told_with_its_input(tmp_path):
    """As the emulator's kernels end that go beside an array."""
    target, program = tmp_path / "target.cpp", tmp_path / "program"
    target.write_text(BESIDE)
    flags = [flag for flag in cuda_emulator.FLAGS if "sanitize" in flag]
    assert flags
    sources = [str(fuzz_abi.HERE / "driver.cpp"), str(target)]
    subprocess.run([fuzz_abi.compiler(), "-std=c++17", *flags, *sources, "-o", str(program)], check=True)
    with pytest.raises(AssertionError, match=r"(?s)seed 7\n.*signal [45] .*\s[0-9a-f]{20,}\s"):
        driven(program, "run", "100", "7", ".")


OF_MEMORY = """
#ifndef __has_feature
#define __has_feature(name) 0
#endif
#include "memory.h"
#ifdef GRPO_FUZZ_SANITIZED
#error plain buffers
#endif
"""


@pytest.mark.parametrize(("flags", "plain"), [((), False), (("-fsanitize=address",), True)])
def test_buffers_are_plain_under_a_sanitizer_alone(flags, plain):
    """Whether or not the compiler has __has_feature."""
    command = [fuzz_abi.compiler(), "-std=c++17", "-fsyntax-only", f"-I{fuzz_abi.HERE}", *flags, "-x", "c++", "-"]
    result = subprocess.run(command, input=OF_MEMORY, capture_output=True, text=True)
    assert ("plain buffers" in result.stderr) == plain
    assert plain or result.returncode == 0, result.stderr


@pytest.mark.parametrize("function", ["fused_loss", "token_sums", "log_probs"])
def test_python_asks_how_a_call_went(monkeypatch, function):
    """Numbers of a refused call are whatever was in memory."""
    name, case = f"grpo_cpu_{function}", make(batch=2, length=3, vocab=33)
    monkeypatch.setattr(cpu.library(), name, lambda params: 4)
    with pytest.raises(RuntimeError, match=f"{name} failed with status 4"):
        case.run("cpu", config="gspo" if function == "log_probs" else "grpo")


@pytest.mark.skipif(not cuda.emulated(), reason="looks into the emulator")
@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_python_says_what_cuda_calls_no_call(monkeypatch, config):
    """Before anything is launched."""
    monkeypatch.setattr(cuda, "plan", lambda *_: cuda.Plan(1, 0, 13))
    with pytest.raises(RuntimeError, match=r"grpo_cuda_\w+ on cpu: a size, stride, layout or pointer .* \(error -1\)"):
        make(batch=2, length=3, vocab=33).run("cuda", config=config)


@pytest.mark.nightly
def test_under_sanitizers(tmp_path, record_property):
    program = fuzz_abi.build_sanitized(tmp_path)
    driven(program, "replay", *map(str, CORPUS))
    seed = str(int(time.time()))
    record_property("examples", executions(driven(program, "run", NIGHTLY, seed, ".")))


@pytest.mark.nightly
def test_cuda_under_sanitizers(tmp_path, record_property):
    program = fuzz_abi.build_emulated_sanitized(tmp_path)
    if program is None:
        pytest.skip("no C++ compiler that knows _Float16")
    driven(program, "replay", *map(str, CUDA_CORPUS))
    seed = str(int(time.time()))
    record_property("examples", executions(driven(program, "run", NIGHTLY, seed, ".")))


ANY_BITS = """
import conftest, test_raw_bits, torch
torch.use_deterministic_algorithms(True)
print(sum(test_raw_bits.check(name, "cuda", 60, always=False) for name in test_raw_bits.PROPERTIES), "executions")
"""


@pytest.mark.nightly
def test_emulated_cuda_under_sanitizers(tmp_path, record_property):
    """The properties of test_raw_bits over csrc/cuda. Bulk copies read whole vectors of 16 bytes, as a GPU may beside
    a row: what memcpy reads is not looked at. Fibers have stacks that no sanitizer knows."""
    flags = ("-O1", "-g1", *fuzz_abi.SANITIZED, "--param", "asan-stack=0")
    library = cuda_emulator.build(cuda_emulator.ROOT / "csrc", tmp_path / "sanitized.so", *flags)
    if library is None:
        pytest.skip("no C++ compiler that knows _Float16")
    runtime = subprocess.run([fuzz_abi.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    options = "replace_intrin=0:detect_leaks=0:detect_stack_use_after_return=0"
    where = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": options, "GRPO_KERNELS_CUDA_LIBRARY": str(library)}
    here = Path(__file__).parent
    where["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", ANY_BITS]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **where})
    assert result.returncode == 0, result.stderr[-4000:]
    record_property("examples", executions(result.stdout))
