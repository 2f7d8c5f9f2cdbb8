"""The [tokens]-sized half of the loss: log-probs to records (two-pass route), records to loss and metrics (both).

``token_terms`` is the twin of the function of that name in csrc/common/surrogates.h:

    log-ratio → ratio, pooled and saturated → weight, rollout factors in it → policy part + KL part

What is pooled over sequences is asked for together, once before the surrogate and once behind it: over a group of ranks
each is one collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..backends.contract import RowGradients, TokenInputs, TokenRecords, TokenValues
from ..backends.spec import in_kernel, objective_spec
from ..objectives.compiler import computed_once
from ..objectives.config import LossConfig
from ..objectives.kl import ESTIMATORS, KL, kl_terms
from ..objectives.levels import Level, Share
from ..objectives.maths import beyond, clamp, log_ratio_of, times, weighed
from ..objectives.metrics import FIELDS, Metrics, reduce_ratios
from ..objectives.rollout import FOLDED, Rollout, rollout_log_ratios, rollout_weights
from ..objectives.running import Origin, Running, begin_back_from, begin_up_to
from ..objectives.sequences import Sequences, accumulate_dtype
from ..objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, Point


@dataclass(frozen=True)
class TokenBatch:
    """The token-sized inputs of one loss, all contiguous (B, T). Where ``live`` is not, they hold anything."""

    live: Tensor
    """bool: counts in the loss and is read."""
    masked_in: Tensor
    """bool: counts in the denominators (live or skipped)."""
    sequences: Sequences
    inputs: TokenInputs
    """Weights are 0 where ``masked_in`` is not."""
    schemes: tuple[Rollout, ...] = ()
    """Rollout schemes that are still to be applied."""
    rollout_weight: Tensor | None = None
    """The factors of those already applied, for the metrics."""
    entropy_threshold: Tensor | float | None = None
    """Tokens of less entropy have no policy term."""
    divergence_weight: Tensor | None = None
    """The weight in the loss of the divergence from a teacher, coefficient included; None: no such term."""

    def totals(self, requests: Sequence[tuple[Tensor, Share]]) -> list[Tensor | None]:
        """Return the sums, or means over live tokens, of each sequence, (S,) in the accumulation dtype; 0 for an empty
        one, None for other shares. Values are (B, T), 0 at dead rows."""
        each: list[Tensor] = []
        places = [_place(values, each) if share in ("mean", "sum") else None for values, share in requests]
        if not each:
            return [None] * len(requests)
        sums = self.sequences.sums(each, accumulate_dtype(self.live.device))
        totals: list[Tensor | None] = []
        for place, (_, share) in zip(places, requests, strict=True):
            total = None if place is None else sums[place]
            totals.append(total / self.live_lengths if total is not None and share == "mean" else total)
        return totals

    @computed_once
    def live_lengths(self) -> Tensor:
        """The live tokens of each sequence, (S,), at least 1."""
        return self.sequences.lengths(self.live).clamp(min=1)

    @computed_once
    def dead(self) -> Tensor:
        """bool (B, T): where a token is not live."""
        return ~self.live

    def begin_up_to(self, requests: Sequence[tuple[Tensor, Share]]) -> list[Callable[[], Running] | None]:
        """Begin what running levels make of values (B, T), 0 at dead rows; None for other shares. To be begun before
        ``totals`` of the same, so that all travel together."""
        each: list[Tensor] = []
        keys = [(_place(values, each), share) for values, share in requests]
        begun: dict[tuple[int, Share], Callable[[], Running]] = {}
        for place, share in keys:
            if share in ("sum_before", "least_before") and (place, share) not in begun:
                begun[place, share] = begin_up_to(each[place], self.live, self.sequences, share == "least_before")
        return [begun.get(key) for key in keys]

    def at_tokens(self, values: Tensor, total: Tensor | None) -> Tensor:
        """Return a total (S,) of ``values`` at every token, in their dtype; the values where it is None."""
        return values if total is None else self.sequences.expand(total.to(values.dtype)).expand_as(values)

    def pool(self, requests: Sequence[tuple[Tensor, Share]]) -> list[Tensor]:
        """Return ``totals``, each at every token."""
        totals = self.totals(requests)
        return [self.at_tokens(values, total) for (values, _), total in zip(requests, totals, strict=True)]

    def factors(self, config: LossConfig, schemes: Sequence[Rollout], log_ratios: Sequence[Tensor]) -> Tensor:
        """Return the product of the factors of rollout schemes, from the log-ratio of each before it is pooled."""
        shares = (scheme.share for scheme in schemes)
        pooled = self.pool(list(zip(log_ratios, shares, strict=True)))
        inputs = self.inputs
        assert inputs.rollout is not None
        return rollout_weights(schemes, pooled, inputs.rollout, inputs.advantage, config.log_ratio_limit)


def _place(values: Tensor, among: list[Tensor]) -> int:
    """Return the place of this very tensor in a list, at whose end it is put where it is not there. PyTorch 2.11 does
    not compile ``id`` of what a graph makes."""
    for place, one in enumerate(among):
        if one is values:
            return place
    among.append(values)
    return len(among) - 1


class KnownSchemes(NamedTuple):
    """Rollout schemes whose factors follow from old log-probs alone."""

    schemes: tuple[Rollout, ...]
    log_ratios: list[Tensor]
    """(B, T) of each, before they are pooled."""
    others: tuple[Rollout, ...]
    """The config's other schemes."""

    @classmethod
    def of(cls, config: LossConfig, old: Tensor | None, rollout: Tensor | None, live: Tensor) -> KnownSchemes | None:
        """Return None where there are no such schemes, or a kernel applies them."""
        if old is None or rollout is None or config.policy_term.takes_rollout or in_kernel(config.schemes):
            return None
        of_old = tuple(scheme for scheme in config.schemes if not scheme.of_policy)
        if not of_old:
            return None
        others = tuple(scheme for scheme in config.schemes if scheme.of_policy)
        return cls(of_old, rollout_log_ratios(of_old, old, old, rollout, live), others)

    @property
    def pooled(self) -> list[Tensor]:
        """Return the log-ratios that are to be pooled."""
        return [values for scheme, values in zip(self.schemes, self.log_ratios, strict=True) if scheme.pooled]

    def applied(self, config: LossConfig, batch: TokenBatch) -> TokenBatch:
        """Multiply the factors into the batch's weights: so the one-pass loss stays one pass."""
        factors = torch.where(batch.live, batch.factors(config, self.schemes, self.log_ratios), 0.0)
        inputs = batch.inputs._replace(policy_weight=weighed(batch.inputs.policy_weight, factors))
        return dataclasses.replace(batch, inputs=inputs, schemes=self.others, rollout_weight=factors)


