"""The package calls no operator that CUDA refuses under torch.use_deterministic_algorithms(True): what it runs is
looked at operator by operator, on a CPU, which refuses none of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import label, make
from test_zero_weights import every_config, with_everything
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import Recorded, TopK, TopP, linear_grpo_loss, token_log_probs
from grpo_kernels.backends import eager as plain
from grpo_kernels.calls import recorded_head
from grpo_kernels.objectives import advantages
from grpo_kernels.objectives.compiler import IMPLEMENTATIONS
from grpo_kernels.verification import reference

aten = torch.ops.aten
REFUSED = (
    *(aten.median.dim, aten.nanmedian.dim, aten.kthvalue, aten.histc, aten.put, aten.put_),
    *(aten.nll_loss_forward, aten.nll_loss2d_forward),
)
"""Of torch.use_deterministic_algorithms' list, what a loss could call; below, those that some arguments save."""


class OnCuda(TorchDispatchMode):
    """Raises where CUDA would."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | (
            kwargs or {}
        )
        refused = function in REFUSED or function.overloadpacket in REFUSED
        if function.overloadpacket in (aten.cumsum, aten.cumsum_):
            refused = (named.get("dtype") or args[0].dtype).is_floating_point
        elif function.overloadpacket is aten.bincount:
            refused = named.get("weights") is not None
        elif function.overloadpacket in (aten.scatter_reduce, aten.scatter_reduce_):
            refused = named["reduce"] == "prod"
        if refused:
            raise RuntimeError(f"{function} has no deterministic implementation on CUDA")
        if function.namespace == "grpo_kernels":  # what it does inside counts
            with self:
                return IMPLEMENTATIONS[function._schema.name.split("::")[1]](*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def packed(case):
    """The same tokens as two sequences of a packed batch."""
    case.options["cu_seqlens"] = torch.tensor([0, 9, case.mask.numel()])
    case.logits = case.logits[:, : case.mask.shape[1]].flatten(0, 1)
    for name, tensor in case.options.items():
        if isinstance(tensor, torch.Tensor) and tensor.shape == case.mask.shape:
            case.options[name] = tensor.flatten()
    case.token_ids, case.mask = case.token_ids.flatten(), case.mask.flatten()
    case.advantages = case.advantages.flatten()
    return case


@pytest.mark.parametrize("config", every_config(), ids=label)
def test_losses(config):
    """Padded and packed, of logits and of hidden states, with its gradient, metrics and reference."""
    padded = with_everything(config)
    for case in (padded, packed(with_everything(dataclasses.replace(config, group_size=1)))):
        hidden = torch.randn(*case.logits.shape[:-1], 5, requires_grad=True)
        weight = torch.randn(case.logits.shape[-1], 5, requires_grad=True)
        with OnCuda():
            out, _ = case.run("torch")
            out.metrics.as_dict()
            linear = linear_grpo_loss(
                hidden, weight, *case.arguments, chunk_bytes=8000, backend="torch", **case.options
            )
            linear.loss.backward()
    options = {name: value for name, value in padded.options.items() if name != "grad_scale"}
    with OnCuda():
        reference.grpo_loss(padded.logits.requires_grad_(), *padded.arguments, **options).loss.backward()


@pytest.mark.parametrize("support", [TopK(5), TopP(0.8), (TopK(20), TopP(0.9))], ids=str)
def test_log_probs_over_a_support(support):
    case = make()
    with OnCuda():
        token_log_probs(case.logits, case.token_ids, case.mask, support=support, backend="torch")


@pytest.mark.parametrize("share", [0, 1 << 40])
def test_recorded_sets(share, monkeypatch):
    """Of logits, and of hidden states by both ways; in segments, as where ``index_add_`` has no order."""
    monkeypatch.setitem(recorded_head.SHARES, "cpu", share)
    monkeypatch.setattr(recorded_head, "add_sorted_", recorded_head.add_segments_)
    case = make()
    counts = 2 * (torch.rand(case.token_ids.shape) < 0.7).long()
    pairs = torch.stack([case.token_ids, (case.token_ids + 1) % 97], -1)
    options = {"support": Recorded.from_counts(pairs[counts > 0].flatten(), counts), "backend": "torch"}
    hidden = torch.randn(*case.logits.shape[:-1], 5, requires_grad=True)
    weight = torch.randn(97, 5, requires_grad=True)
    with OnCuda():
        case.run(**options)
        linear_grpo_loss(hidden, weight, *case.arguments, **options, **case.options).loss.backward()


def test_advantages():
    rewards, values, mask = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6) < 0.7
    with OnCuda():
        for estimate in (advantages.group_centered, advantages.group_normalized, advantages.leave_one_out):
            estimate(rewards[:, 0], 2)
        advantages.centered(rewards)
        for bounds in ({}, {"cu_seqlens": torch.tensor([0, 10, 24])}):
            tensors = [x.flatten() if bounds else x for x in (rewards, values, mask)]
            advantages.reward_to_go(tensors[0], tensors[2], 0.9, **bounds)
            advantages.n_step(*tensors, 0.9, 2, **bounds)
            advantages.gae(*tensors, 0.9, 0.9, **bounds)


def test_what_cuda_would_refuse():
    """The guard guards."""
    x = torch.rand(3, 4)
    with OnCuda():
        x.long().cumsum(-1)
        x.median()
        for call in (lambda: x.cumsum(-1), lambda: x.median(-1), lambda: x.long().cumsum(-1, dtype=torch.float32)):
            with pytest.raises(RuntimeError, match="no deterministic implementation"):
                call()


def test_what_an_operator_of_this_package_does_is_looked_at(monkeypatch):
    monkeypatch.setattr(plain, "token_sums", lambda values, *rest: values.log_prob.cumsum(-1))
    with OnCuda(), pytest.raises(RuntimeError, match="cumsum.* has no deterministic implementation"):
        make().run("torch")
