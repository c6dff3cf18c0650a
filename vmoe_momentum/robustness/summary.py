"""From outcomes to rows, group comparisons and warnings."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from .bootstrap import GroupDifference, Interval, group_difference, mean_interval
from .calibration import aurra, average_precision, rms_calibration_error
from .cells import Cell, Outcome
from .corruptions import BENCHMARK, SEVERITIES
from .evaluate import Evaluation
from .imagenet_c import (
    corruption_error,
    mean_corrupted_accuracy,
    mean_corruption_error,
    relative_mean_corruption_error,
)
from .labels import real_labels
from .rows import Row

WORST, SANITY, L2 = "worst-case", "sanity-pgd", "-L2"
OUTSIDE = "imagenet_o"  # its pictures are of no class


def make_rows(evaluation: Evaluation) -> list[Row]:
    """Every number of the report, model by model."""
    rows = []
    for model in evaluation.models:
        own = [(cell, evaluation.outcomes[model.name, i]) for i, cell in enumerate(evaluation.cells)]
        for cell, outcome in own:
            rows += _cell_rows(model.name, cell, outcome)
        rows += _corruption_rows(model.name, own) + _worst_rows(model.name, own) + _ood_rows(model.name, own)
        if model.num_classes == 1000:
            rows += _real_rows(model.name, own)
    return rows


def robust(outcome: Outcome, clean: Outcome) -> np.ndarray:
    """[N] correct before and after the attack: an image that was wrong already is never robust."""
    return outcome.correct & _at(clean, outcome.index)


def eps_text(condition: str, severity: str) -> str:
    """4/255 in Linf, 0.5 in L2."""
    return severity if condition.endswith(L2) else f"{severity}/255"


def _at(clean: Outcome, index: np.ndarray) -> np.ndarray:
    place = np.full(int(clean.index.max()) + 1, -1)
    place[clean.index] = np.arange(len(clean.index))
    return clean.correct[place[index]]


def _clean(own: Iterable[tuple[Cell, Outcome]]) -> Outcome | None:
    return next((outcome for cell, outcome in own if cell.kind == "clean"), None)


def _cell_rows(model: str, cell: Cell, outcome: Outcome) -> list[Row]:
    start = (model, cell.pictures.name, cell.condition, cell.severity)
    n = len(outcome.correct)
    rows, labelled = [], not cell.pictures.name.startswith(OUTSIDE)
    if labelled and cell.kind != "attack":  # there, robust_top1 says more
        rows.append(Row(*start, "top1", float(outcome.correct.mean()), n))
    if labelled and cell.kind in ("clean", "published") and cell.severity == "":
        confidence, correct = outcome.confidence, outcome.correct
        rows.append(Row(*start, "rms_calibration_error", rms_calibration_error(confidence, correct), n))
        rows.append(Row(*start, "aurra", aurra(confidence, correct), n))
    for block, change in outcome.routing.items():
        rows.append(Row(*start, f"routing_change/{block}", float(change.mean()), n))
    if len(outcome.zero_gradient):
        rows.append(Row(*start, "zero_gradient", float(outcome.zero_gradient.mean()), n))
    return rows


def _corruption_rows(model: str, own: list[tuple[Cell, Outcome]]) -> list[Row]:
    rows = []
    for kind in ("published", "regenerated"):
        cells = [(cell, o) for cell, o in own if cell.kind == kind and cell.severity.isdecimal()]
        errors: dict[str, dict[int, float]] = {}
        counts: dict[str, int] = {}
        for cell, outcome in cells:
            counts[cell.condition] = counts.get(cell.condition, 0) + len(outcome.correct)
            errors.setdefault(cell.condition, {})[int(cell.severity)] = 1.0 - float(outcome.correct.mean())
        if not errors:
            continue
        start, n = (model, cells[0][0].pictures.name), sum(counts.get(name, 0) for name in BENCHMARK)
        for name, found in errors.items():
            rows.append(Row(*start, name, "mean", "top1", 1.0 - sum(found.values()) / len(found), counts[name]))
            if kind == "published" and len(found) == len(SEVERITIES):
                rows.append(Row(*start, name, "mean", "ce", corruption_error(found, name), counts[name]))
        if set(BENCHMARK) <= set(errors) and all(len(errors[name]) == len(SEVERITIES) for name in BENCHMARK):
            rows.append(Row(*start, "15 corruptions", "mean", "top1", mean_corrupted_accuracy(errors), n))
            if kind == "published":  # AlexNet's errors are those of the published pictures
                rows.append(Row(*start, "15 corruptions", "mean", "mce", mean_corruption_error(errors), n))
                clean = _clean(own)
                if clean is not None:
                    value = relative_mean_corruption_error(errors, 1.0 - float(clean.correct.mean()))
                    rows.append(Row(*start, "15 corruptions", "mean", "relative_mce", value, n))
        elif n:
            known = [error for name in BENCHMARK for error in errors.get(name, {}).values()]
            rows.append(Row(*start, part_of_75(len(known)), "mean", "top1", 1.0 - sum(known) / len(known), n))
    return rows


def part_of_75(count: int) -> str:
    """Conditions of the benchmark; the four extras never count."""
    return "15 corruptions" if count == 75 else f"{count} of 75 corruptions x severities"


def _worst_rows(model: str, own: list[tuple[Cell, Outcome]]) -> list[Row]:
    """Robust accuracy per attack, and per eps the share that stands every attack made on all images."""
    clean, rows = _clean(own), []
    attacks = [(cell, outcome) for cell, outcome in own if cell.kind == "attack"]
    standing: dict[str, np.ndarray] = {}
    for cell, outcome in attacks:
        kept = robust(outcome, clean)
        start = (model, cell.pictures.name, cell.condition, cell.severity)
        rows.append(Row(*start, "robust_top1", float(kept.mean()), len(kept)))
        if cell.condition != SANITY and cell.order is None:
            standing[cell.severity] = standing.get(cell.severity, np.ones(len(kept), dtype=bool)) & kept
    for cell, outcome in attacks:  # a query attack counts on its pictures
        if cell.condition != SANITY and cell.order is not None and cell.severity in standing:
            places = np.searchsorted(clean.index, outcome.index)
            standing[cell.severity][places] &= outcome.correct
    before = None
    for eps, kept in sorted(standing.items(), key=lambda item: float(item[0])):
        if before is not None:  # what fell to a smaller eps falls to a larger one
            kept &= before
        before = kept
        name = WORST + (L2 if attacks[0][0].condition.endswith(L2) else "")
        rows.append(Row(model, attacks[0][0].pictures.name, name, eps, "robust_top1", float(kept.mean()), len(kept)))
    return rows


def _real_rows(model: str, own: list[tuple[Cell, Outcome]]) -> list[Row]:
    """ReaL accuracy, where the clean pictures are ImageNet's validation set by name."""
    for cell, outcome in own:
        if cell.kind != "clean":
            continue
        names = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem) for path in cell.pictures.paths]
        if not names or not all(names):
            return []
        numbers, known = [int(name[1]) for name in names], real_labels()
        if not 1 <= min(numbers) <= max(numbers) <= len(known):
            return []
        sets = [known[numbers[i] - 1] for i in outcome.index]
        scored = [int(p) in s for p, s in zip(outcome.predicted, sets, strict=True) if s]
        if scored:
            return [Row(model, cell.pictures.name, "real labels", "", "top1", sum(scored) / len(scored), len(scored))]
    return []


