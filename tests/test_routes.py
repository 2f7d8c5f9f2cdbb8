"""Which route a call took, what it may be required to take, and the switch that stops every kernel."""

from __future__ import annotations

import pytest
import torch
from cases import make

from grpo_kernels import (
    KL,
    Clip,
    Gmpo,
    GRPOLoss,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    Rejection,
    TopK,
    TruncatedIS,
    Vespo,
    backends,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    policy_loss,
    token_log_probs,
)
from grpo_kernels.verification import reference

TWO_PASSES = {
    "pooled ratios": ({"config": "gspo"}, "level 'sequence' pools the ratios"),
    "the KL's level": (
        {"config": LossConfig(Clip(), level="sequence", kl=KL(0.1, ratio_weighted=True, level="token"))},
        "the KL's ratio is pooled at level 'token', the policy's at 'sequence'",
    ),
    "on-policy, weights": (
        {"config": "gspo", "old_log_probs": None, "token_weights": torch.full((6, 9), 0.5)},
        "level 'sequence' spreads the slopes",
    ),
    "no arm": ({"config": LossConfig(Vespo(), level="sequence_product")}, "pools the ratios"),
    "no arm for tokens": ({"config": LossConfig(Gmpo())}, "Gmpo has no one-pass kernel"),
    "several schemes": (
        {"config": LossConfig(rollout=(MaskedIS(), Rejection())), "old_log_probs": None},
        "no one-pass kernel applies MaskedIS",
    ),
    "support": ({"support": TopK(5)}, "support= works on copies"),
}


@pytest.mark.parametrize(("options", "reason"), TWO_PASSES.values(), ids=TWO_PASSES)
def test_two_passes_say_why(options, reason):
    case = make()
    if "rollout" in repr(options):
        case.options["rollout_log_probs"] = case.options["old_log_probs"]
    out, _ = case.run("cpu", **options)
    assert out.route.backend == "cpu"
    assert out.route.passes == 2
    assert reason in out.route.reason
    with pytest.raises(
        RuntimeError, match=r"in one pass \(require='fused'\); got 2 passes of backend 'cpu': "
    ) as error:
        case.run("cpu", require="fused", **options)
    assert reason in str(error.value)


def test_fp16_without_an_announced_factor():
    case = make(dtype=torch.float16)
    out, _ = case.run("cpu")
    assert (out.route.passes, "grad_scale=" in out.route.reason) == (2, True)
    assert case.run("cpu", grad_scale=1.0, require="fused")[0].route.passes == 1


def test_one_pass(backend):
    case = make()
    out, _ = case.run(backend)
    assert out.route.backend == backend
    fuses = backends.choose("test", backends.Request(case.logits.device, vocab=97, fused=True), backend).fuses
    assert out.route.passes == (1 if fuses else 2)
    if fuses:
        assert case.run(backend, require="fused")[0].route == out.route
    else:
        with pytest.raises(RuntimeError, match="it has no one-pass loss"):
            case.run(backend, require="fused")
    without = grpo_loss(case.logits, *case.arguments, backend=backend, **case.options)
    assert without.route.passes == 1
    assert "no gradient is wanted" in without.route.reason


def test_every_function_takes_it():
    case = make(vocab=31)
    hidden, weight = torch.randn(6, 9, 8, requires_grad=True), torch.randn(31, 8)
    options = {"config": "dapo", "require": "fused"}
    assert linear_grpo_loss(hidden, weight, *case.arguments, **options).route.passes == 1
    assert GRPOLoss("dapo", require="fused")(case.logits, *case.arguments).route.backend == "cpu"
    calls = (
        lambda **o: token_log_probs(case.logits, case.token_ids, **o),
        lambda **o: linear_token_log_probs(hidden, weight, case.token_ids, **o),
        lambda **o: linear_grpo_loss(hidden, weight, *case.arguments, **o),
        lambda **o: grpo_loss(case.logits, *case.arguments, **o),
    )
    for call in calls:
        call(require="fused", backend="cpu")
        with pytest.raises(RuntimeError, match=r"require='fused'\); got \d pass(es)? of backend 'torch'"):
            call(require="fused", backend="torch")
        with pytest.raises(ValueError, match="require must be one of fused; got 'fast'"):
            call(require="fast")
    assert reference.grpo_loss(case.logits, *case.arguments).route is None


def test_in_a_compiled_graph():
    case = make()
    compiled = torch.compile(lambda logits: grpo_loss(logits, *case.arguments, **case.options), fullgraph=True)
    assert compiled(case.logits.requires_grad_()).route.passes == 1


