"""What Lightning forgets when a run is resumed inside an epoch: gradients gathered so far, and sums for its means."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

KEY = "vmoe_momentum_partial_epoch"


def keeps_gradients(trainer: pl.Trainer) -> bool:
    """Are gradients whole on each device, to be saved between the batches of one step?"""
    return isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)


class PartialEpoch(Callback):
    """A resumed epoch logs the means of the whole epoch, and a resumed step has the gradients of all its batches.

    With several devices gradients are saved as their mean, which is what the step takes: equal but for rounding.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}  # key: [name that is logged, sum over images, images]
        self._gradients: dict[str, Tensor] = {}
        self._epoch: int | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        sums = {}
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if metric.meta.on_epoch and metric.is_tensor and metric.meta.is_mean_reduction:
                name = trainer.fit_loop.epoch_loop._results._forked_name(metric, on_step=False)[1]
                sums[key] = [name, metric.value.cpu().clone(), metric.cumulated_batch_size.cpu().clone()]
        gradients = _gathered(trainer, pl_module) if trainer.fit_loop._should_accumulate() else {}
        checkpoint[KEY] = {
            "epoch": trainer.current_epoch, "sums": {**self._sums, **sums}, "gradients": gradients,
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(KEY)
        if saved is not None and trainer.state.fn == "fit":
            self._epoch, self._sums, self._gradients = saved["epoch"], dict(saved["sums"]), saved["gradients"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device, copy=True)
        self._gradients = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._sums = {}  # of an epoch that was done

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self._sums:
            return
        results = trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._sums if key in results and trainer.current_epoch == self._epoch]:
            _, value, images = self._sums.pop(key)
            results[key].value += value.to(results[key].value.device)
            results[key].cumulated_batch_size += images.to(results[key].value.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Resumed between the last batch of an epoch and its end, no batch has made a sum."""
        for name, value, images in self._sums.values():
            pl_module.log(name, (value / images).to(pl_module.device), batch_size=1)
        self._sums = {}


def _gathered(trainer: pl.Trainer, module: Any) -> dict[str, Tensor]:
    if not keeps_gradients(trainer):
        return {}
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            mean = trainer.strategy.reduce(parameter.grad.detach().clone(), reduce_op="mean")
            found[name] = mean.cpu()
    return found
