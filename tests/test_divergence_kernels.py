"""Kernels of divergences over pairs of rows, in every backend that has them: values and gradients beside float64, hand
numbers, rows where digits are easily lost, impossible columns, and the bits of one pass and of two."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels import LossConfig
from grpo_kernels.backends import cpu, ops
from grpo_kernels.backends.contract import DivergenceStats, RowGradients, Rows, RowStats, TokenInputs
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.divergence import KINDS, Divergence
from grpo_kernels.verification.tolerance import OUTPUT_UNIT, UNIT, C, smallest

BACKENDS = ("torch", "cpu")
PAIRED = tuple(name for name in BACKENDS if name != "torch")
"""Those that read a pair of rows once."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIX = 0.3
MIXED = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
)
"""Of the policy and of its teacher."""
INF, NAN = math.inf, math.nan
CONFIG = LossConfig()
SPEC = objective_spec(CONFIG, False)
AS_THEY_ARE = LogitArgs()
NOTHING = RowGradients(None, None)

on_backends = pytest.mark.parametrize("kernels", BACKENDS)
on_pairs = pytest.mark.parametrize("kernels", PAIRED)
of_kinds = pytest.mark.parametrize("kind", KINDS)


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(
    logits: Tensor,
    ids: Tensor | None = None,
    live: Tensor | None = None,
    arguments: LogitArgs = AS_THEY_ARE,
    temperatures: Tensor | None = None,
    grad_scale: float = 1.0,
    real: torch.dtype | None = None,
) -> Rows:
    """Rows of (N, V) or (B, T, V) logits with a config's numbers."""
    logits = logits[None] if logits.dim() == 2 else logits
    shape = logits.shape[:2]
    ids = torch.zeros(shape, dtype=torch.int64) if ids is None else ids.view(shape)
    live = torch.ones(shape, dtype=torch.bool) if live is None else live.view(shape)
    real = real or real_of(logits.dtype)
    config = LossConfig(divergence=Divergence("jsd", mix=MIX))
    numbers = numbers_vector(arguments, grad_scale, config, real, logits.device)
    temperatures = None if temperatures is None else temperatures.to(real).view(shape)
    return Rows(logits, ids, live, numbers, arguments.logit_softcap is not None, temperatures)


class Pass(NamedTuple):
    """What a pair of rows gives."""

    stats: RowStats
    teacher: RowStats
    divergence: DivergenceStats
    gradient: Tensor

    @property
    def value(self) -> Tensor:
        return self.divergence.divergence


def two_passes(
    backend: str,
    rows: Rows,
    teacher: Rows,
    kind: str,
    weight: Tensor | float = 1.0,
    gradients: RowGradients = NOTHING,
) -> Pass:
    """log_probs of both, divergence, divergence_backward."""
    number = list(KINDS).index(kind)
    stats, teacher_stats = ops.log_probs(rows, backend), ops.log_probs(teacher, backend)
    found = ops.divergence(rows, stats, teacher, teacher_stats, number, backend)
    weight = torch.as_tensor(weight, dtype=rows.numbers.dtype).expand(rows.live.shape).contiguous()
    known = (rows, stats, teacher, teacher_stats, number, found, gradients, weight)
    return Pass(stats, teacher_stats, found, ops.divergence_backward(*known, backend))


def inputs_of(rows: Rows, advantages: Tensor | None = None, entropy_weight: float | None = None) -> TokenInputs:
    like = torch.ones(rows.live.shape, dtype=rows.numbers.dtype)
    bonus = None if entropy_weight is None else like * entropy_weight
    if advantages is None:
        return TokenInputs(like, 0 * like, None, None, None, None, bonus)
    return TokenInputs(advantages.to(like.dtype), like, None, None, None, None, bonus)


def one_pass(
    backend: str,
    rows: Rows,
    teacher: Rows,
    kind: str,
    weight: Tensor | float = 1.0,
    inputs: TokenInputs | None = None,
    inplace: bool = False,
) -> Pass:
    """fused_divergence, without a policy term unless ``inputs`` have one."""
    weight = torch.as_tensor(weight, dtype=rows.numbers.dtype).expand(rows.live.shape).contiguous()
    inputs = inputs_of(rows) if inputs is None else inputs
    arguments = (rows, teacher, list(KINDS).index(kind), inputs, weight, SPEC, backend)
    if inplace:
        stats, teacher_stats, found, _ = ops.fused_divergence_(*arguments)
        return Pass(stats, teacher_stats, found, rows.logits)
    stats, teacher_stats, found, _, gradient = ops.fused_divergence(*arguments)
    return Pass(stats, teacher_stats, found, gradient)


def passes(backend: str):
    return (two_passes, one_pass) if backend in PAIRED else (two_passes,)


class Truth(NamedTuple):
    """A divergence in float64, and how far fp32 may be off it in units of ``UNIT``."""

    value: Tensor
    """(..., )"""
    gradient: Tensor
    """(..., V)"""
    value_size: Tensor
    size: Tensor


