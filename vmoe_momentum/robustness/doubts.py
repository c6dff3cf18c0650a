"""Warnings: signs of masked gradients, and of numbers that do not fit together (Carlini et al., arXiv:1902.06705)."""

import re

import numpy as np

from ..pictures import picture_size
from .asked import BENCHMARK, SEVERITIES
from .cells import Cell, Outcome, told_condition
from .evaluate import Evaluation
from .rows import Row
from .sets import set_of
from .summary import SANITY, answers_of, eps_text, robust

_ITERATED = ("pgd", "pgd-margin", "pma", "apgd", "apgd-dlr", "apgd-t", "malt", "autoattack")
# what must not leave fewer images standing than those after it, at the same eps
WEAKER = {
    "uniform-noise": ("fgsm", *_ITERATED, "pgd-routing", "fab", "mi-fgsm"),
    "fgsm": ("pgd", "pma", "apgd", "apgd-t", "malt", "autoattack"),
    "square": _ITERATED,
    "spsa": _ITERATED,
}


def warnings_of(evaluation: Evaluation, rows: list[Row]) -> list[str]:
    """What to read before anything else."""
    return doubts(evaluation, rows) + _of_the_sets(evaluation)


def doubts(evaluation: Evaluation, rows: list[Row]) -> list[str]:
    """Of its models: whether they are as robust as it looks."""
    found = []
    for model in evaluation.models:
        if model.random:
            found.append(
                f"{model.name}: answers at random; its numbers are of one draw a picture, and another --seed or "
                "--batch_size draws others"
            )
        elif model.coupled:
            found.append(
                f"{model.name}: its answers depend on what else is in the batch (expert capacity over several images): "
                "another order or batch size gives other numbers, and attacks on part of the images other ones again"
            )
        clean = evaluation.outcomes[model.name, 0]
        shares = [r.value for r in rows if (r.model, r.metric) == (model.name, "zero_gradient")]
        if shares and max(shares) > 0.01:
            found.append(
                f"{model.name}: {100 * max(shares):.0f} % of images have no gradient of the cross-entropy at the clean "
                "picture; attacks that follow it cannot see them, so trust square and spsa"
            )
        own = [(cell, o) for cell, o in answers_of(evaluation, model) if cell.kind in ("attack", "noise")]
        found += _transferred(model.name, own, clean)
        cells = {(cell.condition, cell.severity): outcome for cell, outcome in own if cell.source is None}
        for (condition, eps), outcome in cells.items():
            for stronger in WEAKER.get(_kind(condition), ()):
                base = next((c for c, e in cells if e == eps and _kind(c) == stronger), None)
                if base is None:
                    continue
                other = cells[base, eps]
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
    return list(dict.fromkeys(found))


def _transferred(name: str, own: list[tuple[Cell, Outcome]], clean: Outcome) -> list[str]:
    """Of each attack and eps: whether pictures made on another model hurt more than any made on this one."""
    found = []
    for attack, eps in dict.fromkeys((cell.condition, cell.severity) for cell, _ in own if cell.source):
        knowing = (_kind(attack), *WEAKER["square"])
        here = [(cell, float(robust(o, clean).mean())) for cell, o in own if cell.attack and cell.severity == eps]
        others = {told_condition(cell): share for cell, share in here if cell.source and cell.condition == attack}
        itself = {c.condition: share for c, share in here if not c.source and _kind(c.condition) in knowing}
        told, best = (min(shares, key=shares.__getitem__) for shares in (others, itself))
        share, least = others[told], itself[best]
        if share < least - 0.002 - 1e-9:
            found.append(
                f"{name}, eps {eps_text(attack, eps)}: {told} leaves {100 * share:.1f} % where {best}, by its own "
                f"gradients, leaves {100 * least:.1f} %; its gradients may be masked"
            )
    return found


def _kind(condition: str) -> str:
    """pgd-margin of pgd-margin-20-rs-r5-eot4-router-L2."""
    return re.sub(r"(-\d+q?)?(-rs)?(-r\d+)?(-eot\d+)?(-router)?(-L2)?$", "", condition)


def _of_the_sets(evaluation: Evaluation) -> list[str]:
    """What keeps means, CE and mCE from being the published ones."""
    sets: dict[str, list[Cell]] = {}
    for cell in evaluation.cells:
        if cell.pictures.whole:
            sets.setdefault(cell.pictures.name, []).append(cell)
    return [line for name, cells in sets.items() for line in _of_a_set(name, cells)]


def _of_a_set(name: str, cells: list[Cell]) -> list[str]:
    found, own = [], set_of(name)
    if cells[0].pictures.made:
        return [f"{name}: {cells[0].pictures.made}; no CE and no mCE, which are of those"]
    assert own is not None  # regenerated and published sets alone are whole
    mean = {True: "CE and mCE", False: "numbers"}[own.corruptions == BENCHMARK]
    size = picture_size(cells[0].pictures.paths[0])
    if size != (224, 224):
        found.append(
            f"{name}: pictures of {size[0]} x {size[1]} pixels where {own.title} has 224 x 224; they are squeezed "
            f"into the models' inputs, and {mean} are not comparable"
        )
    whole, count = len(own.corruptions) * len(SEVERITIES), sum(each.condition in own.corruptions for each in cells)
    if count < whole:
        told = "no mCE: it" if own.corruptions == BENCHMARK else f"not {own.title}'s mean: that"
        found.append(f"{name}: {told} is the mean over {whole} corruptions x severities, here are {count}")
    elif " of " in name:
        found.append(
            f"{name}: a part of the published pictures; {mean} are this part's, not to be put beside published ones"
        )
    return found
