"""What every token's log-prob comes to: records for the sums, and ∂loss/∂ℓ.

``token_terms`` is the twin of the function of that name in csrc/common/surrogates.h:

    log-ratio → ratio, pooled and saturated → weight, rollout factors in it → policy part + KL part

What is pooled over sequences is asked for together, once before the surrogate and once behind it: over a group of ranks
each is one collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..backends.contract import TokenRecords, TokenValues
from ..backends.spec import objective_spec
from ..objectives.config import LossConfig
from ..objectives.kl import KL, kl_terms
from ..objectives.levels import Level, Share
from ..objectives.maths import beyond, clamp, log_ratio_of, times, weighed
from ..objectives.rollout import FOLDED, rollout_log_ratios, rollout_weights
from ..objectives.running import Origin, Running, begin_back_from
from ..objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, Point
from .token_batch import TokenBatch, pools


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
    at_bounds = sums_at_bounds(flags) if report else []
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


def sums_at_bounds(flags: Tensor) -> list[tuple[Tensor, Share]]:
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
        return _KLPart(value, weighed(weight, times(pooled.ratio, slope)).masked_fill_(impossible, 0.0), None)
    through_ratio = weighed(weight, value).masked_fill_(pooled.outside, 0.0)
    slope = weighed(weight, times(pooled.ratio, kl.slope)).masked_fill_(impossible, 0.0)
    return _KLPart(value, slope, through_ratio)
