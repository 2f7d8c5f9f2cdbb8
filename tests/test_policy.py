"""policy_loss on every backend against the float64 reference, by the chain rule through plain log-softmax."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ROLLOUTS, SURROGATES, Case, configs, label, make, one_of_each, sampler

from grpo_kernels import (
    KL,
    Cispo,
    Clip,
    DppoKL,
    LossConfig,
    OffPolicyMask,
    Reinforce,
    Rejection,
    TruncatedIS,
    grpo_loss,
    normalizer,
    policy_loss,
    token_log_probs,
)
from grpo_kernels.verification import reference
from grpo_kernels.verification.verify import complete


def case_of(**options) -> Case:
    return make(dtype=torch.float64, **options)


def plain(logits, ids):
    """Log-probs and entropies (.., T) by autograd's own operations."""
    log_p = logits.narrow(-2, 0, ids.shape[-1]).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[..., None]).squeeze(-1), entropy


def check(case: Case, backend: str, **options):
    """Value, gradient through log-probs and entropies, metrics and outputs are the reference's."""
    given = {**case.options, **options}
    wanted, gradient = case.reference(**options)
    leaf = case.logits.clone().requires_grad_()
    log_probs, entropy = plain(leaf, case.token_ids)
    out = policy_loss(log_probs, case.advantages, case.mask, entropy=entropy, backend=backend, **given)
    out.loss.backward()
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-13)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(wanted, name), rtol=1e-11, atol=1e-12)
        assert not getattr(out, name).requires_grad
    for name, value in out.metrics.as_dict().items():
        assert value.item() == pytest.approx(wanted.metrics.as_dict()[name].item(), rel=1e-10, abs=1e-11), name
    assert out.route.passes == 0
    assert out.route.backend == backend
    assert out.route.reason.startswith("log-probs are given")
    return out


@pytest.mark.parametrize("config", configs(), ids=label)
def test_every_config(backend, config):
    check(case_of(noise=0.3 if config.level == "token" else 0.2), backend, config=config)


@pytest.mark.parametrize("name", LossConfig.presets())
def test_presets(backend, name):
    check(case_of(), backend, config=complete(name, kl=KL(0.05), entropy_coef=0.02))


@pytest.mark.parametrize("config", one_of_each(), ids=label)
def test_on_policy(backend, config):
    case = case_of(old_log_probs=None)
    check(case, backend, config=config, rollout_log_probs=sampler(case))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("scheme", ROLLOUTS, ids=str)
def test_rollout_correction(backend, scheme, old):
    case = case_of(batch=12, entropy_coef=0.02, kl_coef=0.05, **({} if old else {"old_log_probs": None}))
    for config in (LossConfig(Cispo(cap=1.1), rollout=scheme), LossConfig(rollout=scheme, level="sequence")):
        check(case, backend, config=config, rollout_log_probs=sampler(case))


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
def test_arguments(backend, level):
    """Each keyword means what it means for grpo_loss."""
    case, config = case_of(noise=0.15), LossConfig(Clip(), level=level, kl=KL(0.05), entropy_coef=0.01)
    threshold = float(plain(case.logits, case.token_ids)[1][case.mask].quantile(0.6))
    for options in (
        {"token_weights": torch.rand(case.mask.shape)},
        {"entropy_threshold": threshold},
        {"entropy_threshold": torch.tensor(threshold, dtype=torch.float64)},
        {"normalizer": 7.0},
        {"normalizer": normalizer(case.mask, config)},
        {"kl_coef": 0.3, "entropy_coef": torch.tensor(0.2)},
        {"kl_coef": 0.0, "entropy_coef": 0.0, "skip_zero_advantage": True, "ref_log_probs": None},
    ):
        check(case, backend, config=config, **options)
    per_token = Case(case.logits, case.token_ids, torch.randn(case.mask.shape), case.mask, case.options)
    check(per_token, backend, config=config)


