"""What a warp loads and stores: bounds, alignment, bytes that nobody wrote or that a copy still writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import ALL, LANDING, LANES, PARAMETER_WINDOW, SHARED_WINDOW, UNITS, Region, lanes_of


class Accesses:
    """Part of Warp. ``m`` masks the active lanes; ``size`` is in bytes, of each of ``count`` numbers a lane."""

    shared_window = np.uint64(SHARED_WINDOW)

    def address_of(self, name: str, kind: Any) -> np.ndarray:
        if name in self.kernel.dynamic_shared:
            return np.full(32, self.block.base, kind)
        return np.full(32, PARAMETER_WINDOW + self.kernel.parameters[name][0], kind)

    def load_param(self, pc: int, addresses: np.ndarray, size: int, count: int, m: Any) -> list[np.ndarray]:
        offset = int(addresses[lanes_of(m)][0]) - PARAMETER_WINDOW
        if not 0 <= offset <= self.kernel.parameter_bytes - size * count:
            raise self.fault(pc, f"a parameter at {offset}")
        return [np.full(32, v) for v in np.frombuffer(self.machine.parameters, UNITS[size], count, offset)]

    # Global memory.

    def _regions(self, pc: int, addresses: np.ndarray, total: int) -> list[tuple[Region, np.ndarray]]:
        """Regions of active lanes' addresses, and which lanes are in each."""
        if (addresses & np.uint64(total - 1)).any():
            raise self.fault(pc, f"an address not aligned to {total} bytes")
        found, left = [], np.ones(len(addresses), bool)
        while left.any():
            first = int(addresses[left][0])
            region = self.machine.memory.of(first)
            if region is None or first + total > region.high:
                near = region.name if region else "nothing mapped"
                raise self.fault(pc, f"global memory out of bounds: {first:#x} + {total} ({near})")
            inside = (addresses >= np.uint64(region.low)) & (addresses <= np.uint64(region.high - total)) & left
            found.append((region, inside))
            left &= ~inside
        return found

    def load_global(self, pc: int, addresses: np.ndarray, size: int, count: int, m: Any) -> list[np.ndarray]:
        result = [np.zeros(32, UNITS[size]) for _ in range(count)]
        lanes = lanes_of(m)
        if not len(lanes):
            return result
        active = addresses[lanes]
        self.machine.stats.touch(pc, active, size * count, False)
        for region, inside in self._regions(pc, active, size * count):
            index = (active[inside] - np.uint64(region.start)).astype(np.int64)
            if region.valid is not None and not region.valid[index[:, None] + np.arange(size * count)].all():
                self.finding(pc, f"memory read that nobody wrote ({region.name})")
            for i in range(count):
                result[i][lanes[inside]] = region.views[size][index // size + i]
        return result

    def store_global(self, pc: int, addresses: np.ndarray, size: int, values: list[np.ndarray], m: Any) -> None:
        lanes = lanes_of(m)
        if not len(lanes):
            return
        active, total = addresses[lanes], size * len(values)
        self.machine.stats.touch(pc, active, total, False)
        for region, inside in self._regions(pc, active, total):
            index = (active[inside] - np.uint64(region.start)).astype(np.int64)
            for i, value in enumerate(values):
                region.views[size][index // size + i] = value[lanes[inside]]
            if region.valid is not None:
                region.valid[index[:, None] + np.arange(total)] = 1

    # Shared memory.

    def _offsets(self, pc: int, addresses: np.ndarray, total: int) -> np.ndarray:
        """Of this block's own shared memory."""
        offsets = addresses - np.uint32(self.block.base)
        if (offsets > np.uint32(max(self.block.size - total, 0))).any():
            raise self.fault(pc, f"shared memory out of bounds: {int(addresses.max()):#x}, {self.block.size} bytes")
        if (offsets & np.uint32(total - 1)).any():
            raise self.fault(pc, f"a shared address not aligned to {total} bytes")
        return offsets

    def load_shared(self, pc: int, addresses: np.ndarray, size: int, count: int, m: Any) -> list[np.ndarray]:
        total, block, lanes = size * count, self.block, lanes_of(m)
        if not len(lanes):
            return [np.zeros(32, UNITS[size])] * count
        offsets = self._offsets(pc, addresses[lanes], total)
        self.machine.stats.touch(pc, offsets, total, True)
        if (block.bad.reshape(-1, total)[offsets // np.uint32(total)] & LANDING).any():
            self.finding(pc, "shared memory read while a copy is still writing it")
        if self.races:
            self.races.read(self, pc, lanes, offsets.astype(np.int64)[:, None] + np.arange(total))
        index = offsets // np.uint32(size)
        values = [block.data[size][index + np.uint32(i)] for i in range(count)]
        if m is None:
            return values
        whole = [np.zeros(32, UNITS[size]) for _ in values]
        for to, value in zip(whole, values, strict=True):
            to[m] = value
        return whole

    def store_shared(self, pc: int, addresses: np.ndarray, size: int, values: list[np.ndarray], m: Any) -> None:
        total, block, lanes = size * len(values), self.block, lanes_of(m)
        if not len(lanes):
            return
        offsets = self._offsets(pc, addresses[lanes], total)
        self.machine.stats.touch(pc, offsets, total, True)
        places = offsets // np.uint32(total)
        if block.busy.reshape(-1, total)[places].any():
            self.finding(pc, "shared memory overwritten while an asynchronous copy uses it")
        index = offsets // np.uint32(size)
        for i, value in enumerate(values):
            block.data[size][index + np.uint32(i)] = value[lanes]
        block.bad.reshape(-1, total)[places] = 0
        block.unfenced.reshape(-1, total)[places] = self.threads[lanes][:, None]
        self.written.append((lanes, places, total))
        if self.races:
            self.races.write(self, pc, lanes, offsets.astype(np.int64)[:, None] + np.arange(total))

    def fence(self, pc: int, name: str, m: Any) -> None:
        """A proxy fence makes its own threads' writes visible to bulk copies; the scopes of others are not modelled."""
        if not name.startswith("fence.proxy.async"):
            return
        left = []
        for lanes, places, total in self.written:
            fenced = (ALL if m is None else m)[lanes]
            view, mine = self.block.unfenced.reshape(-1, total), places[fenced]
            view[mine] = np.where(view[mine] == self.threads[lanes[fenced]][:, None], 0, view[mine])
            if not fenced.all():
                left.append((lanes[~fenced], places[~fenced], total))
        self.written = left

    # Matrices of 8 x 8 16-bit elements: eight lanes give a matrix's rows.

    def _matrix_places(self, pc: int, addresses: np.ndarray, count: int, trans: bool, m: Any) -> list[list[np.ndarray]]:
        """Of each matrix, where the two elements of each lane lie."""
        if m is not None:
            raise self.fault(pc, "a matrix by some lanes")
        self._offsets(pc, addresses[: 8 * count], 16)
        row, column = LANES // 4, 2 * (LANES % 4)
        elements = [(column, row), (column + 1, row)] if trans else [(row, column), (row, column + 1)]
        starts = [addresses[8 * i : 8 * i + 8].astype(np.uint32) for i in range(count)]
        return [[start[r] + (2 * c).astype(np.uint32) for r, c in elements] for start in starts]

    def ldmatrix(self, pc: int, addresses: np.ndarray, count: int, trans: bool, m: Any) -> list[np.ndarray]:
        result = []
        for places in self._matrix_places(pc, addresses, count, trans, m):
            low, high = (self.load_shared(pc, place, 2, 1, None)[0].astype(np.uint32) for place in places)
            result.append(low | high << np.uint32(16))
        return result

    def stmatrix(self, pc: int, addresses: np.ndarray, trans: bool, values: list[np.ndarray], m: Any) -> None:
        for value, places in zip(values, self._matrix_places(pc, addresses, len(values), trans, m), strict=True):
            for half, place in enumerate(places):
                self.store_shared(pc, place, 2, [(value >> np.uint32(16 * half)).astype(np.uint16)], None)
