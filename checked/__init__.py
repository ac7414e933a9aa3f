"""The ground floor of `models` and `atlas`: settings that check themselves, and the error of a user's mistake.

A `Checked` dataclass states each field once: its default, meaning, unit and range. That one statement refuses a wrong
value when an object is made, reads a value from the command line and prints the help.

>>> @dataclasses.dataclass(frozen=True)
... class Schedule(Checked, section="train"):
...     rate: float = field(0.1, "learning rate at its peak", above=0)
>>> overlay(Schedule(), {"rate": read(Schedule, "rate", "nan")})
Traceback (most recent call last):
checked.UserError: train.rate=nan must be a number above 0
>>> print(*describe(Schedule()))
train.rate=0.1: learning rate at its peak; a number above 0
"""

import ast
import dataclasses
import difflib
import functools
import math
import numbers
import operator
import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound="Checked")

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_BOUNDS = {
    "least": (operator.ge, "of at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "of at most"),
    "below": (operator.lt, "below"),
}


class UserError(ValueError):
    """A mistake of the user's: one line that names the thing and the fix; binaries print it and exit with code 2."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """An error for a name that does not exist, offering the nearest valid one.

    >>> str(unknown("language", "frr", ["fr", "de"]))
    "unknown language 'frr'; did you mean 'fr'? valid: de, fr"
    """
    names = sorted(choices)
    near = difflib.get_close_matches(str(name), names, n=1)
    # Letters with accents are written in two ways that look alike.
    show = ascii if near and unicodedata.normalize("NFC", near[0]) == unicodedata.normalize("NFC", str(name)) else repr
    hint = f"; did you mean {show(near[0])}?" if near else ";"
    valid = f"valid: {', '.join(names)}" if names else "there is none"
    return UserError(f"unknown {kind} {show(name)}{hint} {valid}")


def field(
    default: Any, help: str, *, unit: str = "", choices: Sequence[str] = (), pattern: str = "", **bounds: float
) -> Any:
    """A field of a `Checked` dataclass.

    Args:
      default: its value where none is given.
      help: what it does, in one line.
      unit: of the number.
      choices: the only values allowed; a list may grow.
      pattern: a regular expression that text must match as a whole.
      bounds: `least`, `above`, `most` and `below` of a number, or of every number of a tuple.
    """
    rules = {"choices": choices, "pattern": pattern, "bounds": bounds}
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit} | rules)


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of frozen dataclasses whose fields are made by `field`; section: what precedes their names in messages.

    Annotations may be bool, int, float (always finite), str, tuples of any length of these, or another `Checked`.
    Whole numbers become floats and lists tuples where the annotation says so.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = ""):
        cls.section = section or cls.section

    def __post_init__(self) -> None:
        for name, (kind, spec) in _fields(type(self)).items():
            object.__setattr__(self, name, _checked(self, name, kind, spec))
        self.check()

    def check(self) -> None:
        """Raises UserError where fields do not fit together; for subclasses that have such rules."""

    def require(self, condition: bool, name: str, constraint: str) -> None:
        """Raises UserError naming a field, its value and the constraint, unless the condition holds."""
        if not condition:
            raise UserError(f"{_dotted(type(self), name)}={getattr(self, name)!r} {constraint}")


def overlay(config: C, changes: Mapping[str, Any]) -> C:
    """A config with some settings replaced, all at once.

    changes: values by dotted name; a mapping changes a whole section, as JSON spells it. Raises UserError for a name
    that does not exist, and for what the config refuses.
    """
    fields = _fields(type(config))
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if name not in fields or (rest and not _is_section(fields[name][0])):
            raise unknown("setting", _dotted(type(config), key), (n for n, _ in _leaves(config)))
        if rest or isinstance(value, Mapping):
            nested.setdefault(name, {}).update({rest: value} if rest else value)
        else:
            direct[name] = value
    changed = {name: overlay(direct.get(name, getattr(config, name)), part) for name, part in nested.items()}
    return dataclasses.replace(config, **direct | changed)


def read(config: Checked | type[Checked], key: str, text: str) -> Any:
    """The value that a text on the command line means for a dotted field; what is no value stays text, to be refused.

    A tuple may be written `(1, 2)`, `1,2` or `1`; text is taken as it is.
    """
    first, _, rest = key.partition(".")
    fields = _fields(config if isinstance(config, type) else type(config))
    if first not in fields or _is_section(kind := fields[first][0]):
        return read(kind, rest, text) if first in fields and rest else text
    items = typing.get_args(kind)
    if not items:
        return _read_one(kind, text)
    inside = text.strip().removeprefix("(").removesuffix(")")
    return tuple(_read_one(items[0], part.strip().strip("'\"")) for part in inside.split(",") if part.strip())


def describe(config: Checked) -> Iterator[str]:
    """One line a setting: dotted name, value, meaning, unit, range."""
    for name, (owner, last) in _leaves(config):
        kind, spec = _fields(type(owner))[last]
        unit = f" [{spec['unit']}]" if spec["unit"] else ""
        constraint = _constraint(kind, spec)
        ending = f"; {constraint}" if constraint != _KINDS[str] else ""
        yield f"{name}={getattr(owner, last)!r}{unit}: {spec['help']}{ending}"


def leaves(config: Checked) -> dict[str, Any]:
    """The values of all settings by dotted name."""
    return {name: getattr(owner, last) for name, (owner, last) in _leaves(config)}


def _leaves(config: Checked) -> Iterator[tuple[str, tuple[Checked, str]]]:
    for name, (kind, _) in _fields(type(config)).items():
        if _is_section(kind):
            yield from _leaves(getattr(config, name))
        else:
            yield _dotted(type(config), name), (config, name)


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Annotation and statement of each field by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata) for f in dataclasses.fields(cls)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Checked)


def _dotted(cls: type[Checked], name: str) -> str:
    return f"{cls.section}.{name}" if cls.section else name


def _checked(config: Checked, name: str, kind: Any, spec: Mapping[str, Any]) -> Any:
    """The value of a field as its annotation has it; UserError if it is none."""
    value = getattr(config, name)
    if _is_section(kind):
        config.require(isinstance(value, kind), name, "is a section: set the settings in it")
        return value
    items = typing.get_args(kind)
    single = [value] if not items else value if isinstance(value, tuple | list) else [None]
    wrong = [item for item in single if not _allows(items[0] if items else kind, spec, item)]
    near = difflib.get_close_matches(str(wrong[0]), spec["choices"], n=1) if wrong else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    config.require(not wrong, name, f"must be {_constraint(kind, spec)}{hint}")
    return tuple(items[0](item) for item in value) if items else kind(value)


def _allows(kind: type, spec: Mapping[str, Any], value: Any) -> bool:
    if spec["choices"] and value not in spec["choices"]:
        return False
    if kind in (bool, str):
        return isinstance(value, kind) and (
            not spec["pattern"] or re.fullmatch(spec["pattern"], str(value)) is not None
        )
    number = {int: numbers.Integral, float: numbers.Real}[kind]
    if isinstance(value, bool) or not isinstance(value, number) or not math.isfinite(value):
        return False
    return all(_BOUNDS[name][0](value, bound) for name, bound in spec["bounds"].items())


def _constraint(kind: Any, spec: Mapping[str, Any]) -> str:
    """In words, what a value must be.

    >>> _constraint(int, field(1, "", least=1, below=9).metadata)
    'a whole number of at least 1 and below 9'
    """
    items = typing.get_args(kind)
    if spec["choices"]:
        words = f"one of {', '.join(spec['choices'])}"
    else:
        limits = " and ".join(f"{_BOUNDS[name][1]} {bound}" for name, bound in spec["bounds"].items())
        matching = f"matching {spec['pattern']}" if spec["pattern"] else ""
        words = " ".join(filter(None, (_KINDS[items[0] if items else kind], limits, matching)))
    return f"a tuple, each {words}" if items else words


def _read_one(kind: type, text: str) -> Any:
    if kind is str:
        return text
    try:
        return float(text) if kind is float else ast.literal_eval(text.title() if kind is bool else text)
    except (ValueError, SyntaxError):
        return text
