"""The official on-disk layout of V-MoE checkpoints: PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.

Every announced piece must come exactly once, from the shard that the index names, with the right type and size, and the
pieces must cover each tensor: the reference's own reader leaves zeros where a piece is missing.

The format is that of vmoe/checkpoints/ at 942a78b. Each file is one MessagePack object; the index is a tree whose
leaves are `[array info, boxes, shard of each box]`; leaves are numbered depth first with sorted keys; a shard maps leaf
numbers to `[parts, box]` pieces.
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import rich.progress

VERSION = "20220622"
MARKER = "__msgpack_array_chunk_a87ca2__"
ARRAY, BOX, ENTRY = 1, 6, 8  # extension types that occur in files
BFLOAT16 = "bfloat16"
STORED = {BFLOAT16: "<u2", "float16": "<f2", "float32": "<f4", "float64": "<f8"}

Box = tuple[tuple[int, int], ...]  # (start, stop) of each axis


class Entry(NamedTuple):
    """A tensor as the index announces it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: dict[Box, int]  # box -> number of the shard that has it


def read_shards(prefix: Path) -> dict[str, np.ndarray]:
    """Parameters by name, float32. Raises FileNotFoundError, ValueError: see read_flax."""
    index_path = prefix.with_name(prefix.name + ".index")
    if not index_path.is_file():
        interrupted = prefix.with_name(f".tmp.{index_path.name}")
        hint = f"; {interrupted.name} beside it is what an interrupted save leaves" if interrupted.exists() else ""
        raise FileNotFoundError(
            f"source={prefix}: no file {index_path}{hint}; give a .npz file or a checkpoint's prefix"
        )
    leaves, num_shards = _read_index(index_path)
    paths = [prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{num_shards:05d}") for i in range(num_shards)]
    _check_files(prefix, paths)

    names = {number: name for number, (name, _) in enumerate(leaves) if name is not None}
    wanted = {number: leaves[number][1] for number in names}
    missing = {(number, box): shard for number, entry in wanted.items() for box, shard in entry.pieces.items()}
    _check_sizes(paths, wanted)
    arrays = {number: np.empty(entry.shape, np.float32) for number, entry in wanted.items()}
    for shard, path in enumerate(paths):
        for number, box, array in _pieces(path, wanted, len(leaves)):
            where = f"{path.name}: {names[number]} {list(box)}"
            announced = missing.pop((number, box), None)
            if announced is None:
                known = box in wanted[number].pieces
                raise ValueError(f"{where}: {'comes a second time' if known else 'the index announces no such piece'}")
            if announced != shard:
                raise ValueError(f"{where}: the index announces it in shard {announced}; the shards are mixed up")
            arrays[number][tuple(slice(*axis) for axis in box)] = array
    if missing:
        lost = [f"{names[number]} {list(box)} of {paths[shard].name}" for (number, box), shard in missing.items()]
        raise ValueError(f"source={prefix}: incomplete, announced pieces are missing: {some(lost)}")
    return {names[number]: array for number, array in arrays.items()}


def _check_files(prefix: Path, paths: list[Path]) -> None:
    for path in paths:
        if not path.is_file():
            others = sorted(p.name for p in prefix.parent.glob(f"{_escape(prefix.name)}.data-*-of-*") if p not in paths)
            hint = f"; there is {some(others, 3)}, of another number of shards" if others else ""
            raise FileNotFoundError(f"{path}: shard missing, the index announces {len(paths)}{hint}")


def _check_sizes(paths: list[Path], wanted: dict[int, Entry]) -> None:
    """No tensor is believed to be larger than the files that are to hold it."""
    for shard, path in enumerate(paths):
        announced = sum(
            _volume(box) * np.dtype(STORED[entry.dtype]).itemsize
            for entry in wanted.values()
            for box, where in entry.pieces.items()
            if where == shard
        )
        if announced > path.stat().st_size:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, but the index announces {announced} bytes of parameters in it: "
                "it is cut off, or the shard of another checkpoint; fetch it again"
            )


def _escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _read_index(path: Path) -> tuple[list[tuple[str | None, Entry]], int]:
    """All leaves in the order of their numbers; the name is None for those that are no parameters."""
    try:
        index = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ValueError(f"{path}: not a whole index file ({error or type(error).__name__})") from error
    if not isinstance(index, dict) or not {"shard_count", "index"} <= set(index):
        raise ValueError(f"{path}: not the index of a V-MoE checkpoint (no shard_count and index in it)")
    version, num_shards, tree = index.get("version"), index["shard_count"], index["index"]
    if version not in (None, VERSION):
        raise ValueError(f"{path}: version {version!r}; only {VERSION} and unversioned files are known")
    if not isinstance(num_shards, int) or not 0 < num_shards < 100_000 or not isinstance(tree, dict):
        raise ValueError(f"{path}: shard_count={num_shards!r} cannot be; the file is damaged")
    train_state = isinstance(tree.get("params"), dict) and "Encoder" in tree["params"]
    if not train_state and "Encoder" not in tree:
        raise ValueError(f"{path}: holds neither parameters of a vision transformer nor a train state with them")
    if train_state and version is None:
        raise ValueError(f"{path}: an unversioned train state, whose tensors are in an order that nobody wrote down")
    leaves = []
    for name, value in _walk(tree, ()):
        parameter = "/".join(name[1:] if train_state else name)
        wanted = not train_state or name[0] == "params"
        leaves.append((parameter if wanted else None, _entry(path, "/".join(name), value, wanted)))
    for told, entry in leaves:
        for shard in entry.pieces.values():
            if not 0 <= shard < num_shards:
                raise ValueError(f"{path}: {told} lies in shard {shard} of {num_shards}; the file is damaged")
    return leaves, num_shards