def pools(config: LossConfig, batch: TokenBatch) -> bool:
    """Whether a token's slope needs the other tokens of its sequence."""
    of_kls = config.kl_pooling.pools or config.rollout_kl_pooling.pools
    return config.pooling.pools or of_kls or any(scheme.pooled for scheme in batch.schemes)


class Settled(NamedTuple):
    """A loss whose log-probs are known."""

    loss: Tensor
    """0-d, detached."""
    metrics: Metrics
    gradients: RowGradients
    grad_divergence: Tensor | None


class Diverged(NamedTuple):
    """What is known of every token's teacher, (B, T)."""

    divergence: Tensor
    teacher_entropy: Tensor


def settle(
    config: LossConfig,
    batch: TokenBatch,
    values: TokenValues,
    numbers: Tensor,
    backend: str,
    diverged: Diverged | None = None,
) -> Settled:
    """Return loss, metrics and the slopes in log-probs, entropies and divergences."""
    records, slope, ratios = fast_token_terms(config, batch, values, numbers, backend)
    loss, metrics = reduce_records(config, batch, values, records, backend, ratios, diverged)
    weight = batch.inputs.entropy_weight
    gradients = RowGradients(slope, None if weight is None else -weight)
    return Settled(loss, metrics, gradients, batch.divergence_weight)


class PooledRatios(NamedTuple):
    """What metrics are made of where a level pools, in the accumulation dtype: of sequences (S,), of tokens (B, T) at
    running levels."""

    log_ratio: Tensor | None
    """As the level pools it, unsaturated; None on-policy, of sequences."""
    clipped: list[Tensor]
    """At the low, the high and the dual bound: 0 where no token of a sequence is; where a token is not."""


class Terms(NamedTuple):
    """What every token's log-prob and entropy come to."""

    records: TokenRecords
    slope: Tensor
    """∂loss/∂ℓ, weights included."""
    ratios: PooledRatios | None
    """Where a level pools, and metrics are wanted."""


