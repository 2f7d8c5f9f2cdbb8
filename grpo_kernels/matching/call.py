"""Calling a loss that somebody else wrote: which argument is what, in which shape, and what came back."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import check_name
from .batch import Batch

GIVEN_TEMPERATURE = 0.7
"""What a parameter called temperature is given: unlike 1, so that a loss which ignores it is noticed."""
ITEMS_FACTOR = 3
"""Parameters such as num_items_in_batch get this many times the batch's tokens, to be told from a count of its own."""

LOG = "log(?!its)"
ROLES = {
    "logits": r"logits|(shift|policy|new|curr\w*)_?logits",
    "token_ids": r"(token|input|completion|selected_token|response|action|target|sampled|shift)_?ids|labels|targets?"
    r"|actions|tokens|ids|shift_labels",
    "mask": r"m|\w*mask|mask_\w+",
    "old_log_probs": rf"old|(\w*_)?((old|behaviou?r|prev|previous)_?|(b|mb)_)\w*({LOG}|lp)\w*|\w*log_?p(rob)?s?_old",
    "ref_log_probs": rf"ref|reference|(\w*_)?(ref|reference|base|init|sft)_?\w*({LOG}|lp)\w*"
    r"|\w*log_?p(rob)?s?_(ref|base)",
    "rollout_log_probs": rf"(rollout|sampl\w*|vllm|infer\w*|gen\w*)_?\w*({LOG}|lp)\w*",
    "advantages": r"a|\w*adv(antage)?s?",
    "entropy": r"(\w+_)?entrop(y|ies)",
    "num_items": r"num_items\w*|num_tokens|total_tokens|n_tokens|global_n_tokens|\w*batch_num_tokens|denominator"
    r"|normali[sz]er",
    "temperature": r"temperature|temp",
    "cu_seqlens": r"cu_?seq_?lens?\w*",
    "log_probs": r"lp|(\w*_)?(log_?p(rob)?s?|per_token_logps)|new_?log\w*",
}
"""Whole parameter names, in the order in which they are tried."""
NUMBERS = (
    r"(.*_)?(coef|coeff|eps|epsilon|clip|cliprange|beta|weight|ratio|scale|range|alpha|lambda|mode|type|config|args"
    r"|reduction)s?(_.*)?"
)
"""Parameters that are no tensors of a batch, whatever else their names hold."""
CONTAINERS = ("batch", "inputs", "data", "sample", "samples", "mini_batch", "minibatch", "micro_batch", "experience")


def role_of(name: str) -> str | None:
    """What a parameter of that name means; None where its name does not tell."""
    lowered = name.lower()
    if re.fullmatch(NUMBERS, lowered):
        return None
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, lowered)), None)


class Named(dict[str, Any]):
    """A batch for losses that take one mapping: a key is found under whatever name means it."""

    def __missing__(self, key: str) -> Any:
        role = role_of(key)
        if role is None or role not in self:
            raise KeyError(f"{key}: the batch that match makes has {', '.join(sorted(self))}")
        return self[role]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and super().__contains__(role_of(key)))


ADVANTAGES = ("sequence", "token", "column")


@dataclass(frozen=True)
class Form:
    """How tensors are laid out for one loss."""

    source: str
    """"log_probs" or "logits": what the loss takes, and what its gradient is asked for."""
    layout: str
    """"extended": logits (B, T+1, V), the last row unused; "aligned": (B, T, V); "unshifted": logits, ids and mask of
    T+1 positions, to be shifted by the loss; "flat": everything in one dimension."""
    advantages: str
    """"sequence" (B,), "token" (B, T), "column" (B, 1)."""
    mask: torch.dtype


@dataclass(frozen=True)
class Response:
    """What one call gave."""

    loss: float
    gradient: Tensor
    """With respect to the log-probs (B, T), or to the logits (B, T, V)."""
    entropy_gradient: Tensor | None
    dtype: torch.dtype


WRAP = "wrap it in a function whose parameters have names, def loss(log_probs, old_log_probs, advantages, mask): ..."


class Unusable(ValueError):
    """The loss cannot be called as it is."""


