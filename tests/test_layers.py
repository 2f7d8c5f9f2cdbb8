"""The package's folders are layers: nothing imports upwards, and the loss loads nothing that it does not need."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import rlcompleter
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels

PACKAGE = Path(grpo_kernels.__file__).parent
LAYERS = {
    **dict.fromkeys(("interrupt", "files", "streams"), 0),
    "objectives": 0,
    "backends": 1,
    "calls": 2,
    **dict.fromkeys(("loss", "log_probs", "linear", "divergences", "policy", "hf", "advantages", "surrogates"), 3),
    **dict.fromkeys(("integrations", "verification"), 4),
    **dict.fromkeys(("matching", "bench", "training", "info", "__main__"), 5),
}
"""Of a folder or a file at the root: it imports from its own layer and from lower ones."""
EXCEPTIONS = {
    ("__init__", "matching"): "lazy: match, shadow, MatchReport",
    ("__init__", "reference"): "lazy",
    ("reference", "verification"): "the public place of the reference",
}
"""Imports by name that are against the rule."""


def room(path: Path) -> str:
    """The folder or file at the package's root that a module belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path, source: str) -> set[str]:
    """Rooms that a module's imports name, relative or absolute, inside functions as well."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        rooms |= {target[1] for target in targets if target[0] == PACKAGE.name and len(target) > 1}
    return {name for name in rooms if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def climbing(path: Path, source: str) -> list[str]:
    here = room(path)
    layer = LAYERS.get(here, 3)
    return [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for name in sorted(imported_rooms(path, source))
        if name != here and LAYERS.get(name, 3) > layer and (here, name) not in EXCEPTIONS
    ]


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_nothing_imports_upwards():
    assert len(MODULES) > 80
    assert [arrow for path in MODULES for arrow in climbing(path, path.read_text())] == []


def test_a_climbing_import_is_seen():
    """However it is written, and inside a function too."""
    for line in (
        "from ..calls import terms",
        "import grpo_kernels.calls.terms",
        "def f():\n    from ..calls.terms import x",
    ):
        assert climbing(PACKAGE / "backends" / "cpu.py", line) == ["backends/cpu.py imports calls"]
    assert climbing(PACKAGE / "calls" / "cpu.py", "from ..backends import ops") == []


def arrows(folder: Path) -> dict[str, set[str]]:
    """Of each module in a folder, or of each of its packages as one: the others that its imports name, for types and
    inside functions as well."""
    modules = {path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py")}
    rooms = {parts[0] for parts in modules}
    graph: dict[str, set[str]] = {name: set() for name in rooms}
    for here in modules:
        source = folder.joinpath(*here).with_suffix(".py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(here):
                place = [*here[: len(here) - node.level], *filter(None, (node.module or "").split("."))]
                targets = {(*place, alias.name)[0] for alias in node.names}
                graph[here[0]] |= {name if name in rooms else "__init__" for name in targets}
    return {name: targets - {name} for name, targets in graph.items()}


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing which is left are taken away, again and again."""
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return set(left)


@pytest.mark.parametrize("folder", ["objectives", "objectives/surrogates"])
def test_objectives_import_in_one_direction(folder):
    graph = arrows(PACKAGE / folder)
    assert len(graph) >= 5
    assert circles(graph) == set()


def test_a_circle_is_seen():
    graph = arrows(PACKAGE / "objectives")
    assert graph["presets"] == {"config", "surrogates"}
    assert {"checks", "config"} <= circles(graph | {"checks": {"config"}})


def test_every_room_has_a_layer():
    rooms = {room(path) for path in MODULES} - {"__init__", "reference"}
    assert rooms == set(LAYERS)
    assert len(list(PACKAGE.glob("*.py"))) <= 14


LOADED = """
import json, sys
before = set(sys.modules)
import grpo_kernels
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_what_the_import_loads():
    """No match, no program, no Triton and none of PyTorch's compiler, which takes as long to import as PyTorch."""
    loaded = json.loads(subprocess.run([sys.executable, "-c", LOADED], capture_output=True, check=True).stdout)
    assert "grpo_kernels.loss" in loaded
    unwanted = ("torch._dynamo", "torch._inductor", "triton", "transformers", "matplotlib")
    unwanted += tuple(f"grpo_kernels.{name}" for name, layer in LAYERS.items() if layer > 3)
    assert [name for name in loaded if name.startswith(unwanted)] == []


def test_import_takes_a_fraction_of_the_import_of_torch():
    """Least of three: other processes take turns on the cores."""
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import grpo_kernels; "
    code += "print((time.perf_counter() - b) / (b - a))"
    runs = (subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3))
    assert min(float(run.stdout) for run in runs) <= 0.3


def test_names_survive_the_import_of_every_module():
    """A submodule's import sets an attribute of its package: none may take the place of a public name."""
    skipped = ("integrations.trl", "integrations.verl_plugin", "backends.triton.", "__main__")  # TRL, verl, Triton
    for module in pkgutil.walk_packages([str(PACKAGE)], "grpo_kernels."):
        if not any(part in module.name for part in skipped):
            importlib.import_module(module.name)
    for name in grpo_kernels.__all__:
        assert getattr(grpo_kernels, name) is not None
    assert callable(grpo_kernels.match)
    assert callable(grpo_kernels.shadow)
    for place in ("advantages", "reference", "surrogates"):
        assert importlib.import_module(f"grpo_kernels.{place}") is getattr(grpo_kernels, place)


def test_no_other_name_is_made_up():
    with pytest.raises(AttributeError, match="has no attribute 'matches'"):
        grpo_kernels.matches


def test_what_a_name_is_completed_to():
    """Public names and modules, lazy ones too, and nothing that the package imports for itself."""
    names = [name for name in dir(grpo_kernels) if not name.startswith("__")]
    assert names == sorted({*grpo_kernels.__all__, "surrogates"})
    assert {"match", "shadow", "MatchReport", "reference"} <= set(names)
    completer = rlcompleter.Completer({"g": grpo_kernels})
    assert completer.complete("g.shad", 0) == "g.shadow("
    assert completer.complete("g.TYPE", 0) is None
