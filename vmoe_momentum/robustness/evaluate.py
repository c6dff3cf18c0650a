"""Runs a plan: every cell once, all models on the same pictures, finished cells kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..progress import Meter, Work
from .attacks import ATTACKS
from .cells import Cell, Memory, Outcome, Store, run_cell
from .estimate import estimate_line
from .models import Model, View, check_model
from .pictures import batches
from .protocol import cost, count_pictures

SHOWN = 4  # pictures of the run that models are checked with
Outcomes = dict[tuple[str, int], Outcome]  # (model name, number of the cell)


class Evaluation(NamedTuple):
    cells: list[Cell]
    models: list[Model]
    outcomes: Outcomes
    examples: dict[int, torch.Tensor]  # number of the cell -> uint8 [up to 6, 3, H, W], as the first model saw them


def evaluate(
    cells: Sequence[Cell],
    models: Sequence[Model],
    out: Path,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
) -> Evaluation:
    """Everything is checked before the first cell. Cells of an earlier call with the same pictures, models and settings
    are read from OUT/cells.

    Raises ValueError: a model that gives no logits, a picture that cannot be decoded.
    """
    by_gradient = any(cell.attack is not None and ATTACKS[cell.attack].spends != "queries" for cell in cells)
    for model in models:
        model.module.to(device).eval()
    sizes, parts = batch_sizes(cells, batch_size), any(cell.attack and ATTACKS[cell.attack].parts for cell in cells)
    shown = _some_pictures(cells, models)
    models = [check_model(model, device, by_gradient, sizes, parts, shown.get(model.view)) for model in models]
    store, memory, outcomes, examples = Store(out / "cells"), Memory(), {}, {}
    work = Work((_kind(cell), count_pictures(cell) * cost(cell) * len(models)) for cell in cells)
    places = [{model.name: store.path(cell, model, batch_size, device) for model in models} for cell in cells]
    left = [
        (cell, [name for name, path in paths.items() if not path.is_file()])
        for cell, paths in zip(cells, places, strict=True)
    ]
    with Meter("robustness", work) as meter:
        line = estimate_line(left, models, batch_size, device)
        if line is not None:
            meter.say(line)
        for number, cell in enumerate(cells):
            kind = _kind(cell)
            meter.tell(f"{cell.pictures.name}: {cell.condition} {cell.severity}".strip())
            paths = places[number]
            known = {name: found for name, path in paths.items() if (found := store.read(path)) is not None}
            outcomes |= {(name, number): found for name, found in known.items()}
            missing = [model for model in models if model.name not in known]
            meter.skip(kind, len(known) * count_pictures(cell) * cost(cell))
            shown = next((s for path in paths.values() if (s := store.read_examples(path)) is not None), None)
            if missing:
                each = len(missing) * cost(cell)  # a picture
                made, seen = run_cell(
                    cell, missing, batch_size, workers, device, memory,
                    lambda n, kind=kind, each=each: meter.advance(kind, n * each),
                )  # fmt: skip
                for name, outcome in made.items():
                    store.write(paths[name], outcome)
                    outcomes[name, number] = outcome
                if missing[0] is models[0]:
                    shown = seen
                    store.write_examples(paths[models[0].name], shown)
            if shown is not None:
                examples[number] = shown
    return Evaluation(list(cells), list(models), outcomes, examples)


def batch_sizes(cells: Sequence[Cell], batch_size: int) -> set[int]:
    """Of every batch that will come: full ones and last ones."""
    counts = {count_pictures(cell) for cell in cells}
    return {min(batch_size, n) for n in counts} | {n % batch_size for n in counts if n % batch_size}


def _some_pictures(cells: Sequence[Cell], models: Sequence[Model]) -> dict[View, torch.Tensor]:
    """A few of the first set, for each view."""
    pictures = cells[0].pictures
    count = min(SHOWN, len(pictures.paths))
    order = [k * len(pictures.paths) // count for k in range(count)]
    return next(batches(pictures, list({model.view for model in models}), count, 0, None, order)).views


def _kind(cell: Cell) -> tuple[str, str]:
    """What takes alike for the same cost: an attack, or a corruption made here."""
    return cell.kind, cell.attack or (cell.condition if cell.kind == "regenerated" else "")
