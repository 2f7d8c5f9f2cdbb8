"""Batches that make tests bite: ragged masks, ratios on both sides of each bound, advantages of both signs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import (
    KL,
    Cispo,
    Clip,
    DppoKL,
    DppoTV,
    Dro,
    Gmpo,
    LossConfig,
    LossOutput,
    MaskedIS,
    OffPolicyMask,
    Reinforce,
    Rejection,
    Sapo,
    TruncatedIS,
    Unclipped,
    Vespo,
    grpo_loss,
)
from grpo_kernels.verification import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter (conftest.py)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Case:
    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    mask: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.advantages, self.mask

    def run(self, backend: str | None = None, scale: float = 1.0, **options: Any) -> tuple[LossOutput, Tensor]:
        """Loss and the gradient in the logits of ``scale * loss``."""
        leaf = self.logits.detach().clone().requires_grad_()
        out = grpo_loss(leaf, *self.arguments, backend=backend, **{**self.options, **options})
        (out.loss * scale).backward()
        return out, leaf.grad

    def reference(self, **options: Any) -> tuple[LossOutput, Tensor]:
        leaf = self.logits.detach().clone().requires_grad_()
        out = reference.grpo_loss(leaf, *self.arguments, **{**self.options, **options})
        out.loss.backward()
        return out, leaf.grad


def make(
    batch: int = 6,
    length: int = 9,
    vocab: int = 97,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    shift: float = 0.0,
    noise: float = 0.3,
    extra_row: bool = True,
    empty: bool = True,
    **options: Any,
) -> Case:
    """Padded (B, T[+1], V) logits with old and ref log-probs at ``noise`` nats from the policy's.

    Sequence 1 is empty if ``empty`` (and there are several); the others are of random length with a hole.
    """
    with torch.device("cpu"):  # the same numbers on every device
        case = _draw(batch, length, vocab, dtype, seed, spread, shift, noise, extra_row, empty, options)
    case.options = {k: _on_device(v) for k, v in case.options.items()}
    return Case(*map(_on_device, (case.logits, *case.arguments)), case.options)


def _on_device(value: Any) -> Any:
    return value.to(torch.get_default_device()) if isinstance(value, Tensor) else value


def _draw(
    batch: int, length: int, vocab: int, dtype: torch.dtype, seed: int, spread: float, shift: float, noise: float,
    extra_row: bool, empty: bool, options: dict[str, Any],
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(batch, length + int(extra_row), vocab, generator=g) + shift).to(dtype)
    ids = torch.randint(vocab, (batch, length), generator=g)
    lengths = torch.randint(1, length + 1, (batch,), generator=g)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    mask &= torch.rand(batch, length, generator=g) < 0.9
    if batch:
        mask[0, 0] = True
    if empty and batch > 1:
        mask[1] = False
    advantages = torch.randn(batch, generator=g)
    if batch > 2:
        advantages[2] = 0.0
    transform = {k: options[k] for k in ("temperature", "logit_scale", "logit_softcap") if k in options}
    log_probs = exact_log_probs(logits[:, :length], ids, **transform)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def near() -> Tensor:
        return (log_probs + noise * torch.randn(batch, length, generator=g, dtype=torch.float64)).to(real)

    return Case(logits, ids, advantages, mask, {"old_log_probs": near(), "ref_log_probs": near(), **options})


def exact_log_probs(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None
) -> Tensor:
    """float64 log-probs by plain log_softmax."""
    z = logits.double() * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return torch.log_softmax(z / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)


SURROGATES = (
    *(Reinforce(), Unclipped(), Clip(0.2, 0.28), Clip(0.2, 0.2, dual=2.0)),
    *(Cispo(cap=1.1), Cispo(low=0.1, high=0.2), Sapo(1.0, 1.7), Dro(0.3), Vespo(), Gmpo(0.1, 0.15)),
    *(DppoTV(0.01, 0.02), DppoTV(0.01, 0.02, cap=1.2), DppoKL(2e-3, 1e-3), DppoKL(2e-3, 1e-3, cap=1.2)),
)
ONE_PASS = tuple(surrogate for surrogate in SURROGATES if surrogate.kernel_id is not None)
KLS = (
    KL(),
    KL(0.1),
    KL(0.1, "k1"),
    KL(0.1, "k2"),
    KL(0.1, ratio_weighted=True),
    KL(0.1, "k1", ratio_weighted=True),
    KL(0.1, "k2", ratio_weighted=True),
    KL(0.1, "k3", gradient="straight_through_k2"),
    KL(0.1, "abs"),
    KL(0.1, "abs", ratio_weighted=True),
    KL(0.1, "k1", gradient="weighted_k2", ratio_cap=1.1),
    KL(0.1, gradient="score_function"),
    KL(0.1, "k2", gradient="score_function", limit=(0.25, 0.02)),
    KL(0.1, limit=(0.25, 0.02)),
    KL(0.1, ratio_weighted=True, limit=(0.25, 0.02)),
)


LEVELS = ("token", "sequence", "sequence_token", "sequence_product")
RUNNING = ("prefix_product", "prefix_min")
"""Levels at which every token has a ratio of its own, that of the tokens up to it."""
ROLLOUTS = (
    *(TruncatedIS(1.1), TruncatedIS(1.2, 0.9), MaskedIS(0.8, 1.2), Rejection(0.8, 1.2)),
    *(TruncatedIS(1.1, level="sequence"), MaskedIS(0, 1.3, "sequence"), MaskedIS(0.9, 1.1, "geometric")),
    *(OffPolicyMask(0.02), (TruncatedIS(math.inf), Rejection(0.9, 1.1, "geometric"))),
    (MaskedIS(0.5, 2.0), MaskedIS(0.5, 2.0, "sequence"), OffPolicyMask(0.05)),
)
"""Every rollout scheme and level, and several at once."""


def configs() -> list[LossConfig]:
    """Every surrogate, level, aggregation, KL form and entropy setting at least once, crossed where they interact.

    Surrogate x level interact (the ratio), KL x level (the ratio's share), nothing else does: aggregations are only a
    weight, so each appears once per level, and entropy is added to every third config.
    """
    out = []
    for surrogate in SURROGATES:
        for level in LEVELS:
            if level == "token" or surrogate.uses_ratio:
                out.append(LossConfig(surrogate, level=level))
    for level in LEVELS:
        out += [LossConfig(Clip(0.2, 0.28), level=level, kl=kl) for kl in KLS]
        for aggregation in ("token_mean", "sequence_sum", "constant", "group_mean"):
            lengths = {"constant_length": 11, "group_size": 2}
            out.append(LossConfig(Clip(), level=level, aggregation=aggregation, kl=KL(0.05), **lengths))
    for i, surrogate in enumerate(one for one in SURROGATES if one.uses_ratio):
        kl = KL(0.1, ratio_weighted=True) if i % 3 == 0 else KL()
        out.append(LossConfig(surrogate, level=RUNNING[i % 2], kl=kl))
    for level, other in (RUNNING, RUNNING[::-1], ("token", "prefix_product"), ("prefix_min", "token")):
        for kl in (KL(0.1, ratio_weighted=True, level=other), KL(0.1, "k1", "weighted_k2", level=other)):
            out.append(LossConfig(Clip(0.2, 0.28), level=level, kl=kl))
    for i, kl in enumerate(KLS[1:]):
        level = (*LEVELS, *RUNNING)[i % 6]
        out.append(LossConfig(Clip(0.2, 0.28), level=level, kl=KLS[(i * 3) % len(KLS)], rollout_kl=kl))
    import dataclasses

    mixed = []
    for i, config in enumerate(out):
        if i % 3 == 0:
            own = "token_mean" if i % 2 else None
            config = dataclasses.replace(config, entropy_coef=0.05, entropy_aggregation=own)
        mixed.append(config)
    return list(dict.fromkeys(mixed))


def one_of_each() -> list[LossConfig]:
    """Each surrogate at its own level, each level, aggregation and kind of rollout scheme once."""
    own = {"vespo": "sequence_product", "gmpo": "sequence"}
    out = [LossConfig(surrogate, level=own.get(surrogate.name, "token")) for surrogate in SURROGATES]
    lengths = {"constant_length": 11, "group_size": 2, "entropy_coef": 0.05}
    for i, level in enumerate(LEVELS):
        aggregation = ("token_mean", "sequence_sum", "constant", "group_mean")[i]
        kl = KL(0.1, ratio_weighted=True)
        out.append(LossConfig(Clip(0.2, 0.28), level=level, aggregation=aggregation, kl=kl, **lengths))
    for level in RUNNING:
        out.append(LossConfig(Clip(0.2, 0.28), level=level, kl=KL(0.1, ratio_weighted=True), rollout=ROLLOUTS[-1]))
    out += [LossConfig(Clip(0.2, 0.28), rollout=scheme, kl=KL(0.05)) for scheme in ROLLOUTS[2::2]]
    out += [LossConfig(kl=KL(0.05), rollout_kl=KL(0.2, "k2")), LossConfig(rollout_kl=KL(0.2, ratio_weighted=True))]
    return [*out, LossConfig(Vespo(), level="sequence_product", kl=KL(0.1, ratio_weighted=True, level="token"))]


def sampler(case: Case, scale: float = 0.25) -> Tensor:
    """The sampler's log-probs near the case's own, one of them unknown."""
    g = torch.Generator().manual_seed(7)
    options = {k: case.options[k] for k in ("temperature", "logit_scale", "logit_softcap") if k in case.options}
    near = exact_log_probs(case.logits[:, : case.token_ids.shape[1]].cpu(), case.token_ids.cpu(), **options)
    out = near + scale * torch.randn(near.shape, generator=g, dtype=torch.float64, device="cpu")
    b, t = case.mask.nonzero()[1].tolist()
    out[b, t] = math.nan
    return _on_device(out.to(torch.float64 if case.logits.dtype == torch.float64 else torch.float32))


def label(config: LossConfig) -> str:
    """A short, unique test id."""
    kl = config.kl
    parts = [repr(config.surrogate), config.level, config.aggregation]
    if kl.coef:
        parts.append(f"{kl.estimator}{'-r' * kl.ratio_weighted}{f'-{kl.gradient}' * (kl.gradient != 'pathwise')}")
        parts += ["limits"] if kl.limit != KL().limit else []
    parts += [repr(config.rollout_kl)] if config.rollout_kl.coef else []
    parts += [repr(scheme) for scheme in config.schemes]
    parts += ["entropy" + (config.entropy_aggregation or "")] if config.entropy_coef else []
    return "-".join(parts).replace(" ", "")
