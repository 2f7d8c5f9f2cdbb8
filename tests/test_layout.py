"""Shapes, strides, packing, alignment: the same numbers however the tensors lie."""

from __future__ import annotations

import pytest
import torch
from cases import label, make, one_of_each, sampler

from grpo_kernels import (
    KL,
    Clip,
    LossConfig,
    align,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    normalizer,
    token_log_probs,
)
from grpo_kernels.verification import reference
from grpo_kernels.verification.tolerance import compare, truth_of
from grpo_kernels.verification.verify import complete

INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def gradient_of(view_of, storage: torch.Tensor, case, backend, **options) -> tuple:
    """Loss and gradient in a leaf of which the logits are a view."""
    leaf = storage.clone().requires_grad_()
    out = grpo_loss(view_of(leaf), *case.arguments, backend=backend, **{**case.options, **options})
    out.loss.backward()
    return out, leaf.grad


def test_align_padded():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    token_ids, live = align(ids, mask)
    assert token_ids.tolist() == [[6, 7, 8], [2, 3, 4]]
    assert live.tolist() == [[False, True, True], [True, True, False]]
    assert live.dtype == torch.bool


@pytest.mark.parametrize("shape", [(9,), (1, 9)])
def test_align_packed(shape):
    """The last token of a sequence predicts nothing; what follows the last sequence neither."""
    ids = torch.arange(10, 19).view(shape)
    mask = torch.ones(shape)
    cu_seqlens = torch.tensor([0, 3, 7])
    token_ids, live = align(ids, mask, cu_seqlens)
    assert token_ids.shape == live.shape == shape
    assert token_ids.flatten().tolist() == [11, 12, 13, 14, 15, 16, 17, 18, 10]
    assert live.flatten().tolist() == [True, True, False, True, True, True, False, False, False]


def test_align_with_a_first_bound():
    """Rows before the first bound belong to no sequence, and an empty one ends nothing."""
    ids = torch.tensor([10, 11, 12, 20, 21])
    for bounds in ([1, 3, 5], [1, 1, 3, 3, 5]):
        assert align(ids, torch.ones(5), torch.tensor(bounds))[1].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_product"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"])
def test_what_belongs_to_no_sequence(backend, level, aggregation):
    """Rows outside of the bounds count nowhere: in the loss, its gradient, its metrics, and the normalizer."""
    case = make(batch=1, length=12, extra_row=False)
    case.advantages, case.mask = torch.tensor([1.0, -1.0]), torch.ones(1, 12)
    config = LossConfig(Clip(), level, aggregation, KL(0.1), entropy_coef=0.05, constant_length=8, group_size=2)
    bounds = torch.tensor([2, 6, 9])
    inner = make_with(make(batch=1, length=12, extra_row=False), case.advantages)
    inner.logits, inner.token_ids, inner.mask = (x[:, 2:9] for x in (case.logits, case.token_ids, case.mask))
    inner.options = {name: value[:, 2:9] for name, value in case.options.items()}
    expected, expected_gradient = inner.run(backend, config=config, cu_seqlens=bounds - 2)
    truth, _ = case.reference(config=config, cu_seqlens=bounds)
    torch.testing.assert_close(truth.loss, expected.loss, rtol=1e-5, atol=1e-7)
    case.logits[:, :2] = case.logits[:, 9:] = float("nan")
    denominator = normalizer(case.mask, config, cu_seqlens=bounds)
    for options in ({}, {"normalizer": denominator}):
        out, gradient = case.run(backend, config=config, cu_seqlens=bounds, **options)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient[:, 2:9], expected_gradient, rtol=1e-5, atol=1e-9)
        assert (gradient[:, :2] == 0).all()
        assert (gradient[:, 9:] == 0).all()
        for name, value in out.metrics.as_dict().items():
            assert value.item() == pytest.approx(expected.metrics.as_dict()[name].item(), rel=1e-6, abs=1e-7), name