@pytest.mark.parametrize("config", one_of_each()[::3], ids=label)
@pytest.mark.parametrize("flat", [True, False])
def test_packed(backend, config, flat):
    """(N,) and (1, N); rows before the first bound and past the last have no part."""
    case = case_of(noise=0.2, extra_row=False)
    bounds = torch.tensor([2, 13, 13, 30, 50])
    shape = (lambda t: t.reshape(-1, *t.shape[2:])) if flat else (lambda t: t.reshape(1, -1, *t.shape[2:]))
    options = {name: shape(value) for name, value in case.options.items()}
    if config.schemes:
        options["rollout_log_probs"] = shape(sampler(case))
    packed = Case(*map(shape, (case.logits, case.token_ids)), case.advantages[:4], shape(case.mask), options)
    out = check(packed, backend, config=config, cu_seqlens=bounds)
    assert out.log_probs.shape == packed.token_ids.shape


@pytest.mark.parametrize("config", [LossConfig(kl=KL(0.1), entropy_coef=0.1), LossConfig(level="sequence")], ids=label)
def test_masked_places_hold_anything(backend, config):
    """NaN and infinities there change no bit, and get a gradient of exactly 0."""
    case = case_of(noise=0.2)
    names = ("log_probs", "entropy", "old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights")
    clean = dict(zip(names, plain(case.logits, case.token_ids), strict=False))
    clean |= {**case.options, "rollout_log_probs": sampler(case), "token_weights": torch.rand(case.mask.shape).double()}
    outs = []
    for bad in (0.0, math.nan, math.inf, -math.inf):
        given = {name: torch.where(case.mask, clean[name], bad) for name in names}
        leaves = [given[name].requires_grad_() for name in ("log_probs", "entropy")]
        del given["log_probs"]
        out = policy_loss(leaves[0], case.advantages, case.mask, config=config, backend=backend, **given)
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
        assert all((gradient[~case.mask] == 0).all() for gradient in gradients)
        outs.append((out.loss.detach(), *gradients, out.metrics.vector, out.log_probs, out.entropy))
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_impossible_tokens(backend, surrogate):
    """A log-prob of -inf: as grpo_loss has it of a logit of -inf."""
    case = case_of(kl_coef=0.05, noise=0.1)
    b, t = case.mask.nonzero()[3].tolist()
    case.logits[b, t, case.token_ids[b, t]] = -math.inf
    wanted, _ = case.run("cpu" if backend == "cpu" else "torch", config=LossConfig(surrogate))
    log_probs = wanted.log_probs.clone().requires_grad_()
    given = {**case.options, "entropy": wanted.entropy, "config": LossConfig(surrogate), "backend": backend}
    out = policy_loss(log_probs, case.advantages, case.mask, **given)
    torch.testing.assert_close(out.loss, wanted.loss, equal_nan=True)
    torch.testing.assert_close(out.metrics.vector, wanted.metrics.vector, equal_nan=True)
    assert out.metrics.impossible_tokens == 1
    if out.loss.isfinite():
        (gradient,) = torch.autograd.grad(out.loss, log_probs)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5)])
def test_nothing_counts(backend, shape):
    """No sequence, no token, or all masked: a loss of 0 that has a gradient."""
    log_probs = torch.full(shape, -1.0, requires_grad=True)
    for config in ("grpo", "dapo", LossConfig(level="sequence", entropy_coef=0.1)):
        given = {"entropy": torch.ones(shape), "config": config, "backend": backend}
        out = policy_loss(log_probs, torch.ones(shape[0]), torch.zeros(shape), **given)
        assert out.loss == 0
        (gradient,) = torch.autograd.grad(out.loss, log_probs)
        assert gradient.shape == shape
        assert (gradient == 0).all()
        assert all(value == 0 for name, value in out.metrics.as_dict().items() if name != "sequences")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config", [LossConfig(Clip(), kl=KL(0.1), entropy_coef=0.1), LossConfig(Reinforce())], ids=label
)
def test_dtypes(backend, config, dtype):
    """Computed in fp32, of log-probs as they came; the gradient is rounded once, to their dtype."""
    case = make()
    log_probs, entropy = (t.to(dtype) for t in plain(case.logits, case.token_ids))
    options = {**case.options, "config": config}
    found = []
    for real, there in ((dtype, backend), (torch.float64, "torch")):
        leaves = [t.to(real).requires_grad_() for t in (log_probs, entropy)]
        out = policy_loss(leaves[0], case.advantages, case.mask, entropy=leaves[1], backend=there, **options)
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
        found.append((out.loss, *gradients))
    assert found[0][0].dtype == torch.float32
    for a, b in zip(*found, strict=True):
        assert a is found[0][0] or a.dtype == dtype
        rounding = {"rtol": 2 * torch.finfo(a.dtype).eps, "atol": 2 * torch.finfo(dtype).smallest_normal * 1e-3}
        torch.testing.assert_close(
            a.double(), b, **(rounding if a.dtype != torch.float32 else dict(rtol=1e-5, atol=1e-8))
        )


