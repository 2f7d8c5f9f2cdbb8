"""Teachers whose likeliest tokens were recorded: against an oracle over outcomes, by hand, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    Divergence,
    LossConfig,
    Teacher,
    grpo_loss,
    linear_grpo_loss,
    linear_token_divergence,
    token_divergence,
)
from grpo_kernels.objectives.divergence import KINDS

B, T, V, K = 2, 4, 50, 6
BUCKET_KINDS = list(KINDS)
FINITE = [kind for kind in KINDS if kind not in ("reverse_kl", "mixed_kl")]
FORMS = [(kind, rest) for rest in ("bucket", "renormalize") for kind in BUCKET_KINDS]
FORMS += [(kind, "teacher_renormalize") for kind in FINITE]


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * (torch.where(p == 0, 0.0, log_p) - torch.where(p == 0, 0.0, log_q))).sum(-1)


def value_of(kind: str, w: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D over a few outcomes, by its definition."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    m = {"jsd": (1 - w) * p + w * q, "skew_forward_kl": w * q + (1 - w) * p, "skew_reverse_kl": w * p + (1 - w) * q}
    log_m = m.get(kind, p).log()
    return {
        "forward_kl": lambda: kl(q, log_q, log_p),
        "reverse_kl": lambda: kl(p, log_p, log_q),
        "mixed_kl": lambda: w * kl(q, log_q, log_p) + (1 - w) * kl(p, log_p, log_q),
        "jsd": lambda: w * kl(q, log_q, log_m) + (1 - w) * kl(p, log_p, log_m),
        "skew_forward_kl": lambda: kl(q, log_q, log_m),
        "skew_reverse_kl": lambda: kl(p, log_p, log_m),
    }[kind]()


def oracle(z: Tensor, ids: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """D of every row of float64 z (tokens, V), from the recorded log-probs (tokens, k), id < 0 absent."""
    values = []
    for row, of_row, recorded in zip(torch.log_softmax(z, -1), ids, log_q.double(), strict=True):
        kept = of_row[of_row >= 0]
        others = torch.ones(z.shape[-1], dtype=torch.bool).scatter(0, kept, False)
        log_p, known = row[kept], recorded[of_row >= 0]
        if divergence.rest == "renormalize":
            log_p, known = log_p - log_p.logsumexp(0), known - known.logsumexp(0)
        else:
            rest = torch.log1p(-known.exp().sum())
            if divergence.rest == "teacher_renormalize":
                known, rest = known - known.logsumexp(0), torch.tensor(-math.inf).double()
            if bool(others.any()):
                log_p = torch.cat([log_p, row[others].logsumexp(0)[None]])
                known = torch.cat([known, rest[None]])
        values.append(value_of(divergence.kind, divergence.mix, log_p, known))
    return torch.stack(values)


def recorded(k: int = K, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (B, T, V), drawn tokens, recorded ids in any order and their log-probs (B, T, k)."""
    torch.manual_seed(seed)
    z = torch.randn(B, T, V) * spread
    log_q, ids = torch.log_softmax(torch.randn(B, T, V) * spread, -1).topk(k, -1)
    order = torch.randperm(k)
    drawn = torch.randint(V, (B, T))
    drawn[0, 0] = ids[0, 0, 1]
    return z, drawn, ids[..., order], log_q[..., order]


def teacher(ids: Tensor, log_q: Tensor, **options: float) -> Teacher:
    return Teacher(token_ids=ids, log_probs=log_q, **{"temperature": 1.0, **options})


@pytest.mark.parametrize("cap", [None, 6.0])
@pytest.mark.parametrize(("kind", "rest"), FORMS)
def test_value_and_gradient(kind, rest, cap, backend):
    """Beside slopes in log-probs and entropies, which share the gradient's columns."""
    z, drawn, ids, log_q = recorded()
    ids[0, 1, 2], ids[1, 0, 3:] = -1, -1
    log_q[ids < 0] = -math.inf
    divergence, w = Divergence(kind, rest=rest, mix=0.3), torch.rand(B, T)
    w[1, 2] = 0
    leaf = z.clone().requires_grad_()
    out = token_divergence(leaf, teacher(ids, log_q), drawn, divergence=divergence, logit_softcap=cap, backend=backend)
    (w * (out.divergence + 2 * out.log_probs - 0.1 * out.entropy)).sum().backward()
    exact = z.double().requires_grad_()
    x = exact if cap is None else cap * torch.tanh(exact / cap)
    log_p = torch.log_softmax(x, -1)
    value = oracle(x.reshape(-1, V), ids.reshape(-1, K), log_q.reshape(-1, K), divergence).view(B, T)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (w * (value + 2 * log_p.gather(-1, drawn[..., None])[..., 0] - 0.1 * entropy)).sum().backward()
    torch.testing.assert_close(out.divergence.double(), value, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-6, atol=3e-7)


