"""The loss in loops of 40-digit numbers, straight from the papers' formulas; imports nothing of the package.

It checks ``grpo_kernels.reference``, which checks everything else. Gradients are central differences of the value
at a step of 1e-15: no slope is written down here. Stop-gradients (the frozen part of GSPO-token's ratio, the old policy
when none is given, CISPO's weights, rollout weights) are values taken at the point where the derivative is wanted.
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
    rollout: list | None = None  # None where unknown
    token_weights: list | None = None
    surrogate: tuple = ("clip", 0.2, 0.2, None)
    level: str = "token"
    aggregation: str = "sequence_mean"
    constant_length: int | None = None
    group_size: int | None = None
    normalizer: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "pathwise"
    kl_ratio_weighted: bool = False
    kl_ratio_cap: float = 10.0
    kl_level: str | None = None
    kl_limit: tuple = (None, None)
    rollout_kl: dict | None = None  # the fields of a second KL by their names above, to rollout, or old where None
    schemes: tuple = ()  # (kind, numbers by name)
    entropy_threshold: float | None = None
    entropy_coef: float = 0.0
    entropy_token_mean: bool = False
    log_ratio_limit: float | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    teacher: list | None = None  # [B][T][V]
    teacher_form: tuple = (1.0, 1.0, None)  # temperature, scale, softcap
    divergence: tuple | None = None  # (kind, mix)
    divergence_coef: float = 0.0


def _row(problem: Problem, logits: list) -> tuple[list, object]:
    """Log-probs of a row, and its entropy."""
    log_p = log_softmax(logits, problem.temperature, problem.logit_scale, problem.logit_softcap)
    return log_p, -sum(mp.exp(x) * x for x in log_p if x > -mp.inf)


def log_softmax(logits: list, temperature: float = 1.0, scale: float = 1.0, softcap: float | None = None) -> list:
    z = []
    for logit in logits:
        x = mpf(logit) * mpf(scale)
        if softcap is not None:
            x = mpf(softcap) * mp.tanh(x / mpf(softcap))
        z.append(x / mpf(temperature))
    total = mp.log(sum(mp.exp(x) for x in z))
    return [x - total for x in z]


def divergence(kind: str, mix: float, log_p: list, log_q: list):
    """D of a policy's row from a teacher's, nats; inf where it is."""
    p, q, w = ([mp.exp(x) for x in log_p], [mp.exp(x) for x in log_q], mpf(mix))
    if kind == "forward_kl":
        return _kl(q, p)
    if kind == "reverse_kl":
        return _kl(p, q)
    if kind == "mixed_kl":
        return w * _kl(q, p) + (1 - w) * _kl(p, q)
    if kind == "tvd":
        return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if kind == "skew_reverse_kl":
        return _kl(p, [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)])
    m = [(1 - w) * a + w * b for a, b in zip(p, q, strict=True)]
    if kind == "skew_forward_kl":
        return _kl(q, m)
    assert kind == "jsd"
    return w * _kl(q, m) + (1 - w) * _kl(p, m)


def _kl(p: list, q: list):
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return mp.inf
    return sum((a * mp.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), mpf(0))


def _clamp(x, limit):
    if limit is None:
        return x
    return max(-mpf(limit), min(mpf(limit), x))


@dataclass(frozen=True)
class Token:
    """What a surrogate sees; ``sg_`` values are those at the point where stop-gradients are taken."""

    log_prob: object
    old: object
    sg_log_prob: object
    log_ratio: object
    sg_log_ratio: object
    advantage: object


def _own_ratio(problem: Problem, log_ratio, advantage):
    """A token's log-ratio before pooling."""
    name, *numbers = problem.surrogate
    if name != "gmpo":
        return log_ratio
    low, high = numbers
    clipped = _between(-mpf(low), log_ratio, mpf(high))
    return min(log_ratio, clipped) if advantage > 0 else max(log_ratio, clipped) if advantage < 0 else log_ratio


def _between(low, x, high):
    return max(low, min(high, x))


