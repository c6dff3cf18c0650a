"""Weather."""

from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

from .base import Draws, corruption, is_small, to_bytes
from .blur import smooth, streak, zoom_in
from .opencv import cv2

# The code that made the benchmark draws from the first five of its six textures. Apache-2.0, see frost/NOTICE.
TEXTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


@corruption(
    "weather",
    large=(
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    small=(
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
)
def snow(image: np.ndarray, parameters: tuple[float, ...], rng: Draws) -> np.ndarray:
    """Flakes falling in two directions over a whitened picture."""
    mean, spread, factor, threshold, radius, sigma, keep = parameters
    x = image.astype(np.float32) / 255
    flakes = zoom_in(rng.normal(mean, spread, image.shape[:2])[..., None], factor)[..., 0]
    flakes[flakes < threshold] = 0
    flakes = streak(to_bytes(flakes), int(radius), sigma, rng.uniform(-135, -45))[..., None] / 255
    grey = cv2().cvtColor(x, cv2().COLOR_RGB2GRAY)[..., None]
    x = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return to_bytes(x + flakes + np.rot90(flakes, k=2))


@corruption(
    "weather",
    large=((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    small=((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
)
def frost(image: np.ndarray, parameters: tuple[float, float], rng: Draws) -> np.ndarray:
    """A photographed frost texture on top, at full resolution (a fifth of it for small images)."""
    texture = _texture(TEXTURES[int(rng.integers(0, 5))], is_small(image), image.shape[:2])
    height, width = image.shape[:2]
    top = int(rng.integers(0, max(1, texture.shape[0] - height)))
    left = int(rng.integers(0, max(1, texture.shape[1] - width)))
    cut = texture[top : top + height, left : left + width]
    return np.clip(parameters[0] * image + parameters[1] * cut, 0, 255).astype(np.uint8)


@cache
def _texture(name: str, small: bool, least: tuple[int, int]) -> np.ndarray:
    """RGB uint8; enlarged where the image is larger (ours: the benchmark has 224 pixels only)."""
    with Image.open(Path(__file__).parent / "frost" / name) as picture:
        texture = np.asarray(picture.convert("RGB"))
    if small:
        texture = cv2().resize(texture, (0, 0), fx=0.2, fy=0.2)
    factor = max(least[0] / texture.shape[0], least[1] / texture.shape[1])
    if factor > 1:
        size = (max(least[1], round(texture.shape[1] * factor)), max(least[0], round(texture.shape[0] * factor)))
        texture = cv2().resize(texture, size)
    return texture


@corruption(
    "weather",
    large=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    small=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
)
def fog(image: np.ndarray, parameters: tuple[float, float], rng: Draws) -> np.ndarray:
    """A cloud of fractal brightness, shared by the channels."""
    strength, decay = parameters
    height, width = image.shape[:2]
    least = 32 if is_small(image) else 256
    size = max(least, 1 << (max(height, width) - 1).bit_length())
    x = image / 255
    brightest = x.max()
    x = x + strength * _cloud(size, decay, rng)[:height, :width, None]
    return to_bytes(x * brightest / (brightest + strength))


def _cloud(size: int, decay: float, rng: Draws) -> np.ndarray:
    """Diamond-square on a torus: [size, size] in 0..1. The displacement goes with the square of its width."""
    field = np.zeros((size, size))
    step, spread = size, 100.0

    def displaced(total: np.ndarray) -> np.ndarray:
        return total / 4 + spread * rng.uniform(-spread, spread, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        field[half::step, half::step] = displaced(pairs + np.roll(pairs, -1, axis=1))
        centres = field[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0)
        field[::step, half::step] = displaced(above + corners + np.roll(corners, -1, axis=1))
        beside = centres + np.roll(centres, 1, axis=1)
        field[half::step, ::step] = displaced(beside + corners + np.roll(corners, -1, axis=0))
        step, spread = half, spread / decay
    field -= field.min()
    return field / field.max()


@corruption("weather", large=(0.1, 0.2, 0.3, 0.4, 0.5), small=(0.05, 0.1, 0.15, 0.2, 0.3))
def brightness(image: np.ndarray, amount: float, rng: Draws) -> np.ndarray:
    """Added to V of HSV."""
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    return to_bytes(hsv_to_rgb(hsv))


@corruption(
    "extra",
    large=(
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    small=(
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
)
def spatter(image: np.ndarray, parameters: tuple[float, ...], rng: Draws) -> np.ndarray:
    """Drops of water (severities 1 to 3) or mud (4 and 5)."""
    mean, spread, sigma, threshold, strength, is_mud = parameters
    x = image.astype(np.float32) / 255
    liquid = smooth(rng.normal(mean, spread, image.shape[:2]), sigma)
    liquid[liquid < threshold] = 0
    if is_mud:
        mud = smooth((liquid > threshold).astype(np.float32), strength)
        mud[mud < 0.8] = 0
        return to_bytes(x * (1 - mud[..., None]) + mud[..., None] * np.array([63, 42, 20]) / 255)
    drops = (liquid * 255).astype(np.uint8)
    shade = drops * _relief(drops)
    top = shade.max()
    share = shade / top * strength if top > 0 else shade
    return to_bytes(x + share[..., None] * (np.array([175, 238, 238]) / 255).astype(np.float32))


def _relief(drops: np.ndarray) -> np.ndarray:
    """Light on the drops: by their distance from edges, embossed."""
    far = cv2().distanceTransform(255 - cv2().Canny(drops, 50, 150), cv2().DIST_L2, 5)
    far = cv2().threshold(far, 20, 20, cv2().THRESH_TRUNC)[1]
    far = cv2().equalizeHist(cv2().blur(far, (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)
    return cv2().blur(cv2().filter2D(far, cv2().CV_8U, emboss), (3, 3)).astype(np.float32)
