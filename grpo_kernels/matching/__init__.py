"""Which LossConfig is the loss that you have: ``match`` finds it by measuring, ``shadow`` watches in training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import standard_batch, users_batch
from .call import PYTHON, Caller, Words
from .known import Said, said
from .probe import start
from .proof import Proof, beside_the_config
from .report import BESIDE, FAULTS, STRANGE, MatchReport, report_of
from .search import learn
from .shadowing import shadow
from .shapes import has_limit_as_dual

__all__ = ["MatchReport", "match", "shadow"]


def match(
    loss_fn: Callable[..., Any],
    batch: Mapping[str, Tensor] | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    temperature: float | None = None,
    device: torch.device | str | None = None,
) -> MatchReport:
    """Find the ``LossConfig`` that is your loss, by calling it in float64 on a small batch made to tell options apart.

    Your function is called some 800 times with ragged sequences (one of them empty), ratios on both sides of
    every bound, advantages of both signs and distances from the reference; its slopes are read off. What was found is
    then compared with ``grpo_loss``, value and gradient, on that batch and on a second one of other lengths, logits,
    ratios and advantages.

    Args:
        loss_fn: takes log-probs or logits and whatever else of a batch it wants, by parameter name (``old_logprobs``,
            ``response_mask``, ``advantages``, ... in the spellings of TRL, verl, OpenRLHF, CleanRL; or one dict).
            Returns the scalar to be minimised, alone or as the first tensor or the ``loss`` of what it returns.
            Bind everything else: ``functools.partial(loss, clip=0.2)``.
        batch: tensors of your own instead of the built-in ones, where sizes matter: ``mask`` (B, T), ``logits``
            (B, T or T+1, V) with ``token_ids`` (B, T), or ``log_probs`` (B, T); ``advantages`` (B,),
            ``old_log_probs``, ``ref_log_probs`` (B, T). Values are varied; the given ones are compared as well. The
            second batch then has the same sizes and mask.
        arguments: meaning of parameters whose names do not tell, ``{"x": "log_probs"}``.
        temperature: the sampler's, for a loss on logits: one that does not divide by it is then a fault.
        device: where your function wants its tensors; by default where those of ``batch`` are.

    Returns:
        MatchReport: print it, 14 lines at most. True in an ``if`` when a config has your loss's gradient and value and
        no fault was found.

    Raises:
        ValueError: the function cannot be called (unknown parameters, nothing that runs), does not return a
            differentiable scalar, draws random numbers, or is not finite on plain inputs; the message says what to do.
    """
    return match_in_words(PYTHON, loss_fn, batch, arguments, temperature, device)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Let guesses of bounds warn nobody: their numbers are not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* keeps ratios in")
        yield


@_without_warnings()
def match_in_words(
    words: Words,
    loss_fn: Callable[..., Any],
    batch: Mapping[str, Tensor] | None,
    arguments: Mapping[str, str] | None,
    temperature: float | None,
    device: torch.device | str | None,
) -> MatchReport:
    """Do what ``match`` does; ``words`` is how messages tell the reader what to do."""
    if batch is not None and not isinstance(batch, Mapping):
        raise TypeError(f"batch= must be a dict of tensors by name; got {type(batch).__name__}.")
    if device is None:
        device = next((v.device for v in (batch or {}).values() if isinstance(v, Tensor)), "cpu")
    caller = Caller(loss_fn, arguments, temperature, device, words)
    chosen = standard_batch() if batch is None else users_batch(batch)
    probe, known, says = start(caller, chosen if caller.masks else chosen.unmasked(), temperature)
    known, found, whole = learn(probe, known)
    proof = Proof(probe, known) if whole else None
    if proof is not None and proof.gradient > known.precision.matched and known.level == "sequence":
        # With one weight and advantage a sequence the two are one: only the proof can tell.
        other = known.but(level="sequence_token")
        if (again := Proof(probe, other)).gradient <= known.precision.matched:
            known, proof = other, again
    probe.refuse_state()
    says += found
    if known.precision.name:
        says.append(said("rounded", name=known.precision.name, same=known.precision.matched))
    if proof is not None:
        says += [*_proven(proof, says), *_asides(proof)]
    return report_of(probe, known, proof, says)


def _proven(proof: Proof, says: list[Said]) -> list[Said]:
    """Return what the proof adds to what was measured."""
    matched = proof.known.precision.matched
    if proof.gradient > matched:
        named = any(one.key in STRANGE.keys() - BESIDE or one.key in FAULTS for one in says)
        return [] if named else [beside_the_config(proof.probe, proof.known) or said("unproven", apart=proof.apart)]
    if proof.value > matched:
        return [said("value", share=proof.value)]
    if proof.empty:
        return [said("empty_value")]
    if proof.batches < 2:
        return [said("no_second_batch")]
    return [said("constant", constant=proof.constant)] if proof.constant else []


def _asides(proof: Proof) -> list[Said]:
    """Return faults of sign, and what else to know of a loss that is reproduced."""
    known, batch, caller = proof.known, proof.probe.batch, proof.probe.caller
    says = [said("sign")] if known.factor < 0 else []
    if proof.gradient > known.precision.matched:
        return says
    if not caller.takes("old_log_probs") and known.surrogate.uses_ratio:
        says.append(said("on_policy"))
    if known.log_ratio_limit is None and known.uses_ratio and not has_limit_as_dual(known.surrogate):
        says.append(said("no_limit"))
    if not caller.masks and known.config.aggregation == "token_mean":
        says.append(said("same_without_mask"))
    elif batch.own and len(known.lengths(batch).unique()) < 2:
        says.append(said("one_batch"))
    return says
