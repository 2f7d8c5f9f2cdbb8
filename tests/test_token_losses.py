"""token_losses=True of the three losses: values and gradients under weights of the caller's, against the reference."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from cases import ROLLOUTS, Case, configs, label, make, one_of_each, sampler

from grpo_kernels import (
    KL,
    Clip,
    GRPOLoss,
    LossConfig,
    TopK,
    grpo_loss,
    hf,
    linear_grpo_loss,
    linear_token_log_probs,
    policy_loss,
    token_log_probs,
)
from grpo_kernels.objectives.sequences import Padded, on_tokens
from grpo_kernels.verification import reference
from grpo_kernels.verification.verify import complete

FUNCTIONS = ("grpo_loss", "linear_grpo_loss", "policy_loss")
LEVELS = ("token", "sequence", "sequence_token", "sequence_product")


@dataclass
class Head:
    """A case whose logits come of hidden states: ``leaves`` are hidden, weight and bias."""

    case: Case
    leaves: tuple[torch.Tensor, ...]

    @classmethod
    def make(cls, dtype=torch.float64, **options) -> Head:
        case = make(dtype=dtype, **options)
        width = case.logits.shape[-1] + 1
        hidden = torch.cat([case.logits, torch.ones_like(case.logits[..., :1])], -1)
        weight = torch.eye(width, dtype=dtype)[:-1]  # the logits are those that the case was drawn with
        bias = torch.zeros(width - 1, dtype=dtype)
        return cls(case, tuple(leaf.requires_grad_() for leaf in (hidden, weight, bias)))

    @property
    def logits(self) -> torch.Tensor:
        return torch.nn.functional.linear(*self.leaves)

    def loss(self, function: str, backend: str | None = None, **options):
        """The output of one of the functions."""
        case = self.case
        options = {**case.options, "backend": backend, **options}
        if function == "grpo_loss":
            return grpo_loss(self.logits, *case.arguments, **options)
        if function == "linear_grpo_loss":
            hidden, weight, bias = self.leaves
            chunk = 1 << 12 if hidden.dtype == torch.float64 else 1 << 18  # several chunks
            return linear_grpo_loss(hidden, weight, *case.arguments, bias=bias, chunk_bytes=chunk, **options)
        log_p = self.logits.narrow(-2, 0, case.token_ids.shape[-1]).log_softmax(-1)
        log_probs = log_p.gather(-1, case.token_ids[..., None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return policy_loss(log_probs, case.advantages, case.mask, entropy=entropy, **options)

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves)

    def expected(self, monkeypatch, weights: torch.Tensor, **options):
        """The reference's loss and gradients where tokens weigh this."""
        counted = self.case.mask
        if "cu_seqlens" in options:
            positions, bounds = torch.arange(counted.numel()), options["cu_seqlens"]
            counted = counted & ((positions >= bounds[0]) & (positions < bounds[-1])).view(counted.shape)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_weights", lambda *_: weights[counted])
            out = reference.grpo_loss(self.logits, *self.case.arguments, **{**self.case.options, **options})
        return out, self.gradients(out.loss)


def weights_of(mask: torch.Tensor) -> torch.Tensor:
    """Of either sign, some 0, different within each sequence; NaN where the mask is."""
    weights = torch.randn(mask.shape, dtype=torch.float64)
    weights[0, 1] = 0.0
    return torch.where(mask, weights, math.nan)


def check(monkeypatch, head: Head, function: str, backend: str, **options) -> None:
    mask = head.case.mask
    weights = weights_of(mask)
    wanted, gradients = head.expected(monkeypatch, weights, **options)
    out = head.loss(function, backend, token_losses=True, **options)
    losses = out.token_losses
    assert losses.shape == head.case.token_ids.shape
    assert (losses[~mask] == 0).all()
    total = (losses * weights.nan_to_num()).sum()
    torch.testing.assert_close(total, wanted.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.log_probs, wanted.log_probs, rtol=1e-10, atol=1e-12)
    # NaN upstream at masked places, as a caller's 0/0 gives it, changes nothing.
    found = torch.autograd.grad(losses, head.leaves, grad_outputs=weights)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("config", configs()[::2], ids=label)
