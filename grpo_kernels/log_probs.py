"""``token_log_probs``: log-probs and entropies of tokens, differentiable in both."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import ops
from .backends.spec import LogitArgs
from .calls import autograd
from .calls.arguments import check_inplace, check_logit_args
from .calls.contents import check_contents
from .calls.outputs import TokenLogProbs
from .calls.routes import Require, check_require, choose_backend, route_of
from .calls.support import Support, check_not_inplace, supported_log_probs
from .calls.tokens import read_tokens


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    inplace: bool = False,
    support: Support | None = None,
    check: bool | None = None,
    backend: str | None = None,
    require: Require | None = None,
) -> TokenLogProbs:
    """Log-prob of each token and entropy of each row, without a second tensor of the logits' size.

    ℓ_t = z_t[id_t] - logsumexp(z_t), H_t = -Σ_j p_j log p_j, z = softcap(logits·logit_scale)/temperature. Under
    ``no_grad`` it is the old or reference pass; with gradient, any loss on log-probs gets the fused kernels.

    Args:
        logits: (B, T, V), (B, T+1, V) with the last row unused, or packed (N, V) or (1, N, V), as for ``grpo_loss``.
        token_ids: integers (B, T), (N,) or (1, N): the token that row t predicts.
        mask: shape of token_ids, bool or numbers >= 0; masked rows are not read, their outputs and gradient are 0.
        temperature, logit_scale, logit_softcap: numbers or 0-d tensors > 0.
        inplace: backward writes the gradient over the logits.
        support: the tokens that the sampler could draw: ``TopK(k)``, ``TopP(p)``, ``MinP(p)``, a tuple of them in the
            sampler's order, or a bool mask (*token_ids.shape, V). Log-probs and entropies are then those of the
            distribution renormalised over it, the drawn token always included. Rows are copied some at a time, masked
            ones too; not inside a compiled graph.
        check, backend: as for ``grpo_loss``.
        require: "fused": raise where no compiled kernels would serve the call.

    Returns:
        TokenLogProbs(log_probs, entropy), shape of token_ids, fp32 (fp64 for fp64 logits). Two calls on equal rows
        give equal bits, in whatever batch.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as ``grpo_loss``.
    """
    logit_args = LogitArgs(temperature, logit_scale, logit_softcap)
    check_logit_args("token_log_probs", logit_args, check)
    tokens = read_tokens("token_log_probs", logits, token_ids, mask, {}, check)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_gradient:
        check_inplace("token_log_probs", logits, tokens.tensors)
    choice = choose_backend(tokens, backend, logit_args)
    check_require(tokens, require, route_of(choice, None, wants_gradient=False, copies=support is not None))
    chosen = choice.backend
    check_contents(tokens, chosen, logit_args, check)
    if support is not None:
        check_not_inplace("token_log_probs", inplace, tokens.tensors)
        found = supported_log_probs(logits, tokens, support, logit_args, chosen)
        return TokenLogProbs(*(output.view(tokens.shape) for output in found))
    rows = tokens.rows(logit_args)
    if needs_gradient:
        outputs = autograd.LogProbs.apply(logits, rows, chosen, inplace)
    else:
        outputs = ops.log_probs(rows._replace(logits=logits.detach()), chosen)[:2]
    return TokenLogProbs(*(output.view(tokens.shape) for output in outputs))
