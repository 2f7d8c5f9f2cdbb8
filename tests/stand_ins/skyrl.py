"""SkyRL 0.3.0, as ``patch_skyrl`` knows it."""

from __future__ import annotations

from grpo_kernels.integrations.skyrl import patch_skyrl
from grpo_kernels.integrations.skyrl_losses import LOSSES, MISSING

from . import StandIn, moved_away, of_others

UTILS = "skyrl.backends.skyrl_train.utils"
CORE = f"{UTILS}.ppo_utils"
LOGITS = f"{UTILS}.torch_utils"
CORRECTION = f"{UTILS}.off_policy_correction_utils"
WRAPPER = "skyrl.backends.skyrl_train.workers.model_wrapper"
NAMES = (*LOSSES, *MISSING)
LOSS = "(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None)"
REGISTRY = f"{CORE}.PolicyLossRegistry._functions"

SKYRL = StandIn(
    "skyrl",
    patch_skyrl,
    {
        "skyrl": "__version__ = '0.3.0'",
        CORE: f"""
class PolicyLossRegistry:
    _functions = {{}}
for name in {NAMES!r}:
    def loss{LOSS}: return "SkyRL's"
    PolicyLossRegistry._functions[name] = loss
del loss
""",
        CORRECTION: """
def compute_off_policy_correction(old_log_probs, rollout_logprobs, loss_mask, off_policy_correction):
    return 2 * loss_mask, {"is_ratio_mean": 1.0}, loss_mask
""",
        LOGITS: """
def logprobs_from_logits(logits, labels, inplace_backward=True): return "SkyRL's"
def chunked_entropy_from_logits(logits, requires_grad=False, attention_mask=None, chunk_size=1024): return "SkyRL's"
""",
        WRAPPER: f"from {LOGITS} import chunked_entropy_from_logits, logprobs_from_logits",
    },
    losses=frozenset(f"{REGISTRY}.{name}" for name in NAMES),
    operators=frozenset(
        f"{module}.{name}"
        for module in (LOGITS, WRAPPER)
        for name in ("logprobs_from_logits", "chunked_entropy_from_logits")
    ),
    imported=f"{LOGITS}.logprobs_from_logits",
    replaced=(f"{REGISTRY}.gspo", 'the policy loss "gspo"'),
    moves={
        "moved arguments": (
            of_others(f"{LOGITS}.logprobs_from_logits", "(logits, labels)", LOGITS),
            r"logprobs_from_logits to be skyrl's \(logits, labels, inplace_backward\); got .*\(logits, labels\)",
        ),
        "moved away": (moved_away(f"{LOGITS}.logprobs_from_logits"), r"torch_utils\.logprobs_from_logits; got nothing"),
        "somebody else's loss": (of_others(f"{REGISTRY}.gspo", LOSS), r'the policy loss "gspo" to be skyrl\'s'),
        "unregistered": (moved_away(f"{REGISTRY}.sapo"), 'the policy loss "sapo"; got nothing'),
        "without registry": (moved_away(REGISTRY), r"PolicyLossRegistry\._functions; got nothing"),
        "without a class": (moved_away(f"{CORE}.PolicyLossRegistry"), r"PolicyLossRegistry\._functions; got nothing"),
        "another correction": (
            of_others(f"{CORRECTION}.compute_off_policy_correction", "(loss, old_log_probs)", CORRECTION),
            "compute_off_policy_correction to be skyrl's",
        ),
    },
)
