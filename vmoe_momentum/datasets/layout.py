"""Where things lie inside a prepared dataset, and the two JSON files that describe it.

root/classes.json        {"classes": [{"id": folder name, "name": display name}, ...]} in label order
root/train/<id>/*        images; root/val/<id>/* likewise
root/train.beton         the same images, in the same order, for FFCV; root/val.beton likewise
root/checksums.sha256    of every image file, as `sha256sum -c` reads it
root/manifest.json       settings, counts and checksums of all the others and of itself, written last
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..pictures import class_folders, find_pictures, mention, told
from .text_files import holds_text

SPLITS = ("train", "val")
FORMAT = 2  # of the manifest; 1 vouched for betons, names and sizes alone
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

    Raises FileNotFoundError when `root` or its classes.json is missing, ValueError when the file is malformed, is not
    the one that was prepared, or names one class alone.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{setting}={root}: no such folder; {PREPARE_HINT}")
    path = root / "classes.json"
    if not path.is_file() and holds_text(root):
        raise ValueError(f"{setting}={root}: a prepared text, not pictures; load it with TextDataModule")
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
    require_two(classes, f"{setting}={root}")
    recorded = read_manifest(root).get("classes")
    if recorded is not None and hashlib.sha256(path.read_bytes()).hexdigest() != recorded:
        raise ValueError(
            f"{path}: its contents differ from the sha256 in manifest.json; undo what changed, or prepare it again"
        )
    return classes


def require_two(classes: list[ClassEntry], where: str) -> None:
    """Raises ValueError: one class, which there is nothing to tell from."""
    if len(classes) == 1:
        raise ValueError(f"{where}: one class, {classes[0].id!r}, and nothing to tell it from; add a second class")


def write_classes(root: Path, classes: list[ClassEntry]) -> None:
    """Writes classes.json; the order given is the label order."""
    write_json(root / "classes.json", {"classes": [entry._asdict() for entry in classes]})


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a prepared dataset, or {} where there is none (data somebody laid out by hand).

    Raises ValueError: it is none of ours.
    """
    path = root / "manifest.json"
    if not path.is_file():
        return {}
    manifest = _read_json(path)
    try:
        assert isinstance(manifest["settings"], dict) and "ffcv" in manifest
        version = manifest.get("format", 1)
        assert version in (1, FORMAT)
        if version == FORMAT:
            assert manifest["sha256"] == own_digest(manifest)
            assert isinstance(manifest["classes"], str) and isinstance(manifest["checksums"], str)
        for split in SPLITS:
            recorded = manifest["splits"][split]
            assert recorded["count"] == sum(recorded["labels"]) and isinstance(recorded["listing"], str)
            assert recorded["beton"] is None or isinstance(recorded["beton"]["sha256"], str)
            assert recorded["beton"] is None or isinstance(recorded["beton"]["bytes"], int)
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of data prepare, or an edited one; {PREPARE_HINT}") from error
    return manifest


def own_digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's contents, but for this digest."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def list_images(folder: Path, classes: list[ClassEntry], counts: list[int] | None = None) -> list[ImageFile]:
    """Every image under `folder`, by label and then by file name: the one order both backends and the betons share.
    What else lies there is said.

    counts: images of each class, where known; else a class needs one at least. Raises FileNotFoundError when `folder`
    is missing, ValueError when a class has too few images or others, or a folder in it is no class.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {PREPARE_HINT}")
    folders, left_out = class_folders(folder)
    known = {entry.id for entry in classes}
    unknown = [path.name for path in folders if path.name not in known]
    if unknown:
        raise ValueError(f"{folder}: folder {unknown[0]!r} is none of the {len(classes)} classes; remove or rename it")
    if counts is not None and len(counts) != len(classes):
        raise ValueError(
            f"{folder.parent}: classes.json has {len(classes)} classes, manifest.json {len(counts)}: of another"
            f" dataset; {PREPARE_HINT}"
        )
    images = []
    for label, entry in enumerate(classes):
        files, others = find_pictures(folder / entry.id)
        left_out += others
        if not files and counts is None:
            only = f" (only {told(others)})" if others else ""
            raise ValueError(
                f"{folder / entry.id}: class {entry.id!r} has no images{only}; add some or remove the class"
            )
        if counts is not None and len(files) != counts[label]:
            raise ValueError(
                f"{folder / entry.id}: {len(files) or 'no'} images in class {entry.id!r}, where manifest.json says"
                f" {counts[label]}; undo what changed, or prepare it again"
            )
        images += [ImageFile(path, label) for path in files]
    mention(folder, left_out)
    return images


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {PREPARE_HINT}") from error
