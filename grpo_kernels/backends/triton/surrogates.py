"""The per-token maths of the loss for Triton: twin of ``objectives/surrogates/token.py`` and ``kl.py``, and of
csrc/common/surrogates.h.

The same names in the same order; a parity test holds the three together. Slopes are selected branch by branch, never
multiplied by a 0/1 mask: 0 * inf is NaN. Everything is a scalar or a tensor of tokens, fp32 or fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import divide, exp_of, expm1

# Where each hyper-parameter sits in the vector of numbers (grpo_kernels/backends/spec.py).
TEMPERATURE = tl.constexpr(0)
LOGIT_SCALE = tl.constexpr(1)
LOGIT_SOFTCAP = tl.constexpr(2)
GRAD_SCALE = tl.constexpr(3)
LOG_RATIO_LIMIT = tl.constexpr(4)
KL_INPUT_LIMIT = tl.constexpr(5)
ROLLOUT_LOW = tl.constexpr(8)
ROLLOUT_HIGH = tl.constexpr(9)
ENTROPY_THRESHOLD = tl.constexpr(10)
DIVERGENCE_MIX = tl.constexpr(11)
ROLLOUT_KL_INPUT_LIMIT = tl.constexpr(12)
SURROGATE_FIRST = tl.constexpr(15)

REINFORCE = tl.constexpr(0)
UNCLIPPED = tl.constexpr(1)
CLIP = tl.constexpr(2)
CISPO = tl.constexpr(3)
SAPO = tl.constexpr(4)
DPPO_TV = tl.constexpr(5)
DPPO_KL = tl.constexpr(6)
NO_KL = tl.constexpr(0)
K1 = tl.constexpr(1)
K2 = tl.constexpr(2)
ABS = tl.constexpr(4)
STRAIGHT_THROUGH_K2 = tl.constexpr(1)
WEIGHTED_K2 = tl.constexpr(2)
SCORE_FUNCTION = tl.constexpr(3)
NO_ROLLOUT = tl.constexpr(0)
TRUNCATED_IS = tl.constexpr(1)
MASKED_IS = tl.constexpr(2)
CLIPPED_LOW = tl.constexpr(1)
CLIPPED_HIGH = tl.constexpr(2)
CLIPPED_DUAL = tl.constexpr(4)


@triton.jit
def times(a, b):
    """Return a * b where a factor that is exactly zero wins over an infinite one (NaN stays NaN)."""
    zero = ((a == 0) & (b == b)) | ((b == 0) & (a == a))
    return tl.where(zero, 0, a * b)


@triton.jit
def weighed(weight, x):
    """Return weight * x; a weight of zero wins over anything, NaN as well, a zero of x over an infinite weight."""
    zero = (weight == 0) | ((x == 0) & (weight == weight))
    return tl.where(zero, 0, weight * x)


@triton.jit
def log_ratio_of(a, b):
    """Return a - b; equal log-probs differ by exactly zero, also where both are -inf."""
    return tl.where(a == b, 0, a - b)


@triton.jit
def within(x, limit):
    """Return where x lies inside [-limit, limit]; NaN counts as inside."""
    return ((x > limit) | (x < -limit)) == 0


@triton.jit
def clamp(x, limit):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def k3_of(u):
    """Return exp(u) - u - 1 without cancellation: u^2/2 (1 + u/3 (1 + u/4 (...))) near zero."""
    near = (u < 1) & (u > -1)
    v = tl.where(near, u, 0)
    total = v * 0 + 1
    if u.dtype == tl.float64:
        for k in tl.static_range(20, 2, -1):
            total = 1 + v * (1 / k) * total
    else:
        for k in tl.static_range(13, 2, -1):
            total = 1 + v * (1 / k) * total
    far = tl.where(u == float("inf"), u, expm1(u) - u)
    return tl.where(near, v * v / 2 * total, far)


@triton.jit
def no_flags(x):
    return (x == x).to(tl.int32) * 0


@triton.jit
def nothing(x):
    return (x == x).to(x.dtype) * 0


@triton.jit
def reinforce(log_prob, advantage):
    """-A * log_prob"""
    return times(-advantage, log_prob), nothing(advantage), -advantage, no_flags(advantage)


@triton.jit
def unclipped(ratio, advantage):
    """-r * A"""
    value = times(-advantage, ratio)
    return value, value, nothing(advantage), no_flags(advantage)


@triton.jit
def clip(ratio, advantage, low, high, dual):
    """-min(min(r, dual) * A, clip(r, low, high) * A)"""
    clipped_high = (advantage > 0) & (ratio > high)
    clipped_low = (advantage < 0) & (ratio < low)
    clipped_dual = (advantage < 0) & (ratio > dual)
    value, slope, direct, _ = unclipped(ratio, advantage)
    value = tl.where(clipped_high, -advantage * high, value)
    value = tl.where(clipped_low, -advantage * low, value)
    value = tl.where(clipped_dual, -advantage * dual, value)
    slope = tl.where(clipped_high | clipped_low | clipped_dual, 0, slope)
    flags = tl.where(clipped_low, CLIPPED_LOW, tl.where(clipped_high, CLIPPED_HIGH, 0))
    return value, slope, direct, tl.where(clipped_dual, CLIPPED_DUAL, flags)


@triton.jit
def cispo(log_prob, ratio, advantage, low, high):
    """-sg(clip(r, low, high)) * A * log_prob"""
    below = ratio < low
    above = ratio > high
    weighted = -tl.where(above, high, tl.where(below, low, ratio)) * advantage
    flags = tl.where(below, CLIPPED_LOW, tl.where(above, CLIPPED_HIGH, 0))
    return times(weighted, log_prob), nothing(advantage), weighted, tl.where(advantage != 0, flags, 0)


@triton.jit
def sapo(ratio, advantage, tau_pos, tau_neg):
    """-A * sigmoid(tau * (r - 1)) * 4 / tau"""
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    x = tau * (ratio - 1)
    e = exp_of(tl.where(x < 0, x, -x))  # of the smaller side: exact where the gate closes
    gate = divide(tl.where(x < 0, e, e * 0 + 1), 1 + e)
    slope = times(divide(4 * e, (1 + e) * (1 + e)), ratio)
    return divide(-advantage * gate * 4, tau), times(-advantage, slope), nothing(advantage), no_flags(advantage)


@triton.jit
def dppo(log_prob, ratio, advantage, fallen, risen, cap):
    """A trust region in probabilities: -M * r * A, or -M * sg(min(r, cap)) * A * log_prob."""
    low = fallen & (advantage < 0)
    high = risen & (advantage > 0)
    out = low | high
    uncapped = cap == float("inf")
    truncated = ratio > cap
    weighted = -tl.where(truncated, cap, ratio) * advantage
    whole = times(-advantage, ratio)
    value = tl.where(out, 0, tl.where(uncapped, whole, times(weighted, log_prob)))
    slope = tl.where(out, 0, tl.where(uncapped, whole, 0))
    direct = tl.where(out, 0, tl.where(uncapped, 0, weighted))
    flags = tl.where(truncated & (advantage != 0), CLIPPED_DUAL, 0)
    return value, slope, direct, tl.where(low, CLIPPED_LOW, tl.where(high, CLIPPED_HIGH, flags))


@triton.jit
def dppo_tv(log_prob, old_log_prob, ratio, advantage, low, high, cap):
    rise = exp_of(log_prob) - exp_of(old_log_prob)
    return dppo(log_prob, ratio, advantage, rise < -low, rise > high, cap)


@triton.jit
def others_of(log_prob):
    """Return 1 - p, with all its digits near p = 1; +0 where p is 1, or above it by a log-softmax's rounding."""
    return tl.where(log_prob >= 0, 0, -expm1(log_prob))


