"""Hugging Face causal models: the loss inside ``forward``, from hidden states.

``attach(model)`` gives the model's forward one more keyword, ``grpo``; with it the head is never applied to all rows,
and hooks of DDP, FSDP, ZeRO and gradient checkpointing fire as for any forward. Needs transformers.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.outputs import LossOutput, TokenLogProbs
from ..linear import linear_grpo_loss, linear_token_log_probs
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.checks import check_name, fail, may_look
from ..objectives.compiler import outside_graphs
from ..objectives.config import LossConfig, resolve_config
from ..objectives.names import check_options, keywords_of
from ..objectives.sequences import read_live
from .model_head import MODEL_TYPES as MODEL_TYPES
from .model_head import Proof, head_of, in_fsdp_units, row_logits, weight_and_bias


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the keywords of a function, without those that the model provides."""
    names = keywords_of(function)
    return tuple(name for name in names if name not in ("hidden", "weight", "bias", "adapter", "logits", "config"))


_TOKENS = ("token_ids", "advantages", "mask")
"""Of a call, never of the model."""
OUTPUTS = ("loss", "log_probs")
"""``grpo=dict(output=...)``"""


def attach(
    model: nn.Module, config: LossConfig | str = "grpo", *, from_logits: bool = False, **options: Any
) -> nn.Module:
    """Let ``model(..., grpo=dict(...))`` return the loss of ``linear_grpo_loss`` instead of logits.

        attach(model, "dapo", temperature=0.9)
        out = model(input_ids=ids, attention_mask=attention, grpo=dict(token_ids=token_ids, advantages=A, mask=mask))
        out.loss.backward()

    ``grpo`` holds keywords of ``linear_grpo_loss``; with ``output="log_probs"`` the call returns
    ``linear_token_log_probs`` (the old or reference pass), and keywords that only the loss has are left aside.
    ``token_ids`` are (B, L-1) from ``align``, or (B, R) with ``logits_to_keep=R + 1``. ``token_weights`` may be a
    function of the ``TokenLogProbs`` of the policy, which are computed first then, without gradient; ``config``
    replaces the one attached; ``receive`` is a function that is called with the result before wrappers see it. Weight,
    bias, scale and softcap of the head are the model's, read at every call. Without ``grpo`` nothing changes. A mixture
    of experts' auxiliary loss is not part of the result: a call that asks for it is refused.

    That hooks, patched forwards, adapters and subclasses leave the log-probs what this head makes them is measured: the
    first call in each state of the head runs the model's own forward on one live row, without its backbone, and waits
    for the device to compare. With ``from_logits`` there is nothing to compare.

    FSDP2 may shard the head as a unit of its own or with others. FSDP's mixed precision rounds the tensors of a plain
    dict on the way in, old log-probs among them, and may round outputs on the way out:
    ``grpo=types.MappingProxyType(dict(...))`` and ``receive`` go around it. Pickle a model detached;
    ``nn.DataParallel`` is not served.

    Args:
        model: a causal model of transformers, bare or inside PEFT, DDP or FSDP wrappers. Attach before
            ``accelerator.prepare``.
        config: a LossConfig or a preset's name.
        from_logits: run the model's own head and ``grpo_loss`` on its logits: for every architecture and any head, at
            the memory of the logits.
        **options: keywords of ``linear_grpo_loss`` (of ``grpo_loss``) to fix (temperature, chunk_bytes, inplace, ...).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an architecture whose head is not known, a head that is not a plain linear layer (LoRA on the head,
            quantised), a model that is attached already; of a call: a model whose own log-probs are others, ids that
            are not shifted, an auxiliary loss that would be dropped.
    """
    resolved = resolve_config(config)
    inner = causal_model(model, "attach")
    if _attached(inner):
        fail("attach", "a model that is not attached", "one that is", hint="grpo_kernels.hf.detach(model) first")
    _check_unprepared(inner, "attach")
    names = [name for name in _keywords(grpo_loss if from_logits else linear_grpo_loss) if name not in _TOKENS]
    _check_keywords("attach: the option", options, names)
    bind(inner, resolved, from_logits, options)
    return model


def bind(inner: Any, config: LossConfig, from_logits: bool, options: Mapping[str, Any]) -> None:
    """Do what ``attach`` does, without its checks, over whatever ``inner.forward`` is."""
    loss = grpo_loss if from_logits else linear_grpo_loss
    names = (*_keywords(loss), "config", "output", "receive")
    if not from_logits:
        head_of(inner)
    before = inner.forward
    method = getattr(before, "__func__", None)
    signature = inspect.signature(method or type(inner).forward)
    positions = list(signature.parameters)[1:]

    def original(self: Any, *args: Any, **inputs: Any) -> Any:
        return before(*args, **inputs) if method is None else method(self, *args, **inputs)

    proof = Proof(original, method or before)

    @functools.wraps(method or type(inner).forward)
    def forward(self: Any, *args: Any, grpo: Mapping[str, Any] | None = None, **inputs: Any) -> Any:
        if grpo is None:
            return original(self, *args, **inputs)
        inputs |= dict(zip(positions, args, strict=False))
        _check_given(grpo, names, inputs, self.config, options.get("check"))
        inputs |= {"return_dict": True, "use_cache": inputs.get("use_cache", False)}
        given = {"config": config, **options, **grpo}
        if from_logits:
            return _run(grpo_loss, token_log_probs, (original(self, **inputs).logits,), given)
        return _from_hidden(self, inputs, given, proof)

    del forward.__wrapped__  # accelerate's unwrap_model would follow it past this function
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.grpo_kernels_before = (before, method)  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)


