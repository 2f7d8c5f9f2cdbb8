"""Measuring a loss: its slope at every token, as a function of ratio, advantage and distance from the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .call import Caller, Form, Response, Unusable
from .whitening import Whitening

EXACT, ROUNDED = 1e-9, 2e-4
"""Relative differences that count as none: for a loss in float64, and for one that rounds to fp32 on the way."""


@dataclass(frozen=True)
class Ratio:
    """How a loss compares a log-prob with the old one."""

    name: str
    old: Callable[[Tensor, Tensor], Tensor]
    """The old log-prob at which the ratio of ``log_prob`` is exp(log_ratio)."""
    jacobian: Callable[[Tensor], Tensor]
    """d log(ratio) / d log_prob."""


DIFFERENCE = Ratio("difference", lambda lp, x: lp - x, torch.ones_like)
QUOTIENT = Ratio("quotient", lambda lp, x: lp * torch.exp(-x), lambda lp: 1 / lp)
INVERTED = Ratio("inverted", lambda lp, x: lp + x, lambda lp: -torch.ones_like(lp))


@dataclass(frozen=True)
class Slopes:
    """One call in terms of tokens; (B, T)."""

    loss: float
    slope: Tensor
    """∂loss/∂ℓ."""
    entropy: Tensor
    """∂loss/∂H."""


class Probe:
    """A loss that can be called, with what has been learnt of it so far."""

    def __init__(self, caller: Caller, batch: Batch) -> None:
        self.caller = caller
        self.batch = batch
        self.temperature = 1.0
        self.offset = 1
        """Which token row t of the logits scores: 1 the one that it predicts, 0 its own input."""
        self.ratio = DIFFERENCE
        self.whitening = Whitening()
        self.old_shift = 0
        """The loss compares the log-prob at t with the old one at t - old_shift."""
        self.mask_shift = 0
        self.dropped: tuple[int, ...] = ()
        """Columns (0, -1) that it leaves out."""
        self.reads_padding = False
        self.tolerance = EXACT

    def log_probs(self, batch: Batch) -> Tensor:
        return batch.scored(self.ids(batch), self.temperature)

    def ids(self, batch: Batch) -> Tensor:
        everything = torch.cat([batch.first[:, None], batch.token_ids, batch.token_ids[:, :1]], 1)
        return everything[:, self.offset : self.offset + batch.shape[1]]

    def live(self, batch: Batch) -> Tensor:
        """(B, T): the tokens that the loss counts."""
        if self.reads_padding:
            return torch.ones_like(batch.mask)
        live = batch.mask.roll(self.mask_shift, -1)
        live[:, list(self.dropped)] = False
        return live

    def counted(self, batch: Batch) -> Tensor:
        """(B, T): the tokens that its denominators count."""
        return batch.mask if self.reads_padding else self.live(batch)

    def effective(self, advantages: Tensor, batch: Batch | None = None) -> Tensor:
        """(B,): the advantages after whatever the loss does to them."""
        batch = self.batch if batch is None else batch
        return self.whitening.apply(advantages, self.live(batch))

    def call(self, batch: Batch, old: Tensor, ref: Tensor, advantages: Tensor) -> Slopes:
        return self.tokens(batch, self.run(batch, old, ref, advantages))

    def run(self, batch: Batch, old: Tensor, ref: Tensor, advantages: Tensor, leaf: Tensor | None = None) -> Response:
        """``Caller.run`` with the old log-probs where the loss looks for them."""
        return self.caller.run(batch, old.roll(-self.old_shift, -1), ref, advantages, leaf)

    def tokens(self, batch: Batch, response: Response) -> Slopes:
        """A gradient with respect to logits, row by row as slope and entropy slope: least squares on the two."""
        zero = torch.zeros(batch.shape, dtype=torch.float64)
        if response.gradient.dim() == 2:
            entropy = zero if response.entropy_gradient is None else response.entropy_gradient.double()
            return Slopes(response.loss, response.gradient, entropy)
        toward, spread = directions(batch, self.ids(batch), self.temperature)
        d = response.gradient
        aa, bb, ab = (toward * toward).sum(-1), (spread * spread).sum(-1), (toward * spread).sum(-1)
        ad, bd = (toward * d).sum(-1), (spread * d).sum(-1)
        determinant = aa * bb - ab * ab
        slope, entropy = (bb * ad - ab * bd) / determinant, (aa * bd - ab * ad) / determinant
        return Slopes(response.loss, slope, entropy)

    def at(
        self, log_ratio: Tensor | float, advantages: Tensor, x: Tensor | float = 0.0, batch: Batch | None = None
    ) -> Slopes:
        """Every token at these log-ratios and these distances from the reference; (B, T), (B, 1) or a number."""
        batch = self.batch if batch is None else batch
        log_probs = self.log_probs(batch)
        old = self.ratio.old(log_probs, torch.as_tensor(log_ratio, dtype=torch.float64).expand_as(log_probs))
        return self.call(batch, old, log_probs - x, advantages)

    def policy(
        self, log_ratio: Tensor | float, advantages: Tensor, x: Tensor | float = 0.0, batch: Batch | None = None
    ) -> Tensor:
        """(B, T) ∂(policy term)/∂(log-ratio): the slope less that at advantages of 0, which KL and entropy make."""
        batch = self.batch if batch is None else batch
        without = self.at(log_ratio, torch.zeros_like(advantages), x, batch).slope
        difference = self.at(log_ratio, advantages, x, batch).slope - torch.nan_to_num(without)
        return difference / self.ratio.jacobian(self.log_probs(batch))

    def signs(self, batch: Batch | None = None) -> Tensor:
        """(B,): advantages of both signs in turn."""
        batch = self.batch if batch is None else batch
        return 1.0 - 2.0 * (torch.arange(batch.shape[0], dtype=torch.float64) % 2)


def directions(batch: Batch, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, T, V): the gradients of ℓ and of H with respect to the logits."""
    rows = batch.logits[:, : batch.shape[1]] / temperature
    log_p = torch.log_softmax(rows, -1)
    p = log_p.exp()
    chosen = torch.zeros_like(p).scatter(-1, ids[..., None], 1.0)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return (chosen - p) / temperature, -p * (log_p + entropy) / temperature


