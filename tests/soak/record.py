"""What was called and what happened, kept in a file until the run is whole."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_kernels.files import write_text

from .processes import Fault

WARM = 10
"""Rounds until a process has what it keeps."""


@dataclass
class Record:
    path: Path
    seed: int
    seconds: float = 0.0
    runs: int = 0
    """Of the training loop, each to its end."""
    calls: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    resident: list[list[float]] = field(default_factory=list)
    """MB after each round, of each process that calls; of this run alone."""

    @classmethod
    def taken_up(cls, path: Path, seed: int | None, other: int) -> Record:
        """The record of a run that was interrupted, unless another seed is asked for; else a new one."""
        if path.exists():
            held = json.loads(path.read_text())
            if seed in (None, held["seed"]):
                counts = {name: Counter(held.pop(name)) for name in ("calls", "faults")}
                return cls(path, **held, **counts)
        return cls(path, other if seed is None else seed)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {name: getattr(self, name) for name in ("seed", "seconds", "runs", "calls", "faults")}
        write_text(self.path, json.dumps(held) + "\n")

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Count what a process that calls has answered."""
        self.calls += answer["calls"]
        self.faults += answer["faults"]
        while len(self.resident) <= number:
            self.resident.append([])
        self.resident[number].append(answer["resident"])

    def check_growth(self, limit: float) -> None:
        for sizes in self.resident:
            if len(sizes) > 2 * WARM and sizes[-1] - sizes[WARM] > limit:
                raise Fault(f"a process grew from {sizes[WARM]:.0f} to {sizes[-1]:.0f} MB")

    def __str__(self) -> str:
        calls = ", ".join(f"{count:,} {name}" for name, count in sorted(self.calls.items()))
        faults = ", ".join(f"{count:,} {name}" for name, count in sorted(self.faults.items()))
        sizes = ", ".join(f"{each[min(WARM, len(each) - 1)]:.0f} → {each[-1]:.0f}" for each in self.resident if each)
        return (
            f"soak: {self.seconds / 60:.1f} minutes, seed {self.seed}\n"
            f"calls: {self.calls.total():,} ({calls})\n"
            f"faults: {self.faults.total():,} ({faults})\n"
            f"runs to their end: {self.runs:,}; resident MB: {sizes}"
        )
