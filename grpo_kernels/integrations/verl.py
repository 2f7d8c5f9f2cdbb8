"""verl 0.9.1: ``patch_verl`` puts its policy losses, its log-probs and entropies, and its fused head on these kernels.

verl's configuration stays as it is: the loss modes that there is a config for (``loss_config``) are registered under
verl's own names, and report verl's metrics. KL and entropy bonus stay verl's, which adds them behind the policy loss.
verl is looked up when it is patched; ``grpo_kernels.integrations.verl_plugin`` is a module that does so.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..objectives.checks import warn_caller
from . import verl_operators
from .verl_losses import LOSSES, MISSING, policy_loss_of
from .verl_losses import loss_config as loss_config

_VERSIONS = ("0.9.1",)
_LOSSES = "verl.trainer.ppo.core_algos"
_LOSS_ARGUMENTS = (
    *("old_log_prob", "log_prob", "advantages", "response_mask"),
    *("loss_agg_mode", "config", "rollout_is_weights"),
)


class _Hook(NamedTuple):
    """A function of verl's and what takes its place."""

    module: str
    name: str
    arguments: tuple[str, ...]
    replacement: Callable[[Any], Any]
    """Of the original."""
    signature: str = ""
    """What has these arguments, where that is another name."""


def _always(function: Any) -> Callable[[Any], Any]:
    return lambda original: function


