"""A warp: groups of lanes that go together, branches, and what lanes do with one another.

The group with the lowest program counter goes first, now and then another one; lanes that meet merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .accesses import Accesses
from .copies import Copies
from .memory import LANES, Block, Fault
from .parser import Instruction
from .segments import segment_at


class Group:
    """Lanes of a warp that go together."""

    def __init__(self, pc: int, mask: np.ndarray) -> None:
        self.pc = pc
        self.set_mask(mask)
        self.blocked: Callable[[], bool] | None = None  # says whether it may go on
        self.parked = False  # waits for the warp's other lanes
        self.token: Any = None  # what it waits for, between two tries

    def set_mask(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.active = None if mask.all() else mask  # as segments take it


class Warp(Accesses, Copies):
    def __init__(self, machine: Any, block: Block, number: int) -> None:
        self.machine, self.block, self.number, self.kernel = machine, block, number, machine.kernel
        width = {1: bool, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
        poison = {bits: np.full(32, 1 if bits == 1 else (1 << bits) - 3, dtype) for bits, dtype in width.items()}
        self.registers = [poison[bits] for bits in self.kernel.widths]
        threads = number * 32 + LANES
        self.threads = (threads + 1).astype(np.uint16)
        self.exited = threads >= machine.threads
        self.groups = [Group(0, ~self.exited)]
        self.committed = {which: np.zeros(32, int) for which in ("bulk", "copies")}  # groups of each lane
        self.under_way: dict[str, list[Any]] = {"bulk": [], "copies": []}
        self.written: list[Any] = []  # to shared memory since the last proxy fence
        self.special = _Special(self)
        self.races: Any = None

    def place(self, pc: int) -> str:
        one = self.kernel.code[pc]
        return f"{one.place} [{one.text}]"

    def fault(self, pc: int, text: str) -> Fault:
        return Fault(f"{self.kernel.name} block {self.block.index} warp {self.number}: {text} at {self.place(pc)}")

    def finding(self, pc: int, text: str) -> None:
        self.machine.findings[f"{self.kernel.name}: {text} at {self.place(pc)}"] += 1

    def where(self) -> str:
        groups = ", ".join(f"{int(g.mask.sum())} lanes at {self.place(g.pc)}" for g in self.groups)
        return f"block {self.block.index} warp {self.number}: {groups}"

    # Control.

    def run(self, quantum: int) -> bool:
        """Up to so many segments and control instructions; whether anything was done."""
        moved, kernel = False, self.kernel
        for _ in range(quantum):
            group = self._pick()
            if group is None:
                break
            begin, one = group.pc, kernel.code[group.pc]
            if not one.is_control:
                function, group.pc = segment_at(kernel, begin)
                function(self, self.registers, group.active)
                self.machine.stats.ran(self, begin, group.pc)
            elif self._control(group, one):
                self.machine.stats.ran(self, begin, begin + 1)
            moved = True  # at least it has begun to wait
            if len(self.groups) > 1:
                self._merge()
        return moved

    def _pick(self) -> Group | None:
        if len(self.groups) == 1 and self.groups[0].blocked is None and not self.groups[0].parked:
            return self.groups[0]
        ready = []
        for group in self.groups:
            if group.blocked is not None and group.blocked():
                group.blocked = None
            if group.blocked is None and not group.parked:
                ready.append(group)
        if not ready:
            return None
        if len(ready) > 1 and self.machine.draw() < self.machine.stray:
            return ready[int(self.machine.draw() * len(ready))]
        return min(ready, key=lambda g: g.pc)

    def _merge(self) -> None:
        at: dict[int, Group] = {}
        kept = []
        for group in self.groups:
            other = at.get(group.pc)
            if other is None or any(g.blocked is not None or g.token is not None for g in (other, group)):
                at[group.pc] = group
                kept.append(group)
            else:
                other.set_mask(other.mask | group.mask)
                other.parked = False
        self.groups = kept

    def _split(self, group: Group, mask: np.ndarray, pc: int) -> Group:
        """Lanes of ``mask`` leave for ``pc``, as a group of their own."""
        group.set_mask(group.mask & ~mask)
        self.groups.append(Group(pc, mask))
        return self.groups[-1]

    def _control(self, group: Group, one: Instruction) -> bool:
        """Whether the instruction was carried out; else the group waits."""
        guard = group.mask
        if one.guard is not None:
            value = self.registers[one.guard[0]]
            guard = group.mask & (~value if one.guard[1] else value)
        if one.name == "bra":
            self._branch(group, one, guard)
            return True
        if not guard.any():
            group.pc += 1
            return True
        if one.name in ("ret", "exit"):
            leaving = group
            if not (guard == group.mask).all():
                leaving = self._split(group, guard, one.pc)
                group.pc += 1
            self._leave(leaving)
            return True
        if not (guard == group.mask).all():
            self._split(group, group.mask & ~guard, one.pc + 1)
        carry_out = getattr(self, f"_{one.name}", None)
        if carry_out is None:
            raise self.fault(one.pc, one.name)
        return carry_out(group, one)

    def _branch(self, group: Group, one: Instruction, taken: np.ndarray) -> None:
        target = self.kernel.labels[one.operands[0][1]]
        if (taken == group.mask).all():
            group.pc = target
            return
        if taken.any():
            if "uni" in one.parts:
                raise self.fault(one.pc, "bra.uni diverges")
            self._split(group, taken, target)
        group.pc += 1

    def _leave(self, group: Group) -> None:
        self.exited = self.exited | group.mask
        self.groups.remove(group)
        for other in self.groups:
            other.parked = False  # it may have waited for these lanes
        self.block.cluster.complete()

    # Lanes, warps and blocks with one another.

    def _together(self, group: Group, one: Instruction, wanted: np.ndarray) -> bool:
        """Whether all lanes of ``wanted`` are in the group; else it waits for them."""
        if (wanted & self.exited).any():
            self.finding(one.pc, "lanes that have ended are waited for")
            wanted = wanted & ~self.exited
        if (group.mask & ~wanted).any():
            raise self.fault(one.pc, "a lane outside its own mask")
        group.parked = bool((wanted & ~group.mask).any())
        return not group.parked

    def _members(self, group: Group, one: Instruction) -> bool:
        """The same, of the mask that is the instruction's last operand."""
        value = int(self._value(one.operands[-1])[group.mask][0])
        return self._together(group, one, (value >> LANES & 1).astype(bool))

    def _value(self, operand: Any) -> np.ndarray:
        if operand[0] == "register":
            return self.registers[operand[1]].astype(np.int64)
        return np.full(32, operand[1] & 0xFFFFFFFF)

    def _assign(self, group: Group, operand: Any, value: np.ndarray) -> None:
        if operand == ("symbol", "_"):
            return
        kept = self.registers[operand[1]]
        self.registers[operand[1]] = np.where(group.mask, value, kept).astype(kept.dtype)

    def _wait(self, group: Group, ready: Callable[[], bool], acquire: Callable[[], None]) -> bool:
        if not ready():
            group.blocked = ready
            return False
        if self.races:
            acquire()
        group.token = None
        group.pc += 1
        return True

    def _bar(self, group: Group, one: Instruction) -> bool:
        if one.parts[1] == "warp":
            if not self._members(group, one):
                return False
            if self.races:
                self.races.warp_sync(self, group.mask)
            group.pc += 1
            return True
        if one.parts[1] != "sync":
            raise self.fault(one.pc, "a barrier that the executor lacks")
        number = one.operands[0][1]
        meeting = self.block.meetings[number]
        if group.token is None:
            if not self._together(group, one, ~self.exited):
                return False
            wanted = one.operands[1][1] if len(one.operands) > 1 else len(self.block.warps) * 32
            group.token = meeting[1]
            if self.races:
                self.races.meet((self.block.rank, number, meeting[1]), self, group.mask)
            meeting[0] += 32
            if meeting[0] >= wanted:
                meeting[0] = 0
                meeting[1] += 1
        key = (self.block.rank, number, group.token)
        return self._wait(group, lambda: meeting[1] != group.token, lambda: self.races.met(key, self, group.mask))

    def _barrier(self, group: Group, one: Instruction) -> bool:
        if one.parts[1] != "cluster":
            raise self.fault(one.pc, "a barrier that the executor lacks")
        cluster = self.block.cluster
        if "aligned" in one.parts and group.token is None and not self._together(group, one, ~self.exited):
            return False
        if one.parts[2] == "arrive":
            self.cluster_token = cluster.generation
            if self.races:
                self.races.meet(("cluster", cluster.generation), self, group.mask)
            cluster.present += int(group.mask.sum())
            cluster.complete()
            group.pc += 1
            return True
        token = group.token = self.cluster_token
        ready = lambda: cluster.generation != token  # noqa: E731
        return self._wait(group, ready, lambda: self.races.met(("cluster", token), self, group.mask))

    def _shfl(self, group: Group, one: Instruction) -> bool:
        target, source, b, c, _ = one.operands
        if not self._members(group, one):
            return False
        lane, c, mode = self._value(b) & 31, self._value(c), one.parts[2]
        segment = c >> 8 & 31
        first, last = LANES & segment, LANES & segment | c & 31 & ~segment
        place = {"up": LANES - lane, "down": LANES + lane, "bfly": LANES ^ lane, "idx": first | lane & ~segment}[mode]
        inside = place >= last if mode == "up" else place <= last
        place = np.where(inside, place, LANES)
        if not group.mask[place[group.mask]].all():
            self.finding(one.pc, "a shuffle reads lanes that take no part")
        values = (self._value(source)[place], inside)
        for to, value in zip(target[1] if target[0] == "pair" else [target], values, strict=False):
            self._assign(group, to, value)
        group.pc += 1
        return True

    def _vote(self, group: Group, one: Instruction) -> bool:
        target, source, _ = one.operands
        if not self._members(group, one):
            return False
        value = ~self.registers[source[1]] if source[0] == "not" else self.registers[source[1]]
        value, mode = value & group.mask, one.parts[2]
        if mode == "ballot":
            self._assign(group, target, np.full(32, int((value.astype(np.uint64) << LANES.astype(np.uint64)).sum())))
        else:
            self._assign(group, target, np.full(32, {"any": value.any(), "all": value[group.mask].all()}[mode]))
        group.pc += 1
        return True

    def _redux(self, group: Group, one: Instruction) -> bool:
        target, source, _ = one.operands
        if not self._members(group, one):
            return False
        reduce, signed = {"min": np.min, "max": np.max}[one.parts[2]], {"s32": np.int32, "u32": np.uint32}[one.parts[3]]
        value = reduce(self._value(source).astype(signed)[group.mask])
        self._assign(group, target, np.full(32, value))
        group.pc += 1
        return True

    def _mbarrier(self, group: Group, one: Instruction) -> bool:
        """try_wait.parity: true, or suspended until it is, or after a while false."""
        target, address, parity = one.operands
        if one.parts[1] != "try_wait" or "parity" not in one.parts or address[0] != "memory":
            raise self.fault(one.pc, "a wait that the executor lacks")
        addresses = self.registers[address[1][1]] + np.uint32(address[2])
        barriers = self._barriers(one.pc, addresses, group.mask)
        parities = self._value(parity)
        if (parities[group.mask] > 1).any():
            raise self.fault(one.pc, f"parity {parities[group.mask].max()}")
        waits = {(barrier, int(parities[lane])) for lane, barrier in barriers.items()}
        ended = np.zeros(32, bool)
        for lane, barrier in barriers.items():
            ended[lane] = barrier.phase % 2 != parities[lane]
        if not ended[group.mask].any() and self.machine.draw() > self.machine.stray:
            group.blocked = lambda: any(barrier.phase % 2 != parity for barrier, parity in waits)
            return False
        if self.machine.draw() < self.machine.stray / 4:  # some lanes come back without an answer
            ended &= self.machine.random.random(32) < 0.5
        for lane, barrier in barriers.items() if self.races else ():
            if ended[lane]:
                self.races.acquire(barrier.released, self, [lane])
        self._assign(group, target, ended)
        group.pc += 1
        return True

    def _cp(self, group: Group, one: Instruction) -> bool:
        """Waits until all but the last ``pending`` groups of each lane are complete, or their reads."""
        which = "bulk" if "bulk" in one.parts else "copies"
        pending = one.operands[0][1] if one.operands else 0

        def complete() -> bool:
            under_way = self.under_way[which] = [o for o in self.under_way[which] if o.done < len(o.stages)]
            for operation in under_way:
                late = operation.lanes & group.mask
                if one.operands:
                    late = late & (operation.groups < self.committed[which] - pending)
                if late.any() and operation.done < (1 if "read" in one.parts else len(operation.stages)):
                    return False
            return True

        return self._wait(group, complete, lambda: self.races.copies_read(self, group.mask, pending))


class _Special(dict):
    """Special registers, made when they are first read."""

    def __init__(self, warp: Warp) -> None:
        super().__init__()
        self.warp = warp

    def __missing__(self, name: str) -> np.ndarray:
        warp, block, machine = self.warp, self.warp.block, self.warp.machine
        size = len(block.cluster.blocks)
        values: dict[str, Any] = {f"%{n}.{d}": 0 for n in ("tid", "ctaid") for d in "yz"}
        values |= {f"%{n}.{d}": 1 for n in ("ntid", "nctaid") for d in "yz"}
        values |= {"%tid.x": warp.number * 32 + LANES, "%ntid.x": machine.threads, "%laneid": LANES}
        values |= {"%ctaid.x": block.index, "%nctaid.x": machine.grid, "%warpid": warp.number}
        values |= {"%cluster_ctarank": block.rank, "%cluster_ctaid.x": block.rank}
        values |= {"%cluster_nctarank": size, "%clusterid.x": block.index // size}
        self[name] = np.broadcast_to(np.asarray(values[name], np.uint32), 32).copy()
        return self[name]
