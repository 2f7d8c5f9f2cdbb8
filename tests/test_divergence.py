"""Divergences from a teacher by the public functions: numbers by hand, what must hold of any divergence, and every
option of a call beside one. The digits of rows near each other are test_oracle's."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import Case, make
from threads import run_threads
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import grpo_kernels
from grpo_kernels import (
    KL,
    Divergence,
    GRPOLoss,
    LossConfig,
    Recorded,
    Reinforce,
    Teacher,
    TokenDivergence,
    TopK,
    grpo_loss,
    linear_grpo_loss,
    linear_token_divergence,
    linear_token_log_probs,
    normalizer,
    policy_loss,
    token_divergence,
    token_log_probs,
)
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.objectives.metrics import DIVERGENCE_SUMS
from grpo_kernels.verification import reference
from grpo_kernels.verification.tolerance import compare, truth_of
from grpo_kernels.verification.verify import complete

INF = math.inf
pytestmark = pytest.mark.sample(triton=2, cuda=2)


class Rows(NamedTuple):
    value: Tensor
    gradient: Tensor
    out: TokenDivergence


def diverge(z: Any, u: Any, kind: str, mix: float = 0.5, backend: str | None = None, **options: Any) -> Rows:
    """D of one row or of several, and its gradient in the policy's logits."""
    z, u = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (z, u))
    rows = (x.view(1, -1, x.shape[-1]) for x in (z, u))
    policy, teacher = (x.detach().clone() for x in rows)
    policy.requires_grad_()
    form = {name: options.pop(name) for name in ("logit_scale", "logit_softcap") if name in options}
    own = options.pop("teacher_temperature", None)
    divergence = Divergence(kind, mix=mix, teacher_temperature=own)
    ids = torch.zeros(policy.shape[:2], dtype=torch.int64)
    taught = Teacher(logits=teacher, **form)
    out = token_divergence(policy, taught, ids, divergence=divergence, backend=backend, **options)
    out.divergence.sum().backward()
    shape = z.shape[:-1]
    return Rows(out.divergence.detach().view(shape), policy.grad.view(z.shape), out)


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


# By hand: (policy, teacher, kind, mix, D, gradient)

A, B = (logs(0.6, 0.4), logs(0.9, 0.1)), (logs(0.5, 0.25, 0.25), logs(0.25, 0.5, 0.25))
C = ([0.0, 0.0, 0.0], [0.0, 0.0, -INF])
CONFIDENT = ([20.0, 0.0, 0.0, 0.0], [20.0, 1.0, 0.0, 0.0])
HAND = [
    (*A, "forward_kl", 0.5, 0.226289, (-0.3, 0.3)),
    (*A, "reverse_kl", 0.5, 0.311239, (-0.430022, 0.430022)),
    (*A, "jsd", 0.5, 0.063288, (-0.083178, 0.083178)),
    (*A, "jsd", 0.1, 0.020737, None),
    (*A, "jsd", 0.9, 0.026511, None),
    (*A, "tvd", 0.5, 0.3, (-0.24, 0.24)),
    (*A, "skew_forward_kl", 0.1, 0.190174, None),
    (*A, "skew_reverse_kl", 0.1, 0.226634, None),
    (*A, "mixed_kl", 0.25, 0.25 * 0.226289 + 0.75 * 0.311239, (-0.075 - 0.75 * 0.430022, None)),
    (*B, "forward_kl", 0.5, 0.173287, (0.25, -0.25, 0.0)),
    (*B, "reverse_kl", 0.5, 0.173287, (0.259930, -0.216608, -0.043322)),
    (*B, "jsd", 0.5, 0.042475, (0.061302, -0.055992, -0.005309)),
    (*B, "tvd", 0.5, 0.25, None),
    (*C, "forward_kl", 0.5, 0.405465, (-1 / 6, -1 / 6, 1 / 3)),
    (*C, "reverse_kl", 0.5, INF, (math.nan, math.nan, math.nan)),
    (*C, "mixed_kl", 0.5, INF, (math.nan, math.nan, math.nan)),
    (*C, "jsd", 0.5, 0.132304, (-0.050905, -0.050905, 0.101810)),
    (*C, "tvd", 0.5, 1 / 3, None),
    (*C[::-1], "reverse_kl", 0.5, 0.405465, (0.0, 0.0, 0.0)),
    (*C[::-1], "forward_kl", 0.5, INF, (1 / 6, 1 / 6, -1 / 3)),
]
"""The last: the gradient of a KL from the teacher is p - q where it is infinite, also at an impossible column."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("z", "u", "kind", "mix", "value", "gradient"), HAND)
def test_by_hand(backend, z, u, kind, mix, value, gradient, dtype):
    rows = [torch.tensor(x, dtype=dtype) for x in (z, u)]
    got = diverge(*rows, kind, mix, backend)
    assert got.value.item() == pytest.approx(value, abs=1e-6)
    for slope, expected in zip(got.gradient.tolist(), gradient or (), strict=False):
        assert expected is None or slope == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_confident_row_keeps_its_digits(backend, dtype):
    """One pass over log-softmaxes in fp32 gives 0 and 0."""
    rows = [torch.tensor(x, dtype=dtype) for x in CONFIDENT]
    for kind, value in (("forward_kl", 2.06115e-9), ("reverse_kl", 1.48049e-9), ("jsd", 4.25135e-10)):
        got = diverge(*rows, kind, backend=backend)
        assert got.value.item() == pytest.approx(value, rel=1e-5)
        if kind == "forward_kl":
            assert got.gradient[0].item() == pytest.approx(3.54164e-9, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_confident_column_beside_a_teacher_who_prefers_another(backend, kind):
    """Slopes are relative to the one at that column, bit for bit (tests/test_divergence_kernels.py has more rows)."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(1, 8, 120, generator=generator)
    logits[..., 7] += 16 + 6 * torch.rand(1, 8, generator=generator)
    rows = logits + 0.3 * torch.randn(logits.shape, generator=generator)
    rows[..., 9] = logits[..., 7] + 4
    rows[..., 7] = rows[..., 9] - 8 * torch.rand(1, 8, generator=generator)

    def gradient(logits: Tensor, rows: Tensor, backend: str) -> Tensor:
        logits = logits.clone().requires_grad_()
        ids = torch.zeros(logits.shape[:2], dtype=torch.int64)
        token_divergence(
            logits, Teacher(logits=rows), ids, divergence=kind, backend=backend
        ).divergence.sum().backward()
        return logits.grad[..., 7].double()

    exact = gradient(logits.double(), rows.double(), "torch")
    torch.testing.assert_close(gradient(logits, rows, backend), exact, rtol=1e-4, atol=2e-10)


@pytest.mark.parametrize(
    ("tau", "own", "value", "slope"),
    [(1.0, None, 0.036690, None), (2.0, None, 0.016417, -1 / 24), (2.0, 1.0, 0.149697, -0.116667)],
)
def test_temperatures_of_both(backend, tau, own, value, slope):
    got = diverge([math.log(4), 0.0], [math.log(9), 0.0], "forward_kl", 0.5, backend, temperature=tau,
                  teacher_temperature=own)  # fmt: skip
    assert got.value.item() == pytest.approx(value, abs=1e-6)
    assert slope is None or got.gradient[0].item() == pytest.approx(slope, abs=1e-6)


def test_ends_of_the_jensen_shannon_divergence():
    """J/w tends to the KL from the teacher, J/(1 - w) to that to it."""
    assert diverge(*A, "jsd", 1e-4).value.item() / 1e-4 == pytest.approx(0.226270, abs=1e-6)
    assert diverge(*A, "jsd", 1 - 1e-4).value.item() / 1e-4 == pytest.approx(0.311189, abs=1e-6)


# What holds of every divergence


