"""The ULP rule: how far a result may lie from the float64 truth.

An honest fp32 computation of one gradient element errs by rounding its result once (``u_out``), and by a few units
of 2^-24 for each quantity of size 1, |z - R|, |G|, |ℓ|, |old|, |ref| that it subtracts and exponentiates, R the row's
largest z and G = lse - R: an offset that all logits share costs nothing, since it is subtracted first. A softcap rounds
z itself, so |z| counts as well there. The rule allows ``C`` = 4 such units; honest kernels need up to 1.4, a gradient
off by 1 % needs thousands. It is free of scale: small probabilities are checked as strictly as large ones.

Of a divergence from a teacher it allows as many units for what log p_j - log q_j is made of, the difference of two
logits, of two anchors and of two log-sums: a divergence of 1e-6 is judged by its own size, not by a probability's.
Honest rows need 1.02 of the 4 (all kinds, logits 1e-3 to 3 nats apart, seven forms; up to 5.8 were seen of logits with
a standard deviation of 60, which no model has); the loss, whose terms err in all directions, 0.28 of its bound.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calls.batch import LossArguments, read_batch
from ..calls.teacher import Teacher
from ..calls.terms import token_terms
from ..calls.token_batch import TokenBatch
from ..calls.tokens import read_tokens
from ..objectives.config import LossConfig
from ..objectives.maths import log_ratio_of, times
from ..objectives.rollout import rollout_log_ratios
from .reference import allowed
from .reference import grpo_loss as reference_loss

C = 4.0
UNIT = 2.0**-24

OUTPUT_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative rounding error of a gradient's dtype."""


def smallest(dtype: torch.dtype) -> float:
    """Below this nothing is promised: the smallest normal number; of fp16 the smallest subnormal."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


@dataclass(frozen=True)
class Truth:
    """A loss in float64, and the sizes that errors are measured against; row tensors are (B, T)."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    gradient: Tensor
    """(B, T, V): the rows that predict a token, without the unused last one."""
    metrics: dict[str, Tensor]
    scale: Tensor
    """(B, T): 1 + |z - R| + |G| + |ℓ| + |old| + |ref|, what a row's errors grow with; see above."""
    element: Tensor
    """(B, T, V): size of the terms that are added up in each gradient element."""
    apart: Tensor
    """(B, T, V): what one unit in the differences of the policy's and a teacher's rows comes to in each element."""
    own: Tensor
    """(B, T, V): size of the probabilities that cancel in a divergence's elements; the float64 truth rounds them."""
    coefficient: Tensor
    """(B, T): what a row's probabilities are multiplied by; those below the smallest normal number may count as 0."""
    term: Tensor
    """0-d: sum of the sizes of the loss's terms, each times its row's scale."""
    edge: Tensor
    """(B, T): too close to a bound of the clip (or of a limit) for fp32 to tell the side."""

    def gradient_bound(self, dtype: torch.dtype, grad_scale: float = 1.0) -> Tensor:
        """(B, T, V): how far a gradient element may be off that was stored in this dtype, times ``grad_scale``."""
        fp64 = dtype == torch.float64
        unit = 2.0**-53 * 64 if fp64 else UNIT
        floor = smallest(dtype) * (1 + self.coefficient[..., None])
        size = self.scale[..., None] * self.element + self.apart
        size = size + self.scale[..., None] * self.own / 64 if fp64 else size
        return OUTPUT_UNIT[dtype] * self.gradient.abs() + C * unit * size + floor

    def log_prob_bound(self, real: torch.dtype) -> Tensor:
        """(B, T), for log-probs and entropy: rounding of the output, and of the logits' scaling."""
        unit = 2.0**-53 * 64 if real == torch.float64 else UNIT
        return C * unit * self.scale

    def loss_bound(self, real: torch.dtype) -> Tensor:
        fp64 = real == torch.float64
        size = self.term + (self.scale[..., None] * self.own).sum() / 64 if fp64 else self.term
        return C * (2.0**-53 * 64 if fp64 else UNIT) * size + smallest(real)


