"""``grpo_loss``: logits to loss, gradient and metrics while the logits are read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import ops
from .backends.contract import Rows
from .backends.spec import NUMBERS, LogitArgs, ObjectiveSpec
from .calls import autograd
from .calls.arguments import check_inplace, check_logit_args
from .calls.batch import LossInputs, TokenBatch, read_batch
from .calls.contents import check_contents
from .calls.modules import LossModule
from .calls.outputs import LossOutput
from .calls.routes import Require, check_require, choose_backend, one_pass_spec, route_of
from .calls.support import Support, check_not_inplace, supported_log_probs
from .calls.terms import Records, fast_token_terms, reduce_records
from .calls.tokens import read_tokens
from .objectives.aggregation import Normalizer
from .objectives.checks import check_positive
from .objectives.config import LossConfig
from .objectives.metrics import Metrics
from .objectives.presets import resolve_config


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
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
    inplace: bool = False,
    support: Support | None = None,
    skip_zero_advantage: bool = False,
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
) -> LossOutput:
    """The GRPO-family loss of ``config``, its gradient in the logits and its metrics.

    loss = Σ_t w_t·( u_t·ρ_t·f(ℓ_t, r_t, A_t) + kl_coef·k(ℓ_t - ref_t) ) - entropy_coef·Σ_t w'_t·H_t, with ℓ_t the
    log-softmax of softcap(logits·logit_scale)/temperature at the token, r_t = exp(ℓ_t - old_t), f the surrogate, w the
    aggregation, u the ``token_weights`` and ρ the rollout correction (Shao et al. 2024, arXiv:2402.03300, and the
    presets' papers).

    Args:
        logits: (B, T, V), or (B, T+1, V) as a causal model returns it (the last row is unused), or packed (N, V) or
            (1, N, V). float32, bfloat16, float16 or float64; any batch and row stride, last stride 1.
        token_ids: integers (B, T), packed (N,) or (1, N): ``token_ids[:, t]`` is the token that row t *predicts*
            (``align`` makes it).
        advantages: (B,), (B, 1) or (B, T); packed (S,) or token-sized ((1, N) where N is S as well).
        mask: shape of token_ids, bool or numbers >= 0, non-zero where live. A masked row is never read.
        old_log_probs: of the policy that the batch is compared with; None: on-policy, ratio 1, differentiable. In fp32
            where ratios are pooled over sequences: bf16 would move all of them.
        ref_log_probs: of the reference policy; needed by a KL term.
        rollout_log_probs: of the sampler, NaN where unknown; for metrics and the config's rollout correction.
        token_weights: u, factors of the policy term (not of the KL).
        cu_seqlens: (S+1,) bounds of packed sequences; rows before the first and past the last count as masked.
        config: a LossConfig or a preset's name.
        normalizer: replaces the denominator over the batch: from ``normalizer()``, which knows what it counted, or a
            number or 0-d tensor of what the aggregation divides by.
        grad_scale: the factor (> 0) that the caller will put on the loss before backward: 1/accumulation steps, a
            gradient scaler's scale. The gradient is written already multiplied by it; ``loss`` is not. Announced, it
            costs nothing; unannounced, a read and write of the gradient.
        kl_coef, entropy_coef: replace the config's, for annealing; numbers or 0-d device tensors.
        entropy_threshold: tokens whose entropy (nats) is lower have no policy term; they stay in the denominators. A
            quantile of ``token_log_probs(...).entropy`` keeps the rest (Wang et al. 2025, arXiv:2506.01939).
        temperature, logit_scale, logit_softcap: how logits become log-probs, > 0; numbers or 0-d tensors.
        inplace: the gradient overwrites the logits, which are unusable after the call.
        support: the tokens that the sampler could draw, as for ``token_log_probs``; give old and reference log-probs
            over their own. Two passes.
        skip_zero_advantage: rows with A = 0 are not read; their outputs are 0.
        check: also check contents on a device, which waits for it, and more of them everywhere (ids in range and not
            shifted, masks without fractions, weights >= 0). None: the environment's GRPO_KERNELS_CHECK.
        backend: "cpu", "cuda", "triton", "torch"; None: the fastest that serves the call ("cuda" only where proven).
            The environment's GRPO_KERNELS_BACKEND wins over both.
        require: "fused": raise where compiled kernels would not compute loss and gradient in one pass.

    Returns:
        LossOutput(loss, metrics, log_probs, entropy, route); only ``loss`` is differentiable, in ``logits`` alone.
        ``route`` says which backend computed it, in how many passes over the logits, and why.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, names or numbers that do not fit, each named.
        IndexError: a token id outside the vocabulary at a live position (CPU; on a GPU that row becomes NaN).
        RuntimeError: a backend that cannot serve the call, or not as required; a torch.func transform; a second
            backward.
    """
    config = resolve_config(config)
    given = LossInputs(
        *(advantages, old_log_probs, ref_log_probs, rollout_log_probs, token_weights, cu_seqlens, normalizer),
        *(kl_coef, entropy_coef, skip_zero_advantage, check, entropy_threshold),
    )
    logit_args = LogitArgs(temperature, logit_scale, logit_softcap)
    check_logit_args("grpo_loss", logit_args, check)
    tokens = read_tokens("grpo_loss", logits, token_ids, mask, given.tensors, check)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_gradient:
        check_inplace("grpo_loss", logits, tokens.tensors)
    choice = choose_backend(tokens, backend, logit_args, needs_gradient)
    tokens, batch = read_batch(tokens, config, given)
    spec: ObjectiveSpec | str = one_pass_spec(config, batch, given)
    if logits.dtype == torch.float16 and grad_scale is None:
        spec = "an fp16 gradient is written once its factor is known: announce it, grad_scale="
    route = route_of(choice, spec if isinstance(spec, str) else None, needs_gradient, copies=support is not None)
    check_require(tokens, require, route)
    backend = choice.backend
    check_contents(tokens, backend, logit_args, check)
    rows = tokens.rows(logit_args, announced_scale("grpo_loss", grad_scale, check), config, entropy_threshold)
    call = _Call(config, rows, batch, backend, inplace)

    if support is not None:
        check_not_inplace("grpo_loss", inplace, tokens.tensors)
        loss, metrics, records = call.of_log_probs(*supported_log_probs(logits, tokens, support, logit_args, backend))
    elif not needs_gradient:
        loss, metrics, records = call.forward_only()
    elif route.passes == 1 and not isinstance(spec, str):
        loss, metrics, records = call.one_pass(spec)
    else:
        loss, metrics, records = call.two_passes()
    return LossOutput(loss, metrics, records.log_prob.view(tokens.shape), records.entropy.view(tokens.shape), route)


def announced_scale(function: str, grad_scale: float | Tensor | None, check: bool | None) -> float | Tensor:
    """The factor that gradients are written with."""
    if grad_scale is None:
        return 1.0
    check_positive(function, "grad_scale", grad_scale, check)
    return grad_scale


@dataclass(frozen=True)
class _Call:
    """The three routes of one loss; each returns loss, metrics and records."""

    config: LossConfig
    rows: Rows
    batch: TokenBatch
    backend: str
    inplace: bool

    def forward_only(self) -> tuple[Tensor, Metrics, Records]:
        rows = self.rows
        with torch.no_grad():
            log_prob, entropy, *_ = ops.log_probs(rows.logits, *rows.arguments, self.backend)
            loss, metrics, records, _ = self._settle(log_prob, entropy)
        return loss, metrics, records

    def one_pass(self, spec: ObjectiveSpec) -> tuple[Tensor, Metrics, Records]:
        rows, batch = self.rows, self.batch
        arguments = (
            *(*rows.arguments, batch.advantages, batch.policy_weight, batch.old, batch.ref, batch.rollout),
            *(batch.kl_weight, batch.entropy_weight, list(spec), self.backend),
        )
        with torch.no_grad():
            gradient = rows.logits.detach()
            if self.inplace:
                records = Records(*ops.fused_loss_(gradient, *arguments))
            else:
                *outputs, gradient = ops.fused_loss(gradient, *arguments)
                records = Records(*outputs)
            value, metrics = reduce_records(self.config, batch, records, self.backend)
        announced = rows.numbers[NUMBERS.index("grad_scale")]
        known = (announced, rows.token_ids, self.backend, "grpo_loss")
        return autograd.KnownGradients.apply(value, *known, rows.logits, gradient), metrics, records

    def two_passes(self) -> tuple[Tensor, Metrics, Records]:
        rows = self.rows
        with torch.no_grad():
            log_prob, entropy, anchor, log_sum = ops.log_probs(rows.logits.detach(), *rows.arguments, self.backend)
            value, metrics, records, slopes = self._settle(log_prob, entropy)
        stats = (log_prob, entropy, anchor, log_sum, *slopes)
        loss = autograd.LossGradient.apply(rows.logits, value, *rows.arguments, *stats, self.backend, self.inplace)
        return loss, metrics, records

    def of_log_probs(self, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Metrics, Records]:
        """From log-probs and entropies that make their own gradient."""
        with torch.no_grad():
            value, metrics, records, slopes = self._settle(log_prob.detach(), entropy.detach())
        return autograd.LossOfLogProbs.apply(log_prob, entropy, value, *slopes), metrics, records

    def _settle(
        self, log_prob: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Metrics, Records, tuple[Tensor, Tensor | None]]:
        """Loss, metrics and records of log-probs, and its slopes in them and in the entropies."""
        batch, numbers = self.batch, self.rows.numbers
        records, slope = fast_token_terms(self.config, batch, log_prob, entropy, numbers, self.backend)
        value, metrics = reduce_records(self.config, batch, records, self.backend)
        return value, metrics, records, (slope, None if batch.entropy_weight is None else -batch.entropy_weight)


class GRPOLoss(LossModule):
    """``grpo_loss`` as a module: ``GRPOLoss("dapo", temperature=0.7)(logits, token_ids, advantages, mask, ...)``.

    Args:
        config: a LossConfig or a preset's name.
        **options: keywords of ``grpo_loss`` to fix.
    """

    function = staticmethod(grpo_loss)

    def forward(
        self, logits: Tensor, token_ids: Tensor, advantages: Tensor, mask: Tensor | None = None, **options: Any
    ) -> LossOutput:
        """See ``grpo_loss``."""
        return grpo_loss(logits, token_ids, advantages, mask, config=self.config, **{**self.options, **options})
