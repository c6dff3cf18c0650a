"""Entries of RobustBench's ledger, one a model that AutoAttack was run on."""

import json
import re
from collections.abc import Collection
from typing import Any

from .cells import Cell
from .evaluate import Evaluation
from .models import Model
from .summary import at, before_attacks, eps_text, robust, standing
from .versions import versions
from .wide import dataset_of

ATTACK = "autoattack"


def model_info(evaluation: Evaluation, doubted: Collection[str]) -> dict[str, str]:
    """model_info/<dataset>/<norm>/<Name>.json -> its text, for each model and eps that AutoAttack was run on.

    Source: RobustBench 1.1.1, utils.ModelInfo and leaderboard/template.py, and its own entries, which also have
    `unreliable` and, where another attack leaves less than AutoAttack, `external`. What only a paper can say is null.
    Of several eps the name says which. doubted: names of models whose robustness the report's warnings doubt.
    """
    cells = [(number, cell) for number, cell in enumerate(evaluation.cells) if cell.attack == ATTACK]
    names = _names([model.name for model in evaluation.models])
    several = len({cell.severity for _, cell in cells}) > 1
    files = {}
    for model in evaluation.models:
        for number, cell in cells:
            eps = eps_text(cell.condition, cell.severity)
            name = names[model.name] + (f"_eps_{eps.replace('/', '_')}" if several else "")
            entry = _entry(evaluation, model, number, cell) | {"unreliable": model.name in doubted}
            path = f"model_info/{entry['dataset']}/{cell.allowance.norm}/{name}.json"
            files[path] = json.dumps(entry, indent=2) + "\n"
    return files


def _entry(evaluation: Evaluation, model: Model, number: int, cell: Cell) -> dict[str, Any]:
    own = [(each, evaluation.outcomes[model.name, i]) for i, each in enumerate(evaluation.cells)]
    clean, outcome = before_attacks(own), evaluation.outcomes[model.name, number]
    right, left = float(at(clean, outcome.index).mean()), float(robust(outcome, clean).mean())
    worst = next((float(kept.mean()) for (_, eps), kept in standing(own).items() if eps == cell.severity), left)
    entry = {
        "link": None, "name": None, "authors": None, "additional_data": None, "number_forward_passes": 1,
        "dataset": dataset_of(evaluation), "venue": "N/A",
        "architecture": model.architecture or type(model.module).__name__,
        "eps": eps_text(cell.condition, cell.severity), "clean_acc": _percent(right),
        "reported": None, "autoattack_acc": _percent(left),
    }  # fmt: skip
    if worst < left:
        entry["external"] = _percent(worst)
    package = f"pyautoattack {versions()['pyautoattack']}" if "pyautoattack" in versions() else "pyautoattack"
    told = f"On {len(outcome.index):,} pictures, standard AutoAttack of {package}."
    if worst < left:
        told += " External: what stands every attack of the report."
    return entry | {"footnote": told}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _names(models: list[str]) -> dict[str, str]:
    """As file names, no two alike, whatever capitals mean to the file system."""
    found, taken = {}, set()
    for model in models:
        name = wanted = re.sub(r"[^A-Za-z0-9.-]+", "_", model).strip("_.") or "model"
        place = 1
        while name.lower() in taken:
            place += 1
            name = f"{wanted}_{place}"
        taken.add(name.lower())
        found[model] = name
    return found
