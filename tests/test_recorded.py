"""Recorded sampling sets: log-probs, losses and gradients over the ids that a sampler kept."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from cases import make
from test_linear import Problem

from grpo_kernels import (
    KL,
    LossConfig,
    MinP,
    Recorded,
    TopK,
    TopP,
    Unclipped,
    grpo_loss,
    hf,
    linear_grpo_loss,
    linear_token_log_probs,
    split_context,
    token_log_probs,
)
from grpo_kernels.backends import sets as rows_of_sets
from grpo_kernels.backends.contract import Rows
from grpo_kernels.calls import recorded_head
from grpo_kernels.verification.tolerance import compare, truth_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = 0.3
"""The part of tokens that were not recorded, in most tests."""


def draw(ids: torch.Tensor, vocab: int, share: float = 0.1, unrecorded: float = HALF, seed: int = 3) -> Recorded:
    """Sets with the drawn token in each, in no order, of another size for every token."""
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(seed)
        shape = (*ids.shape, vocab)
        kept = torch.rand(shape, generator=g) < share * 2 * torch.rand(*ids.shape, 1, generator=g)
        kept.scatter_(-1, ids.cpu()[..., None], True)
        kept &= ~(torch.rand(*ids.shape, 1, generator=g) < unrecorded)
        kept = kept.flatten(0, -2)
        lists = [row.nonzero().flatten()[torch.randperm(int(row.sum()), generator=g)].tolist() for row in kept]
        counts = torch.tensor([len(one) for one in lists]).view(ids.shape)
        flat = torch.tensor([x for one in lists for x in one], dtype=torch.int32)
    return Recorded.from_counts(flat.to(ids.device), counts.to(ids.device))


def mask_of(recorded: Recorded, vocab: int) -> torch.Tensor:
    """The same as a bool mask, whole rows where nothing was recorded."""
    kept = torch.zeros(recorded.offsets.shape[0] - 1, vocab, dtype=torch.bool, device=recorded.ids.device)
    for row, (first, last) in enumerate(zip(recorded.offsets[:-1], recorded.offsets[1:], strict=True)):
        kept[row, recorded.ids[first:last].long() if last > first else slice(None)] = True
    return kept.view(*recorded.shape, vocab)


@pytest.mark.sample(triton=3)
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 4.0, "logit_scale": 1.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(backend, dtype, options):
    """By the ULP rule, with rows that were not recorded among the others."""
    case = make(dtype=dtype, temperature=0.8, config="dapo", entropy_coef=0.05, **options)
    support = draw(case.token_ids, 97)
    out, gradient = case.run(backend=backend, support=support)
    truth = truth_of(case.logits, *case.arguments, **case.options, support=support)
    result = compare(truth, out.loss, out.log_probs, out.entropy, gradient)
    assert result.holds, result
    assert out.metrics.outside_support == 0
    kept = mask_of(support, 97)
    length = case.token_ids.shape[1]
    assert (gradient[:, :length][~kept] == 0).all()
    assert (gradient[:, length:] == 0).all()
    assert (gradient[:, :length][kept & (case.mask & (case.advantages != 0)[:, None])[..., None]] != 0).sum() > 50


def test_by_hand(backend):
    """z = (2, 1, 0, -1), K = {1, 3} of 1 to 4, y = 3."""
    z = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[2]])
    out = token_log_probs(z, ids, support=Recorded.from_lists([[[2, 0]]]), backend=backend)
    assert float(out.log_probs.detach()) == pytest.approx(-2.126928, abs=1e-6)
    (gradient,) = torch.autograd.grad(out.log_probs.sum(), z)
    wanted = torch.tensor([-0.880797, 0.0, 0.880797, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient[0, 0], wanted, atol=1e-6, rtol=0)
    whole = token_log_probs(z, ids, backend=backend)
    assert float((out.log_probs - whole.log_probs).detach()) == pytest.approx(-math.log(0.731059), abs=1e-6)


def test_of_one_token_nothing_is_left_to_choose(backend):
    case = make(entropy_coef=0.1, config="dapo")
    alone = Recorded.from_counts(case.token_ids.flatten(), torch.ones_like(case.token_ids))
    out, gradient = case.run(backend=backend, support=alone)
    for values in (out.log_probs, out.entropy, gradient):
        assert (values == 0).all()
    assert out.metrics.tokens == case.mask.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_column_is_the_whole_vocabulary(backend, dtype):
    case = make(dtype=dtype, config="dapo", entropy_coef=0.05)
    counts = torch.full_like(case.token_ids, 97)
    everything = Recorded.from_counts(torch.arange(97).repeat(counts.numel()).to(counts.device), counts)
    truth = truth_of(case.logits, *case.arguments, **case.options)
    out, gradient = case.run(backend=backend, support=everything)
    result = compare(truth, out.loss, out.log_probs, out.entropy, gradient)
    assert result.holds, result


def test_nothing_recorded_is_no_support(backend):
    """Bit for bit: every row is the kernels'."""
    case = make()
    none = Recorded.from_counts(case.token_ids.new_empty(0), torch.zeros_like(case.token_ids))
    found = token_log_probs(case.logits, *case.arguments[::2], support=none, backend=backend)
    plain = token_log_probs(case.logits, *case.arguments[::2], backend=backend)
    assert torch.equal(found.log_probs, plain.log_probs)
    assert torch.equal(found.entropy, plain.entropy)


