"""The CUDA kernels of pairs of rows: divergences from a teacher, beside float64.

Without a GPU they run over tests/cuda_emulator.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES
from test_cuda import emulated, everywhere
from test_cuda import laid_out as laid_out
from test_cuda import traffic as traffic
from torch import Tensor

from grpo_kernels import Reinforce
from grpo_kernels.backends import Request, cuda
from grpo_kernels.backends.contract import DivergenceStats, RowGradients, Rows, RowStats, TokenInputs, TokenRecords
from grpo_kernels.backends.memory import gradient_like
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.config import LossConfig
from grpo_kernels.objectives.divergence import KINDS, Divergence

KIND_NAMES = list(KINDS)
GRAD_SCALE = 0.5
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def real_of(dtype: torch.dtype) -> torch.dtype:
    return FP64 if dtype == FP64 else FP32


def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b): a column of a = 0 has no part, one of b = 0 alone makes it infinite."""
    return torch.where(a == 0, 0.0, a * (log_a - log_b)).sum(-1)


def exact(kind: str, z: Tensor, u: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """The divergence of softmax(z) from softmax(u) by its definition, and its gradient in z; rows of float64."""
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "mixed_kl":
        (forward, left), (reverse, right) = (exact(name, z, u, mix) for name in ("forward_kl", "reverse_kl"))
        return mix * forward + (1 - mix) * reverse, mix * left + (1 - mix) * right
    if kind == "forward_kl":
        return kl(q, log_q, log_p), p - q
    if kind == "tvd":
        slope = (p - q).sign() / 2
        return (p - q).abs().sum(-1) / 2, p * (slope - (p * slope).sum(-1, keepdim=True))
    weight = {"jsd": mix, "skew_forward_kl": mix, "skew_reverse_kl": 1 - mix, "reverse_kl": 1.0}[kind]  # of q in m
    m = weight * q + (1 - weight) * p
    log_m = log_q if kind == "reverse_kl" else m.log()
    odds = torch.where(p == 0, 0.0, log_p - log_m)
    if kind == "jsd":
        value, slope = mix * kl(q, log_q, log_m) + (1 - mix) * kl(p, log_p, log_m), (1 - mix) * odds
    elif kind == "skew_forward_kl":
        value, slope = kl(q, log_q, log_m), torch.where(m == 0, 0.0, -(1 - mix) * q / m)
    elif kind == "skew_reverse_kl":
        value, slope = kl(p, log_p, log_m), torch.where(m == 0, 0.0, odds - mix * p / m)
    else:
        value, slope = kl(p, log_p, log_m), odds
    return value, torch.where(p == 0, 0.0, p * (slope - torch.where(p == 0, 0.0, p * slope).sum(-1, keepdim=True)))


@dataclass
class Pair:
    """Rows and their teacher's, (1, N, V), whose first rows begin anywhere."""

    logits: Tensor
    teacher: Tensor
    ids: Tensor
    live: Tensor
    kind: str = "reverse_kl"
    mix: float = 0.375
    transform: LogitArgs = LogitArgs(1.25, 0.75)
    teacher_transform: LogitArgs = LogitArgs(0.8)
    temperature: Tensor | None = None
    teacher_temperature: Tensor | None = None

    def __post_init__(self) -> None:
        generator = seeded(7)
        real = real_of(self.logits.dtype)
        self.slopes = [torch.randn(self.ids.shape, generator=generator, dtype=real) for _ in range(2)]
        self.weight = torch.rand(self.ids.shape, generator=generator, dtype=real) + 0.5
        self.stats, self.teacher_stats, self.found = (
            kind(*(self.empty() for _ in range(4))) for kind in (RowStats, RowStats, DivergenceStats)
        )

    def empty(self) -> Tensor:
        return torch.full(self.ids.shape, 7.0, dtype=real_of(self.logits.dtype))

    def rows(self) -> tuple[Rows, Rows]:
        real, device = real_of(self.logits.dtype), self.logits.device
        config = LossConfig(Reinforce(), divergence=Divergence(self.kind, mix=self.mix))
        numbers = numbers_vector(self.transform, GRAD_SCALE, config, real, device)
        theirs = numbers_vector(self.teacher_transform, 1.0, None, real, device)
        caps = [transform.logit_softcap is not None for transform in (self.transform, self.teacher_transform)]
        return (
            Rows(self.logits, self.ids, self.live, numbers, caps[0], self.temperature),
            Rows(self.teacher, self.ids, self.live, theirs, caps[1], self.teacher_temperature),
        )

    def two_passes(self, out: Tensor | None = None) -> Tensor:
        """Statistics, then the divergence; the gradient of slopes in log-probs, entropies and divergences."""
        rows, teacher = self.rows()
        kind = KIND_NAMES.index(self.kind)
        cuda.log_probs(rows, self.stats)
        cuda.log_probs(teacher, self.teacher_stats)
        known = rows, self.stats, teacher, self.teacher_stats, kind
        cuda.divergence(*known, self.found)
        out = gradient_like(self.logits).fill_(7) if out is None else out
        cuda.divergence_backward(*known, self.found, RowGradients(*self.slopes), self.weight, out)
        return out

    def one_pass(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient, and the slopes in log-probs, of a loss without a ratio: -A·log_prob - H·weight + weight·D."""
        rows, teacher = self.rows()
        config = LossConfig(Reinforce(), divergence=Divergence(self.kind, mix=self.mix))
        kind, spec = KIND_NAMES.index(self.kind), objective_spec(config, False)
        none = self.empty()[:0]
        records = TokenRecords(self.empty(), self.empty(), self.empty().byte(), none, none)
        advantage, policy_weight = self.slopes[0], self.slopes[1].abs()
        inputs = TokenInputs(advantage, policy_weight, None, None, None, None, self.weight)
        out = gradient_like(self.logits).fill_(7) if out is None else out
        known = rows, teacher, kind, inputs, self.weight, spec
        cuda.fused_divergence(*known, self.stats, self.teacher_stats, self.found, records, out)
        return out, -policy_weight * advantage

    def values(self, logits: Tensor, transform: LogitArgs, temperature: Tensor | None) -> Tensor:
        """z of live rows, float64."""
        x = logits[self.live].double() * transform.logit_scale
        if (cap := transform.logit_softcap) is not None:
            x = cap * torch.tanh(x / cap)
        return x / (transform.temperature if temperature is None else temperature[self.live].double()[:, None])

    def truth(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """D of live rows, and the gradients of log-prob, entropy and D in the logits, (N, V) each, or NaN."""
        z = self.values(self.logits, self.transform, self.temperature)
        u = self.values(self.teacher, self.teacher_transform, self.teacher_temperature)
        value, in_z = exact(self.kind, z, u, self.mix)
        if self.kind != "forward_kl":
            in_z = torch.where(value[:, None] == math.inf, math.nan, in_z)
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1, keepdim=True)
        one = torch.zeros_like(p).scatter_(-1, self.ids[self.live][:, None], 1.0)
        in_h = -torch.where(p == 0, 0.0, p * (torch.where(p == 0, 0.0, log_p) + entropy))
        chain = torch.ones_like(z) * self.transform.logit_scale
        if (cap := self.transform.logit_softcap) is not None:
            x = self.logits[self.live].double() * self.transform.logit_scale
            chain = chain * (1 - torch.tanh(x / cap) ** 2)
        own = self.temperature
        chain = chain / (self.transform.temperature if own is None else own[self.live].double()[:, None])
        return value, (one - p) * chain, in_h * chain, in_z * chain


def placed(values: Tensor, dtype: torch.dtype, skew: int, stride: int = 0) -> Tensor:
    """(1, N, V) of these values, the first row ``skew`` elements past 16 bytes, rows ``stride`` apart."""
    count, vocab = values.shape
    stride = stride or vocab
    storage = torch.full((count * stride + skew + 64,), math.nan, dtype=dtype)
    at = -(storage.data_ptr() // dtype.itemsize) % (16 // dtype.itemsize) + skew
    return storage.as_strided((1, count, vocab), (0, stride, 1), at).copy_(values[None])


def pair(vocab: int, dtype: torch.dtype, count: int = 6, skews=(0, 0), **options) -> Pair:
    """Random rows: the second is dead and NaN, the third almost its teacher's, the fourth confident in one column, the
    fifth impossible in the same columns as its teacher's."""
    generator = seeded(vocab + count)
    x, y = (2 * torch.randn(count, vocab, generator=generator) for _ in range(2))
    ids = torch.randint(vocab, (1, count), generator=generator)
    live = torch.ones(1, count, dtype=torch.bool)
    if count > 4:
        x[1] = y[1] = math.nan
        live[0, 1] = False
        y[2] = x[2] + 1e-2 * y[2]
        x[3, vocab // 3] = y[3, vocab // 3] = 25.0
        x[4, vocab // 2 :] = y[4, vocab // 2 :] = -math.inf
        ids[0, 4] = 0
    stride = vocab + (skews[0] & -skews[0] if skews[0] else -vocab % 8)
    return Pair(placed(x, dtype, skews[0], stride), placed(y, dtype, skews[1]), ids, live, **options)


def check_divergences(p: Pair) -> None:
    """D beside float64; statistics of dead rows are 0. The total variation alone has the rounding of the rows' log-sums
    at first order."""
    value, *_ = p.truth()
    for tensor in (*p.stats, *p.teacher_stats, *p.found):
        assert (tensor[~p.live] == 0).all()
    relative, absolute = (1e-10, 1e-14) if p.logits.dtype == FP64 else (2e-5, 2e-6 if p.kind == "tvd" else 1e-9)
    found = p.found.divergence[p.live].double()
    torch.testing.assert_close(found, value, rtol=relative, atol=absolute, equal_nan=True)


def check_gradient(p: Pair, out: Tensor, g: Tensor, h: Tensor, weight: Tensor) -> None:
    """Beside one rounding, by the row's largest gradient and its slopes; NaN where it is, and zeros of dead rows."""
    _, *parts = p.truth()
    live = p.live
    slopes = [slope[live].double()[:, None] for slope in (g, h, weight)]
    wanted = sum(torch.where(slope == 0, 0.0, slope * part) for slope, part in zip(slopes, parts, strict=True))
    found = out[live].double()
    assert torch.equal(found.isnan(), wanted.isnan())
    wanted, found = wanted.nan_to_num(), found.nan_to_num()
    dtype = out.dtype
    rounding = 0.0 if dtype in (FP32, FP64) else torch.finfo(dtype).eps / 2
    size = 5 * wanted.abs().amax(-1, keepdim=True) + sum(slope.abs() for slope in slopes)
    allowed = rounding * wanted.abs() + (1e-10 if dtype == FP64 else 2e-6) * size
    allowed = allowed + (2.0**-24 if dtype == torch.float16 else 1e-30)
    assert ((found - wanted).abs() <= 1.01 * allowed).all(), float(((found - wanted).abs() / allowed).max())
    assert (out[~live] == 0).all()


def check(p: Pair) -> None:
    """Two passes and one, out of place and in place: values and gradients are right, and bits equal."""
    before = p.logits.clone()
    out = p.two_passes()
    check_divergences(p)
    check_gradient(p, out, *p.slopes, p.weight)
    two = [tensor.clone() for tensor in (*p.stats, *p.teacher_stats, *p.found)]
    out, g = p.one_pass()
    one = [*p.stats, *p.teacher_stats, *p.found]
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(two, one, strict=True))
    check_gradient(p, out, GRAD_SCALE * g, -GRAD_SCALE * p.weight, GRAD_SCALE * p.weight)
    again, _ = p.one_pass(p.logits)
    assert torch.equal(again.nan_to_num(9), out.nan_to_num(9))
    p.logits.copy_(before)
    expected = p.two_passes()
    assert torch.equal(p.two_passes(p.logits).nan_to_num(9), expected.nan_to_num(9))
    p.logits.copy_(before)


def filled(columns: Tensor, value: float, *where: int) -> Tensor:
    return columns.index_fill(0, torch.tensor(where), value)


@everywhere
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_infinities(laid_out, kind):
    """Columns that are impossible for one, the other or both; a largest one that the teacher excludes; rows without a
    column, with a NaN, with the least finite number; each its own row alone."""
    laid_out(2, 2, 1)
    plain = torch.linspace(-2, 2, 300)
    least = torch.finfo(BF16).min
    rows = [
        (plain, filled(plain.flip(0), -math.inf, 7)),
        (filled(plain, -math.inf, 9), plain.flip(0)),
        (filled(plain, -math.inf, 9, 299), filled(plain.flip(0), -math.inf, 9, 299)),
        (plain, filled(plain, -math.inf, 299)),
        (plain, plain),
        (torch.full((300,), -math.inf), plain),
        (plain, torch.full((300,), -math.inf)),
        (plain, filled(plain, math.nan, 200)),
        (filled(plain, least, 3, 4), filled(plain, least, 4)),
        (plain - 1000, plain.flip(0) + 900),
        (plain * 40, plain.flip(0) * 50),
    ]
    x, y = (torch.stack(side) for side in zip(*rows, strict=True))
    ids, live = torch.full((1, len(rows)), 150), torch.ones(1, len(rows), dtype=torch.bool)
    same = LogitArgs(1.25), LogitArgs(1.25)
    p = Pair(placed(x, FP32, 0), placed(y, FP32, 0), ids, live, kind, 0.375, *same)
    out, value = p.two_passes(), p.found.divergence[0]
    two = [*(tensor.clone() for tensor in (*p.stats, *p.teacher_stats, *p.found)), out]
    wanted, *_ = p.truth()
    spoilt = torch.zeros(len(rows), dtype=torch.bool)
    spoilt[5:8] = True
    infinite = {"reverse_kl": (0, 3), "forward_kl": (1,), "mixed_kl": (0, 1, 3)}.get(kind, ())
    assert all(tensor[0, spoilt].isnan().all() for tensor in p.found)
    assert not value[~spoilt].isnan().any()
    assert [i for i, d in enumerate(value.tolist()) if d == math.inf] == list(infinite)
    assert value[4] == 0
    fine = ~spoilt & (value < math.inf)
    torch.testing.assert_close(value[fine].double(), wanted[fine], rtol=3e-6, atol=3e-7)
    without = spoilt.clone()
    without[list(infinite) if kind != "forward_kl" else []] = True
    assert out[0].isnan().all(-1).tolist() == out[0].isnan().any(-1).tolist() == without.tolist()
    kept = Pair(p.logits, p.teacher, p.ids, ~without[None], kind, 0.375, *same)
    kept.slopes, kept.weight = p.slopes, p.weight
    check_gradient(kept, torch.where(without[:, None], 0.0, out), *p.slopes, p.weight)
    equal, _ = p.one_pass()
    one = [*p.stats, *p.teacher_stats, *p.found]
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(two[:-1], one, strict=True))
    assert equal[0].isnan().all(-1).tolist() == equal[0].isnan().any(-1).tolist() == without.tolist()


@everywhere
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_equal_rows(laid_out, kind):
    """No divergence and no gradient, to the last bit."""
    laid_out(4, 1, 6)
    p = pair(5001, BF16, kind=kind, transform=LogitArgs(0.7), teacher_transform=LogitArgs(0.7))
    p.teacher.copy_(p.logits)
    rows, teacher = p.rows()
    p.two_passes()
    assert (p.found.divergence == 0).all()
    out = gradient_like(p.logits)
    known = rows, p.stats, teacher, p.teacher_stats, KIND_NAMES.index(kind), p.found
    cuda.divergence_backward(*known, RowGradients(None, None), p.weight, out)
    assert (out == 0).all()


@everywhere
def test_a_small_divergence_keeps_its_digits():
    """Of 151,936 columns that are a thousandth of a nat apart; log-sums alone would lose half of them."""
    generator = seeded(3)
    x = 2 * torch.randn(2, 151_936, generator=generator)
    y = x + 1e-3 * torch.randn(2, 151_936, generator=generator)
    ids, live = torch.tensor([[5, 70_000]]), torch.ones(1, 2, dtype=torch.bool)
    for kind in ("forward_kl", "jsd"):
        p = Pair(placed(x, FP32, 0), placed(y, FP32, 0), ids, live, kind, 0.5, LogitArgs(), LogitArgs())
        p.one_pass()
        wanted, *_ = p.truth()
        assert (wanted < 1e-6).all()
        assert ((p.found.divergence[0].double() - wanted) / wanted).abs().max() < 2e-5


def by_itself(x: Tensor, y: Tensor, ids: list[int], kind: str) -> tuple[Pair, Tensor]:
    """Rows of fp32, of which the divergence alone has a weight; and their gradient by two passes."""
    live = torch.ones(1, len(x), dtype=torch.bool)
    sides = placed(x, FP32, 0), placed(y, FP32, 0)
    p = Pair(*sides, torch.tensor([ids]), live, kind, 0.375, LogitArgs(), LogitArgs())
    p.slopes = [torch.zeros(live.shape), torch.zeros(live.shape)]
    p.weight = torch.ones(live.shape)
    return p, p.two_passes()


@everywhere
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "not drawn"])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_confident_column_keeps_its_digits(laid_out, kind, drawn):
    """D and its gradient are small rests of large numbers, which the column has of the others: relative to another
    token the log-sums, of 28 nats, have an error of 1e-6. In either block of a cluster, in one pass and in two."""
    laid_out(2, 2, 6)
    generator = seeded(5)
    x = torch.randn(2, 4200, generator=generator)
    y = x + 0.5 * torch.randn(2, 4200, generator=generator)
    for row, column in enumerate(columns := [3, 4190]):
        x[row, column], y[row, column] = 28.0, 27.5
    p, out = by_itself(x, y, columns if drawn else [5, 7], kind)
    value, *_, wanted = p.truth()
    torch.testing.assert_close(p.found.divergence[0].double(), value, rtol=4e-6, atol=0)
    found, largest = out[0].double(), wanted.abs().amax(-1, keepdim=True)
    assert ((found - wanted).abs() <= 4e-6 * largest).all()
    assert (found.sum(-1, keepdim=True).abs() <= 4e-6 * largest).all()
    two = [tensor.clone() for tensor in p.found]
    p.one_pass()
    assert all(torch.equal(a, b) for a, b in zip(two, p.found, strict=True))