def start(caller: Caller, batch: Batch) -> tuple[Probe, list[str]]:
    """The first form in which the loss runs, and the names of faults that showed on the way.

    Raises:
        Unusable: it runs in none, or its loss or gradient is NaN even without empty sequences.
    """
    errors: list[str] = []
    not_finite = None
    unusable: Unusable | None = None
    for form in caller.forms():
        for candidate, faults in ((batch, []), (batch.without_empty(), ["empty_sequence"])):
            try:
                response = _first(caller, form, candidate)
            except Unusable as error:  # it ran, and gave something else than a loss; another form may suit it
                unusable = unusable or error
                break
            except Exception as error:  # whatever the loss raises tells that it wants another form
                errors.append(f"{describe(form, candidate)}: {type(error).__name__}: {str(error)[:200]}")
                break
            if torch.isfinite(response.gradient).all() and abs(response.loss) < float("inf"):
                caller.form = form
                probe = Probe(caller, candidate)
                probe.tolerance = _tolerance(probe, response)
                return probe, list(faults)
            not_finite = not_finite or form
    if not_finite is not None:
        raise Unusable(f"the loss or its gradient is not finite on plain inputs ({describe(not_finite, batch)}).")
    if unusable is not None:
        raise unusable
    reasons = {error.partition(": ")[2] for error in errors}
    if len(reasons) == 1:
        raise Unusable(f"the loss raised {reasons.pop()} in every form that was tried.")
    raise Unusable("the loss ran in none of the forms that were tried:\n  " + "\n  ".join(errors))


def _first(caller: Caller, form: Form, batch: Batch) -> Response:
    generator = torch.Generator().manual_seed(1)
    log_probs = batch.scored(batch.token_ids, 1.0)
    old, ref = (log_probs + 1e-2 * torch.randn(batch.shape, generator=generator).double() for _ in range(2))
    advantages = torch.linspace(-1.2, 1.3, batch.shape[0], dtype=torch.float64)
    return caller.run_form(form, batch, old, ref, advantages)


def describe(form: Form, batch: Batch) -> str:
    """The form in words of shapes."""
    B, T = batch.shape
    sizes = {"extended": f"({B}, {T + 1}, V)", "aligned": f"({B}, {T}, V)", "unshifted": f"({B}, {T + 1}, V)"}
    tokens = f"({B * T},)" if form.layout == "flat" else f"({B}, {T})"
    ids = f"({B}, {T + 1})" if form.layout == "unshifted" else tokens
    advantages = {"sequence": f"({B},)", "token": tokens, "column": f"({B}, 1)"}[form.advantages]
    source = f"logits {sizes.get(form.layout, f'({B * T}, V)')}, ids {ids}" if form.source == "logits" else ""
    return f"{source or f'log_probs {tokens}'}, advantages {advantages}, mask {str(form.mask).removeprefix('torch.')}"


def _tolerance(probe: Probe, first: Response) -> float:
    """Whether the loss rounds on the way: it then does not see a change of 1e-10."""
    if first.dtype != torch.float64:
        return ROUNDED
    form, batch = probe.caller.form, probe.batch
    assert form is not None
    leaf = batch.logits if form.source == "logits" else batch.scored(batch.token_ids, 1.0)
    log_probs = batch.scored(batch.token_ids, 1.0)
    plain, near, far = (
        probe.run(batch, log_probs - 1e-5, log_probs - 0.1, probe.signs(), leaf=leaf * scale)
        for scale in (1.0, 1.0 + 1e-10, 1.0 + 1e-3)
    )

    def same(a: Response, b: Response) -> bool:
        return torch.equal(a.gradient, b.gradient) and a.loss == b.loss

    return ROUNDED if same(plain, near) and not same(plain, far) else EXACT
