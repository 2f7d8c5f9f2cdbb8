"""Surrogates of a user's own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import make

from grpo_kernels import (
    Clip,
    Divergence,
    LossConfig,
    Surrogate,
    Teacher,
    Unclipped,
    grpo_loss,
    linear_grpo_loss,
    policy_loss,
    register_surrogate,
)
from grpo_kernels.objectives.surrogates import SURROGATES
from grpo_kernels.verification.tolerance import compare, truth_of


@pytest.fixture(autouse=True)
def _forget():
    before = dict(SURROGATES)
    yield
    SURROGATES.clear()
    SURROGATES.update(before)


def power_class():
    @register_surrogate
    class Power(Surrogate):
        """-A·r^k/k: ratios tempered by a power."""

        k: float = 0.5

        name = "power"
        equation = "-A·r^k/k"

        def value(self, t):
            return -t.advantage * (self.k * t.log_ratio).exp() / self.k

        def slopes(self, t):
            return -t.advantage * (self.k * t.log_ratio).exp(), torch.zeros_like(t.log_prob)

    return Power


def by_autograd_class():
    @register_surrogate
    class Squared(Surrogate):
        """-A·sg(r)·ℓ + (ℓ - old)²/10."""

        def value(self, t):
            return -t.advantage * t.ratio.detach() * t.log_prob + t.log_ratio**2 / 10

        flat_at_zero_advantage = False

    return Squared


@pytest.mark.parametrize("kind", [power_class, by_autograd_class])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
def test_on_every_backend_and_level(backend, kind, level):
    surrogate = kind()()
    case = make(config=LossConfig(surrogate, level=level), kl_coef=0.05)
    out, gradient = case.run(backend=backend)
    truth = truth_of(case.logits, *case.arguments, **case.options)
    result = compare(truth, out.loss, out.log_probs, out.entropy, gradient)
    assert result.holds, result
    assert float(gradient.abs().max()) > 1e-3


def test_from_hidden_states():
    surrogate = by_autograd_class()()
    case = make(extra_row=False)
    weight = torch.eye(case.logits.shape[-1])
    leaf = case.logits.clone().requires_grad_()
    config = LossConfig(surrogate)
    linear_grpo_loss(leaf, weight, *case.arguments, config=config, **case.options).loss.backward()
    _, expected = case.run(config=config)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6)


COMPILED = {
    "grpo_loss": lambda x, given: grpo_loss(x, torch.ones(2, 3).long(), **given),
    "grpo_loss, a teacher": lambda x, given: grpo_loss(
        x,
        torch.ones(2, 3).long(),
        **given | {"config": given["config"].replace(divergence=Divergence("reverse_kl"))},
        teacher=Teacher(logits=torch.zeros(2, 3, 9)),
    ),
    "linear_grpo_loss": lambda x, given: linear_grpo_loss(x, torch.eye(9), torch.ones(2, 3).long(), **given),
    "policy_loss": lambda x, given: policy_loss(x.log_softmax(-1)[..., 1], **given),
}


@pytest.mark.parametrize(
    ("function", "engine"),
    [*((name, "aot_eager") for name in COMPILED), pytest.param("grpo_loss", "inductor", marks=pytest.mark.nightly)],
)
def test_compiled(function, engine):
    """Its call is traced into the loss's node, which must not be lost on the way."""
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = {"advantages": torch.ones(2), "config": LossConfig(by_autograd_class()())}

    def loss(x):
        return COMPILED[function](x, given | {"old_log_probs": torch.full((2, 3), -2.0)}).loss

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend=engine)(x), x)
    assert eager.abs().sum() > 0
    torch.testing.assert_close(compiled, eager)


def test_it_is_a_frozen_value_with_its_equation():
    Power = power_class()
    assert Power(0.25) == Power(0.25)
    assert hash(Power(0.25)) == hash(Power(0.25))
    assert repr(Power()) == "Power(k=0.5)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Power().k = 1.0
    assert "-A·r^k/k, k = 0.5" in LossConfig(Power()).equation()
    again = power_class()  # as a notebook's cell that runs twice
    assert LossConfig(again()).surrogate == again()


def test_r_to_the_first_is_unclipped(backend):
    case = make()
    mine, gradient = case.run(backend=backend, config=LossConfig(power_class()(1.0)))
    plain, expected = case.run(backend=backend, config=LossConfig(Unclipped()))
    torch.testing.assert_close(mine.loss, plain.loss)
    torch.testing.assert_close(gradient, expected)


