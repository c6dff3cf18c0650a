"""Epochs and seconds that training runs take to reach an accuracy, from their logs."""

import itertools
import statistics
from typing import NamedTuple

from ..ranges import Range, check
from .logs import read_log
from .output import Files, grid, group_by, show, whole_numbers
from .subjects import labelled

ACCURACY, SECONDS = "val/top1", "train/epoch_seconds"
TARGET = Range(0, 1, above=True).because("accuracies are shares; 95 % is 0.95")


class CompareRow(NamedTuple):
    """One run and one target; epochs and seconds are empty where it was never reached."""

    label: str
    run: str  # folder
    target: float
    epochs: int | None
    seconds: float | None  # of training, validation not counted
    best: float
    final: float


class Curve(NamedTuple):
    label: str
    run: str
    accuracy: list[float]  # after each epoch
    seconds: list[float]  # until then


def compare(runs: list[str], targets: list[float], files: Files) -> list[CompareRow]:
    """Measures, writes and draws. runs: `[LABEL=]FOLDER` with a metrics.csv; one label several times is a group."""
    curves = [_read(label, folder) for label, folder in labelled(runs, "--run")]
    rows = [_row(curve, target) for curve in curves for target in targets]
    files.write(rows)
    _draw(files, curves, targets)
    cells = []
    for (label, target), group in group_by(rows, lambda row: (row.label, row.target), lambda row: row).items():
        reached = [row for row in group if row.epochs is not None]
        numbers = [_spread([getattr(row, name) for row in reached]) for name in ("epochs", "seconds")]
        cells.append((label, f"{100 * target:g} %", f"{len(reached)} of {len(group)}", *numbers))
    show("Training until the accuracy was reached", ("run", "target", "reached", "epochs", "seconds"), cells)
    return rows


def check_targets(targets: list[float]) -> None:
    """Raises ValueError: not shares."""
    check("--target", targets, TARGET)
    if not targets:
        raise ValueError("--target=[]: give an accuracy, such as 0.95")


def _read(label: str, folder: str) -> Curve:
    columns = read_log(folder)
    for name in (ACCURACY, SECONDS):
        if name not in columns:
            raise ValueError(f"--run={folder}: no {name} in its metrics.csv; is it the log of a fit?")
    first = min(columns.get("epoch", [0.0]))
    if first > 0:
        raise ValueError(
            f"--run={folder}: its log begins with epoch {first:g}, so it is of a resumed run, whose first part lies "
            "elsewhere; compare needs the whole"
        )
    seconds = list(itertools.accumulate(columns[SECONDS]))
    if len(seconds) != len(columns[ACCURACY]):
        raise ValueError(
            f"--run={folder}: {len(columns[ACCURACY])} validations but {len(seconds)} epochs in its metrics.csv; "
            "compare needs one validation an epoch"
        )
    return Curve(label, folder, columns[ACCURACY], seconds)


def _row(curve: Curve, target: float) -> CompareRow:
    first = next((i for i, value in enumerate(curve.accuracy) if value >= target), None)
    reached = (None, None) if first is None else (first + 1, curve.seconds[first])
    return CompareRow(curve.label, curve.run, target, *reached, max(curve.accuracy), curve.accuracy[-1])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def _draw(files: Files, curves: list[Curve], targets: list[float]) -> None:
    """Every run a line, runs of one label in one colour."""
    figure, axes = grid(1, 2, 5.2, 3.8)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        known = f"C{labels.index(curve.label)}"
        fresh = curve is next(c for c in curves if c.label == curve.label)
        percent = [100 * value for value in curve.accuracy]
        for axis, over in zip(axes[0], (range(1, len(percent) + 1), curve.seconds), strict=True):
            axis.plot(over, percent, color=known, alpha=0.8, linewidth=1.2, label=curve.label if fresh else None)
    for axis, over in zip(axes[0], ("epoch", "seconds of training"), strict=True):
        for target in targets:
            axis.axhline(100 * target, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel=over, ylabel="top-1 on the validation split (%)", ylim=(None, 101))
    whole_numbers(axes[0][0])
    axes[0][0].legend(fontsize=8, loc="lower right")
    files.save(figure)
