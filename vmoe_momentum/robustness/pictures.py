"""Pictures from disk: decoded once a cell, corrupted, and cut for every model's view. uint8 [B, 3, H, W]."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from ..pictures import UnreadablePicture, read_picture
from ..resources import check_sockets
from .corruptions import corrupt
from .corruptions.base import SMALL
from .models import View

CORRUPTED = View(224, 224 / 256, "bilinear")  # the published images: Resize(256), CenterCrop(224), the corruption


class Pictures(NamedTuple):
    """A labelled set of files."""

    name: str  # of the dataset
    paths: list[Path]
    labels: list[int]  # positions among `classes` where given, else class indices of the model
    classes: list[int] | None = None  # logits that count, ascending: ImageNet-A, -R, -O
    whole: bool = False  # published at their final size: never cropped
    labelled: str = ""  # how folder names became labels
    merged: list[int] | None = None  # the label that each of `classes` is, where several are one: ObjectNet
    border: int = 0  # pixels around each that are no part of it
    made: str = ""  # how they were corrupted, where that was not by the set's authors

    @property
    def labels_that_count(self) -> int | None:
        """How many; None for all of the model's classes."""
        return None if self.classes is None else len(set(self.merged or self.classes))

    def only(self, order: Sequence[int]) -> "Pictures":
        """Those of these numbers."""
        return self._replace(paths=[self.paths[i] for i in order], labels=[self.labels[i] for i in order])


class Batch(NamedTuple):
    # [B] number of the picture
    index: Tensor  # type: ignore[assignment]  # hides the tuple's method
    labels: Tensor  # [B]
    views: dict[View, Tensor]  # uint8
    clean: dict[View, Tensor] | None  # the same pictures before a corruption made here


class Change(NamedTuple):
    """A regenerated corruption."""

    name: str
    severity: int
    seed: int


_Item = tuple[int, int, list[Tensor], list[Tensor]]  # number, label, the picture for each view, and before a change


class _Files(Dataset[_Item | str]):
    def __init__(self, pictures: Pictures, views: list[View], change: Change | None, order: list[int]) -> None:
        self.pictures, self.views, self.change, self.order = pictures, views, change, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> _Item | str:
        """A message where the picture is damaged: an exception out of a worker would come with the worker's stack."""
        try:
            return self._read(place)
        except ValueError as error:
            return str(error)

    def _read(self, place: int) -> _Item:
        index = self.order[place]
        path = self.pictures.paths[index]
        clean: dict[View, Tensor] = {}
        cut: dict[View, Tensor] = {}
        for upright in dict.fromkeys(view.upright for view in self.views):
            views = [view for view in self.views if view.upright == upright]
            picture, whole = read_inside(path, upright, self.pictures.border), self.pictures.whole
            if self.change is not None:
                base = for_corruption(picture)
                clean |= {view: as_tensor(fit(base, view)) for view in views}
                key = f"{path.parent.name}/{path.name}"
                made = corrupt(np.asarray(base), self.change.name, self.change.severity, self.change.seed, key)
                picture, whole = Image.fromarray(made), True
            cut |= {view: as_tensor(fit(picture, view) if whole else show(picture, view)) for view in views}
        shown, before = ([found[view] for view in self.views] if found else [] for found in (cut, clean))
        return index, self.pictures.labels[index], shown, before


def batches(
    pictures: Pictures,
    views: list[View],
    batch_size: int,
    workers: int,
    change: Change | None = None,
    order: list[int] | None = None,
) -> Iterator[Batch]:
    """order: numbers of the pictures wanted; all by default. Every picture once, the last batch as it comes."""
    files = _Files(pictures, views, change, list(range(len(pictures.paths))) if order is None else order)
    if workers:
        check_sockets("--workers")
    loader = DataLoader(files, batch_size, num_workers=workers, collate_fn=list)
    for items in loader:
        for item in items:
            if isinstance(item, str):
                raise ValueError(item)
        index, labels, cut, clean = zip(*items, strict=True)
        stacked = {view: torch.stack([each[i] for each in cut]) for i, view in enumerate(views)}
        before = {view: torch.stack([each[i] for each in clean]) for i, view in enumerate(views)} if clean[0] else None
        yield Batch(torch.tensor(index), torch.tensor(labels), stacked, before)


def for_corruption(picture: Image.Image) -> Image.Image:
    """The part that the published corruptions are of; all of a small picture."""
    return picture if min(picture.size) < SMALL else crop(picture, CORRUPTED)


def read_inside(path: Path, upright: bool, border: int) -> Image.Image:
    """What is within a border of so many pixels. Raises UnreadablePicture."""
    picture = read_picture(path, upright)
    if border and min(picture.size) <= 2 * border:
        told = f"{picture.width} x {picture.height} px, of which a border of {border} is to be cut off"
        raise UnreadablePicture(path, told)
    return ImageOps.crop(picture, border) if border else picture


def show(picture: Image.Image, view: View) -> Image.Image:
    """As evaluation shows it: the middle of a photograph, all of a small picture."""
    return fit(picture, view) if min(picture.size) < SMALL else crop(picture, view)


def crop(picture: Image.Image, view: View) -> Image.Image:
    """timm's evaluation: the shorter side (or both, for squash) to size / crop_pct, then the middle."""
    side = int(view.size / view.crop_pct)
    return TF.center_crop(
        TF.resize(picture, [side, side] if view.squash else side, InterpolationMode(view.interpolation)),
        [view.size, view.size],
    )


def fit(picture: Image.Image, view: View) -> Image.Image:
    """Whole, without a crop; as it is where it has the size."""
    if picture.size == (view.size, view.size):
        return picture
    return TF.resize(picture, [view.size, view.size], InterpolationMode(view.interpolation))


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def subset(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` numbers, ascending, the same ones for the same seed."""
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))
