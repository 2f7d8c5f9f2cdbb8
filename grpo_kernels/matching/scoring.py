"""Which tokens a loss scores: what a row of logits predicts, at which temperature, and which tokens count."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .batch import Batch, Inputs, taken
from .call import Unusable
from .known import Known, Said, Step, Threshold, TokenSet, said
from .numbers import bisect, follows, plain
from .probe import Probe

SHIFTS = {0: "its own input token, not the one after it", 2: "the token after the one that it predicts"}
"""What a row of logits scores, by the offset of it."""


def find_scored_tokens(probe: Probe, known: Known) -> Step:
    """Find what row t of the logits scores, and the logits' factor, from the shape of a row's gradient."""
    if not probe.on_logits:
        return known, [] if probe.asked is None else [said("temperature_unseen")]
    batch = probe.batch
    one, other = (probe.run(known, probe.inputs(known, 0.0, sign * probe.signs())).gradient for sign in (1, -1))
    reached = (one - other).abs().amax(-1) > 0
    if not bool(reached.any()):
        return known, []
    rows = (one - other)[reached]
    # ∂ℓ/∂z_j = -p_j/τ beside the column that is scored, which has the other sign.
    scored = (rows * rows.sign().sum(-1, keepdim=True).sign()).argmin(-1, keepdim=True)
    hits = {offset: known.but(offset=offset).ids(batch)[reached][:, None] == scored for offset in (1, 0, 2)}
    offset = max(hits, key=lambda offset: int(hits[offset].sum()))
    found: list[Said] = []
    if int(torch.stack(list(hits.values())).any(0).logical_not().sum()) > int(hits[offset].sum()):
        found.append(said("unknown_tokens"))
    elif offset != 1:
        known = known.but(offset=offset)
        found.append(said("shifted_ids", which=SHIFTS[offset]))
    # Its logarithm is a line in z of slope 1/τ.
    largest, top = rows.abs().scatter(-1, scored, 0.0).topk(min(12, rows.shape[-1] - 1))
    x, y = batch.logits[:, : batch.shape[1]][reached].gather(-1, top), largest.log()
    known_both = x.isfinite() & y.isfinite()  # not at a column of -inf, which is no token
    x, y = (torch.where(known_both, values, torch.nan) for values in (x, y))
    x, y = ((values - values.nanmean(-1, keepdim=True)).nan_to_num() for values in (x, y))
    slopes = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True)
    if float((y - slopes * x).abs().amax(-1).median()) > known.precision.close:
        return known, [*found, said("bent_logits")]
    known = known.but(temperature=plain(1 / float(slopes.median()), max(1e-7, known.precision.digits)))
    asked = probe.caller.temperature if probe.caller.roles and probe.caller.takes("temperature") else probe.asked
    if asked is not None and abs(known.temperature - asked) >= max(1e-4, known.precision.digits) * asked:
        key = "no_temperature" if abs(known.temperature - 1) < 1e-6 else "other_temperature"
        found.append(said(key, asked=asked, found=known.temperature))
    return known, found


def find_pairing(probe: Probe, known: Known) -> Step:
    """Find with which token's old log-prob each is compared: all log-probs equal, one old one moved at a time."""
    if not probe.caller.takes("old_log_probs"):
        return known, []
    batch, step = probe.batch, known.precision.step
    leaf, level = probe.alike()

    def slopes(old: Tensor) -> Tensor:
        pair = [probe.run(known, Inputs(batch, old, level, a * probe.signs()), leaf).gradient for a in (1.0, 0.0)]
        difference = pair[0] - torch.nan_to_num(pair[1])
        return difference if difference.dim() == 2 else difference.norm(dim=-1)

    at_rest = slopes(level)
    offsets = []
    for t in range(batch.shape[1]):
        moved = level.clone()
        moved[:, t] += step * probe.signs()
        changed = torch.where(at_rest != 0, slopes(moved) / at_rest - 1, 0.0).abs() > 0.01 * step
        offsets += [int(row.nonzero()[0]) - t for row in changed if int(row.sum()) == 1]
    shift = max(set(offsets), key=offsets.count) if offsets else 0
    if shift == 0 or offsets.count(shift) < 0.9 * len(offsets):
        return known, []
    return known.but(old_shift=shift), [said("shifted_old", away=-shift)]


def find_tokens(probe: Probe, known: Known) -> Step:
    """Find which tokens count: those that get a gradient from the advantages, at some ratio."""
    batch = probe.batch
    reached = _reached(probe, known, batch)
    if not bool(reached.any()):
        raise Unusable(
            "no token gets a gradient from the advantages: is the loss multiplied by them, or do (B,) and (B, 1) meet "
            "in it and make (B, B)?"
        )
    if torch.equal(reached, batch.mask):
        return known, []
    for tokens in _token_sets(known, batch, reached):
        if torch.equal(tokens.select(batch), reached) and _everywhere(probe, known.but(tokens=tokens)):
            return known.but(tokens=tokens), [tokens.says] if tokens.says is not None else []
    dropped, extra = batch.mask & ~reached, int((reached & ~batch.mask).sum())
    if not extra and (threshold := _threshold(probe, known, reached)) is not None:
        return known.but(threshold=threshold), [said("entropy_threshold", source=threshold.source())]
    by = properties(known, batch, batch.mask) | {"advantage": probe.signs()[:, None].expand(batch.shape)[batch.mask]}
    where = follows(reached[batch.mask].double(), by)
    places = ", ".join(f"({i}, {t})" for i, t in dropped.nonzero().tolist()[:3])
    why = f"; what decides is their {where}" if where else ""
    return known, [said("other_tokens", missing=int(dropped.sum()), places=places, extra=extra, why=why)]


