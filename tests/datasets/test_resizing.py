"""Images that grow, evaluation at another size, repeated augmentation, and the resizing itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dataset_helpers import module, requires_ffcv

from vmoe_momentum.datasets.batches import BatchPlan
from vmoe_momentum.datasets.resizing import ProgressiveResize


@pytest.mark.parametrize(("start", "ramp", "final"), [(160, (65, 76), 192), (128, (30, 75), 224), (64, (0, 1), 224)])
def test_sizes_are_those_of_ffcv_imagenet(start, ramp, final) -> None:
    """Its get_resolution, as written there."""
    grows = ProgressiveResize(start, *ramp)
    grows.check(final)
    for epoch in range(ramp[1] + 5):
        expected = int(np.round(np.interp([epoch], ramp, [start, final])[0] / 32)) * 32
        assert grows.size(epoch, final) == expected, epoch


def test_training_images_grow_and_evaluation_has_its_own_size(backend, digits) -> None:
    data = module(
        backend, digits, image_size=24, progressive=ProgressiveResize(8, 0, 2, multiple=8), eval_image_size=32
    )
    assert data.sizes() == [8, 16, 24, 32]
    loader = data.train_dataloader()
    for epoch, size in ((0, 8), (1, 16), (2, 24), (7, 24), (0, 8)):
        loader.set_epoch(epoch)
        images, labels = next(iter(loader))
        assert images.shape == (64, 3, size, size) and images.is_contiguous(memory_format=torch.channels_last)
    assert next(iter(data.val_dataloader()))[0].shape == (64, 3, 32, 32)
    plain = module(backend, digits, image_size=24).train_dataloader()
    plain.set_epoch(2)
    loader.set_epoch(2)
    assert all(torch.equal(a, b) for a, b in zip(next(iter(plain)), next(iter(loader)), strict=True))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            {"progressive": ProgressiveResize(12, 0, 2, multiple=8)},
            r"data\.progressive\.start_size=12: use a ",
        ),
        ({"progressive": ProgressiveResize(32, 0, 2, multiple=8)}, r"start_size=32: use a multiple of 8 up to"),
        ({"progressive": ProgressiveResize(8, 0, 2, multiple=16)}, r"start_size=8: use a multiple of 16"),
        ({"progressive": ProgressiveResize(16, 0, 2, multiple=16)}, r"data\.image_size=24: use a multiple of"),
        ({"progressive": ProgressiveResize(8, 2, 2, multiple=8)}, r"data\.progressive\.start_epoch=2: .* less than"),
        ({"eval_image_size": 0}, r"data\.eval_image_size=0"),
        ({"repeated_augmentation": 0}, r"data\.repeated_augmentation=0"),
    ],
)
def test_impossible_sizes_are_refused(backend, digits, settings, found) -> None:
    with pytest.raises(ValueError, match=found):
        module(backend, digits, image_size=24, **settings)


def test_repeats_are_neighbours_in_an_epoch_as_long() -> None:
    """As timm's RepeatAugSampler: neighbours, so that ranks share an image's repeats."""
    plan = BatchPlan(100, 10, training=True, seed=3, repeats=3)
    draws = np.concatenate(plan.batches(1))
    images = plan.images_of(draws)
    assert len(draws) == 100 and len(set(draws)) == 100
    assert images.tolist() == np.repeat(images[::3], 3)[:100].tolist() and len(set(images)) == 34
    assert (draws // 100).tolist() == (list(range(3)) * 34)[:100]
    assert images[::3].tolist() == np.concatenate(BatchPlan(100, 10, training=True, seed=3).batches(1))[:34].tolist()
    ranks = [BatchPlan(100, 10, training=True, seed=3, repeats=3, rank=r, world_size=3).batches(1) for r in range(3)]
    assert [plan.images_of(b[0]).tolist() for b in ranks] == [images[:90:3][:10].tolist()] * 3


def test_repeats_are_augmented_differently_and_always_the_same(backend, pictures) -> None:
    loader = module(backend, pictures, batch_size=6, repeated_augmentation=2).train_dataloader()
    images, labels = next(iter(loader))
    assert labels[::2].tolist() == labels[1::2].tolist()
    assert all(not torch.equal(a, b) for a, b in zip(images[::2], images[1::2], strict=True))
    first = next(iter(module(backend, pictures, batch_size=3).train_dataloader()))[0]
    assert torch.equal(images[::2], first)  # the first repeat is what there is without
    again = next(iter(module(backend, pictures, batch_size=6, repeated_augmentation=2).train_dataloader()))[0]
    assert torch.equal(images, again)


@requires_ffcv
@pytest.mark.parametrize("shape", [(40, 60), (24, 24), (24, 91), (333, 500), (48, 48), (25, 25)])
def test_shrinking_is_opencvs_area_average(shape) -> None:
    import cv2

    from vmoe_momentum.datasets.ffcv_decoder import _shrink

    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (shape[0] + 7, shape[1] + 5, 3), dtype=np.uint8)
    ours, crop = np.zeros((24, 24, 3), np.uint8), source[3 : 3 + shape[0], 2 : 2 + shape[1]]
    _shrink(source, 3, 2, *shape, ours)
    exact = cv2.resize(crop.astype(np.float64), (24, 24), interpolation=cv2.INTER_AREA)
    assert np.abs(ours - exact).max() <= 0.51  # rounded to the nearest
    theirs = cv2.resize(crop, (24, 24), interpolation=cv2.INTER_AREA)
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and (ours != theirs).mean() < 0.01
