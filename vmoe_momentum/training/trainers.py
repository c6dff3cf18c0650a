"""What Lightning's connectors set on a trainer from outside, so that its class does not declare it."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The list itself, in the order they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]  # set by its _CallbackConnector


def data_of(trainer: pl.Trainer) -> Any:
    """The data module; None where loaders came without one."""
    return trainer.datamodule  # type: ignore[attr-defined]  # set by its _DataConnector


def steps_between_logs(trainer: pl.Trainer) -> int:
    return trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its _LoggerConnector
