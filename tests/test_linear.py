"""From hidden states: the same loss and gradients as from the logits, in chunks, for the live rows alone."""

from __future__ import annotations

import math

import pytest
import torch
from cases import one_of_each
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import (
    KL,
    LinearGRPOLoss,
    LossConfig,
    Unclipped,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    token_log_probs,
)
from grpo_kernels.calls import chunks, head
from grpo_kernels.verification import reference

LEVELS = ("token", "sequence", "sequence_token", "sequence_product")
MANY = 1 << 20
ranks = pytest.mark.parametrize("rank", [0, 3])
"""Of an adapter on the head; 0: none."""


class Problem:
    """Hidden states, head, its adapter and tokens; old and reference log-probs near the policy's."""

    def __init__(
        self, batch=4, length=7, hidden=16, vocab=97, dtype=torch.float32, extra_row=True, bias=True, seed=0, rank=0
    ):
        torch.manual_seed(seed)
        self.hidden = torch.randn(batch, length + extra_row, hidden).to(dtype).requires_grad_()
        self.weight = (0.5 * torch.randn(vocab, hidden)).to(dtype).requires_grad_()
        self.bias = torch.randn(vocab).to(dtype).requires_grad_() if bias else None
        self.adapter = None
        if rank:
            states, low = torch.randn(batch, length + extra_row, rank), 0.5 * torch.randn(vocab, rank)
            self.adapter = (states.to(dtype).requires_grad_(), low.to(dtype).requires_grad_())
        self.ids = torch.randint(vocab, (batch, length))
        self.mask = torch.rand(batch, length) < 0.7
        if batch > 1:
            self.mask[1] = False
        self.advantages = torch.randn(batch)
        with torch.no_grad():
            log_probs = reference_log_probs(self)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        near = (log_probs + 0.3 * torch.randn(batch, length) for _ in range(3))
        names = ("old_log_probs", "ref_log_probs", "rollout_log_probs")
        self.options = dict(zip(names, (x.to(real) for x in near), strict=True))

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for leaf in (self.hidden, self.weight, self.bias, *(self.adapter or ())) if leaf is not None)

    @property
    def states(self) -> list[torch.Tensor]:
        return [self.hidden, *(self.adapter or ())[:1]]

    def logits(self, leaves) -> torch.Tensor:
        """The whole of them, of tensors in the place of the leaves."""
        if self.adapter is None:
            return torch.nn.functional.linear(*leaves)
        *head, states, low = leaves
        logits = torch.nn.functional.linear(*head)
        return (logits + states @ low.T).to(logits.dtype)

    def cast(self, dtype) -> None:
        """Bring the head to another dtype; the adapter keeps its own, and what that dtype holds of its values."""
        for name in ("hidden", "weight", "bias"):
            setattr(self, name, getattr(self, name).detach().to(dtype).requires_grad_())
        self.adapter = tuple(part.detach().to(dtype).to(part.dtype).requires_grad_() for part in self.adapter or ())
        self.adapter = self.adapter or None

    def run(self, scale=1.0, **options):
        """The loss, and the gradients of ``scale * loss``."""
        options = {**self.options, **options}
        options |= {"bias": self.bias, "adapter": self.adapter}
        out = linear_grpo_loss(self.hidden, self.weight, self.ids, self.advantages, self.mask, **options)
        return out, torch.autograd.grad(out.loss * scale, self.leaves)

    def expected(self, dtype=None, **options):
        """By autograd through the whole logits, computed in ``dtype``."""
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in self.leaves]
        logits = self.logits(leaves)
        if dtype is not torch.float64:
            logits = logits.float()
        options = {**self.options, **options}
        out = reference.grpo_loss(logits, self.ids, self.advantages, self.mask, **options)
        return out, torch.autograd.grad(out.loss, leaves)


def reference_log_probs(problem: Problem) -> torch.Tensor:
    logits = problem.logits([leaf.double() for leaf in problem.leaves])[:, : problem.ids.shape[1]]
    return torch.log_softmax(logits, -1).gather(-1, problem.ids[..., None]).squeeze(-1)


def room(problem: Problem, rows: int) -> int:
    """chunk_bytes of ``rows`` rows."""
    (vocab, width), dtype = problem.weight.shape, problem.weight.dtype
    width += problem.adapter[0].shape[-1] if problem.adapter else 0
    fixed, per_row = head.head_kind(problem.weight.device.type, dtype, dtype).bytes(width, vocab, dtype, dtype)
    return fixed + rows * per_row


def routes() -> list:
    """Every objective in one chunk and in several; where ratios are pooled, of whole sequences and of cut ones. Every
    level with an adapter."""
    found = [(config, rows, 0) for config in one_of_each() for rows in (MANY, 5)]
    pooled = [c for c in one_of_each() if c.level != "token" or any(scheme.pooled for scheme in c.schemes)]
    adapted = [LossConfig(level=level, kl=KL(0.1), entropy_coef=0.01) for level in LEVELS]
    adapted = [(config, rows, 3) for config in adapted for rows in (MANY, 7, 5)]
    return found + [(config, 7, 0) for config in pooled] + adapted


