"""The per-token maths of the loss for Triton: twin of ``grpo_kernels/surrogates.py`` and csrc/common/surrogates.h.

The same names in the same order; a parity test holds the three together. Slopes are selected branch by branch, never
multiplied by a 0/1 mask: 0 * inf is NaN. Everything is a scalar or a tensor of tokens, fp32 or fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import exp_of, expm1

# Where each hyper-parameter sits in the vector of numbers (grpo_kernels/spec.py).
TEMPERATURE = tl.constexpr(0)
LOGIT_SCALE = tl.constexpr(1)
LOGIT_SOFTCAP = tl.constexpr(2)
GRAD_SCALE = tl.constexpr(3)
LOG_RATIO_LIMIT = tl.constexpr(4)
KL_INPUT_LIMIT = tl.constexpr(5)
KL_OUTPUT_LIMIT = tl.constexpr(6)
SURROGATE_FIRST = tl.constexpr(7)

REINFORCE = tl.constexpr(0)
UNCLIPPED = tl.constexpr(1)
NO_KL = tl.constexpr(0)
K1 = tl.constexpr(1)
K2 = tl.constexpr(2)
CLIPPED_LOW = tl.constexpr(1)
CLIPPED_HIGH = tl.constexpr(2)
CLIPPED_DUAL = tl.constexpr(4)


@triton.jit
def times(a, b):
    """a * b where a factor that is exactly zero wins over an infinite one (NaN stays NaN)."""
    zero = ((a == 0) & (b == b)) | ((b == 0) & (a == a))
    return tl.where(zero, 0, a * b)


@triton.jit
def log_ratio_of(a, b):
    """a - b; equal log-probs differ by exactly zero, also where both are -inf."""
    return tl.where(a == b, 0, a - b)


@triton.jit
def within(x, limit):
    """NaN counts as inside."""
    return ((x > limit) | (x < -limit)) == 0


@triton.jit
def clamp(x, limit):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def k3_of(u):
    """exp(u) - u - 1 without cancellation: u^2/2 (1 + u/3 (1 + u/4 (...))) near zero."""
    near = (u < 1) & (u > -1)
    v = tl.where(near, u, 0)
    total = v * 0 + 1
    if u.dtype == tl.float64:
        for k in tl.static_range(20, 2, -1):
            total = 1 + v / k * total
    else:
        for k in tl.static_range(13, 2, -1):
            total = 1 + v / k * total
    far = tl.where(u == float("inf"), u, expm1(u) - u)
    return tl.where(near, v * v / 2 * total, far)


@triton.jit
def no_flags(x):
    return (x == x).to(tl.int32) * 0


@triton.jit
def reinforce(log_prob, advantage):
    """-A * log_prob"""
    return times(-advantage, log_prob), -advantage, no_flags(advantage)


@triton.jit
def unclipped(ratio, advantage):
    """-r * A"""
    value = times(-advantage, ratio)
    return value, value, no_flags(advantage)


@triton.jit
def clip(ratio, advantage, low, high, dual):
    """-min(min(r, dual) * A, clip(r, low, high) * A)"""
    clipped_high = (advantage > 0) & (ratio > high)
    clipped_low = (advantage < 0) & (ratio < low)
    clipped_dual = (advantage < 0) & (ratio > dual)
    value, slope, _ = unclipped(ratio, advantage)
    value = tl.where(clipped_high, -advantage * high, value)
    value = tl.where(clipped_low, -advantage * low, value)
    value = tl.where(clipped_dual, -advantage * dual, value)
    slope = tl.where(clipped_high | clipped_low | clipped_dual, 0, slope)
    flags = tl.where(clipped_low, CLIPPED_LOW, tl.where(clipped_high, CLIPPED_HIGH, 0))
    return value, slope, tl.where(clipped_dual, CLIPPED_DUAL, flags)


@triton.jit
def surrogate_terms(SURROGATE: tl.constexpr, numbers, log_prob, ratio, advantage):
    """Value, slope with respect to the log-prob or the log-ratio, flags."""
    if SURROGATE == REINFORCE:
        return reinforce(log_prob, advantage)
    elif SURROGATE == UNCLIPPED:
        return unclipped(ratio, advantage)
    else:
        low = tl.load(numbers + SURROGATE_FIRST)
        high = tl.load(numbers + SURROGATE_FIRST + 1)
        dual = tl.load(numbers + SURROGATE_FIRST + 2)
        return clip(ratio, advantage, low, high, dual)


@triton.jit
def kl_terms(KL_ESTIMATOR: tl.constexpr, KL_STRAIGHT_THROUGH: tl.constexpr, difference, input_limit, output_limit):
    """One KL estimator of x = log_prob - ref, clamped: value, slope, slope of value * ratio divided by the ratio."""
    inside = within(difference, input_limit)
    x = clamp(difference, input_limit)
    if KL_ESTIMATOR == K1:
        value, slope, slope_with_ratio = x, inside.to(x.dtype) * 0 + 1, 1 + x
    elif KL_ESTIMATOR == K2:
        value, slope, slope_with_ratio = x * x / 2, x, x + x * x / 2
    else:
        value, slope, slope_with_ratio = k3_of(-x), -expm1(-x), x  # k3 + its slope is x, exactly
    free = inside & within(value, output_limit)
    value = clamp(value, output_limit)
    slope = tl.where(free, slope, 0)
    slope_with_ratio = tl.where(free, slope_with_ratio, value)
    if KL_STRAIGHT_THROUGH:
        slope = tl.where(inside, x, 0)
    return value, slope, slope_with_ratio


@triton.jit
def token_terms(
    numbers,
    log_prob,
    old,
    ref,
    advantage,
    policy_weight,
    kl_weight,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_STRAIGHT_THROUGH: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
):
    """Policy value, KL value, both unweighted, d loss / d log_prob with the weights in it, flags.

    ``old`` is ``log_prob`` itself on-policy: then the ratio is 1, and NaN for a NaN.
    """
    limit = tl.load(numbers + LOG_RATIO_LIMIT)
    raw = log_ratio_of(log_prob, old)
    # A token of probability 0 has no direction to give: it saturates, whatever it is compared with.
    possible = log_prob != -float("inf")
    inside = within(raw, limit) & possible
    ratio = exp_of(clamp(raw, limit))

    policy, policy_slope, flags = surrogate_terms(SURROGATE, numbers, log_prob, ratio, advantage)
    if SURROGATE != REINFORCE:
        policy_slope = tl.where(inside, policy_slope, 0)
    slope = times(policy_weight, policy_slope)
    kl = possible.to(log_prob.dtype) * 0
    if KL_ESTIMATOR != NO_KL:
        input_limit = tl.load(numbers + KL_INPUT_LIMIT)
        output_limit = tl.load(numbers + KL_OUTPUT_LIMIT)
        difference = log_ratio_of(log_prob, ref)
        kl, kl_slope, with_ratio = kl_terms(KL_ESTIMATOR, KL_STRAIGHT_THROUGH, difference, input_limit, output_limit)
        if KL_RATIO_WEIGHTED:
            kl_slope = times(ratio, tl.where(inside, with_ratio, kl_slope))
            kl = times(ratio, kl)
        slope += times(kl_weight, tl.where(possible, kl_slope, 0))
    return policy, kl, slope, flags
