"""Settings objects as JSON and back: momentum rules and routers travel with every checkpoint this way.

The JSON form is jsonargparse's: `{"class_path": "HeavyBall", "init_args": {"mu": 0.7, "gamma": 1.0}}`. A class is
looked up among the *already imported* subclasses of the expected base, so a config or a checkpoint never imports code.
"""

import inspect
from typing import Any, TypeVar

from .names import did_you_mean, subclasses

T = TypeVar("T")


def to_spec(settings: object) -> dict[str, Any]:
    """JSON form of an object whose constructor arguments are attributes of the same name."""
    names = inspect.signature(type(settings).__init__).parameters
    arguments = {name: getattr(settings, name) for name in names if name != "self"}
    return {"class_path": type(settings).__name__, "init_args": arguments}


def from_spec(spec: "T | dict[str, Any] | str", base: type[T], setting: str) -> T:
    """The object itself, or the one that its JSON form or bare class name describes.

    `setting` is the name to blame in messages. Raises ValueError: unknown class or argument, with the valid ones.
    """
    if isinstance(spec, base):
        return spec
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if not isinstance(spec, dict) or set(spec) - {"class_path", "init_args"} or "class_path" not in spec:
        raise ValueError(
            f"{setting}={spec!r} is not a {base.__name__}; use a class name or "
            f'{{"class_path": NAME, "init_args": {{...}}}}'
        )
    name, arguments = spec["class_path"].rpartition(".")[2], spec.get("init_args") or {}
    known = subclasses(base)
    if name not in known:
        raise ValueError(f"{setting}={name}: no such {base.__name__}{did_you_mean(name, known)}")
    accepted = set(inspect.signature(known[name].__init__).parameters) - {"self"}
    for argument in arguments:
        if argument not in accepted:
            raise ValueError(f"{setting}: {name} takes no {argument!r}{did_you_mean(argument, accepted)}")
    return known[name](**arguments)


def completed(spec: dict[str, Any], base: type) -> dict[str, Any]:
    """A spec with the defaults of what was no setting yet when it was written; an unknown class's as it is."""
    cls: Any = subclasses(base).get(spec.get("class_path", ""))
    known = inspect.signature(cls.__init__).parameters.values() if cls else ()
    defaults = {setting.name: setting.default for setting in known if setting.default is not inspect.Parameter.empty}
    return {**spec, "init_args": {**defaults, **(spec.get("init_args") or {})}} if cls else spec


def describe(spec: dict[str, Any]) -> str:
    """`HeavyBall(mu=0.7, gamma=1.0)`: a spec as people write it."""
    return f"{spec['class_path']}({', '.join(f'{k}={v}' for k, v in spec.get('init_args', {}).items())})"
