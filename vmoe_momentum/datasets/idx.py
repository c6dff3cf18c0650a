"""MNIST and the data sets made in its image, Fashion-MNIST first, as a prepared dataset."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from ..files.staging import refuse_existing, staged
from ..ranges import THREADS, in_range
from ..resources import usable_cores
from .encoding import Encoding
from .idx_files import Pictures, find_idx, read_split
from .layout import SPLITS, ClassEntry, require_two, write_classes
from .manifest import seal
from .prepare import MARK, Prepared, already_prepared, refuse_overlap, require_names, summary
from .reading import in_threads

DEBIAN = "/usr/share/datasets/fashion-mnist"  # of its package dataset-fashion-mnist
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_LABELS = {  # sha256 of the two label files, unzipped and without their headers
    "train": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "val": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}


@in_range("--", num_workers=THREADS)
def prepare_idx(
    out: str,
    source: str = DEBIAN,
    names: str | None = None,
    prefix: str | None = None,
    transpose: bool = False,
    num_workers: int = -1,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> Prepared:
    """MNIST-style IDX files, gzipped or not; Fashion-MNIST where Debian's dataset-fashion-mnist is installed.

    `source` holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte,
    each with or without .gz: Fashion-MNIST, MNIST, Kuzushiji-MNIST, EMNIST (which says test for t10k). train is for
    training, t10k for validation. Pictures are kept pixel by pixel, grey as RGB with three equal channels.

    Args:
        out: Folder to create.
        source: Folder with the four files.
        names: Names of the classes: fashion (the ten of Fashion-MNIST), or a text file with one a line, in the order
            of the labels; null: Fashion-MNIST's where the labels are its labels, else the labels themselves.
        prefix: What the names of the files begin with, such as emnist-letters-, where `source` holds several sets.
        transpose: Exchange rows and columns, which EMNIST's files need.
        num_workers: Threads, 1 to 1024; -1 for one per usable core.
        overwrite: Replace a dataset prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        FileNotFoundError: `source` or one of its files does not exist.
        ValueError: `out` exists, a file is no such IDX file or damaged, or labels and names do not fit.
    """
    target, folder = Path(out), Path(source)
    require_names(source=source, out=out)
    settings = {
        "dataset": "idx", "source": str(folder.resolve()), "names": names, "prefix": prefix, "transpose": transpose,
    }  # fmt: skip
    if exist_ok and (found := already_prepared(target, settings)):
        return found
    refuse_overlap(folder, target)
    refuse_existing(target, overwrite, MARK)
    if not folder.is_dir():
        package = "install Debian's package (apt install dataset-fashion-mnist)" if source == DEBIAN else "look for it"
        raise FileNotFoundError(f"--source={source}: no such folder; {package}, or name one that holds IDX files")
    paths = find_idx(folder, prefix)
    splits = {split: read_split(**paths[split]) for split in SPLITS}
    _check_alike(paths, splits)
    classes = _classes(source, splits, names)
    workers = usable_cores() if num_workers < 0 else num_workers
    with staged(target, overwrite, MARK) as work:
        for split, pictures in splits.items():
            _write(work / split, pictures, transpose, workers)
        write_classes(work, classes)
        side = max(splits["train"].images.shape[1:])
        seal(work, classes, settings, Encoding(side, 0.0, 90), workers)
    return summary(target)


def _check_alike(paths: dict[str, dict[str, Path]], splits: dict[str, Pictures]) -> None:
    """Raises ValueError: pictures of two sizes, or a class that one of the splits lacks."""
    sizes = [" x ".join(map(str, splits[split].images.shape[1:])) for split in SPLITS]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{paths['val']['images']}: pictures of {sizes[1]} px, where {paths['train']['images'].name} has {sizes[0]}"
            " px; they are of different sets"
        )
    for split, other in (SPLITS, SPLITS[::-1]):
        lacking = np.setdiff1d(splits[other].labels, splits[split].labels)
        if lacking.size:
            raise ValueError(
                f"{paths[split]['labels']}: no picture has label {lacking[0]}, which {paths[other]['labels'].name} has;"
                " every class needs pictures in both"
            )


def _classes(source: str, splits: dict[str, Pictures], names: str | None) -> list[ClassEntry]:
    """In the order of the labels."""
    labels = np.unique(splits["train"].labels).tolist()
    told = _names(names, splits)
    if told is not None and len(told) != len(labels):
        raise ValueError(f"--names={names}: {len(told)} names for {len(labels)} classes; give one a class")
    entries = [ClassEntry(folder_of(label, labels[-1]), str(label)) for label in labels]
    require_two(entries, f"--source={source}")
    return entries if told is None else [e._replace(name=name) for e, name in zip(entries, told, strict=True)]


def _names(names: str | None, splits: dict[str, Pictures]) -> list[str] | None:
    if names is None:
        found = {split: hashlib.sha256(pictures.labels.data).hexdigest() for split, pictures in splits.items()}
        return list(FASHION) if found == _FASHION_LABELS else None
    if names == "fashion":
        return list(FASHION)
    try:
        told = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(
            f"--names={names}: cannot be read ({reason}); give fashion, or a text file with one name a line"
        ) from error
    if len(set(told)) != len(told):
        twice = next(name for name in told if told.count(name) > 1)
        raise ValueError(f"--names={names}: {twice!r} stands there twice; give each class a name of its own")
    return told


def folder_of(label: int, last: int) -> str:
    """Padded, so that folders sort as labels do."""
    return str(label).zfill(len(str(last)))


def _write(folder: Path, pictures: Pictures, transpose: bool, num_workers: int) -> None:
    """One PNG a picture, named by its place in the file."""
    last, digits = int(pictures.labels.max()), len(str(len(pictures.labels) - 1))
    images = pictures.images.transpose(0, 2, 1) if transpose else pictures.images
    for label in np.unique(pictures.labels).tolist():
        (folder / folder_of(label, last)).mkdir(parents=True)

    def write(index: int) -> None:
        place = folder / folder_of(int(pictures.labels[index]), last)
        Image.fromarray(np.ascontiguousarray(images[index])).save(place / f"{index:0{digits}d}.png")

    for _ in in_threads(write, list(range(len(images))), num_workers, f"writing {folder.name}/"):
        pass