@pytest.mark.parametrize(("config", "rows", "rank"), routes(), ids=str)
def test_is_the_loss_of_the_logits(backend, config, rows, rank):
    """In fp64."""
    problem = Problem(dtype=torch.float64, rank=rank)
    out, gradients = problem.run(config=config, backend=backend, chunk_bytes=room(problem, rows))
    expected, wanted = problem.expected(torch.float64, config=config)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-10, atol=1e-12)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    for name, value in out.metrics.as_dict().items():
        torch.testing.assert_close(value, expected.metrics.as_dict()[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [MANY, 128])
@pytest.mark.sample(triton=1)
def test_errs_no_more_than_a_materialised_head(backend, dtype, level, on_policy, rows):
    """Gradients through GEMMs: at most twice the error of eager PyTorch that upcasts its logits to fp32."""
    problem = Problem(8, 40, 64, 1500, dtype, seed=1)
    options = {"config": LossConfig(level=level, kl=KL(0.1), entropy_coef=0.01)}
    if on_policy:
        options["old_log_probs"] = None
    assert_errors(problem, backend, rows, options)


def assert_errors(problem, backend, rows, options):
    """At most twice those of eager PyTorch, in gradients of the leaves' dtypes; the loss is the same."""
    out, gradients = problem.run(backend=backend, chunk_bytes=room(problem, rows), **options)
    _, exact = problem.expected(torch.float64, **options)
    baseline, theirs = problem.expected(**options)
    for mine, eager, truth, leaf in zip(gradients, theirs, exact, problem.leaves, strict=True):
        assert mine.dtype == leaf.dtype
        error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (mine, eager))
        assert error <= 2 * allowed + 1e-6, (error, allowed)
    slack = 1e-5 if problem.hidden.dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.loss, baseline.loss, rtol=slack, atol=slack)


@pytest.mark.sample(triton=1)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [MANY, 128])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_errs_no_more_than_a_materialised_one(backend, dtype, adapter_dtype, rows, level):
    """In the head's dtype, and in another as PEFT keeps it; nothing is clipped, or rounding chooses which token is."""
    problem = Problem(8, 40, 64, 1500, adapter_dtype or dtype, seed=1, rank=8)
    problem.cast(dtype)
    config = LossConfig(Unclipped(), level=level, kl=KL(0.1), entropy_coef=0.01)
    assert_errors(problem, backend, rows, {"config": config})
    if adapter_dtype not in (None, dtype):  # summed in fp32, and not rounded to the head's dtype
        _, gradients = problem.run(backend=backend, chunk_bytes=room(problem, rows), config=config)
        assert torch.equal(gradients[-1].to(dtype).to(adapter_dtype), gradients[-1]) == (dtype == torch.float32)


@ranks
def test_a_budget_counts_every_column_of_a_row(rank):
    problem = Problem(rank=rank)
    least = room(problem, 1)
    problem.run(chunk_bytes=least)
    with pytest.raises(ValueError, match=f"chunk_bytes >= {least}, the room of one row"):
        problem.run(chunk_bytes=least - 1)


