"""What both backends yield: the contract, the order, the pixels."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
from dataset_helpers import module, requires_ffcv
from PIL import Image

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule
from vmoe_momentum.datasets.layout import list_images

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hflip": False, "eval_crop_ratio": 1.0}


def labels_of_epoch(loader, epoch: int) -> list[int]:
    loader.set_epoch(epoch)
    return torch.cat([labels for _, labels in loader]).tolist()


@lru_cache
def first_train_batch(cls, root, epoch: int = 0, **settings) -> torch.Tensor:
    loader = module(cls, root, batch_size=16, **settings).train_dataloader()
    loader.set_epoch(epoch)
    return next(iter(loader))[0]


def test_batches_keep_the_contract(backend, digits):
    data = module(backend, digits, image_size=24)
    for loader, count in ((data.train_dataloader(), 64 * (1437 // 64)), (data.val_dataloader(), 360)):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(labels) for _, labels in batches) == count
        for images, labels in batches:
            assert images.shape == (len(labels), 3, 24, 24) and images.dtype == torch.uint8
            assert images.stride() == (3 * 24 * 24, 1, 3 * 24, 3)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.shape == (len(images),) and labels.dtype == torch.int64
        assert set(torch.cat([labels for _, labels in batches]).tolist()) == set(range(10))


def test_the_last_batch_of_one_keeps_its_dimension(backend, digits):
    images, labels = list(module(backend, digits, "validate", eval_batch_size=359).val_dataloader())[-1]
    assert images.shape == (1, 3, 16, 16) and labels.shape == (1,)
    assert images.stride() == (768, 1, 48, 3)


def test_evaluation_yields_every_stored_image_once_in_order(backend, digits):
    data = module(backend, digits, "test", eval_batch_size=100, **WHOLE)
    files = list_images(digits / "val", data.classes)
    stored = torch.from_numpy(np.stack([np.array(Image.open(path)) for path, _ in files])).permute(0, 3, 1, 2)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert torch.equal(torch.cat([images for images, _ in batches]), stored)  # also: kept batches stay intact
        assert torch.cat([labels for _, labels in batches]).tolist() == [file.label for file in files]


@requires_ffcv
def test_both_backends_visit_the_same_images_in_epochs_0_1_2(digits):
    loaders = [module(cls, digits, **WHOLE).train_dataloader() for cls in (FFCVDataModule, FolderDataModule)]
    orders = [[labels_of_epoch(loader, epoch) for epoch in (0, 1, 2)] for loader in loaders]
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1] != orders[0][2]
    for loader in loaders:
        loader.set_epoch(1)
    (ffcv, _), (folder, _) = (next(iter(loader)) for loader in loaders)
    assert torch.equal(ffcv, folder)


@requires_ffcv
def test_jpeg_betons_show_the_same_pictures_as_the_files(pictures):
    ffcv, folder = (
        torch.cat([images for images, _ in module(cls, pictures, "test", image_size=24).val_dataloader()]).float()
        for cls in (FFCVDataModule, FolderDataModule)
    )
    # Different JPEG generations and resampling filters, the same picture: a mistaken crop or channel order is >> 10.
    assert (ffcv - folder).abs().mean() < 4


def test_training_pixels_depend_on_seed_epoch_and_image_alone(backend, pictures):
    reference = first_train_batch(backend, pictures, num_workers=2)
    assert torch.equal(first_train_batch(backend, pictures, num_workers=0), reference)
    assert not torch.equal(first_train_batch(backend, pictures, epoch=1), reference)


def test_global_random_state_is_left_alone(digits):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first_train_batch(FolderDataModule, digits, num_workers=0, randaugment="rand-m5-n1")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"hflip": False}, {"crop_scale": (0.9, 1.0)}, {"crop_ratio": (1.0, 1.0)}, {"image_size": 20}],
    ids=str,
)
def test_each_training_setting_changes_the_pixels(backend, pictures, change):
    assert not torch.equal(first_train_batch(backend, pictures, **change), first_train_batch(backend, pictures))


def test_randaugment_changes_the_pixels_and_eval_crop_ratio_the_evaluation(backend, pictures):
    wide, narrow = (
        next(iter(module(backend, pictures, "test", eval_crop_ratio=ratio).val_dataloader()))[0] for ratio in (1.0, 0.5)
    )
    assert not torch.equal(wide, narrow)
    plain = first_train_batch(FolderDataModule, pictures)
    assert not torch.equal(first_train_batch(FolderDataModule, pictures, randaugment="rand-m9-n2"), plain)


def test_half_of_the_images_are_flipped(backend, digits):
    plain, flipped = (
        torch.cat([batch for batch, _ in module(backend, digits, **WHOLE | {"hflip": flip}).train_dataloader()])
        for flip in (False, True)
    )
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    kept = (flipped == plain).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert 0.45 < mirrored.float().mean() < 0.55  # 1,408 draws: 3.75 standard deviations either side


@requires_ffcv
def test_crops_are_distributed_as_torchvisions(digits):
    from torchvision.transforms import RandomResizedCrop

    from vmoe_momentum.datasets.ffcv_decoder import _mix, _random_crop

    height, width, scale, ratio = 300, 400, (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([_random_crop(height, width, np.uint64(_mix(np.uint64(i))), *scale, *ratio) for i in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for column in range(4):
        spread = theirs[:, column].std() * (2 / 4000) ** 0.5
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 5 * spread
        assert abs(ours[:, column].std() / theirs[:, column].std() - 1) < 0.1


@requires_ffcv
@pytest.mark.parametrize("shape", [(10, 400), (400, 10)])
def test_crops_of_extreme_pictures_fall_back_to_the_centre(shape):
    from vmoe_momentum.datasets.ffcv_decoder import _mix, _random_crop

    top, left, h, w = _random_crop(*shape, np.uint64(_mix(np.uint64(1))), 0.9, 1.0, 3 / 4, 4 / 3)
    assert top >= 0 and top + h <= shape[0] and left >= 0 and left + w <= shape[1] and min(h, w) >= 7


@requires_ffcv
def test_os_cache_and_batches_ahead_change_no_pixel(digits):
    mapped = module(FFCVDataModule, digits).train_dataloader()
    cached = module(FFCVDataModule, digits, os_cache=False, batches_ahead=1).train_dataloader()
    assert cached.batches_ahead == 1
    for (a, b), (c, d) in itertools.islice(zip(mapped, cached, strict=True), 5):
        assert torch.equal(a, c) and torch.equal(b, d)
