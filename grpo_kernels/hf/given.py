"""What ``grpo=dict(...)`` and the options of ``attach`` may hold, and what it says about the call of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calls.outputs import TokenLogProbs
from ..calls.recorded import Recorded
from ..calls.teacher import Teacher
from ..linear import linear_grpo_loss
from ..loss import grpo_loss
from ..objectives.checks import check_scalar, fail, may_look
from ..objectives.config import LossConfig, resolve_config
from ..objectives.names import check_options, keywords_of
from ..objectives.normalizer import Normalizer
from ..objectives.settings import check_name, read_integer

OF_THE_MODEL = ("hidden", "weight", "bias", "adapter", "logits", "config")
"""Keywords of the losses that the model brings, or ``attach``."""
OF_THE_HEAD = ("logit_scale", "logit_softcap")
"""Keywords that a call from hidden states has from the model's forward."""
OF_A_CALL = ("token_ids", "advantages", "mask", "teacher", "micro_batches")
"""Never options of ``attach``."""
OF_ATTACH = ("config", "output", "receive", "aux_loss_coef", "micro_batches")
"""Of a call, beside the loss's keywords."""
OUTPUTS = ("loss", "log_probs")
"""``grpo=dict(output=...)``"""


@functools.cache
def keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the keywords of a function, without those that the model provides."""
    known = OF_THE_MODEL if function is not linear_grpo_loss else (*OF_THE_MODEL, *OF_THE_HEAD)
    return tuple(name for name in keywords_of(function) if name not in known)


class Batch(Mapping[str, Any]):
    """What ``batch`` returns: one thing, as wrappers of a model see it, that the model reads as a mapping."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on a device, in their dtypes."""
        if isinstance(device, torch.dtype):
            fail(
                "hf.batch(...).to", "a device: ids, masks and log-probs keep their dtypes", str(device), error=TypeError
            )

        def moved(value: Any) -> Any:
            if isinstance(value, (Tensor, Recorded, Teacher)):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, TokenLogProbs):
                return TokenLogProbs.by(moved(value.log_probs), moved(value.entropy), value.made)
            if isinstance(value, Normalizer):
                return Normalizer(moved(value.value), value.unit, value.group_size)
            return value

        return Batch({name: moved(value) for name, value in self.items()})

    def __repr__(self) -> str:
        shown = (
            f"{name}={tuple(value.shape) if isinstance(value, Tensor) else value!r}" for name, value in self.items()
        )
        return f"batch({', '.join(shown)})"


def batch(**grpo: Any) -> Batch:
    """Return what ``model(..., grpo=...)`` takes, so that wrappers leave it alone.

    FSDP's mixed precision casts the tensors of a plain dict to its ``param_dtype``, old log-probs and advantages among
    them; accelerate and DDP move them. Into this they do not look: ``batch(...).to(device)`` moves it.

    Args:
        **grpo: as ``attach`` takes them.

    Raises:
        ValueError: a name that no loss has.
    """
    names = dict.fromkeys((*keywords(grpo_loss), *keywords(linear_grpo_loss), *OF_ATTACH))
    check_keywords("hf.batch: the name", grpo, list(names))
    return Batch(grpo)


