"""What the kernels execute and touch, as numbers; and how long the settler's chain is beside the memory's time.

Counts are exact; cycles are computed from estimated latencies, and no clock of a GPU is behind them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from .cases import BF16, FP32, NAMES, Case, Run
from .launches import Executor
from .stats import Stats

CONSUMERS = 8
LOADER, STORER, SETTLER = CONSUMERS, CONSUMERS + 1, CONSUMERS + 2
"""Numbers of warps (csrc/cuda/layout.h); all from SETTLER on settle."""

GPUS = {"H200": 4.3e12, "H100": 3.0e12}
"""Bytes a second that a copy moves, as assumed; of both:"""
PROCESSORS, CLOCK = 132, 1.755e9


def roles_of(stats: Stats) -> dict[str, range]:
    """Which warps of a launch do what."""
    warps = stats.threads // 32
    if "row_kernel" not in stats.kernel.name:
        return {"all": range(warps)}
    names = {"consumers": range(CONSUMERS), "loader": range(LOADER, STORER), "storer": range(STORER, SETTLER)}
    return names | {"settler": range(SETTLER, warps)}


@dataclass
class Counts:
    """Of one kernel; elements are those of the live rows."""

    case: str
    kernel: str
    wrong: list[str]  # as Run has it: counts of wrong results say nothing
    loaded: float  # bytes of bulk copies, of the rows' own
    stored: float
    wavefronts: float  # of shared memory, of the least that the same bytes need
    sectors: float  # of global memory, likewise
    instructions: dict[str, float]  # by role, of a lane, an element
    classes: dict[str, dict[str, float]]  # the same by role and class


def counted(case: Case) -> tuple[Counts, Stats]:
    """Of the case's kernel that executes most; for a divergence's backward, which runs after its forward, the last."""
    run = Run(case)
    launched = list(run.machine.counts.values())
    is_last = case.what == "divergence_backward"
    stats = launched[-1] if is_last else max(launched, key=lambda one: sum(one.runs.values()))
    elements, code = int(run.live.sum()) * case.vocab, stats.kernel.code
    instructions, classes = {}, {}
    for role, warps in roles_of(stats).items():
        executed = stats.executed(warps)
        kinds: Counter[str] = Counter()
        for pc, times in executed.items():
            kinds[code[pc].kind] += times
        instructions[role] = 32 * sum(executed.values()) / elements
        classes[role] = {kind: 32 * times / elements for kind, times in kinds.most_common()}
    moved = [size / elements / case.dtype.itemsize for size in (run.machine.bulk_loaded, run.machine.bulk_stored)]
    ratios = [_over_the_least(stats, space) for space in ("shared", "global")]
    return Counts(str(case), stats.kernel.name, run.wrong, *moved, *ratios, instructions, classes), stats


def _accesses(stats: Stats, space: str) -> list[tuple[int, Any]]:
    """Program counters and what they touched, most first."""
    shared = {pc: "shared" in stats.kernel.code[pc].kind for pc in stats.touched}
    found = [(pc, one) for pc, one in stats.touched.items() if shared[pc] == (space == "shared")]
    return sorted(found, key=lambda item: -item[1].units)


def _over_the_least(stats: Stats, space: str) -> float:
    accesses = [one for _, one in _accesses(stats, space)]
    return sum(one.units for one in accesses) / max(1, sum(one.least for one in accesses))


# The settler: one warp a row, whose instructions wait for one another.

LATENCY = {"int": 5, "select": 5, "fp32": 5, "fp64": 8, "cvt": 10, "mufu": 22, "shfl": 24, "branch": 12}
LATENCY |= {"ld.shared": 30, "ld.global": 300, "ld.param": 0, "mov": 0, "st.shared": 1, "st.global": 1, "cp": 4}
LATENCY["sync"] = 20
EXPANDED = {("div", "f64"): 150, ("div", "f32"): 45, ("div", "s32"): 45, ("div", "s64"): 120}
"""Subroutines."""
EXCHANGE = 1000
"""A message between blocks, sent and waited for. All of these are cycles of Hopper, estimated from microbenchmarks."""
CACHED, CACHED_LATENCY = ("surrogates.h", "logit_map.h"), 40
"""Files whose global reads are of the same few numbers for every row."""


@dataclass
class Chain:
    """What settling a row takes, beside the time in which memory moves the block's slice in and out."""

    case: str
    settlers: int  # warps that take rows in turn
    instructions: float  # of a row
    cycles: float
    exchange: int
    percent: dict[str, float]  # by kind of GPU: (cycles + exchange) / settlers / the slice's cycles


