"""What is left of a plan, for all processes that share its cells: who takes what next, and what others have done."""

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..progress import Meter
from .begun import clear, spans, stop_of
from .cells import Cell, Outcome, Store, told_condition
from .claims import Claims
from .models import Model
from .processes import Helpers
from .protocol import cost, count_pictures

POLL_SECONDS = 0.5  # between looks at what others do, where there is nothing else to do
PATIENCE = 60.0  # seconds at least, after which an idle process does what another one has claimed
Key = tuple[str, int]  # model name, number of the cell
Outcomes = dict[Key, Outcome]
Kind = tuple[str, str]


class Todo:
    """What is left of a plan, shared by all processes with the same store: an answer of a model to a cell each.

    The first cell first, so that what cannot be done at all shows at once; then the dearest, so that at the end nobody
    waits long for somebody's last one.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        models: Sequence[Model],
        store: Store,
        paths: dict[Key, Path],
        claims: Claims,
        meter: Meter,
        helpers: Helpers | None = None,
    ) -> None:
        self.cells, self.models, self.store, self.paths = cells, models, store, paths
        self.claims, self.meter, self.helpers = claims, meter, helpers
        self.outcomes: Outcomes = {}
        dear = [count_pictures(cell) * cost(cell, len(models)) for cell in cells]
        order = sorted(range(1, len(cells)), key=lambda number: -dear[number])
        if claims.missing:  # each in an order of its own, so that not all are at the same
            random.Random(os.urandom(8)).shuffle(order)
        self.order = [0, *order]
        self.left = {(model.name, number) for number in self.order for model in models}
        self.begun = dict.fromkeys(self.left, 0)  # pictures that are answered, of cells that are not whole
        self.mine: set[Key] = set()  # which this process is at: it counts them itself
        self._collect(meter.skip)
        self.looked = time.monotonic()

    def by_cell(self) -> list[tuple[Cell, dict[str, int]]]:
        """Every cell, the models that have yet to answer it, and how many pictures each."""
        return [
            (cell, {model.name: count_pictures(cell) - self.begun[model.name, number]
                    for model in self.models if (model.name, number) in self.left})
            for number, cell in enumerate(self.cells)
        ]  # fmt: skip

    def next(self, rank: int) -> tuple[int, list[Model]]:
        """A cell and the models to ask, claimed until `keep`; waits while others have claimed all that is left.

        What they do not end in a multiple of its time is given here, too: they may be stuck. No model: nothing is left.
        """
        since = time.monotonic()
        while self.left:
            number, taken = self._claim()
            found = self.look()  # what was finished just before the claim is no longer left
            missing = [model for model in taken if (model.name, number) in self.left]
            self._give_back(number, [model for model in taken if model not in missing])
            if missing:
                return number, missing
            if taken or found:
                since = time.monotonic()
                continue
            last = sorted(self.left, key=lambda key: (self.order.index(key[1]), key[0]))
            name, number = last[rank % len(last)]
            if time.monotonic() - since > self._patience((name, number)):
                told = name_of(self.cells[number])
                self.meter.say(f"{told}: another process is at it too long; it is computed here, too")
                return number, [model for model in self.models if model.name == name]
            time.sleep(POLL_SECONDS)
        return 0, []

    def begin(self, number: int, models: list[Model], done: int) -> None:
        """This process goes on with a cell of which so many pictures are answered."""
        for key in ((model.name, number) for model in models):
            self._count(key, done, self.meter.skip)
            self.mine.add(key)

    def keep(self, number: int, made: dict[str, Outcome]) -> None:
        """On the disk, and for all others to see."""
        for name, outcome in made.items():
            self.store.write(self.paths[name, number], outcome)
            self.outcomes[name, number] = outcome
            self.left.discard((name, number))
            self.mine.discard((name, number))
        clear(self.store, {self.paths[name, number].stem for name in made}, self.store.names())
        self._give_back(number, [model for model in self.models if model.name in made])

    def look(self, every: float = 0.0) -> bool:
        """Whether others have finished something; not more often than each so many seconds."""
        if time.monotonic() - self.looked < every:
            return False
        self.looked = time.monotonic()
        for line in self.helpers.check() if self.helpers else ():
            self.meter.say(line)
        return self._collect(self.meter.help)

    def _collect(self, count: Callable[[Kind, float], None]) -> bool:
        """Reads what lies on the disk by now, and counts it; damaged files count as not there. Whether cells are whole
        that were not."""
        there = self.store.names()
        read = {key: self.store.read(self.paths[key]) for key in self.left if self.paths[key].name in there}
        found = {key: outcome for key, outcome in read.items() if outcome is not None}
        parts = spans(there)
        for key in self.left - self.mine:
            whole = count_pictures(self.cells[key[1]])
            self._count(key, whole if key in found else stop_of(parts.get(self.paths[key].stem, {})), count)
        clear(self.store, {self.paths[key].stem for key in found}, there)
        self.outcomes |= found
        self.left -= found.keys()
        return bool(found)

    def _count(self, key: Key, done: int, count: Callable[[Kind, float], None]) -> None:
        if done != self.begun[key]:
            kind, each = self._cost(key)
            count(kind, (done - self.begun[key]) * each)
            self.begun[key] = done

    def _claim(self) -> tuple[int, list[Model]]:
        """All models that can be had, as pictures are made once for all; one of an attack that makes its own."""
        for number in self.order:
            taken: list[Model] = []
            for model in self.models:
                alone = self.cells[number].kind == "attack" and self.cells[number].source is None and taken
                if (model.name, number) in self.left and not alone and self._take(number, model):
                    taken.append(model)
            if taken:
                return number, taken
        return 0, []

    def _take(self, number: int, model: Model) -> bool:
        return self.claims.take(self.paths[model.name, number].name)

    def _give_back(self, number: int, models: list[Model]) -> None:
        for model in models:
            self.claims.give_back(self.paths[model.name, number].name)

    def _cost(self, key: Key) -> tuple[Kind, float]:
        """Of a picture."""
        cell = self.cells[key[1]]
        return kind_of(cell), cost(cell, len(self.models))

    def _patience(self, key: Key) -> float:
        kind, each = self._cost(key)
        assert self.meter.work is not None  # of a plan one knows how much there is
        seconds = self.meter.work.seconds_of({kind: each * count_pictures(self.cells[key[1]])})
        return PATIENCE * 10 if seconds is None else max(PATIENCE, 3 * seconds)


def kind_of(cell: Cell) -> Kind:
    """What takes alike for the same cost: an attack, or a corruption made here."""
    return cell.kind, cell.attack or (cell.condition if cell.kind == "regenerated" else "")


def name_of(cell: Cell) -> str:
    return f"{cell.pictures.name}: {told_condition(cell)} {cell.severity}".strip()