BY_HAND = {
    ("few", "forward_kl"): (2.06115e-9, 3.54164e-9),
    ("few", "reverse_kl"): (1.48049e-9, 2.06115e-9),
    ("many", "forward_kl"): (1.84516e-8, 6.81507e-8),
    ("many", "reverse_kl"): (1.562375e-8, 5.25270e-8),
}
"""D, and its gradient in the first column: of logits (20, 0, 0, 0) from (20, 1, 0, 0), and of 28 beside 151,935 zeros
from 27.5 beside them."""


@everywhere
@pytest.mark.parametrize("token", [0, 1], ids=["drawn", "not drawn"])
@pytest.mark.parametrize("case", BY_HAND, ids=" ".join)
def test_confident_rows(case, token):
    """By hand; the difference of two log-probs of fp32 is 0 in that column."""
    columns, kind = case
    x, y = torch.zeros(2, 1, 4 if columns == "few" else 151_936)
    x[0, 0], y[0, 0] = (20.0, 20.0) if columns == "few" else (28.0, 27.5)
    y[0, 1] = 1.0 if columns == "few" else 0.0
    value, slope = BY_HAND[case]
    p, out = by_itself(x, y, [token], kind)
    assert float(p.found.divergence) == pytest.approx(value, rel=1e-5)
    assert float(out[0, 0, 0]) == pytest.approx(slope, rel=1e-5)
    p.one_pass()
    assert float(p.found.divergence) == pytest.approx(value, rel=1e-5)