def test_rounded_log_probs_are_not_pooled():
    """What bf16 rounds off adds up over a sequence, whichever of the two log-probs has it; on-policy the ratio is 1."""
    log_probs, old, A = torch.full((2, 8), -1.0), torch.full((2, 8), -1.1), torch.ones(2)
    rollout = TruncatedIS(2.0, level="sequence")
    for given in (
        {"config": "gspo", "old_log_probs": old},
        {"config": LossConfig(kl=KL(0.1, ratio_weighted=True, level="sequence")), "old_log_probs": old}
        | {"ref_log_probs": old},
        {"config": LossConfig(rollout=rollout), "rollout_log_probs": old},
        {"config": LossConfig(rollout=OffPolicyMask(0.1)), "rollout_log_probs": old},
    ):
        with pytest.raises(ValueError, match=r"policy_loss: expected log_probs in float32 with .*; got torch.bfloat16"):
            policy_loss(log_probs.bfloat16(), A, **given)
        policy_loss(log_probs, A, **given)
    policy_loss(log_probs.bfloat16(), A, config="gspo")
    policy_loss(log_probs.bfloat16(), A, config="dapo", old_log_probs=old)
    policy_loss(log_probs.bfloat16(), A, config=LossConfig(rollout=rollout), old_log_probs=old, rollout_log_probs=old)


def test_logits_and_log_probs_agree(backend):
    """grpo_loss is token_log_probs and policy_loss."""
    case = make(entropy_coef=0.02, kl_coef=0.05)
    expected, gradient = case.run(backend, config="gspo")
    leaf = case.logits.clone().requires_grad_()
    tokens = token_log_probs(leaf, case.token_ids, case.mask, backend=backend)
    given = {**case.options, "entropy": tokens.entropy, "config": "gspo", "backend": backend}
    out = policy_loss(tokens.log_probs, case.advantages, case.mask, **given)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(leaf.grad, gradient)
    assert torch.equal(out.metrics.vector, expected.metrics.vector)


def test_backward_repeats(backend):
    """A second backward and any factor, as of PyTorch's own operations; a second derivative raises."""
    case = make(entropy_coef=0.1)
    leaves = [t.detach().requires_grad_() for t in plain(case.logits, case.token_ids)]
    given = {**case.options, "entropy": leaves[1], "backend": backend}
    loss = policy_loss(leaves[0], case.advantages, case.mask, **given).loss
    first, again = (torch.autograd.grad(factor * loss, leaves, retain_graph=True) for factor in (1.0, 4.0))
    for a, b in zip(first, again, strict=True):
        assert a.abs().sum() > 0
        assert torch.equal(4 * a, b)
    gradient = torch.autograd.grad(loss, leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second time|once_differentiable"):
        gradient.sum().backward()


def test_other_modes(backend):
    """no_grad, inference mode, and tensors that were made in it."""
    case = make(entropy_coef=0.1, kl_coef=0.1)
    log_probs, entropy = plain(case.logits, case.token_ids)

    def loss(log_probs, advantages, mask, entropy, **options):
        return policy_loss(log_probs, advantages, mask, entropy=entropy, backend=backend, **options)

    given = (log_probs.requires_grad_(), case.advantages, case.mask, entropy.requires_grad_())
    expected = loss(*given, **case.options)
    wanted = torch.autograd.grad(expected.loss, (log_probs, entropy))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = loss(*given, **case.options)
        assert torch.equal(out.loss, expected.loss)
        assert not out.loss.requires_grad
    with torch.inference_mode():
        others = [t.clone() for t in given[1:3]]
        options = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.options.items()
        }
    for token_losses in (False, True):
        out = loss(given[0], *others, given[3], **options, token_losses=token_losses)
        value = (
            (out.token_losses / case.mask.sum(-1, keepdim=True).clamp(min=1)).sum() / 6 if token_losses else out.loss
        )
        for a, b in zip(torch.autograd.grad(value, (log_probs, entropy)), wanted, strict=True):
            torch.testing.assert_close(a, b)


