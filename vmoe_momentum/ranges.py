"""What a number in a setting may be: finite and in a stated range, checked before anything is built.

    @in_range("HeavyBall.", mu=Range(0, 1, below=True), gamma=POSITIVE)
    class HeavyBall: ...

checks the arguments of the constructor (or of a function); every docstring says the range as `Range.interval` does.
Sweeps find the ranges as the attribute `ranges` of the constructor or function.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeVar

Target = TypeVar("Target", bound=Callable[..., Any])
Other = str | int | type[str] | None


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless said otherwise. Of a list each is checked.

    above: low itself is outside. below: high itself is outside. whole: whole numbers only. others: values that may
    stand there too, such as None, "dropless" or -1. why: the way out, where the range alone does not say it.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False
    others: tuple[Other, ...] = ()
    why: str = ""

    def or_(self, *others: Other) -> "Range":
        """The same, or one of these (None is written null; `str` is any text, for others to check)."""
        return replace(self, others=(*self.others, *others))

    def because(self, why: str) -> "Range":
        """The same with a way out."""
        return replace(self, why=why)

    @property
    def interval(self) -> str:
        """`[0, 1)` of numbers, `1 to 1e9` of whole ones."""
        low, high = _short(self.low), _short(self.high)
        if self.whole:
            return f"{low} to {high}"
        return f"{'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"

    def __str__(self) -> str:
        kind = "a whole number from " if self.whole else "a number in "
        others = [f" or {'null' if word is None else word}" for word in self.others if word is not str]
        return kind + self.interval + "".join(others)

    def __contains__(self, value: object) -> bool:
        if any(type(value) is other or (type(value) is type(other) and value == other) for other in self.others):
            return True
        if isinstance(value, list | tuple):
            return all(item in self for item in value)
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value  # numbers.Real, which type checkers compare with nothing
        if not math.isfinite(number):
            return False
        above = number > self.low if self.above else number >= self.low
        return bool(above and (number < self.high if self.below else number <= self.high))


LARGEST = 1e6  # of weights, rates and steps: far above any use, far below where float32 overflows
POSITIVE = Range(0, LARGEST, above=True)
NOT_NEGATIVE = Range(0, LARGEST)
MOMENTUM = Range(0, 1, below=True)
SHARE = Range(0, 1)
COUNT = Range(1, 10**9, whole=True)
COUNT_OR_NONE = Range(0, 10**9, whole=True)
WORKERS = Range(0, 1024, whole=True)
THREADS = Range(1, 1024, whole=True).or_(-1).because("-1 is one per usable core")
SEED = Range(0, 2**32 - 1, whole=True)
SIDE = Range(1, 2**14, whole=True)  # of pictures, in pixels


def check(setting: str, value: object, allowed: Range) -> None:
    """Raises ValueError naming the setting, its value and the range."""
    if value not in allowed:
        why = f"; {allowed.why}" if allowed.why else ""
        raise ValueError(f"{setting}={value!r}: use {allowed}{why}")


def check_all(prefix: str, values: Mapping[str, object], allowed: Mapping[str, Range]) -> None:
    """`check` for each of `allowed` that is among the values."""
    for name, bounds in allowed.items():
        if name in values:
            check(prefix + name, values[name], bounds)


def in_range(prefix: str, **allowed: Range) -> Callable[[Target], Target]:
    """Decorates a class or a function: its arguments of these names are checked first. prefix: of their names."""

    def decorate(target: Any) -> Any:  # a class or a function, and given back as it came
        is_class = isinstance(target, type)
        function = target.__init__ if is_class else target
        signature = inspect.signature(function)
        if strange := allowed.keys() - signature.parameters.keys():
            raise TypeError(f"{target.__qualname__} has no argument {', '.join(sorted(strange))}")

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check_all(prefix, signature.bind(*args, **kwargs).arguments, allowed)
            return function(*args, **kwargs)

        vars(checked)["ranges"] = allowed
        if not is_class:
            return checked
        target.__init__ = checked
        return target

    return decorate


def _short(number: float) -> str:
    if abs(number) == math.pi:
        return "pi" if number > 0 else "-pi"
    text = f"{number:g}".replace("e+0", "e").replace("e+", "e")
    return text if float(text) == number else str(number)
