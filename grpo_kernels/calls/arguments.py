"""Checks of the tensors of one call: logits, a head, what torch.func and autograd must not do with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.spec import LogitArgs
from ..objectives.checks import FLOAT_DTYPES, check_flag, check_held, check_positive, fail, refuse_layout
from .head import HeadTensors, is_autocast

if TYPE_CHECKING:
    from ..objectives.config import LossConfig


def check_logits(
    function: str, logits: Tensor, tensors: Mapping[str, object], may_be_empty: bool = False, name: str = "logits"
) -> None:
    """Raise unless logits are rows of the vocabulary; ``may_be_empty``: where other ranks hold its columns."""
    if not isinstance(logits, Tensor):
        fail(function, f"{name} to be a tensor", type(logits).__name__, tensors, error=TypeError)
    if logits.layout is not torch.strided or logits.is_nested:
        refuse_layout(function, name, logits)
    if logits.dtype not in FLOAT_DTYPES:
        expected = f"{name} in float32, bfloat16, float16 or float64"
        fail(function, expected, str(logits.dtype), tensors, error=TypeError)
    if logits.dim() not in (2, 3):
        hint = (
            f"flatten leading dimensions: {name}.flatten(0, -3), token_ids.flatten(0, -2)" if logits.dim() > 3 else None
        )
        fail(function, f"{name} (B, T, V), (B, T+1, V) or packed (N, V)", f"{logits.dim()} dimensions", tensors, hint)
    if logits.shape[-1] == 0 and not may_be_empty:
        fail(function, "at least one vocabulary column", f"shape {tuple(logits.shape)}", tensors)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        hint = f"the vocabulary must be the contiguous dimension: {name}.contiguous()"
        fail(function, f"{name} with last stride 1", f"strides {logits.stride()}", tensors, hint)


def read_head(
    function: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None
) -> HeadTensors:
    """Return what the logits are made of. Raise unless an adapter is two tensors."""
    if adapter is None:
        return HeadTensors(hidden, weight, bias)
    parts = adapter if isinstance(adapter, (tuple, list)) else ()
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        got = f"({', '.join(type(part).__name__ for part in parts)})" if parts else type(adapter).__name__
        hint = "LoRA on the head is adapter=(scaling * dropout(hidden) @ A.T, B)"
        fail(function, "adapter to be two tensors (states, weight)", got, hint=hint, error=TypeError)
    return HeadTensors(hidden, weight, bias, *parts)


def check_head(function: str, head: HeadTensors, tensors: Mapping[str, object], may_be_empty: bool = False) -> None:
    """Raise unless hidden states, LM head and adapter fit each other, are floating, and whole or this rank's part."""
    hidden, weight, bias = head[:3]
    for name, tensor in head._asdict().items():
        if tensor is None and name not in ("hidden", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            module = "the weight of the head, not the module: model.lm_head.weight" if name == "weight" else None
            fail(function, f"{name} to be a tensor", type(tensor).__name__, hint=module, error=TypeError)
        if tensor.layout is not torch.strided or tensor.is_nested:
            refuse_layout(function, name, tensor)
        if hasattr(tensor, "full_tensor") or (hasattr(tensor, "ds_id") and tensor.numel() == 0):
            hint = (
                "only inside the forward of the module that shards it is it whole, and its gradient reduced: "
                "grpo_kernels.hf.attach computes the loss there; FSDP2's register_fsdp_forward_method(head, name) "
                "makes a method of the head such a forward (full_tensor() would keep each rank's own gradient)"
            )
            fail(function, f"a whole {name}", f"a sharded one ({type(tensor).__name__})", hint=hint)
        if tensor.dtype not in FLOAT_DTYPES:
            quantised = "a quantised head must be dequantised first" if name == "weight" else None
            fail(function, f"{name} of a floating dtype", str(tensor.dtype), tensors, quantised, TypeError)
    if hidden.dim() not in (2, 3):
        expected = "hidden (B, T, H), (B, T+1, H) or packed (N, H)"
        fail(function, expected, f"{hidden.dim()} dimensions", tensors)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not may_be_empty):
        fail(function, "weight (V, H) with V > 0", f"shape {tuple(weight.shape)}", tensors)
    if hidden.shape[-1] != weight.shape[1]:
        turned = "weight is (V, H), as nn.Linear keeps it: weight.T" if hidden.shape[-1] == weight.shape[0] else None
        expected = f"weight (V, {hidden.shape[-1]}) for these hidden states"
        fail(function, expected, str(tuple(weight.shape)), tensors, turned)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        fail(function, f"bias ({weight.shape[0]},)", str(tuple(bias.shape)), tensors)
    differ = any(tensor is not None and tensor.dtype != hidden.dtype for tensor in (weight, bias))
    if differ and not is_autocast(hidden):
        hint = "hidden.to(weight.dtype), or torch.autocast"
        fail(function, f"hidden states, weight and bias of one dtype ({hidden.dtype})", "several", tensors, hint)
    if head.adapter_states is not None and head.adapter_weight is not None:
        _check_adapter(function, hidden, weight.shape[0], head.adapter_states, head.adapter_weight, tensors)


