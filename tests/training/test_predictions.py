"""predict: one row an image, whatever the number of devices."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import rows
from test_interrupted import start

from vmoe_momentum.datasets.batches import BatchPlan
from vmoe_momentum.training import PredictionWriter, predictions

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"


def seen_by(rank: int, world_size: int, count: int, batch_size: int, limit: int | None = None):
    """Its plan, and (probabilities, labels) of each batch: image i is of class i % 7, surely."""
    plan = BatchPlan(count, batch_size, training=False, rank=rank, world_size=world_size)
    labels = [torch.from_numpy(batch) % 7 for batch in plan.batches(0)[:limit]]
    return plan, [(torch.nn.functional.one_hot(batch, 7) * 0.94 + 0.01, batch) for batch in labels]


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_rows_of_all_ranks_in_order_each_image_once(limit, tmp_path: Path, monkeypatch) -> None:
    """Every number of ranks, equal and unequal shares, also cut short; each rank is asked in turn."""
    module = SimpleNamespace(class_names=[f"class {k}" for k in range(7)], num_classes=7)
    for world_size, count, batch_size in itertools.product((1, 2, 3, 4), (23, 24, 25), (3, 8)):
        parts: list = []
        for rank in reversed(range(world_size)):  # rank 0 writes: it comes last here
            plan, batches = seen_by(rank, world_size, count, batch_size, limit)
            trainer = SimpleNamespace(
                predict_dataloaders=SimpleNamespace(plan=plan), log_dir=tmp_path, world_size=world_size,
                is_global_zero=rank == 0,
            )  # fmt: skip
            monkeypatch.setattr(predictions, "_of_all_ranks", lambda mine, parts=parts: parts.append(mine) or parts)
            PredictionWriter().write_on_epoch_end(trainer, module, batches, None)
        found = rows(tmp_path / "predictions.csv")
        images = [int(row["image"]) for row in found]
        shares = [seen_by(rank, world_size, count, batch_size)[0].batches(0)[:limit] for rank in range(world_size)]
        assert images == sorted(int(image) for share in shares for batch in share for image in batch)
        assert limit or images == list(range(count))
        assert all(row["label"] == row["class_1"] == f"class {int(row['image']) % 7}" for row in found)


def test_an_image_that_two_devices_share_is_written_once() -> None:
    one = predictions.Predictions(torch.tensor([2, 0]), *(torch.arange(2.0).reshape(2, -1) for _ in range(3)))
    assert [column.tolist() for column in predictions.merge([one, one])][:2] == [[0, 2], [[1.0], [0.0]]]


def test_a_loader_that_does_not_say_who_sees_what_is_refused_on_two_devices(tmp_path: Path) -> None:
    trainer = SimpleNamespace(predict_dataloaders=[], log_dir=tmp_path, world_size=2, is_global_zero=True)
    with pytest.raises(ValueError, match="trainer.devices=2.*predict on one device"):
        PredictionWriter().write_on_epoch_end(trainer, None, seen_by(0, 2, 23, 8)[1], None)


@pytest.mark.long
def test_two_ranks_write_what_one_writes(digits: Path, tmp_path: Path) -> None:
    """As programs over gloo."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        given = {
            "config": CONFIG, "data": "FolderDataModule", "data.root": digits, "data.num_workers": 1,
            "data.eval_batch_size": 17, "trainer.devices": ranks, "trainer.logger": "false",
            "trainer.strategy": "ddp" if ranks > 1 else "auto", "trainer.enable_progress_bar": "false",
        }  # fmt: skip
        done = start(folder, ["predict", *(f"--{name}={value}" for name, value in given.items())], ranks)
        assert done.returncode == 0, done.stderr
        found.append(rows(next(folder.rglob("predictions.csv"))))
    one, two = found
    assert [row["image"] for row in two] == [str(number) for number in range(360)]
    for ours, theirs in zip(two, one, strict=True):
        assert (ours["image"], ours["label"]) == (theirs["image"], theirs["label"])
        assert float(ours["probability_1"]) == pytest.approx(float(theirs["probability_1"]), abs=2e-6)
