"""Log-probs over a truncated support: what a sampler with top-k, top-p or min-p draws from."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make

from grpo_kernels import MinP, TopK, TopP, grpo_loss, token_log_probs
from grpo_kernels.verification import reference
from grpo_kernels.verification.tolerance import compare, truth_of

SUPPORTS = (TopK(5), TopP(0.8), MinP(0.1), (TopK(20), TopP(0.7)), (TopP(0.9), MinP(0.05)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_loss_and_gradient(backend, support, dtype):
    case = make(dtype=dtype, support=support, temperature=0.8, config="dapo", entropy_coef=0.05)
    out, gradient = case.run(backend=backend)
    truth = truth_of(case.logits, *case.arguments, **case.options)
    result = compare(truth, out.loss, out.log_probs, out.entropy, gradient)
    assert result.holds, result
    plain, _ = case.run(backend=backend, support=None)
    assert (out.log_probs >= plain.log_probs - 1e-5).all()
    assert (out.log_probs > plain.log_probs + 1e-3).sum() > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("support", [TopK(5), TopP(0.8), "a mask"], ids=str)
def test_softcap(backend, support, dtype):
    """The cap comes before the set: applied after it, tanh(-inf) would bring every column back at -cap."""
    case = make(dtype=dtype, temperature=2.0, logit_scale=1.5, logit_softcap=4.0, config="dapo", ref_log_probs=None)
    z = 4.0 * torch.tanh(case.logits[:, :9].double() * 1.5 / 4.0) / 2.0
    allowed = z >= z.topk(5, -1).values[..., -1:] if support != TopP(0.8) else reference._kept(z.flatten(0, 1), support)
    kept = allowed.view(z.shape).scatter(-1, case.token_ids[..., None], True)
    exact = z.masked_fill(~kept, -math.inf).log_softmax(-1).gather(-1, case.token_ids[..., None]).squeeze(-1)
    case.options["old_log_probs"] = (exact + 0.2 * torch.randn(exact.shape)).to(case.options["old_log_probs"].dtype)
    out, gradient = case.run(backend=backend, support=allowed.view(z.shape) if support == "a mask" else support)
    torch.testing.assert_close(
        out.log_probs[case.mask].double(), exact[case.mask], rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6
    )
    assert (gradient[:, :9][~kept] == 0).all()
    leaf = case.logits.double().requires_grad_()
    z = 4.0 * torch.tanh(leaf[:, :9] * 1.5 / 4.0) / 2.0
    z = z.masked_fill(~kept, -math.inf).log_softmax(-1).gather(-1, case.token_ids[..., None]).squeeze(-1)
    ratio, A = (z - case.options["old_log_probs"].double()).exp(), case.advantages[:, None].double()
    losses = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)[case.mask]
    losses.mean().backward()
    torch.testing.assert_close(out.loss.double(), losses.mean(), rtol=1e-5, atol=1e-6)
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=4 * unit, atol=1e-7)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_columns_outside_have_no_gradient(backend, support):
    case = make(support=support, extra_row=False)
    _, gradient = case.run(backend=backend)
    kept = reference._kept(case.logits.flatten(0, 1).double(), support).view(case.logits.shape)
    kept = kept.scatter(-1, case.token_ids[..., None], True)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept & (case.mask & (case.advantages != 0)[:, None])[..., None]] != 0).sum() > 20


def test_the_sampler_and_the_policy_agree(backend):
    """Tokens drawn from the truncated distribution: its log-prob is the sampler's, so every ratio is 1."""
    case = make(noise=0.0)
    rows = case.logits[:, : case.token_ids.shape[1]]
    p = torch.softmax(rows.double() / 0.7, -1)
    order = p.sort(-1, descending=True)
    inside = order.values.cpu().cumsum(-1).to(p.device) - order.values < 0.6
    truncated = torch.where(inside, order.values, 0.0)
    truncated = truncated / truncated.sum(-1, keepdim=True)
    drawn = torch.multinomial(truncated.flatten(0, 1), 1).view(case.token_ids.shape)
    ids = order.indices.gather(-1, drawn[..., None]).squeeze(-1)
    sampler = truncated.gather(-1, drawn[..., None]).squeeze(-1).log()
    options = {"temperature": 0.7, "backend": backend}
    ours = token_log_probs(case.logits, ids, case.mask, support=TopP(0.6), **options).log_probs
    torch.testing.assert_close(ours[case.mask].double(), sampler[case.mask], rtol=0, atol=2e-6)
    biased = token_log_probs(case.logits, ids, case.mask, **options).log_probs
    assert (sampler - biased)[case.mask].mean() > 0.2


def test_a_mask_and_the_drawn_token(backend):
    """The token that was drawn counts, also where the mask or the filter leaves it out."""
    case = make(extra_row=False)
    allowed = torch.rand(case.logits.shape) < 0.3
    found = token_log_probs(case.logits, case.token_ids, case.mask, support=allowed, backend=backend)
    kept = allowed.scatter(-1, case.token_ids[..., None], True)
    plain = token_log_probs(case.logits.masked_fill(~kept, -math.inf), case.token_ids, case.mask, backend=backend)
    assert torch.equal(found.log_probs, plain.log_probs)
    assert torch.equal(found.entropy, plain.entropy)
    alone = token_log_probs(case.logits, case.token_ids, case.mask, support=TopK(1), backend=backend).log_probs
    assert alone[case.mask].isfinite().all()


