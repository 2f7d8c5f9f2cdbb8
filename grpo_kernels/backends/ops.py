"""The operators behind the public functions, registered with ``torch.library``.

An operator takes the whole logits tensor (a slice would be cloned by torch.compile), allocates the
outputs and hands them to the backend named in its last argument. None has an autograd formula: the
public functions attach gradients with the small ``autograd.Function``s of ``autograd.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives.compiler import define
from ..objectives.maths import accumulate_dtype, real_dtype
from ..objectives.metrics import FIELDS
from . import memory

_ROWS = "Tensor token_ids, Tensor live, Tensor numbers, bool softcap"
_BACKWARD = (
    f"{_ROWS}, Tensor log_prob, Tensor entropy, Tensor anchor, Tensor log_sum, "
    "Tensor? grad_log_prob, Tensor? grad_entropy"
)
_FUSED = (
    f"{_ROWS}, Tensor advantage, Tensor policy_weight, Tensor? old, Tensor? ref, Tensor? rollout, "
    "Tensor? kl_weight, Tensor? entropy_weight, int[] spec"
)
_TERMS = (
    "Tensor log_prob, Tensor entropy, Tensor live, Tensor numbers, Tensor advantage, Tensor policy_weight, "
    "Tensor? old, Tensor? ref, Tensor? rollout, Tensor? kl_weight, int[] spec"
)
_SUMMED = (
    "Tensor log_prob, Tensor entropy, Tensor policy, Tensor kl, Tensor flags, Tensor live, Tensor masked_in, "
    "Tensor policy_weight, Tensor? kl_weight, Tensor? entropy_weight, Tensor? old, Tensor? ref, Tensor? rollout, "
    "Tensor? rollout_weight, int kl_estimator, int sequences"
)


def _per_row(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, ...]:
    dtype = real_dtype(logits.dtype)
    return tuple(torch.empty(token_ids.shape, dtype=dtype, device=logits.device) for _ in range(count))


def _rollout_weight_like(log_prob: Tensor, spec: list[int]) -> Tensor:
    """Empty where the kernel applies no rollout scheme: the last number of an ``ObjectiveSpec``."""
    return torch.empty_like(log_prob) if spec[-1] else log_prob.new_empty(0)


def _gradient_like_fake(logits: Tensor) -> Tensor:
    """Without the offset of the real one, which follows from an address."""
    return logits.new_empty_strided(logits.shape, memory.row_strides(logits))


def _note_write(tensor: Tensor) -> None:
    """Kernels write behind PyTorch's back: without this, nodes that saved the tensor would not notice."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _zero_unused_rows(gradient: Tensor, token_ids: Tensor) -> None:
    """The row after the last token of (B, T+1, V) logits predicts nothing."""
    unused = gradient.shape[-2] - token_ids.shape[1]
    if unused:
        gradient.narrow(-2, token_ids.shape[1], unused).zero_()


def _backend(name: str) -> Any:
    from .. import backends

    return backends.get(name)


def _rows(*arguments: Any) -> Any:
    from .contract import Rows

    return Rows(*arguments)


