"""The 15 + 4 corruptions of ImageNet-C, made anew for any image ("regenerated": the published JPEGs are the benchmark).

Images of 64 pixels and more: ImageNet-C's parameters and, at the end, its JPEG of quality 85. Smaller ones: the
parameters published for CIFAR-10-C, whose files are no JPEGs.
"""

import hashlib
import os
from functools import cached_property
from typing import Any

import numpy as np

from ...ranges import check
from ..asked import BENCHMARK, EXTRA, SEVERITIES, SEVERITY
from . import blur, digital, noise, weather  # noqa: F401  (they register themselves)
from .base import REGISTRY, SMALL, Corruption, corruption, is_small
from .digital import through_jpeg, to_file

__all__ = [
    "BENCHMARK",
    "EXTRA",
    "REGISTRY",
    "SEVERITIES",
    "SEVERITY",
    "SMALL",
    "Corruption",
    "check_corruption",
    "corrupt",
    "corrupt_to_file",
    "corruption",
    "generator",
]

_STORED = {"quality": 85, "optimize": True}  # of the published JPEGs


def corrupt(image: np.ndarray, name: str, severity: int, seed: int, key: str) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> the same, as the benchmark would have stored it.

    seed, key: the image's own random numbers, whatever the order and number of workers; key names the image.
    Raises ValueError: no such corruption, or a severity that is none of 1 to 5.
    """
    result = _corrupt(image, name, severity, seed, key)
    return result if is_small(image) else through_jpeg(result, **_STORED)


def corrupt_to_file(image: np.ndarray, name: str, severity: int, seed: int, key: str) -> bytes:
    """The file that `corrupt` gives the pixels of: a JPEG, of a small image a PNG, which loses nothing."""
    result = _corrupt(image, name, severity, seed, key)
    return to_file(result, "PNG") if is_small(image) else to_file(result, "JPEG", **_STORED)


def _corrupt(image: np.ndarray, name: str, severity: int, seed: int, key: str) -> np.ndarray:
    check_corruption(name)
    check("severity", severity, SEVERITY)
    rng = _Later(seed, name, severity, key)
    kind = REGISTRY[name]
    return kind.apply(image, (kind.small if is_small(image) else kind.large)[severity - 1], rng)


def check_corruption(name: str, setting: str = "corruption") -> None:
    """Raises ValueError: it is not one of them."""
    if name not in REGISTRY:
        raise ValueError(f"{setting}={name}: not one of {', '.join((*BENCHMARK, *EXTRA))}")


def generator(seed: int, name: str, severity: int, key: str) -> np.random.Generator:
    """Random numbers of one image under one corruption."""
    place = os.fsencode(f"{seed}/{name}/{severity}/{key}")  # file names need not be UTF-8
    digest = hashlib.sha256(place).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class _Later:
    """A generator made when it is first asked: many corruptions never ask."""

    def __init__(self, *place: Any) -> None:
        self.place = place

    @cached_property
    def rng(self) -> np.random.Generator:
        return generator(*self.place)

    def __getattr__(self, kind: str) -> Any:
        return getattr(self.rng, kind)
