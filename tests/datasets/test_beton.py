"""check_beton and verify: each way a file can be damaged gives one error that names it and the way out."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import module, requires_ffcv

from vmoe_momentum.datasets import FFCVDataModule
from vmoe_momentum.datasets.beton import FIELD, HEADER, RECORD, check_beton
from vmoe_momentum.datasets.layout import own_digest
from vmoe_momentum.datasets.verify import verify

pytestmark = requires_ffcv
RECORDS_AT = HEADER.itemsize + 2 * FIELD.itemsize


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def truncate(share: float):
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def label(value: int):
    return lambda path: patch(path, RECORDS_AT + RECORD.fields["label"][1], struct.pack("<q", value))


def drop_a_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: 1 << 20] + content[1 << 21 :])


DAMAGE = {
    "truncated to 99 %": (truncate(0.99), "does not fit"),
    "truncated to 50 %": (truncate(0.5), "does not fit"),
    "truncated to the header": (truncate(0.0001), "too few"),
    "one byte missing": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not fit"),
    "writer killed: no allocation table": (lambda path: patch(path, 16, bytes(8)), "allocation table at byte 0"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(50_000)), "format version"),
    "no images": (lambda path: patch(path, 8, bytes(8)), "no images"),
    "label too large": (label(10), "labels from 0 to 10 for the 10 classes"),
    "label negative": (label(-1), "labels from -1"),
    "pages cut out": (drop_a_page, "does not fit"),
    "pointer outside": (lambda path: patch(path, -1 + path.stat().st_size - 24 + 9, b"\xff" * 8), "outside"),
    "pointers disagree": (lambda path: patch(path, RECORDS_AT + 5, struct.pack("<Q", (1 << 23) + 768)), "disagree"),
    "raw image of another size": (lambda path: patch(path, RECORDS_AT + 1, struct.pack("<H", 17)), "image 0 has"),
    "other fields": (lambda path: patch(path, HEADER.itemsize, b"\x04"), "RGBImageField, IntField"),
}


@pytest.fixture
def copy(digits, tmp_path) -> Path:
    """A private copy of the digits to damage."""
    return Path(shutil.copytree(digits, tmp_path / "copy"))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_beton_is_refused_by_name(digits, tmp_path, name):
    damage, found = DAMAGE[name]
    path = tmp_path / "val.beton"
    shutil.copy(digits / "val.beton", path)
    assert len(check_beton(path, 10).records) == 360
    damage(path)
    with pytest.raises(ValueError, match=found) as error:
        check_beton(path, 10)
    assert str(path) in str(error.value) and "prepare it again with `vmoe-momentum data prepare" in str(error.value)


def test_setup_refuses_a_damaged_missing_or_resized_beton(copy):
    with open(copy / "train.beton", "ab") as file:
        file.write(bytes(24))
    with pytest.raises(ValueError, match="where manifest.json says"):
        module(FFCVDataModule, copy)
    module(FFCVDataModule, copy, "validate")  # which does not read train.beton
    (copy / "val.beton").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*val\.beton"):
        module(FFCVDataModule, copy, "test")


def zero_a_jpeg(root: Path) -> None:
    beton = check_beton(root / "train.beton", 3)
    index = int(np.flatnonzero(beton.records["image"]["mode"] == 0)[0])
    patch(beton.path, int(beton.records["image"]["data_ptr"][index]), bytes(int(beton.sizes[index])))


def zero_pages(root: Path) -> None:
    start = int(check_beton(root / "train.beton", 3).records["image"]["data_ptr"].min())
    patch(root / "train.beton", start, bytes(1 << 12))


def edit(name: str, change):
    def damage(root: Path) -> None:
        content = change(json.loads((root / name).read_text()))
        if "sha256" in content:  # made so, not damaged
            content["sha256"] = own_digest(content)
        (root / name).write_text(json.dumps(content))

    return damage


def of_another(manifest: dict) -> dict:
    """What a manifest copied from another dataset of the same size would say."""
    labels = manifest["splits"]["train"]["labels"]
    manifest["splits"]["train"]["labels"] = [labels[-1] + 1, *labels[1:-1], labels[0] - 1]
    return manifest


def one_class_more(content: dict) -> dict:
    return {"classes": [*content["classes"], {"id": "x", "name": "x"}]}


def another_sum(manifest: dict) -> dict:
    manifest["splits"]["train"]["beton"]["sha256"] = "0" * 64
    return manifest


# What no look at a beton's structure finds: its manifest, or the checksum in it, must.
ROOT_DAMAGE = {
    "JPEG zeroed": (zero_a_jpeg, r"train\.beton: its contents differ"),
    "pages zeroed": (zero_pages, r"train\.beton: its contents differ"),
    "manifest edited": (
        lambda root: (root / "manifest.json").write_text(
            (root / "manifest.json").read_text().replace('"upright": false', '"upright": true')
        ),
        r"manifest\.json: not a manifest of data prepare, or an edited one",
    ),
    "missing": (lambda root: (root / "train.beton").unlink(), r"train\.beton"),
    "fewer classes": (edit("classes.json", lambda c: {"classes": c["classes"][:-1]}), "classes"),
    "more classes": (
        edit("classes.json", lambda c: {"classes": [*c["classes"], {"id": "x", "name": "x"}]}),
        "differ|of another",
    ),
    "wrong manifest": (edit("manifest.json", of_another), r"manifest\.json"),
    "checksum of another": (edit("manifest.json", another_sum), r"train\.beton: its contents differ"),
    "no manifest": (edit("manifest.json", lambda _: {"splits": {}}), r"manifest\.json: not a manifest"),
}
WHOLE_FILE = {f"beton {name}": name for name in DAMAGE if name not in ("label too large",)}


@pytest.mark.parametrize("name", [*ROOT_DAMAGE, *WHOLE_FILE])
def test_damage_is_refused_by_verify_and_by_fit_before_the_first_step(pictures, tmp_path, name):
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    module(FFCVDataModule, root)  # sound, and known to be: the check below is not the first
    if name in ROOT_DAMAGE:
        damage, found = ROOT_DAMAGE[name]
        damage(root)
    else:
        DAMAGE[WHOLE_FILE[name]][0](root / "train.beton")
        found = r"train\.beton"
    for refuse in (lambda: verify(str(root)), lambda: module(FFCVDataModule, root)):
        with pytest.raises((ValueError, FileNotFoundError), match=found) as error:
            refuse()
        assert "\n" not in str(error.value)


def test_betons_are_read_whole_once_for_each_copy_of_them(pictures, tmp_path, monkeypatch):
    """As make does: by size and time, and by what the manifest says now."""
    from vmoe_momentum.datasets import manifest

    read = []
    digest = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path.name) or digest(path))
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))  # copytree keeps times, as rsync -a does
    module(FFCVDataModule, root)
    assert read == []
    (root / "train.beton").touch()
    module(FFCVDataModule, root)
    module(FFCVDataModule, root)
    assert read == ["train.beton"]
    (root / "verified.json").write_text("{")
    module(FFCVDataModule, root)
    assert read == ["train.beton", "train.beton", "val.beton"]


def test_betons_of_unknown_origin_are_decoded_in_part(pictures, tmp_path):
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    (root / "manifest.json").unlink()
    module(FFCVDataModule, root)
    zero_a_jpeg(root)
    with pytest.raises(ValueError, match=r"train\.beton.*does not decode"):
        module(FFCVDataModule, root)


def test_verify_counts_what_is_sound(digits, pictures):
    report = verify(str(digits))
    assert (report.classes, report.train, report.val, report.betons) == (10, 1437, 360, 2)
    assert report.decoded == 2 * 1797
    assert verify(str(pictures), sample=3).decoded == 12


def test_verify_catches_one_flipped_bit_of_a_beton(copy):
    path = copy / "train.beton"
    offset = path.stat().st_size // 2
    byte = path.read_bytes()[offset]
    patch(path, offset, bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"train\.beton.*sha256"):
        verify(str(copy))


def test_verify_catches_changed_and_missing_files(copy, pictures, tmp_path):
    victim = sorted((copy / "val" / "3").iterdir())[0]
    victim.unlink()
    with pytest.raises(ValueError, match=r"val/3: 36 images in class '3', where manifest.json says 37"):
        verify(str(copy))
    other = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    victim = sorted((other / "val" / "bee").iterdir())[0]
    patch(victim, 0, bytes(victim.stat().st_size))  # same name and size, no longer a picture
    with pytest.raises(ValueError, match=str(victim)):
        verify(str(other))
    (other / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        verify(str(other))


def test_verify_decodes_the_jpegs_inside_a_beton(pictures, tmp_path):
    copy = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    beton = check_beton(copy / "train.beton", 3)
    index = int(np.flatnonzero(beton.records["image"]["mode"] == 0)[0])
    patch(beton.path, int(beton.records["image"]["data_ptr"][index]), bytes(int(beton.sizes[index])))
    manifest = json.loads((copy / "manifest.json").read_text())
    from vmoe_momentum.datasets.manifest import sha256

    manifest["splits"]["train"]["beton"]["sha256"] = sha256(beton.path)  # damaged before it was sealed
    manifest["sha256"] = own_digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"train\.beton.*image {index} does not decode"):
        verify(str(copy))
