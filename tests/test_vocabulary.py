"""A vocabulary over several ranks: whatever columns each has, loss, gradient and metrics are those of the whole.

Ranks are threads here, so that hundreds of shards, configs and rows are tried; tests/test_ranks.py has processes.
"""

from __future__ import annotations

import math
import threading

import cases
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_support import SUPPORTS
from threads import run_threads

from grpo_kernels import (
    KL,
    LossConfig,
    TopK,
    TopP,
    backends,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    token_log_probs,
)
from grpo_kernels.calls.over_ranks import NUMBERS
from grpo_kernels.verification.tolerance import compare, truth_of

VOCAB = 97
CUTS = {
    "two": (0, 49, 97),
    "as torch.chunk": (0, 25, 50, 75, 97),
    "uneven": (0, 1, 61, 90, 97),
    "empty": (0, 0, 40, 40, 97, 97),
    "one has it all": (0, 97, 97),
}
"""Bounds of the ranks' columns."""


@pytest.fixture
def one_kernel_at_a_time(monkeypatch):
    """Triton's interpreter and the CUDA emulator keep what runs in globals; ranks that are threads take turns."""
    lock = threading.Lock()

    def in_turn(kernel):
        def run(*arguments, **options):
            with lock:
                return kernel(*arguments, **options)

        return run

    for name in ("cuda", "triton"):
        module = backends.get(name)
        for kernel in ("log_probs", "log_probs_backward", "token_terms", "token_sums"):
            monkeypatch.setattr(module, kernel, in_turn(getattr(module, kernel)))


def on_bounds(case: cases.Case, bounds: tuple[int, ...]) -> cases.Case:
    """The case with sampled tokens on both sides of every bound, of ratios that are clearly apart."""
    near = sorted({min(max(bound + step, 0), bounds[-1] - 1) for bound in bounds for step in (-1, 0)})
    case.mask[0, : len(near)] = True
    case.token_ids[0, : len(near)] = torch.tensor(near)[: case.token_ids.shape[1]]
    log_probs = cases.exact_log_probs(case.logits[:1, : len(near)], case.token_ids[:1, : len(near)])
    for name in ("old_log_probs", "ref_log_probs"):
        case.options[name][:1, : len(near)] = log_probs + 0.1 + 0.01 * torch.arange(len(near))
    return case


def sharded(case: cases.Case, bounds: tuple[int, ...], padding: int = 0, told: bool = False, **options):
    """Loss of every rank, and the gradient in all of its columns; ``padding`` columns of anything follow the last."""

    def of_rank(rank):
        torch.set_num_threads(1)
        first, last = bounds[rank : rank + 2]
        own = case.logits[..., first:last].detach()
        if padding and rank == len(bounds) - 2:
            own = torch.nn.functional.pad(own, (0, padding), value=1e4)
        leaf = own.clone().requires_grad_()
        where = {"vocab_start": first, "vocab_size": bounds[-1]} if told else {"vocab_size": bounds[-1]}
        group = torch.distributed.group.WORLD
        out = grpo_loss(leaf, *case.arguments, vocab_group=group, **where, **{**case.options, **options})
        out.loss.backward()
        return out, leaf.grad

    results = run_threads(len(bounds) - 1, of_rank)
    return [out for out, _ in results], torch.cat([gradient for _, gradient in results], -1)


