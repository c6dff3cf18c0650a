"""The two LightningDataModules: one batch contract, two ways to read a prepared dataset (see layout.py).

Batches are `(images uint8 [B, 3, H, W] channels_last, labels int64 [B])`, not normalised: the model does that. Test and
predict use the validation split. Both modules visit the same images in the same order for equal settings.
"""

from __future__ import annotations

from typing import get_args

from ..ranges import COUNT, in_range
from .base import COMMON, ImageDataModule
from .batches import BatchPlan
from .beton import check_beton
from .checks import require
from .ffcv_support import ffcv_available, missing_ffcv, using_ffcv
from .folder_loader import EvalTransform, FolderLoader, TrainTransform, Transform, rand_augment
from .jpegs import Decoder, require_torchvision_decoder
from .layout import PREPARE_HINT, ImageFile, beton_path, list_images, read_manifest
from .loader import ImageLoader
from .manifest import check_contents, describe_files
from .resizing import ProgressiveResize
from .verify import decode_some

_DECODED_UNKNOWN = 256  # images of a beton without a manifest


@in_range("data.", **COMMON, batches_ahead=COUNT)
class FFCVDataModule(ImageDataModule):
    """The fast backend: reads root/train.beton and root/val.beton through FFCV.

    Resizing averages areas (OpenCV INTER_AREA), so pixels differ slightly from FolderDataModule's. Training pixels
    depend only on (seed, epoch, image), not on threads. The first batch of a run waits for compilation (seconds).

    Args:
        root: Prepared dataset: a folder with classes.json, train.beton and val.beton.
        image_size: Side of the square images given to the model, 1 to 16384 px.
        batch_size: Training images per device and step, 1 to 1e9.
        eval_batch_size: Evaluation images per device and step, 1 to 1e9; null: as batch_size.
        num_workers: Threads decoding one batch, 0 to 1024 but at most what numba offers; -1: one per usable core.
        seed: Seed of the order of images and of the augmentation, 0 to 4294967295.
        crop_scale: Range of the training crop's share of the image's area, within (0, 1].
        crop_ratio: Range of the training crop's width / height, within (0, 1e6].
        hflip: Flip half of the training images horizontally.
        eval_crop_ratio: Side of the centre crop over the image's shorter side in evaluation, in (0, 1].
        eval_image_size: Side of the images in evaluation, 1 to 16384 px; null: image_size. Another needs a network
            with dynamic_img_size.
        progressive: Training images that grow with the epochs; null: image_size throughout. Needs dynamic_img_size.
        repeated_augmentation: Show each training image so many times in its epoch, 1 to 1e9, augmented anew, and so
            many fewer images (DeiT takes 3); 1: all of them once.
        os_cache: Leave caching to the operating system; false copies the whole file into this process's memory.
        batches_ahead: Decoded batches that may wait for the model, 1 to 1e9.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = -1,
        seed: int = 0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: bool = True,
        eval_crop_ratio: float = 224 / 256,
        eval_image_size: int | None = None,
        progressive: ProgressiveResize | None = None,
        repeated_augmentation: int = 1,
        os_cache: bool = True,
        batches_ahead: int = 3,
    ) -> None:
        if not ffcv_available():
            raise missing_ffcv()
        super().__init__(
            root=root,
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            hflip=hflip,
            eval_crop_ratio=eval_crop_ratio,
            eval_image_size=eval_image_size,
            progressive=progressive,
            repeated_augmentation=repeated_augmentation,
        )
        self.os_cache, self.batches_ahead = os_cache, batches_ahead
        self._counts: dict[str, int] = {}

    def prepare_data(self) -> None:
        """On one process a node and before the others: betons it has read whole they need not."""
        splits = ("train", "val") if self.trainer is not None and self.trainer.state.fn == "fit" else ("val",)
        for split in splits:
            self.check_split(split)

    def check_split(self, split: str) -> None:
        path = beton_path(self.root, split)
        if not path.is_file():
            raise FileNotFoundError(
                f"data.root={self.root}: it holds no {path.name}, which FFCVDataModule reads; {PREPARE_HINT} with ffcv"
                " installed, or use FolderDataModule"
            )
        manifest = read_manifest(self.root)
        recorded = manifest["splits"][split] if manifest else {}
        beton = check_beton(path, self.num_classes, (recorded.get("beton") or {}).get("bytes"))
        if recorded.get("beton"):
            check_contents(beton, recorded, self.num_classes)
        else:  # nothing says what it should hold
            decode_some(beton, _DECODED_UNKNOWN, max(1, self.num_workers))
        self._counts[split] = len(beton.records)

    def checked(self) -> str:
        if not read_manifest(self.root):
            return f"the betons' structure and {_DECODED_UNKNOWN} images each; there is no manifest.json for the rest"
        return (
            "labels, classes.json and betons, by size and time where they were read before; not image files, which"
            " `vmoe-momentum data verify` reads"
        )

    def count(self, split: str) -> int:
        if split not in self._counts:
            self.check_split(split)
        return self._counts[split]

    def build_loader(self, split: str, plan: BatchPlan) -> ImageLoader:
        with using_ffcv():
            from .ffcv_loader import FFCVLoader

            return FFCVLoader(
                beton_path(self.root, split),
                plan,
                num_workers=max(1, self.num_workers),
                os_cache=self.os_cache,
                batches_ahead=self.batches_ahead,
                size=self.train_size if plan.training else lambda epoch: self.eval_image_size,
                scale=self.crop_scale,
                ratio=self.crop_ratio,
                flip=0.5 * self.hflip,
                eval_ratio=self.eval_crop_ratio,
            )


@in_range("data.", **COMMON)
class FolderDataModule(ImageDataModule):
    """The portable backend: reads the image files under root/train and root/val.

    Training pixels depend only on (seed, epoch, image), not on the number of workers.

    Args:
        root: Prepared dataset: a folder with classes.json, train/<class>/* and val/<class>/*.
        image_size: Side of the square images given to the model, 1 to 16384 px.
        batch_size: Training images per device and step, 1 to 1e9.
        eval_batch_size: Evaluation images per device and step, 1 to 1e9; null: as batch_size.
        num_workers: Processes decoding images, 0 to 1024; 0: decode in the training process; -1: one per usable core.
        seed: Seed of the order of images and of the augmentation, 0 to 4294967295.
        crop_scale: Range of the training crop's share of the image's area, within (0, 1].
        crop_ratio: Range of the training crop's width / height, within (0, 1e6].
        hflip: Flip half of the training images horizontally.
        eval_crop_ratio: Side of the centre crop over the image's shorter side in evaluation, in (0, 1].
        eval_image_size: Side of the images in evaluation, 1 to 16384 px; null: image_size. Another needs a network
            with dynamic_img_size.
        progressive: Training images that grow with the epochs; null: image_size throughout. Needs dynamic_img_size.
        repeated_augmentation: Show each training image so many times in its epoch, 1 to 1e9, augmented anew, and so
            many fewer images (DeiT takes 3); 1: all of them once.
        randaugment: timm's RandAugment policy for training images, e.g. rand-m10-n2; null: none.
        upright: Turn pictures as their EXIF orientation says; null: as they were prepared.
        decoder: What decodes JPEGs, in training and evaluation: pillow, or torchvision, which is faster and gives
            pixels that may differ by a few levels. Its colour JPEGs are resized by torch; other files, and JPEGs that
            `upright` turns, go by Pillow, as do all in `robustness` and `classify`.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = -1,
        seed: int = 0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: bool = True,
        eval_crop_ratio: float = 224 / 256,
        eval_image_size: int | None = None,
        progressive: ProgressiveResize | None = None,
        repeated_augmentation: int = 1,
        randaugment: str | None = None,
        upright: bool | None = None,
        decoder: Decoder = "pillow",
    ) -> None:
        super().__init__(
            root=root,
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            hflip=hflip,
            eval_crop_ratio=eval_crop_ratio,
            eval_image_size=eval_image_size,
            progressive=progressive,
            repeated_augmentation=repeated_augmentation,
        )
        if upright is not None:
            self.upright = upright
        require(decoder in get_args(Decoder), "decoder", decoder, "use pillow or torchvision")
        if decoder == "torchvision":
            require_torchvision_decoder()
        self.randaugment, self.decoder = randaugment, decoder
        self.policy = None if randaugment is None else rand_augment(randaugment, image_size)
        self._files: dict[str, list[ImageFile]] = {}

    def check_split(self, split: str) -> None:
        manifest = read_manifest(self.root)
        recorded = manifest["splits"][split] if manifest else None
        files = list_images(self.root / split, self.classes, recorded["labels"] if recorded else None)
        if recorded and describe_files(files, self.num_classes)["listing"] != recorded["listing"]:
            raise ValueError(
                f"{self.root / split}: names or sizes of its images differ from manifest.json; `vmoe-momentum data"
                " verify` names them; undo what changed, or prepare it again"
            )
        self._files[split] = files

    def checked(self) -> str:
        if not read_manifest(self.root):
            return "that each class has images; there is no manifest.json for the rest"
        return "classes.json, names and sizes; not the contents of image files, which `vmoe-momentum data verify` reads"

    def count(self, split: str) -> int:
        if split not in self._files:
            self.check_split(split)
        return len(self._files[split])

    def build_loader(self, split: str, plan: BatchPlan) -> ImageLoader:
        self.count(split)

        def transform(epoch: int) -> Transform:
            if not plan.training:
                return EvalTransform(self.eval_image_size, self.eval_crop_ratio)
            flip = 0.5 * self.hflip
            return TrainTransform(self.train_size(epoch), self.crop_scale, self.crop_ratio, flip, self.policy)

        return FolderLoader(
            self._files[split],
            plan,
            transform=transform,
            num_workers=self.num_workers,
            upright=self.upright,
            decoder=self.decoder,
        )
