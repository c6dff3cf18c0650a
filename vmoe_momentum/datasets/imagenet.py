"""ImageNet-1K from any of the three forms people have it in; labels always by timm's list of WordNet ids.

A source is read into picture files of a prepared dataset; what follows is the same for all. A class's label is its
place among the 1000 ids timm ships, whatever folders are there.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..files.staging import refuse_existing, staged
from ..pictures import class_folders, find_pictures, is_picture, mention
from ..progress import track
from ..ranges import SEED, THREADS, in_range
from ..resources import usable_cores
from .encoding import parse_encoding
from .layout import SPLITS, ClassEntry, write_classes
from .manifest import digest, seal
from .prepare import (
    MARK,
    Placing,
    Prepared,
    already_prepared,
    listing_bad_images,
    place,
    refuse_overlap,
    require_names,
    summary,
)
from .reading import BadImages, OnError

TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar", "devkit": "ILSVRC2012_devkit_t12.tar.gz"}
SHARDS = {"train": "train-*.parquet", "val": "validation-*.parquet"}
_ROWS = 64  # of a shard in memory at once


@in_range("--", num_workers=THREADS, seed=SEED)
def prepare_imagenet(
    source: str,
    out: str = "data/imagenet",
    encoding: str = "500_0.50_90",
    images: Placing = "hardlink",
    on_error: OnError = "stop",
    upright: bool = False,
    num_workers: int = -1,
    seed: int = 0,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> Prepared:
    """ImageNet-1K, from folders, the official archives, or parquet shards.

    `source` holds train/<WordNet id>/* and val/<WordNet id>/*; or ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz as image-net.org gives them; or train-*.parquet and validation-*.parquet (also under
    data/) with columns image (bytes, path) and label, as on the Hugging Face hub. Any subset of the 1000 classes will
    do; labels are those of timm's list.

    Args:
        source: Folder with one of the three.
        out: Folder to create. Beside the betons it holds every picture as a file: archives and shards need about
            150 GB for those.
        encoding: How the betons hold them, LONGER-SIDE_SHARE-OF-JPEGS_QUALITY: 500_0.50_90 (ffcv-imagenet's for
            ResNet-50), 400_0.10_90 (its for ResNet-18), raw (500_0.00_90: nothing to decode, many times the size).
        images: How files get from folders to `out`; archives and shards are unpacked.
        on_error: At an image that does not decode: stop there, or look at all and list every one in a file beside
            `out`. Either way nothing is prepared.
        upright: Turn pictures as their EXIF orientation says, which ImageNet's published scores are without.
        num_workers: Threads, 1 to 1024; -1 for one per usable core.
        seed: Seed of the share of JPEGs, 0 to 4294967295.
        overwrite: Replace a dataset prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        FileNotFoundError: `source` is none of the three.
        ValueError: `out` exists, a folder is no class, an archive is incomplete, an image does not decode.
    """
    stored, folder, target = parse_encoding(encoding, seed), Path(source), Path(out)
    settings = {"dataset": "imagenet", "source": str(folder.resolve()), "encoding": encoding, "seed": seed}
    settings["upright"] = upright
    require_names(source=source, out=out)
    if exist_ok and (found := already_prepared(target, settings)):
        return found
    refuse_overlap(folder, target)
    refuse_existing(target, overwrite, MARK)
    classes = imagenet_classes()
    read = _reader(folder, {entry.id for entry in classes}, images)
    with listing_bad_images(target, on_error), staged(target, overwrite, MARK) as work:
        read(work)
        tree = (folder / "train").is_dir()

        def name(path: Path) -> str:
            own = path.relative_to(work)
            return str(folder / own) if tree else f"{own}, unpacked from {folder}"

        bad = BadImages(on_error, name)
        counts = {split: [len(find_pictures(work / split / entry.id).paths) for entry in classes] for split in SPLITS}
        for split in SPLITS:
            if not sum(counts[split]):
                raise ValueError(f"--source={source}: no pictures for {split}/; both train and val are needed")
        write_classes(work, classes)
        seal(work, classes, settings, stored, usable_cores() if num_workers < 0 else num_workers, bad, counts)
    return summary(target)


def imagenet_classes() -> list[ClassEntry]:
    """The 1000 classes in label order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [ClassEntry(wnid, info.label_name_to_description(wnid)) for wnid in info.label_names()]


def _reader(source: Path, wnids: set[str], images: Placing) -> Callable[[Path], None]:
    """What fills a folder with train/<wnid>/* and val/<wnid>/* from this source."""
    if not source.is_dir():
        raise FileNotFoundError(f"--source={source}: no such folder")
    if all((source / split).is_dir() for split in SPLITS):
        _check_tree(source, wnids)
        return lambda work: _read_tree(source, work, images)
    if all((source / name).is_file() for name in TARS.values()):
        return lambda work: _read_tars(source, work, wnids)
    for folder in (source, source / "data"):
        shards = {split: sorted(folder.glob(pattern)) for split, pattern in SHARDS.items()}
        if all(shards.values()):
            return lambda work: _read_shards(shards, work)
    wanted = f"train/ and val/, or {', '.join(TARS.values())}, or {' and '.join(SHARDS.values())}"
    there = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"--source={source}: it holds {there}; needed are {wanted}")


def _check_tree(source: Path, wnids: set[str]) -> None:
    for split in SPLITS:
        folders = {folder.name for folder in class_folders(source / split)[0]}
        strange = sorted(folders - wnids)
        if strange:
            raise ValueError(
                f"--source={source}: folder {split}/{strange[0]} is no class of ImageNet-1K (1000 WordNet ids such as"
                " n01440764); rename or remove it, or use data prepare folder for other classes"
            )
        if not folders:
            loose = len(find_pictures(source / split).paths)
            raise ValueError(
                f"--source={source}: {split}/ holds {loose} loose images and no class folders; sort them into folders"
                f" by WordNet id, or give the archives as they came ({', '.join(TARS.values())})"
            )


def _read_tree(source: Path, work: Path, images: Placing) -> None:
    for split in SPLITS:
        folders, left_out = class_folders(source / split)
        for folder in track(folders, f"placing {split}"):
            found = find_pictures(folder)
            left_out += found.left_out
            for path in found.paths:
                place(path, work / split / path.relative_to(source / split), images)
        mention(source / split, left_out)


def _read_tars(source: Path, work: Path, wnids: set[str]) -> None:
    """torchvision reads the devkit and knows the checksums; the archives are unpacked here in one pass, without its
    138 GB of archives inside the archive on disk, and with a bar."""
    from torchvision.datasets.imagenet import ARCHIVE_META, load_meta_file, parse_devkit_archive

    for kind, name in TARS.items():
        if digest(source / name, "md5") != ARCHIVE_META[kind][1]:
            raise ValueError(f"{source / name}: not the official archive (its md5 differs); download it again")
    with tempfile.TemporaryDirectory() as scratch:  # torchvision leaves its notes beside the archive
        (Path(scratch) / TARS["devkit"]).symlink_to((source / TARS["devkit"]).resolve())
        parse_devkit_archive(scratch)
        val_wnids = load_meta_file(scratch)[1]
    with tarfile.open(source / TARS["train"]) as outer, _bar_of_bytes(source / TARS["train"]) as advance:
        for member in outer:
            wnid = Path(member.name).stem
            if wnid not in wnids:
                raise ValueError(f"{source / TARS['train']}: {member.name} is no class of ImageNet-1K")
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(work / "train" / wnid, filter="data")
            advance(member.size)
    loose = work / "val" / ".loose"
    with tarfile.open(source / TARS["val"]) as archive, _bar_of_bytes(source / TARS["val"]) as advance:
        for member in archive:
            archive.extract(member, loose, filter="data")
            advance(member.size)
    pictures = find_pictures(loose).paths
    if len(pictures) != len(val_wnids):
        raise ValueError(f"{source / TARS['val']}: {len(pictures)} pictures, {len(val_wnids)} labels in the devkit")
    for path, wnid in zip(pictures, val_wnids, strict=True):
        (work / "val" / wnid).mkdir(exist_ok=True)
        path.rename(work / "val" / wnid / path.name)
    loose.rmdir()


def _read_shards(shards: dict[str, list[Path]], work: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"--source={shards['train'][0].parent}: reading parquet needs pyarrow; pip install 'vmoe_momentum[parquet]'"
        ) from error
    wnids = [entry.id for entry in imagenet_classes()]
    for split, paths in shards.items():
        taken: Counter[str] = Counter()
        for path in track(paths, f"unpacking {split}"):
            row = 0
            try:
                batches = parquet.ParquetFile(path).iter_batches(_ROWS, columns=["image", "label"])
                for batch in batches:
                    for item in batch.to_pylist():
                        _write_item(item, f"{path}: row {row}", work / split, wnids, taken)
                        row += 1
            except (pyarrow.ArrowException, OSError, TypeError, KeyError) as error:
                told = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{path}: row {row} cannot be read ({told}); needed are columns image (a struct of bytes and path)"
                    " and label; download it again"
                ) from error


def _write_item(item: dict[str, Any], where: str, folder: Path, wnids: list[str], taken: Counter[str]) -> None:
    """One row as a picture file. taken: the next number to name a picture of a class by."""
    known = set(wnids)
    label, content, name = item["label"], item["image"]["bytes"], Path(item["image"]["path"] or "").name
    if label is None or not 0 <= label < len(wnids):
        raise ValueError(f"{where}: label {label} where 0 to {len(wnids) - 1} are known")
    wnid = wnids[label]
    if content is None:
        raise ValueError(f"{where}: no bytes, only the name {name!r}; shards must hold the pictures themselves")
    said = {word for word in Path(name).stem.split("_") if word in known}  # first in training, last in validation
    if said and said != {wnid}:
        raise ValueError(f"{where}: label {label} is {wnid}, but the picture is called {name}; labels of another list?")
    (folder / wnid).mkdir(parents=True, exist_ok=True)
    while not is_picture(name) or (folder / wnid / name).exists():
        name = f"{taken[wnid]:08d}.JPEG"
        taken[wnid] += 1
    try:
        (folder / wnid / name).write_bytes(content)
    except OSError as error:
        raise ValueError(f"{where}: cannot be written ({error.strerror}); choose another --out") from error


@contextmanager
def _bar_of_bytes(path: Path) -> Iterator[Callable[[int], None]]:
    """Gives what advances it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"unpacking {path.name}", total=path.stat().st_size)
        yield lambda size: bar.advance(task, size)
