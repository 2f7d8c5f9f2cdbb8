"""Launches: clusters run together, as many as fit ``TOGETHER`` blocks; who goes next is drawn from a seed."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from .copies import Operation
from .memory import Block, Fault, Global
from .parser import Kernel
from .races import Races
from .stats import Stats
from .warp import Warp

TOGETHER = 16


class Cluster:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.present = self.generation = 0  # threads at the cluster's barrier, times it was passed

    def complete(self) -> None:
        left = sum(int((~warp.exited).sum()) for block in self.blocks for warp in block.warps)
        if self.present and self.present >= left:
            self.present = 0
            self.generation += 1


class Machine:
    """``findings`` counts what may be harmless in one schedule; a Fault stops a launch."""

    def __init__(self, memory: Global, seed: int = 0, races: bool = False, traced: int = sys.maxsize) -> None:
        self.memory, self.races, self.traced = memory, races, traced
        self.findings: Counter[str] = Counter()
        self.counts: dict[str, Stats] = {}
        self.bulk_loaded = self.bulk_stored = 0  # bytes of bulk copies
        self.beyond = 0  # of those loaded, bytes outside of what is mapped, in its outermost vectors
        self.random = np.random.default_rng(seed)
        self.pool: list[float] = []
        self.quantum = [40, 4, 400, 1][seed % 4]  # segments that a warp may run before another one
        self.delay = [7, 2, 10, 7][seed // 4 % 4]  # asynchronous operations take 2^(0..this) rounds
        self.stray = [0.02, 0.0, 0.2][seed % 3]  # another group than the lowest; a wait that ends early

    def draw(self) -> float:
        """In [0, 1)."""
        if not self.pool:
            self.pool = self.random.random(4096).tolist()
        return self.pool.pop()

    def rounds(self) -> int:
        return int(self.draw() * 2 ** (self.draw() * self.delay))

    def launch(
        self, kernel: Kernel, blocks: int, threads: int, shared: int, parameters: bytes, cluster: int = 1
    ) -> None:
        """``shared`` bytes of dynamic shared memory. Raises Fault."""
        if len(parameters) != kernel.parameter_bytes:
            raise Fault(f"{kernel.name}: {len(parameters)} bytes of parameters, not {kernel.parameter_bytes}")
        if kernel.threads is not None and threads > kernel.threads:
            raise Fault(f"{kernel.name}: {threads} threads, {kernel.threads} allowed")
        if blocks % cluster:
            raise Fault(f"{kernel.name}: {blocks} blocks in clusters of {cluster}")
        self.kernel, self.threads, self.grid = kernel, threads, blocks
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.stats = self.counts.setdefault(kernel.name, Stats(kernel, self.traced))
        self.stats.launches += 1
        self.stats.threads = threads
        self.shared_bytes = shared
        order = self.random.permutation(blocks // cluster)
        at_once = max(1, TOGETHER // cluster)
        for i in range(0, len(order), at_once):
            self._run([self._cluster(int(n), cluster) for n in order[i : i + at_once]])

    def _cluster(self, index: int, size: int) -> Cluster:
        cluster = Cluster()
        for rank in range(size):
            block = Block(index * size + rank, rank, cluster, self.shared_bytes)
            block.warps = [Warp(self, block, i) for i in range(-(-self.threads // 32))]
            cluster.blocks.append(block)
        if self.races:
            races = Races(cluster, self.threads)
            for warp in (warp for block in cluster.blocks for warp in block.warps):
                warp.races = races
        return cluster

    def _run(self, clusters: list[Cluster]) -> None:
        self.operations: list[Operation] = []
        blocks = [block for cluster in clusters for block in cluster.blocks]
        warps, asleep = [warp for block in blocks for warp in block.warps], {}
        for block in blocks:
            late = int(self.draw() * 1000) if self.draw() < 0.3 else 0
            asleep |= dict.fromkeys(block.warps, late)
        while warps or self.operations:
            moved = False
            for i in self.random.permutation(len(warps)):
                warp = warps[i]
                if asleep[warp] > 0:
                    asleep[warp] -= 1
                    moved = True
                    continue
                if self.draw() < 0.02:
                    asleep[warp] = self.rounds()
                moved |= warp.run(1 + int(self.draw() * self.quantum))
            for warp in warps:
                if not warp.groups:
                    self._ended(warp)
            warps = [warp for warp in warps if warp.groups]
            moved |= self._carry_on()
            if not moved and (warps or self.operations):
                raise Fault("deadlock: " + "; ".join(warp.where() for warp in warps[:24]))
        for barrier in (barrier for block in blocks for barrier in block.barriers.values()):
            if barrier.bytes:
                self.findings[f"{barrier.name}: {barrier.bytes} bytes are still expected at the end"] += 1

    def _ended(self, warp: Warp) -> None:
        if any(operation.done < 1 for operation in warp.under_way["bulk"]):
            self.findings[f"warp {warp.number} ended before its bulk stores had read shared memory"] += 1
        warp.block.gone = all(not other.groups for other in warp.block.warps)

    def _carry_on(self) -> bool:
        """Asynchronous operations; whether there were any."""
        operations, self.operations = self.operations, []
        for operation in operations:
            operation.go_on()
            if operation.done < len(operation.stages):
                self.operations.append(operation)
        return bool(operations)
