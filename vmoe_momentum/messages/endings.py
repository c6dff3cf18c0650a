"""What a command says that ends before it is through, and its exit code."""

import signal
from collections.abc import Iterable, Mapping

from jsonargparse import ArgumentError

from ..resources import explain
from ..stopping import Stopped
from .errors import one_line

_LESS_MEMORY = "lower --batch_size or --limit where the command has them, or free memory"


class Told(BaseException):
    """An error that this process or another one has told already; its cause is the error."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def ending(error: BaseException, sections: Mapping[str, Iterable[str]], way_out: str = "") -> tuple[str, int]:
    """One line, and the exit code: 2 for what a user or machine can cause, 1 for a bug, 128 and more for a signal.

    sections: the valid keys of each part of a config. way_out: how to go on after a signal that does not say it.
    """
    if isinstance(error, Stopped):
        told = error.way_out or way_out or "nothing was done yet; run the same command again"
        return f"stopped by {signal.Signals(error.signum).name}: {told}", 128 + error.signum
    ours = isinstance(error, ValueError)  # in words already, whatever lies behind it
    full = None if ours else explain(error, _LESS_MEMORY)
    line = full or one_line(error, sections)
    where = "".join(f"{note}: " for note in reversed(getattr(error, "__notes__", ())))
    if full or _is_expected(error):
        return f"error: {where}{line}", 2
    line = f"{type(error).__name__}: {line}; this is a bug: run again with --debug and report what it shows"
    return f"error: {where}{line}", 1


def _is_expected(error: BaseException) -> bool:
    """What a user's mistake or machine can cause; anything else is a bug."""
    if isinstance(error, ArgumentError | OSError | RuntimeError | ValueError):
        return True
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from ..training import NotFinite

    return isinstance(error, MisconfigurationException | NotFinite)
