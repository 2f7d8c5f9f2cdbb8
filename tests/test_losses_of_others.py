"""What losses of others are, by comparison with the reference: match is judged by truths that are true."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from losses_of_others import Batch, Truth, broken, seen, unseen
from torch import Tensor

from grpo_kernels.verification import reference

V = 13
LENGTHS = 8 * (6, 3, 0, 1, 5, 6, 2, 4, 7, 5, 7, 6)
SPREADS = (1e-3, 0.2, 0.4, 0.8, 1.5)
"""Of the noise that makes old, reference and sampler's logits: ratios around every bound from GSPO's to 5."""
FAR = ((8.0, 0.5), (0.2, 8.0))
"""Log-ratios beyond 20 to the old policy and the sampler, then to the reference: spreads of the two."""

NAMES = {
    "log_probs": ("lp", "logps", "logprobs", "log_probs", "log_prob", "per_token_logps"),
    "old_log_probs": (
        *("old", "old_logps", "old_logprobs", "old_log_probs", "old_log_prob", "old_per_token_logps"),
    ),
    "ref_log_probs": ("ref", "ref_logps", "ref_log_probs"),
    "rollout_log_probs": ("rollout_log_probs", "sampling_logps"),
    "advantages": ("A", "adv", "advantages"),
    "mask": ("mask", "response_mask", "completion_mask", "loss_mask", "padding_mask"),
    "token_ids": ("token_ids", "input_ids"),
    "logits": ("logits",),
    "entropy": ("entropy",),
    "labels": ("labels",),
    "num_items": ("num_items_in_batch",),
}  # fmt: skip
ROLES = {name: role for role, names in NAMES.items() for name in names}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are small: threads would wait for each other longer than they add."""
    torch.set_num_threads(1)


