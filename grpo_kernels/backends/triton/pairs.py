"""Divergences of rows from a teacher's, and their gradients: both rows' statistics are known, and each is read once.

The teacher's logits may have another dtype; they are computed with in the policy's working precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergences import FORWARD_KL, columns_of, minus
from .gradient import fill, write_gradient
from .maths import divide, log1p, tanh_derivative, to_power
from .rows import (
    AT_RUN_TIME,
    gradient_of,
    gradient_terms,
    in_vectors,
    lane_sums,
    load_block,
    logit_map,
    power_of,
    row_at,
    sampled,
    value_of,
    values_of,
)
from .surrogates import DIVERGENCE_MIX


@triton.jit
def softmax_of(row_index, numbers, temperatures, anchor, log_sum, real: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the logit map of a row, and its anchor and log-sum."""
    inner, cap, derivative, factor = logit_map(numbers, temperatures, row_index, SOFTCAP)
    mapping = (inner.to(real), cap.to(real), derivative.to(real), factor.to(real))
    return mapping, tl.load(anchor + row_index).to(real), tl.load(log_sum + row_index).to(real)


@triton.jit
def probability(value, softmax):
    mapping, anchor, log_sum = softmax
    return tl.exp2(power_of(value, anchor, mapping[3], -to_power(log_sum)))


@triton.jit
def distance_map(policy, teacher):
    """Return ratio, offset and factor of t_j = (x_j - ratio·y_j) - offset and d_j = factor·t_j + shift, as
    ``DivergenceStats`` has them."""
    factor = policy[0][2]
    ratio = divide(teacher[0][2], factor)
    return ratio, tl.fma(-ratio, teacher[1], policy[1]), factor


@triton.jit
def distance_of(x, y, distances, shift):
    """Return t and d of columns by both rows' values; d is 0 where both are impossible."""
    ratio, offset, factor = distances
    t = tl.fma(-ratio, y, x) - offset
    return t, tl.where(t == t, tl.fma(t, factor, shift), 0)


@triton.jit
def slope_at(KIND: tl.constexpr, d, mix):
    """Return the slope at d, which no probability has a part in."""
    one = d * 0 + 1
    return columns_of(KIND, one, one, d, mix)[2]