def _from_hidden(model: Any, inputs: dict[str, Any], given: dict[str, Any], proof: Proof) -> Any:
    """Run the backbone, and the loss from its hidden states where the head's weight is whole."""
    keep = inputs.pop("logits_to_keep", 0)
    output = model.base_model(**inputs)
    hidden = output.last_hidden_state[:, slice(-keep, None) if isinstance(keep, int) else keep]
    return _with_head(model, hidden, output, inputs, given, proof)


@outside_graphs
def _with_head(
    model: Any, hidden: Tensor, output: Any, inputs: dict[str, Any], given: dict[str, Any], proof: Proof
) -> Any:
    head = head_of(model)
    row, logits = proof.row(model, head, hidden, given.get("mask")), []

    def run(states: Tensor) -> Any:
        weight, bias = weight_and_bias(head.layer)
        rows = (states, weight)
        out = _run(linear_grpo_loss, linear_token_log_probs, rows, {**head.transform, **given}, bias=bias)
        if row is not None:
            logits.append(row_logits(row, states, weight, bias, head))
        return out

    out = in_fsdp_units(model, head.layer, run, hidden)
    if row is not None:
        proof.compare(model, head, row, logits[0], inputs, output, hidden)
    return out


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``; returns ``model``."""
    inner = causal_model(model, "detach")
    _check_unprepared(inner, "detach")
    if not _attached(inner):
        fail("detach", "a model that attach() was called on", "one that is as it was")
    before, method = inner.forward.__func__.grpo_kernels_before
    del inner.forward
    if method is not type(inner).forward:  # somebody else's, from before
        inner.forward = before if method is None else types.MethodType(method, inner)
    return model


def _attached(inner: Any) -> bool:
    """Whether a model is attached, by what its forward is: a pickled one comes back with the original's name, without
    ours."""
    return hasattr(getattr(inner.forward, "__func__", None), "grpo_kernels_before")


def _check_unprepared(inner: Any, function: str) -> None:
    if hasattr(inner, "_original_forward"):  # accelerate's name
        fail(function, "a model before accelerator.prepare", "one that accelerate has wrapped")


def _check_given(grpo: object, names: tuple[str, ...], inputs: dict[str, Any], config: Any, check: bool | None) -> None:
    if not isinstance(grpo, Mapping):
        fail("attach", "grpo=dict(token_ids=..., ...)", type(grpo).__name__, error=TypeError)
    if inputs.get("labels") is not None:
        fail("attach", "grpo= or labels=", "both", hint="the loss is grpo's; add one of labels in a call of its own")
    _check_keywords("grpo=dict(...): the name", grpo, names)
    check_name("grpo=dict(output=...)", grpo.get("output", OUTPUTS[0]), OUTPUTS)
    if grpo.get("token_ids") is None:
        fail("attach", "grpo=dict(token_ids=..., ...)", f"only {', '.join(grpo) or 'an empty dict'}")
    wants_loss = grpo.get("output", OUTPUTS[0]) == "loss"
    if grpo.get("advantages") is None and wants_loss:
        hint = 'grpo=dict(token_ids=..., output="log_probs") asks for the log-probs of the old or reference pass'
        fail("attach", "grpo=dict(token_ids=..., advantages=..., ...)", "no advantages", hint=hint)
    if wants_loss:
        _check_router_loss(inputs, config)
    _check_shifted(grpo, inputs, grpo.get("check", check))
    _check_positions(grpo.get("cu_seqlens"), inputs.get("position_ids"), grpo.get("check", check))


def _check_keywords(kind: str, options: Mapping[str, object], names: Collection[str]) -> None:
    """Raise as ``check_options`` does; a keyword of the loss on the other side of ``from_logits`` is not misspelt."""
    of_logits, of_hidden = _keywords(grpo_loss), _keywords(linear_grpo_loss)
    for name in options:
        if name in names:
            continue
        if name in of_logits and name not in of_hidden:
            hint = f"attach(..., from_logits=True) runs the model's own head and grpo_loss, and takes {name}="
            fail("attach", "keywords of linear_grpo_loss", f"{name}=, which grpo_loss alone has", hint=hint)
        if name in of_hidden and name not in of_logits:
            hint = f"attach without from_logits=True runs linear_grpo_loss, and takes {name}="
            fail("attach", "keywords of grpo_loss", f"{name}=, which linear_grpo_loss alone has", hint=hint)
    check_options(kind, options, names)


def _check_router_loss(inputs: Mapping[str, Any], config: Any) -> None:
    """Raise where a mixture of experts' auxiliary loss would be dropped in silence."""
    config, asked = config.get_text_config(), inputs.get("output_router_logits")
    if asked is None:
        asked = getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", None) != 0
    if asked:
        hint = "output_router_logits=False in this call, or the auxiliary loss in a call of its own, without grpo="
        fail("attach", "a call without the router's auxiliary loss", "output_router_logits=True", hint=hint)


