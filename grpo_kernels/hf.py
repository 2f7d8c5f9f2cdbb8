"""Hugging Face causal models: the loss inside ``forward``, from hidden states.

``attach(model)`` gives the model's forward one more keyword, ``grpo``; with it the head is never applied to all rows,
and hooks of DDP, FSDP, ZeRO and gradient checkpointing fire as for any forward. Needs transformers.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_name, fail
from .config import LossConfig
from .linear import linear_grpo_loss, linear_token_log_probs
from .log_probs import token_log_probs
from .loss import grpo_loss
from .outputs import LossOutput, TokenLogProbs
from .presets import resolve_config
from .rows import Packed

_PLAIN = (
    *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi", "phi3"),
    *("olmo", "olmo2", "olmo3", "smollm3", "starcoder2", "stablelm", "gpt2", "gpt_neox", "glm", "glm4", "helium"),
    *("deepseek_v3", "gpt_oss", "nemotron", "seed_oss", "ernie4_5", "exaone4"),
)
_SOFTCAPPED = ("gemma2", "gemma3_text")
_SCALED: Mapping[str, Callable[[Any], float]] = {
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
    "granite": lambda config: 1 / config.logits_scaling,
    "granitemoe": lambda config: 1 / config.logits_scaling,
}
MODEL_TYPES = tuple(sorted((*_PLAIN, *_SOFTCAPPED, *_SCALED)))
"""``model.config.model_type`` whose head is known; a test compares each with the model's own logits."""


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Without those that the model provides."""
    names = inspect.signature(function).parameters
    return tuple(name for name in names if name not in ("hidden", "weight", "bias", "logits", "config"))


_TOKENS = ("token_ids", "advantages", "mask")
"""Of a call, never of the model."""


def attach(
    model: nn.Module, config: LossConfig | str = "grpo", *, from_logits: bool = False, **options: Any
) -> nn.Module:
    """Let ``model(..., grpo=dict(...))`` return the loss of ``linear_grpo_loss`` instead of logits.

        attach(model, "dapo", temperature=0.9)
        out = model(input_ids=ids, attention_mask=attention, grpo=dict(token_ids=token_ids, advantages=A, mask=mask))
        out.loss.backward()

    ``grpo`` holds keywords of ``linear_grpo_loss``; without ``advantages`` the call returns ``linear_token_log_probs``
    (the old or reference pass). ``token_ids`` are (B, L-1) from ``align``, or (B, R) with ``logits_to_keep=R + 1``.
    ``token_weights`` may be a function of the ``TokenLogProbs`` of the policy, which are computed first then, without
    gradient; ``config`` replaces the one attached; ``receive`` is a function that is called with the result before
    wrappers see it. Weight, bias, scale and softcap of the head are the model's. Without ``grpo`` nothing changes. A
    mixture of experts' auxiliary loss is not part of the result.

    FSDP's mixed precision rounds the tensors of a plain dict on the way in, and may round outputs on the way out:
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
            quantised), a model that is attached already.
    """
    resolved = resolve_config(config)
    inner = causal_model(model, "attach")
    if _attached(inner):
        fail("attach", "a model that is not attached", "one that is", hint="grpo_kernels.hf.detach(model) first")
    _check_unprepared(inner, "attach")
    names = [name for name in _keywords(grpo_loss if from_logits else linear_grpo_loss) if name not in _TOKENS]
    for name in options:
        check_name("attach: the option", name, names)
    bind(inner, resolved, from_logits, options)
    return model


def bind(inner: Any, config: LossConfig, from_logits: bool, options: Mapping[str, Any]) -> None:
    """``attach`` without its checks, over whatever ``inner.forward`` is."""
    loss, log_probs = (grpo_loss, token_log_probs) if from_logits else (linear_grpo_loss, linear_token_log_probs)
    names, known = (*_keywords(loss), "config", "receive"), _keywords(log_probs)
    fixed = dict(options)
    if not from_logits:
        _head(inner)
        fixed = {**_transform(inner), **fixed}
    before = inner.forward
    method = getattr(before, "__func__", None)
    signature = inspect.signature(method or type(inner).forward)
    positions = list(signature.parameters)[1:]

    def original(self: Any, *args: Any, **inputs: Any) -> Any:
        return before(*args, **inputs) if method is None else method(self, *args, **inputs)

    @functools.wraps(method or type(inner).forward)
    def forward(self: Any, *args: Any, grpo: Mapping[str, Any] | None = None, **inputs: Any) -> Any:
        if grpo is None:
            return original(self, *args, **inputs)
        _check_given(grpo, names, inputs)
        inputs |= dict(zip(positions, args, strict=False))
        inputs |= {"return_dict": True, "use_cache": inputs.get("use_cache", False)}
        given = {"config": config, **fixed, **grpo}
        receive = given.pop("receive", None)
        if from_logits:
            rows: tuple[Tensor, ...] = (original(self, **inputs).logits,)
            head: dict[str, Any] = {}
        else:
            keep = inputs.pop("logits_to_keep", 0)
            hidden = self.base_model(**inputs).last_hidden_state
            weight, bias = _whole(_head(self))  # looked up anew: FSDP and PEFT may replace it after attach
            rows = (hidden[:, slice(-keep, None) if isinstance(keep, int) else keep], weight)
            head = {"bias": bias}
        out = _run(functools.partial(loss, *rows, **head), functools.partial(log_probs, *rows, **head), known, given)
        if receive is not None:
            receive(out)
        return out

    del forward.__wrapped__  # accelerate's unwrap_model would follow it past this function
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.grpo_kernels_before = method or before  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``; returns ``model``."""
    inner = causal_model(model, "detach")
    _check_unprepared(inner, "detach")
    if not _attached(inner):
        fail("detach", "a model that attach() was called on", "one that is as it was")
    before = inner.forward.__func__.grpo_kernels_before
    del inner.forward
    if before is not type(inner).forward:  # somebody else's, from before
        inner.forward = types.MethodType(before, inner) if inspect.isfunction(before) else before
    return model


