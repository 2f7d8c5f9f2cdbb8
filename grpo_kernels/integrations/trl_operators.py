"""TRL's operators on these kernels: log-probs and entropies, from hidden states and from logits, and divergences.

Each is made with TRL's own, which serves the calls that ours would not equal, or would not gain anything for.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..calls.head import operand_dtype, without_autocast
from ..calls.teacher import Teacher
from ..divergences import token_divergence
from ..linear import linear_grpo_loss, linear_token_log_probs
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.config import LossConfig
from ..objectives.divergence import Divergence

_TILE = (32768, 4096)
"""The most columns and tokens that TRL computes logits of at a time, in fp32, of the student and of the teacher."""


_stays = contextvars.ContextVar("stays", default=False)
"""Whether the fused head is TRL's own, whatever is asked of it."""


def with_trls_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of TRL's inside which the fused head is TRL's own. DPO's policy asks for ``is_top1``, which TRL's
    alone has; a reference by another operator would be off by rounding where the two are one model, and a reward that
    is 0 would not be."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        token = _stays.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            _stays.reset(token)

    return method


class HeadLogProbs:
    """In the place of TRL's ``ChunkedLogProbFunction``: the same call, through ``linear_token_log_probs``."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Return log-probs, and where they are asked for the entropy and the mean logit; None for the rest."""
        linear = ("mean_logits",) if final_logit_softcapping is None else ()
        served = set(outputs) <= {"log_probs", "entropy", *linear} and logit_scale > 0
        if not served or _stays.get() or _is_partitioned(weight):
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            found: tuple[Tensor | None, ...] = self._original.apply(hidden, weight, bias, targets, *options)
            return found
        weight, bias = _cast(weight, hidden), _cast(bias, hidden)
        log_probs, entropy = linear_token_log_probs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=final_logit_softcapping,
        )
        mean = _mean_logits(hidden, weight, bias) * (logit_scale / temperature) if "mean_logits" in outputs else None
        return log_probs, entropy if "entropy" in outputs else None, None, mean, None


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return every row's mean logit over the vocabulary: its product with the mean of the head's rows."""
    real = torch.promote_types(hidden.dtype, torch.float32)
    with without_autocast(hidden.device.type):
        mean = hidden.to(real) @ weight.mean(0, dtype=real)
        return mean if bias is None else mean + bias.mean(dtype=real)


def selective_log_softmax_or(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return TRL's ``selective_log_softmax``, with ``original`` for what ``_serves`` is not true of."""

    @functools.wraps(original)
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if not _serves(logits, index):
            return original(logits, index, temperature, row_mask)
        return token_log_probs(logits, index, row_mask, temperature=temperature).log_probs

    return selective_log_softmax


def selective_log_softmax_and_entropy_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return TRL's ``selective_log_softmax_and_entropy``, with ``original`` for what ``_serves`` is not true of."""

    @functools.wraps(original)
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _serves(logits, index):
            found: tuple[Tensor, Tensor] = original(logits, index, entropy_requires_grad, temperature, row_mask)
            return found
        log_probs, entropy = token_log_probs(logits, index, row_mask, temperature=temperature)
        return log_probs, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _serves(logits: Tensor, index: Tensor) -> bool:
    """Whether a row has one token, and TRL no kernel for it: on GPUs it has one that reads logits once, as ours does,
    and nobody has timed the two."""
    plain = logits.device.type == "cpu" and not isinstance(logits, DTensor) and _lies_in_rows(logits)
    return plain and logits.dim() in (2, 3) and index.shape == logits.shape[:-1] and index.numel() > 0


def divergence_loss_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of TRL's ``DistillationTrainer``, whose gradient is made with it of logits that are made once."""

    @functools.wraps(original)
    def chunked_divergence_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = _arguments(original, args, kwargs)
        heads = (given["student_lm_head_weight"], given["teacher_lm_head_weight"])
        if any(map(_is_partitioned, heads)) or min(given["student_logit_scale"], given["teacher_logit_scale"]) <= 0:
            found: tuple[Tensor, Tensor, Tensor] = original(*args, **kwargs)
            return found
        states, head = _model_of(given, "student")
        teacher_states, teacher_head = _model_of({name: _detached(value) for name, value in given.items()}, "teacher")
        mask = given["completion_mask"] != 0
        half = operand_dtype(states).itemsize == 2
        out = linear_grpo_loss(
            states,
            token_ids=torch.zeros_like(mask, dtype=torch.int64),  # on which the divergence does not depend
            advantages=None,
            mask=mask,
            **head,
            teacher=Teacher(hidden=teacher_states, **teacher_head),
            config=_config(given["beta"]),
            normalizer=_count(given["num_items_in_batch"], mask),
            temperature=given["temperature"],
            logits_dtype=torch.float32 if half else None,  # TRL does not round them either
            chunk_bytes=max(1 << 28, 2 * 4 * _TILE[0] * min(mask.numel(), _TILE[1])),
        )
        return out.loss, out.entropy.sum(), mask.sum()

    return chunked_divergence_loss


