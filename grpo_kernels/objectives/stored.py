"""A config as plain data, for YAML, JSON, Hydra and the records of runs: every field is written, with the number of
this format, so that no default of a later version changes a run that was stored.

Kinds are written by name: surrogates and aggregations by theirs, rollout schemes by their class. Nothing is imported: a
surrogate of a user's own is found where it is registered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from .aggregation import AGGREGATIONS, Aggregation
from .checks import fail
from .divergence import Divergence
from .kl import KL
from .names import check_options
from .rollout import MaskedIS, OffPolicyMask, Rejection, Rollout, TruncatedIS
from .settings import check_name
from .surrogates import SURROGATES, Surrogate

_Config = TypeVar("_Config")

SCHEMA = 1
"""The number of the format. With a new field, or a new meaning of one, it rises, and ``from_dict`` learns what the
numbers before it meant."""
SCHEMES: Mapping[str, type[Rollout]] = MappingProxyType(
    {scheme.__name__: scheme for scheme in (TruncatedIS, MaskedIS, Rejection, OffPolicyMask)}
)
"""Every rollout scheme by name."""
_INFINITIES = MappingProxyType({".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf})
"""YAML's words: JSON has none."""


def to_dict(config: object) -> dict[str, Any]:
    """Return a config's fields and ``schema`` as dicts, lists, strings, numbers and None."""
    return {"schema": SCHEMA, **_fields(config)}


def _fields(instance: Any) -> dict[str, Any]:
    return {field.name: _stored(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _stored(value: object) -> Any:
    """Return a field's value as plain data."""
    if isinstance(value, Surrogate | Aggregation | Rollout):
        return {"name": _name_of(value), **_fields(value)}
    if isinstance(value, KL | Divergence):
        return _fields(value)
    if isinstance(value, tuple | list):
        return [_stored(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    fail("LossConfig.to_dict", "numbers, strings, booleans, None and tuples of them", repr(value), error=TypeError)


def _name_of(value: Surrogate | Aggregation | Rollout) -> str:
    """Return the name by which ``from_dict`` finds the class."""
    kinds: Mapping[str, type]
    if isinstance(value, Rollout):
        kinds, name = SCHEMES, type(value).__name__
    else:
        kinds, name = (AGGREGATIONS if isinstance(value, Aggregation) else SURROGATES), value.name
    if kinds.get(name) is not type(value):
        fail("LossConfig.to_dict", f"one of {', '.join(kinds)}", f"{value!r}, which no name finds", error=TypeError)
    return name


def from_dict(kind: type[_Config], stored: Mapping[str, Any]) -> _Config:
    """Return the config of what ``to_dict`` returned. Without ``schema``, as written by hand, fields may be left out.

    Raises:
        TypeError: no mapping where one belongs.
        ValueError: another schema, a field or a name that is not known, one that is missing from a stored config.
    """
    try:
        return _Reader.of(stored).config(kind, stored)
    except RecursionError:
        fail("LossConfig.from_dict", "fields a few levels deep", "what is nested without end")


@dataclasses.dataclass(frozen=True)
class _Reader:
    whole: bool
    """Whether every field must be there."""

    @classmethod
    def of(cls, stored: object) -> _Reader:
        schema = _mapping("LossConfig.from_dict", stored).get("schema")
        if schema is not None and (isinstance(schema, bool) or schema != SCHEMA):
            hint = "a newer version of the package wrote it: upgrade, or write it again from this one"
            fail("LossConfig.from_dict", f"schema {SCHEMA}", repr(schema), hint=hint)
        return cls(schema is not None)

    def config(self, kind: type[_Config], stored: Mapping[str, Any]) -> _Config:
        readers: dict[str, Callable[[str, Any], Any]] = {
            "surrogate": lambda what, given: self._named(what, given, SURROGATES),
            "aggregation": self._aggregation,
            "kl": lambda what, given: self._made(what, KL, given),
            "rollout_kl": lambda what, given: self._made(what, KL, given),
            "divergence": lambda what, given: self._made(what, Divergence, given),
            "rollout": self._schemes,
        }
        given = {name: value for name, value in stored.items() if name != "schema"}
        made: _Config = self._make("LossConfig", kind, given, readers)
        return made

    def _make(self, what: str, kind: type, given: Mapping[str, Any], readers: Mapping[str, Any]) -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        check_options(f"LossConfig.from_dict: {what}: the field", given, names)
        missing = [name for name in names if name not in given]
        if self.whole and missing:
            hint = "a stored config has all of them; leave out schema to take today's defaults"
            fail("LossConfig.from_dict", f"{what} with the fields {', '.join(names)}", f"no {missing[0]}", hint=hint)
        values = {}
        for name, value in given.items():
            values[name] = value if value is None else readers.get(name, _value)(f"{what}.{name}", value)
        return kind(**values)

    def _made(self, what: str, kind: type, given: object) -> Any:
        return self._make(what, kind, _mapping(f"LossConfig.from_dict: {what}", given), {})

    def _named(self, what: str, given: object, kinds: Mapping[str, type]) -> Any:
        options = dict(_mapping(f"LossConfig.from_dict: {what}", given))
        name = options.pop("name", None)
        if name is None:
            fail("LossConfig.from_dict", f"{what} with its name, one of {', '.join(kinds)}", "none")
        check_name(f"LossConfig.from_dict: {what}", name, kinds)
        return self._made(what, kinds[name], options)

    def _aggregation(self, what: str, given: object) -> Any:
        return given if isinstance(given, str) else self._named(what, given, AGGREGATIONS)

    def _schemes(self, what: str, given: object) -> tuple[Rollout, ...]:
        several = [given] if isinstance(given, Mapping) else given
        if not isinstance(several, Sequence) or isinstance(several, str):
            fail("LossConfig.from_dict", f"{what}, a list of schemes", repr(given), error=TypeError)
        return tuple(self._named(what, scheme, SCHEMES) for scheme in several)


def _mapping(what: str, given: object) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        fail(what, "a mapping of fields", f"{type(given).__name__} {given!r}", error=TypeError)
    return given


def _value(what: str, given: Any) -> Any:
    """Return a number, a word or a tuple of a field."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(None if part is None else _value(what, part) for part in given)
    return _INFINITIES.get(given, given) if isinstance(given, str) else given
