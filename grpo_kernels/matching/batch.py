"""The batch that a loss is called on to learn what it computes: small, float64, made to tell options apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..objectives.checks import check_ids_dtype, read_mask

VOCAB = 13
LENGTHS = (7, 5, 1, 0, 6, 3, 4, 2, 6, 7, 3, 1, 7, 4, 5, 5)
"""Ragged, one of them empty; groups of 2, 4 and 8 differ in size."""
LARGEST = 10_000_000
"""Elements of a user's logits."""
KEYS = ("logits", "log_probs", "token_ids", "mask", "advantages", "old_log_probs", "ref_log_probs")


Found = TypeVar("Found")


class Unusable(ValueError):
    """The loss cannot be called as it is."""


@dataclass(frozen=True)
class Inputs:
    """One set of inputs of a loss.

    Args:
        old, ref: (B, T) log-probs.
        advantages: (B,) or (B, T).
        rollout: (B, T), the sampler's log-probs; None: the old ones.
        teacher: (B, T+1, V), its logits; None: those of the policy itself.
    """

    batch: Batch
    old: Tensor
    ref: Tensor
    advantages: Tensor
    rollout: Tensor | None = None
    teacher: Tensor | None = None

    @property
    def sampled(self) -> Tensor:
        return self.old if self.rollout is None else self.rollout


