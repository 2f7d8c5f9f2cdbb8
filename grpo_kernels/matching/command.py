"""``python -m grpo_kernels match``: name the config that your loss is.

    python -m grpo_kernels match my_training.py:policy_loss
    python -m grpo_kernels match my_package.losses:ppo --argument x=log_probs --set clip=0.2

It runs the file, as importing it does, and then the function, some 800 times: name only what you would run yourself.

The function is called in float64 on a small batch; it takes log-probs or logits and whatever else of a batch it wants,
by parameter name, and returns a scalar. Exit status: 0 a config is the loss, 1 none is or a fault was found, 2 it
could not be called.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..objectives.settings import check_name
from ..streams import say
from . import match_in_words
from .call import COMMAND_LINE, ROLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("loss", metavar="FILE.py:FUNCTION", help="or package.module:function")
    parser.add_argument(
        "--argument", action="append", default=[], metavar="NAME=MEANING",
        help=f"a parameter whose name does not tell what it is; meanings: {', '.join(ROLES)}; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="bound",
        help="a parameter that is no tensor of the batch, such as clip=0.2; repeatable",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="the sampler's, for a loss on logits that must divide by it")
    parser.add_argument("--device", help="where the function wants its tensors, such as cuda; the CPU by default")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    meanings = _pairs("--argument", "NAME=MEANING", arguments.argument)
    bound = {name: _value(text) for name, text in _pairs("--set", "NAME=VALUE", arguments.bound).items()}
    place, name = _parts(arguments.loss)
    say(f"match runs {place}, as importing it does, then {name} on batches of its own")
    with contextlib.redirect_stdout(sys.stderr):  # what the loss prints is not the report
        loss = load(arguments.loss)
        loss = functools.partial(loss, **bound) if bound else loss
        report = match_in_words(COMMAND_LINE, loss, None, meanings, arguments.temperature, arguments.device)
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report)
    return 0 if report else 1


def _pairs(option: str, form: str, given: Iterable[str]) -> dict[str, str]:
    """Return what an option binds, by name. Raise for what is no pair, and for a name that comes again."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} must be {form}; got {text!r}.")
        if name in found:
            raise ValueError(f"{option} {name} is given twice: {found[name]!r} and {value!r}.")
        found[name] = value
    return found


def _value(text: str) -> Any:
    """Return the Python literal that the text is, inf and nan among them, or the text."""
    if re.fullmatch("[+-]?(inf|infinity|nan)", text.lower()):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it documents
        return text


def _parts(where: str) -> tuple[str, str]:
    """Return the file or module, and the function's name."""
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ValueError(f"the loss must be given as FILE.py:FUNCTION or package.module:function; got {where!r}.")
    return place, name


def load(where: str) -> Callable[..., Any]:
    """Return the function behind ``file.py:name`` or ``package.module:name``."""
    place, name = _parts(where)
    found: Any = _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            names = _functions(found)
            if not names:
                raise ValueError(f"{place} has no function; expected one named {part!r}.")
            check_name(f"{place}: the function", part, names)
        found = getattr(found, part)
    return found


def _functions(holder: Any) -> list[str]:
    """Return the names in a module or class that can be called, its own before what it imported."""
    names = [name for name in vars(holder) if name[:1] != "_" and callable(getattr(holder, name))]
    own = [name for name in names if getattr(getattr(holder, name), "__module__", None) == holder.__name__]
    return own or names


def _module(place: str) -> ModuleType:
    """Import a file or a module as if nothing had been said on the command line."""
    sys.path.insert(0, str(Path.cwd()))
    said, argv = io.StringIO(), sys.argv
    what = place if place.endswith(".py") else f"module {place}"
    sys.argv = [place]
    try:
        with contextlib.redirect_stderr(said):
            module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except SystemExit as error:
        raise ValueError(
            f"{what} exits while it is imported (with {error.code!r}), as a program does that parses arguments: put "
            'what it does under if __name__ == "__main__":, or the loss into a file of its own.'
        ) from None
    except Exception as error:
        at = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(
            f"{what} cannot be imported: {type(error).__name__}{at}: {error}. It must import without a training run; "
            "the loss may stand in a file of its own."
        ) from error
    finally:
        sys.argv = argv
    if said.getvalue():
        say(said.getvalue().removesuffix("\n"))
    return module


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        is_folder = f"{place} is a folder, no file" if path.is_dir() else f"there is no file {place}"
        raise FileNotFoundError(f"{is_folder} here ({Path.cwd()})")
    sys.path.insert(0, str(path.resolve().parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_given_to_match"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the names of annotations
    spec.loader.exec_module(module)
    return module
