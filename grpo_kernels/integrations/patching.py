"""Patches of other packages: every hook is looked at before one is changed, one patch a package, undone whole.

A package is looked up when it is patched; nothing of it is imported before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from ..objectives.checks import check_flag, fail, warn_caller

Place = tuple[str, Callable[[Any], object]]
"""Its name, as a message calls it, and its setter."""
Places = Callable[[Any], Iterator[Place]]
"""Of a value: the places that hold it, now."""


class Target(NamedTuple):
    """A package that is patched."""

    package: str
    caller: str
    """The function that patches it, as messages name it."""
    versions: tuple[str, ...]
    """The releases whose internals are known; "1.16" stands for 1.16.0, 1.16.1, ..."""


class Hook(NamedTuple):
    """A function of a package's and what takes its place."""

    module: str
    name: str
    """Dotted where it is in a class."""
    arguments: tuple[str, ...]
    replacement: Callable[[Any], Any]
    """Of the original."""
    signature: str = ""
    """What has these arguments, where that is another name: the forward of an autograd function, which is patched
    itself or by its ``apply``."""
    needs: str = ""
    """A package that the hook's module imports: where there is none, or none that it can be imported with, nothing of
    the hook's runs and it is left out."""


class Change(NamedTuple):
    original: Any
    ours: Any
    places: Places


class Patch:
    """A patch that is on; ``undo()``, or the end of a ``with`` block, takes it off."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._changes: list[tuple[Change, list[str]]] = []

    def put(self, changes: list[Change]) -> None:
        """Make changes, and keep the places of each, so that one which fails half way can be undone."""
        for change in changes:
            names: list[str] = []
            self._changes.append((change, names))
            for name, place in list(change.places(change.original)):
                place(change.ours)
                names.append(name)

    def undo(self) -> None:
        """Give the package its own functions back, in whatever module of its holds ours; a second call does nothing.
        What somebody else has put in their place since stays there, and is named in a warning."""
        lost = []
        for change, before in self._changes:
            places = dict(change.places(change.ours))
            for place in places.values():
                place(change.original)
            lost += [name for name in before if name not in places]
        self._changes = []
        if _patches.get(self._target.package) is self:
            del _patches[self._target.package]
        if lost:
            warn_caller(f"{self._target.caller}: {', '.join(lost)} had been replaced since, and stays as it is.")

    def __enter__(self) -> Patch:
        if _patches.get(self._target.package) is not self:
            caller = self._target.caller
            raise RuntimeError(
                f"{caller}: expected a patch that is on; got one that was undone: call {caller}() again."
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


_patches: dict[str, Patch] = {}
"""Those that are on, by package."""


def check_parts(caller: str, **parts: object) -> None:
    """Raise unless each is on or off, and one is on: nothing would be patched, and nobody told."""
    for name, part in parts.items():
        check_flag(caller, name, part)
    if not any(parts.values()):
        fail(caller, f"one of {', '.join(parts)} to be True", "none", hint="what patches nothing is not called")


def patch(target: Target, changes: Callable[[], Iterable[Change]]) -> Patch:
    """Return a patch of a package that is on from here; ``changes`` is called once its version is found to be known.

    Raises:
        ImportError: no such package.
        RuntimeError: another version; a patch of it that is on; what ``changes`` raises.
    """
    check_version(target)
    on = Patch(target)
    if _patches.setdefault(target.package, on) is not on:  # at once: another thread may be patching
        raise RuntimeError(
            f"{target.caller}: expected {target.package} as it was installed; got one that is patched: undo() that."
        )
    try:
        on.put(list(changes()))
    except BaseException:
        on.undo()
        raise
    return on


def when_imported(module: str, then: Callable[[], object]) -> None:
    """Call ``then`` once a module has been imported: now, or when it is."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(module, then))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds a module as others do, until it has run, and calls a function then."""

    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self._module, self._then = module, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in behind)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                if self in sys.meta_path:  # whoever only looked for the module has a loader like this one
                    sys.meta_path.remove(self)
                    self._then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def check_version(target: Target) -> None:
    """Raise unless a package is there, and a release whose internals are known."""
    package, caller = target.package, target.caller
    expected = " or ".join(target.versions)
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{caller} needs {package} {expected}: pip install {package}=={expected}; got: {error}"
        ) from error
    version = getattr(module, "__version__", None) or _installed_version(package)
    if not any(re.fullmatch(rf"{re.escape(known)}(\.\d+)*(\+.*)?", version) for known in target.versions):
        raise RuntimeError(
            f"{caller}: written for {package} {expected} and its internals; got {version}: "
            f"pip install {package}=={expected}, or do without {caller}."
        )


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a folder on the path
        return "one that does not say its version"


