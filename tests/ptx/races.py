"""Data races on shared memory, by happens-before: a clock for each thread, each barrier's copies, each warp's bulk
reads.

What orders: program order of a thread, bar.warp.sync, bar.sync, barrier.cluster, an arrival at an mbarrier with a wait
for that phase, a copy's bytes with the wait for its barrier, a bulk store's read with its wait_group; no shuffle does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import LANES

EXTRA = 96
"""Clocks of a block that are not threads'."""


class History:
    """Of a block's shared memory: who wrote a byte last, and who of each warp (the last one: bulk stores) read it.

    Where several lanes of a warp read one byte, the last of them alone is known.
    """

    def __init__(self, size: int, warps: int) -> None:
        self.writer, self.written, self.write_pc = (np.zeros(size, np.int32) for _ in range(3))
        self.reader, self.read = (np.zeros((warps + 1, size), np.int32) for _ in range(2))


class Races:
    """Of one cluster."""

    def __init__(self, cluster: Any, threads: int) -> None:
        self.per_block = threads + EXTRA
        self.clocks = len(cluster.blocks) * self.per_block
        self.names: dict[Any, int] = {}
        self.extra = [0] * len(cluster.blocks)
        self.meetings: dict[Any, np.ndarray] = {}
        for block in cluster.blocks:
            block.history = History(len(block.bad), len(block.warps))
            for warp in block.warps:
                warp.seen = np.zeros((32, self.clocks), np.int32)
                warp.own = block.rank * self.per_block + np.minimum(warp.number * 32 + LANES, threads - 1)
                warp.seen[LANES, warp.own] = 1

    def _clock(self, block: Any, key: Any) -> int:
        """The place of a clock that is not a thread's."""
        if key not in self.names:
            self.names[key] = (block.rank + 1) * self.per_block - EXTRA + self.extra[block.rank]
            self.extra[block.rank] += 1
            if self.extra[block.rank] > EXTRA:
                raise NotImplementedError(f"more than {EXTRA} barriers and storing warps in a block: raise races.EXTRA")
        return self.names[key]

    # Order.

    def release(self, kept: np.ndarray | None, warp: Any, lanes: Any) -> np.ndarray:
        seen = warp.seen[lanes].max(0)
        warp.seen[lanes, warp.own[lanes]] += 1
        return seen if kept is None else np.maximum(kept, seen)

    def acquire(self, kept: np.ndarray | None, warp: Any, lanes: Any) -> None:
        if kept is not None:
            warp.seen[lanes] = np.maximum(warp.seen[lanes], kept)

    def meet(self, key: Any, warp: Any, mask: np.ndarray) -> None:
        self.meetings[key] = self.release(self.meetings.get(key), warp, LANES[mask])

    def met(self, key: Any, warp: Any, mask: np.ndarray) -> None:
        self.acquire(self.meetings.get(key), warp, LANES[mask])

    def warp_sync(self, warp: Any, mask: np.ndarray) -> None:
        lanes = LANES[mask]
        warp.seen[lanes] = self.release(None, warp, lanes)
        warp.seen[lanes, warp.own[lanes]] += 1

    # Accesses; `seen` is one row of clocks for each row of places.

    def _access(
        self, warp: Any, pc: int, block: Any, seen: np.ndarray, places: np.ndarray, write: bool, what: str
    ) -> None:
        history, row = block.history, np.arange(len(places))[:, None]
        late = seen[row, history.writer[places]] < history.written[places]
        if late.any():
            other = warp.place(int(history.write_pc[places[late]][0]))
            warp.finding(pc, f"race: {what} after an unordered write at {other}")
        for reader, read in zip(history.reader, history.read, strict=True) if write else ():
            if (seen[row, reader[places]] < read[places]).any():
                warp.finding(pc, f"race: {what} after an unordered read")

    def read(self, warp: Any, pc: int, lanes: np.ndarray, places: np.ndarray) -> None:
        self._access(warp, pc, warp.block, warp.seen[lanes], places, False, "a read")
        history = warp.block.history
        history.reader[warp.number][places] = warp.own[lanes][:, None]
        history.read[warp.number][places] = warp.seen[lanes, warp.own[lanes]][:, None]

    def write(self, warp: Any, pc: int, lanes: np.ndarray, places: np.ndarray) -> None:
        self._access(warp, pc, warp.block, warp.seen[lanes], places, True, "a write")
        history = warp.block.history
        history.writer[places] = warp.own[lanes][:, None]
        history.written[places] = warp.seen[lanes, warp.own[lanes]][:, None]
        history.write_pc[places] = pc

    def copy_in(self, warp: Any, pc: int, lane: int, block: Any, place: slice) -> None:
        """A bulk load or a message is issued: whatever was there must be over."""
        places = np.arange(place.start, place.stop)[None, :]
        self._access(warp, pc, block, warp.seen[lane][None, :], places, True, "an asynchronous write")

    def landed(self, pc: int, block: Any, place: slice, barrier: Any) -> None:
        clock = self._clock(block, barrier)
        if barrier.kept is None:
            barrier.kept = np.zeros(self.clocks, np.int32)
        barrier.landings += 1
        barrier.kept[clock] = barrier.landings
        history = block.history
        history.writer[place], history.written[place], history.write_pc[place] = clock, barrier.landings, pc

    def copy_out(self, warp: Any, pc: int, lane: int, place: slice) -> None:
        """A bulk store is issued: it reads later, until its group is waited for."""
        places = np.arange(place.start, place.stop)[None, :]
        self._access(warp, pc, warp.block, warp.seen[lane][None, :], places, False, "an asynchronous read")
        history = warp.block.history
        history.reader[-1][place] = self._clock(warp.block, (warp.block.rank, warp.number))
        history.read[-1][place] = warp.committed["bulk"][lane] + 1

    def copies_read(self, warp: Any, mask: np.ndarray, pending: int) -> None:
        clock = self._clock(warp.block, (warp.block.rank, warp.number))
        lanes = LANES[mask]
        warp.seen[lanes, clock] = np.maximum(warp.seen[lanes, clock], warp.committed["bulk"][lanes] - pending)
