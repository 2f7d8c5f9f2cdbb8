"""Calling a loss that somebody else wrote: which argument is what, in which shape, and what came back."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import check_positive
from ..objectives.settings import check_name, read_device
from .batch import Inputs, Unusable

GIVEN_TEMPERATURE = 0.7
"""What a parameter called temperature is given: unlike 1, so that a loss which ignores it is noticed."""
ITEMS_FACTOR = 3.7
"""Parameters such as num_items_in_batch get this many times the batch's tokens, to be told from a count of its own."""

LOG = "log(?!its)"
ROLES = {
    "logits": r"logits|(shift|policy|student|new|curr\w*)_?logits",
    "teacher_logits": r"(\w*_)?(teacher|ref|reference|tgt|target)_?logits",
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
    "log_probs": r"lp|(?!.*teacher)(\w*_)?(log_?p(rob)?s?|per_token_logps)|new_?log\w*",
}
"""Whole parameter names, in the order in which they are tried."""
NUMBERS = (
    r"(.*_)?(coef|coeff|eps|epsilon|clip|cliprange|beta|weight|ratio|scale|range|alpha|lambda|mode|type|config|args"
    r"|reduction)s?(_.*)?"
)
"""Parameters that are no tensors of a batch, whatever else their names hold."""
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
WRAP = "wrap it in a function whose parameters have names, such as def loss(log_probs, old_log_probs, advantages, mask)"
CONTAINERS = ("batch", "inputs", "data", "sample", "samples", "mini_batch", "minibatch", "micro_batch", "experience")


def role_of(name: str) -> str | None:
    """Return what a parameter of that name means; None where its name does not tell."""
    lowered = name.lower()
    if re.fullmatch(NUMBERS, lowered):
        return None
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, lowered)), None)


class Named(dict[str, Any]):
    """A batch for losses that take one mapping: a key is found under whatever name means it."""

    def __missing__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(f"{key}: the batch that match makes has {', '.join(sorted(self))}")
        return super().__getitem__(str(role_of(key)))

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (it is what get is made of)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (super().__contains__(key) or super().__contains__(role_of(key)))


@dataclass(frozen=True)
class Form:
    """How tensors are laid out for one loss."""

    source: str
    """"log_probs" or "logits": what the loss takes, and what its gradient is asked for."""
    layout: str
    """"extended": logits (B, T+1, V), the last row unused; "aligned": (B, T, V); "unshifted": logits, ids and mask of
    T+1 positions, to be shifted by the loss; "all_unshifted": log-probs and advantages of tokens too; "ids_unshifted":
    the mask shifted already; "flat": everything in one dimension."""
    advantages: str
    """"sequence" (B,), "token" (B, T), "column" (B, 1)."""
    mask: torch.dtype


@dataclass(frozen=True)
class Response:
    """What one call gave."""

    loss: float
    gradient: Tensor
    """With respect to the log-probs (B, T), or to the logits (B, T, V)."""
    entropy_gradient: Tensor | None = None
    """With respect to the entropies (B, T); None where those come with the logits."""
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Words:
    """How the reader of a message says things: in Python, or on the command line."""

    meaning: str
    """Of a parameter; ``{name}`` and ``{role}`` are filled."""
    bound: str
    """A parameter that is no tensor of the batch."""
    meanings: str
    """What says all meanings."""
    binding: str
    """What binds parameters."""
    device: str
    batch: str


PYTHON = Words(
    'arguments={{"{name}": "{role}"}}',
    "functools.partial(loss_fn, {name}=...)",
    "arguments=",
    "functools.partial",
    'match(..., device="cuda")',
    "give tensors of its own sizes as batch=",
)
COMMAND_LINE = Words(
    "--argument {name}={role}",
    "--set {name}=VALUE",
    "--argument",
    "--set",
    "--device cuda",
    "call match from Python, with tensors of its own sizes as batch=",
)