def _surrogate(problem: Problem, t: Token):
    name, *numbers = problem.surrogate
    if name == "none":
        return mpf(0)
    A, ratio, sg_ratio = t.advantage, mp.exp(t.log_ratio), mp.exp(t.sg_log_ratio)
    if name == "reinforce":
        return -A * t.log_prob
    if name in ("unclipped", "gmpo"):
        return -ratio * A
    if name == "clip":
        low, high, dual = numbers
        first = (ratio if dual is None else min(ratio, mpf(dual))) * A
        return -min(first, _between(1 - mpf(low), ratio, 1 + mpf(high)) * A)
    if name == "cispo":
        cap, low, high = numbers
        weight = min(sg_ratio, mpf(cap)) if cap is not None else _between(1 - mpf(low), sg_ratio, 1 + mpf(high))
        return -weight * A * t.log_prob
    if name == "sapo":
        tau = mpf(numbers[0] if A > 0 else numbers[1])
        return -A * 4 / tau / (1 + mp.exp(-tau * (ratio - 1)))
    if name == "dro":
        return -A * t.log_prob + mpf(numbers[0]) / 2 * t.log_ratio**2
    if name == "vespo":
        k, lam = (mpf(x) for x in (numbers[:2] if A >= 0 else numbers[2:]))
        log_w = _between(mp.log(mpf("1e-8")), t.sg_log_ratio, mpf(20))
        return -mp.exp(lam + k * log_w - lam * mp.exp(log_w)) * A * t.log_prob
    low, high, cap = numbers
    p, q = mp.exp(t.sg_log_prob), mp.exp(t.old)
    moved = p - q
    if name == "dppo_kl":
        moved = (q * mp.log(q / p) + (1 - q) * mp.log((1 - q) / (1 - p))) * (1 if p > q else -1)
    if (A > 0 and moved > mpf(high)) or (A < 0 and moved < -mpf(low)):
        return mpf(0)
    return -ratio * A if cap is None else -min(sg_ratio, mpf(cap)) * A * t.log_prob


def _rollout_factor(problem: Problem, schemes: list, sequence: list, place: tuple, own: dict, behind: dict, advantage):
    """``own``: log rho of each known token (else 0); ``behind``: rollout - log-prob, likewise."""
    known = problem.rollout[place[0]][place[1]] is not None
    total = mpf(1)
    for kind, numbers in schemes:
        if kind == "OffPolicyMask":
            mean = sum(behind[bt] for bt in sequence) / len(sequence)
            total *= 1 if advantage >= 0 or mean <= mpf(numbers["threshold"]) else 0
            continue
        level = numbers["level"]
        if level == "token" and not known:
            continue
        log_rho = own[place] if level == "token" else sum(own[bt] for bt in sequence)
        log_rho = log_rho / len(sequence) if level == "geometric" else log_rho
        rho = mp.exp(_clamp(log_rho, problem.log_ratio_limit))
        low, high = mpf(numbers["low"]), mpf(numbers["high"])
        if kind == "TruncatedIS":
            total *= _between(low, rho, high)
        else:
            total *= 0 if rho < low or rho > high else rho if kind == "MaskedIS" else 1
    return total


