"""Every test runs with deterministic algorithms on, which also fills each torch.empty with NaN: memory that is read
before it is written shows."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import tempfile

import hypothesis
import pytest
import torch

DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")
"""cuda: the tests that take a backend run there, on every backend that serves it; the others are left out."""
if DEVICE != "cpu":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    torch.set_default_device(DEVICE)
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before anything imports one
    if "GRPO_KERNELS_CUDA_LIBRARY" not in os.environ:
        import cuda_emulator

        os.environ["GRPO_KERNELS_CUDA_LIBRARY"] = str(cuda_emulator.build() or "")

from grpo_kernels import backends  # noqa: E402
from grpo_kernels.backends import blocks  # noqa: E402

# Every gradient on a CPU is memory that others had before it, and whoever reads it too late finds NaN.
LARGE, blocks.LARGE, blocks.poisoned = blocks.LARGE, 1, True

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = tempfile.TemporaryDirectory(prefix="grpo_kernels_tests_")
os.environ["XDG_CACHE_HOME"] = CACHE.name  # records of verify are not the user's

hypothesis.settings.register_profile("ci", max_examples=80, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("nightly", max_examples=400, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def round_to_nearest_in_the_interpreter() -> None:
    """Triton's interpreter truncates fp32 to bf16; GPUs round to nearest even, as PyTorch does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(values, from_dtype, to_dtype, rounding):
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            floats = torch.from_numpy(np.array(values).view(np.float32))
            return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            halves = torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
            return halves.to(torch.float32).numpy().view(np.uint32)
        return plain(values, from_dtype, to_dtype, rounding)

    interpreter._convert_float = convert


def fuse_multiply_adds_in_the_interpreter() -> None:
    """It rounds the product first; GPUs round once."""
    import numpy as np
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        wide = np.float64 if z.data.dtype == np.float32 else z.data.dtype
        with np.errstate(all="ignore"):
            fused = x.data.astype(wide) * y.data + z.data
            return interpreter.TensorHandle(fused.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def read_scalars_in_the_interpreter() -> None:
    """Triton 3.6 takes int() of an array of one element where a tensor bounds a loop, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def patch_the_language_once() -> None:
    """The interpreter replaces triton.language's functions anew at every call of a helper: nine tenths of its time."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang

    class Kept:
        def restore(self) -> None:
            pass

    def once(function):
        known = id(function.__globals__)  # a module's name for the language decides what is replaced
        if known not in patched:
            patched[known] = plain(function)
        return Kept()

    patched: dict = {}
    interpreter._patch_lang = once


def compute_nothing_twice_in_the_interpreter() -> None:
    """It forms every integer in 64 bits too, for an assertion that debug=True alone makes, and a table of all dtypes at
    every operation: a third of its time."""
    from triton.runtime import interpreter

    builder, plain = interpreter.interpreter_builder, interpreter._get_np_dtype
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    assert not builder.options.debug

    def np_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = plain(dtype)
        return known[dtype.name]

    known: dict = {}
    interpreter._get_np_dtype = np_dtype


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    round_to_nearest_in_the_interpreter()
    fuse_multiply_adds_in_the_interpreter()
    read_scalars_in_the_interpreter()
    patch_the_language_once()
    compute_nothing_twice_in_the_interpreter()


def pytest_unconfigure() -> None:
    CACHE.cleanup()


def usable_backends() -> list[str]:
    request = backends.Request(torch.device(DEVICE), by_name=True)
    return [name for name in backends.names() if backends.get(name).unsupported(request) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend`` runs on every backend that is usable here: a new one needs no new test."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", usable_backends())


SAMPLES = {"triton": 2, "cuda": 4}
"""Of each test's cases, as many run in CI on interpreted Triton and emulated CUDA kernels, evenly spread; the others
are nightly. A test whose cases are long has numbers of its own: pytest.mark.sample(triton=1)."""


def _takes_a_backend(item: pytest.Item) -> bool:
    return "backend" in getattr(getattr(item, "callspec", None), "params", {})


def _place_on_a_gpu(item: pytest.Item) -> int:
    """What nothing but a GPU shows comes first, plain PyTorch last: minutes there are few."""
    if item.get_closest_marker("gpu"):
        return 0
    return 2 if item.callspec.params["backend"] == "torch" else 1


COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""Every test of this run's files, whether or not it is chosen."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [*items]
    if DEVICE != "cpu":
        items[:] = [item for item in items if _takes_a_backend(item) or item.get_closest_marker("gpu")]
        items.sort(key=_place_on_a_gpu)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    cases: dict = {}
    for item in items:
        if _takes_a_backend(item):
            cases.setdefault((item.path, item.originalname, item.callspec.params["backend"]), []).append(item)
    for (_, _, backend), mine in cases.items():
        marker = mine[0].get_closest_marker("sample")
        sample = (SAMPLES | (marker.kwargs if marker else {})).get(backend, len(mine))
        kept = {round(i * (len(mine) - 1) / max(sample - 1, 1)) for i in range(sample)}
        for i, item in enumerate(mine):
            if i not in kept:
                item.add_marker("nightly")


def pytest_collection_finish() -> None:
    """What is collected stays to the end: looking at all of it again took the collector a third of a test's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