POOLED = LossConfig(level="sequence", kl=KL(0.1), entropy_coef=0.1)


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("config", "token_losses"),
    [("dapo", False), pytest.param(POOLED, True, marks=pytest.mark.nightly)],
    ids=["dapo", "token_losses"],
)
def test_compiled(config, token_losses, engine):
    """In one graph, with a length that changes."""

    def step(log_probs, entropy, advantages, mask, old, ref):
        given = {"entropy": entropy, "old_log_probs": old, "ref_log_probs": ref, "token_losses": token_losses}
        out = policy_loss(log_probs, advantages, mask, config=config, **given)
        return (out.token_losses * 0.1).sum() if token_losses else out.loss, out.metrics.vector, out.log_probs

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=engine)
    for length in (9, 7):
        case = make(length=length)
        found = []
        for function in (step, compiled):
            leaves = [t.detach().requires_grad_() for t in plain(case.logits, case.token_ids)]
            others = (case.options["old_log_probs"], case.options["ref_log_probs"])
            loss, *outputs = function(*leaves, case.advantages, case.mask, *others)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            found.append((loss, *outputs, *gradients))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_refused_by_name():
    log_probs, A, mask = torch.full((2, 3), -1.0), torch.ones(2), torch.ones(2, 3)
    old = {"old_log_probs": log_probs}

    def refused(match, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=match):
            policy_loss(*arguments, **options)

    bonus = r"policy_loss: expected entropy= with an entropy bonus; got none\.\n(.*\n)*  hint: entropy_coef=0"
    refused(bonus, log_probs, A, mask, entropy_coef=0.1)
    refused(bonus, log_probs, A, mask, config=LossConfig(entropy_coef=0.1))
    refused("expected entropy= with entropy_threshold=; got none", log_probs, A, mask, entropy_threshold=1.0)
    refused(r"log_probs \(B, T\), packed \(N,\) or \(1, N\); got 3 dimensions", log_probs[..., None], A, mask)
    refused(r"log_probs \(B, T\), packed \(N,\) or \(1, N\); got 0 dimensions", log_probs[0, 0], A)
    refused("log_probs to be a tensor; got None", None, A, mask, error=TypeError)
    refused("log_probs to be a tensor; got list", [[-1.0]], A, mask, error=TypeError)
    refused("advantages to be a tensor; got None", log_probs, None, mask, error=TypeError)
    refused("log_probs of a floating dtype; got torch.int64", log_probs.long(), A, mask, error=TypeError)
    refused("entropy of a floating dtype; got torch.int64", log_probs, A, mask, entropy=mask.long(), error=TypeError)
    for name, value in (("entropy", mask[:, :2]), ("old_log_probs", mask[:, :1]), ("ref_log_probs", mask[0])):
        refused(rf"{name} of shape \(2, 3\); got", log_probs, A, mask, **{name: value})
    refused(r"mask of shape \(2, 3\); got \(2, 2\)", log_probs, A, mask[:, :2])
    refused(r"advantages of shape .*; got \(3,\)", log_probs, torch.ones(3), mask)
    refused("advantages to be finite", log_probs, A * math.nan, mask)
    refused("mask to be finite and >= 0", log_probs, A, -mask)
    refused("ref_log_probs for the KL term", log_probs, A, mask, kl_coef=0.1)
    refused("rollout_log_probs", log_probs, A, mask, config=LossConfig(rollout=TruncatedIS(2.0)))
    refused("cu_seqlens with packed log_probs", log_probs.flatten(), A)
    refused("no normalizer= with token_losses=True", log_probs, A, mask, token_losses=True, normalizer=3.0)
    refused("backend", log_probs, A, mask, backend="nothing")
    refused("Did you mean 'grpo'", log_probs, A, mask, config="grppo")
    refused(r"log_probs <= 0; got 0.5 \(and as bad at 5 other live tokens", log_probs + 1.5, A, mask, check=True)
    refused("log_probs <= 0; got nan", log_probs * math.nan, A, mask, check=True)
    refused("old_log_probs <= 0; got 1", log_probs, A, mask, check=True, old_log_probs=-log_probs)
    policy_loss(torch.where(mask != 0, log_probs, 1.0), A, mask, **old, check=True)
    dead = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    policy_loss(torch.where(dead != 0, log_probs, 7.0), A, dead, **old, check=True)


