"""check_beton and verify: each way a file can be damaged gives one error that names it and the way out."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import module, requires_ffcv

from vmoe_momentum.datasets import FFCVDataModule, verify
from vmoe_momentum.datasets.beton import FIELD, HEADER, RECORD, check_beton

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
    with pytest.raises(ValueError, match=r"val: count differs"):
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
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"train\.beton.*image {index} does not decode"):
        verify(str(copy))
