"""Writing betons with FFCV's own encoder and allocator, but in one process.

FFCV's DatasetWriter forks workers and then waits for a count: an exception or a kill in any of them waits forever. Here
threads encode (the codecs release the GIL) and the caller's thread writes in order, so that errors surface, and the
same images and settings give the same bytes whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..pictures import read_picture
from .encoding import Encoding
from .ffcv_support import using_ffcv
from .layout import ImageFile
from .reading import BadImages, in_threads, read_content


def write_beton(
    path: Path, files: list[ImageFile], encoding: Encoding, num_workers: int, bad: BadImages, upright: bool = False
) -> list[str]:
    """Writes `files`, in order, as fields "image" and "label"; gives the sha256 of each file.

    Nothing of use where `bad` has some after it.
    """
    with using_ffcv():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter

    options = {"max_resolution": encoding.max_resolution, "jpeg_quality": encoding.jpeg_quality}
    fields = {mode: RGBImageField(write_mode=mode, **options) for mode in ("jpg", "raw")}
    jpeg = encoding.are_jpeg(len(files))
    tasks = [(file.path, fields["jpg" if j else "raw"], upright) for file, j in zip(files, jpeg, strict=True)]
    digests = []

    writer = DatasetWriter(str(path), {"image": fields["raw"], "label": IntField()}, encoding.page_bytes, num_workers=1)
    writer.num_samples = len(files)
    writer.prepare()
    try:
        metadata = np.zeros(len(files), writer.metadata_type)
        image_field, label_field = metadata.dtype.names
        allocator = MemoryAllocator(str(path), writer.data_region_start, encoding.page_bytes)
        with allocator:
            encoded = bad.sift(in_threads(_encode, tasks, num_workers, f"writing {path.name}"))
            for index, (record, data, digest) in enumerate(encoded):
                digests.append(digest)
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
    return digests


def _encode(task: tuple[Path, Any, bool]) -> tuple[np.ndarray, np.ndarray, str]:
    """Record (without pointer) and bytes of one image, through FFCV's field with an allocator that just remembers; and
    the sha256 of its file."""
    path, field, upright = task
    content = read_content(path)
    picture = read_picture(path, upright, content)
    longest = max(picture.size)
    if longest > field.max_resolution > 0 and min(picture.size) * field.max_resolution < longest:
        # FFCV's own shrinking would leave no pixel of the shorter side
        scale = field.max_resolution / longest
        picture = picture.resize([max(1, int(side * scale)) for side in picture.size], Image.Resampling.BOX)
    record, data = np.zeros(1, field.metadata_type), []

    def remember(size: int) -> tuple[int, np.ndarray]:
        data.append(np.empty(size, np.uint8))
        return 0, data[0]

    field.encode(record, np.array(picture), remember)
    return record, data[0], hashlib.sha256(content).hexdigest()