@triton.jit
def dppo_kl(log_prob, old_log_prob, ratio, advantage, low, high, cap):
    fall = log_ratio_of(old_log_prob, log_prob)
    others = others_of(log_prob)
    old_others = others_of(old_log_prob)
    possible = old_others > 0
    safe = tl.where(possible, old_others, 1)
    away = tl.where(possible, old_others * tl.log(divide(safe, others)), 0)
    divergence = times(exp_of(old_log_prob), fall) + away
    fallen = (divergence > low) & (fall > 0)
    return dppo(log_prob, ratio, advantage, fallen, (divergence > high) & (fall < 0), cap)


@triton.jit
def dro(log_prob, log_ratio, advantage, beta):
    """-A * log_prob + beta / 2 * log_ratio^2"""
    pull = beta * log_ratio
    return times(-advantage, log_prob) + pull * log_ratio / 2, pull, -advantage, no_flags(advantage)


@triton.jit
def surrogate_terms(SURROGATE: tl.constexpr, numbers, log_prob, old_log_prob, log_ratio, ratio, advantage):
    """Return value, slope with respect to the log-ratio, and to the log-prob at a fixed ratio, flags."""
    first = tl.load(numbers + SURROGATE_FIRST)
    second = tl.load(numbers + SURROGATE_FIRST + 1)
    third = tl.load(numbers + SURROGATE_FIRST + 2)
    if SURROGATE == REINFORCE:
        return reinforce(log_prob, advantage)
    elif SURROGATE == UNCLIPPED:
        return unclipped(ratio, advantage)
    elif SURROGATE == CLIP:
        return clip(ratio, advantage, first, second, third)
    elif SURROGATE == CISPO:
        return cispo(log_prob, ratio, advantage, first, second)
    elif SURROGATE == SAPO:
        return sapo(ratio, advantage, first, second)
    elif SURROGATE == DPPO_TV:
        return dppo_tv(log_prob, old_log_prob, ratio, advantage, first, second, third)
    elif SURROGATE == DPPO_KL:
        return dppo_kl(log_prob, old_log_prob, ratio, advantage, first, second, third)
    else:
        return dro(log_prob, log_ratio, advantage, first)


