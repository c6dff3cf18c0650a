"""Where things lie inside a prepared dataset, and the two JSON files that describe it.

root/classes.json        {"classes": [{"id": folder name, "name": display name}, ...]} in label order
root/train/<id>/*        images; root/val/<id>/* likewise
root/train.beton         the same images, in the same order, for FFCV; root/val.beton likewise
root/manifest.json       settings, counts and checksums, written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "val")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
PREPARE_HINT = (
    "prepare one with `vmoe-momentum data prepare digits --out DIR`"
    " or `vmoe-momentum data prepare folder --source DIR --out DIR`"
)


class ClassEntry(NamedTuple):
    """One class: `id` is its folder's name, `name` what a person reads; its label is its place in classes.json."""

    id: str
    name: str


class ImageFile(NamedTuple):
    """One image of a split and its label."""

    path: Path
    label: int


def beton_path(root: Path, split: str) -> Path:
    """The FFCV file of a split."""
    return root / f"{split}.beton"


def read_classes(root: Path, setting: str = "data.root") -> list[ClassEntry]:
    """Classes of a prepared dataset in label order.

    Raises FileNotFoundError when `root` or its classes.json is missing, ValueError when the file is malformed.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{setting}={root}: no such folder; {PREPARE_HINT}")
    path = root / "classes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{setting}={root}: it holds no classes.json; {PREPARE_HINT}")
    try:
        classes = [ClassEntry(str(entry["id"]), str(entry["name"])) for entry in _read_json(path)["classes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: expected {{"classes": [{{"id": ..., "name": ...}}, ...]}}; {PREPARE_HINT}'
        ) from error
    if not classes or len({entry.id for entry in classes}) != len(classes):
        raise ValueError(f"{path}: found {len(classes)} classes, some repeated or none at all; {PREPARE_HINT}")
    return classes


def write_classes(root: Path, classes: list[ClassEntry]) -> None:
    """Writes classes.json; the order given is the label order."""
    write_json(root / "classes.json", {"classes": [entry._asdict() for entry in classes]})


def read_manifest(root: Path) -> dict:
    """The manifest of a prepared dataset, or {} where there is none (data somebody laid out by hand)."""
    path = root / "manifest.json"
    return _read_json(path) if path.is_file() else {}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def list_images(folder: Path, classes: list[ClassEntry]) -> list[ImageFile]:
    """Every image under `folder`, by label and then by file name: the one order both backends and the betons share.

    Raises FileNotFoundError when `folder` is missing, ValueError when a class has no image in it or a folder in it is
    no class.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {PREPARE_HINT}")
    unknown = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    unknown = [name for name in unknown if name not in {entry.id for entry in classes}]
    if unknown:
        raise ValueError(f"{folder}: folder {unknown[0]!r} is none of the {len(classes)} classes; remove or rename it")
    images = []
    for label, entry in enumerate(classes):
        files = image_files(folder / entry.id)
        if not files:
            raise ValueError(f"{folder / entry.id}: class {entry.id!r} has no images; add some or remove the class")
        images += [ImageFile(path, label) for path in files]
    return images


def image_files(folder: Path) -> list[Path]:
    """Image files directly inside `folder`, sorted by name; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {PREPARE_HINT}") from error
