"""The CUDA kernels beyond what every backend is tested for: layouts, traffic, schedules, what compilers make of them.

Without a GPU they run over tests/cuda_emulator.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest
import torch
from cases import DTYPES, make
from conftest import DEVICE
from gpu_library import setup
from test_loss import check
from test_numerics import assert_rule

from grpo_kernels import backends, grpo_loss, token_log_probs
from grpo_kernels.backends import cuda, native
from grpo_kernels.backends.contract import RowGradients, Rows, RowStats, TokenInputs, TokenRecords
from grpo_kernels.backends.memory import gradient_like
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.config import LossConfig
from grpo_kernels.verification.verify import complete

ROOT = Path(__file__).resolve().parent.parent
BUILT = native.FOLDER / "libgrpo_cuda.so"
RING_OFFSET = 11264
"""Bytes of shared memory before the ring, sizeof(Shared) of layout.h, over the emulator, whose barriers are larger."""
H200 = {"major": 9, "minor": 0, "shared_bytes": 232448}


REASON = cuda.unsupported(backends.Request(torch.device(DEVICE), by_name=True))
served = pytest.mark.skipif(REASON is not None, reason=f"not served: {REASON}")
emulated = pytest.mark.skipif(REASON is not None or not cuda.emulated(), reason="looks into the emulator")


def everywhere(test):
    """On a GPU too."""
    return pytest.mark.gpu(served(test))


@pytest.fixture
def laid_out(monkeypatch):
    """Calls run with ``laid_out(cluster, clusters, tiles)`` instead of the device's own plan."""

    def use(cluster: int, clusters: int = 3, tiles: int = 13) -> None:
        if cuda.device(0).shared_bytes < RING_OFFSET + 16_400 * tiles:
            pytest.skip("the device has less shared memory")
        monkeypatch.setattr(cuda, "plan", lambda *_: cuda.Plan(cluster, clusters, tiles))

    return use


@pytest.fixture
def traffic():
    """Bytes that bulk copies read and wrote since the last time, as ``traffic()``."""
    library = cuda.library()
    functions = [getattr(library, f"grpo_emulator_bytes_{kind}") for kind in ("loaded", "stored")]
    for function in functions:
        function.restype = ctypes.c_int64

    def moved() -> tuple[int, int]:
        return functions[0](), functions[1]()

    moved()
    return moved


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [512, 32000, 151936])
def test_one_read_one_write(traffic, dtype, vocab):
    """Loss and gradient: each live row is read once, each row written once, in place too; dead rows are not read."""
    case = make(batch=1, length=4, vocab=vocab, dtype=dtype, extra_row=False, empty=False)
    case.mask[:] = torch.tensor([True, False, True, True])
    row = vocab * case.logits.element_size()
    leaf = case.logits.requires_grad_()
    out = token_log_probs(leaf, case.token_ids, case.mask, backend="cuda")
    assert traffic() == (3 * row, 0)
    out.log_probs.sum().backward()
    assert traffic() == (3 * row, 4 * row)
    for inplace in (False, True):
        logits = case.logits.detach().clone().requires_grad_()
        given = logits * 1 if inplace else logits
        loss = grpo_loss(given, *case.arguments, **case.options, inplace=inplace, grad_scale=1.0, backend="cuda").loss
        assert traffic() == (3 * row, 4 * row)
        loss.backward()
        assert traffic() == (0, 0)


