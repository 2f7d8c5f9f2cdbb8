"""How another package is patched, on a stand-in that has an operator of autograd's and a static method."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch

from grpo_kernels.integrations import patching
from grpo_kernels.integrations.patching import Change, Hook, Target, changes_of, patch

TARGET = Target("package", "patch_package", ("2.1",))
SOURCES = {
    "package": "__version__ = '2.1.3'",
    "package.kernels": """
class Operator:
    @staticmethod
    def forward(ctx, hidden, weight): pass
    @classmethod
    def apply(cls, *args): return "theirs"
""",
    "package.utils": "from package.kernels import Operator as _Operator",
    "package.trainer": """
class Trainer:
    @staticmethod
    def loss(logits, labels=None): return "theirs"
    def step(self): return self.loss(1, labels=2), type(self).loss(1)
""",
}


class Ours:
    """An operator that has the original's call."""

    def __init__(self, original):
        self.original = original

    def apply(self, *args):
        return f"ours, made with {self.original.apply()}"


HOOKS = (
    Hook("package.utils", "_Operator", ("ctx", "hidden", "weight"), Ours, signature="_Operator.forward"),
    Hook("package.trainer", "Trainer.loss", ("logits", "labels"), lambda original: lambda logits, labels=None: "ours"),
)


@pytest.fixture
def package(monkeypatch):
    modules = {}
    for name, source in SOURCES.items():
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        exec(source, vars(modules[name]))
    return modules


def test_a_class_and_a_static_method(package):
    """Both are replaced as they are looked up, and are what they were when they are given back."""
    utils, trainer = package["package.utils"], package["package.trainer"].Trainer
    operator, loss = utils._Operator, trainer.loss
    with patch(TARGET, lambda: changes_of(TARGET, HOOKS)):
        assert utils._Operator.apply(1, 2) == "ours, made with theirs"
        assert trainer().step() == ("ours", "ours")
        assert package["package.kernels"].Operator is operator  # under its own name nobody looks it up
    assert utils._Operator is operator
    assert trainer.loss is loss
    assert isinstance(vars(trainer)["loss"], staticmethod)
    assert trainer().step() == ("theirs", "theirs")


def test_arguments_are_those_of_its_forward(package):
    exec("class Operator:\n    @staticmethod\n    def forward(ctx, hidden): pass", vars(package["package.utils"]))
    package["package.utils"]._Operator = package["package.utils"].Operator
    with pytest.raises(RuntimeError, match=r"_Operator to be package's \(ctx, hidden, weight\); got .*\(ctx, hidden\)"):
        patch(TARGET, lambda: changes_of(TARGET, HOOKS))
    assert package["package.trainer"].Trainer().step() == ("theirs", "theirs")


def test_a_decorator_of_somebody_elses_is_refused(package):
    """It goes by the name of what it is around; PyTorch's, which compiles the package's own, does not count."""
    trainer = package["package.trainer"].Trainer
    loss = trainer.loss
    trainer.loss = staticmethod(torch.compile(loss))
    patch(TARGET, lambda: changes_of(TARGET, HOOKS)).undo()

    @functools.wraps(loss)
    def timed(*args, **kwargs):
        return "timed"

    for decorated in (timed, torch.compile(timed)):
        trainer.loss = staticmethod(decorated)
        with pytest.raises(RuntimeError, match=rf"Trainer\.loss to be package's .* got {__name__}\.Trainer\.loss"):
            patch(TARGET, lambda: changes_of(TARGET, HOOKS))
        assert trainer.loss is decorated


def test_a_module_that_is_not_to_be_imported_is_passed_over(package, monkeypatch):
    """``None`` in ``sys.modules`` keeps a module from being imported."""
    monkeypatch.setitem(sys.modules, "package.absent", None)
    trainer = package["package.trainer"].Trainer
    with patch(TARGET, lambda: changes_of(TARGET, HOOKS)):
        assert package["package.utils"]._Operator.apply() == "ours, made with theirs"
        assert trainer().step() == ("ours", "ours")
    assert trainer().step() == ("theirs", "theirs")


def test_a_place_that_cannot_be_set_leaves_nothing_changed(package):
    """What was changed before it is given back, and the package can be patched again."""

    def refuse(new):
        raise OSError("read-only")

    operator, trainer = package["package.utils"]._Operator, package["package.trainer"].Trainer
    fixed = Change("theirs", "ours", lambda value: iter([("fixed", refuse)] if value == "theirs" else []))
    with pytest.raises(OSError, match="read-only"):
        patch(TARGET, lambda: [*changes_of(TARGET, HOOKS), fixed])
    assert package["package.utils"]._Operator is operator
    assert trainer().step() == ("theirs", "theirs")
    assert not patching._patches
    patch(TARGET, lambda: changes_of(TARGET, HOOKS)).undo()
