"""``linear_grpo_loss`` and ``linear_token_log_probs``: from hidden states; the logits never exist in full.

Tokens are taken in chunks of a fixed number of rows. Where a row's slope is known from that row alone, a chunk's logits
become their gradient in place and leave as the gradients of hidden states and weight, all in the forward call:
6·N·H·V FLOPs, nothing is computed twice. Pooled ratios need the log-probs of a whole sequence first: chunks of whole
sequences keep their logits meanwhile; only where the longest does not fit one, all are computed again (8·N·H·V).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import ops
from .backends.contract import RowGradients, Rows, RowStats, TokenRecords, TokenValues
from .backends.spec import NUMBERS, LogitArgs, ObjectiveSpec
from .calls import autograd
from .calls.arguments import check_logit_args
from .calls.batch import LossInputs, TokenBatch, read_batch
from .calls.chunks import CHUNK_BYTES, LiveRows, chunk_rows, cut
from .calls.contents import check_ids, check_shift
from .calls.head import Wants, head_kind, operand_dtype
from .calls.modules import LossModule
from .calls.outputs import LossOutput, TokenLogProbs
from .calls.routes import Require, check_require, choose_backend, one_pass_spec, route_of
from .calls.terms import fast_token_terms, pools, reduce_records
from .calls.tokens import Tokens, read_linear_tokens
from .loss import announced_scale
from .objectives.checks import asked_to_look, check_scalar
from .objectives.compiler import outside_graphs
from .objectives.config import LossConfig, resolve_config
from .objectives.maths import weighed
from .objectives.metrics import Metrics
from .objectives.normalizer import Normalizer
from .objectives.sequences import Sequences

Visit = Callable[[Rows, int, int], None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
HeadTensors = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight, bias."""


@outside_graphs
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig | str = "grpo",
    normalizer: float | Tensor | Normalizer | None = None,
    grad_scale: float | Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    skip_zero_advantage: bool = False,
    live_tokens: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    logits_dtype: torch.dtype | None = None,
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
) -> LossOutput:
    """``grpo_loss(hidden @ weight.T + bias, ...)`` without its logits: only live rows are computed, a chunk at a time.

    Args:
        hidden: (B, T, H), or (B, T+1, H) as a causal model returns it (the last row is unused), or packed (N, H) or
            (1, N, H). The weight's dtype; under autocast both are cast, as a linear layer would.
        weight: the LM head (V, H). Frozen, it costs neither GEMM nor memory; so do frozen hidden states.
        token_ids, advantages, mask: as for ``grpo_loss``.
        bias: (V,).
        live_tokens: how many tokens the mask leaves (with ``skip_zero_advantage``, of A != 0), or a bound of it: then
            nothing waits for the device, which otherwise is asked once, before any GEMM. Where there are more, loss
            and outputs are NaN (on a CPU an error). On a GPU, pooled ratios of more than one chunk then compute the
            logits twice.
        chunk_bytes: memory for a chunk's logits, hidden states and their gradients. Results do not depend on it beyond
            rounding, and on nothing but shapes and dtypes otherwise.
        logits_dtype: torch.float32 keeps the logits of a bf16 or fp16 head unrounded, as its GEMM accumulates them, at
            twice the memory a row; None: the head's dtype, as a materialised head rounds them.
        **the rest**: as for ``grpo_loss``.

    Returns:
        LossOutput; ``loss`` is differentiable in hidden, weight and bias.

    Raises:
        ValueError, TypeError: as ``grpo_loss``; hidden states and a weight that do not fit, a sharded weight, a budget
            too small for one row.
    """
    config = resolve_config(config)
    given = LossInputs(
        *(advantages, old_log_probs, ref_log_probs, rollout_log_probs, token_weights, cu_seqlens, normalizer),
        *(kl_coef, entropy_coef, skip_zero_advantage, check, entropy_threshold),
    )
    logit_args = LogitArgs(temperature, logit_scale, logit_softcap)
    check_logit_args("linear_grpo_loss", logit_args, check)
    head = (hidden, weight, bias)
    tokens = read_linear_tokens("linear_grpo_loss", *head, token_ids, mask, logits_dtype, given.tensors, check)
    wants = _wants(hidden, weight, bias)
    choice = choose_backend(tokens, backend, logit_args, fused=any(wants))
    tokens, batch = read_batch(tokens, config, given)
    spec = one_pass_spec(config, batch, given)
    route = route_of(choice, spec if isinstance(spec, str) else None, any(wants))
    check_require(tokens, require, route)
    chosen = choice.backend
    _check_contents(tokens, hidden, weight, bias, logit_args, check)
    wide = grad_scale is None and operand_dtype(hidden) == torch.float16
    if wide:
        grad_scale = _fp16_scale(batch, config, logit_args)
    announced = announced_scale("linear_grpo_loss", grad_scale, check)
    numbers = tokens.numbers(logit_args, announced, config, entropy_threshold)
    pooled = batch.sequences if isinstance(spec, str) and pools(config, batch) and any(wants) else None
    sweep = _sweep(tokens, numbers, logit_args, chosen, hidden, live_tokens, chunk_bytes, check, pooled, wide)
    with torch.no_grad():
        call = _Loss(config, batch, sweep, spec, choice.fuses)
        loss, metrics, values, gradients = call.run(wants, hidden, weight, bias)
    if any(wants):
        known = (sweep.valid(sweep.announced), tokens.token_ids, chosen, "linear_grpo_loss")
        loss = autograd.KnownGradients.apply(loss, *known, hidden, weight, bias, *gradients)
    log_probs, entropy = (sweep.valid(value).view(tokens.shape) for value in (values.log_prob, values.entropy))
    return LossOutput(sweep.valid(loss), Metrics(sweep.valid(metrics.vector)), log_probs, entropy, route)