def _walk(tree: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Depth first, keys sorted as strings. Empty maps and nil hold no tensor."""
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from _walk(tree[key], (*name, str(key)))
    elif tree is not None:
        yield name, tree


def _entry(path: Path, name: str, value: Any, wanted: bool) -> Entry:
    try:
        if value.code != ENTRY:
            raise ValueError("not an index entry")
        info, boxes, shards = _unpack(value.data)
        shape, dtype, _, _ = _unpack(info)
        if not isinstance(dtype, str) or not all(type(number) is int for number in (*shape, *shards)):
            raise ValueError("a dtype that is no name, or a shape or shard that is no whole number")
        entry = Entry(tuple(shape), dtype, dict(zip(map(_box, boxes), shards, strict=True)))
        if len(entry.pieces) != len(boxes):
            raise ValueError("a box comes twice")
        _check_cover(entry)
    except (AttributeError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"{path}: {name}: unreadable index entry ({error}); the file is damaged") from error
    if wanted and dtype not in STORED:
        raise ValueError(f"{path}: {name} is {dtype}; parameters are {', '.join(STORED)}")
    return entry


def _check_cover(entry: Entry) -> None:
    """Boxes lie inside the tensor, do not overlap, and fill it."""
    boxes = list(entry.pieces)
    for box in boxes:
        inside = len(box) == len(entry.shape) and all(
            0 <= start < stop <= size for (start, stop), size in zip(box, entry.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"box {list(box)} is outside of shape {list(entry.shape)}")
    if sum(_volume(box) for box in boxes) != math.prod(entry.shape):
        raise ValueError(f"its pieces do not cover shape {list(entry.shape)}")
    seen = sorted(boxes)
    for i, box in enumerate(seen):
        for other in seen[i + 1 :]:
            if other and other[0][0] >= box[0][1]:
                break  # sorted by the first axis: none of the rest can meet this box
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                raise ValueError(f"boxes {list(box)} and {list(other)} overlap")


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def _box(data: bytes) -> Box:
    slices = [_unpack(part) for part in _unpack(data)]
    if any(step is not None or type(start) is not int or type(stop) is not int for start, stop, step in slices):
        raise ValueError("a slice with a step, or without whole numbers")
    return tuple((start, stop) for start, stop, _ in slices)


def _pieces(path: Path, wanted: dict[int, Entry], num_leaves: int) -> Iterator[tuple[int, Box, np.ndarray]]:
    """(leaf number, box, float32 array) of a shard's wanted pieces, read one leaf at a time."""
    size = path.stat().st_size
    try:
        title, quiet = f"reading {path.name}", not sys.stderr.isatty()
        with rich.progress.open(path, "rb", description=title, transient=True, disable=quiet) as file:
            # no length in the file is believed beyond what the file can hold
            unpacker = msgpack.Unpacker(file, max_buffer_size=min(size + 1, 2**32 - 1), strict_map_key=False)
            marked = False
            for _ in range(unpacker.read_map_header()):
                key = unpacker.unpack()
                if key == MARKER:
                    marked = unpacker.unpack() is True
                elif not (isinstance(key, str) and key.isdecimal() and int(key) < num_leaves):
                    raise ValueError(f"key {str(key)[:40]!r} is no leaf of the index")
                elif int(key) not in wanted:
                    unpacker.skip()
                else:
                    for piece in unpacker.unpack():
                        yield int(key), *_piece(wanted[int(key)], piece)
            if not marked:
                raise ValueError("the marker of a shard is missing")
            if unpacker.tell() != size:
                raise ValueError(f"{size - unpacker.tell()} extra bytes at the end")
    except msgpack.OutOfData as error:
        raise ValueError(f"{path}: cut off after {size} bytes; fetch this shard again") from error
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(f"{path}: not a whole shard of this checkpoint ({error or type(error).__name__})") from error


def _piece(entry: Entry, piece: Any) -> tuple[Box, np.ndarray]:
    parts, box = piece
    if box.code != BOX:
        raise ValueError("a piece without a box")
    box = _box(box.data)
    stored = STORED[entry.dtype]
    flat = []
    for part in parts:
        if part.code != ARRAY:
            raise ValueError("a part that is no array")
        shape, dtype, content = _unpack(part.data)
        if dtype != entry.dtype:
            raise ValueError(f"{dtype} where the index announces {entry.dtype}")
        if math.prod(shape) * np.dtype(stored).itemsize != len(content):
            raise ValueError(f"{len(content)} bytes for shape {shape} of {dtype}")
        flat.append(np.frombuffer(content, stored))
    values = np.concatenate(flat)
    if values.size != _volume(box):
        raise ValueError(f"{values.size} values for box {list(box)}")
    values = from_bfloat16(values) if entry.dtype == BFLOAT16 else values.astype(np.float32)
    return box, values.reshape([stop - start for start, stop in box])


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> the float32 of equal value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def some(names: list[str], most: int = 8) -> str:
    """The first names of a list that may be long."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more
