"""The plain PyTorch backend as what a CPU without compiled kernels gets: said once, and no worse than eager code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_kernels import backends, grpo_loss, token_log_probs
from grpo_kernels.backends import cpu, eager_rows
from grpo_kernels.backends.contract import RowGradients, Rows, RowStats
from grpo_kernels.backends.spec import LogitArgs, numbers_vector
from grpo_kernels.bench.measure import peak_bytes, quiet, step
from grpo_kernels.bench.providers import ours_by_name
from grpo_kernels.bench.workload import DTYPES, Spec, Workload

plain = backends.get("torch")
BENCHMARKED = [(tokens, vocab, dtype) for tokens, vocab in ((128, 32000), (64, 151_936)) for dtype in DTYPES]


@pytest.fixture
def no_library(tmp_path, monkeypatch):
    """A CPU for which nothing was compiled."""
    caches = (cpu.library, cpu.available_instruction_sets, backends._warn_of_fallback)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libgrpo_cpu.so")
    (tmp_path / "libgrpo_cpu.json").write_text('{"error": "no C++ compiler found"}')
    for name in ("cuda", "triton"):  # emulated and interpreted here, they would serve CPU tensors
        monkeypatch.setattr(backends.get(name), "unsupported", lambda request: "it serves GPUs")
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def warned(function) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [warning for warning in caught if "grpo_kernels" in str(warning.message)]


def loss(logits: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    return grpo_loss(logits, ids, torch.ones(len(logits), device=logits.device), backend=backend).loss


def test_the_fallback_is_said_once(no_library):
    logits = torch.randn(2, 3, 11, requires_grad=True)
    found = warned(lambda: [loss(logits), loss(logits), loss(logits.bfloat16())])
    assert len(found) == 1
    assert found[0].category is UserWarning
    assert found[0].filename == __file__
    text = str(found[0].message)
    for part in ("no C++ compiler found", "install a C++ compiler", "python -m grpo_kernels info", "backend='torch'"):
        assert part in text


def test_the_fallback_is_said_at_any_caller(no_library):
    """A folder whose name begins as the package's is the caller's. Frames of the package alone are no error."""
    package = Path(backends.__file__).parent.parent
    source = "grpo_loss(*arguments, backend=None)"
    for place in (f"{package}_demo.py", f"{package}-other/demo.py", f"{package}/demo.py"):
        backends._warn_of_fallback.cache_clear()
        arguments = (torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long), torch.ones(2))
        code = compile(source, place, "exec")
        (said,) = warned(lambda code=code, a=arguments: exec(code, {"grpo_loss": grpo_loss, "arguments": a}))
        assert (said.filename == place) == ("/demo.py" not in place or "other" in place)


def test_nothing_is_said_where_plain_pytorch_was_asked_for_or_is_all_there_is(no_library):
    logits = torch.randn(2, 3, 11, requires_grad=True)
    assert not warned(lambda: loss(logits, "torch"))
    request = backends.Request(torch.device("meta"), torch.float32, 11)  # a device that no kernel is written for
    assert not warned(lambda: backends.choose("test", request, None))
    assert len(warned(lambda: loss(logits))) == 1


def test_an_instruction_set_that_is_not_here_is_to_be_unset(monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", "foo")
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.get(name), "unsupported", lambda request: "it serves GPUs")
    backends._warn_of_fallback.cache_clear()
    (said,) = warned(lambda: loss(torch.randn(2, 3, 11, requires_grad=True)))
    backends._warn_of_fallback.cache_clear()
    assert "GRPO_KERNELS_CPU_ISA=foo: this machine runs " in str(said.message)
    assert "hint: unset it, or name one of these;" in str(said.message)


def test_nothing_is_said_with_kernels():
    backends._warn_of_fallback.cache_clear()
    assert backends.choose("test", backends.Request(torch.device("cpu")), None)[0] == "cpu"
    assert not warned(lambda: loss(torch.randn(2, 3, 11, requires_grad=True)))


def test_compiled_code_says_it_too(no_library):
    """And it stays one graph."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    logits = torch.randn(2, 3, 11)
    results = []
    assert len(warned(lambda: results.append(compiled(logits)))) == 1
    assert torch.equal(results[0], loss(logits, "torch"))


def test_a_fresh_process_says_it_on_stderr(tmp_path):
    code = f"""
from pathlib import Path
from grpo_kernels.backends import cpu, eager_rows
cpu.LIBRARY = Path({str(tmp_path / "libgrpo_cpu.so")!r})
import torch, grpo_kernels
for _ in range(3):
    grpo_kernels.token_log_probs(torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.int64))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "GRPO_KERNELS_CUDA_LIBRARY": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: grpo_kernels: expected compiled kernels") == 1
    assert "no compiled library" in result.stderr


@pytest.mark.parametrize(("tokens", "vocab", "dtype"), BENCHMARKED)
@pytest.mark.parametrize("inplace", [True, False])
def test_peak_memory(tokens, vocab, dtype, inplace):
    """Of loss and gradient, in copies of the logits, of which one is the gradient; buffers are fp32."""
    torch.use_deterministic_algorithms(False)
    work = Workload(Spec(tokens, vocab, dtype))
    out_of_place, in_place = ours_by_name("torch")
    provider, least, most = (in_place, 0.0, 0.35) if inplace else (out_of_place, 1.0, 1.2)
    with quiet():
        measured = peak_bytes(lambda: step(provider, work), "cpu") / work.spec.logits_bytes
    assert least < measured <= most


class Swept(TorchDispatchMode):
    """Counts operations over whole rows, and what memory of that size they ask for."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.operations: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = self.memories((arguments, options))
        result = function(*arguments, **(options or {}))
        if not function.is_view:
            name = str(function)
            self.allocations += Counter({name: len(self.memories(result) - given)})
            self.operations += Counter({name: bool(given)})
        return result

    def count(self) -> int:
        """Without those that look at a column of each row."""
        return sum(n for name, n in self.operations.items() if not name.startswith(("aten.gather", "aten.scatter_")))

    def memories(self, tensors: object) -> set[int]:
        large = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.numel() >= self.elements]
        return {tensor.untyped_storage().data_ptr() for tensor in large}


