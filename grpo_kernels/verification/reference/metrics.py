"""The metrics, from the outputs of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...objectives.config import LossConfig
from ...objectives.metrics import DIVERGENCE_SUMS, Metrics
from .terms import difference, estimate, sum_by


def metrics_of(
    config: LossConfig,
    terms: dict[str, Tensor | float],
    log_prob: Tensor,
    entropy: Tensor,
    log_ratio: Tensor,
    clipped: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    rho: Tensor,
    sequence: Tensor,
    sequences: int,
) -> Metrics:
    sums: dict[str, Tensor | float] = {**dict.fromkeys((*DIVERGENCE_SUMS, "outside_support"), 0.0), **terms}
    sums["impossible_tokens"] = (log_prob == float("-inf")).sum().double()
    sums["entropy_sum"] = entropy.double().sum()

    def sampled_kl(name: str, other: Tensor | None, estimators: tuple[str, ...], keep: Tensor | None = None) -> None:
        x = None if other is None else difference(log_prob, other).double()
        x = x if x is None or keep is None else x[keep]
        for estimator in estimators:
            key = "kl_sum" if name == "ref" else f"{estimator}_{name}_sum"
            sums[key] = 0.0 if x is None else estimate(estimator, x).sum()

    sampled_kl("ref", ref, (config.kl.estimator,))
    sums["kl_count"] = 0.0 if ref is None else float(len(log_prob))
    sampled_kl("old", old, ("k1", "k3"))
    known = None if rollout is None else ~rollout.isnan()
    sampled_kl("rollout", rollout, ("k1", "k3"), known)
    ratios = weights = log_prob.new_zeros(0).double()
    if known is not None:
        ratios = difference(log_prob if old is None else old, rollout)[known].double().exp()
        weights = rho[known].double()
    sums["rollout_count"] = float(len(ratios))
    sums["rollout_unknown"] = 0.0 if known is None else (~known).sum().double()
    for name, values in (("rollout_ratio", ratios), ("rollout_weight", weights)):
        sums[f"{name}_sum"], sums[f"{name}_square_sum"] = values.sum(), (values * values).sum()
        sums[f"{name}_max"] = values.max() if len(values) else float("-inf")
    sums["rollout_rejected_count"] = (weights == 0).sum().double()

    clipped = torch.zeros(3, len(log_prob), dtype=torch.bool, device=log_prob.device) if clipped is None else clipped
    ratio = log_ratio.double().exp()
    if config.level.startswith("sequence"):  # one ratio for each sequence that has a token
        present = sum_by(sequence, torch.ones_like(ratio), sequences) > 0
        ratio = torch.zeros(sequences, dtype=ratio.dtype, device=ratio.device).index_copy(0, sequence, ratio)[present]
        clipped = torch.stack([sum_by(sequence, flag.double(), sequences) > 0 for flag in clipped])
    sums["ratio_sum"], sums["ratio_count"] = ratio.sum(), float(len(ratio))
    sums["ratio_min"] = ratio.min() if len(ratio) else float("inf")
    sums["ratio_max"] = ratio.max() if len(ratio) else float("-inf")
    sums["clipped_low"], sums["clipped_high"], sums["clipped_dual"] = clipped.sum(-1).double()
    return Metrics.of(**sums)
