"""What other systems' losses and operators are compared on, and how close ours must come."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import torch

B, T = 6, 11
KINDS = (
    *("ragged", "holes", "empty sequences", "on-policy", "zero advantages", "per-token advantages", "far"),
    *("far sequences", "nothing"),
)
"""Of batches: which tokens there are, and how far the policy is from the old one."""


def batch(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probs, old ones, the sampler's, advantages, mask and weights of (B, T) tokens, fp64."""
    draw = torch.Generator("cpu").manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    lengths = torch.tensor([11, 5, 7, 1, 3, 9])
    mask = torch.arange(T) < lengths[:, None]
    log_prob = -0.01 - 6 * torch.rand(B, T, generator=draw, dtype=torch.float64)
    old, advantages = log_prob + 0.4 * randn(B, T), randn(B, 1).expand(B, T).clone()
    if kind == "holes":
        mask &= torch.rand(B, T, generator=draw) < 0.6
    if kind == "empty sequences":
        mask[1:3] = False
    if kind == "nothing":
        mask[:] = False
    if kind == "on-policy":
        old = log_prob.clone()
    if kind == "zero advantages":
        advantages[::2] = 0
    if kind == "per-token advantages":
        advantages = randn(B, T)
    if kind == "far":
        old = log_prob + 12 * randn(B, T)
    if kind == "far sequences":
        old = log_prob - torch.tensor([15.0, -15.0, 12.0, 30.0, 0.1, 8.0], dtype=torch.float64)[:, None]
        advantages = advantages.abs() * torch.tensor([-1.0, 1, -1, 1, -1, -1], dtype=torch.float64)[:, None]
    weights = 2 * torch.rand(B, T, generator=draw, dtype=torch.float64)
    weights[0, 0] = 0
    rollout = old + 0.5 * randn(B, T)
    return dict(log_prob=log_prob, old=old, rollout=rollout, advantages=advantages, mask=mask, weights=weights)


def cast(known: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in known.items()}


def close(mine: torch.Tensor, theirs: torch.Tensor, scale) -> None:
    """Within 1e-5 of a size."""
    torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5 * max(float(scale), 1e-3))


def close_losses(mine, theirs) -> None:
    """Two pairs of a loss and its gradient, ours in fp32 beside theirs in fp64; a loss is as exact as its terms."""
    close(mine[0], theirs[0], max(theirs[0].abs(), theirs[1].abs().sum()))
    close(mine[1], theirs[1], theirs[1].abs().max())


def with_garbage(known: dict[str, torch.Tensor], garbage: float) -> dict[str, torch.Tensor]:
    """The batch with ``garbage`` wherever the mask is 0."""
    return {name: value if name == "mask" else torch.where(known["mask"], value, garbage)
            for name, value in known.items()}  # fmt: skip


def rows(kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, whose first column is impossible where ``kind`` says so."""
    draw = torch.Generator("cpu").manual_seed(1)
    shape = {"packed": (17, 90), "padded": (3, 6, 90), "one row": (1, 90), "masked columns": (17, 90)}[kind]
    logits = 3 * torch.randn(shape, generator=draw)
    labels = torch.randint(1, 90, shape[:-1], generator=draw)
    if kind == "masked columns":
        logits[:, ::3] = -math.inf
        labels = labels // 3 * 3 + 1
    return logits.to(dtype), labels


def gradient_of(function, logits):
    """Values of a function of logits, and the gradient of a weighted sum of them."""
    leaf = logits.clone().requires_grad_()
    values = function(leaf * 1.0)
    weights = torch.linspace(-1, 2, values.numel()).view(values.shape)
    return values.detach(), torch.autograd.grad((values * weights.to(values.dtype)).sum(), leaf)[0]


def tolerance_of(dtype: torch.dtype) -> dict[str, float]:
    """Of values and gradients of logits of that dtype: a gradient is rounded to it."""
    return dict(rtol=2**-8, atol=1e-5) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)


def model():
    """A tiny causal model of transformers."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, vocab_size=120, max_position_embeddings=64, attn_implementation="sdpa")
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **more))


def assert_shadow_sees_rounding(caplog, whose: str) -> None:
    """Assert that one comparison was logged, with a system's own loss, and that it says rounding."""
    lines = [record for record in caplog.records if record.name == "grpo_kernels.shadow"]
    assert [record.levelname for record in lines] == ["INFO"], [record.message for record in lines]
    assert f"({whose})" in lines[0].message


def with_gradients(function, known: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A loss of log-probs and entropies, and its gradients in both."""
    leaves = [known["log_prob"].clone().requires_grad_(), known["log_prob"].abs().requires_grad_()]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def last_line_in_ray(system: str, code: str) -> str:
    """What code printed last, in a process whose Ray workers patch a system."""
    environment = {**os.environ, "RAY_RUNTIME_ENV_HOOK": f"grpo_kernels.integrations.ray_plugin.{system}"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, capture_output=True, env=environment, check=True, text=True)
    return found.stdout.splitlines()[-1]
