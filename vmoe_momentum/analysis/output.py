"""Rows into CSV files, figures into PNG files, rows onto the console."""

import csv
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = TypeVar("Row")
Key = TypeVar("Key")
Value = TypeVar("Value")
SUFFIXES = ("", "eigenvalues", "epochs", "training")


class Files:
    """The files `OUT/NAME.*` of one instrument.

    What an earlier call left is removed when the first new file is written. Raises ValueError: they exist, and
    overwrite is False; or nothing can be written there.
    """

    def __init__(self, out: str, name: str, overwrite: bool = False, keep: bool = False) -> None:
        """keep: what is there already belongs to this call."""
        self.out, self.name = Path(out), name
        every = [self._place(suffix, ending) for suffix in SUFFIXES for ending in ("csv", "png")]
        self.old = [path for path in every if path.exists() and not keep]
        if self.old and not overwrite:
            names = ", ".join(sorted(path.name for path in self.old))
            raise ValueError(f"--out={out}: {names} exist there; choose another folder, or replace them by --overwrite")
        above = next(folder for folder in (self.out.absolute(), *self.out.absolute().parents) if folder.exists())
        try:  # permissions do not tell of every file system
            with tempfile.TemporaryFile(dir=above):
                pass
        except OSError as error:
            raise ValueError(f"--out={out}: cannot be written ({error.strerror}); choose another folder") from error

    def write(self, rows: Sequence[NamedTuple], suffix: str = "") -> None:
        """NAME[_suffix].csv, a column a field."""
        with self._path(suffix, "csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(rows[0]._fields)
            writer.writerows([_cell(value) for value in row] for row in rows)

    def save(self, figure: Figure, suffix: str = "") -> None:
        """NAME[_suffix].png."""
        figure.savefig(self._path(suffix, "png"), dpi=110)

    def _place(self, suffix: str, ending: str) -> Path:
        return self.out / f"{self.name}{'_' if suffix else ''}{suffix}.{ending}"

    def _path(self, suffix: str, ending: str) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        while self.old:
            self.old.pop().unlink(missing_ok=True)
        path = self._place(suffix, ending)
        Console().print(f"[bold]{escape(path.name)}[/bold]  {escape(str(path))}", soft_wrap=True, highlight=False)
        return path


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on the console."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*[f"{cell:.3g}" if isinstance(cell, float) else escape(str(cell)) for cell in row])
    Console().print(table)


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of rows x columns panels, each so many inches; axes as an array [rows, columns]."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def whole_numbers(axis: Any) -> None:
    """Ticks at integers only: epochs, ranks."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def group_by(rows: Sequence[Row], key: Callable[[Row], Key], value: Callable[[Row], Value]) -> dict[Key, list[Value]]:
    """Values by key, keys in their order of appearance."""
    groups: dict[Key, list[Value]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(value(row))
    return groups


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