@pytest.mark.sample(triton=1)
@ranks
@pytest.mark.parametrize("rows", [MANY, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unrounded_logits(backend, dtype, rows, rank):
    """logits_dtype=torch.float32: log-probs and gradients of the half-precision operands, computed exactly."""
    problem = Problem(8, 40, 64, 1500, dtype, seed=1, rank=rank)
    options = {"backend": backend, "chunk_bytes": 3 * room(problem, rows)}
    out, gradients = problem.run(logits_dtype=torch.float32, **options)
    rounded, _ = problem.run(**options)
    exact, wanted = problem.expected(torch.float64)
    error, before = ((x.log_probs.double() - exact.log_probs).abs().max() for x in (out, rounded))
    assert error < 1e-5 < 1e-3 < before
    assert (linear_token_log_probs(
        problem.hidden, problem.weight, problem.ids, problem.mask, bias=problem.bias, adapter=problem.adapter,
        logits_dtype=torch.float32, **options,
    ).log_probs == out.log_probs).all()  # fmt: skip
    unit = torch.finfo(dtype).eps
    for mine, truth, leaf in zip(gradients, wanted, problem.leaves, strict=True):
        assert mine.dtype == leaf.dtype
        # One rounding where GEMMs are fp32; on a GPU the logits' gradient is rounded for its GEMMs as well.
        assert (mine.double() - truth).norm() <= unit * truth.norm()


@ranks
@pytest.mark.sample(triton=1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_old_pass_has_the_same_bits(backend, dtype, rank):
    """Of the same tokens: the first step's ratio is exactly 1; a second call gives the same bits again."""
    problem = Problem(6, 50, 32, 700, dtype, seed=2, rank=rank)
    budget = {"chunk_bytes": room(problem, 128), "backend": backend}
    head = {"bias": problem.bias, "adapter": problem.adapter}
    with torch.no_grad():
        old = linear_token_log_probs(
            problem.hidden, problem.weight, problem.ids, problem.mask, **head, **budget
        ).log_probs
    first, gradients = problem.run(old_log_probs=old, **budget)
    second, again = problem.run(old_log_probs=old, **budget)
    assert torch.equal(first.log_probs, old)
    assert first.metrics.ratio_min == first.metrics.ratio_max == 1
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.sample(triton=1, cuda=1)
@ranks
@pytest.mark.parametrize("rows", [5, MANY])
def test_log_probs_are_differentiable_in_both_outputs(backend, rows, rank):
    problem = Problem(3, 4, 5, 11, torch.float64, rank=rank)
    budget = {"chunk_bytes": room(problem, rows), "backend": backend}

    def outputs(hidden, weight, bias, *adapter):
        options = {"bias": bias, "adapter": adapter or None, **budget}
        out = linear_token_log_probs(hidden, weight, problem.ids, problem.mask, **options)
        return out.log_probs, out.entropy

    assert torch.autograd.gradcheck(outputs, problem.leaves)
    out = outputs(*problem.leaves)
    logits = problem.logits(problem.leaves)
    expected = token_log_probs(logits, problem.ids, problem.mask, backend=backend)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    only_entropy = torch.autograd.grad(out[1].sum(), problem.weight)[0]
    wanted = torch.autograd.grad(expected.entropy.sum(), problem.weight)[0]
    torch.testing.assert_close(only_entropy, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("level", "rows", "gemms"),
    [("token", MANY, 3), ("token", 5, 3), ("sequence", MANY, 3), ("sequence", 7, 3), ("sequence", 5, 4)],
)
@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
def test_flops(level, rows, gemms, frozen):
    """6·n·H·V for n live tokens; a frozen tensor saves its GEMM; pooled ratios recompute where a sequence is cut."""
    problem = Problem()
    assert problem.mask.sum(-1).max() == 6 < problem.mask.sum()
    for name in ("weight", "bias"):
        getattr(problem, name).requires_grad_(frozen != "weight")
    problem.hidden.requires_grad_(frozen != "hidden")
    options = {**problem.options, "config": LossConfig(level=level)}
    arguments = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    with FlopCounterMode(display=False) as counter:
        out = linear_grpo_loss(*arguments, bias=problem.bias, chunk_bytes=room(problem, rows), **options)
        out.loss.backward()
    vocab, hidden = problem.weight.shape
    assert counter.get_total_flops() == 2 * int(problem.mask.sum()) * hidden * vocab * (gemms - (frozen != "nothing"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_grpo_loss(*arguments, bias=problem.bias, **options).loss.requires_grad
    assert counter.get_total_flops() == 2 * int(problem.mask.sum()) * hidden * vocab


LEAVES = ("hidden", "weight", "bias", "adapter's states", "adapter's weight")
FROZEN = [(), LEAVES[1:3], LEAVES[:3], LEAVES[:4], LEAVES[3:4], LEAVES[4:], LEAVES[3:], LEAVES]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, MANY), (torch.float32, 5), (torch.float16, 5)], ids=str)
def test_what_is_frozen_beside_an_adapter(dtype, rows, frozen):
    """Gradients of the rest keep their bits, and no GEMM is left but those of the rest."""
    problem = Problem(dtype=dtype, rank=3)
    out, wanted = problem.run(chunk_bytes=room(problem, rows))
    for name, leaf in zip(LEAVES, problem.leaves, strict=True):
        leaf.requires_grad_(name not in frozen)
    options = {**problem.options, "bias": problem.bias, "adapter": problem.adapter, "chunk_bytes": room(problem, rows)}
    arguments = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    with FlopCounterMode(display=False) as counter:
        again = linear_grpo_loss(*arguments, **options)
    (vocab, width), rank = problem.weight.shape, 3
    free = [width + rank] + [rank if "adapter" in name else width for name in LEAVES if name not in (*frozen, "bias")]
    assert counter.get_total_flops() == 2 * int(problem.mask.sum()) * vocab * sum(free)
    assert torch.equal(again.loss, out.loss)
    assert again.loss.requires_grad == (len(frozen) < len(LEAVES))
    if again.loss.requires_grad:
        again.loss.backward()
    for name, leaf, gradient in zip(LEAVES, problem.leaves, wanted, strict=True):
        assert (leaf.grad is None) == (name in frozen)
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("rows", [MANY, 5])
@pytest.mark.parametrize("frozen", ["nothing", "A", "weight and hidden"])
def test_lora_with_dropout(rows, frozen):
    """adapter=(scaling * dropout(hidden) @ A.T, B): gradients reach A, and hidden by both ways."""
    problem = Problem(dtype=torch.float64, rank=3)
    low, kept = torch.randn(3, 16, dtype=torch.float64, requires_grad=True), torch.rand(4, 8, 16) < 0.8
    leaves = {"hidden": problem.hidden, "weight": problem.weight, "A": low, "B": problem.adapter[1]}
    free = [leaf for name, leaf in leaves.items() if name not in frozen]
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    states = 2.0 * (problem.hidden * kept / 0.8) @ low.T
    arguments, options = (problem.ids, problem.advantages, problem.mask), problem.options
    mine = linear_grpo_loss(
        problem.hidden, problem.weight, *arguments, adapter=(states, problem.adapter[1]),
        chunk_bytes=room(problem, rows), **options,
    )  # fmt: skip
    logits = problem.hidden @ problem.weight.T + states @ problem.adapter[1].T
    expected = reference.grpo_loss(logits, *arguments, **options)
    wanted = torch.autograd.grad(expected.loss, free, retain_graph=True)
    torch.testing.assert_close(mine.loss, expected.loss, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(mine.loss, free), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [MANY, 5])
def test_losses_of_tokens_with_an_adapter(backend, level, rows):
    problem = Problem(dtype=torch.float64, rank=3)
    options = {"config": LossConfig(level=level, kl=KL(0.1)), "backend": backend, **problem.options}
    arguments = (problem.ids, problem.advantages, problem.mask)
    head = {"bias": problem.bias, "adapter": problem.adapter, "chunk_bytes": room(problem, rows)}
    mine = linear_grpo_loss(problem.hidden, problem.weight, *arguments, token_losses=True, **head, **options)
    expected = grpo_loss(problem.logits(problem.leaves), *arguments, token_losses=True, **options)
    torch.testing.assert_close(mine.token_losses, expected.token_losses, rtol=1e-10, atol=1e-12)
    weights = torch.randn(problem.ids.shape, dtype=torch.float64)
    gradients, wanted = (
        torch.autograd.grad((out.token_losses * weights).sum(), problem.leaves) for out in (mine, expected)
    )
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@ranks
@pytest.mark.parametrize("rows", [MANY, 5])
def test_masked_rows_are_not_looked_at(backend, rows, rank):
    problem = Problem(rank=rank)
    kept, wanted = problem.run(backend=backend, chunk_bytes=room(problem, rows))
    with torch.no_grad():
        for states in problem.states:
            states[:, :-1][~problem.mask] = math.nan
            states[:, -1] = math.nan
        problem.ids[~problem.mask] = -100
    out, gradients = problem.run(backend=backend, chunk_bytes=room(problem, rows))
    assert torch.equal(out.loss, kept.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    for gradient in gradients[:: 3 if rank else len(gradients)]:  # of hidden states, of the adapter's
        assert (gradient[:, :-1][~problem.mask] == 0).all()
        assert (gradient[:, -1] == 0).all()


@ranks
def test_rows_without_advantage_cost_nothing(rank):
    problem = Problem(rank=rank)
    problem.advantages[0] = 0
    options = {"old_log_probs": problem.options["old_log_probs"], "bias": problem.bias, "adapter": problem.adapter}
    arguments = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    with FlopCounterMode(display=False) as counter:
        out = linear_grpo_loss(*arguments, skip_zero_advantage=True, **options)
        skipped = torch.autograd.grad(out.loss, problem.leaves)
    live = problem.mask & (problem.advantages != 0)[:, None]
    vocab, hidden = problem.weight.shape
    assert counter.get_total_flops() == 6 * int(live.sum()) * (hidden + rank) * vocab
    assert out.metrics.skipped_tokens == problem.mask[0].sum()
    every = torch.autograd.grad(linear_grpo_loss(*arguments, **options).loss, problem.leaves)
    for a, b in zip(skipped, every, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@ranks
@pytest.mark.parametrize("extra", [0, 1, 20])
def test_a_known_number_of_live_tokens(backend, extra, rank):
    problem = Problem(rank=rank)
    expected, wanted = problem.run(backend=backend)
    out, gradients = problem.run(backend=backend, live_tokens=int(problem.mask.sum()) + extra)
    torch.testing.assert_close(out.loss, expected.loss)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("live", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("extra_row", [True, False])
@pytest.mark.parametrize(("level", "rank"), [("token", 0), ("sequence", 0), ("token", 3)])
def test_padding_of_chunks(backend, monkeypatch, level, rank, extra_row, live):
    """Live rows padded to the 128 of the hidden states; the first row masked and NaN: padding must not bring it in."""
    problem = Problem(2, 64 - extra_row, extra_row=extra_row, seed=5, rank=rank)
    problem.mask = torch.rand(problem.ids.shape) < live
    problem.mask[0, 0] = False
    with torch.no_grad():
        for states in problem.states:
            states[0, 0] = math.nan
    options = {"config": LossConfig(level=level), "backend": backend}
    expected, wanted = problem.run(**options)
    monkeypatch.setattr(chunks, "pads", lambda device: True)
    out, gradients = problem.run(**options)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.log_probs, expected.log_probs)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.sample(triton=1)
@pytest.mark.parametrize(("batch", "rows"), [(2, 64), (4, 32), (8, 128), (1, 128)])
def test_padding_of_a_batch_that_is_live_as_a_whole(backend, monkeypatch, batch, rows):
    """As many rows with padding as with the unused last row of each sequence: one must not be taken for the other."""
    problem = Problem(batch, rows - 1, 4, vocab=13)
    problem.mask = torch.ones_like(problem.mask)
    with torch.no_grad():
        problem.hidden[:, -1] = math.nan
    expected, wanted = problem.run(backend=backend)
    monkeypatch.setattr(chunks, "pads", lambda device: True)
    out, gradients = problem.run(backend=backend)
    torch.testing.assert_close(out.log_probs, expected.log_probs)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["ratio", "advantages", "kl"])
def test_fp16_outliers(case):
    """What eager PyTorch keeps finite stays finite: a ratio of a hundred thousand, large advantages, a KL alone."""
    problem = Problem(4, 64, dtype=torch.float16, seed=4)
    problem.mask = torch.ones_like(problem.mask)
    problem.advantages = -torch.ones(4)
    options = {"old_log_probs": reference_log_probs(problem).detach().float(), "ref_log_probs": None}
    if case == "ratio":
        options["old_log_probs"][0, 0] -= 11.5
    if case == "advantages":
        problem.advantages *= 4e4
    if case == "kl":
        options["ref_log_probs"] = options["old_log_probs"] + 3.5
        options |= {"token_weights": torch.zeros(4, 64), "config": LossConfig(kl=KL(0.04))}
    _, gradients = problem.run(**options)
    _, exact = problem.expected(torch.float64, **options)
    for mine, truth in zip(gradients, exact, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), truth, rtol=1e-2, atol=1e-2 * float(truth.abs().max()))


def test_bad_ids_are_named_where_they_are():
    problem = Problem()
    position = tuple(problem.mask.nonzero()[-1].tolist())
    problem.ids[position] = 97
    with pytest.raises(IndexError, match=rf"token_ids\[{position[0]}, {position[1]}\] = 97"):
        problem.run(chunk_bytes=room(problem, 3))


def test_unshifted_ids_are_noticed():
    """As many ids as rows, each the likeliest of the row before: with checks on they raise."""
    problem = Problem(2, 12, extra_row=False, bias=False)
    logits = problem.hidden.detach() @ problem.weight.detach().T
    problem.ids[:, 1:] = logits.argmax(-1)[:, :-1]
    problem.mask[:] = True
    options = {"old_log_probs": None, "ref_log_probs": None}
    problem.run(**options)
    with pytest.raises(ValueError, match="row t of the hidden predicts"):
        problem.run(check=True, **options)
    states, weight = problem.hidden, problem.weight
    problem.hidden, problem.weight = (torch.zeros_like(leaf).requires_grad_() for leaf in (states, weight))
    problem.run(check=True, **options)
    problem.adapter = (states, weight)
    with pytest.raises(ValueError, match="row t of the hidden predicts"):
        problem.run(check=True, **options)


@pytest.mark.parametrize(
    ("config", "size"), [("grpo", 1), ("grpo", 2000), (LossConfig(aggregation="sequence_sum"), 1)], ids=str
)
def test_fp16_gradients_of_frequent_tokens(config, size):
    """The sum over thousands of tokens of one id: in range, though each was scaled on the way, and the sum of scaled
    ones beyond fp16 where hidden states are large."""
    torch.manual_seed(0)
    hidden = (size * (1 + 0.1 * torch.randn(2, 2048, 8))).half().requires_grad_()
    weight = (0.1 / size * torch.randn(50, 8)).half().requires_grad_()
    ids = torch.zeros(2, 2048, dtype=torch.int64)
    advantages = torch.tensor([10.0, 12.0])
    rest = {"config": config}
    adapted = linear_grpo_loss(hidden * 0, weight.detach(), ids, advantages, adapter=(hidden, weight), **rest)
    (of_adapter,) = torch.autograd.grad(adapted.loss, weight)
    (gradient,) = torch.autograd.grad(linear_grpo_loss(hidden, weight, ids, advantages, **rest).loss, weight)
    assert torch.equal(of_adapter, gradient)
    wide = weight.detach().double().requires_grad_()
    loss = reference.grpo_loss(hidden.detach().double() @ wide.T, ids, advantages, config=config).loss
    (exact,) = torch.autograd.grad(loss, wide)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), exact, rtol=5e-3, atol=5e-3 * float(exact.abs().max()))


