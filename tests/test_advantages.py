"""Advantages and the value loss against loops written from their definitions."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from grpo_kernels import normalizer, value_loss
from grpo_kernels.objectives import advantages

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0, 0.5, 2.5, -1.0, 0.0])
GROUPS = [REWARDS[i : i + 4].tolist() for i in range(0, 12, 4)]


def flat(rows) -> list[float]:
    return [x for row in rows for x in row]


def test_raw_and_centered():
    leaf = REWARDS.clone().requires_grad_()
    assert torch.equal(advantages.raw(leaf), REWARDS)
    assert not advantages.raw(leaf).requires_grad
    mean = statistics.fmean(REWARDS.tolist())
    assert advantages.centered(leaf).tolist() == pytest.approx([r - mean for r in REWARDS.tolist()])


def test_group_centered():
    expected = flat([[r - statistics.fmean(group) for r in group] for group in GROUPS])
    assert advantages.group_centered(REWARDS, 4).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_group_normalized(eps):
    expected = [[(r - statistics.fmean(g)) / (statistics.pstdev(g) + eps) for r in g] for g in GROUPS]
    got = advantages.group_normalized(REWARDS, 4, eps)
    assert got.tolist() == pytest.approx(flat(expected), rel=1e-6)
    assert (got[4:8] == 0).all()  # a group of equal rewards


def test_equal_rewards_give_exact_zeros():
    """0.1 * 3 / 3 is not 0.1 in floating point: the zero must not come from a subtraction."""
    for reward, size in ((0.1, 3), (0.9, 7), (10.1, 8), (100.1, 16)):
        rewards = torch.full((3 * size,), reward)
        for estimate in (advantages.group_centered, advantages.group_normalized, advantages.leave_one_out):
            assert (estimate(rewards, size) == 0).all()
        assert (advantages.centered(rewards.view(3, size)) == 0).all()
        assert not advantages.has_signal(rewards, size).any()


def test_leave_one_out():
    expected = [[r - (sum(g) - r) / (len(g) - 1) for r in g] for g in GROUPS]
    assert advantages.leave_one_out(REWARDS, 4).tolist() == pytest.approx(flat(expected))
    with pytest.raises(ValueError, match="group_size >= 2"):
        advantages.leave_one_out(REWARDS, 1)


def test_has_signal():
    assert advantages.has_signal(REWARDS, 4).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_integer_rewards():
    rewards = torch.tensor([0, 1, 1, 0])
    for estimator in (advantages.group_centered, advantages.group_normalized, advantages.leave_one_out):
        assert torch.equal(estimator(rewards, 2), estimator(rewards.float(), 2))
    assert torch.equal(advantages.centered(rewards), advantages.centered(rewards.float()))


def test_group_size_must_divide():
    for function in (advantages.group_centered, advantages.group_normalized, advantages.has_signal):
        with pytest.raises(ValueError, match=r"rewards \(B,\) with B a multiple of group_size 5; got shape \(12,\)"):
            function(REWARDS, 5)


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (80, 0), (90, -0.5), (100, -1), (130, -1)])
def test_overlong_penalty(length, expected):
    """DAPO, arXiv:2503.14476 eq. 13: 0 up to max - buffer, then linear down to -1 at max."""
    for dtype in (torch.int64, torch.uint8, torch.float64):
        got = advantages.overlong_penalty(torch.tensor([length], dtype=dtype), max_length=100, buffer=20)
        assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_longest_response_beyond_the_dtype_of_lengths(dtype):
    """A difference in the integers of the lengths would wrap around."""
    got = advantages.overlong_penalty(torch.tensor([100], dtype=dtype), max_length=40960, buffer=100)
    assert got.tolist() == [0.0]


def trajectories() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and a mask with holes; an empty row."""
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(5, 8, generator=g) < 0.7
    mask[2] = False
    rewards[~mask], values[~mask] = math.nan, math.nan
    return rewards, values, mask