def assert_same_on_every_rank(outs):
    """Bit for bit, NaN too."""
    for out in outs[1:]:
        for name in ("loss", "log_probs", "entropy"):
            torch.testing.assert_close(getattr(out, name), getattr(outs[0], name), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(out.metrics.vector, outs[0].metrics.vector, rtol=0, atol=0, equal_nan=True)


def assert_whole(case: cases.Case, bounds: tuple[int, ...], padding: int = 0, told: bool = False, **options):
    """By the ULP rule, which whole rows obey too."""
    outs, gradient = sharded(case, bounds, padding, told, **options)
    assert_same_on_every_rank(outs)
    assert bool((gradient[..., bounds[-1] :] == 0).all())
    options = {**case.options, **options}
    options.pop("backend", None)
    truth = truth_of(case.logits, *case.arguments, **options)
    comparison = compare(truth, outs[0].loss, outs[0].log_probs, outs[0].entropy, gradient[..., : bounds[-1]])
    assert comparison.holds, comparison
    tolerance = 1e-12 if case.logits.dtype == torch.float64 else 2e-4
    if not truth.edge.any():
        for name, value in outs[0].metrics.as_dict().items():
            assert value.item() == pytest.approx(truth.metrics[name].item(), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("config", cases.configs(), ids=str)
def test_every_objective(config):
    bounds = CUTS["uneven"]
    noise = 0.3 if config.level == "token" else 0.2
    assert_whole(on_bounds(cases.make(vocab=VOCAB, noise=noise, config=config), bounds), bounds)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_cut_and_dtype(cut, dtype, backend, one_kernel_at_a_time):
    config = LossConfig(kl=KL(0.1), entropy_coef=0.05)
    case = on_bounds(cases.make(vocab=VOCAB, dtype=dtype, config=config), CUTS[cut])
    for padding, told in ((0, False), (31, True)):
        assert_whole(case, CUTS[cut], padding, told, backend=backend)


@pytest.mark.parametrize("options", [dict(logit_softcap=3.0), dict(temperature=0.7), dict(logit_scale=0.25)], ids=str)
def test_how_logits_become_log_probs(options):
    config = LossConfig.preset("gspo", entropy_coef=0.05)
    assert_whole(cases.make(vocab=VOCAB, config=config, **options), CUTS["uneven"])


@pytest.mark.parametrize("rollout", cases.ROLLOUTS, ids=str)
def test_rollout_corrections(rollout):
    case = cases.make(vocab=VOCAB, config=LossConfig(rollout=rollout))
    case.options["rollout_log_probs"] = case.options["old_log_probs"] + 0.1
    assert_whole(case, CUTS["two"])


def test_confident_rows_keep_their_digits():
    """ℓ down to 1e-14 and entropies of the same size: what three numbers a token would lose."""
    torch.manual_seed(0)
    logits = torch.randn(1, 64, VOCAB)
    ids = torch.randint(VOCAB, (1, 64))
    logits.scatter_(2, ids[..., None], torch.linspace(5, 40, 64)[None, :, None])
    log_p = torch.log_softmax(logits.double(), -1)
    p = log_p.exp()
    others = p.scatter(2, ids[..., None], 0).sum(-1)
    exact_log_prob = -torch.log1p(others / p.gather(2, ids[..., None])[..., 0])
    exact_entropy = (
        -(p * log_p).scatter(2, ids[..., None], 0).sum(-1) - p.gather(2, ids[..., None])[..., 0] * exact_log_prob
    )

    def of_rank(rank):
        first, last = CUTS["as torch.chunk"][rank : rank + 2]
        return token_log_probs(logits[..., first:last], ids, vocab_group=torch.distributed.group.WORLD)

    for out in run_threads(4, of_rank):
        torch.testing.assert_close(out.log_probs.double(), exact_log_prob, rtol=32 * 2**-24, atol=0)
        torch.testing.assert_close(out.entropy.double(), exact_entropy, rtol=64 * 2**-24, atol=0)
        assert exact_log_prob.abs().min() < 1e-12


def test_columns_that_are_impossible_and_columns_that_are_not_numbers():
    """A whole shard of -inf has no part; NaN anywhere makes its row NaN on every rank, and no other."""
    case = cases.make(vocab=VOCAB, empty=False)
    case.mask[:] = True
    bounds = CUTS["as torch.chunk"]
    case.token_ids[:] = case.token_ids % 25 + 50
    case.logits[0, :, 25:50] = -math.inf
    case.logits[1, :, :50] = -math.inf
    case.logits[1, :, 75:] = -math.inf
    assert_whole(case, bounds)
    case.logits[0, 0, 60] = math.nan
    case.logits[2, 1] = -math.inf
    case.token_ids[3, 2], case.logits[3, 2, 25:50] = 30, -math.inf  # the token's own shard
    outs, gradient = sharded(case, bounds)
    for out in outs:
        assert out.loss.isnan()
        assert out.log_probs.isnan().nonzero().tolist() == [[0, 0], [2, 1]]
        assert out.entropy.isnan().nonzero().tolist() == [[0, 0], [2, 1]]
        assert out.log_probs[3, 2] == -math.inf
    assert gradient[0, 0].isnan().all()


def test_log_probs_have_gradients_of_both():
    case = cases.make(vocab=VOCAB, extra_row=False)
    weights, weights_of_entropy = torch.randn(2, *case.token_ids.shape)
    leaf = case.logits.double().requires_grad_()
    whole = token_log_probs(leaf, case.token_ids, case.mask)
    (whole.log_probs * weights + whole.entropy * weights_of_entropy).sum().backward()

    def of_rank(rank):
        first, last = CUTS["empty"][rank : rank + 2]
        leaf = case.logits[..., first:last].clone().requires_grad_()
        logits = leaf * 1
        out = token_log_probs(
            logits, case.token_ids, case.mask, vocab_group=torch.distributed.group.WORLD, inplace=rank % 2 == 0
        )
        (out.log_probs * weights + out.entropy * weights_of_entropy).sum().backward()
        return leaf.grad

    gradient = torch.cat(run_threads(5, of_rank), -1)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=2e-5, atol=2e-6)


def test_losses_of_tokens():
    case = cases.make(vocab=VOCAB, config=LossConfig.preset("gspo", entropy_coef=0.05))
    weights = torch.rand(case.token_ids.shape)

    def gradient_of(logits, **options):
        leaf = logits.clone().requires_grad_()
        out = grpo_loss(leaf, *case.arguments, token_losses=True, **case.options, **options)
        (out.token_losses * weights).sum().backward()
        return out.token_losses.detach(), leaf.grad

    def of_rank(rank):
        first, last = CUTS["uneven"][rank : rank + 2]
        return gradient_of(case.logits[..., first:last], vocab_group=torch.distributed.group.WORLD)

    losses, gradient = gradient_of(case.logits)
    parts = run_threads(4, of_rank)
    for of_tokens, _ in parts:
        torch.testing.assert_close(of_tokens, losses)
    torch.testing.assert_close(torch.cat([part for _, part in parts], -1), gradient, rtol=1e-5, atol=1e-7)


def test_a_group_of_one_rank_is_the_ordinary_call():
    case = cases.make(vocab=VOCAB, config=LossConfig(entropy_coef=0.05))
    whole, gradient = case.run()

    def of_rank(rank):
        return case.run(vocab_group=torch.distributed.group.WORLD)

    ((out, of_rank_0),) = run_threads(1, of_rank)
    assert torch.equal(out.loss, whole.loss)
    assert torch.equal(of_rank_0, gradient)
    assert out.route.passes == 1


def test_padding_of_one_rank():
    case = cases.make(vocab=VOCAB)
    truth = truth_of(case.logits, *case.arguments, **case.options)
    leaf = torch.nn.functional.pad(case.logits, (0, 31), value=1e4).requires_grad_()
    out = grpo_loss(leaf, *case.arguments, vocab_size=VOCAB, **case.options)
    out.loss.backward()
    assert compare(truth, out.loss, out.log_probs, out.entropy, leaf.grad[..., :VOCAB]).holds
    assert bool((leaf.grad[..., VOCAB:] == 0).all())


HIDDEN = 16


def head_of(case: cases.Case, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """States and a head whose logits are those of no case; small numbers that bf16 holds."""
    g = torch.Generator().manual_seed(1)

    def quarters(*shape):
        return (torch.randint(-8, 9, shape, generator=g) / 4).to(dtype)

    rows = (case.token_ids.shape[0], case.logits.shape[1])
    return {
        "hidden": quarters(*rows, HIDDEN),
        "weight": quarters(VOCAB, HIDDEN) / 4,
        "bias": quarters(VOCAB),
        "adapter_states": quarters(*rows, 4) / 2,
        "adapter_weight": quarters(VOCAB, 4) / 2,
    }


SPLIT = ("weight", "bias", "adapter_weight")


def linear(case, head, bounds=None, rank=0, function=linear_grpo_loss, reduce=None, frozen=(), **options):
    """Result and gradients of a rank's part of the head, or of the whole of it."""
    first, last = (0, VOCAB) if bounds is None else bounds[rank : rank + 2]
    leaves = {name: (part[first:last] if name in SPLIT else part).clone() for name, part in head.items()}
    leaves = {name: leaf.requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    where = {} if bounds is None else {"vocab_group": torch.distributed.group.WORLD}
    arguments = case.arguments if function is linear_grpo_loss else (case.token_ids, case.mask)
    adapter = (leaves["adapter_states"], leaves["adapter_weight"])
    given = {"bias": leaves["bias"], "adapter": adapter, **where, **options}
    out = function(leaves["hidden"], leaves["weight"], *arguments, **given)
    (out.loss if reduce is None else reduce(out)).backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def assert_gradients(parts: list[dict], whole: dict, share: float):
    """Of every rank, within a share of the largest element of the whole's."""
    for name, gradient in whole.items():
        if gradient is None:
            assert all(part[name] is None for part in parts)
            continue
        size = gradient.abs().max()
        every = [torch.cat([part[name] for part in parts])] if name in SPLIT else [part[name] for part in parts]
        for each in every:
            assert float((each.double() - gradient.double()).abs().max()) <= share * float(size), name
        assert all(torch.equal(each, every[0]) for each in every), name


@pytest.mark.parametrize("config", cases.one_of_each(), ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 6000], ids=["one chunk", "several"])
def test_from_hidden_states(config, chunk_bytes):
    case, bounds = cases.make(vocab=VOCAB), CUTS["uneven"]
    head = head_of(case)
    rollout = case.options["old_log_probs"] + 0.1 if config.schemes else None
    options = {**case.options, "config": config, "rollout_log_probs": rollout, "entropy_coef": 0.05}
    whole, gradients = linear(case, head, **options)

    def of_rank(rank):
        return linear(case, head, bounds, rank, chunk_bytes=chunk_bytes, **options)

    results = run_threads(4, of_rank)
    assert_same_on_every_rank([out for out, _ in results])
    torch.testing.assert_close(results[0][0].loss, whole.loss, rtol=2e-6, atol=2e-6)
    assert_gradients([gradients for _, gradients in results], gradients, 4e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_from_hidden_states_in_other_dtypes(dtype):
    """In bf16 no further from float64 than twice the whole head, by the norm. In fp16 it was 2.12 times: every rank's
    part is rounded, and parts are larger than their sum."""
    case = cases.make(vocab=VOCAB)
    exact = head_of(case, torch.float64)
    _, truth = linear(case, exact, **case.options)
    head = head_of(case, dtype)
    _, whole = linear(case, head, **case.options)
    results = run_threads(2, lambda rank: linear(case, head, CUTS["two"], rank, **case.options)[1])
    for name, gradient in truth.items():
        error, size = float((whole[name].double() - gradient).norm()), float(gradient.norm())
        parts = [torch.cat([part[name] for part in results])] if name in SPLIT else [part[name] for part in results]
        for part in parts:
            assert float((part.double() - gradient).norm()) <= max(
                (2.5 if dtype == torch.float16 else 2) * error, 1e-12 * size
            ), name


@pytest.mark.parametrize("frozen", [("hidden", "adapter_states"), ("weight", "bias", "adapter_weight")], ids=str)
def test_frozen_parts(frozen):
    case = cases.make(vocab=VOCAB)
    head = head_of(case)
    _, gradients = linear(case, head, frozen=frozen, **case.options)
    results = run_threads(2, lambda rank: linear(case, head, CUTS["two"], rank, frozen=frozen, **case.options)[1])
    assert_gradients(results, gradients, 4e-6)


def test_a_head_that_is_frozen_on_one_rank():
    """Only gradients of states are joined, and all ranks want these."""
    case = cases.make(vocab=VOCAB)
    head = head_of(case)
    _, gradients = linear(case, head, **case.options)

    def of_rank(rank):
        frozen = ("weight", "bias", "adapter_weight") if rank == 1 else ()
        return linear(case, head, CUTS["two"], rank, frozen=frozen, **case.options)[1]

    first, second = run_threads(2, of_rank)
    assert second["weight"] is None
    torch.testing.assert_close(first["weight"], gradients["weight"][:49], rtol=1e-5, atol=1e-6)
    for part in (first, second):
        torch.testing.assert_close(part["hidden"], gradients["hidden"], rtol=1e-5, atol=1e-6)


def test_log_probs_from_hidden_states():
    """Backward joins the gradients of states on every rank, on one without upstream too, which sends zeros."""
    case = cases.make(vocab=VOCAB)
    head = head_of(case)
    weights = torch.randn(case.token_ids.shape)

    def reduce(out):
        return (out.log_probs * weights + out.entropy).sum()

    whole, gradients = linear(case, head, function=linear_token_log_probs, reduce=reduce)

    def of_rank(rank):
        options = {"function": linear_token_log_probs, "chunk_bytes": 6000}
        return linear(case, head, CUTS["uneven"], rank, reduce=reduce, **options)

    results = run_threads(4, of_rank)
    for out, _ in results:
        assert torch.equal(out.log_probs, results[0][0].log_probs)
        torch.testing.assert_close(out.log_probs, whole.log_probs, rtol=2e-6, atol=2e-6)
    assert_gradients([part for _, part in results], gradients, 4e-6)


def test_partial_gradients_of_states():
    """hidden_grad="partial": the sum over ranks is the caller's."""
    case = cases.make(vocab=VOCAB)
    head = head_of(case)
    _, gradients = linear(case, head, **case.options)

    def of_rank(rank):
        return linear(case, head, CUTS["two"], rank, hidden_grad="partial", **case.options)[1]

    first, second = run_threads(2, of_rank)
    for name in ("hidden", "adapter_states"):
        torch.testing.assert_close(first[name] + second[name], gradients[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(first[name], gradients[name], rtol=1e-2, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_cut_of_any_rows(data):
    vocab = data.draw(st.integers(1, 40))
    ranks = data.draw(st.integers(2, 4))
    inner = sorted(data.draw(st.lists(st.integers(0, vocab), min_size=ranks - 1, max_size=ranks - 1)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    spread = data.draw(st.sampled_from([0.1, 3.0, 300.0]))
    case = cases.make(3, 4, vocab, dtype, seed=data.draw(st.integers(0, 99)), spread=spread)
    options = data.draw(st.sampled_from([{}, {"logit_softcap": 5.0}, {"temperature": 2.0}])).copy()
    if spread > 100:
        options.pop("logit_softcap", None)  # the slope of a saturated cap is rounded as in whole rows
    config = LossConfig(entropy_coef=data.draw(st.sampled_from([0.0, 0.1])))
    case.options = {"old_log_probs": case.options["old_log_probs"].clamp(min=-30), "config": config, **options}
    outs, gradient = sharded(case, (0, *inner, vocab), told=data.draw(st.booleans()))
    assert_same_on_every_rank(outs)
    truth = truth_of(case.logits, *case.arguments, **case.options)
    comparison = compare(truth, outs[0].loss, outs[0].log_probs, outs[0].entropy, gradient)
    assert max(comparison.log_prob, comparison.entropy, comparison.gradient) <= 1, comparison


def call(rank: int, case: cases.Case, **options):
    """A good call on two ranks."""
    first, last = CUTS["two"][rank : rank + 2]
    given = {"vocab_group": torch.distributed.group.WORLD, **case.options, **options}
    return grpo_loss(
        given.pop("logits", case.logits[..., first:last]), *given.pop("arguments", case.arguments), **given
    )


BAD = {
    "other ids": (lambda case: {"arguments": (case.token_ids.roll(1), *case.arguments[1:])}, "token_ids and mask"),
    "another mask": (lambda case: {"arguments": (*case.arguments[:2], ~case.mask)}, "token_ids and mask"),
    "fewer rows": (
        lambda case: {
            "logits": case.logits[:4, :, 49:],
            "arguments": [x[:4] for x in case.arguments],
            "old_log_probs": case.options["old_log_probs"][:4],
            "ref_log_probs": None,
        },
        "shape of token_ids",
    ),
    "another dtype": (lambda case: {"logits": case.logits[..., 49:].bfloat16()}, "dtype of the logits"),
    "another config": (lambda case: {"config": "dapo"}, "config"),
    "fewer arguments": (lambda case: {"old_log_probs": None}, "old_log_probs"),
    "another vocabulary": (lambda case: {"vocab_size": 90}, "vocab_size"),
    "a start": (lambda case: {"vocab_start": 49}, "vocab_start (given or not)"),
    "a bad start": (lambda case: {"vocab_start": -3}, "rank 1 of 2: grpo_loss: expected vocab_start to be an int >= 0"),
    "bad advantages": (
        lambda case: {"arguments": (case.token_ids, case.advantages[:-1], case.mask)},
        "rank 1 of 2: grpo_loss: expected advantages of shape",
    ),
    "a bad temperature": (lambda case: {"temperature": -1.0}, "rank 1 of 2: grpo_loss: expected temperature"),
    "another temperature": (lambda case: {"temperature": 0.5}, "temperature"),
    "other advantages": (
        lambda case: {"arguments": (case.token_ids, case.advantages + 1, case.mask)},
        "advantages on every rank",
    ),
    "other old log-probs": (lambda case: {"old_log_probs": case.options["old_log_probs"] - 0.1}, "old_log_probs"),
    "a support": (lambda case: {"support": TopK(3)}, "support"),
    "no support": (lambda case: {"support": "top"}, "rank 1 of 2: grpo_loss: expected support="),
    "a bad scale": (lambda case: {"grad_scale": -1.0}, "rank 1 of 2: grpo_loss: expected grad_scale"),
    "no config": (lambda case: {"config": "gpso"}, "rank 1 of 2: preset must be one of"),
    "required in one pass": (
        lambda case: {"require": "fused", "logits": case.logits[..., 49:].clone().requires_grad_()},
        "rank 1 of 2: grpo_loss: expected a call that compiled",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_ranks_that_differ_raise_the_same_error(name):
    """At the first call on a group; no rank waits for another, and the group is as it was afterwards."""
    changed, expected = BAD[name]
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        errors = []
        for _ in range(2):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                call(rank, case, **(changed(case) if rank == 1 else {}))
            errors.append(str(error.value))
        return errors, call(rank, case).loss

    (first, loss), (second, _) = run_threads(2, of_rank, deadline=10)
    assert first == second
    assert expected in first[0]
    assert first[0] == first[1]
    assert loss.isfinite()


@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("name", [name for name in (*NUMBERS, "grad_scale") if name != "divergence_coef"])
def test_numbers_of_ranks_differ(name, kind, function):
    """A normalizer of a rank's own tokens, a coefficient of its own controller: the loss would not be one loss."""
    case, config = cases.make(vocab=VOCAB), LossConfig(rollout_kl=KL(0.1))
    head = torch.eye(VOCAB)  # hidden states that are the logits
    given = {**case.options, "rollout_log_probs": case.options["old_log_probs"], "config": config}

    def of_rank(rank):
        first, last = CUTS["two"][rank : rank + 2]
        options = {**given, "vocab_group": torch.distributed.group.WORLD, name: kind(4.0 + rank)}
        rows = (case.logits[..., first:last],) if function == "grpo_loss" else (case.logits, head[first:last])
        loss = grpo_loss if function == "grpo_loss" else linear_grpo_loss
        with pytest.raises(ValueError, match=f"the same {name} on every rank of vocab_group; got 4.0 on rank 0, 5.0"):
            loss(*rows, *case.arguments, **options)
        return bool(loss(*rows, *case.arguments, **{**options, name: kind(4.0)}).loss.isfinite())

    assert run_threads(2, of_rank, deadline=10) == [True, True]


def test_ids_outside_every_shard():
    case = cases.make(vocab=VOCAB)
    case.token_ids[0, 0], case.mask[0, 0] = VOCAB, True

    def of_rank(rank):
        call(rank, cases.make(vocab=VOCAB))
        with pytest.raises(IndexError, match=r"\[0, 97\).*token_ids\[0, 0\] = 97") as error:
            call(rank, case)
        return str(error.value)

    first, second = run_threads(2, of_rank, deadline=10)
    assert first.splitlines()[0] == second.splitlines()[0]


def test_log_probs_of_ids_outside_every_shard():
    case = cases.make(vocab=VOCAB)
    case.token_ids[0, 0], case.mask[0, 0] = VOCAB, True

    def of_rank(rank):
        first, last = CUTS["two"][rank : rank + 2]
        with pytest.raises(IndexError, match=r"token_log_probs: .*\[0, 97\).*token_ids\[0, 0\] = 97"):
            token_log_probs(
                case.logits[..., first:last], case.token_ids, case.mask, vocab_group=torch.distributed.group.WORLD
            )

    run_threads(2, of_rank, deadline=10)


@pytest.mark.parametrize(
    ("starts", "text"),
    [((0, 50), r"\[0, 49\), \[50, 98\)"), ((0, 40), r"\[0, 49\), \[40, 88\)"), ((1, 50), r"\[1, 50\), \[50, 98\)")],
)
def test_columns_that_are_no_vocabulary(starts, text):
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        with pytest.raises(ValueError, match=f"each of them once; got {text}"):
            call(rank, case, vocab_start=starts[rank], vocab_size=97 if starts[0] == 0 else 98)

    run_threads(2, of_rank, deadline=10)


def test_columns_out_of_order():
    """Ranks may hold any columns, if they say which."""
    case = cases.make(vocab=VOCAB)
    whole, gradient = case.run()

    def of_rank(rank):
        first, last = ((49, 97), (0, 49))[rank]
        leaf = case.logits[..., first:last].clone().requires_grad_()
        out = call(rank, case, logits=leaf, vocab_start=first, vocab_size=VOCAB)
        out.loss.backward()
        return out.loss, leaf.grad

    (loss, second), (_, first) = run_threads(2, of_rank)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(torch.cat([first, second], -1), gradient, rtol=1e-5, atol=1e-8)


def test_a_rank_that_raises_outside_of_checks_is_a_timeout_and_no_answer():
    """A shard without its group is a vocabulary of its own: an id beyond it raises at once."""
    case = cases.make(vocab=VOCAB)
    with pytest.raises(IndexError, match=r"outside the vocabulary \[0, 49\)"):
        grpo_loss(case.logits[..., :49], *case.arguments, **case.options)


def test_arguments_of_one_rank():
    case = cases.make(vocab=VOCAB)
    with pytest.raises(ValueError, match="vocab_start=0 where one rank holds the vocabulary"):
        grpo_loss(case.logits, *case.arguments, vocab_start=3, **case.options)
    with pytest.raises(ValueError, match="vocab_size <= 97"):
        grpo_loss(case.logits, *case.arguments, vocab_size=98, **case.options)
    with pytest.raises(ValueError, match="torch.distributed to be initialised"):
        grpo_loss(case.logits, *case.arguments, vocab_group=object(), **case.options)


def counted(monkeypatch):
    """Elements that a rank contributes to every collective."""
    sizes: list[int] = []
    for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single"):
        plain = getattr(torch.distributed, name, None)
        if plain is not None:

            def counting(out, values, *rest, plain=plain, **options):
                if torch.distributed.get_rank() == 0:
                    sizes.append(values.numel() * values.element_size())
                return plain(out, values, *rest, **options)

            monkeypatch.setattr(torch.distributed, name, counting)
    return sizes


def test_bytes_on_the_wire(monkeypatch):
    """16 bytes a token in forward, contributed by a rank, and nothing in backward; from hidden states their gradient
    once more, a slice of it added by every rank."""
    case = cases.make(vocab=VOCAB, config=LossConfig.preset("gspo", entropy_coef=0.1))
    tokens, live, head = case.mask.numel(), int(case.mask.sum()), head_of(case)
    sizes = counted(monkeypatch)

    def of_rank(rank):
        first, last = CUTS["two"][rank : rank + 2]
        told = {"vocab_start": first, "vocab_size": VOCAB}
        for function in (
            lambda: call(
                rank, case, logits=case.logits[..., first:last].clone().requires_grad_(), **told
            ).loss.backward(),
            lambda: linear(case, head, CUTS["two"], rank, **told, **case.options),
        ):
            function()  # where ranks agree
            torch.distributed.barrier()
            sizes.clear()
            torch.distributed.barrier()
            function()
            torch.distributed.barrier()
            if rank == 0:
                seen.append(list(sizes))
            torch.distributed.barrier()

    seen: list[list[int]] = []
    run_threads(2, of_rank)
    assert seen[0] == [16 * tokens]
    states = 4 * live * HIDDEN, 4 * live * 4
    halves = [size // 2 for size in states]
    assert sorted(seen[1]) == sorted([16 * live, *states, *halves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cut", ["two", "empty"])
@pytest.mark.parametrize("support", [*SUPPORTS, TopK(96), TopK(1000), TopP(1.0), TopP(1e-9)], ids=str)
def test_truncated_support(support, cut, dtype):
    """Thresholds are those of whole rows: of each rank's k largest, of masses, of the largest of all."""
    case = cases.make(vocab=VOCAB, dtype=dtype, support=support, temperature=0.8, config="dapo", entropy_coef=0.05)
    assert_whole(case, CUTS[cut], padding=7)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_support_that_is_a_mask_of_each_rank(softcap):
    case = cases.make(vocab=VOCAB, logit_softcap=softcap)
    allowed = torch.rand(*case.token_ids.shape, VOCAB, generator=torch.Generator().manual_seed(0)) < 0.3
    whole, gradient = case.run(support=allowed)

    def of_rank(rank):
        first, last = CUTS["two"][rank : rank + 2]
        leaf = case.logits[..., first:last].clone().requires_grad_()
        out = call(rank, case, logits=leaf, support=allowed[..., first:last])
        out.loss.backward()
        return out.log_probs, leaf.grad

    results = run_threads(2, of_rank)
    torch.testing.assert_close(results[0][0], whole.log_probs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.cat([part for _, part in results], -1), gradient, rtol=1e-4, atol=1e-6)


def test_backward_of_a_truncated_support_asks_no_rank(monkeypatch):
    case, sizes = cases.make(vocab=VOCAB), counted(monkeypatch)

    def of_rank(rank):
        first, last = CUTS["two"][rank : rank + 2]
        leaf = case.logits[..., first:last].clone().requires_grad_()
        out = call(rank, case, logits=leaf, support=(TopK(20), TopP(0.9)))
        torch.distributed.barrier()
        sizes.clear()
        torch.distributed.barrier()
        out.loss.backward()

    run_threads(2, of_rank)
    assert sizes == []


def test_bits_of_other_numbers_of_ranks():
    """Log-probs and entropies of 1 to 8 ranks differ by their rounding, not by more."""
    torch.manual_seed(0)
    logits, ids = 3 * torch.randn(1, 64, 1000), torch.randint(1000, (1, 64))
    whole = token_log_probs(logits, ids)
    for ranks in (2, 4, 8):
        bounds = [1000 * rank // ranks for rank in range(ranks + 1)]

        def of_rank(rank, bounds=bounds):
            columns = logits[..., bounds[rank] : bounds[rank + 1]]
            return token_log_probs(columns, ids, vocab_group=torch.distributed.group.WORLD)

        for out in run_threads(ranks, of_rank):
            torch.testing.assert_close(out.log_probs, whole.log_probs, rtol=8 * 2**-23, atol=0)
            torch.testing.assert_close(out.entropy, whole.entropy, rtol=8 * 2**-23, atol=0)
            assert out.made.vocabulary_ranks == ranks


def test_a_mask_of_other_columns_on_one_rank():
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        columns = 49 if rank == 0 else 47
        with pytest.raises(ValueError, match=r"rank 1 of 2: grpo_loss: expected support") as error:
            call(rank, case, support=torch.ones(*case.token_ids.shape, columns, dtype=torch.bool))
        return str(error.value)

    first, second = run_threads(2, of_rank, deadline=10)
    assert first == second


def test_columns_that_are_no_vocabulary_are_refused_again():
    """What ranks found out together is forgotten where it failed."""
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        for _ in range(2):
            with pytest.raises(ValueError, match="each of them once"):
                call(rank, case, vocab_start=0, vocab_size=VOCAB)
        return call(rank, case, vocab_start=49 * rank, vocab_size=VOCAB).loss

    assert all(loss.isfinite() for loss in run_threads(2, of_rank, deadline=10))


def test_a_token_that_two_ranks_hold_is_nan():
    """Ranks told of good columns once may be told of bad ones later, when nobody asks."""
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        call(rank, case, vocab_start=49 * rank, vocab_size=VOCAB)
        both = case.logits[..., :60]
        return token_log_probs(
            both, case.token_ids, case.mask, vocab_group=torch.distributed.group.WORLD, vocab_start=0, vocab_size=60
        )

    case.token_ids.clamp_(max=59)

    def warmed(rank):
        first = slice(30 * rank, 30 * rank + 30)
        where = {"vocab_group": torch.distributed.group.WORLD, "vocab_start": 30 * rank, "vocab_size": 60}
        token_log_probs(case.logits[..., first], case.token_ids, case.mask, **where)
        return of_rank(rank)

    for out in run_threads(2, warmed):
        assert out.log_probs[case.mask].isnan().all()


def test_a_group_of_vocabularies_has_not_agreed_on_sequences():
    """One group may be given as either; each is agreed on by itself."""
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        call(rank, case)
        advantages = case.advantages if rank == 0 else case.advantages[:-1]
        with pytest.raises(ValueError, match="rank 1 of 2: grpo_loss: expected advantages") as error:
            grpo_loss(case.logits, case.token_ids, advantages, case.mask, sequence_group=torch.distributed.group.WORLD)
        return str(error.value)

    first, second = run_threads(2, of_rank, deadline=10)
    assert first == second


@pytest.mark.parametrize("ranks", [1, 2])
def test_masked_positions_are_0_whatever_their_ids(ranks):
    case = cases.make(vocab=VOCAB, extra_row=False)
    case.token_ids[~case.mask] = -100

    def of_rank(rank):
        columns = case.logits.tensor_split(ranks, -1)[rank]
        return token_log_probs(
            columns, case.token_ids, case.mask, vocab_group=torch.distributed.group.WORLD, vocab_size=96
        )

    case.token_ids[case.mask] = case.token_ids[case.mask].clamp(max=95)
    for out in run_threads(ranks, of_rank):
        assert (out.log_probs[~case.mask] == 0).all()
        assert (out.entropy[~case.mask] == 0).all()
        assert out.log_probs.isfinite().all()


def test_parameters_are_plain_tensors():
    """A Parameter stays in the graph of a compiled caller."""
    leaf = torch.nn.Parameter(torch.randn(2, 4, 11))
    ids, advantages = torch.randint(11, (2, 4)), torch.ones(2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss():
        return grpo_loss(leaf, ids, advantages).loss + token_log_probs(leaf, ids).log_probs.sum()

    loss().backward()
    assert leaf.grad.abs().max() > 0


def test_ranks_that_hold_the_same_columns_are_refused():
    case = cases.make(vocab=VOCAB)
    case.token_ids.clamp_(max=49)

    def of_rank(rank):
        said = []
        for columns, where in (
            (97, {"vocab_start": 0, "vocab_size": 50}),  # all of what counts, twice
            (60, {"vocab_start": 0, "vocab_size": 97}),
            (97, {"vocab_size": 97}),  # gathered logits
        ):
            with pytest.raises(ValueError, match="vocab_group to hold") as error:
                call(rank, case, logits=case.logits[..., :columns], **where)
            said.append(str(error.value))
        return said

    first, second = run_threads(2, of_rank, deadline=10)
    assert first == second
    assert "each rank of vocab_group to hold a part of the vocabulary" in first[0]
    assert "each of them once; got [0, 60), [0, 60)" in first[1]
    assert "need no vocab_group=" in first[2]


def test_a_vocabulary_is_not_over_the_ranks_of_a_sequence():
    case = cases.make(vocab=VOCAB)

    def of_rank(rank):
        with pytest.raises(ValueError, match=r"sequence_group= of other ranks than vocab_group=") as error:
            call(rank, case, sequence_group=torch.distributed.group.WORLD)
        return str(error.value)

    first, second = run_threads(2, of_rank, deadline=10)
    assert first == second
