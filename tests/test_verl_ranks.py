"""verl 0.9.1's operators of logits whose vocabulary lies on Megatron's tensor-parallel ranks, patched beside themselves
and beside one process. make nightly PART=verl installs verl and megatron-core for it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from distributed import pool
from systems import gradient_of, tolerance_of

pytest.importorskip("verl", exc_type=ImportError)
pytest.importorskip("megatron.core", exc_type=ImportError)

from grpo_kernels.integrations.verl import patch_verl

pytestmark = [pytest.mark.peers, pytest.mark.nightly]
RANKS, V = 2, 96
SHAPES = {"packed": (17,), "padded": (2, 9), "one row": (1, 1)}


def whole(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All columns' logits, and labels on both ranks."""
    draw = torch.Generator("cpu").manual_seed(1)
    logits = 3 * torch.randn(*SHAPES[kind], V, generator=draw)
    return logits.to(dtype), torch.randint(V, SHAPES[kind], generator=draw)


def in_one_process(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Values and gradients of log-probs and entropies of the same logits, fp64."""
    logits, labels = whole(kind, dtype)

    def log_probs(x):
        return x.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)

    def entropies(x):
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)

    return [*gradient_of(log_probs, logits.double()), *gradient_of(entropies, logits.double())]


def on_a_rank(kind: str, dtype: torch.dtype, patched: bool) -> list[torch.Tensor]:
    """What verl's functions make of this rank's columns."""
    from megatron.core import parallel_state
    from verl.utils.megatron import tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    logits, labels = whole(kind, dtype)
    width = V // RANKS
    own = logits[..., torch.distributed.get_rank() * width :][..., :width].contiguous()
    with patch_verl(losses=False) if patched else contextlib.nullcontext():
        found = [
            *gradient_of(lambda x: tensor_parallel.vocab_parallel_log_probs_from_logits(x, labels), own),
            *gradient_of(lambda x: tensor_parallel.vocab_parallel_entropy(x), own),
        ]
        chunks = tensor_parallel.vocab_parallel_entropy_with_chunking
        assert (chunks.__module__ == "grpo_kernels.integrations.verl_operators") == patched
        if patched:  # verl's own takes padded logits alone
            assert torch.equal(chunks(own, chunk_size=4), found[2])
    return found


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_over_ranks(kind, dtype):
    """Ours beside one process in fp64, with the same bits on both ranks; in fp32 verl's own as well."""
    exact, mine = in_one_process(kind, dtype), pool(RANKS).run(on_a_rank, kind, dtype, True)
    found = [mine, pool(RANKS).run(on_a_rank, kind, dtype, False)] if dtype == torch.float32 else [mine]
    for ranks in found:
        for i, wanted in enumerate(exact):
            parts = [values[i] for values in ranks]
            own = torch.cat(parts, -1) if i % 2 else parts[0]  # a rank has the gradient of its columns
            torch.testing.assert_close(own.double(), wanted, **tolerance_of(dtype))
    assert all(torch.equal(*(values[i] for values in mine)) for i in (0, 2))
