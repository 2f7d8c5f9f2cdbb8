"""One vocabulary row, piece by piece: where it lies, its sums, and the gradient in its logits.

Powers are relative to the *sampled* token: log_prob = -log1p(sum over the others of 2^power). No maximum has to be
found first, nothing is rescaled, and a confident token keeps its relative precision. Only where that overflows (a
token some 80 nats below the largest, or of probability 0) a row is read again, relative to its largest value. The
loop over a row has nine instructions an element, counted in sm_90 code; an H200 that reads at full rate can issue
thirteen.

A row's sums are made lane by lane in blocks, then over the lanes, once in each span of columns; blocks and spans
depend on the vocabulary and the dtype alone. Whether one program walks the spans, several share them or the row
sits in registers, and wherever the row begins in memory: its log-prob has the same bits in every kernel and in any
batch. Contraction is off and every fused multiply-add is spelt out, for the same reason.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import LOWEST_POWER, divide, expm1, log1p, tanh, tanh_derivative, to_nats, to_power
from .surrogates import LOGIT_SCALE, LOGIT_SOFTCAP, TEMPERATURE

_STRIDES = tuple(f"{of}{kind}_stride" for of in ("", "teacher_", "out_") for kind in ("batch", "row"))
AT_RUN_TIME = (*_STRIDES, "length", "vocab", "parts", "blocks", "spans", "rows")
"""Arguments whose values compile nothing: what kernels may assume of them is in ALIGNMENT and VECTOR."""


@triton.jit
def row_at(tensor, row, length, batch_stride, row_stride, ALIGNMENT: tl.constexpr):
    """Return where row (batch, token) begins: at a multiple of ALIGNMENT bytes, which the compiler could not prove."""
    batch = row // length
    offset = batch.to(tl.int64) * batch_stride + (row - batch * length).to(tl.int64) * row_stride
    return tl.multiple_of(tensor + offset, ALIGNMENT)


@triton.jit
def in_vectors(vocab, VECTOR: tl.constexpr):
    """Return ``vocab``, which VECTOR divides, so that the compiler sees it: a vector of columns has one mask."""
    return vocab // VECTOR * VECTOR


@triton.constexpr_function
def halvings(count):
    """Return how often ``count``, a power of two, is halved until 1 is left."""
    return max(count, 1).bit_length() - 1


@triton.jit
def halved(sums):
    """Add neighbours: (n, 2) -> (n / 2, 2)."""
    return tl.sum(tl.reshape(sums, [sums.shape[0] // 2, 2, 2]), 1)


@triton.jit
def dealt_out(sums):
    """Return (n, 2) as it is, but one number to a thread: gathered by its own index, because that is laid out so."""
    COUNT: tl.constexpr = sums.shape[0] * 2
    return tl.reshape(tl.gather(tl.reshape(sums, [COUNT]), tl.arange(0, COUNT), 0), [COUNT // 2, 2])


@triton.jit
def lane_sums(total, weighted, SWEEP: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Add up all lanes by sums of two alone, which have no order: of more, the compiler would add in the order in which
    lanes lie in registers, which depends on the rows' alignment and on the compiler.

    SWEEP columns are a vector of 16 bytes for each thread. Sweeps are added first, which a thread of an aligned row
    does in its registers, then neighbours. The last 16 numbers of a sum, one a warp by then, are dealt out to lanes; of
    an unaligned row also those that are left after its lanes, or warps would exchange all of their registers.
    """
    sums = tl.join(total, weighted)
    LANES: tl.constexpr = total.shape[0]
    FOLDS: tl.constexpr = halvings(LANES // SWEEP)
    HALVINGS: tl.constexpr = halvings(LANES) - FOLDS
    for i in tl.static_range(FOLDS):
        sums = tl.sum(tl.reshape(sums, [2, LANES >> (i + 1), 2]), 0)
    for i in tl.static_range(HALVINGS):
        if i == HALVINGS - 4 or (ALIGNMENT < 16 and i == 5):
            sums = dealt_out(sums)
        sums = halved(sums)
    return tl.split(tl.reshape(sums, [2]))


@triton.jit
def logit_map(numbers, temperatures, row_index, SOFTCAP: tl.constexpr):
    """Return inner, cap, derivative and factor, which take a logit to z = softcap(logit * scale) / temperature, the
    row's own temperature where rows have one each.

    z = value * derivative, and in powers of 2 z * log2(e) = value * factor;
    value = cap * tanh(logit * inner) with a softcap, else the logit itself.
    """
    if temperatures is None:
        temperature = tl.load(numbers + TEMPERATURE)
    else:
        temperature = tl.load(temperatures + row_index)
    scale = tl.load(numbers + LOGIT_SCALE)
    cap = tl.load(numbers + LOGIT_SOFTCAP)
    if SOFTCAP:
        inner = divide(scale, cap)
        derivative = divide(temperature * 0 + 1, temperature)
    else:
        inner = scale
        derivative = divide(scale, temperature)
    return inner, cap, derivative, to_power(derivative)


@triton.jit
def value_of(logit, inner, cap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return cap * tanh(logit * inner)
    else:
        return logit


@triton.jit
def load_block(row, start, vocab, numbers, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return logits in working precision, -inf past the row's end."""
    real: tl.constexpr = numbers.dtype.element_ty
    columns = start + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(row + columns, mask=columns < vocab, other=-float("inf")).to(real)
    else:
        return tl.load(row + columns).to(real)


@triton.jit
def values_of(logits, start, vocab, mapping, BLOCK: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    values = value_of(logits, mapping[0], mapping[1], SOFTCAP)
    if SOFTCAP and MASKED:
        values = tl.where(start + tl.arange(0, BLOCK) < vocab, values, -float("inf"))  # tanh(-inf) is not -inf
    return values


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def anchor_of(value):
    """Return the largest value as an origin; NaN for +inf."""
    return tl.where(value == float("inf"), float("nan"), value)


@triton.jit
def origin_of(value, factor):
    """Return the origin of powers relative to ``value``: power_j = value_j * factor + origin, one multiply-add and one
    rounding."""
    return -(value * factor)


@triton.jit
def add_block(
    total,
    weighted,
    logits,
    start,
    target,
    origin,
    vocab,
    mapping,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    TARGET: tl.constexpr,
    NEAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Add 2^power and 2^power * power to two sums, lane by lane, without the sampled column, which is here if TARGET.

    NEAR: powers by ``origin_of``; else relative to the value ``origin``, subtracted before they are scaled, so that
    finite logits of any size are legal.
    """
    values = values_of(logits, start, vocab, mapping, BLOCK, MASKED, SOFTCAP)
    if NEAR:
        power = tl.fma(values, mapping[3], origin)
    else:
        power = (values - origin) * mapping[3]
    power = max_or_nan(power, LOWEST_POWER)
    exps = tl.exp2(power)
    if TARGET:
        exps = tl.where(tl.arange(0, BLOCK) == target - start, 0, exps)
    return total + exps, tl.fma(exps, power, weighted)


@triton.jit
def residual_of(value, factor):
    """Return by how much every power relative to ``value`` is off, exactly: the rounding of its origin."""
    return tl.fma(value, factor, origin_of(value, factor))


@triton.jit
def hold(total, weighted, value, factor):
    """Whether sums relative to the sampled value hold: nothing overflowed, and the value is not so large (past 2^23)
    that the rounding of its origin alone lets powers underflow or overflow."""
    finite = (total < float("inf")) & (tl.abs(weighted) < float("inf"))
    return finite & (tl.abs(residual_of(value, factor)) <= 1)


@triton.jit
def unrounded(total, weighted, value, factor):
    """Return the sums as if their origin were not rounded."""
    residual = residual_of(value, factor)
    correction = tl.exp2(-residual)
    return total * correction, tl.fma(-residual, total, weighted) * correction


@triton.jit
def sampled(
    logits,
    batch_stride,
    row_stride,
    token_ids,
    row_index,
    length,
    vocab,
    numbers,
    mapping,
    ALIGNMENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Return a row's place, its sampled column, and that column's logit and value; NaN for an id outside the
    vocabulary."""
    real: tl.constexpr = numbers.dtype.element_ty
    row = row_at(logits, row_index, length, batch_stride, row_stride, ALIGNMENT)
    target = tl.load(token_ids + row_index)
    valid = (target >= 0) & (target < vocab)
    target = tl.where(valid, target, -1).to(tl.int32)  # columns are compared with it: in 64 bits that takes two steps
    logit = tl.load(row + target, mask=valid, other=float("nan")).to(real)
    return row, target, logit, value_of(logit, mapping[0], mapping[1], SOFTCAP)


@triton.jit
def finish_stats(anchored_at, others, weighted_others, value, factor):
    """Return log_prob, entropy, anchor and log_sum from the sums without the sampled column, which are relative to
    ``anchored_at``."""
    power = (value - anchored_at) * factor
    certain = value == anchored_at
    power = tl.where(certain, 0, power)
    target = tl.exp2(max_or_nan(power, LOWEST_POWER))
    total = others + target
    log_total = tl.where(certain, log1p(others), tl.log(total))
    weighted = weighted_others + tl.where(target == 0, 0, target * power)
    log_prob = to_nats(power, -log_total)
    entropy = to_nats(-divide(weighted, total), log_total)
    entropy = tl.where(entropy < 0, 0, entropy)  # rounding of a row that is certain
    void = (value != value) | (anchored_at == -float("inf")) | (weighted != weighted)  # NaN, or no column is possible
    nan = float("nan")
    return tl.where(void, nan, log_prob), tl.where(void, nan, entropy), anchored_at, tl.where(void, nan, log_total)


@triton.jit
def power_of(value, anchor, factor, shift):
    """Return the power of 2 that a probability is."""
    return tl.minimum(tl.fma(value - anchor, factor, shift), 0)


@triton.jit
def gradient_terms(stats, g, h, target_logit, mapping, SOFTCAP: tl.constexpr, HAS_H: tl.constexpr):
    """Return anchor, shift, constant, linear for every column, and the gradient in the sampled logit.

    ∂loss/∂value_j = p_j (constant + linear power_j), p_j = 2^power_j, power_j = (value_j - anchor) * factor + shift.
    """
    log_prob, entropy, anchor, log_sum = stats
    inner, cap, derivative, _ = mapping
    constant = -g * derivative
    linear = constant * 0
    target = -g * expm1(log_prob)
    if HAS_H:
        constant = -(g + h * entropy) * derivative
        linear = to_nats(-h * derivative, linear)
        target -= tl.where(log_prob == -float("inf"), 0, h * tl.exp(log_prob) * (log_prob + entropy))
    target = target * derivative
    if SOFTCAP:
        target = target * (tanh_derivative(target_logit * inner) * (inner * cap))
    constant = tl.where(log_sum == log_sum, constant, float("nan"))
    return anchor, -to_power(log_sum), constant, linear, target


@triton.jit
def gradient_of(logits, columns, target_column, mapping, terms, SOFTCAP: tl.constexpr, HAS_H: tl.constexpr):
    """Return d loss / d logit of some columns."""
    inner, cap, _, factor = mapping
    anchor, shift, constant, linear, target = terms
    power = power_of(value_of(logits, inner, cap, SOFTCAP), anchor, factor, shift)
    if HAS_H:
        power = tl.maximum(power, LOWEST_POWER)
        gradient = tl.exp2(power) * tl.fma(power, linear, constant)
    else:
        gradient = tl.exp2(power) * constant
    if SOFTCAP:
        gradient = gradient * (tanh_derivative(logits * inner) * (inner * cap))
    return tl.where(columns == target_column, target, gradient)
