"""SkyRL 0.3.0: ``patch_skyrl`` puts its policy losses, log-probs and entropies on these kernels.

SkyRL's configuration stays as it is: the losses that there is a config for (``loss_config``) are registered under
SkyRL's own names, and report SkyRL's metrics. KL and entropy bonus stay SkyRL's, which adds them behind the policy
loss. ``ray_plugin`` patches its Ray workers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..calls.sighting import Turns, check_every
from ..log_probs import token_log_probs
from .beside import beside
from .operators import always, logprobs_from_logits
from .patching import (
    Change,
    Hook,
    Patch,
    Place,
    Places,
    Target,
    changes_of,
    check,
    check_parts,
    moved,
    patch,
    when_imported,
)
from .skyrl_losses import LOSSES, MISSING, policy_loss_of
from .skyrl_losses import loss_config as loss_config

_TARGET = Target("skyrl", "patch_skyrl", ("0.3.0",))
_UTILS = "skyrl.backends.skyrl_train.utils"
_LOSSES, _LOGITS = f"{_UTILS}.ppo_utils", f"{_UTILS}.torch_utils"
_CORRECTION = f"{_UTILS}.off_policy_correction_utils"
_LOSS_ARGUMENTS = ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs")


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    """Return the entropy of every row of logits (B, T, V), nats, fp32 (fp64 for fp64), 0 where ``attention_mask`` is;
    it needs no memory that chunks would save."""
    if attention_mask is not None and attention_mask.shape != logits.shape[:2]:
        raise ValueError(
            f"chunked_entropy_from_logits: expected attention_mask {tuple(logits.shape[:2])}; got "
            f"{tuple(attention_mask.shape)}."
        )
    some_token = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    with contextlib.nullcontext() if requires_grad else torch.no_grad():
        return token_log_probs(logits, some_token, attention_mask).entropy


_OPERATORS = (
    Hook(
        *(_LOGITS, "logprobs_from_logits", ("logits", "labels", "inplace_backward")),
        always(logprobs_from_logits),
    ),
    Hook(
        *(_LOGITS, "chunked_entropy_from_logits", ("logits", "requires_grad", "attention_mask", "chunk_size")),
        always(chunked_entropy_from_logits),
    ),
)


def patch_skyrl(losses: bool = True, operators: bool = True, shadow: int = 0) -> Patch:
    """Put SkyRL on these kernels, in this process. Nothing is changed unless every hook is what it is known to be.

    Args:
        losses: the policy losses of SkyRL's registry, ``policy_loss_type``; those without a counterpart ("clip_cov",
            "kl_cov") then raise where they are called.
        operators: ``logprobs_from_logits`` and ``chunked_entropy_from_logits``, of which its model wrapper takes
            log-probs and entropies.
        shadow: calls of a policy loss, of all of them together, between two comparisons with SkyRL's own of the same
            log-probs; 0 is none. The logger ``grpo_kernels.shadow`` gets a line of both losses and the difference of
            their gradients, at WARNING where that is more than rounding.

    Returns:
        Patch, whose ``undo()`` gives SkyRL its own back: ``with patch_skyrl(): ...`` patches a block.

    Raises:
        ValueError: ``shadow`` that is not a number of calls; nothing to patch.
        TypeError: ``losses`` or ``operators`` that is neither on nor off.
        ImportError: no SkyRL.
        RuntimeError: another version; a hook that moved, has other arguments or was replaced; a patch that is on.
    """
    check_parts("patch_skyrl", losses=losses, operators=operators)
    turns = Turns(check_every("patch_skyrl", shadow))
    return patch(_TARGET, lambda: _changes(losses, operators, turns))


def patch_when_imported() -> None:
    """Patch SkyRL as soon as its losses have been imported; of a process that never does (vLLM's), nothing is."""
    when_imported(_LOSSES, patch_skyrl)


def _changes(losses: bool, operators: bool, turns: Turns) -> Iterator[Change]:
    if operators:
        yield from changes_of(_TARGET, _OPERATORS)
    if losses:
        yield from _loss_changes(turns)


def _loss_changes(turns: Turns) -> Iterator[Change]:
    found = getattr(importlib.import_module(_LOSSES), "PolicyLossRegistry", None)
    registry: Any = getattr(found, "_functions", None)
    if registry is None:
        moved(_TARGET, f"{_LOSSES}.PolicyLossRegistry._functions", "", "nothing")
    correction: Any = vars(importlib.import_module(_CORRECTION)).get("compute_off_policy_correction")
    arguments = ("old_log_probs", "rollout_logprobs", "loss_mask", "off_policy_correction")
    check(_TARGET, f"{_CORRECTION}.compute_off_policy_correction", correction, correction, arguments)
    for name in (*LOSSES, *MISSING):
        what, original = f'the policy loss "{name}"', registry.get(name)
        original = check(_TARGET, what, original, original, _LOSS_ARGUMENTS)
        ours = beside(policy_loss_of(name, correction), turns, "SkyRL", of="log_probs")(original)
        yield Change(original, ours, _registered(registry, name))


def _registered(registry: dict[str, Any], name: str) -> Places:
    def places(value: Any) -> Iterator[Place]:
        if registry.get(name) is value:
            yield f'the policy loss "{name}"', functools.partial(registry.__setitem__, name)

    return places
