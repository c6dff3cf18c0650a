"""Is a prepared dataset still what was prepared? Checksums, counts, labels and pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..pictures import UnreadablePicture, read_picture
from ..ranges import COUNT, THREADS, in_range
from ..resources import usable_cores
from .beton import Beton, check_beton, decode_image
from .layout import SPLITS, ClassEntry, ImageFile, beton_path, list_images, read_classes, read_manifest
from .manifest import CHECKSUMS, check_contents, checksum_line, describe_files, read_checksums
from .reading import BadImages, UnreadableImages, in_threads, read_content


class Report(NamedTuple):
    """What was found sound. train and val: images; decoded: files and beton images decoded; betons: their number;
    compared: image files that have the checksum they were prepared with; uncovered: what the manifest says nothing of.
    """

    root: Path
    classes: int
    train: int
    val: int
    decoded: int
    betons: int
    compared: int
    uncovered: str


@in_range("--", sample=COUNT.or_(None).because("null is every image"), num_workers=THREADS)
def verify(root: str, sample: int | None = None, num_workers: int = -1) -> Report:
    """Checks a prepared dataset and says what is wrong with the first thing that is.

    Classes, betons and every image file are compared with the checksums they were prepared with.

    Args:
        root: The prepared dataset.
        sample: Images decoded per split and backend, 1 to 1e9, evenly spaced; null for all of them.
        num_workers: Threads that read image files, 1 to 1024; -1 for one per usable core.

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
    known = read_checksums(folder, manifest["checksums"]) if "checksums" in manifest else None
    upright = manifest["settings"].get("upright", False)
    counts, decoded, betons = [], 0, 0
    for split in SPLITS:
        recorded = manifest["splits"][split]
        files = list_images(folder / split, classes, recorded["labels"])
        decoded += _verify_files(folder, split, files, recorded, known, upright, sample, num_workers)
        if recorded["beton"] is not None:
            decoded += _verify_beton(beton_path(folder, split), classes, recorded, sample, num_workers)
            betons += 1
        counts.append(recorded["count"])
    missing = "" if known is not None else "contents of image files, classes.json and manifest.json itself"
    train, val = counts
    compared = 0 if known is None else train + val
    return Report(folder, len(classes), train, val, decoded, betons, compared, missing)


def _verify_files(
    root: Path,
    split: str,
    files: list[ImageFile],
    recorded: dict[str, Any],
    known: set[str] | None,
    upright: bool,
    sample: int | None,
    num_workers: int,
) -> int:
    """How many were decoded; every one is compared. known: lines of checksums.sha256, where there are any."""
    chosen = set(_evenly(len(files), sample).tolist())

    def look(index: int) -> None:
        path = files[index].path
        content = read_content(path)
        if known is not None and checksum_line(hashlib.sha256(content).hexdigest(), path, root) not in known:
            raise UnreadablePicture(path, f"its contents differ from {CHECKSUMS}, or it has none there")
        if index in chosen:
            read_picture(path, upright, content)

    bad = BadImages("list")
    wanted = sorted(chosen) if known is None else list(range(len(files)))
    for _ in bad.sift(in_threads(look, wanted, num_workers, f"reading {split}/")):
        pass
    if bad.lines:
        raise UnreadableImages(bad.lines, "bring back what was prepared, or prepare it again")
    found = describe_files(files, len(recorded["labels"]))
    if found["listing"] != recorded["listing"]:
        raise ValueError(f"{root / split}: names or sizes of its images differ from manifest.json; prepare it again")
    return len(chosen)


def _verify_beton(
    path: Path, classes: list[ClassEntry], recorded: dict[str, Any], sample: int | None, num_workers: int
) -> int:
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
