"""Epochs and seconds that training runs take to reach an accuracy, or a perplexity, from their logs."""

import itertools
import statistics
from typing import NamedTuple

from ..ranges import Range, check
from .logs import read_log
from .output import Files, grid, group_by, show, whole_numbers
from .subjects import labelled

SECONDS = "train/epoch_seconds"
TARGET = Range(0, 1e9, above=True).because("an accuracy as a share, 95 % is 0.95, or a perplexity above 1")


class Score(NamedTuple):
    """What is to be reached."""

    column: str  # of the log
    shown: str
    factor: float  # of shown numbers
    unit: str
    lower: bool = False  # the lower the better


ACCURACY = Score("val/top1", "top-1 on the validation split (%)", 100.0, " %")
PERPLEXITY = Score("val/perplexity", "perplexity on the validation text", 1.0, "", lower=True)


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
    score: list[float]  # after each epoch
    seconds: list[float]  # until then


def compare(runs: list[str], targets: list[float], files: Files) -> list[CompareRow]:
    """Measures, writes and draws. runs: `[LABEL=]FOLDER` with a metrics.csv; one label several times is a group.

    targets: accuracies, as shares, of image classifiers; or perplexities, above 1, of language models.
    """
    score = PERPLEXITY if min(targets) > 1 else ACCURACY
    curves = [_read(label, folder, score) for label, folder in labelled(runs, "--run")]
    rows = [_row(curve, target, score) for curve in curves for target in targets]
    files.write(rows)
    _draw(files, curves, targets, score)
    cells = []
    for (label, target), group in group_by(rows, lambda row: (row.label, row.target), lambda row: row).items():
        reached = [row for row in group if row.epochs is not None]
        numbers = [_spread([getattr(row, name) for row in reached]) for name in ("epochs", "seconds")]
        cells.append((label, f"{score.factor * target:g}{score.unit}", f"{len(reached)} of {len(group)}", *numbers))
    show("Training until the target was reached", ("run", "target", "reached", "epochs", "seconds"), cells)
    return rows


def check_targets(targets: list[float]) -> None:
    """Raises ValueError: neither shares nor perplexities."""
    check("--target", targets, TARGET)
    if not targets:
        raise ValueError("--target=[]: give an accuracy, such as 0.95, or a perplexity")
    if min(targets) <= 1 < max(targets):
        raise ValueError(f"--target={targets}: use accuracies, which are shares, or perplexities, above 1, not both")


def _read(label: str, folder: str, score: Score) -> Curve:
    columns = read_log(folder)
    for name in (score.column, SECONDS):
        if name not in columns:
            other = "a target above 1 is a perplexity, 95 % is 0.95" if score.lower else "is it the log of a fit?"
            raise ValueError(f"--run={folder}: no {name} in its metrics.csv; {other}")
    first = min(columns.get("epoch", [0.0]))
    if first > 0:
        raise ValueError(
            f"--run={folder}: its log begins with epoch {first:g}, so it is of a resumed run, whose first part lies "
            "elsewhere; compare needs the whole"
        )
    seconds = list(itertools.accumulate(columns[SECONDS]))
    if len(seconds) != len(columns[score.column]):
        raise ValueError(
            f"--run={folder}: {len(columns[score.column])} validations but {len(seconds)} epochs in its metrics.csv; "
            "compare needs one validation an epoch"
        )
    return Curve(label, folder, columns[score.column], seconds)


def _row(curve: Curve, target: float, score: Score) -> CompareRow:
    done = (value <= target if score.lower else value >= target for value in curve.score)
    first = next((i for i, reached in enumerate(done) if reached), None)
    epochs, seconds = (None, None) if first is None else (first + 1, curve.seconds[first])
    best = min(curve.score) if score.lower else max(curve.score)
    return CompareRow(curve.label, curve.run, target, epochs, seconds, best, curve.score[-1])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def _draw(files: Files, curves: list[Curve], targets: list[float], score: Score) -> None:
    """Every run a line, runs of one label in one colour."""
    figure, axes = grid(1, 2, 5.2, 3.8)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        known = f"C{labels.index(curve.label)}"
        fresh = curve is next(c for c in curves if c.label == curve.label)
        shown = [score.factor * value for value in curve.score]
        for axis, over in zip(axes[0], (range(1, len(shown) + 1), curve.seconds), strict=True):
            axis.plot(over, shown, color=known, alpha=0.8, linewidth=1.2, label=curve.label if fresh else None)
    for axis, xlabel in zip(axes[0], ("epoch", "seconds of training"), strict=True):
        for target in targets:
            axis.axhline(score.factor * target, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel=xlabel, ylabel=score.shown, ylim=(None, None if score.lower else 101))
    whole_numbers(axes[0][0])
    axes[0][0].legend(fontsize=8, loc="upper right" if score.lower else "lower right")
    files.save(figure)
