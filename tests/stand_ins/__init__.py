"""Stand-ins for packages that are patched: modules with their names and signatures, and what a patch changes."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from grpo_kernels.integrations import patching

Modules = Mapping[str, types.ModuleType]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A package as a patch knows it."""

    package: str
    patch: Callable[..., patching.Patch]
    sources: Mapping[str, str]
    """Of its modules by name, the package first; those of others that it needs as well."""
    losses: frozenset[str]
    operators: frozenset[str]
    """Paths of what the patch changes."""
    imported: str
    """A path among them, of a function that other modules import by name."""
    replaced: tuple[str, str]
    """A path among the losses, and how messages call it."""
    moves: Mapping[str, tuple[Callable[[Modules], object], str]]
    """What somebody does to its hooks, and a pattern of the refusal's message."""

    @property
    def version(self) -> str:
        return str(self._scope["__version__"])

    @property
    def _scope(self) -> dict[str, Any]:
        exec(self.sources[self.package], scope := {})
        return scope

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
        """Yield its modules; whatever a test leaves patched is undone."""
        modules = {}
        for name, source in self.sources.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
            exec(source, vars(module))
            modules[name] = module
        yield modules
        if self.package in patching._patches:
            patching._patches[self.package].undo()


def functions(modules: Modules) -> dict[str, Any]:
    """Return every function of a stand-in by its path, those in classes and registries as well."""
    found: dict[str, Any] = {}

    def walk(path: str, entries: Mapping[str, Any]) -> None:
        for key, value in entries.items():
            if isinstance(value, type):
                walk(f"{path}.{key}", vars(value))
            elif isinstance(value, dict) and key != "__builtins__":
                walk(f"{path}.{key}", value)
            elif callable(value):
                found[f"{path}.{key}"] = value

    for name, module in modules.items():
        walk(name, vars(module))
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {path for path, value in after.items() if before[path] is not value}


def place(modules: Modules, path: str) -> tuple[Any, str]:
    """Return who holds a path's last name, and that name."""
    name = max((name for name in modules if path.startswith(f"{name}.")), key=len)
    holder: Any = modules[name]
    *owners, last = path[len(name) + 1 :].split(".")
    for owner in owners:
        holder = holder[owner] if isinstance(holder, dict) else getattr(holder, owner)
    return holder, last


def put(modules: Modules, path: str, value: Any) -> None:
    holder, last = place(modules, path)
    if isinstance(holder, dict):
        holder[last] = value
    else:
        setattr(holder, last, value)


def take_away(modules: Modules, path: str) -> None:
    holder, last = place(modules, path)
    if isinstance(holder, dict):
        del holder[last]
    else:
        delattr(holder, last)


def moved_away(path: str) -> Callable[[Modules], None]:
    return lambda modules: take_away(modules, path)


def of_others(path: str, signature: str, module: str | None = None) -> Callable[[Modules], None]:
    """Put a function with these arguments there: of somebody else's, or of the package's ``module``."""

    def move(modules: Modules) -> None:
        exec(f"def replacement{signature}: pass", scope := {"__name__": module or "recipe"})
        put(modules, path, scope["replacement"])

    return move
