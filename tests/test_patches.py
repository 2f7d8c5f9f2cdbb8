"""What a patch of a package does, on a stand-in with its names and signatures: all of it, none of it, and undone.

The packages themselves are in test_verl_parity.py, test_openrlhf.py and test_skyrl.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types

import pytest
from stand_ins import changed, functions, place, put
from stand_ins.openrlhf import OPENRLHF
from stand_ins.skyrl import SKYRL
from stand_ins.verl import VERL

from grpo_kernels.integrations import patching, ray_plugin

SYSTEMS = {system.package: system for system in (VERL, OPENRLHF, SKYRL)}
RAY = ("openrlhf", "skyrl")
"""Those whose workers are patched through Ray; verl has a way of its own."""


@pytest.fixture(params=SYSTEMS)
def system(request):
    return SYSTEMS[request.param]


@pytest.fixture
def modules(system, monkeypatch):
    yield from system.installed(monkeypatch)


@pytest.mark.parametrize(("losses", "operators"), [(True, True), (True, False), (False, True)])
def test_patch_and_undo(system, modules, losses, operators):
    """Also of what a module has imported by name; and of a module that imported ours."""
    before = functions(modules)
    patch = system.patch(losses=losses, operators=operators)
    wanted = (system.losses if losses else set()) | (system.operators if operators else set())
    assert changed(before, functions(modules)) == wanted
    late = types.ModuleType(f"{system.package}.late")
    sys.modules[late.__name__] = late
    try:
        holder, name = place(modules, system.imported)
        setattr(late, name, getattr(holder, name))
        patch.undo()
        assert getattr(late, name) is before[system.imported]
    finally:
        del sys.modules[late.__name__]
    assert changed(before, functions(modules)) == set()
    patch.undo()


def test_a_patch_of_a_block_ends_with_it(system, modules):
    before = functions(modules)
    with pytest.raises(ZeroDivisionError), system.patch():
        1 / 0
    assert changed(before, functions(modules)) == set()


def test_two_patches_at_once_are_refused(system, modules):
    message = f"expected {system.package} as it was installed; got one that is patched"
    with system.patch(operators=False), pytest.raises(RuntimeError, match=message):
        system.patch()
    system.patch().undo()


def test_a_version_that_is_not_known_is_refused(system, modules):
    modules[system.package].__version__ = "99.1"
    message = rf"patch_{system.package}: written for {system.package} {system.version} and its internals; got 99\.1"
    message += f": pip install {system.package}=={system.version}"
    with pytest.raises(RuntimeError, match=message):
        system.patch()


def test_a_version_that_is_nowhere_is_refused(system, modules, monkeypatch):
    del modules[system.package].__version__
    monkeypatch.setattr(sys, "path", [])  # no metadata of an installed one
    with pytest.raises(RuntimeError, match="internals; got one that does not say its version"):
        system.patch()


def test_without_the_package(system, monkeypatch):
    """The message says what could not be imported: the package may be there, and what it imports not."""
    monkeypatch.setitem(sys.modules, system.package, None)
    install = f"pip install {system.package}=={system.version}"
    with pytest.raises(ImportError, match=f"{install}; got: import of {system.package} halted"):
        system.patch()


MOVES = [(package, move) for package, system in SYSTEMS.items() for move in system.moves]


@pytest.mark.parametrize(("package", "move"), MOVES)
def test_a_hook_that_moved_is_refused_before_anything_is_changed(package, move, monkeypatch):
    system = SYSTEMS[package]
    for modules in system.installed(monkeypatch):
        change, message = system.moves[move]
        change(modules)
        before = functions(modules)
        with pytest.raises(RuntimeError, match=message):
            system.patch()
        assert not patching._patches
        assert changed(before, functions(modules)) == set()


def test_an_undone_patch_is_no_block_s(system, modules):
    patch = system.patch()
    patch.undo()
    with pytest.raises(RuntimeError, match="expected a patch that is on; got one that was undone"), patch:
        pass


def test_what_was_replaced_since_stays(system, modules):
    before, (path, name) = functions(modules), system.replaced
    patch = system.patch()

    def own():
        pass

    put(modules, path, own)
    with pytest.warns(UserWarning, match=f"patch_{system.package}: {name} had been replaced since"):
        patch.undo()
    assert changed(before, functions(modules)) == {path}
    assert functions(modules)[path] is own


def test_one_place_of_several_that_was_replaced_is_told(system, modules):
    """The others are given back: a module has the function by name, and its home has somebody's wrapper of ours."""
    before, path = functions(modules), system.imported
    late = types.ModuleType(f"{system.package}.late")
    name = path.rpartition(".")[2]
    setattr(late, name, before[path])
    sys.modules[late.__name__] = late
    try:
        patch = system.patch()
        ours = getattr(late, name)
        put(modules, path, lambda *args: ours(*args))
        with pytest.warns(UserWarning, match=rf"patch_{system.package}: {path} had been replaced since"):
            patch.undo()
        assert getattr(late, name) is before[path]
    finally:
        del sys.modules[late.__name__]
    assert changed(before, functions(modules)) == {path}


