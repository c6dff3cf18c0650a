"""Lightning: the module, optimisation, callbacks, and what a checkpoint says of its network."""

from .callbacks import EpochSeconds, RouterStats, RunSummary
from .module import ImageClassifier
from .optimization import OptimizerSettings, ScheduleSettings
from .predictions import PredictionWriter
from .resuming import AtomicCheckpointIO, SeededSteps
from .robustness import RobustnessCheck

__all__ = [
    "AtomicCheckpointIO",
    "EpochSeconds",
    "ImageClassifier",
    "OptimizerSettings",
    "PredictionWriter",
    "RobustnessCheck",
    "RouterStats",
    "RunSummary",
    "ScheduleSettings",
    "SeededSteps",
]