@emulated
def test_rows_without_slope(traffic):
    """A clipped row and one of A = 0 are read once and get zeros; in the backward of log-probs they are not read."""
    case = make(batch=1, length=3, vocab=40000, extra_row=False, empty=False, ref_log_probs=None)
    case.mask[:] = True
    exact = token_log_probs(case.logits, case.token_ids, backend="torch").log_probs
    old, row = exact - torch.tensor([[1.0, 0.0, 0.0]]), 4 * 40000
    advantages = torch.tensor([[1.0, 0.0, 1.0]])
    leaf = case.logits.clone().requires_grad_()
    out = grpo_loss(leaf, case.token_ids, advantages, old_log_probs=old, backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert traffic() == (3 * row, 3 * row)
    assert (gradient[0, :2] == 0).all()
    assert gradient[0, 2].count_nonzero() > 30000
    leaf = case.logits.clone().requires_grad_()
    out = token_log_probs(leaf, case.token_ids, backend="cuda")
    traffic()
    (gradient,) = torch.autograd.grad((out.log_probs * torch.tensor([[0.0, 0.0, 1.0]])).sum(), leaf)
    assert traffic() == (row, 3 * row)
    assert (gradient[0, :2] == 0).all()


LAYOUTS = [(1, 1), (1, 13), (2, 2), (2, 5), (4, 2), (4, 13), (8, 1), (8, 3), (16, 13)]
"""Blocks in a cluster, tiles in the ring: rows of 9001 fp32 columns fit once, or twice, or many times."""


@everywhere
@pytest.mark.parametrize(("cluster", "tiles"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(laid_out, dtype, cluster, tiles):
    if cluster not in cuda.CLUSTERS[:4] and not cuda.emulated() and cuda.device(0).clusters[4] == 0:
        pytest.skip("the device takes no clusters of 16")
    width = 16384 // torch.empty(0, dtype=dtype).element_size()
    vocab = min(9001, width * cluster * tiles - 5)
    laid_out(cluster, 3, tiles)
    for options in ({"config": complete("grpo")}, {"config": "gspo"}, {"entropy_coef": 0.1}):
        check(make(batch=3, length=4, vocab=vocab, dtype=dtype), "cuda", **options)


@everywhere
@pytest.mark.parametrize("vocab", [1, 3, 7, 8, 9, 100])
def test_slices_without_columns(laid_out, vocab):
    """Fewer vectors than blocks: some of a cluster have nothing to do but to take part."""
    laid_out(8)
    check(make(batch=3, length=4, vocab=vocab, dtype=torch.bfloat16), "cuda", config=complete("dapo"))


REAL = [
    (torch.bfloat16, 32000),
    (torch.bfloat16, 50257),
    (torch.bfloat16, 151936),
    pytest.param(torch.bfloat16, 128256, marks=pytest.mark.nightly),
    pytest.param(torch.bfloat16, 262144, marks=pytest.mark.nightly),
    pytest.param(torch.float32, 151936, marks=pytest.mark.nightly),
    (torch.float32, 262144),
    pytest.param(torch.float16, 151936, marks=pytest.mark.nightly),
]


@everywhere
@pytest.mark.parametrize(("dtype", "vocab"), REAL, ids=str)
def test_real_vocabularies(dtype, vocab):
    """As an H200 lays them out; fp32 at 262144 fits the ring once, the others twice."""
    if cuda.emulated():
        layout = cuda.plan(0, dtype, vocab)
        tiles = math.ceil(vocab / layout.cluster * torch.empty(0, dtype=dtype).element_size() / 16384)
        assert layout.tiles == 13
        assert (2 * tiles <= 13) == ((dtype, vocab) != (torch.float32, 262144))
    case = make(batch=2, length=7, vocab=vocab, dtype=dtype, empty=False)
    check(case, "cuda", config=complete("grpo"))
    with torch.no_grad():
        alone = token_log_probs(case.logits[:1, 2:3], case.token_ids[:1, 2:3], backend="cuda")
        together = token_log_probs(case.logits, case.token_ids, backend="cuda")
    assert torch.equal(alone.log_probs[0, 0], together.log_probs[0, 2])


@served
def test_plans():
    """Clusters are no larger than two rows need, and say so where not even one fits."""
    device = cuda.Device(**H200, clusters=(ctypes.c_int32 * 5)(132, 66, 32, 16, 0))

    def cluster_of(dtype, vocab, rows=1):
        plan = cuda.Plan()
        code = native.DTYPES[dtype]
        cuda.library().grpo_cuda_plan(ctypes.byref(device), code, ctypes.c_int64(vocab), rows, ctypes.byref(plan))
        return plan.cluster, plan.clusters, plan.tiles

    bf16, fp32 = torch.bfloat16, torch.float32
    assert cluster_of(bf16, 32000) == (1, 132, 13)
    assert [cluster_of(bf16, vocab)[0] for vocab in (1, 128256, 151936, 262144)] == [1, 4, 4, 8]
    assert [cluster_of(fp32, vocab)[0] for vocab in (32000, 128256, 151936, 262144)] == [2, 8, 8, 8]
    assert cluster_of(fp32, 425_984)[0] == 8
    assert cluster_of(fp32, 425_985)[0] == 0
    assert cluster_of(bf16, 32000, 2) == (2, 66, 6)
    assert [cluster_of(bf16, vocab, 2)[0] for vocab in (1, 128256, 151936, 262144)] == [1, 8, 8, 8]
    assert [cluster_of(fp32, vocab, 2)[0] for vocab in (32000, 151936, 196_608, 196_609)] == [4, 8, 8, 0]
    device.clusters[4] = 7
    assert cluster_of(fp32, 262144) == (16, 7, 13)
    device.clusters[4] = 5  # 80 multiprocessors instead of 128: too many idle for two rows at a time
    assert cluster_of(fp32, 262144) == (8, 16, 13)
    assert cluster_of(fp32, 425_985)[0] == 16
    device.shared_bytes = 101_376  # a small ring
    assert cluster_of(bf16, 32000) == (2, 66, 5)
    for device.shared_bytes in range(0, 300_000, 1000):
        tiles = cluster_of(bf16, 32000)[2]
        assert tiles <= 16
        assert tiles <= 0 or tiles * 16_400 + (RING_OFFSET if cuda.emulated() else 4096) <= device.shared_bytes
    device.shared_bytes = 0
    assert cluster_of(bf16, 1)[0] == 0


@everywhere
def test_alignment_changes_no_bit():
    """Rows that begin at each possible distance from 16 bytes."""
    for dtype in DTYPES:
        width = 16 // torch.empty(0, dtype=dtype).element_size()
        vocab = 9001
        case = make(batch=2, length=3, vocab=vocab, dtype=dtype, extra_row=False, empty=False)
        found = []
        for skew in range(width):
            for stride in (9008, 9009):
                storage = torch.empty(6 * stride + width, dtype=dtype)
                logits = storage[skew : skew + 6 * stride].view(2, 3, stride)[..., :vocab].copy_(case.logits)
                out = grpo_loss(
                    logits.requires_grad_(), *case.arguments, **case.options, grad_scale=1.0, backend="cuda"
                )
                (gradient,) = torch.autograd.grad(out.loss, logits)
                found.append((out.log_probs, out.entropy, gradient.contiguous()))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_rows_are_stored_by_vectors(traffic, dtype):
    """Views of an odd vocabulary, whose rows begin anywhere: all but the ends of their tiles leave by bulk copies."""
    case = make(batch=3, length=5, vocab=9001, dtype=dtype, extra_row=True, empty=False)
    case.mask[:] = True
    logits = case.logits[:, :5].detach().requires_grad_()
    traffic()
    out = grpo_loss(logits, *case.arguments, **case.options, grad_scale=1.0, backend="cuda")
    size = logits.element_size()
    tiles = math.ceil(9001 * size / 16384)
    assert 15 * (9001 * size - 32 * tiles) <= traffic()[1] <= 15 * 9001 * size
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert all((a - b) * size % 16 == 0 for a, b in zip(gradient.stride(), logits.stride(), strict=True))


@everywhere
def test_a_gradient_aligned_otherwise_is_refused():
    logits, ids = torch.randn(1, 4, 97), torch.randint(97, (1, 4))
    numbers = numbers_vector(LogitArgs(), 1.0, None, torch.float32, logits.device)
    rows = Rows(logits, ids, torch.ones_like(ids, dtype=torch.bool), numbers, False)
    *stats, slope = (torch.zeros(1, 4) for _ in range(5))
    with pytest.raises(ValueError, match="as the logits' rows do; got a first row .* bytes off, strides"):
        cuda.log_probs_backward(rows, RowStats(*stats), RowGradients(slope, None), torch.empty(1, 4, 98)[..., :97])


@everywhere
def test_padding_of_the_vocabulary_is_left_alone():
    """In place, in rows that are longer than the vocabulary: what is behind it stays, whatever it is."""
    storage = torch.full((2, 3, 1040), math.nan)
    case = make(batch=2, length=3, vocab=1003, extra_row=False, empty=False)
    logits = storage[..., :1003].copy_(case.logits)
    expected, gradient = case.run("cuda", grad_scale=1.0)
    leaf = logits.requires_grad_()
    rows = leaf.view_as(leaf)
    out = grpo_loss(rows, *case.arguments, **case.options, inplace=True, grad_scale=1.0, backend="cuda")
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(rows.detach(), gradient)
    assert storage[..., 1003:].isnan().all()


@emulated
def test_schedules_change_no_bit():
    """Twenty orders of threads, copies and messages, over live and dead rows of several tiles."""
    case = make(batch=3, length=7, vocab=20001, dtype=torch.bfloat16)
    found = []
    for seed in range(20):
        cuda.library().grpo_emulator_seed(ctypes.c_uint64(seed))
        out, gradient = case.run("cuda", config=complete("grpo"), grad_scale=1.0)
        two_passes, again = case.run("cuda", config="gspo")
        found.append((out.loss, out.log_probs, gradient, two_passes.loss, again))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@emulated
@pytest.mark.parametrize(("rows", "blocks"), [(1, 2), (3, 6), (47, 6), (48, 6), (96, 12), (500, 24)])
def test_many_rows_are_dealt_to_more_clusters_than_run_at_once(laid_out, rows, blocks):
    """Of two blocks, three at once: late ones find less to do, and each that comes has rows enough."""
    laid_out(2)
    case = make(batch=1, length=rows, vocab=9, extra_row=False, empty=False)
    check(case, "cuda", config=complete("grpo"))
    token_log_probs(case.logits, case.token_ids, backend="cuda")
    case.run("cuda", grad_scale=1.0)
    assert cuda.library().grpo_emulator_blocks_launched() == blocks


@everywhere
def test_layouts_change_the_gradient_by_rounding_alone(laid_out):
    """The number of clusters changes no bit; their size changes sums by rounding."""
    case = make(batch=3, length=5, vocab=9001)
    found = {}
    for cluster, clusters in ((1, 1), (1, 7), (4, 1), (4, 3)):
        laid_out(cluster, clusters)
        found[cluster, clusters] = case.run("cuda", config=complete("grpo"))[1]
    assert torch.equal(found[1, 1], found[1, 7])
    assert torch.equal(found[4, 1], found[4, 3])
    torch.testing.assert_close(found[1, 1], found[4, 1], rtol=1e-5, atol=1e-9)


@everywhere
@pytest.mark.parametrize("live", ["none", "first", "last", "some"])
def test_the_order_of_rows(live):
    """More rows than the ordering kernel takes in one round."""
    mask = torch.zeros(1, 20_000, dtype=torch.bool)
    places = {
        "none": [],
        "first": [0],
        "last": [19_999],
        "some": [*range(5, 17), 8191, 8192, 8193, *range(16380, 16390)],
    }
    mask[0, places[live]] = True
    logits, ids = torch.randn(1, 20_000, 5), torch.randint(5, (1, 20_000))
    out = token_log_probs(logits, ids, mask, backend="cuda")
    expected = token_log_probs(logits, ids, mask, backend="torch")
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=0, atol=1e-6)
    assert (out.log_probs[~mask] == 0).all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_rows_far_from_the_sampled_token(dtype, entropy):
    """Sums leave the sampled token as their origin: at once, late, in one thread alone, for values of any size."""
    case = make(batch=1, length=8, vocab=40_000, dtype=dtype, extra_row=False, empty=False)
    case.mask[:] = True
    logits, ids = case.logits[0], case.token_ids[0]
    logits[0] += 300 * (torch.arange(40_000) > 20_000)
    logits[1, 39_999] = 200.0
    logits[2, :30_000] = -math.inf
    logits[3, ids[3]] = -2000.0
    logits[4] = torch.linspace(-500, 500, 40_000)
    logits[5, 100:200] = torch.finfo(torch.bfloat16).max
    logits[6, ids[6]] = torch.finfo(torch.bfloat16).min
    logits[7, 1:] = -math.inf
    ids[7], ids[1], ids[2] = 0, 3, 35_000
    case.options = {}
    assert_rule(case, "cuda", entropy_coef=entropy)


def passes(logits, ids, live, numbers, softcap, temperature, slopes):
    """Statistics, the gradient of log-probs and entropies, and that of a loss in one pass."""
    rows = Rows(logits, ids, live, numbers, softcap, temperature)
    real = numbers.dtype
    zeros = [torch.zeros(ids.shape, dtype=real) for _ in range(11)]
    stats, again, records = (
        RowStats(*zeros[:4]),
        RowStats(*zeros[4:8]),
        TokenRecords(*zeros[8:10], zeros[10].byte(), zeros[10][:0], zeros[10][:0]),
    )
    cuda.log_probs(rows, stats)
    gradient, fused = gradient_like(logits).fill_(7), gradient_like(logits).fill_(7)
    cuda.log_probs_backward(rows, stats, RowGradients(slopes, slopes.abs()), gradient)
    inputs = TokenInputs(slopes, slopes.abs(), None, None, None, None, slopes.abs())
    cuda.fused_loss(rows, inputs, objective_spec(LossConfig.preset("dapo"), False), again, records, fused)
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))
    return [*stats, *records[:2], gradient, fused]


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_a_row_has_a_temperature_of_its_own(dtype, softcap):
    """The bits of a call of that temperature alone, whatever stands at dead rows; and float64's log-probs."""
    torch.manual_seed(1)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    logits = (3 * torch.randn(1, 5, 9001)).to(dtype)
    ids, live = torch.randint(9001, (1, 5)), torch.tensor([[True, True, False, True, True]])
    temperature = torch.tensor([[0.5, 1.0, math.nan, 0.7, 3.0]], dtype=real)
    slopes = torch.randn(1, 5, dtype=real)

    def numbers(value: float) -> torch.Tensor:
        arguments = LogitArgs(value, 1.25, softcap)
        return numbers_vector(arguments, 1.0, LossConfig.preset("dapo"), real, torch.device("cpu"))

    cap = softcap is not None
    found = passes(logits, ids, live, numbers(1.0), cap, temperature, slopes)
    assert all((tensor[0, 2] == 0).all() for tensor in found)
    for row in (0, 1, 3, 4):
        part = slice(row, row + 1)
        value = float(temperature[0, row])
        alone = passes(logits[:, part], ids[:, part], live[:, part], numbers(value), cap, None, slopes[:, part])
        assert all(torch.equal(a[0, row], b[0, 0]) for a, b in zip(found, alone, strict=True))
        z = 1.25 * logits[0, row].double()
        exact = torch.log_softmax((6 * torch.tanh(z / 6) if cap else z) / value, -1)[ids[0, row]]
        assert abs(found[0][0, row] - exact) < (1e-11 if real == torch.float64 else 1e-5)


