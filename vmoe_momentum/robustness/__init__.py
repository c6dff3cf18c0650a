"""The robustness benchmark: corruptions, other pictures, attacks, calibration, routing; from any model to a report.

It knows nothing of this project's networks: models come in as callables (models.Model).
"""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .attacks import ATTACKS, Budget, run_attack
    from .corruptions import BENCHMARK, EXTRA, SEVERITIES, corrupt
    from .evaluate import Evaluation
    from .labels import list_pictures
    from .models import Model, View
    from .plan import describe_pictures, make_plan
    from .report import write_report
    from .rows import Row, write_rows
    from .settings import Settings, check_settings, parse_eps

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
    "list_pictures",
    "make_plan",
    "parse_eps",
    "run_attack",
    "write_report",
    "write_rows",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "attacks": ("ATTACKS", "Budget", "run_attack"),
        "corruptions": ("BENCHMARK", "EXTRA", "SEVERITIES", "corrupt"),
        "evaluate": ("Evaluation",),
        "labels": ("list_pictures",),
        "models": ("Model", "View"),
        "plan": ("describe_pictures", "make_plan"),
        "report": ("write_report",),
        "rows": ("Row", "write_rows"),
        "settings": ("Settings", "check_settings", "parse_eps"),
    },
)
