"""Fused GRPO-family policy losses: log-softmax, ratio, clip, KL, gradient and metrics in one pass over the logits."""

from . import advantages, hf, reference
from .advantages import value_loss
from .aggregation import normalizer
from .config import KL, LossConfig
from .linear import LinearGRPOLoss, linear_grpo_loss, linear_token_log_probs
from .log_probs import token_log_probs
from .loss import GRPOLoss, grpo_loss
from .matching import MatchReport, match, shadow
from .metrics import Metrics
from .outputs import LossOutput, TokenLogProbs
from .rows import align
from .surrogates import Clip, Reinforce, Surrogate, Unclipped

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Clip",
    "GRPOLoss",
    "LinearGRPOLoss",
    "LossConfig",
    "LossOutput",
    "MatchReport",
    "Metrics",
    "Reinforce",
    "Surrogate",
    "TokenLogProbs",
    "Unclipped",
    "advantages",
    "align",
    "grpo_loss",
    "hf",
    "linear_grpo_loss",
    "linear_token_log_probs",
    "match",
    "normalizer",
    "reference",
    "shadow",
    "token_log_probs",
    "value_loss",
]
