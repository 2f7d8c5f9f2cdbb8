"""Peak memory of a call, measured in a process of its own: the benchmark's figures are ceilings here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cpu_loss

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs resets the peak on Linux alone")
TOKENS, VOCAB = 1024, 32000


def ceiling(share: float, dtype: str) -> float:
    """A share of the logits, and one fp32 row for each thread."""
    logits = TOKENS * VOCAB * cpu_loss.DTYPES[dtype].itemsize
    return share + torch.get_num_threads() * VOCAB * 4 / logits


@linux
@pytest.mark.parametrize("dtype", cpu_loss.DTYPES)
@pytest.mark.parametrize(("inplace", "share"), [(True, 0.02), (False, 1.05)])
def test_loss_and_gradient(dtype, inplace, share):
    measured = cpu_loss.extra_memory(TOKENS, VOCAB, dtype, inplace)
    assert measured <= ceiling(share, dtype)
    if not inplace:
        assert measured > 0.9  # else this measures nothing: the gradient itself has the logits' size


@linux
def test_torch_backend_holds_a_few_rows():
    """The fallback works in chunks of 2^21 fp32 elements: no second tensor of the logits' size, whatever the batch."""
    code = """
import sys
sys.path.insert(0, {folder!r})
import torch, grpo_kernels
from cpu_loss import peak_growth
logits = torch.randn(1, 4000, 32000)
ids = torch.zeros(1, 4000, dtype=torch.int64)
call = lambda: grpo_kernels.token_log_probs(logits, ids, backend="torch")
call()
print(peak_growth(call) / (logits.numel() * 4))
"""
    import subprocess

    code = code.format(folder=str(Path(cpu_loss.__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.25


LINEAR = """
import sys
sys.path.insert(0, {folder!r})
import torch, grpo_kernels
from cpu_loss import peak_growth
rows, hidden, vocab, dtype = 2048, 64, 16000, torch.{dtype}
states = torch.randn(8, rows // 8, hidden).to(dtype).requires_grad_()
weight = torch.randn(vocab, hidden).to(dtype).requires_grad_()
ids, advantages = torch.randint(vocab, (8, rows // 8)), torch.randn(8)

def call(budget):
    out = grpo_kernels.linear_grpo_loss(states, weight, ids, advantages, chunk_bytes=budget)
    return torch.autograd.grad(out.loss, (states, weight))

call({budget})
print(peak_growth(lambda: call({budget})))
"""


@linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("megabytes", [12, 40, 300])
def test_linear_loss_keeps_to_its_budget(dtype, megabytes):
    """Above inputs: the chunk budget, the gradients, and where chunks are summed in half precision an fp32 weight."""
    import subprocess

    budget = megabytes << 20
    code = LINEAR.format(folder=str(Path(cpu_loss.__file__).parent), dtype=dtype, budget=budget)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = getattr(torch, dtype).itemsize
    gradients = (2048 + 16000) * 64 * size
    summed = 16000 * 64 * 4 if size == 2 else 0
    slack = 8 << 20  # threads' scratch rows, GEMM packing
    measured = int(result.stdout)
    assert measured <= min(budget, 2048 * (16000 * size + 1024 * 4)) + gradients + summed + slack
    assert measured > min(budget, 2048 * 16000 * size) / 2  # else this measures nothing