def _model_of(given: dict[str, Any], which: str) -> tuple[Tensor, dict[str, Any]]:
    """Return a model's hidden states, and what our functions call the parts of its head."""
    states: Tensor = given[f"{which}_hidden_states"]
    head = {name: _whole(given[f"{which}_lm_head_{name}"], states) for name in ("weight", "bias")}
    head |= {"logit_scale": given[f"{which}_logit_scale"], "logit_softcap": given[f"{which}_final_logit_softcapping"]}
    return states, head


def generalized_jsd_or(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a trainer's ``generalized_jsd_loss`` of whole logits, read once; ``original`` is for probabilities,
    students' and teachers' top k, and reductions that are over columns."""

    @functools.wraps(original)
    def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Tensor:
        given = _arguments(original, args, kwargs)
        logits, teacher, labels = given["student_logits"], given["teacher_logits"], given["labels"]
        count, reduction = given["num_items_in_batch"], given["reduction"]
        columns = count is None and reduction not in ("batchmean", "sum")
        if columns or given.get("logits_are_probs") or given.get("top_k") or not _compares(logits, teacher):
            return original(*args, **kwargs)
        mask = None if labels is None else labels != -100
        if count is None:
            whole = len(logits) if mask is None else mask.sum().clamp(min=1)
            count = whole if reduction == "batchmean" else 1
        if logits.dim() == 2:  # one sequence
            logits, teacher, mask = logits[None], teacher[None], None if mask is None else mask[None]
        return grpo_loss(
            logits,
            torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device),
            None,
            mask,
            teacher=Teacher(logits=teacher.detach()),
            config=_config(given["beta"]),
            normalizer=_count(count, logits),
            temperature=given["temperature"],
        ).loss

    return generalized_jsd_loss


def full_logit_loss_or(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the divergence of every token that TRL's self-distillation takes of whole logits."""

    @functools.wraps(original)
    def full_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float) -> Tensor:
        if not _compares(student_logits, teacher_logits):
            return original(student_logits, teacher_logits, distillation_alpha=distillation_alpha)
        ids = torch.zeros(student_logits.shape[:-1], dtype=torch.int64, device=student_logits.device)
        teacher, kind = Teacher(logits=teacher_logits), _divergence(distillation_alpha)
        return token_divergence(student_logits, teacher, ids, divergence=kind).divergence

    return full_logit_loss


def _compares(logits: Tensor, teacher: Tensor) -> bool:
    """Whether two tensors are the logits of the same tokens and vocabulary, the teacher's without a gradient."""
    alike = logits.shape == teacher.shape and logits.dim() in (2, 3) and not teacher.requires_grad
    return alike and _lies_in_rows(logits) and _lies_in_rows(teacher)


def _lies_in_rows(logits: Tensor) -> bool:
    """Whether the columns of a row follow each other in memory, as our kernels read them."""
    return logits.stride(-1) == 1 or logits.shape[-1] == 1


def _config(beta: float) -> LossConfig:
    return LossConfig(surrogate=None, aggregation="token_mean", divergence=_divergence(beta))


def _divergence(beta: float) -> Divergence:
    """Return what TRL means by its beta, or alpha: the KLs at both ends, between them the Jensen-Shannon divergence."""
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return Divergence(ends[beta]) if beta in ends else Divergence("jsd", mix=float(beta))  # type: ignore[arg-type]


def _count(items: Tensor | float | None, beside: Tensor) -> Tensor | float | None:
    return items.to(beside.device) if isinstance(items, Tensor) else items


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults among them."""
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 has parts of a weight alone: TRL's backward gathers it again, ours cannot."""
    return hasattr(weight, "ds_id")


def _whole(tensor: Any, states: Tensor) -> Any:
    """Return a head's tensor, or None, gathered from FSDP2's shards, and in the dtype that TRL computes in."""
    return _cast(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, states)


def _cast(tensor: Any, states: Tensor) -> Any:
    """Return a head's tensor, or None, in its states' dtype, unless autocast sees to both."""
    if tensor is None or torch.is_autocast_enabled(states.device.type):
        return tensor
    return tensor.to(states.dtype)
