"""The head's GEMMs: in slices and pieces on CPUs, whole where half precision has instructions; what either costs."""

from __future__ import annotations

import pytest
import torch
from test_linear import MANY, Problem, assert_errors, ranks, room
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import KL, LossConfig, Unclipped, linear_grpo_loss
from grpo_kernels.calls import head

HALVES = [torch.bfloat16, torch.float16]
SEVERAL = 4 * head.SLICE_COLUMNS
"""Columns of two slices or more."""


@pytest.mark.parametrize("rows", [MANY, 5])
@ranks
@pytest.mark.parametrize(("vocab", "hidden"), [(SEVERAL + 8, 16), (SEVERAL + 6, 10), (SEVERAL + 1, 7), (3, 5)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("slice_logits", "batched_rows"), [(1, 256), (head.SLICE_LOGITS, 256), (1, 3), (1, 0)])
def test_slices_are_the_whole(monkeypatch, vocab, hidden, rank, rows, transposed, slice_logits, batched_rows):
    """In fp64: slices and pieces of any width, the last one narrower, one chunk or sums over several, of which some
    are whole."""
    monkeypatch.setattr(head, "SLICE_LOGITS", slice_logits)
    monkeypatch.setattr(head, "BATCHED_ROWS", batched_rows)
    problem = Problem(3, 6, hidden, vocab, torch.float64, rank=rank)
    if transposed:
        problem.weight = problem.weight.detach().t().contiguous().t().requires_grad_()
    out, gradients = problem.run(chunk_bytes=room(problem, rows))
    expected, wanted = problem.expected(torch.float64)
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-10, atol=1e-12)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [MANY, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@ranks
def test_slices_err_no_more_than_a_materialised_head(dtype, rows, rank):
    problem = Problem(8, 40, 32, SEVERAL + 100, dtype, seed=1, rank=rank)
    config = LossConfig(Unclipped(), kl=KL(0.1), entropy_coef=0.01)
    assert_errors(problem, None, rows, {"config": config})


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({}, ()),
        ({"avx512_bf16": True, "amx_fp16": False}, (torch.bfloat16,)),
        ({"amx_bf16": True, "avx512_fp16": True}, (torch.bfloat16,)),
        ({"amx_bf16": True, "amx_fp16": True}, tuple(HALVES)),
        ({"sve_bf16": True}, (torch.bfloat16,)),
    ],
    ids=str,
)
def test_which_gemms_a_cpu_has(monkeypatch, capabilities, native):
    """By its features alone. fp32 is never whole, logits of another dtype than the operands neither."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    head.cpu_instructions.cache_clear()
    try:
        for dtype in (torch.float32, torch.float64, *HALVES):
            assert head.head_kind("cpu", dtype, dtype) is (head.Head if dtype in native else head.SlicedHead)
        for dtype in HALVES:
            assert head.head_kind("cpu", dtype, torch.float32) is head.SlicedHead
            assert head.head_kind("cuda", dtype, torch.float32) is head.Head
            assert head.head_kind("mps", dtype, dtype) is head.Head
    finally:
        head.cpu_instructions.cache_clear()


@pytest.mark.parametrize("rows", [MANY, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@ranks
def test_gemms_of_a_cpu_that_has_instructions(monkeypatch, dtype, rows, rank):
    """The same code there, on PyTorch's slower GEMMs here."""
    monkeypatch.setattr(head, "cpu_instructions", lambda dtype: ("amx",))
    problem = Problem(8, 40, 32, 300, dtype, seed=1, rank=rank)
    assert head.head_kind("cpu", dtype, dtype) is head.Head
    assert_errors(problem, None, rows, {"config": LossConfig(Unclipped(), kl=KL(0.1), entropy_coef=0.01)})


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator made in a dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == self.dtype:
                self.elements = max(self.elements, tensor.numel())
        return made


def test_few_rows_have_wide_slices(monkeypatch):
    """A slice has about as many logits, and the room that the budget counts."""
    found = []
    plain = head.SlicedHead._part_of
    monkeypatch.setattr(head.SlicedHead, "_part_of", lambda self, shape: found.append(shape) or plain(self, shape))
    vocab = 40 * head.SLICE_COLUMNS
    for rows in (1, 12, 200, 256):
        problem = Problem(1, rows, 2, vocab, bias=False)
        problem.mask[:] = True
        found.clear()
        with torch.no_grad():
            linear_grpo_loss(problem.hidden, problem.weight, problem.ids, problem.advantages)
        sizes = [shape.numel() for shape in found]
        assert sum(sizes) == rows * vocab
        assert max(sizes) <= rows * head.MOST_COLUMNS
        assert len(sizes) == {1: 5, 12: 5, 200: 8, 256: 10}[rows]


@pytest.mark.parametrize("autocast", HALVES, ids=str)
def test_autocast_copies_no_whole_weight(monkeypatch, autocast):
    """Where GEMMs are in fp32, a weight in fp32 is rounded a slice at a time."""
    monkeypatch.setattr(head, "cpu_instructions", lambda dtype: ())
    problem = Problem(2, 4, 64, SEVERAL, bias=False)
    with torch.autocast("cpu", autocast), Largest(autocast) as largest:
        problem.run()
    assert 0 < largest.elements <= problem.weight.numel() // 2


def test_a_converted_weight_is_never_whole(monkeypatch):
    monkeypatch.setattr(head, "cpu_instructions", lambda dtype: ())
    problem = Problem(2, 4, 64, SEVERAL, torch.bfloat16, bias=False)
    with Largest(torch.float32) as largest:
        problem.run()
    assert largest.elements <= problem.weight.numel() // 2


def test_a_gradient_of_one_chunk_is_written_once(monkeypatch):
    """It is made where it is returned: no sum of the weight's size beside it."""
    made = []
    plain = head.Factor._new
    monkeypatch.setattr(head.Factor, "_new", lambda self, dtype: made.append(plain(self, dtype)) or made[-1])
    problem = Problem(dtype=torch.float32, bias=False)
    out = linear_grpo_loss(problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    (gradient,) = torch.autograd.grad(out.loss, problem.weight)
    assert gradient.data_ptr() == made[0].data_ptr()
