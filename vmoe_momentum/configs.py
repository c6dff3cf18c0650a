"""What configs and options say, as one mapping: read strictly, merged as the parser merges them."""

from pathlib import Path
from typing import Any

import yaml

BEFORE = "init_args of another class"
SPEC = ("class_path", "init_args", "dict_kwargs", BEFORE)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, list | dict):
                raise yaml.constructor.ConstructorError(None, None, f"{name} is no key", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_config(path: str) -> dict[str, Any]:
    """Raises ValueError: no text, no YAML, a key twice, no mapping; with the place."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"config={path}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"config={path}: not valid YAML: {told}; mend that line") from error
    except OSError as error:
        raise ValueError(f"config={path}: cannot be read ({error.strerror}); choose another file") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"config={path}: holds {short(content)} where settings are needed, such as model:, data: and trainer:"
        )
    return content


def as_configs(argv: list[str]) -> list[dict[str, Any]]:
    """What `--config` and options such as `--model.mixup=0.2` say, in their order. Raises as `read_config`."""
    found: list[dict[str, Any]] = []
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else after
        if name in ("--config", "-c"):
            found += [read_config(value)] if Path(value).is_file() else []  # no such file: the parser says so
        elif name.startswith("--") and (equals or (after and not after.startswith("--"))):
            found.append(_nested(name.removeprefix("--").split("."), value))
    return found


def _nested(keys: list[str], value: str) -> dict[str, Any]:
    try:
        content: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        content = value
    for key in reversed(keys):
        content = {key: content}
    return content


def merge(first: Any, second: Any) -> Any:
    """Later settings over earlier ones, as the parser has it: another class takes over the arguments that it knows."""
    if isinstance(first, list) and first and isinstance(second, dict):
        return [*first[:-1], merge(first[-1], second)]
    if isinstance(first, dict) and isinstance(second, str) and "class_path" in first:
        second = {"class_path": second}
    if isinstance(first, str) and isinstance(second, dict):
        first = {"class_path": first}
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    if "class_path" in first:
        short = {key: value for key, value in second.items() if key not in SPEC}  # --data.root for data.init_args.root
        second = {key: value for key, value in second.items() if key in SPEC}
        if short:
            second["init_args"] = {**(second.get("init_args") or {}), **short}
        if second.get("class_path", first["class_path"]) != first["class_path"]:
            return {**second, BEFORE: first.get("init_args") or {}}
    return {**first, **{key: merge(first.get(key), value) for key, value in second.items()}}


def short(value: Any) -> str:
    """The value in a line of a message."""
    text = "null" if value is None else str(value)
    text = " ".join(text.split()) if text.strip() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
