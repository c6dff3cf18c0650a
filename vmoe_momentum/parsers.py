"""The parsers of all commands: what Lightning's and ours have in common, and ours.

All try whole numbers before fractions where either will do. typing keeps one `Union` for all orders of its members,
the first one that anything imported wrote: after a `float | int` somewhere Lightning's `int | float` reads 1 as 1.0,
and trainer.limit_train_batches=1 would be all batches instead of one.
"""

import inspect
import typing
from argparse import RawDescriptionHelpFormatter
from functools import reduce
from operator import or_
from types import UnionType
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from .ranges import Range, check


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


if TYPE_CHECKING:
    _Mixed = ArgumentParser  # what classes made from WholeFirst are, too
else:
    _Mixed = object


class WholeFirst(_Mixed):
    """A parser, and those of nested classes, whose unions try whole numbers first."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        return _ordered(self, super().add_argument(*args, **kwargs))

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return _ordered(self, super().add_class_arguments(*args, **kwargs))

    def add_function_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return _ordered(self, super().add_function_arguments(*args, **kwargs))

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return _ordered(self, super().add_method_arguments(*args, **kwargs))


def _ordered(container: Any, added: Any) -> Any:
    """container: a parser, or a group in one, which has the same methods."""
    for action in container._actions:
        if hasattr(action, "_typehint"):
            action._typehint = whole_first(action._typehint)
    return added


def whole_first(hint: Any) -> Any:
    """The type with int before float in all its unions."""
    members = getattr(hint, "__args__", None)
    if not isinstance(members, tuple) or typing.get_origin(hint) is typing.Literal:
        return hint
    found = tuple(whole_first(member) for member in members)
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    if is_union and int in found and float in found and found.index(float) < found.index(int):
        rest = [member for member in found if member is not int]
        rest.insert(rest.index(float), int)
        found = tuple(rest)
    if all(new is old for new, old in zip(found, members, strict=True)):
        return hint
    if isinstance(hint, UnionType):
        return reduce(or_, found)
    if is_union:  # not Union[found], which typing would answer from its cache
        return type(hint)(typing.Union, found)
    return hint.copy_with(found) if hasattr(hint, "copy_with") else typing.get_origin(hint)[found]


class Parser(WholeFirst, ArgumentParser):
    """Of the commands that are not Lightning's. `add_number` adds an option with a range, which parsing checks."""

    ranges: dict[str, Range]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranges = {}

    def add_number(self, name: str, type: Any, allowed: Range, help: str, default: Any = None) -> None:
        """An option that must lie in `allowed`; its help says so."""
        self.ranges[name.removeprefix("--")] = allowed
        self.add_argument(name, type=type, default=default, help=f"{help} {str(allowed)[0].upper()}{str(allowed)[1:]}.")

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: an option outside its range."""
        found = super().parse_args(*args, **kwargs)
        self._check_numbers(found)
        return found

    def _check_numbers(self, values: Any) -> None:
        for name, allowed in self.ranges.items():
            check(f"--{name}", values[name], allowed)
        if (commands := self._subcommands_action) is not None:
            chosen = values[commands.dest]
            commands.choices[chosen]._check_numbers(values[chosen])


def summary_of(function: Any) -> str:
    """Its docstring up to the arguments."""
    return (inspect.getdoc(function) or "").split("Args:")[0].rstrip()


def new_parser(description: str, examples: str, **options: str) -> Parser:
    """Mistakes are raised, a cut-off name is one; `examples` end the help."""
    return Parser(
        description=description,
        epilog=examples,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        **options,
    )


DEVICE = "cpu, cuda, cuda:1, ...; by default the GPU where there is one."


def pick_device(device: str | None) -> str:
    """The one asked for, else the GPU where there is one. Raises ValueError: this machine has no such device."""
    import torch  # here, so that parsers are there without it

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device={device}: not on this machine; use cpu") from error
    return device
