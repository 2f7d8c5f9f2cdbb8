"""The loss in loops of 40-digit numbers, straight from the papers' formulas; imports nothing of the package.

It checks ``grpo_kernels.reference``, which checks everything else. Gradients are central differences of the value
at a step of 1e-15: no slope is written down here. Stop-gradients (the frozen part of GSPO-token's ratio, the old policy
when none is given, the straight-through KL) are values taken at the point where the derivative is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpmath import mp, mpf

mp.dps = 40
STEP = mpf(10) ** -15


@dataclass(frozen=True)
class Problem:
    """One batch as nested lists; ``sequences[i]`` lists the (b, t) of sequence i, masked ones left out."""

    logits: list  # [B][T][V]
    ids: list  # [B][T]
    advantages: list  # [B][T]
    sequences: list
    old: list | None = None
    ref: list | None = None
    token_weights: list | None = None
    surrogate: tuple = ("clip", 0.2, 0.2, None)
    level: str = "token"
    aggregation: str = "sequence_mean"
    constant_length: int | None = None
    group_size: int | None = None
    normalizer: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_straight_through: bool = False
    kl_ratio_weighted: bool = False
    kl_limit: tuple = (None, None)
    entropy_coef: float = 0.0
    entropy_token_mean: bool = False
    log_ratio_limit: float | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None


def _row(problem: Problem, logits: list) -> tuple[list, object]:
    """Log-probs of a row, and its entropy."""
    z = []
    for logit in logits:
        x = mpf(logit) * mpf(problem.logit_scale)
        if problem.logit_softcap is not None:
            x = mpf(problem.logit_softcap) * mp.tanh(x / mpf(problem.logit_softcap))
        z.append(x / mpf(problem.temperature))
    total = sum(mp.exp(x) for x in z)
    log_p = [x - mp.log(total) for x in z]
    return log_p, -sum(mp.exp(x) * x for x in log_p)


def _clamp(x, limit):
    if limit is None:
        return x
    return max(-mpf(limit), min(mpf(limit), x))


def _surrogate(problem: Problem, log_prob, ratio, advantage):
    name, *numbers = problem.surrogate
    if name == "reinforce":
        return -advantage * log_prob
    if name == "unclipped":
        return -ratio * advantage
    low, high, dual = numbers
    first = (ratio if dual is None else min(ratio, mpf(dual))) * advantage
    second = max(1 - mpf(low), min(1 + mpf(high), ratio)) * advantage
    return -min(first, second)


def _estimate(name: str, x):
    return {"k1": x, "k2": x * x / 2, "k3": mp.exp(-x) + x - 1}[name]


def log_probs(problem: Problem) -> dict:
    """Log-prob and entropy of every token that counts, by (b, t)."""
    out = {}
    for sequence in problem.sequences:
        for b, t in sequence:
            log_p, entropy = _row(problem, problem.logits[b][t])
            out[b, t] = (log_p[problem.ids[b][t]], entropy)
    return out


def _weight(problem: Problem, sequence_index: int) -> object:
    """Of a token of that sequence."""
    sequences = problem.sequences
    lengths = [len(s) for s in sequences]
    count = mpf(problem.normalizer if problem.normalizer is not None else max(len(sequences), 1))
    if problem.aggregation == "token_mean":
        tokens = problem.normalizer if problem.normalizer is not None else max(sum(lengths), 1)
        return 1 / mpf(tokens)
    if problem.aggregation == "sequence_mean":
        return 1 / (max(lengths[sequence_index], 1) * count)
    if problem.aggregation == "sequence_sum":
        return 1 / count
    if problem.aggregation == "constant":
        return 1 / (count * problem.constant_length)
    group = sequence_index // problem.group_size
    tokens = sum(lengths[group * problem.group_size : (group + 1) * problem.group_size])
    groups = problem.normalizer if problem.normalizer is not None else len(sequences) // problem.group_size
    return 1 / (mpf(max(tokens, 1)) * mpf(groups))


def loss(problem: Problem, frozen: dict | None = None, derivative: bool = False):
    """The loss; ``frozen`` are ``log_probs`` at the point that stop-gradients refer to (default: here).

    With ``derivative`` the value is one whose *derivative* is the gradient (it differs for straight-through KL only).
    """
    now = log_probs(problem)
    frozen = now if frozen is None else frozen
    tokens = sum(len(sequence) for sequence in problem.sequences)
    total = mpf(0)
    for i, sequence in enumerate(problem.sequences):
        if not sequence:
            continue
        w = _weight(problem, i)
        old = {bt: frozen[bt][0] if problem.old is None else mpf(problem.old[bt[0]][bt[1]]) for bt in sequence}
        pooled = sum(now[bt][0] - old[bt] for bt in sequence)
        frozen_mean = sum(frozen[bt][0] - old[bt] for bt in sequence) / len(sequence)
        for b, t in sequence:
            log_prob, entropy = now[b, t]
            log_ratio = {
                "token": log_prob - old[b, t],
                "sequence": pooled / len(sequence),
                "sequence_token": frozen_mean + log_prob - frozen[b, t][0],
                "sequence_product": pooled,
            }[problem.level]
            ratio = mp.exp(_clamp(log_ratio, problem.log_ratio_limit))
            u = mpf(1) if problem.token_weights is None else mpf(problem.token_weights[b][t])
            total += w * u * _surrogate(problem, log_prob, ratio, mpf(problem.advantages[b][t]))
            if problem.kl_coef:
                x = _clamp(log_prob - mpf(problem.ref[b][t]), problem.kl_limit[0])
                k = _clamp(_estimate(problem.kl_estimator, x), problem.kl_limit[1])
                if derivative and problem.kl_straight_through:
                    k = x * x / 2
                total += w * mpf(problem.kl_coef) * k * (ratio if problem.kl_ratio_weighted else 1)
            own = 1 / mpf(max(tokens, 1)) if problem.entropy_token_mean else w
            total -= own * mpf(problem.entropy_coef) * entropy
    return total


def gradient(problem: Problem) -> list:
    """d loss / d logits, [B][T][V], by central differences; rows outside every sequence are 0."""
    frozen = log_probs(problem)
    live = {bt for sequence in problem.sequences for bt in sequence}
    out = [[[0.0] * len(row) for row in batch] for batch in problem.logits]
    for b, t in live:
        for j in range(len(problem.logits[b][t])):
            values = []
            for sign in (1, -1):
                logits = [[list(row) for row in batch] for batch in problem.logits]
                logits[b][t][j] = mpf(logits[b][t][j]) + sign * STEP
                values.append(loss(replace(problem, logits=logits), frozen, derivative=True))
            out[b][t][j] = float((values[0] - values[1]) / (2 * STEP))
    return out
