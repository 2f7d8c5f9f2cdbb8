"""``linear_grpo_loss`` and ``linear_token_log_probs``: from hidden states; the logits never exist in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends.contract import TokenValues
from .backends.spec import LogitArgs, numbers_vector
from .calls import autograd
from .calls.arguments import check_logit_args, checked_scale, read_head
from .calls.batch import LossArguments, read_batch
from .calls.chunks import CHUNK_BYTES, chunk_rows
from .calls.contents import check_ids, check_shift
from .calls.divergence import refuse_support, why_unfused
from .calls.head import HeadTensors, Wants, operand_dtype
from .calls.modules import LossModule
from .calls.outputs import LossOutput, Outcome, TokenLogProbs
from .calls.over_ranks import Agreed, over_ranks
from .calls.provenance import Made
from .calls.reduction import Diverged, settle
from .calls.routes import Require, choose, choose_backend, choose_log_probs
from .calls.sharding import (
    ONE_RANK,
    HiddenGrad,
    facts_of,
    local,
    local_arguments,
    local_head,
    local_tokens,
    read_hidden_grad,
    read_shard,
    vocabulary_agreement,
)
from .calls.support import Support, check_support, said_of
from .calls.support_sweep import how_swept, supported_sweep
from .calls.sweep import LinearLogProbs, LinearLoss, check_swept_teacher, sweep_of
from .calls.teacher import Teacher
from .calls.teacher_rows import beside_teacher, dtype_beside, read_teacher_states
from .calls.temperature import read_temperatures
from .calls.token_batch import TokenBatch, pools
from .calls.token_losses import ON_DEMAND, refuse_what_losses_of_tokens_lack
from .calls.token_losses import token_losses as losses_of_tokens
from .calls.tokens import RowTokens, read_linear_tokens
from .calls.vocabulary import SHARDED
from .objectives.compiler import outside_graphs
from .objectives.config import LossConfig, resolve_config
from .objectives.maths import weighed
from .objectives.metrics import Metrics
from .objectives.names import NoKeyword, refuse_keywords
from .objectives.normalizer import Normalizer
from .objectives.sequences import Joined, Layout

if TYPE_CHECKING:
    from .objectives.groups import Group


@outside_graphs
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
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
    support: Support | None = None,
    skip_zero_advantage: bool = False,
    token_losses: bool = False,
    sequence_group: Group | None = None,
    sequence_layout: Layout | None = None,
    live_tokens: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    logits_dtype: torch.dtype | None = None,
    vocab_group: Group | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    hidden_grad: HiddenGrad = "all_reduce",
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
    **unknown: NoKeyword,
) -> LossOutput:
    """``grpo_loss(hidden @ weight.T + bias, ...)`` without its logits: only live rows are computed, a chunk at a time.

    Args:
        hidden: (B, T, H), or (B, T+1, H) as a causal model returns it (the last row is unused), or packed (N, H) or
            (1, N, H). The weight's dtype; under autocast both are cast, as a linear layer would.
        weight: the LM head (V, H). Frozen, it costs neither GEMM nor memory; so do frozen hidden states.
        token_ids, advantages, mask: as for ``grpo_loss``.
        bias: (V,).
        adapter: (states, weight), whose product states @ weight.T is added to the logits, in one small GEMM a chunk:
            LoRA on the head is ``(scaling * dropout(hidden) @ A.T, B)``. States of hidden's leading shape with r
            columns, weight (V, r), each of any floating dtype: cast to hidden's (under autocast to its) for GEMMs.
        teacher: as for ``grpo_loss``, and ``Teacher(hidden=..., weight=...)``, whose logits exist a chunk at a time as
            well: 2·N·H'·V FLOPs more. The head may be the policy's own, as beside an adapter.
        support: as for ``grpo_loss``. Filters, masks and large recorded sets are applied to a chunk's logits, which
            backward computes a second time (8·N·H·V FLOPs). Where recorded sets have few ids, rows of the head are
            gathered in their place (6·n·H for n ids, and 2·n·H again); the device is asked, once more and whatever
            ``live_tokens`` says, how many tokens have no set and need whole rows.
        token_losses: as for ``grpo_loss``, from log-probs whose backward computes the logits a second time (8·N·H·V
            FLOPs in place of 6).
        live_tokens: how many tokens the mask leaves (with ``skip_zero_advantage``, of A != 0), or a bound of it: then
            nothing waits for the device, which otherwise is asked once, before any GEMM. Where there are more, loss
            and outputs are NaN (on a CPU an error). On a GPU, pooled ratios of more than one chunk then compute the
            logits twice.
        chunk_bytes: memory for a chunk's logits, a teacher's too, hidden states, adapter states and their gradients.
            Results do not depend on it beyond rounding, and on nothing but shapes and dtypes otherwise.
        logits_dtype: torch.float32 keeps the logits of a bf16 or fp16 head unrounded, as its GEMM accumulates them, at
            twice the memory a row; None: the head's dtype, as a materialised head rounds them.
        vocab_group: the ranks that hold the rows of one head in rank order, a process group or a device mesh of one
            dimension: weight, bias and the adapter's weight are this rank's rows, everything else is equal on all of
            them. What comes back is as well, bit for bit, but for the gradients of these rows. One collective of four
            numbers a token. They may be DTensors instead (``Shard(0)`` on one dimension of their mesh).
        vocab_start, vocab_size: as for ``grpo_loss``.
        hidden_grad: "all_reduce": the gradient of hidden (and adapter) states is summed over the ranks, in fp32 and in
            rank order, a chunk at a time; "overlapped": the same while the weight's gradient is computed (not yet
            measured on a GPU); "partial": it is this rank's part, for a caller that sums it (Megatron's sequence
            parallelism, whose gather of the states does in its backward; states that are DTensors do).
        **the rest**: as for ``grpo_loss``.

    Returns:
        LossOutput; ``loss`` is differentiable in hidden, weight, bias and adapter.

    Raises:
        ValueError, TypeError: as ``grpo_loss``; hidden states, a weight and an adapter that do not fit, a sharded
            weight, a budget too small for one row.
    """
    if unknown:
        refuse_keywords(linear_grpo_loss, unknown)
    if sequence_group is not None and not isinstance(sequence_group, Agreed):
        return over_ranks(linear_grpo_loss, locals())
    if teacher is not None:
        teacher, (weight, bias, adapter) = beside_teacher(
            "linear_grpo_loss", teacher, (weight, bias, adapter), hidden, vocab_group, vocab_start, vocab_size
        )
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
    over = (vocab_group, vocab_start, vocab_size)
    own, shard = read_shard("linear_grpo_loss", weight, 0, *over, check, hidden)
    with ONE_RANK if shard is None else vocabulary_agreement("linear_grpo_loss", shard, check) as facts:
        config = resolve_config(config)
        logit_args = LogitArgs(temperature if temperatures is None else 1.0, logit_scale, logit_softcap)
        check_logit_args("linear_grpo_loss", logit_args, check)
        head = read_head("linear_grpo_loss", hidden, weight, bias, adapter)
        states_sum = read_hidden_grad("linear_grpo_loss", shard, hidden_grad)
        head = local_head("linear_grpo_loss", head, own, shard, hidden_grad)
        token_ids, mask = local_tokens("linear_grpo_loss", token_ids, mask)
        arguments = local_arguments("linear_grpo_loss", arguments)
        tokens = read_linear_tokens(
            "linear_grpo_loss", head, token_ids, mask, logits_dtype, arguments.tensors, check, shard
        )
        wants = Wants.of(head)
        if token_losses:
            refuse_what_losses_of_tokens_lack(tokens, grad_scale)
        of_teacher = None if teacher is None else dtype_beside(teacher, logits_dtype)
        choice = choose_backend(tokens, backend, logit_softcap is not None, any(wants), of_teacher)
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
            wants_gradient=any(wants),
            reading=None if support is None else how_swept(tokens, support),
            unknown=ON_DEMAND if token_losses else why_unfused(teacher) if shard is None else SHARDED,
        )
        if grad_scale is not None:
            checked_scale("linear_grpo_loss", grad_scale, check)
        check_ids(tokens, always=head.hidden.device.type == "cpu")
        if support is not None:
            check_support(tokens, support)
            if teacher is not None:
                refuse_support(tokens, support)
        beside = None
        if teacher is not None and config.divergence is not None:
            beside = read_teacher_states(tokens, teacher, config.divergence, logit_args, logits_dtype, check)
        rows = chunk_rows(tokens, head, chunk_bytes, 0 if beside is None else beside.row_bytes)
        if facts is not None:
            named = {"config": config, "arguments": arguments.given, "gradients of states": wants.states}
            how = {"rows of a chunk": rows, "hidden_grad": hidden_grad, "support": said_of(tokens, support, logit_args)}
            facts |= facts_of(tokens, logit_args, arguments.tensors, **named, **how) | arguments.numbers(grad_scale)
    if made is not None:
        made.warn_of("linear_grpo_loss", Made.of(tokens, plan.route.backend, logit_args, support))
    _check_shift(tokens, head, logit_args)
    if beside is not None:
        check_swept_teacher(tokens, head, logit_args, plan.route, rows, beside)
    attached = token_losses or support is not None  # to log-probs with a gradient of their own
    outside = None
    wide = grad_scale is None and not attached and operand_dtype(hidden) == torch.float16
    scale = _fp16_scale(batch, config, logit_args, tokens.temperature) if wide else grad_scale
    scale = 1.0 if scale is None else scale
    numbers = numbers_vector(logit_args, scale, config, tokens.real, hidden.device, entropy_threshold)
    together = plan.spec is None and pools(config, batch) and any(wants) and not attached
    sequences = batch.sequences if together and not isinstance(batch.sequences, Joined) else None
    chunks = (live_tokens, rows, states_sum, sequences, wide)
    sweep = sweep_of(tokens, numbers, logit_args, plan.route, head, *chunks, teacher=beside)
    if support is not None:
        sweep, outside = supported_sweep(sweep, tokens, support, head, logit_args, chunk_bytes, rows)
    if attached:
        log_prob, entropy, *diverged = LinearLogProbs.apply(sweep, *head)
        with torch.no_grad():
            values = TokenValues(log_prob.detach(), entropy.detach(), batch.live)
            known = Diverged(*(value.detach() for value in diverged)) if diverged else None
            settled = settle(config, batch, values, numbers, sweep.backend, known)
        metrics = settled.metrics
        if not token_losses:
            loss, _ = autograd.LossOfLogProbs.apply(log_prob, entropy, None, (settled.loss,), *settled.gradients, None)
        else:
            loss = losses_of_tokens(config, batch, log_prob, entropy)
            if batch.divergence_weight is not None:
                loss = loss + weighed(batch.divergence_weight, diverged[0])
    else:
        with torch.no_grad():
            loss, metrics, values, gradients = LinearLoss(config, batch, sweep, plan).compute(wants, head)
        if any(wants):
            announced, ids = sweep.valid(sweep.announced), tokens.token_ids
            loss, _ = autograd.KnownGradients.apply(
                (loss,), announced, ids, sweep.backend, "linear_grpo_loss", *head, *gradients
            )
    loss, metrics = sweep.valid(loss), Metrics(sweep.valid(metrics.vector))
    if outside is not None:
        metrics = metrics.with_sum("outside_support", outside)
    log_prob, entropy = sweep.valid(values.log_prob), sweep.valid(values.entropy)
    outcome = Outcome(loss, metrics, log_prob, entropy)
    return outcome.of_tokens(tokens.shape, plan.route) if token_losses else outcome.of_loss(tokens.shape, plan.route)


@outside_graphs
def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    support: Support | None = None,
    live_tokens: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    logits_dtype: torch.dtype | None = None,
    vocab_group: Group | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    hidden_grad: HiddenGrad = "all_reduce",
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
    **unknown: NoKeyword,
) -> TokenLogProbs:
    """``token_log_probs(hidden @ weight.T + bias, ...)`` without its logits: for the old and reference pass, and for
    objectives of your own. Backward computes the logits a second time (8·N·H·V FLOPs in all).

    Args: as for ``linear_grpo_loss`` and ``token_log_probs``.

    Returns:
        TokenLogProbs(log_probs, entropy), both differentiable in hidden, weight, bias and adapter.
    """
    if unknown:
        refuse_keywords(linear_token_log_probs, unknown)
    temperatures = temperature if isinstance(temperature, Tensor) and temperature.dim() > 0 else None
    over = (vocab_group, vocab_start, vocab_size)
    own, shard = read_shard("linear_token_log_probs", weight, 0, *over, check, hidden)
    with ONE_RANK if shard is None else vocabulary_agreement("linear_token_log_probs", shard, check) as facts:
        logit_args = LogitArgs(temperature if temperatures is None else 1.0, logit_scale, logit_softcap)
        check_logit_args("linear_token_log_probs", logit_args, check)
        head = read_head("linear_token_log_probs", hidden, weight, bias, adapter)
        states_sum = read_hidden_grad("linear_token_log_probs", shard, hidden_grad)
        head = local_head("linear_token_log_probs", head, own, shard, hidden_grad)
        token_ids, mask = local_tokens("linear_token_log_probs", token_ids, mask)
        temperatures = local("linear_token_log_probs", "temperature", temperatures)
        named = {"temperature": temperatures}
        tokens = read_linear_tokens("linear_token_log_probs", head, token_ids, mask, logits_dtype, named, check, shard)
        if temperatures is not None:
            tokens = read_temperatures(tokens, temperatures, logit_args)
        softcap, reading = logit_softcap is not None, None if support is None else how_swept(tokens, support)
        route = choose_log_probs(tokens, backend=backend, softcap=softcap, require=require, reading=reading)
        check_ids(tokens, always=head.hidden.device.type == "cpu")
        if support is not None:
            check_support(tokens, support)
        rows = chunk_rows(tokens, head, chunk_bytes)
        if facts is not None:
            how = {"rows of a chunk": rows, "hidden_grad": hidden_grad, "gradients of states": Wants.of(head).states}
            facts |= facts_of(tokens, logit_args, {}, **how, support=said_of(tokens, support, logit_args))
    _check_shift(tokens, head, logit_args)
    numbers = numbers_vector(logit_args, 1.0, None, tokens.real, hidden.device)
    sweep = sweep_of(tokens, numbers, logit_args, route, head, live_tokens, rows, states_sum)
    if support is not None:
        sweep, _ = supported_sweep(sweep, tokens, support, head, logit_args, chunk_bytes, rows)
    log_prob, entropy = LinearLogProbs.apply(sweep, *head)
    log_prob, entropy = sweep.valid(log_prob), sweep.valid(entropy)
    made = Made.of(tokens, route.backend, logit_args, support)
    return TokenLogProbs.by(log_prob.view(tokens.shape), entropy.view(tokens.shape), made)


def _check_shift(tokens: RowTokens, head: HeadTensors, logit_args: LogitArgs) -> None:
    """With checks on, raise where ids look shifted."""
    if not (tokens.checks and tokens.looks):
        return
    adapter = None if head.adapter_states is None else (head.adapter_states, head.adapter_weight)
    options = {"bias": head.bias, "adapter": adapter, **logit_args._asdict(), "check": False}
    if tokens.temperature is not None:
        options["temperature"] = tokens.temperature.view(tokens.shape)
    if (shard := tokens.shard) is not None:
        options |= {"vocab_group": shard.group, "vocab_start": shard.start, "vocab_size": shard.vocab}

    def log_probs(ids: Tensor, live: Tensor) -> Tensor:
        shaped = (values.view(tokens.shape) for values in (ids, live))
        with torch.no_grad():
            return linear_token_log_probs(head.hidden, head.weight, *shaped, **options).log_probs

    check_shift(tokens, log_probs)


def _fp16_scale(batch: TokenBatch, config: LossConfig, logit_args: LogitArgs, temperature: Tensor | None) -> Tensor:
    """Return a power of two that brings the largest slope of a logit near 2⁻⁶: 2²² below what fp16 overflows at, for
    ratios, and 2¹⁸ above its smallest number, for probabilities. Tokens that weigh nothing have no part in it."""
    inputs = batch.inputs
    if inputs.policy_weight.numel() == 0:
        return torch.ones((), device=inputs.policy_weight.device)
    sizes = inputs.advantage.abs()
    if not config.policy_term.flat_at_zero_advantage:
        sizes = sizes.clamp(min=64)  # a slope of its own: DRO's spring at 20 nats
    of_kl = inputs.kl_weight, inputs.rollout_kl_weight
    factors = (weighed(inputs.policy_weight, sizes), *of_kl, inputs.entropy_weight, batch.divergence_weight)
    slopes = [values.abs() for values in factors if values is not None]
    if temperature is not None:
        slopes = [values / temperature for values in slopes]
    largest = torch.stack([values.amax() for values in slopes]).amax()
    largest = largest * logit_args.logit_scale / logit_args.temperature
    return torch.exp2(-largest.clamp(min=2**-24, max=2.0**100).nan_to_num(nan=1.0).log2().floor() - 6)


class LinearGRPOLoss(LossModule):
    """``linear_grpo_loss`` as a module: ``LinearGRPOLoss("dapo")(hidden, weight, token_ids, advantages, mask, ...)``.

    Args:
        config: a LossConfig or a preset's name.
        **options: keywords of ``linear_grpo_loss`` to fix.
    """

    function = staticmethod(linear_grpo_loss)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        advantages: Tensor | None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> LossOutput:
        """See ``linear_grpo_loss``."""
        return linear_grpo_loss(hidden, weight, token_ids, advantages, mask, **self.keywords(options))
