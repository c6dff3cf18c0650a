"""manifest.json: written last, it says how a dataset was made and lets `verify` tell whether that still holds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from pathlib import Path

import numpy as np

from .beton import check_beton
from .beton_writer import Encoding, check_images, write_beton
from .ffcv_support import ffcv_available
from .layout import SPLITS, ClassEntry, ImageFile, beton_path, list_images, write_json

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20


def seal(root: Path, classes: list[ClassEntry], settings: dict, encoding: Encoding, num_workers: int) -> None:
    """Decodes every image under `root`, writes its betons where ffcv is installed, and then its manifest.

    Raises ValueError naming the first few images that do not decode.
    """
    with_betons = ffcv_available()
    if not with_betons:
        _log.warning(
            "The package ffcv is not installed, so no betons are written: FolderDataModule can read this dataset,"
            " FFCVDataModule cannot."
        )
    splits = {}
    for split in SPLITS:
        files = list_images(root / split, classes)
        splits[split] = {**describe_files(files, len(classes)), "beton": None}
        if with_betons:
            path = beton_path(root, split)
            write_beton(path, files, encoding, num_workers)
            check_beton(path, len(classes))
            splits[split]["beton"] = {"bytes": path.stat().st_size, "sha256": sha256(path), **encoding._asdict()}
        else:
            check_images(files, num_workers)
    version = importlib.metadata.version("ffcv") if with_betons else None
    write_json(root / "manifest.json", {"format": 1, "settings": settings, "ffcv": version, "splits": splits})


def describe_files(files: list[ImageFile], num_classes: int) -> dict:
    """Count, images per label, and a digest of names and sizes (not contents: hashing ImageNet takes many minutes)."""
    digest = hashlib.sha256()
    for path, label in files:
        digest.update(f"{label}/{path.name}/{path.stat().st_size}\n".encode())
    labels = np.bincount([label for _, label in files], minlength=num_classes)
    return {"count": len(files), "labels": labels.tolist(), "listing": digest.hexdigest()}


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
