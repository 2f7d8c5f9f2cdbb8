"""What two languages must agree on: every list that C++, Triton and Python have in common is read from each of them."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_kernels import backends
from grpo_kernels.backends import cpu, cuda, native
from grpo_kernels.backends.contract import (
    DivergenceStats,
    RowGradients,
    RowStats,
    TokenInputs,
    TokenRecords,
    batch_and_row_stride,
)
from grpo_kernels.backends.spec import NUMBERS, SURROGATE_PARAMETERS, LogitArgs, ObjectiveSpec
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.objectives.kl import ESTIMATORS, GRADIENTS
from grpo_kernels.objectives.metrics import OF_KERNELS
from grpo_kernels.objectives.rollout import MaskedIS, Rejection, TruncatedIS
from grpo_kernels.objectives.surrogates import BUILT_IN, CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW

ROOT = Path(__file__).resolve().parent.parent


def code(path: str) -> str:
    """A header without its comments."""
    return re.sub(r"//[^\n]*", "", (ROOT / "csrc" / path).read_text())


def struct(path: str, name: str) -> list[str]:
    """The members of a struct in order, those of its bases first."""
    head, body = re.search(rf"struct {name}([^{{;]*)\{{(.*?)\n\}};", code(path), re.S).groups()
    members = []
    for base in re.findall(r"\b(Grpo\w+)", head):
        members += struct("common/call.h", base)
    for declaration in body.split(";"):
        if declaration.strip():
            members += [re.search(r"(\w+)(?:\[\w+\])?$", part.strip())[1] for part in declaration.split(",")]
    return members


def enum(path: str, name: str) -> dict[str, int]:
    """The names of an enum without their k, and their values."""
    values: dict[str, int] = {}
    for entry in re.search(rf"enum {name} \{{(.*?)\}}", code(path), re.S)[1].split(","):
        if entry.strip():
            left, _, right = entry.partition("=")
            number = len(values) if not right else eval(right, {}, {f"k{n}": v for n, v in values.items()})
            values[left.strip().removeprefix("k")] = number
    return values


def plain(name: str) -> str:
    """kKLRatioCap, KL_RATIO_CAP and kl_ratio_cap are one name."""
    return name.replace("_", "").lower()


TUPLES = {
    "GrpoRowStats": RowStats,
    "GrpoRowGradients": RowGradients,
    "GrpoTokenInputs": TokenInputs,
    "GrpoTokenRecords": TokenRecords,
    "GrpoDivergenceStats": DivergenceStats,
}


@pytest.mark.parametrize("name", TUPLES)
def test_structs_are_the_named_tuples(name):
    assert struct("common/call.h", name) == list(TUPLES[name]._fields)


STRUCTS = {
    ("cpu/api.h", "GrpoCpuParams"): cpu._Params,
    ("cpu/api.h", "GrpoCpuTokenSums"): cpu._TokenSums,
    ("cuda/api.h", "GrpoCudaParams"): cuda._Params,
    ("cuda/api.h", "GrpoCudaDevice"): cuda.Device,
    ("cuda/api.h", "GrpoCudaPlan"): cuda.Plan,
}


@pytest.mark.parametrize("place", STRUCTS, ids=lambda place: place[1])
def test_ctypes_structs_are_those_of_the_headers(place):
    kind: type[ctypes.Structure] = STRUCTS[place]
    bases = [*reversed([base for base in kind.__mro__ if "_fields_" in vars(base)])]
    fields = [field[0] for base in bases for field in base._fields_]
    assert fields == struct(*place)


def test_the_spec_is_the_one_of_c():
    assert struct("common/surrogates.h", "ObjectiveSpec") == list(ObjectiveSpec._fields)


def test_numbers():
    values = enum("common/surrogates.h", "Number")
    assert {plain(name): value for name, value in values.items() if value < len(NUMBERS)} == {
        plain(name): i for i, name in enumerate(NUMBERS)
    }
    assert values["SurrogateFirst"] == len(NUMBERS)
    assert values["Numbers"] == len(NUMBERS) + SURROGATE_PARAMETERS


CHOICES = {
    "DivergenceKind": {name: i for i, name in enumerate(KINDS)},
    "SurrogateId": {cls.name: cls.kernel_id for cls in BUILT_IN if cls.kernel_id is not None},
    "EstimatorId": {"no_kl": 0, **{name: 1 + i for i, name in enumerate(ESTIMATORS)}},
    "KLGradient": {name: i for i, name in enumerate(GRADIENTS)},
    "RolloutScheme": {"no_rollout": 0, **{cls.__name__: cls.kernel_id for cls in (TruncatedIS, MaskedIS, Rejection)}},
    "ClipFlag": {"clipped_low": CLIPPED_LOW, "clipped_high": CLIPPED_HIGH, "clipped_dual": CLIPPED_DUAL},
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_of_cpp(name):
    wanted = {plain(choice): value for choice, value in CHOICES[name].items()}
    header = "common/divergences.h" if name == "DivergenceKind" else "common/surrogates.h"
    assert {plain(choice): value for choice, value in enum(header, name).items()} == wanted


def test_choices_of_triton():
    """Every constant of Triton's twin is one of Python's."""
    pytest.importorskip("triton")
    from grpo_kernels.backends.triton import surrogates

    wanted = {plain(name): i for i, name in enumerate((*NUMBERS, "surrogate_first"))}
    for choices in CHOICES.values():
        wanted |= {plain(choice): value for choice, value in choices.items()}
    found = {plain(n): v.value for n, v in vars(surrogates).items() if n.isupper() and hasattr(v, "value")}
    shared = {name: value for name, value in found.items() if name in wanted}
    assert len(shared) > 30
    assert shared == {name: wanted[name] for name in shared}


def test_kinds_of_triton():
    """Every divergence has its place."""
    pytest.importorskip("triton")
    from grpo_kernels.backends.triton import divergences

    found = {
        name.lower(): value.value
        for name, value in vars(divergences).items()
        if name.isupper() and hasattr(value, "value")
    }
    assert found == {name: i for i, name in enumerate(KINDS)}


def test_metrics_are_summed_in_order():
    fields = [plain(name) for name in enum("cpu/token_sums.h", "SumField") if name not in ("SumFields", "Fields")]
    aliases = {"clippedlowcount": "clippedlow", "clippedhighcount": "clippedhigh", "clippeddualcount": "clippeddual"}
    assert [aliases.get(name, name) for name in fields] == [plain(name) for name in OF_KERNELS]


def test_dtypes():
    names = re.search(r"typedef enum \{(.*?)\} GrpoDtype", code("common/call.h"))[1].split(",")
    wanted = {torch.float32: "kFloat32", torch.float64: "kFloat64", torch.bfloat16: "kBFloat16"}
    wanted[torch.float16] = "kFloat16"
    assert {dtype: names[i].strip() for dtype, i in native.DTYPES.items()} == wanted


def test_the_room_for_partial_sums_is_the_librarys():
    """Whatever the length of its chunks: Python has no number of its own that could be too small."""
    library = cpu.library()
    lengths = [library.grpo_cpu_partial_sums(n) for n in (0, 1, 512, 513, 5000)]
    assert lengths[:2] == [0, len(OF_KERNELS)]
    assert lengths == sorted(lengths)
    assert lengths[-1] % len(OF_KERNELS) == 0


WRONG = {
    "a parameter of another type": (
        "def rescale(gradient: Tensor, upstream: Tensor",
        "def rescale(gradient: Tensor, upstream: int",
    ),
    "no such function": ("def token_sums(", "def token_sum("),
}


@pytest.mark.parametrize("name", WRONG)
def test_mypy_holds_backends_to_the_contract(name, tmp_path):
    """A module that does not fit ``Backend`` is an error of type in backends/__init__.py."""
    pytest.importorskip("mypy")
    old, new = WRONG[name]
    source = (ROOT / "grpo_kernels" / "backends" / "eager.py").read_text()
    assert old in source
    shadow = tmp_path / "eager.py"
    shadow.write_text(source.replace(old, new))
    command = [sys.executable, "-m", "mypy", "--shadow-file", "grpo_kernels/backends/eager.py", str(shadow)]
    command += ["--cache-dir", str(tmp_path), "--follow-imports", "silent", "grpo_kernels/backends/__init__.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Backend" in run.stdout


def test_backends_are_what_they_are_asked_for():
    for name in backends.names():
        backend = backends.get(name)
        for function in ("unsupported", "log_probs", "log_probs_backward", "token_sums", "rescale"):
            assert callable(getattr(backend, function))
        assert hasattr(backend, "fused_loss") == hasattr(backend, "token_terms") == (name != "torch")


def test_a_batch_of_one_has_no_stride():
    """Whatever PyTorch says it is: rows on an odd address would be read more slowly."""
    logits = torch.zeros(1, 3, 8).as_strided((1, 3, 8), (5, 8, 1))
    assert batch_and_row_stride(logits) == (0, 8)
    assert batch_and_row_stride(logits[:, :1]) == (0, 0)
    assert batch_and_row_stride(logits[0]) == (0, 8)
    assert batch_and_row_stride(torch.zeros(2, 3, 8)) == (24, 8)


def test_logits_are_left_alone_unless_told():
    assert LogitArgs() == (1.0, 1.0, None)


@pytest.mark.parametrize("library", [cpu._Params, cpu._TokenSums], ids=lambda kind: kind.__name__)
def test_no_buffer_is_read_in_another_dtype(library):
    """A pointer says nothing of what it points to."""
    floats = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    for dtype, real in floats.items():
        params, weight = library(dtype=native.DTYPES[dtype]), torch.ones(2, dtype=real)
        inputs = TokenInputs(weight, weight, None, None, None, weight, None)
        native.fill(params, inputs)
        assert params.kl_weight == weight.data_ptr()
        for other in {torch.float32, torch.float64, torch.float16} - {real}:
            with pytest.raises(TypeError, match=f"kl_weight: the kernel reads {real} here; got {other}"):
                native.fill(params, inputs._replace(kl_weight=weight.to(other)))
