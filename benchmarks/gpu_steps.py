"""Has the steps of gpu_smoke.py: calls of the CUDA kernels alone, without Triton, each compared with float64.

Every step is a function of a Setting that says what it finds, and whether it holds.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gpu_exact
import gpu_rows
import torch
from torch import Tensor

from grpo_kernels.backends import Request, cuda, native
from grpo_kernels.backends.contract import DivergenceStats, RowGradients, Rows, RowStats, TokenInputs, TokenRecords
from grpo_kernels.backends.memory import gradient_like
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.config import LossConfig
from grpo_kernels.objectives.divergence import KINDS, Divergence
from grpo_kernels.objectives.kl import KL

BETA = 0.04
PAIRS = tuple(Divergence(name) for name in ("forward_kl", "reverse_kl", "mixed_kl", "jsd"))
"""The divergences whose kernels are run."""
COPIED = 2**31
"""Bytes of the copy that times are held against: many times the second-level cache."""
BUSY = 2_000_000
"""Cycles, about a millisecond: many times what Python needs to queue a call."""


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


def say(holds: bool, text: str) -> bool:
    print(f"   {text}" + ("" if holds else "  <-- WRONG"), flush=True)
    return holds


def check_log_probs(batch: Batch, found: Tensor, what: str) -> bool:
    error = gpu_exact.log_prob_error(batch.rows.logits[0], batch.rows.token_ids[0], found[0])
    allowed, _ = gpu_exact.allowed(batch.rows.logits.dtype)
    return say(error < allowed, f"{what}: log-prob error {error:.1e}, allowed {allowed:.0e}")


def check_gradient(batch: Batch, before: Tensor, out: Tensor, slope: Tensor, what: str) -> bool:
    """Check every live row, where ``before`` (1, N, V) are the logits."""
    live = batch.rows.live[0]
    given = (before[0], batch.rows.token_ids[0], slope[0], out[0])
    error = gpu_exact.gradient_error(*(given if live.all() else (tensor[live] for tensor in given)))
    _, allowed = gpu_exact.allowed(out.dtype)
    text = f"{what}: gradient error {error:.1e} (L2 of a row, relative), allowed {allowed:.0e}"
    return say(error < allowed, text + "; parts were left unwritten" * math.isnan(error))


def check_terms(batch: Batch, log_prob: Tensor, known: list[Tensor], found: list[Tensor], what: str) -> bool:
    """Check policy terms, KL and flags of live rows: advantage 1, inside the clip, where ``known`` are old and ref."""
    live = batch.rows.live
    exact, old, ref = (tensor[live].double() for tensor in (log_prob, *known))
    policy, kl, flags = (tensor[live] for tensor in found)
    wanted = -torch.exp(exact - old), torch.expm1(ref - exact) - (ref - exact)
    errors = [float((a.double() - b).abs().max()) for a, b in zip((policy, kl), wanted, strict=True)]
    allowed = 1e-12 if batch.real == torch.float64 else 2e-6
    holds = all(error < allowed for error in errors) and not bool(flags.any())
    return holds or say(False, f"{what}: errors of policy terms and KL {errors}, allowed {allowed:.0e}; flags {flags}")


# Steps


def environment(setting: Setting) -> bool:
    """GPU, library, whether it serves, how many clusters run at once, how rows are laid out; no registers spill."""
    if torch.device(setting.device).type == "cuda":
        found = torch.cuda.get_device_properties(0)
        say(True, f"{found.name}, {found.multi_processor_count} multiprocessors, torch {torch.__version__}")
    path = cuda.library_path()
    say(True, f"library {path}, built for {native.build_record(path).get('architectures', 'unknown')}")
    refused = cuda.unsupported(Request(torch.device(setting.device, 0), by_name=True))
    if refused is not None:
        return say(False, f"it does not serve: {refused}")
    device = cuda.device(0)
    at_once = dict(zip(map(str, cuda.CLUSTERS), device.clusters, strict=True))
    capability = f"{device.major}.{device.minor}"
    say(True, f"capability {capability}, driver {device.driver}, shared {device.shared_bytes}, clusters {at_once}")
    spilled = not say(device.local_bytes == 0, f"local memory of a thread: {device.local_bytes} bytes")
    facts = {"capability": capability, "driver": device.driver, "runtime": device.runtime}
    gpu_rows.write(setting.rows, "device", **facts, shared_bytes=device.shared_bytes, clusters_at_once=at_once)
    for vocab in (512, 32000, 50257, 128256, 151936, 262144):
        plan = cuda.plan(0, torch.bfloat16, vocab)
        say(plan.cluster > 0, f"bf16 {vocab}: clusters of {plan.cluster}, {plan.clusters} of them, {plan.tiles} tiles")
    return not spilled


def scored(setting: Setting, shape: Shape, live: Tensor | None = None) -> tuple[Batch, RowStats]:
    """Return a batch (``make``) and the statistics of its rows, when the kernel has ended."""
    batch = make(setting, shape, live)
    found = log_probs(batch)
    wait(setting, f"log_probs {shape}" + ("" if live is None else f", {int(live.sum())} live rows"))
    return batch, found


def sums(setting: Setting, *shapes: Shape) -> bool:
    """Log-probs alone: loads, rings, no cluster."""
    holds = True
    for shape in shapes:
        batch, found = scored(setting, shape)
        holds &= check_log_probs(batch, found[0], str(shape))
    return holds


def both_places(batch: Batch, call: Callable[[Tensor], bool]) -> bool:
    """``call(out)`` with a gradient of its own, then with the logits as the gradient."""
    holds = call(gradient_like(batch.rows.logits).fill_(float("nan")))
    return call(batch.rows.logits) and holds


def gradients(setting: Setting, *shapes: Shape) -> bool:
    """The backward of log-probs: bulk stores, no cluster."""
    holds = True
    for shape in shapes:
        batch, found = scored(setting, shape)
        slope = torch.randn_like(found[0]) * (batch.weight if batch.weight > 1 else 1)
        before = batch.rows.logits.clone()
        holds &= both_places(batch, partial(_backward, setting, shape, batch, found, slope, before))
    return holds


def _backward(
    setting: Setting, shape: Shape, batch: Batch, found: RowStats, slope: Tensor, before: Tensor, out: Tensor
) -> bool:
    cuda.log_probs_backward(batch.rows, found, RowGradients(slope, None), out)
    wait(setting, f"log_probs_backward {shape}")
    return check_gradient(batch, before, out, slope, f"{shape}{_place(batch, out)}")


def _place(batch: Batch, out: Tensor) -> str:
    return ", in place" if out is batch.rows.logits else ""


def one_pass(setting: Setting, *shapes: Shape) -> bool:
    """Loss and gradient in one launch: clusters, exchange between blocks. Log-probs have the bits of log_probs."""
    holds = True
    for shape in shapes:
        batch, found = scored(setting, shape)
        holds &= check_log_probs(batch, found[0], str(shape))
        before = batch.rows.logits.clone()
        holds &= both_places(batch, partial(_fused, setting, shape, batch, found, before))
    return holds


def _fused(setting: Setting, shape: Shape, batch: Batch, found: RowStats, before: Tensor, out: Tensor) -> bool:
    what = f"{shape}{_place(batch, out)}"
    old, ref = found[0] + 0.1, found[0] - 0.1
    *mine, policy, kl, flags = fused(batch, old, ref, out)
    wait(setting, f"fused_loss {what}")
    same = all(torch.equal(a, b) for a, b in zip(mine[:2], found[:2], strict=True))
    if not same:
        say(False, f"{what}: log-probs and entropies have other bits than those of log_probs")
    same &= check_terms(batch, found[0], [old, ref], [policy, kl, flags], what)
    # Advantage 1, inside the clip: -ratio; k3: 1 - exp(ref - log_prob).
    slope = batch.weight * (-torch.exp(found[0] - old) - BETA * torch.expm1(ref - found[0]))
    return check_gradient(batch, before, out, slope, what) and same


def dead_rows(setting: Setting, *shapes: Shape) -> bool:
    """One row in seven is live, then none: a dead row is all zeros, the live ones hold."""
    holds = True
    for shape in shapes:
        live = torch.zeros(1, shape.tokens, dtype=torch.bool, device=setting.device)
        live[0, 3::7] = True
        for some in (live, torch.zeros_like(live)):
            batch, found = scored(setting, shape, some)
            out = gradient_like(batch.rows.logits).fill_(float("nan"))
            if some.any():
                holds &= _fused(setting, shape, batch, found, batch.rows.logits, out)
            else:
                found = fused(batch, batch.per_row(-9.0), batch.per_row(-9.3), out)
                wait(setting, f"fused_loss {shape}, no live rows")
            zeros = not bool(out[~some].any()) and not bool(found[0][~some].any())
            holds &= say(zeros, f"{shape}: {int(some.sum())} live rows, the others are zero")
    return holds


def races(setting: Setting, *shapes: Shape) -> bool:
    """The same bits every time: what a missing fence or wait would break."""
    holds, times = True, 3 if setting.small else 25
    for shape in shapes:
        batch = make(setting, shape)
        old, ref = batch.per_row(-9.0), batch.per_row(-9.3)
        first: list[Tensor] = []
        for k in range(times):
            out = gradient_like(batch.rows.logits).fill_(float("nan"))
            mine = [*fused(batch, old, ref, out)[:4], out]
            wait(setting, f"fused_loss {shape}, run {k}")
            first = first or mine
            if not all(torch.equal(a, b) for a, b in zip(first, mine, strict=True)):
                holds = say(False, f"{shape}: run {k} differs from run 0: a race")
                break
        else:
            say(True, f"{shape}: {times} equal runs")
    return holds


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


def pairs(setting: Setting, call: Callable[[Pair, Tensor], None], *shapes: Shape) -> bool:
    """Divergences from a teacher and their gradient, by ``call``: a row and its teacher's at once."""
    holds = True
    for shape in shapes:
        for divergence in PAIRS:
            pair = pair_of(setting, shape, divergence)
            out, what = gradient_like(pair.rows.logits).fill_(float("nan")), f"{divergence.kind} {shape}"
            call(pair, out)
            wait(setting, what)
            holds &= _check_pair(pair, out, what)
    return holds