def test_fp16_slopes_of_a_low_temperature():
    """A slope is the ratio over the temperature: the scale that keeps fp16 from overflowing on the way knows both."""
    hidden, weight, ids = torch.randn(1, 4, 8) / 50, torch.randn(11, 8), torch.randint(11, (1, 4))
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    options = {"config": LossConfig(Unclipped(), aggregation="token_mean"), "temperature": 0.01}
    with torch.autocast("cpu", torch.float16):
        old = linear_token_log_probs(*leaves, ids, temperature=0.01).log_probs.detach() - 12
        out = linear_grpo_loss(*leaves, ids, torch.ones(1), old_log_probs=old, **options)
    out.loss.backward()
    exact = [hidden.half().double().requires_grad_(), weight.half().double().requires_grad_()]
    z = exact[0] @ exact[1].T
    z = z + (z.half().double() - z).detach()  # rounded as the head's
    ell = (z / 0.01).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    (-(ell - old.double()).exp().mean()).backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        torch.testing.assert_close(
            leaf.grad.double(), wanted.grad, rtol=0.01, atol=0.01 * float(wanted.grad.abs().max())
        )


@ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_upstream_factors(backend, dtype, rank):
    """Announced or not, the gradient is that of the scaled loss; fp16 gradients do not underflow on the way."""
    problem = Problem(dtype=dtype, seed=3, rank=rank)
    _, whole = problem.run(backend=backend)
    for scale in (1.0, 0.25, 1024.0):
        for announced in (None, scale):
            _, gradients = problem.run(scale, backend=backend, grad_scale=announced)
            for a, b in zip(gradients, whole, strict=True):
                slack = 1e-6 if dtype == torch.float32 else 4e-3
                torch.testing.assert_close(a / scale, b, rtol=slack, atol=slack * float(b.abs().max()))