def test_no_grad_and_inference_mode(backend):
    case = make(config=LossConfig(by_autograd_class()()))
    with torch.no_grad():
        plain = case.run  # the forward pass alone
    expected = plain(backend=backend)[0].loss
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = grpo_loss(case.logits, *case.arguments, backend=backend, **case.options)
        torch.testing.assert_close(out.loss, expected)


def test_wrong_slopes_are_refused_with_the_worst_point():
    with pytest.raises(
        ValueError, match=r"Wrong\(\): slopes\(\) is not the derivative of value\(\): ∂f/∂log_ratio"
    ) as e:

        @register_surrogate
        class Wrong(Surrogate):
            def value(self, t):
                return -t.advantage * t.ratio

            def slopes(self, t):
                return torch.where(t.ratio > 50, 0.0, -t.advantage * t.ratio), torch.zeros_like(t.ratio)

    assert "advantage=" in str(e.value)
    ratio = float(str(e.value).split("ratio=")[2].split(",")[0])
    assert ratio > 50
    assert "wrong" not in SURROGATES

    @register_surrogate
    class Needs(Surrogate):
        k: float

        def value(self, t):
            return -t.advantage * (self.k * t.log_ratio).exp()

        def slopes(self, t):
            return -t.advantage * (self.k * t.log_ratio).exp(), torch.zeros_like(t.ratio)  # right for k = 1 alone

    assert LossConfig(Needs(1.0)).surrogate.k == 1.0
    with pytest.raises(ValueError, match=r"Needs\(k=0.5\): slopes"):
        LossConfig(Needs(0.5))


def test_a_wrong_direct_slope_and_nan_are_refused():
    with pytest.raises(ValueError, match="∂f/∂log_prob should be"):

        @register_surrogate
        class Undetached(Surrogate):
            def value(self, t):
                return -t.advantage * t.ratio.detach() * t.log_prob

            def slopes(self, t):
                return torch.zeros_like(t.ratio), -t.advantage

    with pytest.raises(ValueError, match="is nan at"):

        @register_surrogate
        class NaN(Surrogate):
            def value(self, t):
                return -t.advantage * t.ratio

            def slopes(self, t):
                return -t.advantage * t.ratio * math.nan, torch.zeros_like(t.ratio)


def test_refused():
    with pytest.raises(TypeError, match="derives from Surrogate; got 3"):
        register_surrogate(3)
    with pytest.raises(TypeError, match=r"Empty needs value\(self, t\)"):

        @register_surrogate
        class Empty(Surrogate):
            pass

    with pytest.raises(ValueError, match="named 'clip' exists already"):

        @register_surrogate
        class Mine(Surrogate):
            name = "clip"

            def value(self, t):
                return t.ratio

    @dataclasses.dataclass(frozen=True, repr=False)
    class Unregistered(Clip):
        pass

    with pytest.raises(TypeError, match="Unregistered is not registered: decorate it with @register_surrogate"):
        LossConfig(Unregistered())


def test_fields_that_cannot_be_hashed_are_told_of():
    @register_surrogate
    class Weighted(Surrogate):
        weights: list

        def value(self, t):
            return self.weights[0] * t.ratio * t.advantage

    message = r"Weighted\(.*: the fields .* must be numbers, strings or tuples of such, .* unhashable type: 'list'\."
    with pytest.raises(TypeError, match=message):
        LossConfig(Weighted([1.0]))


def test_what_a_class_says_of_itself_is_checked():
    with pytest.raises(ValueError, match="say flat_at_zero_advantage = False"):

        @register_surrogate
        class Pulled(Surrogate):
            def value(self, t):
                return -t.advantage * t.ratio + t.log_ratio**2 / 2

    with pytest.raises(ValueError, match="leave uses_ratio = False out"):

        @register_surrogate
        class Ratio(Surrogate):
            uses_ratio = False

            def value(self, t):
                return -t.advantage * t.ratio

    with pytest.raises(TypeError, match="takes_rollout and clip_log_ratios are for surrogates of the package"):

        @register_surrogate
        class Folding(Surrogate):
            takes_rollout = True

            def value(self, t):
                return -t.advantage * t.ratio


