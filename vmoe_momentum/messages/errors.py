"""Any error as one line that names setting, value and way out.

Our own messages do so already. jsonargparse's are translated here: it reports a mistyped class or key as a list of
every type that did not match.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..names import did_you_mean, subclasses

KEY = re.compile(r'(?:Parser key )?"([\w.]+)":')
REFUSED_OPTION = re.compile(r"given class_path '([^']+)': Option '([^']+)' is not accepted")
REFUSED_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
BASE_CLASS = re.compile(r"Subtypes: \[<class '([\w.]+)'>")
UNKNOWN_KEY = re.compile(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)")
REQUIRED = re.compile(r"the following arguments are required: ([\w.]+(?:, [\w.]+)*)")
INCOMPLETE = re.compile(r"given class_path '[\w.]+': " + REQUIRED.pattern)
WRONG_TYPE = re.compile(r"(?:Given|Got) value: (.*)$")
NESTED = re.compile(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$")
WANTED = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing.Literal\[([^\]]+)\])")


def one_line(error: BaseException, sections: Mapping[str, Iterable[str]]) -> str:
    """The message for people. sections: the valid keys of each part of a config, `{"": [...], "model": [...]}`."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}; choose another place, or mend this one"
    if "Original Traceback (most recent call last)" in message:  # out of a worker process, with its stack
        message = re.split(r"\b\w+(?:Error|Exception|Picture): ", message)[-1]
    if translated := _incomplete(message, sections) or _wrapped(str(error)):
        return translated
    for translate in (_option, _class, _nested, _key):
        if translated := translate(message, sections):
            return translated
    if "Subtypes:" in message or "Got value:" in message:
        return _type(message)
    if "arguments are required" in message and sections:
        return f"{message}; start from a config, such as --config configs/digits.yaml"
    message = re.sub(r'Parser key "config": File does not exist: \'(.*)\'', r"config=\1: no such file", message)
    return message.replace("Problems parsing config:", "config: not valid YAML:").replace("Parser key ", "")


def _setting(message: str) -> str:
    """`model.net.init_args.rule` from the parser's nested keys."""
    keys = KEY.findall(message)
    return ".init_args.".join(keys)


def _incomplete(message: str, sections: Mapping[str, Iterable[str]]) -> str | None:
    """A setting of several fields without some of them, or an option that a command needs."""
    if match := INCOMPLETE.search(message):
        return f"{_setting(message[: match.start()])}: also say {match[1]}"
    if not sections and (match := REQUIRED.search(message)):
        return (
            f"{', '.join('--' + name.rpartition('.')[2] for name in match[1].split(', '))}: required; --help says what"
        )
    return None


def _wrapped(message: str) -> str | None:
    """An error of a constructor, reported among the types that did not match: a list, an item a line."""
    for part in re.split(r"\n\s*- ", message.partition("Errors:")[2].partition("Given value type:")[0]):
        part = " ".join(part.split())
        if part and not part.startswith(("Expected a", "Problem with given class_path", "Does not validate")):
            return part
    return None


def _option(message: str, _: Any) -> str | None:
    match = REFUSED_OPTION.search(message)
    if not match:
        return None
    path, option = match.groups()
    target = _find(path)
    names = [name for name in inspect.signature(target).parameters if name != "self"] if target else []
    setting = _setting(message.partition("given class_path")[0])
    return f"{setting}: {path} takes no {option!r}{did_you_mean(option, names)}"


def _class(message: str, _: Any) -> str | None:
    match = REFUSED_CLASS.search(message)
    bases = BASE_CLASS.findall(message[: match.start()]) if match else []
    if match is None or not bases:
        return None
    base = bases[-1]  # the innermost
    cls = _find(base)
    if dataclasses.is_dataclass(cls):
        fields = ", ".join(f"{field.name}: ..." for field in dataclasses.fields(cls))
        return f"{_setting(message)}={match[1]}: use {{{fields}}}"
    ours = [name for name, c in subclasses(cls).items() if c.__module__.startswith("vmoe_momentum.")] if cls else []
    what = base.rpartition(".")[2]
    return f"{_setting(message)}={match[1]}: no such {what}{did_you_mean(match[1], ours)}"


def _nested(message: str, _: Any) -> str | None:
    """`--router.top_k 1`: no class said, or the wrong type."""
    match = NESTED.search(message)
    if not match:
        return None
    setting = KEY.findall(message)[0]
    told = f"{setting}.{match[1]}={match[2]}"
    if "given class_path" not in message:
        return f"{told}: say which class it is for, with --{setting} NAME before it"
    kinds = [kind or literals for kind, literals in WANTED.findall(message) if kind != "NoneType"]
    return f"{told}: expected {' or '.join(dict.fromkeys(kinds)) or 'another type'}"


def _key(message: str, sections: Mapping[str, Iterable[str]]) -> str | None:
    match = UNKNOWN_KEY.search(message)
    if not match:
        return None
    key = match[1] or match[2]
    if not sections:
        return f"--{key}: no such option; --help lists them"
    section, _, name = key.rpartition(".")
    valid = sections.get(section, sections.get("", ()))
    return f"{key}: no such setting{did_you_mean(name if section in sections else key.partition('.')[0], valid)}"


def _type(message: str) -> str:
    """A value of the wrong type."""
    value = WRONG_TYPE.search(message)
    kinds = [kind.rpartition(".")[2] or literals for kind, literals in WANTED.findall(message)]
    wanted = " or ".join(dict.fromkeys(kinds)) or "another type"
    if "list" in kinds and value:
        wanted += f", such as [{value[1]}]"
    return f"{_setting(message)}={value[1] if value else '?'}: expected {wanted.replace('NoneType', 'null')}"


def _find(path: str) -> Any:
    """A class or function among the modules already imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None) if module in sys.modules else None
