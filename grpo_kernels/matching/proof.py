"""The proof: the loss beside ours, value and gradient, on inputs and on a batch that nothing was fitted to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..loss import grpo_loss
from ..objectives.config import LossConfig
from .batch import Batch, Inputs
from .call import Response
from .known import DIFFERENCE, Known, Said, said
from .probe import Probe, directions, slopes_in


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


@dataclass
class Proof:
    """What the comparison gave.

    Attributes:
        gradient: largest relative difference of a token's gradient.
        value: largest difference of the loss that is not the same constant everywhere, relative to its size.
        constant: what the loss is more than ours, everywhere.
        apart: what varied when the gradients first parted; "" where they never did.
        tokens: the tokens that differ, the worst first.
        batches: on how many batches the two were compared.
    """

    gradient: float = 0.0
    value: float = 0.0
    constant: float = 0.0
    apart: str = ""
    tokens: list[Difference] = field(default_factory=list)
    batches: int = 0


@dataclass(frozen=True)
class Draw:
    """Inputs of one comparison, and what varies in them beyond those before."""

    varies: str
    inputs: Inputs


def prove(probe: Probe, known: Known) -> Proof:
    """Compare loss and config, on the batch that was fitted and on others of other lengths, ratios and advantages."""
    proof = Proof()
    gaps: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(5)
    fitted = _compare_on(probe, known, probe.batch, proof, gaps, generator, must=True)
    others = 0
    for batch in probe.held_out():
        if others < 1 or batch.own:
            others += _compare_on(probe, known, batch, proof, gaps, generator, must=False)
    proof.batches = fitted + others
    for inputs in _given(probe, known):
        _compare(probe, known, Draw("your batch", inputs), proof, gaps)
    proof.tokens.sort(key=lambda token: -abs(token.yours - token.ours))
    apart = _largest(gaps, 0.0)
    constant = float(torch.tensor([gap for gap, _ in gaps], dtype=torch.float64).median())
    if apart > known.precision.matched >= (moved := _largest(gaps, constant)):
        proof.constant, apart = constant, moved
    proof.value = apart
    return proof


def _largest(gaps: list[tuple[float, float]], constant: float) -> float:
    """Return the largest distance of a difference of values from a constant, relative to its call's size."""
    found = max((abs(gap - constant) / size for gap, size in gaps), default=0.0)
    return math.inf if any(math.isnan(gap) for gap, _ in gaps) else found


def _compare_on(
    probe: Probe,
    known: Known,
    batch: Batch,
    proof: Proof,
    gaps: list[tuple[float, float]],
    generator: torch.Generator,
    must: bool,
) -> int:
    """Compare on one batch; return 1, or 0 where the loss does not take its sizes."""
    for k, draw in enumerate(draws(probe, known, batch, generator)):
        try:
            _compare(probe, known, draw, proof, gaps)
        except Exception:  # a loss may insist on its first batch's sizes
            if must or k:
                raise
            return 0
    return 1


def _compare(probe: Probe, known: Known, draw: Draw, proof: Proof, gaps: list[tuple[float, float]]) -> None:
    theirs, their_gradient = measured(probe, known, draw.inputs)
    ours, our_gradient = predicted(known, draw.inputs)
    share = torch.nan_to_num(differences(our_gradient, their_gradient), nan=math.inf, posinf=math.inf)
    share = share.masked_fill(_beside_bounds(known, draw.inputs, our_gradient), 0.0)
    # Terms cancel in a value; their sizes are about those of the slopes.
    terms = 0.1 * float(our_gradient.norm(dim=-1).nan_to_num(0.0, posinf=0.0).sum())
    gaps.append((theirs - ours, max(abs(theirs), abs(ours), terms, 1e-3 * abs(known.factor))))
    if not share.numel():
        return
    allowed = known.precision.matched
    if float(share.max()) > allowed and not proof.apart:
        proof.apart = draw.varies
    proof.gradient = max(proof.gradient, float(share.max()))
    proof.tokens += list(_parting(known, draw.inputs, our_gradient, their_gradient, share > allowed))