def drawn(*shape: int, spread: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_are_exactly_0_apart(kind, dtype):
    z = torch.round(4 * drawn(9, 301)) / 4
    z[2, ::3] = -INF
    z[3] = 80 * z[3].sign()
    z = z.to(dtype)
    for offset in (0.0, 8.0):
        u = (z.double() + offset).to(dtype)
        equal = (u.double() - z.double()).nan_to_num(nan=offset) == offset
        assert equal.all()
        got = diverge(z, u, kind, 0.3)
        assert (got.value == 0).all()
        assert (got.gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_any_divergence_is(kind):
    """At least 0; a gradient that sums to 0; the same for logits that are shifted; no order of columns."""
    z, u, order = drawn(7, 211), drawn(7, 211, seed=1), torch.randperm(211)
    got = diverge(z, u, kind, 0.3)
    assert (got.value > 0).all()
    assert (got.gradient.sum(-1).abs() <= 1e-14 * got.gradient.abs().sum(-1)).all()
    for shifted in (diverge(z + 50, u, kind, 0.3), diverge(z, u - 30, kind, 0.3)):
        torch.testing.assert_close(shifted.value, got.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(shifted.gradient, got.gradient, rtol=1e-10, atol=1e-15)
    permuted = diverge(z[:, order], u[:, order], kind, 0.3)
    torch.testing.assert_close(permuted.value, got.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(permuted.gradient, got.gradient[:, order], rtol=1e-11, atol=1e-16)


def test_relations_of_kinds():
    z, u = drawn(7, 61), drawn(7, 61, seed=1)
    for mix in (0.2, 0.5):
        swapped = diverge(u, z, "jsd", 1 - mix).value
        torch.testing.assert_close(diverge(z, u, "jsd", mix).value, swapped, rtol=1e-13, atol=0)
    torch.testing.assert_close(diverge(z, u, "tvd").value, diverge(u, z, "tvd").value, rtol=1e-13, atol=0)
    forward, reverse = diverge(z, u, "forward_kl"), diverge(z, u, "reverse_kl")
    torch.testing.assert_close(forward.value, diverge(u, z, "reverse_kl").value, rtol=1e-13, atol=0)
    mixed = diverge(z, u, "mixed_kl", 0.3)
    for name in ("value", "gradient"):
        sum_of_both = 0.3 * getattr(forward, name) + 0.7 * getattr(reverse, name)
        torch.testing.assert_close(getattr(mixed, name), sum_of_both, rtol=1e-12, atol=1e-16)
    for kind, bound in (("jsd", math.log(2)), ("tvd", 1.0), ("skew_forward_kl", math.log(2))):
        assert (diverge(50 * z, 50 * u, kind).value <= bound * (1 + 1e-12)).all()


def test_entropies_beside():
    """KL from the teacher and the teacher's entropy are the cross-entropy; the KL to a uniform teacher is ln V less the
    policy's entropy; that from one that is sure is -ℓ. Gradients too."""
    z, u = drawn(5, 41), drawn(5, 41, seed=1)
    got = diverge(z, u, "forward_kl")
    log_p, log_q = (torch.log_softmax(x, -1) for x in (z, u))
    cross = -(log_q.exp() * log_p).sum(-1)
    torch.testing.assert_close(got.value + got.out.teacher_entropy[0], cross, rtol=1e-13, atol=0)

    leaf, ids = z[None].clone().requires_grad_(), torch.randint(41, (1, 5))
    uniform = token_divergence(leaf, Teacher(logits=torch.full_like(leaf, 2.5, requires_grad=False)), ids)
    torch.testing.assert_close(uniform.divergence, math.log(41) - uniform.entropy, rtol=1e-12, atol=0)
    gradients = [
        torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (uniform.divergence, -uniform.entropy)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)

    sure = torch.full_like(z, -INF).scatter(-1, ids[0, :, None], 0.0)[None]
    known = token_divergence(leaf, Teacher(logits=sure), ids, divergence="forward_kl")
    torch.testing.assert_close(known.divergence, -known.log_probs, rtol=1e-12, atol=0)
    assert (known.teacher_entropy == 0).all()
    gradients = [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (known.divergence, -known.log_probs)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)


# Trajectories


class Tree(NamedTuple):
    """All responses of T tokens to one prompt, each with the logits of the prefixes that it passes."""

    policy: Tensor
    """(states, V), a leaf."""
    teacher: Tensor
    states: Tensor
    """(responses, T)"""
    ids: Tensor

    @classmethod
    def draw(cls, vocab: int, length: int) -> Tree:
        ids = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        places = {(): 0}
        for response in ids.tolist():
            for t in range(length):
                places.setdefault(tuple(response[:t]), len(places))
        states = torch.tensor([[places[tuple(response[:t])] for t in range(length)] for response in ids.tolist()])
        policy, teacher = drawn(len(places), vocab, spread=1.0), drawn(len(places), vocab, spread=1.0, seed=1)
        return cls(policy.requires_grad_(), teacher, states, ids)

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Of policy and teacher, (responses, T) each."""
        chosen = self.ids[..., None]
        return tuple(
            torch.log_softmax(rows, -1)[self.states].gather(-1, chosen).squeeze(-1)
            for rows in (self.policy, self.teacher)
        )

    def losses(self, config: LossConfig, **options: Any) -> Tensor:
        """The losses of tokens, (responses, T)."""
        advantages = options.pop("advantages", None)
        logits = self.policy[self.states]
        return grpo_loss(logits, self.ids, advantages, config=config, token_losses=True, **options).token_losses

    def expected(self, values: Tensor) -> Tensor:
        """The sum over responses of their probabilities, detached, times the sums of ``values`` over tokens."""
        probability = self.log_probs()[0].sum(-1).exp().detach()
        return (probability * values.sum(-1)).sum()

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.policy)[0]


@pytest.mark.parametrize(("vocab", "length"), [(4, 2), (3, 3)])
def test_the_kl_of_whole_responses(vocab, length):
    """By enumeration: sums of k1 and k3 over tokens are the exact KL of responses, and so is that of rows. The
    gradient of rows is that of k2 straight through; k3's is another KL's. With later rows' KL in the advantages it is
    the gradient of the KL of responses."""
    tree = Tree.draw(vocab, length)
    log_p, log_q = tree.log_probs()
    x = log_p - log_q
    of_responses = (log_p.sum(-1).exp() * x.sum(-1)).sum()
    teacher = Teacher(logits=tree.teacher[tree.states])
    only = LossConfig(surrogate=None)

    def exact(kind: str) -> Tensor:
        config = dataclasses.replace(only, divergence=Divergence(kind))
        return tree.losses(config, teacher=teacher)

    rows = tree.expected(exact("reverse_kl"))
    for value in (rows, tree.expected(x), tree.expected(torch.expm1(-x) + x)):
        assert value.item() == pytest.approx(of_responses.item(), rel=1e-12)

    def sampled(estimator: str, gradient: str) -> Tensor:
        config = dataclasses.replace(only, kl=KL(1.0, estimator, gradient=gradient))
        return tree.gradient(tree.expected(tree.losses(config, ref_log_probs=log_q.detach())))

    pathwise = tree.gradient(rows)
    torch.testing.assert_close(sampled("k1", "straight_through_k2"), pathwise, rtol=1e-10, atol=1e-14)
    of_k3 = tree.gradient(tree.expected(exact("forward_kl")))
    torch.testing.assert_close(sampled("k3", "pathwise"), of_k3, rtol=1e-10, atol=1e-14)
    assert (of_k3 - pathwise).abs().max() > 1e-2

    later = exact("reverse_kl").detach().flip(-1).cumsum(-1).flip(-1) - exact("reverse_kl").detach()
    reinforce = LossConfig(Reinforce())
    future = tree.gradient(tree.expected(tree.losses(reinforce, advantages=-later)))
    torch.testing.assert_close(pathwise + future, tree.gradient(of_responses), rtol=1e-10, atol=1e-14)
    own = tree.gradient(tree.expected(tree.losses(reinforce, advantages=-exact("reverse_kl").detach())))
    assert own.abs().max() < 1e-14  # a value of the state alone is no advantage


def test_the_part_that_is_dropped():
    """Two tokens, by hand: the first state's rows are equal, and only one choice leads away from the teacher."""
    policy, teacher = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    teacher[1] = torch.tensor(logs(0.75, 0.25), dtype=torch.float64)
    ids = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    tree = Tree(policy.requires_grad_(), teacher, torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]), ids)
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))
    losses = tree.losses(config, teacher=Teacher(logits=teacher[tree.states]))
    assert losses[0, 1].item() == pytest.approx(0.143841, abs=1e-6)
    assert (tree.gradient(tree.expected(losses))[0] == 0).all()
    log_p, log_q = tree.log_probs()
    whole = tree.gradient((log_p.sum(-1).exp() * (log_p - log_q).sum(-1)).sum())
    assert whole[0, 0].item() == pytest.approx(0.035960, abs=1e-6)


# Beside the rest of a loss


