"""What stands beside the policy term: the KL penalty, the entropy bonus, the weights of the sampler's log-probs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..objectives.kl import KL, kl_terms
from ..objectives.rollout import MaskedIS, Rejection, Rollout, TruncatedIS
from ..objectives.surrogates import Point
from .batch import Batch, Inputs
from .known import Known, Said, said
from .numbers import bisect, plain
from .probe import Probe
from .weighing import measure
from .weights import Measured, fit_weights, on_batches, patterns

Step = tuple[Known, list[Said]]
DISTANCES = torch.tensor([-2.0, -1.0, -0.5, -0.1, 0.1, 0.4, 1.0, 1.7], dtype=torch.float64)
FAR = torch.cat([torch.logspace(-2, 0, 11), torch.linspace(1.25, 8, 28), torch.tensor([11.0, 15, 19, 22])]).double()


def _weights(probe: Probe, known: Known) -> Tensor:
    """Return the (B, T) weights of tokens that count, with or without a policy term."""
    m = measure(probe, known, probe.batch)
    w = known.weights
    assert w is not None
    if w.spread > known.precision.close:
        return m.weights
    pattern = patterns(m.counted, m.counted)[w.pattern, w.group_size]
    return pattern * w.factor / w.normalizer().of(m.counted, m.mask)


# The KL penalty


class _Penalty:
    """Slopes of the loss in the distance from the reference, at advantages of 0."""

    def __init__(self, probe: Probe, known: Known) -> None:
        self.probe, self.known = probe, known
        self.counted = known.counted(probe.batch)
        self.weights = _weights(probe, known)
        self.live = self.counted & (self.weights != 0)
        if known.level == "sequence_product" and bool((self.counted.sum(-1) == 1).any()):
            # A ratio that weighs the KL couples the other tokens.
            self.live = self.live & (self.counted.sum(-1, keepdim=True) == 1)

    def slopes(self, x: Tensor | float, ratio: float = 1.0, batch: Batch | None = None) -> Tensor:
        """Return (B, T)."""
        zero = self.probe.zeros(batch)
        return torch.nan_to_num(self.probe.at(self.known, math.log(ratio), zero, x, batch).slope)

    def curve(self, points: Tensor, ratio: float = 1.0) -> Tensor:
        """Return (n,) slopes over weight, the mean of tokens."""
        slopes = torch.stack([(self.slopes(float(x), ratio) / self.weights)[self.live].mean() for x in points])
        return slopes - self._without_advantage(math.log(ratio))

    def _without_advantage(self, log_ratio: float) -> float:
        """Return the surrogate's own slope at an advantage of 0: a spring's."""
        one, x = torch.ones(()).double(), torch.tensor(log_ratio, dtype=torch.float64)
        t = self.known.surrogate.terms(Point(-one, x, x.exp(), 0 * one, -one - x))
        return float(t.slope + t.direct)

    def values(self, points: Tensor, ratio: float) -> Tensor:
        """Return (n,) losses per weight, less the first."""
        zero, log_ratio = self.probe.zeros(), math.log(ratio)
        losses = [self.probe.at(self.known, log_ratio, zero, float(x)).loss for x in points]
        return (torch.tensor(losses, dtype=torch.float64) - losses[0]) / float(self.weights[self.counted].sum())


def find_kl(probe: Probe, known: Known) -> Step:
    """Find the penalty's estimator, gradient, clamps and coefficient, and whether it is one of ours."""
    if not probe.caller.takes("ref_log_probs"):
        return known, []
    penalty = _Penalty(probe, known)
    near = penalty.slopes(0.5)
    says = _coupled(probe, known, penalty, near)
    none = max(1e-9, 0.1 * known.precision.same) * float(penalty.weights.abs().max())
    if max(float(slopes.abs().max()) for slopes in (near, penalty.slopes(-1.0))) < none:
        return known, says
    says += [said("kl_unmasked")] if float(near[~penalty.counted].abs().sum()) > 0 else []
    share = near[penalty.live] / penalty.weights[penalty.live]
    if float((share - share.mean()).abs().max()) > 10 * known.precision.close * float(share.abs().mean()):
        own = fit_weights(on_batches(lambda batch: _own(penalty, batch), probe.batches()), known.precision.same)
        if own.spread <= 10 * known.precision.close:
            says.append(said("kl_aggregation", name=f"per {own.pattern}, over {own.denominator}"))
            penalty.weights = near / own.factor
        else:
            says.append(said("kl_weights"))
    kl, found = _fit_kl(penalty)
    if any(one.key.startswith("kl_follows") for one in says):
        return known.but(kl=dataclasses.replace(kl, limit=(None, None))), says
    return known.but(kl=kl), [*says, *found, *([said("kl_sign")] if kl.coef < 0 else [])]


