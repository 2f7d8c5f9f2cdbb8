"""Divergences of rows from a teacher's, and their gradients: both rows' statistics are known, and each is read once.

The teacher's logits may have another dtype; they are computed with in the policy's working precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergences import FORWARD_KL, REVERSE_KL, TVD, columns_of, minus, of_error
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
from .surrogates import DIVERGENCE_MIX, nothing


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
    """Return t and d of columns by both rows' values; NaN where both are impossible."""
    ratio, offset, factor = distances
    t = tl.fma(-ratio, y, x) - offset
    return t, tl.fma(t, factor, shift)


@triton.jit
def is_likely(p):
    """Whether a column's d is the centre's: of one column at most, the largest."""
    return p > 0.75


@triton.jit
def slope_at(KIND: tl.constexpr, d, mix):
    """Return the slope at d, which no probability has a part in."""
    one = nothing(d) + 1
    return columns_of(KIND, one, one, d, mix)[2]


@triton.jit
def add_columns(total, excess, mass, slopes, x, y, policy, teacher, distances, shift, mix, KIND: tl.constexpr):
    """Add columns, by the values of both rows, to the sums of terms, of p - q, of p and of p·slope. The second is 0 for
    ``REVERSE_KL``: ``excess_of`` makes it of the others."""
    p, q = probability(x, policy), probability(y, teacher)
    d = distance_of(x, y, distances, shift)[1]
    term, _, slope = columns_of(KIND, p, q, d, mix)
    if KIND != FORWARD_KL:
        slopes += tl.where(p == 0, 0, p * slope)
    if KIND != REVERSE_KL:
        excess += minus(p, q, d)
    return total + term, excess, mass + p, slopes


@triton.jit
def excess_of(KIND: tl.constexpr, total, excess, slopes):
    """Return the sum of p - q; 0 where D is infinite."""
    if KIND == REVERSE_KL:
        return tl.where(total < float("inf"), slopes - total, 0)  # a term is p·d - (p - q)
    else:
        return excess


@triton.jit
def add_block_of_pairs(
    total,
    excess,
    mass,
    slopes,
    largest,
    beside,
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
    """``add_columns`` of a block, lane by lane, but for the column of a lane's largest value so far, whose values of
    both rows are kept: a new one comes in its place, and it into the sums."""
    x = load_block(row, start, vocab, numbers, BLOCK, MASKED)
    x = values_of(x, start, vocab, policy[0], BLOCK, MASKED, SOFTCAP)
    y = load_block(teacher_row, start, vocab, numbers, BLOCK, MASKED)
    y = values_of(y, start, vocab, teacher[0], BLOCK, MASKED, TEACHER_SOFTCAP)
    larger = x > largest
    less_x = tl.where(larger, largest, x)
    less_y = tl.where(larger, beside, y)
    total, excess, mass, slopes = add_columns(
        total, excess, mass, slopes, less_x, less_y, policy, teacher, distances, shift, mix, KIND
    )
    return total, excess, mass, slopes, tl.where(larger, x, largest), tl.where(larger, y, beside)


@triton.jit
def finish_divergence(total, excess, mass, slopes, x, y, policy, teacher, distances, shift, mix, KIND: tl.constexpr):
    """Return the numbers of ``DivergenceStats`` from the sums over all columns but that of the policy's largest value,
    which are x and y.

    The log-sums, which are relative to the sampled token, have an error that d has in all columns; Σ p - q over all of
    them is what it makes of 0, and so what it makes of their terms is known. A likely column's own d, of which little
    may be left in fp32, follows from the others: p - q = -Σ_others p - q.
    """
    p, q = probability(x, policy), probability(y, teacher)
    t, d = distance_of(x, y, distances, shift)
    error = log1p(excess + minus(p, q, d))
    corrected = shift - error
    centre = tl.fma(t, distances[2], corrected)
    by_others = log1p(divide(error * mass - excess, tl.where(q > 0, q, 1)))
    centre = tl.where(is_likely(p) & (tl.abs(centre) < 1) & (q > 0), by_others, centre)

    value = total - error * of_error(KIND, excess - error * mass * 0.5, slopes, mix)
    value += columns_of(KIND, p, q, centre, mix)[0]
    value = tl.where(value < 0, value * 0, value)  # what was taken out rounds too
    mean = slopes * 0
    if KIND != FORWARD_KL:
        # With the error that the columns beside it have: only the difference counts. A step has none.
        at_centre = slope_at(KIND, centre if KIND == TVD else d, mix)
        mean = slopes - tl.where(mass > 0, at_centre * mass, 0)
        mean = tl.where(value == float("inf"), float("nan"), mean)
    known = shift == shift
    nan = float("nan")
    return tl.where(known, value, nan), corrected, centre, tl.where(known, mean, nan)


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
    mass = total
    slopes = total
    largest = total - float("inf")
    beside = largest
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        total, excess, mass, slopes, largest, beside = add_block_of_pairs(
            total,
            excess,
            mass,
            slopes,
            largest,
            beside,
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
        total, excess, mass, slopes, largest, beside = add_block_of_pairs(
            total,
            excess,
            mass,
            slopes,
            largest,
            beside,
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

    x = tl.max(largest, 0)
    lane = tl.arange(0, BLOCK)
    first = lane == tl.min(tl.where(largest == x, lane, BLOCK), 0)
    y = tl.max(tl.where(first, beside, -float("inf")), 0)
    largest = tl.where(first, -float("inf"), largest)
    beside = tl.where(first, -float("inf"), beside)
    total, excess, mass, slopes = add_columns(
        total, excess, mass, slopes, largest, beside, policy, teacher, distances, between, mix, KIND
    )
    total, excess = lane_sums(total, excess_of(KIND, total, excess, slopes), SWEEP, ALIGNMENT)
    mass, slopes = lane_sums(mass, slopes, SWEEP, ALIGNMENT)
    values = finish_divergence(total, excess, mass, slopes, x, y, policy, teacher, distances, between, mix, KIND)
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
    row_centre = tl.load(centre + row_index)
    at_centre = slope_at(KIND, row_centre, mix)
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
        d = tl.where(is_likely(p), row_centre, distance_of(value, teacher_value, distances, row_shift)[1])
        own, slope = columns_of(KIND, p, q, d, mix)[1:3]
        gradient = (own + tl.where(p == 0, 0, p * ((slope - at_centre) - row_mean)) + void) * weight
        if SOFTCAP:
            gradient = gradient * (tanh_derivative(x * mapping[0]) * (mapping[0] * mapping[1]))
        if (grad_log_prob is not None) or HAS_H:
            gradient += gradient_of(x, columns, target, mapping, terms, SOFTCAP, HAS_H)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs")
