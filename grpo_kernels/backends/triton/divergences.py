"""The per-column maths of divergences for Triton: twin of ``objectives/divergence.py`` and csrc/common/divergences.h.

The same names in the same order; a parity test holds them together. Everything is a block of columns, or a scalar,
fp32 or fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import log1p

# Where each kind sits in objectives/divergence.KINDS.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
MIXED_KL = tl.constexpr(2)
JSD = tl.constexpr(3)
SKEW_FORWARD_KL = tl.constexpr(4)
SKEW_REVERSE_KL = tl.constexpr(5)
TVD = tl.constexpr(6)


@triton.jit
def negative(x):
    """Return -x, such that the compiler knows it of -(-x) and |-x|; to it, -x is 0 - x."""
    return x * -1.0


@triton.jit
def k3_near(u):
    """Return exp(u) - u - 1 for |u| < 1 without cancellation: u^2 times a series, which in fp32 is the polynomial
    through the Chebyshev nodes (relative error 5.5e-9). Anything for other u."""
    if u.dtype == tl.float64:
        series = u * 0 + 1
        for k in tl.static_range(20, 2, -1):
            series = 1 + u * (1 / k) * series
        series = series * 0.5
    else:
        series = tl.fma(u, 2.8062802e-06, 2.5358513e-05)
        series = tl.fma(series, u, 1.9838102e-04)
        series = tl.fma(series, u, 1.3885397e-03)
        series = tl.fma(series, u, 8.3333394e-03)
        series = tl.fma(series, u, 4.1666735e-02)
        series = tl.fma(series, u, 1.6666667e-01)
        series = tl.fma(series, u, 0.5)
    return u * u * series


@triton.jit
def expm1_of(x):
    """Return exp(x) - 1, in fewer steps than ``maths.expm1``."""
    return tl.where(tl.abs(x) < 1, x + k3_near(x), tl.exp(x) - 1)


@triton.jit
def kl_term(weight, log_odds, other):
    """Return w·x - w + m, x = log(w/m): a term >= 0 of KL(w‖m), by a series near x = 0; m where w is 0."""
    product = tl.where(weight == 0, 0, weight * log_odds)
    return tl.where(tl.abs(log_odds) < 1, weight * k3_near(negative(log_odds)), product - weight + other)


@triton.jit
def over_mixture(d, share, rest):
    """Return log(p/m) and log(q/m), m = share·p + rest·q, of d = log(p/q); nothing overflows."""
    fall = expm1_of(-tl.abs(d))
    larger = -log1p(tl.where(d >= 0, rest, share) * fall)
    return larger + tl.where(d < 0, d, 0), larger - tl.where(d > 0, d, 0)


@triton.jit
def minus(p, q, d):
    """Return p - q, with all its digits where they are close."""
    return tl.where(tl.abs(d) < 1, q * (d + k3_near(d)), p - q)


@triton.jit
def columns_of(KIND: tl.constexpr, p, q, d, mix):
    """Return term, own and slope of columns: p, q and d = log(p/q), which is anything where both are 0; so is the slope
    where p is."""
    zero = p * 0  # d may be infinite
    rest = 1 - mix
    if KIND == FORWARD_KL:
        return kl_term(q, negative(d), p), minus(p, q, d), zero
    elif KIND == REVERSE_KL:
        return kl_term(p, d, q), zero, d
    elif KIND == MIXED_KL:
        return mix * kl_term(q, negative(d), p) + rest * kl_term(p, d, q), mix * minus(p, q, d), rest * d
    elif KIND == JSD:
        log_p, log_q = over_mixture(d, rest, mix)
        m = rest * p + mix * q
        return mix * kl_term(q, log_q, m) + rest * kl_term(p, log_p, m), zero, rest * log_p
    elif KIND == SKEW_FORWARD_KL:
        _, log_q = over_mixture(d, rest, mix)
        return kl_term(q, log_q, mix * q + rest * p), zero, -rest * expm1_of(log_q)
    elif KIND == SKEW_REVERSE_KL:
        log_p, _ = over_mixture(d, mix, rest)
        return kl_term(p, log_p, mix * p + rest * q), zero, log_p - mix * expm1_of(log_p)
    else:
        sign = tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, d))
        return tl.abs(minus(p, q, d)) * 0.5, zero, sign


@triton.jit
def of_error(KIND: tl.constexpr, excess, slopes, mix):
    """Return what a small error in d of many columns makes of their terms, per unit: f''(1)·Σ(p - q), or where f has a
    corner, Σ p·slope; ``excess`` is that of the mean between the erring columns and the right ones."""
    rest = 1 - mix
    if KIND == TVD:
        return slopes
    elif KIND == JSD:
        return mix * rest * excess
    elif KIND > JSD:
        return rest * rest * excess
    else:
        return excess