def fast_token_terms(
    config: LossConfig, batch: TokenBatch, values: TokenValues, numbers: Tensor, backend: str, report: bool = True
) -> Terms:
    """Return the terms, by the backend's kernel where it has one: on a GPU one launch in place of sixty. Metrics of
    sequences are made beside them if ``report``."""
    by_token = not pools(config, batch)
    inputs = batch.inputs
    with_kls = inputs.kl_weight is not None, inputs.rollout_kl_weight is not None
    spec = objective_spec(config, with_kls[0], batch.schemes, with_kls[1]) if by_token else None
    if spec is None or not backends.has_token_terms(backend):
        return _terms(config, batch, values.log_prob, values.entropy, report)
    return Terms(*ops.token_terms(values, numbers, batch.inputs, spec, backend), None)


def token_terms(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor | None = None
) -> tuple[TokenRecords, Tensor]:
    """Return the records of every token and ∂loss/∂ℓ, weights included in the last.

    ``entropy`` is needed with a threshold alone.
    """
    return _terms(config, batch, log_prob, entropy, report=False)[:2]


def _terms(config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor | None, report: bool) -> Terms:
    report &= config.pooling.pools
    ratio = _ratio_of(config, batch, log_prob, report)
    policy = _policy_part(config, batch, log_prob, entropy, ratio)
    kl, to_sampler = _kl_part(config, batch, log_prob, ratio), _rollout_kl_part(config, batch, log_prob, ratio)
    dead = batch.dead
    flags = policy.flags.masked_fill(dead, 0)
    at_bounds = _at_bounds(flags) if report else []
    clipped = [] if config.pooling.running else at_bounds
    spread: list[tuple[Tensor, Share]] = [(_live(policy.slope, config.pooling.spread, batch), config.pooling.spread)]
    pooled = [ratio.pooled]
    for part, level, of_part in (
        (kl, config.kl_pooling, ratio.of_kl),
        (to_sampler, config.rollout_kl_pooling, ratio.of_rollout_kl),
    ):
        if part is not None and part.through_ratio is not None:
            spread.append((_live(part.through_ratio, level.spread, batch), level.spread))
            pooled.append(of_part)
    begun = [_begin_sharing(batch, *request, of_part) for request, of_part in zip(spread, pooled, strict=True)]
    totals = batch.totals([*spread, *clipped])
    each = zip(spread, totals, begun, strict=False)
    shared = [batch.at_tokens(slope, total) if running is None else running() for (slope, _), total, running in each]

    slope = shared[0].masked_fill(ratio.stops, 0.0) + (0.0 if policy.direct is None else policy.direct)  # none is -0
    kl_slope = 0.0 if kl is None else kl.slope
    kl_slope = kl_slope if to_sampler is None else kl_slope + to_sampler.slope
    for of_ratio in shared[1:]:
        kl_slope = kl_slope + of_ratio.masked_fill(ratio.impossible, 0.0)
    if isinstance(kl_slope, Tensor) or policy.direct is not None:
        slope = slope + kl_slope
    applied, none = ratio.applied, log_prob.new_empty(0)
    records = TokenRecords(
        policy=policy.value.masked_fill(dead, 0.0),
        kl=torch.zeros_like(log_prob) if kl is None else kl.value.masked_fill(dead, 0.0),
        flags=flags,
        rollout_weight=none if applied is None else applied.masked_fill(dead, 0.0),
        rollout_kl=none if to_sampler is None else to_sampler.value.masked_fill(dead, 0.0),
    )
    counts = [total for total in totals[len(spread) :] if total is not None]
    flagged = [flag for flag, _ in at_bounds] if config.pooling.running else counts
    ratios = PooledRatios(ratio.of_metrics, flagged) if report else None
    return Terms(records, slope.masked_fill(dead, 0.0), ratios)


def _begin_sharing(batch: TokenBatch, slope: Tensor, share: Share, pooled: _Pooled) -> Callable[[], Tensor] | None:
    """Begin what every token's own log-prob gets of the slopes in log-ratios that a running level has pooled; None for
    other shares."""
    running = share in ("sum_behind", "sum_of_least")
    return begin_back_from(slope, batch.sequences, pooled.origin) if running else None


def _live(slope: Tensor, share: Share, batch: TokenBatch) -> Tensor:
    """Return slopes that are 0 where a token is not live, if they are to be shared."""
    return slope if share == "own" else slope.masked_fill(batch.dead, 0.0)


