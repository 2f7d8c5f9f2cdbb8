"""The cut of a row into blocks: a small table, blocks.json, by kind of GPU, dtype and length of the row.

"any" was chosen by counting instructions and by compiling for sm_80 to sm_100 without spills;
benchmarks/tune_triton.py measures the entries of a kind of GPU (named as compilers do, "sm_90" or "gfx942") and writes
them. The first entry that fits is taken, the GPU's own ones first; null fits everything.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

TABLE = Path(__file__).with_name("blocks.json")


class Blocks(NamedTuple):
    """The cut of a kind of row. All kernels take the same, or their bits would differ: the order of a sum depends on
    the span, the block and the number of warps. Never a function of the number of rows."""

    span: int
    """Columns whose sums are added lane by lane."""
    block: int
    warps: int
    """Warps of 32 threads."""
    stages: int
    hold: bool
    """Whether the one-pass loss keeps a row of at most one span in registers, and so reads it once."""
    two_sweeps: bool
    """Whether one pass of two sweeps is taken for rows that are not held: where it measured faster than two passes."""

    def held(self, vocab: int) -> int:
        """Return how many blocks of a row stay in registers; 0: it is swept twice."""
        return triton.cdiv(vocab, self.block) if self.hold and vocab <= self.span else 0

    def fuses(self, vocab: int) -> bool:
        """Whether the one-pass loss is the fastest."""
        return self.two_sweeps or self.held(vocab) > 0


@functools.cache
def blocks_for(vocab: int, dtype: torch.dtype, softcap: bool = False, target: str = "any") -> Blocks:
    """Return the cut of rows of ``vocab`` columns on the kind of GPU ``target``."""
    for entry in _entries(target):
        wanted = {"dtype": str(dtype).removeprefix("torch."), "softcap": softcap}
        fits = all(entry[name] in (None, value) for name, value in wanted.items())
        if fits and (entry["columns"] is None or vocab <= entry["columns"]):
            return _shortened(Blocks(*(entry[name] for name in Blocks._fields)), vocab)
    raise RuntimeError(f"blocks.json has no entry for {vocab} columns of {dtype} on {target}")


def _shortened(blocks: Blocks, vocab: int) -> Blocks:
    """Return a cut with a block, and warps, no longer than a row needs."""
    whole = triton.next_power_of_2(vocab)
    if whole >= blocks.block:
        return blocks
    return blocks._replace(block=whole, warps=min(blocks.warps, max(4, whole // 256)))


def _entries(target: str) -> list[dict[str, Any]]:
    measured = table().get(target, []) if target != "any" else []
    return [*measured, *table()["any"]]


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """Return the entries by kind of GPU."""
    return json.loads(TABLE.read_text())


@functools.cache
def target_of(device: torch.device) -> str:
    """Return the kind of GPU, as compilers name it; "any" for the interpreter."""
    if device.type != "cuda":
        return "any"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
