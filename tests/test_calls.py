"""What one small call costs in Python: a reader who follows it should not be led through the whole package."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LARGE
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from grpo_kernels import grpo_loss, linear_grpo_loss
from grpo_kernels.backends import blocks
from grpo_kernels.calls import tokens
from grpo_kernels.objectives import checks

PACKAGE = str(Path(grpo_kernels.__file__).parent)
COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")


def functions_of(path: str) -> set[str]:
    """Names of a module's functions and methods, however deep."""
    return {node.name for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.FunctionDef)}


def calls_of(run) -> list[tuple[str, str]]:
    """File and name of every function of the package that ``run`` enters, in order."""
    entered: list[tuple[str, str]] = []

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name not in COMPREHENSIONS:
            entered.append((code.co_filename, code.co_name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    """Memory of a short call is PyTorch's: in tests, all of it is blocks."""
    monkeypatch.setattr(blocks, "LARGE", LARGE)


LIMITS = {"grpo": (90, 45), "gspo": (152, 81)}
"""Calls and changes of file of one loss and its backward: one pass, two passes. It was 157 and 77, 219 and 114;
the last 74 while calls/terms.py, of 550 lines, held what is three files."""


@pytest.mark.parametrize("config", LIMITS)
def test_a_small_call_is_short(config):
    def run() -> None:
        logits = torch.randn(2, 5, 11, requires_grad=True)
        ids, old = torch.randint(0, 11, (2, 4)), torch.full((2, 4), -2.0)
        out = grpo_loss(logits, ids, torch.tensor([1.0, -1.0]), torch.ones(2, 4), old_log_probs=old, config=config)
        assert out.route.passes == 1 + (config == "gspo")
        out.loss.backward()

    run()  # what is cached is cached
    entered = calls_of(run)
    changes = sum(before[0] != after[0] for before, after in itertools.pairwise(entered))
    most_calls, most_changes = LIMITS[config]
    assert 30 < len(entered) <= most_calls
    assert 10 < changes <= most_changes
    assert {name for path, name in entered if path.endswith("loss.py")} <= functions_of(f"{PACKAGE}/loss.py")


class Operations(TorchDispatchMode):
    """The operators that run, each of which a device would be given: no views, no memory, and ours as one."""

    FREE = ("detach", "empty", "new_empty", "empty_like", "_local_scalar_dense", "lift_fresh", "alias", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if not func.is_view and name not in self.FREE:
            self.names.append(name)
        return func(*args, **kwargs or {})


OPERATIONS = {"grpo": (11, 13), "gspo": (86, 88), "linear": (17, 19)}
"""Those of one loss and its backward where contents are not looked at, as on a GPU, and where they are; autograd's 1
and the gradient's factor are two of them. It was (16, 18), (152, 154), (75, 77)."""


def call_of(which: str) -> Callable[[], torch.Tensor]:
    B, T, V, H = 2, 4, 11, 3
    ids, old = torch.randint(0, V, (B, T)), torch.full((B, T), -2.0)
    rest = (ids, torch.tensor([1.0, -1.0]), torch.ones(B, T))
    if which == "linear":
        hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        return lambda: linear_grpo_loss(hidden, weight, *rest, old_log_probs=old).loss
    logits = torch.randn(B, T, V, requires_grad=True)
    return lambda: grpo_loss(logits, *rest, old_log_probs=old, config=which).loss


@pytest.mark.parametrize("looks", [False, True], ids=["unlooked", "looked"])
@pytest.mark.parametrize("which", OPERATIONS)
def test_a_small_call_has_few_operations(which, looks, monkeypatch):
    """Each is a launch on a GPU, and microseconds on a CPU."""
    call = call_of(which)
    if not looks:
        for module in (checks, tokens):
            monkeypatch.setattr(module, "may_look", lambda *_: False)
    with Operations() as operations:
        call().backward()
    assert len(operations.names) <= OPERATIONS[which][looks], operations.names
