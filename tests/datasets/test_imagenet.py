"""ImageNet-1K from folders, archives and shards: the right labels, RGB pictures, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from cli_helpers import fails
from dataset_helpers import HAS_FFCV, module
from imagenet_files import COLOURS, WNIDS, picture, tree
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import imagenet as torchvision_imagenet

from vmoe_momentum import cli
from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule
from vmoe_momentum.datasets.imagenet import prepare_imagenet
from vmoe_momentum.datasets.verify import verify

LABELS = {"n01440764": 0, "n02123045": 281, "n15075141": 999}


def shown(root: Path, cls: type) -> dict[int, list[list[int]]]:
    """Label -> mean colour of each validation picture."""
    found: dict[int, list[list[int]]] = {}
    for images, labels in module(cls, root, "test").val_dataloader():
        for image, label in zip(images.float().mean((2, 3)).round().int().tolist(), labels.tolist(), strict=True):
            found.setdefault(label, []).append(image)
    return found


def check_labels(root: Path) -> None:
    for cls in (FFCVDataModule, FolderDataModule) if HAS_FFCV else (FolderDataModule,):
        found = shown(root, cls)
        assert set(found) == set(LABELS.values())
        for wnid, label in LABELS.items():
            for colour in found[label]:
                assert np.abs(np.array(colour) - COLOURS[wnid]).max() < 12, (wnid, colour)
    data = module(FolderDataModule, root, "test")
    assert data.num_classes == 1000 and "tench" in data.class_names[0] and "toilet tissue" in data.class_names[999]
    assert [entry.id for entry in data.classes] == ImageNetInfo("imagenet-1k").label_names()


def test_three_classes_stray_files_and_odd_pictures(tmp_path: Path, capsys) -> None:
    source = tree(tmp_path / "in")
    train = source / "train"
    (source / "README").write_text("stray")
    (train / "list.txt").write_text("stray")
    (train / "n01440764" / "Thumbs.db").write_bytes(b"stray")
    (train / "n01440764" / "._n01440764_0.JPEG").write_bytes(b"a Mac was here")
    (train / ".ipynb_checkpoints").mkdir()
    odd = train / "n02123045"
    (odd / "cmyk.JPEG").write_bytes(picture("n02123045", mode="CMYK"))
    (odd / "png.JPEG").write_bytes(picture("n02123045", kind="PNG"))
    (odd / "alpha.png").write_bytes(picture("n02123045", kind="PNG", mode="RGBA"))
    (odd / "palette.png").write_bytes(picture("n02123045", kind="PNG", mode="P"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by viewers
    (odd / "exif.JPEG").write_bytes(picture("n02123045", exif=exif))
    grey = train / "n15075141" / "grey.JPEG"
    grey.write_bytes(picture("n15075141", mode="L"))
    cli.run(["data", "prepare", "imagenet", f"--source={source}", f"--out={tmp_path / 'out'}", "--num_workers=2"])
    assert "1000 classes, 15 training and 6 validation images" in capsys.readouterr().out
    verify(str(tmp_path / "out"))
    check_labels(tmp_path / "out")
    assert (tmp_path / "out/train/n02123045/exif.JPEG").samefile(odd / "exif.JPEG")  # a hard link
    for cls in (FFCVDataModule, FolderDataModule) if HAS_FFCV else (FolderDataModule,):
        data = module(cls, tmp_path / "out", batch_size=15, hflip=False)
        images, labels = next(iter(data.train_dataloader()))
        greens = images.float().mean((2, 3))[labels == 281]
        assert len(greens) == 8 and (greens - torch.tensor([0.0, 250.0, 0.0])).abs().max() < 12
        greys = images.float().mean((2, 3))[labels == 999]
        assert (greys.max(1).values - greys.min(1).values < 3).sum() == 1  # the grey one, as RGB


def test_a_truncated_picture_is_named_where_it_lies(tmp_path: Path, capsys) -> None:
    source = tree(tmp_path / "in")
    bad = [source / "train/n02123045/n02123045_1.JPEG", source / "val/n15075141/n15075141_0.JPEG"]
    for path in bad:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    argv = ["data", "prepare", "imagenet", f"--source={source}", f"--out={tmp_path / 'out'}"]
    assert str(bad[0]) in fails(argv, capsys)
    assert not (tmp_path / "out").exists()
    line = fails([*argv, "--on_error=list"], capsys)
    assert str(bad[0]) in line and str(bad[1]) in line and "out.unreadable.txt" in line
    assert len((tmp_path / "out.unreadable.txt").read_text().splitlines()) == 2 and not (tmp_path / "out").exists()


def test_hopeless_sources_are_refused_before_any_work(tmp_path: Path, capsys) -> None:
    def refused(source: Path) -> str:
        return fails(["data", "prepare", "imagenet", f"--source={source}", f"--out={tmp_path / 'out'}"], capsys)

    assert "source: required" in fails(["data", "prepare", "imagenet", "--out=x"], capsys)
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path / "empty")
    assert "train/ and val/" in line and "ILSVRC2012_img_train.tar" in line and "train-*.parquet" in line
    source = tree(tmp_path / "in")
    (source / "train" / "cats").mkdir()
    assert "folder train/cats is no class of ImageNet-1K" in refused(source)
    (source / "train" / "cats").rmdir()
    for path in sorted((source / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.rename(source / "val" / path.name)
    assert "val/ holds 6 loose images and no class folders" in refused(source)
    assert not (tmp_path / "out").exists()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def official(folder: Path, monkeypatch) -> Path:
    """The three archives, small, and torchvision told their checksums."""
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in WNIDS[::-1]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(3):
                    add(archive, f"{wnid}_{number}.JPEG", picture(wnid))
            add(outer, f"{wnid}.tar", inner.getvalue())
    order = [WNIDS[1], WNIDS[2], WNIDS[0], WNIDS[1]]
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in (2, 0, 3, 1):  # not in order inside the archive
            add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", picture(order[number]))
    synsets = np.zeros(4, [("ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("children", "O")])
    for row, wnid in enumerate((*WNIDS, "n00001740")):
        synsets[row] = (row + 1, wnid, f"{wnid}, words", "gloss", 0 if wnid in WNIDS else 3)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets})
    truth = "".join(f"{WNIDS.index(wnid) + 1}\n" for wnid in order)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    told = {
        kind: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for kind, (name, _) in torchvision_imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(torchvision_imagenet, "ARCHIVE_META", told)
    return folder


def test_the_official_archives(tmp_path: Path, monkeypatch, capsys) -> None:
    source = official(tmp_path / "in", monkeypatch)
    done = prepare_imagenet(str(source), str(tmp_path / "out"), num_workers=2)
    assert (done.classes, done.train, done.val) == (1000, 9, 4)
    check_labels(tmp_path / "out")
    assert sorted(path.name for path in source.iterdir()) == sorted(
        v[0] for v in torchvision_imagenet.ARCHIVE_META.values()
    )
    with (source / "ILSVRC2012_img_val.tar").open("ab") as file:
        file.write(b"more")
    argv = ["data", "prepare", "imagenet", f"--source={source}", f"--out={tmp_path / 'again'}"]
    assert "ILSVRC2012_img_val.tar: not the official archive" in fails(argv, capsys)
    assert not (tmp_path / "again").exists()


def shards(folder: Path, **change) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 3), ("test", 2)):
        for shard in range(2):
            order = [WNIDS[i % 3] for i in range(count)]
            rows = {
                "image": [{"bytes": picture(w), "path": f"{w}_{i}_{shard}.JPEG"} for i, w in enumerate(order)],
                "label": [LABELS[w] if split != "test" else -1 for w in order],
            }
            if split == "train" and shard == 1:
                rows |= {key: value(rows[key]) for key, value in change.items()}
            parquet.write_table(pyarrow.table(rows), folder / "data" / f"{split}-{shard:05d}-of-00002.parquet")
    return folder


def test_parquet_shards(tmp_path: Path) -> None:
    done = prepare_imagenet(str(shards(tmp_path / "in")), str(tmp_path / "out"), num_workers=2)
    assert (done.classes, done.train, done.val) == (1000, 12, 6)
    check_labels(tmp_path / "out")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["train"]["labels"][281] == 4
    nameless = shards(tmp_path / "nameless", image=lambda rows: [{**row, "path": None} for row in rows])
    assert prepare_imagenet(str(nameless), str(tmp_path / "out2"), num_workers=2).train == 12
    check_labels(tmp_path / "out2")
    names = ("00000000.JPEG", None, "x", ".x.JPEG", "y.JPEG", "y.JPEG")
    mixed = shards(tmp_path / "mixed", image=lambda rows: [{**r, "path": n} for r, n in zip(rows, names, strict=True)],
                   label=lambda rows: [0] * 6)  # fmt: skip
    assert prepare_imagenet(str(mixed), str(tmp_path / "out3"), num_workers=2).train == 12


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("label", lambda rows: [1000, *rows[1:]], "row 0: label 1000 where 0 to 999 are known"),
        ("label", lambda rows: [-1, *rows[1:]], "row 0: label -1 where"),
        ("label", lambda rows: [7, *rows[1:]], "row 0: label 7 is n01514668, but the picture is called n01440764_0_1"),
        (
            "image",
            lambda rows: [{**rows[0], "path": "ILSVRC2012_val_1_n02123045.JPEG"}, *rows[1:]],
            "row 0: label 0 is",
        ),
        ("image", lambda rows: [{"bytes": None, "path": "x.JPEG"}, *rows[1:]], "row 0: no bytes"),
        ("image", lambda rows: ["x.JPEG" for _ in rows], "row 0 cannot be read"),
    ],
)
def test_odd_shards_are_refused_by_row(tmp_path: Path, name, change, found) -> None:
    source = shards(tmp_path / "in", **{name: change})
    with pytest.raises(ValueError, match=found) as error:
        prepare_imagenet(str(source), str(tmp_path / "out"))
    assert "train-00001-of-00002.parquet" in str(error.value) and not (tmp_path / "out").exists()


def test_a_cut_off_shard_is_named(tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    path = source / "data" / "validation-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="validation-00001.*cannot be read"):
        prepare_imagenet(str(source), str(tmp_path / "out"))
