"""The two decoders of JPEGs: where they may differ, where not, and crops drawn as torchvision draws them."""

from __future__ import annotations

import os
import random
import shutil

import numpy as np
import pytest
import torch
from dataset_helpers import module
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from vmoe_momentum.datasets import FolderDataModule, jpegs
from vmoe_momentum.datasets.folder_loader import EvalTransform, TrainTransform, _Images, random_crop
from vmoe_momentum.datasets.layout import ImageFile
from vmoe_momentum.pictures import UnreadablePicture, is_turned, read_picture

TRANSFORMS = {
    "training": TrainTransform(48, (0.08, 1.0), (3 / 4, 4 / 3), 0.5),
    "evaluation": EvalTransform(48, 0.9),
}


def smooth(mode: str = "RGB") -> Image.Image:
    down, across = np.mgrid[0:90, 0:120]
    colours = np.stack([2 * down, 2 * across, 255 - down - across], axis=-1)
    return Image.fromarray(colours.astype(np.uint8)).convert(mode)


def shown(path, decoder: str, transform, upright: bool = False) -> np.ndarray:
    pictures = _Images([ImageFile(path, 0)], transform, 0, 0, upright, decoder)
    return np.stack([pictures[draw][0] for draw in range(8)]).astype(int)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("subsampling", [0, 2])
def test_torchvision_shows_a_colour_jpeg_within_a_few_levels_of_pillow(tmp_path, transform, subsampling):
    path = tmp_path / "x.jpg"
    smooth().save(path, subsampling=subsampling)
    assert isinstance(jpegs.read_fast(path), torch.Tensor)
    difference = np.abs(shown(path, "torchvision", transform) - shown(path, "pillow", transform))
    assert difference.max() <= 4 and difference.mean() < 1


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name, mode", [("x.png", "RGB"), ("x.webp", "RGB"), ("x.jpg", "L"), ("x.jpg", "CMYK")])
def test_all_else_is_pillows_to_the_bit(tmp_path, transform, name, mode):
    smooth(mode).save(tmp_path / name)
    assert np.array_equal(*(shown(tmp_path / name, decoder, transform) for decoder in ("torchvision", "pillow")))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_is_turned_as_by_pillow(tmp_path, orientation):
    path, exif = tmp_path / "x.jpg", Image.Exif()
    exif[0x0112] = orientation
    smooth().save(path, exif=exif)
    assert is_turned(path.read_bytes()) == (orientation != 1)
    for upright in (False, True):
        fast = jpegs.read_fast(path, upright)
        assert isinstance(fast, Image.Image) == (upright and orientation != 1)
        pixels = np.asarray(fast) if isinstance(fast, Image.Image) else fast.permute(1, 2, 0).numpy()
        wanted = np.asarray(read_picture(path, upright))
        assert pixels.shape == wanted.shape and np.abs(pixels.astype(int) - wanted).max() <= 4


@pytest.mark.parametrize("keep", [0, 3, 100, 700, -2])
def test_a_damaged_jpeg_is_refused_in_the_same_words(tmp_path, keep):
    path = tmp_path / "x.jpg"
    smooth().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    said = []
    for read in (read_picture, jpegs.read_fast):
        with pytest.raises(UnreadablePicture, match=rf"{path}: not a readable image") as error:
            read(path)
        said.append(str(error.value))
    assert "\n" not in said[0] and said[1].startswith(said[0].partition(" (")[0])
    with pytest.raises(ValueError, match=rf"{path}: not a readable image.*data verify"):
        shown(path, "torchvision", TRANSFORMS["evaluation"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_setting_reaches_both_splits_and_randaugment(pictures, tmp_path, monkeypatch, num_workers):
    root, read = tmp_path / "pictures", []
    shutil.copytree(pictures, root)
    for path in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
        smooth().save(path, "JPEG")
    (root / "manifest.json").unlink(missing_ok=True)
    original = jpegs._decode
    monkeypatch.setattr(jpegs, "_decode", lambda content: read.append(os.getpid()) or original(content))
    found = {}
    for decoder in ("pillow", "torchvision"):
        settings = {"batch_size": 4, "num_workers": num_workers, "randaugment": "rand-m5-n1", "decoder": decoder}
        data = module(FolderDataModule, root, **settings)
        read.clear()
        found[decoder] = [next(iter(loader))[0] for loader in (data.train_dataloader(), data.val_dataloader())]
        assert bool(read) == (decoder == "torchvision" and num_workers == 0)
    for one, other in zip(*found.values(), strict=True):
        assert (one.float() - other.float()).abs().mean() < 2
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_a_decoder_that_is_not_there_is_refused(digits, monkeypatch):
    def missing(content):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    with pytest.raises(ValueError, match=r"data\.decoder=turbo.*use pillow or torchvision"):
        FolderDataModule(str(digits), decoder="turbo")
    monkeypatch.setattr(jpegs, "_decode", missing)
    jpegs.require_torchvision_decoder.cache_clear()
    with pytest.raises(ValueError, match=r"data\.decoder=torchvision: .*without libjpeg; use pillow"):
        FolderDataModule(str(digits), decoder="torchvision")
    FolderDataModule(str(digits), decoder="pillow")


@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.5), (1.0, 1.0)), ((0.9, 1), (3, 9))])
@pytest.mark.parametrize("size", [(500, 375), (37, 500), (400, 3), (1, 1), (224, 224)])
def test_crops_are_torchvisions_draw_for_draw(scale, ratio, size):
    for seed in range(50):
        found = []
        for draw in (
            lambda: random_crop(*size, scale, ratio),
            lambda: RandomResizedCrop.get_params(Image.new("L", size), list(scale), list(ratio)),
        ):
            torch.manual_seed(seed)
            found.append((draw(), torch.rand(1).item()))
        assert found[0] == found[1]


def test_python_and_numpy_are_left_alone_or_seeded_as_the_transform_needs(tmp_path):
    smooth().save(tmp_path / "x.png")

    def noisy(image: Image.Image) -> Image.Image:
        return Image.fromarray(np.full((2, 2, 3), random.randrange(256) // 2 + np.random.randint(128), np.uint8))  # noqa: NPY002

    with_policy = TRANSFORMS["training"]._replace(policy=noisy)
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again = (shown(tmp_path / "x.png", "pillow", with_policy) for _ in range(2))
    shown(tmp_path / "x.png", "pillow", TRANSFORMS["training"])
    assert np.array_equal(first, again) and len(set(first[:, 0, 0, 0].tolist())) > 4
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
