"""The way from the records of rows to the loss and the sums behind its metrics, fp64: two launches in place of forty.

backends/eager.py holds the same sums in PyTorch, csrc/cpu/token_sums.h in C++; objectives/metrics.py names the
fields. Chunks of tokens are added left to right, so the bits do not depend on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...objectives.metrics import OF_KERNELS as FIELDS
from ...objectives.metrics import SUMS
from .maths import expm1
from .surrogates import ABS, CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, K1, K2, log_ratio_of, weighed

TOKENS_PER_CHUNK = 512
CHUNKS_AT_ONCE = 16
WIDTH = tl.constexpr(triton.next_power_of_2(len(FIELDS)))
"""The numbers of a chunk's record: FIELDS and padding to a power of two."""

TERMS = tl.constexpr(4)  # those of the loss come first
_SEQUENCES = tl.constexpr(FIELDS.index("sequences"))
_ROLLOUT_SUM = tl.constexpr(FIELDS.index("rollout_ratio_sum"))  # its square, that of the factors, and its square
_RATIO_SUM = tl.constexpr(FIELDS.index("ratio_sum"))
_RATIO_MIN = tl.constexpr(FIELDS.index("ratio_min"))
_RATIO_MAX = tl.constexpr(FIELDS.index("ratio_max"))
_SUMS = tl.constexpr(len(SUMS))
_FIELDS = tl.constexpr(len(FIELDS))


@triton.jit
def weighted(weight, value, at, counted):
    w = tl.load(weight + at, mask=counted, other=0)
    return weighed(w, tl.load(value + at, mask=counted, other=0)).to(tl.float64)


@triton.jit
def divergence(log_prob, other, at, counted):
    """Return log_prob - other and its k3, fp64; 0 where not counted."""
    x = log_ratio_of(log_prob, tl.load(other + at, mask=counted, other=0)).to(tl.float64)
    x = tl.where(counted, x, 0)
    return x, tl.where(x == -float("inf"), float("inf"), expm1(-x) + x)


