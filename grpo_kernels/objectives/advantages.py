"""Advantages: from rewards to the A of the loss. Plain PyTorch on (B,), (B, T) or packed tensors, no gradient.

Groups are consecutive sequences that answer one prompt: rewards (B,) with B = prompts * group_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_flag, check_scalar, check_shape, check_tensors, fail, read_mask, read_scalar
from .running import backward_scan
from .sequences import Packed, Padded, Sequences
from .settings import as_float, read_integer, shown


def raw(rewards: Tensor) -> Tensor:
    """Return the rewards themselves, detached (REINFORCE without a baseline; Williams 1992)."""
    check_tensors("raw", {"rewards": rewards}, needed=("rewards",))
    return rewards.detach()


def centered(rewards: Tensor) -> Tensor:
    """Return R_i - mean(R) over the batch, in the shape of ``rewards`` (REINFORCE with a mean baseline).

    A batch of equal rewards gives exact zeros.
    """
    check_tensors("centered", {"rewards": rewards}, needed=("rewards",))
    return _centered(_floating(rewards).reshape(1, -1)).reshape(rewards.shape)


def group_centered(rewards: Tensor, group_size: int) -> Tensor:
    """Return R_i - mean of its group (Dr. GRPO; Liu et al. 2025, arXiv:2503.20783). (B,) -> (B,).

    A group of equal rewards gives exact zeros.
    """
    return _centered(_groups("group_centered", rewards, group_size)).reshape(-1)


def group_normalized(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """Return (R_i - mean) / (std + eps) within its group, with the population std (GRPO; arXiv:2402.03300).

    TRL divides by the sample std and uses eps 1e-4. A group of equal rewards gives exact zeros.
    """
    groups = _groups("group_normalized", rewards, group_size)
    number = check_scalar("group_normalized", "eps", eps)
    if number is not None and number < 0:
        fail("group_normalized", "eps >= 0", shown(eps))
    deviation = groups.std(-1, keepdim=True, correction=0)
    return torch.where(_constant(groups), 0.0, _centered(groups) / (deviation + as_float(eps))).reshape(-1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Return R_i - mean of the *other* rewards of its group (RLOO; Ahmadian et al. 2024, arXiv:2402.14740).

    Needs group_size >= 2; a group of equal rewards gives exact zeros.
    """
    groups = _groups("leave_one_out", rewards, group_size)
    size = groups.shape[1]
    if size < 2:
        fail("leave_one_out", "group_size >= 2", str(size))
    others = (groups.sum(-1, keepdim=True) - groups) / (size - 1)
    return torch.where(_constant(groups), 0.0, groups - others).reshape(-1)


def has_signal(rewards: Tensor, group_size: int) -> Tensor:
    """Return, bool (B,), whether a sequence's group has unequal rewards, so some advantage is not 0 (for DAPO)."""
    groups = _groups("has_signal", rewards, group_size)
    return (~_constant(groups)).expand_as(groups).reshape(-1)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Return DAPO's soft over-long penalty, to add to the reward (arXiv:2503.14476, eq. 13). (B,) -> (B,) in [-1, 0].

    It is 0 up to lengths of max_length - buffer, then linear down to -1 at max_length, -1 beyond.
    """
    check_tensors("overlong_penalty", {"lengths": lengths}, needed=("lengths",))
    longest = read_scalar("overlong_penalty", "max_length", max_length)
    room = read_scalar("overlong_penalty", "buffer", buffer)
    if not 0 < room <= longest:
        fail("overlong_penalty", "0 < buffer <= max_length", f"buffer={shown(buffer)}, max_length={shown(max_length)}")
    return ((longest - room - _floating(lengths)) / room).clamp(-1.0, 0.0)


def reward_to_go(
    rewards: Tensor,
    mask: Tensor,
    discount: float = 1.0,
    baseline: float | Tensor | None = None,
    discount_from_start: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return Σ_{u>=t} γ^(u-t) r_u - b_t for each token: (B, T) rewards -> (B, T), 0 where masked.

    Time counts live tokens: masked ones (tool output, padding) neither collect nor discount.

    Args:
        discount: γ in [0, 1].
        baseline: a number, one for each sequence ((B, 1), packed (S,)) or for each token ((1, N) where N is S as well),
            subtracted (it leaves the gradient unbiased if it does not depend on the action).
        discount_from_start: multiply by γ^(t-1) too, the exact gradient of the discounted objective; the usual form
            leaves it out (Nota & Thomas 2020, arXiv:1906.07073).
        cu_seqlens: (S+1,) bounds of packed sequences; rewards and mask are then (N,) or (1, N), as for the loss.
    """
    discount = _read_share("reward_to_go", "discount", discount)
    check_flag("reward_to_go", "discount_from_start", discount_from_start)
    tokens = _Tokens.read("reward_to_go", cu_seqlens, rewards=rewards, mask=mask)
    live = tokens.live
    r = torch.where(live, tokens.rows(_floating(rewards)), 0.0)
    links = torch.full_like(r, discount).masked_fill(~live, 1.0)[:, :-1]
    out = backward_scan(r, links.masked_fill(tokens.first[:, 1:] != tokens.first[:, :-1], 0.0))
    if baseline is not None:
        out = out - tokens.baseline("reward_to_go", baseline)
    if discount_from_start:
        before = live.cumsum(-1) - live.to(torch.int64)  # live tokens of the row; those of its sequence are wanted
        out = out * discount ** (before - before.gather(-1, tokens.first)).to(r.dtype)
    return torch.where(live, out, 0.0).view(rewards.shape)


