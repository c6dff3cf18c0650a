"""One rule of pictures: what is one, how folders are listed, and which pixels every reader makes of a file."""

from __future__ import annotations

import ast
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
from dataset_helpers import HAS_FFCV
from PIL import Image

from vmoe_momentum import pictures
from vmoe_momentum.datasets.beton_writer import _encode
from vmoe_momentum.datasets.folder_loader import _Images
from vmoe_momentum.datasets.layout import ClassEntry, ImageFile, list_images
from vmoe_momentum.datasets.reading import BadImages, check_images
from vmoe_momentum.export.serving import Served
from vmoe_momentum.pictures import SUFFIXES, find_pictures, read_picture
from vmoe_momentum.robustness import View, list_pictures
from vmoe_momentum.robustness.pictures import Pictures, batches

PACKAGE = Path(pictures.__file__).parent
SIDE = 64  # as large as the view, so that no reader resizes
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I;16",
    "I",
    "F",
)
OWN_PICTURES = {  # what opens images that are none of the user's
    "datasets/beton.py", "datasets/photos.py", "pictures.py", "robustness/corruptions/digital.py",
    "robustness/corruptions/weather.py",
}  # fmt: skip


def picture(mode: str) -> Image.Image:
    """A ramp over all values of the mode."""
    ramp = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE)
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((ramp * 257).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    colours = np.stack([ramp, ramp.T, 255 - ramp], axis=-1).astype(np.uint8)
    found = Image.fromarray(colours)
    for step in {"La": ("RGBA", "LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,)):
        if step == "LAB":
            return Image.frombytes("LAB", found.size, found.tobytes())
        found = found.convert(step)
    return found


def written(folder: Path) -> dict[str, Path]:
    """Every suffix with every mode that Pillow writes under it."""
    found = {}
    for suffix in sorted(SUFFIXES):
        for mode in MODES:
            path = folder / "val" / "0" / f"{mode.replace(';', '')}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".webp" and mode in ("I;16", "I", "F"):
                continue  # eight bits: Pillow cuts while it writes
            try:
                picture(mode).save(path)
            except (OSError, ValueError, KeyError):
                path.unlink(missing_ok=True)
                continue
            found[f"{suffix} {mode}"] = path
    return found


def readers(path: Path) -> dict[str, np.ndarray | str]:
    """What every reader of ours makes of a file: pixels [H, W, 3] or the reason why not."""
    view = View(SIDE, 1.0, "bilinear")
    metadata = {"image_size": SIDE, "crop_pct": 1.0, "interpolation": "bilinear"}

    def folder() -> np.ndarray:
        return _Images([ImageFile(path, 0)], lambda image: image, 0, 0, False)[0][0]

    def robustness() -> np.ndarray:
        batch = next(iter(batches(Pictures("data", [path], [0]), [view], 1, 0)))
        return batch.views[view][0].permute(1, 2, 0).numpy()

    def classify() -> np.ndarray:
        return Served(None, metadata, path.parent).pixels(path).permute(1, 2, 0).numpy()

    def beton() -> np.ndarray:
        from ffcv.fields import RGBImageField

        record, data, _ = _encode((path, RGBImageField(write_mode="raw", max_resolution=500), False))
        return data.reshape(int(record["height"][0]), int(record["width"][0]), 3)

    def preparing() -> np.ndarray:
        bad = BadImages("list")
        check_images([ImageFile(path, 0)], 1, bad)
        bad.finish()
        return np.asarray(read_picture(path))

    found = {}
    for read in (folder, robustness, classify, preparing, *((beton,) if HAS_FFCV else ())):
        try:
            found[read.__name__] = read()
        except ValueError as error:
            reason = str(error)
            assert str(path) in reason and "\n" not in reason
            found[read.__name__] = reason.partition(f"{path}: ")[2].partition(";")[0]
    return found


def test_every_reader_makes_the_same_of_every_suffix_and_mode(tmp_path):
    files = written(tmp_path)
    assert {name.split()[0] for name in files} == SUFFIXES and len(files) > 60
    refused = set()
    for name, path in files.items():
        first, *others = readers(path).values()
        for other in others:
            assert type(other) is type(first), (name, first, other)
            assert np.array_equal(first, other), name
        if isinstance(first, str):
            refused.add(name)
            continue
        assert first.dtype == np.uint8 and first.shape == (SIDE, SIDE, 3), name
        assert 40 < first.astype(float).mean() < 215 and first.std() > 15, f"{name} became white or black"
    older = {".tif YCbCr", ".tiff YCbCr"} if int(PIL.__version__.split(".")[0]) < 13 else set()
    assert refused == {".tif I", ".tif F", ".tiff I", ".tiff F", ".pgm F", ".ppm F"} | older


def test_listings_agree_on_every_suffix(tmp_path):
    written(tmp_path)
    inside = tmp_path / "val" / "0" / "deeper" / "still"
    inside.mkdir(parents=True)
    picture("RGB").save(inside / "x.JPG")
    own = [file.path for file in list_images(tmp_path / "val", [ClassEntry("0", "0")])]
    assert own == list_pictures(tmp_path, ["0"], 1, "--data").paths == find_pictures(tmp_path / "val" / "0").paths
    assert {path.suffix.lower() for path in own} == SUFFIXES and inside / "x.JPG" in own


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path, dtype):
    grey = np.linspace(0, 255, 256).reshape(16, 16)
    sixteen = (grey * 257).astype(dtype)
    for suffix in (".png", ".tif", ".pgm"):
        Image.fromarray(sixteen.astype("<u2") if suffix != ".tif" else sixteen).save(tmp_path / f"x{suffix}")
        found = np.asarray(read_picture(tmp_path / f"x{suffix}"))
        assert np.array_equal(found, np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)), suffix


@pytest.mark.parametrize("bits, photometric, wanted", [(12, 1, [0, 255]), (16, 1, [0, 255]), (16, 0, [255, 0])])
def test_bit_depth_and_white_are_as_the_file_says(tmp_path, bits, photometric, wanted):
    """A TIFF by hand: 2 x 1 pixels, no and all bits set."""
    pixels = bytes([0x00, 0x0F, 0xFF]) if bits == 12 else bytes([0, 0, 0xFF, 0xFF])
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1), (278, 1),
            (279, len(pixels))]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    (tmp_path / "x.tif").write_bytes((b"II*\0" + struct.pack("<I", 8) + directory).ljust(134, b"\0") + pixels)
    assert np.asarray(read_picture(tmp_path / "x.tif"))[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_orientation_is_ignored_by_all_and_followed_by_all_when_asked(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").crop((0, 0, 32, 64)).save(path, exif=exif)
    stored = np.asarray(Image.open(path).convert("RGB"))
    for upright, wanted in ((False, stored), (True, np.rot90(stored, -1))):
        view = View(32, 1.0, "bilinear", upright)
        assert np.array_equal(np.asarray(read_picture(path, upright)), wanted)
        assert np.array_equal(_Images([ImageFile(path, 0)], lambda image: image, 0, 0, upright)[0][0], wanted)
        batch = next(
            iter(batches(Pictures("data", [path], [0], whole=True), [view, view._replace(upright=True)], 1, 0))
        )
        shown = Image.fromarray(wanted).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(batch.views[view][0].permute(1, 2, 0).numpy().astype(int) - np.asarray(shown)).max() <= 1
        metadata = {"image_size": 32, "crop_pct": 1.0, "interpolation": "bilinear", "upright": upright}
        served = Served(None, metadata, path).pixels(path).permute(1, 2, 0).numpy()
        assert np.abs(served.astype(int) - np.asarray(shown)).max() <= 1


def test_what_is_left_out_is_counted_and_named_by_every_listing(tmp_path, caplog):
    folder = tmp_path / "val" / "0"
    folder.mkdir(parents=True)
    picture("RGB").save(folder / "a.png")
    for name in ("b.gif", "c.avif", "d.gif", ".e.png", "notes", "sub/f.heic", ".hidden/g.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "val" / "loose.png").write_bytes(b"")
    wanted = Counter({".gif": 2, ".avif": 1, ".heic": 1, "hidden": 2, "without suffix": 1, "links in a circle": 1})
    wanted["not a file"] = 1
    assert find_pictures(folder) == ([folder / "a.png"], wanted)
    for listing in (
        lambda: list_images(tmp_path / "val", [ClassEntry("0", "0")]),
        lambda: list_pictures(tmp_path, ["0"], 1, "--data"),
    ):
        caplog.clear()
        assert len(listing()) in (1, 2)
        for kind, count in (wanted + Counter({"outside class folders": 1})).items():
            assert f"{count} {kind}" in caplog.text
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for listing in (
        lambda: list_images(tmp_path / "val", [ClassEntry("0", "0")]),
        lambda: list_pictures(tmp_path, ["0"], 1, "--data"),
    ):
        with pytest.raises(ValueError, match=r"gone\.png leads to no file"):
            listing()


def test_folders_that_cannot_be_read_or_named_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "val" / "0"
    folder.mkdir(parents=True)
    listings = (
        lambda: list_images(tmp_path / "val", [ClassEntry("0", "0")]),
        lambda: list_pictures(tmp_path, ["0"], 1, "--data"),
    )
    scandir = os.scandir

    def denied(place):
        if Path(place) == folder:
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", denied)
        for listing in listings:
            with pytest.raises(ValueError, match="val/0: cannot be read"):
                listing()
    os.mkdir(os.fsencode(tmp_path / "val") + b"/caf\xe9")
    for listing in listings:
        with pytest.raises(ValueError, match=r"b'caf\\xe9' is not UTF-8; rename it"):
            listing()


def test_nobody_else_opens_pictures_or_lists_folders_by_suffix():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            opens = isinstance(node, ast.Attribute) and node.attr in ("open", "exif_transpose", "imread", "read_image")
            of_pil = opens and isinstance(node.value, ast.Name) and node.value.id in ("Image", "ImageOps", "cv2", "io")
            assert not of_pil or name in OWN_PICTURES, f"{name}:{node.lineno}"
            lists = isinstance(node, ast.Constant) and node.value in (".jpeg", ".webp")
            assert not lists or name == "pictures.py", f"{name}:{node.lineno}"
