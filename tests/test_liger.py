"""Liger's own functions and those of its signature: losses, gradients, metrics."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

liger_kernel = pytest.importorskip("liger_kernel")

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as TheirLinearLoss  # noqa: E402
from liger_kernel.transformers.grpo_loss import triton_grpo_loss as their_loss  # noqa: E402

from grpo_kernels.integrations import liger  # noqa: E402
from grpo_kernels.integrations.objectives import AGGREGATIONS, UNBOUNDED  # noqa: E402

pytestmark = pytest.mark.peers
B, L, H, V = 5, 9, 16, 65
LEVELS = ("token", "sequence")
CASES = [
    case
    for case in itertools.product(AGGREGATIONS, LEVELS, (0.0, 0.1), (False, True))
    if case[0] not in UNBOUNDED or case[1] == "token"
]
BOUNDS = {"cispo": {"eps_high": 1.2}, "sapo": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3}}
BOUNDS["vespo"] = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0}


def bounds(loss_type, delta, linear=False):
    """What bounds the ratios of each objective."""
    chosen = BOUNDS.get(loss_type, {"delta": delta})
    return {name.replace("eps_high", "epsilon_high") if linear else name: value for name, value in chosen.items()}


class Batch:
    """Ragged, an empty sequence, ratios on both sides of every bound."""

    def __init__(self, temperature=0.9, seed=0):
        torch.manual_seed(seed)
        self.hidden = torch.randn(B, L + 1, H)
        self.weight = torch.randn(V, H)
        self.bias = torch.randn(V)
        self.ids = torch.randint(V, (B, L))
        self.mask = (torch.arange(L) < torch.tensor([9, 5, 7, 0, 3])[:, None]).long()
        self.advantages = torch.tensor([1.2, -0.8, 0.0, 0.5, -1.5])
        logits = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        self.logits = logits
        log_probs = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)
        self.old, self.ref = (log_probs + 0.4 * torch.randn(B, L) for _ in range(2))
        self.rollout = torch.where(self.mask != 0, 2 * torch.rand(B, L), 1.0)  # Liger's VESPO adds padding's as well
        self.items = self.mask.sum().float() * 3

    def call(self, function, options, rollout, upstream=None):
        """Values, and the gradient in the logits."""
        logits = self.logits.clone().requires_grad_()
        arguments = (logits, self.old, self.ref, self.ids, self.advantages, self.mask)
        result = function(*arguments, inplace=False, vllm_is_ratio=rollout, **options)
        loss = result[0] if upstream is None else (result[0] * upstream).sum()
        return result, torch.autograd.grad(loss, logits)[0]


def assert_close(a, b, loss_type=""):
    """VESPO's weight is the exponential of k·log W - λ·W: two orders of summing W were 1.2e-5 apart."""
    torch.testing.assert_close(a, b, rtol=4e-5 if loss_type == "vespo" else 1e-5, atol=1e-6)


def test_signatures():
    """A changed import is all: names, order and defaults are Liger's."""
    assert (
        inspect.signature(liger.triton_grpo_loss).parameters.keys() == inspect.signature(their_loss).parameters.keys()
    )
    for mine, theirs in (
        (liger.triton_grpo_loss, their_loss),
        (liger.LigerFusedLinearGRPOLoss.__init__, TheirLinearLoss.__init__),
        (liger.LigerFusedLinearGRPOLoss.forward, TheirLinearLoss.forward),
    ):
        a, b = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (mine, theirs))
        assert a == b