def n_step(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, steps: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return n-step returns Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n}: (B, T) -> (B, T), 0 where masked.

    Time counts live tokens; V beyond the last live token is 0, so ``steps`` >= T gives Monte-Carlo returns.
    Subtract ``values`` for an advantage (Sutton & Barto 2018, ch. 7). ``cu_seqlens``: packed, as in ``reward_to_go``.
    """
    discount, count = _read_share("n_step", "discount", discount), read_integer(steps)
    if count is None or count < 1:
        fail("n_step", "an integer steps >= 1", shown(steps))
    tokens = _Tokens.read("n_step", cu_seqlens, rewards=rewards, values=values, mask=mask)
    line = _Line.of(tokens, _floating(rewards), _floating(values))
    r, v = line.columns
    out = r.to(torch.promote_types(r.dtype, v.dtype), copy=True)
    for k in range(1, min(count, r.shape[-1])):
        out += discount**k * line.ahead(r, k)
    if count < r.shape[-1]:
        out += discount**count * line.ahead(v, count)
    return line.spread(out).view(rewards.shape)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    discount: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T), by generalised advantage estimation.

    Schulman et al. 2016, arXiv:1506.02438:

    δ_t = r_t + γ V_{t+1} - V_t, A_t = Σ_k (γλ)^k δ_{t+k}, returns = A + V. Time counts live tokens, V after the
    last one is 0 (the episode ends there); both outputs are 0 where masked. ``cu_seqlens``: packed, as in
    ``reward_to_go``.
    """
    discount, lam = _read_share("gae", "discount", discount), _read_share("gae", "lam", lam)
    tokens = _Tokens.read("gae", cu_seqlens, rewards=rewards, values=values, mask=mask)
    line = _Line.of(tokens, _floating(rewards), _floating(values))
    r, v = line.columns
    delta = r + discount * line.ahead(v, 1) - v
    links = torch.full_like(delta[:, 1:], discount * lam)
    advantages = backward_scan(delta, links.masked_fill(line.first[:, 1:] != line.first[:, :-1], 0.0))
    outputs = (line.spread(columns).view(rewards.shape) for columns in (advantages, advantages + v))
    return next(outputs), next(outputs)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return PPO's clipped value loss, the mean over live tokens of ½·max((V-R)², (V_clip-R)²); (B, T) -> 0-d.

    V_clip = V_old + clamp(V - V_old, ±clip) (Schulman et al. 2017; Huang et al. 2022, "The 37 implementation details
    of PPO"). ``clip=None`` leaves the clip out. Differentiable in ``values``; an all-masked batch gives 0.
    ``cu_seqlens``: packed, (N,) or (1, N).
    """
    named = {"values": values, "old_values": old_values, "returns": returns, "mask": mask}
    if clip is not None:
        number = check_scalar("value_loss", "clip", clip)
        if number is not None and number < 0:
            fail("value_loss", "clip >= 0, or None to leave it out", shown(clip))
    tokens = _Tokens.read("value_loss", cu_seqlens, **named)
    live = tokens.live
    values = torch.where(live, tokens.rows(_wide(values)), 0.0)
    returns = torch.where(live, tokens.rows(_floating(returns)), 0.0)
    losses = (values - returns) ** 2
    if clip is not None:
        bound = as_float(clip)
        old = torch.where(live, tokens.rows(_floating(old_values)), 0.0)
        losses = torch.maximum(losses, (old + (values - old).clamp(-bound, bound) - returns) ** 2)
    return 0.5 * losses.sum() / live.sum().clamp(min=1)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a call in rows, (B, T), a packed batch as one row."""

    live: Tensor
    """bool"""
    first: Tensor
    """The place in its row at which each token's sequence begins, int64."""
    sequences: Sequences
    shape: torch.Size
    """The shape of the user's tensors."""

    @classmethod
    def read(cls, function: str, cu_seqlens: Tensor | None, **tensors: Tensor) -> _Tokens:
        """Read a call's tensors, of one shape, one of them the ``mask``. Raise where they do not fit together."""
        check_tensors(function, {**tensors, "cu_seqlens": cu_seqlens}, needed=tensors)
        mask, shape = tensors["mask"], tensors["mask"].shape
        fitting = len(shape) == 2 if cu_seqlens is None else shape in ((mask.numel(),), (1, mask.numel()))
        if not fitting or any(tensor.shape != shape for tensor in tensors.values()):
            wanted = "(B, T)" if cu_seqlens is None else "(N,) or (1, N) with cu_seqlens"
            got = ", ".join(str(tuple(tensor.shape)) for tensor in tensors.values())
            fail(function, f"{', '.join(tensors)} of one shape {wanted}", got, tensors)
        live = read_mask(function, mask, tensors)
        if cu_seqlens is None:
            return cls(live, torch.zeros_like(live, dtype=torch.int64), Padded(shape[0]), shape)
        count = mask.numel()
        packed = Packed.read(function, cu_seqlens, count, {**tensors, "cu_seqlens": cu_seqlens})
        first = packed.expand(packed.cu_seqlens[:-1].clamp(max=max(count - 1, 0)))  # of an empty last one: any
        return cls(live.view(1, count) & packed.inside(), first, packed, shape)

    def rows(self, values: Tensor) -> Tensor:
        return values.reshape(self.live.shape)

    def baseline(self, function: str, baseline: float | Tensor) -> float | Tensor:
        """Return a user's baseline, broadcastable to the rows."""
        if not isinstance(baseline, Tensor):
            return read_scalar(function, "baseline", baseline)
        baseline, count = _floating(baseline), self.sequences.count
        if baseline.dim() == 0:
            return baseline
        per_token = (tuple(self.shape), tuple(self.live.shape))
        per_sequence = ((count, 1),) if isinstance(self.sequences, Padded) else ((count, 1), (count,))
        check_shape(function, "baseline", baseline, (*per_token, *per_sequence), {"baseline": baseline})
        if baseline.shape in per_sequence and baseline.shape != self.live.shape:
            return self.sequences.expand(baseline.reshape(count))
        return self.rows(baseline)


@dataclass(frozen=True)
class _Line:
    """The live tokens of each row moved to the left, in order: time counts those alone."""

    live: Tensor
    order: Tensor
    """The columns of a row in their new order, int64 (B, T): live ones first."""
    first: Tensor
    """The place at which each token's sequence begins, -1 behind the last live one."""
    columns: tuple[Tensor, ...]
    """The tensors that it was made of, moved likewise; 0 behind the last live token."""

    @classmethod
    def of(cls, tokens: _Tokens, *tensors: Tensor) -> _Line:
        order = torch.sort(~tokens.live, dim=-1, stable=True).indices
        columns = (torch.where(tokens.live, tokens.rows(tensor), 0.0).gather(-1, order) for tensor in tensors)
        first = torch.where(tokens.live, tokens.first, -1).gather(-1, order)
        return cls(tokens.live, order, first, tuple(columns))

    def ahead(self, values: Tensor, steps: int) -> Tensor:
        """Return at each token the value ``steps`` later, 0 where its sequence has ended."""
        out = torch.zeros_like(values)
        same = self.first[:, steps:] == self.first[:, :-steps]
        out[:, :-steps] = torch.where(same, values[:, steps:], 0.0)
        return out

    def spread(self, values: Tensor) -> Tensor:
        """Move values back to where their tokens were, 0 where nothing is live."""
        return torch.where(self.live, torch.zeros_like(values).scatter(-1, self.order, values), 0.0)


def _groups(function: str, rewards: Tensor, group_size: int) -> Tensor:
    check_tensors(function, {"rewards": rewards}, needed=("rewards",))
    size = read_integer(group_size)
    if size is None:
        fail(function, "group_size to be an integer", repr(group_size), error=TypeError)
    if rewards.dim() != 1 or size < 1 or rewards.shape[0] % size:
        expected = f"rewards (B,) with B a multiple of group_size {shown(size)}"
        fail(function, expected, f"shape {tuple(rewards.shape)}", {"rewards": rewards})
    return _floating(rewards).view(-1, size)


def _floating(values: Tensor) -> Tensor:
    """Return rewards, values or lengths without gradient, in fp32 at least: what is added, or multiplied again and
    again, in bf16 loses a discount of 0.999 whole. Integers in the default float type, if that is wider."""
    return _wide(values.detach())


def _wide(values: Tensor) -> Tensor:
    """As ``_floating``, with their gradient."""
    if values.is_complex():
        raise TypeError(f"rewards, values, baselines and lengths are real numbers; got {values.dtype}.")
    dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
    return values.to(torch.promote_types(dtype, torch.float32))


def _centered(groups: Tensor) -> Tensor:
    """Return R_i - mean of its row, 0 where all are the same: their mean is rounded, and an optimiser that normalises
    its steps, as Adam does, makes whole ones of 6e-8."""
    return torch.where(_constant(groups), 0.0, groups - groups.mean(-1, keepdim=True))


def _constant(groups: Tensor) -> Tensor:
    """Return, bool (G, 1), whether all rewards of a group are the same."""
    return (groups == groups[:, :1]).all(-1, keepdim=True)


def _read_share(function: str, name: str, value: float) -> float:
    """Return a number to compute with. Raise unless it is in [0, 1]."""
    number = check_scalar(function, name, value)
    if number is not None and not 0 <= number <= 1:
        fail(function, f"{name} in [0, 1]", shown(value))
    return as_float(value)
