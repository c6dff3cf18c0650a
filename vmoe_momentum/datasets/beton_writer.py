"""Writing betons with FFCV's own encoder and allocator, but in one process.

FFCV's DatasetWriter forks workers and then waits for a count: an exception or a kill in any of them waits forever. Here
threads encode (the codecs release the GIL) and the caller's thread writes in order, so that errors surface, and the
same images and settings give the same bytes whatever the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from .ffcv_support import using_ffcv
from .layout import ImageFile

_MIN_PAGE_BYTES = 1 << 23  # FFCV's default
_WINDOW_PER_THREAD = 32
_SHOWN = 5

Item = TypeVar("Item")
Result = TypeVar("Result")


class Encoding(NamedTuple):
    """How images are stored.

    Args:
        write_mode: "jpg", "raw" (uint8 pixels) or "proportion" (a seeded share of JPEGs, the rest raw).
        max_resolution: Longer side, px; larger images are shrunk.
        jpeg_quality: 1 to 100.
        compress_probability: Share of JPEGs under "proportion".
        seed: Seed of the choice of that share.
    """

    write_mode: str
    max_resolution: int
    jpeg_quality: int
    compress_probability: float
    seed: int

    def modes(self, count: int) -> list[str]:
        """The mode of each image, "jpg" or "raw"."""
        share = {"jpg": 1.0, "raw": 0.0, "proportion": self.compress_probability}[self.write_mode]
        draws = np.random.default_rng(self.seed).random(count)
        return ["jpg" if draw < share else "raw" for draw in draws]

    @property
    def page_bytes(self) -> int:
        """FFCV's page size: a power of two that holds the largest raw image."""
        return max(_MIN_PAGE_BYTES, 1 << (3 * self.max_resolution**2 - 1).bit_length())


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3]; EXIF orientation is ignored, as torchvision's ImageFolder does.

    Raises ValueError naming the file.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def check_images(files: list[ImageFile], num_workers: int) -> None:
    """Decodes every file. Raises ValueError naming the first few that fail."""
    shapes = _in_threads(lambda file: read_image(file.path).shape, files, num_workers, "checking images")
    for _ in _collect_errors(shapes):
        pass


def write_beton(path: Path, files: list[ImageFile], encoding: Encoding, num_workers: int) -> None:
    """Writes `files`, in order, as fields "image" and "label". Raises ValueError naming the first few bad images."""
    with using_ffcv():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter

    options = {"max_resolution": encoding.max_resolution, "jpeg_quality": encoding.jpeg_quality}
    fields = {mode: RGBImageField(write_mode=mode, **options) for mode in ("jpg", "raw")}
    tasks = [(file.path, fields[mode]) for file, mode in zip(files, encoding.modes(len(files)), strict=True)]

    writer = DatasetWriter(str(path), {"image": fields["raw"], "label": IntField()}, encoding.page_bytes, num_workers=1)
    writer.num_samples = len(files)
    writer.prepare()
    try:
        metadata = np.zeros(len(files), writer.metadata_type)
        image_field, label_field = metadata.dtype.names
        allocator = MemoryAllocator(str(path), writer.data_region_start, encoding.page_bytes)
        with allocator:
            encoded = _collect_errors(_in_threads(_encode, tasks, num_workers, f"writing {path.name}"))
            for index, (record, data) in enumerate(encoded):
                allocator.set_current_sample(index)
                record["data_ptr"], storage = allocator.malloc(data.nbytes)
                storage[:] = data
                metadata[image_field][index] = record[0]
                metadata[label_field][index] = files[index].label
        writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _encode(task: tuple[Path, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Record (without pointer) and bytes of one image, through FFCV's field with an allocator that just remembers."""
    path, field = task
    record, data = np.zeros(1, field.metadata_type), []

    def remember(size: int) -> tuple[int, np.ndarray]:
        data.append(np.empty(size, np.uint8))
        return 0, data[0]

    field.encode(record, read_image(path), remember)
    return record, data[0]


def _in_threads(
    function: Callable[[Item], Result], items: list[Item], num_workers: int, title: str
) -> Iterator[Result | ValueError]:
    """`function` of each item, in order, or the ValueError it raised; a progress bar after five seconds."""
    from tqdm import tqdm

    def attempt(item: Item) -> Result | ValueError:
        try:
            return function(item)
        except ValueError as error:
            return error

    # Windows, not one map over everything: finished results would pile up in memory ahead of the writer.
    window = _WINDOW_PER_THREAD * num_workers
    with ThreadPoolExecutor(num_workers) as pool, tqdm(total=len(items), desc=title, delay=5, leave=False) as bar:
        for start in range(0, len(items), window):
            for result in pool.map(attempt, items[start : start + window]):
                bar.update()
                yield result


def _collect_errors(results: Iterable[Result | ValueError]) -> Iterator[Result]:
    """Passes results on; raises one ValueError for the first few errors, having looked at all that follow them."""
    errors = []
    for result in results:
        if isinstance(result, ValueError):
            errors.append(str(result))
        elif not errors:
            yield result
    if errors:
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise ValueError("; ".join(errors[:_SHOWN]) + more + "; replace or remove them, then prepare again")