def test_normalizer_of_packed_masks():
    """(N,) or (1, N), and nothing outside of the bounds."""
    mask, bounds = torch.ones(9), torch.tensor([1, 4, 7])
    assert float(normalizer(mask, "dapo", cu_seqlens=bounds)) == 6
    assert float(normalizer([mask[None], mask], "dapo", cu_seqlens=[bounds, torch.tensor([0, 2])])) == 8
    with pytest.raises(ValueError, match=r"cu_seqlens that never fall, within \[0, 9\]"):
        normalizer(mask, "dapo", cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"packed masks \(N,\) or \(1, N\)"):
        normalizer(torch.ones(2, 9), "dapo", cu_seqlens=bounds)


def test_align_is_the_shift_of_a_causal_model(backend):
    """logits (B, L, V), unshifted ids: exactly what the usual logits[:, :-1] against ids[:, 1:] gives."""
    case = make(extra_row=False)
    ids = torch.randint(97, (6, 9))
    response = torch.rand(6, 9) < 0.5
    token_ids, mask = align(ids, response)
    out = token_log_probs(case.logits, token_ids, mask, backend=backend)
    log_p = torch.log_softmax(case.logits[:, :-1].double(), -1)
    expected = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1) * response[:, 1:]
    torch.testing.assert_close(out.log_probs.double(), expected, rtol=0, atol=1e-5)


def test_align_checks_bounds():
    for bounds in ([0, 5, 20], [0, 9, 5]):
        with pytest.raises(ValueError, match=r"align: expected cu_seqlens that never fall, within \[0, 12\]"):
            align(torch.zeros(12, dtype=torch.int64), torch.ones(12), torch.tensor(bounds))
    with pytest.raises(TypeError, match="loss_mask to be a tensor; got list"):
        align(torch.zeros(2, 3), [1, 1, 1])


def test_align_refusals():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids and loss_mask of one shape"):
        align(ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match="packed ids need cu_seqlens="):
        align(ids[0], torch.ones(4))
    with pytest.raises(ValueError, match=r"packed input_ids \(N,\) or \(1, N\)"):
        align(ids, torch.ones(2, 4), torch.tensor([0, 8]))