def test_probabilities_of_a_set_sum_to_one():
    rows = torch.randn(1, 3, 50, dtype=torch.float64)
    chosen = [[4, 9, 30], [1], list(range(50))]
    flat = [token for one in chosen for token in one]
    offsets = [0, 3, 4, 54]
    for row, (first, last) in enumerate(itertools.pairwise(offsets)):
        total = 0.0
        for token in flat[first:last]:
            ids = torch.tensor([[one[0] for one in chosen]])
            ids[0, row] = token
            recorded = Recorded(torch.tensor(flat), torch.tensor(offsets))
            total += float(token_log_probs(rows, ids, support=recorded).log_probs[0, row].exp())
        assert total == pytest.approx(1, abs=1e-14)


def test_orders_and_dtypes_of_ids_do_not_matter(backend):
    """Sums run in the order of the ids, in fp64: rounded to fp32 they are the same but in a tie."""
    case = make()
    support = draw(case.token_ids, 97)
    found = token_log_probs(case.logits, *case.arguments[::2], support=support, backend=backend)
    for ids, offsets in ((torch.int64, torch.int64), (torch.int32, torch.int32), (torch.int16, torch.int32)):
        other = Recorded(support.ids.to(ids), support.offsets.to(offsets))
        again = token_log_probs(case.logits, *case.arguments[::2], support=other, backend=backend)
        assert torch.equal(found.log_probs, again.log_probs)
    row = rows_of_sets.Sets(support.ids.long(), support.offsets).row
    ascending = torch.argsort(row * 97 + support.ids)
    other = Recorded(support.ids[ascending], support.offsets, support.shape)
    again = token_log_probs(case.logits, *case.arguments[::2], support=other, backend=backend)
    torch.testing.assert_close(found.log_probs, again.log_probs, rtol=0, atol=1e-6)


def test_impossible_columns_and_rows(backend):
    """-inf in a set has no probability; a set of nothing else makes its row NaN, and no other."""
    case = make(empty=False, old_log_probs=None, ref_log_probs=None, extra_row=False)
    case.mask[:] = True
    support = draw(case.token_ids, 97, share=0.3, unrecorded=0.0)
    kept = mask_of(support, 97)
    some = kept.clone().scatter_(-1, case.token_ids[..., None], False)
    case.logits[some & (torch.arange(97, device=kept.device) < 40)] = -math.inf
    out, gradient = case.run(backend=backend, support=support)
    truth = truth_of(case.logits, *case.arguments, support=support)
    assert compare(truth, out.loss, out.log_probs, out.entropy, gradient).holds
    case.logits[0, 2][kept[0, 2]] = -math.inf
    out, gradient = case.run(backend=backend, support=support)
    assert out.log_probs.isnan().nonzero().tolist() == [[0, 2]]
    assert gradient[0, 2][kept[0, 2]].isnan().all()
    assert gradient.isnan().sum() == kept[0, 2].sum()


