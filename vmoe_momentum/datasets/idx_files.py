"""IDX files, MNIST's format: two zero bytes, type, number of dimensions, each size (big endian, 4 bytes), then values.

Source: http://yann.lecun.com/exdb/mnist/. Types other than unsigned bytes exist there; no set of pictures uses them.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .layout import SPLITS

_TYPES = {9: "signed bytes", 11: "16-bit integers", 12: "32-bit integers", 13: "floats", 14: "doubles"}
_UBYTE = 8
_DIMENSIONS = {"images": 3, "labels": 1}
_LARGEST = 2**14  # side, px
_PART = 1 << 24  # bytes read at once
# such as train-images-idx3-ubyte.gz; EMNIST writes emnist-letters- before and test for t10k, some mirrors a dot
_NAME = re.compile(r"(?P<prefix>.*)(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?")
_SPLIT = {"train": "train", "t10k": "val", "test": "val"}


class Pictures(NamedTuple):
    """One split. images: uint8 [n, height, width]; labels: uint8 [n]."""

    images: np.ndarray
    labels: np.ndarray


def find_idx(source: Path, prefix: str | None) -> dict[str, dict[str, Path]]:
    """train and val -> images and labels -> file. prefix: of the names wanted; None where all are of one set.

    Raises FileNotFoundError: no IDX file, or one of the four is missing; ValueError: more than one for a place.
    """
    found: dict[str, dict[tuple[str, str], list[Path]]] = {}
    for path in sorted(source.iterdir()):
        if match := _NAME.fullmatch(path.name):
            place = (_SPLIT[match["split"]], match["kind"])
            found.setdefault(match["prefix"], {}).setdefault(place, []).append(path)
    there = ", ".join(prefix or '""' for prefix in found)
    if not found:
        names = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"--source={source}: no IDX files, but {names}; needed are train-images-idx3-ubyte,"
            " train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, gzipped or not"
        )
    if prefix is None and len(found) > 1:
        raise ValueError(f"--source={source}: it holds several sets; choose one of them by --prefix ({there})")
    if prefix is not None and prefix not in found:
        raise FileNotFoundError(f"--prefix={prefix}: no IDX file in {source} is called so; there are {there}")
    own = prefix if prefix is not None else next(iter(found))
    return {split: {kind: _only(source, own, split, kind, found[own]) for kind in _DIMENSIONS} for split in SPLITS}


def _only(source: Path, prefix: str, split: str, kind: str, found: dict[tuple[str, str], list[Path]]) -> Path:
    paths = found.get((split, kind), [])
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise ValueError(f"--source={source}: {names} are for the same place; remove all but one")
    if not paths:
        name = f"{prefix}{'train' if split == 'train' else 't10k'}-{kind}-idx{_DIMENSIONS[kind]}-ubyte"
        raise FileNotFoundError(f"--source={source}: no {name}[.gz] beside the others; add it")
    return paths[0]


def read_split(images: Path, labels: Path) -> Pictures:
    """Both files whole. Raises ValueError: one is no such IDX file, cut short or too long, or their counts differ."""
    with _opened(labels) as file:
        (count,) = _sizes(file, labels, 1)
        values = _rest(file, labels, (count,))
    with _opened(images) as file:  # its count is looked at before so many pictures are read
        sizes = _sizes(file, images, 3)
        if sizes[0] != count:
            raise ValueError(
                f"{images}: {sizes[0]} pictures, where {labels.name} has {count} labels; they are of different sets"
            )
        if not count or not all(1 <= side <= _LARGEST for side in sizes[1:]):
            raise ValueError(
                f"{images}: its header says {sizes[0]} pictures of {sizes[1]} x {sizes[2]} px; at least one picture"
                f" and sides of 1 to {_LARGEST} px are needed"
            )
        return Pictures(_rest(file, images, sizes), values)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unzipped where they are gzip's, whatever its name. Raises ValueError: they are damaged."""
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if zipped else raw as file:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short ({str(error) or 'no gzip'}); copy it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); copy it again, or change its rights") from error


def _sizes(file: io.BufferedIOBase, path: Path, dimensions: int) -> tuple[int, ...]:
    """Of each dimension, from the header."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"{path}: not an IDX file (it begins with {magic.hex() or 'nothing'}); copy it again")
    kind = magic[2]
    if kind != _UBYTE:
        raise ValueError(
            f"{path}: an IDX file of {_TYPES.get(kind, f'an unknown type, {kind}')}; only unsigned bytes (ubyte) are"
            " pictures or labels here: convert it"
        )
    if magic[3] != dimensions:
        raise ValueError(
            f"{path}: {magic[3]} dimensions, where {'pictures have 3' if dimensions == 3 else 'labels have 1'}; is it"
            " the file that its name says?"
        )
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise ValueError(f"{path}: cut short in its header; copy it again")
    return struct.unpack(f">{dimensions}I", header)


def _rest(file: io.BufferedIOBase, path: Path, sizes: tuple[int, ...]) -> np.ndarray:
    expected, content = math.prod(sizes), bytearray()
    # in parts: a damaged header may ask for more than there is memory
    while part := file.read(min(_PART, expected - len(content))):
        content += part
    # the one byte more lets gzip look at its checksum, too
    if len(content) < expected or file.read(1):
        found = f"only {len(content)}" if len(content) < expected else "more"
        shape = " x ".join(map(str, sizes))
        raise ValueError(f"{path}: its header says {expected} bytes ({shape}), and {found} follow; copy it again")
    return np.frombuffer(content, np.uint8).reshape(sizes)