def _reached(probe: Probe, known: Known, batch: Batch) -> Tensor:
    """Return (B, T): the tokens that have a slope at one ratio or another, whatever clips them."""
    falling = -0.01 * torch.arange(batch.shape[1]).double().expand(batch.shape)  # each is the least so far
    slopes = torch.stack([probe.policy(known, x, batch=batch).abs() for x in (0.0, -1.0, 1.0, falling, falling - 1)])
    finite = slopes[slopes.isfinite()]
    if not finite.numel():
        alike = "logits whose other columns differ, since of equal ones log-prob and entropy have one direction"
        hint = f"give batch= {alike}" if probe.on_logits and batch.own else "call it yourself on such ratios"
        raise Unusable(f"no slope of the loss is finite at ratios of 0.37, 1 and 2.7: {hint}.")
    return (slopes > 1e-9 * finite.max()).any(0)


def _everywhere(probe: Probe, known: Known) -> bool:
    """Whether what is known explains which tokens are reached, in every batch that the loss takes."""

    def explained(batch: Batch) -> bool:
        return torch.equal(_reached(probe, known, batch), known.live(batch))

    return all(taken(explained, (*probe.batches(), *probe.held_out())))


def _token_sets(known: Known, batch: Batch, reached: Tensor) -> Iterator[TokenSet]:
    """Yield what losses make of a mask by mistake, the simplest first."""
    yield TokenSet(lambda batch: torch.ones_like(batch.mask), said("padding"))
    yield TokenSet(lambda batch: ~batch.mask, said("inverted_mask"))
    for shift, columns in itertools.product((0, -1, 1), ((), (0,), (-1,), (0, -1))):
        names = " and ".join(("first", "last")[column] for column in columns)
        fault = said("shifted_mask", away=-shift) if shift else said("dropped", columns=names)
        # A loss that pairs tokens one apart loses a column by that; it was told already.
        yield TokenSet(functools.partial(_columns, shift, columns), None if known.old_shift and not shift else fault)
    yield TokenSet(lambda batch: batch.mask & (batch.mask.flip(-1).cumsum(-1).flip(-1) > 1), said("last_left_out"))
    yield TokenSet(lambda batch: batch.mask & (batch.mask.cumsum(-1) > 1), said("first_left_out"))
    # Ids of which every token is left out.
    dropped, kept = batch.token_ids[batch.mask & ~reached].unique(), batch.token_ids[reached].unique()
    if len(dropped) <= 3 and not bool(torch.isin(dropped, kept).any()):
        says = said("ids_left_out", ids=", ".join(map(str, dropped.tolist())))
        yield TokenSet(lambda batch: batch.mask & ~torch.isin(batch.token_ids, dropped), says)


def _columns(shift: int, without: tuple[int, ...], batch: Batch) -> Tensor:
    """Return the mask moved by some columns, without some columns."""
    live = batch.mask.roll(shift, -1)
    live[:, list(without)] = False
    return live


def _threshold(probe: Probe, known: Known, reached: Tensor) -> Threshold | None:
    """Return the entropy below which tokens are left out: a quantile that explains all batches, or a number of nats."""
    entropy = probe.batch.entropy()
    low, high = float(entropy[probe.batch.mask & ~reached].max()), float(entropy[reached].min())
    if low >= high:
        return None
    number = plain(_cut(probe, known, high), max(1e-7, known.precision.digits))
    quantiles = (Threshold("quantile", percent / 100) for percent in range(5, 100, 5))
    candidates = (*quantiles, Threshold("number", number))
    return next((one for one in candidates if _everywhere(probe, known.but(threshold=one))), None)


def _cut(probe: Probe, known: Known, entropy: float) -> float:
    """Return the threshold below an entropy: the logits of its token are drawn apart until it is left out."""
    place = tuple((probe.batch.entropy() == entropy).nonzero()[0].tolist())

    def sharper(scale: Tensor) -> Batch:
        logits = probe.batch.logits.clone()
        logits[place] *= scale
        return dataclasses.replace(probe.batch, logits=logits)

    def left_out(scale: Tensor) -> Tensor:
        return ~_reached(probe, known, sharper(scale))[place]

    scale = bisect(left_out, *torch.tensor([1.0, 2.0], dtype=torch.float64))
    return float(sharper(scale).entropy()[place])


def properties(known: Known, batch: Batch, tokens: Tensor) -> dict[str, Tensor]:
    """Return what a number of a token may follow, of the given tokens (B, T)."""
    rows, columns = (torch.arange(size) for size in batch.shape)
    values = {
        "position": columns,
        "sequence's length": tokens.sum(-1, keepdim=True),
        "place in the batch": rows[:, None],
        "log-prob": known.log_probs(batch),
        "entropy": batch.entropy(),
    }
    return {name: value.expand(batch.shape)[tokens].double() for name, value in values.items()}
