"""A teacher: the distribution that the policy's is compared with, in the form in which it is there."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.spec import LogitArgs
from ..objectives.checks import check_no_transforms, check_tensors, describe, fail
from ..objectives.divergence import Divergence
from ..objectives.groups import in_words
from ..objectives.settings import plain, read_integer, settle_number, shown


@dataclass(frozen=True, eq=False, kw_only=True)
class Teacher:
    """A distribution for every token, of another policy: one of three forms.

        Teacher(logits=teacher_logits)
        Teacher(hidden=teacher_hidden, weight=teacher_head)
        Teacher(token_ids=top_ids, log_probs=top_log_probs, temperature=1.0)

    It has no gradient. Its rows are the policy's: row t is of the token that row t of the policy predicts.

    Args:
        logits: (B, T, V) or (B, T+1, V), packed (N, V) or (1, N, V).
        hidden: (B, T, H'), (B, T+1, H') or packed, of any width H', behind its final norm; with ``weight`` (V, H') and
            ``bias`` (V,), which may be those of the policy. The logits exist a chunk of rows at a time.
        token_ids, log_probs: its likeliest tokens, (*token_ids.shape of the call, k), each once, an id < 0 where there
            are fewer (a log-prob of -inf says that the teacher finds a token impossible); or with ``offsets`` (N+1,),
            (n,) of all tokens one after the other.
        logit_scale, logit_softcap: of its logits, as for ``grpo_loss``.
        temperature: of recorded log-probs, which carry it: what the sampler's logits were divided by (that of prompt
            log-probs of vLLM and SGLang is 1, whatever the sampler's is). No default.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    token_ids: Tensor | None = None
    log_probs: Tensor | None = None
    offsets: Tensor | None = None
    logit_scale: float | Tensor = 1.0
    logit_softcap: float | Tensor | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        forms = {"logits": ("logits",), "hidden": ("hidden", "weight"), "token_ids": ("token_ids", "log_probs")}
        named = self.tensors
        for name, value in named.items():
            if value is not None and not isinstance(value, Tensor):
                hint = _hint_of(name, value)
                fail("Teacher", f"{name} to be a tensor", type(value).__name__, hint=hint, error=TypeError)
        check_tensors("Teacher", named, needed=())
        given = [form for form, needs in forms.items() if any(named[name] is not None for name in needs)]
        form = given[0] if len(given) == 1 else ""
        if not form or any(named[name] is None for name in forms[form]):
            got = ", ".join(name for name, value in named.items() if value is not None) or "nothing"
            fail("Teacher", "logits=, or hidden= and weight=, or token_ids= and log_probs=", got)
        self._check_options(form)
        self._check_head()
        for name in ("logits", "hidden", "log_probs"):
            value = named[name]
            if value is not None and value.requires_grad:
                hint = f"run it under torch.no_grad(), or {name}.detach()"
                fail(
                    "Teacher", f"{name} without a gradient: only the policy learns", "one that requires grad", hint=hint
                )
        object.__setattr__(self, "temperature", plain(self.temperature))
        if (form == "token_ids") != (self.temperature is not None):
            expected = "temperature= of recorded log-probs, and of them alone"
            hint = (
                "log-probs carry what their logits were divided by: 1.0 of prompt log-probs, else the sampler's"
                if form == "token_ids"
                else "Divergence(teacher_temperature=...) is what its logits are divided by; None: the call's"
            )
            fail("Teacher", expected, repr(self.temperature), hint=hint)
        if self.temperature is not None:
            settle_number(self, "temperature", "Teacher(temperature=...)", above=0)

    def _check_head(self) -> None:
        """Raise where the dimensions do not say how many columns there are."""
        logits, weight, bias = self.logits, self.weight, self.bias
        if logits is not None and logits.dim() < 2:
            fail("Teacher", "logits (..., V), of rows", f"shape {tuple(logits.shape)}")
        if weight is not None and weight.dim() != 2:
            fail("Teacher", "weight (V, H)", f"shape {tuple(weight.shape)}")
        if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
            fail("Teacher", f"bias {tuple(weight.shape[:1])}, one of each of weight's rows", str(tuple(bias.shape)))

    def _check_options(self, form: str) -> None:
        """Raise for what has no part in a teacher of this form."""
        mapped = isinstance(self.logit_scale, Tensor) or self.logit_scale != 1 or self.logit_softcap is not None
        for name, given, forms in (
            ("bias=", self.bias is not None, ("hidden",)),
            ("offsets=", self.offsets is not None, ("token_ids",)),
            ("logit_scale= and logit_softcap=", mapped, ("logits", "hidden")),
        ):
            if given and form not in forms:
                fail("Teacher", f"{name} beside {' or '.join(forms)}= alone", f"{form}=")

    def __repr__(self) -> str:
        """Return what is given, of tensors their dtype, shape and device."""
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                shown.append(f"{field.name}={describe(value)}")
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"Teacher({', '.join(shown)})"

    def facts(self) -> str:
        """Return in words what all parts of one teacher have in common, wherever its tokens are: form, dtype, numbers,
        none of which a device has to be asked for."""
        floating = [(name, value) for name, value in self.tensors.items() if name in ("logits", "hidden", "log_probs")]
        form = "".join(f"{name} of {value.dtype}" for name, value in floating if value is not None)
        columns = "" if self.columns is None else f", {self.columns} columns"
        options = ("logit_scale", "logit_softcap", "temperature")
        return f"{form}{columns}" + "".join(f", {name}={in_words(getattr(self, name))}" for name in options)

    @property
    def form(self) -> str:
        """Return "logits", "hidden" or "token_ids"."""
        return next(name for name in ("logits", "hidden", "token_ids") if getattr(self, name) is not None)

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors by name."""
        names = ("logits", "hidden", "weight", "bias", "token_ids", "log_probs", "offsets")
        return {name: getattr(self, name) for name in names}

    @property
    def dtype(self) -> torch.dtype | None:
        """Return that of its logits; None where there are none."""
        states = self.hidden if self.logits is None else self.logits
        return None if states is None else states.dtype

    @property
    def columns(self) -> int | None:
        """Return how many columns its vocabulary has; None where it has recorded some."""
        whole = self.weight if self.logits is None else self.logits.mT
        return None if whole is None else whole.shape[-2]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Teacher:
        """Return the teacher with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device=device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return Teacher(**moved)