@ranks
@pytest.mark.parametrize("config", ["dapo", "gspo"])
@pytest.mark.parametrize("rows", [MANY, 7])
def test_packed_and_strided(backend, config, rows, rank):
    problem = Problem(3, 6, extra_row=False, dtype=torch.float64, rank=rank)
    expected, wanted = problem.run(backend=backend, config=config)
    bounds = torch.tensor([0, 6, 12, 18])
    flat = {name: value.flatten() for name, value in problem.options.items()}
    hidden, *low = (states.detach().flatten(0, 1).requires_grad_() for states in problem.states)
    arguments = (problem.ids.flatten(), problem.advantages, problem.mask.flatten())
    adapter = (*low, problem.adapter[1]) if rank else None
    packed = {
        "cu_seqlens": bounds,
        "config": config,
        "chunk_bytes": room(problem, rows),
        "backend": backend,
        "bias": problem.bias,
        "adapter": adapter,
        **flat,
    }
    out = linear_grpo_loss(hidden, problem.weight, *arguments, **packed)
    torch.testing.assert_close(out.loss, expected.loss)
    of_states = wanted[:: 3 if rank else len(wanted)]
    for gradient, other in zip(torch.autograd.grad(out.loss, (hidden, *low)), of_states, strict=True):
        torch.testing.assert_close(gradient, other.flatten(0, 1))
    in_a_row = ([x[None] for x in (hidden, *low)], (arguments[0][None], arguments[1], arguments[2][None]))
    (hidden, *low), arguments = in_a_row
    packed |= {name: value[None] for name, value in flat.items()}
    packed["adapter"] = (*low, problem.adapter[1]) if rank else None
    assert torch.equal(linear_grpo_loss(hidden, problem.weight, *arguments, **packed).loss, out.loss)
    strided = []
    for states in problem.states:
        wide = torch.randn(3, 6, 2 * states.shape[-1], dtype=torch.float64)
        wide[..., ::2] = states.detach()
        strided.append(wide[..., ::2].requires_grad_())
    out = linear_grpo_loss(
        strided[0], problem.weight, problem.ids, problem.advantages, problem.mask, bias=problem.bias,
        adapter=(strided[1], problem.adapter[1]) if rank else None,
        config=config, backend=backend, **problem.options,
    )  # fmt: skip
    for gradient, other in zip(torch.autograd.grad(out.loss, strided), of_states, strict=True):
        torch.testing.assert_close(gradient, other)


