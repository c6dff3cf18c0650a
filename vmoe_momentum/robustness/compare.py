"""The comparison: labels side by side on the same images, line by line."""

from typing import NamedTuple

import numpy as np

from .asked import BENCHMARK, SEVERITIES
from .bootstrap import GroupDifference, Interval, group_difference, mean_interval
from .cells import Cell, Outcome
from .evaluate import Evaluation
from .imagenet_c import ALEXNET
from .sets import corruptions_of
from .summary import OUTSIDE, SANITY, answers_of, before_attacks, eps_text, part_of, robust, standing, told_set

# an image that is wrong under everything has this share in mCE
LARGEST_MCE = sum(1 / ALEXNET[name] for name in BENCHMARK) / len(BENCHMARK)


class Comparison(NamedTuple):
    """One line of the comparison table. Shares: 0.5 is 50 %."""

    what: str
    metric: str  # top1, higher is better; mce, lower is better
    groups: dict[str, Interval]  # label -> mean over its models, interval over images
    seeds: dict[str, float | None]  # label -> standard deviation over its models; None for one
    differences: dict[str, GroupDifference]  # label -> it minus the first label
    n: int  # pictures

    @property
    def best(self) -> float:
        return (min if self.metric == "mce" else max)(interval.value for interval in self.groups.values())


def compare(evaluation: Evaluation) -> list[Comparison]:
    """Accuracy of each label, condition by condition; corruptions and severities together, and one line each eps.

    And mCE, where the published corruptions are complete, and what stands all attacks.
    """
    lines: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for model in evaluation.models:
        for key, outcomes in _outcomes_by_line(answers_of(evaluation, model)).items():
            lines.setdefault(key, {}).setdefault(model.label, []).append(outcomes)
    found = []
    for (what, metric), groups in lines.items():
        stacked = {label: np.stack(outcomes) for label, outcomes in groups.items()}
        first, top = next(iter(stacked.values())), LARGEST_MCE if metric == "mce" else 1.0
        spread = {k: float(v.mean(axis=1).std(ddof=1)) if len(v) > 1 else None for k, v in stacked.items()}
        rest = list(stacked.items())[1:]
        differences = {label: group_difference(first, group, largest=top) for label, group in rest}
        means = {label: mean_interval(group, largest=top) for label, group in stacked.items()}
        found.append(Comparison(what, metric, means, spread, differences, first.shape[1]))
    return found


def _outcomes_by_line(own: list[tuple[Cell, Outcome]]) -> dict[tuple[str, str], np.ndarray]:
    """(what, metric) -> one number an image."""
    lines: dict[str, np.ndarray] = {}
    corrupted: dict[str, list[np.ndarray]] = {}  # by set
    errors: dict[str, list[np.ndarray]] = {}
    for cell, outcome in own:
        name = cell.pictures.name
        if name.startswith(OUTSIDE) or cell.condition == SANITY or cell.source is not None:
            continue  # what comes from another model has a table of its own
        if cell.severity.isdecimal() and cell.kind in ("published", "regenerated"):
            if cell.condition in corruptions_of(name):
                corrupted.setdefault(name, []).append(outcome.correct)
                if cell.kind == "published" and cell.condition in BENCHMARK:
                    errors.setdefault(name, []).append((1.0 - outcome.correct) / ALEXNET[cell.condition])
        elif cell.kind == "attack":
            kept = robust(outcome, before_attacks(own))
            lines[f"{cell.condition}, eps {eps_text(cell.condition, cell.severity)}"] = kept
        elif cell.kind == "noise":
            lines[f"{cell.condition}, eps {eps_text(cell.condition, cell.severity)}"] = outcome.correct
        else:
            lines[told_set(cell.pictures)] = outcome.correct
    lines |= {f"{name}, eps {eps_text(name, eps)}": kept for (name, eps), kept in standing(own).items()}
    lines |= {
        f"{name}, mean of {part_of(len(parts), name)}": np.mean(parts, axis=0) for name, parts in corrupted.items()
    }
    found = {(what, "top1"): values.astype(float) for what, values in lines.items()}
    whole = len(BENCHMARK) * len(SEVERITIES)  # mCE is linear in the images: the mean of their shares in it
    return found | {
        (f"mCE of {name}, lower is better", "mce"): np.mean(parts, axis=0)
        for name, parts in errors.items() if len(parts) == whole
    }  # fmt: skip
