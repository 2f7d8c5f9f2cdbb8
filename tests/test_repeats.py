"""One batch has one answer: the same bits a hundred times over, while threads come and go, in place or not, padded,
padded further, packed, in another order and each sequence by itself; on every backend and instruction set."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import INTERPRETED, Case, label, make, one_of_each
from conftest import usable_backends
from torch import Tensor

from grpo_kernels import Clip, LossConfig, grpo_loss, linear_grpo_loss, normalizer
from grpo_kernels.backends import cpu
from grpo_kernels.verification.verify import complete

VARIANTS = [
    (backend, name)
    for backend in usable_backends()
    for name in (cpu.available_instruction_sets() if backend == "cpu" else ("",))
]
"""Backends, and of the compiled one for CPUs the instruction sets that run here."""
SLOW = ("triton", "cuda") if INTERPRETED else ()
"""Interpreted and emulated: of a hundred repeats one in each form is run for every change."""
THREADS = (2, 1, 3, 8, 5)
"""Of PyTorch and of the compiled kernels, one after the other: their number has no divisor in common with FORMS'."""

Answer = dict[str, Tensor]
Call = Callable[..., Any]


def answer(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    """The loss, and what each row gave: log-prob, entropy, gradient."""
    leaf = logits.detach().clone().requires_grad_()
    out = call(leaf, **tensors)
    out.loss.backward()
    return {"loss": out.loss.detach(), "log_probs": out.log_probs, "entropy": out.entropy, "gradient": leaf.grad}


def padded(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    return answer(call, logits, tensors)


def in_place(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    return answer(lambda leaf, **rest: call(leaf * 1, inplace=True, **rest), logits, tensors)


def padded_further(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    """By three rows of NaN, which no mask counts."""
    batch, length, vocab = logits.shape
    nan = torch.full((batch, 3, vocab), float("nan"), dtype=logits.dtype)
    wider = {k: torch.cat([v, v[:, :3] * 0], 1) if _of_tokens(v, logits) else v for k, v in tensors.items()}
    found = answer(call, torch.cat([logits, nan], 1), wider)
    return {name: value if name == "loss" else value[:, :length] for name, value in found.items()}


def packed(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    """Without what is behind a sequence's last token that counts; of an empty one nothing is left."""
    mask = tensors["mask"]
    inside = mask.flip(1).cumsum(1).flip(1) > 0
    bounds = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))
    flat = {k: v[inside] if _of_tokens(v, logits) else v for k, v in tensors.items()}
    found = answer(call, logits[inside], {**flat, "cu_seqlens": bounds})
    rows = {name: logits.new_zeros(*inside.shape, *value.shape[1:], dtype=value.dtype) for name, value in found.items()}
    return {name: value if name == "loss" else _put(rows[name], inside, value) for name, value in found.items()}


def in_another_order(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    """Groups of two sequences stay groups."""
    order = torch.arange(len(logits)).view(-1, 2).flip(0).flatten()
    turned = {k: v[order] if isinstance(v, Tensor) else v for k, v in tensors.items()}
    found = answer(call, logits[order], turned)
    return {name: value[order] for name, value in found.items() if name != "loss"}  # a sum in another order


def alone(call: Call, logits: Tensor, tensors: dict[str, Any]) -> Answer:
    """One sequence at a time, or one group of them."""
    found, size = [], 2 if tensors["config"].weighting.name == "group_mean" else 1
    for i in range(0, len(logits), size):
        mine = {k: v[i : i + size] if isinstance(v, Tensor) else v for k, v in tensors.items()}
        found.append(answer(call, logits[i : i + size], mine))
    return {name: torch.cat([part[name] for part in found]) for name in found[0] if name != "loss"}


FORMS = (padded, in_place, padded_further, packed, in_another_order, alone)
SUMMED = {padded_further: ("loss",), packed: ("loss", "gradient")}
"""What has in these forms the bits of sums in another order where they are not rounded after: sums are of fp64, and so
are these calls. The gradient is that of pooled ratios."""


def _of_tokens(value: Any, logits: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == logits.shape[:2]


def _put(rows: Tensor, inside: Tensor, values: Tensor) -> Tensor:
    rows[inside] = values
    return rows


@contextlib.contextmanager
def company(work: Callable[[], Any], count: int) -> Iterator[None]:
    """Other threads that call meanwhile, until the block ends; what they raise is raised."""
    enough, raised = threading.Event(), []

    def run() -> None:
        try:
            while not enough.is_set():
                work()
        except Exception as error:
            raised.append(error)

    others = [threading.Thread(target=run) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        enough.set()
        for other in others:
            other.join()
    assert not raised, raised


def batch(config: LossConfig, dtype: torch.dtype, length: int, vocab: int) -> tuple[Tensor, dict[str, Any]]:
    case: Case = make(batch=6, length=length, vocab=vocab, dtype=dtype, extra_row=False)
    tensors = {"token_ids": case.token_ids, "advantages": case.advantages, "mask": case.mask, **case.options}
    known = {"config": config, "normalizer": normalizer(case.mask, config), "grad_scale": 1.0}
    if config.schemes or config.rollout_kl.coef:
        known["rollout_log_probs"] = case.options["old_log_probs"] + 0.1
    return case.logits, {**tensors, **known}


def check(backend: str, config: LossConfig, dtype: torch.dtype, repeats: int) -> None:
    """Repeat, each time in the next form with the next number of threads; every seventh beside two others."""
    alone_here = backend == "triton" and INTERPRETED  # the interpreter keeps its place in one global object
    slow = backend in SLOW
    logits, tensors = batch(config, dtype, *((6, 97) if slow else (16, 5000)))

    def call(leaf: Tensor, **options: Any) -> Any:
        return grpo_loss(leaf, backend=backend, **options)

    expected, of_its_layout = padded(call, logits, tensors), {}
    assert expected["gradient"].abs().sum() > 0
    for i, form, threads in zip(range(repeats), itertools.cycle(FORMS), itertools.cycle(THREADS), strict=False):
        torch.set_num_threads(threads)
        others = 0 if alone_here or i % 7 != 5 else 2
        with company(lambda: padded(call, logits, tensors), others):
            found = form(call, logits, tensors)
        for name, value in found.items():
            own = dtype == torch.float64 and name in SUMMED.get(form, ())
            wanted = of_its_layout.setdefault((form, name), value) if own else expected[name]
            assert torch.equal(value, wanted), (i, form.__name__, threads, name)


@pytest.fixture
def chosen(request, monkeypatch) -> str:
    """The backend of a variant, its instruction set in use."""
    backend, name = request.param
    if name:
        monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", name)
        assert cpu.instruction_set() == name
    return backend


def label_of(value: Any) -> str:
    """Of a variant, a config or a dtype."""
    if isinstance(value, LossConfig):
        return label(value)
    return "-".join(filter(None, value)) if isinstance(value, tuple) else str(value)


CORE = [complete("grpo"), complete("gspo"), LossConfig(Clip(), entropy_coef=0.1, aggregation="sequence_sum")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERYTHING = [
    (variant, config, dtype)
    for variant in VARIANTS
    for config in (CORE if variant[0] in SLOW else [*CORE, *one_of_each()])
    for dtype in DTYPES
]


@pytest.mark.parametrize(
    ("chosen", "config"),
    [(variant, config) for variant in VARIANTS for config in (CORE[:1] if variant[0] in SLOW else CORE)],
    ids=label_of,
    indirect=["chosen"],
)
def test_a_hundred_repeats(chosen, config):
    check(chosen, config, torch.float32, len(FORMS) if chosen in SLOW else 100)


@pytest.mark.nightly
@pytest.mark.parametrize(("chosen", "config", "dtype"), EVERYTHING, ids=label_of, indirect=["chosen"])
def test_a_hundred_repeats_of_everything(chosen, config, dtype):
    """What is interpreted or emulated: of the core's configs."""
    check(chosen, config, dtype, 100)


@pytest.mark.parametrize(
    "chosen", [variant for variant in VARIANTS if variant[0] not in SLOW], ids=label_of, indirect=True
)
def test_a_hundred_repeats_from_hidden_states(chosen):
    """At one number of threads, as a GEMM's library adds; others come and go."""
    logits, tensors = batch(complete("grpo"), torch.float32, 6, 1000)
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=g) for shape in ((*logits.shape[:2], 32), (logits.shape[2], 32)))

    def run() -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear_grpo_loss(*leaves, **tensors, backend=chosen, chunk_bytes=40_000)
        out.loss.backward()
        return [out.loss.detach(), out.log_probs, *(leaf.grad for leaf in leaves)]

    expected = run()
    for i in range(100):
        with company(run, 2 if i % 7 == 5 else 0):
            assert all(map(torch.equal, run(), expected)), i
