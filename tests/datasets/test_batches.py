"""BatchPlan: which images make which batch."""

from __future__ import annotations

import numpy as np
import pytest

from vmoe_momentum.datasets.batches import BatchPlan


def order(**changes) -> list[int]:
    settings = {"count": 50, "batch_size": 8, "training": True, "seed": 0, "epoch": 0} | changes
    epoch = settings.pop("epoch")
    return np.concatenate(BatchPlan(**settings).batches(epoch)).tolist()


def test_training_order_depends_on_seed_and_epoch_alone():
    assert order() == order()
    variants = [order(), order(epoch=1), order(epoch=2), order(seed=1), order(seed=1, epoch=1)]
    assert len({tuple(variant) for variant in variants}) == 5
    assert order(seed=1, epoch=0) != order(seed=0, epoch=1)


def test_reshuffle_off_repeats_epoch_zero():
    assert order(reshuffle=False, epoch=3) == order(epoch=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_training_ranks_share_out_full_batches_without_overlap(world_size):
    plans = [BatchPlan(200, 8, training=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for plan in plans for batch in plan.batches(epoch=1)]
    assert {len(plan) for plan in plans} == {200 // (8 * world_size)} == {len(plan.batches(0)) for plan in plans}
    assert {len(batch) for batch in batches} == {8}
    assert len(set(np.concatenate(batches).tolist())) == len(batches) * 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [2, 4, 5, 64])
@pytest.mark.parametrize("count", [32, 33, 41, 64])
def test_evaluation_visits_each_image_once_in_equally_many_batches(count, batch_size, world_size):
    plans = [BatchPlan(count, batch_size, training=False, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [plan.batches(0) for plan in plans]
    assert {len(share) for share in shares} == {len(plans[0])}
    sizes = [len(batch) for share in shares for batch in share]
    assert min(sizes) >= 1 and max(sizes) <= batch_size
    assert sorted(np.concatenate([np.concatenate(share) for share in shares]).tolist()) == list(range(count))


def test_evaluation_keeps_the_stored_order_and_a_last_batch_of_one():
    batches = BatchPlan(9, 4, training=False).batches(epoch=5)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_too_few_images_are_refused_with_the_setting_named():
    with pytest.raises(ValueError, match=r"data\.batch_size=8 on 2 device\(s\) needs 16 .* found 15"):
        BatchPlan(15, 8, training=True, world_size=2)
    with pytest.raises(ValueError, match=r"data\.eval_batch_size=1: 3 images"):
        BatchPlan(3, 1, training=False, world_size=2)


@pytest.mark.parametrize(("count", "repeats"), [(64, 1), (77, 1), (77, 3)])
def test_a_step_is_the_same_images_on_any_number_of_devices(count: int, repeats: int) -> None:
    """For as many images a step: what lets a run go on inside an epoch elsewhere."""
    steps = []
    for world_size in (1, 2, 4):
        settings = {"training": True, "repeats": repeats, "world_size": world_size}
        plans = [BatchPlan(count, 8 // world_size, rank=rank, **settings) for rank in range(world_size)]
        steps.append(
            [sorted(np.concatenate(step).tolist()) for step in zip(*(p.batches(1) for p in plans), strict=True)]
        )
    assert len(steps[0]) == count // 8 and steps[0] == steps[1] == steps[2]
