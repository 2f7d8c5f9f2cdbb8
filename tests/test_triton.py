"""Triton's kernels beyond what every backend is tested for: traffic, routes, and what compilers make of them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import INTERPRETED, make
from conftest import DEVICE

from grpo_kernels import backends, grpo_loss, token_log_probs
from grpo_kernels.backends.contract import Rows

pytest.importorskip("triton")
launch = pytest.importorskip("grpo_kernels.backends.triton.launch")
blocks = pytest.importorskip("grpo_kernels.backends.triton.blocks")
blocks_for = blocks.blocks_for

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
OFFLINE = Path(__file__).with_name("triton_offline.py")


@pytest.fixture
def traffic(monkeypatch):
    """Elements of a tensor that kernels read and wrote, as ``traffic(tensor)``."""
    from triton.runtime.interpreter import InterpreterBuilder

    touched = {"read": [], "written": []}

    def recording(kind, original):
        def wrapper(self, pointers, *rest):
            mask = rest[0] if kind == "read" else rest[1]
            touched[kind].append(pointers.data[mask.data].copy())
            return original(self, pointers, *rest)

        return wrapper

    monkeypatch.setattr(launch, "programs_wanted", lambda device: 1)  # a program to each row
    for kind, name in (("read", "create_masked_load"), ("written", "create_masked_store")):
        monkeypatch.setattr(InterpreterBuilder, name, recording(kind, getattr(InterpreterBuilder, name)))

    def count(tensor: torch.Tensor) -> Counter:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()
        inside = {kind: [((p >= start) & (p < end)).sum() for p in all_] for kind, all_ in touched.items()}
        return Counter({kind: int(sum(counts)) for kind, counts in inside.items()})

    count.clear = lambda: [all_.clear() for all_ in touched.values()]
    return count


@interpreted
@pytest.mark.parametrize("vocab", [100, 9000, 32768, 40000])
def test_rows_are_read_as_often_as_claimed(traffic, vocab):
    """Forward V reads; gradient V reads and V writes; one pass V reads and V writes. One more read for the target."""
    case = make(batch=1, length=3, vocab=vocab, extra_row=False, empty=False)
    case.mask[:] = torch.tensor([True, False, True])
    case.advantages[:] = 1.0
    rows = 2
    leaf = case.logits.requires_grad_()
    out = token_log_probs(leaf, case.token_ids, case.mask, backend="triton")
    assert traffic(leaf) == {"read": rows * (vocab + 1), "written": 0}
    traffic.clear()
    (gradient,) = torch.autograd.grad(out.log_probs.sum(), leaf)
    parts = launch.gradient_parts(3, vocab, blocks_for(vocab, torch.float32).block, leaf.device)[0]
    assert traffic(leaf) == {"read": rows * (vocab + parts), "written": 0}
    assert traffic(gradient)["written"] == 3 * vocab
    traffic.clear()
    out = grpo_loss(leaf, *case.arguments, config="reinforce", backend="triton")
    held = blocks_for(vocab, torch.float32).held(vocab) > 0
    assert held == (vocab <= 32768)
    assert traffic(leaf) == {"read": rows * (vocab + 1), "written": 0}
    traffic.clear()
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert traffic(gradient)["written"] == (0 if held else 3 * vocab)  # one pass wrote it in forward


@interpreted
def test_rows_of_known_slope_are_not_read_again(traffic):
    """A clipped row and one of A = 0, without KL: the second sweep of a walked row does not happen."""
    case = make(batch=1, length=3, vocab=40000, extra_row=False, empty=False, ref_log_probs=None)
    case.mask[:] = True
    exact = token_log_probs(case.logits, case.token_ids, backend="torch").log_probs
    case.options["old_log_probs"] = exact - torch.tensor([[1.0, 0.0, 0.0]])  # the first is clipped
    advantages = torch.tensor([[1.0, 0.0, 1.0]])
    leaf = case.logits.requires_grad_()
    traffic.clear()
    out = grpo_loss(leaf, case.token_ids, advantages, old_log_probs=case.options["old_log_probs"], backend="triton")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    parts = launch.gradient_parts(3, 40000, blocks_for(40000, torch.float32).block, leaf.device)[0]
    assert traffic(leaf)["read"] == 3 * 40001 + 40000 + parts
    assert traffic(gradient)["written"] == 3 * 40000
    assert (gradient[0, :2] == 0).all()
    assert gradient[0, 2].count_nonzero() > 30000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_few_rows_share_programs(monkeypatch, dtype, rows):
    """Several programs to a row's spans: the same bits; a row whose sums overflow is settled by the merge."""
    logits = 3 * torch.randn(1, rows, 100_000).to(dtype)
    ids = torch.randint(100_000, (1, rows))
    logits[0, 0, 5], ids[0, 0] = 500.0, 7
    together = token_log_probs(logits, ids, backend="triton")
    launched = []
    original = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *rest, **kw: (launched.append(kernel), original(kernel, *rest, **kw))
    )
    monkeypatch.setattr(launch, "programs_wanted", lambda device: 64)
    shared = token_log_probs(logits, ids, backend="triton")
    assert len(launched) == 2
    assert torch.equal(shared.log_probs, together.log_probs)
    assert torch.equal(shared.entropy, together.entropy)
    assert together.log_probs[0, 0] < -480


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1000, 9000])
def test_a_walked_row_is_a_held_row(monkeypatch, dtype, vocab):
    """The one-pass kernel without registers to spare: the same bits from two sweeps."""
    case = make(batch=2, length=3, vocab=vocab, dtype=dtype)
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "grad_scale": 0.5}
    (expected, gradient) = case.run("triton", **options)
    walked_blocks = blocks_for(vocab, dtype)._replace(hold=False, two_sweeps=True)
    monkeypatch.setattr(launch, "blocks_of", lambda rows: walked_blocks)
    (out, walked) = case.run("triton", **options)
    assert torch.equal(out.log_probs, expected.log_probs)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(walked, gradient)


