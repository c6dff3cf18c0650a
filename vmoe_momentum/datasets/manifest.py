"""manifest.json, written last: how a dataset was made, for `verify` and `fit` to tell whether that still holds.

Beside it verified.json remembers, as make does, the size and time of each beton whose sha256 was last found right, so
that `fit` reads a hundred gigabytes only where something was copied or changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from rich.console import Console

from ..files.staging import draft_of
from .beton import Beton, check_beton
from .beton_writer import write_beton
from .encoding import Encoding
from .ffcv_support import ffcv_available
from .layout import FORMAT, SPLITS, ClassEntry, ImageFile, beton_path, list_images, own_digest, write_json
from .reading import BadImages, check_images

_log = logging.getLogger(__name__)
_STAMPS = "verified.json"
CHECKSUMS = "checksums.sha256"


def seal(
    root: Path,
    classes: list[ClassEntry],
    settings: dict[str, Any],
    encoding: Encoding,
    num_workers: int,
    bad: BadImages | None = None,
    counts: dict[str, list[int]] | None = None,
) -> None:
    """Decodes every image under `root`, writes its betons where ffcv is installed, and then its manifest.

    counts: images of each class per split, where classes may be empty. Raises UnreadableImages.
    """
    bad = BadImages() if bad is None else bad
    with_betons = ffcv_available()
    if not with_betons:
        _log.warning(
            "The package ffcv is not installed, so no betons are written: FolderDataModule can read this dataset,"
            " FFCVDataModule cannot."
        )
    upright, lines = settings.get("upright", False), []
    splits = {}
    for split in SPLITS:
        files = list_images(root / split, classes, None if counts is None else counts[split])
        splits[split] = {**describe_files(files, len(classes)), "beton": None}
        if with_betons:
            digests = write_beton(beton_path(root, split), files, encoding, num_workers, bad, upright)
        else:
            digests = check_images(files, num_workers, bad, upright)
        if not bad.lines:
            lines += [checksum_line(digest, file.path, root) for digest, file in zip(digests, files, strict=True)]
    bad.finish()
    (root / CHECKSUMS).write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="")
    for split in SPLITS if with_betons else ():
        path = beton_path(root, split)
        check_beton(path, len(classes))
        recorded = {"bytes": path.stat().st_size, "sha256": sha256(path), **encoding._asdict()}
        splits[split]["beton"] = recorded
        _stamp(path, recorded["sha256"])
    version = importlib.metadata.version("ffcv") if with_betons else None
    manifest = {
        "format": FORMAT, "settings": settings, "ffcv": version, "classes": sha256(root / "classes.json"),
        "checksums": sha256(root / CHECKSUMS), "splits": splits,
    }  # fmt: skip
    write_json(root / "manifest.json", {**manifest, "sha256": own_digest(manifest)})


def checksum_line(digest: str, path: Path, root: Path) -> str:
    """As sha256sum writes it: a name with a line end or backslash in it is escaped, and the line says so."""
    name = path.relative_to(root).as_posix()
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def read_checksums(root: Path, recorded: str) -> set[str]:
    """The lines of checksums.sha256. Raises FileNotFoundError, ValueError: it is not the one of the manifest."""
    path = root / CHECKSUMS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, though manifest.json speaks of it; prepare it again")
    if sha256(path) != recorded:
        raise ValueError(f"{path}: its contents differ from the sha256 in manifest.json; prepare it again")
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return set(file)


def describe_files(files: list[ImageFile], num_classes: int) -> dict[str, Any]:
    """Count, images per label, and a digest of names and sizes, which takes seconds of ImageNet."""
    digest = hashlib.sha256()
    for path, label in files:
        digest.update(f"{label}/{path.name}/{path.stat().st_size}\n".encode(errors="surrogateescape"))
    labels = np.bincount([label for _, label in files], minlength=num_classes)
    return {"count": len(files), "labels": labels.tolist(), "listing": digest.hexdigest()}


def check_contents(beton: Beton, recorded: dict[str, Any], num_classes: int, always: bool = False) -> None:
    """Is a sound beton the one that was prepared? Reads it whole where its size or time is new, or `always`.

    recorded: what manifest.json says of its split. Raises ValueError naming what differs.
    """
    path = beton.path
    labels = np.bincount(beton.records["label"], minlength=num_classes).tolist()
    if labels != recorded["labels"]:
        raise ValueError(f"{path}: its images per label differ from manifest.json; prepare it again")
    expected = recorded["beton"]["sha256"]
    if not always and _stamps(path.parent).get(path.name) == _describe(path, expected):
        return
    if sha256(path) != expected:
        raise ValueError(f"{path}: its contents differ from the sha256 in manifest.json; prepare it again")
    _stamp(path, expected)


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    return digest(path, "sha256")


def digest(path: Path, algorithm: str) -> str:
    """Hex digest of a file's contents by hashlib's name of the algorithm, behind a bar of its bytes."""
    console = Console(stderr=True)
    shown: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
    with rich.progress.open(path, "rb", description=f"checking {path.name}", **shown) as file:
        found = hashlib.new(algorithm)
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _stamps(root: Path) -> dict[str, Any]:
    try:
        return json.loads((root / _STAMPS).read_text())
    except (OSError, ValueError):
        return {}


def _describe(path: Path, digest: str) -> dict[str, Any]:
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest}


def _stamp(path: Path, digest: str) -> None:
    """In one move, as several processes may. Where the folder cannot be written, the next run reads the file again."""
    root = path.parent
    stamps = {**_stamps(root), path.name: _describe(path, digest)}
    try:
        with draft_of(root / _STAMPS) as file:
            file.write(json.dumps(stamps, indent=1).encode())
    except OSError as error:
        _log.warning("%s: cannot be written (%s), so every run reads %s whole", root / _STAMPS, error.strerror, path)