@ranks
def test_logit_transforms(backend, rank):
    problem = Problem(dtype=torch.float64, rank=rank)
    options = {"temperature": 0.7, "logit_scale": 0.5, "logit_softcap": 3.0}
    out, gradients = problem.run(backend=backend, **options)
    expected, wanted = problem.expected(torch.float64, **options)
    torch.testing.assert_close(out.loss, expected.loss)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@ranks
def test_autocast_computes_as_a_linear_layer_would(rank):
    problem = Problem(8, 40, 64, 1500, rank=rank)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = problem.run()
    problem.cast(torch.bfloat16)
    expected, wanted = problem.run()
    torch.testing.assert_close(out.loss, expected.loss)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=0.01, atol=1e-4)


def test_tied_weights():
    """The embedding's gradient and the head's meet in one leaf."""
    problem = Problem(bias=False)
    ids = torch.randint(97, problem.hidden.shape[:2])

    def gradient(loss):
        embedded = torch.nn.functional.embedding(ids, problem.weight)
        return torch.autograd.grad(loss(torch.tanh(embedded)), problem.weight)[0]

    rest = (problem.ids, problem.advantages, problem.mask)
    mine = gradient(lambda hidden: linear_grpo_loss(hidden, problem.weight, *rest, **problem.options).loss)
    eager = gradient(lambda hidden: reference.grpo_loss(hidden @ problem.weight.T, *rest, **problem.options).loss)
    torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_live(backend, dtype, level, rank):
    problem = Problem(dtype=dtype, rank=rank)
    problem.mask[:] = False
    out, gradients = problem.run(backend=backend, config=LossConfig(level=level))
    assert out.loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_module_and_compile():
    problem = Problem(bias=False)
    arguments = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    expected = linear_grpo_loss(*arguments, config="dapo", temperature=0.7)
    module = LinearGRPOLoss("dapo", temperature=0.7)
    assert torch.equal(module(*arguments).loss, expected.loss)
    assert "Clip" in repr(module)
    assert torch.equal(
        module(*arguments, config="cispo").loss, linear_grpo_loss(*arguments, config="cispo", temperature=0.7).loss
    )
    with pytest.raises(ValueError, match="chunk_bytes"):
        LinearGRPOLoss(chunk_byte=3)
    problem = Problem(bias=False, rank=3)
    arguments = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    expected = linear_grpo_loss(*arguments, adapter=problem.adapter, config="dapo", temperature=0.7)
    assert torch.equal(module(*arguments, adapter=problem.adapter).loss, expected.loss)
    assert not torch.equal(module(*arguments).log_probs, expected.log_probs)

    @torch.compile
    def step(hidden):
        return linear_grpo_loss(torch.tanh(hidden), *arguments[1:]).loss * 2

    torch.testing.assert_close(
        step(problem.hidden), linear_grpo_loss(torch.tanh(problem.hidden), *arguments[1:]).loss * 2
    )


