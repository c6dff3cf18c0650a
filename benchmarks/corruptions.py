"""Our corruptions beside imagecorruptions and the JPEG of quality 85 that ImageNet-C stores: milliseconds a picture.

    python benchmarks/corruptions.py --peer_path peer --csv benchmarks/results/corruptions.csv

The peer: `pip install --no-deps --target peer imagecorruptions==1.1.2`, no dependency of this package. It needs
scikit-image, and was written for old numpy, scipy and scikit-image; names that these have dropped since are given back
to it here, and nothing else. Without it our own column is measured alone. Both work in one thread and take turns.

It is not the same work everywhere: the peer's elastic transform blurs by 1 % of the side at every severity, ImageNet-C
at severity 1 by 171 pixels, which is what ours does.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType

import jsonargparse
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from timing import side_by_side, write_rows

from vmoe_momentum.robustness.corruptions import BENCHMARK, EXTRA, corrupt, through_jpeg
from vmoe_momentum.robustness.corruptions.opencv import cv2

COLUMNS = ("corruption", "ours_ms", "peer_ms", "ratio", "worst_ratio")


def open_peer(path: str | None) -> Callable | None:
    """imagecorruptions' `corrupt`, or None where it cannot be imported."""
    if path is not None:
        sys.path.insert(0, path)
    old = ModuleType("scipy.ndimage.interpolation")
    old.map_coordinates = ndimage.map_coordinates
    resources = ModuleType("pkg_resources")
    resources.resource_filename = lambda name, file: str(Path(sys.modules[name].__file__).parent / file)
    sys.modules |= {"scipy.ndimage.interpolation": old, "pkg_resources": resources}
    np.float_ = np.float64
    try:
        functions = import_module("imagecorruptions.corruptions")
        package = import_module("imagecorruptions")
    except ImportError as error:
        Console(stderr=True).print(f"without imagecorruptions: {error}", highlight=False)
        return None
    if "multichannel" not in inspect.signature(functions.gaussian).parameters:
        functions.gaussian = partial(_gaussian, functions.gaussian)
    return package.corrupt


def _gaussian(
    gaussian: Callable, image: np.ndarray, sigma: object, multichannel: bool = False, **options: object
) -> np.ndarray:
    return gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)


def picture(side: int) -> np.ndarray:
    """Smooth colours with grain: about as well to compress as a photograph. uint8 [side, side, 3]."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def main(
    peer_path: str | None = None,
    side: int = 224,
    severities: list[int] | None = None,
    repeats: int = 15,
    csv: str | None = None,
) -> None:
    """Print (and write) medians and ratios; a ratio below 1 means that ours is faster.

    Args:
        peer_path: Folder that imagecorruptions was installed to; not needed where it is installed already.
        side: Pixels, 64 or more: smaller pictures have other parameters and no JPEG.
        severities: By default all five.
        repeats: Timed rounds of each corruption and severity.
        csv: File to write the rows to.
    """
    peer, image, rows = open_peer(peer_path), picture(side), []
    cv2().setNumThreads(0)  # the peer's OpenCV is the same module
    for name in (*BENCHMARK, *EXTRA):
        found = []
        for severity in severities or (1, 2, 3, 4, 5):
            ours = partial(corrupt, image, name, severity, 0, "key")
            theirs = partial(_peer, peer, image, name, severity)
            found.append(side_by_side(ours, theirs, repeats))
        mine, other, ratio = (median(column) for column in zip(*found, strict=True))
        known = (f"{1e3 * other:.2f}", f"{ratio:.3f}", f"{max(each[2] for each in found):.3f}")
        told = (name, f"{1e3 * mine:.2f}", *(known if peer else ("", "", "")))
        rows.append(dict(zip(COLUMNS, told, strict=True)) | {"side": side, "opencv_threads": cv2().getNumThreads()})
    table = Table(title=f"milliseconds a picture of {side} px, median over severities, JPEG included")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*(row[column] for column in COLUMNS))
    Console().print(table)
    if csv is not None:
        write_rows(Path(csv), rows)


def _peer(peer: Callable | None, image: np.ndarray, name: str, severity: int) -> None:
    if peer is not None:
        through_jpeg(peer(image, severity, name), quality=85, optimize=True)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