def _estimate(name: str, x):
    return {"k1": x, "k2": x * x / 2, "k3": mp.exp(-x) + x - 1, "abs": abs(x)}[name]


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

    With ``derivative`` the value is one whose *derivative* is the gradient (it differs for some KL gradients only).
    """
    now = log_probs(problem)
    frozen = now if frozen is None else frozen
    tokens = sum(len(sequence) for sequence in problem.sequences)
    total = mpf(0)
    for i, sequence in enumerate(problem.sequences):
        if not sequence:
            continue
        w = _weight(problem, i)
        advantages = {(b, t): mpf(problem.advantages[b][t]) for b, t in sequence}
        old = {bt: frozen[bt][0] if problem.old is None else mpf(problem.old[bt[0]][bt[1]]) for bt in sequence}
        plain = {bt: now[bt][0] - old[bt] for bt in sequence}
        sg_plain = {bt: frozen[bt][0] - old[bt] for bt in sequence}
        own = {bt: _own_ratio(problem, plain[bt], advantages[bt]) for bt in sequence}
        sg_own = {bt: _own_ratio(problem, sg_plain[bt], advantages[bt]) for bt in sequence}
        factors = dict.fromkeys(sequence, mpf(1))
        if problem.schemes:
            sampled = {(b, t): problem.rollout[b][t] for b, t in sequence}
            rho = {bt: mpf(0) if x is None else old[bt] - mpf(x) for bt, x in sampled.items()}
            behind = {bt: mpf(0) if x is None else mpf(x) - frozen[bt][0] for bt, x in sampled.items()}
            in_ratio = [s for s in problem.schemes if problem.surrogate[0] == "vespo" and s[0] != "OffPolicyMask"]
            rest = [s for s in problem.schemes if s not in in_ratio]
            for bt in sequence:
                factors[bt] = _rollout_factor(problem, rest, sequence, bt, rho, behind, advantages[bt])
                if in_ratio:
                    folded = _rollout_factor(problem, in_ratio, sequence, bt, rho, behind, advantages[bt])
                    extra = mp.log(_between(mpf("1e-8"), folded, mp.exp(20)))
                    own[bt], sg_own[bt] = own[bt] + extra, sg_own[bt] + extra

        def pooled(each, frozen_each, bt, level=problem.level, sequence=sequence):
            mean = sum(each.values()) / len(sequence)
            before = sequence[: sequence.index(bt) + 1]
            frozen_mean = sum(frozen_each.values()) / len(sequence)
            log_ratio = {
                "token": each[bt],
                "sequence": mean,
                "sequence_token": frozen_mean + each[bt] - frozen_each[bt],
                "sequence_product": mean * len(sequence),
                "prefix_product": sum(each[s] for s in before),
                "prefix_min": each[min(reversed(before), key=frozen_each.get)],  # the last of equal ones
            }[level]
            return _clamp(log_ratio, problem.log_ratio_limit)

        for b, t in sequence:
            log_prob, entropy = now[b, t]
            log_ratio, sg_log_ratio = pooled(own, sg_own, (b, t)), pooled(sg_own, sg_own, (b, t))
            token = Token(log_prob, old[b, t], frozen[b, t][0], log_ratio, sg_log_ratio, advantages[b, t])
            u = mpf(1) if problem.token_weights is None else mpf(problem.token_weights[b][t])
            if problem.entropy_threshold is not None and frozen[b, t][1] < mpf(problem.entropy_threshold):
                u = mpf(0)
            total += w * u * factors[b, t] * _surrogate(problem, token)
            if problem.kl_coef:
                level = problem.kl_level or problem.level
                kl_ratio, sg_ratio = (pooled(each, sg_plain, (b, t), level) for each in (plain, sg_plain))
                penalty = _penalty(problem, log_prob, frozen[b, t][0], mpf(problem.ref[b][t]), sg_ratio, derivative)
                total += w * mpf(problem.kl_coef) * penalty * (mp.exp(kl_ratio) if problem.kl_ratio_weighted else 1)
            if problem.rollout_kl is not None:
                other = replace(problem, **problem.rollout_kl)
                sampler = (problem.rollout or problem.old)[b][t]
                level = other.kl_level or problem.level
                kl_ratio, sg_ratio = (pooled(each, sg_plain, (b, t), level) for each in (plain, sg_plain))
                if sampler is not None:
                    penalty = _penalty(other, log_prob, frozen[b, t][0], mpf(sampler), sg_ratio, derivative)
                    total += w * mpf(other.kl_coef) * penalty * (mp.exp(kl_ratio) if other.kl_ratio_weighted else 1)
            own_weight = 1 / mpf(max(tokens, 1)) if problem.entropy_token_mean else w
            total -= own_weight * mpf(problem.entropy_coef) * entropy
            if problem.divergence is not None:
                log_p = _row(problem, problem.logits[b][t])[0]
                log_q = log_softmax(problem.teacher[b][t], *problem.teacher_form)
                total += w * mpf(problem.divergence_coef) * divergence(*problem.divergence, log_p, log_q)
    return total


def _penalty(problem: Problem, log_prob, sg_log_prob, ref, sg_log_ratio, derivative: bool):
    x = _clamp(log_prob - ref, problem.kl_limit[0])
    k = _clamp(_estimate(problem.kl_estimator, x), problem.kl_limit[1])
    if not derivative or problem.kl_gradient == "pathwise":
        return k
    if problem.kl_gradient == "score_function":
        return k * mp.exp(log_prob - sg_log_prob)
    weight = 1 if problem.kl_gradient == "straight_through_k2" else min(mp.exp(sg_log_ratio), mpf(problem.kl_ratio_cap))
    return weight * x * x / 2


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
