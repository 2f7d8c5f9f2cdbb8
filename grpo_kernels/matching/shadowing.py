"""Ours in training, yours beside it every so often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calls.outputs import LossOutput, TokenLogProbs
from ..calls.sighting import LOG, Sighting, Turns, seen
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.checks import check_scalar, fail, ordinary
from ..objectives.config import LossConfig
from ..objectives.settings import read_integer, shown
from .call import Caller


def shadow(
    loss_fn: Callable[..., Any],
    config: LossConfig | str = "grpo",
    *,
    factor: float = 1.0,
    every: int = 50,
    log: Callable[[str], Any] | None = None,
    arguments: Mapping[str, str] | None = None,
) -> Shadow:
    """``grpo_loss`` with your loss run beside it on every ``every``-th call; differences are logged.

    Call what it returns as you would call ``grpo_loss``; what trains is ours. On a watched call your function gets
    copies of the same tensors in their own precision (the log-probs by ``token_log_probs``), into which it may write,
    so the difference is what your training would see. A difference of the gradients above what rounding makes in the
    dtype of the logits (1e-4 in fp32, 3e-2 in half precision) is logged at WARNING, which Python shows without any
    setting, others at INFO. Such a call holds several more tensors of the logits' size, one of them their copy, which
    is made for a function that takes logits. An error in your function is logged and training goes on.

    Args:
        loss_fn: as for ``match``; it gets the tensors as they are handed to this call, in their shapes.
        config: of ours; ``match(loss_fn).config``.
        factor: your loss is this times ours; ``match(loss_fn).factor``.
        every: calls between two comparisons; the first call is compared.
        log: gets each line of text as well; lines go to the logger ``grpo_kernels.shadow`` in any case.
        arguments: as for ``match``.

    Returns:
        A callable; its ``history`` is a list of ``Sighting(call, yours, ours, gradient_difference, rounding)``.

    Raises:
        ValueError: an ``every`` that is no integer from 1, a ``factor`` that is 0 or no finite number, or parameters of
            the loss that are not understood.
    """
    count = read_integer(every)
    if count is None or count < 1:
        raise ValueError(f"shadow(every=...) must be an integer, at least 1; got {shown(every)}.")
    number = check_scalar("shadow", "factor", factor, check=True)
    if not number:
        fail("shadow", "a factor other than 0", repr(factor))
    return Shadow(Caller(loss_fn, arguments), config, number, count, log)


class Shadow:
    """What ``shadow`` returns."""

    def __init__(
        self, caller: Caller, config: LossConfig | str, factor: float, every: int, log: Callable[[str], Any] | None
    ) -> None:
        self.caller = caller
        self.config, self.factor = config, factor
        self.log = log
        self.history: list[Sighting] = []
        self._turns = Turns(every, "your loss raised")

    def __call__(
        self, logits: Tensor, token_ids: Tensor, advantages: Tensor, mask: Tensor | None = None, **options: Any
    ) -> LossOutput:
        sighting = self._turns.take(lambda call: self._compare(call, logits, token_ids, advantages, mask, **options))
        if sighting is not None:
            self._tell(sighting)
        return grpo_loss(logits, token_ids, advantages, mask, config=self.config, **options)

    def _tell(self, sighting: Sighting) -> None:
        self.history.append(sighting)
        if self.log is not None:
            try:
                self.log(str(sighting))
            except Exception as error:  # which must not stop training either
                LOG.warning("shadow, call %d: log= raised %s: %s", sighting.call, type(error).__name__, error)

    def _compare(
        self, call: int, logits: Tensor, ids: Tensor, A: Tensor, mask: Tensor | None, **options: Any
    ) -> Sighting:
        plain = {name: value for name, value in options.items() if name not in ("inplace", "grad_scale")}
        leaf = ordinary(logits)[0].detach().requires_grad_()  # the memory of the caller's, which ours only reads
        out = grpo_loss(leaf, ids, A, mask, config=self.config, **plain)
        ours = torch.autograd.grad(out.loss, leaf)[0].float() * self.factor
        yours, theirs = self._yours(leaf, ids, A, mask, **options)
        return seen(call, (yours, [theirs]), (self.factor * out.loss, [ours]), logits.dtype)

    def _yours(
        self, leaf: Tensor, ids: Tensor, A: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the user's function, which may overwrite all that it is handed, and its gradient."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        given = options.get("normalizer")
        beside = ("old_log_probs", "ref_log_probs", "rollout_log_probs", "cu_seqlens")
        handed = {name: options.get(name) for name in beside} | {
            "token_ids": ids, "mask": mask, "advantages": A, "temperature": options.get("temperature", 1.0),
            "num_items": mask.sum() if given is None else getattr(given, "value", given),
        }  # fmt: skip
        if self.caller.takes("teacher_logits"):
            handed["teacher_logits"] = getattr(options.get("teacher"), "logits", None)
        leaves = []
        if self.caller.takes("log_probs") or self.caller.takes("entropy"):
            scaling = {n: options[n] for n in ("temperature", "logit_scale", "logit_softcap") if n in options}
            found = token_log_probs(leaf, ids, mask, **scaling)
            handed |= {"log_probs": found.log_probs, "entropy": found.entropy}
            leaves.append(leaf)
        handed = {n: v.log_probs if isinstance(v, TokenLogProbs) else v for n, v in handed.items()}
        handed = {n: v.clone() if isinstance(v, Tensor) else v for n, v in handed.items()}
        if self.caller.takes("logits"):
            # No leaf can be overwritten: the gradient is asked for of zeros without memory that are added to the copy.
            zeros = leaf.new_full((), -0.0).expand_as(leaf).requires_grad_()
            handed["logits"] = leaf.detach().clone().add_(zeros)
            leaves.append(zeros)
        loss = self.caller.loss_of(handed)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss, sum(gradients[1:], gradients[0])