def _hint_of(name: str, value: object) -> str:
    """Return what to do with something else in the place of a tensor."""
    if isinstance(value, torch.nn.Module):
        return "hf.teacher(model) runs a model; the weight of a head is model.lm_head.weight"
    ragged = "; rows of their own lengths lie one after the other, with offsets="
    return f"torch.as_tensor({name}){ragged if name in ('token_ids', 'log_probs') else ''}"


def check_is_teacher(function: str, teacher: object) -> None:
    """Raise where a teacher is something else, its logits perhaps, or is followed by a transform."""
    if not isinstance(teacher, Teacher):
        hint = "Teacher(logits=...), Teacher(hidden=..., weight=...) or Teacher(token_ids=..., log_probs=...)"
        if callable(teacher):
            hint = "a model is run as one before: teacher=hf.teacher(model)(**inputs), or Teacher(logits=...)"
        fail(function, "teacher= to be a Teacher", type(teacher).__name__, hint=hint, error=TypeError)
    check_no_transforms(function, teacher.tensors.values())


def check_teacher(function: str, teacher: object, divergence: Divergence | None) -> None:
    """Raise where one of the two is missing."""
    if teacher is not None:
        check_is_teacher(function, teacher)
    if divergence is not None and teacher is None:
        hint = "divergence=None leaves the term out"
        fail(function, f"teacher= for {divergence!r}", "none", hint=hint)
    if divergence is None and teacher is not None:
        hint = "LossConfig(divergence=Divergence('reverse_kl')) says what is minimised"
        fail(function, "a divergence in the config beside teacher=", "none", hint=hint)


_DIMENSIONS = {"weight": 2, "bias": 1, "adapter": 2}
"""Of the tensors of a head, which has a row for each column of its logits."""


def first_columns(
    function: str, vocab_size: int, teacher: Teacher, dim: int, *tensors: Tensor | None
) -> tuple[Teacher, tuple[Tensor | None, ...]]:
    """Return a teacher and the policy's ``tensors`` without what their vocabularies have beyond ``vocab_size``."""
    names = ("logits",) if dim else tuple(_DIMENSIONS)
    named = dict(zip(names, tensors, strict=True))
    check_tensors(function, named, needed=names[:1])
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    fitting = all(x.dim() > 1 if name == "logits" else x.dim() == _DIMENSIONS[name] for name, x in given.items())
    columns = {tensor.shape[dim] for tensor in given.values()} if fitting else set()
    if len(columns) != 1:  # refused with what it should be
        return teacher, tensors
    most = min(columns if teacher.columns is None else {*columns, teacher.columns})
    count = read_integer(vocab_size)
    if count is None or not 0 < count <= most:
        fail(function, f"vocab_size, an int in [1, {most}], the columns of policy and teacher", shown(vocab_size))

    if teacher.columns is not None:
        logits, weight, bias = teacher.logits, teacher.weight, teacher.bias
        logits, weight, bias = _narrow(logits, -1, count), _narrow(weight, 0, count), _narrow(bias, 0, count)
        teacher = replace(teacher, logits=logits, weight=weight, bias=bias)
    return teacher, tuple(_narrow(tensor, dim, count) for tensor in tensors)


def _narrow(tensor: Tensor | None, dim: int, count: int) -> Tensor | None:
    return None if tensor is None else tensor.narrow(dim, 0, count)


def teacher_args(teacher: Teacher, divergence: Divergence, temperature: float | Tensor) -> LogitArgs:
    """Return how the teacher's logits become log-probs."""
    own = divergence.teacher_temperature
    return LogitArgs(temperature if own is None else own, teacher.logit_scale, teacher.logit_softcap)