def packed_of(case):
    """The case's sequences, cut to their last live token, one after the other, with slack rows behind."""
    lengths = [int(m.nonzero().max()) + 1 if m.any() else 0 for m in case.mask]
    lengths[4] += 1  # a sequence with a dead tail
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    def pack(x: torch.Tensor, fill: float = 0) -> torch.Tensor:
        parts = [row[:n] for row, n in zip(x, lengths, strict=True)]
        return torch.cat([*parts, torch.full_like(x[0, :2], fill)])

    def unpack(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(lengths), case.token_ids.shape[1], *x.shape[1:], dtype=x.dtype)
        for i, n in enumerate(lengths):
            out[i, :n] = x[bounds[i] : bounds[i] + n]
        return out

    return bounds, pack, unpack


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant", "group_mean"])
@pytest.mark.parametrize("leading", [False, True])
def test_packed_is_padded(backend, level, aggregation, leading):
    case = make(extra_row=False, empty=True, length=8)
    case.mask[4, -1] = False
    config = LossConfig(Clip(), level, aggregation, KL(0.1), entropy_coef=0.05, constant_length=8, group_size=2)
    expected, expected_gradient = case.run(backend, config=config)
    bounds, pack, unpack = packed_of(case)
    wrap = (lambda x: x[None]) if leading else (lambda x: x)
    logits = wrap(pack(case.logits)).requires_grad_()
    options = {name: wrap(pack(case.options[name])) for name in ("old_log_probs", "ref_log_probs")}
    mask = wrap(pack(case.mask, fill=1))  # rows past the last bound count as masked whatever the mask says
    for cu_seqlens in (bounds, bounds.int()):
        logits.grad = None
        out = grpo_loss(
            logits, wrap(pack(case.token_ids)), case.advantages, mask, cu_seqlens=cu_seqlens, config=config,
            backend=backend, **options,
        )  # fmt: skip
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
        flat = logits.grad[0] if leading else logits.grad
        torch.testing.assert_close(unpack(flat), expected_gradient, rtol=1e-5, atol=1e-9)
        assert (flat[bounds[-1] :] == 0).all()
        assert out.log_probs.shape == logits.shape[:-1]
        for name, value in out.metrics.as_dict().items():
            assert value.item() == pytest.approx(expected.metrics.as_dict()[name].item(), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("config", one_of_each(), ids=label)
@pytest.mark.parametrize("on_policy", [False, True])
def test_every_objective_packs(backend, config, on_policy):
    """The same numbers as padded, and the same bits twice: sums over a sequence have an order of their own."""
    case = make(extra_row=False, empty=True, length=8)
    case.options["rollout_log_probs"] = sampler(case)
    if on_policy:
        case.options["old_log_probs"] = None
    expected, expected_gradient = case.run(backend, config=config)
    bounds, pack, unpack = packed_of(case)
    options = {name: None if value is None else pack(value) for name, value in case.options.items()}
    arguments = (pack(case.token_ids), case.advantages, pack(case.mask, fill=1))
    found = []
    for _ in range(2):
        logits = pack(case.logits).requires_grad_()
        out = grpo_loss(logits, *arguments, cu_seqlens=bounds, config=config, backend=backend, **options)
        out.loss.backward()
        found.append((out.loss, logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], expected.loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(unpack(found[0][1]), expected_gradient, rtol=2e-5, atol=1e-8)


def test_packed_reference_is_padded_reference():
    case = make(dtype=torch.float64, extra_row=False, length=8)
    bounds, pack, unpack = packed_of(case)
    config = LossConfig(Clip(), "sequence", "group_mean", KL(0.1), group_size=3)
    expected, expected_gradient = case.reference(config=config)
    leaf = pack(case.logits).requires_grad_()
    out = reference.grpo_loss(
        leaf, pack(case.token_ids), case.advantages, pack(case.mask, fill=1), cu_seqlens=bounds, config=config,
        **{name: pack(case.options[name]) for name in ("old_log_probs", "ref_log_probs")},
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-13)
    torch.testing.assert_close(unpack(leaf.grad), expected_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("bounds", [[0, 1000], [0, 8, 4, 10], [-1, 10], [3, 2]])
def test_bounds_outside_the_tokens(backend, bounds):
    logits, ids = torch.randn(10, 8), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cu_seqlens that never fall, within \[0, 10\]"):
        grpo_loss(logits, ids, torch.ones(len(bounds) - 1), cu_seqlens=torch.tensor(bounds), backend=backend)


def test_packed_token_advantages(backend):
    case = make(extra_row=False, length=8)
    bounds, pack, unpack = packed_of(case)
    per_token = torch.randn(case.mask.shape)
    expected, expected_gradient = make_with(case, per_token).run(backend, config="grpo")
    leaf = pack(case.logits).requires_grad_()
    out = grpo_loss(
        leaf, pack(case.token_ids), pack(per_token), pack(case.mask), cu_seqlens=bounds, backend=backend,
        old_log_probs=pack(case.options["old_log_probs"]),
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unpack(leaf.grad), expected_gradient, rtol=1e-5, atol=1e-9)


def make_with(case, advantages):
    case.advantages = advantages
    return case


VIEWS = {
    "shorter rows of a longer batch": ((6, 14, 97), lambda s: s[:, 2:12]),
    "every second batch": ((12, 10, 97), lambda s: s[::2]),
    "every second row": ((6, 20, 97), lambda s: s[:, ::2]),
    "padded vocabulary": ((6, 10, 128), lambda s: s[..., :97]),
    "misaligned vocabulary": ((6, 10, 128), lambda s: s[..., 3:100]),
    "time first": ((10, 6, 97), lambda s: s.transpose(0, 1)),
    "storage offset": ((6 * 10 * 97 + 1,), lambda s: s[1:].view(6, 10, 97)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_strides(backend, name, config, dtype):
    """Any batch and row stride is read without a copy: the same bits, and gradients where they belong."""
    shape, view_of = VIEWS[name]
    case = make(dtype=dtype)
    storage = torch.full(shape, float("nan"), dtype=dtype)
    view_of(storage)[:] = case.logits
    expected, expected_gradient = case.run(backend, config=config)
    out, gradient = gradient_of(view_of, storage, case, backend, config=config)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.log_probs, expected.log_probs)
    assert torch.equal(view_of(gradient), expected_gradient)
    view_of(gradient)[:] = 0
    assert (gradient == 0).all()


def test_expanded_logits_get_a_dense_gradient(backend):
    row = torch.randn(1, 1, 33)
    ids = torch.randint(33, (2, 3))
    leaf = row.clone().requires_grad_()
    out = grpo_loss(leaf.expand(2, 3, 33), ids, torch.tensor([1.0, -2.0]), backend=backend)
    out.loss.backward()
    plain = row.clone().requires_grad_()
    reference.grpo_loss(plain.expand(2, 3, 33), ids, torch.tensor([1.0, -2.0])).loss.backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_dtypes_of_ids_and_masks(backend, dtype, mask_dtype):
    case = make()
    expected, expected_gradient = case.run(backend)
    case.token_ids = case.token_ids.to(dtype)
    case.mask = case.mask.to(mask_dtype) * (1 if mask_dtype == torch.bool else 3)  # non-zero is live
    out, gradient = case.run(backend)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_of_token_tensors(backend, dtype):
    case = make()
    for name in ("old_log_probs", "ref_log_probs"):
        case.options[name] = case.options[name].to(dtype)
    expected, _ = case.run(backend)
    for name in ("old_log_probs", "ref_log_probs"):
        case.options[name] = case.options[name].float()
    out, _ = case.run(backend)
    assert torch.equal(out.loss, expected.loss)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 9)])
def test_shapes_of_advantages(backend, shape):
    case = make()
    expected, expected_gradient = case.run(backend)
    case.advantages = case.advantages[:, None].expand(6, 9)[:, : shape[1]] if len(shape) > 1 else case.advantages
    out, gradient = case.run(backend)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_unused_row(backend):
    """(B, T+1, V) is (B, T, V) with one more row, whose gradient is 0."""
    case = make()
    expected, expected_gradient = case.run(backend)
    case.logits = case.logits[:, :9]
    out, gradient = case.run(backend)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient[:, :9])
    assert (expected_gradient[:, 9] == 0).all()


