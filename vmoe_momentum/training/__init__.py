"""Lightning: the module, optimisation, callbacks, and what a checkpoint says of its network."""

from .accepted import MonitorCheck, check_apart, check_callbacks
from .adversarial import AdversarialSettings
from .attempts import Attempts, join_attempt
from .callbacks import EpochSeconds, RouterStats, RunSummary
from .consistency import ConsistencySettings
from .continuing import ResumedSettings
from .experts import check_experts
from .finite import FiniteTraining, NotFinite
from .keeping import add_keepers
from .materializing import create_on_meta
from .module import ImageClassifier
from .optimization import OptimizerSettings, ScheduleSettings
from .partial import PartialEpoch
from .predictions import PredictionWriter
from .ranks import EndTogether, follow_first_rank
from .resuming import AtomicCheckpointIO, SeededSteps
from .robustness import RobustnessCheck
from .routing_guard import RouterGuard
from .sharding import FSDP2Strategy, refuse_unsharded
from .stopping import JobCheckpoints, SaveOnStop, StopSignals
from .trainers import callbacks_of

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
    "add_keepers",
    "callbacks_of",
    "create_on_meta",
    "check_apart",
    "check_callbacks",
    "check_experts",
    "follow_first_rank",
    "join_attempt",
    "refuse_unsharded",
]
