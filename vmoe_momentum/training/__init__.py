"""Lightning: the module, optimisation, callbacks, and what a checkpoint says of its network."""

from .accepted import MonitorCheck, check_apart, check_callbacks
from .callbacks import EpochSeconds, RouterStats, RunSummary
from .continuing import ResumedSettings
from .experts import check_experts
from .finite import FiniteTraining, NotFinite
from .keeping import add_keepers
from .materializing import create_on_meta
from .module import ImageClassifier
from .optimization import OptimizerSettings, ScheduleSettings
from .partial import PartialEpoch
from .predictions import PredictionWriter
from .resuming import AtomicCheckpointIO, SeededSteps
from .robustness import RobustnessCheck
from .sharding import FSDP2Strategy, refuse_unsharded
from .stopping import JobCheckpoints, SaveOnStop, StopSignals

__all__ = [
    "MonitorCheck",
    "AtomicCheckpointIO",
    "EpochSeconds",
    "FSDP2Strategy",
    "FiniteTraining",
    "ImageClassifier",
    "JobCheckpoints",
    "NotFinite",
    "OptimizerSettings",
    "PartialEpoch",
    "PredictionWriter",
    "ResumedSettings",
    "RobustnessCheck",
    "RouterStats",
    "RunSummary",
    "SaveOnStop",
    "ScheduleSettings",
    "SeededSteps",
    "StopSignals",
    "add_keepers",
    "create_on_meta",
    "check_apart",
    "check_callbacks",
    "check_experts",
    "refuse_unsharded",
]