def changes_of(target: Target, hooks: Iterable[Hook]) -> Iterator[Change]:
    """Yield the change of every hook.

    Raises:
        RuntimeError: a hook that moved, has other arguments or was replaced.
    """
    for hook in hooks:
        if hook.needs and not _installed(hook.needs):
            continue
        try:
            module = importlib.import_module(hook.module)
        except ImportError as error:
            if not hook.needs or (error.name or "").split(".")[0] == target.package:  # it moved
                raise
            continue  # what it needs is there and does not do
        original = _checked(target, module, hook)
        *owners, last = hook.name.split(".")
        owner = _found(module, ".".join(owners)) if owners else None
        yield Change(original, hook.replacement(original), _places_of(target, owner, last))


def check(target: Target, what: str, original: Any, described: Any, arguments: tuple[str, ...]) -> Any:
    """Return ``original``, if it is the package's own function with these arguments.

    Raises:
        RuntimeError: if not.
    """
    if original is None or described is None:
        moved(target, what, "", "nothing")
    found = tuple(inspect.signature(described).parameters)
    home = _stranger(described, target.package)
    if found != arguments or home is not None:
        own = f"{target.package}'s ({', '.join(arguments)})"
        name = f"{home or described.__module__}.{described.__qualname__}"
        moved(target, what, own, f"{name}({', '.join(found)})")
    return original


def _stranger(function: Any, package: str) -> str | None:
    """Return the module of a function that is not the package's, or of another's decorator around it, which goes by the
    name and module of what it wraps; None if there is neither. PyTorch compiles functions by one of its own."""
    while True:
        home: str = getattr(function, "__globals__", {}).get("__name__") or function.__module__ or ""
        inner = getattr(function, "__wrapped__", None)
        if home.split(".")[0] != package and (inner is None or home.split(".")[0] != "torch"):
            return home
        if inner is None:
            return None
        function = inner


def moved(target: Target, what: str, expected: str, got: str) -> NoReturn:
    """Raise the error of a hook that is not what it is known to be."""
    raise RuntimeError(
        f"{target.caller}: expected {what}{f' to be {expected}' if expected else ''}; got {got}. Something else has "
        f"patched {target.package}, or this is another one."
    )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # no parent either
        return False


def _checked(target: Target, module: Any, hook: Hook) -> Any:
    original = _found(module, hook.name)
    described = _found(module, hook.signature) if hook.signature else original
    path = f"{hook.module}.{hook.name}"
    check(target, path, original, described, hook.arguments)
    kind = hook.signature.split(".")[0]
    if hook.signature and getattr(original, "__self__", original) is not _found(module, kind):
        moved(target, path, f"{kind}.apply", repr(original))
    return original


def _places_of(target: Target, owner: Any, name: str) -> Places:
    """Return the places of an attribute: of its class, or of every module of the package that is imported, since some
    import it by name."""

    def places(value: Any) -> Iterator[Place]:
        if owner is None:
            known = list(sys.modules.items())  # at once: another thread may import
            holders = {key: module for key, module in known if key.split(".")[0] == target.package}
        else:
            holders = {f"{owner.__module__}.{owner.__qualname__}": owner}
        for path, holder in holders.items():
            held = getattr(holder, "__dict__", {}).get(name)  # None stands for a module that is not to be imported
            put = functools.partial(setattr, holder, name)
            if held is value:
                yield f"{path}.{name}", put
            elif isinstance(held, staticmethod) and held.__func__ is value:
                yield f"{path}.{name}", lambda new, put=put: put(staticmethod(new))  # type: ignore[misc]

    return places


def _found(module: Any, name: str) -> Any:
    """Return an attribute by its dotted name as it stands in its owner, None where there is none."""
    for part in name.split("."):
        module = vars(module).get(part) if module is not None else None
    return module.__func__ if isinstance(module, staticmethod) else module