def test_the_switch(monkeypatch):
    """It wins over automatic choice and over names: code that asks for a kernel is stopped without an edit."""
    case = make()
    assert case.run()[0].route.backend == "cpu"
    with pytest.raises(RuntimeError, match="support= works on copies"):
        token_log_probs(case.logits, case.token_ids, support=TopK(5), require="fused")
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "torch")
    for name in (None, "cpu"):
        route = case.run(name)[0].route
        assert route.backend == "torch"
        assert "GRPO_KERNELS_BACKEND=torch" in route.reason
        with pytest.raises(RuntimeError, match="GRPO_KERNELS_BACKEND=torch"):
            case.run(name, require="fused")
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "touch")
    with pytest.raises(ValueError, match="GRPO_KERNELS_BACKEND must be one of .* Did you mean 'torch'"):
        case.run()
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "")
    assert case.run()[0].route.backend == "cpu"


class Squared(TruncatedIS):
    """Another factor than that of the class which it is made of."""

    def factor(self, rho):
        return super().factor(rho) ** 2


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss", "policy_loss"])
def test_a_scheme_made_of_another_is_not_computed_as_that(function, old):
    """A kernel knows a scheme by its number, which a class of somebody's own would inherit."""
    case, g = make(batch=3, length=4, vocab=11, empty=False), torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, 5, generator=g), torch.randn(11, 5, generator=g)
    given = {
        "rollout_log_probs": case.options["old_log_probs"] + 0.5 * torch.randn(3, 4, generator=g),
        "config": LossConfig(rollout=Squared(2.0)),
        **({"old_log_probs": case.options["old_log_probs"]} if old else {}),
    }
    log_probs = token_log_probs(case.logits, case.token_ids, case.mask).log_probs
    call = {
        "grpo_loss": lambda backend: grpo_loss(case.logits, *case.arguments, **given, backend=backend),
        "linear_grpo_loss": lambda b: linear_grpo_loss(hidden, weight, *case.arguments, **given, backend=b),
        "policy_loss": lambda backend: policy_loss(log_probs, case.advantages, case.mask, **given),
    }[function]
    if function == "linear_grpo_loss":
        log_probs = linear_token_log_probs(hidden, weight, case.token_ids, case.mask).log_probs
    behind = given.get("old_log_probs", log_probs)
    factor = (behind - given["rollout_log_probs"]).exp().clamp(max=2.0) ** 2
    ratio = (log_probs - behind).exp()
    A, m = case.advantages[:, None], case.mask.to(torch.float32)
    losses = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * factor
    expected = (torch.where(case.mask, losses, 0.0).sum(-1) / m.sum(-1).clamp(min=1)).mean()
    for backend in ("cpu", "torch"):
        torch.testing.assert_close(call(backend).loss, expected)


class Given(TruncatedIS):
    """A factor of any kind."""

    def factor(self, rho):
        return KINDS[int(self.high)](rho)


KINDS = [None, torch.Tensor.double, lambda rho: rho > 1, lambda rho: rho[:, :1], lambda rho: 1.0, lambda rho: rho * 1j]


def test_factors_of_a_scheme_of_ones_own(backend):
    """In any dtype, one a token: kernels read those of the tokens."""
    case = make(batch=2, length=3, vocab=11, empty=False)
    log_probs = token_log_probs(case.logits, case.token_ids, case.mask).log_probs
    given = {"rollout_log_probs": log_probs - torch.tensor([[0.5, -0.5, 0.25]]), "backend": backend}

    def loss(kind):
        return grpo_loss(case.logits, *case.arguments, config=LossConfig(rollout=Given(kind)), **given).loss

    rho = (log_probs - given["rollout_log_probs"]).exp()
    for kind, factor in ((1, rho), (2, rho > 1)):
        losses = torch.where(case.mask, -case.advantages[:, None] * factor, 0.0)
        torch.testing.assert_close(loss(kind), (losses.sum(-1) / case.mask.sum(-1).clamp(min=1)).mean())
    for kind, got in ((3, r"torch.float32 \(2, 1\)"), (4, "1.0"), (5, r"torch.complex64 \(2, 3\)")):
        with pytest.raises(TypeError, match=rf"must return a tensor of reals of shape \(2, 3\); got {got}"):
            loss(kind)


class Kept(OffPolicyMask):
    """As ``Given``, of a mask of sequences."""

    def factor(self, advantages, mean_fall):
        return KINDS[int(self.threshold)](super().factor(advantages, mean_fall))


def test_factors_of_a_mask_of_ones_own(backend):
    case = make(batch=2, length=3, vocab=11, empty=False)
    log_probs = token_log_probs(case.logits, case.token_ids, case.mask).log_probs
    given = {"rollout_log_probs": log_probs + 0.5, "old_log_probs": log_probs, "backend": backend}

    def loss(scheme):
        return grpo_loss(case.logits, *case.arguments, config=LossConfig(rollout=scheme), **given).loss

    torch.testing.assert_close(loss(Kept(1.0)), loss(OffPolicyMask(1.0)))
    with pytest.raises(TypeError, match=r"must return a tensor of reals of shape \(2, 3\); got torch.float32 \(2, 1\)"):
        loss(Kept(3.0))