@pytest.mark.parametrize("below", [60.0, 88.0, 95.0, 300.0])
def test_tokens_far_below_the_largest(below):
    """Sums relative to a sampled token so unlikely overflow; then they are made relative to the largest value."""
    case = make(batch=1, length=2, vocab=500, empty=False)
    case.logits[0, 0, 17], case.logits[0, 0, case.token_ids[0, 0]] = 5.0, 5.0 - below
    out = token_log_probs(case.logits, case.token_ids, backend="triton")
    exact = torch.log_softmax(case.logits.double(), -1)
    expected = exact[0, 0, case.token_ids[0, 0]]
    torch.testing.assert_close(out.log_probs[0, 0].double(), expected, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(out.entropy[0, 0].double(), -(exact[0, 0].exp() * exact[0, 0]).sum(), rtol=0, atol=2e-5)


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs GRPO_KERNELS_TEST_DEVICE=cuda")]
ROUTES = {"one pass": {"config": "grpo"}, "two passes": {"config": "gspo"}}


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("route", ROUTES)
class TestOnAGPU:
    pytestmark = on_gpu

    @pytest.fixture(autouse=True)
    def _served(self, kernels):
        if reason := backends.get(kernels).unsupported(backends.Request(torch.device("cuda"), by_name=True)):
            pytest.skip(reason)

    def test_nothing_waits_for_the_device(self, kernels, route):
        """Not even a call with numbers that no call had before."""
        case = make(vocab=3000)
        case.run(kernels, **ROUTES[route])  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.run(kernels, temperature=0.8125, **ROUTES[route])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_graph_replays_with_new_values(self, kernels, route):
        case = make(vocab=3000, dtype=torch.bfloat16)
        leaf = case.logits.detach().clone().requires_grad_()
        kl_coef = torch.tensor(0.1, device="cuda")

        def step():
            leaf.grad = None
            options = {**case.options, **ROUTES[route], "kl_coef": kl_coef, "grad_scale": 1.0}
            out = grpo_loss(leaf, *case.arguments, backend=kernels, **options)
            out.loss.backward()
            return out.loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        gradient = leaf.grad
        kl_coef.fill_(0.7)
        with torch.no_grad():
            leaf.mul_(0.5)
        graph.replay()
        replayed = loss.clone(), gradient.clone()
        expected = step()
        assert torch.equal(replayed[0], expected)
        assert torch.equal(replayed[1], leaf.grad)


def collected(*files: str, before: str = "", **environment: str) -> list[str]:
    """What pytest would run, in order, in a process that has run ``before``."""
    code = f"{before}\nimport sys, pytest\nsys.exit(pytest.main(['--collect-only', *sys.argv[1:]]))"
    settings = {"cwd": OFFLINE.parent.parent, "env": os.environ | environment, "timeout": 300}
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, **settings)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_what_only_a_gpu_shows_runs_first_there():
    """Collected for a device that holds no values, as on a GPU."""
    here = [f"tests/{name}.py" for name in ("test_bits", "test_triton")]
    names = collected(*here, GRPO_KERNELS_TEST_DEVICE="meta")
    first = [name for name in names if "TestOnAGPU" in name]
    assert len(first) == 8
    assert names[: len(first)] == first
    assert all("[torch" in name for name in names[len(first) :])
    assert len(names) > len(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_fold_by_sweeps_of_whole_vectors(dtype):
    """Of 16 bytes for each thread, whatever reads the rows."""
    logits, none = torch.zeros(2, 3, 5000, dtype=dtype), torch.zeros(2, 3, dtype=torch.long)
    rows = Rows(logits, none, none > -1, torch.zeros(9), softcap=False)
    for constants in (launch.row_constants(rows, launch.blocks_of(rows)), launch.pair_constants(rows, rows)):
        assert constants["SWEEP"] * dtype.itemsize == 16 * 32 * constants["warps"]


def test_the_suite_collects_without_triton():
    """As on macOS, where nothing asks for it."""
    names = collected(
        "tests/test_bits.py", "tests/test_surrogates.py", before="import sys; sys.modules['triton'] = None"
    )
    backends_of = {name.split("[")[1].split("-")[0] for name in names if "test_long_rows" in name}
    assert "torch]" in backends_of
    assert "triton]" not in backends_of


def offline(what: str, *targets: str) -> list[dict]:
    command = [sys.executable, str(OFFLINE), what, *targets]
    result = subprocess.run(command, capture_output=True, text=True, cwd=OFFLINE.parent.parent, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


TARGETS = [
    *(
        pytest.param(name, marks=[] if name == "sm_90" else pytest.mark.nightly)
        for name in ("sm_80", "sm_90", "sm_100")
    ),
    "gfx942",
]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target):
    """fp64, there to check gradients, may spill."""
    lines = offline("plain", target)
    assert len(lines) == 69
    refused = [line for line in lines if "refused" in line]
    if target == "gfx942" and triton_version() == (3, 9):  # fp64's -inf, as a literal of 64 bits that this GPU has not
        assert {(line["dtype"], line["vocab"]) for line in refused} == {("fp64", 151936)}
        lines = [line for line in lines if line not in refused]
    else:
        assert refused == []
    for line in lines:
        # Once a row: two of 256 registers of a held fp32 row on AMD; held rows on odd addresses; one register of two
        # kernels (sm_90 or sm_100) where Triton 3.8 and 3.9 choose another allocation of registers.
        allowed = 2 if (target, line["dtype"], line["vocab"]) == ("gfx942", "fp32", 32000) else 0
        allowed = 8 if triton_version() >= (3, 8) and target != "gfx942" else allowed
        if line["constants"].get("HELD") and line["constants"]["ALIGNMENT"] < 8:
            allowed = 24
        assert line["dtype"] == "fp64" or line["spills"] <= allowed, line
        if "chunk" not in line["kernel"]:
            assert line["sums_of"] in ([], [2]), line  # no order of sums is the compiler's: see rows.lane_sums
    assert [line for line in lines if line["sums_of"] == [2]]
    if target == "gfx942":
        return
    rows = [line for line in lines if "ALIGNMENT" in line["constants"] and line["kernel"] != "merge_spans_kernel"]
    aligned = [line for line in rows if line["constants"]["ALIGNMENT"] == 16]
    assert {line["vocab"] for line in aligned} == {1000, 8192, 32000, 32008, 151936}
    for line in aligned:
        assert line["wide_loads"] > 0, line
        writes = any(word in line["kernel"] for word in ("gradient", "one_pass", "rescale"))
        assert (line["wide_stores"] > 0) == writes, line
    walked = [line for line in aligned if line["kernel"] == "log_probs_kernel"]
    assert walked
    assert all(line["pipelined"] > 0 for line in walked)
    for line in rows:
        if line["dtype"] == "bf16":  # the sampled logit, and elements of rows that begin on no more than 2 bytes
            assert (line["of_two_bytes"] > 1) == (line["constants"]["ALIGNMENT"] == 2), line


@pytest.mark.parametrize("target", [pytest.param("sm_90", marks=pytest.mark.nightly)])
def test_every_variant_compiles_without_spills(target):
    lines = offline("variants", target)
    assert len(lines) == 60
    assert all(line["spills"] == 0 for line in lines), [line for line in lines if line["spills"]]


@pytest.mark.parametrize("target", [*TARGETS[:3], pytest.param("gfx942", marks=pytest.mark.nightly)])
def test_divergences_compile_without_spills(target):
    lines = offline("divergences", target)
    assert len(lines) == 33
    for line in lines:
        # All but Triton 3.7 keep one register of one kernel in memory: 8 bytes, once a row.
        allowed = 8 if triton_version() != (3, 7) and line["vocab"] == 151936 else 0
        assert line["dtype"] == "fp64" or line["spills"] <= allowed, line
        assert line["sums_of"] == ([2] if line["kernel"] == "divergence_kernel" else []), line
        if target != "gfx942" and line["constants"]["ALIGNMENT"] == 16:
            assert line["wide_loads"] > 0, line
            assert (line["wide_stores"] > 0) == ("gradient" in line["kernel"]), line


def test_alignment_of_rows():
    """What kernels are told holds for every row of every tensor, and is not less than it could be."""
    for size, vocab, stride, shift in itertools.product(
        (2, 4, 8), (31, 32, 36, 40), (40, 42, 44, 48, 49), (0, 1, 2, 8)
    ):
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[size]
        tensor = torch.empty(6 * stride + shift + vocab, dtype=dtype)
        assert tensor.data_ptr() % 16 == 0
        every = tensor[shift:].as_strided((2, 3, vocab), (3 * stride, stride, 1))
        for rows in (every, every[:1], every[:, :1], every[1:, 2:]):
            aligned = torch.empty(*rows.shape[:2], 64, dtype=dtype)[..., :vocab]
            constants = launch.vector_constants(aligned, rows)
            places = {row.data_ptr() % 16 for row in rows.flatten(0, 1)}
            assert constants["ALIGNMENT"] == next(n for n in (16, 8, 4, 2) if all(place % n == 0 for place in places))
            assert constants["VECTOR"] == next(n for n in (8, 4, 2, 1) if n * size <= 16 and vocab % n == 0)


def test_table_of_blocks(monkeypatch):
    """Every row has an entry; a GPU's own come first; rows of less than a block are not padded to one."""
    for target in ("any", *blocks.table()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for vocab in (1, 300, 8192, 8193, 32768, 32769, 2**30):
                for softcap in (False, True):
                    found = blocks.blocks_for(vocab, dtype, softcap, target)
                    assert found.span % found.block == 0
                    assert found.block < 2 * vocab
                    assert found.held(vocab) == 0 or found.held(vocab) * found.block < vocab + found.block
    assert blocks.blocks_for(8192, torch.float32, target="sm_75") == blocks.blocks_for(8192, torch.float32)
    own = {**blocks.table()["any"][2], "dtype": "bfloat16", "block": 1024, "columns": 8192}
    monkeypatch.setitem(blocks.table(), "sm_75", [own])
    blocks.blocks_for.cache_clear()
    assert blocks.blocks_for(8192, torch.bfloat16, target="sm_75").block == 1024
    assert blocks.blocks_for(8192, torch.float32, target="sm_75").block == 2048
    blocks.blocks_for.cache_clear()


def test_lengths_and_numbers_compile_nothing():
    """One kernel for T from 1 to 70,000, also where strides pass 2^31, at any vocabulary; numbers are in memory."""
    lines = offline("keys", "sm_90")
    assert lines
    for line in lines:
        assert len(line["keys"]) == 1, line


def test_request_without_a_gpu():
    """Without a driver, on another device, on a vocabulary past 2^30, for a long fused row: each its reason."""
    triton = backends.get("triton")
    cuda = torch.device("cuda")
    if not torch.cuda.is_available():
        assert triton.unsupported(backends.Request(cuda)) == "no GPU driver is active"
    assert "serves CUDA and ROCm tensors, not meta" in triton.unsupported(backends.Request(torch.device("meta")))
    here = cuda if torch.cuda.is_available() else torch.device("cpu")
    assert "vocabularies of up to" in triton.unsupported(backends.Request(here, vocab=2**31))
    assert "not been measured faster" in triton.unsupported(backends.Request(here, vocab=40000, fused=True))
    assert triton.unsupported(backends.Request(here, vocab=32768, fused=True)) is None


def test_old_triton(monkeypatch):
    import triton

    module = backends.get("triton")
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    module._missing.cache_clear()
    try:
        assert "needs triton >= 3.6; 3.2.0 is installed" in module.unsupported(backends.Request(torch.device("cuda")))
    finally:
        module._missing.cache_clear()
