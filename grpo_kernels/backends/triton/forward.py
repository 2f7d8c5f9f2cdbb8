"""Log-probs, entropies and log-sum-exps of rows.

Lengths, strides and numbers are run-time arguments everywhere: a new length or an annealed coefficient compiles
nothing. Whole blocks are loaded without a mask, so that aligned rows are read 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    AT_RUN_TIME,
    add_block,
    anchor_of,
    finish_stats,
    hold,
    in_vectors,
    lane_sums,
    load_block,
    logit_map,
    max_or_nan,
    origin_of,
    sampled,
    unrounded,
    values_of,
)


@triton.jit
def store_stats(row_index, log_prob, entropy, anchor, log_sum, stats):
    tl.store(log_prob + row_index, stats[0])
    tl.store(entropy + row_index, stats[1])
    tl.store(anchor + row_index, stats[2])
    tl.store(log_sum + row_index, stats[3])


@triton.jit
def store_no_stats(row_index, log_prob, entropy, anchor, log_sum):
    """Store the statistics of a dead row, zeros."""
    store_stats(row_index, log_prob, entropy, anchor, log_sum, (0, 0, 0, 0))


@triton.jit
def span_sums(
    row,
    begin,
    target,
    origin,
    vocab,
    numbers,
    mapping,
    ALIGNMENT: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    NEAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return the two sums of ``add_block`` over the row's columns in [begin, begin + SPAN). Only the block of the
    target looks for it."""
    end = tl.minimum(begin + SPAN, vocab)
    whole = begin + (end - begin) // BLOCK * BLOCK
    total = tl.zeros([BLOCK], numbers.dtype.element_ty)
    weighted = total
    for start in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        logits = load_block(row, start, vocab, numbers, BLOCK, False)
        if (target >= start) & (target < start + BLOCK):
            total, weighted = add_block(
                total, weighted, logits, start, target, origin, vocab, mapping, BLOCK, False, True, NEAR, SOFTCAP
            )
        else:
            total, weighted = add_block(
                total, weighted, logits, start, target, origin, vocab, mapping, BLOCK, False, False, NEAR, SOFTCAP
            )
    if whole < end:
        logits = load_block(row, whole, vocab, numbers, BLOCK, True)
        total, weighted = add_block(
            total, weighted, logits, whole, target, origin, vocab, mapping, BLOCK, True, True, NEAR, SOFTCAP
        )
    return lane_sums(total, weighted, SWEEP, ALIGNMENT)


