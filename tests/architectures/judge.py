"""Is a model's loss from hidden states the one of its own logits? Log-probs, loss and every parameter's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels import grpo_loss, hf, token_log_probs

from .heads import LinearCalls, Watch
from .inputs import Call, call_of
from .tiny import tiny

SERVED, REFUSED, WRONG, NO_BUILD = "hidden states", "refused", "WRONG", "no build"
LOG_PROBS = 1e-4
"""Nats that two log-probs of one token may be apart, in fp32."""
GRADIENT, SMALLEST = 1e-3, 1e-5
"""Of a parameter's largest gradient, and of the largest of all parameters."""
SPREAD = 0.1
"""Standard deviation of a row of logits below which a case shows nothing."""


class NoCase(Exception):
    """A class that cannot be tried here, and why."""


@dataclass(frozen=True)
class Verdict:
    kind: str
    reason: str = ""
    """Of a refusal or of no case, in one line; what differs, where it is wrong."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


@dataclass(frozen=True)
class Truth:
    """By the model's own forward."""

    logits: Tensor
    log_probs: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]
    head: str
    """In words."""
    last_layer: str
    """Of those that make as many columns as the logits have: by which they would be made of every row."""


Attach = Callable[[Any], Any]


def verdict_of(name: str, attach: Attach = hf.attach) -> tuple[Verdict, str]:
    """Build a class, call it, and say what ``attach`` made of it, and what its head is. No exception of the class
    leaves this function."""
    try:
        model, call = case_of(name)
        mine = copy.deepcopy(model)  # before the first forward: some models keep what it computed
        truth = truth_of(model, call)
    except NoCase as error:
        return Verdict(NO_BUILD, str(error)), ""
    except Exception as error:
        return Verdict(NO_BUILD, in_a_line(error)), ""
    return judge(mine, call, truth, attach), truth.head


def case_of(name: str) -> tuple[nn.Module, Call]:
    model = tiny(name)
    return model, call_of(model)


def truth_of(model: Any, call: Call) -> Truth:
    """Return what follows from the model's own logits.

    Raises:
        NoCase: they are no logits (B, T, V) of the call's tokens, or show nothing.
    """
    with Watch(model) as watch, LinearCalls(model) as linear:
        logits = _seeded(model, call).logits
    wanted = (*call.token_ids.shape[:1], call.token_ids.shape[1] + 1)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or tuple(logits.shape[:2]) != wanted:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NoCase(f"its logits are {shape}, not {wanted} rows of a vocabulary")
    rows = logits[:, :-1]
    spread = float(rows[call.mask].detach().float().clamp(-100, 100).std(-1).min())
    if not spread > SPREAD:
        raise NoCase(f"its logits show nothing: they have a standard deviation of {spread:.2g} in a row")
    head = watch.describe(logits)
    log_probs = token_log_probs(rows.float(), call.token_ids, call.mask).log_probs
    loss = grpo_loss(logits, call.token_ids, call.advantages, call.mask).loss
    loss.backward()
    return Truth(
        logits.detach(), log_probs.detach(), loss.detach(), _gradients_of(model), head, linear.last(logits.shape[-1])
    )


def judge(model: Any, call: Call, truth: Truth, attach: Attach = hf.attach) -> Verdict:
    """Return what ``attach`` makes of a model and a call, beside the truth of another model that is the same."""
    try:
        attach(model)
        with LinearCalls(model) as linear:
            output = _seeded(model, call, grpo={**call.grpo, "output": "log_probs"})
            trained = _seeded(model, call, grpo=call.grpo)
            trained.loss.backward()
        plain = _seeded(model, call).logits.detach()  # with gradients on, as the truth: kernels differ without
    except ValueError as error:
        return Verdict(REFUSED, in_a_line(error))
    except Exception as error:
        return Verdict(WRONG, f"raised {in_a_line(error)}")
    found = _unlike(truth, output.log_probs, trained, _gradients_of(model))
    if not torch.equal(plain, truth.logits):
        found = found or "without grpo=, an attached model has other logits"
    rows = linear.most_rows(truth.last_layer)
    if rows >= int(call.mask.sum()):
        found = found or f"{truth.last_layer} was applied to {rows} rows, which makes their logits"
    return Verdict(WRONG, found) if found else Verdict(SERVED)


def _seeded(model: Any, call: Call, **keywords: Any) -> Any:
    """Call a model, with the same random numbers each time."""
    torch.manual_seed(4)
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.inputs.items()}
    return model(**inputs, **keywords)


def _gradients_of(model: nn.Module) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.detach().clone() for name, gradient in gradients.items() if gradient is not None}


def _unlike(truth: Truth, log_probs: Tensor, trained: Any, gradients: Mapping[str, Tensor]) -> str:
    """Return what differs from the truth, in words."""
    for mine in (log_probs, trained.log_probs):
        apart = float((mine.detach() - truth.log_probs).abs().max())
        if not apart <= LOG_PROBS:
            return f"log-probs are {apart:.3g} nats apart"
    apart = float((trained.loss.detach() - truth.loss).abs())
    if not apart <= LOG_PROBS:
        return f"losses are {apart:.3g} apart"
    largest = max(float(gradient.abs().max()) for gradient in truth.gradients.values() if gradient.numel())
    for name, wanted in truth.gradients.items():
        mine = gradients.get(name, torch.zeros_like(wanted))
        if wanted.numel() == 0:
            continue
        limit = GRADIENT * float(wanted.abs().max()) + SMALLEST * largest
        apart = float((mine - wanted).abs().max())
        if not apart <= limit:
            return f"the gradient of {name} is {apart:.3g} apart, of {float(wanted.abs().max()):.3g}"
    for name, mine in gradients.items():
        if name not in truth.gradients and float(mine.abs().max()) > SMALLEST * largest:
            return f"{name} has a gradient, and has none from the logits"
    return ""


def in_a_line(error: BaseException) -> str:
    """Return an exception's first line, without a hint; with its type, unless it is a ValueError."""
    text = str(error).strip().partition("\n")[0]
    return text if type(error) is ValueError else f"{type(error).__name__}: {text[:200]}"
