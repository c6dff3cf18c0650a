"""Lightning: the module, optimisation, callbacks, and what a checkpoint says of its network."""

from .callbacks import EpochSeconds, PredictionWriter, RouterStats, RunSummary
from .module import ImageClassifier
from .optimization import OptimizerSettings, ScheduleSettings
from .robustness import RobustnessCheck

__all__ = [
    "EpochSeconds",
    "ImageClassifier",
    "OptimizerSettings",
    "PredictionWriter",
    "RobustnessCheck",
    "RouterStats",
    "RunSummary",
    "ScheduleSettings",
]