def _own(penalty: _Penalty, batch: Batch) -> Measured:
    counted = penalty.known.counted(batch)
    return Measured(penalty.slopes(0.5, 1.0, batch), counted, counted, batch.mask)


def _coupled(probe: Probe, known: Known, penalty: _Penalty, near: Tensor) -> list[Said]:
    """Say it where a token's slope follows other sequences' distances, or the advantages."""
    allowed = max(1e-6, known.precision.close) * near.abs() + 1e-9 * penalty.weights.abs().max()
    still = torch.arange(probe.batch.shape[0]) % 2 == 0
    far, moved = (torch.where(still, *pair).double()[:, None] for pair in ((0.5, 3.0), (0.0, 1.0)))
    for others in (penalty.slopes(far), torch.nan_to_num(probe.at(known, moved, probe.zeros(), 0.5).slope)):
        if bool(((others - near).abs() > allowed)[still].any()):
            return [said("kl_follows_batch")]
    for log_ratio, key in ((0.0, "kl_follows_advantages"), (0.4, "kl_elsewhere"), (-0.4, "kl_elsewhere")):
        with_them, without = (
            [probe.at(known, log_ratio, A, x).slope for x in (0.5, -0.5)] for A in (3 * probe.signs(), probe.zeros())
        )
        apart = (with_them[0] - with_them[1]) - (without[0] - without[1])
        size = torch.maximum(with_them[0].abs(), near.abs()) + 1e-3 * penalty.weights.abs().max()
        if bool((apart.abs() > max(1e-6, known.precision.close) * size)[penalty.live].any()):
            return [said(key)]
    return []


def _candidates() -> Iterator[KL]:
    """Yield every kind of penalty with coefficient 1, likelier ones before others of the same slopes and values."""
    free = (None, None)
    for estimator in ("k3", "k2", "k1", "abs"):
        yield KL(1.0, estimator, limit=free)
        yield KL(1.0, estimator, ratio_weighted=True, limit=free)
        for gradient in ("straight_through_k2", "weighted_k2", "score_function"):
            yield KL(1.0, estimator, gradient, limit=free, ratio_cap=math.inf)


