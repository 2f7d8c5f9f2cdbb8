"""``python -m grpo_kernels match``: name the config that your loss is.

    python -m grpo_kernels match my_training.py:policy_loss
    python -m grpo_kernels match my_package.losses:ppo --argument x=log_probs

The function is called in float64 on a small batch; it takes log-probs or logits and whatever else of a batch it wants,
by parameter name, and returns a scalar. Exit status: 0 a config reproduces it, 1 none does or a fault was found, 2 it
could not be called.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..objectives.checks import check_name
from . import match
from .call import ROLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("loss", metavar="FILE.py:FUNCTION", help="or package.module:function")
    parser.add_argument(
        "--argument", action="append", default=[], metavar="NAME=MEANING",
        help=f"a parameter whose name does not tell what it is; meanings: {', '.join(ROLES)}; repeatable",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="the sampler's, for a loss on logits that must divide by it")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(arguments: argparse.Namespace) -> int:
    meanings = {}
    for given in arguments.argument:
        name, equals, meaning = given.partition("=")
        if not equals:
            raise ValueError(f"--argument must be NAME=MEANING; got {given!r}.")
        meanings[name] = meaning
    with contextlib.redirect_stdout(sys.stderr):  # what the loss prints is not the report
        report = match(load(arguments.loss), arguments=meanings, temperature=arguments.temperature)
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report)
    return 0 if report else 1


def load(where: str) -> Callable[..., Any]:
    """The function behind ``file.py:name`` or ``package.module:name``."""
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ValueError(f"the loss must be given as FILE.py:FUNCTION or package.module:function; got {where!r}.")
    sys.path.insert(0, str(Path.cwd()))
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"there is no file {place} here ({Path.cwd()}).")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"module {place} cannot be imported: {error}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            check_name(f"{place}: the function", part, [n for n in dir(found) if n[:2] != "__"] or ["(nothing)"])
        found = getattr(found, part)
    return found
