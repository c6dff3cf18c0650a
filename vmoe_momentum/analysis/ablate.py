"""A grid over any two settings and several seeds: one training run a row, a heat map of the means."""

import csv
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from rich.console import Console

from ..progress import track
from ..stopping import Stopped
from .output import Files, grid, show

Fit = Callable[[list[str]], dict[str, float]]
SCORES = {"top1": "val/top1", "loss": "val/loss", "train_loss": "train/loss_epoch"}


class Axis(NamedTuple):
    """One setting and its values, as they follow on fit's command line."""

    key: str
    values: list[str]


def parse_axis(text: str) -> Axis:
    """`KEY=0.3,0.5` or `KEY=[[5, 7], [3, 7]]` (YAML). Raises ValueError: no key, no values, or one twice."""
    key, equals, values = text.partition("=")
    key = key.removeprefix("--")
    if not (key and equals and values):
        raise ValueError(f"{text}: use KEY=VALUE,VALUE,... with a key of the config, such as model.optimizer.lr")
    if key in ("seed_everything", "data.seed") or key.startswith("trainer.logger"):
        raise ValueError(f"{text}: ablate sets {key} itself (seeds: --seeds); choose another setting")
    try:
        listed = yaml.safe_load(values) if values.startswith("[") else values.split(",")
        found = [value.strip() if isinstance(value, str) else json.dumps(value) for value in listed]
        same = {json.dumps(yaml.safe_load(value)) for value in found}
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{text}: not a list of settings in YAML ({' '.join(str(error).split())})") from error
    if not found or not all(found) or len(same) < len(found):
        raise ValueError(f"{text}: there is no value, an empty one, or the same one twice")
    return Axis(key, found)


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
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"--seeds={seeds}: use different numbers from 0 to 4294967295, such as [0,1,2]")
    for word in options:
        if word.startswith(("--trainer.logger", "--print_config", "--help", "--seed_everything", "--data.seed")):
            raise ValueError(f"{word}: not among the options of fit here; ablate sets seeds and loggers itself")
    cells = list(itertools.product(seeds, y.values, x.values))
    done = _read(files.out, x, y, options)
    for seed, *values in track(_corners(cells), "checking the grid"):
        check(_command(options, x, y, values, seed, files.out))
    _describe(files.out, x, y, options)
    path = files.out / "ablate.csv"
    _rewrite(path, x, y, done)
    for number, (seed, y_value, x_value) in enumerate(cells):
        if any((row[x.key], row[y.key], row["seed"]) == (x_value, y_value, str(seed)) for row in done):
            continue
        Console().rule(f"run {number + 1} of {len(cells)}: {_short(x)} {x_value}, {_short(y)} {y_value}, seed {seed}")
        start = time.perf_counter()
        try:
            scores = fit(_command(options, x, y, [y_value, x_value], seed, files.out))
        except (KeyboardInterrupt, Stopped):
            Console().print(f"stopped in run {number + 1}; the same command goes on with it")
            raise
        if SCORES["top1"] not in scores:
            raise ValueError(f"{SCORES['top1']} was not logged, so there is nothing to compare; let fit validate")
        found = {name: f"{scores.get(key, math.nan):.6g}" for name, key in SCORES.items()}
        row = {x.key: x_value, y.key: y_value, "seed": str(seed), **found}
        row |= {"epochs": f"{scores['epochs']:g}", "seconds": f"{time.perf_counter() - start:.1f}"}
        done.append(row)
        _rewrite(path, x, y, done)
    _draw(files, done, x, y)
    return done


def _corners(cells: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Each pair of values once: seeds change nothing that can be wrong."""
    return list({(y, x): (seed, y, x) for seed, y, x in reversed(cells)}.values())


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
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablate.json").write_text(json.dumps({"x": x.key, "y": y.key, "options": options}, indent=2) + "\n")


def _rewrite(path: Path, x: Axis, y: Axis, rows: list[dict[str, str]]) -> None:
    """The whole file under another name, then in one step: stopped at any time, it is as before or as after."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, _columns(x, y), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def _columns(x: Axis, y: Axis) -> list[str]:
    return [x.key, y.key, "seed", *SCORES, "epochs", "seconds"]


def _read(out: Path, x: Axis, y: Axis, options: list[str]) -> list[dict[str, str]]:
    """Whole rows of an earlier, unfinished call. Raises ValueError: it was about something else."""
    path, told = out / "ablate.csv", out / "ablate.json"
    if not path.exists():
        return []
    try:
        before = dict(json.loads(told.read_text()))
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--out={out}: ablate.csv cannot be continued ({error}); choose another folder") from error
    for name, value in {"x": x.key, "y": y.key, "options": options}.items():
        if before.get(name) != value:
            raise ValueError(
                f"--out={out}: the runs there have {name} {before.get(name)}, not {value}; choose another folder, or "
                "say the same to continue them"
            )
    return [row for row in rows if _is_whole(row, _columns(x, y))]


def _is_whole(row: dict[str, str], columns: list[str]) -> bool:
    """Not cut off, as by a full disk: those are run again."""
    if list(row) != columns or None in row.values():
        return False
    try:
        return len([float(row[name]) for name in columns[2:]]) == len(columns) - 2
    except ValueError:
        return False


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