class Caller:
    """A loss function, its parameters' meanings and the form that it takes.

    Args:
        loss_fn: any callable that returns a scalar (or a tuple, dict or object that starts with or names one).
        arguments: meaning of parameters whose names do not tell: ``{"x": "log_probs"}``.
        temperature: what a parameter of that name is given.
        device: where its tensors are.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        arguments: Mapping[str, str] | None = None,
        temperature: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"match needs a function; got {type(loss_fn).__name__}.")
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a finite number > 0; got {temperature!r}.")
        self.loss_fn = loss_fn
        self.temperature = GIVEN_TEMPERATURE if temperature is None else temperature
        self.device = torch.device(device)
        self.rollout_shift: Tensor | float = 0.0
        """The sampler's log-probs are the old ones plus this."""
        self.left_out: list[str] = []
        """Optional parameters that stay at their default."""
        self.form: Form | None = None
        self.container: str | None = None
        self.roles = self._roles(dict(arguments or {}))
        names = [name.lower() for name, role in self.roles.items() if role == "token_ids"]
        self.labelled = not self.takes("mask") and any("label" in name or "target" in name for name in names)
        """Masked tokens are -100 in its ids, and it has no other mask."""

    def _roles(self, arguments: dict[str, str]) -> dict[str, str]:
        """Parameter to role."""
        for name, meaning in arguments.items():
            check_name(f"arguments[{name!r}]", meaning, ROLES)
        if inspect.isclass(self.loss_fn):
            raise Unusable(f"{self.loss_fn.__name__} is a class: give an instance of it, or a function.")
        target = self.loss_fn.forward if isinstance(self.loss_fn, torch.nn.Module) else self.loss_fn
        try:
            parameters = inspect.signature(target).parameters
        except (TypeError, ValueError) as error:
            raise Unusable(f"the parameters of {self.loss_fn!r} cannot be read: wrap it in a function.") from error
        if missing := sorted(set(arguments) - set(parameters)):
            raise ValueError(f"arguments= names {', '.join(missing)}; the loss takes {', '.join(parameters)}.")
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [p for p in parameters.values() if p.default is p.empty and p.kind not in variadic]
        if len(required) == 1 and required[0].name.lower() in CONTAINERS and not arguments:
            self.container = required[0].name
            return {}
        roles: dict[str, str] = {}
        bound = getattr(self.loss_fn, "keywords", {})
        for parameter in parameters.values():
            if parameter.name in bound:
                continue
            if parameter.kind in (*variadic, parameter.POSITIONAL_ONLY):
                if parameter.kind in variadic:
                    continue
                raise Unusable(f"parameter {parameter.name!r} can only be given by its place: {WRAP}")
            role = arguments.get(parameter.name, role_of(parameter.name))
            optional = parameter.default is not parameter.empty
            if role is None or (role in ("rollout_log_probs", "num_items", "cu_seqlens") and optional):
                if not optional:
                    raise Unusable(_unknown(parameter.name, list(parameters)))
                self.left_out += [parameter.name] if role is not None else []
                continue
            if role in roles.values():
                raise Unusable(
                    f"two parameters seem to be {role}: {parameter.name} and "
                    f"{next(n for n, r in roles.items() if r == role)}. Say which is which: "
                    f'arguments={{"{parameter.name}": ...}}.'
                )
            roles[parameter.name] = role
        if "old_log_probs" not in roles.values():  # losses that compare with the sampler alone
            roles = {n: "old_log_probs" if r == "rollout_log_probs" else r for n, r in roles.items()}
        if not roles and len(parameters) and all(p.kind in variadic for p in parameters.values()):
            raise Unusable(f"the loss takes {', '.join(str(p) for p in parameters.values())}: {WRAP}")
        if not {"logits", "log_probs"} & set(roles.values()):
            raise Unusable(
                f"the loss takes neither log-probs nor logits that could be recognised: {', '.join(parameters)}. "
                'Say which it is: arguments={"name": "log_probs"}.'
            )
        return roles

    @property
    def masks(self) -> bool:
        """Whether it knows which tokens count."""
        return self.takes("mask") or self.labelled

    def takes(self, role: str) -> bool:
        return self.container is not None or role in self.roles.values()

    def forms(self) -> Iterator[Form]:
        """Every form that it might want, the likeliest first."""
        sources = ["log_probs", "logits"] if self.container is not None else [self._source()]
        masks = (torch.float64, torch.bool, torch.int64) if self.takes("mask") else (torch.float64,)
        for source in sources:
            for layout, advantages, mask in itertools.product(self._layouts(source), ADVANTAGES, masks):
                packed = "cu_seqlens" in self.roles.values() and advantages == "sequence"
                if layout != "flat" or advantages == "token" or packed:
                    yield Form(source, layout, advantages, mask)

    def _source(self) -> str:
        return "logits" if "logits" in self.roles.values() else "log_probs"

    def _layouts(self, source: str) -> list[str]:
        if "cu_seqlens" in self.roles.values():
            return ["flat"]
        if source == "log_probs":
            return ["aligned", "flat"]
        ids = [name.lower() for name, role in self.roles.items() if role == "token_ids"]
        if ids and ids[0] in ("input_ids", "labels"):
            return ["unshifted", "extended", "aligned", "flat"]
        return ["extended", "aligned", "unshifted", "flat"]

    def run(self, batch: Batch, old: Tensor, ref: Tensor, advantages: Tensor, leaf: Tensor | None = None) -> Response:
        """One call; ``advantages`` (B,) or (B, T). ``leaf``: log-probs or logits other than the batch's own."""
        assert self.form is not None
        return self.run_form(self.form, batch, old, ref, advantages, leaf)

    def run_form(
        self, form: Form, batch: Batch, old: Tensor, ref: Tensor, advantages: Tensor, leaf: Tensor | None = None
    ) -> Response:
        T = batch.shape[1]
        if leaf is None:
            leaf = batch.logits if form.source == "logits" else batch.scored(batch.token_ids, 1.0)
        leaf = leaf.detach().clone().to(self.device).requires_grad_()
        entropy = batch.entropy().to(self.device).requires_grad_()
        handed = self._lay_out(form, batch, leaf, entropy, old, ref, advantages)
        with torch.enable_grad():
            loss = self.loss_of(handed)
            gradient, entropy_gradient = torch.autograd.grad(loss, (leaf, entropy), allow_unused=True)
        gradient = (torch.zeros_like(leaf) if gradient is None else gradient)[:, :T].double().cpu()
        entropy_gradient = None if entropy_gradient is None else entropy_gradient.cpu()
        return Response(float(loss.detach()), gradient, entropy_gradient, loss.dtype)

    def loss_of(self, handed: dict[str, Any]) -> Tensor:
        """The scalar that the function returns when every role has this value."""
        if self.container is not None:
            return _scalar_of(self.loss_fn(Named(handed)))
        return _scalar_of(self.loss_fn(**{name: handed[role] for name, role in self.roles.items()}))

    def _lay_out(
        self, form: Form, batch: Batch, leaf: Tensor, entropy: Tensor, old: Tensor, ref: Tensor, advantages: Tensor
    ) -> dict[str, Any]:
        """Every role's value; tensors are the loss's own, which it may overwrite."""
        B, T = batch.shape
        ids, mask, per_token = batch.token_ids, batch.mask, advantages
        first = batch.first
        if self.labelled:
            ids, first = torch.where(mask, ids, -100), torch.full_like(first, -100)
        if form.advantages != "sequence" and advantages.dim() == 1:
            per_token = advantages[:, None].expand(B, T) if form.advantages == "token" else advantages[:, None]
        logits = leaf if leaf.dim() == 3 else None
        if logits is not None and form.layout in ("aligned", "flat"):
            logits = logits[:, :T]
        if form.layout == "unshifted":
            ids = torch.cat([first[:, None], ids], 1)
            mask = torch.cat([mask.new_zeros(B, 1), mask], 1)
        handed: dict[str, Any] = {"logits" if leaf.dim() == 3 else "log_probs": leaf if logits is None else logits}
        handed |= {"token_ids": ids.clone(), "mask": mask.to(form.mask), "advantages": per_token.clone()}
        handed |= {
            "old_log_probs": old.clone(),
            "ref_log_probs": ref.clone(),
            "rollout_log_probs": old + self.rollout_shift,
        }
        handed |= {"entropy": entropy}
        if form.layout == "flat":
            handed = {
                name: value.reshape(-1, value.shape[-1]) if name == "logits" else value.reshape(-1)
                for name, value in handed.items()
            }
            handed["cu_seqlens"] = torch.arange(B + 1) * T
        handed |= {"num_items": ITEMS_FACTOR * batch.mask.sum().double(), "temperature": self.temperature}
        return {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in handed.items()}


def _scalar_of(result: Any) -> Tensor:
    """The loss among whatever came back."""
    found = result
    if isinstance(result, Mapping):
        found = result.get("loss")
    elif isinstance(result, (tuple, list)):
        found = next((value for value in result if isinstance(value, Tensor)), None)
    elif not isinstance(result, Tensor):
        found = getattr(result, "loss", None)
    if not isinstance(found, Tensor):
        raise Unusable(f"the loss must return a scalar tensor; got {type(result).__name__}.")
    if found.numel() != 1:
        raise Unusable(f"the loss must return a scalar; got shape {tuple(found.shape)}. Reduce it as training does.")
    if not found.requires_grad:
        raise Unusable("the loss that came back needs no gradient: it was detached, or its inputs were.")
    return found.reshape(())


def _unknown(name: str, parameters: list[str]) -> str:
    return (
        f"parameter {name!r} of the loss is not one that match knows (parameters: {', '.join(parameters)}). If it is "
        f'a tensor of the batch, say which: arguments={{"{name}": "old_log_probs"}} (one of {", ".join(ROLES)}); '
        f"else bind it first: functools.partial(loss_fn, {name}=...)."
    )