@triton.jit
def row_sums(
    row,
    target,
    origin,
    vocab,
    numbers,
    mapping,
    ALIGNMENT: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    NEAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return the two sums of ``add_block`` over the whole row, span by span."""
    total = tl.load(numbers) * 0
    weighted = total
    for begin in tl.range(0, vocab, SPAN):
        more = span_sums(
            row, begin, target, origin, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, STAGES, NEAR, SOFTCAP
        )
        total += more[0]
        weighted += more[1]
    return total, weighted


@triton.jit
def row_max(row, vocab, numbers, mapping, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the row's largest value; +inf where one is NaN, so that -inf says that no column is possible."""
    largest = tl.full([BLOCK], -float("inf"), numbers.dtype.element_ty)
    for start in tl.range(0, vocab, BLOCK):
        logits = load_block(row, start, vocab, numbers, BLOCK, True)
        largest = max_or_nan(largest, values_of(logits, start, vocab, mapping, BLOCK, True, SOFTCAP))
    return tl.max(tl.where(largest == largest, largest, float("inf")), 0)


@triton.jit
def far_sums(
    row,
    target,
    vocab,
    numbers,
    mapping,
    ALIGNMENT: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return the row's sums relative to its largest value, and that value."""
    largest = row_max(row, vocab, numbers, mapping, BLOCK, SOFTCAP)
    anchor = anchor_of(largest)
    total, weighted = row_sums(
        row, target, anchor, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, 1, False, SOFTCAP
    )
    return total, weighted, largest


@triton.jit
def settle(
    total,
    weighted,
    row,
    target,
    value,
    vocab,
    numbers,
    mapping,
    ALIGNMENT: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return statistics from the sums relative to the sampled value, or where those overflowed, to the largest."""
    factor = mapping[3]
    anchored_at = value
    if hold(total, weighted, value, factor):
        total, weighted = unrounded(total, weighted, value, factor)
    else:
        total, weighted, anchored_at = far_sums(
            row, target, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, SOFTCAP
        )
    return finish_stats(anchored_at, total, weighted, value, factor)


@triton.jit(do_not_specialize=AT_RUN_TIME)
def log_probs_kernel(
    logits,
    batch_stride: tl.int64,
    row_stride,
    token_ids,
    live,
    numbers,
    temperatures,
    log_prob,
    entropy,
    anchor,
    log_sum,
    length,
    vocab,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Write a row's statistics; one program a row."""
    row_index = tl.program_id(0)
    if tl.load(live + row_index) == 0:
        store_no_stats(row_index, log_prob, entropy, anchor, log_sum)
        return
    vocab = in_vectors(vocab, VECTOR)
    mapping = logit_map(numbers, temperatures, row_index, SOFTCAP)
    row, target, _, value = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, ALIGNMENT, SOFTCAP
    )
    origin = origin_of(value, mapping[3])
    total, weighted = row_sums(
        row, target, origin, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, STAGES, True, SOFTCAP
    )
    stats = settle(total, weighted, row, target, value, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, SOFTCAP)
    store_stats(row_index, log_prob, entropy, anchor, log_sum, stats)


@triton.jit(do_not_specialize=AT_RUN_TIME)
def span_sums_kernel(
    logits,
    batch_stride: tl.int64,
    row_stride,
    token_ids,
    live,
    numbers,
    temperatures,
    partial,
    length,
    vocab,
    spans,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Write a span's two sums, into (rows, spans, 2); for few rows, one program a span."""
    row_index = tl.program_id(0) // spans
    span = tl.program_id(0) - row_index * spans
    if tl.load(live + row_index) == 0:
        return
    vocab = in_vectors(vocab, VECTOR)
    mapping = logit_map(numbers, temperatures, row_index, SOFTCAP)
    row, target, _, value = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, ALIGNMENT, SOFTCAP
    )
    origin = origin_of(value, mapping[3])
    sums = span_sums(
        row, span * SPAN, target, origin, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, STAGES, True, SOFTCAP
    )
    partial += tl.program_id(0).to(tl.int64) * 2
    tl.store(partial, sums[0])
    tl.store(partial + 1, sums[1])


@triton.jit(do_not_specialize=AT_RUN_TIME)
def merge_spans_kernel(
    logits,
    batch_stride: tl.int64,
    row_stride,
    token_ids,
    live,
    numbers,
    temperatures,
    partial,
    log_prob,
    entropy,
    anchor,
    log_sum,
    length,
    vocab,
    spans,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    SWEEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Write a row's statistics from ``span_sums_kernel``'s sums, added left to right as ``log_probs_kernel`` does."""
    row_index = tl.program_id(0)
    if tl.load(live + row_index) == 0:
        store_no_stats(row_index, log_prob, entropy, anchor, log_sum)
        return
    vocab = in_vectors(vocab, VECTOR)
    mapping = logit_map(numbers, temperatures, row_index, SOFTCAP)
    row, target, _, value = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, ALIGNMENT, SOFTCAP
    )
    partial += row_index.to(tl.int64) * spans * 2
    total = tl.load(numbers) * 0
    weighted = total
    for span in tl.range(0, spans):
        total += tl.load(partial + span * 2)
        weighted += tl.load(partial + span * 2 + 1)
    stats = settle(total, weighted, row, target, value, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, SOFTCAP)
    store_stats(row_index, log_prob, entropy, anchor, log_sum, stats)
