"""From outcomes to rows."""

import re
from collections.abc import Iterable

import numpy as np

from .asked import BENCHMARK, SEVERITIES
from .calibration import aurra, average_precision, expected_calibration_error, rms_calibration_error
from .cells import Cell, Outcome, told_condition
from .evaluate import Evaluation
from .imagenet_c import (
    ALEXNET,
    corruption_error,
    mean_corrupted_accuracy,
    mean_corruption_error,
    relative_mean_corruption_error,
)
from .labels import real_labels
from .models import Model
from .pictures import Pictures
from .rows import Row
from .sets import corruptions_of

WORST, SANITY, L2 = "worst-case", "sanity-pgd", "-L2"
ALSO_TRANSFER = "-transfer"  # of a worst case: pictures made on other models count, too
BEFORE = "top1_before"  # of the pictures that were attacked, where these are a part
OUTSIDE = "imagenet_o"  # its pictures are of no class


def make_rows(evaluation: Evaluation) -> list[Row]:
    """Every number of the report, model by model."""
    rows = []
    for model in evaluation.models:
        own = answers_of(evaluation, model)
        for cell, outcome in own:
            rows += _cell_rows(model.name, cell, outcome)
        rows += _corruption_rows(model.name, own) + _worst_rows(model.name, own) + _ood_rows(model.name, own)
        if model.num_classes == 1000:
            rows += _real_rows(model.name, own)
    return rows


def answers_of(evaluation: Evaluation, model: Model) -> list[tuple[Cell, Outcome]]:
    """Cell by cell. A transfer attack from the model itself is that attack, and from nowhere."""
    return [
        (cell._replace(source=None) if cell.source == model.name else cell, evaluation.outcomes[model.name, number])
        for number, cell in enumerate(evaluation.cells)
    ]


def robust(outcome: Outcome, clean: Outcome) -> np.ndarray:
    """[N] correct before and after the attack: an image that was wrong already is never robust."""
    return outcome.correct & at(clean, outcome.index)


def told_set(pictures: Pictures) -> str:
    """The set's name, with how many classes count where these are not all."""
    return pictures.name + ("" if pictures.classes is None else f", {pictures.labels_that_count} classes")


def eps_text(condition: str, severity: str) -> str:
    """4/255 in Linf, 0.5 in L2."""
    return severity if condition.endswith(L2) else f"{severity}/255"


def in_five(cell: Cell, outcome: Outcome) -> np.ndarray | None:
    """[N] whether the label is among the five likeliest classes; None where no more than five count."""
    if outcome.five.shape[1] == 0:
        return None
    labels = np.asarray(cell.pictures.labels)[outcome.index]
    return (outcome.five == labels[:, None]).any(axis=1) | outcome.correct  # equal logits: the first is also a fifth


def at(clean: Outcome, index: np.ndarray) -> np.ndarray:
    place = np.full(int(clean.index.max()) + 1, -1)
    place[clean.index] = np.arange(len(clean.index))
    return clean.correct[place[index]]


def clean_of(own: Iterable[tuple[Cell, Outcome]]) -> Outcome | None:
    return next((outcome for cell, outcome in own if cell.kind == "clean"), None)


def before_attacks(own: Iterable[tuple[Cell, Outcome]]) -> Outcome:
    """What the pictures of attacks were before: a plan with attacks has clean pictures."""
    found = clean_of(own)
    assert found is not None
    return found


def _cell_rows(model: str, cell: Cell, outcome: Outcome) -> list[Row]:
    start = (model, cell.pictures.name, told_condition(cell), cell.severity)
    n = len(outcome.correct)
    rows, labelled = [], not cell.pictures.name.startswith(OUTSIDE)
    if labelled and cell.kind != "attack":  # there, robust_top1 says more
        rows.append(Row(*start, "top1", float(outcome.correct.mean()), n))
        if (five := in_five(cell, outcome)) is not None:
            rows.append(Row(*start, "top5", float(five.mean()), n))
        rows.append(Row(*start, "ece", expected_calibration_error(outcome.confidence, outcome.correct), n))
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
    """Means over severities, and over the corruptions of each set of such."""
    rows = []
    for kind in ("published", "regenerated"):
        sets: dict[str, list[tuple[Cell, Outcome]]] = {}
        for cell, outcome in own:
            if cell.kind == kind and cell.severity.isdecimal():
                sets.setdefault(cell.pictures.name, []).append((cell, outcome))
        for dataset, cells in sets.items():
            rows += _set_rows(model, dataset, cells, clean_of(own) if kind == "published" else None, kind)
            rows += _means(model, dataset, cells)
    return rows


def _set_rows(
    model: str, dataset: str, cells: list[tuple[Cell, Outcome]], clean: Outcome | None, kind: str
) -> list[Row]:
    rows, benchmark = [], corruptions_of(dataset)
    errors: dict[str, dict[int, float]] = {}
    counts: dict[str, int] = {}
    for cell, outcome in cells:
        counts[cell.condition] = counts.get(cell.condition, 0) + len(outcome.correct)
        errors.setdefault(cell.condition, {})[int(cell.severity)] = 1.0 - float(outcome.correct.mean())
    start, n = (model, dataset), sum(counts.get(name, 0) for name in benchmark)
    for name, found in errors.items():
        rows.append(Row(*start, name, "mean", "top1", 1.0 - sum(found.values()) / len(found), counts[name]))
        # AlexNet's errors are those of the published pictures
        if kind == "published" and name in ALEXNET and len(found) == len(SEVERITIES):
            rows.append(Row(*start, name, "mean", "ce", corruption_error(found, name) / 100, counts[name]))
    if set(benchmark) <= set(errors) and all(len(errors[name]) == len(SEVERITIES) for name in benchmark):
        whole = (*start, part_of(len(benchmark) * len(SEVERITIES), dataset), "mean")
        rows.append(Row(*whole, "top1", mean_corrupted_accuracy(errors, benchmark), n))
        if kind == "published" and benchmark == BENCHMARK:
            rows.append(Row(*whole, "mce", mean_corruption_error(errors) / 100, n))
            if clean is not None:
                value = relative_mean_corruption_error(errors, 1.0 - float(clean.correct.mean()))
                rows.append(Row(*whole, "relative_mce", value / 100, n))
    elif n:
        known = [error for name in benchmark for error in errors.get(name, {}).values()]
        rows.append(Row(*start, part_of(len(known), dataset), "mean", "top1", 1.0 - sum(known) / len(known), n))
    return rows


