"""What PTX's arithmetic means, over arrays of 32 lanes. Generated segments see every name of this module."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f4, f8 = np.float32, np.float64
where = np.where

PERTURBED = False
"""Whether approximations (ex2, rcp, lg2, div.full) err by up to 2^-23.6, by a fixed function of their argument."""

_TINY = f4(2.0**-126)
_libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = (ctypes.c_double,) * 3
_fma = np.frompyfunc(_libm.fma, 3, 1)


def ftz(x):
    small = np.abs(x) < _TINY
    return where(small, np.copysign(f4(0), x), x) if small.any() else x


def from_bf16(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def from_f16(bits):
    return bits.view(np.float16).astype(f4)


def to_bf16(x):
    bits = x.view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return where(np.isnan(x), u2(0x7FFF), rounded)


def to_f16(x):
    return where(np.isnan(x), u2(0x7FFF), x.astype(np.float16).view(u2))


def _sum_and_error(a, b, c):
    """a * b + c of fp32 in fp64, and by how much it is too small."""
    product, c = a.astype(f8) * b, c.astype(f8)
    total = product + c
    part = total - product
    return total, (product - (total - part)) + (c - part)


_HALF, _LOW = u8(0x10000000), u8(0x1FFFFFFF)


def fma_f32_rn(a, b, c):
    total = a.astype(f8) * b + c
    rounded = total.astype(f4)
    low = total.view(u8) & _LOW
    tricky = (low == _HALF) | (np.abs(rounded) < _TINY)  # the first rounding may have made or hidden a tie
    if not tricky.any():
        return rounded
    total, error = _sum_and_error(a, b, c)
    off = np.isfinite(total) & (error != 0)  # round to odd: the last bit says that something is missing
    bits = total.view(u8)
    toward_zero = (error < 0) == (total > 0)
    even = (bits & u8(1)) == 0
    bits = where(off & toward_zero & even & (total != 0), bits - u8(1), bits)
    bits = where(off, bits | u8(1), bits)
    return bits.view(f8).astype(f4)


def fma_f32_rm(a, b, c):
    total, error = _sum_and_error(a, b, c)
    rounded = total.astype(f4)
    above = (rounded > total) | ((rounded == total) & (error < 0))
    return where(above & np.isfinite(total), np.nextafter(rounded, f4(-np.inf)), rounded)


def add_f32_rz(a, b):
    total, error = _sum_and_error(a, np.ones_like(a), b)
    rounded = total.astype(f4)
    beyond = (np.abs(rounded) > np.abs(total)) | ((rounded == total) & (error * total < 0))
    return where(beyond & np.isfinite(total), np.nextafter(rounded, f4(0)), rounded)


def fma_f64_rn(a, b, c):
    return _fma(a, b, c).astype(f8)


def approximate(exact, argument, keep_whole=False):
    """To fp32, with the error that the hardware may have."""
    if PERTURBED:
        noise = (np.ascontiguousarray(argument).view(u4) * u4(2654435761) >> u4(29)).astype(f8) / 7 - 0.5
        noise = where(np.rint(argument) == argument, 0, noise) if keep_whole else noise
        exact = exact * (1 + noise * 2.0**-22.6)
    return exact.astype(f4)


ex2_exact = np.exp2
lg2_exact = np.log2


def rcp_exact(x):
    return x.dtype.type(1) / x


def rcp_f64_approx(x):
    """rcp.approx.ftz.f64: looks at the upper half of its argument and gives the upper half of the result."""
    top = (x.view(u8) & u8(0xFFFFFFFF00000000)).view(f8)
    top = where(np.abs(top) < 2.0**-1022, np.copysign(0.0, top), top)
    value = 1 / top
    value = where(np.abs(value) < 2.0**-1022, np.copysign(0.0, value), value)
    return (value.view(u8) & u8(0xFFFFFFFF00000000)).view(f8)


def _with_zero_signs(value, a, b, pick):
    zeros = (a == 0) & (b == 0)
    if not zeros.any():
        return value
    sign = where(pick(np.signbit(a), np.signbit(b)), value.dtype.type(-1), value.dtype.type(1))
    return where(zeros, np.copysign(value, sign), value)


def max_num(a, b):
    return _with_zero_signs(np.fmax(a, b), a, b, np.logical_and)


def min_num(a, b):
    return _with_zero_signs(np.fmin(a, b), a, b, np.logical_or)


def max_nan(a, b):
    return _with_zero_signs(np.maximum(a, b), a, b, np.logical_and)


def min_nan(a, b):
    return _with_zero_signs(np.minimum(a, b), a, b, np.logical_or)


def saturate(x):
    return where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def _shift(x, amount, left):
    bits = u4(8 * x.itemsize)
    kept = np.minimum(amount, bits - u4(1)).astype(x.dtype)
    value = x << kept if left else x >> kept
    beyond = amount >= bits
    if beyond.any() and (left or x.dtype.kind == "u"):
        value = where(beyond, x.dtype.type(0), value)
    return value


def shl(x, amount):
    return _shift(x, amount, True)


def shr(x, amount):
    return _shift(x, amount, False)


def shf_r(low, high, amount, wrap):
    amount = (amount & u4(31) if wrap else np.minimum(amount, u4(32))).astype(u8)
    return (((high.astype(u8) << u8(32)) | low) >> amount).astype(u4)


def shf_l(low, high, amount, wrap):
    amount = (amount & u4(31) if wrap else np.minimum(amount, u4(32))).astype(u8)
    return ((((high.astype(u8) << u8(32)) | low) << amount) >> u8(32)).astype(u4)


def bfi(a, b, start, length):
    bits = 8 * a.itemsize
    whole = (1 << bits) - 1
    result = []
    for x, y, s, n in zip(a.tolist(), b.tolist(), start.tolist(), length.tolist(), strict=True):
        s, n = s & 255, n & 255
        mask = (((1 << n) - 1) << s) & whole
        result.append((y & ~mask) | ((x << s) & mask))
    return np.array(result, a.dtype)


def bfe(a, start, length):
    bits, signed = 8 * a.itemsize, a.dtype.kind == "i"
    result = []
    for x, s, n in zip(a.tolist(), start.tolist(), length.tolist(), strict=True):
        s, n = s & 255, n & 255
        value = (x >> s) & ((1 << n) - 1) if signed else (x & ((1 << bits) - 1)) >> s & ((1 << n) - 1)
        top = x >> min(s + n - 1, bits - 1) & 1 if n else 0
        result.append(value - (1 << n) if signed and n and top and n < bits else value)
    return np.array(result).astype(a.dtype)


def prmt(a, b, selector):
    whole = (b.astype(u8) << u8(32)) | a
    result = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> u4(4 * i)) & u4(15)
        byte = ((whole >> ((pick & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        byte = where(pick & u4(8), where(byte & u4(128), u4(255), u4(0)), byte)
        result |= byte << u4(8 * i)
    return result


def div_int(a, b):
    """Toward zero."""
    safe = where(b == 0, a.dtype.type(1), b)
    if a.dtype.kind == "u":
        return where(b == 0, ~a.dtype.type(0), a // safe)
    quotient = a // safe
    quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return where(b == 0, a.dtype.type(-1), quotient)


def rem_int(a, b):
    """With the sign of ``a``; of 0 the ISA leaves it open."""
    return a - div_int(a, b) * b
