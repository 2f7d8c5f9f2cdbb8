"""What a call of an attached model returns, beside what the losses return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..calls.outputs import LossOutput, TokenLogProbs
from ..objectives.checks import fail
from ..objectives.settings import as_float
from .traced import TracedLogits

_ASKED = ("output_hidden_states", "output_attentions", "output_router_logits", "use_cache")
"""Inputs by which more than logits is asked of a model."""


class ModelLogProbs(NamedTuple):
    """``TokenLogProbs`` of a call that asked for more."""

    log_probs: Tensor
    entropy: Tensor
    aux_loss: Tensor | None
    model_output: Any
    """The model's own output, without logits."""


def with_model_output(
    out: LossOutput | TokenLogProbs,
    output: Any,
    model: Any,
    inputs: Mapping[str, Any],
    aux_loss_coef: float | Tensor | None,
    micro_batches: int,
) -> LossOutput | TokenLogProbs | ModelLogProbs:
    """Return ``out`` with what else was asked of the model, and the auxiliary loss added if a coefficient says so."""
    named = output if isinstance(output, Mapping) else {}
    aux = named.get("aux_loss")
    if aux_loss_coef is not None and aux is None:
        hint = "leave aux_loss_coef out for a model that is no mixture of experts"
        fail("attach", "a model whose forward returns aux_loss", type(model).__name__, hint=hint)
    config = model.config.get_text_config()
    defaults = {name: name != "use_cache" and getattr(config, name, False) for name in _ASKED}
    if not named or (aux is None and not any(inputs.get(name, default) for name, default in defaults.items())):
        return out
    rest = type(output)(
        **{
            name: value
            for name, value in named.items()
            if name not in ("logits", "loss") and not isinstance(value, TracedLogits)
        }
    )
    if isinstance(out, TokenLogProbs):
        return ModelLogProbs(*out, aux_loss=aux, model_output=rest)
    if aux_loss_coef is not None and aux is not None:
        out = out._replace(loss=out.loss + as_float(aux_loss_coef) * aux.to(out.loss) / micro_batches)
    return out._replace(aux_loss=aux, model_output=rest)