def test_second_backward_and_derivative():
    problem = Problem()
    arguments = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    out = linear_grpo_loss(*arguments)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_grpo_loss: a second backward.*linear_token_log_probs"):
        out.loss.backward()
    (gradient,) = torch.autograd.grad(linear_grpo_loss(*arguments).loss, problem.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        gradient.sum().backward()


BAD = {
    "hidden and weight": (lambda p: {"weight": p.weight[:, :5]}, ValueError, r"weight \(V, 16\)"),
    "weight turned": (lambda p: {"weight": p.weight.T}, ValueError, "weight.T"),
    "ids": (lambda p: {"token_ids": p.ids[:, :2]}, ValueError, "token_ids of shape"),
    "bias": (lambda p: {"bias": p.bias[:3]}, ValueError, r"bias \(97,\)"),
    "integer weight": (lambda p: {"weight": p.weight.detach().to(torch.int8)}, TypeError, "dequantised"),
    "dtypes": (lambda p: {"weight": p.weight.detach().bfloat16()}, ValueError, "one dtype"),
    "module": (lambda p: {"weight": torch.nn.Linear(16, 97)}, TypeError, "lm_head.weight"),
    "budget": (lambda p: {"chunk_bytes": 100}, ValueError, "chunk_bytes >= "),
    "live_tokens": (lambda p: {"live_tokens": 2}, ValueError, "live_tokens >= "),
    "live_tokens type": (lambda p: {"live_tokens": 2.0}, TypeError, "an int"),
    "temperature": (
        lambda p: {"temperature": torch.ones((), requires_grad=True)},
        ValueError,
        r"temperature.detach\(\)",
    ),
}


STATES, LOW = torch.randn(4, 8, 3), torch.randn(97, 3)
BAD |= {
    f"adapter, {name}": (lambda p, adapter=adapter: {"adapter": adapter}, error, message)
    for name, adapter, error, message in (
        ("one tensor", STATES, TypeError, r"two tensors \(states, weight\); got Tensor"),
        ("one in a tuple", (STATES,), TypeError, r"got \(Tensor\)"),
        ("half of it", (STATES, None), TypeError, r"got \(Tensor, NoneType\)"),
        ("three", (STATES, LOW, LOW), TypeError, r"(?s)got \(Tensor, Tensor, Tensor\).*dropout\(hidden\)"),
        ("nothing", (), TypeError, "got tuple"),
        ("rows", (STATES[:, :7], LOW), ValueError, r"adapter states \(4, 8, r\) with r >= 1.*got \(4, 7, 3\)"),
        ("packed rows", (STATES.flatten(0, 1), LOW), ValueError, r"adapter states \(4, 8, r\).*got \(32, 3\)"),
        ("no columns", (STATES[..., :0], LOW[:, :0]), ValueError, r"r >= 1.*got \(4, 8, 0\)"),
        ("a number", (torch.ones(()), LOW), ValueError, r"adapter states.*got \(\)"),
        ("vocabulary", (STATES, LOW[:50]), ValueError, r"an adapter weight \(97, 3\); got \(50, 3\)"),
        ("rank", (STATES, LOW[:, :2]), ValueError, r"an adapter weight \(97, 3\); got \(97, 2\)"),
        ("turned", (STATES, LOW.T), ValueError, r"(?s)got \(3, 97\).*weight.T"),
        ("integer states", (STATES.long(), LOW), TypeError, "adapter_states of a floating dtype; got torch.int64"),
        ("integer weight", (STATES, LOW.to(torch.int8)), TypeError, "adapter_weight of a floating dtype"),
        ("device", (STATES, LOW.to("meta")), ValueError, "adapter_weight on the device of hidden, cpu; got meta"),
    )
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    problem = Problem()
    change, error, message = BAD[name]
    arguments = {"hidden": problem.hidden, "weight": problem.weight, "token_ids": problem.ids}
    arguments |= {"advantages": problem.advantages, "mask": problem.mask, "bias": problem.bias, **problem.options}
    with pytest.raises(error, match=message):
        linear_grpo_loss(**{**arguments, **change(problem)})


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("adapter")])
def test_bad_adapters_of_log_probs(name):
    problem = Problem()
    change, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s)^linear_token_log_probs: .*{message.removeprefix('(?s)')}"):
        linear_token_log_probs(problem.hidden, problem.weight, problem.ids, **change(problem))