def z_of(logits: Tensor, arguments: LogitArgs, temperatures: Tensor | None) -> Tensor:
    z = logits.double() * float(arguments.logit_scale)
    if arguments.logit_softcap is not None:
        z = arguments.logit_softcap * torch.tanh(z / arguments.logit_softcap)
    return z / (float(arguments.temperature) if temperatures is None else temperatures.double().view(*z.shape[:-1], 1))


def divergence_of(lp: Tensor, lq: Tensor, kind: str, mix: float) -> Tensor:
    """The definitions, of log-probs."""
    p, q = lp.exp(), lq.exp()

    def kl(weight: Tensor, own: Tensor, other: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * (own - other)).sum(-1)

    if kind == "forward_kl":
        return kl(q, lq, lp)
    if kind == "reverse_kl":
        return kl(p, lp, lq)
    if kind == "mixed_kl":
        return mix * kl(q, lq, lp) + (1 - mix) * kl(p, lp, lq)
    if kind == "jsd":
        m = ((1 - mix) * p + mix * q).log()
        return mix * kl(q, lq, m) + (1 - mix) * kl(p, lp, m)
    if kind == "skew_forward_kl":
        return kl(q, lq, (mix * q + (1 - mix) * p).log())
    if kind == "skew_reverse_kl":
        return kl(p, lp, (mix * p + (1 - mix) * q).log())
    return (p - q).abs().sum(-1) / 2


def truth_of(
    logits: Tensor,
    teacher: Tensor,
    kind: str,
    arguments: LogitArgs = AS_THEY_ARE,
    teacher_arguments: LogitArgs = AS_THEY_ARE,
    temperatures: Tensor | None = None,
) -> Truth:
    """By autograd through log_softmax. Sizes follow from a log-prob's error of 1 + |z - lse| units, and a softcap's."""
    leaf = logits.detach().double().clone().requires_grad_()
    z, u = z_of(leaf, arguments, temperatures), z_of(teacher, teacher_arguments, None)
    z.retain_grad()
    lp, lq = z.log_softmax(-1), u.log_softmax(-1)
    value = divergence_of(lp, lq, kind, MIX)
    value.sum().backward()
    with torch.no_grad():
        p, q, d = lp.exp(), lq.exp(), lp - lq
        of_cap, of_teacher_cap = (z.abs(), u.abs()) if arguments.logit_softcap is not None else (0.0, 0.0)
        ep, eq = 1 + lp.clamp(min=-100).abs() + of_cap, 1 + lq.clamp(min=-100).abs() + of_teacher_cap
        slope = a_of(d, kind)
        curve = 0.0 if kind in ("forward_kl", "tvd") else 1 + 1 / MIX
        mean = (p * slope).sum(-1, keepdim=True)
        wrong = p * (ep * (slope - mean).abs() + curve * (ep + eq))
        if kind in ("forward_kl", "mixed_kl"):
            wrong = wrong + p * ep + q * eq
        if kind == "tvd":  # a sign that rounding may turn
            wrong = wrong + p * (d.abs() < 4e-6 * (ep + eq)) / UNIT
        size = wrong + p * wrong.sum(-1, keepdim=True)
        terms = term_of(p, q, d, kind)
        value_size = (terms * (ep + eq)).sum(-1) + (1.0 if kind == "tvd" else UNIT) * (ep + eq).amax(-1) ** 2
        factor = torch.where(z.grad == 0, 1.0, leaf.grad / z.grad).abs()
    return Truth(value.detach(), leaf.grad, value_size, size * factor)


def a_of(d: Tensor, kind: str) -> Tensor:
    """f'(p/q) without the part that sums to 0 by itself."""
    if kind == "forward_kl":
        return torch.zeros_like(d)
    if kind in ("reverse_kl", "mixed_kl"):
        return d * (1 - MIX if kind == "mixed_kl" else 1)
    if kind == "tvd":
        return d.sign() / 2
    if kind == "jsd":
        return -(1 - MIX) * ((1 - MIX) + MIX * (-d).exp()).log()
    if kind == "skew_forward_kl":
        return -(1 - MIX) / (MIX + (1 - MIX) * d.exp())
    m_over_p = MIX + (1 - MIX) * (-d).exp()
    return -m_over_p.log() - MIX / m_over_p


def term_of(p: Tensor, q: Tensor, d: Tensor, kind: str) -> Tensor:
    """What is added up, as large as any of the KLs' terms."""
    if kind == "tvd":
        return (p - q).abs()
    return p * (torch.expm1(-d) + d) + q * (torch.expm1(d) - d)


