"""Advantages: from rewards to the A of the loss. Plain PyTorch on (B,) or (B, T) tensors, no gradient.

Groups are consecutive sequences that answer one prompt: rewards (B,) with B = prompts * group_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_shape, fail, read_mask


def raw(rewards: Tensor) -> Tensor:
    """The rewards themselves, detached (REINFORCE without a baseline; Williams 1992)."""
    return rewards.detach()


def centered(rewards: Tensor) -> Tensor:
    """R_i - mean(R) over the batch (REINFORCE with a mean baseline). Shape of ``rewards``."""
    rewards = _floating(rewards)
    return rewards - rewards.mean()


def group_centered(rewards: Tensor, group_size: int) -> Tensor:
    """R_i - mean of its group (Dr. GRPO; Liu et al. 2025, arXiv:2503.20783). (B,) -> (B,)."""
    groups = _groups("group_centered", rewards, group_size)
    return (groups - groups.mean(-1, keepdim=True)).reshape(-1)


def group_normalized(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """(R_i - mean) / (std + eps) within its group, with the population std (GRPO; arXiv:2402.03300).

    TRL divides by the sample std and uses eps 1e-4. A group of equal rewards gives exact zeros.
    """
    groups = _groups("group_normalized", rewards, group_size)
    difference = groups - groups.mean(-1, keepdim=True)
    scaled = difference / (groups.std(-1, keepdim=True, correction=0) + eps)
    return torch.where(_constant(groups), 0.0, scaled).reshape(-1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """R_i - mean of the *other* rewards of its group (RLOO; Ahmadian et al. 2024, arXiv:2402.14740).

    Needs group_size >= 2; a group of equal rewards gives exact zeros.
    """
    groups = _groups("leave_one_out", rewards, group_size)
    if group_size < 2:
        fail("leave_one_out", "group_size >= 2", str(group_size))
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return torch.where(_constant(groups), 0.0, groups - others).reshape(-1)


def has_signal(rewards: Tensor, group_size: int) -> Tensor:
    """bool (B,): the sequence's group has unequal rewards, so some advantage is not 0 (DAPO's dynamic sampling)."""
    return (~_constant(_groups("has_signal", rewards, group_size))).expand(-1, group_size).reshape(-1)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft over-long penalty, to add to the reward (arXiv:2503.14476, eq. 13). (B,) lengths -> (B,) in [-1, 0].

    0 up to max_length - buffer, then linear down to -1 at max_length, -1 beyond.
    """
    if not 0 < buffer <= max_length:
        fail("overlong_penalty", "0 < buffer <= max_length", f"buffer={buffer}, max_length={max_length}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def reward_to_go(
    rewards: Tensor,
    mask: Tensor,
    discount: float = 1.0,
    baseline: Tensor | None = None,
    discount_from_start: bool = False,
) -> Tensor:
    """Σ_{u>=t} γ^(u-t) r_u - b_t for each token: (B, T) rewards -> (B, T), 0 where masked.

    Time counts live tokens: masked ones (tool output, padding) neither collect nor discount.

    Args:
        discount: γ in [0, 1].
        baseline: (B, T) or (B, 1), subtracted (it leaves the gradient unbiased if it does not depend on the action).
        discount_from_start: multiply by γ^(t-1) too, the exact gradient of the discounted objective; the usual form
            leaves it out (Nota & Thomas 2020, arXiv:1906.07073).
    """
    _check_unit("reward_to_go", "discount", discount)
    _check_tokens("reward_to_go", rewards=rewards, mask=mask)
    if baseline is not None:
        check_shape("reward_to_go", "baseline", baseline, (tuple(mask.shape), (mask.shape[0], 1)), {"mask": mask})
    live = read_mask("reward_to_go", mask, {"mask": mask})
    r = torch.where(live, _floating(rewards), 0.0)
    returns = _backward_scan(r, live, discount)
    out = returns if baseline is None else returns - baseline.detach()
    if discount_from_start:
        out = out * discount ** (live.to(r.dtype).cumsum(-1) - 1).clamp(min=0)
    return torch.where(live, out, 0.0)


