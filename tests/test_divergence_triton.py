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


def rows_of(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor | float = 1.0,
    cap: float | None = None,
    scale: float = 0.75,
    mix: float = 0.3,
) -> Rows:
    """Rows of (B, T or more, V) logits, with a temperature each where a tensor is given."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    own = temperature if isinstance(temperature, Tensor) else None
    args = LogitArgs(1.0 if own is not None else temperature, scale, cap)
    numbers = numbers_vector(args, 1.0, LossConfig(divergence=Divergence(mix=mix)), real, logits.device)
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


VALUES = [
    pytest.param(kind, layout, marks=[] if i == 0 or kind == "mixed_kl" else pytest.mark.nightly)
    for i, layout in enumerate(LAYOUTS)
    for kind in KINDS
]


@pytest.mark.parametrize(("kind", "layout"), VALUES)
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


def pair(z: list[float], u: list[float], token: int = 0) -> tuple[Rows, Rows]:
    """One row and its teacher's, of scale 1 and mix ½."""
    live = torch.ones(1, 1, dtype=torch.bool)
    both = [rows_of(torch.tensor([[x]]), live, scale=1.0, mix=0.5) for x in (z, u)]
    return tuple(rows._replace(token_ids=torch.full((1, 1), token)) for rows in both)


INF = math.inf
UNIFORM, HALVES = [0.0, 0.0, 0.0], [0.0, 0.0, -INF]
NONE = [math.nan] * 3
HAND = {
    ("forward_kl", True): (0.405465, [-1 / 6, -1 / 6, 1 / 3]),
    ("reverse_kl", True): (INF, NONE),
    ("mixed_kl", True): (INF, NONE),
    ("jsd", True): (0.132304, [-0.050905, -0.050905, 0.101810]),
    ("tvd", True): (1 / 3, [-1 / 9, -1 / 9, 2 / 9]),
    ("forward_kl", False): (INF, [1 / 6, 1 / 6, -1 / 3]),
    ("reverse_kl", False): (0.405465, [0.0, 0.0, 0.0]),
    ("mixed_kl", False): (INF, NONE),
    ("jsd", False): (0.132304, [0.0, 0.0, 0.0]),
    ("tvd", False): (1 / 3, [0.0, 0.0, 0.0]),
}
"""D and its gradient, of the uniform distribution on three columns from one that lacks the third; False: exchanged."""