@functools.cache
def batch_of(spread: float, advantages: str, ref_spread: float | None = None) -> Batch:
    generator = torch.Generator().manual_seed(int(1000 * spread))
    B, T = len(LENGTHS), max(LENGTHS)
    logits, *noises = torch.randn(4, B, T + 1, V, generator=generator, dtype=torch.float64)
    logits *= 0.5 + 3 * torch.rand(B, T + 1, 1, generator=generator, dtype=torch.float64)  # sure and unsure rows
    token_ids = torch.randint(V, (B, T), generator=generator)
    log_p = torch.log_softmax(logits[:, :T], -1)

    def noisy(noise: Tensor, spread: float = spread) -> Tensor:
        return torch.log_softmax(logits + spread * noise, -1)[:, :T].gather(-1, token_ids[..., None]).squeeze(-1)

    A = torch.randn(B, T, generator=generator, dtype=torch.float64)
    A[:, 0] = A[:, 0].abs() * torch.tensor([1, -1]).repeat(B // 2)
    A[1], A[4], A[9] = 0.0, 7.0, -6.0
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[4, 2] = False
    given = A if advantages == "token" else A[:, 0]
    old, ref, rollout = noises
    others = (noisy(old), noisy(ref, spread if ref_spread is None else ref_spread), noisy(rollout))
    return Batch(logits, token_ids, mask, *others, given, -(log_p.exp() * log_p).sum(-1))


def handed(loss: Callable[..., Any], truth: Truth, batch: Batch, logits: Tensor) -> dict[str, Any]:
    """Every argument of a loss, by its own names; log-probs and entropy are differentiable in the logits."""
    T = batch.mask.shape[1]
    log_p = torch.log_softmax(logits[:, :T], -1)
    ids, mask, rows = batch.token_ids, batch.mask.to(truth.mask), logits
    labels = torch.where(batch.mask, ids, -100)
    if truth.layout == "unshifted":
        ids, mask, labels = (torch.nn.functional.pad(x, (1, 0)) for x in (ids, mask, labels))
    else:
        rows = logits[:, :T]
    values = {
        "log_probs": log_p.gather(-1, batch.token_ids[..., None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logits": rows, "token_ids": ids, "mask": mask, "labels": labels, "advantages": batch.advantages,
        "old_log_probs": batch.old, "ref_log_probs": batch.ref, "rollout_log_probs": batch.rollout,
    }  # fmt: skip
    if truth.layout == "flat":
        values = {name: value.flatten() for name, value in values.items()}
    values["num_items"] = batch.items
    names = list(inspect.signature(loss).parameters)
    return {"batch": values} if names == ["batch"] else {name: values[ROLES[name]] for name in names}


def theirs(loss: Callable[..., Any], truth: Truth, batch: Batch) -> tuple[Tensor, Tensor]:
    leaf = batch.logits.clone().requires_grad_()
    value = loss(**handed(loss, truth, batch, leaf))
    value = value["loss"] if isinstance(value, Mapping) else value
    return value.detach().double(), torch.autograd.grad(value, leaf)[0]


def ours(config: Any, truth: Truth, batch: Batch, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = batch.logits.clone().requires_grad_()
    rollout = {"rollout_log_probs": batch.rollout} if config.rollout else {}
    arguments: dict[str, Any] = {"advantages": batch.advantages, "mask": batch.mask, "old_log_probs": batch.old}
    arguments |= {"ref_log_probs": batch.ref} | rollout | dict(given)
    value = truth.factor * reference.grpo_loss(leaf, batch.token_ids, config=config, **arguments).loss
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def differences(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], rounds: float = 1e-9) -> tuple[float, float]:
    """Relative difference of the values, and of the gradients: the largest of a row, relative to that row's largest.

    Rows below 1e-6 of the batch's largest, or below what the loss rounds to, are compared with that.
    """
    (value, gradient), (known, wanted) = one, other
    sizes = torch.maximum(gradient.abs().amax(-1), wanted.abs().amax(-1))
    by_row = (gradient - wanted).abs().amax(-1) / sizes.clamp(min=max(1e-6, rounds) * float(sizes.max()) + 1e-30)
    return float((value - known).abs() / torch.maximum(value.abs(), known.abs()).clamp(min=1e-30)), float(by_row.max())


EVERY = {loss: truth for module in (seen, unseen) for loss, truth in module.LOSSES.items()}


def name_of(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("loss", EVERY, ids=name_of)
def test_the_truth_is_true(loss):
    truth = EVERY[loss]
    batches = [batch_of(spread, truth.advantages) for spread in SPREADS]
    if truth.far:
        batches += [batch_of(spread, truth.advantages, ref_spread) for spread, ref_spread in FAR]
    found = [theirs(loss, truth, batch) for batch in batches]
    for batch, (value, gradient) in zip(batches, found, strict=True):
        assert value.isfinite()
        assert gradient.isfinite().all()
        if truth.proven:
            known = ours(truth.config, truth, batch, truth.given(batch))
            assert max(differences((value, gradient), known, truth.rounds)) <= truth.rounds
    other = truth.looks_like if truth.looks_like is not None else truth.config
    assert other is not None
    if truth.looks_like is None and (truth.is_config or truth.factor != 1.0):
        return
    near = zip(batches[: len(SPREADS)], found, strict=False)
    apart = [differences(one, ours(other, truth, batch, {})) for batch, one in near]
    assert max(value if truth.gradient_alone else max(value, slope) for value, slope in apart) > 1e-3
    assert not truth.gradient_alone or max(slope for value, slope in apart) < 1e-9


@pytest.mark.parametrize("module", [seen, unseen], ids=name_of)
def test_every_loss_has_a_truth(module):
    public = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    assert {loss.__name__ for loss in module.LOSSES} == {name for name in public if not name.startswith("_")}


def test_no_loss_is_in_both():
    assert not {loss.__name__ for loss in seen.LOSSES} & {loss.__name__ for loss in unseen.LOSSES}


def function_of(given: broken.Given, folder: Any) -> Callable[..., Any]:
    """The function itself, or that of a file which is run as an import would run it."""
    if callable(given.loss):
        return given.loss
    path = folder / "file_of_others.py"
    path.write_text(given.loss)
    loss: Callable[..., Any] = runpy.run_path(str(path), run_name="file_of_others")["loss"]
    return loss


WORKS = Truth("C")


@pytest.mark.parametrize("name", broken.GIVEN)
def test_the_broken_are_broken(name, tmp_path, monkeypatch, capsys):
    given, batch = broken.GIVEN[name], batch_of(0.2, "sequence")
    monkeypatch.setattr("sys.argv", ["match"])
    if given.does == "variadic":
        kinds = {parameter.kind.name for parameter in inspect.signature(given.loss).parameters.values()}
        assert kinds <= {"VAR_KEYWORD", "VAR_POSITIONAL"}
    elif given.does == "raises":
        with pytest.raises((Exception, SystemExit)):
            theirs(function_of(given, tmp_path), WORKS, batch)
    elif given.does == "no scalar":
        value = given.loss(**handed(given.loss, WORKS, batch, batch.logits.clone().requires_grad_()))
        assert not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad)
    elif given.does == "differs":
        one, other = (theirs(given.loss, WORKS, batch)[0] for _ in range(2))
        assert one != other
    elif given.does == "not finite":
        assert not theirs(given.loss, WORKS, batch)[0].isfinite()
    else:
        copy = dataclasses.replace(batch, **{name: getattr(batch, name).clone() for name in ("old", "advantages")})
        found = theirs(function_of(given, tmp_path), WORKS, copy)
        assert max(differences(found, ours(given.config, WORKS, batch, {}))) <= WORKS.rounds
    assert name != "prints" or len(capsys.readouterr().out) > 1000
