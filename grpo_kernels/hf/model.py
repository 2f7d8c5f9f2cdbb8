"""The model inside wrappers, and what its own forward is called with."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..objectives.checks import fail


def causal_model(model: nn.Module, function: str) -> Any:
    """Return the model inside the wrappers of DDP, FSDP and PEFT."""
    inner: Any = model
    if isinstance(model, nn.DataParallel):
        fail(function, "a model for one device, or in DistributedDataParallel", "nn.DataParallel")
    while not hasattr(inner, "get_output_embeddings") or hasattr(inner, "get_base_model"):
        wrapped = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "module", None)
        if wrapped is None:
            fail(function, "a causal model of transformers", type(model).__name__)
        inner = wrapped
    return inner


def signature_of(model: Any) -> inspect.Signature:
    """Return the signature of a model's forward; of its class's, where a patch passes its arguments on."""
    signature = inspect.signature(getattr(model.forward, "__func__", None) or type(model).forward)
    if any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in signature.parameters.values()):
        signature = inspect.signature(type(model).forward)
    return signature


def completed(signature: inspect.Signature, inputs: dict[str, Any], aux_loss_coef: Any) -> dict[str, Any]:
    """Return a call's inputs with what the loss needs of the model: named outputs, router logits; no cache unless it is
    asked for."""
    wanted: dict[str, Any] = {"return_dict": True, "use_cache": inputs.get("use_cache", False)}
    if aux_loss_coef is not None:
        wanted["output_router_logits"] = True
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.parameters.values())
    return inputs | {name: value for name, value in wanted.items() if open_ended or name in signature.parameters}


def check_dtypes(function: str, states: Tensor, weight: Tensor) -> None:
    """Raise where the model's own head would: norms in fp32 in front of a head in bf16, as preparing for quantised
    training leaves them."""
    if states.dtype != weight.dtype:
        hint = "torch.autocast around the call, as trainers have it"
        hint += "; or attach(..., head_dtype=torch.float32)" if function == "attach" else ""
        fail(function, f"hidden states of the head's dtype, {weight.dtype}", f"{states.dtype}", hint=hint)
