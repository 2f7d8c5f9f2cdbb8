"""What was learnt of a loss, as a call of ours that can be made and compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loss import grpo_loss
from ..objectives.config import LossConfig
from .batch import Batch
from .call import ITEMS_FACTOR
from .probe import Probe, directions

NORMALIZERS = {
    "num_items": "num_items_in_batch",
    "sequences with tokens": "mask.any(-1).sum()",
    "nothing": "1.0",
}
"""Denominators that no aggregation has by itself, as the argument ``normalizer=``."""


@dataclass(frozen=True)
class Inputs:
    """One set of inputs of a loss; (B, T), ``advantages`` (B,)."""

    batch: Batch
    old: Tensor
    ref: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Finding:
    config: LossConfig
    factor: float
    denominator: str
    with_old: bool
    """False: the loss has no old log-probs."""

    def normalizer(self, mask: Tensor) -> float | None:
        if self.denominator == "num_items":
            return ITEMS_FACTOR * float(mask.sum())
        if self.denominator == "sequences with tokens":
            return float(mask.any(-1).sum())
        if self.denominator == "nothing":
            return 1.0
        return None

    def predict(self, probe: Probe, inputs: Inputs) -> tuple[float, Tensor]:
        """Loss and (B, T, V) gradient of ours on the inputs; with the faults that the probe carries, as they are."""
        batch = inputs.batch
        log_probs = probe.log_probs(batch)
        jacobian = probe.ratio.jacobian(log_probs)
        loss, gradient = self._ours(probe, inputs, log_probs, self.config)
        if bool((jacobian == 1).all()):
            return loss, gradient
        # A ratio that is not a difference has another slope; the KL and entropy terms keep theirs.
        _, plain = self._ours(probe, inputs, log_probs, _without_extras(self.config))
        return loss, gradient + plain * (jacobian[..., None] - 1)

    def _ours(self, probe: Probe, inputs: Inputs, log_probs: Tensor, config: LossConfig) -> tuple[float, Tensor]:
        batch = inputs.batch
        live = probe.live(batch)
        leaf = batch.logits[:, : batch.shape[1]].clone().requires_grad_()
        out = grpo_loss(
            leaf,
            probe.ids(batch),
            probe.effective(inputs.advantages, batch),
            live,
            old_log_probs=_as_difference(probe, log_probs, inputs.old) if self.with_old else None,
            ref_log_probs=inputs.ref,
            config=self._of_length(config, batch.shape[1]),
            normalizer=self._all(batch.mask) if probe.reads_padding else self.normalizer(probe.counted(batch)),
            temperature=probe.temperature,
        )
        out.loss.backward()
        assert leaf.grad is not None
        return self.factor * float(out.loss.detach()), self.factor * leaf.grad

    def _of_length(self, config: LossConfig, length: int) -> LossConfig:
        """A mean over all positions divides by this batch's length."""
        return dataclasses.replace(config, constant_length=length) if self.denominator == "positions" else config

    def _all(self, mask: Tensor) -> float | None:
        """The denominator of a loss that counts padding in its numerator alone."""
        found = self.normalizer(mask)
        return float(mask.sum()) if found is None and self.denominator == "tokens" else found


def _as_difference(probe: Probe, log_probs: Tensor, old: Tensor) -> Tensor:
    """The old log-probs that give our ratio the value that the loss's own has."""
    if probe.ratio.name == "quotient":
        return log_probs - torch.log(log_probs / old)
    return 2 * log_probs - old if probe.ratio.name == "inverted" else old


def _without_extras(config: LossConfig) -> LossConfig:
    return dataclasses.replace(config, kl=dataclasses.replace(config.kl, coef=0.0), entropy_coef=0.0)


def measured(probe: Probe, inputs: Inputs) -> tuple[float, Tensor]:
    """Loss and (B, T, V) gradient of the user's function on the inputs."""
    batch = inputs.batch
    response = probe.run(batch, inputs.old, inputs.ref, inputs.advantages)
    if response.gradient.dim() == 3:
        return response.loss, response.gradient
    slopes = probe.tokens(batch, response)
    toward, spread = directions(batch, probe.ids(batch), probe.temperature)
    return slopes.loss, slopes.slope[..., None] * toward + slopes.entropy[..., None] * spread


def differences(mine: Tensor, theirs: Tensor) -> Tensor:
    """(B, T): distance of a token's gradient rows over the larger of them; 0 where both are next to nothing.

    NaN where a row is not finite.
    """
    size = torch.maximum(mine.norm(dim=-1), theirs.norm(dim=-1))
    largest = float(size.nan_to_num(0.0, posinf=0.0).max()) if size.numel() else 0.0
    return torch.where(size <= 1e-12 * largest, 0.0, (mine - theirs).norm(dim=-1) / size)
