"""Which tokens a loss scores: what a row of logits predicts, at which temperature, and what the mask lets through."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import fit
from .call import Unusable

if TYPE_CHECKING:
    from .search import Search

STEP = 1e-4
"""A log-ratio inside of every clip, GSPO's 3e-4 too."""


def find_scored_tokens(search: Search) -> None:
    """Of a loss on logits: what row t scores, and the logits' factor, from the shape of a row's gradient."""
    probe = search.probe
    form = probe.caller.form
    assert form is not None
    if form.source != "logits":
        if search.temperature is not None:
            search.notes["temperature_unseen"] = {}
        _find_pairing(search)
        return
    batch = probe.batch
    log_probs = probe.log_probs(batch)
    pair = [probe.run(batch, log_probs, log_probs, s * probe.signs()).gradient for s in (1, -1)]
    offsets, slopes, bends = [], [], []
    everything = torch.cat([batch.first[:, None], batch.token_ids], 1)
    difference = pair[0] - pair[1]
    for i, t in (difference.abs().amax(-1) > 0).nonzero().tolist():
        row = difference[i, t]
        chosen = int((row * row.sign().sum().sign()).argmin())
        near = [o for o in (1, 0, 2) if t + o < everything.shape[1] and int(everything[i, t + o]) == chosen]
        offsets.append(near[0] if near else None)
        others = torch.arange(len(row)) != chosen
        top = row.abs().masked_fill(~others, 0.0).topk(min(12, int(others.sum()))).indices
        slope, bend = _line(batch.logits[i, t][top], row[top].abs().log())
        slopes.append(slope)
        bends.append(bend)
    if not offsets:
        return
    offset = max(set(offsets), key=offsets.count)
    if offset is None:
        search.faults["unknown_tokens"] = {}
    elif offset != 1:
        probe.offset = offset
        search.faults["shifted_ids"] = {"offset": offset}
    if max(bends) > 100 * probe.tolerance:
        search.strange["bent_logits"] = {}
        return
    probe.temperature = fit.plain(1 / float(torch.tensor(slopes).double().median()), max(1e-7, probe.tolerance))
    _find_pairing(search)
    _check_temperature(search)


def _find_pairing(search: Search) -> None:
    """With which token's old log-prob each is compared: all log-probs equal, one old one moved at a time."""
    probe = search.probe
    if not probe.caller.takes("old_log_probs"):
        return
    batch = probe.batch
    leaf = level = torch.full(batch.shape, -1.3, dtype=torch.float64)
    if probe.caller.form is not None and probe.caller.form.source == "logits":
        leaf = torch.zeros_like(batch.logits)
        level = torch.full(batch.shape, -math.log(leaf.shape[-1]), dtype=torch.float64)
    sign = probe.signs()[:, None]

    def slopes(old: Tensor) -> Tensor:
        pair = [probe.run(batch, old, level, a * probe.signs(), leaf=leaf).gradient for a in (1.0, 0.0)]
        difference = pair[0] - torch.nan_to_num(pair[1])
        return difference if difference.dim() == 2 else difference.norm(dim=-1)

    at_rest = slopes(level)
    offsets = []
    for t in range(batch.shape[1]):
        moved = level.clone()
        moved[:, t] += (STEP * sign).squeeze(-1)
        changed = torch.where(at_rest != 0, slopes(moved) / at_rest - 1, 0.0).abs() > 0.01 * STEP
        offsets += [int(row.nonzero()[0]) - t for row in changed if int(row.sum()) == 1]
    several = [o for o in offsets if o]
    if len(several) > len(offsets) / 2:
        probe.old_shift = max(set(several), key=several.count)
        search.faults["shifted_old"] = {"shift": probe.old_shift}


def _check_temperature(search: Search) -> None:
    found, asked = search.probe.temperature, search.temperature
    if asked is None and search.probe.caller.takes("temperature") and search.probe.caller.container is None:
        asked = search.probe.caller.temperature
    if asked is None or abs(found - asked) < 1e-4 * asked:
        return
    key = "no_temperature" if abs(found - 1) < 1e-6 else "other_temperature"
    search.faults[key] = {"asked": asked, "found": found}


def find_mask(search: Search) -> None:
    """Which tokens get a gradient."""
    probe = search.probe
    slopes = probe.policy(0.0, probe.signs())
    reached = slopes.abs() > 1e-9 * slopes.abs().max()
    mask = probe.batch.mask
    if not bool(reached.any()):
        raise Unusable(
            "no token gets a gradient from the advantages: is the loss multiplied by them, or do (B,) and (B, 1) meet "
            "in it and make (B, B)?"
        )
    if bool((reached == mask).all()):
        return
    if bool(reached.all()):
        probe.reads_padding = True
        search.faults["padding"] = {}
    else:
        for shift, dropped in itertools.product((0, -1, 1), ((), (0,), (-1,), (0, -1))):
            probe.mask_shift, probe.dropped = shift, dropped
            if bool((reached == probe.live(probe.batch)).all()):
                if shift:
                    search.faults["shifted_mask"] = {"shift": shift}
                elif not probe.old_shift:
                    search.faults["dropped"] = {"columns": " and ".join(("first", "last")[c] for c in dropped)}
                return
        probe.mask_shift, probe.dropped = 0, ()
        missing = mask & ~reached
        places = ", ".join(f"({i}, {t})" for i, t in missing.nonzero().tolist()[:3])
        extra = int((reached & ~mask).sum())
        search.strange["other_tokens"] = {"missing": int(missing.sum()), "places": places, "extra": extra}


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of the least-squares line, and the largest distance from it."""
    x0, y0 = x - x.mean(), y - y.mean()
    slope = float((x0 * y0).sum() / (x0 * x0).sum())
    return slope, float((y0 - slope * x0).abs().max())
