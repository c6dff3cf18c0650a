"""One cell: one condition on one set of pictures, and what models answered. N pictures. answering.py runs it.

Outcomes lie on disk as soon as a cell is done, so that a long run goes on where it stopped.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files.staging import draft_of
from .attacks import Budget
from .models import Model
from .pictures import Change, Pictures
from .versions import versions

FROM = " from "  # between attack and source

Kind = Literal["clean", "published", "regenerated", "noise", "attack"]


class Cell(NamedTuple):
    """What is done to which pictures."""

    pictures: Pictures
    kind: Kind
    condition: str  # as in the rows: clean, gaussian_noise, pgd-20, uniform-noise
    severity: str = ""  # 1 to 5, or eps: of 255 in Linf, of 1 in L2
    change: Change | None = None
    attack: str | None = None
    budget: Budget | None = None
    router_aware: bool = False  # the attack also drives the routers' loss
    order: tuple[int, ...] | None = None  # numbers of the pictures; None for all
    source: str | None = None  # a transfer attack: name of the model that the pictures are made on

    @property
    def numbers(self) -> Sequence[int]:
        """Of its pictures."""
        return range(len(self.pictures.paths)) if self.order is None else self.order

    @property
    def allowance(self) -> Budget:
        """Of noise and attacks, which all have one."""
        assert self.budget is not None
        return self.budget


def told_condition(cell: Cell) -> str:
    """As rows call it: `mi-fgsm-20 from Residual` of a transfer attack."""
    return cell.condition if cell.source is None else f"{cell.condition}{FROM}{cell.source}"


class Outcome(NamedTuple):
    """One model in one cell, picture by picture, in the cell's order."""

    # [N] of the pictures
    index: np.ndarray  # type: ignore[assignment]  # hides the tuple's method
    correct: np.ndarray  # [N] bool
    predicted: np.ndarray  # [N]
    confidence: np.ndarray  # [N] largest softmax value, over the classes that count
    routing: dict[str, np.ndarray]  # block -> [N] 1 - mean IoU of expert sets against the clean picture
    zero_gradient: np.ndarray  # [N] bool, attacks only: the cross-entropy had no gradient at the clean picture
    # [N, 5] the likeliest of the classes that count, best first; [N, 0] where there are no more than five
    five: np.ndarray = np.zeros((0, 0), dtype=np.int64)


_ARRAYS = tuple(name for name in Outcome._fields if name != "routing")


def join(parts: list[Outcome]) -> Outcome:
    """Of batches that follow each other."""
    blocks = parts[0].routing
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
    routing = {block: np.concatenate([part.routing[block] for part in parts]) for block in blocks}
    return Outcome(**arrays, routing=routing)


def _decisive(provenance: dict[str, Any]) -> dict[str, Any]:
    """Of a file, whose sha256 decides its settings, without these: a new setting's default changes nothing."""
    return {key: value for key, value in provenance.items() if key != "settings" or "sha256" not in provenance}


class Store:
    """Outcomes under OUT/cells, one file a model and cell, found again by everything that decided them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell, model: Model, batch_size: int, device: str, source: Model | None = None) -> Path:
        """batch_size, device: as far as answers depend on them. source: of a transfer attack."""
        files = hashlib.sha256()
        for number in cell.numbers:
            path = cell.pictures.paths[number].absolute()
            stat = path.stat()
            files.update(os.fsencode(f"{path}/{stat.st_size}/{stat.st_mtime_ns}/{cell.pictures.labels[number]}"))
        facts: dict[str, Any] = {
            "model": _decisive(model.provenance), "view": model.view, "kind": cell.kind, "condition": cell.condition,
            "severity": cell.severity, "change": cell.change, "attack": cell.attack, "budget": cell.budget,
            "router_aware": cell.router_aware, "files": files.hexdigest(), "classes": cell.pictures.classes,
            "batch_size": batch_size if cell.kind == "attack" or model.coupled else None,
            "device": torch.device(device).type, "versions": versions(), "outcome": Outcome._fields,
            "source": None if source is None else (_decisive(source.provenance), source.view),
        }  # fmt: skip
        facts |= {key: value for key in ("merged", "border") if (value := getattr(cell.pictures, key))}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]
        return self.folder / f"{digest}.npz"

    def names(self) -> set[str]:
        """Of the files that are there."""
        return set(os.listdir(self.folder)) if self.folder.is_dir() else set()

    def read(self, path: Path) -> Outcome | None:
        """None where it is not there, or damaged (then it is made again)."""
        arrays = self.read_arrays(path)
        return None if arrays is None else self.outcome(arrays)

    def write(self, path: Path, outcome: Outcome) -> None:
        self.write_arrays(path, self.arrays(outcome))

    @staticmethod
    def arrays(outcome: Outcome) -> dict[str, np.ndarray]:
        """By their names in a file."""
        named = {name: getattr(outcome, name) for name in _ARRAYS}
        return named | {f"routing/{block}": values for block, values in outcome.routing.items()}

    @staticmethod
    def outcome(arrays: dict[str, np.ndarray]) -> Outcome | None:
        """Back from them; None where one is missing."""
        routing = {name[8:]: values for name, values in arrays.items() if name.startswith("routing/")}
        try:
            return Outcome(**{name: arrays[name] for name in _ARRAYS}, routing=routing)
        except KeyError:
            return None

    def read_arrays(self, path: Path) -> dict[str, np.ndarray] | None:
        """None where the file is not there, or damaged."""
        try:
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
        except Exception:  # whatever damaged bytes make of zip, zlib and numpy
            return None

    def write_arrays(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        # the stub takes any name for its option allow_pickle
        self._write(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]

    def read_examples(self, path: Path) -> Tensor | None:
        """Pictures kept beside the first model's outcome."""
        try:
            return torch.from_numpy(np.load(path.with_suffix(".npy")))
        except Exception:
            return None

    def write_examples(self, path: Path, pictures: Tensor) -> None:
        self._write(path.with_suffix(".npy"), lambda file: np.save(file, pictures.numpy()))

    def _write(self, path: Path, fill: Callable[[BinaryIO], None]) -> None:
        """Whole or not at all, also when two runs write the same cell; what a killed one left of its attempt goes."""
        content = io.BytesIO()
        fill(content)
        try:
            with draft_of(path) as file:
                file.write(content.getvalue())
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written ({error.strerror}): {len(content.getvalue()):,} bytes needed; make room, "
                "or choose another --out"
            ) from error
