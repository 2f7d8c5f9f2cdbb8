"""Measure how rows are best cut on this GPU and write its entries of grpo_kernels/backends/triton/blocks.json.

    python benchmarks/tune_triton.py                      # bfloat16 and float32, about four minutes each
    python benchmarks/tune_triton.py --dtypes bfloat16 --minutes 9 --out /tmp/blocks.json

For each dtype and length of rows: first block and warps, then stages of the forward's pipeline, then one pass with the
row held in registers against one pass of two sweeps against two passes. The score is the time of the forward alone plus
that of loss and gradient in place; a slower kind of pass is left only for one that is 10 % faster. The file is written
after each class of rows, so that a stopped run keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo_kernels import grpo_loss, token_log_probs
from grpo_kernels.backends.triton import blocks
from grpo_kernels.bench.measure import Clock
from grpo_kernels.bench.workload import DTYPES, Spec, Workload
from grpo_kernels.files import write_text

CLASSES = {8192: 8192, 32768: 32000, None: 151936}
"""Longest row of a class of entries, and the row it is measured on."""
LOGITS_BYTES = 1 << 30
SIZES = [
    (block, warps)
    for block in (1024, 2048, 4096, 8192)
    for warps in (4, 8, 16, 32)
    if 4 <= block // warps // 32 <= 32  # columns a thread
]
WORTHWHILE = 0.9
"""Of the time of the plainer way: two sweeps in one kernel are taken below it."""

Entry = dict[str, Any]
SHORT = {dtype: name for name, dtype in DTYPES.items()}


def changes(columns: int | None, span: int) -> dict[str, list[Entry]]:
    """Return what to vary, one after the other, each from the best so far."""
    ways = [{"hold": False, "two_sweeps": sweeps} for sweeps in (False, True)]
    if columns is not None and columns <= span:
        ways.insert(0, {"hold": True, "two_sweeps": False})
    sizes = [{"block": block, "warps": warps} for block, warps in SIZES]
    return {"sizes": sizes, "stages": [{"stages": stages} for stages in (1, 2, 3, 5)], "passes": ways}


def tune(start: Entry, work: Workload, target: str) -> Entry:
    """Return the best entry found from ``start`` on, with its milliseconds."""
    best = start | {"ms": milliseconds(start, work, target)}
    if best["ms"] is None:
        raise SystemExit("the table's own entry does not run here: see above")
    print(f"  so far: {describe(best)}: {best['ms']:.3f} ms", flush=True)
    for what, tried in changes(start["columns"], start["span"]).items():
        for change in tried[: None if work.spec.device == "cuda" else 2]:
            entry = best | change
            entry["ms"] = milliseconds(entry, work, target)
            margin = WORTHWHILE if entry["two_sweeps"] and not best["two_sweeps"] else 1.0
            if entry["ms"] is not None and entry["ms"] < margin * best["ms"]:
                best = entry
        print(f"  {what}: {describe(best)}: {best['ms']:.3f} ms", flush=True)
    return best


def milliseconds(entry: Entry, work: Workload, target: str) -> float | None:
    """Time forward alone plus loss and gradient in place; None where it does not compile or fit."""
    use(entry, target)
    total = 0.0
    for name, function in (("forward", forward), ("loss", loss_and_gradient)):
        try:
            total += median_ms(function, work)
        except Exception as error:
            print(f"  {describe(entry)} {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            return None
    return total


def forward(work: Workload) -> None:
    token_log_probs(work.kept, work.ids, backend="triton")


def loss_and_gradient(work: Workload) -> None:
    options = {"config": work.config, "inplace": True, "grad_scale": 1.0, "backend": "triton"}
    out = grpo_loss(work.logits(), work.ids, work.advantages, work.mask, **work.known(), **options)
    out.loss.backward()


def median_ms(function: Callable[[Workload], None], work: Workload) -> float:
    """Return the median of up to 15 calls in a second, after one that compiles."""
    samples: list[float] = []
    for k in range(16):
        work.restore()
        clock = Clock(work.spec.device)
        function(work)
        clock.mark()
        if k:
            samples.append(1e3 * clock.seconds()[0])
        if sum(samples) > 1e3:
            break
    return statistics.median(samples)


def use(entry: Entry, target: str) -> None:
    """Make ``entry`` the one that every launch takes."""
    blocks.table()[target] = [entry]
    blocks.blocks_for.cache_clear()


def describe(entry: Entry) -> str:
    way = "row held" if entry["hold"] else "two sweeps" if entry["two_sweeps"] else "two passes"
    return f"block {entry['block']}, {entry['warps']} warps, {entry['stages']} stages, {way}"


def order(entry: Entry) -> tuple[bool, str, float]:
    """Sort entries, of which the first that fits is taken: one dtype's before every one's, shorter rows first."""
    columns = float("inf") if entry["columns"] is None else entry["columns"]
    return entry["dtype"] is None, entry["dtype"] or "", columns


def write(entries: dict[str, list[Entry]], path: Path) -> None:
    """Write one entry a line, so that a change is read as one."""
    kinds = []
    for name, mine in entries.items():
        lines = ",\n".join(f"    {json.dumps({key: entry[key] for key in entry if key != 'ms'})}" for entry in mine)
        kinds.append(f'  "{name}": [\n{lines}\n  ]')
    write_text(path, "{\n" + ",\n".join(kinds) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="separated by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new class of rows is begun after so long")
    parser.add_argument("--out", type=Path, default=blocks.TABLE, help="the table to write (default: the package's)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal on tiny shapes")
    arguments = parser.parse_args()
    rehearsal = arguments.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        parser.error("no GPU is usable here (torch.cuda.is_available() is False); --device cpu rehearses")
    if rehearsal and arguments.out == blocks.TABLE:
        parser.error("a rehearsal measures nothing: give --out, another file than the package's table")
    device = torch.device(arguments.device)
    target = blocks.target_of(device)
    before = json.loads(blocks.TABLE.read_text())
    deadline = time.monotonic() + 60 * arguments.minutes
    found: list[Entry] = []
    dtypes = arguments.dtypes.split(",")
    for name in dtypes:
        dtype = getattr(torch, name)
        for columns, vocab in CLASSES.items():
            if time.monotonic() > deadline:
                print(f"stopped before {name}, {columns or 'longer'} columns: {arguments.minutes:g} minutes are over")
                return 1
            vocab = 300 if rehearsal else vocab
            tokens = 16 if rehearsal else LOGITS_BYTES // (vocab * dtype.itemsize) // 8 * 8
            print(f"{name}, up to {columns or 'any number of'} columns ({tokens} rows of {vocab})", flush=True)
            work = Workload(Spec(tokens, vocab, SHORT[dtype], device=arguments.device))
            plain = next(
                e for e in before["any"] if not e["softcap"] and e["dtype"] is None and e["columns"] == columns
            )
            found.append(tune(plain | {"dtype": name}, work, target))
            measured = {(entry["dtype"], entry["columns"]) for entry in found}
            others = [e for e in before.get(target, []) if (e["dtype"], e["columns"]) not in measured]
            write({**before, target: sorted([*found, *others], key=order)}, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