def test_weights_of_the_callers(monkeypatch, function, config):
    noise = 0.3 if config.level == "token" else 0.2
    check(monkeypatch, Head.make(noise=noise, vocab=17), function, "cpu", config=config)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("config", one_of_each(), ids=label)
def test_every_backend(monkeypatch, backend, function, config):
    head = Head.make(noise=0.2, vocab=17)
    check(monkeypatch, head, function, backend, config=config, rollout_log_probs=sampler(head.case))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("config", one_of_each()[::2], ids=label)
def test_on_policy(monkeypatch, function, config):
    head = Head.make(noise=0.2, vocab=17, old_log_probs=None)
    check(monkeypatch, head, function, "cpu", config=config, rollout_log_probs=sampler(head.case))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scheme", ROLLOUTS, ids=str)
def test_rollout_schemes(monkeypatch, function, level, scheme):
    head = Head.make(batch=8, vocab=17, entropy_coef=0.02, kl_coef=0.05)
    config = LossConfig(rollout=scheme, level=level)
    check(monkeypatch, head, function, "cpu", config=config, rollout_log_probs=sampler(head.case))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_arguments(monkeypatch, function, level):
    head, config = Head.make(noise=0.15, vocab=17), LossConfig(Clip(), level=level, kl=KL(0.05), entropy_coef=0.01)
    middle = float(head.loss("grpo_loss", "cpu").entropy[head.case.mask].quantile(0.5))
    for options in (
        {"token_weights": torch.rand(6, 9)},
        {"entropy_threshold": middle},
        {"entropy_threshold": torch.tensor(middle, dtype=torch.float64)},
        {"kl_coef": torch.tensor(0.3), "entropy_coef": 0.2},
        {"kl_coef": 0.0, "entropy_coef": 0.0, "skip_zero_advantage": True},
    ):
        check(monkeypatch, head, function, "cpu", config=config, **options)
    head.case.advantages = torch.randn(6, 9)
    check(monkeypatch, head, function, "cpu", config=config)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("config", one_of_each()[1::4], ids=label)
def test_packed(monkeypatch, function, config):
    head = Head.make(noise=0.2, vocab=17, extra_row=False)
    case = head.case
    head.leaves = (head.leaves[0].detach().flatten(0, 1)[None].requires_grad_(), *head.leaves[1:])
    row = {name: value.reshape(1, -1) for name, value in case.options.items()}
    row["rollout_log_probs"] = sampler(case).reshape(1, -1)
    head.case = Case(case.logits, case.token_ids.reshape(1, -1), case.advantages[:4], case.mask.reshape(1, -1), row)
    head.case.mask[:, :2] = head.case.mask[:, 50:] = False
    check(monkeypatch, head, function, "cpu", config=config, cu_seqlens=torch.tensor([2, 13, 13, 30, 50]))


@pytest.mark.parametrize("support", [TopK(5), "mask"])
def test_support(monkeypatch, support):
    head = Head.make(noise=0.2, vocab=17)
    if support == "mask":
        support = torch.rand(6, 9, 17) < 0.6
    check(monkeypatch, head, "grpo_loss", "cpu", config=LossConfig(kl=KL(0.1), entropy_coef=0.1), support=support)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", LossConfig.presets())
