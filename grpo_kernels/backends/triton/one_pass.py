"""The one-pass loss: a row's log-prob, its surrogate and KL inline, and its gradient, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import row_sums, settle, store_no_stats, store_stats
from .gradient import fill, write_gradient
from .rows import (
    add_block,
    anchor_of,
    finish_stats,
    gradient_of,
    gradient_terms,
    is_finite,
    load_block,
    logit_map,
    row_offset,
    sampled,
    values_of,
)
from .surrogates import GRAD_SCALE, NO_KL, token_terms


@triton.jit
def held_sums(
    held, target, anchor, vocab, numbers, mapping, HELD: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr
):
    """``span_sums`` of a row in registers."""
    total = tl.zeros([BLOCK], numbers.dtype.element_ty)
    weighted = total
    for i in tl.static_range(HELD):
        total, weighted = add_block(
            total, weighted, held[i], i * BLOCK, target, anchor, vocab, mapping, BLOCK, i == HELD - 1, SOFTCAP
        )
    return tl.sum(total, 0), tl.sum(weighted, 0)


@triton.jit
def held_stats(
    held, target, value, vocab, numbers, mapping, HELD: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr
):
    """``row_sums`` and ``settle`` of a row in registers."""
    anchored_at = value
    total, weighted = held_sums(held, target, anchor_of(value), vocab, numbers, mapping, HELD, BLOCK, SOFTCAP)
    if is_finite(total, weighted) == 0:
        largest = tl.full([BLOCK], -float("inf"), numbers.dtype.element_ty)
        for i in tl.static_range(HELD):
            largest = tl.maximum(largest, values_of(held[i], i * BLOCK, vocab, mapping, BLOCK, i == HELD - 1, SOFTCAP))
        anchored_at = tl.max(largest, 0)
        total, weighted = held_sums(held, target, anchor_of(anchored_at), vocab, numbers, mapping, HELD, BLOCK, SOFTCAP)
    return finish_stats(anchored_at, total, weighted, value, mapping[3])


@triton.jit
def row_terms(
    row_index,
    inside,
    row_log_prob,
    numbers,
    advantage,
    policy_weight,
    old,
    ref,
    kl_weight,
    policy,
    kl,
    flags,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_STRAIGHT_THROUGH: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
):
    """Write a row's terms (or those of several, ``inside`` a mask); d loss / d log_prob."""
    row_old = row_log_prob
    row_ref = row_log_prob
    weight = row_log_prob
    if old is not None:
        row_old = tl.load(old + row_index, mask=inside)
    if KL_ESTIMATOR != NO_KL:
        row_ref = tl.load(ref + row_index, mask=inside)
        weight = tl.load(kl_weight + row_index, mask=inside)
    policy_value, kl_value, slope, row_flags = token_terms(
        numbers,
        row_log_prob,
        row_old,
        row_ref,
        tl.load(advantage + row_index, mask=inside),
        tl.load(policy_weight + row_index, mask=inside),
        weight,
        SURROGATE,
        KL_ESTIMATOR,
        KL_STRAIGHT_THROUGH,
        KL_RATIO_WEIGHTED,
    )
    tl.store(policy + row_index, policy_value, mask=inside)
    tl.store(kl + row_index, kl_value, mask=inside)
    tl.store(flags + row_index, row_flags.to(tl.uint8), mask=inside)
    return slope


