"""The per-token maths: slopes against autograd, C++ against Python, accuracy where fp32 cancels."""

from __future__ import annotations

import math

import pytest
import torch
from cases import KLS, ONE_PASS, SURROGATES

from grpo_kernels import KL, Cispo, Clip, DppoTV, Gmpo, LossConfig, MaskedIS, Rejection, TruncatedIS, backends
from grpo_kernels.backends.contract import TokenInputs, TokenRecords, TokenValues
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.calls.terms import token_terms
from grpo_kernels.calls.token_batch import TokenBatch
from grpo_kernels.objectives.kl import kl_terms
from grpo_kernels.objectives.maths import k3_of, times
from grpo_kernels.objectives.sequences import Padded
from grpo_kernels.objectives.surrogates import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, Point
from grpo_kernels.verification import reference


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


def steepness(surrogate, ratio):
    """How much larger the relative error of a slope is than that of its ratio, where that is not 1: the exponents of
    SAPO's gate and VESPO's weight are multiples of the ratio."""
    return 1 + 3 * ratio if surrogate.name in ("sapo", "vespo") else 1.0


def reference_value(surrogate, log_prob, old, advantages):
    """The reference's value and flags, one token a sequence."""
    count = len(log_prob)
    places = (torch.arange(count), count, LossConfig(surrogate), torch.ones_like(log_prob))
    return reference.VALUES[surrogate.name](
        surrogate, reference.Inputs(log_prob, old, advantages, log_prob - old, *places)
    )


def batch_of(log_prob, old, ref, advantages, **weights) -> TokenBatch:
    """A batch of one live sequence."""
    everything = torch.ones(1, len(log_prob), dtype=torch.bool)
    tensors = {"policy_weight": torch.ones_like(log_prob), "old": old, "ref": ref, "advantage": advantages}
    options = {**dict.fromkeys(TokenInputs._fields), **tensors, **weights}
    options = {name: value[None] if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    inputs = TokenInputs(**{name: options.pop(name) for name in TokenInputs._fields})
    return TokenBatch(live=everything, masked_in=everything, sequences=Padded(1), inputs=inputs, **options)


def python_terms(config, log_prob, old, ref, advantages, entropy=None, **weights):
    """terms.token_terms on one sequence: (n,) policy, KL, flags, rollout weight and slope."""
    batch = batch_of(log_prob, old, ref, advantages, **weights)
    records, slope = token_terms(config, batch, log_prob[None], None if entropy is None else entropy[None])
    return [x[0] if x.numel() else x for x in (*records, slope)]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_slope_is_the_derivative(surrogate):
    log_prob, old, _, advantages = grid()
    leaf = log_prob.clone().requires_grad_()
    value, _ = reference_value(surrogate, leaf, old, advantages)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    got = python_terms(LossConfig(surrogate), log_prob, old, None, advantages)[-1]
    ratio = (log_prob - old).clamp(-20, 20).exp()
    # SAPO: σ(1 - σ) cancels in autograd's way of computing it, where σ is nearly 1; ours does not.
    floor = 1e-12 * advantages.abs() * ratio if surrogate.name == "sapo" else 1e-300
    assert ((got - slope).abs() <= 1e-12 * steepness(surrogate, ratio) * slope.abs() + floor).all()
    assert (slope != 0).sum() > 1000


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_value_is_the_references(surrogate):
    log_prob, old, _, advantages = grid()
    expected, bounded = reference_value(surrogate, log_prob, old, advantages)
    value, _, flags, *_ = python_terms(LossConfig(surrogate), log_prob, old, None, advantages)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-300)
    if bounded is not None:
        assert torch.equal(sum(bounded[i].to(torch.uint8) << i for i in range(3)), flags)
        assert 100 < (flags != 0).sum() < len(flags) - 100