@pytest.mark.parametrize(("loss_type", "level", "beta", "corrected"), CASES)
@pytest.mark.parametrize("rollout", [None, "sequence", "token"])
def test_reduced_loss(loss_type, level, beta, corrected, rollout):
    batch = Batch()
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "reduce": True}
    options |= {"use_bias_correction_kl": corrected, "num_items_in_batch": batch.items, **bounds(loss_type, 1.7)}
    weights = {None: None, "sequence": batch.rollout[:, 0].contiguous(), "token": batch.rollout}[rollout]
    (loss, metrics), gradient = batch.call(liger.triton_grpo_loss, options, weights)
    if loss_type == "luspo":  # Liger's value is wrong: padding counts in the mean, lengths count twice
        tokens, *_ = batch.call(their_loss, options | {"reduce": False}, weights, upstream=batch.mask / B)
        assert_close(loss, (tokens[0] * batch.mask).sum() / B)
        return
    (wanted, wanted_metrics), wanted_gradient = batch.call(their_loss, options, weights)
    assert_close(loss, wanted)
    assert_close(gradient, wanted_gradient)
    assert len(metrics) == len(wanted_metrics) >= 1
    for mine, theirs in zip(metrics, wanted_metrics, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(("loss_type", "level", "beta", "corrected"), CASES)
@pytest.mark.parametrize("rollout", [False, True])
def test_per_token_loss(loss_type, level, beta, corrected, rollout):
    """Under weights of one's own, as the default ``reduce=False`` is used."""
    batch = Batch(seed=1)
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    options |= {"use_bias_correction_kl": corrected, "eps_high": 0.3, **BOUNDS.get(loss_type, {})}
    weights = batch.rollout if rollout else None
    upstream = batch.mask / batch.mask.sum()  # Liger's sequence gradient is right for equal weights alone
    mine, gradient = batch.call(liger.triton_grpo_loss, options, weights, upstream)
    theirs, wanted = batch.call(their_loss, options, weights, upstream)
    assert_close(gradient, wanted, loss_type)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, loss_type)


@pytest.mark.parametrize(("loss_type", "level", "beta", "corrected"), CASES)
@pytest.mark.parametrize("own_reference", [False, True])
def test_linear_loss(loss_type, level, beta, corrected, own_reference):
    batch = Batch(temperature=1.3, seed=2)
    options = {"beta": beta, "loss_type": loss_type, "importance_sampling_level": level, "temperature": 1.3}
    options |= {"use_bias_correction_kl": corrected, "max_completion_length": 12, **bounds(loss_type, 1.6, linear=True)}
    found = []
    for kind in (liger.LigerFusedLinearGRPOLoss, TheirLinearLoss):
        leaves = [t.clone().requires_grad_() for t in (batch.hidden[:, :-1], batch.weight, batch.bias)]
        hidden, weight, bias = leaves
        arguments = {"old_per_token_logps": batch.old, "num_items_in_batch": batch.items}
        arguments["ref_per_token_logps"] = None if own_reference else batch.ref
        if own_reference:
            arguments |= {"ref_input": batch.hidden[:, :-1] * 0.9, "ref_weight": batch.weight, "ref_bias": batch.bias}
        loss, metrics = kind(**options, compiled=False)(
            hidden, weight, batch.ids, batch.mask, batch.advantages, bias, **arguments
        )
        found.append((loss, metrics, torch.autograd.grad(loss, leaves)))
    (loss, metrics, gradients), (wanted, wanted_metrics, wanted_gradients) = found
    if loss_type == "luspo" and (level == "token" or beta):  # Liger's value is wrong: compared with ours on logits
        logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
        ref = batch.ref
        if own_reference:
            there = torch.nn.functional.linear(batch.hidden[:, :-1] * 0.9, batch.weight, batch.bias) / 1.3
            ref = there.log_softmax(-1).gather(-1, batch.ids[..., None]).squeeze(-1)
        arguments = (batch.old, ref, batch.ids, batch.advantages, batch.mask)
        del options["max_completion_length"]
        same = {**options, "eps_high": 0.2, "reduce": True}
        assert_close(loss, liger.triton_grpo_loss(logits, *arguments, **same)[0])
        return
    assert_close(loss, wanted)
    for a, b in zip((*metrics, *gradients), (*wanted_metrics, *wanted_gradients), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("delta", [1.1, 1.25])
def test_delta_inside_of_the_band(delta):
    """The gradient is that of Liger's own value, by autograd (its kernel has 0 beyond delta); Liger's metric."""
    batch, options = Batch(), {"delta": delta, "eps_high": 0.4, "beta": 0.0, "reduce": True, "num_items_in_batch": None}
    (loss, metrics), gradient = batch.call(liger.triton_grpo_loss, options, None)
    (wanted, wanted_metrics), _ = batch.call(their_loss, options, None)
    assert_close(loss, wanted)
    assert_close(metrics[0], wanted_metrics[0])
    logits = batch.logits.clone().requires_grad_()
    log_probs = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, batch.ids[..., None]).squeeze(-1)
    ratio, A = (log_probs - batch.old).exp(), batch.advantages[:, None]
    losses = -torch.minimum(ratio.clamp(max=delta) * A, ratio.clamp(0.8, 1.4) * A)
    (exact,) = torch.autograd.grad((losses * batch.mask).sum() / batch.mask.sum(), logits)
    assert_close(gradient, exact)