def _check_pair(pair: Pair, out: Tensor, what: str) -> bool:
    logits, teacher = pair.rows.logits[0], pair.teacher.logits[0]
    gradient = out[0].double() / pair.batch.weight
    value, slope = gpu_exact.divergence_errors(pair.divergence, logits, teacher, pair.found.divergence[0], gradient)
    _, allowed = gpu_exact.allowed(logits.dtype)
    text = f"{what}: errors {value:.1e} of D (relative), {slope:.1e} of the gradient (L2 of a row, relative)"
    return say(value < 1e-4 and slope < 2 * allowed, f"{text}, allowed 1e-04 and {2 * allowed:.0e}")


def times_of_pairs(setting: Setting, *shapes: Shape) -> bool:
    """A divergence's gradient in one pass and in two."""
    if setting.small:
        return say(True, "no times: they are those of large shapes on a GPU")
    for shape in shapes:
        for divergence in PAIRS:
            pair = pair_of(setting, shape, divergence)
            out = torch.empty_like(pair.rows.logits)
            ms = {
                "one_pass_ms": 1e3 * _seconds(setting, lambda pair=pair, out=out: pair.one_pass(out)),
                "two_passes_ms": 1e3 * _seconds(setting, lambda pair=pair, out=out: pair.two_passes(out)),
            }
            name = f"{divergence.kind} {shape}"
            gpu_rows.write(setting.rows, name, logits_bytes=out.nbytes, **ms)
            say(True, f"{name}: one pass {ms['one_pass_ms']:.3f} ms, two passes {ms['two_passes_ms']:.3f} ms")
    return True


