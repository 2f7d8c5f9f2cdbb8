"""What one small call costs in Python: a reader who follows it should not be led through the whole package."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

import pytest
import torch

import grpo_kernels
from grpo_kernels import grpo_loss

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


LIMITS = {"grpo": (90, 40), "gspo": (150, 75)}
"""Calls and changes of file of one loss and its backward: one pass, two passes. It was 157 and 77, 219 and 114."""


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