@triton.jit(do_not_specialize=["count"])
def chunk_sums_kernel(
    log_prob,
    entropy,
    live,
    masked_in,
    policy_weight,
    kl_weight,
    entropy_weight,
    rollout_kl_weight,
    old,
    ref,
    rollout,
    policy,
    kl,
    flags,
    rollout_weight,
    rollout_kl,
    chunk_records,
    count,
    KL_ESTIMATOR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write a chunk's record of WIDTH numbers; one program a chunk of tokens."""
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    chunk_records += tl.program_id(0) * WIDTH
    inside = at < count
    counted = tl.load(live + at, mask=inside, other=0) != 0
    masked = tl.load(masked_in + at, mask=inside, other=0) != 0
    p = tl.load(log_prob + at, mask=counted, other=0)
    zero = tl.zeros([CHUNK], tl.float64)
    one = counted.to(tl.float64)

    kl_loss, entropy_loss, rollout_kl_loss = zero, zero, zero
    if kl_weight is not None:
        kl_loss = weighted(kl_weight, kl, at, counted)
    if entropy_weight is not None:
        entropy_loss = -weighted(entropy_weight, entropy, at, counted)
    if rollout_kl_weight is not None:
        rollout_kl_loss = weighted(rollout_kl_weight, rollout_kl, at, counted)
    to_ref, k3_ref, compared = zero, zero, zero
    if ref is not None:
        to_ref, k3_ref = divergence(p, ref, at, counted)
        compared = one
    if KL_ESTIMATOR == K1:
        kl_sum = to_ref
    elif KL_ESTIMATOR == K2:
        kl_sum = to_ref * to_ref / 2
    elif KL_ESTIMATOR == ABS:
        kl_sum = tl.abs(to_ref)
    else:
        kl_sum = k3_ref
    to_old, k3_old, ratio = zero, zero, one
    if old is not None:
        to_old, k3_old = divergence(p, old, at, counted)
        ratio = tl.where(counted, tl.exp(to_old), 0)
    to_rollout, k3_rollout, rollout_count, unrecorded, rho, weight = zero, zero, zero, zero, zero, zero
    if rollout is not None:
        sampler = tl.load(rollout + at, mask=counted, other=float("nan"))
        recorded = sampler == sampler
        to_rollout, k3_rollout = divergence(p, rollout, at, recorded)
        rollout_count = recorded.to(tl.float64)
        unrecorded = one - rollout_count
        from_rollout = to_rollout
        if old is not None:
            from_rollout = log_ratio_of(tl.load(old + at, mask=counted, other=0), sampler).to(tl.float64)
        rho = tl.where(recorded, tl.exp(from_rollout), 0)
        weight = rollout_count
        if rollout_weight is not None:
            weight = tl.where(recorded, tl.load(rollout_weight + at, mask=counted, other=0), 0).to(tl.float64)
    row_flags = tl.load(flags + at, mask=counted, other=0)

    columns = (
        weighted(policy_weight, policy, at, counted),
        kl_loss,
        entropy_loss,
        rollout_kl_loss,
        masked.to(tl.float64),
        (masked & (counted == 0)).to(tl.float64),
        (counted & (p == -float("inf"))).to(tl.float64),
        tl.load(entropy + at, mask=counted, other=0).to(tl.float64),
        kl_sum,
        compared,
        to_old,
        k3_old,
        to_rollout,
        k3_rollout,
        rollout_count,
        unrecorded,
        rho,
        rho * rho,
        weight,
        weight * weight,
        rollout_count * (weight == 0).to(tl.float64),
        zero,
        ratio,
        one,
        (row_flags & CLIPPED_LOW != 0).to(tl.float64),
        (row_flags & CLIPPED_HIGH != 0).to(tl.float64),
        (row_flags & CLIPPED_DUAL != 0).to(tl.float64),
    )
    for i in tl.static_range(_SUMS):
        tl.store(chunk_records + i, tl.sum(columns[i], 0))
    tl.store(chunk_records + _RATIO_MIN, tl.min(tl.where(counted, ratio, float("inf")), 0))
    tl.store(chunk_records + _RATIO_MAX, tl.max(tl.where(counted, ratio, -float("inf")), 0))
    tl.store(chunk_records + _RATIO_MAX + 1, tl.max(tl.where(rollout_count != 0, rho, -float("inf")), 0))
    tl.store(chunk_records + _RATIO_MAX + 2, tl.max(tl.where(rollout_count != 0, weight, -float("inf")), 0))


@triton.jit(do_not_specialize=["chunks", "sequences"])
def merge_chunks_kernel(chunk_records, loss, sums, chunks, sequences, AT_ONCE: tl.constexpr):
    """Merge all records, column by column, in one program."""
    field = tl.arange(0, WIDTH)
    row = tl.arange(0, AT_ONCE)
    total = tl.zeros([AT_ONCE, WIDTH], tl.float64)
    smallest = total + float("inf")
    largest = total - float("inf")
    for start in tl.range(0, chunks, AT_ONCE):
        inside = (start + row < chunks)[:, None] & (field < _FIELDS)[None, :]
        records = tl.load(chunk_records + (start + row)[:, None] * WIDTH + field[None, :], mask=inside, other=0)
        total += records
        smallest = tl.minimum(smallest, tl.where(inside, records, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, records, -float("inf")))
    result = tl.sum(total, 0)
    result = tl.where(field == _SEQUENCES, sequences, result)
    ratio_sum = tl.sum(tl.where(field == _RATIO_SUM, result, 0), 0)
    unknown = ratio_sum != ratio_sum  # a NaN ratio is both extremes, as in torch
    result = tl.where(field == _RATIO_MIN, tl.where(unknown, ratio_sum, tl.min(smallest, 0)), result)
    result = tl.where(field == _RATIO_MAX, tl.where(unknown, ratio_sum, tl.max(largest, 0)), result)
    result = tl.where(field > _RATIO_MAX, tl.max(largest, 0), result)
    for i in tl.static_range(2):  # the sampler's ratios and factors likewise
        total_i = tl.sum(tl.where(field == _ROLLOUT_SUM + 2 * i, result, 0), 0)
        kept = tl.where(total_i != total_i, total_i, result)
        result = tl.where(field == _RATIO_MAX + 1 + i, kept, result)
    tl.store(sums + field, result, mask=field < _FIELDS)
    tl.store(loss, tl.sum(tl.where(field < TERMS, result, 0), 0).to(loss.dtype.element_ty))
