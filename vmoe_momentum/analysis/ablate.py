"""A grid over any two settings and several seeds: one training run a row, a heat map of the means."""

import csv
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from rich.console import Console

from .output import Files, grid, show, track

Fit = Callable[[list[str]], dict[str, float]]
SCORES = {"top1": "val/top1", "loss": "val/loss", "train_loss": "train/loss_epoch"}


class Axis(NamedTuple):
    """One setting and its values, as they follow on fit's command line."""

    key: str
    values: list[str]


def parse_axis(text: str) -> Axis:
    """`KEY=0.3,0.5` or `KEY=[[5, 7], [3, 7]]` (YAML). Raises ValueError: no key, no values, or one twice."""
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise ValueError(f"{text}: use KEY=VALUE,VALUE,... with a key of the config, such as model.optimizer.lr")
    try:
        listed = yaml.safe_load(values) if values.startswith("[") else values.split(",")
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: not a list in YAML ({' '.join(str(error).split())})") from error
    found = [value.strip() if isinstance(value, str) else json.dumps(value) for value in listed]
    if not all(found) or len(set(found)) < len(found):
        raise ValueError(f"{text}: a value is empty or there twice")
    return Axis(key.removeprefix("--"), found)


def ablate(
    fit: Fit, check: Callable[[list[str]], None], options: list[str], x: Axis, y: Axis, seeds: list[int], files: Files
) -> list[dict[str, str]]:
    """Trains what the CSV does not have yet, then draws.

    fit: trains by a command line and gives what was logged last; check: raises where such a command line is wrong.
    options: of fit, for all runs. Every cell is checked before the first run. The score is the last epoch's on the
    validation split, without any selection.
    """
    if x.key == y.key:
        raise ValueError(f"--x and --y are both {x.key}; give two settings")
    cells = list(itertools.product(seeds, y.values, x.values))
    done = _read(files.out, x, y, options)
    for seed, *values in track(_corners(cells), "checking the grid"):
        check(_command(options, x, y, values, seed, files.out))
    _describe(files.out, x, y, options)
    columns = [x.key, y.key, "seed", *SCORES, "epochs", "seconds"]
    path = files.out / "ablate.csv"
    for number, (seed, y_value, x_value) in enumerate(cells):
        if any((row[x.key], row[y.key], row["seed"]) == (x_value, y_value, str(seed)) for row in done):
            continue
        Console().rule(f"run {number + 1} of {len(cells)}: {_short(x)} {x_value}, {_short(y)} {y_value}, seed {seed}")
        start = time.perf_counter()
        scores = fit(_command(options, x, y, [y_value, x_value], seed, files.out))
        found = {name: f"{scores.get(key, math.nan):.6g}" for name, key in SCORES.items()}
        row = {x.key: x_value, y.key: y_value, "seed": str(seed), **found}
        row |= {"epochs": f"{scores['epochs']:g}", "seconds": f"{time.perf_counter() - start:.1f}"}
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        done.append(row)
    _draw(files, done, x, y)
    return done


def _corners(cells: list[tuple]) -> list[tuple]:
    """Each pair of values once: seeds change nothing that can be wrong."""
    return list({tuple(values): (seed, *values) for seed, *values in reversed(cells)}.values())


def _command(options: list[str], x: Axis, y: Axis, values: list[str], seed: int, out: Path) -> list[str]:
    """values: y's, then x's."""
    y_value, x_value = values
    name = f"{_short(x)}={x_value}_{_short(y)}={y_value}_seed{seed}".replace("/", "-").replace(" ", "")
    return [
        *options,
        f"--{x.key}={x_value}",
        f"--{y.key}={y_value}",
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={out / 'runs'}",
        f"--trainer.logger.name={name}",
    ]


def _short(axis: Axis) -> str:
    return axis.key.rpartition(".")[2]


def _describe(out: Path, x: Axis, y: Axis, options: list[str]) -> None:
    (out / "ablate.json").write_text(json.dumps({"x": x.key, "y": y.key, "options": options}, indent=2) + "\n")


def _read(out: Path, x: Axis, y: Axis, options: list[str]) -> list[dict[str, str]]:
    """Rows of an earlier, unfinished call. Raises ValueError: it was about something else."""
    path, told = out / "ablate.csv", out / "ablate.json"
    if not path.exists():
        return []
    try:
        before = json.loads(told.read_text())
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        keep = [row for row in rows if row["seconds"]]  # a row cut off by a full disk is run again
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--out={out}: ablate.csv cannot be continued ({error!r}); choose another folder") from error
    for name, value in {"x": x.key, "y": y.key, "options": options}.items():
        if before.get(name) != value:
            raise ValueError(
                f"--out={out}: the runs there have {name} {before.get(name)}, not {value}; choose another folder, or "
                "say the same to continue them"
            )
    return keep


def _draw(files: Files, rows: list[dict[str, str]], x: Axis, y: Axis) -> None:
    """Mean of top-1 over seeds, with the sample standard deviation, a cell a pair of values."""
    figure, axes = grid(1, 1, 2.2 + 1.15 * len(x.values), 1.8 + 0.75 * len(y.values))
    axis, means = axes[0][0], np.full((len(y.values), len(x.values)), np.nan)
    lines = []
    for i, y_value in enumerate(y.values):
        for j, x_value in enumerate(x.values):
            found = [row for row in rows if (row[x.key], row[y.key]) == (x_value, y_value)]
            top1 = [100 * float(row["top1"]) for row in found if math.isfinite(float(row["loss"]))]
            spread = statistics.stdev(top1) if len(top1) > 1 else math.nan
            if top1:
                means[i, j] = statistics.mean(top1)
            lost = len(found) - len(top1)
            text = (f"{means[i, j]:.1f}" if top1 else "") + (f"\n± {spread:.1f}" if len(top1) > 1 else "")
            axis.text(j, i, text + (f"\n{lost} diverged" if lost else ""), ha="center", va="center", fontsize=9)
            lines.append((x_value, y_value, len(found), float(means[i, j]), float(spread), lost))
    image = axis.imshow(means, cmap="YlGn", aspect="auto", alpha=0.6)
    axis.set_xticks(range(len(x.values)), x.values)
    axis.set_yticks(range(len(y.values)), y.values)
    seeds = len({row["seed"] for row in rows})
    axis.set(xlabel=_short(x), ylabel=_short(y))
    axis.set_title(f"Top-1 (%), mean ± standard deviation, seeds: {seeds}", fontsize=9)
    figure.colorbar(image, ax=axis)
    files.save(figure)
    show("Top-1 (%), last epoch", (_short(x), _short(y), "seeds", "mean", "std", "diverged"), lines)
