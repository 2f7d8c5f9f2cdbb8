"""Has the steps of gpu_smoke.py: calls of the CUDA kernels alone, without Triton, each compared with float64.

Every step is a function of a Setting that says what it finds, and whether it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import gpu_exact
import gpu_rows
import torch
from gpu_calls import BETA, Batch, Pair, Setting, Shape, fused, log_probs, make, pair_of, prepared, wait
from torch import Tensor

from grpo_kernels.backends import Request, cuda, native
from grpo_kernels.backends.contract import RowGradients, RowStats
from grpo_kernels.backends.memory import gradient_like
from grpo_kernels.objectives.divergence import Divergence

PAIRS = tuple(Divergence(name) for name in ("forward_kl", "reverse_kl", "mixed_kl", "jsd"))
"""The divergences whose kernels are run."""
COPIED = 2**31
"""Bytes of the copy that times are held against: many times the second-level cache."""
BUSY = 2_000_000
"""Cycles, about a millisecond: many times what Python needs to queue a call."""


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