def check_given(
    grpo: object,
    config: LossConfig,
    options: Mapping[str, Any],
    from_logits: bool,
    inputs: Mapping[str, Any],
    model: Any,
) -> None:
    """Raise for what no call can mean, or would mean something else in silence."""
    if not isinstance(grpo, Mapping):
        fail("attach", "grpo=dict(token_ids=..., ...)", type(grpo).__name__, error=TypeError)
    if inputs.get("labels") is not None:
        fail("attach", "grpo= or labels=", "both", hint="the loss is grpo's; add one of labels in a call of its own")
    names = (*keywords(grpo_loss if from_logits else linear_grpo_loss), *OF_ATTACH)
    check_keywords("grpo=dict(...): the name", grpo, names)
    check_name("grpo=dict(output=...)", grpo.get("output", OUTPUTS[0]), OUTPUTS)
    if grpo.get("token_ids") is None:
        fail("attach", "grpo=dict(token_ids=..., ...)", f"only {', '.join(grpo) or 'an empty dict'}")
    wants_loss = grpo.get("output", OUTPUTS[0]) == "loss"
    if wants_loss and grpo.get("advantages") is None and resolve_config(grpo.get("config", config)).surrogate:
        hint = 'grpo=dict(token_ids=..., output="log_probs") asks for the log-probs of the old or reference pass'
        fail("attach", "grpo=dict(token_ids=..., advantages=..., ...)", "no advantages", hint=hint)
    _check_auxiliary({**options, **grpo})
    if grpo.get("receive") is not None and not callable(grpo["receive"]):
        expected = "grpo=dict(receive=...), a function that takes the result"
        fail("attach", expected, type(grpo["receive"]).__name__, error=TypeError)
    if {**options, **grpo}.get("hidden_grad") == "partial":
        hint = "the hooks of a sharded head, and every module before it, take the gradient for the whole one"
        fail("attach", "the whole gradient of hidden states", 'hidden_grad="partial"', grpo, hint=hint)
    check = grpo.get("check", options.get("check"))
    encoded = bool(getattr(model.config, "is_encoder_decoder", False))
    name = "decoder_input_ids" if encoded else "input_ids"
    # Of a part of a sequence the next token may be another rank's, and places are in any order.
    whole = grpo.get("sequence_group", options.get("sequence_group")) is None
    if whole:
        _check_shifted(grpo, name, inputs.get(name), inputs.get("logits_to_keep", 0), check)
    _check_packed(grpo.get("cu_seqlens"), inputs)
    if whole:
        _check_positions(grpo.get("cu_seqlens"), inputs.get("position_ids"), check)


def check_keywords(kind: str, options: Mapping[str, object], names: Collection[str]) -> None:
    """Raise as ``check_options`` does; a keyword of the loss on the other side of ``from_logits`` is not misspelt."""
    of_logits, of_hidden = keywords(grpo_loss), keywords(linear_grpo_loss)
    for name in options:
        if name in names:
            continue
        if name in OF_THE_HEAD:
            fail("attach", "the model's own scale and cap, which are traced", f"{name}={options[name]}")
        if name in of_logits and name not in of_hidden:
            hint = f"attach(..., from_logits=True) runs the model's own head and grpo_loss, and takes {name}="
            fail("attach", "keywords of linear_grpo_loss", f"{name}=, which grpo_loss alone has", hint=hint)
        if name in of_hidden and name not in of_logits:
            hint = f"attach without from_logits=True runs linear_grpo_loss, and takes {name}="
            fail("attach", "keywords of grpo_loss", f"{name}=, which linear_grpo_loss alone has", hint=hint)
    check_options(kind, options, names)


def _check_auxiliary(grpo: Mapping[str, Any]) -> None:
    """Raise unless it is said how often the auxiliary loss counts in what one normalizer divides."""
    coef, count = grpo.get("aux_loss_coef"), grpo.get("micro_batches")
    if count is not None and (read_integer(count) or 0) < 1:
        fail("attach", "grpo=dict(micro_batches=...), an int >= 1", repr(count))
    if coef is None:
        return
    check_scalar("attach", "aux_loss_coef", coef, grpo.get("check"))
    normalized = grpo.get("normalizer") is not None
    if normalized and count is None:
        hint = (
            "the normalizer spans them; each call's auxiliary loss is a mean of its own, and is divided by their number"
        )
        fail(
            "attach",
            "micro_batches=, the number of calls of this step, beside aux_loss_coef= and normalizer=",
            "none",
            hint=hint,
        )
    if not normalized and count not in (None, 1):
        hint = "without a normalizer the caller divides the whole loss by the number of micro-batches"
        fail("attach", "micro_batches= beside a normalizer=", f"micro_batches={count} alone", hint=hint)
    if grpo.get("token_losses"):
        fail("attach", "aux_loss_coef= with a loss", "token_losses=True", hint="add out.aux_loss yourself")