def taught(noise: float = 0.5, form: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Case:
    """A case with a teacher near the policy, in its dtype and of its shape."""
    case = make(seed=seed, **options)
    apart = noise * torch.randn(case.logits.shape, generator=torch.Generator().manual_seed(seed + 1))
    case.options["teacher"] = Teacher(logits=(case.logits + apart).to(case.logits.dtype), **(form or {}))
    return case


def assert_reference(case: Case, config: LossConfig, backend: str | None = None, **options: Any) -> None:
    """Value, gradient and metrics, by the float64 rule."""
    options = {**case.options, "config": config, **options}
    exact = truth_of(case.logits, *case.arguments, **options)
    out, gradient = case.run(backend, **{"config": config, **options})
    found = compare(exact, out.loss.detach(), out.log_probs, out.entropy, gradient)
    assert found.holds, found
    expected = reference.grpo_loss(case.logits, *case.arguments, **options).metrics.as_dict()
    rtol = 1e-10 if case.logits.dtype == torch.float64 else 1e-4
    for name, value in out.metrics.as_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=rtol, check_dtype=False, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_by_the_rule(backend, kind, dtype):
    """Of the whole loss, on every backend."""
    case = taught(dtype=dtype, temperature=0.9)
    assert_reference(case, LossConfig(kl=KL(0.1), entropy_coef=0.05, divergence=Divergence(kind, 0.7, 0.3)), backend)


FORMS = {
    "temperature of its own": ({}, {"temperature": 0.7}, 1.4),
    "scales": ({"logit_scale": 0.6}, {"logit_scale": 1.3}, None),
    "softcaps": ({"logit_softcap": 4.0}, {"logit_softcap": 7.0, "temperature": 0.8}, None),
    "a capped teacher": ({"logit_softcap": 4.0, "logit_scale": 0.5}, {}, 0.9),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_forms_of_both_models(backend, kind, form):
    own_form, options, own = FORMS[form]
    case = taught(form=own_form, **options)
    assert_reference(case, LossConfig(divergence=Divergence(kind, teacher_temperature=own)), backend)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_of_another_dtype(dtype, other):
    case = taught(dtype=dtype)
    case.options["teacher"] = Teacher(logits=case.options["teacher"].logits.to(other))
    assert_reference(case, LossConfig(surrogate=None, divergence=Divergence("reverse_kl")))


def gradients_add(case: Case, config: LossConfig, divergence: Divergence, **options: Any) -> None:
    """A loss beside a divergence is both alone."""
    teacher = case.options.pop("teacher")
    both, of_both = case.run(config=dataclasses.replace(config, divergence=divergence), teacher=teacher, **options)
    one, of_one = case.run(config=config, **options)
    alone = dataclasses.replace(config, surrogate=None, level="token", kl=KL(), entropy_coef=0.0, rollout=())
    other, of_other = case.run(config=dataclasses.replace(alone, divergence=divergence), teacher=teacher, **options)
    assert of_other.abs().max() > 1e-3 * of_one.abs().max()
    assert both.loss.item() == pytest.approx(one.loss.item() + other.loss.item(), rel=1e-12, abs=1e-14)
    torch.testing.assert_close(of_both, of_one + of_other, rtol=1e-10, atol=1e-15)
    assert torch.equal(both.log_probs, one.log_probs)
    assert both.metrics.divergence_loss.item() == pytest.approx(other.loss.item(), rel=1e-12)


@pytest.mark.parametrize("preset", LossConfig.presets())
def test_beside_every_preset(preset):
    gradients_add(taught(dtype=torch.float64), complete(preset), Divergence("reverse_kl", 0.7))


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"])
def test_beside_every_level_and_aggregation(level, aggregation):
    config = LossConfig(level=level, aggregation=aggregation, constant_length=11, group_size=2, kl=KL(0.1))
    gradients_add(taught(dtype=torch.float64), config, Divergence("jsd", 0.7))


def test_token_weights_have_no_part_in_it():
    case = taught(dtype=torch.float64)
    weights = torch.rand(case.token_ids.shape, dtype=torch.float64)
    gradients_add(case, complete("dapo"), Divergence("forward_kl"), token_weights=weights)


@pytest.mark.parametrize(("aggregation", "value"), [("token_mean", 0.25), ("sequence_mean", 0.5)])
def test_aggregations_of_two_lengths(aggregation, value):
    """Lengths 1 and 3, divergences 1 and 0, 0, 0."""
    teacher = torch.zeros(2, 3, 2, dtype=torch.float64)
    teacher[0, 0] = torch.tensor([0.0, -2 * math.acosh(math.e)], dtype=torch.float64)  # KL from ½, ½ is 1
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    config = LossConfig(surrogate=None, aggregation=aggregation, divergence=Divergence("reverse_kl"))
    logits, ids = torch.zeros(2, 3, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    out = grpo_loss(logits, ids, None, mask, config=config, teacher=Teacher(logits=teacher))
    assert out.loss.item() == pytest.approx(value, rel=1e-12)


def test_coefficients():
    """A number, a tensor, and a 0 that leaves the metric; 0·inf is 0."""
    case = taught(dtype=torch.float64)
    config = complete("grpo", divergence=Divergence("reverse_kl", 0.5))
    plain, gradient = case.run(config=config)
    twice, of_twice = case.run(config=config, divergence_coef=torch.tensor(1.0))
    none, of_none = case.run(config=config, divergence_coef=0.0)
    assert twice.metrics.divergence_loss.item() == pytest.approx(2 * plain.metrics.divergence_loss.item())
    torch.testing.assert_close(of_twice - of_none, 2 * (gradient - of_none), rtol=1e-10, atol=1e-15)
    assert none.metrics.divergence == plain.metrics.divergence > 0
    impossible = Teacher(logits=case.options["teacher"].logits.masked_fill(torch.arange(97) % 2 == 0, -INF))
    out, of_impossible = case.run(config=config, divergence_coef=0.0, teacher=impossible)
    assert torch.equal(of_impossible, of_none)
    assert out.loss == none.loss
    assert out.metrics.infinite_divergences == case.mask.sum()


def test_metrics_of_infinite_rows():
    case = taught(dtype=torch.float64)
    b, t = case.mask.nonzero()[0].tolist()
    teacher = case.options["teacher"].logits.clone()
    teacher[b, t, 3] = -INF
    config = LossConfig(surrogate=None, divergence=Divergence("forward_kl"))
    out, gradient = case.run(config=config, teacher=Teacher(logits=teacher))
    assert out.loss.isfinite()
    assert out.metrics.infinite_divergences == 0
    policy = case.logits.clone()
    policy[b, t, 3] = -INF
    out, gradient = dataclasses.replace(case, logits=policy).run(config=config)
    assert out.loss == INF
    assert out.metrics.infinite_divergences == 1
    assert out.metrics.divergence.isfinite()
    assert gradient.isfinite().all()
    reverse = dataclasses.replace(config, divergence=Divergence("reverse_kl"))
    _, gradient = case.run(config=reverse, teacher=Teacher(logits=teacher))
    assert gradient[b, t].isnan().all()
    gradient[b, t] = 0
    assert gradient.isfinite().all()


def test_losses_of_tokens_and_normalizers():
    case = taught(dtype=torch.float64)
    config = complete("dapo", divergence=Divergence("jsd", 0.7))
    leaf = case.logits.clone().requires_grad_()
    losses = grpo_loss(leaf, *case.arguments, **case.options, config=config, token_losses=True).token_losses
    assert (losses[~case.mask] == 0).all()
    weights = torch.rand(losses.shape, dtype=torch.float64)
    plain = grpo_loss(leaf, *case.arguments, **case.options, config=config).loss
    assert losses.sum().item() / case.mask.sum().item() == pytest.approx(plain.item(), rel=1e-12)
    (weights * losses).sum().backward()
    rows = token_divergence(case.logits.clone().requires_grad_(), case.options["teacher"], case.token_ids, case.mask,
                            divergence=config.divergence)  # fmt: skip
    own = dataclasses.replace(config, surrogate=None, kl=KL(), entropy_coef=0.0)
    of_tokens = grpo_loss(case.logits, *case.arguments, **case.options, config=own, token_losses=True).token_losses
    torch.testing.assert_close(of_tokens, 0.7 * rows.divergence, rtol=1e-12, atol=0)

    other = case.logits.clone().requires_grad_()
    total = normalizer(case.mask, config)
    halved = grpo_loss(other, *case.arguments, **case.options, config=config, normalizer=total, grad_scale=0.5).loss
    (0.5 * halved).backward()
    _, gradient = case.run(config=config)
    assert halved.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(other.grad, 0.5 * gradient, rtol=1e-11, atol=1e-16)


# Batches


def test_packed_is_padded():
    case = taught(dtype=torch.float64, extra_row=False)
    config = complete("grpo", divergence=Divergence("reverse_kl"))
    padded, gradient = case.run(config=config)
    teacher, (sequences, length) = case.options["teacher"].logits, case.token_ids.shape
    flat = {name: value.reshape(1, -1) for name, value in case.options.items() if isinstance(value, Tensor)}
    leaf = case.logits.reshape(-1, 97).clone().requires_grad_()
    flat["cu_seqlens"] = torch.arange(sequences + 1) * length
    for shape in ((-1,), (1, -1)):
        flat["teacher"] = Teacher(logits=teacher.reshape(*shape, 97))
        flat |= {name: flat[name].reshape(shape) for name in ("old_log_probs", "ref_log_probs")}
        arguments = case.token_ids.reshape(shape), case.advantages, case.mask.reshape(shape)
        out = grpo_loss(leaf.view(*shape, 97), *arguments, **flat, config=config)
        assert out.loss.item() == pytest.approx(padded.loss.item(), rel=1e-13)
        assert torch.equal(torch.autograd.grad(out.loss, leaf)[0].view_as(gradient), gradient)


@pytest.mark.parametrize("extra_row", [True, False])
def test_rows_of_the_teacher(extra_row):
    """(B, T, V) and (B, T+1, V) of either, strided and offset, have the same bits."""
    case = taught(extra_row=extra_row)
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))
    expected = case.run(config=config)
    logits, length = case.options["teacher"].logits, case.token_ids.shape[1]
    longer = torch.cat([logits[:, :length], torch.full_like(logits[:, :1], math.nan)], 1)
    strided = torch.full((*logits.shape[:2], 100), math.nan)
    strided[..., 2:99] = logits
    for teacher in (
        longer,
        logits[:, :length],
        strided[..., 2:99],
        logits.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        got = case.run(config=config, teacher=Teacher(logits=teacher))
        assert torch.equal(got[0].loss, expected[0].loss)
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("extra_row", [0, 1])
def test_packed_rows_of_the_teacher(extra_row):
    """(N, V) and (1, N, V) beside packed (N, V) and (1, N, V), as the tensors of tokens."""
    case = taught(batch=1, length=9)
    logits, kept = case.options["teacher"].logits[:, : 9 + extra_row], []
    leaf = case.logits[0, :9].clone().requires_grad_()
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))
    options, arguments = {"config": config, "cu_seqlens": torch.tensor([0, 4, 9])}, (case.token_ids[0], None)
    for teacher in (Teacher(logits=logits[0]), Teacher(logits=logits)):
        out = grpo_loss(leaf, *arguments, teacher=teacher, **options)
        states = linear_grpo_loss(leaf, torch.eye(97), *arguments, teacher=teacher, **options)
        torch.testing.assert_close(states.loss, out.loss)
        kept.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaf)))
        whole = grpo_loss(leaf[None], case.token_ids, None, teacher=teacher, **options)
        assert torch.equal(whole.loss, out.loss)
    assert all(map(torch.equal, *kept))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_are_not_read(backend, kind):
    case = taught()
    config = LossConfig(divergence=Divergence(kind))
    expected, gradient = case.run(backend, config=config)
    policy, teacher = case.logits.clone(), case.options["teacher"].logits.clone()
    for rows in (policy, teacher):
        rows[:, -1] = math.nan
        rows[:, :-1][~case.mask] = math.nan
    out, of_nan = dataclasses.replace(case, logits=policy).run(backend, config=config, teacher=Teacher(logits=teacher))
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(of_nan, gradient)
    assert (gradient[:, :-1][~case.mask] == 0).all()
    taught_by = Teacher(logits=teacher)
    rows = token_divergence(policy, taught_by, case.token_ids, case.mask, divergence=kind, backend=backend)
    assert all((values[~case.mask] == 0).all() for values in rows)


