"""How the package meets torch.compile: operators that are one node of a graph, functions that stay outside of it.

``torch.compiler.disable`` and ``assume_constant_result`` import ``torch._dynamo`` where they decorate, which takes as
long as PyTorch itself. The decorators here mark functions in the same way and leave that import to torch.compile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("grpo_kernels", "DEF")
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The function that every operator runs, with flat arguments, by the operator's name."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it; ``fake`` gives its outputs' shapes. It has no formula for autograd."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))  # a gradient's follow from its logits'
    IMPLEMENTATIONS[name] = implementation
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grpo_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.grpo_kernels, name).default


def outside_graphs(function: _Function) -> _Function:
    """Let a function break the graph of a compiled caller and run, with all that it calls, as it is."""
    disabled: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing is being compiled
            return function(*args, **options)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **options)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def constant_in_graphs(function: _Function) -> _Function:
    """Let torch.compile run a function while it traces, and keep the result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
