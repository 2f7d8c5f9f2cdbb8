"""Every so many losses of an attached model, the same one of whole logits in plain PyTorch: what ``shadow=`` asks for.

What trains is the fused loss. On a watched call both are computed once more, of copies that share the memory of hidden
states and head (or of the logits), so nothing of the model runs twice; logits and several tensors of their size exist
for as long as that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calls.outputs import TokenLogProbs
from ..calls.sharding import is_dtensor
from ..calls.sighting import Sighting, Turns, seen
from ..objectives.checks import fail
from ..objectives.names import keywords_of

_OF_MEMORY = ("chunk_bytes", "live_tokens", "logits_dtype", "hidden_grad")
"""Keywords that change no loss; the dtype of the logits is taken as it is given."""


def plain_loss(logits: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Return the reference's loss."""
    from ..reference import grpo_loss

    taken = {name: value for name, value in given.items() if name not in (*_OF_MEMORY, "output")}
    taken = {n: v.log_probs if isinstance(v, TokenLogProbs) else v for n, v in taken.items()}
    if given.get("logits_dtype") is not None:
        logits = logits.to(given["logits_dtype"])
    taken.setdefault("advantages", None)
    if callable(weights := taken.get("token_weights")):
        with torch.no_grad():
            out = grpo_loss(logits, **{**taken, "token_weights": None})
            taken["token_weights"] = weights(TokenLogProbs(out.log_probs, out.entropy))
    return grpo_loss(logits, **taken).loss


def plain_log_probs(logits: Tensor, given: Mapping[str, Any]) -> TokenLogProbs:
    """Return log-probs and entropies (B, T), differentiable, of untransformed logits (B, T or more, V)."""
    ids = given["token_ids"]
    z = logits[:, : ids.shape[1]].to(torch.promote_types(logits.dtype, torch.float32)) * given.get("logit_scale", 1.0)
    if (cap := given.get("logit_softcap")) is not None:
        z = cap * torch.tanh(z / cap)
    log_p = torch.log_softmax(z / given.get("temperature", 1.0), -1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return TokenLogProbs(log_p.gather(-1, ids[..., None]).squeeze(-1), entropy)


Loss = Callable[[Tensor, Mapping[str, Any]], Tensor]


class Watch:
    """Counts the losses of a model, or of several, and compares every ``every``-th one; 0 compares none.

    Args:
        loss: the other one, of untransformed logits (..., V) and of what ours was given.
        whose: what messages call it.
    """

    def __init__(self, every: int, loss: Loss = plain_loss, whose: str = "plain PyTorch") -> None:
        self._turns, self.loss, self.whose = Turns(every), loss, whose

    def look(
        self,
        fused: Callable[..., Any],
        logits_of: Callable[..., Tensor],
        leaves: tuple[Tensor, ...],
        given: Mapping[str, Any],
        head: Mapping[str, Any],
    ) -> None:
        """Compare, where this call's turn has come, and log what was seen.

        Args:
            fused: the loss, of leaves and of what is given.
            logits_of: logits (..., V) of the leaves.
            leaves: hidden states and the head's weight, or logits.
            given: what both losses take.
            head: what the fused loss takes beside it.
        """

        def compare(call: int) -> Sighting:
            _check(given, leaves)
            copies = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
            moved = [copy for copy in copies if copy.requires_grad]
            plain = self.loss(logits_of(*copies), given)
            theirs = torch.autograd.grad(plain, moved)
            out = fused(tuple(copies), dict(given), **head)
            ours = torch.autograd.grad(out.loss, moved)
            least = max(leaves, key=lambda leaf: torch.finfo(leaf.dtype).eps)
            return seen(call, (plain, theirs), (out.loss, ours), least.dtype, self.whose)

        if given.get("output", "loss") == "loss":
            self._turns.take(compare)


def _check(given: Mapping[str, Any], leaves: tuple[Tensor, ...]) -> None:
    """Raise for what plain PyTorch on one rank has no counterpart of."""
    from ..reference import grpo_loss

    known = (*keywords_of(grpo_loss), *_OF_MEMORY, "output", "vocab_size")
    for name, value in given.items():
        if name not in known and value is not None and value is not False:
            fail("shadow", "options of reference.grpo_loss", f"{name}=", hint="leave shadow= out of such a call")
    if any(is_dtensor(leaf) for leaf in leaves):
        fail("shadow", "a whole head", "one that tensor parallelism shards", hint="leave shadow= out")