@outside_graphs
def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    live_tokens: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    logits_dtype: torch.dtype | None = None,
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
) -> TokenLogProbs:
    """``token_log_probs(hidden @ weight.T + bias, ...)`` without its logits: for the old and reference pass, and for
    objectives of your own. Backward computes the logits a second time (8·N·H·V FLOPs in all).

    Args: as for ``linear_grpo_loss`` and ``token_log_probs``.

    Returns:
        TokenLogProbs(log_probs, entropy), both differentiable in hidden, weight and bias.
    """
    logit_args = LogitArgs(temperature, logit_scale, logit_softcap)
    check_logit_args("linear_token_log_probs", logit_args, check)
    head = (hidden, weight, bias)
    tokens = read_linear_tokens("linear_token_log_probs", *head, token_ids, mask, logits_dtype, {}, check)
    choice = choose_backend(tokens, backend, logit_args)
    check_require(tokens, require, route_of(choice, None, wants_gradient=False))
    chosen = choice.backend
    _check_contents(tokens, hidden, weight, bias, logit_args, check)
    numbers = tokens.numbers(logit_args)
    sweep = _sweep(tokens, numbers, logit_args, chosen, hidden, live_tokens, chunk_bytes, check)
    outputs = autograd.LinearLogProbs.apply(sweep, hidden, weight, bias)
    return TokenLogProbs(*(sweep.valid(output).view(tokens.shape) for output in outputs))


def _check_contents(
    tokens: Tokens, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_args: LogitArgs, check: bool | None
) -> None:
    """With checks on: ids in range, and ids that look shifted. On a CPU the range is looked at in any case."""
    check_ids(tokens, True if hidden.device.type == "cpu" else check)
    if not asked_to_look(hidden, check):
        return
    options = {"bias": bias, **logit_args._asdict(), "check": False}

    def log_probs(ids: Tensor, live: Tensor) -> Tensor:
        shaped = (values.view(tokens.shape) for values in (ids, live))
        with torch.no_grad():
            return linear_token_log_probs(hidden, weight, *shaped, **options).log_probs

    check_shift(tokens, log_probs)


def _fp16_scale(batch: TokenBatch, config: LossConfig, logit_args: LogitArgs) -> Tensor:
    """A power of two that brings the largest slope of a logit near 2⁻⁶: 2²² below what fp16 overflows at, for ratios,
    and 2¹⁸ above its smallest number, for probabilities. Tokens that weigh nothing have no part in it."""
    inputs = batch.inputs
    if inputs.policy_weight.numel() == 0:
        return torch.ones((), device=inputs.policy_weight.device)
    sizes = inputs.advantage.abs()
    if not config.surrogate.flat_at_zero_advantage:
        sizes = sizes.clamp(min=64)  # a slope of its own: DRO's spring at 20 nats
    factors = (weighed(inputs.policy_weight, sizes), inputs.kl_weight, inputs.entropy_weight)
    largest = torch.stack([values.abs().amax() for values in factors if values is not None]).amax()
    largest = largest * logit_args.logit_scale / logit_args.temperature
    return torch.exp2(-largest.clamp(min=2**-24, max=2.0**100).nan_to_num(nan=1.0).log2().floor() - 6)


