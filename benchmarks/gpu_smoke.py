"""First contact of the CUDA kernels with a GPU: steps from least to most risk, each in a process with a deadline.

    python benchmarks/gpu_smoke.py                                    # on the GPU, about a minute
    python benchmarks/gpu_smoke.py --device cpu                       # a rehearsal over tests/cuda_emulator
    compute-sanitizer --error-exitcode 9 python benchmarks/gpu_smoke.py --no-fork --small --skip races --skip times

A step that hangs is named and killed, one that faults poisons only its own process. Exit status 0: every step held.
On a CPU, GRPO_KERNELS_CUDA_LIBRARY names the emulator's library (gpu_check.py --device cpu builds it).
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_calls
import gpu_rows
import gpu_steps
import torch  # before the forks; CUDA is first touched in one of them
from gpu_calls import Setting, Shape
from gpu_process import Ended, Interrupted, end_on_signals, fork

Step = tuple[str, Callable[[Setting], bool]]
LONG = 4
"""Times as long as another step:"""
REPEATED = ("races", "times", "times of pairs")
START = 8.0
"""Seconds in which a step's process finds the GPU and makes its logits, beside one launch that hangs."""
MARGIN = 3.0
"""Seconds that are left for the last words when the time of all steps is over."""


def steps(small: bool) -> list[Step]:
    """Return the steps in the order of risk."""

    def rows(many: int, few: int) -> int:
        return few if small else many

    half, single, double = torch.float16, torch.float32, torch.float64
    wide = [Shape(rows(300, 3), 32000), Shape(rows(40, 1), 151936)]
    unaligned = [Shape(rows(300, 3), 50257), Shape(37, 97), Shape(rows(37, 3), 9001, skew=3), Shape(37, 3)]
    unaligned += [Shape(rows(37, 2), 9001, single, 1), Shape(rows(37, 2), 9001, double, 1)]
    equal = [Shape(3000, 151936), Shape(3000, 128256), Shape(5000, 32000), Shape(2000, 50257)]
    paired = [Shape(1, 512), Shape(rows(300, 2), rows(32000, 9001)), Shape(rows(37, 3), 97, skew=3)]
    paired += [Shape(rows(37, 2), rows(9001, 1001), single, 1)]
    paired += [] if small else [Shape(40, 151936), Shape(40, 151936, single), Shape(300, 50257)]
    timed = [Shape(8192, 151936), Shape(8192, 128256), Shape(16384, 32000), Shape(16384, 4096)]
    return [
        ("environment", gpu_steps.environment),
        ("log-probs, one block, one row", _step(gpu_steps.sums, Shape(1, 512))),
        ("log-probs, rings that wrap", _step(gpu_steps.sums, *wide)),
        ("backward, bulk stores", _step(gpu_steps.gradients, Shape(1, 512), *wide)),
        ("fused, a cluster of 4, one row", _step(gpu_steps.one_pass, Shape(1, 151936))),
        ("fused, clusters of 4 and 8", _step(gpu_steps.one_pass, wide[1], Shape(rows(100, 1), 262144))),
        ("fused, one block a cluster", _step(gpu_steps.one_pass, Shape(1, 512), wide[0])),
        ("unaligned rows", _step(gpu_steps.one_pass, *unaligned)),
        ("dtypes", _step(gpu_steps.one_pass, *(Shape(rows(37, 2), 9008, dtype) for dtype in (half, single, double)))),
        ("dead rows", _step(gpu_steps.dead_rows, Shape(rows(301, 8), 32000), Shape(rows(301, 8), 50257))),
        ("races", _step(gpu_steps.races, *([Shape(6, 9008)] if small else equal))),
        ("times", _step(gpu_steps.times, *timed)),
        ("pairs, two passes", _pairs(gpu_calls.Pair.two_passes, *paired)),
        ("pairs, one pass", _pairs(gpu_calls.Pair.one_pass, *paired)),
        ("times of pairs", _step(gpu_steps.times_of_pairs, Shape(8192, 151936), Shape(16384, 32000))),
    ]


def _step(function: Callable[..., bool], *shapes: Shape) -> Callable[[Setting], bool]:
    return lambda setting: function(setting, *shapes)


def _pairs(call: Callable[[gpu_calls.Pair, torch.Tensor], None], *shapes: Shape) -> Callable[[Setting], bool]:
    return lambda setting: gpu_steps.pairs(setting, call, *shapes)


def run(chosen: Sequence[Step], setting: Setting, seconds: float, forked: bool = True) -> list[str]:
    """Every step that failed. Races and times are left out after a failure: they time and repeat what does not hold."""
    start = time.monotonic()
    failed: list[str] = []
    for name, function in chosen:
        if failed and name in REPEATED:
            print(f"   {name}: left out after a failure", flush=True)
            continue
        print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)
        left = seconds - MARGIN - (time.monotonic() - start)
        limit = START + setting.patience * (LONG if name in REPEATED else 1)
        ended = _alone(function, setting, min(limit, left)) if forked else _here(function, setting)
        gpu_rows.write(setting.rows, name, passed=not str(ended), seconds=ended.seconds, how=_how(ended))
        if str(ended):
            failed.append(name)
            print(f"   FAILED: {name}: {_how(ended)}", flush=True)
        if ended.held:
            print("   no further step: the driver does not let go of this one", flush=True)
            break
    words = f"FAILED: {'; '.join(failed)}" if failed else "every step held"
    print(f"{time.monotonic() - start:6.1f} s  {words}", flush=True)
    return failed


def _alone(function: Callable[[Setting], bool], setting: Setting, seconds: float) -> Ended:
    """Run a step in a process of its own."""
    if seconds <= 0:
        return Ended(None, 0.0)
    return fork(partial(function, setting), seconds)


def _here(function: Callable[[Setting], bool], setting: Setting) -> Ended:
    start = time.monotonic()
    try:
        code = 0 if function(setting) else 1
    except Exception:
        traceback.print_exc()
        code = 2
    return Ended(code, time.monotonic() - start)


def _how(ended: Ended) -> str:
    """Say why a step failed."""
    known = {1: "a wrong result", 2: "an exception", 3: "a launch that hangs"}
    return known.get(ended.code or 0, str(ended))


def chosen_of(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """Return those whose name holds a word of ``only``, if there are any, and none of ``skip``."""
    return [
        step for step in steps
        if (not only or any(word in step[0] for word in only)) and not any(word in step[0] for word in skip)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="steps whose name holds this")
    parser.add_argument("--skip", action="append", default=[], metavar="WORD", help="none whose name holds this")
    parser.add_argument("--small", action="store_true", help="small shapes: under compute-sanitizer, on a CPU")
    parser.add_argument("--no-fork", action="store_true", help="in this process: under compute-sanitizer")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds that a launch may take (default: 20)")
    parser.add_argument("--seconds", type=float, default=200.0, help="for all steps together")
    parser.add_argument("--rows", type=Path, help="file that measured rows are appended to")
    arguments = parser.parse_args(argv)
    small = arguments.small or arguments.device == "cpu"
    everything = steps(small)
    chosen = chosen_of(everything, arguments.only, arguments.skip)
    if not chosen:
        parser.error(f"no step is left; there are {'; '.join(name for name, _ in everything)}")
    setting = Setting(arguments.device, small, arguments.patience, arguments.rows)
    end_on_signals()
    try:
        return 1 if run(chosen, setting, arguments.seconds, not arguments.no_fork) else 0
    except Interrupted as interrupted:
        print(f"interrupted by {interrupted}", flush=True)
        return interrupted.status


if __name__ == "__main__":
    raise SystemExit(main())