def test_dead_rows_have_no_part(backend):
    """Whatever they, their ids and their sets hold; rows of whole vocabulary and of sets alike."""
    case = make()
    support = draw(case.token_ids, 97)
    found, gradient = case.run(backend=backend, support=support)
    dead = ~case.mask
    case.logits[:, :9][dead] = math.nan
    wrong = support.ids.clone()
    wrong[dead.flatten()[rows_of_sets.Sets(wrong.long(), support.offsets).row]] = 5000
    case.token_ids[dead] = -100
    again, same = case.run(backend=backend, support=dataclasses.replace(support, ids=wrong))
    assert torch.equal(found.loss, again.loss)
    assert torch.equal(gradient, same)
    assert (same[:, :9][dead] == 0).all()


def test_nan_shows_where_it_is_read(backend):
    case = make(ref_log_probs=None)
    support = draw(case.token_ids, 97, unrecorded=0.0)
    kept = mask_of(support, 97)
    b, t = (case.mask & (case.advantages != 0)[:, None]).nonzero()[0].tolist()
    case.logits[b, t][~kept[b, t]] = math.nan
    assert case.run(backend=backend, support=support)[0].loss.isfinite()
    case.logits[b, t, case.token_ids[b, t]] = math.nan
    out, gradient = case.run(backend=backend, support=support)
    assert out.loss.isnan()
    assert gradient[b, t][kept[b, t]].isnan().all()
    assert (gradient[b, t][~kept[b, t]] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
def test_packed_is_padded(backend, level):
    case = make(batch=3, length=8, extra_row=False, empty=False)
    support = draw(case.token_ids, 97)
    config = LossConfig(Unclipped(), level=level, kl=KL(0.1))
    out, gradient = case.run(backend=backend, support=support, config=config)
    leaf = case.logits.flatten(0, 1).clone().requires_grad_()
    packed = {name: value.flatten() for name, value in case.options.items()}
    packed |= {"cu_seqlens": torch.arange(0, 25, 8), "config": config, "backend": backend}
    mask, flat = case.mask.flatten(), Recorded(support.ids, support.offsets)
    other = grpo_loss(leaf, case.token_ids.flatten(), case.advantages, mask, support=flat, **packed)
    other.loss.backward()
    torch.testing.assert_close(out.loss, other.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.flatten(0, 1), leaf.grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(out.log_probs.flatten(), other.log_probs)


def test_the_sampler_and_the_policy_agree():
    """Top-p 0.8 by simulation, as in trl#7269: ratios to what the sampler reports are 1 with its sets and off by the
    kept mass without; here tokens are drawn from rows of a few thousand columns."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 400, 2000)
    p = torch.softmax(logits.double(), -1)
    order = p.sort(-1, descending=True)
    inside = order.values.cumsum(-1) - order.values < 0.8
    truncated = torch.where(inside, order.values, 0.0)
    mass = truncated.sum(-1)
    drawn = torch.multinomial((truncated / mass[..., None])[0], 1)[None, :, 0]
    ids = order.indices.gather(-1, drawn[..., None]).squeeze(-1)
    sampler = (truncated.gather(-1, drawn[..., None]).squeeze(-1) / mass).log()
    recorded = Recorded.from_counts(order.indices[inside].int(), inside.sum(-1))
    ratios = (token_log_probs(logits, ids, support=recorded).log_probs.double() - sampler).exp()
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=3e-6)
    without = (token_log_probs(logits, ids).log_probs.double() - sampler).exp()
    torch.testing.assert_close(without, mass, rtol=0, atol=3e-6)
    assert 0.8 <= without.mean() < 0.81


def test_losses_of_tokens_and_second_backward(backend):
    """Weighed by the caller: the same as the loss whose weights they are; log-probs may go backward twice."""
    case = make(extra_row=False)
    support = draw(case.token_ids, 97)
    leaf = case.logits.clone().requires_grad_()
    options = {**case.options, "support": support, "backend": backend}
    losses = grpo_loss(leaf, *case.arguments, token_losses=True, config="dapo", **options).token_losses
    (losses.sum() / case.mask.sum()).backward(retain_graph=True)
    _, gradient = case.run(config="dapo", support=support, backend=backend)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-8)
    once = leaf.grad.clone()
    (losses.sum() / case.mask.sum()).backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


# What is refused


def test_a_drawn_token_outside_its_set():
    case = make()
    support = draw(case.token_ids, 97, unrecorded=0.0)
    b, t = case.mask.nonzero()[2].tolist()
    ids = case.token_ids.clone()
    first, last = support.offsets[b * 9 + t : b * 9 + t + 2].tolist()
    ids[b, t] = next(token for token in range(97) if token not in support.ids[first:last].tolist())
    with pytest.raises(ValueError, match=rf"every live token in its recorded set; got token_ids\[{b}, {t}\] = "):
        token_log_probs(case.logits, ids, case.mask, support=support)
    hidden, weight = torch.randn(6, 9, 4), torch.randn(97, 4)
    with pytest.raises(ValueError, match=rf"recorded set; got token_ids\[{b}, {t}\] = "):
        linear_token_log_probs(hidden, weight, ids, case.mask, support=support)
    case.mask[b, t] = False
    assert token_log_probs(case.logits, ids, case.mask, support=support).log_probs.isfinite().all()


def test_where_nobody_may_look_it_is_nan_and_counted(backend, monkeypatch):
    """As on a GPU without checks: out-of-range ids and offsets read nothing that is not there."""
    case = make(ref_log_probs=None, extra_row=False)
    support = draw(case.token_ids, 97, unrecorded=0.0)
    monkeypatch.setattr("grpo_kernels.calls.recorded.may_look", lambda *_: False)
    (b, t), (c, u) = case.mask.nonzero()[[2, 5]].tolist()
    place, other = b * 9 + t, c * 9 + u
    wrong = support.ids.clone()
    row = rows_of_sets.Sets(wrong.long(), support.offsets).row
    wrong[(row == place) & (wrong == case.token_ids[b, t])] = 97  # the drawn one is another now
    out, gradient = case.run(backend=backend, support=dataclasses.replace(support, ids=wrong))
    assert out.loss.isnan()
    assert out.log_probs.isnan().nonzero().tolist() == [[b, t]]
    assert out.metrics.outside_support == 1
    assert (out.metrics + out.metrics).outside_support == 2
    offsets = support.offsets.clone()
    offsets[other], offsets[-1] = 10**6, -5
    case.run(backend=backend, support=dataclasses.replace(support, offsets=offsets))


def test_refused():
    case = make()
    support = draw(case.token_ids, 97)
    ids, offsets = support.ids, support.offsets
    for make_it, message in (
        (lambda: Recorded([1], offsets), "ids to be a tensor; got list"),
        (lambda: Recorded(ids.float(), offsets), "integer ids; got torch.float32"),
        (lambda: Recorded(ids[None], offsets), "ids of one dimension"),
        (lambda: Recorded(ids[1:], offsets), "offsets that do not fall, from 0 to"),
        (lambda: Recorded(ids, offsets + 1), "offsets that do not fall, from 0 to"),
        (lambda: Recorded(ids, offsets.flip(0)), r"got offsets\[1:3\] = "),
        (lambda: Recorded(ids, offsets, (5, 5)), r"offsets \(26,\) for tokens \(5, 5\)"),
        (lambda: Recorded.from_counts(ids, torch.tensor([3, -1])), "counts >= 0; got -1"),
        (lambda: Recorded.from_counts(ids, torch.tensor([0.5])), "counts to be an integer tensor"),
        (lambda: Recorded.from_lists([[1]], torch.tensor([[1, 1]])), "each of the mask's 2 tokens; got 1"),
        (lambda: Recorded.from_lists([[[1]], [[2]]], torch.ones(2, 2)), "2 lists of ids in sequence 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make_it()
    for support_, options, message in (
        (support[1:], {}, r"Recorded\(...\) of tokens \(6, 9\); got \(5, 9\)"),
        (dataclasses.replace(support, ids=ids - 97), {}, r"recorded ids in \[0, 97\)"),
        (support, {"inplace": True}, "inplace=False with support=Recorded"),
        (support, {"require": "fused"}, r"2 passes of backend '\w+': support=Recorded\(...\) reads a row at its ids"),
        (support, {"vocab_size": 96}, r"support=Recorded\(...\) with a whole vocabulary"),
    ):
        with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
            token_log_probs(case.logits.clone(), case.token_ids, case.mask, support=support_, **options)
    twice = Recorded.from_counts(case.token_ids.repeat_interleave(2), torch.full_like(case.token_ids, 2))
    with pytest.raises(ValueError, match="recorded sets without an id twice"):
        token_log_probs(case.logits, case.token_ids, case.mask, support=twice)


# How sets are made and cut


@pytest.mark.parametrize(
    ("sets", "mask", "message"),
    [
        ([[3.7, 1.2]], None, "ids that are integers, of 64 bits at most; got 3.7 in the set of token 0"),
        ([[0.0]], None, "ids that are integers, .*; got 0.0"),
        ([[1], [2, None]], None, "ids that are integers, .*; got None in the set of token 1"),
        ([np.array([1.7], np.float32)], None, r"ids that are integers, .*; got 1\.7"),
        ([torch.tensor([1.0])], None, r"ids that are integers, .*; got 1\.0"),
        ([{"a": -0.1}], None, "ids that are integers, .*; got 'a'"),
        ([[True]], None, "ids that are integers, .*; got True"),
        ([[2**70]], None, "ids that are integers, of 64 bits at most; got 1180591620717411303424"),
        (torch.tensor(3), None, "lists of ids, one for every token or for every sequence; got Tensor"),
        ([torch.tensor(3)], None, r"a list of ids for every token.*; got tensor\(3\) at 0"),
        ([np.array(5), np.array(6)], None, r"a list of ids for every token.*; got array\(5\) at 0"),
        ([[[1], np.array(5)]], None, r"a list of ids for every token.*; got array\(5\) at 1"),
        ([b"ab", b"c"], None, "a list of ids for every token.*; got b'ab' at 0"),
        ([[1], None], None, "a list of ids for every token.*; got None at 1"),
        ([[[1], None]], None, "a list of ids for every token.*; got None at 1"),
        (["12"], None, "a list of ids for every token.*; got '12' at 0"),
        (None, None, "lists of ids, one for every token or for every sequence; got NoneType"),
        ([[1]], [[1]], "mask to be a tensor; got list"),
    ],
)
def test_lists_that_are_none(sets, mask, message):
    with pytest.raises(TypeError, match=message):
        Recorded.from_lists(sets, mask)


def test_from_lists():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]])
    recorded = Recorded.from_lists([[5, 2], [7], [1, 2, 3]], mask)
    assert recorded.shape == (2, 4)
    assert recorded.ids.tolist() == [5, 2, 7, 1, 2, 3]
    assert recorded.offsets.tolist() == [0, 0, 2, 3, 3, 3, 3, 6, 6]
    nested = Recorded.from_lists([[[5, 2], [7]], [[1, 2, 3]]], mask)
    assert torch.equal(nested.offsets, recorded.offsets)
    whole = Recorded.from_lists([[[], [5, 2], [7], []], [[], [], [1, 2, 3], []]])
    assert torch.equal(whole.offsets, recorded.offsets)
    assert whole.shape == (2, 4)
    assert Recorded.from_lists([[4], [], [1, 2]]).shape == (3,)
    assert Recorded.from_lists([[], []]).offsets.tolist() == [0, 0, 0]
    assert Recorded.from_lists([]).shape == (0,)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "kind",
    [torch.tensor, np.array, tuple, set, lambda ids: dict.fromkeys(ids, -0.5), lambda ids: [*map(np.int32, ids)]],
    ids=["tensors", "arrays", "tuples", "sets", "dicts", "numpy's integers"],
)
def test_what_is_as_good_as_lists(kind, nested):
    """At any depth, in the order that they give."""
    lists = [[1, 2], [3], [2, 5]]
    wanted, given = Recorded.from_lists([lists] if nested else lists), [kind(ids) for ids in lists]
    found = Recorded.from_lists([given] if nested else given)
    assert (found.ids.tolist(), found.offsets.tolist()) == (wanted.ids.tolist(), wanted.offsets.tolist())
    assert found.shape == wanted.shape


def test_what_engines_return():
    """Padded rows and counts beside flat ids: prime-rl's, NeMo-RL's, slime's."""
    lists = [[3, 1], [], [0, 4, 2]]
    wanted = Recorded.from_lists(lists)
    padded = torch.tensor([[3, 1, -1], [-1, -1, -1], [0, 4, 2]])
    found = Recorded.from_counts(padded[padded >= 0], (padded >= 0).sum(-1))
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.offsets, wanted.offsets)
    padded, sizes = padded.clamp(min=0), torch.tensor([2, 0, 3])
    found = Recorded.from_counts(padded[torch.arange(3) < sizes[:, None]], sizes)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.offsets, wanted.offsets)


