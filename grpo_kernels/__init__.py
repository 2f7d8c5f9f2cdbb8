"""Fused GRPO-family policy losses: log-softmax, ratio, clip, KL, gradient and metrics in one pass over the logits."""

from . import advantages, hf, reference
from . import surrogates as surrogates
from .calls.outputs import LossOutput, TokenLogProbs
from .calls.routes import Route
from .calls.support import MinP, TopK, TopP
from .calls.tokens import align
from .linear import LinearGRPOLoss, linear_grpo_loss, linear_token_log_probs
from .log_probs import token_log_probs
from .loss import GRPOLoss, grpo_loss
from .matching import MatchReport, match, shadow
from .objectives.advantages import value_loss
from .objectives.aggregation import Normalizer, normalizer
from .objectives.config import LossConfig
from .objectives.kl import KL
from .objectives.metrics import Metrics
from .objectives.rollout import MaskedIS, OffPolicyMask, Rejection, TruncatedIS
from .objectives.surrogates import Cispo, Clip, DppoKL, DppoTV, Dro, Gmpo, Reinforce, Sapo, Surrogate, Unclipped, Vespo
from .objectives.surrogates.registration import register_surrogate

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