@everywhere
def test_large_logits_lose_nothing():
    """The origin of powers is rounded, by up to 6e-5 here; the sums are not."""
    case = make(batch=2, length=5, vocab=20_000, shift=1000.0, empty=False)
    exact = torch.log_softmax(case.logits[:, :5].double(), -1).gather(-1, case.token_ids[..., None]).squeeze(-1)
    for found in (token_log_probs(case.logits, case.token_ids, backend="cuda"), case.run("cuda", grad_scale=1.0)[0]):
        live = found.log_probs != 0
        assert (found.log_probs - exact)[live].abs().max() < 3e-6


@everywhere
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_column(value):
    """In whichever tile it is, the row shows it and no other row does."""
    for column in (0, 5000, 39_999):
        case = make(batch=1, length=3, vocab=40_000, empty=False)
        case.mask[:] = True
        case.logits[0, 1, column] = value
        out, gradient = case.run("cuda")
        assert out.log_probs.isnan().tolist() == [[False, True, False]]
        assert gradient[0, 1].isnan().all()
        assert not gradient[0, [0, 2]].isnan().any()


@everywhere
def test_no_kernel_needs_local_memory():
    assert cuda.device(0).local_bytes == 0


@emulated
def test_rows_too_long_for_the_emulator():
    reason = cuda.unsupported(backends.Request(torch.device("cpu"), vocab=5_000_000, by_name=True))
    assert reason == "a row of 5000000 columns does not fit into the shared memory of a cluster"


