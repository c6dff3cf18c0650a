"""Callbacks that cannot work here are refused by name, and so are metrics to watch that no run logs."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..configs import short
from ..names import did_you_mean
from .trainers import callbacks_of

_SCHEDULE = "it puts a schedule of its own in the place of model.schedule"
REFUSED = {  # those that Lightning ships and cannot work, with the reason and the way out
    "StochasticWeightAveraging": f"{_SCHEDULE}; use EMAWeightAveraging",
    "LearningRateFinder": f"{_SCHEDULE}; compare rates with `vmoe-momentum analyze ablate`",
    "BatchSizeFinder": "the schedule's steps, which follow from the batch size, are set before it; set data.batch_size",
    "BackboneFinetuning": "the network has no `backbone` apart from its head; use model.optimizer.layer_decay",
    "BaseFinetuning": "it does nothing until a class of yours says what to freeze; give that class",
    "GradientAccumulationScheduler": (
        "the schedule's steps are set before it changes their number; use trainer.accumulate_grad_batches"
    ),
    "ModelPruning": "it renames the weights, so that its checkpoints fit no network",
    "BasePredictionWriter": "it writes nothing until a class of yours says how; predict writes predictions.csv",
}


def check_callbacks(callbacks: list[Callback]) -> None:
    """Raises ValueError: one of Lightning's cannot work here; classes made from these are their authors' matter but
    for the schedulers."""
    for callback in callbacks:
        for name, why in REFUSED.items():
            kind = getattr(lightning_callbacks, name)
            if type(callback) is kind or (why.startswith(_SCHEDULE) and isinstance(callback, kind)):
                raise ValueError(f"trainer.callbacks={type(callback).__name__}: cannot be used, as {why}")


def check_apart(callbacks: list[Callback] | Callback | None) -> None:
    """Raises ValueError: two of them would keep their state in checkpoints under one key."""
    seen: dict[str, int] = {}
    for number, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        if not is_overridden("state_dict", callback, parent=Callback):
            continue
        key = callback.state_key
        if key in seen:
            raise ValueError(
                f"trainer.callbacks[{seen[key]}] and trainer.callbacks[{number}] keep their state in checkpoints under "
                f"one name, {key.replace('None', 'null')}; leave one out, or make these settings of theirs differ"
            )
        seen[key] = number


class MonitorCheck(Callback):
    """Raises ValueError where a callback watches a metric that the run does not log: before training where that is
    known, else after the first epoch or at the end, in place of a run that saved nothing and ends as if all were well.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        strangers = [c for c in callbacks_of(trainer) if not type(c).__module__.startswith(("lightning.", _package()))]
        for what, metric in _watched(trainer):
            if metric.startswith("val/") and (never := _never_validates(trainer)):
                raise ValueError(f"{what}={short(metric)}: {never}, so it is never logged; watch train/loss_epoch")
            known = [*_logged(trainer, pl_module), *trainer.callback_metrics]
            block = metric.startswith("val/block")
            if not strangers and not block and metric not in known and not metric.startswith("lr-"):
                raise ValueError(f"{what}={short(metric)}: no such metric is logged{did_you_mean(metric, known)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for what, metric in _watched(trainer):
            if metric not in trainer.callback_metrics:
                names = list(trainer.callback_metrics)
                raise ValueError(f"{what}={short(metric)}: never logged in this run{did_you_mean(metric, names)}")


def _package() -> str:
    return __name__.partition(".")[0] + "."


def _watched(trainer: pl.Trainer) -> list[tuple[str, str]]:
    """[trainer.callbacks: Class.monitor, metric], but for the counts that a ModelCheckpoint has by itself."""
    found = [
        (type(c).__name__, getattr(c, "monitor", None))
        for c in callbacks_of(trainer)
        if not (isinstance(c, ModelCheckpoint) and c.monitor in ("epoch", "step"))
    ]
    return [(f"trainer.callbacks: {name}.monitor", metric) for name, metric in found if isinstance(metric, str)]


def _logged(trainer: pl.Trainer, module: Any) -> list[str]:
    """By the module and by our callbacks in every run, but for the routers'."""
    train = [f"train/{name}" for name in ("loss", "loss_step", "loss_epoch", "epoch_seconds")]
    robust = any(getattr(callback, "val_attack", None) is not None for callback in callbacks_of(trainer))
    return [*train, *module.logged(), *["val/robust_top1"] * robust]


def _never_validates(trainer: pl.Trainer) -> str | None:
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches=0 turns validation off"
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 < epochs < every:
        return f"trainer.check_val_every_n_epoch={every} of trainer.max_epochs={epochs} never validates"
    return None
