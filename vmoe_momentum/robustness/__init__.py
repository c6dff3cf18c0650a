"""The robustness benchmark: corruptions, other pictures, attacks, calibration, routing; from any model to a report.

It knows nothing of this project's networks: models come in as callables (models.Model).
"""

from .attacks import ATTACKS, Budget, run_attack
from .corruptions import BENCHMARK, EXTRA, SEVERITIES, corrupt
from .evaluate import Evaluation, evaluate
from .labels import list_pictures
from .models import Model, View
from .plan import Settings, check_settings, describe_pictures, make_plan, parse_eps
from .report import write_report
from .rows import Row, write_rows
from .versions import versions

__all__ = [
    "ATTACKS",
    "BENCHMARK",
    "EXTRA",
    "SEVERITIES",
    "Budget",
    "Evaluation",
    "Model",
    "Row",
    "Settings",
    "View",
    "check_settings",
    "corrupt",
    "describe_pictures",
    "evaluate",
    "list_pictures",
    "make_plan",
    "parse_eps",
    "run_attack",
    "versions",
    "write_report",
    "write_rows",
]
