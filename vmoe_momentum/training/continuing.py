"""Going on from a checkpoint under another config: what differs holds from there on and is said, or is refused.

The network's own settings are `identity`'s matter.
"""

import copy
import dataclasses
import inspect
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from ..models.saved import KEY
from .resuming import SeededSteps
from .trainers import callbacks_of

TRAINING = f"{KEY}_training"  # where checkpoints keep them, beside the network's
STEPS = "steps of the whole run"
# the network, where files lie, how fast: what does not change how training goes on
_OTHERS = {
    "self", "net", "num_classes", "image_size", "class_names", "optimizer", "schedule", "test_time_flip", "compile",
    "channels_last", "override_model", "root", "num_workers", "eval_batch_size", "eval_crop_ratio", "eval_image_size",
    "os_cache", "batches_ahead", "upright",
}  # fmt: skip
_EARLIER = {"data.decoder": "pillow"}  # what checkpoints meant before they said it
_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")


class ResumedSettings(Callback):
    """`fit --ckpt_path` with other settings than the checkpoint's: a line says what holds from there on.

    Rates, decay and the schedule over the run's new length are the config's, where Lightning would keep the
    checkpoint's without a word; losses, augmentation, batches and the trainer's settings are the config's anyway.
    Another optimizer, groups of parameters or seed are refused: its state would mean something else.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._ours: dict[str, Any] = {}
        self._groups: list[int] = []
        self._resumed = False
        self._fresh: tuple[list[dict[str, Any]], dict[str, Any]] = ([], {})

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            checkpoint[TRAINING] = describe_training(pl_module)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._resumed = trainer.state.fn == "fit" and bool(checkpoint.get("optimizer_states"))
        if not self._resumed:
            return
        saved = checkpoint.get(TRAINING)
        self._saved = None if saved is None else {**_EARLIER, **saved}
        self._groups = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Before the checkpoint's state goes into the optimizer. Raises ValueError: it is of another one."""
        optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        self._ours = describe_training(pl_module)
        self._fresh = ([_settings(group) for group in optimizer.param_groups], copy.deepcopy(scheduler.state_dict()))
        if self._resumed:
            self._check(trainer, self._ours, optimizer)

    def _check(self, trainer: pl.Trainer, ours: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        saved = self._saved or {}
        name, groups = (
            "model.optimizer.name",
            [len(group["params"]) for group in optimizer.state_dict()["param_groups"]],
        )
        other = saved.get(name, ours[name]) != ours[name]
        if other or groups != self._groups:
            keys = [name] if other else [key for key in ours if key.startswith("model.optimizer.")]
            told = "; ".join(
                _line(key, saved[key], ours[key]) for key in keys if key in saved and saved[key] != ours[key]
            )
            told = told or "its optimizer has other groups of parameters"
            raise ValueError(
                f"ckpt_path: the checkpoint's optimizer cannot go on under this config: {told}; use its settings, or "
                "start a new run"
            )
        seed = next((c.seed for c in callbacks_of(trainer) if isinstance(c, SeededSteps)), None)
        if seed is not None and seed != torch.initial_seed():
            raise ValueError(
                f"ckpt_path: seed_everything: checkpoint {seed}, config {torch.initial_seed()}; a run draws with one "
                f"seed from start to end: use --seed_everything={seed}, or start a new run"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self._resumed:
            return
        optimizer = trainer.optimizers[0]
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler  # timm's, none of torch's
        groups, schedule = self._fresh
        ours, saved = self._ours, self._saved
        if trainer.strategy.restore_checkpoint_after_setup:  # sharded weights: it was not there before
            self._check(trainer, ours, optimizer)
        changed = [key for key, value in ours.items() if saved is None or saved.get(key) != value]
        if any(key.startswith(("model.optimizer.", "model.schedule.", STEPS)) for key in changed):
            for group, fresh in zip(optimizer.param_groups, groups, strict=True):
                group.update(fresh)
            scheduler.load_state_dict(schedule)
            scheduler.step_update(trainer.global_step)
        if saved is None:
            _say("the checkpoint does not say the settings of its run (of an earlier version): the config's hold now")
        elif changed:
            lines = "; ".join(_line(key, saved.get(key), ours[key]) for key in changed)
            _say(f"other settings from step {trainer.global_step} on: {lines}")


def describe_training(module: Any) -> dict[str, Any]:
    """Every setting that training follows, by the name a config gives it, and the steps of the whole run; JSON."""
    trainer, data = module.trainer, getattr(module.trainer, "datamodule", None)
    found: dict[str, Any] = {}
    for part, settings in (("optimizer", module.optimizer_settings), ("schedule", module.schedule_settings)):
        found |= {f"model.{part}.{key}": value for key, value in dataclasses.asdict(settings).items()}
    found |= {f"model.{key}": value for key, value in module.training_settings.items()}
    names = inspect.signature(type(data).__init__).parameters if data is not None else ()
    found |= {f"data.{key}": getattr(data, key) for key in names if key not in _OTHERS and hasattr(data, key)}
    found |= {f"trainer.{key}": getattr(trainer, key) for key in _TRAINER}
    found["devices"] = trainer.world_size
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    found[STEPS] = int(scheduler.t_initial + scheduler.warmup_t)
    return {key: _as_json(value) for key, value in found.items()}


def is_training_setting(name: str) -> bool:
    """Of the arguments of ImageClassifier and the data modules."""
    return name not in _OTHERS


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Of a group of parameters, what a config says; not what an optimizer counts in it, nor the rate of the step."""
    names = ("initial_lr", "lr_scale", "weight_decay", "betas")
    return {name: group[name] for name in names if name in group}


def _line(key: str, saved: Any, ours: Any) -> str:
    return f"{key}: checkpoint {saved}, config {ours}"


@rank_zero_only
def _say(text: str) -> None:
    Console().print(f"[bold]resumed[/bold]  {text}", soft_wrap=True, highlight=False)