def _check_adapter(
    function: str, hidden: Tensor, vocab: int, states: Tensor, weight: Tensor, tensors: Mapping[str, object]
) -> None:
    """Raise unless an adapter's states have the rows of the hidden ones and its weight their columns. Their dtypes may
    be others: adapters are kept in fp32 beside a bf16 head."""
    rows, rank = hidden.shape[:-1], states.shape[-1] if states.dim() > 0 else 0
    if states.shape[:-1] != rows or rank < 1:
        expected = f"adapter states ({', '.join(map(str, rows))}, r) with r >= 1, a row for each of the hidden states"
        hint = "adapter=(scaling * dropout(hidden) @ A.T, B), of the same hidden"
        fail(function, expected, str(tuple(states.shape)), tensors, hint)
    if tuple(weight.shape) != (vocab, rank):
        turned = "it is (V, r), as lora_B.weight is: weight.T" if tuple(weight.shape) == (rank, vocab) else None
        fail(function, f"an adapter weight ({vocab}, {rank})", str(tuple(weight.shape)), tensors, turned)


def check_inplace(function: str, inplace: bool, logits: Tensor, tensors: Mapping[str, object]) -> None:
    """Refuse ``inplace=True``, which overwrites the logits with their gradient, where that would be wrong."""
    check_flag(function, "inplace", inplace)
    if keeps_values(logits):
        hint = "a leaf that requires grad keeps its values, and so do views of it; use inplace=False"
        got = "a leaf that requires grad" if logits.is_leaf else "a view of a leaf that requires grad"
        fail(function, "logits computed by a model with inplace=True", got, tensors, hint)
    if _overlaps_itself(logits):
        hint = "use inplace=False, or logits.contiguous()"
        fail(function, "logits without internal overlap with inplace=True", f"strides {logits.stride()}", tensors, hint)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{function}: inplace=True inside activation checkpointing's recomputation: the logits that it was given "
            "may already be the gradient. Keep the loss outside the checkpointed region, or use inplace=False."
        )


def keeps_values(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf that requires grad, or a view of one: PyTorch's own functions write into neither."""
    if tensor.is_leaf or torch.compiler.is_compiling():
        return tensor.is_leaf and tensor.requires_grad
    base = tensor._base
    return base is not None and base.is_leaf and base.requires_grad


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a dimension steps less than what lies inside it."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def check_pooled(
    function: str,
    config: LossConfig,
    old: Tensor | None,
    rollout: Tensor | None,
    tensors: Mapping[str, object],
    log_probs: Tensor | None = None,
) -> None:
    """Log-probs that are summed over a sequence have fp32's digits: what bf16 rounds off adds up. ``log_probs`` are the
    policy's, where they are given."""
    if not any(value is not None and value.dtype.itemsize < 4 for value in (old, rollout, log_probs)):
        return
    schemes = [scheme for scheme in config.schemes if scheme.pooled]
    all_levels = (config.pooling, config.kl_pooling, config.rollout_kl_pooling)
    levels = [f'level="{level.name}"' for level in all_levels if level.pools]
    of_old = [repr(scheme) for scheme in schemes if not scheme.of_policy]
    of_policy = [repr(scheme) for scheme in schemes if scheme.of_policy]
    for name, value, reasons in (
        ("old_log_probs", old, [*levels, *of_old]),
        ("rollout_log_probs", rollout, [repr(s) for s in schemes]),
        ("log_probs", log_probs, [*(of_old if old is None else levels), *of_policy]),  # on-policy, ratios are 1
    ):
        if reasons and value is not None and value.dtype.itemsize < 4:
            hint = "rounded log-probs make wrong ratios of sequences: store them in float32, as they were computed"
            fail(function, f"{name} in float32 with {reasons[0]}", str(value.dtype), tensors, hint)


def check_logit_args(function: str, args: LogitArgs, check: bool | None = None) -> None:
    """Raise unless each is a positive number that fp32 holds, and so are the quotients that kernels form of them."""
    plain = {type(value) for value in args} <= {int, float, type(None)}
    if plain and not torch.compiler.is_compiling():
        _check_logit_numbers(function, args)
    else:
        check_transform(function, args, check)


@functools.lru_cache(maxsize=64)
def _check_logit_numbers(function: str, args: LogitArgs) -> None:
    """Look at plain numbers once."""
    check_transform(function, args, None)


def check_transform(function: str, args: LogitArgs, check: bool | None) -> None:
    """As ``check_logit_args``, of numbers that change from call to call."""
    temperature = check_positive(function, "temperature", args.temperature, check)
    scale = check_positive(function, "logit_scale", args.logit_scale, check)
    _check_quotient(function, "logit_scale / temperature", scale, temperature)
    if args.logit_softcap is not None:
        cap = check_positive(function, "logit_softcap", args.logit_softcap, check)
        _check_quotient(function, "logit_scale / logit_softcap", scale, cap)
        _check_quotient(function, "logit_softcap / temperature", cap, temperature)


def _check_quotient(function: str, names: str, over: float | None, under: float | None) -> None:
    if over is not None and under is not None:
        check_held(function, names, over / under, over, under)


def checked_scale(function: str, grad_scale: float | Tensor, check: bool | None) -> float | Tensor:
    """Return the factor that gradients are written with."""
    check_positive(function, "grad_scale", grad_scale, check)
    return grad_scale
