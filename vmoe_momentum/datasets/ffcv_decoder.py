"""FFCV decoders that crop, resize and flip in one pass, reproducibly, and report images that do not decode.

FFCV's own decoders draw from numba's per-thread generators, which no seed reaches, and ignore the JPEG decoder's return
code, so a damaged image becomes stale pixels. Ours keys every draw by (seed, epoch, image) and writes a status.
Import this module lazily: it loads ffcv (seconds).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from numba import njit, prange

from .beton import JPEG

_numba: Any = numba  # its types leave out what it exports and what its config holds

# splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a counter-based generator needs no state shared between threads.
_GAMMA, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many


def _kept(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiled, and kept on disk for the next process where numba finds a place to write to: two seconds less.

    Without such a place, or where the disk is full, it is compiled all the same.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kept = njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no such place
            return njit(nogil=True, **options)(function)
        save = kept._cache.save_overload

        def save_if_possible(*overload: Any) -> None:
            with suppress(OSError):
                save(*overload)

        kept._cache.save_overload = save_if_possible
        return kept

    return compiled


@_kept()
def _mix(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@_kept()
def _uniform(key: np.uint64, draw: int) -> float:
    """The `draw`-th number in [0, 1) of the stream `key`."""
    return float(_mix(key + np.uint64(draw + 1) * _GAMMA) >> _S11) * 2.0**-53


@_kept()
def _random_crop(
    height: int,
    width: int,
    key: np.uint64,
    scale_low: float,
    scale_high: float,
    ratio_low: float,
    ratio_high: float,
) -> tuple[int, int, int, int]:
    """Top, left, height and width as torchvision's RandomResizedCrop draws them."""
    for attempt in range(_CROP_ATTEMPTS):
        draw = 4 * attempt
        area = height * width * (scale_low + (scale_high - scale_low) * _uniform(key, draw))
        log_low, log_high = np.log(ratio_low), np.log(ratio_high)
        ratio = np.exp(log_low + (log_high - log_low) * _uniform(key, draw + 1))
        w, h = int(round(np.sqrt(area * ratio))), int(round(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top = int(_uniform(key, draw + 2) * (height - h + 1))
            return top, int(_uniform(key, draw + 3) * (width - w + 1)), h, w
    w, h = width, height
    if width < ratio_low * height:
        h = max(1, int(round(width / ratio_low)))
    elif width > ratio_high * height:
        w = max(1, int(round(height * ratio_high)))
    return (height - h) // 2, (width - w) // 2, h, w


@_kept(fastmath=True, error_model="numpy")
def _shrink(source: np.ndarray, top: int, left: int, height: int, width: int, out: np.ndarray) -> None:
    """Averages areas as OpenCV's INTER_AREA does where both sides shrink, in half the time: rows are added as vectors,
    and columns by differences of running sums, which needs no branch per pixel."""
    size = out.shape[0]
    scale_y, scale_x = height / size, width / size
    first, share = np.empty(size + 1, np.int64), np.empty(size + 1, np.float32)
    for k in range(size + 1):  # the column an edge of `out` falls into, and how far
        first[k] = min(int(k * scale_x), width - 1)
        share[k] = np.float32(k * scale_x - first[k])
    sums, before = np.empty(3 * width, np.float32), np.empty(3 * width, np.float32)
    edges = np.empty(3 * size + 3, np.float32)
    factor, half = np.float32(1.0 / (scale_x * scale_y)), np.float32(0.5)
    for row in range(size):
        upper, lower = row * scale_y, (row + 1) * scale_y
        sums[:] = 0
        for y in range(int(upper), min(int(np.ceil(lower)), height)):
            weight = np.float32(min(lower, y + 1.0) - max(upper, float(y)))
            line = source[top + y, left : left + width].reshape(-1)
            for i in range(3 * width):
                sums[i] += weight * np.float32(line[i])
        red = green = blue = np.float32(0)
        for i in range(0, 3 * width, 3):
            before[i], before[i + 1], before[i + 2] = red, green, blue
            red, green, blue = red + sums[i], green + sums[i + 1], blue + sums[i + 2]
        for k in range(size + 1):
            i, part = 3 * first[k], share[k]
            for channel in range(3):
                edges[3 * k + channel] = before[i + channel] + part * sums[i + channel]
        line = out[row].reshape(-1)
        for i in range(3 * size):
            line[i] = np.uint8(np.int32((edges[i + 3] - edges[i]) * factor + half))


@_kept()
def _flip(image: np.ndarray) -> None:
    for row in range(image.shape[0]):
        for column in range(image.shape[1] // 2):
            for channel in range(3):
                mirrored = image.shape[1] - 1 - column
                left = image[row, column, channel]
                image[row, column, channel] = image[row, mirrored, channel]
                image[row, mirrored, channel] = left


@_kept()
def _read_mapped(address: np.uint64, state: Any) -> np.ndarray:
    """Bytes of one sample from the memory-mapped file: (file, pointers, sizes)."""
    return state[0][address : address + state[2][np.searchsorted(state[1], address)]]


@_kept()
def _read_cached(address: np.uint64, state: Any) -> np.ndarray:
    """Bytes of one sample from FFCV's page cache: (pages, pointers, sizes, page -> slot)."""
    page_size = np.uint64(state[0].shape[1])
    offset = address % page_size
    size = state[2][np.searchsorted(state[1], address)]
    return state[0][state[3][address // page_size], offset : offset + size]


@lru_cache
def _compiled(os_cache: bool, threads: int) -> Callable[..., Any]:
    """The batch decoder. One compilation serves every loader of the process: crops are arguments, not constants."""
    read = _read_mapped if os_cache else _read_cached
    decode_jpeg, resize = njit(nogil=True)(imdecode), njit(nogil=True)(resize_crop)
    jpeg, parallel = JPEG, threads > 1

    @njit(nogil=True, parallel=parallel, error_model="numpy")
    def decode_batch(
        indices: np.ndarray,
        images: np.ndarray,
        scratch: np.ndarray,
        control: np.ndarray,
        fields: np.ndarray,
        state: Any,
        crop: Any,
    ) -> None:
        train, scale_low, scale_high, ratio_low, ratio_high, flip, eval_ratio = crop
        for slot in prange(len(indices)):
            field = fields[indices[slot]]
            data = read(field["data_ptr"], state)
            height, width = np.int64(field["height"]), np.int64(field["width"])
            pixels = data
            if field["mode"] == jpeg:
                # one buffer a thread, which stays in its cache, where there are as many
                place = _numba.get_thread_id() if len(scratch) >= threads else np.int64(slot)
                pixels = scratch[place, : height * width * 3]
                h, w = np.uint32(height), np.uint32(width)
                control[slot, 1] = decode_jpeg(data, pixels, h, w, h, w, 0, 0, 1, 1, False, False)
            key = _mix(np.uint64(control[slot, 0]) + np.uint64(indices[slot]) * _GAMMA)
            if train:
                crop_of = _random_crop(height, width, key, scale_low, scale_high, ratio_low, ratio_high)
            else:
                side = max(1, int(eval_ratio * min(height, width)))
                crop_of = ((height - side) // 2, (width - side) // 2, side, side)
            top, left, h_crop, w_crop = crop_of
            picture = pixels.reshape(height, width, 3)
            if min(h_crop, w_crop) >= images.shape[1]:
                _shrink(picture, top, left, h_crop, w_crop, images[slot])
            else:
                resize(picture, top, top + h_crop, left, left + w_crop, images[slot])
            if train and _uniform(key, 4 * _CROP_ATTEMPTS) < flip:
                _flip(images[slot])

    return decode_batch


class CropDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]  # ffcv has no types
    """Random resized crop and flip (training) or centre crop (evaluation), resized to `size` by area averaging.

    Its third buffer, `control` int64 [B, 2], carries the epoch's key in and the JPEG decoder's status (0: good) out.

    Args:
        size: Side of the square output, px; may be changed between iterations, as FFCV asks for it anew.
        training: Random crop and flip instead of the centre crop.
        scale: Range of the crop's share of the image's area.
        ratio: Range of the crop's width / height.
        flip: Probability of a horizontal flip.
        eval_ratio: Side of the centre crop over the image's shorter side.
        os_cache: Which of FFCV's two memory managers the loader uses.
        threads: Threads per batch; 1 compiles faster, without a parallel region.
    """

    def __init__(
        self,
        size: int,
        training: bool,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        eval_ratio: float,
        os_cache: bool,
        threads: int,
    ) -> None:
        super().__init__()
        self.size = size
        self.crop = (training, *map(float, (*scale, *ratio, flip, eval_ratio)))
        self.decode_batch = _compiled(os_cache, threads)

    def declare_state_and_memory(self, previous_state: Any) -> Any:
        """FFCV's hook: shapes of the output and of the buffers the decoder asks for, per image."""
        jpegs = self.metadata[self.metadata["mode"] == JPEG]
        largest = int((jpegs["height"].astype(np.int64) * jpegs["width"]).max()) if len(jpegs) else 0
        shape, pixel = (self.size, self.size, 3), np.dtype("<u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=pixel)
        scratch = AllocationQuery((3 * largest,), pixel)
        return state, (AllocationQuery(shape, pixel), scratch, AllocationQuery((2,), np.dtype("<i8")))

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's hook: the function it compiles and calls for each batch."""
        decode_batch, crop = self.decode_batch, self.crop

        def decode(batch_indices: np.ndarray, buffers: Any, metadata: np.ndarray, storage_state: Any) -> np.ndarray:
            images, scratch, control = buffers
            decode_batch(batch_indices, images, scratch, control, metadata, storage_state, crop)
            return images[: len(batch_indices)]

        return decode


def require_thread_safe_numba() -> None:
    """Starts numba's threads on a layer that survives two loaders decoding at once (training and validation).

    Its fallback layer, workqueue, aborts the whole process in that case. Raises ValueError when nothing else loads.
    """
    if _numba.config.THREADING_LAYER == "default":
        _numba.config.THREADING_LAYER = "threadsafe"
    from numba.np.ufunc import parallel

    try:
        parallel._launch_threads()
        layer = _numba.threading_layer()
    except ValueError as error:
        layer = str(error).splitlines()[0]
    if layer not in ("tbb", "omp"):
        raise ValueError(
            f"NUMBA_THREADING_LAYER={_numba.config.THREADING_LAYER}: numba offers {layer!r}, and FFCV decoding training"
            " and validation batches at once needs 'tbb' or 'omp'; pip install tbb and unset NUMBA_THREADING_LAYER"
        )


def usable_threads(requested: int) -> int:
    """`requested` threads, or as many as numba was started with when that is fewer; -1 asks for all of them."""
    most = _numba.config.NUMBA_NUM_THREADS
    return most if requested < 0 else max(1, min(requested, most))
