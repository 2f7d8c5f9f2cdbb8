"""Peak memory of a call: what PyTorch's allocator hands out, and what the process really holds."""

from __future__ import annotations

import sys

import pytest
import resident
import torch

from grpo_kernels.bench.measure import peak_bytes, quiet, step
from grpo_kernels.bench.providers import from_logits
from grpo_kernels.bench.workload import DTYPES, Spec, Workload

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs resets the peak on Linux alone")
TOKENS, VOCAB = 1024, 32000


def ceiling(share: float, dtype: str) -> float:
    """A share of the logits, and one fp32 row for each thread."""
    logits = TOKENS * VOCAB * DTYPES[dtype].itemsize
    return share + torch.get_num_threads() * VOCAB * 4 / logits


LOSS = """
import grpo_kernels
from grpo_kernels.bench.measure import step
from grpo_kernels.bench.providers import from_logits
from grpo_kernels.bench.workload import Spec, Workload
work = Workload(Spec({tokens}, {vocab}, {dtype!r}))
provider = {{p.name: p for p in from_logits(work.spec)}}[{name!r}]
step(provider, work)
work.restore()
grpo_kernels.empty_cache()
print(peak_growth(lambda: step(provider, work)) / work.spec.logits_bytes)
"""


@linux
@pytest.mark.parametrize(
    ("name", "share", "dtype"),
    [
        ("ours, in place", 0.02, "bf16"),
        ("ours", 1.05, "fp32"),
        pytest.param("ours, in place", 0.02, "fp32", marks=pytest.mark.nightly),
        pytest.param("ours", 1.05, "bf16", marks=pytest.mark.nightly),
    ],
)
def test_loss_and_gradient(name, share, dtype):
    measured = resident.run(LOSS.format(tokens=TOKENS, vocab=VOCAB, dtype=dtype, name=name))
    assert measured <= ceiling(share, dtype)
    if name == "ours":
        assert measured > 0.9  # else this measures nothing: the gradient itself has the logits' size


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_allocator_tells_the_same(dtype):
    """The benchmarks' figure, of ours and of eager PyTorch, whose three fp32 copies are known."""
    work = Workload(Spec(64, 32000, dtype))
    wanted = {"ours, in place": (0.0, 0.2), "ours": (1.0, 1.2), "eager, fp32 upcast": (3, 3.1)}
    offered = {provider.name for provider in from_logits(work.spec)}
    assert offered >= wanted.keys()
    for provider in from_logits(work.spec):
        if provider.name in wanted:
            step(provider, work)
            work.restore()
            with quiet():
                measured = peak_bytes(lambda p=provider: step(p, work), "cpu") / work.spec.logits_bytes
            low, high = wanted[provider.name]
            if provider.name.startswith("eager"):  # copies are fp32
                low, high = (4 / DTYPES[dtype].itemsize * bound for bound in (low, high))
            assert low <= measured <= high, provider.name


@linux
def test_torch_backend_holds_a_few_rows():
    """The fallback works in chunks of at most 2^20 logits: no second tensor of their size, whatever the batch."""
    code = """
import torch, grpo_kernels
logits = torch.randn(1, 4000, 32000)
ids = torch.zeros(1, 4000, dtype=torch.int64)
call = lambda: grpo_kernels.token_log_probs(logits, ids, backend="torch")
call()
print(peak_growth(call) / (logits.numel() * 4))
"""
    assert resident.run(code) < 0.25


LINEAR = """
import torch, grpo_kernels
rows, hidden, vocab, dtype = 2048, 64, 16000, torch.{dtype}
states = torch.randn(8, rows // 8, hidden).to(dtype).requires_grad_()
weight = torch.randn(vocab, hidden).to(dtype).requires_grad_()
ids, advantages = torch.randint(vocab, (8, rows // 8)), torch.randn(8)
adapter = (torch.randn(8, rows // 8, {rank}), torch.randn(vocab, {rank})) if {rank} else ()
leaves = (states, weight, *(part.requires_grad_() for part in adapter))

def call(budget):
    options = dict(adapter=adapter or None, chunk_bytes=budget)
    out = grpo_kernels.linear_grpo_loss(states, weight, ids, advantages, **options)
    return torch.autograd.grad(out.loss, leaves)

call({budget})
grpo_kernels.empty_cache()
print(peak_growth(lambda: call({budget})))
"""


@linux
@pytest.mark.parametrize(
    ("megabytes", "dtype", "rank"),
    [
        (12, "bfloat16", 0),
        (40, "float32", 8),
        (300, "bfloat16", 0),
        pytest.param(12, "float32", 0, marks=pytest.mark.nightly),
        pytest.param(40, "bfloat16", 0, marks=pytest.mark.nightly),
        pytest.param(40, "float32", 0, marks=pytest.mark.nightly),
        pytest.param(300, "float32", 0, marks=pytest.mark.nightly),
        pytest.param(300, "bfloat16", 8, marks=pytest.mark.nightly),
    ],
)
def test_linear_loss_keeps_to_its_budget(megabytes, dtype, rank):
    """Above inputs: the chunk budget, the gradients, and where chunks are summed in half precision an fp32 weight. An
    fp32 adapter brings its gradients alone, no second copy of the logits of a chunk."""
    budget = megabytes << 20
    measured = resident.run(LINEAR.format(dtype=dtype, budget=budget, rank=rank))
    size = getattr(torch, dtype).itemsize
    gradients = (2048 + 16000) * (64 * size + rank * 4)
    summed = 16000 * 64 * 4 if size == 2 else 0
    slack = 8 << 20  # threads' scratch rows, GEMM packing
    assert measured <= min(budget, 2048 * (16000 * size + 1024 * 4)) + gradients + summed + slack
    assert measured > min(budget, 2048 * 16000 * size) / 2  # else this measures nothing


ADAPTED = """
import torch, grpo_kernels
rows, hidden, vocab, rank, dtype = 512, 1024, 16000, 8, torch.{dtype}
states = torch.randn(8, rows // 8, hidden).to(dtype).requires_grad_()
weight = torch.randn(vocab, hidden).to(dtype)
low, up = torch.randn(8, rows // 8, rank, requires_grad=True), torch.randn(vocab, rank, requires_grad=True)
ids, advantages = torch.randint(vocab, (8, rows // 8)), torch.randn(8)

def call():
    out = grpo_kernels.linear_grpo_loss(states, weight, ids, advantages, adapter=(low, up), chunk_bytes={budget})
    return torch.autograd.grad(out.loss, (states, low, up))

call()
print(peak_growth(call))
"""


@linux
@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(dtype, marks=pytest.mark.nightly) for dtype in ("float32", "float16"))]
)
def test_an_adapter_makes_nothing_of_the_weights_size(dtype):
    """Beside a frozen weight, which is not merged: the budget, and the gradients of hidden states and adapter."""
    budget = 8 << 20
    measured = resident.run(ADAPTED.format(dtype=dtype, budget=budget))
    size = getattr(torch, dtype).itemsize
    gradients = 512 * 1024 * size + (512 + 16000) * 8 * 4
    allowed = budget + gradients + (8 << 20)  # threads' scratch rows, GEMM packing, the adapter in the head's dtype
    assert budget / 4 < measured <= allowed < 16000 * 1024 * size
