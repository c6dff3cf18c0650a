"""The robustness benchmark: corruptions, other pictures, attacks, calibration, routing; from any model to a report.

It knows nothing of this project's networks: models come in as callables (models.Model).
"""

from .attacks import ATTACKS, Budget, run_attack
from .corruptions import BENCHMARK, EXTRA, SEVERITIES, corrupt
from .evaluate import Evaluation, evaluate
from .models import Model, View
from .plan import Settings, make_plan, parse_eps
from .report import write_report
from .rows import Row, read_rows, write_rows

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
    "corrupt",
    "evaluate",
    "make_plan",
    "parse_eps",
    "read_rows",
    "run_attack",
    "write_report",
    "write_rows",
]
