"""verl 0.9.1: ``patch_verl`` puts its policy losses, its log-probs and entropies, and its fused head on these kernels.

verl's configuration stays as it is: the loss modes that there is a config for (``loss_config``) are registered under
verl's own names, and report verl's metrics. KL and entropy bonus stay verl's, which adds them behind the policy loss.
verl is looked up when it is patched; ``grpo_kernels.integrations.verl_plugin`` is a module that does so.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from ..calls.sighting import Turns, check_every
from . import verl_operators
from .beside import beside
from .operators import always, entropy_from_logits, logprobs_from_logits
from .patching import Change, Hook, Patch, Place, Places, Target, changes_of, check, check_parts, moved, patch
from .verl_losses import LOSSES, MISSING, policy_loss_of
from .verl_losses import loss_config as loss_config

_TARGET = Target("verl", "patch_verl", ("0.9.1",))
_LOSSES = "verl.trainer.ppo.core_algos"
_LOSS_ARGUMENTS = (
    *("old_log_prob", "log_prob", "advantages", "response_mask"),
    *("loss_agg_mode", "config", "rollout_is_weights"),
)


_LOGITS, _HEAD = "verl.utils.torch_functional", "verl.utils.experimental.torch_functional"
_MEGATRON = "verl.utils.megatron.tensor_parallel"
_HOOKS = (
    Hook(
        *(_LOGITS, "logprobs_from_logits", ("logits", "labels", "inplace_backward")),
        always(logprobs_from_logits),
    ),
    Hook(_LOGITS, "entropy_from_logits", ("logits",), always(entropy_from_logits)),
    Hook(
        *(_LOGITS, "entropy_from_logits_with_chunking", ("logits", "chunk_size")),
        always(verl_operators.entropy_from_logits_with_chunking),
    ),
    Hook(
        *(_HEAD, "FusedLinearForPPO.forward"),
        ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
        always(verl_operators.fused_linear_for_ppo),
    ),
    Hook(
        *("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
        ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
        verl_operators.linear_cross_entropy_or,
        signature="LinearCrossEntropy.forward",
    ),
    *(
        Hook(_MEGATRON, function.__name__, arguments, always(function), needs="megatron.core")
        for function, arguments in (
            (verl_operators.vocab_parallel_log_probs_from_logits, ("logits", "labels")),
            (verl_operators.vocab_parallel_entropy, ("vocab_parallel_logits",)),
            (verl_operators.vocab_parallel_entropy_with_chunking, ("vocab_parallel_logits", "chunk_size")),
        )
    ),
)


def patch_verl(losses: bool = True, operators: bool = True, shadow: int = 0) -> Patch:
    """Put verl on these kernels, in this process. Nothing is changed unless every hook is what it is known to be.

    Args:
        losses: the policy losses of verl's registry, ``policy_loss.loss_mode``; modes without a counterpart
            ("clip_cov", "kl_cov", "bypass_mode") then raise where they are called.
        operators: ``logprobs_from_logits``, ``entropy_from_logits`` (chunked, too), and what ``use_fused_kernels``
            takes log-probs and entropies from: ``FusedLinearForPPO``, and ``linear_cross_entropy`` where it is not over
            ranks. Where Megatron is installed, its engine's as well: ``vocab_parallel_log_probs_from_logits`` and
            ``vocab_parallel_entropy``.
        shadow: calls of a policy loss, of all modes together, between two comparisons with verl's own of the same
            log-probs; 0 is none. The logger ``grpo_kernels.shadow`` gets a line of both losses and the difference of
            their gradients, at WARNING where that is more than rounding.

    Returns:
        Patch, whose ``undo()`` gives verl its own back: ``with patch_verl(): ...`` patches a block.

    Raises:
        ValueError: ``shadow`` that is not a number of calls; nothing to patch.
        TypeError: ``losses`` or ``operators`` that is neither on nor off.
        ImportError: no verl.
        RuntimeError: another version; a hook that moved, has other arguments or was replaced; a patch that is on.
    """
    check_parts("patch_verl", losses=losses, operators=operators)
    turns = Turns(check_every("patch_verl", shadow))
    return patch(_TARGET, lambda: _changes(losses, operators, turns))


def _changes(losses: bool, operators: bool, turns: Turns) -> Iterator[Change]:
    if operators:
        yield from changes_of(_TARGET, _HOOKS)
    if losses:
        yield from _loss_changes(turns)


def _loss_changes(turns: Turns) -> Iterator[Change]:
    module = importlib.import_module(_LOSSES)
    for name in ("register_policy_loss", "POLICY_LOSS_REGISTRY"):
        if not hasattr(module, name):
            moved(_TARGET, f"{_LOSSES}.{name}", "", "nothing")
    registry: dict[str, Any] = module.POLICY_LOSS_REGISTRY
    for mode in (*LOSSES, *MISSING):
        what, original = f'the policy loss "{mode}"', registry.get(mode)
        original = check(_TARGET, what, original, original, _LOSS_ARGUMENTS)
        ours = beside(policy_loss_of(mode), turns, "verl", of="log_prob")(original)
        yield Change(original, ours, _registered(module, mode))


def _registered(module: Any, mode: str) -> Places:
    def places(value: Any) -> Iterator[Place]:
        if module.POLICY_LOSS_REGISTRY.get(mode) is value:
            yield f'the policy loss "{mode}"', module.register_policy_loss(mode)

    return places
