"""Lightning: the module, optimisation, callbacks, and what a checkpoint says of its network."""

from .accepted import MonitorCheck
from .adversarial import AdversarialSettings
from .attempts import Attempts
from .callbacks import EpochSeconds, RouterStats, RunSummary
from .consistency import ConsistencySettings
from .continuing import ResumedSettings
from .finite import FiniteTraining, NotFinite
from .module import ImageClassifier
from .optimization import OptimizerSettings, ScheduleSettings
from .partial import PartialEpoch
from .predictions import PredictionWriter
from .ranks import EndTogether
from .resuming import AtomicCheckpointIO, SeededSteps
from .robustness import RobustnessCheck
from .routing_guard import RouterGuard
from .sharding import FSDP2Strategy
from .stopping import JobCheckpoints, SaveOnStop, StopSignals

__all__ = [
    "MonitorCheck",
    "AdversarialSettings",
    "AtomicCheckpointIO",
    "Attempts",
    "ConsistencySettings",
    "EndTogether",
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
    "RouterGuard",
    "RouterStats",
    "RunSummary",
    "SaveOnStop",
    "ScheduleSettings",
    "SeededSteps",
    "StopSignals",
]
