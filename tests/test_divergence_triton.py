"""Triton's kernels of pairs of rows beside float64 autograd, and those of rows with a temperature each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from torch import Tensor

from grpo_kernels import LossConfig, backends
from grpo_kernels.backends.contract import (
    DivergenceStats,
    RowGradients,
    Rows,
    RowStats,
    TokenInputs,
    TokenRecords,
)
from grpo_kernels.backends.spec import NUMBERS, LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.divergence import KINDS, Divergence

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")


def rows_of(logits: Tensor, live: Tensor, temperature: Tensor | float = 1.0, cap: float | None = None) -> Rows:
    """Rows of (B, T or more, V) logits, with a temperature each where a tensor is given; scale 0.75, mix 0.3."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    own = temperature if isinstance(temperature, Tensor) else None
    args = LogitArgs(1.0 if own is not None else temperature, 0.75, cap)
    numbers = numbers_vector(args, 1.0, LossConfig(divergence=Divergence(mix=0.3)), real, logits.device)
    ids = torch.randint(logits.shape[-1], live.shape, generator=torch.Generator().manual_seed(3))
    return Rows(logits, ids, live, numbers, cap is not None, None if own is None else own.to(real))


def empty_stats(rows: Rows, kind: type = RowStats) -> tuple:
    return kind(*(torch.full(rows.live.shape, 7.0, dtype=rows.numbers.dtype) for _ in kind._fields))


def differ(rows: Rows, teacher: Rows, kind: str) -> tuple[Any, ...]:
    """Both rows' statistics and the divergence's, by the kernels: what a backward takes, in its order."""
    triton, stats, others = backends.get("triton"), empty_stats(rows), empty_stats(teacher)
    triton.log_probs(rows, stats)
    triton.log_probs(teacher, others)
    found = empty_stats(rows, DivergenceStats)
    triton.divergence(rows, stats, teacher, others, PLACES[kind], found)
    return rows, stats, teacher, others, PLACES[kind], found


def backward(differed: tuple[Any, ...], weight: Tensor, g: Tensor | None = None, h: Tensor | None = None) -> Tensor:
    out = torch.full_like(differed[0].logits, 7.0)
    backends.get("triton").divergence_backward(*differed, RowGradients(g, h), weight, out)
    return out


def scaled(rows: Rows, logits: Tensor) -> Tensor:
    """float64 logits of the rows' softmax."""
    temperature, scale, cap = rows.numbers[:3].double()
    z = rows.row_view(logits).double() * scale
    z = cap * torch.tanh(z / cap) if rows.softcap else z
    return z / (temperature if rows.temperature is None else rows.temperature.double()[..., None])


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a‖b) of log-probs."""
    possible = a > -math.inf
    difference = torch.where(possible, a, 0.0) - torch.where(possible, b, 0.0)
    return (a.exp() * difference).sum(-1)


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))


EXACT = {
    "forward_kl": lambda p, q, w: kl(q, p),
    "reverse_kl": lambda p, q, w: kl(p, q),
    "mixed_kl": lambda p, q, w: w * kl(q, p) + (1 - w) * kl(p, q),
    "jsd": lambda p, q, w: w * kl(q, mixed(q, p, w)) + (1 - w) * kl(p, mixed(q, p, w)),
    "skew_forward_kl": lambda p, q, w: kl(q, mixed(q, p, w)),
    "skew_reverse_kl": lambda p, q, w: kl(p, mixed(p, q, w)),
    "tvd": lambda p, q, w: (p.exp() - q.exp()).abs().sum(-1) / 2,
}
"""Of log-probs of the policy and the teacher, and mix."""
PLACES = {kind: i for i, kind in enumerate(KINDS)}


def truth(rows: Rows, teacher: Rows, kind: str, weight: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """D, and the gradient of the sum of g·ℓ + h·H + weight·D, by float64 autograd."""
    leaf = rows.logits.detach().double().clone().requires_grad_()
    p = torch.log_softmax(scaled(rows, leaf), -1)
    q = torch.log_softmax(scaled(teacher, teacher.logits), -1)
    value = EXACT[kind](p, q, float(rows.numbers[NUMBERS.index("divergence_mix")]))
    terms = g * p.gather(-1, rows.token_ids[..., None])[..., 0] - h * (p.exp() * p).sum(-1) + weight * value
    (gradient,) = torch.autograd.grad(torch.where(rows.live, terms, 0.0).sum(), leaf)
    return value.detach(), torch.where(rows.live[..., None], rows.row_view(gradient), 0.0)


LAYOUTS = {
    "rows of other dtypes, a temperature each": (torch.float32, torch.bfloat16, 4101, None, None, True),
    "a cap on the policy": (torch.bfloat16, torch.float32, 97, 4.0, None, False),
    "a cap on the teacher": (torch.float16, torch.float16, 1000, None, 5.0, True),
    "fp64": (torch.float64, torch.float64, 1030, 6.0, 5.0, False),
    "fp64 of a teacher in bf16": (torch.float64, torch.bfloat16, 300, None, None, False),
}
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(kind, layout):
    """Beside autograd, in strided rows that begin anywhere; the log-prob's and the entropy's slopes in one sweep."""
    dtype, other, vocab, cap, teacher_cap, own = LAYOUTS[layout]
    live = torch.tensor([[True, False, True], [True, True, True]])
    logits = (2 * torch.randn(2, 4, vocab + 3)).to(dtype)[..., 1 : vocab + 1]
    nearby = (logits[:, :3] + 0.5 * torch.randn(2, 3, vocab)).to(other)
    logits[0, 1], nearby[0, 1] = math.nan, math.nan
    temperature, of_teacher = (torch.where(live, 0.5 + torch.rand(2, 3), math.nan) if own else 1.25 for _ in range(2))
    rows, teacher = rows_of(logits, live, temperature, cap), rows_of(nearby, live, of_teacher, teacher_cap)
    g, h, weight = torch.randn(3, 2, 3, dtype=rows.numbers.dtype)
    weight[1, 0], g[1, 1], h[1, 1] = 0, 0, 0
    differed = differ(rows, teacher, kind)
    value, gradient = truth(rows, teacher, kind, weight, g, h)
    real = 1e-12 if dtype == torch.float64 and other == dtype else 3e-6
    found = differed[-1].divergence
    assert found[live].double().sub(value[live]).abs().max() <= real * value[live].abs().max()
    assert all((number[~live] == 0).all() for number in differed[-1])
    written = rows.row_view(backward(differed, weight, g, h)).double()
    error, size = (written - gradient).abs(), gradient.abs()
    assert (error <= 1.01 * ROUNDING[dtype] * size + real * size.amax(-1, keepdim=True) + 2.0**-24).all()
    assert (written[~live] == 0).all()
    unweighted = rows.row_view(backward(differed, weight))
    alone = truth(rows, teacher, kind, weight, 0 * g, 0 * h)[1]
    assert (unweighted - alone).abs().max() <= (1.01 * ROUNDING[dtype] + 2 * real) * alone.abs().max() + 2.0**-24


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
        records = TokenRecords(
            *torch.zeros(2, 2, 3), torch.zeros(2, 3, dtype=torch.uint8), torch.empty(0), torch.empty(0)
        )
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