def _log_probs(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *row_arguments, backend = rest
    outputs = _per_row(logits, token_ids, 4)
    _backend(backend).log_probs(_rows(logits, token_ids, *row_arguments), *outputs)
    return outputs


def _log_probs_fake(logits: Tensor, token_ids: Tensor, *rest: Any) -> Any:
    return _per_row(logits, token_ids, 4)


def _backward_into(out: Tensor, logits: Tensor, token_ids: Tensor, *rest: Any) -> None:
    live, numbers, softcap, *per_row, backend = rest
    _backend(backend).log_probs_backward(_rows(logits, token_ids, live, numbers, softcap), *per_row, out)
    _zero_unused_rows(out, token_ids)


def _log_probs_backward(logits: Tensor, *rest: Any) -> Tensor:
    out = memory.gradient_like(logits)
    _backward_into(out, logits, *rest)
    return out


def _log_probs_backward_(logits: Tensor, *rest: Any) -> None:
    _backward_into(logits, logits, *rest)
    _note_write(logits)


def _fused_into(out: Tensor, logits: Tensor, token_ids: Tensor, *rest: Any) -> Any:
    live, numbers, softcap, *inputs, spec, backend = rest
    *stats, policy, kl = _per_row(logits, token_ids, 6)
    log_prob, entropy, *_ = stats
    flags = torch.empty(token_ids.shape, dtype=torch.uint8, device=logits.device)
    rows = _rows(logits, token_ids, live, numbers, softcap)
    weight = _rollout_weight_like(log_prob, spec)
    _backend(backend).fused_loss(rows, *inputs, spec, *stats, policy, kl, flags, weight, out)
    _zero_unused_rows(out, token_ids)
    return log_prob, entropy, policy, kl, flags, weight


def _fused_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    out = memory.gradient_like(logits)
    return (*_fused_into(out, logits, *rest), out)


def _fused_loss_(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    outputs = _fused_into(logits, logits, *rest)
    _note_write(logits)
    return outputs


def _fused_loss_fake_(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    log_prob, *others = _per_row(logits, token_ids, 4)
    flags = torch.empty(token_ids.shape, dtype=torch.uint8, device=logits.device)
    return log_prob, *others, flags, _rollout_weight_like(log_prob, rest[-2])


def _fused_loss_fake(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (*_fused_loss_fake_(logits, token_ids, *rest), _gradient_like_fake(logits))


def _token_terms(log_prob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, backend = rest
    outputs = _token_terms_fake(log_prob, *rest)
    _backend(backend).token_terms(log_prob, *inputs, *outputs)
    return outputs


def _token_terms_fake(log_prob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    policy, kl, slope = (torch.empty_like(log_prob) for _ in range(3))
    return policy, kl, torch.empty_like(log_prob, dtype=torch.uint8), _rollout_weight_like(log_prob, rest[-2]), slope


def _token_sums(log_prob: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = rest
    loss, sums = _token_sums_fake(log_prob)
    _backend(backend).token_sums(log_prob, *inputs, loss, sums)
    return loss, sums


def _token_sums_fake(log_prob: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=log_prob.dtype, device=log_prob.device)
    return loss, torch.empty(len(FIELDS), dtype=accumulate_dtype(log_prob.device), device=log_prob.device)


def _rescale_(gradient: Tensor, token_ids: Tensor, upstream: Tensor, announced: Tensor, backend: str) -> None:
    """gradient *= upstream / announced, unless they are equal: then nothing is read or written.

    ``token_ids`` is here for its shape: a compiled backward that saw T only as the T + 1 rows of the gradient would
    not compile (inductor of torch 2.13: "For s + 1, expected [s] to have been codegen-ed").
    """
    _backend(backend).rescale(gradient, upstream, announced)
    _note_write(gradient)


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

log_probs = define(f"log_probs(Tensor logits, {_ROWS}, str backend) -> {_FOUR}", _log_probs, _log_probs_fake)
log_probs_backward = define(
    f"log_probs_backward(Tensor logits, {_BACKWARD}, str backend) -> Tensor",
    _log_probs_backward,
    lambda logits, *rest: _gradient_like_fake(logits),
)
log_probs_backward_ = define(
    f"log_probs_backward_(Tensor(a!) logits, {_BACKWARD}, str backend) -> ()",
    _log_probs_backward_,
    lambda logits, *rest: None,
)
fused_loss = define(f"fused_loss(Tensor logits, {_FUSED}, str backend) -> {_SEVEN}", _fused_loss, _fused_loss_fake)
fused_loss_ = define(
    f"fused_loss_(Tensor(a!) logits, {_FUSED}, str backend) -> {_SIX}", _fused_loss_, _fused_loss_fake_
)
token_terms = define(f"token_terms({_TERMS}, str backend) -> {_FIVE}", _token_terms, _token_terms_fake)
token_sums = define(f"token_sums({_SUMMED}, str backend) -> (Tensor, Tensor)", _token_sums, _token_sums_fake)
rescale_ = define(
    "rescale_(Tensor(a!) gradient, Tensor token_ids, Tensor upstream, Tensor announced, str backend) -> ()",
    _rescale_,
    lambda *args: None,
)