def test_everything_is_the_whole_vocabulary(backend):
    case = make()
    plain = token_log_probs(case.logits, case.token_ids, case.mask, backend=backend)
    for support in (TopK(10**6), TopP(1.0), MinP(1e-30)):
        found = token_log_probs(case.logits, case.token_ids, case.mask, support=support, backend=backend)
        assert torch.equal(found.log_probs, plain.log_probs)


def test_packed_and_many_parts(backend, monkeypatch):
    monkeypatch.setattr("grpo_kernels.calls.support.CHUNK_ELEMENTS", 300)
    case = make(batch=1, length=12, extra_row=False)
    whole = token_log_probs(case.logits, case.token_ids, support=TopK(7), backend=backend)
    packed = token_log_probs(case.logits[0], case.token_ids[0], support=TopK(7), backend=backend)
    assert torch.equal(whole.log_probs[0], packed.log_probs)
    options = {"old_log_probs": case.options["old_log_probs"][0], "cu_seqlens": torch.tensor([0, 5, 12])}
    wrong = case.token_ids.clone()
    b, t = case.mask.nonzero()[3].tolist()
    wrong[b, t] = 97
    with pytest.raises(IndexError, match=rf"token_ids\[{b}, {t}\] = 97"):
        token_log_probs(case.logits, wrong, case.mask, support=TopK(3))
    leaf = case.logits[0].clone().requires_grad_()
    out = grpo_loss(leaf, case.token_ids[0], torch.tensor([1.0, -1.0]), support=TopK(7), backend=backend, **options)
    out.loss.backward()
    truth = truth_of(leaf, case.token_ids[0], torch.tensor([1.0, -1.0]), None, support=TopK(7), **options)
    assert compare(truth, out.loss, out.log_probs, out.entropy, leaf.grad).holds


def test_nan_shows_and_masked_rows_do_not(backend):
    case = make(support=TopP(0.9))
    live, dead = case.mask.nonzero()[0].tolist(), (~case.mask).nonzero()[0].tolist()
    case.logits[dead[0], dead[1]] = math.nan
    assert case.run(backend=backend)[0].loss.isfinite()
    case.logits[live[0], live[1], 3] = math.nan
    out, gradient = case.run(backend=backend)
    assert out.loss.isnan()
    assert gradient[live[0], live[1]].isnan().all()


def test_refused():
    case = make()
    for support, message in (
        (lambda: TopK(0), r"TopK\(k\) must be an integer >= 1"),
        (lambda: TopP(1.5), r"TopP\(p\) must be in \(0, 1\]; got 1.5"),
        (lambda: MinP(True), r"MinP\(p\) must be in \(0, 1\]; got True"),
        (lambda: MinP(0.0), r"MinP\(p\)"),
    ):
        with pytest.raises(ValueError, match=message):
            support()
    with pytest.raises(TypeError, match=r"expected support=TopK\(k\).*got 0.9"):
        token_log_probs(case.logits, case.token_ids, support=0.9)
    with pytest.raises(ValueError, match="support of shape"):
        token_log_probs(case.logits, case.token_ids, support=torch.ones(3, 4, dtype=torch.bool))
    wrong = case.token_ids.clone()
    b, t = case.mask.nonzero()[3].tolist()
    wrong[b, t] = 97
    with pytest.raises(IndexError, match=rf"token_ids\[{b}, {t}\] = 97"):
        token_log_probs(case.logits, wrong, case.mask, support=TopK(3))
    leaf = case.logits.clone().requires_grad_() * 1.0
    with pytest.raises(ValueError, match="inplace=False with support="):
        grpo_loss(leaf, *case.arguments, support=TopK(3), inplace=True)


def test_top_p_of_1_keeps_everything(backend):
    """Samplers' default. Rounded, masses reached 1 before the last token, whose gradient was then 0."""
    case = make(vocab=1000, spread=6.0, config="dapo")
    out, gradient = case.run(backend=backend, support=TopP(1.0))
    whole, of_whole = case.run(backend=backend)
    assert torch.equal(out.log_probs, whole.log_probs)
    assert torch.equal(gradient == 0, of_whole == 0)


@pytest.mark.parametrize("name", ["token_ids", "mask", "support"])
@pytest.mark.parametrize("token_losses", [False, True])
def test_what_is_overwritten_before_backward_is_noticed(name, token_losses):
    """As PyTorch's own operations do; the gradient would be another one."""
    logits = torch.randn(1, 2, 4, requires_grad=True)
    given = {
        "token_ids": torch.tensor([[0, 1]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "support": torch.rand(1, 2, 4) < 0.7 if name == "support" else TopK(3),
    }
    out = grpo_loss(logits, advantages=torch.tensor([1.0]), token_losses=token_losses, **given)
    given[name].copy_(given[name].flip(-1) if name == "token_ids" else given[name].logical_not())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.token_losses.sum() if token_losses else out.loss).backward()


def test_a_temperature_that_is_overwritten_before_backward_changes_nothing():
    """Kernels have a copy."""
    logits, temperature = torch.randn(1, 2, 4, requires_grad=True), torch.tensor([[0.5, 2.0]])
    gradients = []
    for overwritten in (False, True):
        loss = grpo_loss(logits, torch.tensor([[0, 1]]), torch.ones(1), support=TopK(3), temperature=temperature).loss
        if overwritten:
            temperature.fill_(1.0)
        gradients += torch.autograd.grad(loss, logits)
    assert torch.equal(*gradients)
