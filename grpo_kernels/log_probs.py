"""``token_log_probs``: log-probs and entropies of tokens, differentiable in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends.spec import LogitArgs, numbers_vector
from .calls import autograd
from .calls.arguments import check_inplace, check_logit_args
from .calls.contents import check_contents, check_ids
from .calls.outputs import TokenLogProbs
from .calls.provenance import Made
from .calls.recorded import Recorded, read_sets, recorded_log_probs
from .calls.routes import Require, choose_log_probs
from .calls.sharding import (
    ONE_RANK,
    PLAIN,
    facts_of,
    is_whole,
    local,
    local_tokens,
    outside_a_graph,
    read_shard,
    refuse_inplace,
    vocabulary_agreement,
)
from .calls.support import Support, check_support, how_read, said_of, supported_log_probs
from .calls.temperature import read_temperatures
from .calls.tokens import read_tokens
from .calls.vocabulary import row_stats
from .objectives.names import NoKeyword, refuse_keywords

if TYPE_CHECKING:
    from .objectives.groups import Group


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
    vocab_group: Group | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
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
        temperature: a number or 0-d tensor > 0, or one for every sequence, (B,) or (B, 1), or token, as token_ids.
        logit_scale, logit_softcap: numbers or 0-d tensors > 0.
        inplace: backward writes the gradient over the logits.
        support: the tokens that the sampler could draw: ``TopK(k)``, ``TopP(p)``, ``MinP(p)``, a tuple of them in the
            sampler's order, or a bool mask (*token_ids.shape, V). Log-probs and entropies are then those of the
            distribution renormalised over it, the drawn token always included. Rows are copied some at a time, masked
            ones too; not inside a compiled graph. Or ``Recorded(ids, offsets)``, the sets that an engine returned: of
            a row its ids alone are read; an empty set is the whole vocabulary, a token outside of its set an error
            (on a device without checks NaN).
        vocab_group, vocab_start, vocab_size: as for ``grpo_loss``: logits are some of a vocabulary's columns.
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
    if vocab_group is not None and torch.compiler.is_compiling():
        return outside_a_graph(token_log_probs, locals())
    temperatures = temperature if isinstance(temperature, Tensor) and temperature.dim() > 0 else None
    shard = None
    plain = type(logits) in PLAIN and type(token_ids) in PLAIN
    if not (plain and is_whole(vocab_group, vocab_start, vocab_size)):
        refuse_inplace("token_log_probs", logits, inplace)
        logits, shard = read_shard("token_log_probs", logits, -1, vocab_group, vocab_start, vocab_size, check)
        token_ids, mask = local_tokens("token_log_probs", token_ids, mask)
        temperatures = local("token_log_probs", "temperature", temperatures)
    with ONE_RANK if shard is None else vocabulary_agreement("token_log_probs", shard, check) as facts:
        logit_args = LogitArgs(temperature if temperatures is None else 1.0, logit_scale, logit_softcap)
        check_logit_args("token_log_probs", logit_args, check)
        named = {"temperature": temperatures}
        tokens = read_tokens("token_log_probs", logits, token_ids, mask, named, check, shard)
        if temperatures is not None:
            tokens = read_temperatures(tokens, temperatures, logit_args)
        wants_gradient = torch.is_grad_enabled() and logits.requires_grad
        if inplace and wants_gradient:
            check_inplace("token_log_probs", inplace, logits, tokens.tensors)
        softcap, reading = logit_softcap is not None, None if support is None else how_read(support)
        route = choose_log_probs(tokens, backend=backend, softcap=softcap, require=require, reading=reading)
        if support is not None:
            check_support(tokens, support, inplace)
        if shard is not None:
            check_ids(tokens, always=logits.device.type == "cpu")
            kept = said_of(tokens, support, logit_args)
            if facts is not None:
                facts |= facts_of(tokens, logit_args, {}, support=kept)
    check_contents(tokens, route.backend, logit_args)
    made = Made.of(tokens, route.backend, logit_args, support)
    if support is not None and not isinstance(support, Recorded):
        log_prob, entropy = supported_log_probs(logits, tokens, support, logit_args, route.backend)
        return TokenLogProbs.by(log_prob.view(tokens.shape), entropy.view(tokens.shape), made)
    rows = tokens.rows(numbers_vector(logit_args, 1.0, None, tokens.real, logits.device), softcap)
    if isinstance(support, Recorded):
        log_prob, entropy = recorded_log_probs(rows, read_sets(tokens, support), route.backend)
    elif wants_gradient:
        log_prob, entropy = autograd.LogProbs.apply(logits, rows, shard, route.backend, inplace)
    else:
        log_prob, entropy, *_ = row_stats(rows._replace(logits=logits.detach()), shard, route.backend)
    return TokenLogProbs.by(log_prob.view(tokens.shape), entropy.view(tokens.shape), made)