@triton.jit
def kl_terms(KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr, limits, difference, ratio):
    """Return value, slope, and slope of value * ratio divided by the ratio, of a KL estimator of log_prob - ref;
    ``limits`` are those of input and output, and the cap of the ratio."""
    input_limit = tl.load(limits)
    output_limit = tl.load(limits + 1)
    inside = within(difference, input_limit)
    x = clamp(difference, input_limit)
    if KL_ESTIMATOR == K1:
        value, slope, slope_with_ratio = x, inside.to(x.dtype) * 0 + 1, 1 + x
    elif KL_ESTIMATOR == K2:
        value, slope, slope_with_ratio = x * x / 2, x, x + x * x / 2
    elif KL_ESTIMATOR == ABS:
        sign = tl.where(x > 0, 1, tl.where(x < 0, -1, x))  # 0, or NaN
        value, slope, slope_with_ratio = tl.abs(x), sign, sign + tl.abs(x)
    else:
        value, slope, slope_with_ratio = k3_of(-x), -expm1(-x), x  # k3 + its slope is x, exactly
    free = inside & within(value, output_limit)
    value = clamp(value, output_limit)
    slope = tl.where(free, slope, 0)
    slope_with_ratio = tl.where(free, slope_with_ratio, value)
    if KL_GRADIENT == STRAIGHT_THROUGH_K2:
        slope = tl.where(inside, x, 0)
    elif KL_GRADIENT == WEIGHTED_K2:
        cap = tl.load(limits + 2)
        slope = tl.where(inside, times(tl.where(ratio > cap, cap, ratio), x), 0)
    elif KL_GRADIENT == SCORE_FUNCTION:
        slope = slope_with_ratio
    return value, slope, slope_with_ratio


@triton.jit
def kl_part(
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    limits,
    log_prob,
    other,
    ratio,
    inside,
):
    """Return the value of a KL term with the ratio in it, and its slope by the log-prob; ``inside``: the ratio does not
    saturate."""
    kl, slope, with_ratio = kl_terms(KL_ESTIMATOR, KL_GRADIENT, limits, log_ratio_of(log_prob, other), ratio)
    if KL_RATIO_WEIGHTED:
        slope = times(ratio, tl.where(inside, with_ratio, slope))
        kl = times(ratio, kl)
    return kl, tl.where(log_prob != -float("inf"), slope, 0)


