"""A small ImageNet-shaped set of real colour photographs, from pictures that ship in packages."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from ..files.staging import refuse_existing, staged
from ..progress import track
from ..ranges import SEED, THREADS, Range, in_range
from ..resources import usable_cores
from .encoding import parse_encoding
from .layout import SPLITS, ClassEntry, write_classes
from .manifest import seal
from .prepare import MARK, Prepared, already_prepared, summary

# Class -> package and file. scikit-image's bundled colour photographs, and scikit-learn's two.
PICTURES = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "cat": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "galaxies": ("skimage.data", "hubble_deep_field.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "temple": ("sklearn.datasets.images", "china.jpg"),
    "tissue": ("skimage.data", "ihc.png"),
}
_VAL_SHARE = 5  # one crop in five


@in_range("--", per_class=Range(_VAL_SHARE, 10**6, whole=True), seed=SEED, num_workers=THREADS)
def prepare_photos(
    out: str = "data/photos",
    per_class: int = 65,
    encoding: str = "500_0.50_90",
    seed: int = 0,
    num_workers: int = -1,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> Prepared:
    """Ten classes of large JPEGs, 400 to 640 px: crops of ten photographs that ship with scikit-image and -learn.

    For trying the whole path on pictures of ImageNet's shape. Training and validation crops come from the same
    photographs, so accuracy on it says nothing of generalisation.

    Args:
        out: Folder to create.
        per_class: Crops of each photograph, 5 to 1e6; a fifth of them for validation.
        encoding: How the betons hold them: 500_0.50_90, 400_0.10_90, raw, or LONGER-SIDE_SHARE-OF-JPEGS_QUALITY.
        seed: Seed of the crops and of the share of JPEGs, 0 to 4294967295.
        num_workers: Threads, 1 to 1024; -1 for one per usable core.
        overwrite: Replace a dataset prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        ValueError: `out` exists, a setting is out of range, or scikit-image is missing.
    """
    target, settings = Path(out), {"dataset": "photos", "per_class": per_class, "encoding": encoding, "seed": seed}
    stored = parse_encoding(encoding, seed)
    if exist_ok and (found := already_prepared(target, settings)):
        return found
    refuse_existing(target, overwrite, MARK)
    pictures = {name: _open(*place) for name, place in PICTURES.items()}
    classes = [ClassEntry(name, name) for name in sorted(pictures)]
    with staged(target, overwrite, MARK) as work:
        jobs = [(entry.id, i) for entry in classes for i in range(per_class)]
        for name, i in track(jobs, "cropping"):
            folder = work / SPLITS[i % _VAL_SHARE == 0] / name
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, sorted(pictures).index(name), i])
            _crop(pictures[name], rng).save(folder / f"{name}_{i:04d}.jpg", quality=90)
        write_classes(work, classes)
        workers = usable_cores() if num_workers < 0 else num_workers
        seal(work, classes, settings, stored, workers)
    return summary(target)


def _open(package: str, name: str) -> Image.Image:
    try:
        with files(package).joinpath(name).open("rb") as file:
            return Image.open(file).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"data prepare photos: {package} with {name} is missing; pip install 'vmoe_momentum[photos]'"
        ) from error


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of at least half the shorter side, sides 3:4 to 4:3, the longer one 400 to 640 px."""
    ratio = np.sqrt(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
    largest = min(picture.width / ratio, picture.height * ratio)
    side = rng.uniform(0.5, 1.0) * largest
    width, height = int(side * ratio), int(side / ratio)
    left = int(rng.integers(0, picture.width - width + 1))
    top = int(rng.integers(0, picture.height - height + 1))
    scale = rng.uniform(400, 640) / max(width, height)
    size = (round(width * scale), round(height * scale))
    return picture.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