def test_transforms_are_refused():
    A = torch.ones(2)
    given = {"entropy": torch.ones(2, 3), "entropy_coef": 0.1}
    with pytest.raises(RuntimeError, match=r"policy_loss: torch\.func"):
        torch.func.grad(lambda x: policy_loss(x, A, **given).loss)(torch.full((2, 3), -1.0))
    with pytest.raises(RuntimeError, match=r"policy_loss: torch\.func"):
        torch.func.grad(lambda x: policy_loss(torch.full((2, 3), -1.0), A, entropy=x, entropy_coef=0.1).loss)(
            torch.ones(2, 3)
        )


def test_constants_get_no_gradient():
    """Old, reference and rollout log-probs and advantages are constants, whatever they come from."""
    names = ("old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights")
    constants = {name: torch.full((2, 3), -1.2, requires_grad=True) for name in names[:3]}
    constants["token_weights"] = torch.ones(2, 3, requires_grad=True)
    A, log_probs = torch.ones(2, requires_grad=True), torch.full((2, 3), -1.0, requires_grad=True)
    policy_loss(log_probs, A, kl_coef=0.1, **constants).loss.backward()
    assert log_probs.grad.abs().sum() > 0
    assert A.grad is None
    assert all(value.grad is None for value in constants.values())


def test_the_equation_of_a_row():
    """One clipped token and one free one by hand."""
    old = torch.tensor([[-1.0, -2.0]])
    log_probs = torch.tensor([[-0.5, -2.1]], requires_grad=True)
    out = policy_loss(log_probs, torch.ones(1), old_log_probs=old, config="grpo")
    out.loss.backward()
    free = math.exp(-0.1)
    assert out.loss.item() == pytest.approx(-(1.2 + free) / 2)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, -free / 2]]))
    assert out.metrics.clip_high == 0.5
    assert reference.VALUES.keys() >= {surrogate.name for surrogate in SURROGATES}
    assert torch.equal(out.loss, grpo_loss_of(log_probs.detach(), old))


def grpo_loss_of(log_probs, old):
    """The same of two-column logits that have these log-probs."""
    logits = torch.stack([log_probs, torch.log1p(-log_probs.exp())], -1)
    return grpo_loss(logits, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1), old_log_probs=old).loss


def test_messages_speak_of_log_probs():
    """Not of ids and logits, which this function does not have."""
    log_probs, advantages = -torch.rand(2, 4), torch.ones(2)
    with pytest.raises(ValueError, match="one of log_probs and old_log_probs is shifted"):
        policy_loss(log_probs, advantages, old_log_probs=log_probs[:, 1:])
    with pytest.raises(TypeError, match=r"the order is \(log_probs, advantages, mask\)"):
        policy_loss(log_probs, advantages.bool())
    with pytest.raises(ValueError, match=r"\(log_probs, advantages, mask\)"):
        policy_loss(log_probs, advantages, -torch.rand(2, 4))
    with pytest.raises(RuntimeError, match="got float32 log-probs on meta"):
        policy_loss(log_probs.to("meta"), advantages.to("meta"), backend="cpu")


