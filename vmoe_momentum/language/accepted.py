"""What of a trainer is not for language models."""

from lightning.pytorch import Trainer

from ..training import FSDP2Strategy, RobustnessCheck
from ..training.trainers import callbacks_of


def check_trainer(trainer: Trainer) -> None:
    """Raises ValueError: what is for image classifiers only."""
    if isinstance(trainer.strategy, FSDP2Strategy):
        raise ValueError("trainer.strategy=FSDP2Strategy: for image classifiers; train language models with ddp")
    if any(isinstance(callback, RobustnessCheck) for callback in callbacks_of(trainer)):
        raise ValueError(
            "trainer.callbacks=RobustnessCheck: attacks pictures; leave it out, and test with --data.word_swap"
        )
