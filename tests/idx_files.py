"""Small sets of IDX files, as MNIST and its kin come."""

import gzip
import struct
from pathlib import Path

import numpy as np

COUNTS = {"train": 12, "t10k": 6}


def drawn(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 5, 7] and labels 0, 1, 2, 0, ..."""
    count = COUNTS[split]
    return np.random.default_rng(count).integers(0, 256, (count, 5, 7), np.uint8), np.arange(count, dtype=np.uint8) % 3


def packed(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_set(folder: Path, prefix: str = "", val: str = "t10k", dot: bool = False) -> Path:
    """train gzipped, validation not."""
    folder.mkdir(exist_ok=True)
    for split in COUNTS:
        for kind, values in zip(("images-idx3", "labels-idx1"), drawn(split), strict=True):
            name = f"{prefix}{'train' if split == 'train' else val}-{kind}-ubyte"
            name = name.replace("-idx", ".idx") if dot else name
            if split == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(packed(values)))
            else:
                (folder / name).write_bytes(packed(values))
    return folder