@pytest.mark.parametrize(
    "key",
    [slice(1, 3), slice(None, None, 2), 2, (slice(None), slice(1, 4)), torch.tensor([3, 0, 3]), slice(0, 0)],
    ids=str,
)
def test_a_key_takes_what_it_takes_of_the_ids(key):
    ids = torch.arange(4 * 5).view(4, 5)
    recorded = draw(ids, 30)
    kept, part = mask_of(recorded, 30), recorded[key]
    assert part.shape == tuple(ids[key].shape)
    assert torch.equal(mask_of(part, 30), kept[key])
    assert part.ids.dtype == recorded.ids.dtype


def test_parts_of_a_sequence():
    """What ``split_context`` leaves on a rank, padding aside."""
    ids = torch.randint(30, (2, 11))
    recorded = draw(ids[:, 1:], 30)
    for rank in (0, 1):
        part = split_context(ids, torch.ones_like(ids), rank, 2)
        found = mask_of(recorded[:, part.index.clamp(max=9)], 30)
        assert torch.equal(found & part.mask[..., None], part.take(mask_of(recorded, 30)) & part.mask[..., None])


def test_moves_with_a_batch():
    recorded = draw(torch.zeros(2, 3, dtype=torch.int64), 10)
    moved = hf.batch(token_ids=torch.zeros(2, 3, dtype=torch.int64), support=recorded).to("meta")["support"]
    assert moved.ids.is_meta
    assert moved.shape == (2, 3)


