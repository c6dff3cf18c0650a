"""What `predict` writes: one row an image, of all devices, in the order the images are stored.

B images, K classes, T of them shown.
"""

import csv
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from torch import Tensor

from ..files.staging import draft_of
from ..resources import room_for


class Predictions(NamedTuple):
    """Of some images: their numbers in the split, labels [B], the likeliest classes and how likely they are [B, T]."""

    images: Tensor
    labels: Tensor
    classes: Tensor
    probabilities: Tensor


class PredictionWriter(BasePredictionWriter):
    """`predict` writes predictions.csv into the log folder: image number, label, then the five likeliest classes."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(self, trainer: pl.Trainer, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        probabilities = torch.cat([batch[0] for batch in predictions])
        labels = torch.cat([batch[1] for batch in predictions])
        top = probabilities.topk(min(5, probabilities.shape[1]))
        seen = [numbers.cpu() for numbers in (_images(trainer, len(labels)), labels, top.indices, top.values)]
        found = merge(_of_all_ranks(Predictions(*seen)))
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks, too
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            names = pl_module.class_names or [str(index) for index in range(pl_module.num_classes)]
            write(folder / "predictions.csv", found, names)
            Console().print(f"{len(found.labels)} predictions: {folder / 'predictions.csv'}", soft_wrap=True)


def merge(parts: list[Predictions]) -> Predictions:
    """Those of all devices, by image number; an image that several devices saw (tensor parallel) once."""
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = joined[0].argsort(stable=True)
    numbers = joined[0][order]
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1]
    return Predictions(*(column[order[first]] for column in joined))


def write(path: Path, found: Predictions, names: list[str]) -> None:
    """One CSV row an image, whole or not at all; names: of the classes, in label order."""
    ranks = range(1, found.classes.shape[1] + 1)
    text = StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", "label", *[f"{what}_{r}" for r in ranks for what in ("class", "probability")]])
    for image, label, indices, values in zip(*(column.tolist() for column in found), strict=True):
        pairs = [(names[i], f"{v:.6f}") for i, v in zip(indices, values, strict=True)]
        writer.writerow([image, names[label], *[cell for pair in pairs for cell in pair]])
    content = text.getvalue().encode()
    with room_for(path, len(content)), draft_of(path) as file:
        file.write(content)


def _images(trainer: pl.Trainer, count: int) -> Tensor:
    """Numbers of the images that this process saw: the first `count` of its share."""
    plan = getattr(trainer.predict_dataloaders, "plan", None)
    if plan is None:  # a loader of another maker, from Python
        if trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices={trainer.world_size}: only data modules of vmoe_momentum say which device sees which "
                "image; predict on one device"
            )
        return torch.arange(count)
    return torch.cat([torch.from_numpy(batch) for batch in plan.batches(0)])[:count]


def _of_all_ranks(mine: Predictions) -> list[Predictions]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
