"""predict: one row an image, whatever the number of devices."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import rows
from forks import run_ranks

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


def evaluated(folder: Path, pictures: Path, ranks: int, strategy: list[str]) -> tuple[bytes, dict[str, float]]:
    """Of nine images, three a batch: predictions.csv, and what `test` says."""
    data = ["--data=FolderDataModule", f"--data.root={pictures}", "--data.num_workers=0", "--data.eval_batch_size=3"]
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    more = [f"--trainer.devices={ranks}", "--trainer.enable_progress_bar=false", "--model.net.init_args.rule=HeavyBall"]
    words = [f"--config={CONFIG}", *strategy, *data, *logger, *more]
    codes = run_ranks(folder, [["predict", *words], ["test", *words]], ranks)
    assert codes == [0] * ranks, (folder / "said0").read_text()[-2000:]
    (said,) = folder.rglob("metrics.csv")
    (scores,) = rows(said)
    return next(folder.rglob("predictions.csv")).read_bytes(), {name: float(score) for name, score in scores.items()}


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory) -> tuple[bytes, dict[str, float]]:
    return evaluated(tmp_path_factory.mktemp("alone") / "one", pictures, 1, [])


DDP, SHARDED = ["--trainer.strategy=ddp"], [f"--config={CONFIG.parent / 'scale' / 'fsdp2.yaml'}"]
EXPERTS = [f"--config={CONFIG.parent / 'scale' / 'expert_parallel.yaml'}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        pytest.param(2, DDP, marks=pytest.mark.long),
        pytest.param(4, DDP),
        pytest.param(2, SHARDED, marks=pytest.mark.long),
        pytest.param(4, SHARDED, marks=pytest.mark.long),
        pytest.param(2, [*EXPERTS, "--trainer.strategy.expert_parallel=2"], marks=pytest.mark.long),
        pytest.param(4, [*EXPERTS, "--trainer.strategy.expert_parallel=2"], marks=pytest.mark.long),
    ],
)
def test_ranks_count_each_image_once(ranks: int, strategy: list[str], pictures: Path, alone, tmp_path: Path) -> None:
    """Shares of 5 and 4, of 3, 2, 2 and 2: every row in order, to the byte, and scores weighted by the images."""
    predicted, scores = evaluated(tmp_path / "r", pictures, ranks, strategy)
    assert predicted == alone[0] and predicted.count(b"\n") == 10
    assert {"test/loss", "test/top1", "test/block1/load_0"} <= scores.keys() == alone[1].keys()
    for name, score in scores.items():
        assert score == pytest.approx(alone[1][name], rel=2e-6, abs=1e-7), name


def test_fewer_images_than_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images are too few to evaluate on 4 devices; use at most 3"):
        BatchPlan(3, 8, training=False, rank=0, world_size=4)
