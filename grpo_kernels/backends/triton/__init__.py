"""Triton kernels, for NVIDIA and AMD GPUs; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1).

rows.py has the maths of a row, surrogates.py that of a token, divergences.py that of a column of two rows; forward.py,
gradient.py, one_pass.py, pairs.py and sums.py have the kernels, launch.py grids, blocks.py block sizes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..contract import (
    DivergenceStats,
    Request,
    RowGradients,
    Rows,
    RowStats,
    TokenInputs,
    TokenRecords,
    TokenValues,
    batch_and_row_stride,
)
from ..spec import ObjectiveSpec

_MINIMUM_TRITON = (3, 6)
_LONGEST_VOCABULARY = 2**30


def unsupported(request: Request) -> str | None:
    if reason := _missing():
        return reason
    if request.device.type == "cuda":
        if not torch.cuda.is_available():
            return "no GPU driver is active"
    elif not (request.device.type == "cpu" and _interpreted()):
        return f"it serves CUDA and ROCm tensors, not {request.device.type} (without TRITON_INTERPRET=1)"
    if request.vocab > _LONGEST_VOCABULARY:
        return f"it serves vocabularies of up to {_LONGEST_VOCABULARY} columns"
    if request.fused:
        from .blocks import blocks_for, target_of

        blocks = blocks_for(request.vocab, request.dtype, request.softcap, target_of(request.device))
        if not blocks.fuses(request.vocab):
            return "such a row does not stay in registers, and two sweeps have not been measured faster"
    return None


@functools.cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _MINIMUM_TRITON:
        wanted = ".".join(map(str, _MINIMUM_TRITON))
        return f"it needs triton >= {wanted}; {triton.__version__} is installed"
    return None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def log_probs(rows: Rows, stats: RowStats) -> None:
    from . import forward, launch

    count, device = rows.token_ids.numel(), rows.logits.device
    blocks = launch.blocks_of(rows)
    spans = -(-rows.vocab // blocks.span)
    sizes = (rows.token_ids.shape[1], rows.vocab)
    constants = launch.row_constants(rows, blocks)
    row_arguments = launch.row_arguments(rows)
    if spans == 1 or count >= launch.programs_wanted(device):
        launch.launch(forward.log_probs_kernel, count, device, *row_arguments, *stats, *sizes, **constants)
        return
    partial = torch.empty(count, spans, 2, dtype=rows.numbers.dtype, device=device)
    arguments = (*row_arguments, partial, *sizes, spans)
    launch.launch(forward.span_sums_kernel, count * spans, device, *arguments, **constants)
    arguments = (*row_arguments, partial, *stats, *sizes, spans)
    launch.launch(forward.merge_spans_kernel, count, device, *arguments, **constants)


def log_probs_backward(rows: Rows, stats: RowStats, gradients: RowGradients, out: Tensor) -> None:
    from . import gradient, launch

    count, device = rows.token_ids.numel(), rows.logits.device
    blocks = launch.blocks_of(rows)
    parts, share = launch.gradient_parts(count, rows.vocab, blocks.block, device)
    arguments = (*launch.row_arguments(rows), *stats, *gradients, *launch.out_arguments(out))
    sizes = (rows.token_ids.shape[1], rows.vocab, parts, share)
    constants = {"BLOCK": blocks.block, "SOFTCAP": rows.softcap, "warps": blocks.warps}
    constants |= launch.vector_constants(rows.logits, out)
    launch.launch(gradient.gradient_kernel, count * parts, device, *arguments, *sizes, **constants)


def divergence(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, out: DivergenceStats
) -> None:
    from . import launch, pairs

    softmaxes = (*launch.softmax_arguments(rows, stats), *launch.softmax_arguments(teacher, teacher_stats))
    sizes = (rows.token_ids.shape[1], rows.vocab)
    constants = launch.pair_constants(rows, teacher) | {"KIND": kind}
    count, device = rows.token_ids.numel(), rows.logits.device
    launch.launch(pairs.divergence_kernel, count, device, rows.live, *softmaxes, *out, *sizes, **constants)


def divergence_backward(
    rows: Rows,
    stats: RowStats,
    teacher: Rows,
    teacher_stats: RowStats,
    kind: int,
    divergence: DivergenceStats,
    gradients: RowGradients,
    grad_divergence: Tensor,
    out: Tensor,
) -> None:
    from . import launch, pairs

    count, device = rows.token_ids.numel(), rows.logits.device
    constants = launch.pair_constants(rows, teacher, out) | {"KIND": kind}
    del constants["SWEEP"], constants["STAGES"]
    parts, share = launch.gradient_parts(count, rows.vocab, constants["BLOCK"], device)
    softmaxes = (*launch.softmax_arguments(rows, stats), *launch.softmax_arguments(teacher, teacher_stats))
    of_token = (rows.token_ids, stats.log_prob, stats.entropy, *gradients, grad_divergence)
    arguments = (rows.live, *softmaxes, *divergence, *of_token, *launch.out_arguments(out))
    sizes = (rows.token_ids.shape[1], rows.vocab, parts, share)
    launch.launch(pairs.divergence_gradient_kernel, count * parts, device, *arguments, *sizes, **constants)


def fused_loss(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, stats: RowStats, records: TokenRecords, out: Tensor
) -> None:
    from . import launch, one_pass

    blocks = launch.blocks_of(rows)
    arguments = (*launch.row_arguments(rows), *inputs, *stats, *records, *launch.out_arguments(out))
    sizes = (rows.token_ids.shape[1], rows.vocab)
    constants = launch.one_pass_constants(rows, blocks, out) | _spec_constants(spec)
    count, device = rows.token_ids.numel(), rows.logits.device
    launch.launch(one_pass.one_pass_kernel, count, device, *arguments, *sizes, **constants)


def token_sums(
    values: TokenValues,
    masked_in: Tensor,
    inputs: TokenInputs,
    records: TokenRecords,
    kl_estimator: int,
    sequences: int,
    loss: Tensor,
    sums: Tensor,
) -> None:
    from . import launch
    from . import sums as kernels

    count, device = values.live.numel(), values.live.device
    chunks = -(-count // kernels.TOKENS_PER_CHUNK)
    partial = torch.empty(chunks, kernels.WIDTH.value, dtype=sums.dtype, device=device)
    weights = (inputs.policy_weight, inputs.kl_weight, inputs.entropy_weight, inputs.rollout_kl_weight)
    compared = (inputs.old, inputs.ref, inputs.rollout)
    *records_of_all, rollout_weight, rollout_kl = records
    some = (record if record.numel() else None for record in (rollout_weight, rollout_kl))
    arguments = (*values, masked_in, *weights, *compared, *records_of_all, *some, partial, count)
    constants = {"KL_ESTIMATOR": kl_estimator, "CHUNK": kernels.TOKENS_PER_CHUNK}
    launch.launch(kernels.chunk_sums_kernel, chunks, device, *arguments, **constants)
    at_once = kernels.CHUNKS_AT_ONCE
    launch.launch(kernels.merge_chunks_kernel, 1, device, partial, loss, sums, chunks, sequences, AT_ONCE=at_once)


def rescale(gradient: Tensor, upstream: Tensor, announced: Tensor) -> None:
    from . import gradient as kernels
    from . import launch

    length, vocab = gradient.shape[-2:]
    rows, device = gradient.numel() // max(vocab, 1), gradient.device
    programs = min(rows, launch.programs_wanted(device))
    arguments = (gradient, *batch_and_row_stride(gradient), upstream, announced, length, rows, vocab)
    constants = launch.vector_constants(gradient)
    launch.launch(kernels.rescale_kernel, programs, device, *arguments, **constants, BLOCK=4096, warps=8)


def token_terms(
    values: TokenValues,
    numbers: Tensor,
    inputs: TokenInputs,
    spec: ObjectiveSpec,
    records: TokenRecords,
    grad_log_prob: Tensor,
) -> None:
    from . import launch, one_pass

    count, device = grad_log_prob.numel(), grad_log_prob.device
    constants = {**_spec_constants(spec), "BLOCK": one_pass.TOKENS_PER_PROGRAM}
    programs = -(-count // one_pass.TOKENS_PER_PROGRAM)
    arguments = (*values, numbers, *inputs, *records, grad_log_prob, count)
    launch.launch(one_pass.token_terms_kernel, programs, device, *arguments, **constants)


def _spec_constants(spec: ObjectiveSpec) -> dict[str, int]:
    """Return the compile-time choices by the kernels' names for them."""
    return {name.upper(): value for name, value in spec._asdict().items()}
