"""Pictures, data modules and markers the dataset tests share."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
requires_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="the package ffcv is not installed")


def draw_pictures(source: Path, per_class: int, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> None:
    """Writes `per_class` JPEGs into one folder per class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (source / name).mkdir(parents=True)
        for index in range(per_class):
            size = tuple(int(side) for side in rng.integers(24, 60, size=2))
            coarse = Image.fromarray(rng.integers(0, 256, size=(3, 3, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(source / name / f"{index}.jpg", quality=95)


def module(cls, root: Path, stage: str = "fit", **settings):
    """A data module set up for `stage`, small and with two workers unless told otherwise."""
    built = cls(str(root), **{"image_size": 16, "batch_size": 64, "num_workers": 2 if HAS_FFCV else 0, **settings})
    built.setup(stage)
    return built


def decoding_threads() -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if "ffcv" in thread.name or "PageReader" in type(thread).__name__
    ]
