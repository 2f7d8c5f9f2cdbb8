"""The kernels' PTX, executed on a CPU (tests/ptx): the kernels beside fp64, and the executor itself.

Kernels run in a process of their own: this one interprets Triton's and has the emulated CUDA library loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import arithmetic, counters, faults, launches, sweep
from ptx.machine import Machine
from ptx.memory import Fault, Global
from ptx.parser import Module

ROOT = Path(__file__).resolve().parent.parent
PARTS = [("cuda", what) for what in (*sweep.PASSES, *sweep.FUSED_PAIRS)] + [
    ("triton", what) for what in (*sweep.PASSES, *sweep.PAIRS, "tokens", "rescale")
]
MISSING = {
    "cuda": None if launches.nvcc() and launches.host_compiler() else "no nvcc, or no C++ compiler, to make PTX with",
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed",
}


def executor(*arguments: str) -> str:
    """What a command of the executor prints, whether or not it finds a fault."""
    command = [sys.executable, "-m", "tests.ptx", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    assert not result.stderr, result.stderr[-3000:]
    return result.stdout


def assert_no_discrepancies(*words: str) -> None:
    """Of the cases of those words; those that fail are named, each with its seed."""
    if reason := MISSING[next(word for word in words if word in MISSING)]:
        pytest.skip(reason)
    said = executor("check", *words)
    wanted = len(sweep.jobs("quick" in words, [word for word in words if word != "quick"]))
    assert f"\n{wanted} cases, 0 with discrepancies" in said, re.sub(r"^ok .*\n", "", said, flags=re.M)


@functools.cache
def counts(name: str) -> dict:
    """counters.Counts or counters.Chain of that name, as a dictionary."""
    if reason := MISSING["triton" if name.startswith("triton") else "cuda"]:
        pytest.skip(reason)
    return json.loads(executor("counts", "--json", *name.split()))[name]


@pytest.mark.parametrize(
    "words", [("cuda", "fused"), ("cuda", "fused_divergence"), ("bits", "cuda"), ("triton",)], ids=" ".join
)
def test_quick_cases(words):
    """The passes of one sweep, which hold what those of two are made of; nightly all cases of every pass."""
    assert_no_discrepancies("quick", *words)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("words", PARTS, ids=" ".join)
def test_all_cases(words):
    assert_no_discrepancies(*words)


def test_parts_are_all_cases():
    """And the quick sample has some of each."""
    assert sum(len(sweep.jobs(False, part)) for part in PARTS) == len(sweep.jobs(False, ())) > 300
    assert all(sweep.jobs(True, part) for part in [*PARTS, ("cuda", "races"), ("bits", "cuda"), ("bits", "triton")])


def test_counts_of_aligned_rows():
    """A row is read once and written once, in whole vectors without bank conflicts."""
    found = counts("cuda fused bf16 32000")
    assert found["wrong"] == []
    assert found["loaded"] == found["stored"] == 1
    assert found["wavefronts"] < 1.01
    assert found["sectors"] < 1.1


@pytest.mark.nightly
def test_counts_of_unaligned_rows():
    """An odd vocabulary costs little more: no bank conflicts, whole vectors, a shift of those that are summed."""
    aligned, unaligned = counts("cuda fused bf16 32000"), counts("cuda fused bf16 32001 skew1")
    assert unaligned["wrong"] == []
    assert unaligned["wavefronts"] <= 1.1
    assert unaligned["stored"] > 0.998  # by bulk copies; the rest are ends of tiles
    assert unaligned["instructions"]["consumers"] <= 1.15 * aligned["instructions"]["consumers"]


@pytest.mark.nightly
def test_counts_of_pairs():
    """A row and its teacher's are read once each, one gradient is written, in whole vectors without bank conflicts."""
    found = counts("cuda fused_divergence bf16 32000 reverse_kl")
    assert found["wrong"] == []
    assert (found["loaded"], found["stored"]) == (2, 1)
    assert found["wavefronts"] < 1.01


@pytest.mark.nightly
@pytest.mark.parametrize("row", ["bf16 151936", "bf16 32000"])
def test_settlers_are_not_the_limit(row):
    """A row's chain of dependent operations, and the exchange, beside the time that memory takes for a slice."""
    assert counts(f"settler {row}")["percent"]["H200"] <= 45


