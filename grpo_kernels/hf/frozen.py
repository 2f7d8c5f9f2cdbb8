"""A frozen Hugging Face model as a teacher: its states, head, scale and cap, as its own forward has them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.sharding import is_dtensor
from ..calls.teacher import Teacher
from ..objectives.checks import fail
from ..objectives.compiler import leaving_graphs, with_frames
from .head import Caller, TracedHead, head_of, in_fsdp_units, way_to, with_forward
from .model import causal_model, check_dtypes, completed, signature_of
from .parts import Parts
from .proof import EVERY, Memories, Proof, alone, row_logits

TEACHER = Caller("hf.teacher", "Teacher(logits=model(...).logits) takes those of the model's own head")
_MEMORIES: Memories = weakref.WeakKeyDictionary()
"""Of each model that has been a teacher."""


def teacher(model: nn.Module) -> Callable[..., Teacher]:
    """Return what gives the ``Teacher`` of a call of a Hugging Face model: ``hf.teacher(model)(input_ids=...)``.

        ask = hf.teacher(big_model)
        grpo = dict(token_ids=token_ids, advantages=A, mask=mask, teacher=ask(input_ids=ids, attention_mask=attention))
        student(input_ids=ids, attention_mask=attention, grpo=grpo).loss.backward()

    The model runs up to its head, in evaluation mode and without a gradient, and makes no logits: the Teacher has the
    states behind its final norm and the head's weight, bias, scale and cap, traced as ``attach`` traces them and
    compared with the model's own logits on one row, at the first call in each state and every hundred. The call is the
    student's, ``logits_to_keep`` included. No other thread trains this model meanwhile: it has no dropout. The model
    may be attached, and may be the student itself, its adapters off:
    ``with model.disable_adapter(): reference = hf.teacher(model)(...)``.

    The Teacher's weight is the model's own memory: it is of this step where the model learns. It is a copy, V·H'
    elements, where the model's is not all of it: cast under autocast, gathered by FSDP, or beside an adapter on the
    head (which ``merge_adapter`` saves).

    Args:
        model: a causal, multimodal or encoder-decoder model of transformers, bare or inside PEFT, DDP or FSDP
            wrappers.

    Returns:
        A function of the model's inputs.

    Raises:
        ValueError: a model without a head; of a call: a head that cannot be traced (quantised, or not linear), or that
            tensor parallelism shards, log-probs that are others than the model's own.
    """
    head_of(causal_model(model, TEACHER.function), TEACHER)
    return functools.partial(_called, model)


def _called(model: nn.Module, /, *args: Any, **inputs: Any) -> Teacher:
    """Return the teacher of a call, made inside the model's own forward, where wrappers have weights whole."""
    for name in ("grpo", "labels"):
        if inputs.get(name) is not None:
            fail(TEACHER.function, "inputs of the model alone", f"{name}=", hint="the student's call takes it")
    inner = causal_model(model, TEACHER.function)
    with alone(inner, _MEMORIES):  # another thread's call has its own forward there until it ends
        return _asked(model, inner, *args, **inputs)


def _asked(model: nn.Module, inner: Any, /, *args: Any, **inputs: Any) -> Teacher:
    """As ``_called``, of checked inputs; no other thread is here with this model."""
    thread, found = threading.get_ident(), []
    plain, signature = inner.forward, signature_of(inner)
    proof = Proof(_before(plain), EVERY, TEACHER, _MEMORIES)

    @leaving_graphs
    def forward(compiled: Any, *args: Any, **inputs: Any) -> None:
        if threading.get_ident() != thread:
            with with_frames(compiled):
                return plain(*args, **inputs)
        given = completed(signature, {**inputs, **dict(zip(list(signature.parameters)[1:], args, strict=False))}, None)
        keep = None if "logits_to_keep" in signature.parameters else given.pop("logits_to_keep", None)
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        parts = Parts(inner, head_of(inner, TEACHER))
        call = functools.partial(plain, **given)
        with proof.refusing(parts):
            traced = proof.traced(parts, call, compiled, kept)
            found.append(_of_traced(traced, parts, call, proof, given, _gathered(model, parts.head)))

    with torch.no_grad(), _evaluated(model), with_forward(inner, forward):
        model(*args, **inputs)
    return found[0]


def _of_traced(
    traced: TracedHead, parts: Parts, call: Callable[[], Any], proof: Proof, inputs: dict[str, Any], copied: bool
) -> Teacher:
    """Return the teacher of a traced head, compared on one row where the proof asks for it."""
    hidden = traced.main.states
    row = proof.row(traced, parts, call, hidden, _mask_of(parts.model, inputs, hidden.shape[-2]))
    found: list[Teacher | None] = []
    logits: list[Tensor | None] = []

    def run(states: Tensor) -> None:
        found.append(_whole(traced, copied))
        if row is not None:
            logits.append(row_logits(row))

    in_fsdp_units(parts.model, traced.layer, run, hidden)
    made = found[0]
    if made is None:
        hint = "hf.attach takes such a head for the policy, without a teacher; a teacher's is whole on every rank"
        fail(TEACHER.function, "a head that is whole on every rank", "one that tensor parallelism shards", hint=hint)
    factor = None if row is None else proof.compare(row, logits[0], traced, parts, call, None)
    return made if factor is None else dataclasses.replace(made, hidden=made.hidden * factor)  # type: ignore[operator]


def _whole(traced: TracedHead, copied: bool) -> Teacher | None:
    """Return the teacher of a head whose weight is whole here; None of one that is a DTensor."""
    form, operands = traced.form, traced.operands()
    if is_dtensor(operands.weight):
        return None
    states, weight, dtype = traced.main.states, operands.weight, operands.weight.dtype
    if form.autocast.enabled and dtype != torch.float64:
        dtype = form.autocast.dtype
    elif not form.autocast.enabled:
        check_dtypes(TEACHER.function, states, weight)
    if operands.adapter is not None:  # Σ products is the product of what stands side by side
        states = torch.cat([each.to(dtype) for each in (states, operands.adapter[0])], -1)
        weight = torch.cat([each.to(dtype) for each in (weight, operands.adapter[1])], -1)
        copied = False
    scale = operands.transform["logit_scale"]
    return Teacher(
        hidden=states.detach().to(dtype),
        weight=weight.detach().to(dtype, copy=copied),
        bias=None if operands.bias is None else operands.bias.detach().to(dtype, copy=copied),
        logit_scale=scale.detach().clone() if isinstance(scale, Tensor) else scale,
        logit_softcap=operands.transform.get("logit_softcap"),
    )


def _mask_of(model: Any, inputs: dict[str, Any], rows: int) -> Tensor | None:
    """Return which of the last ``rows`` are of tokens, as the model is told; None where it is not."""
    name = "decoder_attention_mask" if getattr(model.config, "is_encoder_decoder", False) else "attention_mask"
    mask = inputs.get(name)
    return mask[:, -rows:] if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= rows else None


def _before(forward: Any) -> Callable[..., Any]:
    """Return the function of a model's forward, or what it was before ``attach``."""
    function = getattr(forward, "__func__", forward)
    before, method = getattr(function, "grpo_kernels_before", (function, None))
    found: Callable[..., Any] = method or before
    return found


def _gathered(model: nn.Module, head: nn.Module) -> bool:
    """Whether FSDP makes a head's weights whole for a forward alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in way_to(model, head))


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Let a model be in evaluation mode: a distribution that is aimed at has no dropout."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
