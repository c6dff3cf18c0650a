"""Plain image files behind `EpochLoader`, decoded by Pillow or torchvision in torch DataLoader workers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..pictures import UnreadablePicture, read_picture
from ..resources import check_sockets
from ..stopping import serve_until_done
from .batches import BatchPlan
from .jpegs import Decoder, read_fast
from .layout import ImageFile
from .loader import Batch, ImageLoader

Picture = Image.Image | torch.Tensor  # uint8 [3, H, W]
_IMAGENET_MEAN = (124, 116, 104)  # RGB of 255, what timm fills uncovered corners with


class Transform(Protocol):
    """Of a picture to one of the final size."""

    def __call__(self, image: Picture) -> Picture: ...


class TrainTransform(NamedTuple):
    """Random resized crop (bilinear, antialiased), flip with probability `flip`, then RandAugment's `policy`."""

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    policy: Callable[[Image.Image], Image.Image] | None = None

    def __call__(self, image: Picture) -> Picture:
        image = _crop_and_resize(image, *random_crop(*_size(image), self.scale, self.ratio), self.size)
        if torch.rand(()).item() < self.flip:
            image = _mirror(image)
        return image if self.policy is None else self.policy(_as_image(image))


class EvalTransform(NamedTuple):
    """Centre crop of `ratio` times the shorter side, resized (bilinear, antialiased)."""

    size: int
    ratio: float

    def __call__(self, image: Picture) -> Picture:
        width, height = _size(image)
        side = max(1, int(self.ratio * min(width, height)))
        return _crop_and_resize(image, (height - side) // 2, (width - side) // 2, side, side, self.size)


def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width: torchvision's RandomResizedCrop.get_params, draw for draw, with less around them."""
    number = torch.empty(1)
    low, high = torch.tensor(ratio).log().tolist()
    for _ in range(10):
        area = width * height * number.uniform_(*scale).item()
        shape = number.uniform_(low, high).exp_().item()
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,)))
            return top, int(torch.randint(width - w + 1, (1,))), h, w
    w, h = width, height  # the middle of a picture too long or too high
    if width / height < min(ratio):
        h = round(w / min(ratio))
    elif width / height > max(ratio):
        w = round(h * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


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


class FolderLoader(ImageLoader):
    """Batches of one split's image files.

    Args:
        files: Images and labels in the dataset's order.
        plan: Which images make which batch.
        transform: Of an epoch: picture to picture of the final size; its draws from torch's generator, where it has a
            `policy` python's and numpy's too, depend on (seed, epoch, draw) alone, whatever the number of workers.
        num_workers: Worker processes; 0 decodes in this process.
        upright: Turn pictures as their EXIF orientation says.
        decoder: What decodes JPEGs.
    """

    plan: BatchPlan

    def __init__(
        self,
        files: list[ImageFile],
        plan: BatchPlan,
        *,
        transform: Callable[[int], Transform],
        num_workers: int,
        upright: bool = False,
        decoder: Decoder = "pillow",
    ) -> None:
        super().__init__(plan)
        if num_workers:
            check_sockets("data.num_workers")
        self.files, self.transform, self.num_workers, self.upright = files, transform, num_workers, upright
        self.decoder = decoder

    def open(self, batches: list[np.ndarray], epoch: int) -> Generator[Batch, None, None]:
        loader = DataLoader(
            _Images(self.files, self.transform(epoch), self.plan.seed, epoch, self.upright, self.decoder),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.num_workers,
            worker_init_fn=serve_until_done,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: drawing worker seeds from the global one would make training depend on this loader.
            generator=torch.Generator().manual_seed(self.plan.seed),
        )
        yield from loader


class _Images(Dataset[tuple[np.ndarray, int]]):
    def __init__(
        self,
        files: list[ImageFile],
        transform: Transform,
        seed: int,
        epoch: int,
        upright: bool,
        decoder: Decoder = "pillow",
    ) -> None:
        self.files, self.transform, self.seed, self.epoch, self.upright = files, transform, seed, epoch, upright
        self.read = {"pillow": read_picture, "torchvision": read_fast}[decoder]
        self.all_generators = getattr(transform, "policy", None) is not None

    def __getitem__(self, draw: int) -> tuple[np.ndarray, int]:
        path, label = self.files[draw % len(self.files)]
        try:
            image = self.read(path, self.upright)
        except UnreadablePicture as error:
            raise ValueError(
                f"{path}: {error.reason}; replace it, or find every such file with `vmoe-momentum data verify`"
            ) from error
        with _seeded(self.seed, self.epoch, draw, every=self.all_generators):
            shown = self.transform(image)
        return shown.permute(1, 2, 0).numpy() if isinstance(shown, torch.Tensor) else np.asarray(shown), label


def _collate(samples: list[tuple[np.ndarray, int]]) -> Batch:
    shape = (len(samples), *samples[0][0].shape)
    images = torch.empty(0, dtype=torch.uint8)  # [B, H, W, 3]
    if get_worker_info() is not None:  # straight into what the training process will read
        images.set_(torch.UntypedStorage._new_shared(math.prod(shape)))
    images.resize_(shape)
    np.stack([image for image, _ in samples], out=images.numpy())
    return images.permute(0, 3, 1, 2), torch.tensor([label for _, label in samples])


@contextmanager
def _seeded(*key: int, every: bool) -> Iterator[None]:
    """torch's global generator, or python's and numpy's too, seeded by `key` inside, as before outside: training
    shares them."""
    sequence = np.random.SeedSequence(key)
    seeds = sequence.generate_state(2)
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(seeds[1]))  # not torch.manual_seed, which reaches for the GPU too
    if every:  # their states cost as much as all else here
        states = random.getstate(), get_bit_generator()
        random.seed(int(seeds[0]))
        set_bit_generator(np.random.PCG64(sequence))  # saving numpy's own generator costs ten times as much
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if every:
            random.setstate(states[0])
            set_bit_generator(states[1])


def _size(image: Picture) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[2], image.shape[1]) if isinstance(image, torch.Tensor) else image.size


def _mirror(image: Picture) -> Picture:
    return image.flip(2) if isinstance(image, torch.Tensor) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _as_image(image: Picture) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy()) if isinstance(image, torch.Tensor) else image


def _crop_and_resize(image: Picture, top: int, left: int, height: int, width: int, size: int) -> Picture:
    if isinstance(image, torch.Tensor):  # differs from Pillow's by a level at most
        part = image[None, :, top : top + height, left : left + width]
        return interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
