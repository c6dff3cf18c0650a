"""Turns pictures into a prepared dataset (layout.py): image folders, betons, and a manifest that vouches for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from ..files.staging import refuse_existing, remove_abandoned, staged
from ..pictures import class_folders, find_pictures, require_utf8
from ..progress import track
from ..ranges import SEED, THREADS, Range, in_range
from ..resources import usable_cores
from .encoding import Encoding, parse_encoding
from .ffcv_support import ffcv_available
from .layout import (
    SPLITS,
    ClassEntry,
    ImageFile,
    list_images,
    read_manifest,
    require_two,
    write_classes,
)
from .manifest import seal
from .reading import BadImages, OnError, UnreadableImages

Placing = Literal["copy", "hardlink", "symlink"]
MARK = "manifest.json"  # what a finished dataset has
_DIGITS_VAL = 360  # of 1,797 images, so 1,437 to train on


class Prepared(NamedTuple):
    """A finished dataset. train and val: images; betons: whether FFCV files were written."""

    root: Path
    classes: int
    train: int
    val: int
    betons: bool


@in_range("--", size=Range(8, 1024, whole=True))
def prepare_digits(
    out: str = "data/digits", size: int = 16, overwrite: bool = False, exist_ok: bool = False
) -> Prepared:
    """Handwritten digits that ship with scikit-learn: 1,437 training and 360 validation images of ten classes.

    The split is stratified and always the same. Source: UCI optical recognition of handwritten digits, CC BY 4.0.

    Args:
        out: Folder to create.
        size: Side of the images written, 8 to 1024 px; the originals are 8 x 8.
        overwrite: Replace a dataset prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        ValueError: `out` exists, or a setting is out of range.
    """
    target = Path(out)
    settings = {"dataset": "digits", "size": size}
    if exist_ok and (found := already_prepared(target, settings)):
        return found
    refuse_existing(target, overwrite, MARK)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Fixed, not an option: a published accuracy on the digits must mean one split.
    indices = train_test_split(
        np.arange(len(digits.target)), test_size=_DIGITS_VAL, stratify=digits.target, random_state=0
    )
    classes = [ClassEntry(str(digit), str(digit)) for digit in range(10)]
    with staged(target, overwrite, MARK) as work:
        for split, members in zip(SPLITS, indices, strict=True):
            for index in members:
                folder = work / split / classes[digits.target[index]].id
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)  # the source counts 0 to 16
                image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
                image.save(folder / f"{index:04d}.png")
        write_classes(work, classes)
        seal(work, classes, settings, Encoding(size, 0.0, 90), num_workers=1)
    return summary(target)


@in_range("--", val_fraction=Range(0, 1, above=True, below=True), num_workers=THREADS, seed=SEED)
def prepare_folder(
    source: str,
    out: str,
    val_fraction: float = 0.1,
    encoding: str = "500_0.50_90",
    images: Placing = "copy",
    on_error: OnError = "stop",
    upright: bool = False,
    num_workers: int = -1,
    seed: int = 0,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> Prepared:
    """Any pictures sorted into one folder per class, such as ImageNet.

    `source` holds either train/<class>/* and val/<class>/*, or <class>/* alone, which is then split, stratified. A
    class is all pictures in its folder and the folders under it; what else is there is left out, counted and named.
    Every image is decoded once.

    Args:
        source: Folder with the pictures.
        out: Folder to create.
        val_fraction: Share of each class, in (0, 1), used for validation where `source` has no train and val.
        encoding: How the betons hold them, LONGER-SIDE_SHARE-OF-JPEGS_QUALITY: 500_0.50_90 (ffcv-imagenet's for
            ResNet-50), 400_0.10_90 (its for ResNet-18), raw (500_0.00_90). Image folders keep the files as they are.
        images: How image files get from `source` to `out`.
        on_error: At an image that does not decode: stop there, or look at all and list every one in a file beside
            `out`. Either way nothing is prepared.
        upright: Turn pictures as their EXIF orientation says, which ImageNet's published scores are without.
        num_workers: Threads, 1 to 1024; -1 for one per usable core.
        seed: Seed of the split and of the mixture, 0 to 4294967295.
        overwrite: Replace a dataset prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `out` exists, a class is empty or alone, an image does not decode, or a setting is out of range.
    """
    settings = {key: value for key, value in locals().items() if key not in ("out", "num_workers")}
    for name in ("overwrite", "exist_ok", "images", "on_error"):
        del settings[name]
    require_names(source=source, out=out)
    settings |= {"dataset": "folder", "source": str(Path(source).resolve())}
    target = Path(out)
    stored = parse_encoding(encoding, seed)
    if exist_ok and (found := already_prepared(target, settings)):
        return found
    refuse_overlap(Path(source), target)
    refuse_existing(target, overwrite, MARK)
    classes, splits = _find_images(Path(source), val_fraction, seed)
    workers = usable_cores() if num_workers < 0 else num_workers
    tree = (Path(source) / "train").is_dir()
    with listing_bad_images(target, on_error), staged(target, overwrite, MARK) as work:
        for split, files in splits.items():
            for path, _ in track(files, f"placing {split}"):
                within = path.relative_to(Path(source, split) if tree else source)
                place(path, work / split / within, images)
        write_classes(work, classes)
        first = 0 if tree else 1  # of the parts of a path under `work` that `source` has
        bad = BadImages(on_error, lambda path: str(Path(source, *path.relative_to(work).parts[first:])))
        seal(work, classes, settings, stored, workers, bad)
    return summary(target)


@contextmanager
def listing_bad_images(target: Path, on_error: OnError) -> Iterator[None]:
    """Writes the pictures that could not be read to a file beside `target`, where all were looked at."""
    path = target.with_name(f"{target.name}.unreadable.txt")
    try:
        yield
        path.unlink(missing_ok=True)  # of an earlier attempt
    except UnreadableImages as error:
        if on_error == "stop":
            raise
        path.write_text("\n".join(error.lines) + "\n", encoding="utf-8", errors="surrogateescape")
        raise UnreadableImages(
            error.lines, f"all are listed in {path}; replace or remove them, then prepare again"
        ) from error


def _find_images(source: Path, val_fraction: float, seed: int) -> tuple[list[ClassEntry], dict[str, list[ImageFile]]]:
    """Classes in the order of their folders' names, and the files of each split."""
    if not source.is_dir():
        raise FileNotFoundError(f"--source={source}: no such folder; name one that holds a folder of images per class")
    present = [split for split in SPLITS if (source / split).is_dir()]
    if len(present) == 1:
        raise ValueError(f"--source={source}: it has {present[0]}/ but not both train/ and val/; add the other")
    classes = _class_entries(source / "train" if present else source)
    require_two(classes, f"--source={source}")
    if present:
        return classes, {split: list_images(source / split, classes) for split in SPLITS}
    files = list_images(source, classes)
    labels = [file.label for file in files]
    smallest = min(range(len(classes)), key=labels.count)
    held_out = round(val_fraction * len(files))
    if labels.count(smallest) < 2 or not len(classes) <= held_out <= len(files) - len(classes):
        raise ValueError(
            f"--val_fraction={val_fraction}: {len(files)} images, {labels.count(smallest)} of them in class"
            f" {classes[smallest].id!r}, cannot be split with every class on both sides; change it or add images"
        )
    from sklearn.model_selection import train_test_split

    parts = train_test_split(files, test_size=held_out, stratify=labels, random_state=seed)
    return classes, {split: sorted(part, key=lambda file: file.path) for split, part in zip(SPLITS, parts, strict=True)}


def _class_entries(folder: Path) -> list[ClassEntry]:
    ids = [path.name for path in class_folders(folder)[0]]
    if not ids:
        loose = len(find_pictures(folder).paths)
        raise ValueError(f"{folder}: no class folders, only {loose} loose images; sort them into class folders")
    names = {}
    if all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in ids):  # WordNet ids, ImageNet's classes
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        names = {synset: info.label_name_to_description(synset) for synset in set(ids) & set(info.label_names())}
    return [ClassEntry(name, names.get(name, name)) for name in ids]


def place(source: Path, target: Path, images: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if images == "copy":
        shutil.copyfile(source, target)
    elif images == "hardlink":
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise ValueError(
                f"--images=hardlink: cannot link {source} ({error}); use copy, or an --out on the same file system"
            ) from error
    else:
        target.symlink_to(source.resolve())


def already_prepared(target: Path, settings: dict[str, Any]) -> Prepared | None:
    """The dataset at `target` if it was made with these settings; raises when it was made with others."""
    remove_abandoned(target)
    manifest = read_manifest(target)
    if not manifest:
        return None
    earlier = {"upright": False} if "upright" in settings else {}  # before it was a setting
    if earlier | manifest["settings"] != settings or (ffcv_available() and manifest["ffcv"] is None):
        raise ValueError(
            f"--out={target}: prepared with {manifest['settings']} and ffcv {manifest['ffcv']}, not with {settings};"
            " choose another folder, or replace it with --overwrite and without --exist_ok"
        )
    return summary(target)


def require_names(**paths: str) -> None:
    """Raises ValueError: a folder's name that the manifest cannot hold."""
    for setting, path in paths.items():
        require_utf8(str(Path(path).absolute()), f"--{setting}")


def refuse_overlap(source: Path, target: Path) -> None:
    a, b = source.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ValueError(f"--out={target}: it overlaps --source={source}; choose a folder outside it")


def summary(root: Path) -> Prepared:
    manifest = read_manifest(root)
    train, val = (manifest["splits"][split] for split in SPLITS)
    return Prepared(root, len(train["labels"]), train["count"], val["count"], manifest["ffcv"] is not None)
