"""Functions that Triton's language lacks, from the operations that also run in its interpreter."""

from __future__ import annotations

import math

import triton
import triton.language as tl

# log2(e) and log(2) in two parts, the first exact in fp32: with a fused multiply-add the product of an fp32
# number is rounded once.
LOG2E_HIGH = tl.constexpr(1.4426950216293335)
LOG2E_LOW = tl.constexpr(math.log2(math.e) - 1.4426950216293335)
LN2_HIGH = tl.constexpr(0.693147182464599609375)
LN2_LOW = tl.constexpr(math.log(2) - 0.693147182464599609375)

LOWEST_POWER = tl.constexpr(-1200.0)
"""2 to this is 0, in fp64 too, and 0 times it is 0: powers of -inf are raised to it."""


@triton.jit
def to_power(nats):
    """Return nats * log2(e)."""
    return tl.fma(nats, LOG2E_HIGH, nats * LOG2E_LOW)


@triton.jit
def to_nats(power, plus):
    """Return power * log(2) + plus."""
    finite = tl.abs(power) < float("inf")
    low = tl.where(finite, power * LN2_LOW, 0)  # inf - inf otherwise
    return tl.fma(power, LN2_HIGH, low + plus)


@triton.jit
def divide(a, b):
    """Return a / b, correctly rounded: plain fp32 division on a GPU is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def exp_of(x):
    """Return exp(x), in fp32 by the whole and the broken part of x * log2(e): a GPU's own is off by |x| units."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        whole = tl.floor(x * LOG2E_HIGH + 0.5)
        near = tl.exp2(tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E_HIGH, -whole))) * tl.exp2(whole)
        return tl.where(tl.abs(x) < 60, near, tl.exp(x))


@triton.jit
def log1p(x):
    """Return log(1 + x): the logarithm of the rounded u = 1 + x, corrected by x / (u - 1) (Kahan)."""
    u = 1 + x
    rounded = u - 1
    safe = tl.where((rounded == 0) | (u == float("inf")), 1, rounded)
    corrected = tl.log(u) * divide(tl.where(u == float("inf"), 1 + x * 0, x), safe)
    return tl.where(rounded == 0, x, tl.where(u == float("inf"), tl.log(u), corrected))


@triton.jit
def expm1(x):
    """Return exp(x) - 1: that of the rounded u = exp(x), corrected by x / log(u) (Kahan); -1 and inf at the ends."""
    u = tl.exp(x)
    inner = (u != 1) & (u - 1 != -1) & (u < float("inf"))
    safe = tl.where(inner, u, 2)
    corrected = (safe - 1) * divide(x, tl.log(safe))
    return tl.where(u == 1, x, tl.where(inner, corrected, u - 1))


@triton.jit
def tanh(y):
    """Return tanh(y), in fp32 by an odd polynomial (relative error 5e-9) below 0.625, else (1 - q) / (1 + q) with
    q = exp(-2|y|)."""
    a = tl.abs(y)
    if y.dtype == tl.float64:
        fall = expm1(-2 * a)
        result = -fall / (2 + fall)
    else:
        q = tl.exp2(-2 * to_power(a))
        s = y * y
        p = tl.fma(s, -0.005666977260261774, 0.020606176927685738)
        p = tl.fma(p, s, -0.05373000726103783)
        p = tl.fma(p, s, 0.13331331312656403)
        p = tl.fma(p, s, -0.33333277702331543)
        result = tl.where(a < 0.625, tl.fma(a * s, p, a), (1 - q) / (1 + q))
    return tl.where(y < 0, -result, result)


@triton.jit
def tanh_derivative(y):
    """Return 1 - tanh(y)^2 as 4q / (1 + q)^2, which keeps its precision where tanh is nearly 1."""
    q = tl.exp2(-2 * to_power(tl.abs(y)))
    return 4 * q / ((1 + q) * (1 + q))