def truth_of(
    logits: Tensor, token_ids: Tensor, advantages: Tensor | None, mask: Tensor | None, **options: Any
) -> Truth:
    """The reference in float64 on the values of ``logits``, with the options of a ``grpo_loss`` call."""
    leaf = logits.detach().double().requires_grad_()
    doubled: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    if (teacher := doubled.get("teacher")) is not None:
        doubled["teacher"] = _of_logits(teacher)
    advantages = None if advantages is None else advantages.double()
    out = reference_loss(leaf, token_ids, advantages, mask, **doubled)
    if out.loss.requires_grad:
        out.loss.backward()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    config = doubled.get("config", "grpo")
    config = LossConfig.preset(config) if isinstance(config, str) else config
    batch = _batch(leaf.detach(), token_ids, advantages, mask, config, doubled)
    return _sizes(leaf.detach(), gradient, out, token_ids, config, batch, doubled)


def _of_logits(teacher: Teacher) -> Teacher:
    """Return a teacher of logits or of hidden states as one of logits, float64."""
    if teacher.logits is not None:
        return dataclasses.replace(teacher, logits=teacher.logits.double())
    assert teacher.hidden is not None
    assert teacher.weight is not None
    bias = None if teacher.bias is None else teacher.bias.double()
    logits = torch.nn.functional.linear(teacher.hidden.double(), teacher.weight.double(), bias)
    return dataclasses.replace(teacher, logits=logits, hidden=None, weight=None, bias=None)


def _batch(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor | None,
    mask: Tensor | None,
    config: LossConfig,
    o: dict[str, Any],
) -> TokenBatch:
    tokens = read_tokens("truth_of", logits, token_ids, mask, {})
    arguments = LossArguments(advantages, **{name: o[name] for name in o.keys() & set(LossArguments._fields)})
    return read_batch(tokens, config, arguments)[1]


def _sizes(
    logits: Tensor,
    gradient: Tensor,
    out: Any,
    token_ids: Tensor,
    config: LossConfig,
    batch: TokenBatch,
    o: dict[str, Any],
) -> Truth:
    """Return the truth with the sizes of the rule (ARCHITECTURE.md, section 5), which bounds every gradient element by

        |error_j| <= u_out·|gradient_j| + C·u·(scale·element_j + apart_j),
        scale     = 1 + |z - R| + |G| + |ℓ| + |old| + |ref|     (+ |z| under a softcap, + |rollout| with its schemes,
                                                                 + |u - R'| + |G'| of a teacher's row)
        element_j = |dz_j/dx_j|·p_j·(slope + h·(|log p_j| + H + 1)),   j not the sampled token
        element_t = |dz_t/dx_t|·(slope + h·p_t·(1 + |ℓ| + H)),         t the sampled token

    and the loss by C·u·Σ (|policy term| + growth + KL term + h·(1 + H))·scale over live tokens. ``slope`` is the size
    of the slope by ℓ, ``h`` of the entropy's weight, ``x`` the logit that is given, ``z`` as it is used. What a
    divergence adds to ``element``, to the loss and to ``apart`` is said at ``_Diverged``.
    """
    shape = batch.live.shape
    ids = _safe(token_ids.reshape(shape), batch.live)[..., None]
    whole = logits.reshape(shape[0], -1, logits.shape[-1])
    gradient_rows = gradient.reshape(whole.shape)[:, : shape[1]]
    read = torch.where(batch.live[..., None], whole[:, : shape[1]], 0.0)
    z, derivative = _logits_as_used(read, _temperature(batch, o.get("temperature", 1.0)), o)
    log_prob, entropy = out.log_probs.reshape(shape), out.entropy.reshape(shape)
    scale = _scale(z, log_prob, config, batch, o.get("logit_softcap") is not None)
    slope, term = _slope_and_term(config, batch, log_prob, entropy)
    h = _magnitude(batch.inputs.entropy_weight, batch)
    diverged = _diverged(z, config, batch, o)
    scale = scale + diverged.scale
    log_p = torch.log_softmax(z, -1)
    if (support := o.get("support")) is not None:
        live, rows = batch.live.flatten().nonzero().flatten(), z[batch.live]
        left = allowed(rows, ids[batch.live].flatten(), live, support)
        log_p[batch.live] = torch.log_softmax(rows.masked_fill(~left, -math.inf), -1)
    element = _element(log_p, ids, slope, h, log_prob, entropy) + diverged.element
    element, apart, own = (x * derivative.abs() for x in (element, diverged.apart, diverged.own))
    term = ((term + h * (1 + entropy) + diverged.term) * scale + diverged.value_apart)[batch.live].sum()
    metrics = {name: value.double() for name, value in out.metrics.as_dict().items()}
    edge = _edges(config, batch, log_prob, entropy, scale) | diverged.edge
    underflow = -math.log(torch.finfo(torch.float32).tiny)
    coefficient = (slope + h * (underflow + entropy) + diverged.slope) * derivative.abs().amax(-1)
    element, apart, own = (torch.where(batch.live[..., None], x, 0.0) for x in (element, apart, own))
    coefficient = torch.where(batch.live, coefficient, 0.0)
    sizes = (scale, element, apart, own, coefficient, term, edge)
    return Truth(out.loss.detach(), log_prob, entropy, gradient_rows, metrics, *sizes)


