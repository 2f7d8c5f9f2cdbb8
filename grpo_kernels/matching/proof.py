"""The proof: the loss beside ours, value and gradient, on inputs and on a batch that nothing was fitted to."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls.teacher import Teacher
from ..loss import grpo_loss
from ..objectives.config import LossConfig
from .batch import Batch, Inputs, taken
from .call import Response, Unusable
from .known import DIFFERENCE, HALF, Known, Said, said
from .probe import Number, Probe, directions, slopes_in


@dataclass(frozen=True)
class Difference:
    """A token at which the two losses part."""

    sequence: int
    position: int
    ratio: float
    advantage: float
    distance: float
    """ℓ - ref."""
    yours: float
    ours: float
    """Slopes ∂loss/∂ℓ."""

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, token {self.position}: ratio {self.ratio:.4g}, A {self.advantage:+.3g}, "
            f"ℓ - ref {self.distance:+.3g}: slope {self.yours:+.4g}, ours {self.ours:+.4g}"
        )


class Proof:
    """What the comparison of a loss and its config gave.

    Attributes:
        gradient: largest relative difference of a token's gradient.
        value: largest difference of the loss that is not the same constant everywhere, relative to its size.
        constant: what the loss is more than ours, everywhere.
        empty: the values are only equal where no sequence is empty.
        apart: what varied when the gradients first parted; "" where they never did.
        tokens: the tokens that differ, the worst first.
        batches: on how many batches the two were compared.
    """

    def __init__(self, probe: Probe, known: Known) -> None:
        """Compare on the batch that was fitted and on others of other lengths, ratios and advantages."""
        self.probe, self.known = probe, known
        self.gradient, self.apart = 0.0, ""
        self.tokens: list[Difference] = []
        self._gaps: list[tuple[float, float]] = []
        """Of each call: what the loss is more than ours, and the size of its value."""
        generator = torch.Generator().manual_seed(5)
        tried = taken(lambda batch: self._compare_on(batch, generator), (probe.batch, *probe.held_out()))
        batches = list(tried if probe.batch.own else itertools.islice(tried, 2))
        self.batches = len(batches)
        for inputs in _given(probe, known):
            self._compare("your batch", inputs)
        self.value, self.constant = self._of_values()
        self.empty = False
        if self.value > known.precision.matched and not all(bool(b.mask.any(-1).all()) for b in batches):
            self._gaps = []
            for batch in batches:
                self._compare_on(batch.without_empty(), generator)
            value, constant = self._of_values()
            if value <= known.precision.matched and not constant:
                self.value, self.empty = value, True
        self.tokens.sort(key=lambda token: -abs(token.yours - token.ours))

    def _of_values(self) -> tuple[float, float]:
        """Return the largest difference of values, relative to its call's size, and a constant that was taken off."""

        def largest(constant: float) -> float:
            shares = [abs(gap - constant) / size for gap, size in self._gaps]
            return math.inf if any(map(math.isnan, shares)) else max(shares, default=0.0)

        constant = float(torch.tensor([gap for gap, _ in self._gaps], dtype=torch.float64).median())
        matched = self.known.precision.matched
        needed = largest(0.0) > matched >= largest(constant)
        return (largest(constant), constant) if needed else (largest(0.0), 0.0)

    def _compare_on(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Compare on one batch, and return it; a batch that the loss does not take leaves nothing behind."""
        gradient, apart, tokens, gaps = self.gradient, self.apart, len(self.tokens), len(self._gaps)
        try:
            for varies, inputs in draws(self.probe, self.known, batch, generator):
                self._compare(varies, inputs)
        except Unusable:
            self.gradient, self.apart = gradient, apart
            del self.tokens[tokens:], self._gaps[gaps:]
            raise
        return batch

    def _compare(self, varies: str, inputs: Inputs) -> None:
        known = self.known
        theirs, their_gradient = measured(self.probe, known, inputs)
        ours, our_gradient = predicted(known, inputs)
        share = torch.nan_to_num(differences(known, our_gradient, their_gradient), nan=math.inf, posinf=math.inf)
        share = share.masked_fill(_beside_bounds(known, inputs, our_gradient), 0.0)
        # Terms cancel in a value; their sizes are about those of the slopes.
        terms = 0.1 * float(our_gradient.norm(dim=-1).nan_to_num(0.0, posinf=0.0).sum())
        self._gaps.append((theirs - ours, max(abs(theirs), abs(ours), terms, 1e-3 * abs(known.factor))))
        parted = share > known.precision.matched
        if not self.apart and bool(parted.any()):
            self.apart = varies
        self.gradient = max(self.gradient, float(share.max()))
        self.tokens += list(_parting(known, inputs, our_gradient, their_gradient, parted))


def beside_the_config(probe: Probe, known: Known) -> Said | None:
    """Say it where a token has a gradient without advantages that the config does not give."""
    allowed = max(1e-6, known.precision.close) * probe.policy(known, 0.0).nan_to_num().abs().max()
    for log_ratio, key in ((0.0, "own_term"), (0.5, "old_term")):
        inputs = probe.inputs(known, log_ratio, probe.zeros(), 1e-3)
        theirs = probe.slopes(known, inputs).slope.nan_to_num()
        apart = (theirs - slopes_of(known, inputs, predicted(known, inputs)[1])).abs()
        if bool((apart > allowed)[known.live(inputs.batch)].any()):
            return said(key)
    return None


def slopes_of(known: Known, inputs: Inputs, gradient: Tensor) -> Tensor:
    """Return the (B, T) slopes of a gradient with respect to the logits."""
    return slopes_in(known, inputs.batch, Response(0.0, gradient)).slope


def _beside_bounds(known: Known, inputs: Inputs, ours: Tensor) -> Tensor:
    """Return (B, T): the tokens that a bound takes or leaves by less than a loss that rounds can tell.

    A log-prob is rounded by a share of itself: of -10 bf16 keeps 4 %, and nothing can be told of less likely tokens.
    """
    beside = torch.zeros(inputs.batch.shape, dtype=torch.bool)
    if not known.precision.name:
        return beside
    sizes = 1 + known.log_probs(inputs.batch).abs() / 8
    for slack in (-known.precision.digits, known.precision.digits):
        moved = dataclasses.replace(inputs, old=inputs.old + slack * sizes)
        allowed = known.precision.matched + 2 * abs(slack) * sizes
        beside |= differences(known, predicted(known, moved)[1], ours) > allowed
    return beside | (sizes * known.precision.digits > 0.12) if known.precision is HALF else beside


def _given(probe: Probe, known: Known) -> Iterator[Inputs]:
    """Yield the user's own values, the rest drawn."""
    if given := probe.batch.values:
        _, drawn = next(draws(probe, known, probe.batch, torch.Generator().manual_seed(6)))
        values = {"old_log_probs": drawn.old, "ref_log_probs": drawn.ref, "advantages": drawn.advantages} | given
        yield Inputs(probe.batch, *values.values())


def draws(probe: Probe, known: Known, batch: Batch, generator: torch.Generator) -> Iterator[tuple[str, Inputs]]:
    """Yield inputs from plain to wild, with what varies: near the old policy, around every bound, then everything."""
    B, shape = batch.shape[0], batch.shape
    log_probs = known.log_probs(batch)

    def normal(*size: int) -> Tensor:
        return torch.randn(*(size or shape), generator=generator).double()

    def at(log_ratio: Tensor, A: Tensor, noise: Number = 0.3, x: Number = 1e-3, rollout: Number = 0.0) -> Inputs:
        old = known.ratio.old(log_probs, pooled(known, batch, log_ratio, noise))
        if known.ratio is DIFFERENCE:
            # A probability of at most 1; of confident tokens no two ratios alike, of which one is a prefix's least.
            old = torch.minimum(old, -1e-6 * (1 + torch.arange(shape[1])))
        return Inputs(batch, old, log_probs - x, A, old + rollout)  # |x| has no slope at 0

    far = 1.0 if known.kl.limit[0] is None else min(1.0, known.kl.limit[0] / 2)
    ones = torch.randint(0, 2, (B,), generator=generator).double() * 2 - 1
    yield "batches", at(1e-3 * normal(B, 1), ones, 1e-3 * normal())
    for points in _bounds(known):
        chosen = points[torch.randint(len(points), shape, generator=generator)]
        yield "ratios", at(chosen, ones, 0.3 * normal())
    for size in (0.3, 3.0):
        yield "ratios", at(size * normal(), ones, normal())
    A = normal(B) * torch.exp(normal(B))
    yield "sizes of advantages", at(0.3 * normal(), A, normal())
    for size in (0.05, far):
        x = size * normal()
        yield "distances from the reference", at(0.2 * normal(), 0.5 * A, 0.2, x)
    if probe.caller.takes("rollout_log_probs"):
        yield "the sampler's log-probs", at(normal(), A, rollout=0.7 * normal())
    if probe.form.advantages == "token" and not known.whitening.text:
        yield "advantages inside of a sequence", at(0.3 * normal(), normal())
    if known.kl.coef:
        yield "distances from the reference", at(1e-3 * normal(), A, 1e-3, 4 * normal())
    if known.rollout_kl.coef and probe.caller.takes("rollout_log_probs"):
        yield "the sampler's log-probs", at(1e-3 * normal(B, 1), A, 1e-3, rollout=4 * normal())
    if probe.caller.takes("teacher_logits") and probe.on_logits:
        for size in (0.3, 3.0):
            teacher = batch.logits + size * normal(*batch.logits.shape)
            yield "the teacher's rows", dataclasses.replace(at(0.3 * normal(), A, normal()), teacher=teacher)
    A = normal(B) * (torch.arange(B) % 3 > 0)
    A[-1] = 1e-4
    yield "all of it", at(normal(), A, normal(), far * normal())


def _bounds(known: Known) -> Iterator[Tensor]:
    """Yield log-ratios next to every bound, on both sides of it; clear of what a loss that rounds cannot see."""
    limit = known.log_ratio_limit
    bounds = [*known.bounds(), *([limit] if limit and limit < 15 else [])]
    if not bounds:
        return
    near = {1e-6: 1e-6, 1e-3: 2e-2}.get(known.precision.matched, 0.4)
    for off in {near, max(near, 1e-2)}:
        yield torch.tensor([e + s * off * max(abs(e), 1e-5) for e in bounds for s in (-1, 1)], dtype=torch.float64)
    yield torch.tensor([e * f for e in bounds for f in (0.5, 1.5)] + [-2.5, -0.6, 0.5, 2.5], dtype=torch.float64)


def pooled(known: Known, batch: Batch, log_ratio: Tensor, noise: Number) -> Tensor:
    """Return (B, T) log-ratios whose pooled ones are the given ones, or each sequence's first, with noise inside."""
    log_ratio = log_ratio.expand(batch.shape)
    if known.level == "token":
        return log_ratio
    if known.level == "prefix_min":
        # Those of half of the sequences fall, so that each is a least. No two are equal but for rounding: what they are
        # lowered by is no multiple of what a bound's two sides are apart.
        falling = log_ratio.sort(-1, descending=True).values
        log_ratio = torch.where(torch.arange(len(log_ratio))[:, None] % 2 == 0, falling, log_ratio)
        return log_ratio - known.precision.order * math.pi * torch.arange(batch.shape[1])
    if known.level == "prefix_product":
        return known.own(log_ratio, batch)
    counted, lengths = known.counted(batch), known.lengths(batch)
    spread = noise * counted
    whole = log_ratio[:, :1] / (lengths if known.level == "sequence_product" else 1)
    return whole + spread - spread.sum(-1, keepdim=True) / lengths * counted


def measured(probe: Probe, known: Known, inputs: Inputs) -> tuple[float, Tensor]:
    """Return loss and (B, T, V) gradient of the user's function on the inputs."""
    response = probe.run(known, inputs)
    if response.gradient.dim() == 3:
        return response.loss, response.gradient
    slopes = slopes_in(known, inputs.batch, response)
    toward, spread = directions(inputs.batch, known.ids(inputs.batch), known.temperature)
    return slopes.loss, slopes.slope[..., None] * toward + slopes.entropy[..., None] * spread


def predicted(known: Known, inputs: Inputs) -> tuple[float, Tensor]:
    """Return loss and (B, T, V) gradient of ours on the inputs; with the faults of the loss, as they are."""
    log_probs = known.log_probs(inputs.batch)
    jacobian = known.ratio.jacobian(log_probs)
    loss, gradient = _ours(known, inputs, log_probs, known.config)
    if bool((jacobian == 1).all()):
        return loss, gradient
    # A ratio that is not a difference has another slope; the KL and entropy terms keep theirs.
    none = {name: dataclasses.replace(getattr(known, name), coef=0.0) for name in ("kl", "rollout_kl")}
    bare = dataclasses.replace(known.config, entropy_coef=0.0, divergence=None, **none)
    return loss, gradient + _ours(known, inputs, log_probs, bare)[1] * (jacobian[..., None] - 1)


def _ours(known: Known, inputs: Inputs, log_probs: Tensor, config: LossConfig) -> tuple[float, Tensor]:
    batch, counted = inputs.batch, known.counted(inputs.batch)
    leaf = batch.logits[:, : batch.shape[1]].clone().requires_grad_()
    denominator = known.weights.divisor
    out = grpo_loss(
        leaf,
        known.ids(batch),
        known.effective(inputs.advantages, batch),
        counted,
        old_log_probs=known.ratio.as_difference(log_probs, inputs.old) if known.takes_old else None,
        ref_log_probs=inputs.ref,
        rollout_log_probs=inputs.sampled if known.takes_rollout else None,
        config=config,
        normalizer=denominator.of(counted, batch.mask) if denominator.normalizer else None,
        entropy_threshold=None if known.threshold is None else known.threshold.of(batch.entropy(), counted),
        temperature=known.temperature,
        teacher=None if config.divergence is None else _teacher(inputs),
    )
    out.loss.backward()
    assert leaf.grad is not None
    return known.factor * float(out.loss.detach()), known.factor * leaf.grad


def _teacher(inputs: Inputs) -> Teacher:
    rows = inputs.batch.logits if inputs.teacher is None else inputs.teacher
    return Teacher(logits=rows[:, : inputs.batch.shape[1]].contiguous())


def differences(known: Known, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return (B, T): the distance of a token's gradient rows over the larger of them, NaN where one is not finite.

    Rows a millionth of the largest are compared with that: in float64 they are what subtraction left. In a loss that
    rounds, subtraction leaves more.
    """
    size = torch.maximum(ours.norm(dim=-1), theirs.norm(dim=-1))
    largest = float(size.nan_to_num(0.0, posinf=0.0).max()) if size.numel() else 0.0
    floor = known.precision.floor * largest
    return torch.where(size <= 1e-12 * largest, 0.0, (ours - theirs).norm(dim=-1) / size.clamp(min=floor))


def _parting(known: Known, inputs: Inputs, ours: Tensor, theirs: Tensor, where: Tensor) -> Iterator[Difference]:
    log_probs, A = known.log_probs(inputs.batch), known.effective(inputs.advantages, inputs.batch)
    A = A.expand(where.T.shape).T if A.dim() == 1 else A
    columns = [torch.exp(log_probs - inputs.old), A, log_probs - inputs.ref]
    columns += [slopes_of(known, inputs, gradient) for gradient in (theirs, ours)]
    for i, t in where.nonzero().tolist():
        yield Difference(i, t, *(float(column[i, t]) for column in columns))