def by_row(function, *tensors, mask: torch.Tensor) -> torch.Tensor:
    """A function of lists of live entries, applied row by row."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i in range(len(mask)):
        result = function(*(t[i][mask[i]].tolist() for t in tensors))
        out[i][mask[i]] = torch.tensor(result, dtype=torch.float64)
    return out


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("from_start", [False, True])
def test_reward_to_go(discount, from_start):
    rewards, _, mask = trajectories()

    def loop(r):
        front = [discount**t if from_start else 1.0 for t in range(len(r))]
        return [front[t] * sum(discount ** (u - t) * r[u] for u in range(t, len(r))) for t in range(len(r))]

    got = advantages.reward_to_go(rewards, mask, discount, discount_from_start=from_start)
    torch.testing.assert_close(got, by_row(loop, rewards, mask=mask))
    baseline = torch.randn(5, 1, dtype=torch.float64)
    if not from_start:
        moved = advantages.reward_to_go(rewards, mask, discount, baseline=baseline)
        torch.testing.assert_close(moved, torch.where(mask, got - baseline, 0.0))


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_n_step(steps):
    rewards, values, mask = trajectories()

    def loop(r, v):
        out = []
        for t in range(len(r)):
            total = sum(0.9**k * r[t + k] for k in range(steps) if t + k < len(r))
            out.append(total + (0.9**steps * v[t + steps] if t + steps < len(r) else 0.0))
        return out

    torch.testing.assert_close(
        advantages.n_step(rewards, values, mask, 0.9, steps), by_row(loop, rewards, values, mask=mask)
    )
    if steps >= 8:
        torch.testing.assert_close(
            advantages.n_step(rewards, values, mask, 0.9, steps), advantages.reward_to_go(rewards, mask, 0.9)
        )


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae(lam):
    rewards, values, mask = trajectories()

    def loop(r, v):
        following = [*v[1:], 0.0]
        delta = [r[t] + 0.9 * following[t] - v[t] for t in range(len(r))]
        return [sum((0.9 * lam) ** (u - t) * delta[u] for u in range(t, len(r))) for t in range(len(r))]

    got, returns = advantages.gae(rewards, values, mask, 0.9, lam)
    expected = by_row(loop, rewards, values, mask=mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0))
    if lam == 0.0:
        one_step = advantages.n_step(rewards, values, mask, 0.9, 1)
        torch.testing.assert_close(returns, one_step)


PACKED = {
    "reward_to_go": lambda r, v, m, **o: advantages.reward_to_go(r, m, 0.9, **o),
    "from the start": lambda r, v, m, **o: advantages.reward_to_go(r, m, 0.9, discount_from_start=True, **o),
    "baseline": lambda r, v, m, **o: advantages.reward_to_go(r, m, 0.9, baseline=v, **o),
    "n_step 1": lambda r, v, m, **o: advantages.n_step(r, v, m, 0.9, 1, **o),
    "n_step 3": lambda r, v, m, **o: advantages.n_step(r, v, m, 0.9, 3, **o),
    "n_step 100": lambda r, v, m, **o: advantages.n_step(r, v, m, 0.9, 100, **o),
    "gae": lambda r, v, m, **o: advantages.gae(r, v, m, 0.9, 0.95, **o)[0],
    "gae returns": lambda r, v, m, **o: advantages.gae(r, v, m, 0.9, 1.0, **o)[1],
    "td": lambda r, v, m, **o: advantages.gae(r, v, m, 0.9, 0.0, **o)[0],
}


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("bounds", [[0, 7, 7, 8, 20], [2, 7, 13, 17], [20, 20], [0, 20]])
def test_packed_sequences_are_alone(name, bounds, leading):
    """Each as if it were the only one; what belongs to none is 0, whatever it holds."""
    g = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(20, generator=g) < 0.7
    rewards[~mask], values[~mask] = math.nan, math.nan
    expected = torch.zeros(20, dtype=torch.float64)
    for a, b in itertools.pairwise(bounds):
        expected[a:b] = PACKED[name](*(x[None, a:b] for x in (rewards, values, mask)))[0]
    shaped = (x[None] if leading else x for x in (rewards, values, mask))
    got = PACKED[name](*shaped, cu_seqlens=torch.tensor(bounds))
    assert got.shape == ((1, 20) if leading else (20,))
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-12, atol=1e-14)


def test_nothing_leaks_over_a_bound():
    """Not even NaN: 0 * NaN is NaN."""
    rewards, mask = torch.tensor([1.0, 2.0, math.nan, 4.0]), torch.ones(4)
    bounds = torch.tensor([0, 2, 4])
    for name in PACKED:
        assert PACKED[name](rewards, rewards, mask, cu_seqlens=bounds)[:2].isfinite().all(), name


def test_packed_value_loss():
    g = torch.Generator().manual_seed(3)
    values, old, returns = (torch.randn(9, generator=g) for _ in range(3))
    mask = torch.rand(9, generator=g) < 0.8
    expected = value_loss(*(x[None, 2:7] for x in (values, old, returns, mask)))
    got = value_loss(values, old, returns, mask, cu_seqlens=torch.tensor([2, 4, 7]))
    torch.testing.assert_close(got, expected)


def test_baselines():
    """A number, a 0-d tensor, one for each sequence or for each token."""
    rewards, _, mask = trajectories()
    plain = advantages.reward_to_go(rewards, mask, 0.9)
    whole = torch.full_like(rewards, 0.5)
    for baseline in (0.5, torch.tensor(0.5, requires_grad=True), whole[:, :1], whole):
        got = advantages.reward_to_go(rewards, mask, 0.9, baseline=baseline)
        torch.testing.assert_close(got, torch.where(mask, plain - 0.5, 0.0))
        assert not got.requires_grad
    flat, bounds = (rewards.flatten(), mask.flatten()), torch.arange(0, 41, 8)
    each = torch.arange(5.0, dtype=torch.float64)
    expected = torch.where(mask, plain - each[:, None], 0.0).flatten()
    for baseline in (each, each[:, None], each.repeat_interleave(8)):
        got = advantages.reward_to_go(*flat, 0.9, baseline=baseline, cu_seqlens=bounds)
        torch.testing.assert_close(got, expected)
    of_two = torch.tensor([5.0, 1.0])  # N is S: (S,) is of sequences, the first of which is empty here
    for baseline, expected in ((of_two, [-1.0, -1.0]), (of_two[None], [-5.0, -1.0])):
        got = advantages.reward_to_go(torch.zeros(2), torch.ones(2), 1.0, baseline, cu_seqlens=torch.tensor([0, 0, 2]))
        assert got.tolist() == expected
    with pytest.raises(ValueError, match="baseline to be a finite number"):
        advantages.reward_to_go(rewards, mask, baseline=math.nan)


def test_estimators_are_detached():
    rewards, values, mask = (x.requires_grad_() if x.is_floating_point() else x for x in trajectories())
    assert not advantages.reward_to_go(rewards, mask, 0.9).requires_grad
    assert not advantages.n_step(rewards, values, mask, 0.9, 2).requires_grad
    assert not any(x.requires_grad for x in advantages.gae(rewards, values, mask))


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss(clip):
    g = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 5, generator=g) < 0.6
    values[~mask], old[~mask], returns[~mask] = math.nan, math.nan, math.nan
    total = 0.0
    for v, o, r in zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True):
        loss = (v - r) ** 2
        if clip is not None:
            loss = max(loss, (o + max(-clip, min(clip, v - o)) - r) ** 2)
        total += loss / 2
    leaf = values.requires_grad_()
    loss = value_loss(leaf, old, returns, mask, clip)
    assert loss.item() == pytest.approx(total / mask.sum().item())
    loss.backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[~mask] == 0).all()
    assert value_loss(leaf, old, returns, torch.zeros_like(mask), clip).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: advantages.reward_to_go(x, m, 1.1), r"discount in \[0, 1\]; got 1.1"),
        (lambda x, m: advantages.gae(x, x, m, 0.9, -0.1), r"lam in \[0, 1\]; got -0.1"),
        (lambda x, m: advantages.n_step(x, x, m, 0.9, 0), "steps >= 1; got 0"),
        (lambda x, m: advantages.n_step(x, x[:, :2], m, 0.9, 1), r"rewards, values, mask of one shape \(B, T\)"),
        (lambda x, m: advantages.gae(x[0], x[0], m[0]), r"rewards, values, mask of one shape \(B, T\)"),
        (lambda x, m: advantages.reward_to_go(x, m, baseline=x[:, 0]), r"baseline of shape \(2, 3\) or \(2, 1\)"),
        (lambda x, m: advantages.value_loss(x, x, x[:, :1], m), "values, old_values, returns, mask of one shape"),
        (lambda x, m: advantages.gae(x, x, m, cu_seqlens=torch.tensor([0, 6])), r"\(N,\) or \(1, N\) with cu_seqlens"),
        (lambda x, m: advantages.gae(x[0], x[0], m[0], cu_seqlens=torch.tensor([0, 4])), r"within \[0, 3\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3), torch.ones(2, 3))


ESTIMATORS = {
    "raw": advantages.raw,
    "centered": advantages.centered,
    "group_centered": lambda x: advantages.group_centered(x, 3),
    "group_normalized": lambda x: advantages.group_normalized(x, 3),
    "leave_one_out": lambda x: advantages.leave_one_out(x, 3),
    "has_signal": lambda x: advantages.has_signal(x, 3),
    "overlong_penalty": lambda x: advantages.overlong_penalty(x, 9, 3),
    "reward_to_go": lambda x: advantages.reward_to_go(x, torch.ones(2, 3)),
    "n_step": lambda x: advantages.n_step(torch.ones(2, 3), x, torch.ones(2, 3), 0.9, 2),
    "gae": lambda x: advantages.gae(torch.ones(2, 3), torch.ones(2, 3), x),
    "value_loss": lambda x: advantages.value_loss(torch.ones(2, 3), x, torch.ones(2, 3), torch.ones(2, 3)),
    "bounds": lambda x: advantages.gae(*[torch.ones(6)] * 3, cu_seqlens=[0, 6] if x is None else x),
}


@pytest.mark.parametrize(
    "value", [[[1.0] * 3] * 2, np.ones((2, 3)), None, 1.0], ids=["list", "numpy", "none", "number"]
)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_no_tensor(name, value):
    with pytest.raises(TypeError, match=rf"^{name if name != 'bounds' else 'gae'}: expected \w+ to be a tensor; got"):
        ESTIMATORS[name](value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: advantages.group_centered(x[0], "3"), "group_size to be an integer; got '3'"),
        (lambda x: advantages.leave_one_out(x[0], 3.0), "group_size to be an integer; got 3.0"),
        (lambda x: advantages.group_normalized(x[0], 3, "1e-4"), "eps to be a finite number .*; got '1e-4'"),
        (lambda x: advantages.group_normalized(x[0], 3, -1), "group_normalized: expected eps >= 0; got -1"),
        (lambda x: advantages.group_centered(x[0] * 1j, 3), "baselines and lengths are real numbers; got .*x64"),
        (lambda x: advantages.gae(x, x * 1j, x), "baselines and lengths are real numbers; got torch.complex64"),
        (lambda x: advantages.reward_to_go(x, x, baseline=x * 1j), "real numbers; got torch.complex64"),
        (lambda x: advantages.value_loss(x * 1j, x, x, x), "real numbers; got torch.complex64"),
        (lambda x: advantages.overlong_penalty(x[0], "9", 3), "max_length to be a finite number .*; got '9'"),
        (lambda x: advantages.reward_to_go(x, x, "0.9"), "discount to be a finite number .*; got '0.9'"),
        (lambda x: advantages.gae(x, x, x, 1.0, math.nan), "lam to be a finite number .*; got nan"),
        (lambda x: advantages.n_step(x, x, x, 0.9, 1.5), "an integer steps >= 1; got 1.5"),
        (lambda x: advantages.value_loss(x, x, x, x, -0.2), "clip >= 0, or None to leave it out; got -0.2"),
        (lambda x: advantages.gae(x, x[:1], x), r"of one shape \(B, T\); got \(2, 3\), \(1, 3\), \(2, 3\)"),
    ],
)
def test_numbers_that_are_none(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.ones(2, 3))


def test_numbers_of_numpy_and_of_no_dimension():
    rewards, mask = torch.ones(2, 3), torch.ones(2, 3)
    expected = advantages.gae(rewards, rewards, mask, 0.5, 0.25)
    for kind in (np.float32, np.array, torch.tensor):
        for got, want in zip(advantages.gae(rewards, rewards, mask, kind(0.5), kind(0.25)), expected, strict=True):
            torch.testing.assert_close(got, want)


NUMBERS = {
    "eps": lambda x: advantages.group_normalized(REWARDS, 4, x),
    "max_length": lambda x: advantages.overlong_penalty(REWARDS, x, 1),
    "buffer": lambda x: advantages.overlong_penalty(REWARDS, 10**25, x),
    "baseline": lambda x: advantages.reward_to_go(REWARDS[None], torch.ones(1, 12), baseline=x),
    "clip": lambda x: advantages.value_loss(*[REWARDS[None] + i for i in range(3)], torch.ones(1, 12), x),
    "normalizer": lambda x: torch.tensor(float(x * normalizer(torch.ones(2, 3), "dapo") / x)),
}
SHARES = {
    "discount": lambda x: advantages.reward_to_go(REWARDS[None], torch.ones(1, 12), x),
    "steps": lambda x: advantages.n_step(*[REWARDS[None]] * 2, torch.ones(1, 12), x, np.array(2)),
    "lam": lambda x: torch.stack(advantages.gae(*[REWARDS[None]] * 2, torch.ones(1, 12), 1.0, x)),
}


@pytest.mark.parametrize("name", [*NUMBERS, *SHARES])
def test_a_number_of_any_kind(name):
    """The dtype and the bits of Python's float."""
    call, number = (NUMBERS | SHARES)[name], 0.5 if name in SHARES else 3.0
    alike = (np.array(number), np.float64(number), *(() if name in SHARES else (3, np.int64(3))))
    for kind in alike:
        assert torch.equal(call(kind), call(number))
        assert call(kind).dtype == torch.float32
    if name in NUMBERS:
        assert torch.equal(call(10**20), call(1e20))


