"""Reading FFCV's beton files with numpy alone, to tell a sound one from a damaged one before FFCV maps it.

FFCV checks nothing: a file whose writer was killed loads with garbage labels, and a bad pointer reads outside the file.
Layout: header | field descriptors | one metadata record per image | pages of image bytes | allocation table.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

VERSION = 2
JPEG, RAW = 0, 1  # values of a record's "mode"
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
FIELDS = [(2, "image"), (1, "label")]  # FFCV's type ids of RGBImageField and IntField
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


class Beton(NamedTuple):
    """A beton that passed `check_beton`. records: RECORD [count]; sizes: bytes of each image, [count]."""

    path: Path
    records: np.ndarray
    sizes: np.ndarray


def check_beton(path: Path, num_classes: int, expected_bytes: int | None = None) -> Beton:
    """Checks a beton's structure and labels in seconds even for millions of images; pixels are `decode_image`'s.

    Raises FileNotFoundError when it is missing, ValueError naming the file, what was found and the way out otherwise.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_way_out(path)}")
    size = path.stat().st_size
    _require(size > 0, path, "the file is empty")
    if expected_bytes is not None:
        _require(size == expected_bytes, path, f"{size} bytes where manifest.json says {expected_bytes}")
    _require(size >= HEADER.itemsize + 2 * FIELD.itemsize, path, f"{size} bytes are too few for a beton's header")
    header = np.fromfile(path, HEADER, count=1)[0]
    count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    _check_header(path, header)
    records_at = HEADER.itemsize + 2 * FIELD.itemsize
    _require(count > 0, path, "it holds no images")
    data_at = records_at + count * RECORD.itemsize
    _require(
        data_at <= table and table + count * ALLOCATION.itemsize == size,
        path,
        f"header announces {count} images and an allocation table at byte {table}, which does not fit {size} bytes"
        " (cut short, or its writer was stopped)",
    )
    records = np.fromfile(path, RECORD, count=count, offset=records_at)
    labels = records["label"]
    _require(
        labels.min() >= 0 and labels.max() < num_classes,
        path,
        f"labels from {labels.min()} to {labels.max()} for the {num_classes} classes of classes.json",
    )
    allocations = np.fromfile(path, ALLOCATION, count=count, offset=table)
    return Beton(path, records, _check_allocations(path, records, allocations, data_at, table))


def decode_image(beton: Beton, index: int) -> None:
    """Raises ValueError: the image at `index` does not decode, or is not as large as its record says."""
    image, size = beton.records["image"][index], int(beton.sizes[index])
    if image["mode"] != JPEG:
        return
    data = np.fromfile(beton.path, np.uint8, count=size, offset=int(image["data_ptr"]))
    try:
        with Image.open(BytesIO(data.data), formats=["JPEG"]) as decoded:
            decoded.load()
            shape = decoded.size
    except (OSError, SyntaxError) as error:
        raise _damaged(beton.path, f"image {index} does not decode ({error})") from error
    expected = (int(image["width"]), int(image["height"]))
    _require(shape == expected, beton.path, f"image {index} is {shape} px, its record says {expected}")


def _check_header(path: Path, header: np.void) -> None:
    version, page = int(header["version"]), int(header["page_size"])
    _require(version == VERSION, path, f"format version {version} where FFCV writes {VERSION} (is it a beton at all?)")
    _require(page >= 1 << 21 and page & (page - 1) == 0, path, f"page size {page} is no power of two >= 2 MiB")
    found = [(int(header["num_fields"]), "fields")]
    if header["num_fields"] == len(FIELDS):
        descriptors = np.fromfile(path, FIELD, count=len(FIELDS), offset=HEADER.itemsize)
        found = [(int(d["type_id"]), d["name"].tobytes().rstrip(b"\0").decode("latin-1")) for d in descriptors]
    _require(found == FIELDS, path, f"fields {found} where {FIELDS} (RGBImageField, IntField) are needed")


def _check_allocations(
    path: Path, records: np.ndarray, allocations: np.ndarray, data_at: int, table: int
) -> np.ndarray:
    """Size in bytes of each image, after checking that every pointer stays inside the file's data region."""
    count = len(records)
    order = np.argsort(allocations["sample_id"], kind="stable")
    allocations = allocations[order]
    _require(
        bool((allocations["sample_id"] == np.arange(count, dtype=np.uint64)).all()),
        path,
        "the allocation table does not list each image once",
    )
    images, start, size = records["image"], allocations["ptr"], allocations["size"]
    inside = (start >= data_at) & (size > 0) & (size <= table) & (start <= np.uint64(table) - np.minimum(size, table))
    _require(bool(inside.all()), path, f"image {int(np.argmin(inside))} lies outside the file's data region")
    _require(bool((images["data_ptr"] == start).all()), path, "image pointers disagree with the allocation table")
    pixels = 3 * images["width"].astype(np.uint64) * images["height"]
    sound = (pixels > 0) & ((images["mode"] == JPEG) | ((images["mode"] == RAW) & (size == pixels)))
    _require(bool(sound.all()), path, f"image {int(np.argmin(sound))} has an impossible mode or size")
    return size


def _require(condition: bool, path: Path, found: str) -> None:
    if not condition:
        raise _damaged(path, found)


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"{path}: not a sound beton: {found}; {_way_out(path)}")


def _way_out(path: Path) -> str:
    return f"prepare it again with `vmoe-momentum data prepare ... --out {path.parent} --overwrite`"
