"""Measures times in turns, peak memory, accuracy and first calls: one engine for every provider and workload."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..backends import blocks
from ..backends.contract import on_device
from ..objectives.config import LossConfig
from ..objectives.settings import first_line
from ..verification import records, reference
from .providers import Provider
from .workload import DTYPES, SEQUENCES, Spec, Workload

FLUSH_BYTES = 256 << 20
"""Bytes that are written between samples on a GPU: more than its second-level cache holds."""
ENOUGH = 7.0
"""Seconds of samples of one provider in one workload, after which it is left out of further rounds."""
CHECKED_ROWS = 64
"""How many rows of the gradient are compared with float64."""


class TooLarge(ValueError):
    """Raised for a workload that does not fit the device, before anything is allocated."""


def run(
    specs: Sequence[Spec],
    providers: Callable[[Spec], Sequence[Provider]],
    rounds: int,
    *,
    timed: bool = True,
    progress: Callable[[str], object] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each workload, as soon as it is measured: plain data, ready for JSON."""
    for spec in specs:
        check_fits(spec)
    for spec in specs:
        progress(f"{spec}: preparing")
        with on_device(torch.device(spec.device)):
            row = _row(spec, providers(spec), rounds, timed, progress)
        yield row
        gc.collect()


def check_fits(spec: Spec) -> None:
    """Raise TooLarge where not even the workload and ours fit."""
    there = records.free_memory(spec.device)
    # Ours beside the workload; a sequence in float64 with its gradient, softmax and copies; fp32 noise to draw from.
    ours = 1.1 * spec.logits_bytes if spec.hidden is None else min(2**30, 2 * spec.logits_bytes)
    need = spec.bytes() + ours + max(48 * spec.tokens * spec.vocab // SEQUENCES, 4 * spec.tokens * spec.vocab)
    if there is not None and need > there:
        fitting = int(spec.tokens * there / need * 0.8)
        advice = f"fewer tokens ({fitting} would fit)" if fitting > 0 else "fewer columns"
        narrower = " or --dtype bf16" if DTYPES[spec.dtype].itemsize > 2 else ""
        raise TooLarge(
            f"{spec} needs about {need / 1e9:.1f} GB and {there / 1e9:.1f} GB are free on {spec.device}: "
            f"{advice}{narrower}."
        )


def _row(
    spec: Spec, providers: Sequence[Provider], rounds: int, timed: bool, progress: Callable[[str], object]
) -> dict[str, Any]:
    work = Workload(spec)
    found: dict[str, dict[str, Any]] = {}
    alive: list[Provider] = []
    exact = Exact(work) if timed else None
    for provider in providers:
        progress(f"{spec}: {provider.name}")
        free = records.free_memory(spec.device)
        if free is not None and provider.bytes(spec) > 0.9 * free:
            found[provider.name] = {
                "skipped": f"needs about {provider.bytes(spec) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            }
            continue
        try:
            found[provider.name] = _alone(provider, work, exact)
            alive.append(provider)
        except Exception as error:  # a peer may raise anything; the others go on
            found[provider.name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    if timed:
        for name, numbers in _in_turns(work, alive, rounds, lambda k: progress(f"{spec}: round {k} of {rounds}")):
            found.setdefault(name, {}).update(numbers)
        for provider in alive:
            progress(f"{spec}: {provider.name}, another length")
            try:
                found[provider.name] |= _new_length(provider, work)
            except Exception as error:  # the timing stands
                found[provider.name]["new_length_failed"] = f"{type(error).__name__}: {first_line(error)}"
    yardstick = found.pop(YARDSTICK, {}).get("step_ms")
    for provider in providers:
        found[provider.name] |= {"same_outputs": provider.same_outputs, "ours": provider.ours, "call": provider.call}
    return {
        **dataclasses.asdict(spec),
        "logits_bytes": spec.logits_bytes,
        "yardstick_ms": yardstick,
        "providers": found,
    }


# One provider by itself


def _alone(provider: Provider, work: Workload, exact: Exact | None) -> dict[str, Any]:
    """Measure the first call, peak memory, what stays of it, and errors beside float64."""
    work.restore()
    blocks.empty_cache()
    clock = Clock(work.spec.device)
    loss = float(step(provider, work).detach())
    clock.mark()
    numbers: dict[str, Any] = {}
    if work.spec.kind == "all" and work.spec.upstream == 1:  # else everything was compiled for this shape before
        numbers["first_call_s"] = clock.seconds()[0]
    gradients = tuple(g.clone() for g in work.gradients)
    work.restore()
    with quiet():
        numbers["extra_bytes"] = peak_bytes(lambda: step(provider, work), work.spec.device)
    numbers["repeatable"] = all(torch.equal(a, b) for a, b in zip(gradients, work.gradients, strict=True))
    work.restore()
    numbers["kept_bytes"] = blocks.count().kept
    if exact is None:
        return numbers
    numbers["loss_error"], numbers["gradient_error"] = exact.errors(loss, gradients)
    with torch.no_grad():
        provider.loss(work)  # compiles what a forward alone needs
    return numbers


def _new_length(provider: Provider, work: Workload) -> dict[str, float]:
    """Time a first call with a length that nothing was compiled for, after the timing, which it might slow down."""
    if work.shape[1] == 1 or work.spec.kind != "all" or work.spec.upstream != 1:
        return {}
    shorter = work.shortened()
    return {"new_length_s": _seconds(lambda: step(provider, shorter), work)}


def step(provider: Provider, work: Workload) -> Tensor:
    """Compute loss and gradient, as a training step does."""
    loss = provider.loss(work)
    (loss * work.spec.upstream).backward()
    return loss


class Exact:
    """Holds the loss and some rows of its gradient in float64, computed a sequence at a time, so that it fits."""

    def __init__(self, work: Workload) -> None:
        B, T = work.shape
        self.columns = torch.arange(T, device=work.ids.device)[:: max(1, B * T // CHECKED_ROWS)]
        self.loss, rows = 0.0, []
        summed = dataclasses.replace(work.config, aggregation="sequence_sum")
        for i in range(B):
            everything = torch.arange(T, device=work.ids.device)
            with torch.no_grad():
                self.loss += float(self._loss(work, i, everything, work.config)[0]) / B
            loss, leaf = self._loss(work, i, self.columns, summed)
            weight = work.spec.upstream / (B * max(1, int(work.mask[i].sum())))
            rows.append(torch.autograd.grad(loss * weight, leaf)[0])
        self.gradient = torch.cat(rows)

    def _loss(self, work: Workload, i: int, columns: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
        """Return the loss of some tokens of a sequence, and the rows that it is a function of."""
        rows = work.kept if work.spec.hidden is None else work.hidden
        leaf = rows[i : i + 1, columns].double().requires_grad_()
        logits = leaf if work.spec.hidden is None else torch.nn.functional.linear(leaf, work.weight.double())
        ids, mask = work.ids[i : i + 1, columns], work.mask[i : i + 1, columns]
        known: dict[str, Any] = {name: tensor[i : i + 1, columns].double() for name, tensor in work.known().items()}
        return reference.grpo_loss(
            logits, ids, work.advantages[i : i + 1].double(), mask, config=config, **known
        ).loss, leaf

    def errors(self, loss: float, gradients: tuple[Tensor, ...]) -> tuple[float, float]:
        """Return the relative error of the value, and the relative L2 error of the gradient's rows (from hidden states
        theirs)."""
        mine = gradients[0][:, self.columns].double()
        size = float(self.gradient.norm())
        off = float((mine - self.gradient).norm()) / size if size else float(mine.norm())
        return abs(loss - self.loss) / max(abs(self.loss), 1e-12), off


# In turns

YARDSTICK = "bound"


def bound(work: Workload) -> None:
    """Do what no loss step can beat: read and write the logits once; from hidden states, the three GEMMs.

    The GEMMs run in fp32 on a CPU, which is what a bf16 head takes there, and make fresh tensors as training does.
    """
    if work.spec.hidden is None:
        work.buffer.mul_(1.0)
        return
    hidden, weight = work.hidden.flatten(0, 1), work.weight
    if hidden.device.type == "cpu":
        hidden, weight = hidden.float(), weight.float()
    logits = hidden @ weight.t()
    gradients = logits @ weight, logits.t() @ hidden
    del gradients


def _in_turns(
    work: Workload, providers: Sequence[Provider], rounds: int, progress: Callable[[int], object]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield median milliseconds of the no-grad forward, of loss and backward in a step, and of both, by provider."""
    samples: dict[str, dict[str, list[float]]] = {p.name: {} for p in providers}
    device = work.spec.device
    flush = torch.empty(FLUSH_BYTES if torch.device(device).type == "cuda" else 1, dtype=torch.uint8, device=device)
    scale: dict[str, list[float]] = {"step_ms": []}
    for provider in providers:
        if provider.ours:  # what it keeps for the next call was dropped after its memory was measured
            work.restore()
            step(provider, work)
    for k in range(rounds):
        progress(k + 1)
        for i in range(len(providers)):
            provider = providers[(i + k) % len(providers)]
            mine = samples[provider.name]
            if sum(mine.get("step_ms", [])) + sum(mine.get("forward_ms", [])) > 1e3 * ENOUGH:
                continue
            for name, ms in _sample(provider, work, flush).items():
                mine.setdefault(name, []).append(ms)
        work.restore()
        flush.zero_()
        scale["step_ms"].append(1e3 * _seconds(lambda: bound(work), work))
    for name, lists in [*samples.items(), (YARDSTICK, scale)]:
        yield name, _medians(lists)


def _medians(lists: dict[str, list[float]]) -> dict[str, float]:
    found = {}
    for name, values in lists.items():
        if values:
            ordered = sorted(values)
            found[name] = statistics.median(ordered)
            found[name.replace("_ms", "_p20_ms")] = ordered[len(ordered) // 5]
            found[name.replace("_ms", "_p80_ms")] = ordered[(4 * len(ordered)) // 5]
    return found


def _sample(provider: Provider, work: Workload, flush: Tensor) -> dict[str, float]:
    work.restore()
    flush.zero_()
    with torch.no_grad():
        forward = _seconds(lambda: provider.loss(work), work)
    work.restore()
    flush.zero_()
    clock = Clock(work.spec.device)
    loss = provider.loss(work)
    clock.mark()
    (loss * work.spec.upstream).backward()
    clock.mark()
    loss_s, backward_s = clock.seconds()
    return {
        "forward_ms": 1e3 * forward,
        "loss_ms": 1e3 * loss_s,
        "backward_ms": 1e3 * backward_s,
        "step_ms": 1e3 * (loss_s + backward_s),
    }


class Clock:
    """Sets marks on the device's own time line: CUDA events, or the wall clock."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between one mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def _seconds(function: Callable[[], object], work: Workload) -> float:
    clock = Clock(work.spec.device)
    function()
    clock.mark()
    return clock.seconds()[0]


# Memory


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Return the peak of what PyTorch's allocator hands out while the function runs, beyond what it had before.

    On a CPU our blocks are PyTorch's memory meanwhile, which its profiler sees. What is kept of them afterwards is the
    system's to take, and counted by itself.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with mock.patch.dict(os.environ, {blocks.SWITCH: "0"}), profiled as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence stderr below Python, where the profiler greets."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
