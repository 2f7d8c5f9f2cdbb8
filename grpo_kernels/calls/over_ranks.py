"""A loss of sequences that lie over several ranks: what the ranks agree on before the first of them waits for another.

A first call on a group, and one with checks, rehearses: each rank computes its own part as if it were whole, without a
gradient. Whatever raises there, shapes, ids or a kernel, is told to all ranks, together with what must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import fail
from ..objectives.compiler import outside_graphs
from ..objectives.config import resolve_config
from ..objectives.groups import agree, checksum, get_ranks, in_words, meets, read_group
from ..objectives.sequences import LAYOUTS
from ..objectives.settings import check_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .outputs import LossOutput

KEYWORD = "sequence_group"
_TENSORS = ("old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights", "cu_seqlens", "entropy", "teacher")
_OPTIONS = ("support", "skip_zero_advantage", "token_losses")
NUMBERS = ("normalizer", "kl_coef", "rollout_kl_coef", "entropy_coef", "divergence_coef", "entropy_threshold")
"""Arguments that are one number, the same on ranks that share tokens or sequences."""
_NUMBERS = (*NUMBERS, "grad_scale", "temperature", "logit_scale", "logit_softcap")
"""Keywords of the losses that all ranks give, or none; of the last also the number."""
_EITHER = ("advantages", "temperature")
"""Those of which there may be one a sequence, the same on all ranks, or one a token."""
_OF_SEQUENCES = "one a sequence"
_LAYOUT = "sequence_layout"


class Agreed(NamedTuple):
    """A group whose ranks have agreed on a call, in the place of the one that its user gave."""

    group: ProcessGroup


@outside_graphs
def over_ranks(function: Callable[..., LossOutput], given: Mapping[str, Any]) -> LossOutput:
    """Call a loss again, once its ranks agree.

    Args:
        function: the loss.
        given: its arguments by name, ``sequence_group`` among them: a process group or a mesh.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: on every rank what one of them raises, or what differs; at
            calls that do not rehearse, on that rank alone.
    """
    given = {name: value for name, value in given.items() if name != "unknown"}
    group = read_group(function.__name__, KEYWORD, given[KEYWORD])
    if group is None:
        _check_layout(function.__name__, given[_LAYOUT])
        return function(**{**given, KEYWORD: None, _LAYOUT: None})
    _refuse_the_vocabulary(function.__name__, group, given.get("vocab_group"))
    if meets(function.__name__, KEYWORD, group, given["check"]):
        facts, error = _rehearse(function, given)
        agree(function.__name__, KEYWORD, group, facts, error, given["check"])
    return function(**{**given, KEYWORD: Agreed(group)})


def _refuse_the_vocabulary(function: str, group: ProcessGroup, vocab_group: Any) -> None:
    """Raise where the ranks of a sequence are those of a vocabulary: these all hold the same tokens."""
    other = read_group(function, "vocab_group", vocab_group)
    if other is not None and set(get_ranks(other)) & set(get_ranks(group)) != {torch.distributed.get_rank()}:
        hint = 'two dimensions of a mesh: mesh["cp"], mesh["tp"]'
        fail(function, f"{KEYWORD}= of other ranks than vocab_group=", "ranks that are in both", hint=hint)


def _rehearse(
    function: Callable[..., LossOutput], given: Mapping[str, Any]
) -> tuple[dict[str, int | str], Exception | None]:
    """Return what has to be the same on all ranks, and what this rank's part raises."""
    old = given["old_log_probs"]  # with what it knows of itself, the call will warn, and its rehearsal not
    alone = {**given, KEYWORD: None, _LAYOUT: None, "old_log_probs": getattr(old, "log_probs", old)}
    alone |= {"inplace": False} if "inplace" in given else {}
    try:
        _check_layout(function.__name__, given[_LAYOUT])
        for name in _EITHER:
            _check_per_token(function.__name__, given, name)
        with torch.no_grad():
            out = function(**alone)
        _check_halves(function.__name__, given)
        return _facts(given, out), None
    except Exception as error:  # of any kind: the others wait
        return {}, error


def _check_per_token(function: str, given: Mapping[str, Any], name: str) -> None:
    """Raise for packed values (N,): on a rank with as many tokens as sequences they would be one a sequence."""
    values, bounds = given.get(name), given["cu_seqlens"]
    if not (isinstance(values, Tensor) and isinstance(bounds, Tensor)) or values.dim() != 1:
        return
    if values.shape[0] != bounds.shape[0] - 1:
        expected = f"{name} ({bounds.shape[0] - 1},), one a sequence, or (1, N) with {KEYWORD}="
        fail(function, expected, str(tuple(values.shape)), hint=f"one for each token: {name}[None]")


def _check_layout(function: str, layout: object) -> None:
    if layout is not None:
        check_name(f"{function}: {_LAYOUT}", layout, LAYOUTS)


def _check_halves(function: str, given: Mapping[str, Any]) -> None:
    """Raise for parts that cannot be of two chunks of equal length."""
    if given[_LAYOUT] != "zigzag":
        return
    bounds = given["cu_seqlens"]
    tokens = given["token_ids"] if "token_ids" in given else given["log_probs"]
    lengths = bounds.diff() if isinstance(bounds, Tensor) else torch.tensor(tokens.shape[-1:])
    if bool((lengths % 2 != 0).any()):
        hint = "split_context pads behind the end to a multiple of 2·ranks"
        fail(function, f"parts of an even length with {_LAYOUT}='zigzag'", str(lengths.tolist()), hint=hint)


def _kind(value: object) -> str:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return "none" if value is None else "a number"
    return _OF_SEQUENCES if value.dim() == 1 else "one a token"


def _facts(given: Mapping[str, Any], out: LossOutput) -> dict[str, int | str]:
    values = {name: given.get(name) for name in (*_TENSORS, *_OPTIONS)}
    named = [name for name, value in values.items() if value is not None and value is not False]
    bounds = given["cu_seqlens"]
    floating = [value for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()]
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in floating)
    sequences = out.log_probs.shape[0] if bounds is None else bounds.shape[0] - 1
    teacher = given.get("teacher")
    return {
        "number of sequences": sequences,
        "config": repr(resolve_config(given["config"])),
        "keywords": ", ".join(named) or "none",
        _LAYOUT: repr(given[_LAYOUT]),
        **{f"kind of {name}": _kind(given.get(name)) for name in _EITHER},
        **{name: in_words(given.get(name)) for name in _NUMBERS},
        **{name: checksum(given[name]) for name in _EITHER if _kind(given.get(name)) == _OF_SEQUENCES},
        "vocab_size": repr(given.get("vocab_size")),
        "dtype": str(floating[0].dtype),
        "teacher": "none" if teacher is None else teacher.facts(),
        "backend": "" if out.route is None else out.route.backend,
        "gradients": "wanted" if wanted else "not wanted",
    }
