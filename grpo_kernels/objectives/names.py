"""Names that other packages have for the options of a loss: whoever uses one here is told ours."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from .settings import check_name, nearest

_Class = TypeVar("_Class", bound=type)

ELSEWHERE = {
    **dict.fromkeys(("beta", "kl_beta", "kl_coef", "kl_coeff", "kl_loss_coef", "init_kl_coef"), ("kl", "KL({0})")),
    **dict.fromkeys(("kl_penalty", "kl_loss_type", "kl_estimator"), ("kl", "KL(..., estimator={0})")),
    "use_bias_correction_kl": ("kl", "KL(..., ratio_weighted={0})"),
    **dict.fromkeys(("loss_type", "loss_mode"), ("config", "LossConfig.preset({0})")),
    "importance_sampling_level": ("level", "{0}"),
    "loss_agg_mode": ("aggregation", "..."),
    "max_completion_length": ("constant_length", "{0}"),
    "num_generations": ("group_size", "{0}"),
    **dict.fromkeys(("ent_coef", "entropy_coeff"), ("entropy_coef", "{0}")),
    **dict.fromkeys(
        ("tis_imp_ratio_cap", "rollout_is_threshold", "vllm_importance_sampling_cap"), ("rollout", "TruncatedIS({0})")
    ),
}
"""Our name for an option of TRL, Liger, verl or OpenRLHF, and its value where theirs is {0}."""


BOUNDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("epsilon", "eps", "clip", "clip_eps", "clip_range", "clip_ratio", "cliprange", "eps_clip"), ("low", "high")
    ),
    **dict.fromkeys(("epsilon_low", "eps_low", "clip_ratio_low", "eps_clip_low"), ("low",)),
    **dict.fromkeys(("epsilon_high", "eps_high", "clip_ratio_high", "eps_clip_high"), ("high",)),
    **dict.fromkeys(("delta", "clip_ratio_c", "dual_clip"), ("dual",)),
}
"""Theirs for numbers of a clip, and which of ours they are."""
ARGUMENTS = {
    **dict.fromkeys(
        ("old_logprobs", "old_log_prob", "old_logps", "old_per_token_logps", "old_action_log_probs"), "old_log_probs"
    ),
    **dict.fromkeys(
        ("ref_logprobs", "ref_log_prob", "ref_logps", "ref_per_token_logps", "base_action_log_probs"), "ref_log_probs"
    ),
    **dict.fromkeys(
        ("rollout_logprobs", "rollout_log_prob", "sampling_per_token_logps", "generation_logprobs", "vllm_logprobs"),
        "rollout_log_probs",
    ),
    **dict.fromkeys(
        ("response_mask", "completion_mask", "loss_mask", "action_mask", "assistant_mask", "token_mask"), "mask"
    ),
    **dict.fromkeys(("rollout_is_weights", "importance_sampling_ratio", "importance_weights"), "token_weights"),
    "num_items_in_batch": "normalizer",
}
"""Our argument of a call for one of TRL, Liger, verl, OpenRLHF or NeMo-RL."""
FIELDS = (
    "surrogate",
    "level",
    "aggregation",
    "kl",
    "rollout",
    "entropy_coef",
    "entropy_aggregation",
    "log_ratio_limit",
    "constant_length",
    "group_size",
    "divergence",
    "rollout_kl",
)
"""What a config holds, and a call takes inside of its config."""
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
}
"""Our aggregation for verl's ``loss_agg_mode``."""
ESTIMATORS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
"""Our KL estimator for verl's ``kl_penalty``."""


def translated(name: str, value: object, allowed: Iterable[str], surrogate: Any = None) -> str | None:
    """Return ours in place of ``name=value``; None where no other package is known to say it. ``allowed`` are the names
    that the called function or class takes: any other belongs in its config. ``surrogate`` is what is changed: where it
    has no such number, no other is suggested in its place."""
    shown = repr(value) if isinstance(value, (int, float, str)) else "..."
    if name in BOUNDS:
        ours, expression = "surrogate", _bounded(BOUNDS[name], value, shown, surrogate)
    elif name in ELSEWHERE:
        ours, expression = ELSEWHERE[name]
        expression = expression.format(shown)
    elif name in FIELDS and name not in allowed:
        ours, expression = name, shown
    elif name in ARGUMENTS and ARGUMENTS[name] in allowed:
        return f"{ARGUMENTS[name]}={shown}"
    else:
        return None
    written = f"{ours}={expression}"
    return written if ours == "config" or ours in allowed else f"config=LossConfig({written})"


def _bounded(fields: tuple[str, ...], value: object, shown: str, surrogate: Any) -> str:
    """Write the surrogate with these numbers changed."""
    if surrogate is None:
        return f"Clip({', '.join([shown] * 2 if len(fields) == 2 else [f'{fields[0]}={shown}'])})"
    try:
        return repr(dataclasses.replace(surrogate, **dict.fromkeys(fields, value)))
    except (TypeError, ValueError):  # it has no such number, or not this one
        return f"{type(surrogate).__name__}(...)"


def check_options(kind: str, options: Mapping[str, object], allowed: Iterable[str], surrogate: Any = None) -> None:
    """Raise a ValueError, with ours, for the first option that is none of ``allowed``."""
    names = list(allowed)
    for name, value in options.items():
        check_name(kind, name, names, translated(name, value, names, surrogate))


class NoKeyword:
    """The type of the keywords that a function does not have, ``**unknown: NoKeyword``: nothing is of it, so that type
    checkers refuse them all, and a call without any pays nothing for the hint that others get. (With ``typing.Never``
    mypy forgets what a conditional expression of two functions is.)"""


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of what a function takes, without its ``**`` and ``*``."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def refuse_keywords(function: Callable[..., Any], keywords: Mapping[str, object]) -> NoReturn:
    """Raise the TypeError of a call with keywords that the function does not have, with ours for the first of them."""
    names = keywords_of(function)
    name, value = next(iter(keywords.items()))
    meant = translated(name, value, names)
    if meant is None or (meant.startswith("config=") and "config" not in names):
        near = difflib.get_close_matches(name, names, n=1)
        meant = repr(near[0]) if near else None
    hint = f"it takes {', '.join(names)}" if meant is None else f"did you mean {meant}?"
    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}\n  hint: {hint}")


def _field_of(cls: Any, name: str, value: object, names: Sequence[str]) -> str | None:
    """Return ours in place of ``name=value`` where it is another name for a class's own numbers: another package's for
    the bounds of a clip, a config's for those of an aggregation."""
    ours = {**BOUNDS, **{option: (field,) for field, option in getattr(cls, "options", {}).items()}}.get(name)
    if ours is None or not set(ours) <= set(names):
        return None
    shown = repr(value) if isinstance(value, (int, float)) else "..."
    return ", ".join(f"{field}={shown}" for field in ours)


def translates_fields(cls: _Class) -> _Class:
    """Let the TypeError of a dataclass that is given an unknown field say which one was meant."""
    init, names = cls.__init__, [field.name for field in dataclasses.fields(cls)]  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        for name, value in fields.items():
            if name not in names:
                meant = _field_of(cls, name, value, names) or translated(name, value, names)
                meant = meant or repr(nearest(name, names))
                message = f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}"
                raise TypeError(f"{message}. Did you mean {meant}?")
        init(self, *args, **fields)

    cls.__init__ = checked  # type: ignore[misc]
    return cls