def n_step(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, steps: int) -> Tensor:
    """n-step returns Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n}: (B, T) -> (B, T), 0 where masked.

    Time counts live tokens; V beyond the last live token is 0, so ``steps`` >= T gives Monte-Carlo returns.
    Subtract ``values`` for an advantage (Sutton & Barto 2018, ch. 7).
    """
    _check_unit("n_step", "discount", discount)
    if steps < 1:
        fail("n_step", "steps >= 1", str(steps))
    _check_tokens("n_step", rewards=rewards, values=values, mask=mask)
    live = read_mask("n_step", mask, {"mask": mask})
    order, r, v = _compact(live, _floating(rewards), values.detach())
    length = r.shape[-1]
    out = torch.zeros_like(r)
    for k in range(min(steps, length)):
        out[:, : length - k] += discount**k * r[:, k:]
    if steps < length:
        out[:, : length - steps] += discount**steps * v[:, steps:]
    return _uncompact(order, out, live)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438): advantages and returns, (B, T).

    δ_t = r_t + γ V_{t+1} - V_t, A_t = Σ_k (γλ)^k δ_{t+k}, returns = A + V. Time counts live tokens, V after the
    last one is 0 (the episode ends there); both outputs are 0 where masked.
    """
    _check_unit("gae", "discount", discount)
    _check_unit("gae", "lam", lam)
    _check_tokens("gae", rewards=rewards, values=values, mask=mask)
    live = read_mask("gae", mask, {"mask": mask})
    order, r, v = _compact(live, _floating(rewards), values.detach())
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], -1)
    delta = r + discount * following - v
    advantages = _backward_scan(delta, torch.ones_like(delta, dtype=torch.bool), discount * lam)
    return _uncompact(order, advantages, live), _uncompact(order, advantages + v, live)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2) -> Tensor:
    """PPO's clipped value loss, mean over live tokens of ½·max((V-R)², (V_clip-R)²); (B, T) tensors -> 0-d.

    V_clip = V_old + clamp(V - V_old, ±clip) (Schulman et al. 2017; Huang et al. 2022, "The 37 implementation details
    of PPO"). ``clip=None`` leaves the clip out. Differentiable in ``values``; an all-masked batch gives 0.
    """
    _check_tokens("value_loss", values=values, old_values=old_values, returns=returns, mask=mask)
    live = read_mask("value_loss", mask, {"mask": mask})
    values = torch.where(live, values, 0.0)
    returns = torch.where(live, returns.detach(), 0.0)
    losses = (values - returns) ** 2
    if clip is not None:
        old = torch.where(live, old_values.detach(), 0.0)
        losses = torch.maximum(losses, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * losses.sum() / live.sum().clamp(min=1)


def _groups(function: str, rewards: Tensor, group_size: int) -> Tensor:
    if rewards.dim() != 1 or group_size < 1 or rewards.shape[0] % group_size:
        expected = f"rewards (B,) with B a multiple of group_size {group_size}"
        fail(function, expected, f"shape {tuple(rewards.shape)}", {"rewards": rewards})
    return _floating(rewards).view(-1, group_size)


def _floating(rewards: Tensor) -> Tensor:
    """Detached; integer rewards as the default float type."""
    return rewards.detach() if rewards.is_floating_point() else rewards.detach().to(torch.get_default_dtype())


def _check_tokens(function: str, **tensors: Tensor) -> None:
    """All of one shape (B, T)."""
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        fail(function, f"{', '.join(tensors)} of one shape (B, T)", "others", tensors)


def _constant(groups: Tensor) -> Tensor:
    """(G, 1): all rewards of the group are the same."""
    return (groups == groups[:, :1]).all(-1, keepdim=True)


def _check_unit(function: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        fail(function, f"{name} in [0, 1]", repr(value))


def _backward_scan(values: Tensor, live: Tensor, decay: float) -> Tensor:
    """out_t = values_t + decay * out_{next live}: a scan from the right over (B, T)."""
    out = torch.zeros_like(values)
    carry = torch.zeros_like(values[:, 0]) if values.shape[-1] else values.sum(-1)
    for t in range(values.shape[-1] - 1, -1, -1):
        carry = torch.where(live[:, t], values[:, t] + decay * carry, carry)
        out[:, t] = carry
    return out


def _compact(live: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each row's live entries moved to the left, zeros behind, and the order that undoes it."""
    order = torch.sort(~live, dim=-1, stable=True).indices
    return order, *(torch.where(live, tensor, 0.0).gather(-1, order) for tensor in tensors)


def _uncompact(order: Tensor, values: Tensor, live: Tensor) -> Tensor:
    return torch.where(live, torch.zeros_like(values).scatter(-1, order, values), 0.0)