def _ood_rows(model: str, own: list[tuple[Cell, Outcome]]) -> list[Row]:
    """ImageNet-O: how well low confidence finds the pictures of no class."""
    name, outside = next(((c.pictures.name, o) for c, o in own if c.pictures.name.startswith(OUTSIDE)), ("", None))
    inside = next((o for c, o in own if c.pictures.name == f"data on {OUTSIDE}'s classes"), None)
    if outside is None or inside is None:
        return []
    positive = np.r_[np.ones(len(outside.confidence)), np.zeros(len(inside.confidence))]
    value = average_precision(positive, -np.r_[outside.confidence, inside.confidence])
    return [Row(model, name, "shifted", "", "aupr", value, len(positive))]


class Comparison(NamedTuple):
    """One line of the comparison table."""

    what: str
    groups: dict[str, Interval]  # label -> mean over its models, interval over images
    seeds: dict[str, float | None]  # label -> standard deviation over its models; None for one
    differences: dict[str, GroupDifference]  # label -> it minus the first label
    n: int  # pictures


def compare(evaluation: Evaluation) -> list[Comparison]:
    """Accuracy of each label, condition by condition; corruptions and severities together, and one line each eps."""
    lines: dict[str, dict[str, list[np.ndarray]]] = {}
    for model in evaluation.models:
        own = [(cell, evaluation.outcomes[model.name, i]) for i, cell in enumerate(evaluation.cells)]
        for what, outcomes in _outcomes_by_line(own).items():
            lines.setdefault(what, {}).setdefault(model.label, []).append(outcomes)
    found = []
    for what, groups in lines.items():
        stacked = {label: np.stack(outcomes) for label, outcomes in groups.items()}
        first = next(iter(stacked.values()))
        spread = {k: float(v.mean(axis=1).std(ddof=1)) if len(v) > 1 else None for k, v in stacked.items()}
        differences = {label: group_difference(first, group) for label, group in list(stacked.items())[1:]}
        means = {label: mean_interval(group) for label, group in stacked.items()}
        found.append(Comparison(what, means, spread, differences, first.shape[1]))
    return found


