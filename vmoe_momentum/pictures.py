"""What a picture is, how folders of them are listed, and how a file becomes RGB uint8: the one rule of every reader.

A picture is a file with one of torchvision's suffixes. A folder holds the pictures in it and in its sub-folders, links
followed, hidden names left out, as torchvision and timm list them; what is left out is counted and named.

EXIF orientation is ignored unless `upright`: torchvision and timm do not turn pictures, so ImageNet's published scores
are of pictures as they are stored. (A TIFF's own orientation is Pillow's to apply, and applied everywhere.) Alpha is
dropped and the first frame taken, as they do. Grey of more than 8 bits is scaled by its bit depth, which Pillow alone
would clip to white; floats and 32-bit integers have no stated white, and are refused.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
UPRIGHT_HELP = "Turn pictures as their EXIF orientation says; the published scores of ImageNet are without."

_log = logging.getLogger(__name__)
_EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


class Found(NamedTuple):
    """paths: pictures in order. left_out: what else was there, `.gif` or `hidden`, and how many."""

    paths: list[Path]
    left_out: Counter[str]


class UnreadablePicture(ValueError):
    """reason: without the file's name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; replace it, or leave it out")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:  # out of worker processes
        return UnreadablePicture, (self.path, self.reason)


def is_picture(name: str) -> bool:
    """By its name alone."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def find_pictures(folder: Path) -> Found:
    """All of a class's folder, by the parts of their names under it; none where there is no such folder.

    Raises ValueError: a folder that cannot be read, a picture's link that leads nowhere.
    """
    found: list[tuple[str, ...]] = []
    left_out: Counter[str] = Counter()
    if folder.is_dir():
        _walk(folder, (), {os.path.realpath(folder)}, found, left_out)
    return Found([folder.joinpath(*parts) for parts in sorted(found)], left_out)


def class_folders(place: Path) -> tuple[list[Path], Counter[str]]:
    """Folders that are classes, by name, and what lies beside them. Raises ValueError: a name that is not UTF-8."""
    folders: list[Path] = []
    left_out: Counter[str] = Counter()
    for entry in _entries(place):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.is_dir():
            require_utf8(entry.name, place)
            folders.append(place / entry.name)
        else:
            left_out["outside class folders"] += 1
    return sorted(folders), left_out


def require_utf8(name: str, place: Path | str) -> None:
    """Raises ValueError: a name that no label, log or JSON file can hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(name)
        where = str(place).encode(errors="backslashreplace").decode()
        raise ValueError(f"{where}: the name {shown!r} is not UTF-8; rename it, such as with convmv -t utf8") from error


def mention(place: Path | str, left_out: Counter[str]) -> None:
    """Says what was left out, where anything was."""
    if left_out:
        _log.warning("%s: left out %s (pictures are %s)", place, told(left_out), " ".join(sorted(SUFFIXES)))


def told(left_out: Counter[str]) -> str:
    """`12 .gif, 1 hidden`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


def read_picture(path: Path, upright: bool = False, content: bytes | None = None) -> Image.Image:
    """RGB uint8 of a file, or of its `content` where that was read already. Raises UnreadablePicture."""
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            return as_rgb(image, path, upright)
    except UnreadablePicture:
        raise
    except Exception as error:  # Pillow's plugins raise what damaged bytes happen to cause
        told = str(error).partition(" <_io")[0] or type(error).__name__
        raise UnreadablePicture(path, f"not a readable image ({told})") from error


def as_rgb(image: Image.Image, path: Path, upright: bool = False) -> Image.Image:
    """RGB uint8 of an open picture. path: for messages. Raises UnreadablePicture, and what Pillow does."""
    scale = _scale(image, path)
    # Pillow forgets format and tags when it turns
    return scale(ImageOps.exif_transpose(image) if upright else image)


def is_turned(content: bytes) -> bool:
    """Whether a picture's EXIF orientation is another than as stored. Raises what Pillow does of damaged bytes."""
    with Image.open(BytesIO(content)) as image:
        return image.getexif().get(_ORIENTATION, 1) != 1


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as stored, px, without decoding. Raises UnreadablePicture."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise UnreadablePicture(path, f"not a readable image ({error})") from error


def _scale(image: Image.Image, path: Path) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB uint8 of a picture of this mode, format and bit depth."""
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    if mode == "RGB" and image.format == "JPEG":
        return _loaded
    if mode in _EIGHT_BITS:
        return lambda shown: shown.convert("RGB")
    if mode in _PREMULTIPLIED:
        return lambda shown: shown.convert(_PREMULTIPLIED[mode]).convert("RGB")
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PPM", "PNG")):
        # the upper byte, as Pillow takes of colours of 16 bits; it scales a PPM of any depth to 16
        bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))
        invert = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO

        def upper_byte(shown: Image.Image) -> Image.Image:
            values = (np.asarray(shown).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
            return Image.fromarray(255 - values if invert else values).convert("RGB")

        return upper_byte
    kind = {"F": "floating-point", "I": "32-bit or signed"}.get(mode, f"{mode!r}")
    raise UnreadablePicture(path, f"{kind} pixels, which have no stated white; save it with 8 or 16 bits")


def _loaded(shown: Image.Image) -> Image.Image:
    """Without the copy that a conversion from RGB to RGB is."""
    shown.load()
    return shown


def _walk(
    folder: Path, parts: tuple[str, ...], above: set[str], found: list[tuple[str, ...]], left_out: Counter[str]
) -> None:
    for entry in _entries(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in above:  # a link to where we came from
                left_out["links in a circle"] += 1
                continue
            _walk(folder / entry.name, (*parts, entry.name), {*above, real}, found, left_out)
        elif not is_picture(entry.name):
            left_out[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
        elif entry.is_file():
            found.append((*parts, entry.name))
        elif entry.is_symlink():
            raise ValueError(f"{entry.path} leads to no file; remove it, or bring its target back")
        else:
            left_out["not a file"] += 1


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Of a folder. Raises ValueError: it cannot be read."""
    try:
        with os.scandir(folder) as entries:  # says of most what they are without a question to the disk
            yield from entries
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); make it readable, or remove it") from error
