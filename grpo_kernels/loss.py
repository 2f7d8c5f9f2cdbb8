"""``grpo_loss``: logits to loss, gradient and metrics while the logits are read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import ops
from .backends.contract import Rows, TokenValues
from .backends.sets import outside
from .backends.spec import NUMBERS, LogitArgs, ObjectiveSpec, numbers_vector
from .calls import autograd
from .calls.arguments import check_inplace, check_logit_args, checked_scale
from .calls.batch import LossArguments, read_batch
from .calls.contents import check_contents, check_ids
from .calls.divergence import (
    Beside,
    DivergedLogProbs,
    Whole,
    check_teacher_rows,
    read_teacher,
    refuse_columns_inplace,
    refuse_shards,
    refuse_shared_memory,
    why_unfused,
)
from .calls.modules import LossModule
from .calls.outputs import LossOutput, Outcome, TokenLogProbs
from .calls.over_ranks import Agreed, over_ranks
from .calls.provenance import Made
from .calls.recorded import Recorded, read_sets, recorded_log_probs
from .calls.reduction import Diverged, Settled, reduce_records, settle
from .calls.routes import Require, choose, choose_backend
from .calls.sharding import (
    ONE_RANK,
    PLAIN,
    facts_of,
    is_whole,
    local_arguments,
    local_tokens,
    outside_a_graph,
    read_shard,
    refuse_inplace,
    vocabulary_agreement,
)
from .calls.support import Support, check_support, how_read, said_of, supported_log_probs
from .calls.teacher import Teacher, check_is_teacher, first_columns
from .calls.temperature import read_temperatures
from .calls.token_batch import TokenBatch
from .calls.token_losses import ON_DEMAND, refuse_what_losses_of_tokens_lack
from .calls.token_losses import token_losses as losses_of_tokens
from .calls.tokens import read_tokens
from .calls.vocabulary import SHARDED
from .objectives.config import LossConfig, resolve_config
from .objectives.maths import weighed
from .objectives.names import NoKeyword, refuse_keywords
from .objectives.normalizer import Normalizer

if TYPE_CHECKING:
    from .objectives.groups import Group
    from .objectives.sequences import Layout


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    old_log_probs: Tensor | TokenLogProbs | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    teacher: Teacher | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig | str = "grpo",
    normalizer: float | Tensor | Normalizer | None = None,
    grad_scale: float | Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    rollout_kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    divergence_coef: float | Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    inplace: bool = False,
    support: Support | None = None,
    skip_zero_advantage: bool = False,
    token_losses: bool = False,
    vocab_group: Group | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sequence_group: Group | None = None,
    sequence_layout: Layout | None = None,
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
    **unknown: NoKeyword,
) -> LossOutput:
    """The GRPO-family loss of ``config``, its gradient in the logits and its metrics.

    loss = Σ_t w_t·( u_t·ρ_t·f(ℓ_t, r_t, A_t) + kl_coef·k(ℓ_t - ref_t) + rollout_kl_coef·k(ℓ_t - rollout_t)
                     + divergence_coef·D_t ) - entropy_coef·Σ_t w'_t·H_t,
    with ℓ_t the log-softmax of softcap(logits·logit_scale)/temperature at the token, r_t = exp(ℓ_t - old_t), f the
    surrogate, w the aggregation, u the ``token_weights``, ρ the rollout correction and D the divergence of the row from
    a teacher's (Shao et al. 2024, arXiv:2402.03300, and the presets' papers).

    Args:
        logits: (B, T, V), or (B, T+1, V) as a causal model returns it (the last row is unused), or packed (N, V) or
            (1, N, V). float32, bfloat16, float16 or float64; any batch and row stride, last stride 1.
        token_ids: integers (B, T), packed (N,) or (1, N): ``token_ids[:, t]`` is the token that row t *predicts*
            (``align`` makes it).
        advantages: (B,), (B, 1) or (B, T); packed (S,) or token-sized ((1, N) where N is S as well). None where the
            config has no surrogate.
        mask: shape of token_ids, bool or numbers >= 0, non-zero where live. A masked row is never read.
        old_log_probs: of the policy that the batch is compared with; None: on-policy, ratio 1, differentiable. In fp32
            where ratios are pooled over sequences: bf16 would move all of them. A whole ``TokenLogProbs`` knows how it
            was made, and the loss warns where it is made otherwise.
        ref_log_probs: of the reference policy; needed by a KL term.
        rollout_log_probs: of the sampler, NaN where unknown; for metrics, the config's rollout correction and the KL to
            the sampler, which is taken to ``old_log_probs`` without them.
        token_weights: u, factors of the policy term (not of the KL).
        teacher: the distribution that the config's ``divergence`` is taken to: ``Teacher(logits=...)``, or top-k ids
            and log-probs of it.
        cu_seqlens: (S+1,) bounds of packed sequences; rows before the first and past the last count as masked.
        config: a LossConfig or a preset's name.
        normalizer: replaces the denominator over the batch: from ``normalizer()``, which knows what it counted, or a
            number or 0-d tensor of what the aggregation divides by.
        grad_scale: the factor (> 0) that the caller will put on the loss before backward: 1/accumulation steps, a
            gradient scaler's scale. The gradient is written already multiplied by it; ``loss`` is not. Announced, it
            costs nothing; unannounced, a read and write of the gradient.
        kl_coef, rollout_kl_coef, entropy_coef, divergence_coef: replace the config's, for annealing; numbers or 0-d
            device tensors.
        entropy_threshold: tokens whose entropy (nats) is lower have no policy term; they stay in the denominators. A
            quantile of ``token_log_probs(...).entropy`` keeps the rest (Wang et al. 2025, arXiv:2506.01939).
        temperature: of the softmax, > 0: a number or a 0-d tensor, or one for every sequence or token, in the shapes of
            advantages; where the mask is 0 it may be anything.
        logit_scale, logit_softcap: how logits become those of the softmax, > 0; numbers or 0-d tensors.
        inplace: the gradient overwrites the logits, which are unusable after the call.
        support: the tokens that the sampler could draw, as for ``token_log_probs``; give old and reference log-probs
            over their own, over recorded sets those over the same. Two passes.
        skip_zero_advantage: rows with A = 0 are not read; their outputs are 0.
        token_losses: return the loss of every token, unweighted by the aggregation, in ``out.token_losses`` (and no
            ``out.loss``): for a reduction of your own, which the gradient follows. The metrics' terms of the loss are
            sums over tokens then. Two passes; ``normalizer``, ``grad_scale`` and ``inplace`` are refused.
        vocab_group: the ranks that hold the columns of one vocabulary in rank order, a process group or a device mesh
            of one dimension: logits are this rank's columns, everything else is equal on all of them, and so is what
            comes back, bit for bit. Two passes, and one collective of four numbers a token, in forward. Logits may be a
            DTensor instead (``Shard(-1)`` on one dimension of its mesh), which says all this by itself.
        vocab_start: this rank's first column; None: ranks hold columns one after the other.
        vocab_size: how many columns count, of a teacher as well: ids are below it, and what a padded vocabulary has
            beyond it has no probability and gradient 0. Where one of the two is not given, ranks tell each other how
            many columns they have, which waits for a device.
        sequence_group: the ranks that hold the other tokens of these sequences, a process group or a mesh of one
            dimension: all have the same sequences in the same order, each any of their tokens (``split_context``), or
            none. ``loss`` is this rank's share; shares, and gradients of what all ranks hold, add up.
        sequence_layout: which of their tokens these ranks hold, in the order of the group: "contiguous" or "zigzag", as
            of ``split_context``, whose ``part.layout`` this is. Levels of prefixes need to be told; None: any.
        check: also check contents on a device, which waits for it, and more of them everywhere (ids in range and not
            shifted, masks without fractions, weights >= 0). None: the environment's GRPO_KERNELS_CHECK.
        backend: "cpu", "cuda", "triton", "torch"; None: the fastest that serves the call ("cuda" only where proven).
            The environment's GRPO_KERNELS_BACKEND wins over both.
        require: "fused": raise where compiled kernels would not compute loss and gradient in one pass.

    Returns:
        LossOutput(loss, metrics, log_probs, entropy, route, token_losses); only ``loss`` (or ``token_losses``) is
        differentiable, in ``logits`` alone.
        ``route`` says which backend computed it, in how many passes over the logits, and why.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, names or numbers that do not fit, each named; a keyword of
            another package's loss, with ours.
        IndexError: a token id outside the vocabulary at a live position (CPU; on a GPU that row becomes NaN).
        RuntimeError: a backend that cannot serve the call, or not as required; a torch.func transform; a second
            backward.
    """
    if unknown:
        refuse_keywords(grpo_loss, unknown)
    if vocab_group is not None and torch.compiler.is_compiling():
        return outside_a_graph(grpo_loss, locals())
    if sequence_group is not None and not isinstance(sequence_group, Agreed):
        return over_ranks(grpo_loss, locals())
    if teacher is not None:
        check_is_teacher("grpo_loss", teacher)
        refuse_shards("grpo_loss", vocab_group, vocab_start, (logits, token_ids))
        if vocab_size is not None:
            teacher, (logits,) = first_columns("grpo_loss", vocab_size, teacher, -1, logits)  # type: ignore[assignment]
            inplace = refuse_columns_inplace("grpo_loss", inplace)
            vocab_size = None
    made = None
    if isinstance(old_log_probs, TokenLogProbs):
        made, old_log_probs = old_log_probs.made, old_log_probs.log_probs
    temperatures = temperature if isinstance(temperature, Tensor) and temperature.dim() > 0 else None
    arguments = LossArguments(
        advantages=advantages,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        rollout_log_probs=rollout_log_probs,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        kl_coef=kl_coef,
        rollout_kl_coef=rollout_kl_coef,
        entropy_coef=entropy_coef,
        entropy_threshold=entropy_threshold,
        divergence_coef=divergence_coef,
        teacher=teacher,
        temperature=temperatures,
        skip_zero_advantage=skip_zero_advantage,
        token_losses=token_losses,
        sequence_group=sequence_group,
        sequence_layout=sequence_layout,
    )
    shard = None
    plain = type(logits) in PLAIN and type(token_ids) in PLAIN
    if not (plain and is_whole(vocab_group, vocab_start, vocab_size)):
        refuse_inplace("grpo_loss", logits, inplace)
        logits, shard = read_shard("grpo_loss", logits, -1, vocab_group, vocab_start, vocab_size, check)
        token_ids, mask = local_tokens("grpo_loss", token_ids, mask)
        arguments = local_arguments("grpo_loss", arguments)
    with ONE_RANK if shard is None else vocabulary_agreement("grpo_loss", shard, check) as facts:
        config = resolve_config(config)
        logit_args = LogitArgs(temperature if temperatures is None else 1.0, logit_scale, logit_softcap)
        check_logit_args("grpo_loss", logit_args, check)
        tokens = read_tokens("grpo_loss", logits, token_ids, mask, arguments.tensors, check, shard)
        wants_gradient = torch.is_grad_enabled() and logits.requires_grad
        if token_losses:
            refuse_what_losses_of_tokens_lack(tokens, grad_scale, inplace)
        if inplace and wants_gradient:
            check_inplace("grpo_loss", inplace, logits, tokens.tensors)
        unannounced = UNSCALED if grad_scale is None and logits.dtype == torch.float16 else None
        unannounced = ON_DEMAND if token_losses else unannounced if shard is None else SHARDED
        if unannounced is None and teacher is not None:
            unannounced = why_unfused(teacher)
        of_teacher = None if teacher is None else teacher.dtype
        choice = choose_backend(tokens, backend, logit_softcap is not None, wants_gradient, of_teacher)
        tokens, batch = read_batch(tokens, config, arguments)
        if arguments.temperature is not None:
            tokens = read_temperatures(tokens, arguments.temperature, logit_args, batch.sequences)
        plan = choose(
            tokens,
            config,
            batch,
            arguments,
            choice,
            require=require,
            wants_gradient=wants_gradient,
            reading=None if support is None else how_read(support),
            unknown=unannounced,
        )
        beside = None
        if teacher is not None and config.divergence is not None:
            beside = read_teacher(tokens, teacher, config.divergence, logit_args, support, check)
            if inplace and wants_gradient:
                refuse_shared_memory(tokens, teacher)
        scale = 1.0 if grad_scale is None else checked_scale("grpo_loss", grad_scale, check)
        if support is not None:
            check_support(tokens, support, inplace)
        if shard is not None:
            check_ids(tokens, always=logits.device.type == "cpu")
            kept = said_of(tokens, support, logit_args)
            if facts is not None:
                named = {"config": config, "arguments": arguments.given, "support": kept}
                facts |= facts_of(tokens, logit_args, arguments.tensors, **named) | arguments.numbers(grad_scale)
    backend = plan.route.backend
    if made is not None:
        made.warn_of("grpo_loss", Made.of(tokens, backend, logit_args, support))
    if tokens.checks:
        check_contents(tokens, backend, logit_args)
        if beside is not None:
            check_teacher_rows(tokens, beside, backend, logit_args)
    numbers = numbers_vector(logit_args, scale, config, tokens.real, logits.device, entropy_threshold)
    rows = Rows(logits, tokens.token_ids, tokens.live, numbers, logit_softcap is not None, tokens.temperature)
    call = _Call(config, rows, batch, backend, inplace, beside)

    if isinstance(support, Recorded):
        sets = read_sets(tokens, support)
        outputs = recorded_log_probs(rows, sets, backend)
        outcome = call.tokens_of(*outputs) if token_losses else call.of_log_probs(*outputs)
        missing = outside(tokens.token_ids, tokens.live, sets).sum()
        outcome = outcome._replace(metrics=outcome.metrics.with_sum("outside_support", missing))
    elif support is not None:
        outputs = supported_log_probs(logits, tokens, support, logit_args, backend)
        outcome = call.tokens_of(*outputs) if token_losses else call.of_log_probs(*outputs)
    elif beside is not None and not (plan.fused and plan.spec is not None):
        outputs = DivergedLogProbs.apply(logits, call.rows, beside, backend, inplace)
        outcome = call.tokens_of(*outputs) if token_losses else call.of_log_probs(*outputs)
    elif token_losses or shard is not None:
        outputs = autograd.LogProbs.apply(logits, call.rows, shard, backend, inplace)
        outcome = call.tokens_of(*outputs) if token_losses else call.of_log_probs(*outputs)
    elif not wants_gradient:
        outcome = call.forward_only()
    elif plan.fused and plan.spec is not None:
        outcome = call.one_pass(plan.spec)
    else:
        outcome = call.two_passes()
    if token_losses:
        return outcome.of_tokens(tokens.shape, plan.route)
    return outcome.of_loss(tokens.shape, plan.route)


UNSCALED = "an fp16 gradient is written once its factor is known: announce it, grad_scale="
"""Why fp16 logits take two passes without one."""


@dataclass(frozen=True)
class _Call:
    """The routes of one loss."""

    config: LossConfig
    rows: Rows
    batch: TokenBatch
    backend: str
    inplace: bool
    beside: Beside | None = None
    """The teacher's rows."""

    def forward_only(self) -> Outcome:
        with torch.no_grad():
            stats = ops.log_probs(self.rows, self.backend)
            settled = self._settle(stats.log_prob, stats.entropy)
        return Outcome(settled.loss, settled.metrics, stats.log_prob, stats.entropy)

    def one_pass(self, spec: ObjectiveSpec) -> Outcome:
        rows, batch = self.rows, self.batch
        with torch.no_grad():
            gradient = rows.logits.detach()
            arguments = (Rows(gradient, *rows[1:]), batch.inputs, spec, self.backend)
            diverged = None
            if isinstance(self.beside, Whole):
                log_prob, entropy, diverged, records, gradient = self._one_pass_of_pairs(self.beside, spec)
            elif self.inplace:
                log_prob, entropy, records = ops.fused_loss_(*arguments)
            else:
                log_prob, entropy, records, gradient = ops.fused_loss(*arguments)
            values = TokenValues(log_prob, entropy, batch.live)
            value, metrics = reduce_records(self.config, batch, values, records, self.backend, diverged=diverged)
        announced = rows.numbers[NUMBERS.index("grad_scale")]
        loss, _ = autograd.KnownGradients.apply(
            (value,), announced, rows.token_ids, self.backend, "grpo_loss", rows.logits, gradient
        )
        return Outcome(loss, metrics, log_prob, entropy)

    def two_passes(self) -> Outcome:
        rows = self.rows
        with torch.no_grad():
            stats = ops.log_probs(rows._replace(logits=rows.logits.detach()), self.backend)
            settled = self._settle(stats.log_prob, stats.entropy)
        loss = autograd.LossGradient.apply(
            rows.logits, (settled.loss,), rows, stats, settled.gradients, self.backend, self.inplace
        )
        return Outcome(loss, settled.metrics, stats.log_prob, stats.entropy)

    def of_log_probs(self, log_prob: Tensor, entropy: Tensor, *diverged: Tensor) -> Outcome:
        """Return the loss of log-probs and entropies that make their own gradient, and what is ``Diverged``."""
        with torch.no_grad():
            settled = self._settle(log_prob.detach(), entropy.detach(), *(value.detach() for value in diverged))
        divergence = diverged[0] if diverged else None
        loss, _ = autograd.LossOfLogProbs.apply(
            log_prob, entropy, divergence, (settled.loss,), *settled.gradients, settled.grad_divergence
        )
        return Outcome(loss, settled.metrics, log_prob.detach(), entropy.detach())

    def tokens_of(self, log_prob: Tensor, entropy: Tensor, *diverged: Tensor) -> Outcome:
        """Return losses of tokens, from such log-probs and entropies."""
        with torch.no_grad():
            metrics = self._settle(log_prob.detach(), entropy.detach(), *(value.detach() for value in diverged)).metrics
        losses = losses_of_tokens(self.config, self.batch, log_prob, entropy)
        if diverged:
            assert self.batch.divergence_weight is not None
            losses = losses + weighed(self.batch.divergence_weight, diverged[0])
        return Outcome(losses, metrics, log_prob.detach(), entropy.detach())

    def _one_pass_of_pairs(self, beside: Whole, spec: ObjectiveSpec) -> tuple[Any, ...]:
        """Return log-probs, entropies, what diverged, records and the logits' gradient."""
        rows, weight = self.rows._replace(logits=self.rows.logits.detach()), self.batch.divergence_weight
        assert weight is not None
        arguments = (rows, beside.teacher, beside.kind, self.batch.inputs, weight, spec, self.backend)
        if self.inplace:
            stats, teacher, divergences, records = ops.fused_divergence_(*arguments)
            gradient = rows.logits
        else:
            stats, teacher, divergences, records, gradient = ops.fused_divergence(*arguments)
        diverged = Diverged(divergences.divergence, teacher.entropy)
        return stats.log_prob, stats.entropy, diverged, records, gradient

    def _settle(self, log_prob: Tensor, entropy: Tensor, *diverged: Tensor) -> Settled:
        values = TokenValues(log_prob, entropy, self.batch.live)
        known = Diverged(*diverged) if diverged else None
        return settle(self.config, self.batch, values, self.rows.numbers, self.backend, known)


class GRPOLoss(LossModule):
    """``grpo_loss`` as a module: ``GRPOLoss("dapo", temperature=0.7)(logits, token_ids, advantages, mask, ...)``.

    Args:
        config: a LossConfig or a preset's name.
        **options: keywords of ``grpo_loss`` to fix.
    """

    function = staticmethod(grpo_loss)

    def forward(
        self,
        logits: Tensor,
        token_ids: Tensor,
        advantages: Tensor | None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> LossOutput:
        """See ``grpo_loss``."""
        return grpo_loss(logits, token_ids, advantages, mask, **self.keywords(options))
