"""Blurs."""

import numpy as np
from scipy import ndimage

from .base import Draws, corruption, to_bytes
from .opencv import cv2

STRIP = 16  # rows


def smooth(x: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    """Gaussian filter over height and width; the edge pixel repeated."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode=mode, truncate=truncate)


@corruption(
    "blur",
    large=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    small=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
)
def defocus_blur(image: np.ndarray, parameters: tuple[float, float], rng: Draws) -> np.ndarray:
    """A disk of some radius, itself softened and not normalised again (it brightens by 1 % at severities 4 and 5)."""
    radius, softness = parameters
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    line = np.arange(-reach, reach + 1)
    kernel = (line[None] ** 2 + line[:, None] ** 2 <= radius**2).astype(np.float32)
    kernel = cv2().GaussianBlur(kernel / kernel.sum(), (size, size), sigmaX=softness)
    x = image / 255
    return to_bytes(np.stack([cv2().filter2D(x[..., channel], -1, kernel) for channel in range(3)], axis=-1))


@corruption(
    "blur",
    large=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    small=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
)
def glass_blur(image: np.ndarray, parameters: tuple[float, int, int], rng: Draws) -> np.ndarray:
    """Pixels take their neighbours' places, between two blurs.

    The published "swap" is a copy, and later pixels see earlier copies: from the bottom right to the top left.
    """
    sigma, reach, iterations = parameters
    height, width = image.shape[:2]
    pixels = to_bytes(smooth(image / 255, sigma)).reshape(-1, 3)
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    target = (rows[:, None] * width + columns).ravel()
    where = list(range(height * width))  # which pixel of the blurred picture each place shows
    for _ in range(iterations):
        offset = rng.integers(-reach, reach, (len(target), 2))  # across, down
        source = target + offset[:, 1] * width + offset[:, 0]
        for to, place in zip(target.tolist(), source.tolist(), strict=True):
            where[to] = where[place]
    return to_bytes(smooth(pixels[where].reshape(image.shape) / 255, sigma))


@corruption(
    "blur",
    large=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    small=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
)
def motion_blur(image: np.ndarray, parameters: tuple[int, float], rng: Draws) -> np.ndarray:
    """Along a line of up to 45 degrees."""
    return streak(image, *parameters, rng.uniform(-45, 45))


def streak(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """ImageMagick's motion blur: one-sided, so it also shifts. uint8 [H, W] or [H, W, 3]; angle in degrees.

    It rounds to 16 bits and cuts to 8.
    """
    height, width = image.shape[:2]
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2.0 * sigma**2))
    weights /= weights.sum()
    turn = np.deg2rad(angle)
    right = np.ceil(taps * np.cos(turn) - 0.5).astype(int)
    down = np.ceil(taps * np.sin(turn) - 0.5).astype(int)
    sides = [(max(0, -int(way.min())), max(0, int(way.max()))) for way in (down, right)]
    wide = np.pad(image, sides + [(0, 0)] * (image.ndim - 2), mode="edge").astype(np.float64)
    places = [(weight, sides[0][0] + dy, sides[1][0] + dx) for weight, dx, dy in zip(weights, right, down, strict=True)]
    blurred = np.empty_like(image)
    for start in range(0, height, STRIP):  # so that sums stay in the processor's cache
        stop = min(height, start + STRIP)
        total = np.zeros((stop - start, *image.shape[1:]))
        part = np.empty_like(total)
        for weight, top, left in places:
            total += np.multiply(wide[top + start : top + stop, left : left + width], weight, out=part)
        blurred[start:stop] = (257 * total + 0.5).astype(np.int32) // 257
    return blurred


def zoom_in(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of [H, W, C] enlarged by `factor`, corners aligned, cut back to H x W."""
    if factor == 1:
        return x
    height, width = x.shape[:2]
    inner_height, inner_width = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return enlarge(x[top : top + inner_height, left : left + inner_width], factor, height, width)


def enlarge(x: np.ndarray, factor: float, height: int, width: int) -> np.ndarray:
    """The middle of scipy.ndimage.zoom(x, (factor, factor, 1), order=1), to the bit: its sums in its order."""
    channels = x.shape[2]
    above, below, up, down = _between(len(x), factor, height)
    before, after, near, far = _between(x.shape[1], factor, width)
    values = x.reshape(len(x), -1).astype(np.float64)
    before, after = ((each[:, None] * channels + np.arange(channels)).ravel() for each in (before, after))
    near, far = np.repeat(near, channels), np.repeat(far, channels)
    upper, lower = values[above] * up[:, None], values[below] * down[:, None]
    total = upper.take(before, axis=1) * near
    for rows, columns, weights in ((upper, after, far), (lower, before, near), (lower, after, far)):
        part = rows.take(columns, axis=1)
        part *= weights
        total += part
    return total.reshape(len(total), -1, channels).astype(x.dtype)


def _between(few: int, factor: float, wanted: int) -> tuple[np.ndarray, ...]:
    """Neighbours of each place and their weights; none beyond the last pixel, where rounding may lead."""
    many = round(few * factor)
    start = (many - wanted) // 2
    place = np.arange(many)[start : start + wanted] * ((few - 1) / max(1, many - 1))
    low = np.floor(place).astype(int)
    near = 1 - (place - low)
    inside = place <= few - 1
    return np.minimum(low, few - 1), np.minimum(low + 1, few - 1), near * inside, (1 - near) * inside


@corruption(
    "blur",
    large=((1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)),
    small=((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)),
)
def zoom_blur(image: np.ndarray, parameters: tuple[float, float, float], rng: Draws) -> np.ndarray:
    """Mean over growing zooms, and once more the image itself."""
    x = (image / 255).astype(np.float32)
    factors = np.arange(*parameters)  # floating point decides whether the last one is in
    total = np.zeros_like(x)
    for factor in factors:
        total += zoom_in(x, factor)
    return to_bytes((x + total) / (len(factors) + 1))


@corruption("extra", large=(1, 2, 3, 4, 6), small=(0.4, 0.6, 0.7, 0.8, 1))
def gaussian_blur(image: np.ndarray, sigma: float, rng: Draws) -> np.ndarray:
    """Sigma in pixels, cut at four of them."""
    return to_bytes(smooth(image / 255, sigma))