def times(setting: Setting, *shapes: Shape) -> bool:
    """Bandwidth of a copy; loss and gradient, in place and not, with KL and without; log-probs."""
    if setting.small:
        return say(True, "no times: they are those of large shapes on a GPU")
    copy = _copy(setting)
    say(True, f"a copy moves {copy / 1e9:.0f} GB/s")
    gpu_rows.write(setting.rows, "copy", copy_gb_per_s=copy / 1e9)
    for shape in shapes:
        for beta in (BETA, 0.0):
            _time(setting, shape, beta, copy)
    return True


def _copy(setting: Setting) -> float:
    """Return bytes a second, read and written."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(setting, lambda: target.copy_(source))


def _time(setting: Setting, shape: Shape, beta: float, copy: float) -> None:
    batch = make(setting, shape, beta=beta)
    logits, plan = batch.rows.logits, cuda.plan(0, shape.dtype, shape.vocab)
    old, ref, out = batch.per_row(-9.0), batch.per_row(-9.3), torch.empty_like(logits)
    stats = RowStats(*batch.unwritten(4))
    calls = {  # the last replaces the logits
        "log_probs_ms": lambda: cuda.log_probs(batch.rows, stats),
        "one_pass_ms": prepared(batch, old, ref, out).call,
        "in_place_ms": prepared(batch, old, ref, logits).call,
    }
    ms = {name: 1e3 * _seconds(setting, call) for name, call in calls.items()}
    share = 2e3 * logits.nbytes / copy / ms["in_place_ms"]
    micros = 1e3 * ms["in_place_ms"] * plan.clusters / shape.tokens
    name = f"{shape}, {'k3 KL' if beta else 'no KL'}"
    gpu_rows.write(setting.rows, name, logits_bytes=logits.nbytes, of_copy=share, us_per_row_and_cluster=micros, **ms)
    figures = ", ".join(f"{key.removesuffix('_ms').replace('_', ' ')} {value:.3f} ms" for key, value in ms.items())
    say(True, f"{name}: {figures}; in place {share:.0%} of a copy, {micros:.2f} us a row and cluster")


def _seconds(setting: Setting, function: Callable[[], object]) -> float:
    """Of the device, the median of nine after one: it is kept busy until the call and both marks are queued, so that
    no mark waits for Python."""
    function()
    found = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY)
        start.record()
        function()
        end.record()
        wait(setting, "a timed call")
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[4]
