"""From a loss to a Finding, one property after another; each is measured with those before it in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..objectives.config import LossConfig
from ..objectives.kl import KL
from ..objectives.levels import LevelName
from ..objectives.surrogates import Surrogate, Unclipped
from . import fit
from .batch import Batch
from .finding import Finding
from .policy import find_surrogate
from .probe import DIFFERENCE, INVERTED, QUOTIENT, ROUNDED, Probe
from .scoring import STEP, find_mask, find_scored_tokens
from .weights import Measured, Weights, fit_weights, off_plain
from .whitening import Whitening, whitenings


@dataclass
class Search:
    """The properties found so far.

    ``faults``, ``strange`` and ``notes`` are keys of report.TEXTS, with what they mention.
    """

    probe: Probe
    temperature: float | None
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    strange: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: Weights | None = None
    level: LevelName = "token"
    surrogate: fit.Surrogates = field(default_factory=lambda: fit.Surrogates(Unclipped(), None))
    kl: KL = field(default_factory=KL)
    entropy_coef: float = 0.0
    entropy_aggregation: Literal["token_mean"] | None = None
    uses_ratio: bool = True
    cap: float = 1.0
    """What bounds the ratio already where it is 1: on-policy weights are this times the loss's."""
    detached: bool = False
    """The ratio is a weight without gradient of its own: a token's slope is not its sequence's."""
    _at_rest: Measured | None = None

    def run(self) -> Finding:
        find_scored_tokens(self)
        find_mask(self)
        self.find_whitening()
        self.find_weights()
        self.find_level()
        find_surrogate(self)
        self.find_kl()
        self.find_entropy()
        self.find_rollout_weights()
        return self.finding()

    # How advantages and tokens are weighed

    def find_whitening(self) -> None:
        """Whether the loss centres or scales advantages itself."""
        probe = self.probe
        A = torch.linspace(-1.1, 1.4, probe.batch.shape[0], dtype=torch.float64).roll(3)
        plain, moved, doubled = (probe.policy(0.0, a) for a in (A, A + 0.5, 2 * A))
        near = max(1e-3, probe.tolerance) * plain.abs().max()
        if bool(((moved - plain).abs() > near).any()):
            large = probe.policy(0.0, 50 * A) / 50
            if bool(((large - plain).abs() > near).any()):
                self.strange["advantages_not_linear"] = {}
            return
        scaled = bool(((doubled - plain).abs() <= near).all())
        best: tuple[bool, float, Whitening] = (True, math.inf, probe.whitening)
        for candidate in whitenings(scaled, len(A)):
            probe.whitening = candidate
            try:
                weights = fit_weights(lambda b: self._weights_at(b, A), [probe.batch], probe.tolerance)
            except RuntimeError:
                continue
            unfit = weights.spread > 100 * probe.tolerance
            off = weights.spread if unfit else off_plain(weights.factor)
            if (unfit, off) < best[:2]:
                best = unfit, off, candidate
        if best[0]:
            probe.whitening = Whitening()
            self.strange["whitening_unknown"] = {}
            return
        probe.whitening = best[2]
        self.notes["whitening"] = {"text": best[2].text}

    def batches(self) -> list[Batch]:
        """The batch and others that the loss may be called on."""
        caller = self.probe.caller
        return self.probe.batch.variants(caller.masks)

    def _weights_at(self, batch: Batch, advantages: Tensor | None = None) -> Measured:
        """On-policy slopes over -A. A product of ratios hands every token the weight of its whole sequence, unless it
        is detached."""
        probe = self.probe
        A = probe.signs(batch) if advantages is None else advantages
        effective = probe.effective(A, batch)[:, None]
        live = probe.live(batch) & (effective != 0)
        weights = torch.where(live, -probe.policy(0.0, A, batch=batch) / effective, 0.0)
        if self.level == "sequence_product" and not self.detached:
            weights = weights / live.sum(-1, keepdim=True).clamp(min=1)
        return weights / self.cap, live, probe.counted(batch)

    def find_weights(self) -> None:
        """Pattern and denominator; and, since it shows here, what a log-prob is compared with."""
        probe = self.probe
        for key in ("no_pattern", "denominator"):  # of an earlier try, before the level was known
            self.strange.pop(key, None)
        batches = self.batches()
        weights = fit_weights(self._weights_at, batches, probe.tolerance)
        if weights.spread > 100 * probe.tolerance:
            probe.ratio = QUOTIENT
            other = fit_weights(self._weights_at, batches, probe.tolerance)
            if other.spread <= 100 * probe.tolerance:
                self.faults["quotient"] = {}
                self.weights = other
                return
            probe.ratio = DIFFERENCE
            self.strange["no_pattern"] = {"spread": weights.spread}
        self.weights = weights
        if weights.spread <= 100 * probe.tolerance < 1e-3 < weights.apart:
            self.strange["denominator"] = {}
        if weights.denominator == "positions":
            self.faults["mask_in_numerator"] = {"positions": probe.batch.mask.numel()}

    # How ratios are pooled

    def find_level(self, base: float = 0.0) -> None:
        """Which log-ratios move which slopes, around ``base``: a token's own, a neighbour's, all of its sequence's."""
        probe = self.probe
        assert self.weights is not None
        if not probe.caller.takes("old_log_probs"):
            self.uses_ratio = False
            return
        sign = probe.effective(probe.signs()).sign()[:, None]
        at_rest = probe.policy(base, probe.signs())
        uniform = self._changes(probe.policy(base - STEP * sign, probe.signs()), at_rest)
        growth = uniform / (-STEP * sign)
        live = probe.live(probe.batch) & (at_rest != 0)
        if not bool(live.any()) or float(growth[live].abs().max()) < 0.05:
            if base == 0 and self._find_cap(at_rest, live):
                self.find_level(math.log(self.cap) - 1)
                return
            self.uses_ratio = False
            if "old_log_probs" in probe.caller.roles.values():
                kind = self.faults if self.value_is_a_ratio() else self.notes
                kind["old_ignored"] = {}
            return
        grown = [growth[live & (sign == one)] for one in (1.0, -1.0)]
        falls = [float(part.mean()) < 0 for part in grown if part.numel()]
        if all(falls) and probe.ratio is not INVERTED:
            probe.ratio = INVERTED
            self.faults["inverted"] = {}
            self.find_weights()
            self.find_level()
            return
        lengths = live.sum(-1, keepdim=True).expand_as(live)
        several = live & (lengths > 1)
        moved = self._moved(at_rest, sign, base)
        if sum(moved) <= len(moved) * 1.5:
            return
        if self._grows_with_length(growth.abs(), lengths, several, sign):
            self.level = "sequence_product"
            per_token = growth / lengths  # 1 where the ratio carries the gradient
            self.detached = bool(((per_token - 1).abs()[several] > 0.05).any())
            self.find_weights()
        else:
            self.level = self._own_slopes()

    def _find_cap(self, at_rest: Tensor, live: Tensor) -> bool:
        """CISPO with a cap below 1: on-policy every weight is the cap, and far below it is the ratio."""
        if not bool(live.any()):
            return False
        shares = [(self.probe.policy(x, self.probe.signs()) / at_rest)[live] for x in (-8.0, -7.0)]
        share = float(shares[0].mean())
        if not share > 0 or not math.isfinite(share):
            return False
        cap = math.exp(-8.0) / share
        apart = [(part - math.exp(x) / cap).abs().max() for part, x in zip(shares, (-8.0, -7.0), strict=True)]
        if not 2e-3 < cap < 1 - 1e-3 or float(max(apart)) > 1e-4:
            return False
        self.cap = fit.plain(cap, max(1e-8, 100 * self.probe.tolerance))
        self.notes["cap_below_one"] = {"cap": self.cap}
        self.find_weights()
        return True

    def _grows_with_length(self, growth: Tensor, lengths: Tensor, several: Tensor, sign: Tensor) -> bool:
        """A product of ratios moves by the length of a sequence, a mean by 1; whatever becomes of it, by sign."""

        def spread(values: Tensor) -> float:
            parts = (values[several & (sign == one)] for one in (1.0, -1.0))
            return sum(float(part.std() / part.mean()) for part in parts if part.numel() > 1)

        by_product, by_mean = spread(growth / lengths), spread(growth)
        if abs(by_product - by_mean) > 1e-3:
            return by_product < by_mean
        return bool((growth - lengths)[several].abs().mean() < (growth - 1)[several].abs().mean())

    def _changes(self, slopes: Tensor, at_rest: Tensor) -> Tensor:
        return torch.where(at_rest != 0, slopes / at_rest - 1, 0.0)

    def _moved(self, at_rest: Tensor, sign: Tensor, base: float) -> list[int]:
        """For each token whose old log-prob is moved alone: how many slopes of its sequence change."""
        probe = self.probe
        found = []
        live = probe.live(probe.batch)
        for t in range(live.shape[1]):
            moved = torch.zeros_like(at_rest)
            moved[:, t] = -STEP
            changed = self._changes(probe.policy(base + moved * sign, probe.signs()), at_rest).abs() > 0.01 * STEP
            found += [int(row.sum()) for row, own in zip(changed, live, strict=True) if own.sum() > 1 and row.any()]
        return found

    def _own_slopes(self) -> LevelName:
        """Pooled: whether a token's slope follows its own advantage; only seen where advantages come by token."""
        probe = self.probe
        form = probe.caller.form
        assert form is not None
        if form.advantages != "token" or probe.whitening.text:
            return "sequence"
        generator = torch.Generator().manual_seed(2)
        A = 1 + torch.rand(probe.batch.shape, generator=generator, dtype=torch.float64)
        slopes = probe.policy(0.0, A) / self._weights_at(probe.batch)[0]
        row = slopes[int(probe.live(probe.batch).sum(-1).argmax())]
        row = row[row.isfinite() & (row != 0)]
        return (
            "sequence_token" if float((row - row.mean()).abs().max()) > 1e-3 * float(row.abs().mean()) else "sequence"
        )

    # What the surrogate is measured by; the KL term, the entropy bonus

    def value_is_a_ratio(self) -> bool:
        """Where old log-probs change nothing: -A·exp(ℓ - sg(ℓ)) has the slope of -A·ℓ and the value -A."""
        probe = self.probe
        assert self.weights is not None
        A = probe.signs()
        value = probe.at(0.0, A).loss - probe.at(0.0, torch.zeros_like(A)).loss
        weights, live, _ = self.at_rest()
        terms = -weights * probe.effective(A)[:, None]
        log_probs = probe.log_probs(probe.batch)
        return abs(value - float(terms[live].sum())) < abs(value - float((terms * log_probs)[live].sum()))

    def curve(self, log_ratios: Tensor, sign: int) -> Tensor:
        """Slopes over weight and |A| at pooled log-ratios: ``fit.Curve``."""
        probe = self.probe
        weights, live, _ = self.at_rest()
        lengths = live.sum(-1, keepdim=True).clamp(min=1).double()
        if self.level != "sequence_product":
            lengths = torch.ones_like(lengths)
        handed = torch.ones_like(lengths) if self.detached else lengths
        A = probe.signs()
        if not bool((live.any(-1) & (probe.effective(A).sign() == sign)).any()):
            A = -A  # one sequence, or every live one of the same sign
        effective = probe.effective(A)[:, None]
        sizes = weights * handed * effective.abs()

        def slopes(log_ratio: Tensor) -> Tensor:
            return probe.policy(log_ratio / lengths, A)

        return torch.nan_to_num(_at_points(log_ratios, live & (effective.sign() == sign), slopes, sizes))

    def at_rest(self) -> Measured:
        """The weights, measured once they are understood."""
        if self._at_rest is None:
            self._at_rest = self._weights_at(self.probe.batch)
        return self._at_rest

    def kl_slopes(self, x: Tensor | float, ratio: float = 1.0, batch: Batch | None = None) -> Tensor:
        """(B, T) slopes at advantages of 0."""
        probe = self.probe
        batch = probe.batch if batch is None else batch
        return torch.nan_to_num(probe.at(math.log(ratio), torch.zeros(batch.shape[0]).double(), x, batch).slope)

    def _kl_weights(self, batch: Batch) -> Measured:
        return self.kl_slopes(0.5, 1.0, batch), self.probe.live(batch), self.probe.counted(batch)

    def find_kl(self) -> None:
        probe = self.probe
        if not probe.caller.takes("ref_log_probs"):
            return
        weights, live, _ = self.at_rest()
        if self.level == "sequence_product" and bool((live.sum(-1) == 1).any()):
            live = live & (live.sum(-1, keepdim=True) == 1)  # a ratio that weighs the KL couples the other tokens
        near = self.kl_slopes(0.5)
        if float(near[~probe.live(probe.batch)].abs().sum()) > 0:
            self.faults["kl_unmasked"] = {}
        share = near[live] / weights[live]
        if float((share - share.mean()).abs().max()) > 1e3 * probe.tolerance * float(share.abs().mean()):
            own = fit_weights(self._kl_weights, self.batches(), probe.tolerance)
            self.strange["kl_aggregation"] = {"name": f"per {own.pattern}, over {own.denominator}"}
            weights = near / own.factor

        def curve(x: Tensor) -> Tensor:
            return _at_points(x, live, self.kl_slopes, weights)

        def value(x: float) -> float:
            zero = torch.zeros(probe.batch.shape[0], dtype=torch.float64)
            return (probe.at(0.0, zero, x).loss - probe.at(0.0, zero).loss) / float(weights.sum())

        def with_ratio(ratio: float) -> float:
            return float((self.kl_slopes(0.5, ratio)[live] / self.kl_slopes(0.5)[live]).mean())

        found = fit.fit_kl(curve, with_ratio, value, probe.tolerance)
        if found is None:
            return
        self.kl = found.kl
        if found.kl.coef < 0:
            self.faults["kl_sign"] = {}
        if found.strange:
            (self.faults if found.strange == "kl_reversed" else self.strange)[found.strange] = {}
        elif found.error > 1e3 * probe.tolerance:
            self.strange["unknown_kl"] = {"error": found.error}

    def find_entropy(self) -> None:
        """A bonus, from what is left of the gradient at advantages of 0."""
        probe = self.probe
        zero = torch.zeros(probe.batch.shape[0], dtype=torch.float64)
        slopes = torch.nan_to_num(probe.at(0.0, zero).entropy)
        weights, live, _ = self.at_rest()
        assert self.weights is not None
        largest = float(weights.abs().max())
        if float(slopes.abs().max()) < max(1e-9, probe.tolerance) * 10 * largest:
            return
        if float(slopes[~live & ~probe.live(probe.batch)].abs().sum()) > 0:
            self.faults["entropy_unmasked"] = {}
        share = -slopes[live] / weights[live]
        digits = max(1e-8, 10 * probe.tolerance)
        if float((share - share.mean()).abs().max()) <= 100 * probe.tolerance * float(share.abs().mean()):
            self.entropy_coef = fit.plain(float(share.mean()), digits)
            if self.entropy_coef < 0:
                self.notes["entropy_penalty"] = {}
            return
        own = -slopes[live] * float(live.sum()) / self.weights.factor
        if not bool(own.isfinite().all()):
            self.strange["unknown_entropy"] = {}
            return
        self.entropy_coef, self.entropy_aggregation = fit.plain(float(own.mean()), digits), "token_mean"
        if float((own - own.mean()).abs().max()) > 100 * probe.tolerance * float(own.abs().mean()):
            self.strange["unknown_entropy"] = {}

    def find_rollout_weights(self) -> None:
        """Whether the sampler's log-probs, equal to the old ones so far, change anything."""
        probe, caller = self.probe, self.probe.caller
        if caller.left_out:
            self.notes["left_out"] = {"names": ", ".join(caller.left_out)}
        if not caller.takes("rollout_log_probs"):
            return
        log_probs, A = probe.log_probs(probe.batch), probe.signs()
        equal = probe.run(probe.batch, log_probs, log_probs, A).gradient
        generator = torch.Generator().manual_seed(3)
        caller.rollout_shift = 0.3 * torch.randn(log_probs.shape, generator=generator).double()
        if caller.form is not None and caller.form.layout == "flat":
            caller.rollout_shift = caller.rollout_shift.flatten()
        moved = probe.run(probe.batch, log_probs, log_probs, A).gradient
        caller.rollout_shift = 0.0
        if float((moved - equal).abs().max()) > 10 * probe.tolerance * float(equal.abs().max()):
            self.strange["rollout_weights"] = {}

    # All of it

    def finding(self) -> Finding:
        assert self.weights is not None
        w, found = self.weights, self.surrogate
        options: dict[str, Any] = {"aggregation": "token_mean"}
        factor = w.factor
        if w.pattern == "group":
            options = {"aggregation": "group_mean", "group_size": w.group_size}
        elif w.pattern == "sequence":
            options = {"aggregation": "sequence_mean"}
        elif w.denominator == "positions":
            options = {"aggregation": "constant", "constant_length": self.probe.batch.shape[1]}
        elif w.denominator in ("sequences", "sequences with tokens", "nothing"):
            options = {"aggregation": "sequence_sum"}
            length = 1 / factor if factor else 0.0
            if w.denominator == "sequences" and length > 15.5 and abs(length - round(length)) < 1e-6 * length:
                options = {"aggregation": "constant", "constant_length": round(length)}
                factor = 1.0
        surrogate: Surrogate = found.surrogate
        if not surrogate.uses_ratio:
            self.level = "token"
        config = LossConfig(
            surrogate, self.level, kl=self.kl, entropy_coef=self.entropy_coef,
            entropy_aggregation=self.entropy_aggregation, log_ratio_limit=found.log_ratio_limit, **options,
        )  # fmt: skip
        factor = fit.plain(factor, max(1e-7, self.probe.tolerance))
        if factor < 0:
            self.faults["sign"] = {}
        if self.probe.tolerance == ROUNDED:
            self.notes["rounded"] = {}
        if not self.probe.caller.takes("old_log_probs") and surrogate.uses_ratio:
            self.notes["on_policy"] = {}
        with_old = self.probe.caller.takes("old_log_probs") and self.uses_ratio
        return Finding(config, factor, w.denominator, with_old)


def _at_points(points: Tensor, live: Tensor, slopes: Callable[[Tensor], Tensor], sizes: Tensor) -> Tensor:
    """(n,) slopes over sizes at n points: a point to each row that is live, read at its first token.

    ``slopes`` takes one point for each sequence, (B, 1), and gives (B, T), as ``sizes`` is.
    """
    rows = [i for i in range(len(live)) if bool(live[i].any())]
    places = [int(live[i].nonzero()[0]) for i in rows]
    found = []
    for chunk in points.split(len(rows)):
        at = torch.zeros(len(live), 1, dtype=torch.float64)
        for value, i in zip(chunk, rows, strict=False):
            at[i] = value
        measured = slopes(at) / sizes
        found += [measured[i, t] for _, i, t in zip(chunk, rows, places, strict=False)]
    return torch.stack(found)
