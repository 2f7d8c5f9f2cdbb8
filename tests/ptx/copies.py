"""A warp's asynchronous operations: cp.async, bulk copies, messages between blocks, and the barriers they end at.

They take effect some rounds after their issue, first their reads, later their writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import ALL, LANES, Barrier, Block, Fault, Region, lanes_of

MASK24 = np.uint32(0xFFFFFF)


class Operation:
    """Something under way: ``stages`` are carried out one after the other, each after so many rounds."""

    def __init__(self, rounds: Callable[[], int], stages: list[Callable[[], None]]) -> None:
        self.stages, self.rounds, self.left = stages, rounds, rounds()
        self.done = 0  # stages carried out

    def go_on(self) -> None:
        if self.left > 0:
            self.left -= 1
        else:
            self.stages[self.done]()
            self.done += 1
            self.left = self.rounds()


class Copies:
    """Part of Warp. ``m`` masks the active lanes."""

    def commit(self, pc: int, which: str, m: Any) -> None:
        self.committed[which][lanes_of(m)] += 1

    def _start(self, stages: list[Callable[[], None]], which: str | None = None, lanes: Any = ALL) -> None:
        operation = Operation(self.machine.rounds, stages)
        self.machine.operations.append(operation)
        if which:
            operation.lanes, operation.groups = lanes, self.committed[which].copy()
            self.under_way[which].append(operation)

    def copy_async(self, pc: int, to: Any, source: Any, size: int, read: Any, m: Any) -> None:
        """cp.async: ``read`` bytes of each lane's source, zeros for the rest of ``size``."""
        mask = ALL if m is None else m
        if not mask.any():
            return
        offsets = self._offsets(pc, to[mask], size).astype(np.int64)
        wanted, addresses = np.minimum(read[mask].astype(np.int64), size), source[mask].copy()
        reads = np.flatnonzero(wanted)
        regions = self._regions(pc, addresses[reads], size) if len(reads) else []
        if len(reads):
            self.machine.stats.touch(pc, addresses[reads], size, False)
        block, places = self.block, offsets[:, None] + np.arange(size)
        if block.busy[places].any():
            self.finding(pc, "an asynchronous copy into memory that another one uses")
        block.begin_write(places)
        block.data[1][places] = 0xFF

        def land() -> None:
            data = np.zeros((len(offsets), size), np.uint8)
            for region, inside in regions:
                index = (addresses[reads[inside]] - np.uint64(region.start)).astype(np.int64)
                data[reads[inside]] = region.views[1][index[:, None] + np.arange(size)]
            data[np.arange(size) >= wanted[:, None]] = 0
            block.end_write(places, data)

        self._start([land], "copies", mask)

    # Barriers.

    def _block_at(self, pc: int, address: int, size: int) -> tuple[Block, int]:
        """The block of the cluster that a shared address is of, and the offset there."""
        rank, offset = (address >> 24) - 1, address & 0xFFFFFF
        if not 0 <= rank < len(self.block.cluster.blocks) or offset + size > self.block.size:
            raise self.fault(pc, f"no shared memory at {address:#x}")
        block = self.block.cluster.blocks[rank]
        if block.gone:
            raise self.fault(pc, f"block {block.index} has ended")
        return block, offset

    def _barrier_at(self, pc: int, address: int) -> Barrier:
        block, offset = self._block_at(pc, address, 8)
        if offset not in block.barriers:
            raise self.fault(pc, f"no barrier initialised at {offset} of block {block.index}")
        return block.barriers[offset]

    def _barriers(self, pc: int, addresses: np.ndarray, m: Any, remote: bool = False) -> dict[int, Barrier]:
        """Each lane's barrier, of this block or, ``remote``, of any in the cluster."""
        found = {}
        for lane in lanes_of(m).tolist():
            if not remote and int(addresses[lane]) >> 24 != self.block.rank + 1:
                raise self.fault(pc, "another block's barrier as shared::cta")
            found[lane] = self._barrier_at(pc, int(addresses[lane]))
        return found

    def barrier_init(self, pc: int, addresses: np.ndarray, counts: np.ndarray, m: Any) -> None:
        for lane in lanes_of(m):
            block, offset = self._block_at(pc, int(addresses[lane]), 8)
            if offset % 8 or not 0 < int(counts[lane]) < 2**20:
                raise self.fault(pc, f"a barrier at {offset} for {int(counts[lane])} arrivals")
            if offset in block.barriers:
                raise self.fault(pc, "a barrier initialised twice")
            block.barriers[offset] = Barrier(int(counts[lane]), f"{self.kernel.name} barrier at {offset}")

    def barrier_expect_tx(self, pc: int, addresses: np.ndarray, sizes: np.ndarray, m: Any) -> None:
        for lane, barrier in self._barriers(pc, addresses, m).items():
            barrier.expect(int(sizes[lane]))

    def barrier_arrive(self, pc: int, addresses: Any, number: Any, expect: bool, remote: bool, m: Any) -> None:
        for lane, barrier in self._barriers(pc, addresses, m, remote).items():
            if expect:
                barrier.expect(int(number[lane]))
            if self.races:
                barrier.kept = self.races.release(barrier.kept, self, [lane])
            try:
                barrier.arrive(1 if number is None or expect else int(number[lane]))
            except Fault as error:
                raise self.fault(pc, str(error)) from error

    def mapa(self, pc: int, addresses: np.ndarray, ranks: np.ndarray, m: Any) -> np.ndarray:
        if (ranks[lanes_of(m)] >= len(self.block.cluster.blocks)).any():
            raise self.fault(pc, "no such block in the cluster")
        return (ranks + np.uint32(1) << np.uint32(24)) | (addresses & MASK24)

    # Bulk copies: whole vectors of 16 bytes.

    def _bulk_source(self, pc: int, shared: int, address: int, size: int, store: bool) -> tuple[Region, int]:
        """The region of a bulk copy's global end and the offset there. Loads may take what is around it in vectors."""
        if (shared | address | size) & 15 or size <= 0:
            raise self.fault(pc, f"a bulk copy of {size} bytes between {address:#x} and {shared:#x}")
        memory = self.machine.memory
        region = memory.of(address) or memory.of(min(address + 15, address + size - 1))
        if region is not None:
            low, high = (region.low, region.high) if store else (region.start, region.end)
        if region is None or address < low or address + size > high:
            raise self.fault(pc, f"global memory out of bounds: {address:#x} + {size} ({region and region.name})")
        return region, address - region.start

    def bulk_load(self, pc: int, to: Any, source: Any, sizes: Any, barriers: Any, m: Any) -> None:
        for lane in lanes_of(m).tolist():
            self._bulk_load(pc, lane, *(int(values[lane]) for values in (to, source, sizes, barriers)))

    def _bulk_load(self, pc: int, lane: int, to: int, source: int, size: int, barrier_address: int) -> None:
        block, offset = self._block_at(pc, to, size)
        barrier = self._barrier_at(pc, barrier_address)
        region, start = self._bulk_source(pc, to, source, size, False)
        place = slice(offset, offset + size)
        if block.busy[place].any():
            self.finding(pc, "a bulk copy into memory that another one uses")
        if block.unfenced[place].any():
            self.finding(pc, "a bulk copy over writes without a proxy fence")
        if self.races:
            self.races.copy_in(self, pc, lane, block, place)
        block.begin_write(place)
        block.data[1][place] = 0xFF
        self.machine.bulk_loaded += size
        self.machine.beyond += max(0, region.low - source) + max(0, source + size - region.high)
        taken: list[np.ndarray] = []

        def read() -> None:
            taken.append(region.views[1][start : start + size].copy())

        def land() -> None:
            block.end_write(place, taken[0])
            block.unfenced[place] = 0
            if self.races:
                self.races.landed(pc, block, place, barrier)
            barrier.landed(size)

        self._start([read, land])

    def bulk_store(self, pc: int, to: Any, source: Any, sizes: Any, m: Any) -> None:
        for lane in lanes_of(m).tolist():
            self._bulk_store(pc, lane, *(int(values[lane]) for values in (to, source, sizes)))

    def _bulk_store(self, pc: int, lane: int, to: int, source: int, size: int) -> None:
        block, offset = self._block_at(pc, source, size)
        if block is not self.block:
            raise self.fault(pc, "a bulk store of another block's memory")
        region, start = self._bulk_source(pc, source, to, size, True)
        place = slice(offset, offset + size)
        if block.unfenced[place].any():
            self.finding(pc, "a bulk store of writes without a proxy fence")
        if block.bad[place].any():
            self.finding(pc, "a bulk store of memory that nobody wrote or a copy is still writing")
        if self.races:
            self.races.copy_out(self, pc, lane, place)
        block.busy[place] += 1
        self.machine.bulk_stored += size
        taken: list[np.ndarray] = []

        def read() -> None:
            taken.append(block.data[1][place].copy())
            block.busy[place] -= 1

        def land() -> None:
            region.views[1][start : start + size] = taken[0]
            if region.valid is not None:
                region.valid[start : start + size] = 1

        self._start([read, land], "bulk", lane == LANES)

    def store_async(self, pc: int, to: Any, words: list[Any], barriers: Any, m: Any) -> None:
        """A message into another block, whose barrier gets its bytes."""
        if len(self.block.cluster.blocks) == 1:  # PTX ISA, st.async: undefined unless %cluster_nctarank > 1
            self.finding(pc, "st.async in a cluster of one block")
        size = 4 * len(words)
        for lane in lanes_of(m).tolist():
            block, offset = self._block_at(pc, int(to[lane]), size)
            barrier = self._barrier_at(pc, int(barriers[lane]))
            if int(to[lane]) >> 24 != int(barriers[lane]) >> 24:
                raise self.fault(pc, "a message to one block and a barrier of another")
            if offset % size:
                raise self.fault(pc, "a message not aligned to its size")
            message = np.array([word[lane] for word in words], np.uint32).view(np.uint8)
            self._send(pc, lane, block, slice(offset, offset + size), message, barrier)

    def _send(self, pc: int, lane: int, block: Block, place: slice, message: np.ndarray, barrier: Barrier) -> None:
        if block.busy[place].any():
            self.finding(pc, "a message over one that has not arrived")
        if self.races:
            self.races.copy_in(self, pc, lane, block, place)
        block.begin_write(place)

        def land() -> None:
            block.end_write(place, message)
            if self.races:
                self.races.landed(pc, block, place, barrier)
            barrier.landed(len(message))

        self._start([land])