def check(found: Pass, truth: Truth, dtype: torch.dtype, weight: float = 1.0) -> None:
    """By the ULP rule: the constant of every other gradient."""
    fp64 = dtype == torch.float64
    unit = 64 * 2.0**-53 if fp64 else UNIT
    off = (found.value.double() - truth.value).abs()
    bound = C * unit * truth.value_size + 1e-15  # the truth's own
    assert (off <= bound).all(), (off / bound).max()
    expected = weight * truth.gradient
    off = (found.gradient.double() - expected).abs()
    bound = OUTPUT_UNIT[dtype] * expected.abs() + C * unit * abs(weight) * truth.size + smallest(dtype)
    assert (off <= bound).all(), (off / bound).max()
    # The rows' sums are 0, each element's rounding aside.
    assert ((found.gradient.double() - expected).sum(-1).abs() <= bound.sum(-1)).all()


def drawn(rows: int, vocab: int, dtype: torch.dtype, apart: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, vocab, generator=g)
    u = z + apart * torch.randn(rows, vocab, generator=g) if apart < 2 else 3 * torch.randn(rows, vocab, generator=g)
    return z.to(dtype), u.to(dtype)


MAPS = {
    "plain": (LogitArgs(), LogitArgs()),
    "temperatures": (LogitArgs(0.7), LogitArgs(1.3, 0.5)),
    "softcaps": (LogitArgs(0.9, 1.0, 5.0), LogitArgs(1.1, 0.8, 7.0)),
}


@of_kinds
@on_backends
def test_the_ulp_rule(kernels, kind):
    for dtype, vocab, (arguments, of_teacher) in itertools.product(DTYPES, (1, 15, 33, 4097), MAPS.values()):
        for apart in (0.1, 3.0):
            z, u = drawn(3, vocab, dtype, apart)
            ids = torch.randint(vocab, (3,))
            truth = truth_of(z, u, kind, arguments, of_teacher)
            for run in passes(kernels):
                found = run(kernels, rows_of(z, ids, None, arguments), rows_of(u, ids, None, of_teacher), kind, -0.5)
                assert found.gradient.dtype == dtype
                check(Pass(*found[:3], found.gradient[0]), truth, dtype, -0.5)


@of_kinds
@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows(kernels, kind, dtype):
    z, u = drawn(2, 151_936, dtype, 0.5)
    truth = truth_of(z, u, kind)
    for run in passes(kernels):
        found = run(kernels, rows_of(z), rows_of(u), kind)
        check(Pass(*found[:3], found.gradient[0]), truth, dtype)


@on_backends
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "mixed_kl", "jsd"])
def test_a_small_divergence_keeps_its_digits(kernels, kind):
    """4.6e-6 and 5e-7 nats over 151,936 columns, where the difference of two log-sums has none left."""
    z = 2 * torch.randn(1, 151_936)
    for apart, off in ((3e-3, 5e-7), (1e-3, 1e-6)):
        u = z + apart * torch.randn(z.shape)
        truth = truth_of(z, u, kind)
        assert truth.value < 5e-6
        for run in passes(kernels):
            found = run(kernels, rows_of(z), rows_of(u), kind)
            assert (found.value.double() / truth.value - 1).abs() < off


@on_backends
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("column", [100, 5000, 151_000])
def test_a_largest_column_far_from_the_others(kernels, kind, column):
    """It says nothing of the mean: 7e-6 nats, of columns that differ by 3e-3 and one that differs by 0.9."""
    z = 0.1 * torch.randn(1, 151_936)
    z[0, column] = z.max() + 0.1
    u = z + 3e-3 * torch.randn(z.shape)
    u[0, column] -= 0.9
    truth = truth_of(z, u, kind)
    assert truth.value < 2e-5
    for run in passes(kernels):
        found = run(kernels, rows_of(z), rows_of(u), kind)
        assert (found.value.double() / truth.value - 1).abs() < 1e-6
        check(Pass(*found[:3], found.gradient[0]), truth, torch.float32)


HAND = {
    "forward_kl": (0.226289, -0.3, 0.173287, (0.25, -0.25, 0)),
    "reverse_kl": (0.311239, -0.430022, 0.173287, (0.259930, -0.216608, -0.043322)),
    "tvd": (0.3, -0.24, 0.25, None),  # rounding has a say in the sign of its third column
}


@on_backends
def test_hand_numbers(kernels):
    """p = (.6, .4), q = (.9, .1), and p = (½, ¼, ¼), q = (¼, ½, ¼)."""
    two = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.9, 0.1]]).log()
    three = torch.tensor([[2.0, 1, 1]]).log(), torch.tensor([[1.0, 2, 1]]).log()
    for kind, (value, first, other, whole) in HAND.items():
        for run in passes(kernels):
            found = run(kernels, rows_of(two[0]), rows_of(two[1]), kind)
            assert found.value.item() == pytest.approx(value, abs=1e-6)
            assert found.gradient.flatten().tolist() == pytest.approx([first, -first], abs=1e-6)
            found = run(kernels, rows_of(three[0]), rows_of(three[1]), kind)
            assert found.value.item() == pytest.approx(other, abs=1e-6)
            assert whole is None or found.gradient.flatten().tolist() == pytest.approx(whole, abs=1e-6)