@triton.jit(do_not_specialize=["length"])
def one_pass_kernel(
    logits,
    batch_stride: tl.int64,
    row_stride,
    token_ids,
    live,
    numbers,
    advantage,
    policy_weight,
    old,
    ref,
    kl_weight,
    entropy_weight,
    log_prob,
    entropy,
    lse,
    policy,
    kl,
    flags,
    out,
    out_batch_stride: tl.int64,
    out_row_stride,
    length,
    vocab,
    HELD: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_STRAIGHT_THROUGH: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
):
    """One program a row: its log-prob, the terms of its loss, its gradient. ``out`` may be the logits.

    HELD > 0: the row, one span of so many blocks, stays in registers and is read once. HELD = 0: it is walked twice.
    """
    row_index = tl.program_id(0)
    out += row_offset(row_index, length, out_batch_stride, out_row_stride)
    zero = tl.load(numbers) * 0
    if tl.load(live + row_index) == 0:
        store_no_stats(row_index, log_prob, entropy, lse)
        tl.store(policy + row_index, zero)
        tl.store(kl + row_index, zero)
        tl.store(flags + row_index, zero.to(tl.uint8))
        fill(out, zero, 0, tl.cdiv(vocab, BLOCK), vocab, BLOCK)
        return
    mapping = logit_map(numbers, SOFTCAP)
    row, target, target_logit, value = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, SOFTCAP
    )
    anchor = anchor_of(value)
    held = ()
    if HELD == 0:
        total, weighted = row_sums(row, target, anchor, vocab, numbers, mapping, SPAN, BLOCK, STAGES, SOFTCAP)
        stats = settle(total, weighted, row, target, value, vocab, numbers, mapping, SPAN, BLOCK, STAGES, SOFTCAP)
    else:
        for i in tl.static_range(HELD):
            held += (load_block(row, i * BLOCK, vocab, numbers, BLOCK, i == HELD - 1),)
        stats = held_stats(held, target, value, vocab, numbers, mapping, HELD, BLOCK, SOFTCAP)
    store_stats(row_index, log_prob, entropy, lse, stats)
    row_log_prob, row_entropy, row_lse = stats

    grad_scale = tl.load(numbers + GRAD_SCALE)
    g = grad_scale * row_terms(
        row_index,
        None,
        row_log_prob,
        numbers,
        advantage,
        policy_weight,
        old,
        ref,
        kl_weight,
        policy,
        kl,
        flags,
        SURROGATE,
        KL_ESTIMATOR,
        KL_STRAIGHT_THROUGH,
        KL_RATIO_WEIGHTED,
    )
    h = zero
    HAS_H: tl.constexpr = entropy_weight is not None
    if HAS_H:
        h = -tl.load(entropy_weight + row_index) * grad_scale
    if (g == 0) & (h == 0) & (row_lse == row_lse):
        fill(out, zero, 0, tl.cdiv(vocab, BLOCK), vocab, BLOCK)
        return
    terms = gradient_terms(row_log_prob, row_entropy, row_lse, g, h, target_logit, mapping, SOFTCAP, HAS_H)
    if HELD == 0:
        blocks = tl.cdiv(vocab, BLOCK)
        write_gradient(row, out, 0, blocks, target, vocab, mapping, terms, numbers, BLOCK, SOFTCAP, HAS_H)
    else:
        for i in tl.static_range(HELD):
            columns = i * BLOCK + tl.arange(0, BLOCK)
            gradient = gradient_of(held[i], columns, target, mapping, terms, SOFTCAP, HAS_H).to(out.dtype.element_ty)
            if i == HELD - 1:
                tl.store(out + columns, gradient, mask=columns < vocab)
            else:
                tl.store(out + columns, gradient)


@triton.jit(do_not_specialize=["count"])
def token_terms_kernel(
    numbers,
    log_prob,
    old,
    ref,
    advantage,
    policy_weight,
    kl_weight,
    policy,
    kl,
    flags,
    slope,
    count,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_STRAIGHT_THROUGH: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The per-token maths alone, for the parity test."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row_log_prob = tl.load(log_prob + at, mask=inside)
    row_slope = row_terms(
        at,
        inside,
        row_log_prob,
        numbers,
        advantage,
        policy_weight,
        old,
        ref,
        kl_weight,
        policy,
        kl,
        flags,
        SURROGATE,
        KL_ESTIMATOR,
        KL_STRAIGHT_THROUGH,
        KL_RATIO_WEIGHTED,
    )
    tl.store(slope + at, row_slope, mask=inside)