def test_an_empty_batch(backend):
    case = taught()
    config = complete("grpo", divergence=Divergence("jsd"))
    nothing = dataclasses.replace(case, mask=torch.zeros_like(case.mask))
    out, gradient = nothing.run(backend, config=config)
    assert out.loss == 0
    assert (gradient == 0).all()
    assert out.metrics.divergence == out.metrics.teacher_entropy == 0


def test_nan_stays_in_its_row():
    case = taught()
    teacher = case.options["teacher"].logits.clone()
    teacher[0, 0, 5] = math.nan
    _, gradient = case.run(config=LossConfig(divergence=Divergence("forward_kl")), teacher=Teacher(logits=teacher))
    assert gradient[0, 0].isnan().all()
    gradient[0, 0] = 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["policy", "teacher"])
def test_nan_is_no_number_of_the_truth_either(where, kind):
    """In value and metrics; and a row that no column of is possible."""
    config = LossConfig(None, divergence=Divergence(kind))
    for bad in (math.nan, -INF):
        case = taught(dtype=torch.float64, batch=2, length=3, vocab=5)
        rows = case.logits if where == "policy" else case.options["teacher"].logits
        rows[0, 0] = bad
        case.options |= {"old_log_probs": None, "ref_log_probs": None}
        options = {**case.options, "config": config}
        found = grpo_loss(case.logits, case.token_ids, None, case.mask, **options)
        exact = reference.grpo_loss(case.logits, case.token_ids, None, case.mask, **options)
        assert found.loss.isnan()
        assert exact.loss.isnan()
        for name in DIVERGENCE_SUMS:
            values = (getattr(out.metrics, name) for out in (found, exact))
            torch.testing.assert_close(*values, equal_nan=True, rtol=1e-9, atol=1e-9)


PADDING = [0.0, 1e4, -INF, math.nan]


@pytest.mark.parametrize("x", PADDING)
def test_padded_vocabularies(backend, x):
    """By hand: what is beyond vocab_size has no probability, in either, and gradient exactly 0."""
    row, wide = [math.log(3), 0.0], [math.log(3), 0.0, x]
    for z, u in ((row, wide), (wide, row), (wide, [*wide, 7.0])):
        for kind in KINDS:
            got = diverge(z, u, kind, backend=backend, vocab_size=2)
            assert got.value == 0
            assert (got.gradient == 0).all()
    apart = diverge([0.0, 0.0, x], [*wide, x], "reverse_kl", backend=backend, vocab_size=2)
    expected = diverge([0.0, 0.0], row, "reverse_kl", backend=backend)
    assert torch.equal(apart.value, expected.value)
    assert torch.equal(apart.gradient[:2], expected.gradient)
    assert (apart.gradient[2:] == 0).all()


@pytest.mark.parametrize("integer", [np.int64, np.uint16])
@pytest.mark.parametrize("teacher", [True, False])
def test_vocab_size_is_an_integer_of_any_type(integer, teacher):
    """As arrays and configs hold it, with and without a teacher."""
    config = LossConfig(divergence=Divergence("jsd") if teacher else None)
    case = taught(batch=3, length=4, vocab=11)
    case.token_ids.clamp_(max=8)
    if not teacher:
        del case.options["teacher"]
    losses = [case.run(config=config, vocab_size=size)[0].loss for size in (9, integer(9))]
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", [tuple, list])
def test_an_adapter_beside_a_padded_head(kind):
    case = taught(batch=3, length=4, vocab=9)
    hidden, weight, states, own = (
        drawn(*shape, dtype=torch.float32) for shape in ((3, 4, 5), (9, 5), (3, 4, 2), (9, 2))
    )
    losses = []
    for rows, options in (((weight, own), {}), ((weight, own), {"vocab_size": 9}), (None, {"vocab_size": 9})):
        head, down = rows or (torch.cat([x, drawn(2, x.shape[1], dtype=torch.float32)]) for x in (weight, own))
        common = {**case.options, "config": LossConfig(divergence=Divergence("jsd")), **options}
        losses.append(linear_grpo_loss(hidden, head, *case.arguments, adapter=kind((states, down)), **common).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("x", PADDING)
def test_padded_vocabularies_of_losses(x):
    case, dtype = taught(dtype=torch.float64), torch.float64
    config = complete("grpo", divergence=Divergence("reverse_kl"))
    expected, gradient = case.run(config=config)
    teacher = case.options["teacher"].logits
    wider = [torch.cat([rows, torch.full((*rows.shape[:2], n), x, dtype=dtype)], -1)
             for rows, n in ((case.logits, 2), (teacher, 5))]  # fmt: skip
    padded = dataclasses.replace(case, logits=wider[0])
    out, of_wider = padded.run(config=config, teacher=Teacher(logits=wider[1]), vocab_size=97)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(of_wider[..., :97], gradient)
    assert (of_wider[..., 97:] == 0).all()

    hidden, weight = drawn(6, 10, 5, spread=1.0), drawn(97, 5)
    taller = torch.cat([weight, torch.full((3, 5), x, dtype=dtype)])
    results = []
    for head, columns, options in ((weight, teacher, {}), (taller, wider[1], {"vocab_size": 97})):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        options = {**case.options, "teacher": Teacher(logits=columns), "config": config, **options}
        loss = linear_grpo_loss(*leaves, *case.arguments, **options).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    (loss, *gradients), (of_taller, *others) = results
    assert torch.equal(loss, of_taller)
    assert torch.equal(gradients[0], others[0])
    assert torch.equal(gradients[1], others[1][:97])
    assert (others[1][97:] == 0).all()


# Autograd


def test_bits_with_and_without_a_gradient(backend):
    """But those of the teacher's entropy, a metric, where the CPU's one pass makes it of the policy's exponentials."""
    case = taught()
    config = complete("grpo", divergence=Divergence("reverse_kl"))
    with_gradient, _ = case.run(backend, config=config)
    options = {**case.options, "config": config, "backend": backend}
    with torch.no_grad():
        without = grpo_loss(case.logits, *case.arguments, **options)
    assert torch.equal(with_gradient.loss, without.loss)
    metrics, others = with_gradient.metrics.as_dict(), without.metrics.as_dict()
    entropies = metrics.pop("teacher_entropy"), others.pop("teacher_entropy")
    torch.testing.assert_close(*entropies, rtol=1e-6 if backend == "cpu" else 0, atol=0)
    assert len(metrics) > 15
    assert all(torch.equal(value, others[name]) for name, value in metrics.items())
    some = slice(2, 5)
    alone = token_divergence(case.logits[some], Teacher(logits=options["teacher"].logits[some]), case.token_ids[some],
                             case.mask[some], backend=backend)  # fmt: skip
    whole = token_divergence(case.logits, options["teacher"], case.token_ids, case.mask, backend=backend)
    for a, b in zip(alone, whole, strict=True):
        assert torch.equal(a, b[some])
    old = token_log_probs(case.logits, case.token_ids, case.mask, backend=backend)
    assert torch.equal(whole.log_probs, old.log_probs)
    assert torch.equal(whole.entropy, old.entropy)


@pytest.mark.sample(triton=1, cuda=2)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_inplace_is_out_of_place(backend, preset):
    case = taught()
    config = complete(preset, divergence=Divergence("jsd"))
    _, gradient = case.run(backend, config=config)
    logits = case.logits.clone().requires_grad_()
    copied = logits * 1
    teacher = case.options["teacher"].logits
    kept = teacher.clone()
    grpo_loss(copied, *case.arguments, **case.options, config=config, backend=backend, inplace=True).loss.backward()
    assert torch.equal(logits.grad, gradient)
    assert torch.equal(teacher, kept)
    leaf = case.logits.clone().requires_grad_()
    copied, taught_by = leaf * 1, case.options["teacher"]
    out = token_divergence(copied, taught_by, case.token_ids, case.mask, inplace=True, backend=backend)
    out.divergence.sum().backward()
    other = case.logits.clone().requires_grad_()
    token_divergence(other, taught_by, case.token_ids, case.mask, backend=backend).divergence.sum().backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("function", [grpo_loss, token_divergence])
def test_inplace_beside_a_teacher_in_the_same_memory(function):
    """Refused where the two overlap, whose later rows would read a gradient; both models in one batch do not."""
    config, ids = LossConfig(None, divergence=Divergence("jsd")), torch.zeros(2, 5, dtype=torch.int64)

    def run(policy: Tensor, teacher: Tensor, inplace: bool) -> Tensor:
        if function is token_divergence:
            return token_divergence(policy, Teacher(logits=teacher), ids, inplace=inplace).divergence.sum()
        return grpo_loss(policy, ids, None, teacher=Teacher(logits=teacher), config=config, inplace=inplace).loss

    leaf = drawn(4, 6, 7, dtype=torch.float32).requires_grad_()
    both = leaf * 1.0
    number = both[:2].numel()
    ends = [both.flatten()[first : first + number].view(2, 6, 7) for first in (0, number - 1)]  # share one number
    overlapping = ((both[:2, 1:], both[:2, :5]), (both[:2], both[:2]), (both[:2], both[1:3]), ends, ends[::-1])
    for policy, teacher in overlapping:
        with pytest.raises(ValueError, match=r"in memory of their own with inplace=True(.|\n)*clone\(\)"):
            run(policy, teacher.detach(), True)
        run(policy, teacher.detach(), False)
        with torch.no_grad():
            run(policy, teacher.detach(), True)
    gradients = []
    for inplace in (False, True):
        both = leaf * 1.0
        run(both[:2], both[2:].detach(), inplace).backward()
        gradients.append(leaf.grad)
        leaf.grad = None
    assert torch.equal(*gradients)
    assert (gradients[0][2:] == 0).all()


def test_backward_twice():
    """Of two passes it repeats; of one, and of hidden states, it is refused as it is without a teacher."""
    case = taught()
    leaf = case.logits.clone().requires_grad_()
    out = token_divergence(leaf, case.options["teacher"], case.token_ids, case.mask)
    out.divergence.sum().backward(retain_graph=True)
    once = leaf.grad.clone()
    out.divergence.sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * once, rtol=0, atol=0)
    config = complete("gspo", divergence=Divergence("reverse_kl"))
    loss = grpo_loss(leaf, *case.arguments, **case.options, config=config).loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    hidden, weight = drawn(6, 10, 5, dtype=torch.float32).requires_grad_(), drawn(97, 5, dtype=torch.float32)
    loss = linear_grpo_loss(hidden, weight, *case.arguments, **case.options, config=config).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient has been handed over|second backward"):
        loss.backward()


