"""The photographs: shapes, classes, the same every time."""

from pathlib import Path

import pytest
from PIL import Image

from vmoe_momentum.datasets import photos
from vmoe_momentum.datasets.verify import verify

pytest.importorskip("skimage")


def test_photos_are_large_jpegs_of_ten_classes(tmp_path: Path) -> None:
    done = photos.prepare_photos(str(tmp_path / "a"), per_class=5, num_workers=2)
    assert (done.classes, done.train, done.val) == (10, 40, 10)
    assert verify(str(tmp_path / "a")).decoded > 0
    sizes, colours = [], 0
    for path in sorted((tmp_path / "a").glob("*/*/*.jpg")):
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.mode == "RGB"
            sizes.append(max(picture.size))
            red, green, blue = (channel.tobytes() for channel in picture.split())
            colours += not (red == green == blue)
    assert len(sizes) == 50 and min(sizes) >= 400 and max(sizes) <= 640 and len(set(sizes)) > 20
    assert colours == 50
    again = photos.prepare_photos(str(tmp_path / "b"), per_class=5, num_workers=2)
    for path in sorted((again.root / "train").rglob("*.jpg")):
        assert path.read_bytes() == (tmp_path / "a" / path.relative_to(again.root)).read_bytes()


def test_mistakes(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="--per_class=2: use a whole number from 5"):
        photos.prepare_photos(str(tmp_path / "a"), per_class=2)
    monkeypatch.setitem(photos.PICTURES, "cat", ("skimage.data", "no_such.png"))
    with pytest.raises(ValueError, match=r"no_such.png is missing; pip install 'vmoe_momentum\[photos\]'"):
        photos.prepare_photos(str(tmp_path / "a"), per_class=5)
    assert not (tmp_path / "a").exists()