@pytest.mark.parametrize("name", faults.FAULTS)
def test_planted_fault_is_of_this_code(name):
    assert faults.places(name) == 1, (
        f"{faults.FAULTS[name].file} has changed: write this fault anew (tests/ptx/faults.py)"
    )


def test_the_executor_is_of_this_code():
    """What it knows of the code: which warp of csrc/cuda does what, how Triton's kernels are launched."""
    layout = (ROOT / "csrc" / "cuda" / "layout.h").read_text()
    assert f"kConsumerWarps = {counters.CONSUMERS}," in layout
    assert "kLoader = kConsumerWarps, kStorer = kLoader + 1, kSettler = kLoader + 2;" in layout
    assert launches.launcher_differs() is None


@pytest.mark.nightly
@pytest.mark.skipif(MISSING["cuda"] is not None, reason=str(MISSING["cuda"]))
@pytest.mark.parametrize("name", faults.FAULTS)
def test_planted_fault_is_noticed(name):
    noticed, said = faults.noticed(name)
    assert noticed, said


# The executor itself, over kernels written here.

KERNEL = """
.extern .shared .align 128 .b8 memory[];
.visible .entry kernel(
	.param .u64 out
)
{
	.reg .pred %p<4>;
	.reg .b16 %rs<4>;
	.reg .b32 %r<16>;
	.reg .f32 %f<4>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [out];
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	mov.u32 %r3, memory;
	add.s32 %r4, %r3, %r2;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
BODY
	ret;
}
"""
"""%rd1 is the memory's address, %rd3 that of the thread's word; %r1 the thread, %r4 its word of shared memory."""


def executed(body: str, threads: int = 64, seed: int = 0) -> tuple[np.ndarray, Machine]:
    """64 words of memory, which begin as -1, after a launch of one block; and the machine."""
    memory, words = Global(), torch.full((64,), -1, dtype=torch.int32)
    memory.map("words", words.data_ptr(), 256)
    machine = Machine(memory, seed, races=True)
    (kernel,) = Module(KERNEL.replace("BODY", body)).values()
    machine.launch(kernel, 1, threads, 512, words.data_ptr().to_bytes(8, "little"))
    return words.numpy(), machine


REVERSED = """
	st.shared.u32 [%r4], %r1;
	{barrier}
	sub.s32 %r5, %r3, %r2;
	ld.shared.u32 %r6, [%r5+252];
	st.global.u32 [%rd3], %r6;
"""


@pytest.mark.parametrize("seed", range(6))
def test_threads_meet_or_race(seed):
    words, machine = executed(REVERSED.format(barrier="bar.sync 0;"), seed=seed)
    assert words.tolist() == list(range(64))[::-1]
    assert not machine.findings
    _, machine = executed(REVERSED.format(barrier=""), seed=seed)
    assert any("race" in text for text in machine.findings)


def test_lanes_diverge_and_exchange():
    """Odd lanes take a branch of their own; a shuffle reads what each has computed."""
    body = """
	and.b32 %r5, %r1, 1;
	setp.eq.s32 %p1, %r5, 1;
	mov.u32 %r6, 100;
	@%p1 bra ODD;
	mov.u32 %r6, 200;
ODD:
	add.s32 %r6, %r6, %r1;
	shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
	st.global.u32 [%rd3], %r7;
"""
    words, machine = executed(body)
    assert words.tolist() == [(200 if i % 2 else 100) + (i ^ 1) for i in range(64)]
    assert not machine.findings


