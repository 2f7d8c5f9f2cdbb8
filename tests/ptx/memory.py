"""What kernels access: global memory as the regions of CPU tensors, shared memory of a block, mbarriers."""

from __future__ import annotations

import bisect
import ctypes
from collections import defaultdict
from typing import Any

import numpy as np

SHARED_WINDOW = 1 << 60
"""Generic address of shared memory; that of parameters is above it."""
PARAMETER_WINDOW = 1 << 61
UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NEVER_WRITTEN, LANDING = 1, 2
"""Why a byte of shared memory must not be read; one that nobody wrote may be, where it is not looked at: it is NaN."""
LANES = np.arange(32)
ALL = np.ones(32, bool)


class Fault(Exception):
    """Something that a GPU would not forgive."""


def lanes_of(mask: np.ndarray | None) -> np.ndarray:
    """Numbers of a mask's lanes; None stands for all."""
    return LANES if mask is None else LANES[mask]


class Region:
    """A piece of global memory, [low, high), mapped from the 16-byte vectors around it."""

    def __init__(self, name: str, low: int, size: int, fresh: bool = False) -> None:
        self.name, self.low, self.high = name, low, low + size
        self.start, self.end = low & ~15, (low + size + 15) & ~15
        memory = np.frombuffer((ctypes.c_uint8 * (self.end - self.start)).from_address(self.start), np.uint8)
        self.views = {n: memory.view(t) for n, t in UNITS.items()}
        self.valid = np.zeros(len(memory), np.uint8) if fresh else None  # bytes written, of uninitialised memory


class Global:
    """Global memory: what is mapped; everything else is out of bounds."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.lows: list[int] = []

    def map(self, name: str, low: int, size: int, fresh: bool = False) -> None:
        if size and not any(r.low <= low and low + size <= r.high for r in self.regions):
            self.regions = [r for r in self.regions if r.high <= low or r.low >= low + size]  # freed since
            self.regions.append(Region(name, low, size, fresh))
            self.regions.sort(key=lambda r: r.low)
            self.lows = [r.low for r in self.regions]

    def of(self, address: int) -> Region | None:
        i = bisect.bisect_right(self.lows, address) - 1
        return self.regions[i] if i >= 0 and address < self.regions[i].high else None


class Barrier:
    """An mbarrier; ``phase`` counts completed phases."""

    LIMIT = 2**20 - 1

    def __init__(self, count: int, name: str) -> None:
        self.expected = self.pending = count
        self.bytes = self.phase = self.landings = 0
        self.name = name
        self.kept: Any = None  # clocks of those that have arrived, and of those of ended phases
        self.released: Any = None

    def expect(self, size: int) -> None:
        self.bytes += size
        if abs(self.bytes) > self.LIMIT:
            raise Fault(f"{self.name}: {self.bytes} bytes are expected, {self.LIMIT} at most may be")

    def arrive(self, count: int) -> None:
        if count > self.pending:
            raise Fault(f"{self.name}: {count} arrivals, {self.pending} pending")
        self.pending -= count
        self._complete()

    def landed(self, size: int) -> None:
        self.expect(-size)
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected
            if self.kept is not None:
                self.released = self.kept.copy()


class Block:
    """A block's shared memory, its barriers and its warps. Its shared addresses begin at ``base``."""

    def __init__(self, index: int, rank: int, cluster: Any, size: int) -> None:
        self.index, self.rank, self.cluster, self.size = index, rank, cluster, size
        self.base = (rank + 1) << 24
        whole = -(-max(size, 16) // 16) * 16
        data = np.full(whole, 0xFF, np.uint8)  # NaN
        self.data = {n: data.view(t) for n, t in UNITS.items()}
        self.bad = np.full(whole, NEVER_WRITTEN, np.uint8)
        self.busy = np.zeros(whole, np.uint8)  # asynchronous copies that still read or will write a byte
        self.unfenced = np.zeros(whole, np.uint16)  # thread + 1 that wrote it, not yet made visible to bulk copies
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # bar.sync: threads present, generation
        self.warps: list[Any] = []
        self.gone = False

    def begin_write(self, place: Any) -> None:
        """A copy will write there: until it has landed, nobody may read."""
        self.busy[place] += 1
        self.bad[place] |= LANDING

    def end_write(self, place: Any, data: np.ndarray) -> None:
        self.data[1][place] = data
        self.busy[place] -= 1
        self.bad[place] = 0
