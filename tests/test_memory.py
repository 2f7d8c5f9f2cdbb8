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
