"""Every callback that Lightning ships: it works, or is refused by name; and metrics that are watched are logged."""

from pathlib import Path

import pytest
from cli_helpers import fails
from lightning.pytorch import callbacks as lightning_callbacks

from vmoe_momentum import cli
from vmoe_momentum.training.accepted import REFUSED

CONFIG = Path(__file__).parent.parent.parent / "configs" / "digits.yaml"
ARGUMENTS = {  # that some cannot do without
    "EarlyStopping": {"monitor": "val/loss"},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "GradientAccumulationScheduler": {"scheduling": {0: 1, 1: 2}},
    "ModelCheckpoint": {"every_n_train_steps": 2},
    "OnExceptionCheckpoint": {"dirpath": "here"},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "Timer": {"duration": "00:01:00:00"},
    "WeightAveraging": {},
}


def arguments(root: Path, *extra: str) -> list[str]:
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=2"]
    quiet = ["--model.schedule.warmup_steps=1", "--data.num_workers=0", "--trainer.log_every_n_steps=1"]
    return ["fit", f"--config={CONFIG}", "--data=FolderDataModule", f"--data.root={root}", *short, *quiet, *extra]


def adding(name: str) -> list[str]:
    words = [f"--trainer.callbacks+=lightning.pytorch.callbacks.{name}"]
    return [*words, *(f"--trainer.callbacks.{key}={value}" for key, value in ARGUMENTS.get(name, {}).items())]


@pytest.mark.parametrize("name", REFUSED)
def test_those_that_cannot_work_are_refused_before_training(name, digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(arguments(digits, *adding(name)), capsys)
    assert f"trainer.callbacks={name}: cannot be used, as " in line and not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(lightning_callbacks.__all__) - REFUSED.keys()))
def test_all_others_work(name, digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(arguments(digits, *adding(name)))
    path = next(tmp_path.rglob("last.ckpt"))
    cli.main(["test", *arguments(digits)[1:], f"--ckpt_path={path}"])
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ModelCheckpoint", pytest.param("EarlyStopping", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("metric", "extra", "words"),
    [
        ("val/top", [], "no such metric is logged; did you mean val/top"),
        ("test/top1", [], "no such metric is logged"),
        ("val/top1", ["--trainer.limit_val_batches=0"], "limit_val_batches=0 turns validation off"),
        ("val/top1", ["--trainer.check_val_every_n_epoch=3"], "check_val_every_n_epoch=3 of trainer.max_epochs=2"),
        ("val/block9/dropped", ["--trainer.callbacks.strict=false"], "never logged in this run"),
    ],
)
def test_a_metric_that_is_never_logged_is_no_success(
    kind, metric, extra, words, digits, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "ModelCheckpoint":
        extra = [word for word in extra if "strict" not in word]
        words = words.replace("never logged in this run", "")
    line = fails(
        arguments(digits, "--trainer.callbacks=null", *adding(kind), f"--trainer.callbacks.monitor={metric}", *extra),
        capsys,
    )
    assert metric in line and kind in line and words in line


@pytest.mark.parametrize("metric", ["epoch", "step"])
def test_a_checkpoint_may_watch_its_own_counts(metric, digits, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    watching = [*adding("ModelCheckpoint"), f"--trainer.callbacks.monitor={metric}", "--trainer.callbacks.mode=max"]
    cli.run(arguments(digits, "--trainer.callbacks=null", *watching))
    assert list(tmp_path.rglob("*.ckpt"))