@pytest.mark.parametrize("reduce", [False, True])
def test_in_place_is_in_backward(reduce):
    """As in Liger: what reads the logits before backward finds them, and nothing of the result changes."""
    batch = Batch()
    given = (batch.old, batch.ref, batch.ids, batch.advantages, batch.mask)
    upstream = batch.mask / batch.mask.sum()
    found = []
    for inplace in (False, True):
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 1
        result = liger.triton_grpo_loss(logits, *given, inplace=inplace, reduce=reduce)[0]
        assert torch.equal(logits, batch.logits)
        loss = result if reduce else (result * upstream).sum()
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
        assert torch.equal(logits, batch.logits) != inplace
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_masked_weights_and_attributes():
    batch = Batch()
    weights = torch.where(batch.mask != 0, batch.rollout, torch.nan)
    (losses, *_), gradient = batch.call(liger.triton_grpo_loss, {}, weights, batch.mask)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.1, use_ref_model=False, compiled=False)
    theirs = TheirLinearLoss(beta=0.1, use_ref_model=False, compiled=False)
    arguments = (batch.hidden[:, :-1], batch.weight, batch.ids, batch.mask, batch.advantages, batch.bias)
    for high in (0.2, 5.0):
        loss.epsilon_high = theirs.epsilon_high = high
        mine, wanted = (f(*arguments, old_per_token_logps=batch.old + 1) for f in (loss, theirs))
        assert_close(mine[0], wanted[0])
        assert mine[1]
        for a, b in zip(mine[1], wanted[1], strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"), [("advantages", (1,)), ("advantages", (L,)), ("old", (B, 1)), ("ref", (L,)), ("rollout", (1, L))]
)
def test_shapes_are_checked(name, shape, reduce):
    batch = Batch()
    setattr(batch, name, torch.zeros(shape))
    with pytest.raises(ValueError, match="of shape"):
        batch.call(liger.triton_grpo_loss, {"reduce": reduce}, batch.rollout)


def test_on_policy_and_advantages_of_tokens():
    batch = Batch()
    options = {"beta": 0.0, "reduce": True}
    batch.old = None
    (loss, _), gradient = batch.call(liger.triton_grpo_loss, options, None)
    (wanted, _), wanted_gradient = batch.call(their_loss, options, None)
    assert_close(loss, wanted)
    assert_close(gradient, wanted_gradient)
    batch.advantages = batch.advantages[:, None].expand(B, L).contiguous()
    (same, _), gradient = batch.call(liger.triton_grpo_loss, options, None)
    assert_close(same, loss)
    assert_close(gradient, wanted_gradient)


def test_two_references():
    batch = Batch(temperature=1.0)
    arguments = (batch.hidden[:, :-1], batch.weight, batch.ids, batch.mask, batch.advantages, batch.bias)
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.1)
    both = {"ref_input": batch.hidden[:, :-1] * 2, "ref_weight": batch.weight}
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        value = loss(*arguments, ref_per_token_logps=batch.ref, **both)[0]
    assert torch.equal(value, loss(*arguments, ref_per_token_logps=batch.ref)[0])


def test_refused_by_name():
    batch = Batch()
    with pytest.raises(ValueError, match="Did you mean 'cispo'"):
        batch.call(liger.triton_grpo_loss, {"loss_type": "cispos"}, None)
    for options in ({"delta": 3.0}, {"importance_sampling_level": "sequence"}):
        with pytest.raises(ValueError, match="'sapo' takes importance_sampling_level='token' and no delta"):
            batch.call(liger.triton_grpo_loss, {"loss_type": "sapo", **options}, None)
    old, batch.old = batch.old, None
    with pytest.raises(ValueError, match="needs old log-probs"):
        batch.call(liger.triton_grpo_loss, {"loss_type": "vespo"}, batch.rollout)
    batch.old = old
    with pytest.raises(ValueError, match="max_completion_length"):
        liger.LigerFusedLinearGRPOLoss(loss_type="dr_grpo")
    batch.ref = None
    for reduce in (False, True):
        with pytest.raises(ValueError, match="ref_log"):
            batch.call(liger.triton_grpo_loss, {"reduce": reduce}, None)
    with pytest.raises(ValueError, match="delta"):
        liger.LigerFusedLinearGRPOLoss(delta=0.5)