def _attached(inner: Any) -> bool:
    """By what forward is: a pickled model comes back with the name of the original, and without ours."""
    return hasattr(getattr(inner.forward, "__func__", None), "grpo_kernels_before")


def _check_unprepared(inner: Any, function: str) -> None:
    if hasattr(inner, "_original_forward"):  # accelerate's name
        fail(function, "a model before accelerator.prepare", "one that accelerate has wrapped")


def _check_given(grpo: object, names: tuple[str, ...], inputs: dict[str, Any]) -> None:
    if not isinstance(grpo, Mapping):
        fail("attach", "grpo=dict(token_ids=..., ...)", type(grpo).__name__, error=TypeError)
    if inputs.get("labels") is not None:
        fail("attach", "grpo= or labels=", "both", hint="the loss is grpo's; add one of labels in a call of its own")
    for name, value in grpo.items():
        check_name("grpo=dict(...): the name", name, names)
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            hint = (
                "rounded log-probs make wrong ratios; FSDP's mixed precision rounds what is in a plain dict: "
                "grpo=types.MappingProxyType(dict(...))"
            )
            fail("attach", f"grpo[{name!r}] in float32", str(value.dtype), hint=hint)


def _run(
    loss: Callable[..., LossOutput],
    log_probs: Callable[..., TokenLogProbs],
    names: tuple[str, ...],
    given: dict[str, Any],
) -> LossOutput | TokenLogProbs:
    """``names``: what ``log_probs`` accepts of what was given."""
    if given.get("token_ids") is None:
        fail("attach", "grpo=dict(token_ids=..., ...)", f"only {', '.join(given) or 'an empty dict'}")
    token_ids, mask = given.pop("token_ids"), given.pop("mask", None)
    known = {name: value for name, value in given.items() if name in names}
    inside = _inside(token_ids, mask, given.get("cu_seqlens"))
    if given.get("advantages") is None:
        return log_probs(token_ids, inside, **known)
    if callable(given.get("token_weights")):
        known.pop("live_tokens", None)  # of the loss, which may skip rows
        with torch.no_grad():
            given["token_weights"] = given["token_weights"](log_probs(token_ids, inside, **known))
    return loss(token_ids, given.pop("advantages"), mask, **given)


def _inside(token_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """The mask without what lies outside of every packed sequence."""
    if cu_seqlens is None:
        return mask
    inside = Packed.of(cu_seqlens.to(torch.int64), token_ids.shape[-1]).inside().view(token_ids.shape)
    return inside if mask is None else inside & (mask != 0)


def causal_model(model: nn.Module, function: str) -> Any:
    """Inside the wrappers of DDP, FSDP and PEFT."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") or hasattr(inner, "get_base_model"):
        wrapped = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "module", None)
        if wrapped is None:
            fail(function, "a causal model of transformers", type(model).__name__)
        inner = wrapped
    return inner


def _whole(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, gathered where FSDP2 has sharded them."""
    weight, bias = (
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in (head.weight, head.bias)
    )
    return weight, bias


def _head(inner: Any) -> nn.Linear:
    head = inner.get_output_embeddings()
    if saved := getattr(head, "modules_to_save", None):  # PEFT trains a copy of the whole layer
        head = saved[head.active_adapters[0]]
    if head is None:
        fail("attach", "a causal model of transformers", f"{type(inner).__name__}, which has no head")
    if type(head) is not nn.Linear and type(head).__name__ != "FSDPLinear":
        hint = "exclude it from LoRA's target modules, or attach(..., from_logits=True)"
        fail("attach", "a head that is a plain nn.Linear", f"{type(head).__module__}.{type(head).__name__}", hint=hint)
    return head


def _transform(inner: Any) -> dict[str, float]:
    """How this model's logits follow from its head."""
    config = inner.config
    kind = config.model_type
    if kind not in MODEL_TYPES:
        expected = f"one of the architectures {', '.join(MODEL_TYPES)}"
        hint = (
            "attach(..., from_logits=True) runs the model's own head; linear_grpo_loss(hidden, head.weight, ...) "
            "serves any model, given its logit_scale and logit_softcap"
        )
        fail("attach", expected, f"{kind} ({type(inner).__name__})", hint=hint)
    if kind in _SCALED:
        return {"logit_scale": float(_SCALED[kind](config))}
    cap = config.final_logit_softcapping if kind in _SOFTCAPPED else None
    return {} if cap is None else {"logit_softcap": float(cap)}