def test_a_subclass_of_a_built_in_runs_its_own_value(backend):
    @register_surrogate
    class Sharper(Clip):
        name = "sharper"
        mode: str = "hard"

        def value(self, t):
            return -t.advantage * t.ratio * 3

        def slopes(self, t):
            return -t.advantage * t.ratio * 3, 0.0

    case = make()
    mine, gradient = case.run(backend=backend, config=LossConfig(Sharper()))
    plain, expected = case.run(backend=backend, config=LossConfig(Unclipped()))
    torch.testing.assert_close(mine.loss, 3 * plain.loss)
    torch.testing.assert_close(gradient, 3 * expected)
    assert "mode = 'hard'" in LossConfig(Sharper()).equation()


def naive_clip():
    @register_surrogate
    class Naive(Surrogate):
        """PPO's clip, as everyone writes it."""

        def value(self, t):
            return -torch.minimum(t.ratio * t.advantage, t.ratio.clamp(0.8, 1.2) * t.advantage)

    return Naive()


def gate(**hints):
    @register_surrogate
    class Gate(Surrogate):
        """Exponential up to a ratio of 2, logarithmic beyond, where the exponential overflows."""

        tau: float = 8.0

        def value(self, t):
            low = torch.exp(self.tau * (t.ratio - 1)) / self.tau
            return -t.advantage * torch.where(t.ratio > 2, 3 - (1 - torch.log(t.ratio / 2)), low)

    for name, value in hints.items():
        setattr(Gate, name, value)
    return Gate()


def test_a_branch_that_overflows_has_no_part(backend):
    """Autograd gives 0·inf to what minimum() and clamp() did not choose: the slope is the chosen branch's."""
    case = make(vocab=9, noise=0.0, ref_log_probs=None)
    case.options["old_log_probs"] = case.options["old_log_probs"] - torch.where(torch.arange(9) % 2 == 0, 100.0, 0.3)
    case.advantages = case.advantages.abs() + 0.1
    out, gradient = case.run(backend, config=LossConfig(naive_clip(), log_ratio_limit=None))
    plain, expected = case.run(backend, config=LossConfig(Clip(), log_ratio_limit=None))
    assert out.loss.isfinite()
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("hints", [{}, {"flat_at_zero_advantage": False}], ids=str)
def test_the_chosen_branch_keeps_its_slope(backend, hints):
    case = make(vocab=9, noise=0.0, ref_log_probs=None)
    case.options["old_log_probs"] = case.options["old_log_probs"] - torch.where(torch.arange(9) % 2 == 0, 15.0, 0.05)
    config = LossConfig(gate(**hints), aggregation="token_mean")
    out, gradient = case.run(backend, config=config)
    leaf = case.logits.double().requires_grad_()
    ell = leaf[:, :9].log_softmax(-1).gather(-1, case.token_ids[..., None]).squeeze(-1)
    x = ell - case.options["old_log_probs"].double()
    far = x.detach() > 5  # each branch by itself
    value = torch.where(far, 2 + x - math.log(2), torch.exp(8 * (torch.where(far, 0.0, x).exp() - 1)) / 8)
    expected = -(value * case.advantages[:, None])[case.mask].mean()
    expected.backward()
    torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-3, atol=1e-6)
    assert float(leaf.grad[:, ::2].abs().max()) > 1e-3


def test_a_value_of_nan_has_slopes_of_nan():
    case = make(vocab=9, ref_log_probs=None)
    case.options["old_log_probs"][0, 0] = math.nan
    out, gradient = case.run("cpu", config=LossConfig(naive_clip()))
    assert out.loss.isnan()
    assert gradient[0, 0].isnan().all()


