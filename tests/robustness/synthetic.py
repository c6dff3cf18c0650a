"""Evaluations with random answers, for what is drawn and printed of them. No model is run."""

from pathlib import Path

import numpy as np
import torch
from planted import planted

from vmoe_momentum.robustness import BENCHMARK, Evaluation
from vmoe_momentum.robustness.attacks import ATTACKS, Budget
from vmoe_momentum.robustness.cells import Cell, Outcome
from vmoe_momentum.robustness.pictures import Pictures

PICTURE = Path(__file__).parent.parent / "oracles" / "corruptions" / "input.png"
COUNT, PART = 60, (3, 8, 21, 40, 55)


def pictures(name: str, classes: list[int] | None = None, whole: bool = False) -> Pictures:
    return Pictures(name, [PICTURE] * COUNT, [0] * COUNT, classes, whole)


def attack_cell(
    name: str, condition: str, eps: float, norm: str = "Linf", order: tuple[int, ...] | None = None
) -> Cell:
    size, severity = (eps / 255, f"{eps:g}") if norm == "Linf" else (eps, f"{eps:g}")
    suffix = "" if norm == "Linf" else "-L2"
    return Cell(
        pictures("data"), "attack" if name in ATTACKS else "noise", condition + suffix, severity,
        attack=name if name in ATTACKS else None, budget=Budget(size, norm), order=order,
    )  # fmt: skip


def cells(*parts: str, norm: str = "Linf") -> list[Cell]:
    """parts: of sets, regenerated, published, attacks."""
    few = list(range(200))
    found = [Cell(pictures("data"), "clean", "clean")]
    if "regenerated" in parts:
        own = pictures("data (regenerated)")
        names = ("fog", "contrast", "spatter")
        found += [Cell(own, "regenerated", name, str(level)) for name in names for level in (1, 3, 5)]
    if "attacks" in parts:
        budgets = (4, 1, 2) if norm == "Linf" else (2.0, 0.5, 1.0)
        found += [attack_cell("uniform-noise", "uniform-noise", eps, norm) for eps in budgets]
        for name, condition, order in (("fgsm", "fgsm", None), ("pgd", "pgd-20", None), ("square", "square-9q", PART)):
            found += [attack_cell(name, condition, eps, norm, order) for eps in budgets]
        found.append(attack_cell("pgd-margin", "sanity-pgd", 64, order=PART))
    if "published" in parts:
        own = pictures("imagenet_c (60 of 50,000)", whole=True)
        found += [Cell(own, "published", name, str(level)) for name in BENCHMARK for level in range(1, 6)]
    if "sets" in parts:
        for name in ("imagenet_a", "imagenet_r", "imagenet_o"):
            found.append(Cell(pictures(name, few), "published", "shifted"))
            found.append(Cell(pictures(f"data on {name}'s classes", few), "published", "clean"))
    return found


def evaluation(made: list[Cell], labels: list[str], dense: tuple[str, ...] = ()) -> Evaluation:
    """labels: of the models; a label again is a group. dense: labels of models without routers."""
    names = [f"{label}#{place}" if labels.count(label) > 1 else label for place, label in enumerate(labels)]
    rng, outcomes, models = np.random.default_rng(0), {}, []
    for label, name in zip(labels, names, strict=True):
        models.append(planted(label, num_classes=10)._replace(name=name))
        for number, cell in enumerate(made):
            index = np.arange(COUNT) if cell.order is None else np.array(cell.order)
            right = rng.uniform(size=len(index)) < rng.uniform(0.1, 0.9)
            blocks = [] if label in dense or cell.kind == "published" else ["block1", "block3"]
            routing = {block: rng.uniform(size=len(index)) for block in blocks}
            zero = np.zeros(len(index) if cell.kind == "attack" else 0, dtype=bool)
            predicted, confidence = 1 - right.astype(int), rng.uniform(size=len(index))  # all are of class 0
            rest = np.where(rng.uniform(size=(len(index), 1)) < 0.5, [[0, 2, 3, 4]], [[2, 3, 4, 5]])
            five = np.c_[predicted, np.where(right[:, None], [[1, 2, 3, 4]], rest)]
            outcomes[name, number] = Outcome(index, right, predicted, confidence, routing, zero, five)
    examples = {i: torch.full((6, 3, 8, 8), i, dtype=torch.uint8) for i in range(len(made))}
    return Evaluation(made, models, outcomes, examples)