@pytest.mark.parametrize("estimator", ["group_centered", "group_normalized", "leave_one_out", "has_signal"])
@pytest.mark.parametrize("kind", [np.int64, np.array])
def test_a_group_size_of_numpy(kind, estimator):
    function = getattr(advantages, estimator)
    assert torch.equal(function(REWARDS, kind(4)), function(REWARDS, 4))
    assert function(REWARDS, kind(4)).dtype == function(REWARDS, 4).dtype
    with pytest.raises(TypeError, match="group_size to be an integer; got array"):
        function(REWARDS, np.array([4, 4]))
    with pytest.raises(TypeError, match="group_size to be an integer; got array"):
        function(REWARDS, np.array(4.0))


def test_compiled_estimators():
    """What is checked leaves no graph, whatever the numbers are."""
    compiled = torch.compile(advantages.group_normalized, backend="eager", fullgraph=True)
    for group in (3, 4, 6):
        assert torch.equal(compiled(REWARDS, group), advantages.group_normalized(REWARDS, group))


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_rewards_in_half_precision(dtype):
    """The discount of 0.999 is 1 in bf16, and a mean of thousands has other digits than its terms."""
    steps = 400
    r, m = torch.zeros(1, steps, dtype=dtype), torch.ones(1, steps)
    r[0, -1] = 1
    v = torch.zeros_like(r)
    expected = pytest.approx(0.999 ** (steps - 1), rel=1e-5)
    for found in (
        advantages.reward_to_go(r, m, 0.999),
        advantages.gae(r, v, m, 0.999, 1.0)[0],
        advantages.gae(r, v, m, 1.0, 0.999)[0],
        advantages.n_step(r, v, m, 0.999, steps),
    ):
        assert found[0, 0].item() == expected
        assert found.dtype == torch.float32
    groups = torch.tensor([1000.0, 1004, 1008, 1012])
    for function in (advantages.group_normalized, advantages.group_centered, advantages.leave_one_out):
        assert torch.equal(function(groups.to(dtype), 4), function(groups, 4))
    assert torch.equal(advantages.centered(groups.to(dtype)), advantages.centered(groups))


def test_integer_rewards_under_a_default_of_half_precision():
    rewards, default = torch.tensor([257, 258, 259, 260]), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = advantages.group_normalized(rewards, 4)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(found, advantages.group_normalized(rewards, 4))


@pytest.mark.parametrize("dtype", HALVES)
def test_values_keep_their_digits_beside_rewards_in_half_precision(dtype):
    r, m = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3)
    v = torch.tensor([[1.001, 2.003, 3.007], [0.1, 0.2, 0.3]])
    assert torch.equal(advantages.n_step(r, v, m, 1.0, 1)[:, :-1], v[:, 1:])
    values, old, returns = (torch.randn(8, 64).to(dtype) for _ in range(3))
    leaf = values.clone().requires_grad_()
    loss = advantages.value_loss(leaf, old, returns, torch.ones(8, 64))
    assert torch.equal(loss, advantages.value_loss(values.float(), old.float(), returns.float(), torch.ones(8, 64)))
    loss.backward()
    assert leaf.grad.dtype == dtype
