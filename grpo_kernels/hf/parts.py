"""A model whose parts return again what they have returned: its own forward, without the work of its backbone."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..objectives.compiler import with_frames
from .form import Untraceable
from .head import way_to
from .traced import TracedLogits

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Whose elements are called, or may be."""


class Parts:
    """The largest parts of a model that do not hold its head. In ``recorded`` they run, and what each returns is kept;
    in ``replayed`` they return it again, in its order, and run where there is nothing to return.

    A part stays in its place: ``nn.Module`` runs ``_compiled_call_impl`` instead of a call, hooks included.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self.model, self.head = model, head
        self._parts = list(dict.fromkeys(_parts(model, head)))
        self._returned: dict[nn.Module, list[_Returned]] = defaultdict(list)
        self._compiled: Any = None

    @contextlib.contextmanager
    def recorded(self, compiled: Any) -> Iterator[None]:
        """Run, torch.compile having their frames as ``compiled`` says."""
        self._compiled = compiled
        with self._called(self._run):
            yield

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Return what was kept."""
        again = {part: iter(returned) for part, returned in self._returned.items()}

        def returned(part: nn.Module, plain: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
            for kept in again.get(part, ()):
                return kept.again()
            return plain(*args, **inputs)

        with self._called(returned):
            yield

    def _run(self, part: nn.Module, plain: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
        if any(isinstance(value, TracedLogits) for value in (*args, *inputs.values())):
            return plain(*args, **inputs)  # behind the head: a cap that is a module
        with with_frames(self._compiled):
            returned = plain(*args, **inputs)
        self._returned[part].append(_Returned(returned))
        return returned

    @contextlib.contextmanager
    def _called(self, run: Callable[..., Any]) -> Iterator[None]:
        """Let calls of the parts from this thread be ``run(part, plain, *args, **inputs)``."""
        thread = threading.get_ident()

        def instead(part: nn.Module) -> Callable[..., Any]:
            plain = part._compiled_call_impl or part._call_impl

            def call(*args: Any, **inputs: Any) -> Any:
                if threading.get_ident() != thread:
                    return plain(*args, **inputs)
                return run(part, plain, *args, **inputs)

            return call

        before = [(part, part.__dict__.get("_compiled_call_impl")) for part in self._parts]
        for part in self._parts:
            part._compiled_call_impl = instead(part)
        try:
            yield
        finally:
            for part, compiled in before:
                del part._compiled_call_impl
                if compiled is not None:
                    part._compiled_call_impl = compiled


class _Returned:
    """What a part returned, and the versions of its tensors then."""

    def __init__(self, value: Any) -> None:
        self._value, self._versions = value, self._now(value)

    def again(self) -> Any:
        if self._now(self._value) != self._versions:
            raise Untraceable("what its backbone returns is written to in place")
        return self._value

    @staticmethod
    def _now(value: Any) -> list[int]:
        leaves = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _parts(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """Give each part; the way to the head is the shortest."""
    way = set(way_to(model, head)) - {head}

    def below(parent: nn.Module) -> Iterator[nn.Module]:
        for part in parent.children():
            if part in way or isinstance(part, _CONTAINERS):
                yield from below(part)
            elif part is not head:
                yield part

    return below(model)