def test_of_patches_in_several_threads_one_is_on(system, modules, recwarn):
    """The others are told that it is; undoing it undoes all."""
    before = functions(modules)
    barrier, results = threading.Barrier(8), []

    def work():
        barrier.wait()
        try:
            results.append(system.patch())
        except RuntimeError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
    finally:
        sys.setswitchinterval(interval)
    (on,) = [result for result in results if not isinstance(result, str)]
    for told in results:
        assert told is on or "got one that is patched: undo() that" in told
    on.undo()
    assert changed(before, functions(modules)) == set()
    assert not recwarn


def test_a_patch_waits_for_the_import(tmp_path, monkeypatch):
    """A module is patched when it has run, once; one that is there already, now."""
    (tmp_path / "awaited").mkdir()
    (tmp_path / "awaited" / "__init__.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], [*sys.meta_path]
    patching.when_imported("awaited", lambda: seen.append(sys.modules["awaited"].value))
    import json  # noqa: F401

    assert seen == []
    awaited = importlib.import_module("awaited")
    assert seen == [1]
    assert sys.meta_path == finders
    importlib.reload(awaited)
    patching.when_imported("awaited", lambda: seen.append("now"))
    assert seen == [1, "now"]
    del sys.modules["awaited"]


def test_a_patch_waits_through_a_lookup_and_a_failed_import(tmp_path, monkeypatch):
    """Whether a module is there is asked for by its spec; what an import lacked may be there at the next."""
    (tmp_path / "awaited.py").write_text("import lacking")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], [*sys.meta_path]
    patching.when_imported("awaited", lambda: seen.append("patched"))
    assert importlib.util.find_spec("awaited").name == "awaited"
    with pytest.raises(ImportError):
        importlib.import_module("awaited")
    assert seen == []
    monkeypatch.setitem(sys.modules, "lacking", types.ModuleType("lacking"))
    importlib.import_module("awaited")
    assert seen == ["patched"]
    assert sys.meta_path == finders
    del sys.modules["awaited"]


@pytest.mark.parametrize("package", RAY)
def test_ray_tells_its_workers(package):
    """By name of a function that is there; a hook of the user's own is refused."""
    told = getattr(ray_plugin, package)({"env_vars": {"A": "1"}})
    assert told["env_vars"] == {"A": "1"}
    module, name = told["worker_process_setup_hook"].rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))
    assert getattr(ray_plugin, package)(None) == {"worker_process_setup_hook": f"{module}.{name}"}
    with pytest.raises(ValueError, match=f"got 'mine'. Call {module}.{name} in that"):
        getattr(ray_plugin, package)({"worker_process_setup_hook": "mine"})


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"losses": "no"}, TypeError, "expected losses to be True or False; got 'no'"),
        ({"operators": None}, TypeError, "expected operators to be True or False; got None"),
        ({"losses": False, "operators": False}, ValueError, "expected one of losses, operators to be True; got none"),
    ],
)
def test_what_is_to_be_patched_is_said(system, modules, parts, error, message):
    before = functions(modules)
    with pytest.raises(error, match=f"patch_{system.package}: {message}"):
        system.patch(**parts)
    assert changed(before, functions(modules)) == set()


@pytest.mark.parametrize("shadow", [-1, True, 0.5, "50"])
def test_shadow_is_a_number_of_calls(system, modules, shadow):
    before = functions(modules)
    with pytest.raises(ValueError, match=f"patch_{system.package}: expected shadow to be an int >= 0"):
        system.patch(shadow=shadow)
    assert changed(before, functions(modules)) == set()
