"""Is a prepared dataset still what was prepared? Checksums, counts, labels and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..ranges import COUNT, THREADS, in_range
from .beton import Beton, check_beton, decode_image
from .cores import usable_cores
from .layout import SPLITS, ClassEntry, beton_path, list_images, read_classes, read_manifest
from .manifest import check_contents, describe_files
from .reading import BadImages, check_images, in_threads


class Report(NamedTuple):
    """What was found sound. train and val: images; decoded: files and beton images decoded; betons: their number."""

    root: Path
    classes: int
    train: int
    val: int
    decoded: int
    betons: int


@in_range("--", sample=COUNT.or_(None).because("null is every image"), num_workers=THREADS)
def verify(root: str, sample: int | None = None, num_workers: int = -1) -> Report:
    """Checks a prepared dataset and says what is wrong with the first thing that is.

    Args:
        root: The prepared dataset.
        sample: Images decoded per split and backend, 1 to 1e9, evenly spaced; null for all of them.
        num_workers: Threads that decode image files, 1 to 1024; -1 for one per usable core.

    Raises:
        FileNotFoundError: `root` or a file of it is missing.
        ValueError: A file is damaged or not the one that was prepared; the message names it.
    """
    num_workers = usable_cores() if num_workers < 0 else num_workers
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
            decoded += _verify_beton(beton_path(folder, split), classes, recorded, sample, num_workers)
            betons += 1
        counts.append(recorded["count"])
    return Report(folder, len(classes), counts[0], counts[1], decoded, betons)


def _verify_files(folder: Path, classes: list[ClassEntry], recorded: dict, sample: int | None, num_workers: int) -> int:
    files = list_images(folder, classes, recorded["labels"])
    found = describe_files(files, len(classes))
    if found["listing"] != recorded["listing"]:
        raise ValueError(f"{folder}: names or sizes of its images differ from manifest.json; prepare it again")
    chosen = _evenly(len(files), sample)
    bad = BadImages("list")
    check_images([files[index] for index in chosen], num_workers, bad, f"decoding {folder.name}/")
    bad.finish()
    return len(chosen)


def _verify_beton(path: Path, classes: list[ClassEntry], recorded: dict, sample: int | None, num_workers: int) -> int:
    beton = check_beton(path, len(classes), recorded["beton"]["bytes"])
    check_contents(beton, recorded, len(classes), always=True)
    return decode_some(beton, sample, num_workers)


def decode_some(beton: Beton, sample: int | None, num_workers: int) -> int:
    """How many were decoded, `sample` of them evenly spaced or all. Raises ValueError: one does not decode."""
    chosen = _evenly(len(beton.records), sample).tolist()
    what = f"decoding {beton.path.name}"
    return sum(1 for _ in in_threads(lambda index: decode_image(beton, index), chosen, num_workers, what))


def _evenly(count: int, sample: int | None) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, count if sample is None else min(sample, count)).astype(int))
