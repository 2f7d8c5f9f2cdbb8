"""The contract between calls and kernels: the one list of a row's and a token's tensors, and the backends' functions.

Named tuples of tensors go in and out; operators (``ops.py``), the structs of the compiled libraries (``native.py``,
csrc/common/call.h) and the launches of Triton's kernels follow their fields. Tensors of rows and tokens are contiguous
(B, T), fp32, or fp64 where the logits are, unless their comment says otherwise. A backend is a module of the functions
of ``Backend`` and one line in ``backends/__init__.py``; with those of ``FusedBackend`` it serves one pass.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .spec import ObjectiveSpec


class Rows(NamedTuple):
    """The vocabulary rows of one call.

    Row (b, t) predicts ``token_ids[b, t]``. A row that is not ``live`` is not looked at: its outputs are 0, and so is
    its gradient.
    """

    logits: Tensor
    """(B, T or T+1, V) or (T or T+1, V), any batch and row stride, last stride 1."""
    token_ids: Tensor
    """int64"""
    live: Tensor
    """bool"""
    numbers: Tensor
    """The vector of ``spec.NUMBERS`` and the surrogate's parameters."""
    softcap: bool
    """Whether logits go through a softcap; its size is one of the numbers."""
    temperature: Tensor | None = None
    """A row's own, (B, T), > 0 where it is live: in the place of the one among the numbers, which is 1 then."""

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def strides(self) -> tuple[int, int]:
        """Batch and row stride of the logits, in elements."""
        return batch_and_row_stride(self.logits)

    def row_view(self, tensor: Tensor) -> Tensor:
        """Return a (B, T, V) view of a tensor shaped like the logits: the rows that predict a token."""
        batch, length = self.token_ids.shape
        whole = tensor.unsqueeze(0) if tensor.dim() == 2 else tensor
        return whole[:batch, :length]


def batch_and_row_stride(tensor: Tensor) -> tuple[int, int]:
    """Return the strides of a tensor shaped like logits; 0 where there is one batch or one row alone, which nothing is
    so far from."""
    batch = tensor.stride(0) if tensor.dim() == 3 and tensor.shape[0] > 1 else 0
    return batch, tensor.stride(-2) if tensor.shape[-2] > 1 else 0


class RowStats(NamedTuple):
    """The statistics of a row's softmax: p_j = exp((z_j - z_anchor) - log_sum), z = softcap(logit·scale)/temperature.

    Two parts keep the digits that one log-sum-exp in fp32 loses to a common offset of the logits.
    """

    log_prob: Tensor
    """ℓ, the log-prob of the row's token, nats."""
    entropy: Tensor
    """H = -Σ_j p_j log p_j, nats."""
    anchor: Tensor
    """The value (a logit, under a softcap the capped one) that the row's powers are relative to, near its largest.

    -inf exactly where no column of a row is possible: all values are -inf. The other three are NaN there, as they are
    in a row with a NaN or +inf among its values, whose anchor is anything but -inf. So a shard of the vocabulary that
    has nothing to add is told from one that spoils the row.
    """
    log_sum: Tensor
    """log Σ_j exp(z_j - z_anchor)"""


class RowGradients(NamedTuple):
    """The loss's gradient in a row's log-prob and entropy; None: 0."""

    grad_log_prob: Tensor | None
    """∂loss/∂ℓ"""
    grad_entropy: Tensor | None
    """∂loss/∂H"""


class DivergenceStats(NamedTuple):
    """A row's divergence of the policy p from a teacher q, and what its gradient needs beside both rows' ``RowStats``.

    With s = dz/dvalue of the policy's row (its scale over its temperature), s' of the teacher's, values x and y
    (logits, under a softcap the capped ones), anchors α and β and ρ = s'/s,

        d_j = log(p_j/q_j) = s·t_j + shift,    t_j = (x_j - ρ·y_j) - (α - ρ·β),    d_j = 0 where both are -inf,

    so that what two rows have in common costs nothing where ρ is 1: logits of like size subtract exactly, before
    anything is scaled. (Under another ρ, x_j - ρ·y_j is rounded at the size of the common offset times 1 - ρ.) Then,
    with the columns' ``term``, ``own`` and ``slope`` of objectives/divergence.py,

        D = Σ_j term_j,    ∂D/∂z_j = own_j + p_j·((slope_j - slope at centre) - mean).
    """

    divergence: Tensor
    """D, nats; +inf where it is."""
    shift: Tensor
    """log_sum of the teacher - log_sum of the policy, less the rest of rounding log(1 + Σ_j (p_j - q_j)), whose sum
    over terms that are small where p and q are close has the digits that the two logarithms lost."""
    centre: Tensor
    """d at the column of the policy's largest value: slopes are relative to it, as p·(d - KL) of a confident column
    would cancel. Bit for bit what the backend's gradient has there, by the formula or with more digits."""
    mean: Tensor
    """Σ_j p_j·(slope_j - slope at centre); NaN where D is infinite and has no gradient."""


class TokenInputs(NamedTuple):
    """The inputs of a token's maths beside its log-prob and entropy; anything where a token is not live."""

    advantage: Tensor
    policy_weight: Tensor
    """The weight in the loss of the surrogate: the aggregation's, the token's own, rollout factors already applied."""
    old: Tensor | None
    """Log-probs of the policy that the ratio is taken to; None: on-policy."""
    ref: Tensor | None
    """Log-probs of the KL's reference policy."""
    rollout: Tensor | None
    """Log-probs of the sampler, NaN where unknown."""
    kl_weight: Tensor | None
    """The weight in the loss of the KL, coefficient included; None: no KL term."""
    entropy_weight: Tensor | None
    """The weight in the loss of -H, coefficient included; None: no bonus."""
    rollout_kl_weight: Tensor | None = None
    """The weight in the loss of the KL to the sampler, or to ``old`` where no ``rollout`` is given, coefficient
    included; None: no such term."""


