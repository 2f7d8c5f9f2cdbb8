"""Divergences beside the packages that have them: TRL's chunked operator and Liger's JSD, and where TRL's is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_kernels import Divergence, LossConfig, Teacher, linear_grpo_loss, linear_token_divergence

pytestmark = pytest.mark.peers
N, V, H, WIDE = 12, 130, 16, 24
TRL = {0.0: "forward_kl", 1.0: "reverse_kl", 0.3: "jsd", 0.5: "jsd"}
"""TRL's and Liger's beta, and our name for the divergence; inside (0, 1) it is our mix."""


def heads(seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    policy = torch.randn(N, H, requires_grad=True), (0.5 * torch.randn(V, H)).requires_grad_(), torch.randn(V)
    return *policy, torch.randn(N, WIDE), 0.4 * torch.randn(V, WIDE), torch.randn(V)


def named(beta: float) -> Divergence:
    kind = TRL[beta]
    return Divergence(kind, mix=beta) if kind == "jsd" else Divergence(kind)


def trl_operator():
    pytest.importorskip("trl")
    import trl.trainer.utils  # noqa: F401  its backward needs it
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply


@pytest.mark.parametrize("beta", TRL)
@pytest.mark.parametrize("capped", [False, True])
def test_trl(beta, capped):
    """Per token, with temperature, and the scale and softcap of each model."""
    apply, (hidden, weight, bias, other, head, of_head) = trl_operator(), heads()
    forms = (0.8, 5.0, 1.2, 7.0) if capped else (1.0, None, 1.0, None)
    upstream = torch.randn(N)
    theirs = apply(hidden, weight, bias, other, head, of_head, beta, 0.7, *forms)[0]
    wanted = torch.autograd.grad((theirs * upstream).sum(), (hidden, weight))
    teacher = Teacher(hidden=other, weight=head, bias=of_head, logit_scale=forms[2], logit_softcap=forms[3])
    out = linear_token_divergence(
        hidden, weight, teacher, torch.zeros(N, dtype=torch.int64), bias=bias, divergence=named(beta), temperature=0.7,
        logit_scale=forms[0], logit_softcap=forms[1],
    )  # fmt: skip
    found = torch.autograd.grad((out.divergence * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(out.divergence, theirs.float(), rtol=1e-4, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_trl_distillation_loss():
    """The loss of its DistillationTrainer: the sum over completions over ``num_items_in_batch``."""
    apply, (hidden, weight, _, other, head, _) = trl_operator(), heads()
    mask = torch.arange(N) % 3 > 0
    theirs = (apply(hidden, weight, None, other, head, None, 1.0, 1.0)[0] * mask).sum() / mask.sum()
    config = LossConfig(surrogate=None, aggregation="token_mean", divergence=Divergence("reverse_kl"))
    ids, bounds = torch.zeros(N, dtype=torch.int64), torch.tensor([0, N])
    teacher = Teacher(hidden=other, weight=head)
    ours = linear_grpo_loss(hidden, weight, ids, None, mask, teacher=teacher, config=config, cu_seqlens=bounds).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    wanted, found = (torch.autograd.grad(loss, (hidden, weight)) for loss in (theirs, ours))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_trl_loses_small_divergences_and_masked_columns():
    """What keeps these from being one test with the others: a value that cancels, and NaN where both have -inf."""
    apply = trl_operator()
    torch.manual_seed(0)
    weight = torch.randn(V, H)
    hidden = torch.randn(4, H)
    other = hidden + 2e-4 * torch.randn(4, H)
    ids = torch.zeros(4, dtype=torch.int64)
    exact = linear_token_divergence(
        hidden.double(), weight.double(), Teacher(hidden=other.double(), weight=weight.double()), ids
    )
    ours = linear_token_divergence(hidden, weight, Teacher(hidden=other, weight=weight), ids).divergence
    theirs = apply(hidden, weight, None, other, weight, None, 1.0, 1.0)[0]
    assert float((theirs / exact.divergence - 1).abs().max()) > 0.05
    torch.testing.assert_close(ours.double(), exact.divergence, rtol=3e-2, atol=0)  # the GEMMs' rounding
    bias = torch.zeros(V).index_fill(0, torch.tensor([3]), -math.inf)
    masked = apply(hidden, weight, bias, other, weight, bias, 1.0, 1.0)[0]
    assert bool(masked.isnan().any())
    teacher = Teacher(hidden=other, weight=weight, bias=bias)
    assert bool(linear_token_divergence(hidden, weight, teacher, ids, bias=bias).divergence.isfinite().all())


@pytest.mark.parametrize("beta", TRL)
def test_liger(beta):
    """Its chunked JSD by tokens' mean; half a cross-entropy, its default, is left out."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, weight, _, other, head, _ = heads()
    labels = torch.arange(N).where(torch.arange(N) % 4 > 0, -100)
    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, temperature=0.7, compiled=False)
    theirs = module(hidden, weight, other, head, labels)
    config = LossConfig(surrogate=None, aggregation="token_mean", divergence=named(beta))
    options = {"config": config, "cu_seqlens": torch.tensor([0, N]), "temperature": 0.7}
    arguments = (labels.clamp(min=0), None, labels != -100)
    ours = linear_grpo_loss(hidden, weight, *arguments, teacher=Teacher(hidden=other, weight=head), **options).loss
    value = theirs if isinstance(theirs, torch.Tensor) else theirs[0]
    torch.testing.assert_close(ours, value, rtol=1e-5, atol=0)
    wanted, found = (torch.autograd.grad(loss, (hidden, weight)) for loss in (value, ours))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