def _predicted(kl: KL, x: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Return values and slopes of a penalty, (n,) each, at distances x and one ratio."""
    t = kl_terms(kl, x, torch.full_like(x, ratio))
    return (t.value * ratio, t.slope_with_ratio * ratio) if kl.ratio_weighted else (t.value, t.slope)


def _fit_kl(penalty: _Penalty) -> tuple[KL, list[Said]]:
    """Return the kind whose slopes these are, on-policy and off; of several the one whose values they are as well."""
    precise = penalty.known.precision
    ratios = (1.0, 1.5)
    slopes = torch.cat([penalty.curve(DISTANCES, ratio) for ratio in ratios])
    values = torch.cat([penalty.values(DISTANCES, ratio) for ratio in ratios])
    if not bool(slopes.isfinite().all()):
        return KL(), [said("kl_elsewhere")]

    def fit(kl: KL, exchanged: bool = False) -> tuple[float, float, float]:
        """Return how far slopes are from a kind's, how far values are, and the coefficient."""
        sign = -1 if exchanged else 1
        kinds = [_predicted(kl, sign * DISTANCES, ratio) for ratio in ratios]
        value, slope = torch.cat([v - v[0] for v, _ in kinds]), sign * torch.cat([s for _, s in kinds])
        coef = float((slopes * slope).sum() / (slope * slope).sum())
        error = float((slopes - coef * slope).abs().max() / slopes.abs().max())
        return max(error, max(1e-6, precise.close)), float((values - coef * value).abs().max()), coef

    kinds = [(fit(kl), kl) for kl in _candidates()]
    (error, _, coef), kl = min(kinds, key=lambda kind: kind[0][:2])
    exchanged, _, other = fit(KL(1.0), exchanged=True)
    if exchanged < error:
        return KL(plain(other, precise.digits)), [said("kl_reversed")]
    cap = KL().ratio_cap
    if kl.gradient == "weighted_k2":
        x = torch.tensor([0.5], dtype=torch.float64)
        cap = plain(float(penalty.curve(x, 1e3) / penalty.curve(x, 1.0)), max(1e-6, precise.digits))
    limit = _kl_limit(penalty, coef, kl)
    kl = dataclasses.replace(kl, coef=plain(coef, precise.digits), limit=limit or (None, None), ratio_cap=cap)
    unknown = [said("unknown_kl", error=error)] if error > max(1e-6, precise.close) else []
    return kl, unknown if limit is not None else [said("kl_limit")]


def _kl_limit(penalty: _Penalty, coef: float, kl: KL) -> tuple[float | None, float | None] | None:
    """Return (input, output) clamps, from where slopes leave the kind's; None where that is no clamp of ours."""
    precise = penalty.known.precision

    def left(x: Tensor) -> Tensor:
        size = _predicted(kl, x, 1.0)[1]
        return (penalty.curve(x) / coef - size).abs() >= max(1e-3, precise.close) * size.abs().clamp(min=1e-12)

    ends: list[float | None] = []
    for direction in (-1, 1):
        # k3 grows as exp downwards, and hides what rounds.
        points = direction * (FAR if direction > 0 or precise.same < 1e-6 else FAR[FAR <= 8])
        gone = left(points)
        first = len(points) - int(gone.flip(0).long().cumprod(0).sum())
        if first == len(points):
            ends.append(None)
            continue
        inside = points[first - 1 : first] if first else torch.zeros(1, dtype=torch.float64)
        ends.append(abs(float(bisect(left, inside, points[first : first + 1], 50))))
    low, high = ends
    if low is None and high is None:
        return None, None
    if high is not None and (abs(low - high) < 1e-3 * high if low is not None else precise.same > 1e-6):
        return plain(high, 1e-6 + 0.1 * precise.digits), None  # a loss that rounds does not show its lower end
    if kl.estimator != "k3" or kl.gradient != "pathwise" or low is None or high is None:
        return None
    output = math.exp(low) - low - 1
    if abs(math.exp(-high) + high - 1 - output) > 1e-3 * output:
        return None
    return 20.0, plain(output, 1e-6)  # an input clamp behind it cannot be seen


# The entropy bonus


def find_entropy(probe: Probe, known: Known) -> Step:
    """Find the bonus, from what is left of the gradient at advantages of 0."""
    precise = known.precision
    slopes = torch.nan_to_num(probe.at(known, 0.0, probe.zeros()).entropy)
    weights, counted = _weights(probe, known), known.counted(probe.batch)
    live = counted & (weights != 0)
    if float(slopes.abs().max()) < max(1e-9, precise.same) * 10 * float(weights.abs().max()):
        return known, []
    says = [said("entropy_unmasked")] if float(slopes[~counted].abs().sum()) > 0 else []
    share = -slopes[live] / weights[live]
    if float((share - share.mean()).abs().max()) <= precise.close * float(share.abs().mean()):
        coef = plain(float(share.mean()), precise.digits)
        return known.but(entropy_coef=coef), says + ([said("entropy_penalty")] if coef < 0 else [])
    w = known.weights
    assert w is not None
    own = -slopes[live] * float(live.sum()) / w.factor
    if not bool(own.isfinite().all()):
        return known, [*says, said("unknown_entropy")]
    known = known.but(entropy_coef=plain(float(own.mean()), precise.digits), entropy_aggregation="token_mean")
    if float((own - own.mean()).abs().max()) > precise.close * float(own.abs().mean()):
        says.append(said("unknown_entropy"))
    return known, says


# The weights of the sampler's log-probs


def find_rollout(probe: Probe, known: Known) -> Step:
    """Find the correction for the sampler, whose log-probs were the old ones so far."""
    says = [said("left_out", names=", ".join(probe.caller.left_out))] if probe.caller.left_out else []
    if not probe.caller.takes("rollout_log_probs"):
        return known, says
    log_probs, A = known.log_probs(probe.batch), probe.signs()
    rest = probe.slopes(known, Inputs(probe.batch, log_probs, log_probs, A)).slope
    live = known.live(probe.batch) & (rest != 0)

    def factor(log_rho: Tensor | float) -> Tensor:
        """Return (B, T): what slopes are times those at ρ = 1."""
        rollout = log_probs - torch.as_tensor(log_rho, dtype=torch.float64)
        return probe.slopes(known, Inputs(probe.batch, log_probs, log_probs, A, rollout)).slope / rest

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(log_probs.shape, generator=generator).double()
    near = 10 * known.precision.same
    if all(bool(((factor(s * noise) - 1).abs() <= near)[live].all()) for s in (0.3, 6.0)):
        return known, says
    one_moved = torch.zeros_like(log_probs)
    one_moved.scatter_(-1, live.long().argmax(-1, keepdim=True), 0.5)
    pooled = bool(((factor(one_moved) - 1).abs() > near)[live & (one_moved == 0)].any())
    for level, shares in _levels(known, probe.batch, pooled):

        def of_all(log_rho: float, shares: Tensor = shares) -> Tensor:
            return factor(log_rho / shares)[live]

        scheme = _scheme(of_all, level, known)
        if scheme is not None:
            return known.but(rollout=(scheme,)), says
    return known, [*says, said("rollout_weights")]


def _levels(known: Known, batch: Batch, pooled: bool) -> list[tuple[str, Tensor]]:
    """Return how ρ may be pooled, with what spreads one pooled log ρ over a sequence's tokens."""
    lengths = known.counted(batch).sum(-1, keepdim=True).clamp(min=1).double()
    one = torch.ones_like(lengths)
    return [("sequence", lengths), ("geometric", one)] if pooled else [("token", one)]


def _scheme(factor: Callable[[float], Tensor], level: str, known: Known) -> Rollout | None:
    """Return the scheme whose factors these are at one log ρ for all tokens, or for all sequences.

    What is left beyond two bounds tells the schemes apart: of ρ the bound or nothing, or nothing of 1.
    """
    near = max(1e-6, known.precision.close)

    def kept(x: Tensor, by_ratio: bool) -> Tensor:
        values = factor(float(x))
        wanted = math.exp(float(x)) if by_ratio else 1.0
        return ((values - wanted).abs() <= near * wanted).all()

    small = torch.tensor(1e-3, dtype=torch.float64)

    def gone(x: Tensor, by_ratio: bool) -> bool:
        """Whether no token keeps it: tokens that leave at bounds of their own are pooled in another way."""
        values = factor(float(x))
        wanted = math.exp(float(x)) if by_ratio else 1.0
        return not bool(((values - wanted).abs() <= 1e-5 * wanted).any())

    by_ratio = bool(kept(10 * small, True))
    if not by_ratio and not bool(kept(small, False)):
        return None
    bounds, beyond = [], []
    for far in (-8.0, 8.0):
        end = torch.tensor(far, dtype=torch.float64)
        if bool(kept(end, by_ratio)):
            bounds.append(0.0 if far < 0 else math.inf)
            continue
        edge = bisect(lambda x: ~kept(x, by_ratio), torch.zeros_like(end), end)
        if not gone(edge * 1.01 + math.copysign(1e-4, far), by_ratio):
            return None
        bounds.append(plain(math.exp(float(edge)), known.precision.digits))
        beyond.append((float(factor(far).mean()), bounds[-1]))
    low, high = bounds
    if not by_ratio:
        return Rejection(low, high, level) if all(value == 0 for value, _ in beyond) else None  # type: ignore[arg-type]
    if all(value == 0 for value, _ in beyond) and beyond:
        return MaskedIS(low, high, level)  # type: ignore[arg-type]
    if all(abs(value - bound) <= 10 * near * bound for value, bound in beyond):
        # The bound is what is left beyond it, more exactly than where it begins.
        exact = {bound: plain(value, known.precision.digits) for value, bound in beyond}
        return TruncatedIS(exact.get(high, high), exact.get(low, low), level)  # type: ignore[arg-type]
    return None