# Gather and scatter


def test_what_is_scattered_is_gathered_again():
    """Any strides, a row more than tokens, fp64: the two ways are each other's inverse, and touch nothing else."""
    logits = torch.randn(5, 2, 12).transpose(0, 1)[..., 1:-1].double()
    token_ids, live = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    numbers = torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64)
    rows = Rows(logits, token_ids, live, numbers, softcap=False)
    sets = rows_of_sets.Sets(torch.tensor([3, 9, 0, 4]), torch.tensor([0, 2, 2, 2, 3, 3, 3, 3, 4]))
    at = rows_of_sets.gather(rows, sets)
    assert at.row.tolist() == [0, 0, 3, 7]
    assert torch.equal(at.value, torch.stack([logits[0, 0, 3], logits[0, 0, 9], logits[0, 3, 0], logits[1, 3, 4]]))
    assert (at.factor == 3).all()
    out = torch.zeros_like(logits)
    rows_of_sets.scatter_(out, rows, at, torch.arange(1.0, 5.0))
    assert torch.equal(rows_of_sets.gather(rows._replace(logits=out), sets).value, torch.arange(1.0, 5.0).double())
    assert out.count_nonzero() == 4


@pytest.mark.parametrize("add", [recorded_head.add_sorted_, recorded_head.add_segments_])
def test_sums_over_sorted_keys(add):
    """As on a CPU, and as where ``index_add_`` has no order."""
    keys = torch.tensor([0, 0, 2, 2, 2, 5])
    values = torch.randn(6, 3)
    total = torch.ones(7, 3)
    add(total, keys, values)
    wanted = torch.ones(7, 3)
    for key, row in zip(keys, values, strict=True):
        wanted[key] += row
    torch.testing.assert_close(total, wanted)
    add(total, keys[:0], values[:0])
    torch.testing.assert_close(total, wanted)


