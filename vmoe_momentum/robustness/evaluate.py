"""Runs a plan: every cell once, all models on the same pictures, finished cells kept, by one process or several."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from ..pictures import UnreadablePicture, picture_size
from ..progress import Meter, Work
from ..resources import usable_cores
from .answering import Memory, run_cell
from .attacks import ATTACKS
from .begun import Begun
from .cells import Cell, Store
from .claims import Claims
from .corruptions.base import SMALL
from .estimate import estimate_line
from .models import Model, View, check_model
from .pictures import batches
from .processes import ALONE, Helpers, Place
from .protocol import cost, count_pictures
from .todo import Key, Kind, Outcomes, Todo, kind_of, name_of

SHOWN = 4  # pictures of the run that models are checked with


class Evaluation(NamedTuple):
    cells: list[Cell]
    models: list[Model]
    outcomes: Outcomes
    examples: dict[int, torch.Tensor]  # number of the cell -> uint8 [up to 6, 3, H, W], as the first model saw them


def loader_workers(cells: Sequence[Cell], processes: int) -> int:
    """Of a process of so many: its share of the cores where pictures are photographs. Small ones take longer to send
    to another process than to decode; that one is unreadable is told where it is read.
    """
    try:
        photographs = any(min(picture_size(cell.pictures.paths[0])) >= SMALL for cell in cells)
    except UnreadablePicture:
        photographs = False
    return max(1, usable_cores() // processes) if photographs else 0


def evaluate(
    cells: Sequence[Cell],
    models: Sequence[Model],
    out: Path,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    place: Place = ALONE,
    helpers: Helpers | None = None,
) -> Evaluation:
    """Everything is checked before the first cell. Cells of an earlier call with the same pictures, models and settings
    are read from OUT/cells, and so are those of other processes that are at the same; all return the same, when every
    cell is there.

    place: the first process says how far all are. helpers: started once everything is checked, ended at the end.
    Raises ValueError: a model that gives no logits, a picture that cannot be decoded.
    """
    by_gradient = any(cell.attack is not None and ATTACKS[cell.attack].spends != "queries" for cell in cells)
    for model in models:
        model.module.to(device).eval()
    sizes, parts = batch_sizes(cells, batch_size), any(cell.attack and ATTACKS[cell.attack].parts for cell in cells)
    shown = _some_pictures(cells, models)
    passes = max((cell.budget.eot for cell in cells if cell.budget is not None), default=1)
    models = [
        check_model(model, device, by_gradient, sizes, parts, shown.get(model.view), passes > 1) for model in models
    ]
    if passes > 1 and not any(model.random for model in models):
        raise ValueError(f"--eot={passes}: every model answers the same again, so one pass is enough; leave it out")
    store, memory = Store(out / "cells"), Memory()
    named: dict[str | None, Model] = {model.name: model for model in models}  # None names none
    paths = {
        (model.name, number): store.path(cell, model, batch_size, device, named.get(cell.source))
        for number, cell in enumerate(cells) for model in models
    }  # fmt: skip
    work = Work((kind_of(cell), count_pictures(cell) * cost(cell, len(models)) * len(models)) for cell in cells)
    meter = Meter("robustness", work, shown=place.rank == 0)
    with Claims(store.folder) as claims, helpers or nullcontext(), meter:
        todo = Todo(cells, models, store, paths, claims, meter, helpers)
        if claims.missing:
            meter.say(f"{store.folder}: no locks here ({claims.missing}), so processes may compute a cell twice")
        if place.rank == 0 and (line := estimate_line(todo.by_cell(), models, batch_size, device, place.count)):
            meter.say(line)
        if not todo.left:
            meter.tell("all cells are kept")
        while todo.left:
            number, taken = todo.next(place.rank)
            if not taken:  # others did the rest
                break
            cell, kind = cells[number], kind_of(cells[number])
            meter.tell(name_of(cell))
            begun = Begun(store, {model.name: paths[model.name, number] for model in taken}, cell.numbers)
            todo.begin(number, taken, begun.done)
            each = len(taken) * cost(cell, len(models))  # a picture

            def advance(count: int, kind: Kind = kind, each: float = each) -> None:
                meter.advance(kind, count * each)
                todo.look(every=2.0)

            try:
                rest = (batch_size, workers, device, memory, advance, begun, named.get(cell.source))
                made, seen = run_cell(cell, taken, *rest)
            except Exception as error:
                error.add_note(name_of(cell))
                raise
            if taken[0] is models[0]:  # before what says that all is there
                store.write_examples(paths[models[0].name, number], seen)
            todo.keep(number, made)
    return Evaluation(list(cells), list(models), todo.outcomes, _examples(store, paths, len(cells)))


def _examples(store: Store, paths: dict[Key, Path], count: int) -> dict[int, torch.Tensor]:
    """Of each cell: those of the first model that has some."""
    found: dict[int, torch.Tensor] = {}
    for (_, number), path in paths.items():
        if number not in found and (pictures := store.read_examples(path)) is not None:
            found[number] = pictures
    return {number: found[number] for number in range(count) if number in found}


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
