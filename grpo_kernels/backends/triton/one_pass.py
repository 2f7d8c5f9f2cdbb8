"""The one-pass loss: a row's log-prob, its surrogate and KL inline, and its gradient, in one kernel.

The per-token maths is also a kernel of its own, for the two-pass route.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import far_sums, row_sums, settle, store_no_stats, store_stats
from .gradient import fill, write_gradient
from .rows import (
    AT_RUN_TIME,
    add_block,
    finish_stats,
    gradient_of,
    gradient_terms,
    hold,
    in_vectors,
    lane_sums,
    load_block,
    logit_map,
    origin_of,
    row_at,
    sampled,
    unrounded,
)
from .surrogates import GRAD_SCALE, NO_KL, NO_ROLLOUT, token_terms

TOKENS_PER_PROGRAM = 256
"""The tokens of a program of the per-token maths alone."""


@triton.jit
def hold_row(row, vocab, numbers, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """Load a row into registers, block by block."""
    held = ()
    for i in tl.static_range(HELD):
        held += (load_block(row, i * BLOCK, vocab, numbers, BLOCK, i == HELD - 1),)
    return held


@triton.jit
def held_sums(
    held,
    target,
    origin,
    vocab,
    numbers,
    mapping,
    ALIGNMENT: tl.constexpr,
    SWEEP: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return the ``span_sums`` of a row in registers, relative to the sampled value."""
    total = tl.zeros([BLOCK], numbers.dtype.element_ty)
    weighted = total
    for i in tl.static_range(HELD):
        start, last = i * BLOCK, i == HELD - 1
        total, weighted = add_block(
            total, weighted, held[i], start, target, origin, vocab, mapping, BLOCK, last, True, True, SOFTCAP
        )
    return lane_sums(total, weighted, SWEEP, ALIGNMENT)


@triton.jit
def row_terms(
    row_index,
    inside,
    row_log_prob,
    row_entropy,
    numbers,
    advantage,
    policy_weight,
    old,
    ref,
    rollout,
    kl_weight,
    rollout_kl_weight,
    policy,
    kl,
    flags,
    rollout_weight,
    rollout_kl,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    ROLLOUT_SCHEME: tl.constexpr,
    ROLLOUT_KL_ESTIMATOR: tl.constexpr,
    ROLLOUT_KL_GRADIENT: tl.constexpr,
    ROLLOUT_KL_RATIO_WEIGHTED: tl.constexpr,
):
    """Write a row's terms (or those of several, ``inside`` a mask); return d loss / d log_prob."""
    row_old = row_log_prob
    row_ref = row_log_prob
    row_rollout = row_log_prob
    weight = row_log_prob
    if old is not None:
        row_old = tl.load(old + row_index, mask=inside)
    if KL_ESTIMATOR != NO_KL:
        row_ref = tl.load(ref + row_index, mask=inside)
        weight = tl.load(kl_weight + row_index, mask=inside)
    of_sampler = row_log_prob
    if ROLLOUT_SCHEME != NO_ROLLOUT or ROLLOUT_KL_ESTIMATOR != NO_KL:
        row_rollout = row_old
        if rollout is not None:
            row_rollout = tl.load(rollout + row_index, mask=inside)
    if ROLLOUT_KL_ESTIMATOR != NO_KL:
        of_sampler = tl.load(rollout_kl_weight + row_index, mask=inside)
    policy_value, kl_value, grad_log_prob, row_flags, row_weight, rollout_kl_value = token_terms(
        numbers,
        row_log_prob,
        row_entropy,
        row_old,
        row_ref,
        row_rollout,
        tl.load(advantage + row_index, mask=inside),
        tl.load(policy_weight + row_index, mask=inside),
        weight,
        of_sampler,
        SURROGATE,
        KL_ESTIMATOR,
        KL_GRADIENT,
        KL_RATIO_WEIGHTED,
        ROLLOUT_SCHEME,
        ROLLOUT_KL_ESTIMATOR,
        ROLLOUT_KL_GRADIENT,
        ROLLOUT_KL_RATIO_WEIGHTED,
    )
    tl.store(policy + row_index, policy_value, mask=inside)
    tl.store(kl + row_index, kl_value, mask=inside)
    tl.store(flags + row_index, row_flags.to(tl.uint8), mask=inside)
    if ROLLOUT_SCHEME != NO_ROLLOUT:
        tl.store(rollout_weight + row_index, row_weight, mask=inside)
    if ROLLOUT_KL_ESTIMATOR != NO_KL:
        tl.store(rollout_kl + row_index, rollout_kl_value, mask=inside)
    return grad_log_prob