def test_a_teacher_made_in_inference_mode(backend):
    """It is copied where a backward needs it, and has the gradient of an ordinary one."""
    case, kept = taught(), []
    for of in (torch.inference_mode, torch.no_grad):
        with of():
            teacher = Teacher(logits=case.options["teacher"].logits * 1)
        leaf = case.logits.clone().requires_grad_()
        token_divergence(leaf, teacher, case.token_ids, case.mask, backend=backend).divergence.sum().backward()
        kept.append(leaf.grad)
    assert torch.equal(*kept)


V = 300  # so many that recorded sets gather rows of the head
SIZES = {"logits": (2, 3, V), "hidden": (2, 3, 5), "weight": (V, 5), "teacher.logits": (2, 3, V),
         "teacher.hidden": (2, 3, 4), "teacher.weight": (V, 4), "mask": (2, 3, V)}  # fmt: skip


def kept_alive(call) -> list[str]:
    """Return which tensors live on when a call's output, of which the backward has run, is kept. What learns is
    computed: a leaf is the graph's."""
    given = {name: drawn(*size, dtype=torch.float32) for name, size in SIZES.items()}
    given |= {name: given[name].requires_grad_() * 1 for name in ("logits", "hidden", "weight")}
    given["mask"] = given["mask"] > -INF
    storages = {name: weakref.ref(tensor.untyped_storage()) for name, tensor in given.items()}
    output = call(given, torch.zeros(2, 3, dtype=torch.int64))
    del given
    output.sum().backward()
    gc.collect()
    assert output.grad_fn is not None
    return [name for name, storage in storages.items() if storage() is not None]


_STATES = LossConfig(surrogate=None, divergence=Divergence("jsd"))
KEEPERS = {
    "logits": lambda of, ids: token_divergence(
        of["logits"], Teacher(logits=of["teacher.logits"]), ids
    ).divergence,
    "states beside logits": lambda of, ids: linear_token_divergence(
        of["hidden"], of["weight"], Teacher(logits=of["teacher.logits"]), ids
    ).divergence,
    "states beside states": lambda of, ids: linear_token_divergence(
        of["hidden"], of["weight"], Teacher(hidden=of["teacher.hidden"], weight=of["teacher.weight"]), ids
    ).divergence,
    "states beside recorded": lambda of, ids: linear_token_divergence(
        of["hidden"], of["weight"],
        Teacher(token_ids=ids[..., None], log_probs=of["teacher.logits"][..., :1] - 9, temperature=1.0), ids,
    ).divergence,
    "losses of tokens": lambda of, ids: linear_grpo_loss(
        of["hidden"], of["weight"], ids, None, config=_STATES, token_losses=True,
        teacher=Teacher(hidden=of["teacher.hidden"], weight=of["teacher.weight"]),
    ).token_losses,
    "a filter": lambda of, ids: token_log_probs(of["logits"], ids, support=TopK(3)).log_probs,
    "a mask": lambda of, ids: token_log_probs(of["logits"], ids, support=of["mask"]).log_probs,
    "states, a mask": lambda of, ids: linear_token_log_probs(
        of["hidden"], of["weight"], ids, support=of["mask"]
    ).log_probs,
    "states, recorded sets": lambda of, ids: linear_token_log_probs(
        of["hidden"], of["weight"], ids, support=Recorded.from_counts(ids.view(-1), torch.ones_like(ids))
    ).log_probs,
}  # fmt: skip


@pytest.mark.parametrize("call", KEEPERS.values(), ids=KEEPERS)
def test_an_output_that_is_kept_keeps_nothing_large(call):
    """What backward needed is given back after it."""
    assert kept_alive(call) == []


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_checkpoint(preset):
    case = taught()
    config = complete(preset, divergence=Divergence("reverse_kl"))
    _, gradient = case.run(config=config)
    leaf = case.logits.clone().requires_grad_()
    options = {**case.options, "config": config}
    checkpoint(lambda x: grpo_loss(x, *case.arguments, **options).loss, leaf, use_reentrant=False).backward()
    assert torch.equal(leaf.grad, gradient)


def test_outputs_of_token_divergence():
    """Each alone and all together; the teacher's entropy has no gradient."""
    case = taught(dtype=torch.float64)
    leaf = case.logits.clone().requires_grad_()
    out = token_divergence(leaf, case.options["teacher"], case.token_ids, case.mask, divergence="jsd")
    assert not out.teacher_entropy.requires_grad
    weights = torch.rand(3, *case.token_ids.shape, dtype=torch.float64)
    outputs = (out.divergence, out.log_probs, out.entropy)
    parts = [torch.autograd.grad((w * x).sum(), leaf, retain_graph=True)[0]
             for w, x in zip(weights, outputs, strict=True)]  # fmt: skip
    whole = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), leaf)[0]
    torch.testing.assert_close(whole, sum(parts[1:], parts[0]), rtol=1e-11, atol=1e-15)
    assert (out.divergence[~case.mask] == 0).all()
    assert torch.autograd.gradcheck(
        lambda z: token_divergence(
            z, Teacher(logits=drawn(1, 2, 5, seed=1)), torch.zeros(1, 2).long(), divergence="jsd"
        )[:3],
        drawn(1, 2, 5).requires_grad_(),
    )


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.nightly)])
def test_no_graph_break(dynamic):
    """Where every size is a symbol too."""
    case = taught()
    config = complete("grpo", divergence=Divergence("reverse_kl"))
    teacher = case.options.pop("teacher").logits
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def step(logits, teacher, coef):
        loss = grpo_loss(logits, *case.arguments, **case.options, config=config, teacher=Teacher(logits=teacher),
                         divergence_coef=coef).loss  # fmt: skip
        rows = token_divergence(logits, Teacher(logits=teacher), case.token_ids, case.mask, divergence="jsd")
        return loss + rows.divergence.sum()

    for coef in (0.5, 0.25):
        leaf, other = (case.logits.clone().requires_grad_() for _ in range(2))
        step(leaf, teacher, torch.tensor(coef)).backward()
        expected = grpo_loss(other, *case.arguments, **case.options, config=config, teacher=Teacher(logits=teacher),
                             divergence_coef=coef).loss  # fmt: skip
        rows = token_divergence(other, Teacher(logits=teacher), case.token_ids, case.mask, divergence="jsd")
        (expected + rows.divergence.sum()).backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-9)


