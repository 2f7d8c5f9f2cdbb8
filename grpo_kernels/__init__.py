"""Fused GRPO-family policy losses: log-softmax, ratio, clip, KL, gradient and metrics in one pass over the logits."""

from . import advantages, hf, reference
from .advantages import value_loss
from .aggregation import Normalizer, normalizer
from .config import LossConfig
from .kl import KL
from .linear import LinearGRPOLoss, linear_grpo_loss, linear_token_log_probs
from .log_probs import token_log_probs
from .loss import GRPOLoss, grpo_loss
from .matching import MatchReport, match, shadow
from .metrics import Metrics
from .outputs import LossOutput, TokenLogProbs
from .rollout import MaskedIS, OffPolicyMask, Rejection, TruncatedIS
from .routes import Route
from .rows import align
from .support import MinP, TopK, TopP
from .surrogates import Cispo, Clip, DppoKL, DppoTV, Dro, Gmpo, Reinforce, Sapo, Surrogate, Unclipped, Vespo
from .surrogates.registration import register_surrogate

__version__ = "0.1.1"

__all__ = [
    "KL",
    "Cispo",
    "Clip",
    "DppoKL",
    "DppoTV",
    "Dro",
    "GRPOLoss",
    "Gmpo",
    "LinearGRPOLoss",
    "LossConfig",
    "LossOutput",
    "MaskedIS",
    "MatchReport",
    "Metrics",
    "MinP",
    "Normalizer",
    "OffPolicyMask",
    "Reinforce",
    "Rejection",
    "Route",
    "Sapo",
    "Surrogate",
    "TokenLogProbs",
    "TopK",
    "TopP",
    "TruncatedIS",
    "Unclipped",
    "Vespo",
    "advantages",
    "align",
    "grpo_loss",
    "hf",
    "linear_grpo_loss",
    "linear_token_log_probs",
    "match",
    "normalizer",
    "reference",
    "register_surrogate",
    "shadow",
    "token_log_probs",
    "value_loss",
]