@triton.jit(do_not_specialize=AT_RUN_TIME)
def one_pass_kernel(
    logits,
    batch_stride: tl.int64,
    row_stride,
    token_ids,
    live,
    numbers,
    temperatures,
    advantage,
    policy_weight,
    old,
    ref,
    rollout,
    kl_weight,
    entropy_weight,
    rollout_kl_weight,
    log_prob,
    entropy,
    anchor,
    log_sum,
    policy,
    kl,
    flags,
    rollout_weight,
    rollout_kl,
    out,
    out_batch_stride: tl.int64,
    out_row_stride,
    length,
    vocab,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    SWEEP: tl.constexpr,
    HELD: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    ROLLOUT_SCHEME: tl.constexpr,
    ROLLOUT_KL_ESTIMATOR: tl.constexpr,
    ROLLOUT_KL_GRADIENT: tl.constexpr,
    ROLLOUT_KL_RATIO_WEIGHTED: tl.constexpr,
):
    """Write a row's log-prob, the terms of its loss and its gradient; one program a row. ``out`` may be the logits.

    HELD > 0: the row, one span of so many blocks, stays in registers and is read once. HELD = 0: it is walked twice.
    """
    row_index = tl.program_id(0)
    out = row_at(out, row_index, length, out_batch_stride, out_row_stride, ALIGNMENT)
    vocab = in_vectors(vocab, VECTOR)
    zero = tl.load(numbers) * 0
    if tl.load(live + row_index) == 0:
        store_no_stats(row_index, log_prob, entropy, anchor, log_sum)
        tl.store(policy + row_index, zero)
        tl.store(kl + row_index, zero)
        tl.store(flags + row_index, zero.to(tl.uint8))
        if ROLLOUT_SCHEME != NO_ROLLOUT:
            tl.store(rollout_weight + row_index, zero)
        if ROLLOUT_KL_ESTIMATOR != NO_KL:
            tl.store(rollout_kl + row_index, zero)
        fill(out, zero, 0, tl.cdiv(vocab, BLOCK), vocab, BLOCK)
        return
    mapping = logit_map(numbers, temperatures, row_index, SOFTCAP)
    row, target, target_logit, value = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, ALIGNMENT, SOFTCAP
    )
    origin = origin_of(value, mapping[3])
    held = ()
    if HELD == 0:
        total, weighted = row_sums(
            row, target, origin, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, STAGES, True, SOFTCAP
        )
        stats = settle(
            total, weighted, row, target, value, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, SOFTCAP
        )
    else:
        held = hold_row(row, vocab, numbers, HELD, BLOCK)
        total, weighted = held_sums(
            held, target, origin, vocab, numbers, mapping, ALIGNMENT, SWEEP, HELD, BLOCK, SOFTCAP
        )
        anchored_at = value
        if hold(total, weighted, value, mapping[3]):
            total, weighted = unrounded(total, weighted, value, mapping[3])
        else:  # the row is read again, so that its registers are free meanwhile
            total, weighted, anchored_at = far_sums(
                row, target, vocab, numbers, mapping, ALIGNMENT, SWEEP, SPAN, BLOCK, SOFTCAP
            )
            held = hold_row(row, vocab, numbers, HELD, BLOCK)
        stats = finish_stats(anchored_at, total, weighted, value, mapping[3])
    store_stats(row_index, log_prob, entropy, anchor, log_sum, stats)
    row_log_prob, row_entropy, _, _ = stats

    grad_scale = tl.load(numbers + GRAD_SCALE)
    g = grad_scale * row_terms(
        row_index,
        None,
        row_log_prob,
        row_entropy,
        numbers,
        advantage,
        policy_weight,
        old,
        ref,
        rollout,
        kl_weight,
        rollout_kl_weight,
        policy,
        kl,
        flags,
        rollout_weight,
        rollout_kl,
        SURROGATE,
        KL_ESTIMATOR,
        KL_GRADIENT,
        KL_RATIO_WEIGHTED,
        ROLLOUT_SCHEME,
        ROLLOUT_KL_ESTIMATOR,
        ROLLOUT_KL_GRADIENT,
        ROLLOUT_KL_RATIO_WEIGHTED,
    )
    h = zero
    HAS_H: tl.constexpr = entropy_weight is not None
    if HAS_H:
        h = -tl.load(entropy_weight + row_index) * grad_scale
    if (g == 0) & (h == 0):
        fill(out, zero, 0, tl.cdiv(vocab, BLOCK), vocab, BLOCK)
        return
    terms = gradient_terms(stats, g, h, target_logit, mapping, SOFTCAP, HAS_H)
    if HELD == 0:
        blocks = tl.cdiv(vocab, BLOCK)
        write_gradient(row, out, 0, blocks, target, vocab, mapping, terms, numbers, BLOCK, SOFTCAP, HAS_H)
    else:
        for i in tl.static_range(HELD):
            lane = tl.arange(0, BLOCK)
            place = target - i * BLOCK  # not lane + i * BLOCK: that would take a register for every column
            gradient = gradient_of(held[i], lane, place, mapping, terms, SOFTCAP, HAS_H).to(out.dtype.element_ty)
            columns = i * BLOCK + lane
            if i == HELD - 1:
                tl.store(out + columns, gradient, mask=columns < vocab)
            else:
                tl.store(out + columns, gradient)


