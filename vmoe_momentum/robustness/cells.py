"""One cell: one condition on one set of pictures, for all models at once. N pictures, L MoE blocks.

Outcomes lie on disk as soon as a cell is done, so that a long run goes on where it stopped.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..staging import draft_of
from .attacks import ATTACKS, Budget, Classifier, cross_entropy, input_gradient, run_attack
from .models import Model
from .pictures import Batch, Change, Pictures, batches
from .versions import versions

EXAMPLES = 6

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


class Outcome(NamedTuple):
    """One model in one cell, picture by picture, in the cell's order."""

    index: np.ndarray  # [N]
    correct: np.ndarray  # [N] bool
    predicted: np.ndarray  # [N]
    confidence: np.ndarray  # [N] largest softmax value, over the classes that count
    routing: dict[str, np.ndarray]  # block -> [N] 1 - mean IoU of expert sets against the clean picture
    zero_gradient: np.ndarray  # [N] bool, attacks only: the cross-entropy had no gradient at the clean picture


class Memory:
    """What is asked again in every cell: the routing of clean pictures, and which of them have no gradient.

    Kept while it is small; answers are the same without it.
    """

    def __init__(self, limit_bytes: int = 2**28) -> None:
        self.left, self.known = limit_bytes, {}

    def get(self, key: tuple, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key in self.known:
            return self.known[key]
        made = make()
        size = sum(value.numel() * value.element_size() for value in made.values())
        if size <= self.left:
            self.left -= size
            self.known[key] = made
        return made


def run_cell(
    cell: Cell,
    models: list[Model],
    batch_size: int,
    workers: int,
    device: str,
    memory: Memory,
    advance: Callable[[int], None],
) -> tuple[dict[str, Outcome], Tensor]:
    """Outcomes by model name, and a few of the pictures the first model saw (uint8)."""
    views = list(dict.fromkeys(model.view for model in models))
    found: dict[str, list[Outcome]] = {model.name: [] for model in models}
    seen: list[Tensor] = []
    numbers = range(len(cell.pictures.paths)) if cell.order is None else cell.order
    shown = {numbers[i * len(numbers) // EXAMPLES] for i in range(EXAMPLES)}  # they lie class by class
    order = None if cell.order is None else list(cell.order)
    for batch in batches(cell.pictures, views, batch_size, workers, cell.change, order):
        for model in models:
            outcome, images = _answer(cell, model, batch, device, memory)
            found[model.name].append(outcome)
            if model is models[0]:
                own = [i for i, number in enumerate(batch.index.tolist()) if number in shown]
                seen.append((images[own] * 255).round().byte().cpu())
        advance(len(batch.index))
    return {name: _join(parts) for name, parts in found.items()}, torch.cat(seen)


def _answer(cell: Cell, model: Model, batch: Batch, device: str, memory: Memory) -> tuple[Outcome, Tensor]:
    labels = batch.labels.to(device)
    images = batch.views[model.view].to(device).float() / 255
    before = batch.clean[model.view].to(device).float() / 255 if batch.clean is not None else images
    zero = np.zeros(0, dtype=bool)
    pictures = (model.name, cell.pictures.paths[0], batch.index.numpy().tobytes(), batch.clean is None)
    if cell.kind == "noise":
        images = _noisy(images, batch.index, cell.budget)
    elif cell.kind == "attack":
        if ATTACKS[cell.attack].spends != "queries":
            found = memory.get(
                ("gradient", *pictures), lambda: {"zero": _without_gradient(model.module, before, labels)}
            )  # fmt: skip
            zero = found["zero"].cpu().numpy()
        budget = cell.budget._replace(router_loss=model.router_loss if cell.router_aware else None)
        images = run_attack(cell.attack, model.module, images, labels, budget)
    with torch.inference_mode():
        routing = {}
        # of what was corrupted elsewhere, and of other sets, the clean picture is not at hand
        if model.routing is not None and cell.kind != "published" and not cell.pictures.whole:
            clean = memory.get(("routing", *pictures), lambda: model.routing(before)[1])
            logits, now = model.routing(images)
            routing = {block: routing_change(clean[block], now[block]).cpu().numpy() for block in clean}
        else:
            logits = model.module(images)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"--model={model.name}: gives logits that are not finite on {cell.pictures.name}, {cell.condition} "
                f"{cell.severity}; its answers mean nothing there"
            )
        logits = logits.float() if cell.pictures.classes is None else logits.float()[:, cell.pictures.classes]
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        if cell.pictures.merged is not None:
            predicted = torch.tensor(cell.pictures.merged, device=device)[predicted]
    correct = (predicted == labels).cpu().numpy()
    parts = (batch.index.numpy(), correct, predicted.cpu().numpy(), confidence.cpu().numpy())
    return Outcome(*parts, routing, zero), images


def routing_change(before: Tensor, after: Tensor) -> Tensor:
    """1 - IoU of each token's expert sets, mean over tokens. [B, N, E] bool -> [B].

    A token that no expert takes before and after has not changed (V-MoE's adversarial project counts it as changed, so
    that clean against clean is not 0 there).
    """
    both, either = (before & after).sum(dim=-1).float(), (before | after).sum(dim=-1).float()
    return (1.0 - torch.where(either > 0, both / either.clamp_min(1), 1.0)).mean(dim=-1)


def _noisy(images: Tensor, index: Tensor, budget: Budget) -> Tensor:
    """Noise of size eps, each picture its own: uniform in the Linf ball or on the L2 sphere, clipped to the box."""
    drawn = []
    for image, number in zip(images, index.tolist(), strict=True):
        generator = torch.Generator().manual_seed(budget.seed * 1_000_003 + number)
        if budget.norm == "Linf":
            noise = torch.rand(image.shape, generator=generator) * 2 - 1
        else:
            noise = torch.randn(image.shape, generator=generator)
            noise /= noise.norm()
        drawn.append(noise.to(images.device))
    return (images + budget.eps * torch.stack(drawn)).clamp(0.0, 1.0)


def _without_gradient(module: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        gradient = input_gradient(Classifier(module), images.clone(), labels.clone(), cross_entropy, Budget(0.0))
    return ~(gradient.flatten(1).abs().amax(dim=1) > 0)  # NaN is none either


def _join(parts: list[Outcome]) -> Outcome:
    blocks = parts[0].routing
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in Outcome._fields[:4]]
    routing = {block: np.concatenate([part.routing[block] for part in parts]) for block in blocks}
    return Outcome(*arrays, routing, np.concatenate([part.zero_gradient for part in parts]))


class Store:
    """Outcomes under OUT/cells, one file a model and cell, found again by everything that decided them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell, model: Model, batch_size: int, device: str) -> Path:
        """batch_size, device: as far as answers depend on them."""
        files = hashlib.sha256()
        numbers = range(len(cell.pictures.paths)) if cell.order is None else cell.order
        for number in numbers:
            path = cell.pictures.paths[number].absolute()
            stat = path.stat()
            files.update(os.fsencode(f"{path}/{stat.st_size}/{stat.st_mtime_ns}/{cell.pictures.labels[number]}"))
        facts: dict[str, Any] = {
            "model": model.provenance, "view": model.view, "kind": cell.kind, "condition": cell.condition,
            "severity": cell.severity, "change": cell.change, "attack": cell.attack, "budget": cell.budget,
            "router_aware": cell.router_aware, "files": files.hexdigest(), "classes": cell.pictures.classes,
            "batch_size": batch_size if cell.kind == "attack" or model.coupled else None,
            "device": torch.device(device).type, "versions": versions(),
        }  # fmt: skip
        facts |= {key: value for key in ("merged", "border") if (value := getattr(cell.pictures, key))}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]
        return self.folder / f"{digest}.npz"

    def names(self) -> set[str]:
        """Of the files that are there."""
        return set(os.listdir(self.folder)) if self.folder.is_dir() else set()

    def read(self, path: Path) -> Outcome | None:
        """None where it is not there, or damaged (then it is made again)."""
        try:
            with np.load(path) as file:
                routing = {name[8:]: file[name] for name in file.files if name.startswith("routing/")}
                return Outcome(*(file[name] for name in Outcome._fields[:4]), routing, file["zero_gradient"])
        except Exception:  # whatever damaged bytes make of zip, zlib and numpy
            return None

    def write(self, path: Path, outcome: Outcome) -> None:
        arrays = {name: getattr(outcome, name) for name in (*Outcome._fields[:4], "zero_gradient")}
        arrays |= {f"routing/{block}": values for block, values in outcome.routing.items()}
        self._write(path, lambda file: np.savez_compressed(file, **arrays))

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
