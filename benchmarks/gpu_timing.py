"""The timing part of gpu_check.py: ours and the peers in turns, each figure with the copy bandwidth next to it.

Providers take turns inside each round, the second-level cache is flushed outside the timed window, figures are medians
over rounds; an upstream gradient of 1 and one of 1/4, which ours is told beforehand (grad_scale). Peers that are not
installed are left out and named.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import linear_loss
import torch
from baselines import eager_loss, loss_of_log_probs
from torch import Tensor

from grpo_kernels import KL, LossConfig, grpo_loss, token_log_probs

BETA = 0.04
CONFIG = LossConfig.preset("grpo", kl=KL(BETA))
SHAPES = ((8192, 151936), (16384, 32000), (8192, 128256))
REHEARSAL = ((16, 3000),)
ROUNDS = 15
FLUSH_BYTES = 256 << 20


class Workload:
    """Tokens in 8 sequences; ``restore`` brings back the logits, which in place overwrites."""

    def __init__(self, tokens: int, vocab: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        shape = (8, tokens // 8)
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        self.kept = (2 * torch.randn(*shape, vocab, **options)).to(dtype)
        self.buffer = self.kept.clone()
        self.ids = torch.randint(vocab, shape, **options)
        self.advantages = torch.randn(8, **options)
        self.mask = torch.ones(shape, dtype=torch.bool, device=device)
        log_probs = token_log_probs(self.kept, self.ids, backend="torch").log_probs
        self.old = log_probs + 0.2 * torch.randn(shape, **options)
        self.ref = log_probs + 0.2 * torch.randn(shape, **options)
        self.bytes = self.kept.numel() * dtype.itemsize

    def restore(self) -> None:
        self.buffer.copy_(self.kept)

    def leaf(self) -> Tensor:
        return self.buffer.detach().requires_grad_()

    def arguments(self) -> tuple[Tensor, ...]:
        return self.ids, self.advantages, self.mask


class _Handed(torch.autograd.Function):
    """Logits as a model hands them over: not a leaf, so that they may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def ours(work: Workload, upstream: float, inplace: bool, backend: str | None = None) -> Callable[[], object]:
    """Computes loss and gradient once, as the other providers do."""

    def step() -> None:
        anchor = torch.zeros((), device=work.kept.device, requires_grad=True)
        logits = _Handed.apply(anchor, work.buffer)
        options = {"old_log_probs": work.old, "ref_log_probs": work.ref, "config": CONFIG, "grad_scale": upstream}
        out = grpo_loss(logits, *work.arguments(), **options, inplace=inplace, backend=backend)
        (out.loss * upstream).backward()

    return step


def providers(work: Workload, upstream: float) -> dict[str, Callable[[], object]]:
    """What is missing here is absent."""

    def eager(function: Callable[..., Any]) -> Callable[[], object]:
        def step() -> None:
            loss = function(work.leaf(), *work.arguments(), work.old, work.ref, BETA, upcast=True)[0]
            (loss * upstream).backward()

        return step

    found = {"ours, in place": ours(work, upstream, True), "ours": ours(work, upstream, False)}
    found["eager fp32"] = eager(eager_loss)
    found["torch.compile"] = eager(torch.compile(eager_loss))
    if step := _liger(work, upstream):
        found["Liger triton_grpo_loss"] = step
    if step := _trl(work, upstream):
        found["TRL logprob kernel + eager loss"] = step
    return found


def _liger(work: Workload, upstream: float) -> Callable[[], object] | None:
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    except ImportError:
        return None
    padded = torch.zeros(8, 1, work.kept.shape[-1], dtype=work.kept.dtype, device=work.kept.device)
    logits = torch.cat([work.kept, padded], 1)  # it wants (B, L+1, V)

    def step() -> None:
        leaf = logits.detach().requires_grad_()
        options = {"temperature": 1.0, "beta": BETA, "eps_low": 0.2, "eps_high": 0.2, "inplace": False}
        loss = triton_grpo_loss(leaf, work.old, work.ref, work.ids, work.advantages, work.mask, **options)[0]
        (loss.mean() * upstream).backward()

    return step


def _trl(work: Workload, upstream: float) -> Callable[[], object] | None:
    try:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
    except ImportError:
        return None

    def step() -> None:
        log_probs = selective_log_softmax_and_entropy(work.leaf(), work.ids)[0]
        loss = loss_of_log_probs(log_probs, work.advantages, work.mask, work.old, work.ref, BETA)[0]
        (loss * upstream).backward()

    return step


def floors(work: Workload) -> dict[str, Callable[[], object]]:
    """What memory alone allows: one read; one read and one write."""
    target = torch.empty_like(work.kept)
    forward = {"forward alone": lambda: token_log_probs(work.kept, work.ids)}
    return {"copy": lambda: target.copy_(work.kept), "read": lambda: work.kept.view(torch.int16).amax(), **forward}