def _means(model: str, dataset: str, cells: list[tuple[Cell, Outcome]]) -> list[Row]:
    """Top-5 and calibration error, which each severity has: over those of a corruption, and over all that count."""
    found, benchmark = dict[tuple[str, str], list[Row]](), corruptions_of(dataset)
    for row in (row for cell, outcome in cells for row in _cell_rows(model, cell, outcome)):
        if row.metric in ("top5", "ece"):
            found.setdefault((row.condition, row.metric), []).append(row)
    for metric in ("top5", "ece"):
        if own := [row for (name, kind), rows in found.items() if kind == metric and name in benchmark for row in rows]:
            found[part_of(len(own), dataset), metric] = own
    return [
        Row(model, own[0].dataset, name, "mean", metric, sum(row.value for row in own) / len(own),
            sum(row.n for row in own))
        for (name, metric), own in found.items()
    ]  # fmt: skip


def part_of(count: int, dataset: str) -> str:
    """So many corruptions x severities of those that a set's mean is over; ImageNet-C's four extras never count."""
    whole = len(corruptions_of(dataset))
    each = len(SEVERITIES)
    return f"{whole} corruptions" if count == whole * each else f"{count} of {whole * each} corruptions x severities"


def _worst_rows(model: str, own: list[tuple[Cell, Outcome]]) -> list[Row]:
    """Robust accuracy per attack, and per eps the share that stands every attack made on all images."""
    attacks = [(cell, outcome) for cell, outcome in own if cell.kind == "attack"]
    if not attacks:
        return []
    clean, rows = before_attacks(own), []
    for cell, outcome in attacks:
        kept = robust(outcome, clean)
        start = (model, cell.pictures.name, told_condition(cell), cell.severity)
        rows.append(Row(*start, "robust_top1", float(kept.mean()), len(kept)))
        if len(kept) < len(clean.index):
            rows.append(Row(*start, BEFORE, float(at(clean, outcome.index).mean()), len(kept)))
    for (name, eps), kept in standing(own).items():
        rows.append(Row(model, attacks[0][0].pictures.name, name, eps, "robust_top1", float(kept.mean()), len(kept)))
    return rows


def standing(own: list[tuple[Cell, Outcome]]) -> dict[tuple[str, str], np.ndarray]:
    """(worst-case, eps) -> [N] which images stand every attack; where one was made on all of them.

    Those made on other models count in a worst case of their own: it depends on which models these are, and the plain
    one is the same in every report.
    """
    attacks = [(cell, outcome) for cell, outcome in own if cell.kind == "attack" and cell.condition != SANITY]
    if not attacks:
        return {}
    plain, clean = [(cell, outcome) for cell, outcome in attacks if cell.source is None], before_attacks(own)
    found = _standing(plain, clean, WORST)
    return found if len(plain) == len(attacks) else found | _standing(attacks, clean, WORST + ALSO_TRANSFER)


def _standing(attacks: list[tuple[Cell, Outcome]], clean: Outcome, name: str) -> dict[tuple[str, str], np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for cell, outcome in attacks:
        if cell.order is None:
            kept = robust(outcome, clean)
            found[cell.severity] = found.get(cell.severity, np.ones(len(kept), dtype=bool)) & kept
    for cell, outcome in attacks:  # a query attack counts on its pictures
        if cell.order is not None and cell.severity in found:
            found[cell.severity][np.searchsorted(clean.index, outcome.index)] &= outcome.correct
    before: np.ndarray | bool = True
    ordered: dict[tuple[str, str], np.ndarray] = {}
    for eps, kept in sorted(found.items(), key=lambda item: float(item[0])):
        before = kept & before  # what fell to a smaller eps falls to a larger one
        ordered[name + (L2 if attacks[0][0].condition.endswith(L2) else ""), eps] = before
    return ordered


def _real_rows(model: str, own: list[tuple[Cell, Outcome]]) -> list[Row]:
    """ReaL accuracy, where the clean pictures are ImageNet's validation set by name."""
    for cell, outcome in own:
        if cell.kind != "clean":
            continue
        names = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem) for path in cell.pictures.paths]
        numbers, known = [int(name[1]) for name in names if name], real_labels()
        if not numbers or len(numbers) < len(names):
            return []
        if not 1 <= min(numbers) <= max(numbers) <= len(known):
            return []
        sets, start = [known[numbers[i] - 1] for i in outcome.index], (model, cell.pictures.name, "real labels", "")
        answers = {"top1": outcome.predicted[:, None], "top5": np.c_[outcome.predicted, outcome.five]}
        scored = {
            metric: [bool(set(given) & set(s)) for given, s in zip(found.tolist(), sets, strict=True) if s]
            for metric, found in answers.items()
        }
        return [Row(*start, metric, sum(found) / len(found), len(found)) for metric, found in scored.items() if found]
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