def chain(dtype: Any, vocab: int, kind: str = "") -> Chain:
    """Of a fused row in the backend's own layout, or of a pair of that divergence; from the difference of 16 rows and
    8."""
    with Executor().cuda() as cuda:
        own = cuda.plan(0, dtype, vocab, 2 if kind else 1)
    found, what = [], "fused_divergence" if kind else "fused"
    columns = vocab if vocab < 2000 else vocab // 16  # the chain does not depend on it
    for rows in (8, 16):  # both with the same special rows
        case = Case("cuda", what, dtype, columns, (own.cluster, 1, own.tiles), rows=(1, rows), seed=1)
        case = replace(case, kind=kind, teacher=dtype)
        run = Run(case, SETTLER)
        stats = next(stats for name, stats in run.machine.counts.items() if "row_kernel" in name)
        traces = stats.traces.values()
        instructions = sum(end - begin for trace in traces for begin, end in trace)
        found.append((int(run.live.sum()), instructions, sum(_cycles(stats, trace) for trace in traces)))
    live, instructions, cycles = (many - few for few, many in zip(*found, strict=True))
    instructions, cycles = instructions / live, cycles / live
    settled, moved_rows = (2, 3) if kind else (1, 2)
    exchange, settlers = settled * EXCHANGE if own.cluster > 1 else 0, len(roles_of(stats)["settler"])
    slice_bytes = moved_rows * vocab / own.cluster * dtype.itemsize
    moved = {gpu: slice_bytes * PROCESSORS * CLOCK / copy for gpu, copy in GPUS.items()}
    percent = {gpu: 100 * (cycles + exchange) / settlers / time for gpu, time in moved.items()}
    what = " ".join(filter(None, (NAMES[dtype], str(vocab), kind, f"in {own.cluster}")))
    return Chain(what, settlers, instructions, cycles, exchange, percent)


def _registers(operand: Any) -> list[int]:
    if operand[0] in ("register", "not"):
        return [operand[1]]
    if operand[0] == "memory":
        return _registers(operand[1])
    return [number for one in operand[1] for number in _registers(one)] if operand[0] in ("vector", "pair") else []


def _cycles(stats: Stats, trace: list[tuple[int, int]]) -> float:
    """Of one warp alone that issues in order and waits for operands; copies between registers are free."""
    now, ready = 0.0, {}
    for one in (one for begin, end in trace for one in stats.kernel.code[begin:end]):
        writes = one.name not in ("st", "bra", "cp", "bar", "fence") and one.parts[:2] != ["mbarrier", "expect_tx"]
        operands = one.operands[1:] if writes else one.operands
        sources = [number for operand in operands for number in _registers(operand)]
        sources += [one.guard[0]] if one.guard else []
        expanded = EXPANDED.get((one.name, one.parts[-1]))
        latency = expanded or LATENCY[one.kind]
        if one.kind == "ld.global" and one.place.startswith(CACHED):
            latency = CACHED_LATENCY
        start = max([now, *(ready.get(number, 0.0) for number in sources)])
        if one.kind in ("branch", "sync"):
            start += latency
        for number in _registers(one.operands[0]) if writes and one.operands else ():
            ready[number] = start + latency
        now = start + (expanded or (1 if latency else 0))
    return now


# What is printed.