def _at_bounds(flags: Tensor) -> list[tuple[Tensor, Share]]:
    """Return what to ask for so as to know which sequences have tokens at the low, the high and the dual bound."""
    return [(flags & bit, "sum") for bit in (CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL)]


class _Ratio(NamedTuple):
    """The ratio to the old policy of every token, and the rollout factors beside it."""

    old: Tensor
    """Log-probs that the ratio is taken to; the policy's own on-policy."""
    pooled: _Pooled
    """The log-ratio with the surrogate's bounds and the rollout factors that are part of it, as the level pools it."""
    of_kl: _Pooled
    """The log-ratio as it is, as the KL's level pools it, where there is a KL."""
    of_rollout_kl: _Pooled
    """As that of the KL to the sampler does, where there is one."""
    of_metrics: Tensor | None
    """As that of ``PooledRatios``; None where no metric asks for it."""
    impossible: Tensor
    """bool: the token's probability is 0. Such a one has no direction to give: it saturates."""
    stops: Tensor
    """bool: ``impossible``, or at one of the surrogate's own bounds."""
    flags: Tensor | None
    """Of these bounds, where the surrogate has any."""
    in_value: Tensor | None
    """The rollout factors of the surrogate's value."""
    applied: Tensor | None
    """All rollout factors."""


class _Pooled(NamedTuple):
    """A log-ratio pooled and saturated, at every token."""

    log: Tensor
    ratio: Tensor
    outside: Tensor
    """bool: where it saturates."""
    origin: Origin | None
    """Whose own it is, where the level takes that of one token."""

    @classmethod
    def of(
        cls,
        batch: TokenBatch,
        values: Tensor,
        total: Tensor | None,
        running: Callable[[], Running] | None,
        limit: float | None,
    ) -> _Pooled:
        """Pool every token's own; ``total`` is that of the sequences, where the level has one, or else ``running`` what
        it makes of the tokens up to each."""
        raw, origin = batch.at_tokens(values, total), None
        if running is not None:
            raw, origin = running()
            raw = raw.to(values.dtype)
        saturated = clamp(raw, limit)
        return cls(saturated, saturated.exp(), beyond(raw, limit), origin)


def _ratio_of(config: LossConfig, batch: TokenBatch, log_prob: Tensor, report: bool) -> _Ratio:
    inputs, limit = batch.inputs, config.log_ratio_limit
    old = log_prob if inputs.old is None else inputs.old
    own = log_ratio_of(log_prob, old).masked_fill_(batch.dead, 0.0)  # NaN stays NaN
    bounded, free, flags = config.policy_term.clip_log_ratios(own, inputs.advantage)
    schemes = batch.schemes
    log_rhos: list[Tensor] = []
    if schemes:
        assert inputs.rollout is not None
        log_rhos = rollout_log_ratios(schemes, log_prob, inputs.old, inputs.rollout, batch.live)
    in_ratio = _factors(config, batch, log_rhos, folded=True)  # of tokens, not of sequences: config.py
    if in_ratio is not None:
        bounded = bounded + torch.where(batch.live, in_ratio.log().clamp(*FOLDED), 0.0)

    kls = (
        (config.kl_pooling, inputs.kl_weight is not None),
        (config.rollout_kl_pooling, inputs.rollout_kl_weight is not None),
    )
    wanted: list[tuple[Tensor, Share]] = [
        (bounded, config.pooling.pooled),
        *((own, level.pooled if wanted else "own") for level, wanted in kls),
        (own, config.pooling.pooled if report and (inputs.old is not None or config.pooling.running) else "own"),
        *((log_rho, scheme.share) for log_rho, scheme in zip(log_rhos, schemes, strict=True)),
    ]
    begun = batch.begin_up_to(wanted)
    totals = batch.totals(wanted)
    of_ratio, of_kl, of_rollout_kl, of_metrics, *of_schemes = totals
    pooled = _Pooled.of(batch, bounded, of_ratio, begun[0], limit)
    pooled_of_kl, pooled_of_rollout_kl = (
        pooled
        if not wanted or (level == config.pooling and bounded is own)
        else _Pooled.of(batch, own, total, running, limit)
        for (level, wanted), total, running in zip(kls, (of_kl, of_rollout_kl), begun[1:3], strict=True)
    )
    if (running := begun[3]) is not None:
        of_metrics = running().values
    known = [batch.at_tokens(log_rho, total) for log_rho, total in zip(log_rhos, of_schemes, strict=True)]
    in_value = _factors(config, batch, known, folded=False)
    applied = in_value if in_ratio is None else in_ratio if in_value is None else times(in_ratio, in_value)
    impossible = log_prob == float("-inf")
    stops = impossible if free is None else impossible | ~free
    kls_pooled = (pooled_of_kl, pooled_of_rollout_kl)
    return _Ratio(old, pooled, *kls_pooled, of_metrics, impossible, stops, flags, in_value, applied)


