"""What ``shadow=`` of a patch asks for: a package's own policy loss beside the one in its place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls.sighting import Sighting, Turns, seen

PolicyLoss = Callable[..., Any]
"""Of tensors of log-probs and options; its first result is the loss."""


def beside(loss: PolicyLoss, turns: Turns, whose: str, of: str) -> Callable[[PolicyLoss], PolicyLoss]:
    """Return what takes the place of a package's policy loss: ``loss``, which when its turn has come is compared with
    the package's own of the same arguments, value and gradient in the log-probs, argument ``of``. What trains is
    ``loss``; for a comparison both are computed once more."""
    signature = inspect.signature(loss)

    def in_place_of(theirs: PolicyLoss) -> PolicyLoss:
        @functools.wraps(loss)
        def watched(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments

            def compare(call: int) -> Sighting:
                log_probs = given[of].detach().requires_grad_()
                yours, ours = (_with_gradient(one(**{**given, of: log_probs})[0], log_probs) for one in (theirs, loss))
                return seen(call, yours, ours, log_probs.dtype, whose)

            turns.take(compare)
            return loss(*args, **kwargs)

        return watched

    return in_place_of if turns.every else lambda theirs: loss


def _with_gradient(loss: Tensor, log_probs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return loss, torch.autograd.grad(loss, [log_probs])