def _temperature(batch: TokenBatch, given: float | Tensor) -> float | Tensor:
    """Return the number, or (B, T, 1) of what was given of sequences or tokens, 1 where a token is not live."""
    if not isinstance(given, Tensor) or given.dim() == 0:
        return given
    count, shape = batch.sequences.count, batch.live.shape
    of_sequences = given.shape in ((count,), (count, 1))
    values = batch.sequences.expand(given.reshape(-1)).expand(shape) if of_sequences else given.reshape(shape)
    return torch.where(batch.live, values, 1.0)[..., None]


def _logits_as_used(rows: Tensor, temperature: float | Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return z, the logits after scale, softcap and temperature, and dz/dx."""
    scale, cap = o.get("logit_scale", 1.0), o.get("logit_softcap")
    z, derivative = rows * scale, torch.ones_like(rows) * scale
    if cap is not None:
        derivative = derivative * (1 - torch.tanh(z / cap) ** 2)
        z = cap * torch.tanh(z / cap)
    return z / temperature, derivative / temperature


def _magnitude(values: Tensor | None, batch: TokenBatch) -> Tensor:
    """Return |values|, and 0 where there are none."""
    return torch.zeros_like(batch.live, dtype=torch.float64) if values is None else values.abs()


def _scale(z: Tensor, log_prob: Tensor, config: LossConfig, batch: TokenBatch, capped: bool) -> Tensor:
    """Return the sum of what is subtracted and exponentiated in a row, (B, T)."""
    live, inputs = batch.live, batch.inputs
    largest = z.amax(-1, keepdim=True)
    below = torch.where(z.isinf(), 0.0, largest - z).amax(-1).clamp(max=_UNDERFLOW)
    log_sum = (torch.logsumexp(z, -1) - largest.squeeze(-1)).abs()
    scale = 1 + below + log_sum + torch.where(log_prob.isinf(), 0.0, log_prob).abs()
    if capped:
        scale = scale + torch.where(z.isinf(), 0.0, z).abs().amax(-1)
    scale = scale + torch.where(live, _magnitude(inputs.old, batch) + _magnitude(inputs.ref, batch), 0.0)
    if (config.schemes or inputs.rollout_kl_weight is not None) and inputs.rollout is not None:
        scale = scale + torch.where(live, inputs.rollout.nan_to_num(nan=0.0).abs(), 0.0)
    return scale


def _kl_size(config: LossConfig, batch: TokenBatch, log_prob: Tensor) -> Tensor:
    """Return w_kl·(e^u + |u| + 1), u = ref - ℓ (k2 adds u²/2), times the ratio where that weighs the term; of both KL
    terms together."""
    live, inputs = batch.live, batch.inputs
    sampler = inputs.old if inputs.rollout is None else inputs.rollout.nan_to_num(nan=0.0)
    total = torch.zeros_like(log_prob)
    for kl, weight, other in (
        (config.kl, inputs.kl_weight, inputs.ref),
        (config.rollout_kl, inputs.rollout_kl_weight, sampler),
    ):
        if weight is None or other is None:
            continue
        u = torch.where(live, log_ratio_of(other, log_prob), 0.0).clamp(max=50)
        size = weight.abs() * (u.exp() + u.abs() + (u * u / 2 if kl.estimator == "k2" else 0) + 1)
        if (kl.ratio_weighted or kl.gradient == "weighted_k2") and inputs.old is not None:
            size = size * torch.where(live, log_ratio_of(log_prob, inputs.old), 0.0).clamp(max=20).exp()
        total = total + size
    return total


def _slope_and_term(config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sizes of a token's slope by ℓ and of its policy and KL terms, with what an error of ℓ makes of them.

    What a surrogate makes of an error in its ratio may be larger than its slope: SAPO's gate, DRO's spring.
    """
    inputs, kl_size = batch.inputs, _kl_size(config, batch, log_prob)
    plain = dataclasses.replace(batch, inputs=inputs._replace(kl_weight=None, rollout_kl_weight=None))
    records, policy_slope = token_terms(config, plain, log_prob, entropy)
    ahead, behind = (token_terms(config, plain, log_prob + step, entropy) for step in (_STEP, -_STEP))
    growth = (ahead[1] - behind[1]).abs() / (2 * _STEP)
    value_growth = inputs.policy_weight.abs() * (ahead[0].policy - behind[0].policy).abs() / (2 * _STEP)
    policy_slope = torch.maximum(policy_slope.abs(), growth.nan_to_num(nan=0.0, posinf=0.0))
    value_growth = torch.maximum(policy_slope, value_growth.nan_to_num(nan=0.0, posinf=0.0))
    slope = policy_slope + kl_size
    if config.pooling.pools:  # a pooled slope errs with the whole sequence
        pooled = batch.sequences.sum(kl_size + policy_slope, kl_size.dtype)
        slope = torch.maximum(slope, batch.sequences.expand(pooled).expand(slope.shape) * (kl_size > 0))
    return slope, times(inputs.policy_weight, records.policy).abs() + value_growth + kl_size


def _element(log_p: Tensor, ids: Tensor, slope: Tensor, h: Tensor, log_prob: Tensor, entropy: Tensor) -> Tensor:
    """Return the size of the terms that are added up in each element of the gradient by z, (B, T, V)."""
    p = log_p.exp()
    element = (slope[..., None] + h[..., None] * (log_p.clamp(min=-700).abs() + entropy[..., None] + 1)) * p
    sampled = slope + h * p.gather(-1, ids).squeeze(-1) * (1 + log_prob.abs() + entropy)
    return element.scatter(-1, ids, sampled[..., None])


@dataclass(frozen=True)
class _Diverged:
    """What a divergence of weight w adds to the sizes of the rule; u are the teacher's logits as they are used,

        E_j     = |z_j - u_j| + |R - R'| + |G - G'|     (+ |z_j| + |u_j| where they are scaled or capped unlike,
                                                         + |G| + |G'| of TVD)
        element = w·(|own_j| + p_j·(|a_j - a_c| + |m|)),
        apart   = w·(max(p_j, q_j)·E_j of a KL from the teacher + p_j·(E_j + E_c + Σ_i p_i·(scale·|a_i - a_c| + E_i)))

    with the slope a at every column (a is no steeper than 1 in log p - log q, but for a skewed KL of a small mix), c
    the column of R and m = Σ_i p_i·(a_i - a_c); to the loss w·D·scale + w·Σ_j |p_j - q_j|·E_j: an offset that all d
    share has no part in it, as Σ p = Σ q. TVD alone is of first order in d, and takes the log-sums as they are rounded.
    """

    scale: Tensor
    element: Tensor
    apart: Tensor
    own: Tensor
    """w·max(p_j, q_j)"""
    term: Tensor
    value_apart: Tensor
    slope: Tensor
    """What a probability is multiplied by."""
    edge: Tensor
    """TVD: which of p and q is larger is not told, where they differ by rounding alone."""


def _diverged(z: Tensor, config: LossConfig, batch: TokenBatch, o: dict[str, Any]) -> _Diverged:
    divergence, live = config.divergence, batch.live
    if divergence is None:
        nothing = torch.zeros_like(live, dtype=z.dtype)
        flat = nothing[..., None]
        return _Diverged(nothing, flat, flat, flat, nothing, nothing, nothing, torch.zeros_like(live))
    teacher, tau = o["teacher"], _temperature(batch, o.get("temperature", 1.0))
    own_tau = tau if divergence.teacher_temperature is None else divergence.teacher_temperature
    form = {"logit_scale": teacher.logit_scale, "logit_softcap": teacher.logit_softcap}
    rows = teacher.logits.reshape(live.shape[0], -1, teacher.logits.shape[-1])[:, : live.shape[1]]
    u, _ = _logits_as_used(torch.where(live[..., None], rows, 0.0), own_tau, form)
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(u, -1)
    p, q, d = log_p.exp(), log_q.exp(), log_ratio_of(log_p, log_q)
    columns = divergence.columns(p, q, d)

    largest, other = z.amax(-1, keepdim=True), u.amax(-1, keepdim=True)
    log_sums = torch.logsumexp(z, -1, keepdim=True) - largest, torch.logsumexp(u, -1, keepdim=True) - other
    apart = (z - u).abs() + (largest - other).abs() + (log_sums[0] - log_sums[1]).abs()
    alike = divergence.teacher_temperature is None and teacher.logit_scale == o.get("logit_scale", 1.0)
    if not alike or teacher.logit_softcap is not None or o.get("logit_softcap") is not None:
        apart = apart + z.abs() + u.abs()
    if divergence.kind == "tvd":
        apart = apart + log_sums[0].abs() + log_sums[1].abs()
    apart = torch.where(apart.isfinite(), apart, 0.0)

    centre = z.argmax(-1, keepdim=True)
    slope = columns.slope + torch.zeros_like(p)
    from_centre = torch.where(p == 0, 0.0, slope - slope.gather(-1, centre))
    mean = (p * from_centre).sum(-1, keepdim=True).abs()
    below = torch.where(u.isinf(), 0.0, other - u).amax(-1).clamp(max=_UNDERFLOW)
    scale = below + log_sums[1].squeeze(-1).abs()
    both = 1 + scale + torch.where(z.isinf(), 0.0, largest - z).amax(-1).clamp(max=_UNDERFLOW)
    off_mean = (p * (both[..., None] * from_centre.abs() + apart)).sum(-1, keepdim=True)
    steepest = max(1.0, 1 / (4 * divergence.mix)) if divergence.kind == "skew_forward_kl" else 1.0
    of_slope = steepest * p * (apart + apart.gather(-1, centre) + off_mean)
    of_own = torch.maximum(p, q) * apart if isinstance(columns.own, Tensor) else 0.0
    weight = torch.where(live, _magnitude(batch.divergence_weight, batch), 0.0)
    rows_of = weight[..., None]
    unsure = (d != 0) & (d.abs() < 16 * UNIT * apart) & (divergence.kind == "tvd")
    return _Diverged(
        scale=scale,
        element=rows_of * ((columns.own + torch.zeros_like(p)).abs() + p * (from_centre.abs() + mean)),
        apart=rows_of * (of_own + of_slope),
        own=rows_of * torch.maximum(p, q),
        term=weight * columns.term.sum(-1),
        value_apart=weight * ((p - q).abs() * apart).sum(-1),
        slope=weight * (1 + mean.squeeze(-1) + torch.where(from_centre.isfinite(), from_centre, 0.0).abs().amax(-1)),
        edge=unsure.any(-1) & live,
    )


def _safe(ids: Tensor, live: Tensor) -> Tensor:
    return torch.where(live, ids, 0).long()


_UNDERFLOW = 746.0
"""Nats below the largest at which a probability is 0 in float64: such columns round nothing."""
_STEP = 1e-7
"""Nats, of a derivative in float64: smaller than the width of an edge."""


def _edges(config: LossConfig, batch: TokenBatch, log_prob: Tensor, entropy: Tensor, sizes: Tensor) -> Tensor:
    """Rows at which 16 units decide on which side of a bound a token lies: a clip's, a rollout scheme's, a
    threshold's."""
    inputs, width = batch.inputs, torch.where(batch.live, 16 * UNIT * sizes, 0.0)
    edge = torch.zeros_like(batch.live)
    if inputs.old is not None or batch.schemes:
        below, above = (token_terms(config, batch, log_prob + w, entropy)[0] for w in (-width, width))
        edge |= below.flags != above.flags
        if batch.schemes:
            edge |= (below.rollout_weight == 0) != (above.rollout_weight == 0)
    if inputs.old is not None and inputs.rollout is not None and config.schemes:
        others = (inputs.rollout, batch.live)
        shifted = (rollout_log_ratios(config.schemes, log_prob, inputs.old + w, *others) for w in (-width, width))
        kept_below, kept_above = (batch.factors(config, config.schemes, moved) == 0 for moved in shifted)
        edge |= kept_below != kept_above
    if batch.entropy_threshold is not None:
        edge |= (entropy - batch.entropy_threshold).abs() < width
    if inputs.ref is not None and config.kl.estimator == "abs":
        edge |= log_ratio_of(log_prob, inputs.ref).abs() < width
    sampler = inputs.old if inputs.rollout is None else inputs.rollout
    if sampler is not None and inputs.rollout_kl_weight is not None and config.rollout_kl.estimator == "abs":
        edge |= log_ratio_of(log_prob, sampler).abs() < width
    return edge & batch.live


@dataclass(frozen=True)
class Comparison:
    """Largest errors as shares of what the rule allows (above 1: broken), and where."""

    log_prob: float
    entropy: float
    loss: float
    gradient: float
    gradient_ulps: float
    """Largest gradient error in last places of the terms that an element adds up (of itself, where none cancel)."""
    edges: float
    """Share of live rows left out because fp32 cannot tell the side of the clip."""

    @property
    def holds(self) -> bool:
        return max(self.log_prob, self.entropy, self.loss, self.gradient) <= 1 and self.edges <= 0.01


def compare(
    truth: Truth, loss: Tensor, log_probs: Tensor, entropy: Tensor, gradient: Tensor, grad_scale: float = 1.0
) -> Comparison:
    """A result against the truth; NaN anywhere breaks the rule.

    ``gradient`` is shaped like the logits, in their dtype, and was computed for the loss times ``grad_scale``; what it
    has beyond the rows that predict tokens is 0.
    """
    shape = truth.log_probs.shape
    real = log_probs.dtype
    whole = gradient.detach().reshape(shape[0], -1, gradient.shape[-1]).double() / grad_scale
    rows, unused = whole[:, : shape[1]], whole[:, shape[1] :]
    keep = ~truth.edge
    error = (rows - truth.gradient).abs()
    bound = truth.gradient_bound(gradient.dtype, grad_scale)
    share = torch.where(keep[..., None], error / bound, 0.0)
    broken = (unused != 0).any() | (rows.isfinite() != truth.gradient.isfinite()).any()  # in rows at an edge as well
    size = torch.stack(torch.broadcast_tensors(truth.gradient.abs(), truth.element, truth.own)).amax(0)
    ulp = 2 * OUTPUT_UNIT[gradient.dtype] * size + smallest(gradient.dtype) / grad_scale
    per_row = truth.log_prob_bound(real)
    loss_share = _difference(loss.detach().double(), truth.loss) / truth.loss_bound(real)
    return Comparison(
        log_prob=_worst(_difference(log_probs.double().reshape(shape), truth.log_probs) / per_row),
        entropy=_worst((entropy.double().reshape(shape) - truth.entropy).abs() / per_row),
        loss=_worst(loss_share) if not bool(truth.edge.any()) else 0.0 if bool(loss.isfinite()) else math.inf,
        gradient=math.inf if bool(broken) else _worst(share),
        gradient_ulps=_worst(torch.where(keep[..., None], error / ulp, 0.0)),
        edges=float(truth.edge.sum() / max(1, truth.edge.numel())),
    )


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return log_ratio_of(a, b).abs()


def _worst(shares: Tensor) -> float:
    if shares.numel() == 0:
        return 0.0
    return float("inf") if bool(shares.isnan().any()) else float(shares.max())