def _factors(config: LossConfig, batch: TokenBatch, log_ratios: list[Tensor], folded: bool) -> Tensor | None:
    """Return the product of the factors of the schemes that are part of the ratio (``folded``), or of the value; None
    where there are none. ``log_ratios`` are those of every scheme, pooled."""
    each = zip(batch.schemes, log_ratios, strict=True)
    chosen = [(scheme, values) for scheme, values in each if config.policy_term.folds(scheme) == folded]
    if not chosen:
        return None
    inputs, schemes = batch.inputs, [scheme for scheme, _ in chosen]
    assert inputs.rollout is not None
    others = (inputs.rollout, inputs.advantage, config.log_ratio_limit)
    return rollout_weights(schemes, [values for _, values in chosen], *others)


class _PolicyPart(NamedTuple):
    value: Tensor
    """Unweighted, rollout factors included."""
    slope: Tensor
    """∂loss/∂(pooled log-ratio), weighted; the level spreads it."""
    direct: Tensor | None
    """∂loss/∂ℓ at a fixed ratio, weighted; None: 0."""
    flags: Tensor


def _policy_part(
    config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor | None, ratio: _Ratio
) -> _PolicyPart:
    inputs, pooled = batch.inputs, ratio.pooled
    terms = config.policy_term.terms(Point(log_prob, pooled.log, pooled.ratio, inputs.advantage, ratio.old))
    weight, value = inputs.policy_weight, terms.value
    if ratio.in_value is not None:
        weight, value = weighed(weight, ratio.in_value), weighed(ratio.in_value, value)
    if batch.entropy_threshold is not None:
        assert entropy is not None
        low = entropy < batch.entropy_threshold
        weight, value = torch.where(low, 0.0, weight), torch.where(low, 0.0, value)
    slope = weighed(weight, terms.slope.masked_fill(pooled.outside, 0.0))
    flags = terms.flags if ratio.flags is None else terms.flags | ratio.flags
    direct = None if terms.direct is None else weighed(weight, terms.direct)
    return _PolicyPart(value, slope, direct, flags)


class _KLPart(NamedTuple):
    value: Tensor
    """Unweighted."""
    slope: Tensor
    """∂loss/∂ℓ that is the token's own, weighted."""
    through_ratio: Tensor | None
    """∂loss/∂(pooled log-ratio), weighted, where a level is to spread it."""


def _kl_part(config: LossConfig, batch: TokenBatch, log_prob: Tensor, ratio: _Ratio) -> _KLPart | None:
    """Return the part of the KL to the reference, whose ratio is π/π_old as it is; None without that term."""
    ref, weight = batch.inputs.ref, batch.inputs.kl_weight
    if weight is None or ref is None:
        return None
    return _sampled_kl_part(config.kl, config.kl_pooling, weight, log_prob, ref, ratio.of_kl, ratio.impossible)


def _rollout_kl_part(config: LossConfig, batch: TokenBatch, log_prob: Tensor, ratio: _Ratio) -> _KLPart | None:
    """Return the part of the KL to the sampler, 0 where its log-prob is NaN; None without that term."""
    inputs, weight = batch.inputs, batch.inputs.rollout_kl_weight
    if weight is None:
        return None
    sampler = ratio.old if inputs.rollout is None else inputs.rollout
    form = config.rollout_kl, config.rollout_kl_pooling
    part = _sampled_kl_part(*form, weight, log_prob, sampler, ratio.of_rollout_kl, ratio.impossible)
    unknown = sampler.isnan()
    return _KLPart(*(None if values is None else values.masked_fill(unknown, 0.0) for values in part))  # type: ignore[arg-type]