@dataclass(frozen=True)
class Batch:
    """Logits (B, T+1, V), float64; row t predicts ``token_ids[:, t]``. ``first`` (B,) are the tokens before them."""

    logits: Tensor
    first: Tensor
    token_ids: Tensor
    mask: Tensor
    """(B, T), bool."""
    own: bool = False
    """The user's: its sizes stay as they are."""
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """advantages, old_log_probs, ref_log_probs of a user's batch."""
    _log_softmax: dict[float, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    """By temperature: some 800 calls of a loss ask for it twice each."""

    @property
    def shape(self) -> torch.Size:
        return self.token_ids.shape

    def scored(self, ids: Tensor, temperature: float) -> Tensor:
        """Return the (B, T) log-probs of ``ids`` in the rows that predict a token."""
        log_p = self._log_probs(temperature)
        return log_p.gather(-1, ids[..., None]).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return the (B, T) entropies at temperature 1."""
        log_p = self._log_probs(1.0)
        return -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)

    def _log_probs(self, temperature: float) -> Tensor:
        if temperature not in self._log_softmax:
            if len(self._log_softmax) == 2:  # 1 and the sampler's; a search tries many, on a user's sizes too
                self._log_softmax.clear()
            rows = self.logits[:, : self.shape[1]]
            self._log_softmax[temperature] = torch.log_softmax(rows / temperature, -1)
        return self._log_softmax[temperature]

    def unmasked(self) -> Batch:
        """Return the same where every position counts."""
        return dataclasses.replace(self, mask=torch.ones_like(self.mask))

    def without_empty(self) -> Batch:
        """Return the same with one live token in each sequence that had none."""
        mask = self.mask.clone()
        mask[:, 0] |= ~mask.any(-1)
        return dataclasses.replace(self, mask=mask)

    def variants(self, maskable: bool = True) -> list[Batch]:
        """Return itself, with fewer tokens, with more padding, with half of the sequences: denominators differ in each.

        A user's batch keeps its sizes; ``maskable``: the loss takes a mask.
        """
        fewer = self.mask.clone()
        fewer[0, fewer.shape[1] // 2 :] = False
        fewer[-1, 1:] = False
        fewer[:, 5:] = False
        everything = [self, dataclasses.replace(self, mask=fewer)] if maskable else [self]
        if self.own:
            return everything
        logits, ids = torch.cat([self.logits, self.logits[:, :3]], 1), self.token_ids
        padding = torch.full_like(self.mask[:, :3], not maskable)
        padded = Batch(logits, self.first, torch.cat([ids, ids[:, :3].flip(-1)], 1), torch.cat([self.mask, padding], 1))
        half = slice(0, self.shape[0] // 2)
        return [*everything, padded, Batch(self.logits[half], self.first[half], ids[half], self.mask[half])]


def taken(measure: Callable[[Batch], Found], batches: Iterable[Batch]) -> Iterator[Found]:
    """Yield what is measured on each batch that the loss takes: it may insist on the sizes of the first.

    What it raises comes as ``Unusable``; any other error is ours.
    """
    for k, batch in enumerate(batches):
        try:
            found = measure(batch)
        except Unusable:
            if k == 0:
                raise
            continue
        yield found


def _drawn(lengths: Sequence[int], T: int, vocab: int, spread: float, seed: int) -> Batch:
    """Return a batch of these lengths; one sequence has a hole, as a tool's output leaves."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    logits = spread * torch.randn(B, T + 1, vocab, generator=generator, dtype=torch.float64)
    if spread > 1:
        logits[:, ::5] *= 6.0
    # Neighbours differ by 1 to 4, so that a token is told from the one before and the one after.
    steps = torch.randint(1, 5, (B, T + 1), generator=generator)
    tokens = steps.cumsum(-1) % vocab
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    mask[4, 2] = False
    return Batch(logits, tokens[:, 0], tokens[:, 1:], mask)


def standard_batch() -> Batch:
    """Return 16 sequences of up to 7 tokens over 13 columns, one of them empty."""
    return _drawn(LENGTHS, max(LENGTHS), VOCAB, 1.0, 20)


def held_out(batch: Batch) -> Iterator[Batch]:
    """Yield batches on which nothing was fitted, the most different first, for losses that insist on sizes.

    They have other lengths, ids and logits, with confident and unlikely tokens (log-probs from -1e-9 to -60); the
    first has other sizes as well, and sequences of up to 40 tokens. A user's batch keeps sizes and mask.
    """
    B, T = batch.shape
    generator = torch.Generator().manual_seed(21)
    if not batch.own:
        lengths = [3, 40, 6, 2, 8, *torch.randint(0, 41, (19,), generator=generator).tolist()]
        yield _drawn(lengths, 40, VOCAB + 4, 2.0, 22)
        yield _drawn((*LENGTHS[::-1][:4], 6, *LENGTHS[::-1][5:]), T, VOCAB, 2.0, 23)
    logits = 2.0 * torch.randn(batch.logits.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(batch.logits.shape[-1], (B, T), generator=generator)
    yield dataclasses.replace(batch, logits=logits, token_ids=ids, values={})


def users_batch(given: Mapping[str, Tensor]) -> Batch:
    """Return a batch of the user's own tensors: sizes and mask are theirs, and their values are compared as well.

    Args:
        given: ``mask`` (B, T) and either ``logits`` (B, T or T+1, V) with ``token_ids`` (B, T), or ``log_probs``
            (B, T); also ``advantages``, ``old_log_probs``, ``ref_log_probs``. Whatever is missing is drawn.

    Raises:
        ValueError: unknown names, or shapes that do not belong together.
    """
    if unknown := sorted(set(given) - set(KEYS)):
        raise ValueError(f"batch= has {', '.join(unknown)}; known are {', '.join(KEYS)}.")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"batch= {name} must be a tensor; got {type(value).__name__}.")
    values = {name: value.detach().cpu() for name, value in given.items()}
    shaped = next((tuple(values[name].shape) for name in ("token_ids", "mask", "log_probs") if name in values), None)
    if shaped is None or len(shaped) != 2:
        raise ValueError(f"batch= needs token_ids, mask or log_probs of shape (B, T); got {shaped or 'nothing'}.")
    B, T = shaped
    if B == T:
        raise ValueError(f"batch= has as many sequences as tokens ({B}): (B,) and (T,) look alike. Give another size.")
    for name, value in values.items():
        wanted = (B,) if name == "advantages" else (B, T)
        if name != "logits" and value.shape != wanted:
            raise ValueError(f"batch= {name} must be {wanted}; got {tuple(value.shape)}.")
    if "logits" in values and values["logits"].numel() > LARGEST:
        raise ValueError(
            f"batch= logits have {values['logits'].numel():,} elements, and match calls the loss hundreds of times in "
            f"float64: give a smaller batch, of at most {LARGEST:,}."
        )
    advantages = values.get("advantages")
    if advantages is not None and not bool(advantages.isfinite().all()):
        wrong = advantages[~advantages.isfinite()][0].item()
        raise ValueError(f"batch= advantages must be finite; got {wrong}.")
    generator = torch.Generator().manual_seed(20)
    mask = read_mask("match", values["mask"], values) if "mask" in values else torch.ones(B, T, dtype=torch.bool)
    if "logits" in values:
        if "token_ids" not in values:
            raise ValueError("batch= has logits and no token_ids (B, T).")
        check_ids_dtype("match: batch=", values["token_ids"], name="token_ids")
        logits, ids = values["logits"].double(), values["token_ids"].long()
        if logits.dim() != 3 or logits.shape[0] != B or logits.shape[1] not in (T, T + 1):
            raise ValueError(f"batch= logits must be ({B}, {T} or {T + 1}, V); got {tuple(logits.shape)}.")
        if logits.shape[1] == T:
            logits = torch.cat([logits, logits[:, :1]], 1)
        ids = torch.where(mask, ids, 0)
    else:
        ids = torch.randint(VOCAB, (B, T), generator=generator)
        logits = torch.randn(B, T + 1, VOCAB, generator=generator, dtype=torch.float64)
        if "log_probs" in values:
            logits[:, :T] = _logits_with(values["log_probs"].double(), ids, logits[:, :T])
    kept = {name: values[name].double() for name in KEYS[4:] if name in values}
    first = torch.randint(logits.shape[-1], (B,), generator=generator)
    return Batch(logits, first, ids, mask, True, kept)


def _logits_with(log_probs: Tensor, ids: Tensor, others: Tensor) -> Tensor:
    """Return (B, T, VOCAB) logits whose log-prob of ``ids`` is ``log_probs``: what is left the other columns share as
    logits ``others`` do. Were they equal, log-prob and entropy would have one direction."""
    log_probs = log_probs.clamp(max=-1e-9)
    chosen = ids[..., None]
    shares = others.scatter(-1, chosen, -math.inf).log_softmax(-1)
    rest = torch.log(-torch.expm1(log_probs))
    return (shares + rest[..., None]).scatter(-1, chosen, log_probs[..., None])