@pytest.mark.parametrize("log_prob", [0.0, -0.0, 1e-7, -1e-7])
def test_dppo_of_a_certain_token(backend, log_prob):
    """The KL from what was none is infinite: the sign of a zero, or a log-softmax's rounding above it, made it a NaN,
    which no bound stops."""
    log_probs = torch.tensor([[log_prob]], requires_grad=True)
    old = torch.tensor([[-3.0]])
    config = LossConfig(surrogate=DppoKL(0.05, 0.05))
    out = policy_loss(log_probs, torch.ones(1), old_log_probs=old, config=config, backend=backend)
    out.loss.backward()
    assert (out.loss.item(), log_probs.grad.item(), out.metrics.clip_high.item()) == (0, 0, 1)


def test_dppo_of_a_certain_token_from_logits(backend):
    """And in the reference: log-softmax gives +0."""
    ids, given = torch.tensor([[0]]), {"old_log_probs": torch.tensor([[-3.0]])}
    config = LossConfig(surrogate=DppoKL(0.05, 0.05))
    for loss, options in ((grpo_loss, {"backend": backend}), (reference.grpo_loss, {})):
        logits = torch.tensor([[[200.0, 0, 0]]], requires_grad=True)
        out = loss(logits, ids, torch.ones(1), **given, config=config, **options)
        out.loss.backward()
        assert out.loss.item() == 0
        assert not logits.grad.any()


def test_a_rejection_without_an_upper_bound(backend):
    """A ratio to the sampler that overflows is inside of it."""
    log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    config = LossConfig(rollout=Rejection(0.5, math.inf), log_ratio_limit=None)
    given = {"old_log_probs": log_probs.detach(), "rollout_log_probs": torch.tensor([[-100.0, -1.0]])}
    out = policy_loss(log_probs, torch.ones(1), **given, config=config, backend=backend)
    out.loss.backward()
    assert out.loss.item() == -1
    assert log_probs.grad.tolist() == [[-0.5, -0.5]]
    assert out.metrics.rollout_weight_mean.item() == 1


@pytest.mark.parametrize("estimator", ["abs", "k2"])
def test_a_reference_that_is_nan_shows_in_the_gradient_too(backend, estimator):
    log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    given = {"old_log_probs": log_probs.detach(), "ref_log_probs": torch.tensor([[math.nan, -1.0]]), "check": False}
    out = policy_loss(log_probs, torch.ones(1), **given, config=LossConfig(kl=KL(0.1, estimator)), backend=backend)
    out.loss.backward()
    assert out.loss.isnan()
    assert log_probs.grad.isnan().tolist() == [[True, False]]


def test_an_impossible_token_has_no_slope_whatever_it_is_compared_with(backend):
    log_probs = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    kl = KL(0.1, "k3", gradient="weighted_k2", ratio_weighted=False)
    old = torch.tensor([[math.nan, -1.0]])
    for term in (kl, KL(0.1, "k3", ratio_weighted=True)):
        given = {"old_log_probs": old, "ref_log_probs": torch.tensor([[-2.0, -1.5]]), "check": False}
        out = policy_loss(log_probs, torch.ones(1), **given, config=LossConfig(kl=term), backend=backend)
        (gradient,) = torch.autograd.grad(out.loss, log_probs)
        assert gradient[0, 0] == 0
        assert gradient[0, 1].isfinite()


def test_log_probs_of_eight_bits_are_not_summed():
    log_probs = torch.tensor([[-1.0, -1.0]])
    with pytest.raises(ValueError, match="rounded log-probs make wrong ratios of sequences"):
        policy_loss(log_probs, torch.ones(1), old_log_probs=log_probs.to(torch.float8_e4m3fn), config="gspo")