@emulated
def test_sources_that_do_not_compile_are_no_reason_to_skip(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)does not compile over the emulator:.*error"):
        mutated(tmp_path, "job.h", "#pragma once", "#pragma once\nint;;x")


def test_where_it_serves(monkeypatch):
    """No driver, an older GPU, no Triton, a row that does not fit, a GPU without a proof: each says so."""
    found = {"device": cuda.Device(**{**H200, "major": 8}), "name": "NVIDIA A100"}
    monkeypatch.setattr(cuda, "emulated", lambda: False)
    monkeypatch.setattr(backends.get("triton"), "unsupported", lambda request: None)
    monkeypatch.setattr(cuda, "device", lambda index: found["device"])
    monkeypatch.setattr(cuda, "plan", lambda index, dtype, vocab: cuda.Plan(4 if vocab < 10**6 else 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: found["name"])
    monkeypatch.setattr(torch.version, "hip", None)

    def reason(**request):
        return cuda.unsupported(backends.Request(torch.device("cuda", 0), **request))

    assert reason(by_name=True) == "it needs compute capability 9.0; NVIDIA A100 has 8.0"
    assert reason() == "not yet proven on NVIDIA A100: ask for it by name, backend='cuda'"
    found |= {"device": cuda.Device(**H200), "name": "NVIDIA H200"}
    assert reason(by_name=True) is None
    assert reason() == "not yet proven on NVIDIA H200: ask for it by name, backend='cuda'"
    monkeypatch.setattr(cuda, "PROVEN", frozenset({"NVIDIA H200"}))
    assert reason() is None
    assert reason(vocab=16384, dtype=torch.bfloat16) is None
    short = {"vocab": 16383, "dtype": torch.bfloat16}
    assert reason(**short) == "rows of 32766 bytes are short, and Triton's below 32768: ask for it by name"
    assert reason(**short, by_name=True) is None
    assert "2000000 columns does not fit" in reason(vocab=2_000_000)
    monkeypatch.setattr(backends.get("triton"), "unsupported", lambda request: "triton is not installed")
    assert reason() == "its [tokens]-sized kernels are Triton's: triton is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "no GPU driver is active"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason() == "it serves NVIDIA GPUs, not ROCm"


def test_a_refusal_of_the_driver_is_not_remembered(monkeypatch):
    """An earlier fault of the process passes for one; what a GPU offers is asked once."""

    errors = [700, 0]

    class Library:
        def grpo_cuda_device(self, index, found):
            found._obj.major = 9
            return errors.pop(0)

        def grpo_cuda_error(self, error):
            return b"an illegal memory access was encountered"

    monkeypatch.setattr(cuda, "library", Library)
    cuda.device.cache_clear()
    try:
        with pytest.raises(native.Unavailable, match=r"refuses: an illegal memory access .* \(error 700\)"):
            cuda.device(0)
        assert cuda.device(0).major == 9
        assert cuda.device(0).major == 9
    finally:
        cuda.device.cache_clear()


def test_automatic_choice_has_a_proof():
    """Each kind of GPU where this backend is chosen has a run of gpu_check.py in which it passed every part."""
    from gpu_record import proves_cuda

    found = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").rglob("gpu_check.json")]
    assert {run["environment"]["gpu"] for run in found if proves_cuda(run)} >= cuda.PROVEN


@emulated
@pytest.mark.parametrize(
    ("tiles", "fault"),
    [(1, "a size, stride, layout or pointer .*error -1"), (16, "more shared memory .*error 1")],
)
def test_faults_have_a_name(monkeypatch, tiles, fault):
    """An error of the library arrives with its text: a ring that does not hold a row, one that no block has."""
    monkeypatch.setattr(cuda, "plan", lambda *_: cuda.Plan(1, 1, tiles))
    logits = torch.randn(1, 2, 9000, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"grpo_cuda_fused_loss on cpu: {fault}"):
        grpo_loss(logits, torch.zeros(1, 2, dtype=torch.long), torch.ones(1), grad_scale=1.0, backend="cuda")


built = pytest.mark.skipif(not BUILT.exists(), reason="no nvcc built the CUDA library here")


def in_a_process_of_its_own(code: str, library: Path) -> str:
    environment = {**os.environ, "GRPO_KERNELS_CUDA_LIBRARY": str(library), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@built
def test_library_loads_without_a_driver():
    """Its runtime is inside; where there is no driver it says so in CUDA's words."""
    code = """
import torch
from grpo_kernels import grpo_loss
from grpo_kernels.backends import Request, cuda, native
print(cuda.emulated())
try:
    print(cuda.device(0).major)
except native.Unavailable as error:
    print(error)
print(cuda.unsupported(Request(torch.device("cpu"), by_name=True)))
try:
    grpo_loss(torch.randn(1, 2, 9), torch.zeros(1, 2, dtype=torch.long), torch.ones(1), backend="cuda")
except RuntimeError as error:
    print(error)
"""
    real, device, cpu, error = in_a_process_of_its_own(code, BUILT).splitlines()
    assert real == "False"
    assert cpu == "it serves NVIDIA GPUs, not cpu"
    assert "a call that backend='cuda' can serve; got 9 columns of float32 logits on cpu (it serves NVIDIA" in error
    if not torch.cuda.is_available():
        assert re.fullmatch(r"the CUDA driver refuses: .+ \(error \d+\)", device)


def test_missing_and_foreign_libraries(tmp_path, monkeypatch):
    for cached in ("_loaded", "emulated", "device"):
        monkeypatch.setattr(cuda, cached, getattr(cuda, cached).__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(cuda, "on_device", lambda where: contextlib.nullcontext())

    def reason(library: Path) -> str:
        monkeypatch.setenv("GRPO_KERNELS_CUDA_LIBRARY", str(library))
        return cuda.unsupported(backends.Request(torch.device("cuda", 0), by_name=True))

    library = tmp_path / "libgrpo_cuda.so"
    assert f"no compiled library ({library}): install with `pip install .`" in reason(library)
    library.with_suffix(".json").write_text(json.dumps({"error": "no nvcc found"}))
    assert "it was not compiled: no nvcc found" in reason(library)
    if (native.FOLDER / "libgrpo_cpu.so").exists():
        foreign = reason(native.FOLDER / "libgrpo_cpu.so")
        assert "was built from other sources than this package: reinstall grpo_kernels" in foreign


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


@built
@pytest.mark.parametrize("architectures", ["as built", pytest.param("90,100", marks=pytest.mark.nightly)])
def test_compiled_kernels_do_not_spill(architectures, tmp_path, monkeypatch):
    """Every kernel, for each GPU it is compiled for: no stack, no local memory, registers for 384 threads. Not so of
    "100" alone: of PTX for that GPU ptxas leaves one kernel 8 bytes of stack (CUDA 13.0)."""
    if (tool := cuobjdump()) is None:
        pytest.skip("no cuobjdump here")
    library, record = BUILT, native.build_record(BUILT)
    if architectures != "as built":
        monkeypatch.setenv("GRPO_KERNELS_CUDA_ARCHITECTURES", architectures)
        library = tmp_path / BUILT.name
        record = setup().build_cuda(library, tmp_path)
    usage = subprocess.run([tool, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True)
    targets = re.split(r"^arch = ", usage.stdout, flags=re.M)[1:]
    assert {target.split()[0] for target in targets} >= {f"sm_{name}" for name in record["architectures"].split()}
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    rows = [kernel for kernel in kernels if "row_kernel" in kernel[0]]
    assert len(rows) == 24 * len(record["architectures"].split())
    for name, registers, stack, shared, local in kernels:
        assert (stack, local) == ("0", "0"), name
        assert int(shared) <= 1024, name  # the rest is asked for at launch
        assert int(registers) <= (65536 // 384 // 8 * 8 if "row_kernel" in name else 255), name


CONSUMERS, SETTLERS, MOVES = "consumer.h", "settler.h", "loading.h"
UNDEFINED = {
    "a message to itself": (SETTLERS, "if (job_.p.cluster == 1) return;", "", "a message in a cluster of one block"),
    "a tile read too early": (
        CONSUMERS,
        "shared_.filled[at.place].wait(at.lap);\n      sweep_sums",
        "sweep_sums",
        "16 bytes read: a copy on its way",
    ),
    "room given back unread": (MOVES, "port::bulk_wait_read<kStoresInFlight>();", "", "load: a copy on its way reads"),
    "a wait by a part of a warp": (
        SETTLERS,
        "shared_.swept[place_].wait(turn & 1);\n    const double value",
        "if (lane_ == 0) shared_.swept[place_].wait(turn & 1);\n    const double value",
        "deadlock: ",
    ),
    "a message off 16 bytes": (SETTLERS, "slot + 16 * i", "slot + 16 * i + 8", "a message: not aligned to 16 bytes"),
}
"""Faults that leave the kernels' behaviour undefined, and what the emulator calls them."""


def mutated(folder: Path, file: str, old: str, new: str) -> Path:
    """The emulator's library of sources with that change."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    source.write_text(source.read_text().replace(old, new, 1))
    return cuda_emulator.build(sources=folder / "csrc", library=folder / "mutant.so")


@emulated
@pytest.mark.nightly
@pytest.mark.parametrize("name", UNDEFINED)
def test_the_emulator_refuses_what_is_undefined(tmp_path, name):
    *change, words = UNDEFINED[name]
    code = """
import ctypes
import torch
from grpo_kernels import grpo_loss
from grpo_kernels.backends import cuda
for seed, (cluster, vocab) in enumerate([(1, 300), (1, 20001), (2, 20001)] * 3):
    cuda.plan = lambda *_: cuda.Plan(cluster, 1, 6)
    cuda.library().grpo_emulator_seed(ctypes.c_uint64(seed))
    logits = torch.randn(2, 3, vocab, requires_grad=True)
    grpo_loss(logits, torch.ones(2, 3, dtype=torch.long), torch.ones(2), grad_scale=1.0, backend="cuda")
"""
    environment = {**os.environ, "GRPO_KERNELS_CUDA_LIBRARY": str(mutated(tmp_path, *change))}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert words in result.stderr