@triton.jit
def rollout_weight(ROLLOUT_SCHEME: tl.constexpr, numbers, log_prob, rollout):
    """Return the rollout correction's factor, of rho = exp(log_prob - rollout); 1 where the sampler's is unknown."""
    low = tl.load(numbers + ROLLOUT_LOW)
    high = tl.load(numbers + ROLLOUT_HIGH)
    rho = exp_of(clamp(log_ratio_of(log_prob, rollout), tl.load(numbers + LOG_RATIO_LIMIT)))
    outside = (rho < low) | (rho > high)
    if ROLLOUT_SCHEME == TRUNCATED_IS:
        weight = tl.where(rho > high, high, tl.where(rho < low, low, rho))
    elif ROLLOUT_SCHEME == MASKED_IS:
        weight = tl.where(outside, 0, rho)
    else:
        weight = tl.where(outside, 0.0, 1.0).to(rho.dtype)
    return tl.where(rollout == rollout, weight, 1)


@triton.jit
def token_terms(
    numbers,
    log_prob,
    entropy,
    old,
    ref,
    rollout,
    advantage,
    policy_weight,
    kl_weight,
    rollout_kl_weight,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    ROLLOUT_SCHEME: tl.constexpr,
    ROLLOUT_KL_ESTIMATOR: tl.constexpr,
    ROLLOUT_KL_GRADIENT: tl.constexpr,
    ROLLOUT_KL_RATIO_WEIGHTED: tl.constexpr,
):
    """Return policy value, KL value, both unweighted but for the rollout weight in the first, d loss / d log_prob with
    the weights in it, flags, rollout weight, value of the KL to the sampler.

    ``old`` is ``log_prob`` itself on-policy: then the ratio is 1, and NaN for a NaN. ``rollout`` is ``old`` where no
    sampler's log-probs are given.
    """
    limit = tl.load(numbers + LOG_RATIO_LIMIT)
    raw = log_ratio_of(log_prob, old)
    # A token of probability 0 has no direction to give: it saturates, whatever it is compared with.
    possible = log_prob != -float("inf")
    inside = within(raw, limit) & possible
    log_ratio = clamp(raw, limit)
    ratio = exp_of(log_ratio)

    policy, slope, direct, flags = surrogate_terms(SURROGATE, numbers, log_prob, old, log_ratio, ratio, advantage)
    weight = possible.to(log_prob.dtype) * 0 + 1
    if ROLLOUT_SCHEME != NO_ROLLOUT:
        weight = rollout_weight(ROLLOUT_SCHEME, numbers, old, rollout)
        policy_weight = weighed(policy_weight, weight)
        policy = weighed(weight, policy)
    below = entropy < tl.load(numbers + ENTROPY_THRESHOLD)
    policy = tl.where(below, 0, policy)
    policy_weight = tl.where(below, 0, policy_weight)
    grad_log_prob = weighed(policy_weight, tl.where(inside, slope, 0)) + weighed(policy_weight, direct)
    kl = possible.to(log_prob.dtype) * 0
    rollout_kl = kl
    if KL_ESTIMATOR != NO_KL:
        limits = numbers + KL_INPUT_LIMIT
        kl, kl_slope = kl_part(KL_ESTIMATOR, KL_GRADIENT, KL_RATIO_WEIGHTED, limits, log_prob, ref, ratio, inside)
        grad_log_prob += weighed(kl_weight, kl_slope)
    if ROLLOUT_KL_ESTIMATOR != NO_KL:
        limits = numbers + ROLLOUT_KL_INPUT_LIMIT
        rollout_kl, kl_slope = kl_part(
            ROLLOUT_KL_ESTIMATOR,
            ROLLOUT_KL_GRADIENT,
            ROLLOUT_KL_RATIO_WEIGHTED,
            limits,
            log_prob,
            rollout,
            ratio,
            inside,
        )
        known = rollout == rollout
        rollout_kl = tl.where(known, rollout_kl, 0)
        grad_log_prob += weighed(rollout_kl_weight, tl.where(known, kl_slope, 0))
    return policy, kl, grad_log_prob, flags, weight, rollout_kl
