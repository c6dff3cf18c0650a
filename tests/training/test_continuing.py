"""Going on under another config: every setting of training is applied and said, or refused with both values."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from cli_helpers import fails

from vmoe_momentum import datasets, lightning_cli
from vmoe_momentum.training import ImageClassifier, OptimizerSettings, ScheduleSettings
from vmoe_momentum.training.continuing import is_training_setting

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
EPOCH = 3  # steps
# setting -> another value than digits.yaml's, and whether it can be applied
OTHER = {
    "model.optimizer.name": ("lion", False),
    "model.optimizer.lr": (2e-4, True),
    "model.optimizer.weight_decay": (0.01, True),
    "model.optimizer.betas": ([0.8, 0.9], True),
    "model.optimizer.layer_decay": (0.5, False),
    "model.schedule.decay": ("linear", True),
    "model.schedule.warmup_steps": (1, True),
    "model.schedule.min_lr": (3e-5, True),
    "model.loss": ("sigmoid", True),
    "model.label_smoothing": (0.2, True),
    "model.mixup": (0.3, True),
    "model.cutmix": (0.4, True),
    "model.random_erasing": (0.1, True),
    "model.aux_loss_weight": (0.5, True),
    "model.adversarial": ("{eps: 4/255, steps: 1}", True),
    "model.consistency": ("{weight: 0.1}", True),
    "trainer.accumulate_grad_batches": (2, True),
    "trainer.gradient_clip_val": (0.3, True),
    "trainer.precision": ("bf16-mixed", True),
    "trainer.max_epochs": (4, True),
    "data.batch_size": (64, True),
    "data.hflip": (True, True),
    "data.repeated_augmentation": (2, True),
    "data.seed": (5, True),
    "data.crop_scale": ([0.5, 0.9], True),
    "data.crop_ratio": ([0.9, 1.2], True),
    "data.randaugment": ("rand-m3-n1", True),
    "data.decoder": ("torchvision", True),
    "data.progressive": ("{start_size: 12, start_epoch: 0, end_epoch: 1, multiple: 4}", True),
    "seed_everything": (7, False),
}  # fmt: skip
TOLD = {"trainer.max_epochs": "steps of the whole run", "seed_everything": "seed_everything"}
DEFAULT = ["model.optimizer.lr", "trainer.max_epochs"]


def fit(root: Path, *more: str) -> lightning_cli.VMoECLI:
    argv = [f"--config={CONFIG}", "--data=FolderDataModule", f"--data.root={root}", "--data.num_workers=0"]
    short = ["--trainer.max_epochs=2", "--model.schedule.warmup_steps=0", "--trainer.limit_val_batches=1"]
    short += [f"--trainer.limit_train_batches={EPOCH}", "--trainer.enable_progress_bar=false"]
    short += ["--trainer.num_sanity_val_steps=0", "--model.net.init_args.dynamic_img_size=true"]
    return lightning_cli.run_lightning(["fit", *argv, *short, *more])


@pytest.fixture(scope="module")
def half_way(digits: Path, tmp_path_factory) -> Path:
    """A checkpoint after the first of two epochs."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        saver = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder}"]
        saver += ["--trainer.callbacks.filename=half{step}", f"--trainer.callbacks.every_n_train_steps={EPOCH}"]
        fit(digits, *saver, "--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.auto_insert_metric_name=false")
    return min(folder.glob("half*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


def test_every_setting_of_training_has_another_value_here() -> None:
    known = {f"model.optimizer.{field.name}" for field in dataclasses.fields(OptimizerSettings)}
    known |= {f"model.schedule.{field.name}" for field in dataclasses.fields(ScheduleSettings)}
    known |= {f"model.{name}" for name in inspect.signature(ImageClassifier).parameters if is_training_setting(name)}
    data = inspect.signature(datasets.FolderDataModule).parameters
    known |= {f"data.{name}" for name in data if is_training_setting(name)}
    assert known <= OTHER.keys()


@pytest.mark.parametrize(
    "setting", [s if s in DEFAULT or not OTHER[s][1] else pytest.param(s, marks=pytest.mark.long) for s in OTHER]
)
def test_another_value_is_applied_and_said_or_refused(
    setting: str, half_way: Path, digits: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    value, applied = OTHER[setting]
    given = f"--{setting}={value}".replace("'", "")
    argv, name = (f"--ckpt_path={half_way}", given), TOLD.get(setting, setting)
    if not applied:
        with pytest.raises(ValueError, match=f"ckpt_path: .*{name}: checkpoint .*, config"):
            fit(digits, *argv)
        return
    trainer = fit(digits, *argv).trainer
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed"))
    assert f"from step {EPOCH} on" in said and f"{name}: checkpoint " in said
    fresh = lightning_cli.run_lightning(_argv(digits, given), start=False)
    optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    settings = fresh.model.optimizer_settings
    assert {group["initial_lr"] for group in optimizer.param_groups} == {settings.lr}
    assert max(group["weight_decay"] for group in optimizer.param_groups) == settings.weight_decay
    if settings.betas is not None:
        assert {tuple(group["betas"]) for group in optimizer.param_groups} == {tuple(settings.betas)}
    assert scheduler.t_initial + scheduler.warmup_t == trainer.estimated_stepping_batches
    rates = fresh.model.schedule_settings.build(
        fresh.model.optimizer_settings.build(fresh.model.model.net), int(trainer.estimated_stepping_batches)
    )
    rates.step_update(trainer.global_step)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in rates.optimizer.param_groups]


def _argv(root: Path, given: str) -> list[str]:
    argv = [f"--config={CONFIG}", "--data=FolderDataModule", f"--data.root={root}", "--data.num_workers=0"]
    return [*argv, "--model.schedule.warmup_steps=0", given]


def test_the_same_settings_say_nothing_and_older_checkpoints_go_on(
    half_way: Path, digits: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = fit(digits).model.state_dict()
    capsys.readouterr()
    resumed = fit(digits, f"--ckpt_path={half_way}").model.state_dict()
    assert "resumed" not in capsys.readouterr().out
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    old = torch.load(half_way, weights_only=True)
    del old["vmoe_momentum_training"]
    torch.save(old, tmp_path / "old.ckpt")
    again = fit(digits, f"--ckpt_path={tmp_path / 'old.ckpt'}").model.state_dict()
    assert "of an earlier version" in capsys.readouterr().out
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    line = fails(["fit", *_argv(digits, "--seed_everything=3"), f"--ckpt_path={half_way}"], capsys)
    assert "seed_everything: checkpoint 0, config 3" in line
