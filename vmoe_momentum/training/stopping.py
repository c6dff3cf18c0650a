"""Told to stop (Ctrl-C, SIGTERM, SIGHUP, SLURM's warning), training saves where it stands and says how to go on.

Signals only leave a note; the trainer reads it where its state can be saved: between two batches.
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ..models.sharded import is_checkpoint
from ..stopping import Stopped, end_at_once, heeded, in_own_process
from .attempts import newest_of_job, slurm_job
from .partial import keeps_gradients
from .ranks import resume_command
from .sharding import FSDP2Strategy
from .trainers import callbacks_of

_SAME_PRESS = 0.5  # seconds: launchers pass on the Ctrl-C that their children have got already
_VAL = "epoch_loop.val_loop.batch_progress"


class StopSignals(_SignalConnector):
    """In place of Lightning's, which saves nothing on SIGTERM, ends Ctrl-C with 1 and lets SLURM's warning save amid a
    step."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.stop = self.requeue = 0  # the signal's number
        self.wait = False  # is there something to save first?
        self._pressed = 0.0

    def register_signal_handlers(self) -> None:
        self.received_sigterm, self.stop, self.requeue, self.wait = False, 0, 0, False
        self._original_handlers = self._get_current_signal_handlers()
        for signum in heeded():
            self._register_signal(signum, in_own_process(self._stop))
        environment = self.trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            asked = environment.requeue_signal or signal.SIGUSR1
            if not self._has_already_handler(asked):
                self._register_signal(asked, in_own_process(self._note_requeue))

    def _stop(self, signum: int) -> None:
        launcher: Any = self.trainer.strategy.launcher  # only those that start processes have a `kill`
        if self.stop:
            if signum == signal.SIGINT and time.monotonic() - self._pressed > _SAME_PRESS:
                if hasattr(launcher, "kill"):
                    launcher.kill(signal.SIGKILL)
                end_at_once(signum)
            return
        self.stop, self._pressed = signum, time.monotonic()
        if not self.wait:
            if hasattr(launcher, "kill"):
                launcher.kill(signum)
            raise Stopped(signum, "nothing new to save; the same command starts again")
        if self.trainer.is_global_zero:
            os.write(2, b"\nstopping: saving after this batch; Ctrl-C again ends at once, without\n")

    def _note_requeue(self, signum: int) -> None:
        self.requeue = signum


class JobCheckpoints(_CheckpointConnector):
    """What SLURM's warning saves is named by its job and found again by that job only: Lightning would load whatever
    hpc_ckpt_N.ckpt lies in the folder that a job starts in. So is what earlier attempts of the same command left."""

    def __init__(self, trainer: pl.Trainer, argv: list[str]) -> None:
        super().__init__(trainer)
        self.argv = argv

    @property
    def _hpc_resume_path(self) -> str | None:
        path = Path(self.hpc_save_path(self.trainer.default_root_dir))
        foreign = sorted(path.parent.glob("hpc_ckpt_*.ckpt"))
        if not is_checkpoint(path) and foreign:
            rank_zero_warn(f"{foreign[-1]}: which job saved it is unknown, so it is not loaded; ask with --ckpt_path")
        return str(path) if is_checkpoint(path) else None

    @staticmethod
    def hpc_save_path(folderpath: Any) -> str:
        return str(Path(folderpath) / f"slurm_{slurm_job() or 0}.ckpt")

    def _select_ckpt_path(self, state_fn: Any, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        """An earlier attempt of this very run went on from what --ckpt_path says."""
        earlier = newest_of_job(self.trainer, self.argv) if state_fn == TrainerFn.FITTING else None
        return super()._select_ckpt_path(state_fn, earlier or ckpt_path, *args, **kwargs)


class SaveOnStop(Checkpoint):
    """Saves when a signal asked for it, then ends the run. Last among the callbacks, so that all have seen the batch.

    argv: the command line, to be repeated with the checkpoint.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self._leave: Stopped | None = None  # raised once the batch's numbers are logged

    # Where a checkpoint is what an unbroken run would have saved.

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        _signals(trainer).wait = True
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None  # amid an epoch
        if loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher):
            return  # saved at the validation or the end of the epoch, which follow at once
        if loop._should_accumulate() and not keeps_gradients(trainer):
            return
        self._save_if_asked(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Amid validation, which the resumed run does as a whole."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_if_asked(trainer, validating=True)
            self._raise()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save_if_asked(trainer)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._raise()

    on_train_epoch_start = on_train_end = on_train_batch_start

    def _raise(self) -> None:
        if self._leave is not None:
            raise self._leave

    def _save_if_asked(self, trainer: pl.Trainer, validating: bool = False) -> None:
        signals = _signals(trainer)
        asked = torch.tensor([signals.stop, signals.requeue], device=trainer.strategy.root_device)
        if trainer.world_size > 1:  # not all ranks need have been told
            asked = trainer.strategy.reduce(asked, reduce_op="max")
        stop, requeue = asked.tolist()
        if requeue:
            kept = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            self._save(trainer, Path(kept), validating)
            signals.requeue = 0
            if trainer.is_global_zero:
                _ask_for_requeue()
        if stop and self._leave is None:
            path = self._path(trainer)
            self._save(trainer, path, validating)
            self._leave = Stopped(stop, f"saved {path}; go on with: {resume_command(self.argv, path)}")

    def _save(self, trainer: pl.Trainer, path: Path, validating: bool) -> None:
        if validating:
            for callback in callbacks_of(trainer):
                if isinstance(callback, WeightAveraging):  # it validates the average in place of the weights
                    callback.on_validation_epoch_end(trainer, trainer.lightning_module)
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            before = progress.state_dict()
            # begun and not done: what makes Lightning validate, before it trains on, from the first batch
            progress.load_state_dict(_counts(total=(1, 1, 0, 0), current=(0, 0, 0, 0)))
        trainer.save_checkpoint(path)
        if isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.finish_saving()  # it is about to be named, and the job to end
        if validating:
            progress.load_state_dict(before)
            for callback in callbacks_of(trainer):
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_start(trainer, trainer.lightning_module)

    def _path(self, trainer: pl.Trainer) -> Path:
        """Beside the run's other checkpoints."""
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        folder = savers[0].dirpath if savers else None
        return Path(folder or trainer.log_dir or trainer.default_root_dir) / "stopped.ckpt"


def _signals(trainer: pl.Trainer) -> StopSignals:
    """The command line gives every trainer both these and SaveOnStop."""
    return cast(StopSignals, trainer._signal_connector)


def _counts(total: tuple[int, ...], current: tuple[int, ...]) -> dict[str, Any]:
    names = ("ready", "started", "processed", "completed")
    return {
        "total": dict(zip(names, total, strict=True)),
        "current": dict(zip(names, current, strict=True)),
        "is_last_batch": False,
    }


def _ask_for_requeue() -> None:
    job = slurm_job() or "0"
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
        told = done.stderr.strip() if done.returncode else None
    except OSError as error:
        told = str(error)
    if told is not None:
        rank_zero_warn(f"SLURM job {job} could not be requeued ({told}); submit it again with --ckpt_path")
