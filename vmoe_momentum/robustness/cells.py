"""One cell: one condition on one set of pictures, for all models at once. N pictures, L MoE blocks.

Outcomes lie on disk as soon as a cell is done, so that a long run goes on where it stopped.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from ..staging import draft_of
from .attacks import ATTACKS, Budget, Classifier, Stages, cross_entropy, frozen, input_gradient, run_attack
from .models import Model
from .pictures import Batch, Change, Pictures, batches
from .versions import versions

if TYPE_CHECKING:
    from .begun import Begun

EXAMPLES, FIVE = 6, 5
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


def told_condition(cell: Cell) -> str:
    """As rows call it: `mi-fgsm-20 from Residual` of a transfer attack."""
    return cell.condition if cell.source is None else f"{cell.condition}{FROM}{cell.source}"


class Outcome(NamedTuple):
    """One model in one cell, picture by picture, in the cell's order."""

    index: np.ndarray  # [N]
    correct: np.ndarray  # [N] bool
    predicted: np.ndarray  # [N]
    confidence: np.ndarray  # [N] largest softmax value, over the classes that count
    routing: dict[str, np.ndarray]  # block -> [N] 1 - mean IoU of expert sets against the clean picture
    zero_gradient: np.ndarray  # [N] bool, attacks only: the cross-entropy had no gradient at the clean picture
    # [N, 5] the likeliest of the classes that count, best first; [N, 0] where there are no more than five
    five: np.ndarray = np.zeros((0, 0), dtype=np.int64)


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
    begun: "Begun",
    source: Model | None = None,
) -> tuple[dict[str, Outcome], Tensor]:
    """Outcomes by model name, and a few of the pictures the first model saw (uint8).

    begun: what is answered already, and where answers go. source: whose pictures they are in a transfer attack.
    """
    views = list(dict.fromkeys(model.view for model in models))
    numbers = begun.numbers.tolist()
    shown = {numbers[i * len(numbers) // EXAMPLES] for i in range(EXAMPLES)}  # they lie class by class
    left = numbers[begun.done :]
    for batch in batches(cell.pictures, views, batch_size, workers, cell.change, left) if left else ():
        images = None if source is None else _attacked(cell, source, batch, device)
        found = {model.name: _answer(cell, model, batch, device, memory, images, begun) for model in models}
        own = [i for i, number in enumerate(batch.index.tolist()) if number in shown]
        seen = (found[models[0].name][1][own] * 255).round().byte().cpu()
        begun.add({name: outcome for name, (outcome, _) in found.items()}, seen)
        del found
        advance(len(batch.index))
    return begun.whole()


def _answer(
    cell: Cell, model: Model, batch: Batch, device: str, memory: Memory, made: Tensor | None, begun: "Begun"
) -> tuple[Outcome, Tensor]:
    """made: the pictures of a transfer attack."""
    labels = batch.labels.to(device)
    images = _images(batch, model, device)
    before = batch.clean[model.view].to(device).float() / 255 if batch.clean is not None else images
    zero = np.zeros(0, dtype=bool)
    pictures = (model.name, cell.pictures.paths[0], batch.index.numpy().tobytes(), batch.clean is None)
    if cell.kind == "noise":
        images = _noisy(images, batch.index, cell.budget)
    elif cell.kind == "attack":
        if ATTACKS[cell.attack].spends != "queries" and cell.source in (None, model.name):
            found = memory.get(
                ("gradient", *pictures), lambda: {"zero": _without_gradient(model.module, before, labels)}
            )  # fmt: skip
            zero = found["zero"].cpu().numpy()
        images = _attacked(cell, model, batch, device, begun.stages(model.name)) if made is None else made
    seed = crc32(batch.index.numpy().tobytes(), 0 if cell.budget is None else cell.budget.seed)
    with torch.inference_mode(), frozen(model.module, seed) if model.random else nullcontext():
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
        # of the logits: in float32 a softmax has many zeros, and nothing ranks those
        five = logits.topk(FIVE).indices if logits.shape[1] > FIVE else predicted.new_zeros((len(logits), 0))
        if cell.pictures.merged is not None:
            label_of = torch.tensor(cell.pictures.merged, device=device)
            predicted, five = label_of[predicted], label_of[five]
    correct = (predicted == labels).cpu().numpy()
    parts = (batch.index.numpy(), correct, predicted.cpu().numpy(), confidence.cpu().numpy())
    return Outcome(*parts, routing, zero, five.cpu().numpy()), images


def _images(batch: Batch, model: Model, device: str) -> Tensor:
    return batch.views[model.view].to(device).float() / 255


def _attacked(cell: Cell, model: Model, batch: Batch, device: str, stages: Stages | None = None) -> Tensor:
    router_loss = model.router_loss if cell.router_aware else None
    budget = cell.budget._replace(router_loss=router_loss, stages=stages)
    return run_attack(cell.attack, model.module, _images(batch, model, device), batch.labels.to(device), budget)


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


def join(parts: list[Outcome]) -> Outcome:
    """Of batches that follow each other."""
    blocks = parts[0].routing
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in Outcome._fields[:4]]
    routing = {block: np.concatenate([part.routing[block] for part in parts]) for block in blocks}
    zero, five = (np.concatenate([getattr(part, name) for part in parts]) for name in ("zero_gradient", "five"))
    return Outcome(*arrays, routing, zero, five)


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
        named = {name: getattr(outcome, name) for name in (*Outcome._fields[:4], "zero_gradient", "five")}
        return named | {f"routing/{block}": values for block, values in outcome.routing.items()}

    @staticmethod
    def outcome(arrays: dict[str, np.ndarray]) -> Outcome | None:
        """Back from them; None where one is missing."""
        routing = {name[8:]: values for name, values in arrays.items() if name.startswith("routing/")}
        try:
            first = (arrays[name] for name in Outcome._fields[:4])
            return Outcome(*first, routing, arrays["zero_gradient"], arrays["five"])
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