def _check_shifted(grpo: Mapping[str, Any], inputs: Mapping[str, Any], check: bool | None) -> None:
    """Raise unless ``token_ids`` are the inputs shifted by one, row t predicting token t + 1: others may have an
    accepted shape, and the wrong meaning. Contents are compared at live places, where they may be looked at."""
    ids, inputs_ids, keep = grpo["token_ids"], inputs.get("input_ids"), inputs.get("logits_to_keep", 0)
    if not (isinstance(ids, Tensor) and isinstance(inputs_ids, Tensor) and isinstance(keep, int)):
        return
    kept = inputs_ids[:, -keep:]
    rows = kept.shape[-1]
    if ids.dim() == 0 or ids.shape[-1] not in (rows, rows - 1) or ids.numel() * rows != kept.numel() * ids.shape[-1]:
        return
    hint = "token_ids, mask = align(input_ids, loss_mask): row t predicts token t + 1"
    if ids.shape[-1] == rows and not keep and grpo.get("cu_seqlens") is None:
        expected = f"token_ids (B, {rows - 1}) for input_ids (B, {rows}), whose last row predicts none"
        fail("attach", expected, f"as many ids, {tuple(ids.shape)}", grpo, hint=hint)
    if ids is inputs_ids or not _are_shifted(ids.reshape(kept.shape[0], -1), kept, grpo.get("mask"), check):
        fail("attach", "token_ids that are input_ids shifted by one", "other ids at live places", grpo, hint=hint)


def _check_positions(cu_seqlens: object, position_ids: object, check: bool | None) -> None:
    """Raise unless the model sees the sequences of a packed batch where the loss does."""
    if not (isinstance(cu_seqlens, Tensor) and isinstance(position_ids, Tensor)) or position_ids.dim() > 2:
        return
    positions = position_ids.reshape(-1)
    if not may_look(positions, check) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        return
    first, *inner, last = cu_seqlens.tolist()
    anew = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
    found = anew[(anew > first) & (anew < last)].tolist()
    bounds = sorted({bound for bound in inner if first < bound < last})
    if found != bounds:
        expected = f"position_ids that begin anew at the bounds of cu_seqlens, {bounds[:8]}"
        fail("attach", expected, f"ones that do at {found[:8]}", hint="positions count from 0 in each sequence")


def _are_shifted(ids: Tensor, kept: Tensor, mask: object, check: bool | None) -> bool:
    """Whether ids are the inputs shifted by one; true, too, where contents may not be looked at. A mask of another
    shape is left to the loss."""
    if not may_look(ids, check):
        return True
    fits = isinstance(mask, Tensor) and mask.numel() == ids.numel()
    live = mask.reshape(ids.shape) != 0 if isinstance(mask, Tensor) and fits else ids >= 0
    wanted = kept[:, 1:]
    same = ids[:, : wanted.shape[1]] == wanted  # the last row has nothing to be compared with
    return bool((same | ~live[:, : wanted.shape[1]]).all())


def _run(
    loss: Callable[..., LossOutput],
    log_probs: Callable[..., TokenLogProbs],
    rows: tuple[Tensor, ...],
    given: dict[str, Any],
    **head: Tensor | None,
) -> LossOutput | TokenLogProbs:
    """Return what was asked for, of logits or of hidden states and head."""
    token_ids, mask, output = given.pop("token_ids"), given.pop("mask", None), given.pop("output", OUTPUTS[0])
    receive = given.pop("receive", None)
    known = {name: given[name] for name in _keywords(log_probs) if name in given}
    if output == "log_probs":
        inside = _inside(token_ids, mask, given.get("cu_seqlens"), given.get("check"))
        out: LossOutput | TokenLogProbs = log_probs(*rows, token_ids, inside, **head, **known)
    else:
        if callable(given.get("token_weights")):
            known.pop("live_tokens", None)  # of the loss, which may skip rows
            inside = _inside(token_ids, mask, given.get("cu_seqlens"), given.get("check"))
            with torch.no_grad():
                given["token_weights"] = given["token_weights"](log_probs(*rows, token_ids, inside, **head, **known))
        out = loss(*rows, token_ids, given.pop("advantages"), mask, **head, **given)
    if receive is not None:
        receive(out)
    return out


def _inside(token_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, check: bool | None) -> Tensor | None:
    """Return the mask without what lies outside of every packed sequence."""
    if cu_seqlens is None:
        return mask
    mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    return read_live("attach", mask, cu_seqlens, check)


def causal_model(model: nn.Module, function: str) -> Any:
    """Return the model inside the wrappers of DDP, FSDP and PEFT."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") or hasattr(inner, "get_base_model"):
        wrapped = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "module", None)
        if wrapped is None:
            fail(function, "a causal model of transformers", type(model).__name__)
        inner = wrapped
    return inner
