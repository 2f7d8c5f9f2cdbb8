"""The statistics of rows as shards of a vocabulary need them: what says that no column is possible, a stand-in for a
token of another shard, and a gradient from the statistics of a wider row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from grpo_kernels.backends import cpu, ops
from grpo_kernels.backends.contract import RowGradients, Rows, RowStats
from grpo_kernels.backends.spec import LogitArgs, numbers_vector
from grpo_kernels.verification.tolerance import OUTPUT_UNIT, UNIT, C, smallest

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
VOCABS = (9001, 33)
"""Several of the CPU's segments and of the GPUs' tiles, and less than a vector of some."""
CASES = pytest.mark.parametrize(
    ("dtype", "softcap", "vocab"),
    list(itertools.product(DTYPES, (None, 8.0), VOCABS)),
    ids=lambda value: str(value),
)
TEMPERATURE = 0.75
FAR = 90.0
"""Nats above the sampled token from which on no backend's powers are relative to it."""


def ways(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Once, but with each instruction set of a CPU's kernels."""
    for name in cpu.available_instruction_sets() if backend == "cpu" else [None]:
        if name is not None:
            monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", name)
        yield


def rows_of(logits: torch.Tensor, ids: torch.Tensor, softcap: float | None) -> Rows:
    """Rows of (N, V) logits, every one live."""
    arguments = LogitArgs(TEMPERATURE, logit_softcap=softcap)
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    numbers = numbers_vector(arguments, 1.0, None, real, logits.device)
    ids = ids.to(logits.device).view(1, -1)
    live = torch.ones_like(ids, dtype=torch.bool)
    return Rows(logits[None], ids, live, numbers, softcap is not None)


def values_of(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The values of a row's columns in float64, before they are divided by the temperature."""
    return logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)


def bare_rows(dtype: torch.dtype, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with and without a possible column, with and without NaN and +inf, (N, V), and the sampled columns."""
    inf, nan, lowest = math.inf, math.nan, torch.finfo(dtype).min
    places = (0, vocab // 2, vocab - 1)
    with torch.device("cpu"):
        drawn = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(0)).double()
        none, flat = (torch.full((vocab,), number, dtype=torch.float64) for number in (-inf, 0.0))
        half = torch.where(torch.arange(vocab) < vocab // 2, none, drawn)
        late = torch.where(torch.arange(vocab) < vocab - 1, flat - 1e4, flat + 1e4)  # powers before its last column: 0
        made = [(row, place) for row in (none, none.clamp(min=lowest), drawn, half, late) for place in places]
        for row, number, place in itertools.product((none, flat), (nan, inf, 1.0, lowest), places):
            special = row.index_fill(0, torch.tensor(place), number)
            made += [(special, place), (special, places[place == 0])]
        made += [(row.index_fill(0, torch.tensor(3), nan), vocab - 1) for row in (half, late)]
        rows, ids = torch.stack([row for row, _ in made]).to(dtype), torch.tensor([place for _, place in made])
    return rows.to(torch.get_default_device()), ids.to(torch.get_default_device())


@pytest.mark.sample(triton=4, cuda=12)
@CASES
def test_an_anchor_says_that_no_column_is_possible(backend, dtype, vocab, softcap, monkeypatch):
    """It is -inf there and nowhere else: not where one column is NaN, be it the sampled one. The gradient is NaN as
    for a NaN, and 0 where nothing weighs anything."""
    logits, ids = bare_rows(dtype, vocab)
    values = values_of(logits, softcap)
    impossible = (values == -math.inf).all(-1)
    spoiled = (values.isnan() | (values == math.inf)).any(-1)
    assert softcap is not None or (3 <= impossible.sum() < spoiled.sum() < len(logits))
    rows = rows_of(logits, ids, softcap)
    ones = torch.ones(rows.token_ids.shape, dtype=rows.numbers.dtype)
    for _ in ways(backend, monkeypatch):
        stats = ops.log_probs(rows, backend)
        log_prob, entropy, anchor, log_sum = (each[0] for each in stats)
        assert torch.equal(anchor == -math.inf, impossible)
        assert torch.equal(log_sum.isnan(), impossible | spoiled)
        assert torch.equal(entropy.isnan(), impossible | spoiled)
        assert torch.equal(log_prob.isnan(), impossible | spoiled)
        assert anchor[~(impossible | spoiled)].isfinite().all()
        for gradients in (RowGradients(ones, None), RowGradients(None, ones)):
            out = ops.log_probs_backward(rows, stats, gradients, backend)[0]
            assert out[impossible | spoiled].isnan().all()
        assert (ops.log_probs_backward(rows, stats, RowGradients(0 * ones, 0 * ones), backend) == 0).all()


@pytest.mark.sample(triton=4, cuda=12)
@CASES
def test_a_stand_in_for_a_token_of_another_shard(backend, dtype, vocab, softcap, monkeypatch):
    """Column 0 in its place: entropy, anchor and log_sum of the row are right whatever that column holds."""
    lowest = torch.finfo(dtype).min
    firsts = torch.tensor([-math.inf, lowest, -1e4, -200.0, -100.0, -60.0, -10.0, 0.0, 5.0, 60.0, 1e3]).double()
    drawn = 2 * torch.randn(len(firsts), vocab, generator=torch.Generator("cpu").manual_seed(1), device="cpu").double()
    drawn = torch.cat([drawn, drawn + 1000, drawn.masked_fill(drawn < 0, -math.inf)])
    drawn[:, 0] = firsts.repeat(3).cpu()
    logits = drawn.to(dtype).to(torch.get_default_device())
    rows = rows_of(logits, torch.zeros(len(logits), dtype=torch.int64), softcap)
    z = values_of(logits, softcap) / TEMPERATURE
    bound = C * unit_of(rows.numbers.dtype) * scale_of(z, z[:, 0], softcap)
    for _ in ways(backend, monkeypatch):
        _, entropy, anchor, log_sum = (each[0].double() for each in ops.log_probs(rows, backend))
        assert ((entropy - entropy_of(z)).abs() <= bound).all()
        found = anchor / TEMPERATURE + log_sum
        assert ((found - torch.logsumexp(z, -1)).abs() <= bound + 2.0**-50 * found.abs()).all()


def unit_of(real: torch.dtype) -> float:
    return 2.0**-53 * 64 if real == torch.float64 else UNIT


def scale_of(z: torch.Tensor, anchored: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """What a row's errors grow with (``tolerance.py``), (N,): |z - R| and |G|, and the distance of R to the value that
    powers are relative to; columns past FAR weigh nothing."""
    largest = z.amax(-1)
    below = (largest[:, None] - z).clamp(max=FAR).amax(-1)
    scale = 1 + below + (torch.logsumexp(z, -1) - largest) + (largest - anchored).abs().clamp(max=FAR)
    return scale if softcap is None else scale + softcap / TEMPERATURE


def entropy_of(z: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(z, -1)
    return -torch.where(z == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)


def wider(logits: torch.Tensor, softcap: float | None, above: torch.Tensor) -> tuple[RowStats, torch.Tensor]:
    """The statistics, (1, N), of rows with three columns more, the largest so many nats above the others and the
    anchor; and all columns' z, float64."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    local = values_of(logits, softcap)
    anchor = (local.amax(-1) + above * TEMPERATURE).to(real)
    others = anchor.double()[:, None] - torch.arange(3)
    z = torch.cat([local, others], -1) / TEMPERATURE
    log_sum = torch.logsumexp(z - anchor.double()[:, None] / TEMPERATURE, -1)
    stats = RowStats(torch.log_softmax(z, -1)[:, -2], entropy_of(z), anchor, log_sum)
    return RowStats(*(each.to(real)[None] for each in stats)), z


@pytest.mark.sample(triton=4, cuda=12)
@CASES
@pytest.mark.parametrize("bonus", [False, True])
def test_a_gradient_from_the_statistics_of_a_wider_row(backend, dtype, vocab, softcap, bonus, monkeypatch):
    """Of every column but the sampled one, the stand-in: the anchor is from 60 nats below the local values to 1e4 above
    them, where all powers are 0."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(2)
        above = torch.tensor([-60.0, -10.0, 0.0, 10.0, 80.0, 100.0, 1e3, 1e4]).double()
        logits = 2 * torch.randn(len(above), vocab, generator=generator).double()
        logits[:, 5:8] = torch.tensor([-math.inf, torch.finfo(dtype).min, -300.0], dtype=torch.float64)
        slopes = torch.randn(2, 1, len(above), generator=generator) * torch.tensor([1.0, bonus])[:, None, None]
    device = torch.get_default_device()
    logits, above, (g, h) = logits.to(device, dtype), above.to(device), slopes.to(device).double()
    stats, z = wider(logits, softcap, above)
    log_p = torch.log_softmax(z, -1)[:, :-3].clamp(min=-1e300)
    dz = torch.full_like(log_p, 1 / TEMPERATURE)
    if softcap is not None:
        dz *= torch.cosh(logits.double() / softcap) ** -2
    g_of, h_of, entropy = g[0][:, None], h[0][:, None], entropy_of(z)[:, None]
    truth = -log_p.exp() * (g_of + h_of * (log_p + entropy)) * dz
    size = log_p.exp() * (g_of.abs() + h_of.abs() * (log_p.abs() + entropy + 1)) * dz
    real = stats.anchor.dtype
    scale = scale_of(z, stats.anchor[0].double() / TEMPERATURE, softcap)[:, None]
    floor = smallest(dtype) * (1 + g_of.abs() + h_of.abs() * (800 + entropy))
    bound = OUTPUT_UNIT[dtype] * truth.abs() + C * unit_of(real) * scale * size + floor

    column = 2
    rows = rows_of(logits, torch.full((len(logits),), column), softcap)
    counted = torch.arange(vocab, device=device) != column
    for _ in ways(backend, monkeypatch):
        given = RowGradients(g.to(real), h.to(real) if bonus else None)
        found = ops.log_probs_backward(rows, stats, given, backend)[0].double()
        assert ((found - truth).abs() <= bound)[:, counted].all()
        assert (found[-1, counted] == 0).all()
