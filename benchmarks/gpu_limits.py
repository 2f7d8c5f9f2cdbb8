"""Measures what a GPU can do, for gpu_check.py: bandwidths that the figures are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from gpu_rows import Rows

from grpo_kernels.bench import measure


def limits() -> Rows:
    """What this GPU can do: GB/s of a copy, of reading alone, and of reading again what its second-level cache may
    hold."""
    source = torch.zeros(2**29, device="cuda")
    target = torch.empty_like(source)
    yield "copy", lambda: {"gb_per_s": 2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9}
    yield "read", lambda: {"gb_per_s": _reading(source, 1)}
    for mb in (8, 16, 24, 32, 40, 48, 64, 96, 128):
        yield f"{mb} MB read again", partial(lambda part: {"gb_per_s": _reading(part, 100)}, source[: mb * 2**18])


@triton.jit
def reading_kernel(source, out, columns, repeats, BLOCK: tl.constexpr):
    """Reads everything ``repeats`` times, past the first-level cache."""
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(repeats):
        for start in tl.range(tl.program_id(0) * BLOCK, columns, tl.num_programs(0) * BLOCK, num_stages=4):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(source + at, mask=at < columns, other=0.0, cache_modifier=".cg")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def _reading(values: torch.Tensor, repeats: int) -> float:
    """Return GB/s."""
    programs = 8 * torch.cuda.get_device_properties(values.device).multi_processor_count
    out = torch.empty(programs, device=values.device)
    arguments = (values, out, values.numel(), repeats)
    seconds = _seconds(lambda: reading_kernel[(programs,)](*arguments, BLOCK=2048, num_warps=4))
    return repeats * values.nbytes / seconds / 1e9


def _seconds(function: Callable[[], object]) -> float:
    """Return the median of some calls, after two to warm up."""
    function(), function()
    clock = measure.Clock("cuda")
    for _ in range(11):
        function()
        clock.mark()
    return sorted(clock.seconds())[5]
