"""Memory of large gradients on a CPU: whose it is, when it comes back, and what is kept of it."""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import gc
import io
import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import LARGE
from torch._subclasses import FakeTensorMode

import grpo_kernels
from grpo_kernels import grpo_loss, linear_grpo_loss
from grpo_kernels.backends import blocks, cpu, native

try:
    cpu.library()
except native.Unavailable as error:
    pytest.skip(f"no blocks without the library: {error}", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("blocks are of Linux", allow_module_level=True)

MB = 1 << 20
LOGITS, WEIGHT = blocks.Kind
PAGE = 2 * MB
"""Blocks are whole huge pages."""


def used() -> int:
    """Bytes in use, beside those that other tests still hold: a traceback may."""
    return blocks.count().used - _others


_others = 0


@pytest.fixture(autouse=True)
def _from_nothing(monkeypatch):
    global _others
    monkeypatch.setattr(blocks, "LARGE", LARGE)
    gc.collect()
    blocks.empty_cache()
    _others = blocks.count().used
    yield
    gc.collect()
    blocks.empty_cache()
    assert (blocks.count().kept, used()) == (0, 0)


def gradient(tokens: int = 100, vocab: int = 30000, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """Of a loss with logits of 12 MB, as autograd keeps it."""
    logits = torch.zeros(1, tokens, vocab, dtype=dtype, requires_grad=True)
    ids = torch.arange(tokens)[None]
    grpo_loss(logits, ids, torch.ones(1), **options).loss.backward()
    assert logits.grad is not None
    return logits.grad


def room(size: int, kind: blocks.Kind = LOGITS) -> torch.Tensor:
    """So many bytes."""
    return blocks.empty(size // 4, torch.float32, kind)


def holds(found: torch.Tensor) -> bool:
    """Whether it is still the gradient of ``gradient``: at uniform probabilities."""
    wanted = torch.full_like(found, 1 / found.shape[1] / found.shape[2])
    wanted[0, range(found.shape[1]), range(found.shape[1])] -= 1 / found.shape[1]
    return torch.allclose(found, wanted, rtol=1e-3, atol=0)


def test_a_gradient_is_a_block_and_comes_back():
    found = gradient()
    assert holds(found)
    assert used() == 12 * MB
    assert blocks.count().kept == 0
    place = found.data_ptr()
    del found
    assert (used(), blocks.count().kept) == (0, 12 * MB)
    assert gradient().data_ptr() == place


def test_the_second_gradient_takes_no_fresh_pages():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        room(64 * MB).fill_(0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first, second = faults(), faults()
    assert first >= 32  # huge pages at best
    assert second <= 4
    blocks.empty_cache()
    assert faults() >= 32


HOLDERS = {
    "view": lambda tensor: tensor[0, 3:5],
    "detached": lambda tensor: tensor.detach(),
    "storage": lambda tensor: tensor.untyped_storage(),
    "numpy": lambda tensor: tensor.numpy(),
    "numpy's view": lambda tensor: tensor.numpy()[0, 7:9, ::3],
    "dlpack": lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    "memoryview": lambda tensor: memoryview(tensor.numpy()),
    "another shape": lambda tensor: tensor.flatten().as_strided((3, 4), (7, 1), 11),
    "saved for backward": lambda tensor: (tensor * torch.ones((), requires_grad=True)).grad_fn,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_it_stays_as_long_as_anything_holds_it(holder):
    found = gradient()
    held = HOLDERS[holder](found)
    place = found.data_ptr()
    del found
    assert used() == 12 * MB
    other = gradient()
    assert other.data_ptr() != place
    assert used() == 24 * MB
    del other
    assert blocks.count().kept == 12 * MB
    del held
    gc.collect()
    assert used() == 0


def test_what_is_held_keeps_its_numbers():
    """Blocks that come back are filled with NaN, and the next gradient is written there."""
    kept = [gradient() for _ in range(3)]
    arrays = [tensor.numpy() for tensor in kept]
    del kept
    for _ in range(4):
        assert holds(gradient())
    assert all(holds(torch.from_numpy(array)) for array in arrays)


def test_a_gradient_that_autograd_accumulates():
    logits = torch.zeros(1, 100, 30000, requires_grad=True)
    ids = torch.arange(100)[None]
    for step in range(1, 4):
        grpo_loss(logits, ids, torch.ones(1)).loss.backward()
        assert holds(logits.grad / step)
    logits.grad = None
    assert used() == 0


def test_a_block_that_is_read_too_late_shows():
    """What the other tests stand on: an address alone keeps nothing."""
    found = gradient()
    stale = (ctypes.c_float * 16).from_address(found.data_ptr())
    assert all(map(math.isfinite, stale))
    del found
    assert all(map(math.isnan, stale))


def test_at_most_one_block_is_kept_and_at_most_twice_the_last():
    sizes = [30, 10, 100, 12, 64]
    held = [room(size * MB) for size in sizes]
    assert used() == sum(sizes) * MB
    held.clear()
    assert used() == 0
    assert blocks.count().kept in [size * MB for size in sizes]
    for size in (40, 20, 24, 9, 80, 81):
        tensor = room(size * MB)
        assert size * MB <= used() <= 2 * (size + 2) * MB
        tensor.fill_(1)
        del tensor
        assert size * MB <= blocks.count().kept <= 2 * (size + 2) * MB


def test_it_grows_with_the_pages_that_it_has(monkeypatch):
    monkeypatch.setattr(blocks, "poisoned", False)
    torch.use_deterministic_algorithms(False)  # both would fill all of it

    def faults_of_growth() -> int:
        blocks.empty_cache()
        room(32 * MB).fill_(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        room(48 * MB)[: 8 * MB].fill_(0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults_of_growth() for _ in range(3)) <= 3


def test_each_kind_keeps_its_own():
    logits, weight = room(16 * MB), room(40 * MB, WEIGHT)
    places = logits.data_ptr(), weight.data_ptr()
    del logits, weight
    assert blocks.count().kept == 56 * MB
    assert (room(16 * MB).data_ptr(), room(40 * MB, WEIGHT).data_ptr()) == places
    assert blocks.count().kept == 56 * MB
    assert grpo_kernels.empty_cache() == 56 * MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_from_hidden_states_takes_both_kinds_again(dtype):
    hidden = torch.ones(1, 200, 200, dtype=dtype, requires_grad=True)  # as many tokens as it is wide: equal blocks
    weight = torch.zeros(30000, 200, dtype=dtype, requires_grad=True)
    ids, size = torch.arange(200)[None], 6 * MB * dtype.itemsize
    places = set()
    for step in range(3):
        weight.grad = None
        assert (used(), blocks.count().kept) == (0, 2 * size if step else 0)
        linear_grpo_loss(hidden, weight, ids, torch.ones(1)).loss.backward()
        assert weight.grad is not None
        assert (used(), blocks.count().kept) == (size, size)
        wanted = torch.full_like(weight, 1 / 30000)
        wanted[:200] -= 1 / 200
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-2, atol=0)
        places.add(weight.grad.data_ptr())
    assert len(places) == 1
    weight.grad = None


def test_small_gradients_are_pytorchs():
    found = gradient(8, 1000)
    assert found.numel() * 4 < blocks.LARGE
    assert used() == 0


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(blocks.SWITCH, "0")
    found = gradient()
    assert holds(found)
    assert (used(), blocks.count().kept) == (0, 0)
    for value, keeps in (("off", False), ("1", True), ("", True)):
        monkeypatch.setenv(blocks.SWITCH, value)
        assert blocks.keeps() is keeps


def test_empty_cache_gives_back_what_is_kept_alone():
    held = gradient()
    gradient()
    assert blocks.count().kept == 12 * MB
    assert grpo_kernels.empty_cache() == 12 * MB
    assert grpo_kernels.empty_cache() == 0
    assert holds(held)


def test_copies_and_files_are_as_of_any_tensor():
    found = gradient()
    twin = copy.deepcopy(found)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    shared = found.clone().share_memory_()
    found.share_memory_()  # moves it out of the block
    for other in (twin, torch.load(file, weights_only=True), shared, found):
        assert holds(other)


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.nightly)])
def test_a_compiled_step(where):
    logits = torch.zeros(1, 100, 30000, requires_grad=True)
    ids = torch.arange(100)[None]
    config = "grpo" if where == "forward" else "gspo"  # one pass, two passes
    torch.compile(lambda: grpo_loss(logits, ids, torch.ones(1), config=config).loss)().backward()
    assert holds(logits.grad)
    logits.grad = None


def test_threads_do_not_meet_in_a_block():
    """Every thread writes what it has and finds it again; blocks die on other threads than they were made on."""

    def work(i: int) -> torch.Tensor:
        for k in range(40):
            mine = blocks.empty(blocks.LARGE // 4 + 7 * i + k, torch.float32, LOGITS).fill_(i)
            assert (mine == i).all()
        return mine

    torch.set_num_threads(1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        left = list(pool.map(work, range(8)))
    assert all((mine == i).all() for i, mine in enumerate(left))
    assert used() >= 8 * blocks.LARGE
    thread = threading.Thread(target=left.clear)
    thread.start()
    thread.join()
    assert used() == 0
    assert blocks.count().kept <= 2 * blocks.LARGE


def test_a_fork_has_memory_of_its_own():
    """The child's gradient is written into its copy of what was kept; a held one has its numbers on both sides."""
    held = gradient()
    gradient()
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
    child = os.fork()
    if child == 0:
        held.fill_(3)
        fine = holds(gradient()) and bool((held == 3).all()) and grpo_kernels.empty_cache() > 0
        os._exit(0 if fine else 1)
    mine = gradient()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert holds(mine)
    assert holds(held)


def test_the_system_may_take_what_is_kept():
    def lazily_freed() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("LazyFree"))

    room(64 * MB).fill_(1)
    assert lazily_freed() >= 60 * MB


REFUSED = """
import resource, torch, grpo_kernels
from grpo_kernels.backends import blocks
logits = torch.zeros(1, 100, 30000, requires_grad=True)
ids = torch.arange(100)[None]
def step(**options):
    logits.grad = None
    leaf = logits if not options else logits * 1
    grpo_kernels.grpo_loss(leaf, ids, torch.ones(1), **options).loss.backward()
step()
logits.grad = None
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    blocks.empty(1 << 28, torch.float32, blocks.Kind.LOGITS)
except MemoryError as error:
    print(str(error).splitlines()[0] if isinstance(error, RuntimeError) else "of one kind alone")
step()
print(bool(logits.grad.isfinite().all()), blocks.count().used >> 20)
"""


def test_where_there_is_no_room_it_says_so_and_nothing_is_lost():
    run = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    message, after = run.stdout.splitlines()
    assert message.startswith(
        "grpo_kernels expected 1.07 GB of free memory for a tensor of the vocabulary's size, and the system gave none: "
        "inplace=True needs no second tensor of the logits' size, a smaller chunk_bytes= less from hidden states. ("
    )
    assert "DefaultCPUAllocator: can't allocate memory" in message  # by which callers know it who try a smaller batch
    assert after == "True 12"


def test_uninitialised_memory_is_filled_where_pytorch_fills_it():
    room(16 * MB).fill_(1)
    assert room(16 * MB).isnan().all()
    assert blocks.empty(8 * MB, torch.bfloat16, LOGITS).isnan().all()


NARROW = """
import resource
from grpo_kernels.backends import blocks
import torch
def room(megabytes, kind):
    return blocks.empty(megabytes << 18, torch.float32, kind)
room(512, blocks.Kind.LOGITS)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)
print(blocks.count().kept >> 20, room(300, blocks.Kind.WEIGHT).numel() >> 18, blocks.count().kept >> 20)
"""


def test_what_is_kept_of_the_other_kind_makes_room():
    run = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["512", "300", "300"]


def test_sizes_that_no_system_has():
    for count in (1 << 60, 1 << 61, 1 << 62):
        with pytest.raises((RuntimeError, MemoryError)):
            blocks.empty(count, torch.float32, LOGITS)
    assert used() == 0


@pytest.mark.parametrize("calls", ["first", "without", "with"])
@pytest.mark.parametrize("place", ["grpo_cpu_new_block", "_new_capsule", "from_dlpack"])
def test_a_block_that_reaches_nobody_comes_back_once(monkeypatch, place, calls):
    """Of any call on its way: a signal's handler raises when the call has ended, with what it returned ("with") or
    without. A block that came back twice was the next gradient, and nobody's memory."""
    holder = {"grpo_cpu_new_block": cpu.library(), "_new_capsule": blocks, "from_dlpack": torch.utils.dlpack}[place]
    call = getattr(holder, place)
    returned = []

    def interrupted(*arguments: object) -> None:
        if calls != "first":
            result = call(*arguments)
            if calls == "with":
                returned.append(result)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(holder, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            room(16 * MB)
    held = [tensor for tensor in returned if isinstance(tensor, torch.Tensor)]
    assert used() == 16 * MB * len(held)
    del held
    returned.clear()
    allocated = not (place == "grpo_cpu_new_block" and calls == "first")
    assert (used(), blocks.count().kept) == (0, 16 * MB * allocated)
    assert room(16 * MB).fill_(1).data_ptr() % PAGE == 0


def test_fake_tensors_take_no_block():
    with FakeTensorMode():
        hidden, weight = torch.ones(1, 200, 200, requires_grad=True), torch.zeros(30000, 200, requires_grad=True)
        ids = torch.zeros(1, 200, dtype=torch.int64)
        linear_grpo_loss(hidden, weight, ids, torch.ones(1), live_tokens=200).loss.backward()
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
    assert (used(), blocks.count().kept) == (0, 0)


@pytest.mark.parametrize("vocab", [pytest.param(1001, marks=pytest.mark.nightly), 40001])
def test_a_compiled_step_of_logits_that_lie_apart(vocab):
    """Rows of one sequence, transposed as Megatron has them: the stride of a dimension of 1 says nothing."""
    logits = torch.zeros(1, 100, vocab).transpose(0, 1).requires_grad_()
    ids = torch.zeros(100, 1, dtype=torch.int64)
    torch.compile(lambda: grpo_loss(logits, ids, torch.ones(100)).loss)().backward()
    compiled, logits.grad = logits.grad, None
    grpo_loss(logits, ids, torch.ones(100)).loss.backward()
    assert torch.equal(compiled, logits.grad)
    assert (used() > 0) == (vocab == 40001)
    del compiled
    logits.grad = None