class TokenValues(NamedTuple):
    """The log-prob and entropy of a token's row, and whether the token counts."""

    log_prob: Tensor
    entropy: Tensor
    live: Tensor
    """bool"""


class TokenRecords(NamedTuple):
    """The records that the loss and its metrics are reduced from, beside log-probs and entropies; 0 at dead rows."""

    policy: Tensor
    """The surrogate's value times the rollout factor, otherwise unweighted."""
    kl: Tensor
    """The KL term's value, unweighted, ratio included."""
    flags: Tensor
    """uint8, CLIPPED_* of objectives/surrogates/base.py."""
    rollout_weight: Tensor
    """The rollout factor in ``policy``; empty, (0,), where no scheme was applied."""
    rollout_kl: Tensor
    """The value of the KL to the sampler, unweighted, ratio included, 0 where the sampler's log-prob is NaN; empty
    without that term."""


class Request(NamedTuple):
    """A call that a backend is asked whether it can serve."""

    device: torch.device
    """The logits' device."""
    dtype: torch.dtype = torch.float32
    vocab: int = 32768
    """Columns of the logits; 0: log-probs are given."""
    fused: bool = False
    """Whether the one-pass loss is asked for, not log-probs and their backward."""
    softcap: bool = False
    teacher: torch.dtype | None = None
    """Of a teacher's logits, whose rows come beside the policy's; None: no teacher."""
    by_name: bool = False
    """Whether the user named the backend. In automatic choice ``cuda`` has to be proven on such a device."""


class Backend(Protocol):
    """Kernels over rows. They write into tensors that the caller allocated."""

    def unsupported(self, request: Request) -> str | None:
        """Return the reason why it cannot serve a call, or None."""

    def log_probs(self, rows: Rows, stats: RowStats) -> None:
        """Write the statistics of every row."""

    def log_probs_backward(self, rows: Rows, stats: RowStats, gradients: RowGradients, out: Tensor) -> None:
        """Write the logits' gradient; ``out`` is shaped like the logits and may be the logits."""

    def token_sums(
        self,
        values: TokenValues,
        masked_in: Tensor,
        inputs: TokenInputs,
        records: TokenRecords,
        kl_estimator: int,
        sequences: int,
        loss: Tensor,
        sums: Tensor,
    ) -> None:
        """Reduce records to the loss (0-d) and the sums behind its metrics (``metrics.OF_KERNELS``, fp64).

        ``masked_in`` (bool) counts in the denominators, ``kl_estimator`` is 1 + its place in ``kl.ESTIMATORS``.
        """

    def divergence(
        self, rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, out: DivergenceStats
    ) -> None:
        """Write every row's divergence, 0 at dead rows. Both have their ``log_probs``, of one vocabulary and the same
        token; ``kind`` is the place in objectives/divergence.KINDS, its mix one of the policy's numbers."""

    def divergence_backward(
        self,
        rows: Rows,
        stats: RowStats,
        teacher: Rows,
        teacher_stats: RowStats,
        kind: int,
        divergence: DivergenceStats,
        gradients: RowGradients,
        grad_divergence: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient in the policy's logits: that of ``log_probs_backward`` and ∂loss/∂D times D's.

        ``out`` is shaped like the logits and may be the logits. Where ``grad_divergence`` is 0 the divergence has no
        part, whatever it is.
        """

    def rescale(self, gradient: Tensor, upstream: Tensor, announced: Tensor) -> None:
        """Multiply a gradient by upstream / announced in place, unless they are equal."""


class FusedBackend(Backend, Protocol):
    """A backend that serves the one-pass loss, and the maths of tokens in a kernel of their own."""

    def fused_loss(
        self, rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, stats: RowStats, records: TokenRecords, out: Tensor
    ) -> None:
        """Write statistics, records and the gradient of every row while its logits are read once."""

    def token_terms(
        self,
        values: TokenValues,
        numbers: Tensor,
        inputs: TokenInputs,
        spec: ObjectiveSpec,
        records: TokenRecords,
        grad_log_prob: Tensor,
    ) -> None:
        """Write the records and ∂loss/∂ℓ of tokens whose log-probs are known (``calls/terms.py`` has the maths)."""


class PairBackend(FusedBackend, Protocol):
    """A backend whose one pass takes the teacher's rows beside the policy's."""

    def fused_divergence(
        self,
        rows: Rows,
        teacher: Rows,
        kind: int,
        inputs: TokenInputs,
        weight: Tensor,
        spec: ObjectiveSpec,
        stats: RowStats,
        teacher_stats: RowStats,
        divergence: DivergenceStats,
        records: TokenRecords,
        out: Tensor,
    ) -> None:
        """``fused_loss`` with Σ weight·D in the loss, while a row and its teacher's are read once.

        Its numbers have the bits of ``log_probs`` and ``divergence``; ``cuda``'s, where a pair has the slices of a row
        alone. ``cpu``'s reverse KL makes the teacher's statistics of the policy's exponentials: not its bits, and its
        anchor is its logit at the policy's largest, with a shift to match. A backend without this function
        takes two passes."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Let launches go to that GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