class Caller:
    """A loss function, its parameters' meanings and the form that it takes.

    Args:
        loss_fn: any callable that returns a scalar (or a tuple, dict or object that starts with or names one).
        arguments: meaning of parameters whose names do not tell: ``{"x": "log_probs"}``.
        temperature: what a parameter of that name is given.
        device: where its tensors are.
        words: how messages say what to do.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        arguments: Mapping[str, str] | None = None,
        temperature: float | None = None,
        device: torch.device | str = "cpu",
        words: Words = PYTHON,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"match needs a function; got {type(loss_fn).__name__}.")
        if temperature is not None:
            temperature = check_positive("match", "temperature", temperature, check=True)
        if arguments is not None and not isinstance(arguments, Mapping):
            wanted = 'a dict of what parameters mean, such as {"x": "log_probs"}'
            raise TypeError(f"arguments must be {wanted}; got {type(arguments).__name__}.")
        self.loss_fn = loss_fn
        self.temperature = GIVEN_TEMPERATURE if temperature is None else temperature
        self.device = read_device("device", device)
        self.words = words
        self.left_out: list[str] = []
        """Optional parameters that stay at their default."""
        self.sampler_is_old = False
        """The loss compares with the sampler alone, and its log-probs are our old ones."""
        self.container: str | None = None
        self.roles = self._roles(dict(arguments or {}))
        names = [name.lower() for name, role in self.roles.items() if role == "token_ids"]
        self.labelled = not self.takes("mask") and any("label" in name or "target" in name for name in names)
        """Masked tokens are -100 in its ids, and it has no other mask."""

    def _roles(self, arguments: dict[str, str]) -> dict[str, str]:
        """Return the role of every parameter that is given one."""
        for name, meaning in arguments.items():
            check_name(f"arguments[{name!r}]", meaning, ROLES)
        parameters = self._parameters()
        if missing := sorted(set(arguments) - set(parameters)):
            raise ValueError(
                f"{self.words.meanings} names {', '.join(missing)}; the loss takes {', '.join(parameters)}."
            )
        if "self" in parameters and parameters["self"].default is inspect.Parameter.empty and "self" not in arguments:
            method = getattr(self.loss_fn, "func", self.loss_fn)
            name = getattr(method, "__qualname__", "the loss").rpartition("<locals>.")[2]
            raise Unusable(f"{name} is a method: give that of an instance, or a function.")
        required = [p for p in parameters.values() if p.default is p.empty and p.kind not in VARIADIC]
        if len(required) == 1 and required[0].name.lower() in CONTAINERS and not arguments:
            self.container = required[0].name
            return {}
        if starred := [str(p) for p in parameters.values() if p.kind in VARIADIC] if not required else []:
            raise Unusable(f"the loss takes {', '.join(starred)}: {WRAP}")
        roles: dict[str, str] = {}
        for name, parameter in parameters.items():
            if name in getattr(self.loss_fn, "keywords", {}) or parameter.kind in VARIADIC:
                continue
            role = self._role(parameter, arguments, ", ".join(parameters))
            if role in roles.values():
                other = next(n for n, r in roles.items() if r == role)
                raise Unusable(
                    f"two parameters seem to be {role}: {name} and {other}. Bind the one that is no {role}: "
                    f"{self.words.bound.format(name=name)}; or say what it is: "
                    f"{self.words.meaning.format(name=name, role='MEANING')}."
                )
            if role is not None:
                roles[name] = role
        if "logits" not in roles.values():
            roles = self._without_teacher(roles, parameters)
        self.sampler_is_old = "old_log_probs" not in roles.values() and "rollout_log_probs" in roles.values()
        if self.sampler_is_old:
            roles = {n: "old_log_probs" if r == "rollout_log_probs" else r for n, r in roles.items()}
        if not parameters:
            raise Unusable("the loss takes no arguments: it must take log-probs or logits at least.")
        if not {"logits", "log_probs"} & set(roles.values()):
            raise Unusable(
                f"the loss takes neither log-probs nor logits that could be recognised: {', '.join(parameters)}. "
                f"Say which it is: {self.words.meaning.format(name='NAME', role='log_probs')}."
            )
        return roles

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """Return the parameters that are left of what ``functools.partial`` binds."""
        whole, bound = self.loss_fn, None
        if isinstance(self.loss_fn, functools.partial):
            whole, bound = self.loss_fn.func, self.loss_fn
        if inspect.isclass(whole):
            raise Unusable(f"{whole.__name__} is a class: give an instance of it, or a function.")
        target = whole.forward if isinstance(whole, torch.nn.Module) else whole
        try:
            parameters = inspect.signature(target).parameters
        except (TypeError, ValueError) as error:
            raise Unusable(f"the parameters of {whole!r} cannot be read: wrap it in a function.") from error
        if bound is None:
            return parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not takes_any and (unknown := sorted(set(bound.keywords) - set(parameters))):
            raise ValueError(
                f"{self.words.binding} names {', '.join(unknown)}; the loss takes {', '.join(parameters)}."
            )
        try:
            return inspect.signature(functools.partial(target, *bound.args, **bound.keywords)).parameters
        except ValueError as error:
            raise Unusable(
                f"what {self.words.binding} binds cannot be handed to the loss, which takes "
                f"{inspect.signature(target)}: {WRAP}"
            ) from error

    def _without_teacher(self, roles: dict[str, str], parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
        """Return the roles of a loss of log-probs: its teacher's logits stay at their default."""
        for name in [name for name, role in roles.items() if role == "teacher_logits"]:
            if parameters[name].default is inspect.Parameter.empty:
                raise Unusable(
                    f"the loss takes {name} beside log-probs: a teacher's rows meet whole rows of the policy, so "
                    "let it take the policy's logits, and make the log-probs of them."
                )
            self.left_out.append(name)
        return {name: role for name, role in roles.items() if role != "teacher_logits"}

    def _role(self, parameter: inspect.Parameter, arguments: dict[str, str], names: str) -> str | None:
        """Return what a parameter is given; None where it stays at its default."""
        name, optional = parameter.name, parameter.default is not parameter.empty
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise Unusable(f"parameter {name!r} can only be given by its place: {WRAP}")
        no_tensor = isinstance(parameter.default, (bool, str))  # a switch, whatever its name holds
        role = arguments.get(name, None if no_tensor else role_of(name))
        if role is None and not optional:
            raise Unusable(
                f"parameter {name!r} of the loss is not one that match knows (parameters: {names}). If it "
                f"is a tensor of the batch, say which: {self.words.meaning.format(name=name, role='old_log_probs')} "
                f"(one of {', '.join(ROLES)}); else bind it first: {self.words.bound.format(name=name)}."
            )
        if optional and (role in ("rollout_log_probs", "num_items", "cu_seqlens") or role is parameter.default is None):
            self.left_out.append(name)
            return None
        return role

    @property
    def masks(self) -> bool:
        """Whether the loss knows which tokens count: of a packed batch it is handed no others."""
        return self.takes("mask") or self.labelled or "cu_seqlens" in self.roles.values()

    def takes(self, role: str) -> bool:
        return self.container is not None or role in self.roles.values()

    def forms(self) -> Iterator[Form]:
        """Yield every form that it might want, the likeliest first."""
        shifted, unshifted = ("extended", "aligned"), ("unshifted", "all_unshifted", "ids_unshifted")
        of_logits = (*shifted, *unshifted, "flat")
        if {"input_ids", "labels"} & {name.lower() for name in self.roles}:
            of_logits = (*unshifted, *shifted, "flat")
        layouts = {"log_probs": ("aligned", "flat"), "logits": of_logits}
        packed = "cu_seqlens" in self.roles.values()
        masks = (torch.float64, torch.bool, torch.int64) if self.takes("mask") else (torch.float64,)
        sources = [source for source in layouts if self.container is not None or source in self.roles.values()]
        for source in sources[-1:] if self.container is None else sources:
            tried = ("flat",) if packed else layouts[source]
            for layout, advantages, mask in itertools.product(tried, ("sequence", "token", "column"), masks):
                if layout != "flat" or advantages == "token" or (packed and advantages == "sequence"):
                    yield Form(source, layout, advantages, mask)

    def run(self, form: Form, inputs: Inputs, leaf: Tensor | None = None) -> Response:
        """Call the loss once. ``leaf``: log-probs or logits other than the batch's own."""
        batch = inputs.batch
        if leaf is None:
            leaf = batch.logits if form.source == "logits" else batch.scored(batch.token_ids, 1.0)
        leaf = leaf.detach().clone().to(self.device).requires_grad_()
        entropy = batch.entropy().to(self.device).requires_grad_()
        with torch.enable_grad():
            # Copies: a loss may write into log-probs, which are no leaf of the graph in training either.
            try:
                loss = self.loss_of(self._lay_out(form, inputs, leaf.clone(), entropy.clone()))
            except SystemExit as error:
                raise Unusable(f"the loss ends the program (SystemExit: {error.code!r}): return a scalar.") from None
            found = torch.autograd.grad(loss, (leaf, entropy), allow_unused=True, materialize_grads=True)
        if form.layout == "all_unshifted" and found[0][:, batch.shape[1] :].any():
            raise ValueError("the loss shifts nothing: the last row, which predicts no token, has a gradient")
        gradient, of_entropy = (g[:, : batch.shape[1]].double().cpu() for g in found)
        return Response(float(loss.detach()), gradient, None if form.source == "logits" else of_entropy, loss.dtype)

    def loss_of(self, handed: dict[str, Any]) -> Tensor:
        """Return what the function returns when every role has this value, a scalar."""
        if self.container is not None:
            return _scalar_of(self.loss_fn(Named(handed)))
        return _scalar_of(self.loss_fn(**{name: handed[role] for name, role in self.roles.items()}))

    def _lay_out(self, form: Form, inputs: Inputs, leaf: Tensor, entropy: Tensor) -> dict[str, Any]:
        """Return every role's value; tensors are the loss's own, which it may overwrite."""
        batch, A = inputs.batch, inputs.advantages
        B, T = batch.shape
        ids, mask, first = batch.token_ids, batch.mask, batch.first
        if self.labelled:
            ids, first = torch.where(mask, ids, -100), torch.full_like(first, -100)
        if form.advantages != "sequence" and A.dim() == 1:
            A = A[:, None].expand(B, T if form.advantages == "token" else 1)
        if form.layout.endswith("unshifted"):
            ids = torch.cat([first[:, None], ids], 1)
        if form.layout in ("unshifted", "all_unshifted"):
            mask = torch.cat([mask.new_zeros(B, 1), mask], 1)
        handed: dict[str, Any] = {
            form.source: leaf[:, :T] if form.layout in ("aligned", "flat") else leaf,
            "token_ids": ids.clone(), "mask": mask.to(form.mask, copy=True), "advantages": A.clone(),
            "entropy": entropy, "old_log_probs": inputs.old.clone(), "ref_log_probs": inputs.ref.clone(),
            "rollout_log_probs": inputs.sampled.clone(),
        }  # fmt: skip
        if form.layout == "all_unshifted":
            for name in ("advantages", "entropy", "old_log_probs", "ref_log_probs", "rollout_log_probs"):
                if handed[name].shape == (B, T):
                    handed[name] = torch.nn.functional.pad(handed[name], (1, 0))
        if form.source == "logits":
            # Beside itself a policy has no divergence, whichever it is, and no gradient of one.
            teacher = leaf.detach() if inputs.teacher is None else inputs.teacher
            handed["teacher_logits"] = teacher[:, : handed["logits"].shape[1]].clone()
        if form.layout == "flat":
            # Packed sequences are those of the mask, one after the other; without their bounds every position is kept.
            kept = batch.mask if "cu_seqlens" in self.roles.values() else torch.ones_like(batch.mask)
            handed = {n: x[kept] if x.shape[:2] == (B, T) else x for n, x in handed.items()}
            handed["cu_seqlens"] = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
        handed |= {"num_items": ITEMS_FACTOR * batch.mask.sum().double(), "temperature": self.temperature}
        return {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in handed.items()}


def _scalar_of(result: Any) -> Tensor:
    """Return the loss among whatever came back."""
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
