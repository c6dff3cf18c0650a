"""Which key of a config the parser could not take, and why.

The parser says of a nested class only that no type matched. Where it has refused, the files are gone through again key
by key, each against the signature of the class that takes it, and the first that does not fit is named.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any

from jsonargparse import ArgumentParser

from ..configs import BEFORE, SPEC, merge, short
from ..names import classes_of, did_you_mean
from ..parsers import WholeFirst

TOP = (  # of a config of fit, validate, test and predict
    "seed_everything", "data", "ckpt_path", "weights_only", "print_config", "verbose", "return_predictions", "model",
    "trainer",
)  # fmt: skip


class _Parser(WholeFirst, ArgumentParser):
    """Reads signatures and checks single values."""


def find_mistyped(configs: list[dict[str, Any]]) -> str | None:
    """The first key at the top that is none but looks like one, in find_mistake's words; needs no class imported.

    What looks like none is left to the parser, which may be of a newer Lightning that knows it.
    """
    for key in (key for config in configs for key in config):
        name = str(key).removesuffix("+")
        if name not in TOP and difflib.get_close_matches(name, TOP, n=1):
            return f"{name}: no such setting{did_you_mean(name, TOP)}"
    return None


def find_mistake(
    configs: list[dict[str, Any]], single: dict[str, Any], classes: dict[str, Callable[..., Any]]
) -> str | None:
    """The first key that does not fit, as a message.

    single: the type of each key at the top; classes: what takes the settings of each section.
    """
    return next(_top(functools.reduce(merge, configs, {}), single, classes), None)


def find_unnoticed(
    configs: list[dict[str, Any]], single: dict[str, Any], classes: dict[str, Callable[..., Any]]
) -> str | None:
    """What the parser takes without a word: null for anything, a scalar for settings. Arguments: as find_mistake."""
    whole: dict[str, Any] = functools.reduce(merge, configs, {})
    for section, value in whole.items():
        found = _nulls(value, classes[section], section) if section in classes else iter(())
        if section in single:
            found = _nulls_below(value, single[section], section)
        if message := next(found, None):
            return message
    return None


def _nulls(values: Any, target: Any, where: str) -> Iterator[str]:
    if _is_file(values):  # the settings may lie there
        return
    if not isinstance(values, dict):
        yield f"{where}={short(values)}: use {{NAME: VALUE, ...}} of its settings"
        return
    for name, hint in _hints(target).items():
        value, members = values.get(name, ...), _members(hint)
        if value is None and hint is not Any and type(None) not in members:
            yield f"{where}.{name}=null: expected {_said(hint)}; leave it out for the default"
        elif dataclasses.is_dataclass(members[0]) and not isinstance(value, dict | EllipsisType | None):
            yield from _fields(value, members[0], hint, f"{where}.{name}")
        else:
            yield from _nulls_below(value, hint, f"{where}.{name}")


def _nulls_below(value: Any, hint: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict | list) or not _has_null(value):
        return
    bases = [cls for member in _members(hint) for cls in (member, *_members(_element(member))) if _is_base(cls)]
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _nulls_below(item, hint, f"{where}[{number}]")
    elif bases and dataclasses.is_dataclass(bases[0]):
        yield from _nulls(value, bases[0], where)
    elif bases and isinstance(value.get("class_path"), str):
        target = _find(value["class_path"], bases[0])
        yield from _nulls(value.get("init_args") or {}, target, f"{where}.init_args") if target else ()


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def _has_null(value: Any) -> bool:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(_has_null(item) for item in below)


def _top(values: dict[str, Any], single: dict[str, Any], classes: dict[str, Callable[..., Any]]) -> Iterator[str]:
    for key, value in values.items():
        if key not in classes:
            yield from _mapping({key: value}, {**single, **classes}, "")
        elif isinstance(value, dict):
            yield from _mapping(value, _hints(classes[key]), key)
        elif not _is_file(value):
            yield f"{key}={short(value)}: use {{NAME: VALUE, ...}} of its settings"
    for key in classes:  # nothing else is wrong
        if _is_file(values.get(key)):
            yield f"{key}={values[key]}: what that file holds does not fit; give a file of settings of {key} alone"


def _mapping(values: dict[str, Any], hints: dict[str, Any], where: str) -> Iterator[str]:
    for key, value in values.items():
        name = str(key).removesuffix("+")
        path = f"{where}.{name}".lstrip(".")
        if name not in hints:
            yield f"{path}: no such setting{did_you_mean(name, hints)}"
        else:
            yield from _value(value, hints[name], path)


def _value(value: Any, hint: Any, where: str) -> Iterator[str]:
    if value is None and hint is not Any and type(None) not in _members(hint):
        yield f"{where}=null: expected {_said(hint)}"
        return
    bases = [cls for cls in _members(hint) if _is_base(cls)]
    many = [cls for member in _members(hint) for cls in _members(_element(member)) if _is_base(cls)]
    if many and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _value(item, typing.Union[tuple(many)], f"{where}[{number}]")  # noqa: UP007
    elif bases and dataclasses.is_dataclass(bases[0]):
        yield from _fields(value, bases[0], hint, where)
    elif (bases or many) and (isinstance(value, dict | str) or _refused(value, hint)):
        if not _refused(value, hint):  # as a plain value, such as "auto"
            return
        yield from _spec(value, (bases or many)[0], where)
    elif _refused(value, hint):
        yield f"{where}={short(value)}: expected {_said(hint)}"


def _fields(value: Any, cls: Any, hint: Any, where: str) -> Iterator[str]:
    if _is_file(value) or (value is None and type(None) in _members(hint)):
        return
    hints = _hints(cls)
    if not isinstance(value, dict):
        yield f"{where}={short(value)}: use {{{', '.join(f'{name}: ...' for name in hints)}}}"
        return
    yield from _mapping(value, hints, where)
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        yield f"{where}: also say {', '.join(missing)}"


def _spec(value: Any, base: type, where: str) -> Iterator[str]:
    """A class by name, or `{class_path: NAME, init_args: {...}}`."""
    ways = f"use the name of a {base.__name__}, or {{class_path: NAME, init_args: {{...}}}}"
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, dict):
        yield f"{where}={short(value)}: {ways}"
        return
    for key in spec:
        if key not in SPEC:
            yield f"{where}.{key}: no such setting{did_you_mean(str(key), SPEC[:3])}"
    name = spec.get("class_path")
    place = where if isinstance(value, str) else f"{where}.class_path"
    if not isinstance(name, str) or not name:
        told = f"={short(name)}" if "class_path" in spec else ": missing"
        yield f"{where}.class_path{told}; {ways}"
        return
    target = _find(name, base)
    if target is None:
        yield f"{place}={name}: no such {base.__name__}{did_you_mean(name.rpartition('.')[2], classes_of(base))}"
        return
    given = spec.get("init_args")
    if given is not None and not isinstance(given, dict):
        yield f"{where}.init_args={short(given)}: use {{NAME: VALUE, ...}} of {target.__name__}"
        return
    hints = _hints(target)
    for key in given or {}:
        if key not in hints:
            yield f"{where}.init_args.{key}: {name} takes no {key!r}{did_you_mean(str(key), hints)}"
    yield from _mapping({k: v for k, v in (given or {}).items() if k in hints}, hints, f"{where}.init_args")
    there = {**spec.get(BEFORE, {}), **(given or {})}
    required = [
        name for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is parameter.empty and name in hints and name not in there
    ]  # fmt: skip
    if required:
        yield f"{where}.init_args: also say {', '.join(required)}, which {target.__name__} needs"


def _find(name: str, base: type) -> Callable[..., Any] | None:
    """The class, or the function that gives one; None where there is none that fits."""
    if "." not in name:
        return classes_of(base).get(name)
    parser = _Parser(exit_on_error=False)
    parser.add_argument("--x", type=type[base] | Callable)  # imports it, and nothing else
    try:
        target = parser.parse_object({"x": name}).x
    except Exception:  # whatever importing raises
        return None
    if isinstance(target, type):
        return target if issubclass(target, base) else None
    returned = inspect.signature(target).return_annotation
    return target if isinstance(returned, type) and issubclass(returned, base) else None


@functools.cache
def _hints(target: Any) -> dict[str, Any]:
    """The type of each argument, also of those that the class only hands on."""
    parser, is_class = _Parser(exit_on_error=False), isinstance(target, type)
    if is_class:
        parser.add_class_arguments(target, fail_untyped=False)
    else:
        parser.add_function_arguments(target, fail_untyped=False)
    found = {a.dest: getattr(a, "_typehint", Any) for a in parser._actions if a.dest != "help"}
    nested = {name.partition(".")[0] for name in found if "." in name}
    plain = {name: hint for name, hint in found.items() if "." not in name}
    annotations = typing.get_type_hints(target.__init__ if is_class else target) if nested else {}
    return {**plain, **{name: annotations[name] for name in nested}}


def _members(hint: Any) -> list[Any]:
    """The types of a union, or the one type."""
    union = type(hint).__name__ in ("UnionType", "_UnionGenericAlias", "Union")
    return [m for member in typing.get_args(hint) for m in _members(member)] if union else [hint]


def _element(hint: Any) -> Any:
    """X of list[X] and Iterable[X]."""
    listed = typing.get_origin(hint) in (list, Iterable)
    return typing.get_args(hint)[0] if listed and typing.get_args(hint) else None


def _is_base(cls: Any) -> bool:
    return isinstance(cls, type) and cls.__module__ not in ("builtins", "datetime", "pathlib", "typing", "os")


def _refused(value: Any, hint: Any) -> bool:
    if hint is Any or hint is inspect.Parameter.empty:
        return False
    parser = _Parser(exit_on_error=False)
    parser.add_argument("--x", type=hint)
    try:
        parser.parse_object({"x": value})
    except Exception:  # TypeError and AttributeError, too: the parser's for what it did not foresee
        return True
    return False


def _said(hint: Any) -> str:
    """`int or null` for people."""
    words = []
    for member in _members(hint):
        text = getattr(member, "__name__", "") if isinstance(member, type) and not typing.get_args(member) else ""
        text = text or re.sub(r"\b[a-z_]\w*\.", "", str(member))
        words.append("null" if text == "NoneType" else text)
    return " or ".join(dict.fromkeys(words))