@on_backends
def test_temperatures_by_hand(kernels):
    """z = (ln 4, 0), u = (ln 9, 0): .036690, .016417 where both are halved, .149697 where z alone is."""
    z, u = torch.tensor([[4.0, 1.0]]).log(), torch.tensor([[9.0, 1.0]]).log()
    for own, others, value, slope in ((1, 1, 0.036690, -0.1), (2, 2, 0.016417, -1 / 24), (2, 1, 0.149697, -0.116667)):
        for run in passes(kernels):
            rows, teacher = rows_of(z, arguments=LogitArgs(own)), rows_of(u, arguments=LogitArgs(others))
            found = run(kernels, rows, teacher, "forward_kl")
            assert found.value.item() == pytest.approx(value, abs=1e-6)
            assert found.gradient[0, 0, 0].item() == pytest.approx(slope, abs=1e-6)


@on_backends
@pytest.mark.parametrize("sampled", [0, 1], ids=["drawn", "not drawn"])
def test_confident_rows(kernels, sampled):
    """What cancels at a column of p = 1 - 1e-8, whether its token was drawn or not."""
    ids = torch.tensor([sampled])
    z, u = torch.tensor([[20.0, 0, 0, 0]]), torch.tensor([[20.0, 1, 0, 0]])
    for kind, value, slope in (
        ("forward_kl", 2.06115e-9, 3.54164e-9),
        ("reverse_kl", 1.48049e-9, 2.06115e-9),
        ("mixed_kl", None, None),
        ("skew_reverse_kl", None, None),
    ):
        truth = truth_of(z, u, kind)
        for run in passes(kernels):
            found = run(kernels, rows_of(z, ids), rows_of(u, ids), kind)
            assert found.value.item() == pytest.approx(truth.value.item(), rel=1e-5)
            assert found.gradient[0, 0, 0].item() == pytest.approx(truth.gradient[0, 0].item(), rel=1e-5)
            if value is not None:
                assert found.value.item() == pytest.approx(value, rel=1e-5)
                assert found.gradient[0, 0, 0].item() == pytest.approx(slope, rel=1e-5)
    z, u = torch.zeros(1, 151_936), torch.zeros(1, 151_936)
    z[0, 7], u[0, 7] = 28.0, 27.5
    for kind in ("forward_kl", "reverse_kl"):
        truth = truth_of(z, u, kind)
        for run in passes(kernels):
            found = run(kernels, rows_of(z, 7 * ids), rows_of(u, 7 * ids), kind)
            assert found.gradient[0, 0, 7].item() == pytest.approx(truth.gradient[0, 7].item(), rel=2e-5)
            assert abs(found.gradient.double().sum()) < 1e-12


@on_backends
@of_kinds
def test_a_confident_column_that_is_not_the_teachers(kernels, kind):
    """Its d less itself is nothing, bit for bit: half an ulp of a d of 10, times p = 1, would be most of the gradient.
    Measured: 3e-5, but for a row of the jsd whose slopes cancel to 1e-9; where the reverse KL's centre was rounded by
    another formula 0.1 and more, 1e-7 of what is a gradient of 1e-9."""
    generator = torch.Generator().manual_seed(5)
    rows = 128
    z = torch.randn(rows, 1000, generator=generator)
    z[:, 7] += 16 + 6 * torch.rand(rows, generator=generator)
    u = z + 0.3 * torch.randn(rows, 1000, generator=generator)
    u[:, 9] = z[:, 7] + 4 * torch.randn(rows, generator=generator)
    u[:, 7] = u[:, 9] - 8 * torch.rand(rows, generator=generator)
    truth = truth_of(z, u, kind).gradient[:, 7]
    for run in passes(kernels):
        gradient = run(kernels, rows_of(z), rows_of(u), kind).gradient[0, :, 7].double()
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=2e-10)


@of_kinds
def test_plain_pytorch_takes_all_of_a_divergence_with_corrected_log_sums(kind):
    """5e-9 nats over 151,936 columns; and a confident row, of whose total variation half was lost."""
    z = 2 * torch.randn(1, 151_936)
    pairs = (z, z + 1e-4 * torch.randn(z.shape)), (torch.tensor([[20.0, 0, 0, 0]]), torch.tensor([[20.0, 1, 0, 0]]))
    for policy, teacher in pairs:
        truth = truth_of(policy, teacher, kind)
        for run in passes("torch"):
            found = run("torch", rows_of(policy), rows_of(teacher), kind)
            assert found.value.item() == pytest.approx(truth.value.item(), rel=1e-6)