BY_HAND = {
    ("forward_kl", "bucket"): (0.173287, (-0.25, 0.0, 0.125, 0.125)),
    ("forward_kl", "teacher_renormalize"): (0.749780, (-0.416667, -0.083333, 0.25, 0.25)),
    ("forward_kl", "renormalize"): (0.056633, (-0.166667, 0.166667, 0.0, 0.0)),
    ("reverse_kl", "bucket"): (0.173287, (-0.216608, -0.043322, 0.129965, 0.129965)),
}
"""p uniform over four, q = (1/2, 1/4, 1/8, 1/8), of which the first two are recorded."""


@pytest.mark.parametrize(("kind", "rest"), BY_HAND)
def test_by_hand(kind, rest):
    z = torch.zeros(1, 1, 4, requires_grad=True)
    q = torch.tensor([[[0.5, 0.25]]]).log()
    divergence = Divergence(kind, rest=rest)
    out = token_divergence(z, teacher(torch.tensor([[[0, 1]]]), q), torch.tensor([[3]]), divergence=divergence)
    out.divergence.sum().backward()
    value, gradient = BY_HAND[kind, rest]
    assert float(out.divergence.detach()) == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(z.grad[0, 0], torch.tensor(gradient), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", BUCKET_KINDS)
def test_all_recorded_is_the_whole_distribution(kind, rest):
    z, drawn, *_ = recorded()
    log_q = torch.log_softmax(torch.randn(B, T, V), -1)
    ids = torch.randperm(V).expand(B, T, V)
    found = []
    for of_q in (teacher(ids, log_q.gather(-1, ids)), Teacher(logits=log_q)):
        leaf = z.clone().requires_grad_()
        out = token_divergence(leaf, of_q, drawn, divergence=Divergence(kind, rest=rest))
        out.divergence.sum().backward()
        found.append((out.divergence.detach(), leaf.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-7)


def test_a_bucket_is_never_above_the_whole_and_grows_with_k():
    z, drawn, *_ = recorded()
    log_q = torch.log_softmax(torch.randn(B, T, V) * 2, -1)
    whole = token_divergence(z, Teacher(logits=log_q), drawn, divergence="forward_kl").divergence
    before = torch.zeros(B, T)
    for k in (0, 1, 3, 10, V):
        top, ids = log_q.topk(k, -1)
        now = token_divergence(z, teacher(ids, top), drawn, divergence="forward_kl").divergence
        assert bool((now >= before - 1e-6).all())
        assert bool((now <= whole + 1e-6).all())
        before = now
    torch.testing.assert_close(now, whole, rtol=1e-6, atol=1e-6)


def test_the_rest_of_a_confident_row_keeps_its_digits():
    """1 less the mass of the recorded would be 0 here, or a few units of rounding."""
    z = torch.zeros(1, 1, V)
    z[..., :2] = torch.tensor([30.0, 12.0])
    ids, log_q = torch.tensor([[[0]]]), torch.tensor([[[-1e-3]]])
    leaf = z.clone().requires_grad_()
    out = token_divergence(leaf, teacher(ids, log_q), torch.tensor([[0]]), divergence="forward_kl")
    out.divergence.sum().backward()
    exact = z.double().requires_grad_()
    value = oracle(exact[0], ids[0], log_q[0], Divergence("forward_kl"))
    value.sum().backward()
    torch.testing.assert_close(out.divergence.double()[0], value, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=0)


def test_rounded_log_probs_of_all_mass_leave_a_reverse_kl_finite():
    z, drawn, ids, _ = recorded(k=2)
    log_q = torch.tensor([-1e-9, -25.0]).expand(B, T, 2)
    out = token_divergence(z, teacher(ids, log_q), drawn, divergence="reverse_kl")
    assert bool(out.divergence.isfinite().all())


@pytest.mark.parametrize("shape", [(0, T), (B, 0)])
def test_no_tokens(shape, backend):
    z = torch.randn(*shape, V, requires_grad=True)
    drawn, ends = torch.zeros(shape, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))
    in_rows = teacher(drawn[..., None].expand(*shape, K), torch.zeros(*shape, K))
    for given in (in_rows, teacher(drawn.view(-1), torch.zeros(0), offsets=ends)):
        out = grpo_loss(z, drawn, None, teacher=given, config=config, backend=backend)
        out.loss.backward()
        assert out.loss == 0
        assert z.grad.shape == z.shape


@pytest.mark.parametrize(("kind", "rest"), FORMS)
def test_a_row_of_which_nothing_was_recorded_is_0(kind, rest):
    z, drawn, ids, log_q = recorded()
    ids[0, 1] = -1
    leaf = z.clone().requires_grad_()
    out = token_divergence(leaf, teacher(ids, log_q), drawn, divergence=Divergence(kind, rest=rest))
    out.divergence.sum().backward()
    assert out.divergence[0, 1] == 0
    assert bool((leaf.grad[0, 1] == 0).all())
    assert bool((leaf.grad[0, 0] != 0).any())


def test_a_named_token_may_be_impossible():
    """For the teacher: a reverse KL is infinite, as of the whole distribution; for the policy too: no part."""
    z = torch.randn(1, 1, V)
    log_q = torch.log_softmax(torch.randn(1, 1, V).index_fill(-1, torch.tensor([3]), -math.inf), -1)
    ids, drawn = torch.arange(V).view(1, 1, V), torch.tensor([[5]])
    for kind, impossible in (("reverse_kl", True), ("forward_kl", False), ("jsd", False)):
        found = token_divergence(z, teacher(ids, log_q), drawn, divergence=kind).divergence
        whole = token_divergence(z, Teacher(logits=log_q), drawn, divergence=kind).divergence
        assert found.isinf().item() is impossible
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    z[..., 3] = -math.inf
    assert bool(token_divergence(z, teacher(ids, log_q), drawn).divergence.isfinite())


def test_a_policy_without_the_recorded_tokens_is_nan_renormalised():
    z, drawn, ids, log_q = recorded()
    z[0, 1] = z[0, 1].index_fill(0, ids[0, 1], -math.inf)
    leaf = z.clone().requires_grad_()
    divergence = Divergence("reverse_kl", rest="renormalize")
    out = token_divergence(leaf, teacher(ids, log_q), torch.where(drawn == -1, 0, drawn), divergence=divergence)
    (out.divergence * torch.ones(B, T)).sum().backward()
    assert out.divergence.isnan().nonzero().tolist() == [[0, 1]]
    assert bool(leaf.grad[0, 1].isnan().all())
    assert bool(leaf.grad[0, 0].isfinite().all())


@pytest.mark.parametrize("rest", ["renormalize", "teacher_renormalize"])
def test_impossible_tokens_alone_are_no_distribution(rest, monkeypatch):
    """NaN where nobody may look, in that row alone; in one bucket with the rest they are one."""
    z, drawn, ids, log_q = recorded()
    log_q[0, 1] = -math.inf
    assert token_divergence(z, teacher(ids, log_q), drawn, divergence="jsd").divergence.isfinite().all()
    monkeypatch.setattr("grpo_kernels.calls.tokens.may_look", lambda *_: False)
    kind = Divergence("forward_kl", rest=rest)
    leaf = z.clone().requires_grad_()
    found = token_divergence(leaf, teacher(ids, log_q), drawn, divergence=kind).divergence
    found.sum().backward()
    for values in (found, leaf.grad.sum(-1)):
        assert values[0, 1].isnan()
        assert values.isnan().sum() == 1


def test_masked_rows_are_not_read():
    z, drawn, ids, log_q = recorded()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 2] = mask[1, 3] = False
    leaf = z.clone().requires_grad_()
    clean = token_divergence(leaf, teacher(ids, log_q), drawn, mask)
    clean.divergence.sum().backward()
    dirty_z, dirty_ids, dirty_q, dirty_drawn = z.clone(), ids.clone(), log_q.clone(), drawn.clone()
    dirty_z[~mask], dirty_ids[~mask], dirty_q[~mask], dirty_drawn[~mask] = math.nan, V + 7, math.nan, -100
    other = dirty_z.requires_grad_()
    out = token_divergence(other, teacher(dirty_ids, dirty_q), dirty_drawn, mask)
    out.divergence.sum().backward()
    assert torch.equal(out.divergence, clean.divergence)
    assert torch.equal(other.grad, leaf.grad)
    assert bool((other.grad[~mask] == 0).all())


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 3000])
def test_from_hidden_states_and_in_rows_of_their_own_lengths(preset, chunk_bytes):
    _, drawn, ids, log_q = recorded()
    hidden, weight = torch.randn(B, T, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    ids[0, 0, 4:], log_q[0, 0, 4:] = -1, -math.inf
    kept = ids >= 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).reshape(-1).cumsum(0)])
    flat = teacher(ids[kept], log_q[kept], offsets=offsets)
    config = LossConfig.preset(preset, divergence=Divergence("reverse_kl", coef=0.5))
    arguments = (drawn, torch.randn(B), torch.rand(B, T) > 0.3)
    options = {"old_log_probs": -torch.rand(B, T) * 4, "config": config}
    results = []
    for of_q in (teacher(ids, log_q), flat):
        out = linear_grpo_loss(hidden, weight, *arguments, teacher=of_q, chunk_bytes=chunk_bytes, **options)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))))
    out = grpo_loss(hidden @ weight.T, *arguments, teacher=flat, **options)
    assert "recorded" in out.route.reason
    results.append((out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))))
    for result in results[:2]:
        for a, b in zip(result, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    own = linear_token_divergence(hidden, weight, flat, *arguments[::2]).divergence
    torch.testing.assert_close(own, token_divergence(hidden @ weight.T, flat, *arguments[::2]).divergence)


def test_in_place_and_losses_of_tokens():
    z, drawn, ids, log_q = recorded()
    config, arguments = LossConfig(surrogate=None, divergence=Divergence("forward_kl")), (drawn, None)
    leaf = z.clone().requires_grad_()
    out = grpo_loss(leaf, *arguments, config=config, teacher=teacher(ids, log_q))
    out.loss.backward()
    other = z.clone().requires_grad_()
    logits = other * 1.0
    grpo_loss(logits, *arguments, config=config, teacher=teacher(ids, log_q), inplace=True).loss.backward()
    assert torch.equal(other.grad, leaf.grad)
    third = z.clone().requires_grad_()
    losses = grpo_loss(third, *arguments, config=config, teacher=teacher(ids, log_q), token_losses=True).token_losses
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), out.loss)
    torch.testing.assert_close(third.grad, leaf.grad)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.nightly)])
