"""Hugging Face causal models: the loss inside ``forward``, from hidden states.

``attach(model)`` gives the model's forward one more keyword, ``grpo``; with it the head is never applied to all rows,
and hooks of DDP, FSDP, ZeRO and gradient checkpointing fire as for any forward. Needs transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .checks import fail
from .config import LossConfig, check_name, resolve_config
from .linear import linear_grpo_loss, linear_token_log_probs
from .outputs import LossOutput, TokenLogProbs

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
    return tuple(inspect.signature(function).parameters)


_NAMES = tuple(name for name in _keywords(linear_grpo_loss) if name not in ("hidden", "weight", "bias", "config"))


def attach(model: nn.Module, config: LossConfig | str = "grpo", **options: Any) -> nn.Module:
    """Let ``model(..., grpo=dict(...))`` return the loss of ``linear_grpo_loss`` instead of logits.

        attach(model, "dapo", temperature=0.9)
        out = model(input_ids=ids, attention_mask=attention, grpo=dict(token_ids=token_ids, advantages=A, mask=mask))
        out.loss.backward()

    ``grpo`` holds keywords of ``linear_grpo_loss``; without ``advantages`` the call returns ``linear_token_log_probs``
    (the old or reference pass). ``token_ids`` are (B, L-1) from ``align``, or (B, R) with ``logits_to_keep=R + 1``.
    Weight, bias, scale and softcap of the head are the model's. Without ``grpo`` nothing changes. A mixture of experts'
    auxiliary loss is not part of the result.

    Args:
        model: a causal model of transformers, bare or inside PEFT, DDP or FSDP wrappers. Attach before
            ``accelerator.prepare``.
        config: a LossConfig or a preset's name.
        **options: keywords of ``linear_grpo_loss`` to fix (temperature, grad_scale, chunk_bytes, ...).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an architecture whose head is not known, a head that is not a plain linear layer (LoRA on the head,
            quantised), a model that is attached already.
    """
    resolved = resolve_config(config)
    inner = _causal_model(model)
    if hasattr(inner, "_grpo_original_forward"):
        fail("attach", "a model that is not attached", "one that is", hint="grpo_kernels.hf.detach(model) first")
    if hasattr(inner, "_original_forward"):  # accelerate's name
        fail("attach", "a model before accelerator.prepare", "one that accelerate has wrapped")
    head = _head(inner)
    transform = _transform(inner)
    for name in options:
        check_name("attach: the option", name, _NAMES)
    original = inner.forward

    @functools.wraps(original)
    def forward(*args: Any, grpo: Mapping[str, Any] | None = None, **inputs: Any) -> Any:
        if grpo is None:
            return original(*args, **inputs)
        keep = inputs.pop("logits_to_keep", 0)
        hidden = inner.base_model(*args, **{"use_cache": False, **inputs}).last_hidden_state
        return _loss(resolved, head, hidden[:, -keep:] if keep else hidden, {**transform, **options, **grpo})

    inner._grpo_original_forward = original
    inner.forward = forward
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``; returns ``model``."""
    inner = _causal_model(model)
    if not hasattr(inner, "_grpo_original_forward"):
        fail("detach", "a model that attach() was called on", "one that is as it was")
    del inner._grpo_original_forward
    del inner.forward
    return model


def _loss(config: LossConfig, head: nn.Linear, hidden: Tensor, options: dict[str, Any]) -> LossOutput | TokenLogProbs:
    for name in options:
        check_name("grpo=dict(...): the name", name, _NAMES)
    if "token_ids" not in options:
        fail("attach", "grpo=dict(token_ids=..., ...)", f"only {', '.join(options) or 'an empty dict'}")
    token_ids, mask = options.pop("token_ids"), options.pop("mask", None)
    options["bias"] = head.bias
    if "advantages" in options:
        advantages = options.pop("advantages")
        return linear_grpo_loss(hidden, head.weight, token_ids, advantages, mask, config=config, **options)
    options = {name: value for name, value in options.items() if name in _keywords(linear_token_log_probs)}
    return linear_token_log_probs(hidden, head.weight, token_ids, mask, **options)


def _causal_model(model: nn.Module) -> Any:
    """Inside the wrappers of DDP, FSDP and PEFT."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") or hasattr(inner, "get_base_model"):
        wrapped = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "module", None)
        if wrapped is None:
            fail("attach", "a causal model of transformers", type(model).__name__)
        inner = wrapped
    return inner


def _head(inner: Any) -> nn.Linear:
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        hint = "exclude it from LoRA's target modules, or train without attach()"
        fail("attach", "a head that is a plain nn.Linear", f"{type(head).__module__}.{type(head).__name__}", hint=hint)
    return head


def _transform(inner: Any) -> dict[str, float]:
    """How this model's logits follow from its head."""
    config = inner.config
    kind = config.model_type
    if kind not in MODEL_TYPES:
        expected = f"one of the architectures {', '.join(MODEL_TYPES)}"
        hint = "linear_grpo_loss(hidden, head.weight, ...) serves any model, given its logit_scale and logit_softcap"
        fail("attach", expected, f"{kind} ({type(inner).__name__})", hint=hint)
    if kind in _SCALED:
        return {"logit_scale": float(_SCALED[kind](config))}
    cap = config.final_logit_softcapping if kind in _SOFTCAPPED else None
    return {} if cap is None else {"logit_softcap": float(cap)}
