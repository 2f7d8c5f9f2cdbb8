"""OpenRLHF 0.11.2: ``patch_openrlhf`` puts its policy loss, log-probs and entropies on these kernels.

OpenRLHF's options stay as they are: ``PolicyLoss`` reads them, and ``loss_config`` is the config that they make. KL and
entropy bonus stay OpenRLHF's, which adds them behind the policy loss. ``ray_plugin`` patches its Ray workers.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..calls.sighting import Turns, check_every
from .beside import beside
from .openrlhf_losses import loss_config as loss_config
from .openrlhf_losses import policy_loss_forward
from .operators import always, entropy_from_logits, logprobs_from_logits
from .patching import Change, Hook, Patch, Target, changes_of, check_parts, patch, when_imported

_TARGET = Target("openrlhf", "patch_openrlhf", ("0.11.2",))
_UTILS = "openrlhf.models.utils"


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probs of ``labels`` (B, T) in logits (B, T, V), fp32 (fp64 for fp64); as OpenRLHF's it divides the
    logits themselves by a temperature."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logprobs_from_logits(logits, labels, inplace_backward=False)


def _losses(turns: Turns) -> tuple[Hook, ...]:
    arguments = (
        *("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs"),
        *("dp_size", "batch_num_tokens", "global_batch_size"),
    )
    ours = beside(policy_loss_forward, turns, "OpenRLHF", of="log_probs")
    return (Hook("openrlhf.models.loss", "PolicyLoss.forward", arguments, ours),)


_OPERATORS = (
    Hook(_UTILS, "log_probs_from_logits", ("logits", "labels", "temperature"), always(log_probs_from_logits)),
    Hook(_UTILS, "compute_entropy", ("logits",), always(entropy_from_logits)),
)


def patch_openrlhf(losses: bool = True, operators: bool = True, shadow: int = 0) -> Patch:
    """Put OpenRLHF on these kernels, in this process. Nothing is changed unless every hook is what it is known to be.

    Args:
        losses: ``PolicyLoss.forward``; what it has no counterpart for raises where it is called, by name.
        operators: ``log_probs_from_logits`` and ``compute_entropy``, of which ``Actor.forward`` takes log-probs and
            entropies.
        shadow: calls of a policy loss between two comparisons with OpenRLHF's own of the same log-probs; 0 is none. The
            logger ``grpo_kernels.shadow`` gets a line of both losses and the difference of their gradients, at WARNING
            where that is more than rounding.

    Returns:
        Patch, whose ``undo()`` gives OpenRLHF its own back: ``with patch_openrlhf(): ...`` patches a block.

    Raises:
        ValueError: ``shadow`` that is not a number of calls; nothing to patch.
        TypeError: ``losses`` or ``operators`` that is neither on nor off.
        ImportError: no OpenRLHF.
        RuntimeError: another version; a hook that moved, has other arguments or was replaced; a patch that is on.
    """
    check_parts("patch_openrlhf", losses=losses, operators=operators)
    turns = Turns(check_every("patch_openrlhf", shadow))
    return patch(_TARGET, lambda: _changes(losses, operators, turns))


def patch_when_imported() -> None:
    """Patch OpenRLHF as soon as its models have been imported; of a process that never does (vLLM's), nothing is."""
    when_imported("openrlhf.models", patch_openrlhf)


def _changes(losses: bool, operators: bool, turns: Turns) -> Iterator[Change]:
    if operators:
        yield from changes_of(_TARGET, _OPERATORS)
    if losses:
        yield from changes_of(_TARGET, _losses(turns))
