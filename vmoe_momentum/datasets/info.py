"""What is in a prepared dataset: counts, sizes, storage, and a sheet of pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from ..pictures import UnreadablePicture, picture_size
from ..progress import track
from ..ranges import SEED, SIDE, Range, in_range
from .batches import BatchPlan
from .beton import JPEG, check_beton
from .ffcv_support import ffcv_available
from .layout import SPLITS, ClassEntry, beton_path, list_images, read_classes, read_manifest

_MEASURED = 1000  # image files looked at where there is no beton to ask
Backend = Literal["ffcv", "folder"]


def info(root: str) -> Table:
    """What a prepared dataset holds, as a table.

    Args:
        root: The prepared dataset.

    Raises:
        FileNotFoundError: `root` is missing, or it is no dataset.
        ValueError: A file of it is damaged.
    """
    folder = Path(root)
    classes, manifest = read_classes(folder, setting="root"), read_manifest(folder)
    table = Table(title=root, show_header=True)
    columns = {split: _describe(folder, split, classes, manifest) for split in SPLITS}
    table.add_column("")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name in columns["train"]:
        table.add_row(name, *[columns[split][name] for split in SPLITS])
    made = {**manifest.get("settings", {}), "ffcv": manifest.get("ffcv")}
    table.caption = ", ".join(f"{name} {value}" for name, value in made.items()) if manifest else "no manifest.json"
    return table


def _describe(folder: Path, split: str, classes: list[ClassEntry], manifest: dict[str, Any]) -> dict[str, str]:
    recorded = manifest["splits"][split] if manifest else None
    files = list_images(folder / split, classes, recorded["labels"] if recorded else None)
    counts = np.bincount([file.label for file in files], minlength=len(classes))
    filled = counts[counts > 0]
    told = {
        "images": f"{len(files):,}",
        "classes": f"{len(filled):,}" if len(filled) == len(classes) else f"{len(filled):,} of {len(classes):,}",
        "images a class": f"{filled.min():,} to {filled.max():,}, median {np.median(filled):,.0f}",
    }
    path = beton_path(folder, split)
    if not path.is_file():
        some = files[:: max(1, len(files) // _MEASURED)]
        sizes = np.array([_size(file.path) for file in track(some, "measuring pictures")])
        return {**told, "size, px (files)": _ranges(sizes[:, 0], sizes[:, 1]), "beton": "none", "stored as": ""}
    beton = check_beton(path, len(classes))
    image = beton.records["image"]
    share = float((image["mode"] == JPEG).mean())
    return {
        **told, "size, px (beton)": _ranges(image["width"], image["height"]),
        "beton": f"{path.stat().st_size / 1e9:.3g} GB, {beton.sizes.mean() / 1e3:,.0f} kB an image",
        "stored as": f"{share:.0%} JPEG, {1 - share:.0%} raw",
    }  # fmt: skip


def _size(path: Path) -> tuple[int, int]:
    try:
        return picture_size(path)
    except UnreadablePicture as error:
        raise ValueError(f"{path}: {error.reason}; `vmoe-momentum data verify` finds all") from error


def _ranges(widths: np.ndarray, heights: np.ndarray) -> str:
    return f"{widths.min()} to {widths.max()} x {heights.min()} to {heights.max()}"


@in_range("--", count=Range(1, 400, whole=True), image_size=SIDE, seed=SEED)
def sample(
    root: str,
    out: str = "sample.png",
    split: Literal["train", "val"] = "train",
    count: int = 36,
    augment: bool = False,
    image_size: int = 224,
    backend: Backend | None = None,
    seed: int = 0,
) -> Path:
    """Draws a contact sheet: pictures with their labels, as a network sees them.

    Args:
        root: The prepared dataset.
        out: PNG to write.
        split: Which pictures.
        count: How many, 1 to 400, drawn at random and shown by label.
        augment: Random crops and flips as in training, with the data modules' defaults, instead of the centre.
        image_size: Side of each, 1 to 16384 px.
        backend: Who reads them; null: ffcv where there are betons.
        seed: Seed of the choice, 0 to 4294967295.

    Raises:
        FileNotFoundError: `root` is missing, or it is no dataset.
        ValueError: A file is damaged, or a setting out of range.
    """
    from matplotlib.figure import Figure

    from .datamodules import FFCVDataModule, FolderDataModule

    target = Path(out)
    if target.suffix.lower() != ".png" or not target.absolute().parent.is_dir():
        raise ValueError(f"--out={out}: use a name ending in .png, in a folder that exists")
    if backend is None:
        backend = "ffcv" if ffcv_available() and beton_path(Path(root), split).is_file() else "folder"
    cls = FFCVDataModule if backend == "ffcv" else FolderDataModule
    data = cls(root, image_size=image_size, num_workers=1, seed=seed)
    data.check_split(split)
    total = data.count(split)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    loader = data.build_loader(split, BatchPlan(total, len(chosen), training=augment, seed=seed))
    images, labels = next(loader.open([chosen], epoch=0))

    columns = int(np.ceil(np.sqrt(len(chosen))))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.85 * rows), layout="constrained")
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set_axis_off()
    shown = zip(figure.axes, images.permute(0, 2, 3, 1).numpy(), labels.tolist(), chosen.tolist(), strict=False)
    for axis, image, label, index in shown:
        axis.imshow(image)
        name = data.class_names[label].partition(",")[0]
        axis.set_title(f"{label} {name[:18]}\n#{index}", fontsize=7, parse_math=False)
    how = "random crops, as in training" if augment else "centre crops, as in evaluation"
    figure.suptitle(
        f"{Path(root).name}/{split}: {len(chosen)} of {total:,} images, {how}, {backend}", fontsize=9, parse_math=False
    )
    figure.savefig(target, dpi=110)
    return target