def test_one_graph(dynamic):
    """The call's temperature is a symbol where sizes are."""
    z, drawn, ids, log_q = recorded()
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))
    torch._dynamo.reset()

    def step(z: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        return grpo_loss(z, drawn, None, teacher=teacher(ids, log_q), config=config).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    (own, *_), (other, *_) = leaves = [(z.clone().requires_grad_(), ids, log_q) for _ in range(2)]
    for function, given in zip((step, compiled), leaves, strict=True):
        function(*given).backward()
    assert torch.equal(own.grad, other.grad)


def test_rows_of_their_own_lengths_leave_the_graph(caplog):
    """Their longest is a number of the host: a break that torch.compile has nothing to say about."""
    z, drawn, ids, log_q = recorded()
    flat = teacher(ids.flatten(), log_q.flatten(), offsets=torch.arange(B * T + 1) * K)
    config = LossConfig(surrogate=None, divergence=Divergence("jsd"))
    torch._dynamo.reset()

    def step(z: Tensor) -> Tensor:
        return grpo_loss(z, drawn, None, teacher=flat, config=config).loss

    leaves = [z.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((step, torch.compile(step, backend="aot_eager")), leaves, strict=True):
        function(leaf).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert not [record for record in caplog.records if "Graph break" in record.getMessage()]


def test_renormalised_ones_change_their_temperature():
    z, drawn, ids, _ = recorded()
    u = torch.randn(B, T, V)
    at_one, at_half = (torch.log_softmax(u / tau, -1).gather(-1, ids) for tau in (1.0, 0.5))
    divergence = Divergence("forward_kl", rest="renormalize")
    found = [
        token_divergence(z, of_q, drawn, divergence=divergence, temperature=0.5).divergence
        for of_q in (teacher(ids, at_one), teacher(ids, at_half, temperature=0.5))
    ]
    torch.testing.assert_close(*found)


ONE, TWO = torch.zeros(1, 1, 2, dtype=torch.int64), torch.tensor([[[0, 1]]])
HALVES = torch.full((1, 1, 2), 0.5).log()
REFUSED = {
    "twice": (lambda: teacher(ONE, HALVES), {}, ValueError, "once each; got one twice"),
    "NaN": (lambda: teacher(TWO, math.nan * HALVES), {}, ValueError, "that are numbers; got NaN at a live token"),
    "outside": (lambda: teacher(TWO + V, HALVES), {}, IndexError, "recorded ids below 50; got 5"),
    "probabilities": (lambda: teacher(TWO, -HALVES), {}, ValueError, "log-probs <= 0; got 0.69"),
    "mass": (lambda: teacher(TWO, HALVES / 2), {}, ValueError, "one distribution; got a mass of 1.41"),
    "shape": (lambda: teacher(TWO[0], HALVES[0]), {}, ValueError, r"teacher.token_ids \(1, 1, 'k'\), or offsets="),
    "lengths": (lambda: teacher(TWO, HALVES[..., :1]), {}, ValueError, "teacher.log_probs of shape"),
    "dtypes": (lambda: teacher(HALVES, HALVES), {}, TypeError, "token_ids of integers"),
    "offsets": (
        lambda: teacher(TWO.view(-1), HALVES.view(-1), offsets=torch.tensor([0, 1])),
        {}, ValueError, "from 0 to 2, the number of ids; got from 0 to 1",
    ),
    "offsets' shape": (
        lambda: teacher(TWO.view(-1), HALVES.view(-1), offsets=torch.tensor([0, 1, 2])),
        {}, ValueError, r"teacher.offsets \(2,\) of integers",
    ),
    "no rest": (
        lambda: teacher(TWO, HALVES),
        {"divergence": Divergence("reverse_kl", rest="teacher_renormalize")},
        ValueError, "finite where the teacher has nothing",
    ),
    "no mass": (
        lambda: teacher(TWO, HALVES - math.inf), {"divergence": Divergence("jsd", rest="renormalize")},
        ValueError, r"tokens of some mass(.|\n)*ids < 0 alone",
    ),
    "no mass of the teacher's own": (
        lambda: teacher(TWO, HALVES - math.inf), {"divergence": Divergence("tvd", rest="teacher_renormalize")},
        ValueError, "tokens of some mass",
    ),
    "temperature": (lambda: teacher(TWO, HALVES), {"temperature": 0.5}, ValueError, "ones at 1(.|\n)*teacher_temp"),
    "a tensor's temperature": (
        lambda: teacher(TWO, HALVES), {"temperature": torch.tensor(0.5)}, ValueError, "temperature, 0.5; got ones at 1",
    ),
    "no temperature": (lambda: teacher(TWO, HALVES, temperature=0.0), {}, ValueError, r"temperature=...\) must .*> 0"),
    "a temperature by name": (lambda: teacher(TWO, HALVES, temperature="1"), {}, ValueError, r"Teacher\(temperature="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    make, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        token_divergence(torch.randn(1, 1, V), make(), torch.tensor([[2]]), **options)


def test_a_teacher_is_one_of_its_forms():
    z = torch.randn(1, 1, V)
    for given, message in (
        ({}, "got nothing"),
        ({"logits": z, "hidden": z, "weight": z}, "got logits, hidden, weight"),
        ({"hidden": z}, "got hidden"),
        ({"token_ids": TWO, "log_probs": HALVES}, "temperature= of recorded log-probs"),
        ({"logits": z, "temperature": 1.0}, "of recorded log-probs, and of them alone"),
        ({"logits": z.clone().requires_grad_()}, "without a gradient"),
        ({"logits": z, "bias": z[0, 0]}, "bias= beside hidden= alone; got logits="),
        ({"logits": z, "offsets": TWO}, "offsets= beside token_ids= alone; got logits="),
        ({"token_ids": TWO, "log_probs": HALVES, "temperature": 1.0, "logit_softcap": 3.0}, "logits or hidden= alone"),
    ):
        with pytest.raises(ValueError, match=message):
            Teacher(**given)