@pytest.mark.parametrize("kl", KLS[1:], ids=str)
def test_kl_slopes_are_derivatives(kl):
    log_prob, old, ref, _ = grid()
    leaf = log_prob.clone().requires_grad_()
    ratio = (log_prob - old).clamp(-20, 20).exp()
    value = reference.kl_penalty(kl, leaf - ref, ratio)
    (slope,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    terms = kl_terms(kl, log_prob - ref, ratio)
    torch.testing.assert_close(terms.value, value.detach(), rtol=1e-11, atol=1e-14)
    # score function: k and its slope cancel in autograd's sum of them
    size = slope.abs() + (terms.value.abs() if kl.gradient == "score_function" else 0)
    assert ((terms.slope - slope).abs() <= 1e-11 * size + 1e-14).all()
    if kl.gradient == "pathwise":
        ratio = (leaf - old).clamp(-20, 20).exp()
        (slope,) = torch.autograd.grad((ratio * reference.kl_penalty(kl, leaf - ref, ratio)).sum(), leaf)
        inside = (log_prob - old).abs() <= 20
        got = ratio.detach() * torch.where(inside, terms.slope_with_ratio, terms.slope)
        # the sum k + k' cancels in autograd's way of computing it; ours does not
        size = ratio.detach() * (terms.value.abs() + terms.slope.abs() + 1)
        assert ((got - slope).abs() <= 1e-12 * size + 1e-12 * slope.abs()).all()


def point(ratio, advantage) -> Point:
    """Tokens of probability ½ at these ratios."""
    log_prob = torch.full_like(ratio, -0.6931)
    return Point(log_prob, ratio.log(), ratio, advantage, log_prob - ratio.log())


def test_clip_table():
    """The 2 x 2 table of the min-clip: which side of the band, which sign of the advantage."""
    clip = Clip(0.2, 0.3, dual=3.0)
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    terms = clip.terms(point(ratio, advantage))
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
    assert (clip.terms(point(torch.stack([low, high]), one)).flags == 0).all()
    assert clip.terms(point(beyond, one)).flags.tolist() == [1, 2]
    assert (clip.terms(point(beyond, one)).slope == 0).all()


def test_bounds_of_log_ratios_are_inclusive():
    at = torch.tensor([-0.5, 0.25])
    beyond, advantage = torch.nextafter(at, at * 2), torch.tensor([-1.0, 1.0])
    for log_ratio, inside, flags in ((at, True, [0, 0]), (beyond, False, [1, 2])):
        clipped = Gmpo(low=0.5, high=0.25).clip_log_ratios(log_ratio, advantage)
        assert clipped.log_ratio.tolist() == at.tolist()
        assert (clipped.free == inside).all()
        assert clipped.flags.tolist() == flags


def test_infinite_ratio_is_selected_not_masked():
    ratio = torch.tensor([math.inf, math.inf, math.inf])
    advantage = torch.tensor([1.0, 0.0, -1.0])
    terms = Clip(0.2, 0.2).terms(point(ratio, advantage))
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


def kernel_terms(backend, config: LossConfig, log_prob, old, ref, advantages, rollout, entropy, threshold, weights):
    """csrc/common/surrogates.h, or Triton's twin, on the same numbers."""
    numbers = numbers_vector(LogitArgs(), 1.0, config, log_prob.dtype, log_prob.device, threshold)
    policy, kl, slope, rollout_kl = (torch.empty_like(log_prob) for _ in range(4))
    flags = torch.empty_like(log_prob, dtype=torch.uint8)
    rollout_weight = torch.empty_like(log_prob) if config.schemes else log_prob.new_empty(0)
    live = torch.ones(log_prob.shape, dtype=torch.bool)
    policy_weight, kl_weight, *of_sampler = weights
    spec = objective_spec(config, True, config.schemes, bool(of_sampler))
    values = TokenValues(log_prob, entropy, live)
    inputs = TokenInputs(advantages, policy_weight, old, ref, rollout, kl_weight, None, *(of_sampler or [None]))
    rollout_kl = rollout_kl if of_sampler else log_prob.new_empty(0)
    records = TokenRecords(policy, kl, flags, rollout_weight, rollout_kl)
    backends.get(backend).token_terms(values, numbers, inputs, spec, records, slope)
    return *records, slope


def assert_twins_agree(twin, config, dtype, with_old, threshold=None, with_rollout=True):
    """The languages on one grid: 4 ULP of the terms that are added; flags but for a bound's edge."""
    log_prob, old, ref, advantages = grid(dtype, 20000 if twin == "cpu" else 2048)  # the interpreter is slow
    log_prob[5], old[5], log_prob[6], ref[7] = -math.inf, -math.inf, -math.inf, -math.inf
    old = old if with_old else None
    rollout = (log_prob if old is None else old).roll(1).maximum(log_prob - 0.3)
    rollout[::40] = math.nan
    rollout = rollout if with_rollout else None
    entropy = torch.linspace(0, 3, len(log_prob), dtype=dtype)
    weights = (torch.full_like(log_prob, 0.37), torch.full_like(log_prob, 0.11))
    options = {"policy_weight": weights[0], "kl_weight": weights[1], "rollout": rollout, "schemes": config.schemes}
    options["entropy_threshold"] = threshold
    if config.rollout_kl.coef:
        weights = (*weights, torch.full_like(log_prob, 0.23))
        options["rollout_kl_weight"] = weights[2]
    expected = python_terms(config, log_prob, old, ref, advantages, entropy, **options)
    got = kernel_terms(twin, config, log_prob, old, ref, advantages, rollout, entropy, threshold, weights)
    eps = torch.finfo(dtype).eps
    same_side = got[2] == expected[2]
    if config.schemes:
        same_side &= (got[3] == 0) == (expected[3] == 0)
    assert (~same_side).sum() <= 2  # exp of the two languages may differ in the last place, on a bound
    ratio = 1.0 if old is None else (log_prob - old).clamp(-20, 20).exp().nan_to_num(nan=1.0)
    steep = steepness(config.surrogate, ratio)
    names = ("policy", "kl", "flags", "rollout_weight", "rollout_kl", "slope")
    for name, a, b in zip(names, got, expected, strict=True):
        if name == "flags" or not a.numel():
            continue
        size = b.abs() * (steep if name == "slope" else 1)
        if name == "slope":
            size = size + weights[1] * (expected[1].abs() + 1) + weights[0] * advantages.abs()
            size = size + (weights[2] * (expected[4].abs() + 1) if config.rollout_kl.coef else 0)
        close = (a == b) | ((a - b).abs() <= 4 * eps * size) | (a.isnan() & b.isnan())
        assert close[same_side].all(), (name, a[~close][:3], b[~close][:3])
    return got


CLIP = Clip(0.2, 0.2, dual=2.0)
TWINS = ("cpu", pytest.param("triton", marks=pytest.mark.nightly))
"""The interpreter takes half a second for each of these; ``test_triton_is_python`` is its sample."""
FORMS = [(surrogate, KL(0.1, ratio_weighted=True)) for surrogate in ONE_PASS] + [(CLIP, kl) for kl in KLS[1:]]


@pytest.mark.parametrize(("surrogate", "kl"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("twin", TWINS)
def test_twins_are_python(twin, surrogate, kl, dtype, with_old):
    """Surrogate and KL meet in the ratio alone: each KL with the clip, each surrogate with a KL that has it."""
    assert_twins_agree(twin, LossConfig(surrogate, kl=kl), dtype, with_old)


@pytest.mark.parametrize("scheme", [TruncatedIS(1.2, 0.9), MaskedIS(0.8, 1.2), Rejection(0.8, 1.2)], ids=str)
@pytest.mark.parametrize("surrogate", [CLIP, Cispo()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("twin", TWINS)
def test_twins_weigh_and_drop_tokens_alike(twin, surrogate, scheme, dtype, with_old):
    config = LossConfig(surrogate, kl=KL(0.1), rollout=scheme)
    *_, weight, _, _ = assert_twins_agree(twin, config, dtype, with_old, threshold=1.0)
    assert ((weight != 1) & (weight != 0)).double().mean() > 0.02 or isinstance(scheme, Rejection)
    assert (weight[::40] == 1).all()


@pytest.mark.parametrize("kl", KLS[1:], ids=str)
@pytest.mark.parametrize("to", ["sampler", "old"])
@pytest.mark.parametrize("twin", TWINS)
def test_twins_have_a_kl_to_the_sampler(twin, kl, to):
    """Beside one to the reference of another form; the sampler's log-probs are unknown at some tokens."""
    beside = KLS[1 + (KLS.index(kl) + 4) % (len(KLS) - 1)]
    config = LossConfig(CLIP, kl=beside, rollout_kl=kl)
    for dtype in (torch.float32, torch.float64):
        *_, of_sampler, _ = assert_twins_agree(twin, config, dtype, True, with_rollout=to == "sampler")
        assert (of_sampler[::40] == 0).all() == (to == "sampler")


@pytest.mark.parametrize("surrogate", ONE_PASS, ids=str)
def test_triton_is_python(surrogate):
    """Every arm, with a KL and a scheme in turn."""
    pytest.importorskip("triton")
    i = ONE_PASS.index(surrogate)
    kl, scheme = KLS[1 + i % (len(KLS) - 1)], (TruncatedIS(1.2, 0.9), MaskedIS(0.8, 1.2), Rejection(0.8, 1.2))[i % 3]
    config = LossConfig(surrogate, kl=kl, rollout=scheme, rollout_kl=KLS[-i])
    assert_twins_agree("triton", config, torch.float64 if i % 4 == 0 else torch.float32, i % 5 != 0, threshold=1.0)


def test_flags_of_surrogates_that_bound_without_stopping():
    ratio = torch.tensor([0.5, 0.5, 0.5, 1.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    low, high = CLIPPED_LOW, CLIPPED_HIGH
    band = Cispo(low=0.2, high=0.2).terms(point(ratio, advantage))
    assert band.flags.tolist() == [low, low, 0, 0, high, high, 0]
    assert band.direct.tolist() == pytest.approx([-0.8, 0.8, 0.0, -1.0, -1.2, 1.2, 0.0])
    assert Cispo(cap=2.0).terms(point(ratio, advantage)).flags.tolist() == [0, 0, 0, 0, high, high, 0]
    capped = DppoTV(1.0, 1.0, cap=2.0).terms(point(ratio, advantage))
    assert capped.flags.tolist() == [0, 0, 0, 0, CLIPPED_DUAL, CLIPPED_DUAL, 0]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_infinities_stay_where_they_are(surrogate):
    """No limit on the log-ratio: an infinite ratio, a token of probability 0, A = 0."""
    log_prob = torch.tensor([-1.0, -1.0, -1.0, -math.inf, -math.inf, -1.0], dtype=torch.float64)
    old = torch.tensor([-math.inf, -math.inf, -math.inf, -1.0, -math.inf, math.nan], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    config = LossConfig(surrogate, log_ratio_limit=None)
    value, *_, slope = python_terms(config, log_prob, old, None, advantages)
    if surrogate.flat_at_zero_advantage:
        assert value[2] == slope[2] == 0
    bounded = surrogate.name in ("cispo", "sapo", "vespo")
    if bounded:
        assert value[:3].isfinite().all()
    assert not slope[:5].isnan().any()
    if surrogate.uses_ratio and surrogate.name != "gmpo":
        assert value[5].isnan()


def test_reference_kl_is_the_exact_divergence():
    """Σ_a π(a)·k3(a) = KL(π, ref) = Σ_a π(a)·k1(a), and k2 has its gradient: what estimators estimate."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, -1)
    log_q = torch.log_softmax(torch.randn(7, dtype=torch.float64), -1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    p = log_p.exp().detach()
    for estimator in ("k1", "k3"):
        value = kl_terms(KL(1.0, estimator, limit=(None, None)), log_p.detach() - log_q, torch.ones(7)).value
        torch.testing.assert_close((p * value).sum(), exact.detach())
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for kl in (KL(1.0, "k3", "straight_through_k2"), KL(1.0, "k3", "score_function"), KL(1.0, "k1", "score_function")):
        slope = kl_terms(kl, log_p.detach() - log_q, torch.ones(7)).slope
        (estimated,) = torch.autograd.grad((p * slope * log_p).sum(), logits, retain_graph=True)
        torch.testing.assert_close(estimated, exact_gradient)
