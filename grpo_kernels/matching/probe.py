"""Measuring a loss: its slope at every token, as a function of ratio, advantage and distance from the reference."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch, Inputs, held_out
from .call import Caller, Form, Response, Unusable
from .known import EXACT, HALF, SINGLE, Known, Precision, Said, said

Number = Tensor | float


class Slopes(NamedTuple):
    """One call in terms of tokens; (B, T)."""

    loss: float
    slope: Tensor
    """∂loss/∂ℓ."""
    entropy: Tensor
    """∂loss/∂H."""


class Probe:
    """A loss that can be called, with the batch that it is called on. What is known of it is given to every method.

    Args:
        asked: the sampler's temperature, where the user said it.
    """

    def __init__(self, caller: Caller, form: Form, batch: Batch, asked: float | None) -> None:
        self.caller, self.form, self.batch, self.asked = caller, form, batch, asked
        self.begun = self.run(Known(), _first(batch, 0.5))
        """What it gives before all other calls."""
        self.on_logits = form.source == "logits"

    def batches(self) -> list[Batch]:
        """Return the batch and others that the loss may be called on."""
        return self.batch.variants(self.caller.masks)

    def held_out(self) -> list[Batch]:
        """Return batches for the proof, the most different first; where the loss has a fault, free of what shows it."""
        batches = list(held_out(self.batch))
        if not self.caller.masks:
            batches = [batch.unmasked() for batch in batches]
        return [b.without_empty() for b in batches] if bool(self.batch.mask.any(-1).all()) else batches

    def refuse_state(self) -> None:
        """Make the first call again, after all others, at ratios on both sides of bounds.

        Raises:
            Unusable: it gives something else than at first.
        """
        _refuse_random(self.caller, self.form, _first(self.batch, 0.5), self.begun)

    def run(self, known: Known, inputs: Inputs, leaf: Tensor | None = None) -> Response:
        """Call the loss with the old log-probs where it looks for them.

        Raises:
            Unusable: the loss raised, which it had not done on plain inputs.
        """
        shifted = dataclasses.replace(inputs, old=inputs.old.roll(-known.old_shift, -1))
        try:
            return self.caller.run(self.form, shifted, leaf)
        except Unusable:
            raise
        except Exception as error:
            raise Unusable(
                f"the loss raised {type(error).__name__}: {' '.join(str(error).split())[:160]}, on tensors of other "
                "values or sizes than those of its first call: let it take any ratio, advantage and mask."
            ) from error

    def slopes(self, known: Known, inputs: Inputs) -> Slopes:
        return slopes_in(known, inputs.batch, self.run(known, inputs))

    def inputs(self, known: Known, log_ratio: Number, A: Tensor, x: Number = 0.0, batch: Batch | None = None) -> Inputs:
        """Return every token at these log-ratios and distances from the reference, with these advantages.

        Args:
            log_ratio, x: (B, T), (B, 1) or a number; at levels of prefixes the log-ratios are the pooled ones.
            A: advantages, (B,) or (B, T).
        """
        batch = self.batch if batch is None else batch
        log_probs = known.log_probs(batch)
        pooled = torch.as_tensor(log_ratio, dtype=torch.float64).expand_as(log_probs)
        old = known.ratio.old(log_probs, known.own(pooled, batch))
        return Inputs(batch, old, log_probs - x, A)

    def at(self, known: Known, log_ratio: Number, A: Tensor, x: Number = 0.0, batch: Batch | None = None) -> Slopes:
        return self.slopes(known, self.inputs(known, log_ratio, A, x, batch))

    def policy(self, known: Known, log_ratio: Number, A: Tensor | None = None, batch: Batch | None = None) -> Tensor:
        """Return (B, T) ∂(policy term)/∂(log-ratio), of prefixes the pooled one: slopes less those at advantages of 0.

        ``A``: advantages, (B,) or (B, T); None: ±1.
        """
        return self.policy_beside(known, log_ratio, A, batch)[0]

    def policy_beside(
        self, known: Known, log_ratio: Number, A: Tensor | None = None, batch: Batch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return that, and the slopes that were subtracted."""
        batch = self.batch if batch is None else batch
        A = self.signs(batch) if A is None else A
        slope, without = (self.at(known, log_ratio, a, batch=batch).slope for a in (A, torch.zeros_like(A)))
        without = torch.nan_to_num(without)
        own = (slope - without) / known.ratio.jacobian(known.log_probs(batch))
        return known.of_pooled(own, batch), without

    def policy_value(self, known: Known, log_ratio: Number, A: Tensor) -> float:
        """Return the loss less that at advantages of 0."""
        with_them, without = (self.at(known, log_ratio, a).loss for a in (A, torch.zeros_like(A)))
        return with_them - without

    def alike(self) -> tuple[Tensor, Tensor]:
        """Return what the loss takes, log-probs or logits, so that all tokens have the same log-prob, and that, (B, T).

        Whatever rounding does, it does to all of them.
        """
        if self.on_logits:
            leaf = torch.zeros_like(self.batch.logits)
            return leaf, torch.full(self.batch.shape, -math.log(leaf.shape[-1]), dtype=torch.float64)
        leaf = torch.full(self.batch.shape, -1.3, dtype=torch.float64)
        return leaf, leaf

    def signs(self, batch: Batch | None = None) -> Tensor:
        """Return (B,) advantages of both signs, + - - +: in each group of two, and of either in every second row."""
        rows = torch.arange((batch or self.batch).shape[0], dtype=torch.float64)
        return 1.0 - 2.0 * ((rows + 1) // 2 % 2)

    def zeros(self, batch: Batch | None = None) -> Tensor:
        """Return (B,) advantages of 0."""
        return torch.zeros_like(self.signs(batch))


def slopes_in(known: Known, batch: Batch, response: Response) -> Slopes:
    """Return a gradient in logits row by row as slope and entropy slope: least squares on the two directions."""
    d = response.gradient
    if response.entropy_gradient is not None:
        return Slopes(response.loss, d, response.entropy_gradient)
    toward, spread = directions(batch, known.ids(batch), known.temperature)
    aa, bb, ab = (toward * toward).sum(-1), (spread * spread).sum(-1), (toward * spread).sum(-1)
    ad, bd = (toward * d).sum(-1), (spread * d).sum(-1)
    determinant = aa * bb - ab * ab
    return Slopes(response.loss, (bb * ad - ab * bd) / determinant, (aa * bd - ab * ad) / determinant)


def directions(batch: Batch, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (B, T, V): the gradients of ℓ and of H with respect to the logits."""
    rows = batch.logits[:, : batch.shape[1]] / temperature
    log_p = torch.log_softmax(rows, -1)
    p = log_p.exp()
    chosen = torch.zeros_like(p).scatter(-1, ids[..., None], 1.0)
    log_p = torch.where(log_p == -math.inf, 0.0, log_p)  # 0·(-inf) of a column that is no token
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return (chosen - p) / temperature, -p * (log_p + entropy) / temperature


def start(caller: Caller, batch: Batch, asked: float | None) -> tuple[Probe, Known, list[Said]]:
    """Find the first form in which the loss runs, how exactly it computes, and what there is to say so far.

    Raises:
        Unusable: it runs in no form, its loss or gradient is NaN even without empty sequences, or it draws random
            numbers.
    """
    errors: list[tuple[str, Exception]] = []
    for form in caller.forms():
        for candidate, faults in ((batch, []), (batch.without_empty(), [said("empty_sequence")])):
            where = describe(form, candidate)
            try:
                response = caller.run(form, _first(candidate))
            except Exception as error:  # whatever the loss raises tells that it wants another form
                errors.append((where, error))
                break
            if torch.isfinite(response.gradient).all() and math.isfinite(response.loss):
                _refuse_random(caller, form, _first(candidate), response)
                precision = _precision(caller, form, candidate, response)
                return Probe(caller, form, candidate, asked), Known(precision), [*faults, *_shifted(caller, form)]
            errors.append((where, Unusable(f"the loss or its gradient is not finite on plain inputs ({where}).")))
    raise _why_not(caller, errors)


def _shifted(caller: Caller, form: Form) -> list[Said]:
    """Return a note where ids that are called those of a model's input are not, as far as the loss can be asked."""
    names = [name for name in caller.roles if name.lower() == "input_ids"]
    return [said("ids_as_predicted", name=name) for name in names if form.layout in ("extended", "aligned")]


def _why_not(caller: Caller, errors: list[tuple[str, Exception]]) -> Unusable:
    """Return one sentence on why the loss ran in no form, and what to do."""
    if unusable := [error for _, error in errors if isinstance(error, Unusable)]:
        return unusable[0]
    raised = [f"{type(error).__name__}: {' '.join(str(error).split())[:160]}" for _, error in errors]
    gpu_words = ("CUDA", "NVIDIA", "active drivers")
    if caller.device.type == "cpu" and any(word in text for text in raised for word in gpu_words):
        return Unusable(
            f"the loss wants a GPU, and was given tensors on a CPU (it raised {raised[0]}): let it use its inputs' "
            f"device, or run it where there is a GPU, with {caller.words.device}."
        )
    where = "every form that was tried"
    if len(set(raised)) > 1:
        where = f"the likeliest form, {errors[0][0]}, and in {len(errors) - 1} other forms"
    return Unusable(
        f"the loss raised {raised[0]} in {where}: call it yourself on such tensors to see where, or, if it insists "
        f"on sizes, {caller.words.batch}."
    )


def _first(batch: Batch, spread: float = 1e-2) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    log_probs = batch.scored(batch.token_ids, 1.0)
    old, ref = (log_probs + spread * torch.randn(batch.shape, generator=generator).double() for _ in range(2))
    return Inputs(batch, old, ref, torch.linspace(-1.2, 1.3, batch.shape[0], dtype=torch.float64))


def _refuse_random(caller: Caller, form: Form, inputs: Inputs, first: Response) -> None:
    """Call the loss again on what it was given; a sum in another order is no other loss."""
    again = caller.run(form, inputs)
    moved = float((again.gradient - first.gradient).norm()) > 1e-5 * float(first.gradient.norm())
    if moved or abs(again.loss - first.loss) > 1e-5 * max(abs(first.loss), 1e-12):
        raise Unusable(
            f"two calls on the same tensors differ (loss {first.loss:.6g} and {again.loss:.6g}), so the loss draws "
            "random numbers or keeps a state: switch dropout and sampling off (.eval()), or fix the seed inside of it."
        )


def describe(form: Form, batch: Batch) -> str:
    """Return the form in words of shapes."""
    B, T = batch.shape
    rows = {"aligned": f"({B}, {T}, V)", "flat": f"({B * T}, V)"}.get(form.layout, f"({B}, {T + 1}, V)")
    tokens = f"({B * T},)" if form.layout == "flat" else f"({B}, {T})"
    ids = f"({B}, {T + 1})" if form.layout.endswith("unshifted") else tokens
    tokens = ids if form.layout == "all_unshifted" else tokens
    advantages = {"sequence": f"({B},)", "token": tokens, "column": f"({B}, 1)"}[form.advantages]
    source = f"logits {rows}, ids {ids}" if form.source == "logits" else ""
    return f"{source or f'log_probs {tokens}'}, advantages {advantages}, mask {str(form.mask).removeprefix('torch.')}"


def _precision(caller: Caller, form: Form, batch: Batch, first: Response) -> Precision:
    """Return whether the loss rounds on the way: to fp32 it does not see a change of 1e-10, to bf16 hardly one of 1e-5.

    It is asked at three ratios, since a slope that a clip or a cap has stopped sees nothing.
    """
    if first.dtype in (torch.bfloat16, torch.float16):
        return HALF
    log_probs = batch.scored(batch.token_ids, 1.0)
    leaf = batch.logits if form.source == "logits" else log_probs
    signs = 1.0 - 2.0 * (torch.arange(batch.shape[0], dtype=torch.float64) % 2)
    found = []
    for log_ratio in (1e-5, 0.3, -0.3):
        inputs = Inputs(batch, log_probs - log_ratio, log_probs - 0.1, signs)
        plain, *moved = (caller.run(form, inputs, leaf * (1 + x)).gradient for x in (0.0, 1e-10, 1e-5, 1e-2))
        tenth, fifth, second = (int((gradient != plain).sum()) for gradient in moved)
        if second:
            found.append(HALF if fifth < 0.5 * second else SINGLE if tenth < 0.5 * second else EXACT)
    exact = min(found, key=lambda precision: precision.same, default=EXACT)
    return SINGLE if exact is EXACT and first.dtype != torch.float64 else exact
