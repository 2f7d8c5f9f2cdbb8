"""Which cases are run: layouts, dtypes, schedules, races; and which of them must have equal bits."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grpo_kernels.objectives.divergence import KINDS

from .cases import BF16, FP16, FP32, FP64, STATS, Case, Run

PASSES = ("log_probs", "backward", "fused")
PAIRS = ("divergence", "divergence_backward")
FUSED_PAIRS = (*PAIRS, "fused_divergence")
"""Of the backend whose one pass takes pairs of rows."""


def _cuda_cases() -> list[Case]:
    base, found = Case("cuda", "fused", BF16, 1000), []
    shapes = itertools.product((BF16, FP32, FP16), (97, 1000, 4101, 32000), (1, 2, 4, 8), PASSES)
    for seed, (dtype, vocab, cluster, what) in enumerate(shapes, 1):
        pick = random.Random(seed).choice
        need = max(1, -(-(-(-vocab * dtype.itemsize // 16) // cluster) * 16 // 16384))  # tiles of a slice
        plan = (cluster, pick((1, 1, 2, 3)), pick((need, need + 1, 2 * need, 13)))
        case = replace(base, what=what, dtype=dtype, vocab=vocab, plan=plan, seed=seed, skew=pick((0, 0, 1, 3, 7)))
        case = replace(case, out=pick(("in", "own")), entropy=pick((True, False)), cap=pick((0.0, 0.0, 3.0)))
        found.append(replace(case, rows=pick(((2, 3), (1, 9)))))
    for seed in range(200, 224):  # many rows through small rings, many schedules
        pick = random.Random(seed).choice
        case = replace(base, dtype=pick((BF16, FP32)), vocab=10000, plan=(pick((1, 2)), 1, pick((3, 4, 5, 6))))
        case = replace(case, seed=seed, rows=(1, 12), out=pick(("in", "own")), skew=pick((0, 1)))
        found.append(replace(case, entropy=pick((True, False))))
    for seed in range(300, 318):
        pick = random.Random(seed).choice
        case = replace(base, what=("fused", *PASSES[::-1])[seed % 4], dtype=pick((BF16, BF16, FP32)), seed=seed)
        case = replace(case, vocab=pick((97, 4101, 10000, 40000)), plan=(pick((1, 2)), 1, pick((5, 6, 7))), rows=(1, 8))
        case = replace(case, out=pick(("in", "own")), skew=pick((0, 0, 1)), entropy=pick((True, False)))
        found.append(replace(case, races=True))
    wide = replace(base, dtype=FP64, vocab=4101, plan=(2, 2, 13), entropy=True)
    for i, what in enumerate(PASSES):
        found.append(replace(wide, what=what, seed=3 + i, skew=i % 2))
        found.append(replace(base, what=what, vocab=151936, seed=5, rows=(1, 2), out="in"))
        found.append(replace(base, what=what, vocab=32000, dtype=FP32, seed=5, rows=(1, 5)))
    return [*found, *_cuda_pairs(base), replace(base, plan=(16, 1, 13), seed=9, rows=(1, 7))]


def _cuda_pairs(base: Case) -> list[Case]:
    """Every divergence; layouts of one pair and of two in the ring; races."""
    found = []
    for seed, (kind, what) in enumerate(itertools.product(KINDS, FUSED_PAIRS), 400):
        pick = random.Random(seed).choice
        case = replace(base, what=what, kind=kind, teacher=BF16, seed=seed, plan=(pick((1, 2)), 1, 2), rows=(1, 9))
        found.append(replace(case, entropy=pick((True, False)), perturbed=pick((True, False))))
    shapes = itertools.product((BF16, FP32, FP16), (97, 4101, 32000), (1, 2, 4), FUSED_PAIRS)
    for seed, (dtype, vocab, cluster, what) in enumerate(shapes, 430):
        pick = random.Random(seed).choice
        need = -(-(-(-vocab * dtype.itemsize // 16) // cluster) * 16 // 16384)  # places that a slice takes
        plan = (cluster, pick((1, 2)), max(need, pick((need, 2 * need, 6)), 3 if what == "divergence_backward" else 1))
        case = replace(base, what=what, dtype=dtype, teacher=dtype, vocab=vocab, plan=plan, seed=seed)
        case = replace(case, kind=pick(("forward_kl", "reverse_kl", "mixed_kl", "jsd")), skew=pick((0, 0, 1, 4)))
        case = replace(case, cap=pick((0.0, 0.0, 3.0)), per_row=pick((True, False)), entropy=pick((True, False)))
        found.append(replace(case, out=pick(("in", "own")), rows=pick(((2, 3), (1, 9)))))
    for seed, what in enumerate(2 * FUSED_PAIRS, 520):
        pick = random.Random(seed).choice
        case = replace(base, what=what, kind="reverse_kl", teacher=BF16, vocab=10000, plan=(2, 1, pick((3, 4))))
        found.append(replace(case, seed=seed, rows=(1, 8), skew=pick((0, 1)), races=True))
    wide = replace(base, dtype=FP64, teacher=FP64, kind="mixed_kl", vocab=4101, plan=(2, 2, 6), seed=530)
    return [*found, *(replace(wide, what=what) for what in FUSED_PAIRS)]


def _triton_cases() -> list[Case]:
    base, found = Case("triton", "log_probs", BF16, 1000), []
    shapes = itertools.product((BF16, FP32), (97, 1000, 4101, 8192, 32000, 40000), PASSES, (1, 2))
    for seed, (dtype, vocab, what, _) in enumerate(shapes, 1):
        pick = random.Random(seed).choice
        case = replace(base, what=what, dtype=dtype, vocab=vocab, seed=seed, skew=pick((0, 0, 3)))
        case = replace(case, out=pick(("in", "own", "odd")), entropy=pick((True, False)), cap=pick((0.0, 0.0, 3.0)))
        found.append(replace(case, processors=pick((132, 1))))
    found.append(replace(base, dtype=FP16, vocab=4101, seed=3))
    found += [replace(base, dtype=dtype, rows=(1, 9), seed=7) for dtype in (BF16, FP64)]
    found += [replace(base, what=what, dtype=FP64, seed=3) for what in PASSES]
    for seed, (what, cap) in enumerate(itertools.product(PASSES, (0.0, 3.0)), 11):
        case = replace(base, what=what, dtype=(BF16, FP32)[seed % 2], entropy=True, cap=cap, seed=seed)
        found.append(replace(case, per_row=True))
    found.append(replace(base, vocab=70000, processors=132, per_row=True, seed=17))  # a program a span
    found += _pairs(base)
    tokens = replace(base, what="tokens", vocab=300)
    found += [replace(tokens, rows=(2, n), dtype=dtype, seed=n) for n, dtype in ((3, FP32), (400, BF16))]
    rescale = replace(base, what="rescale", vocab=4101, skew=1, seed=4101)
    return [*found, rescale, replace(rescale, dtype=FP32, vocab=1000, skew=0, seed=1000)]


def _pairs(base: Case) -> list[Case]:
    """Every divergence, and its gradient; then the layouts of rows."""
    found = []
    for seed, (kind, what) in enumerate(itertools.product(KINDS, PAIRS), 1):
        pick = random.Random(seed).choice
        case = replace(base, what=what, kind=kind, seed=seed, teacher=pick((BF16, FP32)), rows=(1, 9))
        found.append(replace(case, entropy=pick((True, False)), perturbed=pick((True, False))))
    shapes = itertools.product((BF16, FP32), (97, 4101, 32000), PAIRS)
    for seed, (dtype, vocab, what) in enumerate(shapes, 100):
        pick = random.Random(seed).choice
        case = replace(
            base, what=what, dtype=dtype, vocab=vocab, seed=seed, kind=pick(("reverse_kl", "mixed_kl", "jsd"))
        )
        case = replace(case, teacher=pick((dtype, FP16)), skew=pick((0, 0, 1, 4)), out=pick(("in", "own", "odd")))
        found.append(replace(case, cap=pick((0.0, 3.0)), per_row=pick((True, False)), entropy=pick((True, False))))
    wide = replace(base, dtype=FP64, kind="mixed_kl", teacher=FP64, seed=120)
    return [*found, *(replace(wide, what=what) for what in PAIRS)]


def _with_equal_bits() -> list[list[Case]]:
    """CUDA's bits depend on nothing but the plan; Triton's on nothing but the vocabulary: rows begin anywhere."""
    found = []

    def add(case: Case, *changes: dict[str, Any]) -> None:
        found.append([case, *(replace(case, **change) for change in changes)])

    for dtype, vocab, cap, perturbed in itertools.product((BF16, FP32), (1000, 32000), (0.0, 3.0), (False, True)):
        case = Case("cuda", "log_probs", dtype, vocab, (2, 2, 13), cap=cap, perturbed=perturbed)
        odd = {"what": "fused", "skew": 1, "seed": 5, "entropy": True}
        add(case, {"what": "fused"}, {"skew": 3, "seed": 4}, {"plan": (2, 1, 5), "seed": 6}, odd)
        case, odd = replace(case, backend="triton", plan=None), {"what": "fused", "out": "odd", "entropy": True}
        add(case, {"what": "fused"}, {"processors": 1}, odd, {"skew": 3}, {"skew": 4}, {"skew": 2, "what": "fused"})
    for perturbed in (False, True):  # several spans: one program a row or one a span
        case = Case("triton", "log_probs", BF16, 70000, perturbed=perturbed)
        add(case, {"processors": 1}, {"what": "fused"}, {"skew": 3}, {"skew": 4, "what": "fused"})
    return found


def _differences(cases: list[Case]) -> list[str]:
    """What is wrong with each, and where bits of the statistics are not those of the first."""
    wrong, first = [], None
    for case in cases:
        run = Run(case)
        wrong += [f"{case}: {text}" if len(cases) > 1 else text for text in run.wrong]
        if len(cases) > 1 and set(STATS) <= set(run.outputs):
            found = {name: run.outputs[name].numpy().view(np.uint32) for name in STATS}
            first = first or found
            unequal = [name for name in STATS if (found[name] != first[name]).any()]
            wrong += [f"{case}: bits of {name} are not those of {cases[0]}" for name in unequal]
    return wrong


STEP = {"cuda": 25, "triton": 15}
"""Of so many cases of a pass that are not long, the first is a quick one."""


def _sampled(all_cases: list[list[Case]]) -> list[list[Case]]:
    groups: dict[Any, list[list[Case]]] = {}
    for cases in all_cases:
        one, several = cases[0], len(cases) > 1
        if one.vocab <= (1000 if several else 10000 if one.races else 32000):
            key = (one.backend, one.what, one.races, one.races and one.skew > 0, several, one.per_row)
            groups.setdefault(key, []).append(cases)
    return [cases for (backend, *_), group in groups.items() for cases in group[:: STEP[backend]]]


def jobs(quick: bool, words: Sequence[str]) -> dict[str, list[Case]]:
    """Cases by a name, those that must have equal bits together; of those whose names hold every word."""
    found = [[case] for case in _cuda_cases() + _triton_cases()] + _with_equal_bits()
    named = {
        ("bits " if len(cases) > 1 else "") + str(cases[0]): cases for cases in (_sampled(found) if quick else found)
    }
    return {name: cases for name, cases in named.items() if set(words) <= set(name.split())}


def check(quick: bool, words: list[str], stop_at_first: bool) -> int:
    """Runs and prints them; how many are wrong."""
    chosen, failed, began = jobs(quick, words), 0, time.time()
    for name, cases in chosen.items():
        start = time.time()
        wrong = _differences(cases)
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '} {time.time() - start:5.1f} s  {name}", flush=True)
        for text in wrong:
            print(f"       {text}", flush=True)
        if failed and stop_at_first:
            break
    print(f"{len(chosen)} cases, {failed} with discrepancies, {time.time() - began:.0f} s")
    return failed