# From hidden states


class Heads(NamedTuple):
    """Hidden states and heads of a policy and of a wider teacher, float64; logits of spread 3."""

    hidden: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor

    @classmethod
    def draw(cls, case: Case, width: int = 16, of_teacher: int = 24) -> Heads:
        batch, length = case.logits.shape[:2]
        sizes = ((batch, length, width), (97, width), (batch, length, of_teacher), (97, of_teacher))
        spreads = (1.0, 3 * width**-0.5, 1.0, 3 * of_teacher**-0.5)
        return cls(*(drawn(*size, spread=s, seed=i) for i, (size, s) in enumerate(zip(sizes, spreads, strict=True))))

    def to(self, dtype: torch.dtype) -> Heads:
        return Heads(*(tensor.to(dtype) for tensor in self))

    def gradients(self, case: Case, config: LossConfig, eager: bool, **options: Any) -> tuple[Tensor, ...]:
        """Of hidden states and weight; ``eager``: of the reference on logits that are upcast."""
        leaves = [tensor.clone().requires_grad_() for tensor in self[:2]]
        real = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        given = {**case.options, "config": config, **options}
        if eager:
            given["teacher"] = Teacher(logits=(self.teacher @ self.teacher_weight.T).to(real))
            loss = reference.grpo_loss((leaves[0] @ leaves[1].T).to(real), *case.arguments, **given).loss
        else:
            given["teacher"] = Teacher(hidden=self.teacher, weight=self.teacher_weight)
            loss = linear_grpo_loss(*leaves, *case.arguments, **given).loss
        return torch.autograd.grad(loss, leaves)


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", ["grpo", "gspo", None])
def test_from_hidden_states(preset, dtype):
    """At most twice the error of eager PyTorch that upcasts, a teacher of another width beside it."""
    case = taught()
    del case.options["teacher"]
    divergence = Divergence("jsd", 0.7)
    config = LossConfig(None, divergence=divergence) if preset is None else complete(preset, divergence=divergence)
    heads = Heads.draw(case).to(dtype)
    exact = heads.to(torch.float64).gradients(case, config, eager=True)
    allowed = 1e-12 if dtype == torch.float64 else 2 * error(heads.gradients(case, config, eager=True), exact)
    assert error(heads.gradients(case, config, eager=False), exact) <= allowed


