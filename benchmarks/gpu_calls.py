"""Makes the calls of the CUDA kernels that gpu_steps.py looks at: rows, what their loss is made of, a teacher's beside
them, and the launches themselves, each of which waits at most so long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.backends import cuda
from grpo_kernels.backends.contract import DivergenceStats, RowGradients, Rows, RowStats, TokenInputs, TokenRecords
from grpo_kernels.backends.memory import gradient_like
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.config import LossConfig
from grpo_kernels.objectives.divergence import KINDS, Divergence
from grpo_kernels.objectives.kl import KL

BETA = 0.04


@dataclass(frozen=True)
class Setting:
    """Says where the steps run and how much of them."""

    device: str
    small: bool = False
    """Shapes for the emulator and for compute-sanitizer."""
    patience: float = 20.0
    """Seconds that a launch may take."""
    rows: Path | None = None
    """Where measured rows go."""


class Shape(NamedTuple):
    """Rows of logits, the first of which begins ``skew`` elements past 16 bytes."""

    tokens: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    skew: int = 0

    def __str__(self) -> str:
        skew = f", {self.skew} elements past 16 bytes" if self.skew else ""
        return f"{self.tokens}x{self.vocab} {str(self.dtype).removeprefix('torch.')}{skew}"


@dataclass(frozen=True)
class Batch:
    """Rows of a shape, and what their loss is made of."""

    rows: Rows
    config: LossConfig
    real: torch.dtype
    """Of log-probs."""
    weight: float
    """Of a token in the loss; large for fp16, whose gradients would round to multiples of 6e-8."""

    def per_row(self, value: float) -> Tensor:
        return torch.full(self.rows.token_ids.shape, value, dtype=self.real, device=self.rows.logits.device)

    def unwritten(self, count: int) -> list[Tensor]:
        return [self.per_row(float("nan")) for _ in range(count)]


def make(setting: Setting, shape: Shape, live: Tensor | None = None, beta: float = BETA) -> Batch:
    """Make random logits of spread 2; every row is live unless ``live`` (1, N) says otherwise."""
    n, vocab, dtype, skew = shape
    generator = torch.Generator(setting.device).manual_seed(vocab + n)
    logits = torch.empty(n * vocab + skew, dtype=dtype, device=setting.device)[skew:].view(1, n, vocab)
    for part in logits[0].split(1024):  # never a second copy in fp32
        part.copy_(2 * torch.randn(part.shape, generator=generator, device=setting.device))
    ids = torch.randint(vocab, (1, n), generator=generator, device=setting.device)
    live = torch.ones_like(ids, dtype=torch.bool) if live is None else live
    config = LossConfig.preset("dapo", kl=KL(beta))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = numbers_vector(LogitArgs(), 1.0, config, real, torch.device(setting.device))
    return Batch(Rows(logits, ids, live, numbers, False), config, real, 1024.0 if dtype == torch.float16 else 1 / n)


def log_probs(batch: Batch) -> RowStats:
    """Return statistics of the rows, (1, N)."""
    stats = RowStats(*batch.unwritten(4))
    cuda.log_probs(batch.rows, stats)
    return stats


class Fused(NamedTuple):
    """A call of fused_loss whose tensors are there already, so that nothing but the call itself is timed."""

    call: Callable[[], None]
    results: list[Tensor]
    """Log-probs, entropies, anchors, sums, policy terms, KL and flags (1, N)."""


def prepared(batch: Batch, old: Tensor, ref: Tensor, out: Tensor) -> Fused:
    """The gradient goes to ``out``; advantages are 1."""
    one, kl = batch.per_row(1.0), bool(batch.config.kl.coef)
    weight, unwritten = batch.weight * one, batch.unwritten(6)
    spec = objective_spec(batch.config, kl)
    assert spec is not None
    flags = torch.full(one.shape, 255, dtype=torch.uint8, device=one.device)
    inputs = TokenInputs(one, weight, old, ref if kl else None, None, BETA * weight if kl else None, None)
    none = one.new_empty(0)
    stats, records = RowStats(*unwritten[:4]), TokenRecords(*unwritten[4:], flags, none, none)
    return Fused(lambda: cuda.fused_loss(batch.rows, inputs, spec, stats, records, out), [*unwritten, flags])


def fused(batch: Batch, old: Tensor, ref: Tensor, out: Tensor) -> list[Tensor]:
    """Return the results of ``prepared``."""
    call, results = prepared(batch, old, ref, out)
    call()
    return results


def wait(setting: Setting, what: str) -> None:
    """Poll, so that a kernel that hangs is named and no call of the driver blocks."""
    if torch.device(setting.device).type != "cuda":
        return
    done = torch.cuda.Event()
    done.record()
    end = time.monotonic() + setting.patience
    while not done.query():
        if time.monotonic() > end:
            print(f"   HANG: {what} has not finished after {setting.patience:.0f} s", flush=True)
            os._exit(3)
        time.sleep(0.002)


class Pair(NamedTuple):
    """Rows beside their teacher's, and what is found of them."""

    batch: Batch
    rows: Rows
    teacher: Rows
    divergence: Divergence
    stats: RowStats
    teacher_stats: RowStats
    found: DivergenceStats

    @property
    def kind(self) -> int:
        return list(KINDS).index(self.divergence.kind)

    def two_passes(self, out: Tensor) -> None:
        """Find the gradient of the divergences' sum, times the weight of a token, in four launches."""
        cuda.log_probs(self.rows, self.stats)
        cuda.log_probs(self.teacher, self.teacher_stats)
        known = self.rows, self.stats, self.teacher, self.teacher_stats, self.kind
        cuda.divergence(*known, self.found)
        weight = self.batch.per_row(self.batch.weight)
        cuda.divergence_backward(*known, self.found, RowGradients(None, None), weight, out)

    def one_pass(self, out: Tensor) -> None:
        """Find the same in one launch: the policy's term weighs nothing."""
        weight, nothing = self.batch.per_row(self.batch.weight), self.batch.per_row(0.0)
        spec = objective_spec(self.batch.config, False)
        assert spec is not None
        none = nothing.new_empty(0)
        records = TokenRecords(*self.batch.unwritten(2), nothing.to(torch.uint8), none, none)
        inputs = TokenInputs(nothing, nothing, None, None, None, None, None)
        known = self.rows, self.teacher, self.kind, inputs, weight, spec
        cuda.fused_divergence(*known, self.stats, self.teacher_stats, self.found, records, out)


def pair_of(setting: Setting, shape: Shape, divergence: Divergence) -> Pair:
    """Make a batch (``make``) and its teacher's rows, half a unit away."""
    batch = make(setting, shape)
    logits = batch.rows.logits
    teacher = gradient_like(logits).copy_(logits)
    for part in teacher[0].split(1024):
        part += 0.5 * torch.randn_like(part)
    config = LossConfig.preset("dapo", divergence=divergence)
    numbers = numbers_vector(LogitArgs(), 1.0, config, batch.real, torch.device(setting.device))
    rows = batch.rows._replace(numbers=numbers)
    unwritten = batch.unwritten(12)
    stats, found = (RowStats(*unwritten[:4]), RowStats(*unwritten[4:8])), DivergenceStats(*unwritten[8:])
    return Pair(batch, rows, rows._replace(logits=teacher), divergence, *stats, found)
