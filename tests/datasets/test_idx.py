"""IDX files: pixels and labels as they are, whatever the names; and every broken file in one clear line."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import HAS_FFCV, module
from idx_files import COUNTS, drawn, packed, write_set

from vmoe_momentum.datasets import FolderDataModule, idx, prepare_idx
from vmoe_momentum.datasets.commands import run
from vmoe_momentum.datasets.verify import verify

LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.fixture
def source(tmp_path) -> Path:
    return write_set(tmp_path / "source")


def test_every_pixel_and_label_comes_back(source, backend):
    done = prepare_idx(str(source.parent / "out"), str(source), num_workers=2)
    assert (done.classes, done.train, done.val, done.betons) == (3, 12, 6, HAS_FFCV)
    verify(str(done.root))
    data = module(backend, done.root, "validate", image_size=5, eval_batch_size=6, eval_crop_ratio=1.0)
    images, labels = next(iter(data.val_dataloader()))
    pixels, given = drawn("t10k")
    order = np.argsort(given, kind="stable")
    assert labels.tolist() == given[order].tolist()
    assert np.array_equal(images.numpy(), np.repeat(pixels[order][:, None, :, 1:6], 3, axis=1))  # the middle square
    assert data.class_names == ["0", "1", "2"]


def test_names_of_files_may_vary(source, tmp_path):
    emnist = write_set(tmp_path / "emnist", prefix="emnist-letters-", val="test")
    dotted = write_set(tmp_path / "dotted", dot=True)
    digests = set()
    for name, folder in (("a", source), ("b", emnist), ("c", dotted)):
        root = prepare_idx(str(tmp_path / name), str(folder), num_workers=1).root
        digests.add(hashlib.sha256((root / "checksums.sha256").read_bytes()).hexdigest())
    assert len(digests) == 1
    write_set(emnist, prefix="emnist-digits-", val="test")
    with pytest.raises(ValueError, match=r"several sets.*--prefix \(emnist-digits-, emnist-letters-\)"):
        prepare_idx(str(tmp_path / "d"), str(emnist))
    with pytest.raises(FileNotFoundError, match="--prefix=emnist: no IDX file in .* is called so; there are emnist-"):
        prepare_idx(str(tmp_path / "d"), str(emnist), prefix="emnist")
    turned = prepare_idx(str(tmp_path / "d"), str(emnist), prefix="emnist-digits-", transpose=True, num_workers=1)
    data = module(FolderDataModule, turned.root, "validate", image_size=5, eval_crop_ratio=1.0, num_workers=0)
    pixels = next(iter(data.val_dataloader()))[0]
    assert np.array_equal(pixels[0, 0].numpy(), drawn("t10k")[0][0].T[1:6])


def test_classes_get_names(source, tmp_path, monkeypatch):
    def names(out: str, **settings) -> list[str]:
        root = prepare_idx(str(tmp_path / out), str(source), num_workers=1, **settings).root
        return [entry["name"] for entry in json.loads((root / "classes.json").read_text())["classes"]]

    told = tmp_path / "names.txt"
    told.write_text("ant\nbee\n\ncat, small\n")
    assert names("a", names=str(told)) == ["ant", "bee", "cat, small"]
    assert names("b") == ["0", "1", "2"]
    for text, message in (("ant\nbee\n", "2 names for 3 classes"), ("ant\nbee\nant\n", "'ant' stands there twice")):
        told.write_text(text)
        with pytest.raises(ValueError, match=f"--names=.*{message}"):
            names("c", names=str(told))
    told.write_bytes(b"\xff\n")
    for path, message in ((told, "it is not UTF-8"), (tmp_path / "none", "No such file")):
        with pytest.raises(ValueError, match=f"--names=.*cannot be read .{message}.*; give fashion, or a text file"):
            names("c", names=str(path))
    with pytest.raises(ValueError, match="--names=fashion: 10 names for 3 classes"):
        names("c", names="fashion")
    # recognised by its labels alone: of both splits
    monkeypatch.setattr(idx, "FASHION", ("x", "y", "z"))
    known = {own: hashlib.sha256(drawn(split)[1]).hexdigest() for own, split in (("train", "train"), ("val", "t10k"))}
    monkeypatch.setattr(idx, "_FASHION_LABELS", known)
    assert names("d") == ["x", "y", "z"]
    monkeypatch.setattr(idx, "_FASHION_LABELS", {**known, "val": known["train"]})
    assert names("e") == ["0", "1", "2"]


def test_folders_sort_as_labels_do():
    names = [idx.folder_of(label, 46) for label in range(47)]
    assert names == sorted(names) and names[3] == "03" and idx.folder_of(3, 9) == "3"


def plain(content: bytes) -> bytes:
    return gzip.decompress(content)


def header(content: bytes, *sizes: int) -> bytes:
    """With other sizes written in it."""
    return plain(content)[:4] + struct.pack(f">{len(sizes)}I", *sizes) + plain(content)[4 + 4 * len(sizes) :]


BROKEN = {  # file, what becomes of its content, message
    "empty": (IMAGES, lambda c: b"", "not an IDX file (it begins with nothing)"),
    "magic": (IMAGES, lambda c: b"\x89PNG" + plain(c), "not an IDX file (it begins with 89504e47)"),
    "little endian": (LABELS, lambda c: b"\1\x08\0\0" + plain(c)[4:], "not an IDX file"),
    "floats": (IMAGES, lambda c: b"\0\0\x0d\3" + plain(c)[4:], "an IDX file of floats; only unsigned bytes"),
    "unknown type": (LABELS, lambda c: b"\0\0\x77\1" + plain(c)[4:], "an unknown type, 119"),
    "no dimensions": (IMAGES, lambda c: b"\0\0\x08\0", "0 dimensions, where pictures have 3"),
    "other dimensions": (IMAGES, lambda c: packed(np.zeros((12, 35), np.uint8)), "2 dimensions, where pictures"),
    "labels of pictures": (LABELS, lambda c: packed(drawn("train")[0]), "3 dimensions, where labels have 1"),
    "short header": (IMAGES, lambda c: plain(c)[:9], "cut short in its header"),
    "short": (IMAGES, lambda c: plain(c)[:-1], "its header says 420 bytes (12 x 5 x 7), and only 419 follow"),
    "short labels": (LABELS, lambda c: plain(c)[:-2], "its header says 12 bytes (12), and only 10 follow"),
    "long": (IMAGES, lambda c: plain(c) + b"x", "its header says 420 bytes (12 x 5 x 7), and more follow"),
    "long zipped": (LABELS, lambda c: gzip.compress(plain(c) + b"x"), "and more follow"),
    "truncated gzip": (IMAGES, lambda c: c[:-20], "damaged or cut short (Compressed file ended"),
    "gzip without end": (IMAGES, lambda c: c[:-3], "damaged or cut short"),
    "gzip of nothing": (LABELS, lambda c: c[:5], "damaged or cut short"),
    "wrong checksum": (LABELS, lambda c: c[:-8] + b"abcd" + c[-4:], "damaged or cut short (CRC check failed"),
    "damaged gzip": (IMAGES, lambda c: c[:60] + b"\xff" * 90 + c[150:], "damaged or cut short"),
    "rubbish behind gzip": (LABELS, lambda c: c + b"rubbish", "damaged or cut short"),
    "fewer labels": (LABELS, lambda c: packed(drawn("train")[1][:9]), "12 pictures, where train-labels"),
    "no pictures": (IMAGES, lambda c: packed(np.zeros((0, 5, 7), np.uint8)), "0 pictures, where train-labels"),
    "more than memory": (IMAGES, lambda c: header(c, 12, 16384, 16384), "and only 420 follow"),
    "sides of nothing": (IMAGES, lambda c: packed(np.zeros((12, 0, 7), np.uint8)), "12 pictures of 0 x 7 px"),
    "sides past all": (IMAGES, lambda c: header(c, 12, 2**32 - 1, 7), "12 pictures of 4294967295 x 7 px"),
    "labels past all": (LABELS, lambda c: header(c, 2**32 - 1), "4294967295 bytes (4294967295), and only 12"),
    "other size": (IMAGES, lambda c: packed(np.zeros((12, 7, 5), np.uint8)), "pictures of 5 x 7 px, where train"),
    "a class less": (LABELS, lambda c: packed(drawn("train")[1] % 2), "no picture has label 2, which t10k-labels"),
    "a class more": (LABELS, lambda c: packed(np.arange(12, dtype=np.uint8) % 4), "no picture has label 3, which tr"),
}


@pytest.mark.parametrize(("name", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_ends_in_one_line_that_names_it(source, name, change, message):
    path = source / f"{name}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        prepare_idx(str(source.parent / "out"), str(source))
    told = str(error.value)
    assert message in told and str(source) in told and "\n" not in told and len(told) < 500
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_both_splits_empty_or_of_one_class(source, tmp_path):
    for values, message in ((np.zeros(0), "0 pictures of 5 x 7 px; at least one"), (np.zeros(6), "one class, '0'")):
        for split in COUNTS:
            (source / f"{split}-labels-idx1-ubyte").write_bytes(packed(values.astype(np.uint8)))
            (source / f"{split}-images-idx3-ubyte").write_bytes(packed(np.zeros((len(values), 5, 7), np.uint8)))
            for name in ("labels-idx1", "images-idx3"):
                (source / f"{split}-{name}-ubyte.gz").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=message):
            prepare_idx(str(tmp_path / "out"), str(source))


def test_files_that_are_missing_twice_or_none(source, tmp_path):
    out = str(tmp_path / "out")
    (source / LABELS).write_bytes(plain((source / f"{LABELS}.gz").read_bytes()))
    with pytest.raises(ValueError, match=f"{LABELS} and {LABELS}.gz are for the same place; remove all but one"):
        prepare_idx(out, str(source))
    for name in (LABELS, f"{LABELS}.gz"):
        (source / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {LABELS}\[.gz\] beside the others; add it"):
        prepare_idx(out, str(source))
    (source / LABELS).mkdir()
    with pytest.raises(ValueError, match=f"{LABELS}: cannot be read .Is a directory.*; copy it again"):
        prepare_idx(out, str(source))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no IDX files, but notes\.txt; needed are train-images-idx3-ubyte,"):
        prepare_idx(out, str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_without_debians_package_the_command_says_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "DEBIAN", str(tmp_path / "fashion-mnist"))
    with pytest.raises(FileNotFoundError, match=r"no such folder; install .*apt install dataset-fashion-mnist\), or"):
        prepare_idx(str(tmp_path / "out"), idx.DEBIAN)
    with pytest.raises(FileNotFoundError, match="--source=nowhere: no such folder; look for it, or name one"):
        prepare_idx(str(tmp_path / "out"), "nowhere")


def test_the_command_line_prepares_once(source, capsys):
    out = source.parent / "out"
    words = ["prepare", "idx", "--source", str(source), "--out", str(out), "--num_workers", "1"]
    run(words)
    assert f"{out}: 3 classes, 12 training and 6 validation images" in capsys.readouterr().out
    stamp = (out / "manifest.json").stat().st_mtime_ns
    run([*words, "--exist_ok"])
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="it exists"):
        run(words)
    with pytest.raises(ValueError, match="not with .*'transpose': True"):
        run([*words, "--exist_ok", "--transpose=true"])
    with pytest.raises(ValueError, match="overlaps --source"):
        prepare_idx(str(source / "out"), str(source))
    with pytest.raises(SystemExit):
        run(["prepare", "idx", "--help"])
    assert re.search(r"dataset-fashion-mnist", capsys.readouterr().out)


@pytest.mark.skipif(not Path(idx.DEBIAN).is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_known_by_its_labels():
    paths = idx.find_idx(Path(idx.DEBIAN), None)
    splits = {split: idx.read_split(**paths[split]) for split in paths}
    assert [pictures.images.shape for pictures in splits.values()] == [(60000, 28, 28), (10000, 28, 28)]
    classes = idx._classes("x", splits, None)
    assert [(entry.id, entry.name) for entry in classes][::9] == [("0", "T-shirt/top"), ("9", "Ankle boot")]
