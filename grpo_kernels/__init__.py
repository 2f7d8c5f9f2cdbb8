"""Fused GRPO-family policy losses: log-softmax, ratio, clip, KL, gradient and metrics in one pass over the logits."""

from __future__ import annotations

from . import interrupt as interrupt  # before whatever imports PyTorch

# isort: split
import importlib
from typing import TYPE_CHECKING, Any

from . import advantages, hf
from . import surrogates as surrogates
from .backends.blocks import empty_cache
from .calls.context import ContextPart, split_context
from .calls.outputs import LossOutput, TokenLogProbs
from .calls.packing import collate, pack, unpack
from .calls.recorded import Recorded
from .calls.routes import Route
from .calls.support import MinP, TopK, TopP
from .calls.teacher import Teacher
from .calls.tokens import align
from .divergences import TokenDivergence, linear_token_divergence, token_divergence
from .linear import LinearGRPOLoss, linear_grpo_loss, linear_token_log_probs
from .log_probs import token_log_probs
from .loss import GRPOLoss, grpo_loss
from .objectives.advantages import value_loss
from .objectives.aggregation import Constant, GroupMean, SequenceMean, SequenceSum, TokenMean
from .objectives.config import LossConfig
from .objectives.divergence import Divergence
from .objectives.kl import KL
from .objectives.metrics import Metrics
from .objectives.normalizer import Normalizer, normalizer
from .objectives.rollout import MaskedIS, OffPolicyMask, Rejection, TruncatedIS
from .objectives.surrogates import Cispo, Clip, DppoKL, DppoTV, Dro, Gmpo, Reinforce, Sapo, Surrogate, Unclipped, Vespo
from .objectives.surrogates.registration import register_surrogate
from .policy import policy_loss

if TYPE_CHECKING:
    from . import reference
    from .matching import MatchReport, match, shadow

__version__ = "0.1.1"

__all__ = [
    "KL",
    "Cispo",
    "Clip",
    "Constant",
    "ContextPart",
    "Divergence",
    "DppoKL",
    "DppoTV",
    "Dro",
    "GRPOLoss",
    "Gmpo",
    "GroupMean",
    "LinearGRPOLoss",
    "LossConfig",
    "LossOutput",
    "MaskedIS",
    "MatchReport",
    "Metrics",
    "MinP",
    "Normalizer",
    "OffPolicyMask",
    "Recorded",
    "Reinforce",
    "Rejection",
    "Route",
    "Sapo",
    "SequenceMean",
    "SequenceSum",
    "Surrogate",
    "Teacher",
    "TokenDivergence",
    "TokenLogProbs",
    "TokenMean",
    "TopK",
    "TopP",
    "TruncatedIS",
    "Unclipped",
    "Vespo",
    "advantages",
    "align",
    "collate",
    "empty_cache",
    "grpo_loss",
    "hf",
    "linear_grpo_loss",
    "linear_token_divergence",
    "linear_token_log_probs",
    "match",
    "normalizer",
    "pack",
    "policy_loss",
    "reference",
    "register_surrogate",
    "shadow",
    "split_context",
    "token_divergence",
    "token_log_probs",
    "unpack",
    "value_loss",
]

_LAZY = {"match": "matching", "shadow": "matching", "MatchReport": "matching", "reference": ""}
"""What is imported when it is first asked for, and the module that has it: the loss needs none of them."""


def __getattr__(name: str) -> Any:
    """Import a lazy name. It is kept, so that this runs once for each."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name] or name}", __name__)
    value = getattr(module, name) if _LAZY[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return what is public, lazy names too, and not what this module imports for itself."""
    return sorted({*__all__, "surrogates", *(name for name in globals() if name.startswith("__"))})