def test_transforms_of_an_adapter_are_refused():
    problem = Problem(rank=3)
    states, low = problem.adapter
    with pytest.raises(RuntimeError, match="linear_token_log_probs: .*torch.func"):
        torch.func.grad(
            lambda low: linear_token_log_probs(
                problem.hidden, problem.weight, problem.ids, adapter=(states, low)
            ).log_probs.sum()
        )(low)


def test_a_sharded_weight_is_refused():
    problem = Problem()

    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    with pytest.raises(ValueError, match="(?s)whole weight.*register_fsdp_forward_method"):
        linear_token_log_probs(problem.hidden, problem.weight.detach().as_subclass(Sharded), problem.ids)
    adapter = (torch.randn(4, 8, 3), torch.randn(97, 3).as_subclass(Sharded))
    with pytest.raises(ValueError, match="(?s)whole adapter_weight.*register_fsdp_forward_method"):
        linear_token_log_probs(problem.hidden, problem.weight, problem.ids, adapter=adapter)


def test_outputs_are_not_what_backward_saved():
    """Where every token is live nothing is scattered, and yet what is returned is the caller's; nor gathered, and the
    gradient of a sum, which is one number in memory, is one a token."""
    problem = Problem(bias=False, extra_row=False)
    leaves, ids, found = (problem.hidden, problem.weight), torch.randint(97, (4, 7)), []
    for write in (False, True):
        buffer, mask = ids.clone(), torch.ones(4, 7, dtype=torch.bool)
        out = linear_token_log_probs(*leaves, buffer, mask)
        total = out.log_probs.sum() + out.entropy.sum()
        if write:  # what the caller has, and what he gave: buffers of a loader
            for values in (*out, buffer, mask):
                values.detach().zero_()
        found.append(torch.autograd.grad(total, leaves))
    of_logits = token_log_probs(leaves[0] @ leaves[1].T, ids)
    wanted = torch.autograd.grad(of_logits.log_probs.sum() + of_logits.entropy.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found[0], wanted, strict=True))


@pytest.mark.parametrize("live_tokens", [None, 6])
@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_meta_tensors(config, live_tokens):
    """Shapes without numbers: nothing is counted, and no autocast is asked for a device that has none."""
    with torch.device("meta"):
        hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        ids, ones = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    rest = {"old_log_probs": ones, "config": config, "live_tokens": live_tokens}
    linear_grpo_loss(hidden, weight, ids, ones[:, 0], ones, **rest).loss.backward()
    assert hidden.grad.is_meta
    assert weight.grad.is_meta
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
    with torch.no_grad():
        assert linear_token_log_probs(hidden, weight, ids, live_tokens=live_tokens).log_probs.shape == (2, 3)
