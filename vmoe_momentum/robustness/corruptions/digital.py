"""Digital corruptions."""

import io

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from .base import Draws, corruption, to_bytes
from .blur import smooth
from .opencv import cv2


@corruption("digital", large=(0.4, 0.3, 0.2, 0.1, 0.05), small=(0.75, 0.5, 0.4, 0.3, 0.15))
def contrast(image: np.ndarray, factor: float, rng: Draws) -> np.ndarray:
    """About the mean of each channel of this image."""
    levels = np.arange(256)[:, None] / 255
    values = np.stack([levels[:, 0].take(image[..., channel].ravel()) for channel in range(3)])
    mean = np.add.accumulate(values, axis=1, out=values)[:, -1] / values.shape[1]  # as image.mean((0, 1)) adds them
    table = to_bytes((levels - mean) * factor + mean)
    return np.stack([table[:, channel].take(image[..., channel]) for channel in range(3)], axis=-1)


@corruption(  # 244 where 224 was meant: so the benchmark was made
    "digital",
    large=tuple(
        (244 * a, 244 * s, 244 * o)
        for a, s, o in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    ),
    small=tuple(
        (32 * a, 32 * s, 32 * o)
        for a, s, o in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
)
def elastic_transform(image: np.ndarray, parameters: tuple[float, float, float], rng: Draws) -> np.ndarray:
    """A random affine map, then every pixel displaced by smooth noise (alpha, sigma, corner offset in pixels)."""
    alpha, sigma, offset = parameters
    x = image.astype(np.float32) / 255
    height, width = image.shape[:2]
    centre, reach = np.array([height, width], dtype=np.float32) // 2, min(height, width) // 3
    corners = np.stack([centre + reach, [centre[0] + reach, centre[1] - reach], centre - reach]).astype(np.float32)
    moved = corners + np.asarray(rng.uniform(-offset, offset, (3, 2))).astype(np.float32)
    turn = cv2().getAffineTransform(corners, moved)
    x = cv2().warpAffine(x, turn, (width, height), borderMode=cv2().BORDER_REFLECT_101)
    across, down = (
        (smooth(rng.uniform(-1, 1, (height, width)), sigma, "reflect", 3.0) * alpha).astype(np.float32)
        for _ in range(2)
    )
    rows, columns = np.mgrid[:height, :width]
    places = (rows + down, columns + across)
    channels = [ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)]
    return to_bytes(np.stack(channels, axis=-1))


@corruption("digital", large=(0.6, 0.5, 0.4, 0.3, 0.25), small=(0.95, 0.9, 0.85, 0.75, 0.65))
def pixelate(image: np.ndarray, scale: float, rng: Draws) -> np.ndarray:
    """Smaller and back, areas averaged."""
    height, width = image.shape[:2]
    small = (max(1, int(width * scale)), max(1, int(height * scale)))
    picture = Image.fromarray(image).resize(small, Image.Resampling.BOX)
    # the box filter repeats pixels; so does the nearest one, ten times as fast, where none lies between two
    clear = all(lowest_bit(few) <= lowest_bit(many) for few, many in zip(small, (width, height), strict=True))
    again = Image.Resampling.NEAREST if clear else Image.Resampling.BOX
    return np.asarray(picture.resize((width, height), again))


def lowest_bit(number: int) -> int:
    return number & -number


@corruption("digital", large=(25, 18, 15, 10, 7), small=(80, 65, 58, 50, 40))
def jpeg_compression(image: np.ndarray, quality: int, rng: Draws) -> np.ndarray:
    """Saved as JPEG and read back."""
    return through_jpeg(image, quality=quality)


def through_jpeg(image: np.ndarray, **options: object) -> np.ndarray:
    """uint8 [H, W, 3] as Pillow saves it (4:2:0) and reads it again."""
    return np.asarray(Image.open(io.BytesIO(to_file(image, "JPEG", **options))))


def to_file(image: np.ndarray, form: str, **options: object) -> bytes:
    """What Pillow writes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=form, **options)
    return file.getvalue()


@corruption(
    "extra",
    large=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    small=((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
)
def saturate(image: np.ndarray, parameters: tuple[float, float], rng: Draws) -> np.ndarray:
    """S of HSV times the first, plus the second."""
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * parameters[0] + parameters[1], 0, 1)
    return to_bytes(hsv_to_rgb(hsv))