@everywhere
@pytest.mark.parametrize("kind", [kind for kind in KIND_NAMES if kind != "tvd"])
def test_an_error_of_the_log_sums_is_taken_out(laid_out, kind):
    """Of D of 1e-9 and 1e-6 nats, relative to an unlikely token: log-sums of 30 are off by 1e-6, beside d of 1e-4."""
    laid_out(2, 2, 6)
    generator = seeded(3)
    x = 3 * torch.randn(2, 1500, generator=generator)
    y = x + torch.tensor([[1e-4], [3e-3]]) * torch.randn(2, 1500, generator=generator)
    x[:, 5] = y[:, 5] = -25.0
    p, _ = by_itself(x, y, [5, 5], kind)
    value, *_ = p.truth()
    torch.testing.assert_close(p.found.divergence[0].double(), value, rtol=4e-6, atol=0)


@everywhere
def test_rows_of_no_weight(laid_out):
    """Where D weighs nothing its row gets the gradient of log-probs alone, whatever D is; without any slope, zeros."""
    laid_out(2, 2, 6)
    p = pair(1001, FP32)
    p.teacher[0, 0, 3] = math.nan
    p.weight[0, 0] = p.weight[0, 2] = 0
    p.slopes[0][0, 2] = p.slopes[1][0, 2] = 0
    out = p.two_passes()
    rows, _ = p.rows()
    alone = gradient_like(p.logits)
    cuda.log_probs_backward(rows, p.stats, RowGradients(*p.slopes), alone)
    assert torch.equal(out[0, 0], alone[0, 0])
    assert (out[0, 2] == 0).all()
    assert not out.isnan().any()