def _outcomes_by_line(own: list[tuple[Cell, Outcome]]) -> dict[str, np.ndarray]:
    """What -> one number in [0, 1] an image."""
    clean, lines, corrupted = _clean(own), {}, {}
    for cell, outcome in own:
        if cell.pictures.name.startswith(OUTSIDE) or cell.condition == SANITY:
            continue
        if cell.severity.isdecimal() and cell.kind in ("published", "regenerated"):
            if cell.condition in BENCHMARK:
                corrupted.setdefault(cell.pictures.name, []).append(outcome.correct)
        elif cell.kind == "attack":
            lines[f"{cell.condition}, eps {eps_text(cell.condition, cell.severity)}"] = robust(outcome, clean)
        elif cell.kind == "noise":
            lines[f"{cell.condition}, eps {eps_text(cell.condition, cell.severity)}"] = outcome.correct
        else:
            lines[cell.pictures.name] = outcome.correct
    averages = {
        f"{name}, mean of {part_of_75(len(parts))}": np.mean(parts, axis=0) for name, parts in corrupted.items()
    }
    return {name: values.astype(float) for name, values in (lines | averages).items()}


# what must not leave fewer images standing than those after it, at the same eps
WEAKER = {
    "uniform-noise": ("fgsm", "pgd", "pgd-margin", "apgd", "apgd-dlr", "autoattack"),
    "fgsm": ("pgd", "apgd", "autoattack"),
    "square": ("pgd", "pgd-margin", "apgd", "apgd-dlr", "autoattack"),
    "spsa": ("pgd", "pgd-margin", "apgd", "apgd-dlr", "autoattack"),
}


def warnings_of(evaluation: Evaluation, rows: list[Row]) -> list[str]:
    """Signs of masked gradients, and of numbers that do not fit together (Carlini et al., arXiv:1902.06705)."""
    found = []
    cells = {(c.condition, c.severity): i for i, c in enumerate(evaluation.cells) if c.kind in ("attack", "noise")}
    for model in evaluation.models:
        if model.coupled:
            found.append(
                f"{model.name}: its answers depend on what else is in the batch (expert capacity over several images): "
                "another order or batch size gives other numbers, and attacks on part of the images other ones again"
            )
        clean = evaluation.outcomes.get((model.name, 0))
        shares = [r.value for r in rows if (r.model, r.metric) == (model.name, "zero_gradient")]
        if shares and max(shares) > 0.01:
            found.append(
                f"{model.name}: {100 * max(shares):.0f} % of images have no gradient of the cross-entropy at the clean "
                "picture; attacks that follow it cannot see them, so trust square and spsa"
            )
        for (condition, eps), number in cells.items():
            for stronger in WEAKER.get(_kind(condition), ()):
                base = next((c for c, e in cells if e == eps and _kind(c) == stronger), None)
                if base is None:
                    continue
                outcome, other = (evaluation.outcomes[model.name, i] for i in (number, cells[base, eps]))
                both = np.intersect1d(outcome.index, other.index)
                mine, theirs = (robust(o, clean)[np.isin(o.index, both)].mean() for o in (outcome, other))
                if mine < theirs - 0.002 - 1e-9:
                    found.append(
                        f"{model.name}, eps {eps_text(condition, eps)}: {condition} leaves {100 * mine:.1f} % "
                        f"where the stronger {base} leaves {100 * theirs:.1f} %; its gradients may be masked"
                    )
        for row in rows:
            if (row.model, row.condition, row.metric) == (model.name, SANITY, "robust_top1") and row.value > 0.05:
                found.append(
                    f"{model.name}: {100 * row.value:.0f} % still right under PGD at eps {row.severity_or_eps}/255, "
                    "where nothing should be; its gradients may be masked"
                )
    return list(dict.fromkeys(found)) + _of_the_sets(evaluation)


def _kind(condition: str) -> str:
    """pgd-margin of pgd-margin-20-router-L2."""
    return re.sub(r"(-\d+q?)?(-router)?(-L2)?$", "", condition)


def _of_the_sets(evaluation: Evaluation) -> list[str]:
    """Published pictures of ImageNet-C that have another size than the published ones."""
    for cell in evaluation.cells:
        if cell.pictures.whole:
            with Image.open(cell.pictures.paths[0]) as picture:
                size = picture.size
            if size != (224, 224):
                told = f"{cell.pictures.name}: pictures of {size[0]} x {size[1]} pixels where ImageNet-C has 224 x 224"
                return [f"{told}; they are squeezed into the models' inputs, and CE and mCE are not comparable"]
    return []