def beside_the_config(probe: Probe, known: Known) -> Said | None:
    """Say it where a token has a gradient without advantages that the config does not give."""
    allowed = max(1e-6, known.precision.close) * probe.policy(known, 0.0, probe.signs()).nan_to_num().abs().max()
    for log_ratio, key in ((0.0, "own_term"), (0.5, "old_term")):
        inputs = probe.inputs(known, log_ratio, probe.zeros(), 1e-3)
        theirs = probe.slopes(known, inputs).slope.nan_to_num()
        response = Response(0.0, predicted(known, inputs)[1], None, torch.float64)
        apart = (theirs - slopes_in(known, inputs.batch, response).slope).abs()
        if bool((apart > allowed)[known.live(inputs.batch)].any()):
            return said(key)
    return None


def _beside_bounds(known: Known, inputs: Inputs, ours: Tensor) -> Tensor:
    """Return (B, T): the tokens that a bound takes or leaves by less than a loss that rounds can tell."""
    beside = torch.zeros(inputs.batch.shape, dtype=torch.bool)
    if known.precision.name:
        for slack in (-known.precision.digits, known.precision.digits):
            moved = dataclasses.replace(inputs, old=inputs.old + slack)
            beside |= differences(predicted(known, moved)[1], ours) > known.precision.matched + 2 * abs(slack)
    return beside


def _given(probe: Probe, known: Known) -> Iterator[Inputs]:
    """Yield the user's own values, the rest drawn."""
    values = probe.batch.values
    if values:
        generator = torch.Generator().manual_seed(6)
        first = next(iter(draws(probe, known, probe.batch, generator))).inputs
        drawn = {"old_log_probs": first.old, "ref_log_probs": first.ref, "advantages": first.advantages}
        yield Inputs(probe.batch, *(values.get(name, value) for name, value in drawn.items()))


def draws(probe: Probe, known: Known, batch: Batch, generator: torch.Generator) -> Iterator[Draw]:
    """Yield inputs from plain to wild: near the old policy, around every bound, then everything varied at once."""
    B, shape = batch.shape[0], batch.shape
    log_probs = known.log_probs(batch)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).double()

    def at(log_ratio: Tensor, x: Tensor | float, A: Tensor, rollout: Tensor | float = 0.0) -> Inputs:
        old = known.ratio.old(log_probs, log_ratio)
        if known.ratio is DIFFERENCE:
            old = old.clamp(max=-1e-6)  # a probability of at most 1
        return Inputs(batch, old, log_probs - x, A, old + rollout)

    far = 1.0 if known.kl.limit[0] is None else min(1.0, known.kl.limit[0] / 2)
    ones = torch.randint(0, 2, (B,), generator=generator).double() * 2 - 1
    near = 1e-3  # |x| has no slope at 0
    yield Draw("batches", at(pooled(known, batch, 1e-3 * normal(B, 1), normal(*shape) * 1e-3), near, ones))
    for points in _bounds(known):
        chosen = points[torch.randint(len(points), shape, generator=generator)]
        yield Draw("ratios", at(pooled(known, batch, chosen, 0.3 * normal(*shape)), near, ones))
    for size in (0.3, 3.0):
        yield Draw("ratios", at(pooled(known, batch, size * normal(*shape), normal(*shape)), near, ones))
    A = normal(B) * torch.exp(normal(B))
    yield Draw("sizes of advantages", at(pooled(known, batch, 0.3 * normal(*shape), normal(*shape)), near, A))
    for size in (0.05, far):
        x = size * normal(*shape)
        yield Draw("distances from the reference", at(pooled(known, batch, 0.2 * normal(*shape), 0.2), x, 0.5 * A))
    if probe.caller.takes("rollout_log_probs"):
        yield Draw(
            "the sampler's log-probs", at(pooled(known, batch, normal(*shape), 0.3), near, A, 0.7 * normal(*shape))
        )
    form = probe.caller.form
    assert form is not None
    if form.advantages == "token" and not known.whitening.text:
        yield Draw(
            "advantages inside of a sequence", at(pooled(known, batch, 0.3 * normal(*shape), 0.3), near, normal(*shape))
        )
    A = normal(B) * (torch.arange(B) % 3 > 0)
    yield Draw("everything at once", at(pooled(known, batch, normal(*shape), normal(*shape)), far * normal(*shape), A))