_LOGITS, _HEAD = "verl.utils.torch_functional", "verl.utils.experimental.torch_functional"
_HOOKS = (
    _Hook(
        *(_LOGITS, "logprobs_from_logits", ("logits", "labels", "inplace_backward")),
        _always(verl_operators.logprobs_from_logits),
    ),
    _Hook(_LOGITS, "entropy_from_logits", ("logits",), _always(verl_operators.entropy_from_logits)),
    _Hook(
        *(_LOGITS, "entropy_from_logits_with_chunking", ("logits", "chunk_size")),
        _always(verl_operators.entropy_from_logits_with_chunking),
    ),
    _Hook(
        *(_HEAD, "FusedLinearForPPO.forward"),
        ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
        _always(verl_operators.fused_linear_for_ppo),
    ),
    _Hook(
        *("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
        ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
        verl_operators.linear_cross_entropy_or,
        signature="LinearCrossEntropy.forward",
    ),
)


class _Change(NamedTuple):
    name: str
    """As a message calls it."""
    original: Any
    ours: Any
    places: Callable[[Any], Iterator[Callable[[Any], None]]]
    """Setters of the places that hold a value, now."""


class VerlPatch:
    """A patch of verl that is on; ``undo()``, or the end of a ``with`` block, takes it off."""

    def __init__(self, changes: list[_Change]) -> None:
        self._changes = changes
        for change in changes:
            for place in change.places(change.original):
                place(change.ours)

    def undo(self) -> None:
        """Give verl its own functions back, in whatever module of verl's holds ours; a second call does nothing. What
        somebody else has put in their place since stays there, and is named in a warning."""
        global _patch
        lost = []
        for change in self._changes:
            places = list(change.places(change.ours))
            for place in places:
                place(change.original)
            if not places:
                lost.append(change.name)
        self._changes = []
        if _patch is self:
            _patch = None
        if lost:
            warn_caller(f"patch_verl: {', '.join(lost)} had been replaced since, and stays as it is.")

    def __enter__(self) -> VerlPatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


_patch: VerlPatch | None = None


def patch_verl(losses: bool = True, operators: bool = True) -> VerlPatch:
    """Put verl on these kernels, in this process. Nothing is changed unless every hook is what it is known to be.

    Args:
        losses: the policy losses of verl's registry, ``policy_loss.loss_mode``; modes without a counterpart
            ("clip_cov", "kl_cov", "bypass_mode") then raise where they are called.
        operators: ``logprobs_from_logits``, ``entropy_from_logits`` (chunked, too), and what ``use_fused_kernels``
            takes log-probs and entropies from: ``FusedLinearForPPO``, and ``linear_cross_entropy`` where it is not over
            ranks.

    Returns:
        VerlPatch, whose ``undo()`` gives verl its own back: ``with patch_verl(): ...`` patches a block.

    Raises:
        ImportError: no verl.
        RuntimeError: another version; a hook that moved, has other arguments or was replaced; a patch that is on.
    """
    global _patch
    try:
        import verl
    except ImportError as error:
        raise ImportError("patch_verl needs verl 0.9.1: pip install verl==0.9.1") from error
    if verl.__version__ not in _VERSIONS:
        expected = " or ".join(_VERSIONS)
        raise RuntimeError(f"patch_verl: written for verl {expected} and its internals; got {verl.__version__}.")
    if _patch is not None:
        raise RuntimeError("patch_verl: expected verl as it was installed; got one that is patched: undo() that.")
    changes = [*(_operator_changes() if operators else ()), *(_loss_changes() if losses else ())]
    _patch = VerlPatch(changes)
    return _patch


def _operator_changes() -> Iterator[_Change]:
    for hook in _HOOKS:
        module = importlib.import_module(hook.module)
        original = _checked(hook.module, module, hook.name, hook.arguments, hook.signature)
        *owners, last = hook.name.split(".")
        owner = _found(module, ".".join(owners)) if owners else None
        yield _Change(hook.name, original, hook.replacement(original), _places_of(owner, last))


def _places_of(owner: Any, name: str) -> Callable[[Any], Iterator[Callable[[Any], None]]]:
    """Return the places of an attribute: of its class, or of every module of verl's that is imported, since some import
    it by name."""

    def places(value: Any) -> Iterator[Callable[[Any], None]]:
        modules = [module for key, module in sys.modules.items() if key.split(".")[0] == "verl"]
        for holder in modules if owner is None else [owner]:
            if vars(holder).get(name) is value:
                yield lambda new, holder=holder: setattr(holder, name, new)  # type: ignore[misc]

    return places


def _loss_changes() -> Iterator[_Change]:
    module = importlib.import_module(_LOSSES)
    for name in ("register_policy_loss", "POLICY_LOSS_REGISTRY"):
        if not hasattr(module, name):
            _moved(f"{_LOSSES}.{name}", "", "nothing")
    registry: dict[str, Any] = module.POLICY_LOSS_REGISTRY
    for mode in (*LOSSES, *MISSING):
        original = registry.get(mode)
        _check(f'the policy loss "{mode}"', original, original, _LOSS_ARGUMENTS)
        yield _Change(f'the policy loss "{mode}"', original, policy_loss_of(mode), _registered(module, mode))


def _registered(module: Any, mode: str) -> Callable[[Any], Iterator[Callable[[Any], None]]]:
    def places(value: Any) -> Iterator[Callable[[Any], None]]:
        if module.POLICY_LOSS_REGISTRY.get(mode) is value:
            yield module.register_policy_loss(mode)

    return places


def _checked(path: str, module: Any, name: str, arguments: tuple[str, ...], signature: str) -> Any:
    original = _found(module, name)
    described = _found(module, signature) if signature else original
    _check(f"{path}.{name}", original, described, arguments)
    kind = signature.split(".")[0]
    if signature and getattr(original, "__self__", None) is not _found(module, kind):
        _moved(f"{path}.{name}", f"{kind}.apply", repr(original))
    return original


def _found(module: Any, name: str) -> Any:
    """Return an attribute by its dotted name as it stands in its owner, None where there is none."""
    for part in name.split("."):
        module = vars(module).get(part) if module is not None else None
    return module.__func__ if isinstance(module, staticmethod) else module


def _check(what: str, original: Any, described: Any, arguments: tuple[str, ...]) -> None:
    """Raise unless a hook is verl's own function with these arguments."""
    if original is None or described is None:
        _moved(what, "", "nothing")
    found = tuple(inspect.signature(described).parameters)
    home = getattr(described, "__module__", None) or ""
    if found != arguments or home.split(".")[0] != "verl":
        _moved(what, f"verl's ({', '.join(arguments)})", f"{home}.{described.__qualname__}({', '.join(found)})")


def _moved(what: str, expected: str, got: str) -> None:
    raise RuntimeError(
        f"patch_verl: expected {what}{f' to be {expected}' if expected else ''}; got {got}. Something else has patched "
        "verl, or this is another one."
    )
