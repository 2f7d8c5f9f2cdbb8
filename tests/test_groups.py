"""What ranks tell each other, and the one error that all of them raise."""

from __future__ import annotations

import pytest
import torch
from threads import errors_of, run_threads

from grpo_kernels.objectives.groups import agree, begin_total, gather, ordered_sum


def test_sums_are_in_rank_order():
    """Of numbers whose sum depends on the order: 1 is lost beside 1e16 unless it comes after both."""
    values = torch.tensor([1e16, -1e16, 1.0], dtype=torch.float64)

    def total(rank):
        return ordered_sum(values[rank], torch.distributed.group.WORLD), gather(
            values[rank], torch.distributed.group.WORLD
        )

    for summed, gathered in run_threads(3, total):
        assert summed == 1.0
        assert torch.equal(gathered, values)


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, RuntimeError, KeyError])
def test_one_rank_has_an_error(error):
    def call(rank):
        agree("grpo_loss", "group", torch.distributed.group.WORLD, {}, error("wrong") if rank == 1 else None)

    first, second, third = errors_of(3, call)
    assert first == second == third
    kind = RuntimeError if error is KeyError else error
    assert first.startswith(f"{kind.__name__}: rank 1 of 3: ")
    assert "wrong" in first


def test_all_ranks_have_errors():
    def same(rank):
        agree("grpo_loss", "group", torch.distributed.group.WORLD, {}, ValueError("wrong"))

    def other(rank):
        agree("grpo_loss", "group", torch.distributed.group.WORLD, {}, ValueError(f"wrong in {rank}"))

    assert errors_of(2, same) == ["ValueError: wrong"] * 2
    assert errors_of(2, other) == ["ValueError: rank 0 of 2: wrong in 0\nrank 1 of 2: wrong in 1"] * 2


def test_facts_that_differ_are_named():
    def call(rank):
        agree("grpo_loss", "sequence_group", torch.distributed.group.WORLD, {"config": "a", "sequences": 3 + rank})

    expected = "grpo_loss: expected the same sequences on every rank of sequence_group; got 3 on rank 0, 4 on rank 1."
    assert errors_of(2, call) == [f"ValueError: {expected}"] * 2


def test_another_function_on_one_rank_is_named():
    def call(rank):
        agree(("grpo_loss", "policy_loss")[rank], "group", torch.distributed.group.WORLD, {})

    first, second = errors_of(2, call)
    assert "the same function on every rank of group; got grpo_loss on rank 0, policy_loss on rank 1" in first
    assert "the same function on every rank of group; got grpo_loss on rank 0, policy_loss on rank 1" in second


def test_ranks_talk_at_the_first_good_call_and_with_checks(monkeypatch):
    """Not at later ones, whatever is wrong with a rank: then the others do not wait for it."""
    monkeypatch.delenv("GRPO_KERNELS_CHECK", raising=False)

    def call(rank):
        group, raised = torch.distributed.group.WORLD, []
        for facts, check in (
            ({"sequences": rank}, None),
            ({}, None),
            ({"sequences": rank}, None),
            ({"sequences": rank}, True),
        ):
            try:
                agree("grpo_loss", "group", group, facts, check=check)
                raised.append(False)
            except ValueError:
                raised.append(True)
        if rank == 1:
            with pytest.raises(IndexError, match="^of this rank alone"):
                agree("grpo_loss", "group", group, {}, IndexError("of this rank alone"))
        return raised

    assert run_threads(2, call) == [[True, False, False, True]] * 2


def test_without_a_group_an_error_is_raised_as_it_is():
    agree("grpo_loss", "group", None, {})
    with pytest.raises(ValueError, match="^wrong$"):
        agree("grpo_loss", "group", None, {}, ValueError("wrong"))


def test_ranks_that_do_not_come_are_a_timeout():
    def call(rank):
        if rank == 1:
            agree("grpo_loss", "group", torch.distributed.group.WORLD, {})

    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_threads(2, call, deadline=0.5)


def test_a_sum_of_bf16_rounds_as_often_as_its_parts():
    """At 8 ranks, by the norm: a ring, which adds in bf16, errs 2.4 times as much as one rank's rounding, this 1.4."""
    exact = torch.randn(8, 4, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = exact.to(torch.bfloat16)
    whole = exact.sum(0)
    one_rounding = float((whole.to(torch.bfloat16).double() - whole).norm())
    ring = parts[0]
    for part in parts[1:]:
        ring = ring + part
    assert 2.1 < float((ring.double() - whole).norm()) / one_rounding < 2.7

    def total(rank):
        return begin_total(parts[rank], torch.distributed.group.WORLD)()

    sums = run_threads(8, total)
    assert all(torch.equal(each, sums[0]) for each in sums)
    assert 1.2 < float((sums[0].double() - whole).norm()) / one_rounding < 1.6
