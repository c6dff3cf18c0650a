"""What a corruption is, and where it is found.

H, W height and width in pixels. A corruption turns uint8 RGB [H, W, 3] into the same. Most work on x = pixels / 255 in
float64, clip to 0..1, and *truncate* to uint8, as the published images were made (hendrycks/robustness, ImageNet-C,
imagenet_c/corruptions.py at 8190fe3, Apache-2.0; parameters of images below 64 pixels: create_c/make_cifar_c.py there).

To add one: a function `name(image, parameters, rng)` in a file of this folder, decorated with `@corruption`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

SMALL = 64  # images with a shorter side have the parameters published for CIFAR-10-C


class Draws(Protocol):
    """Random numbers, as numpy's Generator gives them."""

    def normal(self, loc: float, scale: float, size: Any = None) -> Any: ...

    def uniform(self, low: float, high: float, size: Any = None) -> Any: ...

    def poisson(self, lam: Any) -> Any: ...

    def integers(self, low: int, high: int, size: Any = None) -> Any: ...

    def random(self, size: Any = None) -> Any: ...


Apply = Callable[[np.ndarray, Any, Draws], np.ndarray]  # image, parameters of a severity


class Corruption(NamedTuple):
    group: str  # noise, blur, weather, digital; extra: never part of mCE
    apply: Apply
    large: Sequence[Any]  # parameters of severities 1 to 5 at 224 pixels: ImageNet-C
    small: Sequence[Any]  # below 64 pixels: CIFAR-10-C


REGISTRY: dict[str, Corruption] = {}


def corruption(group: str, large: Sequence[Any], small: Sequence[Any]) -> Callable[[Apply], Apply]:
    """Registers a function under its own name."""

    def register(function: Apply) -> Apply:
        REGISTRY[function.__name__] = Corruption(group, function, large, small)
        return function

    return register


def to_bytes(x: np.ndarray) -> np.ndarray:
    """0..1 -> 0..255, truncated."""
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def is_small(image: np.ndarray) -> bool:
    return min(image.shape[:2]) < SMALL
