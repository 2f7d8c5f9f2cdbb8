"""The logits' gradient from known log-probs and slopes, and its rescaling."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import AT_RUN_TIME, gradient_of, gradient_terms, in_vectors, logit_map, row_at, sampled


@triton.jit
def fill(row, value, first, last, vocab, BLOCK: tl.constexpr):
    """Fill the blocks [first, last) of a row with ``value``."""
    filling = tl.zeros([BLOCK], row.dtype.element_ty) + value.to(row.dtype.element_ty)
    for i in tl.range(first, last):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(row + columns, filling, mask=columns < vocab)


@triton.jit
def write_gradient(
    row,
    out,
    first,
    last,
    target,
    vocab,
    mapping,
    terms,
    numbers,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_H: tl.constexpr,
):
    """Write blocks [first, last) of a row, the last one first: a forward sweep leaves it in the nearest cache."""
    real: tl.constexpr = numbers.dtype.element_ty
    for i in tl.range(0, last - first):
        columns = (last - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < vocab
        logits = tl.load(row + columns, mask=inside, eviction_policy="evict_first").to(real)
        gradient = gradient_of(logits, columns, target, mapping, terms, SOFTCAP, HAS_H)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit(do_not_specialize=AT_RUN_TIME)
def gradient_kernel(
    logits,
    batch_stride: tl.int64,
    row_stride,
    token_ids,
    live,
    numbers,
    temperatures,
    log_prob,
    entropy,
    anchor,
    log_sum,
    grad_log_prob,
    grad_entropy,
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
):
    """Write a row's gradient by ``parts`` programs, ``blocks`` of it each. ``out`` may be the logits."""
    row_index = tl.program_id(0) // parts
    first = (tl.program_id(0) - row_index * parts) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(vocab, BLOCK))
    out = row_at(out, row_index, length, out_batch_stride, out_row_stride, ALIGNMENT)
    vocab = in_vectors(vocab, VECTOR)
    zero = tl.load(numbers) * 0
    g = zero
    h = zero
    if grad_log_prob is not None:
        g = tl.load(grad_log_prob + row_index)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row_index)
    if (tl.load(live + row_index) == 0) | ((g == 0) & (h == 0)):
        fill(out, zero, first, last, vocab, BLOCK)
        return
    mapping = logit_map(numbers, temperatures, row_index, SOFTCAP)
    row, target, target_logit, _ = sampled(
        logits, batch_stride, row_stride, token_ids, row_index, length, vocab, numbers, mapping, ALIGNMENT, SOFTCAP
    )
    HAS_H: tl.constexpr = grad_entropy is not None
    stats = (
        tl.load(log_prob + row_index),
        tl.load(entropy + row_index),
        tl.load(anchor + row_index),
        tl.load(log_sum + row_index),
    )
    terms = gradient_terms(stats, g, h, target_logit, mapping, SOFTCAP, HAS_H)
    write_gradient(row, out, first, last, target, vocab, mapping, terms, numbers, BLOCK, SOFTCAP, HAS_H)


@triton.jit(do_not_specialize=AT_RUN_TIME)
def rescale_kernel(
    gradient,
    batch_stride: tl.int64,
    row_stride,
    upstream,
    announced,
    length,
    rows,
    vocab,
    ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply a gradient by upstream / announced in place, rows dealt out to all programs; leave it where they are
    equal."""
    up = tl.load(upstream)
    assumed = tl.load(announced)
    if up == assumed:
        return
    factor = up / assumed
    vocab = in_vectors(vocab, VECTOR)
    block = tl.arange(0, BLOCK)
    for row_index in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = row_at(gradient, row_index, length, batch_stride, row_stride, ALIGNMENT)
        for start in tl.range(0, vocab, BLOCK):
            inside = start + block < vocab
            values = tl.load(row + start + block, mask=inside).to(factor.dtype) * factor
            tl.store(row + start + block, values.to(gradient.dtype.element_ty), mask=inside)
