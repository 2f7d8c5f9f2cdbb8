"""A vocabulary over several ranks: each holds some of the logits' columns, and four numbers a token join them.

Every rank runs the kernels of a whole vocabulary on its own columns. What they return of a row, log-prob, entropy,
anchor and log-sum, is gathered, and combined in rank order by the same operations on every rank, so that the row's
numbers have the same bits on all of them. The gradient needs nothing else: p_j follows from the whole row's anchor and
log-sum, and only the rank that holds the token adds to its column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends
from ..backends import eager, memory, ops
from ..backends.contract import RowGradients, Rows, RowStats
from ..objectives.compiler import outside_graphs
from ..objectives.groups import gather
from ..objectives.sequences import accumulate_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OF_ANOTHER_RANK = float("inf")
"""A log-prob that says: another rank holds the token. No log-prob is above 0."""

SHARDED = "vocab_group=: a row's slope follows from the columns of every rank"
"""Why such a call takes two passes."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of a vocabulary: the first ``columns`` of its logits, from column ``start`` of the whole.

    ``Rows`` are those of this rank's logits, with token ids of the whole vocabulary.
    """

    group: ProcessGroup | None
    """The ranks that hold one vocabulary; None: this rank holds all of it that counts."""
    start: int
    columns: int
    """Those after them are padding: they have no probability, and gradient 0."""
    vocab: int
    """Columns of the whole vocabulary that count."""

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @property
    def even(self) -> int:
        """Return the columns of a rank if all had as many: what sizes follow from that are the same on every rank."""
        return -(-self.vocab // self.ranks)

    def holds(self, token_ids: Tensor) -> Tensor:
        """Return where a token's column is one of this rank's, bool."""
        return (token_ids >= self.start) & (token_ids < self.start + self.columns)

    @outside_graphs
    def log_probs(self, rows: Rows, backend: str) -> RowStats:
        """Return the statistics of the whole rows: one collective of four numbers a row."""
        stats = self._own_stats(rows, backend)
        if self.group is not None:
            everyones = gather(torch.stack(stats), self.group)
            stats = combine(RowStats(*everyones.unbind(1)), factor_of(rows))
        return RowStats(*(torch.where(rows.live, value, 0.0).to(rows.numbers.dtype) for value in stats))

    @outside_graphs
    def gradient(self, rows: Rows, stats: RowStats, gradients: RowGradients, backend: str, inplace: bool) -> Tensor:
        """Return the gradient in this rank's logits, over them where ``inplace``, from the whole rows' ``stats``."""
        length = rows.token_ids.shape[1]
        gradients = RowGradients(*(None if slope is None else slope.resolve_neg() for slope in gradients))
        inplace = inplace and not rows.logits.is_neg()
        out = rows.logits.detach() if inplace else memory.gradient_like(rows.logits, length)
        padding = slice(self.columns, None)
        if self.columns:
            own, held = self._own(rows), self.holds(rows.token_ids)
            first = _first_column(own, stats, gradients)
            backends.get(backend).log_probs_backward(own, stats, gradients, out[..., : self.columns])
            column = own.row_view(out)[..., 0]
            column.copy_(torch.where(held, column, first))
        if inplace:
            out.narrow(-2, length, out.shape[-2] - length).zero_()
            ops.note_write(rows.logits)
        out[..., padding] = 0
        return out

    def _own(self, rows: Rows) -> Rows:
        """Return rows of the columns that count, as a backend takes them; column 0 stands in for a token elsewhere."""
        ids = torch.where(self.holds(rows.token_ids), rows.token_ids - self.start, 0)
        return rows._replace(logits=rows.logits.detach().resolve_neg()[..., : self.columns], token_ids=ids)

    def _own_stats(self, rows: Rows, backend: str) -> RowStats:
        """Return those of this rank's columns alone; ``OF_ANOTHER_RANK`` is the log-prob of a token elsewhere."""
        held = self.holds(rows.token_ids)
        if self.columns:
            stats = ops.log_probs(self._own(rows), backend)
        else:
            none = torch.zeros_like(rows.token_ids, dtype=rows.numbers.dtype)
            stats = RowStats(none, none, none - float("inf"), none)
        impossible = stats.anchor == float("-inf")
        log_prob = torch.where(impossible, float("-inf") if self.group else float("nan"), stats.log_prob)
        return stats._replace(log_prob=torch.where(held, log_prob, OF_ANOTHER_RANK if self.group else float("nan")))