def _check_shifted(grpo: Mapping[str, Any], name: str, given: object, keep: object, check: bool | None) -> None:
    """Raise unless ``token_ids`` are the inputs shifted by one, row t predicting token t + 1: others may have an
    accepted shape, and the wrong meaning. Contents are compared at live places, where they may be looked at."""
    ids = grpo["token_ids"]
    if not (isinstance(ids, Tensor) and isinstance(given, Tensor)) or ids.numel() == 0:
        return
    if isinstance(keep, Tensor):
        _check_index(grpo, name, given, keep, check)
        return
    kept = given[:, -keep:] if isinstance(keep, int) else given
    rows = kept.shape[-1]
    if ids.dim() == 0 or ids.shape[-1] not in (rows, rows - 1) or ids.numel() * rows != kept.numel() * ids.shape[-1]:
        return
    hint = f"token_ids, mask = align({name}, loss_mask): row t predicts token t + 1"
    if ids.shape[-1] == rows and not keep and grpo.get("cu_seqlens") is None:
        expected = f"token_ids (B, {rows - 1}) for {name} (B, {rows}), whose last row predicts none"
        fail("attach", expected, f"as many ids, {tuple(ids.shape)}", grpo, hint=hint)
    if ids is given or not _are_shifted(ids.reshape(kept.shape[0], -1), kept, grpo.get("mask"), check):
        fail("attach", f"token_ids that are {name} shifted by one", "other ids at live places", grpo, hint=hint)


def _check_index(grpo: Mapping[str, Any], name: str, given: Tensor, keep: Tensor, check: bool | None) -> None:
    """Raise unless the id of each row that an index keeps is the input after it."""
    ids = grpo["token_ids"]
    if keep.dim() != 1 or keep.dtype == torch.bool or ids.dim() != 2 or ids.shape[1] not in (len(keep), len(keep) - 1):
        return
    if len(ids) != len(given) or not may_look(ids, check):
        return
    mask = grpo.get("mask")
    live = mask != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else ids >= 0
    last = given.shape[1] - 1
    places = keep[: ids.shape[1]] % given.shape[1]
    others = (ids != given[:, (places + 1).clamp(max=last)]) & (places < last)
    if bool((others & live).any()):
        hint = f"row t predicts token t + 1: token_ids = {name}[:, logits_to_keep + 1]"
        fail("attach", f"token_ids that are {name} shifted by one", "other ids at live places", grpo, hint=hint)


def _check_packed(cu_seqlens: object, inputs: Mapping[str, Any]) -> None:
    """Raise unless the model is told that it sees several sequences: it would attend from one to those before it."""
    mask = inputs.get("attention_mask")
    told = any(inputs.get(name) is not None for name in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.numel() <= 2 or told:
        return
    if not isinstance(mask, Tensor) or mask.dim() < 3:
        hint = "positions count from 0 in each sequence: torch.cat([torch.arange(n) for n in lengths])[None]"
        fail("attach", "position_ids= in the model's call of a packed batch", "cu_seqlens alone", hint=hint)


def _check_positions(cu_seqlens: object, position_ids: object, check: bool | None) -> None:
    """Raise unless the model sees the sequences of a packed batch where the loss does."""
    if not (isinstance(cu_seqlens, Tensor) and isinstance(position_ids, Tensor)) or position_ids.dim() > 2:
        return
    positions = position_ids.reshape(-1)
    if not may_look(positions, check) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        return
    first, *inner, last = cu_seqlens.tolist()
    anew = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
    found = anew[(anew > first) & (anew < last)].tolist()
    bounds = sorted({bound for bound in inner if first < bound < last})
    if found != bounds:
        expected = f"position_ids that begin anew at the bounds of cu_seqlens, {bounds[:8]}"
        fail("attach", expected, f"ones that do at {found[:8]}", hint="positions count from 0 in each sequence")


def _are_shifted(ids: Tensor, kept: Tensor, mask: object, check: bool | None) -> bool:
    """Whether ids are the inputs shifted by one; true, too, where contents may not be looked at. A mask of another
    shape is left to the loss."""
    if not may_look(ids, check):
        return True
    fits = isinstance(mask, Tensor) and mask.numel() == ids.numel()
    live = mask.reshape(ids.shape) != 0 if isinstance(mask, Tensor) and fits else ids >= 0
    wanted = kept[:, 1:]
    same = ids[:, : wanted.shape[1]] == wanted  # the last row has nothing to be compared with
    return bool((same | ~live[:, : wanted.shape[1]]).all())