INSTRUCTIONS = {
    "add.s32 %r6, %r1, -5;": lambda i: i - 5,
    "mul.lo.s32 %r6, %r1, 0x10001;": lambda i: i * 0x10001,
    "shr.s32 %r5, %r1, 1; neg.s32 %r6, %r5;": lambda i: -(i >> 1),
    "neg.s32 %r5, %r1; shr.s32 %r6, %r5, 1;": lambda i: -i >> 1,
    "neg.s32 %r5, %r1; div.s32 %r6, %r5, 7;": lambda i: -(i // 7),
    "neg.s32 %r5, %r1; rem.s32 %r6, %r5, 7;": lambda i: -(i % 7),
    "prmt.b32 %r6, %r1, 0xdd, 0xc410;": lambda i: i | 0xFFDD0000,  # the last selects a sign
    "shf.l.wrap.b32 %r6, 0x80000000, %r1, 33;": lambda i: i << 1 | 1,
    "shf.r.clamp.b32 %r6, %r1, 3, 4;": lambda i: i >> 4 | 3 << 28,
    "bfi.b32 %r6, %r1, 0xff, 4, 3;": lambda i: 0x8F | (i & 7) << 4,
    "bfe.s32 %r6, %r1, 1, 3;": lambda i: (i >> 1 & 7) - (8 if i & 8 else 0),
    "cvt.u16.u32 %rs1, %r1; mov.b32 %r6, {%rs1, %rs1};": lambda i: i | i << 16,
    "cvt.rn.f32.u32 %f1, %r1; fma.rn.f32 %f2, %f1, 0f40000000, 0f3F000000; mov.b32 %r6, %f2;": (
        lambda i: int(np.float32(2 * i + 0.5).view(np.int32))
    ),
    "mov.f32 %f1, 0f80000000; mov.f32 %f2, 0f00000000; min.f32 %f3, %f2, %f1; mov.b32 %r6, %f3;": lambda i: -(2**31),
    "mov.f32 %f1, 0f80000000; mov.f32 %f2, 0f00000000; max.f32 %f3, %f1, %f2; mov.b32 %r6, %f3;": lambda i: 0,
    "setp.lt.s32 %p1, %r1, 40; selp.b32 %r6, 1, 2, %p1;": lambda i: 1 if i < 40 else 2,
    "setp.lt.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r6, %p1, -1;": lambda i: -1 if i < 32 else 255,
    "mov.u32 %r6, 7; setp.ge.u32 %p1, %r1, 9; @%p1 bra DONE; ret; DONE:": lambda i: 7 if i >= 9 else None,
    "sub.s32 %r5, 5, %r1; redux.sync.min.s32 %r6, %r5, -1;": lambda i: 5 - (i | 31),
    "sub.s32 %r5, 5, %r1; redux.sync.max.u32 %r6, %r5, -1;": lambda i: -1 if i < 32 else 5 - 32,
    "shfl.sync.up.b32 %r6, %r1, 2, 0, -1;": lambda i: i - 2 if i % 32 > 1 else i,
    "shfl.sync.idx.b32 %r6, %r1, 3, 31, -1;": lambda i: i // 32 * 32 + 3,
}


@pytest.mark.parametrize("code", INSTRUCTIONS)
def test_instructions(code):
    """A thread's word, after what it executed; -1 where it left before."""
    words, machine = executed(code + "st.global.u32 [%rd3], %r6;")
    wanted = [-1 if (value := INSTRUCTIONS[code](i)) is None else value for i in range(64)]
    assert words.tolist() == np.array(wanted, np.int64).astype(np.int32).tolist()
    assert not machine.findings


BULK = """
	st.shared.u32 [%r4], %r1;
	{fence}
	bar.sync 0;
	setp.ne.s32 %p1, %r1, 0;
	@%p1 bra DONE;
	cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], {size};
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
DONE:
"""


@pytest.mark.parametrize("seed", range(6))
def test_bulk_stores_need_a_fence(seed):
    words, machine = executed(BULK.format(fence="fence.proxy.async.shared::cta;", size=256), seed=seed)
    assert words.tolist() == list(range(64))
    assert not machine.findings
    _, machine = executed(BULK.format(fence="", size=256), seed=seed)
    assert any("without a proxy fence" in text for text in machine.findings)


WAIT = """
	mbarrier.init.shared::cta.b64 [%r3], 2;
	mbarrier.arrive.shared::cta.b64 _, [%r3];
AGAIN:
	mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r3], 0;
	@!%p1 bra AGAIN;
"""


@pytest.mark.parametrize(
    ("body", "threads", "said"),
    [
        ("st.global.u32 [%rd3+4], %r1;", 64, "global memory out of bounds"),
        ("st.shared.u32 [%r4+512], %r1;", 64, "shared memory out of bounds"),
        ("ld.global.u32 %r5, [%rd1+2];", 64, "not aligned to 4 bytes"),
        (BULK.format(fence="", size=24), 64, "a bulk copy of 24 bytes"),
        (WAIT, 1, "deadlock"),
        (WAIT.replace(", 2;", ", 0;"), 1, "for 0 arrivals"),
        ("setp.lt.s32 %p1, %r1, 8; @%p1 bra.uni AWAY; AWAY:", 64, "diverges"),
    ],
)
def test_faults_end_a_launch(body, threads, said):
    with pytest.raises(Fault, match=said):
        executed(body, threads, seed=1)


def test_unknown_instructions_are_named():
    for body in ("sad.u32 %r5, %r1, %r1, %r1;", "add.sat.s32 %r5, %r1, %r1;"):
        with pytest.raises(NotImplementedError, match=re.escape(body[:-1])):
            executed(body)


@pytest.mark.parametrize(("stride", "waves"), [(4, 1), (8, 2), (16, 4), (0, 1)])
def test_wavefronts(stride, waves):
    """Words that lie so many bytes apart, by a warp; the same word for all lanes is one access."""
    _, machine = executed(f"mad.lo.s32 %r5, %r1, {stride}, %r3; ld.shared.u32 %r6, [%r5];", 32)
    (touched,) = (one for one in machine.counts["kernel"].touched.values())
    assert (touched.requests, touched.units, touched.least) == (1, waves, 1)


# Its arithmetic.

LIBM = ctypes.CDLL(None)
LIBM.fmaf.restype, LIBM.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def floats(random: np.random.Generator, low: int, high: int) -> np.ndarray:
    """32 of any sign and mantissa, few bits or many, with exponents in a range."""
    bits = random.integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    kept = random.choice(np.array([0x807FFFFF, 0x80700000, 0x80700001], np.uint32))
    return (bits & kept | random.integers(low, high, 32).astype(np.uint32) << np.uint32(23)).view(np.float32)


@np.errstate(all="ignore")
@pytest.mark.parametrize(("low", "high"), [(1, 250), (100, 150), (1, 80)])
def test_multiply_add_rounds_once(low, high):
    random = np.random.default_rng(0)
    for _ in range(150):
        a, b, c = floats(random, low, high), floats(random, low, high), floats(random, 0, high)
        nearest, below = arithmetic.fma_f32_rn(a, b, c), arithmetic.fma_f32_rm(a, b, c)
        wanted = [LIBM.fmaf(*map(float, three)) for three in zip(a, b, c, strict=True)]
        assert np.array_equal(nearest, np.array(wanted, np.float32), equal_nan=True)
        above = np.nextafter(below, np.float32(np.inf))
        for x, y, z, down, up in zip(*(v.tolist() for v in (a, b, c, below, above)), strict=True):
            if np.isfinite(down) and np.isfinite(up):
                assert Fraction(down) <= Fraction(x) * Fraction(y) + Fraction(z) < Fraction(up)


@np.errstate(all="ignore")
@pytest.mark.parametrize(("low", "high"), [(1, 250), (100, 150), (120, 130)])
def test_sums_toward_zero(low, high):
    random = np.random.default_rng(0)
    for _ in range(150):
        a, b = floats(random, low, high), floats(random, low, high)
        for x, y, z in zip(a.tolist(), b.tolist(), arithmetic.add_f32_rz(a, b).tolist(), strict=True):
            exact = Fraction(x) + Fraction(y) if np.isfinite(x) and np.isfinite(y) else None
            if exact is not None and np.isfinite(z):
                further = float(np.nextafter(np.float32(z), np.float32(np.copysign(np.inf, float(exact)))))
                assert abs(Fraction(z)) <= abs(exact) < abs(Fraction(further)) or not np.isfinite(further)


@np.errstate(all="ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_to_nearest_even(dtype):
    convert = arithmetic.to_bf16 if dtype == torch.bfloat16 else arithmetic.to_f16
    bits = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), (bits & 0xFFFF8000).view(np.float32)])  # the second have ties
    values = values[~np.isnan(values)]
    wanted = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(convert(values), wanted)
