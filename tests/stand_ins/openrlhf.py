"""OpenRLHF 0.11.2, as ``patch_openrlhf`` knows it."""

from __future__ import annotations

from grpo_kernels.integrations.openrlhf import patch_openrlhf

from . import StandIn, moved_away, of_others

LOSS = "openrlhf.models.loss"
UTILS = "openrlhf.models.utils"
ACTOR = "openrlhf.models.actor"
FORWARD = f"{LOSS}.PolicyLoss.forward"

OPENRLHF = StandIn(
    "openrlhf",
    patch_openrlhf,
    {
        "openrlhf": "__version__ = '0.11.2'",
        LOSS: """
class PolicyLoss:
    def __init__(self, clip_eps_low=0.2, clip_eps_high=0.2, **options):
        defaults = dict(dual_clip=None, token_level_loss=True, policy_loss_type="ppo", is_correction_level="off")
        defaults |= dict(is_correction_mode="mask", is_correction_gating="ratio", is_correction_threshold=(0.5, 5.0))
        vars(self).update(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, **defaults | options)
    def forward(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
                batch_num_tokens=None, global_batch_size=None): return "OpenRLHF's"
""",
        UTILS: """
def log_probs_from_logits(logits, labels, temperature=1.0): return "OpenRLHF's"
def compute_entropy(logits): return "OpenRLHF's"
""",
        ACTOR: f"from {UTILS} import compute_entropy, log_probs_from_logits",
    },
    losses=frozenset({FORWARD}),
    operators=frozenset(
        f"{module}.{name}" for module in (UTILS, ACTOR) for name in ("log_probs_from_logits", "compute_entropy")
    ),
    imported=f"{UTILS}.compute_entropy",
    replaced=(FORWARD, r"openrlhf\.models\.loss\.PolicyLoss\.forward"),
    moves={
        "moved arguments": (
            of_others(f"{UTILS}.log_probs_from_logits", "(logits, labels)", UTILS),
            r"log_probs_from_logits to be openrlhf's \(logits, labels, temperature\); got .*\(logits, labels\)",
        ),
        "moved away": (moved_away(FORWARD), r"PolicyLoss\.forward; got nothing"),
        "moved class": (moved_away(FORWARD.removesuffix(".forward")), r"PolicyLoss\.forward; got nothing"),
        "somebody else's": (of_others(f"{UTILS}.compute_entropy", "(logits)"), "compute_entropy to be openrlhf's"),
    },
)
