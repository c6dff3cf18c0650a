"""Is a prepared dataset still what was prepared? Checksums, counts, labels and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .beton import check_beton, decode_beton
from .beton_writer import check_images
from .layout import SPLITS, ClassEntry, beton_path, list_images, read_classes, read_manifest
from .manifest import describe_files, sha256


class Report(NamedTuple):
    """What was found sound. train and val: images; decoded: files and beton images decoded; betons: their number."""

    root: Path
    classes: int
    train: int
    val: int
    decoded: int
    betons: int


def verify(root: str, sample: int | None = None, num_workers: int = 1) -> Report:
    """Checks a prepared dataset and says what is wrong with the first thing that is.

    Args:
        root: The prepared dataset.
        sample: Images decoded per split and backend, evenly spaced; null for all of them.
        num_workers: Threads that decode image files.

    Raises:
        FileNotFoundError: `root` or a file of it is missing.
        ValueError: A file is damaged or not the one that was prepared; the message names it.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"--sample={sample}: use 1 or more, or null for every image")
    folder = Path(root)
    classes = read_classes(folder, setting="root")
    manifest = read_manifest(folder)
    if not manifest:
        raise FileNotFoundError(f"{folder / 'manifest.json'}: no such file, so there is nothing to verify against")
    counts, decoded, betons = [], 0, 0
    for split in SPLITS:
        recorded = manifest["splits"][split]
        decoded += _verify_files(folder / split, classes, recorded, sample, num_workers)
        if recorded["beton"] is not None:
            decoded += _verify_beton(beton_path(folder, split), classes, recorded, sample)
            betons += 1
        counts.append(recorded["count"])
    return Report(folder, len(classes), counts[0], counts[1], decoded, betons)


def _verify_files(folder: Path, classes: list[ClassEntry], recorded: dict, sample: int | None, num_workers: int) -> int:
    files = list_images(folder, classes)
    found = describe_files(files, len(classes))
    for what in ("count", "labels", "listing"):
        if found[what] != recorded[what]:
            raise ValueError(
                f"{folder}: {what} differs from manifest.json ({len(files)} images where {recorded['count']} were"
                " prepared; names, sizes or classes changed); prepare it again"
            )
    chosen = _evenly(len(files), sample)
    check_images([files[index] for index in chosen], num_workers)
    return len(chosen)


def _verify_beton(path: Path, classes: list[ClassEntry], recorded: dict, sample: int | None) -> int:
    beton = check_beton(path, len(classes), recorded["beton"]["bytes"])
    labels = np.bincount(beton.records["label"], minlength=len(classes)).tolist()
    if labels != recorded["labels"]:
        raise ValueError(f"{path}: its images per label differ from manifest.json; prepare it again")
    if sha256(path) != recorded["beton"]["sha256"]:
        raise ValueError(f"{path}: its contents differ from the sha256 in manifest.json; prepare it again")
    return sum(1 for _ in decode_beton(beton, _evenly(len(beton.records), sample)))


def _evenly(count: int, sample: int | None) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, count if sample is None else min(sample, count)).astype(int))