@triton.jit(do_not_specialize=["count"])
def token_terms_kernel(
    log_prob,
    entropy,
    live,
    numbers,
    advantage,
    policy_weight,
    old,
    ref,
    rollout,
    kl_weight,
    entropy_weight,
    rollout_kl_weight,
    policy,
    kl,
    flags,
    rollout_weight,
    rollout_kl,
    grad_log_prob,
    count,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    ROLLOUT_SCHEME: tl.constexpr,
    ROLLOUT_KL_ESTIMATOR: tl.constexpr,
    ROLLOUT_KL_GRADIENT: tl.constexpr,
    ROLLOUT_KL_RATIO_WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write tokens' terms and d loss / d log_prob: the per-token maths alone, between the two passes."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    alive = tl.load(live + at, mask=inside, other=0) != 0
    gradient = row_terms(
        at,
        alive,
        tl.load(log_prob + at, mask=alive),
        tl.load(entropy + at, mask=alive),
        numbers,
        advantage,
        policy_weight,
        old,
        ref,
        rollout,
        kl_weight,
        rollout_kl_weight,
        policy,
        kl,
        flags,
        rollout_weight,
        rollout_kl,
        SURROGATE,
        KL_ESTIMATOR,
        KL_GRADIENT,
        KL_RATIO_WEIGHTED,
        ROLLOUT_SCHEME,
        ROLLOUT_KL_ESTIMATOR,
        ROLLOUT_KL_GRADIENT,
        ROLLOUT_KL_RATIO_WEIGHTED,
    )
    dead = inside & (alive == 0)
    tl.store(policy + at, 0, mask=dead)
    tl.store(kl + at, 0, mask=dead)
    tl.store(flags + at, 0, mask=dead)
    if ROLLOUT_SCHEME != NO_ROLLOUT:
        tl.store(rollout_weight + at, 0, mask=dead)
    if ROLLOUT_KL_ESTIMATOR != NO_KL:
        tl.store(rollout_kl + at, 0, mask=dead)
    tl.store(grad_log_prob + at, tl.where(alive, gradient, 0), mask=inside)
