"""What both LightningDataModules share: classes, settings, the order of images, and where a checkpoint resumes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..ranges import COUNT, POSITIVE, SEED, SIDE, WORKERS, Range
from ..resources import usable_cores
from .batches import BatchPlan
from .checks import require
from .layout import read_classes, read_manifest
from .loader import ImageLoader
from .resizing import ProgressiveResize
from .resuming import ResumingDataModule, rank_and_world_size, shuffles

COMMON = {  # ranges of the settings that both backends have
    "image_size": SIDE, "batch_size": COUNT, "eval_batch_size": COUNT.or_(None),
    "num_workers": WORKERS.or_(-1).because("-1 is one per usable core"), "seed": SEED,
    "crop_scale": Range(0, 1, above=True), "crop_ratio": POSITIVE, "eval_crop_ratio": Range(0, 1, above=True),
    "eval_image_size": SIDE.or_(None), "repeated_augmentation": COUNT,
}  # fmt: skip


class ImageDataModule(ResumingDataModule, ABC):
    """What both backends share: classes, settings, order of images, and the position a checkpoint resumes from.

    `num_classes`, `class_names` and `image_size` are there as soon as it is built. Arguments: see FolderDataModule.
    """

    def __init__(
        self,
        *,
        root: str,
        image_size: int,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        hflip: bool,
        eval_crop_ratio: float,
        eval_image_size: int | None,
        progressive: ProgressiveResize | None,
        repeated_augmentation: int,
    ) -> None:
        super().__init__()
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        eval_image_size = image_size if eval_image_size is None else eval_image_size
        for name, (low, high) in (("crop_scale", crop_scale), ("crop_ratio", crop_ratio)):
            require(low <= high, name, (low, high), "use the lower number first")
        if progressive is not None:
            progressive.check(image_size)
        self.root = Path(root)
        self.classes = read_classes(self.root)
        self.upright: bool = read_manifest(self.root).get("settings", {}).get("upright", False)
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.eval_image_size, self.progressive = eval_image_size, progressive
        self.repeated_augmentation = repeated_augmentation
        self.num_workers = usable_cores() if num_workers < 0 else num_workers
        self.seed, self.hflip = seed, hflip
        self.crop_scale, self.crop_ratio, self.eval_crop_ratio = crop_scale, crop_ratio, eval_crop_ratio

    @property
    def num_classes(self) -> int:
        """Number of classes in classes.json."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """Display names in label order."""
        return [entry.name for entry in self.classes]

    @property
    def class_ids(self) -> list[str]:
        """Names of the classes' folders in label order."""
        return [entry.id for entry in self.classes]

    def train_size(self, epoch: int) -> int:
        """Side of the training pictures of `epoch`, px."""
        return self.image_size if self.progressive is None else self.progressive.size(epoch, self.image_size)

    def train_sizes(self) -> set[int]:
        """Every side of training pictures, px."""
        last = 0 if self.progressive is None else self.progressive.end_epoch
        return {self.train_size(epoch) for epoch in range(last + 1)}

    def sizes(self) -> list[int]:
        """Every side a network will meet, px, ascending."""
        return sorted({self.eval_image_size, *self.train_sizes()})

    def setup(self, stage: str | None = None) -> None:
        """Checks the splits `stage` reads, before anything is trained.

        Raises FileNotFoundError for a missing split, ValueError for a damaged one.
        """
        for split in ("train", "val") if stage in ("fit", None) else ("val",):
            self.check_split(split)
        if stage in ("fit", None):
            rank_zero_info(f"{self.root}: checked {self.checked()}")

    def train_dataloader(self) -> ImageLoader:
        """Shuffled, augmented, full batches only. Raises ValueError for fewer images than one batch on each device."""
        return self.keep_position(self.build_loader("train", self._plan("train")))

    def val_dataloader(self) -> ImageLoader:
        """Each validation image once, in stored order, over all devices."""
        return self.build_loader("val", self._plan("val"))

    def test_dataloader(self) -> ImageLoader:
        """The validation split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ImageLoader:
        """The validation split."""
        return self.val_dataloader()

    @abstractmethod
    def check_split(self, split: str) -> None:
        """Raises when the files of `split` cannot be used."""

    @abstractmethod
    def checked(self) -> str:
        """What `check_split` looks at, and what it does not."""

    @abstractmethod
    def count(self, split: str) -> int:
        """Images in `split`, checked first where `setup` has not been called."""

    @abstractmethod
    def build_loader(self, split: str, plan: BatchPlan) -> ImageLoader:
        """The backend's loader of `split`; training augmentation when `plan.training`."""

    def _plan(self, split: str) -> BatchPlan:
        training = split == "train"
        rank, world_size = rank_and_world_size(self.trainer)
        return BatchPlan(
            self.count(split),
            self.batch_size if training else self.eval_batch_size,
            training=training,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            reshuffle=shuffles(self.trainer),
            repeats=self.repeated_augmentation if training else 1,
        )
