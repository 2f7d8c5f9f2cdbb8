"""The per-token maths: slopes against autograd, C++ against Python, accuracy where fp32 cancels."""

from __future__ import annotations

import math

import pytest
import torch
from cases import KLS, SURROGATES

from grpo_kernels import KL, Clip, LossConfig, backends, reference
from grpo_kernels.objective import TokenBatch, token_terms
from grpo_kernels.rows import Padded
from grpo_kernels.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.surrogates import k3_of, kl_terms, times


def grid(dtype: torch.dtype = torch.float64, count: int = 20000) -> tuple[torch.Tensor, ...]:
    """Log-probs, old, ref and advantages over all regimes, and the corners."""
    g = torch.Generator().manual_seed(1)
    log_prob = -5 * torch.rand(count, generator=g, dtype=torch.float64)
    wide = torch.where(torch.rand(count, generator=g) < 0.7, 0.4, 30.0)
    old = log_prob - wide * torch.randn(count, generator=g, dtype=torch.float64)
    ref = log_prob - wide.flip(0) * torch.randn(count, generator=g, dtype=torch.float64)
    advantages = torch.randn(count, generator=g, dtype=torch.float64)
    advantages[::50] = 0.0
    old[::70], ref[::90] = log_prob[::70], log_prob[::90]
    return tuple(x.to(dtype) for x in (log_prob, old, ref, advantages))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_slope_is_the_derivative(surrogate):
    log_prob, old, _, advantages = grid()
    difference = (log_prob - old).clamp(-20, 20)
    leaf = log_prob.clone().requires_grad_()
    ratio = (difference + (leaf - leaf.detach())).exp()
    value = torch.where(
        surrogate.terms(leaf, ratio, advantages).flags > 0, 0.0, surrogate.terms(leaf, ratio, advantages).value
    )
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(surrogate.terms(log_prob, ratio.detach(), advantages).slope, slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_value_is_the_references(surrogate):
    log_prob, old, _, advantages = grid()
    difference = (log_prob - old).clamp(-20, 20)
    expected, clipped = reference.VALUES[surrogate.name](surrogate, log_prob, difference, advantages)
    terms = surrogate.terms(log_prob, difference.exp(), advantages)
    torch.testing.assert_close(terms.value, expected, rtol=1e-13, atol=0)
    if clipped is not None:
        flags = sum(clipped[i].to(torch.uint8) << i for i in range(3))
        assert torch.equal(flags, terms.flags)


@pytest.mark.parametrize("kl", KLS[1:], ids=str)
def test_kl_slopes_are_derivatives(kl):
    log_prob, old, ref, _ = grid()
    leaf = log_prob.clone().requires_grad_()
    value = reference._kl(kl, leaf - ref)
    (slope,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    terms = kl_terms(kl, log_prob - ref)
    torch.testing.assert_close(terms.value, value.detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(terms.slope, slope, rtol=1e-11, atol=1e-14)
    if kl.gradient == "pathwise":
        ratio = (leaf - old).clamp(-20, 20).exp()
        (slope,) = torch.autograd.grad((ratio * reference._kl(kl, leaf - ref)).sum(), leaf)
        inside = (log_prob - old).abs() <= 20
        got = ratio.detach() * torch.where(inside, terms.slope_with_ratio, terms.slope)
        # the sum k + k' cancels in autograd's way of computing it; ours does not
        size = ratio.detach() * (terms.value.abs() + terms.slope.abs() + 1)
        assert ((got - slope).abs() <= 1e-12 * size + 1e-12 * slope.abs()).all()


def test_clip_table():
    """The 2 x 2 table of the min-clip: which side of the band, which sign of the advantage."""
    clip = Clip(0.2, 0.3, dual=3.0)
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    terms = clip.terms(ratio.log(), ratio, advantage)
    assert terms.value.tolist() == [-0.5, 0.8, -1.0, 1.0, -1.3, 2.0, -1.3, 3.0]
    assert terms.slope.tolist() == [-0.5, 0.0, -1.0, 1.0, 0.0, 2.0, 0.0, 0.0]
    assert terms.flags.tolist() == [0, 1, 0, 0, 2, 0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounds_are_inclusive(dtype):
    """At a bound the slope is that of r * A; the next number beyond it is clipped."""
    clip = Clip(0.2, 0.28)
    low, high, _ = (torch.tensor(x, dtype=dtype) for x in clip.parameters())
    beyond = torch.stack([torch.nextafter(low, low * 0), torch.nextafter(high, high * 2)])
    one = torch.tensor([-1.0, 1.0], dtype=dtype)
    assert (clip.terms(one, torch.stack([low, high]), one).flags == 0).all()
    assert clip.terms(one, beyond, one).flags.tolist() == [1, 2]
    assert (clip.terms(one, beyond, one).slope == 0).all()


def test_infinite_ratio_is_selected_not_masked():
    ratio = torch.tensor([math.inf, math.inf, math.inf])
    advantage = torch.tensor([1.0, 0.0, -1.0])
    terms = Clip(0.2, 0.2).terms(ratio, ratio, advantage)
    assert terms.value.tolist()[:2] == [pytest.approx(-1.2), 0.0]
    assert terms.slope.tolist()[:2] == [0.0, 0.0]
    assert terms.value[2] == math.inf
    assert math.isnan(times(torch.tensor(0.0), torch.tensor(math.nan)))


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 0.1, 0.49, 0.51, 1.0, 10.0])
def test_k3_is_accurate_for_small_differences(size):
    """exp(u) - u - 1 in fp32 is noise below 1e-3; the series is not."""
    u = torch.tensor([size, -size], dtype=torch.float32)
    exact = [math.fsum(x**k / math.factorial(k) for k in range(2, 90)) for x in u.double().tolist()]
    torch.testing.assert_close(k3_of(u).double(), torch.tensor(exact, dtype=torch.float64), rtol=6e-7, atol=0)


def kernel_terms(backend, config: LossConfig, log_prob, old, ref, advantages, policy_weight, kl_weight):
    """csrc/common/surrogates.h, or Triton's twin, on the same numbers."""
    numbers = numbers_vector(LogitArgs(), 1.0, config, log_prob.dtype, log_prob.device)
    outputs = {name: torch.empty_like(log_prob) for name in ("policy", "kl", "slope")}
    flags = torch.empty_like(log_prob, dtype=torch.uint8)
    live = torch.ones(log_prob.shape, dtype=torch.bool)
    inputs = (log_prob, live, numbers, advantages, policy_weight, old, ref, kl_weight)
    spec = list(objective_spec(config, with_kl=True))
    results = (outputs["policy"], outputs["kl"], flags, outputs["slope"])
    backends.get(backend).token_terms(*inputs, spec, *results)
    return outputs["policy"], outputs["kl"], flags, outputs["slope"]


@pytest.mark.parametrize("kl", KLS[1:], ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("twin", ["cpu", "triton"])
def test_twins_are_python(twin, surrogate, kl, dtype, with_old):
    """The languages on one grid: 4 ULP of the terms that are added; flags but for the clip's edge."""
    log_prob, old, ref, advantages = grid(dtype)
    log_prob[5], old[5], log_prob[6], ref[7] = -math.inf, -math.inf, -math.inf, -math.inf
    old = old if with_old else None
    config = LossConfig(surrogate, kl=kl)
    policy_weight, kl_weight = torch.full_like(log_prob, 0.37), torch.full_like(log_prob, 0.11)
    batch = TokenBatch(
        live=torch.ones(1, len(log_prob), dtype=torch.bool),
        masked_in=torch.ones(1, len(log_prob), dtype=torch.bool),
        sequences=Padded(1),
        advantages=advantages[None],
        old=None if old is None else old[None],
        ref=ref[None],
        rollout=None,
        policy_weight=policy_weight[None],
        kl_weight=kl_weight[None],
        entropy_weight=None,
    )
    expected = [x[0] for x in token_terms(config, batch, log_prob[None])]
    got = kernel_terms(twin, config, log_prob, old, ref, advantages, policy_weight, kl_weight)
    same_side = got[2] == expected[2]
    assert (~same_side).sum() <= 2  # exp of the two languages may differ in the last place, on a bound
    eps = torch.finfo(dtype).eps
    for name, a, b in zip(("policy", "kl", "flags", "slope"), got, expected, strict=True):
        if name == "flags":
            continue
        size = b.abs() if name != "slope" else b.abs() + (kl_weight * expected[1]).abs() + kl_weight
        close = (a == b) | ((a - b).abs() <= 4 * eps * size) | (a.isnan() & b.isnan())
        assert close[same_side].all(), (name, a[~close][:3], b[~close][:3])


def test_reference_kl_is_the_exact_divergence():
    """Σ_a π(a)·k3(a) = KL(π, ref) = Σ_a π(a)·k1(a), and k2 has its gradient: what estimators estimate."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, -1)
    log_q = torch.log_softmax(torch.randn(7, dtype=torch.float64), -1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    p = log_p.exp().detach()
    for estimator in ("k1", "k3"):
        value = kl_terms(KL(1.0, estimator, limit=(None, None)), log_p.detach() - log_q).value
        torch.testing.assert_close((p * value).sum(), exact.detach())
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    through = (p * kl_terms(KL(1.0, "k3", "straight_through_k2"), log_p.detach() - log_q).slope * log_p).sum()
    (estimated,) = torch.autograd.grad(through, logits)
    torch.testing.assert_close(estimated, exact_gradient)
