"""Triton's kernels of pairs of rows beside float64 autograd, and those of rows with a temperature each."""

from __future__ import annotations

import math

import pytest
import torch
from cases import INTERPRETED
from torch import Tensor

from grpo_kernels import LossConfig, backends
from grpo_kernels.backends.contract import RowGradients, Rows, RowStats, TokenInputs, TokenRecords
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")


def rows_of(logits: Tensor, live: Tensor, temperature: Tensor | float = 1.0, cap: float | None = None) -> Rows:
    """Rows of (B, T or more, V) logits, with a temperature each where a tensor is given; scale 0.75."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    own = temperature if isinstance(temperature, Tensor) else None
    args = LogitArgs(1.0 if own is not None else temperature, 0.75, cap)
    numbers = numbers_vector(args, 1.0, LossConfig(), real, logits.device)
    ids = torch.randint(logits.shape[-1], live.shape, generator=torch.Generator().manual_seed(3))
    return Rows(logits, ids, live, numbers, cap is not None, None if own is None else own.to(real))


def empty_stats(rows: Rows, kind: type = RowStats) -> tuple:
    return kind(*(torch.full(rows.live.shape, 7.0, dtype=rows.numbers.dtype) for _ in kind._fields))


@pytest.mark.parametrize(
    ("dtype", "vocab", "cap"), [(torch.float32, 700, None), (torch.float32, 700, 5.0), (torch.bfloat16, 32769, None)]
)
def test_a_rows_own_temperature(monkeypatch, dtype, vocab, cap):
    """It has the bits of a call with that temperature for all rows: statistics, by one program a row or a span, and the
    gradient of both routes. That of a dead row is not looked at."""
    from grpo_kernels.backends.triton import launch

    triton, spec = backends.get("triton"), objective_spec(LossConfig(), False)
    logits, live = (3 * torch.randn(2, 3, vocab)).to(dtype), torch.ones(2, 3, dtype=torch.bool)
    live[0, 1] = False
    temperatures = torch.tensor([[0.5, math.nan, 1.5], [0.5, 1.0, 1.5]])
    g, one = torch.randn(2, 3), torch.ones(2, 3)

    def computed(temperature: Tensor | float) -> list[Tensor]:
        rows = rows_of(logits, live, temperature, cap)
        stats, shared, fused = (empty_stats(rows) for _ in range(3))
        outs = [torch.full_like(logits, 7.0) for _ in range(2)]
        triton.log_probs(rows, stats)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "programs_wanted", lambda device: 1000)
            triton.log_probs(rows, shared)
        triton.log_probs_backward(rows, stats, RowGradients(g, g), outs[0])
        records = TokenRecords(*torch.zeros(2, 2, 3), torch.zeros(2, 3, dtype=torch.uint8), torch.empty(0))
        inputs = TokenInputs(g, one, None, None, None, None, one)
        triton.fused_loss(rows, inputs, spec, fused, records, outs[1])
        return [*stats, *shared, *fused, *outs]

    found = computed(temperatures)
    for temperature in (0.5, 1.0, 1.5):
        these = live & (temperatures == temperature)
        for tensor, wanted in zip(found, computed(temperature), strict=True):
            assert torch.equal(tensor[these], wanted[these])
    for tensor in found:
        assert (tensor[~live] == 0).all()
