"""Names that people get wrong: what they may have meant, and which classes there are."""

import difflib
import inspect
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """Every imported subclass of `base` that can be made, by bare name."""
    found: dict[str, type[T]] = {}
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            found[cls.__name__] = cls
        found |= subclasses(cls)
    return found


def classes_of(base: type[T]) -> dict[str, type[T]]:
    """`base` itself, where it can be made, and its subclasses, by bare name."""
    own = {} if inspect.isabstract(base) else {base.__name__: base}
    return own | subclasses(base)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean X?` when something close is valid, then the whole list."""
    valid = sorted(set(valid))
    close = difflib.get_close_matches(name, valid, n=1)
    return (f"; did you mean {close[0]}?" if close else ";") + f" valid: {', '.join(valid)}"