SWEEPS = {"loss": (7, 5, 1), "entropy": (7, 13, 2), "softcap": (11, 20, 2)}
"""How often log-probs and their backward go over fp32 logits or a buffer of that size, and backward's buffers."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps(monkeypatch, dtype, name):
    """Each costs what reading the logits costs, or a launch. Nothing makes a tensor of rows but one or two buffers."""
    forward, backward, buffers = SWEEPS[name]
    loaded = int(dtype != torch.float32 and name != "softcap")  # a cap's logits are loaded in any dtype
    chunks, tokens, vocab = 4, 3, 5000
    monkeypatch.setattr(eager_rows, "CHUNK_ELEMENTS", (tokens * vocab, tokens * vocab))
    cap = 9.0 if name == "softcap" else None
    logits = torch.randn(chunks, tokens, vocab).to(dtype)
    live = torch.ones(chunks, tokens, dtype=torch.bool)
    numbers = numbers_vector(LogitArgs(logit_softcap=cap), 1.0, None, torch.float32, logits.device)
    rows = Rows(logits, torch.randint(vocab, live.shape), live, numbers, cap is not None)
    statistics = RowStats(*(torch.empty(live.shape) for _ in range(4)))
    slopes = RowGradients(torch.randn(live.shape), torch.randn(live.shape) if name == "entropy" else None)
    gradient = torch.empty_like(logits)
    with Swept(tokens * vocab) as swept:
        plain.log_probs(rows, statistics)
    assert swept.allocations == {"aten.empty.memory_format": 2}
    assert swept.count() <= chunks * (forward + loaded), swept.operations
    with Swept(tokens * vocab) as swept:
        plain.log_probs_backward(rows, statistics, slopes, gradient)
    assert swept.allocations == {"aten.empty.memory_format": buffers}
    assert swept.count() <= chunks * (backward + loaded), swept.operations


@pytest.mark.parametrize("vocab", [33, 257, 11_003, 40_001])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 4.0}, {"entropy_coef": 0.1, "temperature": 0.7}], ids=str)
def test_bits_do_not_depend_on_chunks_and_threads(monkeypatch, vocab, options):
    """Nor on where in its chunk a row lies: functions of PyTorch round differently at the end of a thread's share."""
    torch.use_deterministic_algorithms(False)
    case = make(batch=3, length=4, vocab=vocab, empty=False, spread=4.0)
    expected = None
    for rows in (1, 3, 9, 1000):
        monkeypatch.setattr(eager_rows, "CHUNK_ELEMENTS", (rows * vocab, rows * vocab))
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, gradient = case.run("torch", **options)
            found = (out.log_probs, out.entropy, gradient)
            expected = expected or found
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_beside_eager_code(dtype):
    """Loss and gradient, and log-probs, of one thread's own time. Before chunks fitted the cache it was 9-20 times."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    work = Workload(Spec(32, 100_000, "fp32" if dtype == torch.float32 else "bf16"))
    ids = work.ids[..., None]

    def eager_log_probs() -> torch.Tensor:
        return torch.log_softmax(work.buffer, -1).gather(-1, ids)

    def eager_step() -> None:
        leaf = work.buffer.requires_grad_()
        ratio = (torch.log_softmax(leaf, -1).gather(-1, ids).squeeze(-1) - work.old).exp()
        A = work.advantages[:, None]
        (-torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)).mean().backward()
        leaf.grad = None
        work.buffer = leaf.detach()

    ours = ours_by_name("torch")[0]
    pairs = {
        "log-probs": (lambda: token_log_probs(work.buffer, work.ids, backend="torch"), eager_log_probs, 4.0),
        "step": (lambda: step(ours, work), eager_step, 2.5),
    }
    for name, (mine, eager, most) in pairs.items():
        best = [float("inf"), float("inf")]
        for _ in range(6):
            for i, function in enumerate((mine, eager)):
                start = time.thread_time()
                function()
                best[i] = min(best[i], time.thread_time() - start)
        assert best[0] < most * best[1], name


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)], ids=str)
def test_a_tensor_without_elements_was_not_freed(shape):
    """It has no address either."""
    logits = torch.zeros(shape, requires_grad=True)
    loss = grpo_loss(logits, torch.zeros(shape[:2], dtype=torch.int64), torch.ones(shape[0])).loss
    loss.backward()
    assert loss == 0
