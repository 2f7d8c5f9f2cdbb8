"""Counts of one kernel's launches: how often each instruction ran, and what each access touched."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parser import Kernel


@dataclass
class Touched:
    """What one memory instruction touched; units are sectors of 32 bytes, or wavefronts of 32 banks."""

    requests: int = 0
    units: int = 0
    least: int = 0  # units that the same bytes need where they lie best


class Stats:
    """Warps of block 0 from ``traced`` on keep in which order they ran."""

    def __init__(self, kernel: Kernel, traced: int = sys.maxsize) -> None:
        self.kernel, self.traced = kernel, traced
        self.launches = self.threads = 0  # threads of a block
        self.runs: Counter[tuple[int, int, int]] = Counter()  # warp, begin and end of a segment
        self.traces: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # warp -> begins and ends
        self.touched: dict[int, Touched] = {}  # by program counter
        self._known: dict[Any, tuple[int, int]] = {}

    def ran(self, warp: Any, begin: int, end: int) -> None:
        self.runs[warp.number, begin, end] += 1
        if warp.number >= self.traced and warp.block.index == 0:
            self.traces[warp.number].append((begin, end))

    def executed(self, warps: range) -> Counter[int]:
        """Warp instructions by program counter, of some of each block's warps."""
        found: Counter[int] = Counter()
        for (warp, begin, end), times in self.runs.items():
            if warp in warps:
                for pc in range(begin, end):
                    found[pc] += times
        return found

    def touch(self, pc: int, addresses: np.ndarray, size: int, shared: bool) -> None:
        """Active lanes access ``size`` bytes each."""
        base = int(addresses.min())
        relative = addresses - addresses.dtype.type(base)
        key = (relative.tobytes(), size, base & 127, shared)
        if key not in self._known:
            places = relative.astype(np.int64) + base % 128
            self._known[key] = (_wavefronts if shared else _sectors)(places, size)
        row = self.touched.setdefault(pc, Touched())
        units, least = self._known[key]
        row.requests += 1
        row.units += units
        row.least += least


def _sectors(places: np.ndarray, size: int) -> tuple[int, int]:
    found = np.unique(places[:, None] + np.arange(size))
    return len(np.unique(found // 32)), -(-len(found) // 32)


def _wavefronts(places: np.ndarray, size: int) -> tuple[int, int]:
    """Lanes go together in groups of 128 bytes at most; a bank gives one word of 4 bytes to each."""
    together = max(1, 32 // max(1, size // 4))
    waves = least = 0
    for i in range(0, len(places), together):
        words = np.unique((places[i : i + together, None] + np.arange(0, size, min(4, size))) // 4)
        waves += int(np.bincount(words % 32).max())
        least += -(-len(words) // 32)
    return waves, least