def _wants(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wants:
    enabled = torch.is_grad_enabled()
    return Wants(*(enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)))


def _sweep(
    tokens: Tokens,
    numbers: Tensor,
    logit_args: LogitArgs,
    backend: str,
    hidden: Tensor,
    live_tokens: int | None,
    chunk_bytes: int,
    check: bool | None,
    pooled: Sequences | None = None,
    wide: bool = False,
) -> Sweep:
    check_scalar(tokens.function, "chunk_bytes", chunk_bytes)
    operands = operand_dtype(hidden)
    rows = LiveRows.of(tokens, chunk_rows(tokens, operands, int(chunk_bytes)), live_tokens, check, pooled)
    ids = rows.take(tokens.token_ids)
    assert ids is not None
    softcap = logit_args.logit_softcap is not None
    return Sweep(rows, ids, numbers, softcap, operands, tokens.dtype, tokens.vocab, backend, wide)


@dataclass(frozen=True)
class Sweep:
    """A walk over the chunks of one call."""

    live_rows: LiveRows
    token_ids: Tensor
    """(1, n)"""
    numbers: Tensor
    softcap: bool
    operands: torch.dtype
    """Of the GEMMs."""
    dtype: torch.dtype
    """Of the logits."""
    vocab: int
    backend: str
    wide: bool
    """Gradients stay in fp32 until they are scaled, not yet in the dtypes of what they belong to."""

    @property
    def announced(self) -> Tensor:
        return self.numbers[NUMBERS.index("grad_scale")]

    def valid(self, value: Tensor) -> Tensor:
        """NaN, and so its gradient, where rows were cut off."""
        cut = self.live_rows.cut
        return value if cut is None else value * torch.where(cut, torch.nan, 1.0).to(value.dtype)

    def run(self, visit: Visit, wants: Wants, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        """Compute each chunk's logits and let ``visit`` have them; where gradients are wanted, it turns the logits
        into their gradient."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self._run(visit, wants, hidden, weight, bias)

    def _run(self, visit: Visit, wants: Wants, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        rows, device = self.live_rows, hidden.device
        kind = head_kind(device.type, self.operands, self.dtype)
        head = kind(weight, bias, self.operands, len(rows.chunks), wants, self.wide)
        buffer = torch.empty(rows.longest, self.vocab, dtype=self.dtype, device=device)
        places = hidden.shape[:-1].numel() + 1
        gradient = None
        if wants.hidden:
            gradient = hidden.new_zeros(places, hidden.shape[-1], dtype=torch.float32 if self.wide else hidden.dtype)
        for first, last in rows.chunks:
            states = rows.hidden(hidden, first, last).to(self.operands)
            logits = buffer[: last - first]
            head.logits(states, logits)
            ids, live = self.token_ids[:, first:last], rows.live[:, first:last]
            visit(Rows(logits, ids, live, self.numbers, self.softcap), first, last)
            if any(wants):
                values = head.backward(logits, states)
                if gradient is not None and values is not None:
                    rows.put_hidden(values, gradient, hidden, first, last)
        if gradient is not None:
            gradient = gradient[:-1].view(hidden.shape)
        return gradient, *head.gradients()

    def log_probs(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> RowStats:
        """Return the statistics of the live rows, (1, n)."""
        stats = RowStats(*(torch.zeros_like(self.token_ids, dtype=self.numbers.dtype) for _ in RowStats._fields))

        def visit(rows: Rows, first: int, last: int) -> None:
            outputs = ops.log_probs(rows, self.backend)
            for total, output in zip(stats, outputs, strict=True):
                total[:, first:last] = output

        self.run(visit, Wants(False, False, False), hidden, weight, bias)
        return stats

    def gradients(
        self,
        wants: Sequence[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stats: RowStats,
        gradients: RowGradients,
    ) -> Gradients:
        """From (B, T) slopes in log-prob and entropy and ``log_probs``'s ``stats``; the logits are computed again."""
        slopes = RowGradients(*(None if slope is None else self.live_rows.take(slope) for slope in gradients))

        def visit(rows: Rows, first: int, last: int) -> None:
            ops.log_probs_backward_(rows, cut(stats, first, last), cut(slopes, first, last), self.backend)

        return self.run(visit, Wants(*wants), hidden, weight, bias)


@dataclass(frozen=True)
class _Loss:
    """The routes of one loss; each returns records of (B, T) and the gradients times the announced scale."""

    config: LossConfig
    batch: TokenBatch
    sweep: Sweep
    spec: ObjectiveSpec | str
    """For a one-pass kernel; or why a row's slope does not follow from the row, or no kernel has the surrogate."""
    fuses: bool
    """Whether the backend has that kernel."""

    def run(
        self, wants: Wants, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Metrics, TokenValues, Gradients]:
        head = (hidden, weight, bias)
        if not any(wants):
            values, records, _ = self._terms(self.sweep.log_probs(*head))
            gradients: Gradients = (None, None, None)
        elif self._of_rows or self.sweep.live_rows.bounds is not None:
            values, records, gradients = self._one_sweep(wants, head)
        else:
            stats = self.sweep.log_probs(*head)
            values, records, slopes = self._terms(stats)
            gradients = self.sweep.gradients(wants, *head, stats, slopes)
        loss, metrics = reduce_records(self.config, self.batch, values, records, self.sweep.backend)
        return loss, metrics, values, gradients

    @property
    def _of_rows(self) -> bool:
        """Every row's slope follows from the row."""
        return not isinstance(self.spec, str) or not pools(self.config, self.batch)

    def _one_sweep(self, wants: Wants, head: HeadTensors) -> tuple[TokenValues, TokenRecords, Gradients]:
        """Every row's slope follows from the rows of its chunk."""
        sweep = self.sweep
        mine = sweep.live_rows.batch(self.batch)
        real = torch.zeros_like(sweep.token_ids, dtype=sweep.numbers.dtype)
        flags = torch.zeros_like(real, dtype=torch.uint8)
        weight = torch.zeros_like(real) if self.batch.schemes else real.new_empty(0)
        log_prob, entropy = torch.zeros_like(real), torch.zeros_like(real)
        records = TokenRecords(torch.zeros_like(real), torch.zeros_like(real), flags, weight)

        def visit(rows: Rows, first: int, last: int) -> None:
            part = sweep.live_rows.narrow(mine, first, last)
            fused = self.fuses and not isinstance(self.spec, str)
            outputs = self._fused(rows, part) if fused else self._two_passes(rows, part)
            for total, chunk in zip((log_prob, entropy, *records), (*outputs[:2], *outputs[2]), strict=True):
                if total.dim() > 1:
                    total[:, first:last] = chunk

        gradients = sweep.run(visit, wants, *head)
        scatter = sweep.live_rows.scatter
        values = TokenValues(scatter(log_prob), scatter(entropy), self.batch.live)
        return values, TokenRecords(*(scatter(total) if total.dim() > 1 else total for total in records)), gradients

    def _fused(self, rows: Rows, part: TokenBatch) -> tuple[Tensor, Tensor, TokenRecords]:
        assert not isinstance(self.spec, str)
        return ops.fused_loss_(rows, part.inputs, self.spec, self.sweep.backend)

    def _two_passes(self, rows: Rows, part: TokenBatch) -> tuple[Tensor, Tensor, TokenRecords]:
        backend = self.sweep.backend
        stats = ops.log_probs(rows, backend)
        # On-policy, what pools can be the token's own.
        config = dataclasses.replace(self.config, level="token") if self._of_rows else self.config
        records, slope = fast_token_terms(config, part, stats.log_prob, stats.entropy, rows.numbers, backend)
        slopes = self._announce(slope, part.inputs.entropy_weight)
        ops.log_probs_backward_(rows, stats, slopes, backend)
        return stats.log_prob, stats.entropy, records

    def _terms(self, stats: RowStats) -> tuple[TokenValues, TokenRecords, RowGradients]:
        """From (1, n): values, records and announced slopes, (B, T)."""
        log_prob, entropy = (self.sweep.live_rows.scatter(values) for values in stats[:2])
        numbers, backend = self.sweep.numbers, self.sweep.backend
        records, slope = fast_token_terms(self.config, self.batch, log_prob, entropy, numbers, backend)
        values = TokenValues(log_prob, entropy, self.batch.live)
        return values, records, self._announce(slope, self.batch.inputs.entropy_weight)

    def _announce(self, slope: Tensor, entropy_weight: Tensor | None) -> RowGradients:
        scale = self.sweep.announced
        return RowGradients(slope * scale, None if entropy_weight is None else -entropy_weight * scale)


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
        advantages: Tensor,
        mask: Tensor | None = None,
        **options: Any,
    ) -> LossOutput:
        """See ``linear_grpo_loss``."""
        options = {**self.options, **options}
        return linear_grpo_loss(hidden, weight, token_ids, advantages, mask, config=self.config, **options)