@triton.jit
def add_pairs(
    total,
    excess,
    largest,
    at_largest,
    centre,
    mass,
    mean,
    row,
    teacher_row,
    start,
    vocab,
    numbers,
    policy,
    teacher,
    distances,
    shift,
    mix,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Add a block of columns, lane by lane: terms, p - q, and p·(slope - slope at the centre).

    A lane's centre is the column of its largest value so far. A new one moves the sum of slopes by the mass of the
    columns before it, each of which is less likely: no likely column has a part in the sum, or it would cancel.
    """
    x = load_block(row, start, vocab, numbers, BLOCK, MASKED)
    x = values_of(x, start, vocab, policy[0], BLOCK, MASKED, SOFTCAP)
    y = load_block(teacher_row, start, vocab, numbers, BLOCK, MASKED)
    y = values_of(y, start, vocab, teacher[0], BLOCK, MASKED, TEACHER_SOFTCAP)
    p, q = probability(x, policy), probability(y, teacher)
    t, d = distance_of(x, y, distances, shift)
    term, _, slope = columns_of(KIND, p, q, d, mix)
    larger = x > largest
    if KIND != FORWARD_KL:
        moved = tl.where(larger, slope, centre)
        mean += tl.where(larger & (mass > 0), (centre - moved) * mass, 0)
        mean += tl.where(p == 0, 0, p * (slope - moved))
        mass += p
        centre = moved
    largest = tl.where(larger, x, largest)
    at_largest = tl.where(larger, t, at_largest)
    return total + term, excess + minus(p, q, d), largest, at_largest, centre, mass, mean


@triton.jit
def store_divergence(row_index, divergence, shift, centre, mean, values):
    tl.store(divergence + row_index, values[0])
    tl.store(shift + row_index, values[1])
    tl.store(centre + row_index, values[2])
    tl.store(mean + row_index, values[3])


@triton.jit(do_not_specialize=AT_RUN_TIME)
def divergence_kernel(
    live,
    logits,
    batch_stride: tl.int64,
    row_stride,
    numbers,
    temperatures,
    anchor,
    log_sum,
    teacher_logits,
    teacher_batch_stride: tl.int64,
    teacher_row_stride,
    teacher_numbers,
    teacher_temperatures,
    teacher_anchor,
    teacher_log_sum,
    divergence,
    shift,
    centre,
    mean,
    length,
    vocab,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    SWEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write a row's divergence and what its gradient needs; one program a row."""
    row_index = tl.program_id(0)
    if tl.load(live + row_index) == 0:
        store_divergence(row_index, divergence, shift, centre, mean, (0, 0, 0, 0))
        return
    real: tl.constexpr = numbers.dtype.element_ty
    vocab = in_vectors(vocab, VECTOR)
    row = row_at(logits, row_index, length, batch_stride, row_stride, ALIGNMENT)
    teacher_row = row_at(teacher_logits, row_index, length, teacher_batch_stride, teacher_row_stride, ALIGNMENT)
    policy = softmax_of(row_index, numbers, temperatures, anchor, log_sum, real, SOFTCAP)
    teacher = softmax_of(
        row_index, teacher_numbers, teacher_temperatures, teacher_anchor, teacher_log_sum, real, TEACHER_SOFTCAP
    )
    distances = distance_map(policy, teacher)
    mix = tl.load(numbers + DIVERGENCE_MIX)
    between = teacher[2] - policy[2]

    total = tl.zeros([BLOCK], real)
    excess = total
    largest = total - float("inf")
    at_largest = total
    at_centre = total
    mass = total
    slopes = total
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        total, excess, largest, at_largest, at_centre, mass, slopes = add_pairs(
            total,
            excess,
            largest,
            at_largest,
            at_centre,
            mass,
            slopes,
            row,
            teacher_row,
            start,
            vocab,
            numbers,
            policy,
            teacher,
            distances,
            between,
            mix,
            BLOCK,
            False,
            SOFTCAP,
            TEACHER_SOFTCAP,
            KIND,
        )
    if whole < vocab:
        total, excess, largest, at_largest, at_centre, mass, slopes = add_pairs(
            total,
            excess,
            largest,
            at_largest,
            at_centre,
            mass,
            slopes,
            row,
            teacher_row,
            whole,
            vocab,
            numbers,
            policy,
            teacher,
            distances,
            between,
            mix,
            BLOCK,
            True,
            SOFTCAP,
            TEACHER_SOFTCAP,
            KIND,
        )

    at_top = tl.max(tl.where(largest == tl.max(largest, 0), at_largest, -float("inf")), 0)
    # Not by the corrected shift: the slope at the centre has to be that of the columns beside it.
    at_top_slope = slope_at(KIND, tl.fma(at_top, distances[2], between), mix)
    slopes += tl.where(mass > 0, (at_centre - at_top_slope) * mass, 0)
    value, rest = lane_sums(total, excess, SWEEP, ALIGNMENT)
    mean_slope, _ = lane_sums(slopes, slopes, SWEEP, ALIGNMENT)
    corrected = between - log1p(rest)
    if KIND != FORWARD_KL:
        mean_slope = tl.where(value == float("inf"), float("nan"), mean_slope)
    nan = float("nan")
    value = tl.where(between == between, value, nan)
    mean_slope = tl.where(between == between, mean_slope, nan)
    values = (value, corrected, tl.fma(at_top, distances[2], corrected), mean_slope)
    store_divergence(row_index, divergence, shift, centre, mean, values)


@triton.jit(do_not_specialize=AT_RUN_TIME)
def divergence_gradient_kernel(
    live,
    logits,
    batch_stride: tl.int64,
    row_stride,
    numbers,
    temperatures,
    anchor,
    log_sum,
    teacher_logits,
    teacher_batch_stride: tl.int64,
    teacher_row_stride,
    teacher_numbers,
    teacher_temperatures,
    teacher_anchor,
    teacher_log_sum,
    divergence,
    shift,
    centre,
    mean,
    token_ids,
    log_prob,
    entropy,
    grad_log_prob,
    grad_entropy,
    grad_divergence,
    out,
    out_batch_stride: tl.int64,
    out_row_stride,
    length,
    vocab,
    parts,
    blocks,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write a row's gradient by ``parts`` programs, ``blocks`` of it each. ``out`` may be the logits."""
    row_index = tl.program_id(0) // parts
    first = (tl.program_id(0) - row_index * parts) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(vocab, BLOCK))
    out = row_at(out, row_index, length, out_batch_stride, out_row_stride, ALIGNMENT)
    real: tl.constexpr = numbers.dtype.element_ty
    vocab = in_vectors(vocab, VECTOR)
    zero = tl.load(numbers) * 0
    g = zero
    h = zero
    if grad_log_prob is not None:
        g = tl.load(grad_log_prob + row_index)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row_index)
    weight = tl.load(grad_divergence + row_index)
    if (tl.load(live + row_index) == 0) | ((g == 0) & (h == 0) & (weight == 0)):
        fill(out, zero, first, last, vocab, BLOCK)
        return
    HAS_H: tl.constexpr = grad_entropy is not None
    policy = softmax_of(row_index, numbers, temperatures, anchor, log_sum, real, SOFTCAP)
    mapping = policy[0]
    row, target, target_logit, _ = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, ALIGNMENT, SOFTCAP
    )
    stats = (tl.load(log_prob + row_index), tl.load(entropy + row_index), policy[1], policy[2])
    terms = gradient_terms(stats, g, h, target_logit, mapping, SOFTCAP, HAS_H)
    if weight == 0:
        write_gradient(row, out, first, last, target, vocab, mapping, terms, numbers, BLOCK, SOFTCAP, HAS_H)
        return

    teacher_row = row_at(teacher_logits, row_index, length, teacher_batch_stride, teacher_row_stride, ALIGNMENT)
    teacher = softmax_of(
        row_index, teacher_numbers, teacher_temperatures, teacher_anchor, teacher_log_sum, real, TEACHER_SOFTCAP
    )
    distances = distance_map(policy, teacher)
    mix = tl.load(numbers + DIVERGENCE_MIX)
    row_shift = tl.load(shift + row_index)
    row_mean = tl.load(mean + row_index)
    at_centre = slope_at(KIND, tl.load(centre + row_index), mix)
    void = (row_mean + row_shift) * 0  # NaN in the whole row, where the row has one
    weight = weight * mapping[2]
    for i in tl.range(0, last - first):
        columns = (last - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < vocab
        x = tl.load(row + columns, mask=inside, other=0, eviction_policy="evict_first").to(real)
        y = tl.load(teacher_row + columns, mask=inside, other=0, eviction_policy="evict_first").to(real)
        value = value_of(x, mapping[0], mapping[1], SOFTCAP)
        teacher_value = value_of(y, teacher[0][0], teacher[0][1], TEACHER_SOFTCAP)
        p, q = probability(value, policy), probability(teacher_value, teacher)
        d = distance_of(value, teacher_value, distances, row_shift)[1]
        own, slope = columns_of(KIND, p, q, d, mix)[1:3]
        gradient = (own + tl.where(p == 0, 0, p * ((slope - at_centre) - row_mean)) + void) * weight
        if SOFTCAP:
            gradient = gradient * (tanh_derivative(x * mapping[0]) * (mapping[0] * mapping[1]))
        if (grad_log_prob is not None) or HAS_H:
            gradient += gradient_of(x, columns, target, mapping, terms, SOFTCAP, HAS_H)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs")
