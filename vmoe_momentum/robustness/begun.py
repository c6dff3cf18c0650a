"""Cells that take long: what is answered so far lies on the disk, and a killed process costs a batch, not the cell.

A part is a file beside the cell's own, STEM.FIRST-STOP.part: one model's answers to the pictures FIRST to STOP - 1 of
the cell's order. Whoever goes on reads those that join without a gap. STEM.FIRST.stage holds what an attack of several
stages (AutoAttack's four) found so far in the batch that begins there. All of them go once the cell is whole.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cells import Outcome, Store, join

EVERY_SECONDS = 5.0  # at least between two writings: quick batches are kept several at once
_PART, _OWN = re.compile(r"(.+)\.(\d+)-(\d+)\.part"), re.compile(r"(.+?)\.\d+(-\d+)?\.(part|stage)")


def spans(names: Iterable[str]) -> dict[str, dict[int, int]]:
    """Of file names, stem -> FIRST -> STOP, the longest part where several begin alike."""
    found: dict[str, dict[int, int]] = {}
    for match in filter(None, map(_PART.fullmatch, names)):
        stem, first, stop = match[1], int(match[2]), int(match[3])
        own = found.setdefault(stem, {})
        own[first] = max(stop, own.get(first, 0))
    return found


def joined(own: dict[int, int]) -> list[tuple[int, int]]:
    """Those that join, from picture 0 on."""
    chain, place = [], 0
    while place in own and own[place] > place:
        chain.append((place, own[place]))
        place = own[place]
    return chain


def stop_of(own: dict[int, int]) -> int:
    """Pictures that need not be answered again."""
    return max((stop for _, stop in joined(own)), default=0)


class Begun:
    """Answers of some models to one cell as they come in; those of an earlier process first."""

    def __init__(
        self, store: Store, paths: dict[str, Path], numbers: Sequence[int], every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """paths: where each model's whole cell will lie. numbers: of the pictures, in the cell's order."""
        self.store, self.paths, self.numbers, self.clock = store, paths, np.array(numbers), clock
        self.every = EVERY_SECONDS if every is None else every
        self.found: dict[str, list[Outcome]] = {}
        self.seen: list[Tensor] = []  # of the first of these models
        self.done = self.kept = self._read()
        self.batches = {name: len(outcomes) for name, outcomes in self.found.items()}  # that are on the disk
        self.pictures, self.since = len(self.seen), clock()

    def add(self, outcomes: dict[str, Outcome], seen: Tensor) -> None:
        """What the models answered to the next batch."""
        for name, outcome in outcomes.items():
            self.found[name].append(outcome)
        self.seen.append(seen)
        self.done += len(outcome.index)  # the same for all
        if self.done < len(self.numbers) and self.clock() - self.since >= self.every:
            self._keep()

    def whole(self) -> tuple[dict[str, Outcome], Tensor]:
        """Once all is answered."""
        return {name: join(parts) for name, parts in self.found.items()}, torch.cat(self.seen)

    def stages(self, name: str) -> "Stages":
        """Of this model and the batch that comes next."""
        path = self.paths[name]
        return Stages(self.store, path.with_name(f"{path.stem}.{self.done}.stage"), self.every, self.clock)

    def _keep(self) -> None:
        for name, outcomes in self.found.items():
            path, first = self.paths[name], name == next(iter(self.found))
            seen = torch.cat(self.seen[self.pictures :]) if first else torch.zeros(0, dtype=torch.uint8)
            part = join(outcomes[self.batches[name] :])
            target = path.with_name(f"{path.stem}.{self.kept}-{self.done}.part")
            self.store.write_arrays(target, self.store.arrays(part) | {"seen": seen.numpy()})
            self.batches[name] = len(outcomes)
            path.with_name(f"{path.stem}.{self.kept}.stage").unlink(missing_ok=True)
        self.kept, self.pictures, self.since = self.done, len(self.seen), self.clock()

    def _read(self) -> int:
        """Up to where all the models have answered; parts that are damaged, or of other pictures, go."""
        while True:
            names = self.store.names()
            chains = {name: joined(spans(names).get(path.stem, {})) for name, path in self.paths.items()}
            common = set.intersection(*({0} | {stop for _, stop in chain} for chain in chains.values()))
            self.found, self.seen, damaged = {name: [] for name in self.paths}, [], None
            for name, path in self.paths.items():
                for first, stop in (span for span in chains[name] if span[1] <= max(common)):
                    file = path.with_name(f"{path.stem}.{first}-{stop}.part")
                    arrays = self.store.read_arrays(file)
                    outcome = None if arrays is None else self.store.outcome(arrays)
                    if arrays is None or outcome is None or not np.array_equal(outcome.index, self.numbers[first:stop]):
                        damaged = damaged or file
                        continue
                    self.found[name].append(outcome)
                    if name == next(iter(self.paths)):
                        self.seen.append(torch.from_numpy(arrays["seen"]))
            if damaged is None:
                return max(common)
            damaged.unlink(missing_ok=True)


class Stages:
    """What an attack of several stages has found in one batch, for another process to go on with (attacks.Stages)."""

    def __init__(self, store: Store, path: Path, every: float, clock: Callable[[], float]) -> None:
        self.store, self.path, self.every, self.clock = store, path, every, clock
        self.since = clock()

    def load(self) -> dict[str, Tensor]:
        """{} where there is nothing."""
        found = self.store.read_arrays(self.path) or {}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def keep(self, found: dict[str, Tensor]) -> None:
        if self.clock() - self.since >= self.every:
            self.store.write_arrays(self.path, {name: values.cpu().numpy() for name, values in found.items()})
            self.since = self.clock()


def clear(store: Store, stems: set[str], names: Iterable[str]) -> None:
    """Removes the parts and stages of cells that are whole."""
    for name in names:
        match = _OWN.fullmatch(name)
        if match and match[1] in stems:
            (store.folder / name).unlink(missing_ok=True)