def run(device: str, seconds: float) -> dict[str, Any]:
    deadline = time.perf_counter() + seconds
    rows, missing = [], set()
    for tokens, vocab in SHAPES if device == "cuda" else REHEARSAL:
        work = Workload(tokens, vocab, device)
        for upstream in (1.0, 0.25):
            if time.perf_counter() > deadline:
                return {"rows": rows, "stopped": f"before {tokens}x{vocab}, upstream {upstream}"}
            steps = {**providers(work, upstream), **floors(work)}
            wanted = {"Liger triton_grpo_loss", "TRL logprob kernel + eager loss"}
            missing |= wanted - set(steps)
            share = (deadline - time.perf_counter()) / 2
            rows.append({"tokens": tokens, "vocab": vocab, "upstream": upstream, **measure(steps, work, device, share)})
        del work
    return {"rows": rows, "missing": sorted(missing)}


def measure(steps: dict[str, Callable[[], object]], work: Any, device: str, seconds: float) -> dict[str, Any]:
    """Median milliseconds and extra peak bytes of each, in turns; a provider that fails is named with its error."""
    failed, times, memory = {}, {name: [] for name in steps}, {}
    for name, step in steps.items():
        try:
            work.restore()
            step()
            memory[name] = _extra_memory(step, work, device)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    alive = [name for name in steps if name not in failed]
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 1, dtype=torch.uint8, device=device)
    end = time.perf_counter() + seconds
    for round_index in range(ROUNDS):
        if time.perf_counter() > end and round_index >= 3:
            break
        for i in range(len(alive)):
            name = alive[(i + round_index) % len(alive)]
            work.restore()
            flush.zero_()
            times[name].append(_milliseconds(steps[name], device))
    medians = {name: statistics.median(times[name]) for name in alive}
    return {"ms": medians, "extra_bytes": memory, "failed": failed, "logits_bytes": work.bytes}


def _milliseconds(step: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _extra_memory(step: Callable[[], object], work: Any, device: str) -> int:
    if device != "cuda":
        return 0
    work.restore()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


LINEAR = ((8192, 4096, 151936), (8192, 2048, 151936), (16384, 2048, 32000))
LINEAR_REHEARSAL = ((64, 32, 3000),)


def run_linear(device: str, seconds: float) -> dict[str, Any]:
    """From hidden states, bf16: ours and the peers beside the three GEMMs that bound them."""
    deadline = time.perf_counter() + seconds
    rows = []
    for shape in LINEAR if device == "cuda" else LINEAR_REHEARSAL:
        if time.perf_counter() > deadline:
            return {"rows": rows, "stopped": f"before {shape}"}
        work = linear_loss.Batch("bf16", *shape, device)
        steps = {name: functools.partial(step, work) for name, step in linear_loss.providers(work).items()}
        rows.append({"shape": shape, **measure(steps, work, device, deadline - time.perf_counter())})
        del work, steps
    return {"rows": rows}


def linear_table(results: dict[str, Any]) -> list[str]:
    lines = ["| tokens × hidden × vocab | provider | ms | x GEMMs | x ours | extra memory, of the logits |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in results["rows"]:
        ours, gemms = (row["ms"].get(name, float("nan")) for name in ("ours", linear_loss.GEMMS))
        for name, ms in row["ms"].items():
            extra = 100 * row["extra_bytes"][name] / row["logits_bytes"]
            cells = ["×".join(map(str, row["shape"])), name, f"{ms:.3f}", f"{ms / gemms:.2f}", f"{ms / ours:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {extra:.0f} % |")
        lines += [f"| | {name} | failed: {reason} | | | |" for name, reason in row["failed"].items()]
    return lines


def table(results: dict[str, Any]) -> list[str]:
    lines = ["| tokens × vocab | upstream | provider | ms | x ours | of the copy's rate | extra memory |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in results["rows"]:
        ours, copy = row["ms"].get("ours, in place", float("nan")), row["ms"].get("copy", float("nan"))
        for name, ms in row["ms"].items():
            extra = row["extra_bytes"][name] / row["logits_bytes"]
            cells = [f"{row['tokens']}×{row['vocab']}", f"{row['upstream']:g}", name, f"{ms:.3f}", f"{ms / ours:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {100 * copy / ms:.0f} % | {100 * extra:.1f} % |")
        lines += [f"| | | {name} | failed: {reason} | | | |" for name, reason in row["failed"].items()]
    if results.get("missing"):
        lines += ["", f"Not installed: {', '.join(results['missing'])}."]
    return lines
