"""Plain image files behind `EpochLoader`, decoded by Pillow in torch DataLoader workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from ..pictures import UnreadablePicture, read_picture
from .batches import BatchPlan
from .layout import ImageFile
from .loader import Batch, EpochLoader

_IMAGENET_MEAN = (124, 116, 104)  # RGB of 255, what timm fills uncovered corners with


class TrainTransform(NamedTuple):
    """Random resized crop (bilinear, antialiased), flip with probability `flip`, then RandAugment's `policy`."""

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    policy: Callable[[Image.Image], Image.Image] | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
        image = _crop_and_resize(image, top, left, height, width, self.size)
        if torch.rand(()).item() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image if self.policy is None else self.policy(image)


class EvalTransform(NamedTuple):
    """Centre crop of `ratio` times the shorter side, resized (bilinear, antialiased)."""

    size: int
    ratio: float

    def __call__(self, image: Image.Image) -> Image.Image:
        side = max(1, int(self.ratio * min(image.size)))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return _crop_and_resize(image, top, left, side, side, self.size)


def rand_augment(policy: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment of `policy`, e.g. "rand-m10-n2". Raises ValueError when timm does not understand it."""
    from timm.data.auto_augment import rand_augment_transform

    try:
        # As timm.data.create_transform: translations up to 45 % of the side, uncovered corners in ImageNet's mean.
        return rand_augment_transform(policy, {"translate_const": int(size * 0.45), "img_mean": _IMAGENET_MEAN})
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.randaugment={policy!r}: not a timm RandAugment policy; use one such as 'rand-m10-n2'"
            " (10 of 10 in strength, 2 operations an image) or null"
        ) from error


class FolderLoader(EpochLoader):
    """Batches of one split's image files.

    Args:
        files: Images and labels in the dataset's order.
        plan: Which images make which batch.
        transform: Of an epoch: picture to picture of the final size; its draws from python's, numpy's and torch's
            generators depend on (seed, epoch, draw) alone, whatever the number of workers.
        num_workers: Worker processes; 0 decodes in this process.
        upright: Turn pictures as their EXIF orientation says.
    """

    def __init__(
        self,
        files: list[ImageFile],
        plan: BatchPlan,
        *,
        transform: Callable[[int], Callable[[Image.Image], Image.Image]],
        num_workers: int,
        upright: bool = False,
    ) -> None:
        super().__init__(plan)
        self.files, self.transform, self.num_workers, self.upright = files, transform, num_workers, upright

    def open(self, batches: list[np.ndarray], epoch: int) -> Generator[Batch, None, None]:
        loader = DataLoader(
            _Images(self.files, self.transform(epoch), self.plan.seed, epoch, self.upright),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: drawing worker seeds from the global one would make training depend on this loader.
            generator=torch.Generator().manual_seed(self.plan.seed),
        )
        yield from loader


class _Images(Dataset):
    def __init__(self, files: list[ImageFile], transform: Callable, seed: int, epoch: int, upright: bool) -> None:
        self.files, self.transform, self.seed, self.epoch, self.upright = files, transform, seed, epoch, upright

    def __getitem__(self, draw: int) -> tuple[np.ndarray, int]:
        path, label = self.files[draw % len(self.files)]
        try:
            image = read_picture(path, self.upright)
        except UnreadablePicture as error:
            raise ValueError(
                f"{path}: {error.reason}; replace it, or find every such file with `vmoe-momentum data verify`"
            ) from error
        with _seeded(self.seed, self.epoch, draw):
            return np.array(self.transform(image)), label


def _collate(samples: list[tuple[np.ndarray, int]]) -> Batch:
    images = torch.from_numpy(np.stack([image for image, _ in samples]))  # [B, H, W, 3]
    return images.permute(0, 3, 1, 2), torch.tensor([label for _, label in samples])


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """The three global generators seeded by `key` inside, as they were outside: training shares them."""
    sequence = np.random.SeedSequence(key)
    seeds = sequence.generate_state(2)
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.set_bit_generator(np.random.PCG64(sequence))  # saving numpy's own generator costs ten times as much
    torch.default_generator.manual_seed(int(seeds[1]))  # not torch.manual_seed, which reaches for the GPU too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])


def _crop_and_resize(image: Image.Image, top: int, left: int, height: int, width: int, size: int) -> Image.Image:
    box = (left, top, left + width, top + height)
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