def _sampled_kl_part(
    form: KL, level: Level, weight: Tensor, log_prob: Tensor, other: Tensor, pooled: _Pooled, impossible: Tensor
) -> _KLPart:
    kl = kl_terms(form, log_ratio_of(log_prob, other), pooled.ratio)
    kl = kl._replace(slope=kl.slope.masked_fill(impossible, 0.0))
    if not form.ratio_weighted:
        return _KLPart(kl.value, weighed(weight, kl.slope), None)
    value = times(pooled.ratio, kl.value)
    if not level.spreads:
        slope = torch.where(pooled.outside | impossible, kl.slope, kl.slope_with_ratio)
        return _KLPart(value, weighed(weight, times(pooled.ratio, slope)), None)
    through_ratio = weighed(weight, value).masked_fill_(pooled.outside, 0.0)
    return _KLPart(value, weighed(weight, times(pooled.ratio, kl.slope)), through_ratio)


def reduce_records(
    config: LossConfig,
    batch: TokenBatch,
    values: TokenValues,
    records: TokenRecords,
    backend: str,
    ratios: PooledRatios | None = None,
    diverged: Diverged | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the loss (0-d, the records' dtype) and its metrics: the one place where records are summed. Metrics of
    sequences are those of ``ratios``, or made here."""
    applied = batch.rollout_weight
    if applied is not None:
        weight = times(records.rollout_weight, applied) if batch.schemes else applied
        records = records._replace(rollout_weight=weight)
    estimator, sequences = ESTIMATORS.index(config.kl.estimator) + 1, batch.sequences.count
    if not batch.sequences.owner:
        sequences = 0
    loss, vector = ops.token_sums(values, batch.masked_in, batch.inputs, records, estimator, sequences, backend)
    if config.pooling.pools:
        ratios = ratios or _pooled_ratios(config, batch, values.log_prob, records)
        counted = (_count_tokens if config.pooling.running else _count_sequences)(batch, ratios)
        first = FIELDS.index("ratio_sum")
        vector[first : first + len(counted)] = counted
    if diverged is not None:
        sums = _divergence_sums(batch, diverged).to(vector.dtype)
        vector = torch.cat([vector[: -len(sums)], sums])
        loss = (loss + sums[0]).to(loss.dtype)
    return loss, Metrics(vector)


def _divergence_sums(batch: TokenBatch, diverged: Diverged) -> Tensor:
    """Return metrics.DIVERGENCE_SUMS."""
    weight, live = batch.divergence_weight, batch.live
    assert weight is not None
    dtype = accumulate_dtype(live.device)
    divergence, entropy = (torch.where(live, values, 0.0).to(dtype) for values in diverged)
    infinite = divergence == float("inf")
    finite = torch.where(infinite, 0.0, divergence)
    columns = (weighed(weight.to(dtype), divergence), finite, live & ~infinite, infinite, entropy)
    return torch.stack([column.to(dtype).sum() for column in columns])


def _pooled_ratios(config: LossConfig, batch: TokenBatch, log_prob: Tensor, records: TokenRecords) -> PooledRatios:
    old, level = batch.inputs.old, config.pooling
    own = log_ratio_of(log_prob, log_prob if old is None else old).masked_fill_(batch.dead, 0.0)
    at_bounds = _at_bounds(records.flags)
    (running,) = batch.begin_up_to([(own, level.pooled)])
    if running is not None:
        return PooledRatios(running().values, [flag for flag, _ in at_bounds])
    wanted = [*at_bounds, *([] if old is None else [(own, level.pooled)])]
    low, high, dual, *log_ratio = (total for total in batch.totals(wanted) if total is not None)
    return PooledRatios(log_ratio[0] if log_ratio else None, [low, high, dual])


def _count_sequences(batch: TokenBatch, ratios: PooledRatios) -> Tensor:
    """Return metrics.RATIO_SUMS and extremes of the ratio over non-empty sequences. One counts as clipped where one of
    its tokens does."""
    lengths = batch.sequences.lengths(batch.live)
    log_ratio = torch.zeros_like(lengths) if ratios.log_ratio is None else ratios.log_ratio
    counted, clipped = lengths > 0, [total > 0 for total in ratios.clipped]
    if not batch.sequences.owner:
        counted, *clipped = (torch.zeros_like(flag) for flag in (counted, *clipped))
    return reduce_ratios(log_ratio.exp(), counted, clipped)


def _count_tokens(batch: TokenBatch, ratios: PooledRatios) -> Tensor:
    """Return metrics.RATIO_SUMS and extremes of the ratio over tokens."""
    assert ratios.log_ratio is not None
    clipped = [flag.flatten() != 0 for flag in ratios.clipped]
    return reduce_ratios(ratios.log_ratio.exp().flatten(), batch.live.flatten(), clipped)