# From hidden states


@pytest.fixture(params=["gathered", "whole rows"])
def form(request, monkeypatch):
    """Both ways to a set's logits, whatever the shapes."""
    share = 0 if request.param == "gathered" else 1 << 40
    monkeypatch.setitem(recorded_head.SHARES, "cpu", share)
    return request.param


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 20000])
def test_from_hidden_states(form, level, chunk_bytes, rank):
    """In fp64: of one chunk and of several, with rows that were not recorded."""
    problem = Problem(dtype=torch.float64, rank=rank)
    support = draw(problem.ids, 97)
    options = {"config": LossConfig(level=level, kl=KL(0.1), entropy_coef=0.05), "support": support}
    out, gradients = problem.run(chunk_bytes=chunk_bytes, **options)
    expected, wanted = problem.expected(torch.float64, **options)
    assert ("gathers" in out.route.reason) == (form == "gathered")
    for found, other in zip(out[0::2], expected[0::2], strict=False):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-10, atol=1e-12)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    for name, value in out.metrics.as_dict().items():
        torch.testing.assert_close(value, expected.metrics.as_dict()[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("unrecorded", [0.0, HALF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_a_materialised_head(form, dtype, unrecorded):
    """At most twice the error of eager PyTorch that upcasts its logits to fp32, beside float64."""
    problem = Problem(8, 20, 64, 500, dtype, seed=1)
    options = {"config": LossConfig(Unclipped(), kl=KL(0.1), entropy_coef=0.01)}
    options["support"] = draw(problem.ids, 500, unrecorded=unrecorded)
    out, gradients = problem.run(**options)
    _, exact = problem.expected(torch.float64, **options)
    baseline, theirs = problem.expected(**options)
    for mine, eager, truth, leaf in zip(gradients, theirs, exact, problem.leaves, strict=True):
        assert mine.dtype == leaf.dtype
        error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (mine, eager))
        assert error <= 2 * allowed + 1e-6, (error, allowed)
    slack = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.loss, baseline.loss, rtol=slack, atol=slack)


def test_masked_states_have_no_part_and_results_repeat(form):
    problem = Problem()
    support = draw(problem.ids, 97)
    _, gradients = problem.run(support=support)
    with torch.no_grad():
        problem.hidden[:, :7][~problem.mask] = math.nan
    for _ in range(2):
        _, again = problem.run(support=support)
        assert all(map(torch.equal, gradients, again))
    assert (gradients[0][:, :7][~problem.mask] == 0).all()


def test_only_what_is_wanted(form):
    """A frozen head, frozen states, and no gradient at all."""
    problem = Problem(bias=False)
    options = {**problem.options, "support": draw(problem.ids, 97)}
    _, wanted = problem.run(**options)
    for leaf, other, gradient in zip(problem.leaves, problem.leaves[::-1], wanted, strict=True):
        other.requires_grad_(False)
        out = linear_grpo_loss(*problem.leaves, problem.ids, problem.advantages, problem.mask, **options)
        out.loss.backward()
        assert torch.equal(leaf.grad, gradient)
        assert other.grad is None
        leaf.grad = None
        other.requires_grad_()
    with torch.no_grad():
        found = linear_token_log_probs(*problem.leaves, problem.ids, problem.mask, support=options["support"])
    assert torch.equal(found.log_probs, out.log_probs)
    assert not found.log_probs.requires_grad


def test_nothing_to_compute(form):
    """No sequences, no tokens, and none that is live."""
    problem = Problem()
    support = draw(problem.ids, 97)
    for key in (slice(0, 0), (slice(None), slice(0, 0))):
        ids, sets = problem.ids[key], support[key]
        leaf = torch.randn(*ids.shape, 97, requires_grad=True)
        token_log_probs(leaf, ids, support=sets).log_probs.sum().backward()
        assert leaf.grad.shape == leaf.shape
        states = torch.randn(*ids.shape, 16, requires_grad=True)
        linear_token_log_probs(states, problem.weight.detach(), ids, support=sets).log_probs.sum().backward()
        assert states.grad.shape == states.shape
    problem.mask[:] = False
    out, gradients = problem.run(support=support)
    assert out.loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_autocast(form):
    """Operands as a linear layer would have them, gradients in the leaves' dtypes."""
    problem = Problem(rank=3)
    support = draw(problem.ids, 97)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = problem.run(support=support)
        wanted, others = problem.run(support=mask_of(support, 97))
    torch.testing.assert_close(out.loss, wanted.loss, rtol=5e-3, atol=0)
    for mine, other in zip(gradients, others, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.01 * other.norm()


def test_which_form_follows_from_shapes():
    assert recorded_head.gathers("cpu", 8 * 100, 100, 150_000)
    assert not recorded_head.gathers("cpu", 20_000 * 100, 100, 150_000)
    assert recorded_head.gathers("cuda", 780 * 100, 100, 150_000)
    assert not recorded_head.gathers("cuda", 800 * 100, 100, 150_000)


@pytest.mark.parametrize("support", [TopK(5), TopP(0.8), (TopK(20), MinP(0.05)), "a mask"], ids=str)
def test_filters_from_hidden_states(support):
    """Computed of the logits of each chunk."""
    problem = Problem(dtype=torch.float64)
    if support == "a mask":
        support = mask_of(draw(problem.ids, 97, share=0.3), 97)
    options = {"config": LossConfig(kl=KL(0.1), entropy_coef=0.05), "support": support}
    expected, wanted = problem.expected(torch.float64, **options)
    for chunk_bytes in (1 << 30, 8000):
        out, gradients = problem.run(chunk_bytes=chunk_bytes, **options)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
        for mine, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_compiled_in_one_graph():
    case = make(config="dapo", entropy_coef=0.05)
    support = draw(case.token_ids, 97)

    def loss(logits, ids, offsets):
        recorded = Recorded(ids, offsets)
        return grpo_loss(logits, *case.arguments, support=recorded, backend="torch", **case.options).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = case.logits.clone().requires_grad_()
        value = function(leaf, support.ids, support.offsets)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["ids", "offsets", "token_ids", "mask", "temperature"])
@pytest.mark.parametrize("every", [True, False])
def test_what_is_overwritten_before_backward_changes_no_gradient(name, every):
    """Of gathered rows of a head: a sweep has its own; with sets of every row, and with rows that have none."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8000, 4, generator=g)
    gradients = []
    for overwritten in (False, True):
        hidden = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        given = {
            "ids": torch.tensor([3, 9, 4, 7]),
            "offsets": torch.tensor([0, 2, 4] if every else [0, 4, 4]),
            "token_ids": torch.tensor([[3, 4]]),
            "mask": torch.ones(1, 2, dtype=torch.bool),
            "temperature": torch.tensor([[0.5, 2.0]]),
        }
        recorded = Recorded(given["ids"], given["offsets"])
        tokens = {key: given[key] for key in ("token_ids", "mask", "temperature")}
        log_probs = linear_token_log_probs(hidden, weight, support=recorded, **tokens).log_probs
        if overwritten:
            given[name].copy_(given[name].flip(-1).logical_not() if name == "mask" else given[name].flip(-1))
        gradients += torch.autograd.grad(log_probs.sum(), hidden)
    assert torch.equal(*gradients)