def _bounds(known: Known) -> Iterator[Tensor]:
    """Yield log-ratios next to every bound, on both sides of it; clear of what a loss that rounds cannot see."""
    limits = [limit for limit in (known.log_ratio_limit,) if limit and limit < 15]
    bounds = [math.log(b) for b in known.surrogate.parameters() if 0 < b < math.exp(5)] + limits
    if not bounds:
        return
    near = {1e-6: 1e-6, 1e-3: 2e-2}.get(known.precision.matched, 0.4)
    for off in {near, 1e-2 if near < 1e-2 else near}:
        yield torch.tensor([e + s * off * max(abs(e), 1e-5) for e in bounds for s in (-1, 1)], dtype=torch.float64)
    yield torch.tensor([e * f for e in bounds for f in (0.5, 1.5)] + [-2.5, -0.6, 0.5, 2.5], dtype=torch.float64)


def pooled(known: Known, batch: Batch, log_ratio: Tensor, noise: Tensor | float) -> Tensor:
    """Return (B, T) log-ratios whose pooled ones are the given ones, or each sequence's first, with noise inside."""
    log_ratio = log_ratio.expand(batch.shape)
    if known.level == "token":
        return log_ratio
    live = known.counted(batch)
    lengths = live.sum(-1, keepdim=True).clamp(min=1)
    spread = noise * live
    whole = log_ratio[:, :1] / (lengths if known.level == "sequence_product" else 1)
    return whole + spread - spread.sum(-1, keepdim=True) / lengths * live


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
    bare = dataclasses.replace(known.config, kl=dataclasses.replace(known.kl, coef=0.0), entropy_coef=0.0)
    return loss, gradient + _ours(known, inputs, log_probs, bare)[1] * (jacobian[..., None] - 1)


def _ours(known: Known, inputs: Inputs, log_probs: Tensor, config: LossConfig) -> tuple[float, Tensor]:
    batch, w = inputs.batch, known.weights
    counted = known.counted(batch)
    leaf = batch.logits[:, : batch.shape[1]].clone().requires_grad_()
    A = inputs.advantages
    denominator = w.normalizer() if w is not None else None
    out = grpo_loss(
        leaf,
        known.ids(batch),
        known.effective(A, batch) if A.dim() == 1 else A,
        counted,
        old_log_probs=known.ratio.as_difference(log_probs, inputs.old) if known.uses_ratio else None,
        ref_log_probs=inputs.ref,
        rollout_log_probs=(inputs.old if inputs.rollout is None else inputs.rollout) if known.rollout else None,
        config=config,
        normalizer=None if not denominator or not denominator.normalizer else denominator.of(counted, batch.mask),
        entropy_threshold=None if known.threshold is None else known.threshold.of(batch.entropy(), counted),
        temperature=known.temperature,
    )
    out.loss.backward()
    assert leaf.grad is not None
    return known.factor * float(out.loss.detach()), known.factor * leaf.grad


def differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return (B, T): the distance of a token's gradient rows over the larger of them, NaN where one is not finite.

    Rows a millionth of the largest are compared with that: in float64 they are what subtraction left.
    """
    size = torch.maximum(ours.norm(dim=-1), theirs.norm(dim=-1))
    largest = float(size.nan_to_num(0.0, posinf=0.0).max()) if size.numel() else 0.0
    return torch.where(size <= 1e-12 * largest, 0.0, (ours - theirs).norm(dim=-1) / size.clamp(min=1e-6 * largest))


def _parting(known: Known, inputs: Inputs, ours: Tensor, theirs: Tensor, where: Tensor) -> Iterator[Difference]:
    batch = inputs.batch
    log_probs = known.log_probs(batch)
    slopes = [slopes_in(known, batch, Response(0.0, g, None, torch.float64)).slope for g in (theirs, ours)]
    A = known.effective(inputs.advantages, batch) if inputs.advantages.dim() == 1 else inputs.advantages[:, 0]
    ratio = torch.exp(log_probs - inputs.old)
    for i, t in where.nonzero().tolist():
        yield Difference(
            i, t, float(ratio[i, t]), float(A[i]), float((log_probs - inputs.ref)[i, t]),
            float(slopes[0][i, t]), float(slopes[1][i, t]),
        )  # fmt: skip
