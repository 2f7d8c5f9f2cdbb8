"""``token_log_probs``: log-probs and entropies of tokens, differentiable in both."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import ops
from .backends.spec import LogitArgs, numbers_vector
from .calls import autograd
from .calls.arguments import check_inplace, check_logit_args
from .calls.contents import check_contents
from .calls.outputs import TokenLogProbs
from .calls.routes import Require, choose_log_probs
from .calls.support import Support, check_not_inplace, supported_log_probs
from .calls.tokens import read_tokens
from .objectives.names import NoKeyword, refuse_keywords


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
    **unknown: NoKeyword,
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
    if unknown:
        refuse_keywords(token_log_probs, unknown)
    logit_args = LogitArgs(temperature, logit_scale, logit_softcap)
    check_logit_args("token_log_probs", logit_args, check)
    tokens = read_tokens("token_log_probs", logits, token_ids, mask, {}, check)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and wants_gradient:
        check_inplace("token_log_probs", inplace, logits, tokens.tensors)
    softcap, copies = logit_softcap is not None, support is not None
    route = choose_log_probs(tokens, backend=backend, softcap=softcap, require=require, copies=copies)
    check_contents(tokens, route.backend, logit_args)
    if support is not None:
        check_not_inplace("token_log_probs", inplace, tokens.tensors)
        log_prob, entropy = supported_log_probs(logits, tokens, support, logit_args, route.backend)
        return TokenLogProbs(log_prob.view(tokens.shape), entropy.view(tokens.shape))
    rows = tokens.rows(numbers_vector(logit_args, 1.0, None, tokens.real, logits.device), softcap)
    if wants_gradient:
        log_prob, entropy = autograd.LogProbs.apply(logits, rows, route.backend, inplace)
    else:
        log_prob, entropy, *_ = ops.log_probs(rows._replace(logits=logits.detach()), route.backend)
    return TokenLogProbs(log_prob.view(tokens.shape), entropy.view(tokens.shape))