def test_the_aggregations_weights_make_the_loss(function, name):
    head, config = Head.make(noise=0.2, vocab=17), complete(name, kl=KL(0.05), entropy_coef=0.02)
    mask, sequences = head.case.mask, Padded(6)
    weights = on_tokens(config.weighting.weights(mask, sequences, None), mask, sequences, torch.float64)
    losses = head.loss(function, config=config, token_losses=True)
    expected = head.loss(function, config=config)
    total = (losses.token_losses * weights).sum()
    torch.testing.assert_close(total, expected.loss, rtol=1e-11, atol=1e-13)
    for a, b in zip(head.gradients(total), head.gradients(expected.loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    # Ratios, divergences and counts are those of any reduction; the terms of the loss are sums over tokens.
    ours, theirs = (out.metrics.as_dict() for out in (losses, expected))
    terms = {metric: ours.pop(metric) + 0 * theirs.pop(metric) for metric in ("policy_loss", "kl_loss", "entropy_loss")}
    assert sum(terms.values()).item() == pytest.approx(losses.token_losses.sum().item(), rel=1e-11)
    for metric, value in ours.items():
        assert value.item() == pytest.approx(theirs[metric].item(), rel=1e-11), metric


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masked_places_hold_anything(function):
    """NaN there, of whatever tensor, and whatever comes back to them."""
    head = Head.make(noise=0.2, vocab=17)
    case, config = head.case, LossConfig(kl=KL(0.1), entropy_coef=0.1, level="sequence")
    clean = head.loss(function, config=config, token_losses=True)
    wanted = head.gradients(clean.token_losses.sum())
    dead = ~case.mask
    for name in ("old_log_probs", "ref_log_probs"):
        case.options[name] = case.options[name].masked_fill(dead, math.nan)
    with torch.no_grad():
        head.leaves[0][:, :9][dead] = math.nan
    case.token_ids = case.token_ids.masked_fill(dead, -100 if function != "policy_loss" else 0)
    for upstream in (math.nan, math.inf, 3.0):
        out = head.loss(function, config=config, token_losses=True)
        assert torch.equal(out.token_losses, clean.token_losses)
        weights = torch.where(dead, upstream, 1.0).double()
        if function == "linear_grpo_loss":
            found = torch.autograd.grad(out.token_losses, head.leaves, grad_outputs=weights)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        elif function == "grpo_loss":
            logits = head.logits.detach().requires_grad_()
            losses = grpo_loss(logits, *case.arguments, config=config, token_losses=True, **case.options).token_losses
            (gradient,) = torch.autograd.grad(losses, logits, grad_outputs=weights)
            assert (gradient[:, :9][dead] == 0).all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_skipped_tokens_get_nothing(function):
    """They count in the mask and are not live: NaN that comes back to them has no part either."""
    head = Head.make(noise=0.2, vocab=17)
    skipped = head.case.mask & (head.case.advantages == 0)[:, None]
    assert skipped.any()
    for level in ("token", "sequence"):
        config = LossConfig(level=level, aggregation="sequence_sum")
        wanted = head.gradients(head.loss(function, config=config, normalizer=1.0).loss)
        out = head.loss(function, config=config, skip_zero_advantage=True, token_losses=True)
        assert (out.token_losses[skipped] == 0).all()
        weights = torch.where(skipped, math.nan, 1.0).double()
        found = torch.autograd.grad(out.token_losses, head.leaves, grad_outputs=weights)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss"])
def test_dtypes(backend, function, dtype):
    """The gradient of a mean over a batch, through losses of tokens and through the loss, is one."""
    head = Head.make(dtype=dtype, noise=0.2, vocab=33, batch=3, length=4)
    config = LossConfig(Clip(), kl=KL(0.05), aggregation="token_mean", entropy_coef=0.02)
    scale = 2.0**10
    out = head.loss(function, backend, config=config, token_losses=True)
    assert out.token_losses.dtype == torch.float32
    loss = out.token_losses.sum() / head.case.mask.sum()
    expected = head.loss(function, backend, config=config, grad_scale=scale)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(head.gradients(loss * scale), head.gradients(expected.loss * scale), strict=True):
        unit = b.abs().max().item() * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=4 * unit)


def test_more_live_tokens_than_said():
    """On a GPU nothing waits to be asked: every loss is NaN. A CPU raises."""
    head = Head.make(noise=0.2, vocab=17)
    with pytest.raises(ValueError, match="live_tokens"):
        head.loss("linear_grpo_loss", token_losses=True, live_tokens=3)
    count = int(head.case.mask.sum())
    known = head.loss("linear_grpo_loss", token_losses=True, live_tokens=count + 5).token_losses
    assert torch.equal(known, head.loss("linear_grpo_loss", token_losses=True).token_losses)


def test_rows_that_were_cut_off_make_everything_nan(monkeypatch):
    from grpo_kernels.calls.sweep import Sweep

    monkeypatch.setattr(Sweep, "valid", lambda self, value: value * torch.nan)
    head = Head.make(noise=0.2, vocab=17)
    out = head.loss("linear_grpo_loss", token_losses=True)
    assert out.token_losses.isnan().all()
    assert out.metrics.vector.isnan().all()
    assert all(gradient.isnan().any() for gradient in head.gradients(out.token_losses.sum()))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_route(function):
    head = Head.make(vocab=17)
    route = head.loss(function, "cpu", token_losses=True).route
    if function == "policy_loss":
        assert route.passes == 0
        return
    assert route.passes == 2
    assert route.reason == "token_losses=True: a row's slope follows from what the caller makes of its loss"
    with pytest.raises(RuntimeError, match="got 2 passes of backend 'cpu': token_losses=True"):
        head.loss(function, "cpu", token_losses=True, require="fused")
    with torch.no_grad():
        assert head.loss(function, "cpu", token_losses=True, require="fused").route.passes == 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_refused_by_name(function):
    head = Head.make(vocab=17)
    with pytest.raises(ValueError, match=f"{function}: expected no normalizer= with token_losses=True; got one"):
        head.loss(function, token_losses=True, normalizer=4.0)
    if function == "policy_loss":
        return
    with pytest.raises(ValueError, match=f"{function}: expected no grad_scale= with token_losses=True; got 0.5"):
        head.loss(function, token_losses=True, grad_scale=0.5)
    if function == "grpo_loss":
        with pytest.raises(
            ValueError, match="expected inplace=False with token_losses=True; got inplace=True"
        ) as error:
            head.loss(function, token_losses=True, inplace=True)
        assert "token_log_probs(..., inplace=True) and policy_loss" in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_output(function):
    """It has no loss, and is a tuple like any other."""
    out = Head.make(vocab=17).loss(function, token_losses=True)
    with pytest.raises(AttributeError, match="out.token_losses, for the caller to reduce"):
        out.loss
    assert not hasattr(out, "loss")
    nothing, metrics, log_probs, entropy, route, losses, *of_a_model = out
    assert nothing is None
    assert of_a_model == [None, None]
    assert losses is out.token_losses is out[5]
    assert (metrics, log_probs, entropy, route) == (out.metrics, out.log_probs, out.entropy, out.route)
    assert "token_losses=tensor" in repr(out)
    assert out._asdict()["token_losses"] is losses
    assert not hasattr(out._replace(route=None), "loss")
    leaves, structure = torch.utils._pytree.tree_flatten(out)
    assert any(leaf is losses for leaf in leaves)
    assert torch.utils._pytree.tree_unflatten(leaves, structure).token_losses is losses
    detached = copy.deepcopy(out._replace(token_losses=losses.detach()))
    assert torch.equal(detached.token_losses, losses)
    plain = Head.make(vocab=17).loss(function)
    assert plain.token_losses is None


def test_modules_take_it():
    head = Head.make(vocab=17)
    module = GRPOLoss("gspo", token_losses=True)
    out = module(head.logits, *head.case.arguments, old_log_probs=head.case.options["old_log_probs"])
    assert torch.equal(out.token_losses, head.loss("grpo_loss", config="gspo", token_losses=True).token_losses)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_overwritten_before_backward_is_noticed(function):
    """As PyTorch's own operations do; the gradient would be another one."""
    for name in ("old_log_probs", "ref_log_probs", "mask", "advantages", "entropy_threshold"):
        head = Head.make(noise=0.2, vocab=17, kl_coef=0.1)
        case = head.case
        case.advantages = torch.randn(6, 9, dtype=torch.float64)
        case.options["entropy_threshold"] = torch.tensor(1.0, dtype=torch.float64)
        out = head.loss(function, token_losses=True)
        target = getattr(case, name) if name in ("mask", "advantages") else case.options[name]
        target.mul_(2) if name != "mask" else target.fill_(True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.token_losses.sum().backward()


@pytest.mark.parametrize("function", ["grpo_loss", "policy_loss"])
def test_backward_repeats(function):
    head = Head.make(vocab=17, kl_coef=0.1)
    losses = head.loss(function, token_losses=True).token_losses
    for weights in (torch.rand_like(losses), torch.rand_like(losses)):
        total = (losses * weights).sum()
        first, again = (torch.autograd.grad(total, head.leaves, retain_graph=True) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
    gradient = torch.autograd.grad(losses.sum(), head.leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second time|once_differentiable"):
        gradient.sum().backward()


def test_in_place_of_the_callers():
    """What the refusal of inplace=True says: token_log_probs writes the gradient over the logits, in backward."""
    head = Head.make(noise=0.2, vocab=17)
    case, config = head.case, LossConfig(level="sequence", kl=KL(0.1), entropy_coef=0.1)
    expected = head.gradients(head.loss("grpo_loss", config=config, token_losses=True).token_losses.sum())
    logits = head.logits
    tokens = token_log_probs(logits, case.token_ids, case.mask, inplace=True)
    given = {**case.options, "entropy": tokens.entropy, "config": config, "token_losses": True}
    losses = policy_loss(tokens.log_probs, case.advantages, case.mask, **given).token_losses
    for a, b in zip(head.gradients(losses.sum()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_linear_is_log_probs_and_policy_loss():
    head = Head.make(noise=0.2, vocab=17)
    case, (hidden, weight, bias) = head.case, head.leaves
    tokens = linear_token_log_probs(hidden, weight, case.token_ids, case.mask, bias=bias)
    given = {**case.options, "config": "gspo", "token_losses": True}
    ours = policy_loss(tokens.log_probs, case.advantages, case.mask, entropy=tokens.entropy, **given).token_losses
    theirs = head.loss("linear_grpo_loss", config="gspo", token_losses=True).token_losses
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LossConfig(kl=KL(0.1)), marks=pytest.mark.nightly),
        LossConfig(level="sequence", entropy_coef=0.1),
    ],
    ids=label,
)
def test_compiled(config):
    """grpo_loss in one graph."""

    def step(logits, ids, advantages, mask, old, ref, weights):
        given = {"config": config, "old_log_probs": old, "ref_log_probs": ref}
        return (grpo_loss(logits, ids, advantages, mask, token_losses=True, **given).token_losses * weights).sum()

    case = make()
    found = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = case.logits.clone().requires_grad_()
        others = (case.options["old_log_probs"], case.options["ref_log_probs"], torch.ones(6, 9))
        loss = function(leaf, *case.arguments, *others)
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("from_logits", [False, True])
def test_attached_models(from_logits):
    """grpo=dict(token_losses=True) reaches the loss, as an option of attach as well."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    ids = torch.randint(50, (3, 7))
    grpo = {"token_ids": ids[:, 1:], "advantages": torch.tensor([1.0, -1.0, 0.5]), "mask": torch.ones(3, 6)}
    grpo["old_log_probs"] = torch.full((3, 6), -3.9)
    found = []
    for options, given in (({"token_losses": True}, grpo), ({}, {**grpo, "token_losses": True}), ({}, grpo)):
        torch.manual_seed(0)
        model = hf.attach(transformers.Qwen3ForCausalLM(config), "dapo", from_logits=from_logits, **options)
        out = model(input_ids=ids, grpo=given)
        loss = out.loss if out.token_losses is None else out.token_losses.mean()
        loss.backward()
        found.append((loss.detach(), *(parameter.grad for parameter in model.parameters())))
    for other in found[:2]:
        for a, b in zip(other, found[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_losses_may_be_weighted_in_place():
    """``losses *= w`` is an idiom; autograd refuses it for a view of what a Function returned."""
    logits = torch.randn(2, 3, 7, requires_grad=True)
    losses = grpo_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.ones(2), token_losses=True).token_losses
    losses *= 0.5
    losses.sum().backward()
    assert logits.grad.abs().sum() > 0