_FUSED = Case("cuda", "fused", BF16, 151936, rows=(1, 4), out="in", seed=1)
_ONE_BLOCK = replace(_FUSED, vocab=32000, plan=(1, 1, 13))
_PAIR = replace(_ONE_BLOCK, what="fused_divergence", kind="reverse_kl", teacher=BF16, plan=(2, 1, 6))
_TRITON = replace(_FUSED, backend="triton", out="own", processors=1)
_TRITON_PAIR = replace(_TRITON, what="divergence", kind="reverse_kl", teacher=BF16)
CASES = {
    "cuda fused bf16 151936": _FUSED,
    "cuda backward bf16 151936": replace(_FUSED, what="backward"),
    "cuda log_probs bf16 151936": replace(_FUSED, what="log_probs"),
    "cuda fused bf16 32000": _ONE_BLOCK,
    "cuda fused bf16 32001 skew1": replace(_ONE_BLOCK, vocab=32001, skew=1),
    "cuda fused fp32 32000": replace(_ONE_BLOCK, dtype=FP32),
    "cuda fused_divergence bf16 32000 reverse_kl": _PAIR,
    "cuda fused_divergence bf16 32000 jsd": replace(_PAIR, kind="jsd"),
    "cuda divergence bf16 32000 reverse_kl": replace(_PAIR, what="divergence"),
    "cuda divergence_backward bf16 32000 reverse_kl": replace(_PAIR, what="divergence_backward"),
    "triton log_probs bf16 151936": replace(_TRITON, what="log_probs"),
    "triton backward bf16 151936": replace(_TRITON, what="backward"),
    "triton fused bf16 32000": replace(_TRITON, vocab=32000),
    "triton divergence bf16 151936 forward_kl": replace(_TRITON_PAIR, kind="forward_kl"),
    "triton divergence bf16 151936 reverse_kl": _TRITON_PAIR,
    "triton divergence bf16 151936 jsd": replace(_TRITON_PAIR, kind="jsd"),
    "triton divergence_backward bf16 151936 reverse_kl": replace(_TRITON_PAIR, what="divergence_backward"),
}
CHAINS: dict[str, tuple[Any, ...]] = {
    f"settler {NAMES[dtype]} {vocab}": (dtype, vocab)
    for dtype, vocab in ((BF16, 151936), (BF16, 32000), (FP32, 32000), (BF16, 1000))
}
CHAINS |= {f"settler pair {NAMES[BF16]} {vocab}": (BF16, vocab, "reverse_kl") for vocab in (151936, 32000)}


def show(words: list[str], as_json: bool) -> None:
    """Counts of the cases and chains whose names hold every word: tables, or one JSON object by name."""
    found = {}
    for name in (name for name in (*CASES, *CHAINS) if all(word in name.split() for word in words)):
        if name in CHAINS:
            found[name] = asdict(one := chain(*CHAINS[name]))
            lines = _chain_lines(one)
        else:
            one, stats = counted(CASES[name])
            found[name], lines = asdict(one), _count_lines(one, stats)
        if not as_json:
            print("\n".join([f"\n{name}", *lines]), flush=True)
    if as_json:
        print(json.dumps(found))


def _count_lines(one: Counts, stats: Stats) -> list[str]:
    lines = [f"  {one.kernel}: bulk copies load {one.loaded:.4f} of the rows' bytes, store {one.stored:.4f}"]
    lines += [f"  WRONG: {text}" for text in one.wrong]
    for role, number in one.instructions.items():
        classes = ", ".join(f"{kind} {n:.3f}" for kind, n in list(one.classes[role].items())[:12])
        lines.append(f"  {role}: {number:.3f} instructions an element ({classes})")
    for space, ratio, unit in (("shared", one.wavefronts, "wavefronts"), ("global", one.sectors, "sectors")):
        accesses = _accesses(stats, space)
        lines.append(f"  {space}: {ratio:.3f} of the least {unit}; of {len(accesses)} instructions:")
        for pc, touched in accesses[:5]:
            each = f"{touched.units / touched.requests:6.2f} (least {touched.least / touched.requests:5.2f})"
            code = stats.kernel.code[pc]
            lines.append(f"    {touched.requests:7d} x {each} {code.place}: {code.text[:60]}")
    return lines


def _chain_lines(one: Chain) -> list[str]:
    shares = ", ".join(f"{percent:.0f} % on {gpu}" for gpu, percent in one.percent.items())
    return [
        f"  {one.case}, {one.settlers} settling: {one.instructions:.0f} instructions a row, {one.cycles:.0f} cycles + "
        f"{one.exchange} for the exchange; a settler is busy {shares}",
        "  (computed from estimated latencies; 100 %: as long as memory takes to move the slice)",
    ]