def test_chunks_of_any_size():
    """But for the GEMMs, which round in another order."""
    case = taught(dtype=torch.float32)
    heads = Heads.draw(case).to(torch.float32)
    config = complete("grpo", divergence=Divergence("reverse_kl"))
    out = []
    for chunk in (1 << 11, 1 << 13, 1 << 20):
        hidden = heads.hidden.clone().requires_grad_()
        teacher = Teacher(hidden=heads.teacher, weight=heads.teacher_weight)
        rows = linear_token_divergence(
            hidden, heads.weight, teacher, case.token_ids, case.mask, chunk_bytes=chunk, divergence="jsd"
        )
        options = {**case.options, "teacher": teacher, "config": config, "chunk_bytes": chunk}
        loss = linear_grpo_loss(hidden, heads.weight, *case.arguments, **options)
        assert torch.equal(loss.log_probs, rows.log_probs)
        out.append((rows.divergence, loss.loss, torch.autograd.grad(loss.loss, hidden, retain_graph=True)[0]))
    for other in out[1:]:
        for a, b in zip(out[0], other, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_linear_token_divergence():
    case = taught(dtype=torch.float64)
    heads = Heads.draw(case)
    teacher = Teacher(hidden=heads.teacher, weight=heads.teacher_weight)
    leaves = [tensor.clone().requires_grad_() for tensor in heads[:2]]
    rows = linear_token_divergence(*leaves, teacher, case.token_ids, case.mask, divergence="skew_reverse_kl")
    others = [tensor.clone().requires_grad_() for tensor in heads[:2]]
    made = Teacher(logits=heads.teacher @ heads.teacher_weight.T)
    expected = token_divergence(others[0] @ others[1].T, made, case.token_ids, case.mask, divergence="skew_reverse_kl")
    for a, b in zip(rows, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    for out, of in ((rows, leaves), (expected, others)):
        (out.divergence.sum() + 0.3 * out.log_probs.sum() - 0.1 * out.entropy.sum()).backward()
        assert all(leaf.grad is not None for leaf in of)
    for a, b in zip(leaves, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_the_backend_is_asked_about_the_logits_that_a_teachers_states_make(monkeypatch):
    """By autocast and ``logits_dtype``: a kernel may take some dtypes beside each other alone."""
    case, asked, choose = taught(), [], grpo_kernels.backends.choose
    monkeypatch.setattr(
        grpo_kernels.backends,
        "choose",
        lambda *given: asked.append((given[1].dtype, given[1].teacher)) or choose(*given),
    )
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))

    def run(dtype: torch.dtype, **options: Any) -> None:
        hidden, weight = drawn(6, 10, 5, dtype=dtype), drawn(97, 5, dtype=dtype)
        teacher = Teacher(hidden=drawn(6, 10, 3, dtype=dtype), weight=drawn(97, 3, dtype=dtype))
        linear_token_divergence(hidden, weight, teacher, case.token_ids, case.mask, **options)
        linear_grpo_loss(hidden, weight, case.token_ids, None, case.mask, teacher=teacher, config=config, **options)

    run(torch.bfloat16, logits_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(torch.float32)
    assert asked == [(torch.float32, torch.float32)] * 2 + [(torch.bfloat16, torch.bfloat16)] * 2


@pytest.mark.parametrize("form", ["logits", "states", "head"])
def test_a_teacher_that_changes_before_backward(form):
    """Its logits are made, or read, a second time there."""
    case, hidden, weight = taught(), drawn(6, 10, 5, dtype=torch.float32), drawn(97, 5, dtype=torch.float32)
    teacher = case.options["teacher"]
    if form != "logits":
        teacher = Teacher(hidden=drawn(6, 10, 3, dtype=torch.float32), weight=drawn(97, 3, dtype=torch.float32))
    out = linear_token_divergence(hidden.requires_grad_(), weight, teacher, case.token_ids, case.mask)
    {"logits": teacher.logits, "states": teacher.hidden, "head": teacher.weight}[form].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.divergence.sum().backward()


def test_a_reference_that_shares_the_head():
    """LoRA: the teacher's head is the policy's own, which learns; the gradient is of the policy's use alone."""
    case = taught(dtype=torch.float64)
    heads = Heads.draw(case, of_teacher=16)
    config = LossConfig(surrogate=None, divergence=Divergence("reverse_kl", to="ref"))
    del case.options["teacher"]
    weight = heads.weight.clone().requires_grad_()
    shared = Teacher(hidden=heads.teacher, weight=weight)
    loss = linear_grpo_loss(heads.hidden, weight, *case.arguments, **case.options, teacher=shared, config=config).loss
    separate = heads._replace(teacher_weight=heads.weight).gradients(case, config, eager=True)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], separate[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("where", ["hidden", "teacher"])
def test_masked_states_are_not_read(where):
    case = taught(dtype=torch.float64)
    heads = Heads.draw(case)
    del case.options["teacher"]
    config = complete("grpo", divergence=Divergence("reverse_kl"))
    expected = heads.gradients(case, config, eager=False)
    states = getattr(heads, where).clone()
    states[:, -1] = math.nan
    states[:, :-1][~case.mask] = math.nan
    for a, b in zip(heads._replace(**{where: states}).gradients(case, config, eager=False), expected, strict=True):
        assert torch.equal(a, b)


# Ranks


@pytest.mark.parametrize("preset", ["gspo", None])
def test_sequences_over_ranks(preset):
    """Shares of the even and the odd tokens of every sequence; without advantages too."""
    case = taught(dtype=torch.float64, extra_row=False)
    divergence = Divergence("reverse_kl", 0.7)
    config = LossConfig(None, divergence=divergence) if preset is None else complete(preset, divergence=divergence)
    if preset is None:
        case.options |= {"old_log_probs": None, "ref_log_probs": None}
    advantages = None if preset is None else case.advantages
    options = {**case.options, "config": config, "backend": "torch"}
    whole = case.logits.clone().requires_grad_()
    expected = grpo_loss(whole, case.token_ids, advantages, case.mask, **options)
    expected.loss.backward()

    def of_rank(rank: int) -> tuple[Tensor, Tensor]:
        at = slice(rank, None, 2)
        own = {name: value[:, at] if isinstance(value, Tensor) else value for name, value in options.items()}
        own["teacher"] = Teacher(logits=options["teacher"].logits[:, at])
        logits = case.logits[:, at].clone().requires_grad_()
        group = torch.distributed.group.WORLD
        out = grpo_loss(logits, case.token_ids[:, at], advantages, case.mask[:, at], **own, sequence_group=group)
        out.loss.backward()
        return out.loss.detach(), logits.grad, out.metrics.all_reduce(group).vector

    shares = run_threads(2, of_rank)
    assert sum(share[0] for share in shares).item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for rank, (_, gradient, metrics) in enumerate(shares):
        torch.testing.assert_close(gradient, whole.grad[:, rank::2], rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(metrics, expected.metrics.vector, rtol=1e-10, atol=1e-12)


# Rows of another token


def one_late(rows: Tensor) -> Tensor:
    """What a teacher is whose rows begin one too early, with one that belongs to no token."""
    return torch.cat([rows[:, :1], rows[:, :-1]], 1)


SHIFTED = ("logits", "logits of T rows", "packed", "states", "gathered logits", "recorded", "recorded beside states")


@pytest.mark.parametrize("form", SHIFTED)
def test_a_teacher_one_row_off_is_noticed(form):
    """In every form and function, with checks on; neither the right one nor unrelated rows are."""
    batch, length, vocab = 3, 12, 31
    near = drawn(batch, length + 1, vocab, dtype=torch.float32)
    policy, right = (near + drawn(*near.shape, spread=0.7, seed=seed, dtype=torch.float32) for seed in (1, 2))
    ids, mask = torch.randint(vocab, (batch, length)), torch.ones(batch, length)
    mask[0, 4], head = 0, torch.eye(vocab)
    config = LossConfig(surrogate=None, divergence=Divergence("forward_kl"))
    temperatures = torch.tensor([0.8, 1.0, 1.2])

    def run(rows: Tensor, check: bool | None) -> None:
        log_probs, top = rows[:, :length].log_softmax(-1).topk(5)
        recorded = Teacher(token_ids=top, log_probs=log_probs, temperature=1.0)
        common = {"config": config, "check": check}
        if form == "logits":
            grpo_loss(policy, ids, None, mask, teacher=Teacher(logits=rows), temperature=temperatures, **common)
        elif form == "logits of T rows":
            token_divergence(policy, Teacher(logits=rows[:, :length]), ids, mask, check=check)
        elif form == "packed":
            flat = [x[:, :length].reshape(-1, vocab) for x in (policy, rows)]
            bounds = torch.arange(batch + 1) * length
            options = {"teacher": Teacher(logits=flat[1]), "cu_seqlens": bounds, **common}
            grpo_loss(flat[0], ids.view(-1), None, mask.view(-1), **options)
        elif form == "states":
            taught = Teacher(hidden=rows, weight=head)
            linear_grpo_loss(policy, head, ids, None, mask, teacher=taught, temperature=temperatures, **common)
        elif form == "gathered logits":
            linear_token_divergence(policy, head, Teacher(logits=rows), ids, mask, chunk_bytes=2**14, check=check)
        elif form == "recorded":
            grpo_loss(policy, ids, None, mask, teacher=recorded, **common)
        else:
            adapter = (torch.zeros(batch, length + 1, 2), torch.zeros(vocab, 2))
            linear_grpo_loss(policy, head, ids, None, mask, teacher=recorded, adapter=adapter, **common)

    for rows in (right, drawn(*near.shape, seed=5, dtype=torch.float32), policy):
        run(rows, True)
    for rows, words in ((one_late(right), r"later(.|\n)*prompt_logprobs"), (right.roll(-1, 1), r"earlier(.|\n)*:-1")):
        run(rows, None)
        with pytest.raises(ValueError, match=rf"row t of the teacher .* nearer by 0.*one row {words}"):
            run(rows, True)


def test_a_policy_that_repeats_what_it_has_read_is_no_evidence():
    """As one with tied embeddings does, untrained: a teacher that knows the text is nearest one row earlier."""
    ids = (torch.arange(60) % 31)[None]
    policy, teacher = (9.0 * torch.nn.functional.one_hot(x % 31, 31).float() for x in (ids - 1, ids))
    token_divergence(policy, Teacher(logits=teacher), ids, check=True)
    with pytest.raises(ValueError, match="one row earlier"):
        token_divergence(policy, Teacher(logits=teacher), ids - 1 + 31 * (ids == 0), check=True)


def test_a_few_rows_are_no_evidence_of_another_token():
    near = drawn(1, 17, 31)
    for length in (0, 1, 2, 3, 17):
        rows, late = near[:, :length], one_late(near)[:, :length]
        token_divergence(rows, Teacher(logits=late), torch.zeros(1, length).long(), check=True)


# What is refused


def bad(function: Any = grpo_loss, **changes: Any) -> Any:
    def call() -> Any:
        case = taught(batch=3, length=4, vocab=11)
        named = {"token_ids": case.token_ids, "advantages": case.advantages, "mask": case.mask, **case.options}
        states = {"logits": case.logits}
        if function is linear_grpo_loss:
            states = {"hidden": drawn(3, 5, 7, dtype=torch.float32), "weight": drawn(11, 7, dtype=torch.float32)}
        config = LossConfig(divergence=Divergence("reverse_kl"))
        return function(**{**states, **named, "config": config, **changes})

    return call


def teacher_of(*shape: int, **form: Any) -> Teacher:
    return Teacher(logits=torch.zeros(shape), **form)


def states_of(hidden: tuple[int, ...], weight: tuple[int, ...], **form: Any) -> Teacher:
    return Teacher(hidden=torch.zeros(hidden), weight=torch.zeros(weight), **form)


OTHER = {"vocab_size": 11}
BAD = {
    "no teacher": (bad(teacher=None), ValueError, r"teacher= for Divergence\(.*got none(.|\n)*divergence=None"),
    "no divergence": (bad(config="grpo"), ValueError, "a divergence in the config beside teacher=; got none"),
    "logits for a teacher": (bad(teacher=torch.zeros(3, 5, 11)), TypeError, r"a Teacher; got Tensor"),
    "a model for a teacher": (
        bad(teacher=torch.nn.Linear(2, 3)), TypeError, r"a Teacher; got Linear(.|\n)*hf.teacher\(model\)\(\*\*inputs\)",
    ),
    "a model that was not run": (bad(teacher=lambda: None), TypeError, r"got function(.|\n)*hf.teacher\(model\)"),
    "a teacher that learns": (
        lambda: Teacher(logits=torch.zeros(2, 3, requires_grad=True)), ValueError, "only the policy learns",
    ),
    "states that learn": (
        lambda: Teacher(hidden=torch.zeros(2, 3, requires_grad=True), weight=torch.zeros(4, 3)),
        ValueError, r"hidden without a gradient(.|\n)*hidden.detach\(\)",
    ),
    "two forms": (
        lambda: Teacher(logits=torch.zeros(2, 3), hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3)),
        ValueError, "logits=, or hidden= and weight=, or token_ids= and log_probs=; got logits, hidden, weight",
    ),
    "no form": (lambda: Teacher(), ValueError, "got nothing"),
    "states without a head": (lambda: Teacher(hidden=torch.zeros(2, 3)), ValueError, "hidden= and weight="),
    "a list": (lambda: Teacher(logits=[0.0]), TypeError, r"logits to be a tensor; got list(.|\n)*as_tensor\(logits\)"),
    "an array": (lambda: Teacher(logits=np.zeros((2, 3))), TypeError, r"got ndarray(.|\n)*torch.as_tensor\(logits\)"),
    "lists of ids": (
        lambda: Teacher(token_ids=[[1], [2, 3]], log_probs=[[-1.0], [-1.0, -2.0]], temperature=1.0), TypeError,
        r"token_ids to be a tensor; got list(.|\n)*torch.as_tensor\(token_ids\); rows .*offsets=",
    ),
    "a head's module": (
        lambda: Teacher(hidden=torch.zeros(2, 3), weight=torch.nn.Linear(3, 4)), TypeError,
        r"weight to be a tensor; got Linear(.|\n)*model.lm_head.weight",
    ),
    "a temperature of logits": (
        lambda: teacher_of(1, 2, temperature=0.7), ValueError, r"recorded log-probs(.|\n)*teacher_temp",
    ),
    "a scale of the teacher": (
        bad(teacher=teacher_of(3, 5, 11, logit_scale=0.0)), ValueError,
        r"grpo_loss: teacher: expected logit_scale to be a finite number > 0; got 0.0",
    ),
    "a cap of the teacher's states": (
        bad(linear_grpo_loss, teacher=states_of((3, 5, 2), (11, 2), logit_softcap=INF)), ValueError,
        "linear_grpo_loss: teacher: expected logit_softcap to be",
    ),
    "a teacher moved to a dtype": (lambda: teacher_of(1, 2).to(torch.bfloat16), TypeError, "device"),
    "logits of no rows": (lambda: teacher_of(7), ValueError, r"expected logits \(..., V\), of rows; got .*\(7,"),
    "logits of no dimension": (lambda: teacher_of(), ValueError, r"Teacher: expected logits .*got shape \(\)"),
    "a head of no rows": (lambda: states_of((2, 3), (7,)), ValueError, r"expected weight \(V, H\); got shape \(7,"),
    "a bias of another head": (
        lambda: states_of((2, 3), (7, 3), bias=torch.zeros(3)), ValueError, r"Teacher: expected bias \(7,\).*\(3,\)",
    ),
    "a bias of no dimension": (
        lambda: states_of((2, 3), (7, 3), bias=torch.zeros(())), ValueError, r"Teacher: expected bias \(7,\).*\(\)",
    ),
    "the policy's bias, of another head": (
        bad(linear_grpo_loss, bias=torch.zeros(3), **OTHER), ValueError, r"bias \(11,\); got \(3,\)",
    ),
    "the policy's bias, as a column": (
        bad(linear_grpo_loss, bias=torch.zeros(11, 1), **OTHER), ValueError, r"bias \(11,\); got \(11, 1\)",
    ),
    "columns that numpy does not write as one": (
        bad(vocab_size=np.array([5, 6])), ValueError, r"vocab_size, an int in \[1, 11\].*array\(\[5, 6\]\)",
    ),
    "columns that Python does not write": (
        bad(vocab_size=10**5000), ValueError, r"vocab_size, an int in \[1, 11\].*an integer of 16610 bits",
    ),
    "a wider teacher": (bad(teacher=teacher_of(3, 5, 13)), ValueError, "11 columns, or vocab_size=; got 13"),
    "a narrower teacher": (bad(teacher=teacher_of(3, 5, 9)), ValueError, r"11 columns(.|\n)*vocab_size=9"),
    "too many columns": (bad(teacher=teacher_of(3, 5, 9), **OTHER), ValueError, r"vocab_size, an int in \[1, 9\].*11"),
    "columns that are a flag": (bad(vocab_size=True), ValueError, r"vocab_size, an int in \[1, 11\].*True"),
    "columns that are no number": (bad(vocab_size=9.0), ValueError, r"vocab_size, an int in \[1, 11\].*9.0"),
    "a wider head": (
        bad(linear_grpo_loss, teacher=states_of((3, 5, 2), (13, 2))), ValueError, "11 columns, or vocab_size=; got 13",
    ),
    "shorter": (bad(teacher=teacher_of(3, 3, 11)), ValueError, r"teacher.logits with rows \(3, 4\).*got \(3, 3\)"),
    "another batch": (bad(teacher=teacher_of(2, 4, 11)), ValueError, r"teacher.logits with rows \(3, 4\)"),
    "flat": (bad(teacher=teacher_of(12, 11)), ValueError, r"teacher.logits with rows \(3, 4\).*got \(12,\)"),
    "states of another batch": (
        bad(linear_grpo_loss, teacher=states_of((2, 5, 2), (11, 2))), ValueError, r"teacher.hidden with rows \(3, 4\)",
    ),
    "states of another width": (
        bad(linear_grpo_loss, teacher=states_of((3, 5, 2), (11, 3))), ValueError, "linear_grpo_loss: teacher",
    ),
    "integer logits": (
        bad(teacher=Teacher(logits=torch.zeros(3, 5, 11, dtype=torch.int64))), TypeError, "float32, bfloat16, float16",
    ),
    "strided logits": (
        bad(teacher=Teacher(logits=torch.zeros(3, 11, 5).mT)), ValueError,
        r"teacher.logits with last stride 1(.|\n)*teacher.logits.contiguous\(\)",
    ),
    "ratios of nothing": (
        lambda: LossConfig.preset("gspo", surrogate=None, divergence=Divergence()), ValueError,
        r"pools ratios, and surrogate=None has none. Use level=\"token\"",
    ),
    "on another device": (
        bad(teacher=Teacher(logits=torch.zeros(3, 5, 11, device="meta"))), ValueError, "teacher.logits on the device",
    ),
    "a teacher of fp64": (
        bad(teacher=Teacher(logits=torch.zeros(3, 5, 11, dtype=torch.float64))), TypeError,
        r"a teacher's logits of fp32, bf16 or fp16, as the policy's; got torch.float64(.|\n)*to\(torch.float32\)",
    ),
    "a teacher of fp64, by name": (
        bad(teacher=Teacher(logits=torch.zeros(3, 5, 11, dtype=torch.float64)), backend="cpu"), TypeError,
        r"a teacher's logits of fp32, bf16 or fp16(.|\n)*cast the teacher",
    ),
    "states of fp64": (
        bad(linear_grpo_loss, teacher=Teacher(hidden=drawn(3, 5, 2), weight=drawn(11, 2))),
        TypeError, "a teacher's logits of fp32, bf16 or fp16",
    ),
    "states beside logits": (
        bad(teacher=states_of((3, 5, 2), (11, 2))), ValueError, r"of logits beside logits(.|\n)*linear_grpo_loss",
    ),
    "skipped tokens": (
        bad(skip_zero_advantage=True), ValueError, r"skip_zero_advantage=True .*a divergence, whose gradient is not 0",
    ),
    "a support": (bad(support=TopK(5)), ValueError, r"no support= with teacher=(.|\n)*whole vocabulary"),
    "a vocabulary over ranks": (bad(vocab_start=0), ValueError, r"no vocabulary over ranks with teacher="),
    "policy_loss": (
        lambda: policy_loss(
            -torch.ones(1, 2), torch.ones(1), torch.ones(1, 2), config=LossConfig(divergence=Divergence())
        ),
        ValueError, r"a config without a divergence, which needs rows(.|\n)*token_divergence",
    ),
    "in place beside padding": (bad(inplace=True, vocab_size=11), ValueError, "inplace=False with vocab_size="),
    "no advantages": (bad(advantages=None), TypeError, r"advantages to be a tensor; got None(.|\n)*surrogate=None"),
    "a coefficient of nothing": (
        bad(config="grpo", teacher=None, divergence_coef=0.5), ValueError, "config beside divergence_coef=; got",
    ),
    "an infinite coefficient": (bad(divergence_coef=INF), ValueError, "divergence_coef to be a finite number"),
    "TRL's beta": (lambda: Divergence("jsd", beta=0.5), TypeError, "'beta'. Did you mean mix=0.5"),
    "a mix of 0": (lambda: Divergence("jsd", mix=0.0), ValueError, r"mix=...\) must be .*> 0.*0.0"),
    "a mix of 1": (lambda: Divergence("jsd", mix=1), ValueError, r"inside \(0, 1\) \(mix=0 is forward_kl.*reverse_kl"),
    "TRL's name": (lambda: Divergence("generalized_jsd"), ValueError, "jsd"),
    "DistiLLM's name": (lambda: Divergence("SRKL"), ValueError, "skew_reverse_kl"),
    "a short name": (lambda: Divergence("fkl"), ValueError, "forward_kl"),
    "no name": (lambda: Divergence(None), ValueError, r"tvd; got None\.$"),
    "a mistyped name": (lambda: Divergence("revers_kl"), ValueError, "Did you mean 'reverse_kl'"),
    "a cold teacher": (lambda: Divergence(teacher_temperature=0), ValueError, "teacher_temperature.*> 0"),
    "a divergence by name": (
        lambda: LossConfig(divergence="reverse_kl"), TypeError, r"a Divergence such as Divergence\('reverse_kl'\)",
    ),
    "an unknown kind of rows": (
        lambda: token_divergence(torch.zeros(1, 2, 3), teacher_of(1, 2, 3), torch.zeros(1, 2).long(), divergence="kl_"),
        ValueError, "token_divergence: divergence must be one of",
    ),
    "rows without a teacher": (
        lambda: token_divergence(torch.zeros(1, 2, 3), None, torch.zeros(1, 2).long()), ValueError, "token_divergence",
    ),
    "the reference without a teacher": (bad(reference.grpo_loss, teacher=None), ValueError, "reference.grpo_loss: exp"),
    "the reference beside states": (
        bad(reference.grpo_loss, teacher=states_of((3, 5, 2), (11, 2))), ValueError,
        r"reference.grpo_loss: expected a teacher of logits; got Teacher\(hidden=(.|\n)*hidden @ weight.T",
    ),
    "a keyword of others": (bad(teacher_logits=torch.zeros(3, 5, 11)), TypeError, "teacher"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n  hint" in str(caught.value) or len(str(caught.value)) < 700


def test_a_teacher_in_one_line():
    """Of tensors, what they are and not what they hold."""
    texts = {
        "Teacher(logits=float32 (2, 3, 4) on cpu)": teacher_of(2, 3, 4),
        "Teacher(hidden=float32 (5, 2) on cpu, weight=float32 (4, 2) on cpu, logit_scale=2.0, logit_softcap=3.0)": (
            states_of((5, 2), (4, 2), logit_scale=2.0, logit_softcap=3.0)
        ),
        "Teacher(token_ids=int64 (1, 1) on cpu, log_probs=float32 (1, 1) on cpu, temperature=0.5)": (
            Teacher(token_ids=torch.zeros(1, 1).long(), log_probs=torch.zeros(1, 1), temperature=0.5)
        ),
        "Teacher(logits=float32 (1, 2) on cpu, logit_scale=float32 () on cpu)": (
            teacher_of(1, 2, logit_scale=torch.tensor(2.0))
        ),
    }
    for text, teacher in texts.items():
        assert repr(teacher) == text


def test_a_module_and_a_preset():
    case = taught()
    config = LossConfig.preset("dapo", divergence=Divergence("reverse_kl", 0.1, to="ref"))
    assert "0.1·reverse_kl(π_ref)" in config.equation()
    out = GRPOLoss(config)(case.logits, *case.arguments, **case.options)
    assert torch.equal(out.loss, grpo_loss(case.logits, *case.arguments, **case.options, config=config).loss)
    names = {name: getattr(grpo_kernels, name) for name in grpo_kernels.__all__}
    assert eval(repr(config), names) == config
