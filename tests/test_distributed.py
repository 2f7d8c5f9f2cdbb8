"""The ranks that tests run on: what comes back from them, what is raised, what a fault leaves behind."""

from __future__ import annotations

import functools
import os
import threading
import time

import pytest
import torch
from distributed import GROUP_SECONDS, mesh, on_threads, pool, subgroup, thread_errors_of, world
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels.objectives.groups import ordered_sum

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]


def rank() -> int:
    return torch.distributed.get_rank()


def total(values: torch.Tensor) -> torch.Tensor:
    return ordered_sum(values * (1 + rank()), world())


def place() -> tuple:
    groups = mesh(2, 2)
    sums = [ordered_sum(torch.tensor([rank()]), groups[name].get_group()).item() for name in ("dp", "tp")]
    return rank(), os.getpid(), id(groups), id(subgroup(0, 2)), sums, torch.get_num_threads()


def test_a_run_returns_what_each_rank_returned():
    values = torch.arange(6.0).view(2, 3)
    for found in pool(2).run(total, values):
        assert torch.equal(found, values * 3)


def test_processes_and_groups_stay():
    first, second = pool(4).run(place), pool(4).run(place)
    assert first == second
    assert [each[0] for each in first] == [0, 1, 2, 3]
    assert [each[4] for each in first] == [[2, 1], [4, 1], [2, 5], [4, 5]]
    assert len({each[1] for each in first}) == 4
    assert all(each[5] == 1 for each in first)


def state() -> tuple[bool, float]:
    return torch.are_deterministic_algorithms_enabled(), float(torch.rand(()))


def disturbed() -> None:
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(3 + rank())


def test_every_run_begins_in_the_same_state():
    before = pool(2).run(state)
    pool(2).run(disturbed)
    assert pool(2).run(state) == before
    assert before[0] == before[1]
    assert before[0][0]


class Unreadable(Exception):
    """One that pickle writes and cannot read."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def refuse(on: int | None, after: bool, error: type = ValueError) -> None:
    """Raise on one rank or on all, before or after the ranks have met."""
    if after:
        ordered_sum(torch.ones(1), world())
    if on in (None, rank()):
        raise Unreadable(1, 2) if error is Unreadable else error("expected a, got b")
    if not after:
        ordered_sum(torch.ones(1), world())


def test_an_exception_is_raised_with_its_rank_and_traceback():
    starts = pool(2).starts
    with pytest.raises(ValueError, match="expected a, got b") as raised:
        pool(2).run(refuse, 1, True)
    assert raised.value.__notes__[0].startswith("on rank 1 of 2: Traceback")
    assert 'error("expected a, got b")' in raised.value.__notes__[0]
    pool(2).run(state)
    assert pool(2).starts == starts + 1
    with pytest.raises(RuntimeError, match="Unreadable: 1 and 2"):
        pool(2).run(refuse, None, False, Unreadable)


def test_the_same_refusal_on_every_rank_leaves_the_pool_as_it_is():
    pool(2).run(state)
    starts = pool(2).starts
    for after in (False, True):
        assert pool(2).refusal_of(refuse, None, after) == "expected a, got b"
    assert pool(2).starts == starts
    errors = pool(2).errors_of(refuse, 0, True)
    assert [type(error) for error in errors] == [ValueError, type(None)]
    with pytest.raises(AssertionError):
        pool(2).refusal_of(refuse, 0, True)
    pool(2).run(state)
    assert pool(2).starts == starts


def test_ranks_that_wait_for_one_that_raised_are_started_anew():
    pool(2).run(state)
    starts, began = pool(2).starts, time.monotonic()
    errors = pool(2).errors_of(refuse, 0, False)
    assert isinstance(errors[0], ValueError)
    assert isinstance(errors[1], RuntimeError), errors  # gloo's timeout
    assert time.monotonic() - began < GROUP_SECONDS + 5
    assert torch.equal(pool(2).run(total, torch.ones(1))[0], torch.tensor([3.0]))
    assert pool(2).starts == starts + 1


def hang_on(one: int) -> None:
    if rank() == one:
        time.sleep(600)


def die(one: int, code: int) -> None:
    if rank() == one:
        os._exit(code)


def test_a_rank_that_hangs_or_dies_is_named():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 1 of 2 did not return within 1 s") as raised:
        pool(2).run(hang_on, 1, seconds=1)
    assert "in hang_on" in raised.value.__notes__[0]
    assert time.monotonic() - began < 60
    with pytest.raises(ChildProcessError, match="rank 0 of 2 died with exit code 7"):
        pool(2).run(die, 0, 7)
    assert len(pool(2).run(state)) == 2


def test_what_cannot_go_to_the_ranks_is_raised_here():
    with pytest.raises((AttributeError, TypeError)):
        pool(2).run(lambda: None)
    with pytest.raises(RuntimeError, match="lock"):
        pool(2).run(threading.Lock)
    assert len(pool(2).run(state)) == 2


@settings(max_examples=40)
@given(st.integers(1, 5), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5))
def test_threads_stand_for_ranks(ranks, values):
    wanted = torch.tensor(values, dtype=torch.float64) * (ranks * (ranks + 1) // 2)
    for found in on_threads(ranks, total, torch.tensor(values, dtype=torch.float64)):
        torch.testing.assert_close(found, wanted)


def test_threads_have_meshes_of_their_own():
    sums = [each[4] for each in on_threads(4, place)]
    assert sums == [[2, 1], [4, 1], [2, 5], [4, 5]]


def test_a_fault_of_a_thread_ends_the_others():
    errors = thread_errors_of(3, refuse, None, True)
    assert [str(error) for error in errors] == ["expected a, got b"] * 3
    for after in (False, True):
        with pytest.raises(ValueError, match="expected a, got b"):
            on_threads(3, refuse, 1, after)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 3"):
        on_threads(3, functools.partial(_meets_unless, 2), seconds=0.5)
    assert time.monotonic() - began < 10
    assert not torch.distributed.is_initialized()
    assert torch.equal(on_threads(2, total, torch.ones(1))[1], torch.tensor([3.0]))


def _meets_unless(absent: int) -> None:
    if rank() != absent:
        ordered_sum(torch.ones(1), world())
