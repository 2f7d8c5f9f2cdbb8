"""What stands beside the policy term: the KL penalty, the entropy bonus, the weights of the sampler's log-probs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..objectives.kl import KL, kl_terms
from ..objectives.rollout import MaskedIS, Rejection, Rollout, TruncatedIS
from ..objectives.surrogates import Dro, Point
from .batch import Batch, Inputs, taken
from .known import DIFFERENCE, RUNNING, Known, Said, Step, said
from .numbers import edges, plain, spread
from .probe import Probe, Slopes
from .weighing import weights_of_tokens
from .weights import Measured, fit_weights

DISTANCES = torch.tensor([-2.0, -1.0, -0.5, -0.1, 0.1, 0.4, 1.0, 1.7], dtype=torch.float64)
FAR = torch.cat([torch.logspace(-2, 0, 11), torch.linspace(1.25, 8, 28), torch.tensor([11.0, 15, 19, 22])]).double()


# The KL penalties


class _Penalty:
    """Slopes of the loss in the distance from another policy, at advantages of 0.

    Args:
        other: whose log-probs are moved; with the old ones the ratio is.
    """

    def __init__(self, probe: Probe, known: Known, other: Literal["ref", "rollout", "old"] = "ref") -> None:
        self.probe, self.known, self.other = probe, known, other
        self.counted = known.counted(probe.batch)
        self.weights = weights_of_tokens(probe, known)
        self.live = self.counted & (self.weights != 0)
        self.none = max(1e-9, 0.1 * known.precision.same) * float(self.weights.abs().max())
        """The size of slopes that are none."""
        self.ratios = (1.0,) if other == "old" else (1.0, 1.5)
        """At which curves tell the kinds apart."""
        summed = known.level in ("sequence_product", *RUNNING)
        if summed and bool((self.counted.sum(-1) == 1).any()):
            # A ratio that weighs the KL couples the other tokens.
            self.live = self.live & (self.counted.sum(-1, keepdim=True) == 1)

    def at(self, x: Tensor | float, ratio: float = 1.0, batch: Batch | None = None) -> Slopes:
        """Return the loss where tokens are at a distance from the other policy."""
        probe, known, zero = self.probe, self.known, self.probe.zeros(batch)
        if self.other == "old":
            return probe.at(known.but(level="token", ratio=DIFFERENCE), x, zero, batch=batch)
        inputs = probe.inputs(known, math.log(ratio), zero, x if self.other == "ref" else 0.0, batch)
        if self.other == "rollout":
            inputs = dataclasses.replace(inputs, rollout=known.log_probs(inputs.batch) - x)
        return probe.slopes(known, inputs)

    def slopes(self, x: Tensor | float, batch: Batch | None = None) -> Tensor:
        """Return (B, T)."""
        return torch.nan_to_num(self.at(x, batch=batch).slope)

    def is_there(self) -> bool:
        """Whether the value follows the distance; towards the reference, or the slopes, which the old log-probs move
        where its KL is weighed by the ratio."""
        one, other = self.at(0.5), self.at(-1.0)
        moved = abs(one.loss - other.loss)
        if self.other == "ref":
            moved = max(moved, float((one.slope.nan_to_num() - other.slope.nan_to_num()).abs().max()))
        return moved >= self.none

    def predicted(self, kl: KL, x: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return values and slopes of a penalty, (n,) each, at distances x and one ratio."""
        r = x.exp() if self.other == "old" else torch.full_like(x, ratio)
        t = kl_terms(kl, x, r)
        return (t.value * r, t.slope_with_ratio * r) if kl.ratio_weighted else (t.value, t.slope)

    def curves(self, points: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return values per weight, less the first, and slopes over weight, at points of any shape; a mean of tokens.

        What the surrogate's own spring and the KL to the sampler have of the slopes is taken off those in the distance
        from the reference.
        """
        at = [self.at(float(x), ratio) for x in points.flatten()]
        values = torch.tensor([one.loss - at[0].loss for one in at], dtype=torch.float64)
        values = values / self.weights[self.counted].sum()
        slopes = torch.stack([(one.slope.nan_to_num() / self.weights)[self.live].mean() for one in at])
        if self.other == "ref":
            slopes = slopes - self._beside(ratio)
        return values.view(points.shape), slopes.view(points.shape)

    def _beside(self, ratio: float) -> Tensor:
        one, x = torch.ones(()).double(), torch.tensor(math.log(ratio), dtype=torch.float64)
        own = self.known.surrogate.terms(Point(-one, x, x.exp(), 0 * one, -one - x))
        to_sampler = kl_terms(self.known.rollout_kl, x, x.exp())  # the sampler's log-probs are the old ones
        weight = x.exp() if self.known.rollout_kl.ratio_weighted else one
        slope = to_sampler.slope_with_ratio if self.known.rollout_kl.ratio_weighted else to_sampler.slope
        return own.own_slope + self.known.rollout_kl.coef * weight * slope

    def measure(self, batch: Batch) -> Measured:
        """Return its own weights, those of slopes at one distance."""
        counted = self.known.counted(batch)
        return Measured(self.slopes(0.5, batch), counted, counted, batch.mask)


def find_sampler_kl(probe: Probe, known: Known) -> Step:
    """Find the penalty towards the sampler; or towards the old policy, which is to us that of no other sampler."""
    others: dict[Literal["rollout", "old"], str] = {"rollout": "rollout_log_probs", "old": "old_log_probs"}
    for other, role in others.items():
        if not probe.caller.takes(role) or (other == "old" and isinstance(known.surrogate, Dro)):
            continue
        penalty = _Penalty(probe, known, other)
        if penalty.is_there():
            kl, says = _penalty_of(penalty)
            return known.but(rollout_kl=kl, sampler=other), says
    return known, []


def find_kl(probe: Probe, known: Known) -> Step:
    """Find the penalty towards the reference."""
    if not probe.caller.takes("ref_log_probs"):
        return known, []
    penalty = _Penalty(probe, known)
    says = _elsewhere(probe, known, penalty)
    if not penalty.is_there():
        return known, says
    kl, found = _penalty_of(penalty, says)
    return known.but(kl=kl), found


def _penalty_of(penalty: _Penalty, elsewhere: list[Said] | None = None) -> tuple[KL, list[Said]]:
    """Return the penalty's estimator, gradient, clamps and coefficient, and whether it is one of ours."""
    probe, precise = penalty.probe, penalty.known.precision
    near = penalty.slopes(0.5)
    says = _coupled(penalty, near) or elsewhere or []
    says = [*says, *([said("kl_unmasked")] if bool(near[~penalty.counted].any()) else [])]
    if spread((near / penalty.weights)[penalty.live]) > 10 * precise.close:
        own = fit_weights(list(taken(penalty.measure, probe.batches())), precise.same)
        if own.spread <= 10 * precise.close:
            says.append(said("kl_aggregation", name=f"per {own.pattern}, over {own.denominator}"))
            penalty.weights = near / own.factor
        else:
            says.append(said("kl_weights"))
    kl, found = _fit_kl(penalty)
    if any(one.key.startswith("kl_follows") for one in says):
        return dataclasses.replace(kl, limit=(None, None)), says
    return kl, [*says, *found, *([said("kl_sign")] if kl.coef < 0 else [])]


def _coefficient(penalty: _Penalty) -> str:
    return "kl_coef" if penalty.other == "ref" else "rollout_kl_coef"


def _coupled(penalty: _Penalty, near: Tensor) -> list[Said]:
    """Say it where a token's slope follows other sequences' distances."""
    probe, known = penalty.probe, penalty.known
    close, size = max(1e-6, known.precision.close), penalty.weights.abs().max()
    still = torch.arange(probe.batch.shape[0]) % 2 == 0
    far, moved = (torch.where(still, *pair).double()[:, None] for pair in ((0.5, 3.0), (0.0, 1.0)))
    everyones = [penalty.slopes(far)]
    if penalty.other == "ref":
        everyones.append(torch.nan_to_num(probe.at(known, moved, probe.zeros(), 0.5).slope))
    for others in everyones:
        if bool(((others - near).abs() > close * near.abs() + 1e-9 * size)[still].any()):
            return [said("kl_follows_batch", coef=_coefficient(penalty))]
    return []


def _elsewhere(probe: Probe, known: Known, penalty: _Penalty) -> list[Said]:
    """Say it where what a token's slope has of the reference follows the advantages."""
    close, size = max(1e-6, known.precision.close), penalty.weights.abs().max()
    near = penalty.slopes(0.5)
    for log_ratio, key in ((0.0, "kl_follows_advantages"), (0.4, "kl_elsewhere"), (-0.4, "kl_elsewhere")):
        (one, other), (without, other_without) = (
            [probe.at(known, log_ratio, A, x).slope for x in (0.5, -0.5)] for A in (3 * probe.signs(), probe.zeros())
        )
        change = (one - other) - (without - other_without)
        allowed = close * (torch.maximum(one.abs(), near.abs()) + 1e-3 * size)
        if bool((change.abs() > allowed)[penalty.live].any()):
            return [said(key)]
    return []


def _candidates(cap: float) -> Iterator[KL]:
    """Yield every kind of penalty with coefficient 1, likelier ones before others of the same slopes and values; the
    ratios of "weighted_k2" up to ``cap``."""
    free = (None, None)
    for estimator in ("k3", "k2", "k1", "abs"):
        yield KL(1.0, estimator, limit=free)
        yield KL(1.0, estimator, ratio_weighted=True, limit=free)
        for gradient in ("straight_through_k2", "weighted_k2", "score_function"):
            yield KL(1.0, estimator, gradient, limit=free, ratio_cap=cap)


def _fit_kl(penalty: _Penalty) -> tuple[KL, list[Said]]:
    """Return the kind whose slopes these are, on-policy and off; of several the one whose values they are as well."""
    precise, ratios = penalty.known.precision, penalty.ratios
    close = max(1e-6, precise.close)
    values, slopes = map(torch.cat, zip(*(penalty.curves(DISTANCES, ratio) for ratio in ratios), strict=True))
    if not bool(slopes.isfinite().all()):
        return KL(), [said("kl_elsewhere")]

    def fit(kl: KL, sign: int = 1) -> tuple[float, float, float]:
        """Return how far slopes are from a kind's of ``sign`` times the distance, how far values, and the factor."""
        kinds = [penalty.predicted(kl, sign * DISTANCES, ratio) for ratio in ratios]
        value, slope = torch.cat([v - v[0] for v, _ in kinds]), sign * torch.cat([s for _, s in kinds])
        coef = float((slopes * slope).sum() / (slope * slope).sum())
        error = float((slopes - coef * slope).abs().max() / slopes.abs().max())
        return max(error, close), float((values - coef * value).abs().max()), coef

    cap = _ratio_cap(penalty)
    candidates = _candidates(cap if penalty.other == "old" else math.inf)
    (error, _, coef), kl = min(((fit(kl), kl) for kl in candidates), key=lambda kind: kind[0][:2])
    exchanged, _, other = fit(KL(1.0), -1)
    if exchanged < error:
        return KL(plain(other, precise.digits)), [said("kl_reversed")]
    limit = _kl_limit(penalty, coef, kl)
    cap = cap if kl.gradient == "weighted_k2" else KL().ratio_cap
    kl = dataclasses.replace(kl, coef=plain(coef, precise.digits), limit=limit or (None, None), ratio_cap=cap)
    unknown = [said("unknown_kl", error=error)] if error > close else []
    return kl, unknown if limit is not None else [said("kl_limit")]


def _ratio_cap(penalty: _Penalty) -> float:
    """Return the largest weight of the distance, were the penalty "weighted_k2"; infinity where it cannot be one."""
    near, far = torch.tensor([0.5, math.log(1e3)], dtype=torch.float64)
    if penalty.other == "old":
        weights = [float(penalty.curves(x)[1] / x) for x in (near, far)]
        cap = weights[1] / weights[0] * math.exp(near) if weights[0] else 0.0
    else:
        weights = [float(penalty.curves(near, ratio)[1]) for ratio in (1.0, 1e3)]
        cap = weights[1] / weights[0] if weights[0] else 0.0
    return plain(cap, max(1e-6, penalty.known.precision.digits)) if 0 < cap < math.inf else math.inf


def _kl_limit(penalty: _Penalty, coef: float, kl: KL) -> tuple[float | None, float | None] | None:
    """Return (input, output) clamps, from where slopes leave the kind's; None where that is no clamp of ours."""
    precise = penalty.known.precision
    exact = precise.same < 1e-6

    def left(x: Tensor) -> Tensor:
        size = penalty.predicted(kl, x)[1]
        return (penalty.curves(x)[1] / coef - size).abs() >= max(1e-3, precise.close) * size.abs().clamp(min=1e-12)

    # k3 grows as exp downwards, and hides what rounds.
    grids = (-(FAR if exact else FAR[FAR <= 8]), FAR)
    low, high = (abs(float(edges(left, points, left(points)))) for points in grids)
    if low == high == math.inf:
        return _hidden_limit(penalty, coef, kl)
    if high < math.inf and (abs(low - high) < 1e-3 * high or (low == math.inf and not exact)):
        # A loss that rounds does not show its lower end. The slope of k2 stops at a clamp of its value as well.
        before, after = (plain(x, 1e-6 + 0.1 * precise.digits) for x in (high, high * high / 2))
        shorter = len(repr(after)) < len(repr(before))
        return (20.0, after) if shorter and (kl.estimator, kl.gradient) == ("k2", "pathwise") else (before, None)
    if kl.estimator != "k3" or kl.gradient != "pathwise" or math.inf in (low, high):
        return None
    output = math.exp(low) - low - 1
    if abs(math.exp(-high) + high - 1 - output) > 1e-3 * output:
        return None
    return 20.0, plain(output, 1e-6)  # an input clamp behind it cannot be seen


def _hidden_limit(penalty: _Penalty, coef: float, kl: KL) -> tuple[float | None, float | None]:
    """Return the clamps of a kind whose slope is not its value's, and goes on where the value stops (verl's k3+)."""
    if kl.gradient not in ("straight_through_k2", "weighted_k2"):
        return None, None
    _, near, far = (penalty.curves(torch.tensor([0.0, -8.0, -9.0], dtype=torch.float64))[0] / coef).tolist()
    return (20.0, plain(far, 1e-6)) if abs(far - near) <= 1e-6 * abs(far) else (None, None)


# The entropy bonus


def find_entropy(probe: Probe, known: Known) -> Step:
    """Find the bonus, from what is left of the gradient at advantages of 0."""
    precise = known.precision
    slopes = torch.nan_to_num(probe.at(known, 0.0, probe.zeros()).entropy)
    weights, counted = weights_of_tokens(probe, known), known.counted(probe.batch)
    live = counted & (weights != 0)
    if not bool((slopes.abs() >= max(1e-9, precise.same) * 10 * weights.abs().max()).any()):
        return known, []
    says = [said("entropy_unmasked")] if bool(slopes[~counted].any()) else []
    share = -slopes[live] / weights[live]
    if spread(share) <= precise.close:
        coef = plain(float(share.mean()), precise.digits)
        return known.but(entropy_coef=coef), says + ([said("entropy_penalty")] if coef < 0 else [])
    own = -slopes[live] * float(live.sum()) / known.weights.factor
    if bool(own.isfinite().all()):
        known = known.but(entropy_coef=plain(float(own.mean()), precise.digits), entropy_aggregation="token_mean")
    return known, says if spread(own) <= precise.close else [*says, said("unknown_entropy")]


# The weights of the sampler's log-probs


def find_rollout(probe: Probe, known: Known) -> Step:
    """Find the correction for the sampler, whose log-probs were the old ones so far."""
    says = [said("left_out", names=", ".join(probe.caller.left_out))] if probe.caller.left_out else []
    if not probe.caller.takes("rollout_log_probs"):
        return known, says
    inputs = probe.inputs(known, 0.0, probe.signs())

    def policy(inputs: Inputs) -> Tensor:
        """Return (B, T) slopes less those at advantages of 0, of the KL to the sampler."""
        without = dataclasses.replace(inputs, advantages=torch.zeros_like(inputs.advantages))
        return probe.slopes(known, inputs).slope - torch.nan_to_num(probe.slopes(known, without).slope)

    rest = policy(inputs)
    live = known.live(probe.batch) & (rest != 0)
    near = 10 * known.precision.same

    def factor(log_rho: Tensor | float) -> Tensor:
        """Return (B, T): what slopes are times those at ρ = 1."""
        return policy(dataclasses.replace(inputs, rollout=inputs.old - log_rho)) / rest

    noise = torch.randn(live.shape, generator=torch.Generator().manual_seed(3)).double()
    if all(bool(((factor(s * noise) - 1).abs() <= near)[live].all()) for s in (0.3, 6.0)):
        return known, says
    first = torch.zeros_like(rest).scatter(-1, live.long().argmax(-1, keepdim=True), 1.0)
    pooled = any(bool(((factor(x * first) - 1).abs() > near)[live & (first == 0)].any()) for x in (0.5, 3.0, -3.0))
    # Over how many tokens one pooled log ρ is spread.
    shares = {"sequence": known.lengths(probe.batch), "geometric": 1.0} if pooled else {"token": 1.0}
    for level, tokens in shares.items():
        scheme = _scheme(lambda x, tokens=tokens: factor(x / tokens)[live], level, known)  # type: ignore[misc]
        if scheme is not None:
            return known.but(rollout=(scheme,)), says
    return known, [*says, said("rollout_weights")]


def _scheme(factor: Callable[[float], Tensor], level: Any, known: Known) -> Rollout | None:
    """Return the scheme whose factors these are at one log ρ for all tokens, or for all sequences.

    All keep ρ, or 1, between two bounds; what is left beyond them tells them apart.
    """
    close, digits = max(1e-6, known.precision.close), known.precision.digits

    def differ(x: float, wanted: float) -> Tensor:
        return ~((factor(x) - wanted).abs() <= close * wanted).all()

    by_ratio = not bool(differ(1e-2, math.exp(1e-2)))
    if not by_ratio and bool(differ(1e-3, 1.0)):
        return None

    def left(x: Tensor) -> Tensor:
        return differ(float(x), math.exp(float(x)) if by_ratio else 1.0)

    bounds, kept, points = [], [], [0.0]
    for far in (-8.0, 8.0):
        end = torch.tensor([far], dtype=torch.float64)
        edge = math.copysign(float(edges(left, end, left(end)[None])), far)
        bounds.append(plain(math.exp(edge), digits))
        kept.append(bounds[-1])
        if math.isfinite(edge):
            points += [far, 1.01 * edge + math.copysign(1e-4, far)]
            kept[-1] = plain(float(factor(far).mean()), digits)  # a bound, more exactly than where it begins
    low, high = bounds
    kinds: list[TruncatedIS | MaskedIS | Rejection] = [Rejection(low, high, level)]
    if by_ratio:
        kinds = [TruncatedIS(kept[1], kept[0], level)] if 0 < kept[1] >= kept[0] >= 0 else []
        kinds += [MaskedIS(low, high, level)]
    for kind in kinds:
        predicted = kind.factor(torch.tensor(points, dtype=torch.float64).exp()).tolist()
        # Tokens that leave at bounds of their own are pooled in another way.
        if not any(bool(differ(x, wanted)) for x, wanted in zip(points, predicted, strict=True)):
            return kind
    return None
