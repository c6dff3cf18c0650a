"""What fit refuses before its first step is decided by the steps that it would take."""

from pathlib import Path

import pytest
from test_cli import arguments

from vmoe_momentum import lightning_cli

BASE = ["--data.batch_size=128", "--trainer.limit_val_batches=1", "--trainer.max_epochs=2"]  # 11 batches an epoch
UNEVEN = ["--trainer.limit_train_batches=4", "--trainer.accumulate_grad_batches=3"]
MORE = [
    ["--trainer.limit_train_batches=0.5", "--trainer.max_steps=7"],
    *(
        [f"--trainer.limit_train_batches={limit}", f"--trainer.accumulate_grad_batches={several}", f"--trainer.{end}"]
        for limit in ("1", "3", "1.0", "0.2")
        for several in (1, 2, 4)
        for end in ("max_epochs=1", "max_steps=2", "max_epochs=3")
    ),
]


def steps_of(built: lightning_cli.VMoECLI) -> int:
    """As its schedule ends: the first step after which the rate no longer changes."""
    scheduler = built.model.configure_optimizers()["lr_scheduler"]["scheduler"]
    rate = lambda step: scheduler._get_values(step, on_epoch=False)[0]  # noqa: E731
    return next(step for step in range(1, 1000) if rate(step) == rate(step + 1))


def check(extra: list[str], digits: Path) -> None:
    words = [*arguments(digits), *BASE, "--model.schedule.warmup_steps=0", "--trainer.logger=false", *extra]
    built = lightning_cli.run_lightning(words, start=False)
    lightning_cli.rehearse(built)
    rehearsed, counted = int(built.trainer.estimated_stepping_batches), steps_of(built)
    taken = lightning_cli.run_lightning(
        ["fit", *words, "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"]
    )
    assert rehearsed == counted == taken.trainer.global_step


def test_rehearse_counts_the_steps_that_fit_takes(digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(UNEVEN, digits)


@pytest.mark.long
@pytest.mark.parametrize("extra", MORE, ids=" ".join)
def test_rehearse_counts_the_steps_of_a_grid(extra: list[str], digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(extra, digits)


def test_several_devices_share_the_batches(digits: Path, tmp_path: Path, monkeypatch) -> None:
    """1437 images, 128 on each of 2 devices: 5 steps an epoch, and each adds the same step."""
    monkeypatch.chdir(tmp_path)
    words = [*arguments(digits), *BASE, "--trainer.limit_train_batches=1.0", "--trainer.devices=2"]
    built = lightning_cli.run_lightning([*words, "--trainer.strategy=ddp"], start=False)
    lightning_cli.rehearse(built)
    assert built.trainer.estimated_stepping_batches == 10


def test_warm_up_is_refused_by_the_steps_there_are(digits: Path, tmp_path: Path, monkeypatch) -> None:
    """4 batches by 3 at a time are 2 steps an epoch, not 1."""
    monkeypatch.chdir(tmp_path)
    words = [*arguments(digits), *BASE, *UNEVEN]
    lightning_cli.rehearse(lightning_cli.run_lightning([*words, "--model.schedule.warmup_steps=3"], start=False))
    with pytest.raises(ValueError, match="warmup_steps=4: this run has 4 steps in all"):
        lightning_cli.rehearse(lightning_cli.run_lightning([*words, "--model.schedule.warmup_steps=4"], start=False))


def test_a_length_that_is_not_said(digits: Path, tmp_path: Path, monkeypatch) -> None:
    """Lightning's 1000 epochs, or the steps alone; a time alone gives the schedule no end."""
    monkeypatch.chdir(tmp_path)
    words = [*arguments(digits), *BASE, "--trainer.limit_train_batches=4", "--trainer.max_epochs=null"]
    for extra, steps in (([], 4000), (["--trainer.max_steps=5"], 5)):
        built = lightning_cli.run_lightning([*words, *extra], start=False)
        lightning_cli.rehearse(built)
        assert built.trainer.estimated_stepping_batches == steps
    with pytest.raises(ValueError, match="the schedule decays to the last step"):
        lightning_cli.rehearse(lightning_cli.run_lightning([*words, "--trainer.max_time=00:00:01:00"], start=False))
