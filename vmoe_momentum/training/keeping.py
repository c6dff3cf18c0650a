"""What is kept of a run: a last checkpoint that is the last, and averaged weights only once there are any."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, WeightAveraging

from .trainers import callbacks_of


class KeepLast(Callback):
    """Unmonitored checkpoints end at the run's last step, whatever its validation and saving intervals."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epochs, steps = trainer.max_epochs, trainer.max_steps
        over = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
        if not (over or trainer.should_stop or 0 <= steps <= trainer.global_step):
            return
        for saver in trainer.checkpoint_callbacks:
            if not isinstance(saver, ModelCheckpoint) or saver._should_skip_saving_checkpoint(trainer):
                continue
            candidates = saver._monitor_candidates(trainer)
            if saver.monitor is None and saver.save_top_k != 0:
                saver._save_topk_checkpoint(trainer, candidates)
            saver._save_last_checkpoint(trainer, candidates)  # where save_last asks for it


class RawUntilAveraged(Callback):
    """Until weight averaging begins, what it validates, saves and ends with are the weights that are trained.

    Lightning 2.6.6 has the network as it was built in their place.
    """

    def _follow(self, trainer: pl.Trainer, module: Any) -> None:
        for callback in callbacks_of(trainer):
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None and int(average.n_averaged) == 0:
                with torch.no_grad():
                    for kind in ("parameters", "buffers"):
                        pairs = zip(getattr(average.module, kind)(), getattr(module, kind)(), strict=True)
                        for theirs, ours in pairs:
                            theirs.copy_(ours)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._follow(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._follow(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._follow(trainer, pl_module)


def add_keepers(callbacks: list[Any]) -> None:
    """In place: the first before averaging, the second between it and what saves."""
    callbacks.insert(0, RawUntilAveraged())
    first = next((n for n, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), len(callbacks))
    callbacks.insert(first, KeepLast())
