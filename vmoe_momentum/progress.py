"""How far something is: a bar where somebody watches, a line now and then where output goes into a file or a pipe."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sized
from datetime import timedelta
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

Thing = TypeVar("Thing")
EVERY_SECONDS = 10.0  # between two lines


class Work:
    """The time left of pieces that cost unlike: by known costs, corrected by what each kind was measured to take."""

    def __init__(self, pieces: Iterable[tuple[Hashable, float]], clock: Callable[[], float] = time.monotonic) -> None:
        """pieces: (kind, cost in any unit). Seconds of a kind that was not met yet follow from the others' costs."""
        self.clock, self.since = clock, clock()
        self.left: dict[Hashable, float] = {}
        for kind, cost in pieces:
            self.left[kind] = self.left.get(kind, 0.0) + cost
        self.total = sum(self.left.values())
        self.measured: dict[Hashable, tuple[float, float]] = {}  # kind -> cost done, seconds
        self.helped: dict[Hashable, float] = {}  # kind -> cost that other processes did meanwhile

    def advance(self, kind: Hashable, cost: float) -> None:
        """So much of the kind was done since the last call."""
        now = self.clock()
        done, seconds = self.measured.get(kind, (0.0, 0.0))
        self.measured[kind] = (done + cost, seconds + now - self.since)
        self.skip(kind, cost)

    def skip(self, kind: Hashable, cost: float) -> None:
        """So much of the kind need not be done."""
        self.since = self.clock()
        self.left[kind] = max(0.0, self.left.get(kind, 0.0) - cost)

    def help(self, kind: Hashable, cost: float) -> None:
        """Another process did so much of the kind meanwhile."""
        self.helped[kind] = self.helped.get(kind, 0.0) + cost
        self.left[kind] = max(0.0, self.left.get(kind, 0.0) - cost)

    @property
    def share(self) -> float:
        """Done or skipped, in [0, 1]."""
        return 1.0 - sum(self.left.values()) / self.total if self.total else 1.0

    def seconds_left(self) -> float | None:
        """By all who work on it, at the share that others had so far. None before anything is measured."""
        left, helped = self.seconds_of(self.left), self.seconds_of(self.helped)
        if left is None or helped is None:
            return None
        own = sum(seconds for _, seconds in self.measured.values())
        return left * own / (own + helped) if own else left

    def seconds_of(self, costs: Mapping[Hashable, float]) -> float | None:
        """Of this process alone, for so much of each kind. None before anything is measured."""
        done, seconds = (sum(values) for values in zip((0.0, 0.0), *self.measured.values(), strict=True))
        if not done:
            return None
        rates = {kind: took / cost for kind, (cost, took) in self.measured.items() if cost}
        return sum(cost * rates.get(kind, seconds / done) for kind, cost in costs.items())


class Meter:
    """One piece of work as it goes on, told on stderr. A context manager."""

    def __init__(self, what: str, work: Work | None, shown: bool = True, file: IO[str] | None = None) -> None:
        """work: None where nobody knows how much there is. shown: False where another process tells it.

        file: stderr as it is now, where that is redirected meanwhile.
        """
        self.what, self.work, self.told, self.count = what, work, "", 0
        self.console = Console(file=file, stderr=True, quiet=not shown)
        columns = [_Told(lambda: self.told or what), BarColumn(), _Told(self.amount), _Told(self.time_left)]
        self.bar = Progress(
            *columns, console=self.console, transient=True, disable=not (shown and self.console.is_terminal)
        )
        self.task = self.bar.add_task(what, total=None if work is None else 1.0)
        self.lines, self.started = 0, time.monotonic()
        self.shown = self.started

    def __enter__(self) -> "Meter":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.bar.stop()
        if self.lines and kind is None:
            self._print(f"done in {clock(time.monotonic() - self.started)}")

    def tell(self, told: str) -> None:
        """What is being done now; the first time in a line of its own at once."""
        first, self.told = not self.told, told
        self._show(at_once=first)

    def advance(self, kind: Hashable, cost: float = 1.0) -> None:
        self.count += 1
        if self.work is not None:
            self.work.advance(kind, cost)
        self._show()

    def skip(self, kind: Hashable, cost: float) -> None:
        """It need not be done."""
        if self.work is not None:
            self.work.skip(kind, cost)
        self._show()

    def help(self, kind: Hashable, cost: float) -> None:
        """Another process did it."""
        if self.work is not None:
            self.work.help(kind, cost)
        self._show()

    def amount(self) -> str:
        if self.work is None:
            return f"{self.count} so far"
        return f"{100 * self.work.share:.0f} %"

    def time_left(self) -> str:
        seconds = None if self.work is None else self.work.seconds_left()
        return "" if seconds is None else f"{clock(seconds)} left"

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(f"{self.what}: {line}", soft_wrap=True, highlight=False, markup=False)

    def _show(self, at_once: bool = False) -> None:
        if self.work is not None:
            self.bar.update(self.task, completed=self.work.share)
        if not self.console.is_terminal and (at_once or time.monotonic() - self.shown >= EVERY_SECONDS):
            self._print(", ".join(part for part in (self.amount(), self.time_left(), self.told) if part))

    def _print(self, told: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{self.what}: {told}", soft_wrap=True, highlight=False, markup=False)
            self.lines, self.shown = self.lines + 1, time.monotonic()


class _Told(ProgressColumn):
    """Of the meter, not of the bar: rich counts steps as if they cost alike."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(self.text())


def track(things: Iterable[Thing], what: str, total: int | None = None) -> Iterator[Thing]:
    """`things`, with the time left. total: how many, where they have no len()."""
    if total is None and isinstance(things, Sized):
        total = len(things)
    with Meter(what, None if total is None else Work([(what, total)])) as meter:
        for thing in things:
            yield thing
            meter.advance(what)


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