@of_kinds
@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_are_exactly_0(kernels, kind, dtype):
    """Value and gradient, also where the teacher's logits are shifted, masked, of another dtype or scale."""
    z = (torch.randint(-40, 41, (3, 5000)) / 8).to(dtype)  # shifts are exact
    masked = z.clone()
    masked[:, 1::7] = -INF
    same = torch.float64 if dtype == torch.float64 else torch.bfloat16
    for policy, teacher, args in (
        (z, z, LogitArgs()),
        (z, z + 2, LogitArgs()),
        (masked, masked + 2, LogitArgs()),
        (z, z.to(same), LogitArgs()),
        (z, z, LogitArgs(0.7, 1.0, 6.0)),
    ):
        for run in passes(kernels):
            found = run(kernels, rows_of(policy, arguments=args), rows_of(teacher, arguments=args), kind)
            assert (found.value == 0).all()
            assert (found.gradient == 0).all()


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impossible_columns(kernels, dtype):
    """A column that is impossible for one of the two: ln 1.5 or +inf, and the gradients that exist."""
    whole, part = torch.zeros(1, 3, dtype=dtype), torch.tensor([[0.0, 0.0, -INF]], dtype=dtype)
    third, near = 1 / 3, 4 * OUTPUT_UNIT[dtype]
    cases = {
        "forward_kl": ((math.log(1.5), (-1 / 6, -1 / 6, third)), (INF, (1 / 6, 1 / 6, -third))),
        "reverse_kl": ((INF, None), (math.log(1.5), (0, 0, 0))),
        "mixed_kl": ((INF, None), (INF, None)),
        "tvd": ((third, (-1 / 9, -1 / 9, 2 / 9)), (third, (0, 0, 0))),
    }
    for kind, both in cases.items():
        for (z, u), (value, gradient) in zip(((whole, part), (part, whole)), both, strict=True):
            for run in passes(kernels):
                found = run(kernels, rows_of(z), rows_of(u), kind)
                assert found.value.item() == pytest.approx(value, abs=1e-6)
                if gradient is None:
                    assert found.gradient.isnan().all()
                else:
                    torch.testing.assert_close(
                        found.gradient.flatten().double(), torch.tensor(gradient).double(), rtol=near, atol=1e-6
                    )
    for kind in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
        for z, u in ((whole, part), (part, whole)):
            z64, u64 = z.double().clamp(min=-1e4), u.double().clamp(min=-1e4)
            truth = truth_of(z64, u64, kind)
            for run in passes(kernels):
                found = run(kernels, rows_of(z), rows_of(u), kind)
                torch.testing.assert_close(found.value[0].double(), truth.value, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(found.gradient[0].double(), truth.gradient, rtol=near, atol=1e-6)


@of_kinds
@on_backends
def test_columns_that_neither_has_change_nothing(kernels, kind):
    """A common mask, of -inf or of the smallest number, gives what the other columns give alone."""
    z, u = drawn(2, 600, torch.float32)
    for number in (-INF, torch.finfo(torch.float32).min):
        z_masked, u_masked = (torch.cat([x[:, :300], torch.full((2, 5000), number), x[:, 300:]], 1) for x in (z, u))
        for run in passes(kernels):
            found, alone = (run(kernels, rows_of(a), rows_of(b), kind) for a, b in ((z_masked, u_masked), (z, u)))
            torch.testing.assert_close(found.value, alone.value, rtol=2e-6, atol=1e-7)
            assert (found.gradient[..., 300:5300] == 0).all()
            kept = torch.cat([found.gradient[..., :300], found.gradient[..., 5300:]], -1)
            torch.testing.assert_close(kept, alone.gradient, rtol=1e-4, atol=1e-7)


@of_kinds
@on_backends
def test_columns_masked_in_front(kernels, kind):
    """A whole segment of 4096 columns or two, before the first that either has: nothing to be relative to."""
    z, u = drawn(2, 900, torch.float32)
    for masked in (4096, 8192):
        z_masked, u_masked = (torch.cat([torch.full((2, masked), -INF), x], 1) for x in (z, u))
        for run in passes(kernels):
            found, alone = (run(kernels, rows_of(a), rows_of(b), kind) for a, b in ((z_masked, u_masked), (z, u)))
            torch.testing.assert_close(found.value, alone.value, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(found.gradient[..., masked:], alone.gradient, rtol=1e-4, atol=1e-7)


@of_kinds
@on_backends
def test_a_late_column_far_above_the_others(kernels, kind):
    """1000 nats above a first segment, whose columns have half of the teacher's mass."""
    z, u = torch.zeros(1, 8192), torch.zeros(1, 8192)
    z[0, 5000] = 1000.0
    truth = truth_of(z, u, kind)
    for run in passes(kernels):
        found = run(kernels, rows_of(z), rows_of(u), kind)
        torch.testing.assert_close(found.value[0].double(), truth.value, rtol=1e-5, atol=0)
        if kind not in ("skew_forward_kl", "jsd"):
            torch.testing.assert_close(found.gradient[0].double(), truth.gradient, rtol=1e-5, atol=1e-9)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_that_the_policy_alone_has_not(kernels, dtype):
    """Of a probability of 0 there, however large the weight: a mask by the smallest number has a d of 3e38; nor by a
    token 120 nats below, where the teacher has no mass."""
    z, u = drawn(1, 64, torch.float32)
    z[0, 9] = 20.0
    z, u = z.to(dtype), u.to(dtype)
    for low, other in ((torch.finfo(dtype).min, 0.0), (-100.0, -INF)):
        z[0, 5], u[0, 5] = low, other
        kept = [j for j in range(64) if j != 5]
        for run in passes(kernels):
            found = run(kernels, rows_of(z, torch.tensor([5])), rows_of(u), "reverse_kl", 1e3)
            alone = z[:, kept].double().log_softmax(-1), u.double().log_softmax(-1)[:, kept]
            value = (alone[0].exp() * (alone[0] - alone[1])).sum(-1)
            expected = 1e3 * alone[0].exp() * (alone[0] - alone[1] - value)
            torch.testing.assert_close(found.value[0].double(), value, rtol=1e-5, atol=0)
            assert found.gradient[0, 0, 5] == 0
            gradient = found.gradient[0, :, kept].double()
            torch.testing.assert_close(gradient, expected, rtol=4 * OUTPUT_UNIT[dtype] + 1e-5, atol=1e-7)


@of_kinds
@on_backends
def test_a_nan_stays_in_its_row(kernels, kind):
    """A NaN in either row, and a row without a possible column; where the divergence weighs nothing, no gradient."""
    z, u = drawn(4, 5000, torch.float32)
    z[0, 4321], u[1, 5], z[2] = NAN, NAN, -INF
    for run in passes(kernels):
        found = run(kernels, rows_of(z), rows_of(u), kind)
        assert found.value[0, :3].isnan().all()
        assert found.gradient[0, :3].isnan().all()
        assert found.value[0, 3].isfinite()
        assert found.gradient[0, 3].isfinite().all()
        alone = run(kernels, rows_of(z[3:]), rows_of(u[3:]), kind)
        assert torch.equal(alone.gradient[0, 0], found.gradient[0, 3])
        weights = torch.tensor([[0.0, 0, 0, 1]])
        found = run(kernels, rows_of(z), rows_of(u), kind, weights)
        assert (found.gradient[0, :3] == 0).all()
        assert torch.equal(alone.gradient[0, 0], found.gradient[0, 3])


@on_backends
def test_dead_rows_are_not_looked_at(kernels):
    """Their outputs are 0, whatever logits, ids, temperatures and weights they have."""
    z, u = drawn(6, 5000, torch.float32)
    live = torch.tensor([True, False, True, False, False, True])
    ids, temperatures = torch.randint(5000, (6,)), torch.full((6,), 0.8)
    expected = [run(kernels, rows_of(z, ids, live, temperatures=temperatures), rows_of(u, ids, live), "jsd") for run in
                passes(kernels)]  # fmt: skip
    z[~live], u[~live], ids[~live], temperatures[~live] = NAN, NAN, -100, NAN
    weights = torch.where(live, 1.0, NAN)[None]
    for run, before in zip(passes(kernels), expected, strict=True):
        rows, teacher = rows_of(z, ids, live, temperatures=temperatures), rows_of(u, ids, live)
        found = run(kernels, rows, teacher, "jsd", weights)
        for now, then in zip((*found[0], *found[1], *found[2]), (*before[0], *before[1], *before[2]), strict=True):
            assert torch.equal(now, then)
            assert (now[0, ~live] == 0).all()
        assert torch.equal(found.gradient, before.gradient)
        assert (found.gradient[0, ~live] == 0).all()


@of_kinds
@on_backends
def test_a_rows_own_temperature(kernels, kind):
    """It gives the bits of the same number for all rows, of log-probs, gradients and divergences."""
    z, u = drawn(3, 5000, torch.float32)
    ids, own, others = torch.randint(5000, (3,)), torch.tensor([0.7, 1.0, 1.6]), torch.tensor([1.2, 0.8, 1.0])
    g, h = torch.randn(1, 3), torch.randn(1, 3)
    for run in passes(kernels):
        kept = (g, h) if run is two_passes else None
        extra = {"gradients": RowGradients(*kept)} if kept else {"inputs": inputs_of(rows_of(z), g, 0.1)}
        found = run(kernels, rows_of(z, ids, temperatures=own), rows_of(u, ids, temperatures=others), kind, **extra)
        for r in range(3):
            one = slice(r, r + 1)
            arguments, of_teacher = LogitArgs(own[r].item()), LogitArgs(others[r].item())
            rows, teacher = rows_of(z[one], ids[one], None, arguments), rows_of(u[one], ids[one], None, of_teacher)
            if kept:
                extra = {"gradients": RowGradients(g[:, one].contiguous(), h[:, one].contiguous())}
            else:
                extra = {"inputs": inputs_of(rows, g[:, one], 0.1)}
            alone = run(kernels, rows, teacher, kind, **extra)
            for mine, whole in zip((*alone[0], *alone[1], *alone[2]), (*found[0], *found[1], *found[2]), strict=True):
                assert torch.equal(mine[0, 0], whole[0, r])
            assert torch.equal(alone.gradient[0, 0], found.gradient[0, r])
    gradients = RowGradients(g, h)
    whole = rows_of(z, ids, temperatures=own)
    stats = ops.log_probs(whole, kernels)
    gradient = ops.log_probs_backward(whole, stats, gradients, kernels)
    for r in range(3):
        row = rows_of(z[r : r + 1], ids[r : r + 1], None, LogitArgs(own[r].item()))
        mine = RowGradients(*(slope[:, r : r + 1].contiguous() for slope in gradients))
        alone = ops.log_probs(row, kernels)
        assert all(torch.equal(a[0, 0], b[0, r]) for a, b in zip(alone, stats, strict=True))
        assert torch.equal(ops.log_probs_backward(row, alone, mine, kernels)[0, 0], gradient[0, r])


@on_backends
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_gradients_add_up(kernels, softcap):
    """log_probs_backward's and the divergence's, for both slopes, in every combination."""
    z, u = drawn(4, 3000, torch.float64)
    arguments = LogitArgs(0.8, 1.0, softcap)
    ids = torch.randint(3000, (4,))
    rows, teacher = rows_of(z, ids, None, arguments), rows_of(u, ids)
    g, h = torch.randn(1, 4).double(), torch.randn(1, 4).double()
    g[0, 1] = h[0, 2] = 0
    stats = ops.log_probs(rows, kernels)
    for kind in KINDS:
        alone = two_passes(kernels, rows, teacher, kind, 0.7).gradient
        for gradients in (RowGradients(g, None), RowGradients(None, h), RowGradients(g, h)):
            both = two_passes(kernels, rows, teacher, kind, 0.7, gradients).gradient
            expected = alone + ops.log_probs_backward(rows, stats, gradients, kernels)
            torch.testing.assert_close(both, expected, rtol=1e-11, atol=1e-14)


@of_kinds
@on_backends
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_a_teacher_of_another_dtype(kernels, kind, dtypes):
    for vocab in (33, 4500):
        z, u = drawn(3, vocab, torch.float32)
        z, u = z.to(dtypes[0]), u.to(dtypes[1])
        truth = truth_of(z, u, kind)
        for run in passes(kernels):
            found = run(kernels, rows_of(z), rows_of(u), kind)
            check(Pass(*found[:3], found.gradient[0]), truth, dtypes[0])


def pairs_of_rows():
    """Every pair of dtypes, four lengths and all maps: (rows, the teacher's, what both maps were made of)."""
    dtypes = [*((dtype, dtype) for dtype in DTYPES), *MIXED]
    for (own, other), vocab, maps in itertools.product(dtypes, (1, 31, 1500, 9001), MAPS.values()):
        z, u = drawn(3, vocab, torch.float32)
        ids = torch.randint(vocab, (3,))
        yield rows_of(z.to(own), ids, None, maps[0]), rows_of(u.to(other), ids, None, maps[1]), maps


@on_pairs
@of_kinds
def test_one_pass_has_the_bits_of_two(kernels, kind):
    """Statistics of both rows and the divergence's; its gradient is two passes' by the ULP rule (above).

    The CPU's reverse KL has no sweep over the teacher by itself: the teacher's statistics, and the shift between both
    rows' anchors with the centre that goes with it, are made of other sums than log_probs makes of it."""
    for rows, teacher, _ in pairs_of_rows():
        one, two = one_pass(kernels, rows, teacher, kind), two_passes(kernels, rows, teacher, kind)
        pairs = list(zip((*one.stats, *one.divergence), (*two.stats, *two.divergence), strict=True))
        if kernels == "cpu" and kind == "reverse_kl":
            own = one.divergence.shift, one.divergence.centre
            pairs = [pair for pair in pairs if not any(pair[0] is tensor for tensor in own)]
        else:
            pairs += zip(one.teacher, two.teacher, strict=True)
        for left, right in pairs:
            assert torch.equal(left, right)


@on_pairs
@of_kinds
def test_statistics_of_one_pass_serve_the_backward_of_two(kernels, kind):
    """By the ULP rule, and the teacher's own are right to 8 units of its logits' size."""
    for rows, teacher, maps in pairs_of_rows():
        one, two = one_pass(kernels, rows, teacher, kind), two_passes(kernels, rows, teacher, kind)
        for found, expected in zip(one.teacher[:2], two.teacher[:2], strict=True):
            unit = torch.finfo(found.dtype).eps * (1 + teacher.logits.abs().amax(-1)).to(found.dtype)
            assert ((found - expected).abs() <= 8 * unit).all()
        known = (rows, one.stats, teacher, one.teacher, list(KINDS).index(kind), one.divergence, NOTHING)
        gradient = ops.divergence_backward(*known, torch.ones_like(one.value), kernels)
        truth = truth_of(rows.logits[0], teacher.logits[0], kind, *maps)
        check(one._replace(gradient=gradient[0]), truth, rows.logits.dtype)


@on_pairs
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_bits_depend_on_the_pair_alone(kernels, kind):
    """Not on other rows, where the rows begin, strides, in place or not, or the number of threads."""
    for dtype, vocab in itertools.product((torch.float32, torch.bfloat16), (1001, 9001)):
        z, u = drawn(12, vocab, dtype)
        ids = torch.randint(vocab, (12,))
        inputs = inputs_of(rows_of(z), torch.randn(1, 12))
        expected = one_pass(kernels, rows_of(z, ids), rows_of(u, ids), kind, 0.5, inputs)

        def same(found: Pass, take=slice(None), expected=expected, vocab=vocab):
            for left, right in zip((*found[0], *found[2]), (*expected[0], *expected[2]), strict=True):
                assert torch.equal(left.flatten(), right[0, take].flatten())
            assert torch.equal(found.gradient.reshape(-1, vocab), expected.gradient[0, take].reshape(-1, vocab))

        for r in (0, 7):
            one = slice(r, r + 1)
            mine = inputs._replace(advantage=inputs.advantage[:, one].clone(), policy_weight=torch.ones(1, 1))
            same(one_pass(kernels, rows_of(z[one], ids[one]), rows_of(u[one], ids[one]), kind, 0.5, mine), one)
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            same(one_pass(kernels, rows_of(z, ids), rows_of(u, ids), kind, 0.5, inputs))
        for shift, stride in ((1, vocab + 3), (3, vocab), (8, 2 * vocab)):
            wide, other = (torch.full((12 * stride + shift,), NAN, dtype=dtype) for _ in range(2))
            placed = wide[shift:].as_strided((12, vocab), (stride, 1)).copy_(z)
            beside = other[shift + 1 :].as_strided((11, vocab), (stride, 1)).copy_(u[:11])
            beside = torch.cat([beside, u[11:]]) if shift == 3 else u
            same(one_pass(kernels, rows_of(placed, ids), rows_of(beside, ids), kind, 0.5, inputs))
            same(one_pass(kernels, rows_of(placed, ids), rows_of(beside, ids), kind, 0.5, inputs, inplace=True))


@on_pairs
@of_kinds
def test_one_pass_beside_a_policy_term(kernels, kind):
    """Its gradient is that of two passes with the term's slopes, times grad_scale; entropy bonus and softcap too."""
    for dtype, softcap, bonus in itertools.product((torch.float64, torch.float32), (None, 6.0), (None, 0.3)):
        z, u = drawn(5, 4500, dtype)
        arguments, ids = LogitArgs(0.9, 1.0, softcap), torch.randint(4500, (5,))
        rows, teacher = rows_of(z, ids, None, arguments, grad_scale=2.0), rows_of(u, ids)
        advantages = torch.randn(1, 5).to(real_of(dtype))
        weight = torch.tensor([[1.0, 0.0, -0.5, 2.0, 1.0]])
        one = one_pass(kernels, rows, teacher, kind, weight, inputs_of(rows, advantages, bonus))
        gradients = RowGradients(-2 * advantages, None if bonus is None else torch.full_like(advantages, -2 * bonus))
        two = two_passes(kernels, rows, teacher, kind, 2 * weight, gradients)
        tolerance = {"rtol": 1e-10, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-7}
        torch.testing.assert_close(one.gradient, two.gradient, **tolerance)


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
@of_kinds
def test_every_instruction_set_obeys_the_rule(name, kind, monkeypatch):
    if name not in cpu.available_instruction_sets():
        pytest.skip(f"this processor does not run {name} (test_bits.py emulates AVX-512)")
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", name)
    for dtype, vocab in itertools.product(DTYPES, (31, 4500)):
        z, u = drawn(2, vocab, dtype)
        truth = truth_of(z, u, kind)
        for run in passes("cpu"):
            found = run("cpu", rows_of(z), rows_of(u), kind)
            check(Pass(*found[:3], found.gradient[0]), truth, dtype)


@on_pairs
def test_a_teacher_in_fp64_is_refused_beside_others(kernels):
    from grpo_kernels import backends

    request = backends.Request(torch.device("cpu"), torch.float32, teacher=torch.float64)
    assert "float64 teacher" in backends.get(kernels).unsupported(request)


@on_pairs
@of_kinds
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_nothing_is_written_behind_a_row(kernels, kind, softcap):
    """In place, where a row's last block is not whole, and other memory follows."""
    for dtype, vocab in itertools.product((torch.float32, torch.bfloat16), (5, 37)):
        z, u = drawn(2, vocab, dtype)
        held = torch.full((1, 2, vocab + 64), 7.0, dtype=dtype)
        held[..., :vocab] = z
        arguments = LogitArgs(logit_softcap=softcap)
        rows, teacher = (rows_of(x, arguments=arguments) for x in (held[..., :vocab], u))
        one_pass(kernels, rows, teacher, kind, inplace=True)
        assert (held[..., vocab:] == 7).all()