@everywhere
@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergences(laid_out, dtype, kind):
    laid_out(2, 2, 6)
    check(pair(3001, dtype, kind=kind))


@everywhere
@pytest.mark.parametrize(("cluster", "tiles"), [(1, 1), (1, 2), (1, 6), (2, 3), (4, 1), (8, 2)])
@pytest.mark.parametrize("kind", ["reverse_kl", "mixed_kl"])
def test_layouts(laid_out, kind, cluster, tiles):
    """Pairs that fit the ring once, or twice, or many times; blocks without columns."""
    laid_out(cluster, 2, tiles)
    check(pair(min(9001, 4096 * cluster * tiles - 5), FP32, count=9, kind=kind))


@everywhere
@pytest.mark.parametrize("vocab", [1, 3, 8, 97])
def test_few_columns(laid_out, vocab):
    laid_out(8, tiles=6)  # of both rows
    p = pair(vocab, BF16, count=4, kind="jsd")
    check(p)
    if vocab == 1:
        assert (p.found.divergence == 0).all()


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "skew_forward_kl"])
def test_alignment_changes_no_bit(laid_out, dtype, kind):
    """A row and its teacher's begin at each possible distance from 16 bytes, each by itself."""
    laid_out(2, 2, 3)
    width, found = 16 // dtype.itemsize, []
    for skew in range(width):
        p = pair(9001, dtype, 5, (skew, 3 * skew % width), kind=kind)
        out = p.two_passes()
        fused, _ = p.one_pass()
        found.append([*p.stats, *p.teacher_stats, *p.found, out.contiguous(), fused.contiguous()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@everywhere
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_softcaps_and_temperatures_of_rows(laid_out, kind):
    """Either row has a softcap, or both; each has temperatures of its own, NaN where a row is dead."""
    laid_out(2, 2, 6)
    temperature = torch.tensor([[0.5, math.nan, 1.5, 1.0, 0.8, 2.0]])
    caps = [(5.0, None), (None, 4.0), (6.0, 6.0)]
    for i, (cap, teacher_cap) in enumerate(caps):
        own = [LogitArgs(1.0, 1.5, cap), LogitArgs(1.0, 0.75, teacher_cap)]
        p = pair(1001, BF16 if i else FP32, kind=kind, transform=own[0], teacher_transform=own[1])
        p.temperature, p.teacher_temperature = temperature, temperature.flip(-1) if i == 1 else None
        if i == 1:
            p.live[0, 4] = False
        check(p)


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_read_of_each_and_one_write(traffic, laid_out, dtype):
    """Three units of traffic in one pass; dead rows are written alone."""
    laid_out(2, 2, 6)
    p = pair(16_000, dtype)
    row = 16_000 * dtype.itemsize
    traffic()
    p.one_pass()
    assert traffic() == (2 * 5 * row, 6 * row)
    p.two_passes()
    assert traffic() == ((2 + 2 + 2) * 5 * row, 6 * row)


@emulated
def test_schedules_change_no_bit(laid_out):
    """Eight orders of threads, copies and messages, one pair and two in the ring."""
    found = []
    for seed in range(8):
        laid_out(2, 2, (2, 5)[seed % 2])
        cuda.library().grpo_emulator_seed(ctypes.c_uint64(seed))
        p = pair(17_001, BF16, 9, kind="mixed_kl")
        out = p.two_passes()
        fused, _ = p.one_pass()
        found.append([*p.stats, *p.teacher_stats, *p.found, out, fused])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@everywhere
def test_pairs_in_the_layout_of_the_device():
    """A real vocabulary, as it is laid out; fp32 at 262,144 fits no cluster of eight and takes two passes."""
    check_two = pair(32_000, BF16, 3)
    out = check_two.two_passes()
    check_divergences(check_two)
    check_gradient(check_two, out, *check_two.slopes, check_two.weight)
    out, g = check_two.one_pass()
    check_divergences(check_two)
    check_gradient(check_two, out, GRAD_SCALE * g, -GRAD_SCALE * check_two.weight, GRAD_SCALE * check_two.weight)


@emulated
def test_what_is_refused():
    where = torch.device("cpu")
    teacher = Request(where, BF16, 32_000, teacher=FP32, by_name=True)
    assert cuda.unsupported(teacher) == (
        "a teacher's logits must be torch.bfloat16 as the policy's are, not torch.float32: cast them"
    )
    long = Request(where, FP32, 262_144, fused=True, teacher=FP32, by_name=True)
    assert cuda.unsupported(long) == "two rows of 262144 columns do not fit into the shared memory of a cluster"
    assert cuda.unsupported(Request(where, FP32, 262_144, teacher=FP32, by_name=True)) is None
    p = pair(97, FP32)
    p.teacher = p.teacher.double()
    with pytest.raises(ValueError, match=r"97 columns of torch.float32; got 97 columns of torch.float64\. Cast them"):
        p.one_pass()


@emulated
def test_pairs_that_fit_no_cluster_are_read_twice(laid_out):
    """Both rows pass through a ring that holds a part of them."""
    p = pair(262_144, FP32, 2)
    out = p.two_passes()
    check_divergences(p)
    check_gradient(p, out, *p.slopes, p.weight)