@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("case", HAND, ids=str)
def test_impossible_columns(case, token):
    """By hand; the log-prob and the entropy have no part, and the token may be the impossible one."""
    kind, of_teacher = case
    rows, teacher = pair(*((UNIFORM, HALVES) if of_teacher else (HALVES, UNIFORM)), token)
    differed = differ(rows, teacher, kind)
    value, gradient = HAND[case]
    torch.testing.assert_close(differed[-1].divergence[0, 0], torch.tensor(value), rtol=2e-6, atol=0)
    found = backward(differed, torch.ones(1, 1))[0, 0]
    torch.testing.assert_close(found, torch.tensor(gradient), rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
def test_a_largest_column_that_the_teacher_lacks(kind):
    """d is infinite at the centre; D, its slope there and the gradient are not."""
    differed = differ(*pair([2.0, 0.5, 0.0, 1.0], [-INF, 0.5, 1.0, 0.0], 1), kind)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    value, gradient = truth(differed[0], differed[2], kind, one, zero, zero)
    torch.testing.assert_close(differed[-1].divergence.double(), value, rtol=2e-6, atol=0)
    torch.testing.assert_close(backward(differed, one).double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_both_lack(kind):
    """Have no part: the rest is what it is without them, and their gradient is 0."""
    live = torch.ones(1, 2, dtype=torch.bool)
    z, u = 2 * torch.randn(2, 1, 2, 40)
    z[..., 32:], u[..., 32:] = -INF, -INF
    given = [rows_of(values, live)._replace(token_ids=torch.tensor([[3, 17]])) for values in (z, u)]
    fewer = [rows._replace(logits=rows.logits[..., :32].contiguous()) for rows in given]
    differed, wanted = differ(*given, kind), differ(*fewer, kind)
    torch.testing.assert_close(differed[-1].divergence, wanted[-1].divergence, rtol=1e-6, atol=0)
    gradient = backward(differed, torch.ones(1, 2))
    torch.testing.assert_close(gradient[..., :32], backward(wanted, torch.ones(1, 2)), rtol=1e-5, atol=1e-8)
    assert (gradient[..., 32:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows(kind):
    """D is 0, and so is the gradient, to the bit: whatever the token, in another dtype too."""
    live, logits = torch.ones(2, 3, dtype=torch.bool), (9 * torch.randn(2, 3, 3000)).bfloat16()
    logits[0, 0, 100:200] = -INF
    logits[0, 1, 5] += 40
    temperature = 0.5 + torch.rand(2, 3)
    differed = differ(*(rows_of(values, live, temperature) for values in (logits, logits.float())), kind)
    assert all((number == 0).all() for number in differed[-1])
    assert (backward(differed, torch.randn(2, 3)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_differ_by_a_constant(kind):
    """D is 0 but for rounding, and never below."""
    live, logits = torch.ones(2, 3, dtype=torch.bool), (3 * torch.randn(2, 3, 3000)).round() / 4
    divergence = differ(rows_of(logits, live), rows_of(logits + 8, live), kind)[-1].divergence
    assert (divergence >= 0).all()
    assert (divergence < 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nothing_can_be_said_of(kind):
    """A NaN, or no possible column, of either row spoils that row alone; not where the divergence has no weight."""
    live, weight, g = torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 7), torch.randn(1, 7)
    z, u = torch.randn(2, 1, 7, 2100)
    z[0, 0, 7], u[0, 1, 2099], z[0, 2], u[0, 3] = math.nan, math.nan, -INF, -INF
    u[0, 4, 8], weight[0, 4], weight[0, 6] = math.nan, 0, 0
    rows, teacher = rows_of(z, live), rows_of(u, live)
    differed = differ(rows, teacher, kind)
    spoiled = torch.tensor([True] * 5 + [False] * 2)
    for number in (differed[-1].divergence, differed[-1].mean):
        assert number[0].isnan().equal(spoiled)
    gradient = backward(differed, weight, g)
    assert gradient[0].isnan().any(-1).equal(spoiled & (weight[0] != 0))
    assert gradient[0, :4].isnan().all()
    alone = torch.empty_like(z)
    backends.get("triton").log_probs_backward(*differed[:2], RowGradients(g, None), alone)
    assert torch.equal(gradient[0, [4, 6]], alone[0, [4, 6]])


CONFIDENT = {"forward_kl": 2.06115e-9, "reverse_kl": 1.48049e-9, "jsd": 4.25135e-10}


@pytest.mark.parametrize("token", [0, 1])
@pytest.mark.parametrize("kind", CONFIDENT)
def test_confident_rows(kind, token):
    """Logits (20, 0, 0, 0) from (20, 1, 0, 0), where differences of fp32 logarithms are 0. Relative to another token
    than the confident one both log-sums have an error of 1e-6, 500 times D."""
    differed = differ(*pair([20.0, 0, 0, 0], [20.0, 1, 0, 0], token), kind)
    assert float(differed[-1].divergence) == pytest.approx(CONFIDENT[kind], rel=5e-6)
    gradient = backward(differed, torch.ones(1, 1))
    exact = truth(*differed[:1], differed[2], kind, *torch.tensor([1.0, 0, 0])[:, None, None])[1].float()
    torch.testing.assert_close(gradient, exact, rtol=2e-5, atol=1e-13)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("kind", ["reverse_kl", "mixed_kl", "jsd", "tvd"])
def test_a_confident_column_among_many(kind, drawn):
    """Its gradient is the small rest of large numbers, whether the centre comes first in its lane or last."""
    z = torch.randn(2, 4200)
    u = z + 0.5 * torch.randn(2, 4200)
    for row, column in enumerate((3, 4190)):
        z[row, column], u[row, column] = 28.0, 27.5
    live = torch.ones(1, 2, dtype=torch.bool)
    ids = torch.tensor([[3, 4190]]) if drawn else torch.tensor([[5, 7]])
    both = [rows_of(values[None], live, scale=1.0)._replace(token_ids=ids) for values in (z, u)]
    zero = torch.zeros(1, 2)
    exact = truth(*both, kind, zero + 1, zero, zero)[1]
    found = backward(differ(*both, kind), zero + 1).double()
    for row, column in enumerate((3, 4190)):
        assert float(found[0, row, column]) == pytest.approx(float(exact[0, row, column]), rel=1e-5)
    assert found.sum(-1).abs().max() < 1e-5 * exact.abs().amax(-1).min()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tvd"])
def test_small_divergences(kind):
    """Of 1e-9 and 1e-6 nats, relative to an unlikely token: log-sums of 30 have an error of 1e-6, beside d of 1e-4."""
    z = 3 * torch.randn(1, 2, 1500)
    u = z + torch.tensor([1e-4, 3e-3])[:, None] * torch.randn(1, 2, 1500)
    z[..., 5], u[..., 5] = -25.0, -25.0
    live, zero = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    both = [rows_of(x, live, scale=1.0)._replace(token_ids=torch.full((1, 2), 5)) for x in (z, u)]
    exact = truth(*both, kind, zero, zero, zero)[0]
    found = differ(*both, kind)[-1].divergence.double()
    torch.testing.assert_close(found, exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row(dtype):
    """Are the same in any batch, on any address, and in place."""
    live, ids = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[5, 70, 2100]])
    z, u = (2 * torch.randn(2, 1, 3, 2101)).to(dtype)
    g, weight = torch.randn(2, 1, 3)

    def computed(logits: Tensor, teacher: Tensor, rows: slice = slice(None)) -> list[Tensor]:
        given = [
            rows_of(values[:, rows], live[:, rows])._replace(token_ids=ids[:, rows]) for values in (logits, teacher)
        ]
        differed = differ(*given, "mixed_kl")
        out = given[0].logits
        backends.get("triton").divergence_backward(*differed, RowGradients(g[:, rows], None), weight[:, rows], out)
        return [*differed[-1], out.clone()]

    def moved(values: Tensor, by: int) -> Tensor:
        return torch.zeros(1, 4, 2200, dtype=dtype)[:, 1:, by : by + 2101].copy_(values)

    whole = computed(z.clone(), u.clone())
    for found in (computed(moved(z, 0), moved(u, 1)), computed(moved(z, 3), moved(u, 8))):
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    alone = computed(z.clone(), u.clone(), slice(2, 3))
    assert all(torch.equal(a, b[:, 2:]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize(
    ("dtype", "vocab", "cap"), [(torch.float32, 700, None), (torch.float32, 700, 5.0), (torch.bfloat16, 32769, None)]
)
def test_a_rows_own_temperature(monkeypatch, dtype, vocab, cap):
    """It has the bits of a call with that temperature for all rows: statistics, by one program a row or a span, and the
    gradient of both routes. That of a dead row is not looked at."""
    from grpo_kernels.backends.triton import launch

    triton, spec = backends.get("triton"), objective_spec(LossConfig(), False)
    logits, live = (3 * torch.randn(1, 3, vocab)).to(dtype), torch.tensor([[True, False, True]])
    temperatures = torch.tensor([[0.5, math.nan, 1.5]])
    g, one = torch.randn(1, 3), torch.ones(1, 3)

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
            *torch.zeros(2, 1, 3), torch.zeros(1, 3, dtype=torch.uint8), torch.empty(0), torch.empty(0)
        )
        inputs = TokenInputs(g, one, None, None, None, None, one)
        triton.fused_loss(rows, inputs, spec, fused, records, outs[1])
        return [*stats, *shared, *fused, *outs]

    found = computed(temperatures)
    for temperature in (0.5, 1.5):
        these = live & (temperatures == temperature)
        for tensor, wanted in zip(found, computed(temperature), strict=True):
            assert torch.equal(tensor[these], wanted[these])
    for tensor in found:
        assert (tensor[~live] == 0).all()