MIXING = {
    "divided by a mean": lambda t: -t.ratio * t.advantage / (t.advantage.abs().mean() + 1e-6),
    "a ratio of ratios": lambda t: -t.ratio / t.ratio.mean() * t.advantage,
    "reduced": lambda t: -(t.ratio * t.advantage).mean(),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_value_that_mixes_tokens_is_refused(name):
    """Tokens that are masked would have a part in it."""
    kind = type("Mixing", (Surrogate,), {"value": lambda self, t: MIXING[name](t), "__annotations__": {}})
    with pytest.raises(ValueError, match="depends on the other tokens"):
        register_surrogate(kind)


@pytest.mark.parametrize("detached", ["no_grad", "detach"])
def test_a_value_without_a_gradient_is_refused(detached):
    def value(self, t):
        with torch.no_grad() if detached == "no_grad" else torch.enable_grad():
            f = -t.ratio * t.advantage
        return f if detached == "no_grad" else f.detach()

    with pytest.raises(ValueError, match="no gradient in log_prob, log_ratio or ratio"):
        register_surrogate(type("Stopped", (Surrogate,), {"value": value, "__annotations__": {}}))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_value_in_a_dtype_of_its_own(backend, dtype, slopes, level):
    """It is read as what the tokens are: kernels know no other."""

    def rounded(x):
        return x.to(dtype) if x.dtype == torch.float32 else x  # what a class is checked on is fp64

    class Rounded(Surrogate):
        def value(self, t):
            return rounded(-t.advantage * t.ratio)

    if slopes:
        Rounded.slopes = lambda self, t: (rounded(-t.advantage * t.ratio), 0.0)
    case = make(config=LossConfig(register_surrogate(Rounded)(), level=level))
    out, gradient = case.run(backend=backend)
    plain, expected = case.run(backend=backend, config=LossConfig(Unclipped(), level=level))
    assert out.loss.dtype == plain.loss.dtype
    tolerance = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert abs(plain.loss) > 8 * tolerance
    torch.testing.assert_close(out.loss, plain.loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.metrics.policy_loss, plain.metrics.policy_loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=4 * tolerance, atol=1e-6)


def test_what_methods_write_into_is_nobody_elses():
    """Not the caller's, and not the other method's."""

    @register_surrogate
    class Writes(Surrogate):
        def value(self, t):
            return t.advantage.neg_() * t.log_ratio.exp()

        def slopes(self, t):
            t.old_log_prob.zero_()
            return -t.advantage * t.ratio, 0.0

    case = make(config=LossConfig(Writes()))
    before = case.options["old_log_probs"].clone()
    _, gradient = case.run()
    torch.testing.assert_close(case.options["old_log_probs"], before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, case.run(config=LossConfig(Unclipped()))[1])


RETURNED = {
    "nothing": ({"value": lambda self, t: None}, TypeError, r"value\(t\) must be a tensor.* got None"),
    "a number": ({"value": lambda self, t: 1.0}, ValueError, "no gradient"),
    "one token less": (
        {"value": lambda self, t: t.ratio[1:]},
        ValueError,
        r"the shape of t.log_prob, \(1230,\); got \(1229,\)",
    ),
    "one slope": (
        {"value": lambda self, t: t.advantage * t.ratio, "slopes": lambda self, t: t.advantage * t.ratio},
        TypeError,
        "must return two, .* got Tensor",
    ),
    "slopes of nothing": (
        {"value": lambda self, t: t.advantage * t.ratio, "slopes": lambda self, t: (None, 0.0)},
        TypeError,
        "each of slopes.* got None",
    ),
    "random": ({"value": lambda self, t: t.advantage * t.ratio * torch.rand(())}, ValueError, "no random numbers"),
    "nan": ({"value": lambda self, t: t.ratio * t.advantage.sqrt()}, ValueError, "its value is NaN at log_prob="),
    "its own __init__": (
        {"value": lambda self, t: t.ratio, "__init__": lambda self: None},
        TypeError,
        "without __init__",
    ),
}


@pytest.mark.parametrize("what", RETURNED)
def test_what_a_class_may_not_return(what):
    methods, error, message = RETURNED[what]
    with pytest.raises(error, match=message):
        register_surrogate(type("Wrong", (Surrogate,), methods))


def test_a_number_for_every_slope_has_the_digits_of_the_tokens():
    """Of Python's float, not of the default dtype's."""

    @register_surrogate
    class Tenth(Surrogate):
        """-(ℓ - old)/10."""

        name = "tenth"
        equation = "-log r/10"
        flat_at_zero_advantage = False

        def value(self, t):
            return -0.1 * t.log_ratio

        def slopes(self, t):
            return -0.1, 0.0

    log_probs = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.1, -1.9]], dtype=torch.float64)
    policy_loss(log_probs, torch.ones(1), old_log_probs=old, config=LossConfig(Tenth())).loss.backward()
    assert log_probs.grad.tolist() == [[-0.05, -0.05]]
