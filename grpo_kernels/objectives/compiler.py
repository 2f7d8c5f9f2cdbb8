"""How the package meets torch.compile: operators that are one node of a graph, functions that stay outside of it.

``torch.compiler.disable`` and ``assume_constant_result`` import ``torch._dynamo`` where they decorate, which takes as
long as PyTorch itself. The decorators here mark functions in the same way and leave that import to torch.compile.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import torch

NAMESPACE = re.sub(r"\W", "_", __name__.removesuffix(".objectives.compiler"), flags=re.ASCII)
"""Of the operators: the package's name, so that two versions which one process holds under two names do not meet."""
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The function that every operator runs, with flat arguments, by the operator's name."""
_Value = TypeVar("_Value")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it; ``fake`` gives its outputs' shapes. It has no formula for autograd."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))  # a gradient's follow from its logits'
    IMPLEMENTATIONS[name] = implementation
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def outside_graphs(function: _Function) -> _Function:
    """Let a function break the graph of a compiled caller and run, with all that it calls, as it is."""
    frames = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):  # a PyTorch that marks code in another way
        return cast(_Function, torch.compiler.disable(function))
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def leaving_graphs(function: Callable[..., _Value]) -> Callable[..., _Value]:
    """Let a function break the graph of a compiled caller and run, with all that it calls, as it is. Its first argument
    is what torch.compile does with frames there, for ``with_frames``."""
    frames = torch._C._dynamo.eval_frame

    def outside(*args: Any, **kwargs: Any) -> _Value:
        compiled = frames.set_eval_frame(None)
        try:
            return function(compiled, *args, **kwargs)
        finally:
            frames.set_eval_frame(compiled)

    if not hasattr(frames, "set_code_exec_strategy"):
        return torch.compiler.disable(outside, recursive=False)
    action = frames._FrameAction
    frames.set_code_exec_strategy(outside.__code__, frames._FrameExecStrategy(action.SKIP, action.DEFAULT))
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside


@contextlib.contextmanager
def with_frames(compiled: Any) -> Iterator[None]:
    """Let torch.compile have frames again inside a function that ``leaving_graphs`` runs."""
    frames = torch._C._dynamo.eval_frame
    before = frames.set_eval_frame(compiled)
    try:
        yield
    finally:
        frames.set_eval_frame(before)


def constant_in_graphs(function: _Function) -> _Function:
    """Let torch.compile run a function while it traces, and keep the result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class computed_once(Generic[_Value]):
    """A property of a frozen object whose value is kept. ``functools.cached_property`` takes a lock before Python 3.12,
    which torch.compile cannot trace; in a graph nothing is kept."""

    def __init__(self, function: Callable[[Any], _Value]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> _Value:
        value = self._function(instance)
        if not torch.compiler.is_compiling():
            vars(instance)[self._name] = value
        return value
