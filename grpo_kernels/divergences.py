"""``token_divergence``, ``linear_token_divergence``: how far every token's distribution is from a teacher's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends.spec import LogitArgs, numbers_vector
from .calls.arguments import check_inplace, check_logit_args, read_head
from .calls.chunks import CHUNK_BYTES, chunk_rows
from .calls.contents import check_contents, check_ids
from .calls.divergence import (
    DivergedLogProbs,
    check_teacher_rows,
    read_teacher,
    refuse_columns_inplace,
    refuse_shared_memory,
)
from .calls.routes import choose_backend, choose_log_probs
from .calls.sweep import LinearLogProbs, check_swept_teacher, sweep_of
from .calls.teacher import Teacher, check_teacher, first_columns
from .calls.teacher_rows import beside_teacher, dtype_beside, read_teacher_states
from .calls.temperature import read_temperatures
from .calls.tokens import read_linear_tokens, read_tokens
from .objectives.compiler import outside_graphs
from .objectives.divergence import ELSEWHERE, KINDS, Divergence, KindName
from .objectives.names import NoKeyword, refuse_keywords
from .objectives.settings import read_name


class TokenDivergence(NamedTuple):
    """Divergences of tokens, and what the same rows give beside; 0 at masked positions."""

    divergence: Tensor
    """D, shape of token_ids, nats, fp32 (fp64 for fp64 logits); differentiable."""
    log_probs: Tensor
    """Of the policy at the tokens; differentiable."""
    entropy: Tensor
    """Of the policy, nats; differentiable."""
    teacher_entropy: Tensor
    """Nats; detached."""


def token_divergence(
    logits: Tensor,
    teacher: Teacher,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: Divergence | KindName = "reverse_kl",
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    check: bool | None = None,
    backend: str | None = None,
    **unknown: NoKeyword,
) -> TokenDivergence:
    """The divergence of every token's distribution from the teacher's, differentiable, for objectives of your own.

    D_t = Σ_j q_j·f(p_j/q_j) over the vocabulary, p the policy's softmax and q the teacher's (``Divergence`` names f;
    its ``coef`` has no part here). The value is a sum of terms >= 0: a KL of 4e-6 keeps six digits.

    Args:
        logits: of the policy, as for ``grpo_loss``.
        teacher: ``Teacher(logits=...)``, or top-k ids and log-probs of it.
        token_ids: as for ``grpo_loss``; D does not depend on them.
        mask: rows that are masked are not read, the teacher's neither.
        divergence: a Divergence or the name of one.
        temperature, logit_scale, logit_softcap: of the policy, as for ``token_log_probs``; the teacher's temperature is
            the same, row by row, unless the divergence has one; scale and softcap are the Teacher's own.
        vocab_size: how many columns count, where policy and teacher have more.
        inplace, check, backend: as for ``token_log_probs``.

    Returns:
        TokenDivergence(divergence, log_probs, entropy, teacher_entropy).

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as ``grpo_loss``; a teacher that requires grad or does not fit.
    """
    if unknown:
        refuse_keywords(token_divergence, unknown)
    name = "token_divergence"
    kind = read_divergence(name, divergence)
    check_teacher(name, teacher, kind)
    if vocab_size is not None:
        teacher, (logits,) = first_columns(name, vocab_size, teacher, -1, logits)  # type: ignore[assignment]
        inplace = refuse_columns_inplace(name, inplace)
    temperatures = temperature if isinstance(temperature, Tensor) and temperature.dim() > 0 else None
    logit_args = LogitArgs(temperature if temperatures is None else 1.0, logit_scale, logit_softcap)
    check_logit_args(name, logit_args, check)
    tokens = read_tokens(name, logits, token_ids, mask, {"temperature": temperatures}, check)
    if temperatures is not None:
        tokens = read_temperatures(tokens, temperatures, logit_args)
    overwrites = inplace and torch.is_grad_enabled() and logits.requires_grad
    if overwrites:
        check_inplace(name, inplace, logits, tokens.tensors)
    choice = choose_backend(tokens, backend, logit_softcap is not None, fused=False, teacher=teacher.dtype)
    beside = read_teacher(tokens, teacher, kind, logit_args, None, check)
    if overwrites:
        refuse_shared_memory(tokens, teacher)
    check_contents(tokens, choice.backend, logit_args)
    check_teacher_rows(tokens, beside, choice.backend, logit_args)
    numbers = numbers_vector(logit_args, 1.0, None, tokens.real, logits.device, divergence=kind)
    rows = tokens.rows(numbers, logit_softcap is not None)
    log_prob, entropy, value, teacher_entropy = DivergedLogProbs.apply(logits, rows, beside, choice.backend, inplace)
    return TokenDivergence(*(x.view(tokens.shape) for x in (value, log_prob, entropy, teacher_entropy)))


@outside_graphs
def linear_token_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: Divergence | KindName = "reverse_kl",
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    logits_dtype: torch.dtype | None = None,
    check: bool | None = None,
    backend: str | None = None,
    **unknown: NoKeyword,
) -> TokenDivergence:
    """``token_divergence(hidden @ weight.T + bias, ...)`` without its logits, or the teacher's: a chunk at a time.

    Backward computes both logits a second time. ``linear_grpo_loss(config=LossConfig(surrogate=None, divergence=...))``
    computes a loss and its gradient together, of logits that are made once.

    Args: as for ``linear_grpo_loss`` and ``token_divergence``.

    Returns:
        TokenDivergence; divergence, log_probs and entropy are differentiable in hidden, weight, bias and adapter.
    """
    if unknown:
        refuse_keywords(linear_token_divergence, unknown)
    name = "linear_token_divergence"
    kind = read_divergence(name, divergence)
    check_teacher(name, teacher, kind)
    whole = (weight, bias, adapter)
    teacher, (weight, bias, adapter) = beside_teacher(name, teacher, whole, hidden, None, None, vocab_size)
    temperatures = temperature if isinstance(temperature, Tensor) and temperature.dim() > 0 else None
    logit_args = LogitArgs(temperature if temperatures is None else 1.0, logit_scale, logit_softcap)
    check_logit_args(name, logit_args, check)
    head = read_head(name, hidden, weight, bias, adapter)
    tokens = read_linear_tokens(name, head, token_ids, mask, logits_dtype, {"temperature": temperatures}, check)
    if temperatures is not None:
        tokens = read_temperatures(tokens, temperatures, logit_args)
    of_teacher = dtype_beside(teacher, logits_dtype)
    route = choose_log_probs(
        tokens, backend=backend, softcap=logit_softcap is not None, require=None, teacher=of_teacher
    )
    check_ids(tokens, always=head.hidden.device.type == "cpu")
    beside = read_teacher_states(tokens, teacher, kind, logit_args, logits_dtype, check)
    rows = chunk_rows(tokens, head, chunk_bytes, beside.row_bytes)
    check_swept_teacher(tokens, head, logit_args, route, rows, beside)
    numbers = numbers_vector(logit_args, 1.0, None, tokens.real, hidden.device, divergence=kind)
    sweep = sweep_of(tokens, numbers, logit_args, route, head, live_tokens, rows, None, teacher=beside)
    outputs = map(sweep.valid, LinearLogProbs.apply(sweep, *head))
    log_prob, entropy, value, teacher_entropy = (output.view(tokens.shape) for output in outputs)
    return TokenDivergence(value, log_prob, entropy, teacher_entropy)


def read_divergence(function: str, divergence: Divergence | str) -> Divergence:
    """Return a Divergence, or the one of that name."""
    if isinstance(divergence, Divergence):
        return divergence
    return Divergence(read_name(f"{function}: divergence", divergence, KINDS, ELSEWHERE))  # type: ignore[arg-type]
