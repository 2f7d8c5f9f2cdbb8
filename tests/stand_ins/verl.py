"""verl 0.9.1, as ``patch_verl`` knows it."""

from __future__ import annotations

from grpo_kernels.integrations.verl import patch_verl
from grpo_kernels.integrations.verl_losses import LOSSES, MISSING

from . import StandIn, moved_away, of_others, put

CORE = "verl.trainer.ppo.core_algos"
LOGITS = "verl.utils.torch_functional"
HEAD = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
ENGINE = "verl.workers.engine.fsdp.transformer_impl"
MEGATRON = "verl.utils.megatron.tensor_parallel"
MODES = (*LOSSES, *MISSING)
LOSS = "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=0, config=None, rollout_is_weights=None)"
REGISTRY = f"{CORE}.POLICY_LOSS_REGISTRY"
FORWARD = f"{HEAD}.FusedLinearForPPO.forward"

VERL = StandIn(
    "verl",
    patch_verl,
    {
        "verl": "__version__ = '0.9.1'",
        CORE: f"""
POLICY_LOSS_REGISTRY = {{}}
def register_policy_loss(name):
    def decorator(function):
        POLICY_LOSS_REGISTRY[name] = function
        return function
    return decorator
for mode in {MODES!r}:
    @register_policy_loss(mode)
    def loss{LOSS}: return "verl's"
del loss
""",
        LOGITS: """
def logprobs_from_logits(logits, labels, inplace_backward=True): return "verl's"
def entropy_from_logits(logits): return "verl's"
def entropy_from_logits_with_chunking(logits, chunk_size=2048): return "verl's"
""",
        HEAD: """
class FusedLinearForPPO:
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0): return "verl's"
""",
        KERNEL: """
class LinearCrossEntropy:
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None): pass
    @classmethod
    def apply(cls, *args): return "verl's", args
linear_cross_entropy = LinearCrossEntropy.apply
""",
        ENGINE: f"from {LOGITS} import logprobs_from_logits",
        "megatron.core": "",
        MEGATRON: """
def vocab_parallel_log_probs_from_logits(logits, labels): return "verl's"
def vocab_parallel_entropy(vocab_parallel_logits): return "verl's"
def vocab_parallel_entropy_with_chunking(vocab_parallel_logits, chunk_size=2048): return "verl's"
""",
    },
    losses=frozenset(f"{REGISTRY}.{mode}" for mode in MODES),
    operators=frozenset(
        {
            *(f"{LOGITS}.{name}" for name in ("logprobs_from_logits", "entropy_from_logits")),
            *(f"{LOGITS}.entropy_from_logits_with_chunking", FORWARD, f"{KERNEL}.linear_cross_entropy"),
            f"{ENGINE}.logprobs_from_logits",
            *(f"{MEGATRON}.vocab_parallel_{name}" for name in ("log_probs_from_logits", "entropy")),
            f"{MEGATRON}.vocab_parallel_entropy_with_chunking",
        }
    ),
    imported=f"{LOGITS}.entropy_from_logits",
    replaced=(f"{REGISTRY}.gspo", 'the policy loss "gspo"'),
    moves={
        "moved arguments": (
            of_others(f"{LOGITS}.entropy_from_logits", "(logits, temperature)", LOGITS),
            r"entropy_from_logits to be verl's \(logits\); got .*\(logits, temperature\)",
        ),
        "moved over ranks": (
            moved_away(f"{MEGATRON}.vocab_parallel_entropy"),
            r"tensor_parallel\.vocab_parallel_entropy; got nothing",
        ),
        "moved away": (moved_away(FORWARD), r"FusedLinearForPPO\.forward; got nothing"),
        "moved class": (moved_away(FORWARD.removesuffix(".forward")), r"FusedLinearForPPO\.forward; got nothing"),
        "somebody else's": (
            of_others(f"{LOGITS}.logprobs_from_logits", "(logits, labels, inplace_backward)"),
            "logprobs_from_logits to be verl's",
        ),
        "somebody else's loss": (of_others(f"{REGISTRY}.gspo", LOSS), r'the policy loss "gspo" to be verl\'s'),
        "unregistered": (moved_away(f"{REGISTRY}.cispo"), 'the policy loss "cispo"; got nothing'),
        "without registry": (moved_away(REGISTRY), "POLICY_LOSS_REGISTRY; got nothing"),
        "another kernel": (
            lambda verl: put(verl, f"{KERNEL}.linear_cross_entropy", lambda *args: None),
            r"linear_cross_entropy to be LinearCrossEntropy\.apply",
        ),
    },
)