def row_stats(rows: Rows, shard: VocabShard | None, backend: str) -> RowStats:
    """Return the statistics of every row."""
    return ops.log_probs(rows, backend) if shard is None else shard.log_probs(rows, backend)


def row_gradient_(rows: Rows, stats: RowStats, gradients: RowGradients, shard: VocabShard | None, backend: str) -> None:
    """Write the gradient over the logits."""
    if shard is None:
        ops.log_probs_backward_(rows, stats, gradients, backend)
    else:
        shard.gradient(rows, stats, gradients, backend, inplace=True)


def factor_of(rows: Rows) -> Tensor:
    """Return the factor in double precision, 0-d, or (B, T) of rows with a temperature each, that makes z of the
    anchors' unit."""
    temperature, scale, _ = rows.numbers[:3].to(accumulate_dtype(rows.numbers.device)).unbind()
    if rows.temperature is not None:
        temperature = rows.temperature.to(temperature.dtype)
    return (1.0 if rows.softcap else scale) / temperature


def combine(everyones: RowStats, factor: Tensor) -> RowStats:
    """Return the statistics of whole rows (B, T), from those of every rank's columns, (ranks, B, T).

    With w_r the share of rank r in a row's probability, o the rank that holds the token:

        lse_r = z_anchor_r + log_sum_r,   ℓ = ℓ_o - log1p(Σ_{r≠o} e^{lse_r - lse_o}),   H = Σ_r w_r·(H_r - log w_r)

    Anchors are logits of their rows, so their differences are exact where they matter; and what is close to 0, ℓ of a
    likely token and H of a row that is certain, is never the difference of large numbers: the logarithm of the largest
    share is -log1p of the others'. Three numbers a token (lse, H, ℓ) would lose 5 % of a small entropy in fp32.

    Where a rank's columns are all impossible its anchor is -inf, and it has no part; NaN has, and stays. A token that
    no rank holds, or several, is NaN.
    """
    log_prob, entropy, anchor, log_sum = (values.to(factor.dtype) for values in everyones)
    possible = anchor != float("-inf")
    largest = anchor.amax(0)
    lse = torch.where(possible, (anchor - largest) * factor + log_sum, float("-inf"))
    top_lse, top = lse.max(0, keepdim=True)
    to_top = torch.where(possible, lse - top_lse, float("-inf"))
    log_top_share = -torch.log1p(to_top.exp().scatter(0, top, 0.0).sum(0))
    log_share = to_top + log_top_share
    share_entropy = torch.where(possible & (log_share != float("-inf")), entropy - log_share, 0.0)
    held = log_prob != OF_ANOTHER_RANK
    own = torch.where(held, log_prob, 0.0).sum(0)
    own_lse = torch.where(held, lse, 0.0).sum(0)
    others = torch.where(held, 0.0, (lse - own_lse).exp()).sum(0)
    whole = RowStats(
        log_prob=torch.where(own == float("-inf"), own, own - torch.log1p(others)),
        entropy=(log_share.exp() * share_entropy).sum(0).clamp(min=0),
        anchor=largest,
        log_sum=(top_lse.squeeze(0) - log_top_share),
    )
    void = ~possible.any(0) | (held.sum(0) != 1) | whole.log_sum.isnan()
    return RowStats(*(torch.where(void, float("nan"), value) for value in whole))


def _first_column(rows: Rows, stats: RowStats, gradients: RowGradients) -> Tensor:
    """Return the gradient in column 0 of rows whose token is elsewhere, (B, T).

    A kernel takes the column that stands in for the token for the token's own. Here that column comes twice, and the
    second of the two is taken for it.
    """
    pair = rows.row_view(rows.logits)[..., :1].expand(*rows.token_ids.shape, 2).contiguous()
    out = torch.empty_like(pair)
    eager.log_probs_backward(
        rows._replace(logits=pair, token_ids=torch.ones_like(rows.token_ids)), stats, gradients, out
    )
    return out[..., 0]