def test_unshifted_ids_are_noticed(backend, monkeypatch):
    """A model that knows its tokens, ids not shifted: an accepted shape with the wrong meaning."""
    ids = torch.randint(50, (3, 12))
    logits = 4 * torch.nn.functional.one_hot(ids.roll(-1, 1), 50).float() + 0.1 * torch.randn(3, 12, 50)
    mask = torch.ones(3, 12)
    with pytest.raises(ValueError, match=r"nats likelier one row earlier(.|\n)*align\(input_ids, mask\)"):
        grpo_loss(logits, ids, torch.ones(3), mask, check=True, backend=backend)
    monkeypatch.setenv("GRPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="likelier one row earlier"):
        token_log_probs(logits, ids, mask, backend=backend)
    token_ids, live = align(ids, mask)
    out = grpo_loss(logits, token_ids, torch.ones(3), live, backend=backend)
    assert out.loss.isfinite()
    grpo_loss(torch.randn(3, 12, 50), ids, torch.ones(3), mask, backend=backend)  # an untrained model is no evidence
    monkeypatch.setenv("GRPO_KERNELS_CHECK", "0")
    grpo_loss(logits, ids, torch.ones(3), mask, backend=backend)


def knowing(ids, vocab: int = 50, spread: float = 0.1) -> torch.Tensor:
    """(B, L, V) logits of a model that knows the next of these tokens."""
    return 4 * torch.nn.functional.one_hot(ids.roll(-1, 1), vocab).float() + spread * torch.randn(*ids.shape, vocab)


def score(logits, ids, mask=None, **options) -> None:
    """Through each function that looks for a shift."""
    A = torch.ones(len(ids))
    grpo_loss(logits, ids, A, mask, check=True, **options)
    token_log_probs(logits, ids, mask, check=True, **options)
    head = torch.eye(logits.shape[-1])
    linear_grpo_loss(logits, head, ids, A, mask, check=True, **options)
    linear_token_log_probs(logits, head, ids, mask, check=True, **options)


CUTS = {
    "not shifted": lambda ids, logits: (ids, logits),
    "cut at the wrong end": lambda ids, logits: (ids[:, :-1], logits),
    "both cut": lambda ids, logits: (ids[:, :-1], logits[:, :-1]),
    "logits cut at the wrong end": lambda ids, logits: (ids[:, 1:], logits[:, 1:]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_shift_to_earlier_is_noticed(backend, cut):
    input_ids = torch.randint(50, (3, 12))
    ids, logits = CUTS[cut](input_ids, knowing(input_ids))
    mask = torch.ones(ids.shape)
    head = torch.eye(50)
    for call in (
        lambda: grpo_loss(logits, ids, torch.ones(3), mask, check=True, backend=backend),
        lambda: token_log_probs(logits, ids, mask, check=True, backend=backend),
        lambda: linear_grpo_loss(logits, head, ids, torch.ones(3), mask, check=True, backend=backend),
        lambda: linear_token_log_probs(logits, head, ids, mask, check=True, backend=backend),
    ):
        with pytest.raises(ValueError, match=r"likelier one row earlier(.|\n)*ids\[:, 1:\], not ids\[:, :-1\]"):
            call()


def drawn(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).sample()


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["random", "on-policy", "half", "repeated", "two tokens"])
def test_no_shift_where_there_is_none(kind, spread):
    """Policies that know nothing, or too much; text that repeats itself; both shapes of logits."""
    for length in (4, 12, 60):
        logits = spread * torch.randn(3, length + 1, 50)
        ids = {
            "random": torch.randint(50, (3, length)),
            "on-policy": drawn(logits[:, :-1]),
            "half": torch.where(torch.rand(3, length) < 0.5, drawn(logits[:, :-1]), torch.randint(50, (3, length))),
            "repeated": torch.full((3, length), 7),
            "two tokens": torch.tensor([7, 8]).repeat(length)[:length].expand(3, length),
        }[kind]
        score(logits, ids)
        score(logits[:, :-1], ids)


def test_no_shift_of_aligned_ids():
    """A model that knows its tokens, some of them impossible or far from what it would say; too few to tell."""
    input_ids = torch.randint(50, (3, 40))
    logits = knowing(input_ids)
    ids, mask = align(input_ids, torch.ones(3, 40))
    score(logits, ids, mask)
    for b, t in ((0, 3), (1, 7), (2, 30)):
        logits[b, t, ids[b, t]] = -1e4
    score(logits, ids, mask)
    logits[0, 5, ids[0, 5]] = float("-inf")
    score(logits, ids, mask)
    score(logits[:, :6], input_ids[:, :5], torch.ones(3, 5))  # not shifted, and 12 tokens are no evidence


PER_TOKEN = ("mask", "advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_hints_of_what_is_not_shifted(name, linear):
    """Ids shifted and another tensor not, or the other way round: the message says which of them to change."""
    logits, input_ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))

    def call(ids: torch.Tensor, length: int) -> None:
        given = {"advantages": torch.ones(2), "mask": torch.ones(ids.shape), name: torch.ones(2, length)}
        head = (logits, torch.eye(7)) if linear else (logits,)
        (linear_grpo_loss if linear else grpo_loss)(*head, ids, **given)

    hint = r"the mask is not: align" if name == "mask" else rf"{name}\[:, :-1\] of what .* {name}\[:, 1:\]"
    with pytest.raises(ValueError, match=rf"{name} of shape (.|\n)*hint: token_ids are shifted and .*{hint}"):
        call(input_ids[:, 1:], 5)
    with pytest.raises(ValueError, match=rf"{name} of shape (.|\n)*hint: token_ids are not shifted: align"):
        call(input_ids, 4)
    with pytest.raises(ValueError, match=rf"{name} of shape") as caught:
        call(input_ids, 7)
    assert "hint" not in str(caught.value)


def test_one_token(backend):
    case = make(batch=1, length=1, vocab=5, extra_row=False, empty=False)
    for config in ("grpo", "gspo", complete("dr_grpo"), complete("dapo")):
        truth = truth_of(case.logits, *case.arguments, **case.options, config=config)
        out, gradient = case.run(backend, config=config)
        assert compare(truth, out.loss, out.log_probs, out.entropy, gradient).holds


@pytest.mark.parametrize("packs", [False, True])
def test_megatrons_layouts(backend, packs):
    """(T, B, V), and packed (T, 1, V): a view is all that is needed, and gradients lie as what was given."""
    case = make(4, 9, 33, extra_row=False)
    _, expected = case.run(backend=backend, config="gspo")
    ids, advantages, mask = case.arguments
    options = {**case.options, "config": "gspo", "backend": backend}
    if packs:
        options |= {name: value.reshape(1, -1) for name, value in case.options.items()}
        options["cu_seqlens"] = torch.arange(5) * 9
        ids, mask = ids.reshape(1, -1), mask.reshape(1, -1)
        leaf, expected = case.logits.reshape(-1, 1, 33).clone(), expected.reshape(-1, 1, 33)
    else:
        leaf, expected = case.logits.transpose(0, 1).contiguous(), expected.transpose(0, 1)
    leaf.requires_grad_()
    grpo_loss(leaf.transpose(0, 1), ids, advantages, mask, **options).loss.backward()
    assert torch.equal(leaf.grad, expected)

    hidden, weight = torch.randn(*leaf.shape[:2], 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    arguments = (weight, ids, advantages, mask)
    linear_grpo_loss(hidden.transpose(0, 1), *arguments, **options).loss.backward()
    of_view, hidden.grad = hidden.grad, None
    linear_grpo_loss(hidden.transpose(0, 1).contiguous(), *arguments, **options).loss.backward()
    assert torch.equal(of_view, hidden.grad)


def test_megatrons_layouts_are_hinted_at():
    for shape, ids, view in (
        ((9, 4, 5), (4, 9), "transpose(0, 1)"),
        ((9, 1, 5), (1, 9), "transpose(0, 1)"),
        ((9, 1, 5), (9,), "squeeze(1)"),
    ):
        with pytest.raises(ValueError, match="token_ids of shape") as raised:
            grpo_loss(torch.zeros(shape), torch.zeros(ids, dtype=torch.int64), torch.ones(4))
        assert f"Megatron has logits (T, B, ...), packed ones (T, 1, ...): logits.{view} is a view" in str(raised.value)


def columns(rows: int, runs: list[float], dead: float, generator: torch.Generator):
    """Logits (rows, 1, V) with ids, advantages and mask (rows, 1)."""
    advantages = torch.tensor(runs).repeat_interleave(-(-rows // len(runs)))[:rows, None]
    mask = torch.rand(rows, 1, generator=generator) >= dead
    return torch.zeros(rows, 1, 5), torch.zeros(rows, 1, dtype=torch.int64), advantages, mask


def test_a_packed_batch_that_is_read_as_sequences_of_one_token():
    generator = torch.Generator().manual_seed(0)
    packed = columns(256, [1.0, -0.5, 0.25, 0.0], 0.3, generator)
    with pytest.raises(
        ValueError, match=r"256 sequences of one token, \d+ of them live, with 4 runs of advantages"
    ) as raised:
        grpo_loss(*packed, check=True)
    assert "logits.transpose(0, 1), and ids, mask and advantages (1, T)" in str(raised.value)
    grpo_loss(*packed)  # it is what shapes say
    for seed in range(200):  # answers of one token, groups of 8 with rewards of 0 and 1
        generator.manual_seed(seed)
        share = torch.rand(32, 1, generator=generator)
        rewards = (torch.rand(32, 8, generator=generator) < share).double()
        normed = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        logits, ids, _, mask = columns(256, [0.0], 0.0 if seed % 2 else 0.04, generator)
        grpo_loss(logits, ids, normed, mask, check=True)
    grpo_loss(*columns(256, [0.0], 0.3, generator), check=True)
