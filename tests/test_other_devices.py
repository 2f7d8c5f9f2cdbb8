"""Devices that no machine of ours has: a call asks for operators that PyTorch lists for Apple's GPUs alone, and for no
fp64, which those have not; what takes the place of a missing operator has its results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_kernels import (
    Divergence,
    LossConfig,
    Recorded,
    Teacher,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    policy_loss,
    token_log_probs,
)
from grpo_kernels.objectives import compiler, sequences

KERNELS = {"MPS", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
B, T, V, H = 3, 5, 40, 8


@pytest.fixture(scope="module")
def listed():
    """Whether an operator, ``name.overload``, has a kernel on Apple's GPUs, by PyTorch's own list."""
    torchgen = pytest.importorskip("torchgen")
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(path.read_text())}

    def has_kernel(name: str) -> bool:
        entry = entries[name]
        entry = entries[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        dispatch = entry.get("dispatch")
        keys = {key.strip() for group in dispatch or ("CompositeImplicitAutograd",) for key in group.split(",")}
        return bool(keys & KERNELS)

    return has_kernel


class Asked(TorchDispatchMode):
    """The operators of PyTorch's that run, those inside of ours too, and whether one made fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.doubles: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("grpo_kernels"):
            with self:
                return compiler.IMPLEMENTATIONS[func._opname](*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        self.names.add(name.removeprefix("aten::"))
        if any(getattr(one, "dtype", None) == torch.float64 for one in tree_leaves(out)):
            self.doubles.add(name)
        return out


@pytest.fixture
def elsewhere(monkeypatch):
    """The decisions that a call takes on a device which is neither a CPU nor a CUDA GPU, and has no fp64."""
    monkeypatch.setattr(sequences, "_COMPLETE", ())
    monkeypatch.setattr(sequences, "_SINGLE", ("cpu",))


class Batch:
    def __init__(self, dtype: torch.dtype, packed: bool) -> None:
        torch.manual_seed(0)
        lead = (B * T,) if packed else (B, T)
        self.logits = torch.randn(*lead, V, dtype=dtype, requires_grad=True)
        self.hidden = torch.randn(*lead, H, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
        self.ids = torch.randint(V, lead)
        self.mask = (torch.arange(B * T) % 4 != 1).view(lead)
        self.old = torch.full(lead, -3.5)
        self.cu = torch.tensor([0, 2, 9, B * T]) if packed else None
        self.teacher = torch.randn(*lead, V, dtype=dtype)
        self.common = {"mask": self.mask, "cu_seqlens": self.cu, "backend": "torch"}
        self.of_loss = {**self.common, "old_log_probs": self.old}
        self.advantages = torch.tensor([1.0, -2.0, 0.5])

    def loss(self, **options):
        return grpo_loss(self.logits, self.ids, self.advantages, **{**self.of_loss, **options}).loss

    def linear(self, **options):
        return linear_grpo_loss(self.hidden, self.weight, self.ids, self.advantages, **{**self.of_loss, **options}).loss


def recorded(batch: Batch) -> torch.Tensor:
    ids = torch.stack([batch.ids[batch.mask], (batch.ids[batch.mask] + 1) % V], -1).flatten()
    support = Recorded.from_counts(ids, torch.full((int(batch.mask.sum()),), 2), batch.mask)
    return batch.linear(support=support)


CALLS = {
    "logits": lambda batch: batch.loss(),
    "sequences": lambda batch: batch.loss(config="gspo"),
    "bounds over sequences": lambda batch: batch.loss(config=LossConfig.preset("dapo", level="prefix_min")),
    "divergence": lambda batch: batch.loss(
        teacher=Teacher(logits=batch.teacher), config=LossConfig(divergence=Divergence("reverse_kl", coef=0.1))
    ),
    "hidden states": lambda batch: batch.linear(),
    "hidden states, sequences": lambda batch: batch.linear(config="gspo"),
    "hidden states, counted before": lambda batch: batch.linear(live_tokens=12),
    "recorded": recorded,
    "log-probs": lambda batch: token_log_probs(batch.logits, batch.ids, batch.mask, backend="torch").log_probs.sum(),
    "log-probs of hidden states": lambda batch: linear_token_log_probs(
        batch.hidden, batch.weight, batch.ids, batch.mask, backend="torch"
    ).log_probs.sum(),
    "policy": lambda batch: policy_loss(batch.logits.amax(-1).float(), batch.advantages, **batch.of_loss).loss,
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_operators_of_apples_gpus_are_enough(elsewhere, listed, call, dtype, packed):
    batch = Batch(dtype, packed)
    with Asked() as asked:
        CALLS[call](batch).backward()
    assert len(asked.names) > 10
    assert not {name for name in asked.names if not listed(name)}
    assert not asked.doubles


def test_the_list_tells_what_is_missing(listed):
    assert listed("searchsorted.Tensor")
    assert listed("index_add_")
    assert not listed("segment_reduce")
    assert not listed("mm.dtype")


@pytest.mark.parametrize("call", CALLS)
def test_what_takes_a_missing_operators_place_has_its_results(monkeypatch, call):
    found = []
    for complete in (("cpu",), ()):
        monkeypatch.setattr(sequences, "_COMPLETE", complete)
        batch = Batch(torch.float32, True)
        loss = CALLS[call](batch)
        loss.backward()
        gradients = [tensor.grad for tensor in (batch.logits, batch.hidden, batch.weight) if tensor.grad is not None]
        found.append((loss.detach(), *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offsets", [[0, 0, 3, 3, 5], [0, 5], [0, 0], [0], [2, 3, 3, 4], [5, 5]])
def test_segments(monkeypatch, offsets):
    """Empty ones too, at both ends; values before the first offset and behind the last have no part."""
    values, offsets = torch.tensor([1.0, -2.0, 4.0, -8.0, 16.0]), torch.tensor(offsets)
    pairs = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    monkeypatch.setattr(sequences, "_COMPLETE", ())
    assert sequences.segment_sum(values, offsets).tolist() == [values[a:b].sum().item() for a, b in pairs]
    largest = [max(values[a:b].tolist(), default=float("-inf")) for a, b in pairs]
    assert sequences.segment_max(values, offsets).tolist() == largest
    assert sequences.segment_sum(values[:, None] * torch.ones(2), offsets).shape == (len(pairs), 2)
