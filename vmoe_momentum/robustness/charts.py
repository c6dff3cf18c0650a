"""Pictures of a report: bars a corruption, accuracy over severity and over eps, examples."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .cells import FROM
from .evaluate import Evaluation
from .rows import Row
from .sets import corruptions_of, named_corruptions
from .summary import BEFORE, L2, SANITY, WORST, eps_text
from .transfer import ITSELF, Transfers, transfers


def draw(evaluation: Evaluation, rows: list[Row]) -> dict[str, Figure]:
    """By name, those for which there are rows."""
    labels = {model.name: model.label for model in evaluation.models}
    colors = _colors(list(dict.fromkeys(labels.values())))
    found = {}
    for dataset in dict.fromkeys(cell.pictures.name for cell in evaluation.cells if cell.severity and not cell.attack):
        own = [row for row in rows if row.dataset == dataset and row.metric == "top1"]
        if any(row.condition in named_corruptions() for row in own):
            found[f"corruptions, {dataset}"] = _bars(own, labels, colors)
        benchmark = [row for row in own if row.condition in corruptions_of(dataset)]
        if benchmark:
            found[f"severity, {dataset}"] = _curves(benchmark, labels, colors)
    own = [row for row in rows if row.condition != SANITY and FROM not in row.condition]
    attacks = [row for row in own if row.metric == "robust_top1"]
    if attacks:
        found["attacks"] = _eps(attacks, rows, labels, colors)
    if transfer := transfers(rows, labels):
        found["transfer"] = _transfer(transfer, list(colors))
    routing = [row for row in own if row.metric.startswith("routing_change/")]
    if routing:
        found["routing"] = _routing(routing, labels, colors)
    if evaluation.examples:
        found["examples"] = _examples(evaluation)
    return found


def _colors(labels: list[str]) -> dict[str, Any]:
    """Ten easy to tell apart; with more models, all of them off one scale."""
    if len(labels) <= 10:
        return {label: f"C{i}" for i, label in enumerate(labels)}
    return {label: colormaps["turbo"](i / (len(labels) - 1)) for i, label in enumerate(labels)}


def _columns(labels: Iterable[str], figure: Figure) -> int:
    """Of a legend above the axes: a wider one leaves them no room. An inch has about 13 letters of size 8."""
    room = 13 * figure.get_figwidth() / (max(map(len, labels)) + 6)
    return max(1, int(room))


def _mean(rows: list[Row]) -> float:
    return float(np.mean([row.value for row in rows])) if rows else float("nan")


def _bars(rows: list[Row], labels: dict[str, str], colors: dict[str, str]) -> Figure:
    names = [name for name in named_corruptions() if any(row.condition == name for row in rows)]
    figure = Figure(figsize=(max(6, 0.75 * len(names) + 2), 3.6), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(colors)
    for place, (label, color) in enumerate(colors.items()):
        heights = [
            100 * _mean([r for r in rows if (labels[r.model], r.condition, r.severity_or_eps) == (label, name, "mean")])
            for name in names
        ]
        axis.bar(np.arange(len(names)) + (place + 0.5) * width - 0.4, heights, width, color=color, label=label)
    axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=7)
    axis.set(ylabel="top-1 (%), mean over severities", ylim=(0, 100))
    axis.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=_columns(colors, figure), frameon=False
    )
    return figure


def _curves(rows: list[Row], labels: dict[str, str], colors: dict[str, str]) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    levels = sorted({row.severity_or_eps for row in rows if row.severity_or_eps.isdecimal()})
    for label, color in colors.items():
        own = [row for row in rows if labels[row.model] == label]
        each = [[100 * r.value for r in own if r.severity_or_eps == level] for level in levels]
        axis.plot([int(level) for level in levels], [np.mean(v) for v in each], marker="o", color=color, label=label)
    axis.set(xlabel="severity", ylabel="top-1 (%), mean over corruptions", ylim=(0, 101))
    axis.set_xticks([int(level) for level in levels])
    axis.legend(fontsize=8)
    return figure


def _eps(attacks: list[Row], rows: list[Row], labels: dict[str, str], colors: dict[str, str]) -> Figure:
    """A panel an attack, three in a line; eps 0 is the accuracy before it, on the pictures that it attacked."""
    conditions = sorted({row.condition for row in attacks}, key=lambda name: (name.startswith(WORST), name))
    across, down = min(3, len(conditions)), -(-len(conditions) // 3)
    figure = Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axis in axes[len(conditions) :]:
        axis.set_axis_off()
    for axis, condition in zip(axes, conditions, strict=False):
        for label, color in colors.items():
            own = [r for r in attacks if labels[r.model] == label and r.condition == condition]
            clean = _mean([r for r in rows if labels[r.model] == label and _before(r, own[0])])
            sizes = sorted({float(row.severity_or_eps) for row in own})
            values = [_mean([r for r in own if float(r.severity_or_eps) == size]) for size in sizes]
            axis.plot([0, *sizes], [100 * v for v in (clean, *values)], marker="o", color=color, label=label)
        axis.set(title=condition, xlabel="eps" if condition.endswith(L2) else "eps, of 255", ylim=(0, 101))
    for axis in axes[::across]:
        axis.set_ylabel("robust top-1 (%)")
    axes[0].legend(fontsize=8)
    return figure


def _transfer(found: Transfers, labels: list[str]) -> Figure:
    """A line an attack, a panel an eps: which model pictures were made on, downwards, and which stands them."""
    attacks = list(dict.fromkeys(attack for attack, _ in found))
    sizes = sorted({eps for _, eps in found}, key=float)
    side = 1.6 + 0.45 * len(labels)
    figure = Figure(figsize=(side * len(sizes) + 1.0, side * len(attacks)), layout="constrained")
    axes = figure.subplots(len(attacks), len(sizes), squeeze=False, sharex=True, sharey=True)
    for line, attack in enumerate(attacks):
        for axis, eps in zip(axes[line], sizes, strict=True):
            shares = found[attack, eps]
            values = np.array([
                [100 * np.mean(shares.get((source, target), np.nan)) for target in labels]
                for source in (ITSELF, *labels)
            ])  # fmt: skip
            axis.imshow(values, cmap="viridis", vmin=0, vmax=100)
            for (down, across), value in np.ndenumerate(values):
                told, tone = "" if np.isnan(value) else f"{value:.0f}", "black" if value > 60 else "white"
                axis.text(across, down, told, ha="center", va="center", color=tone, fontsize=7)
            axis.set_title(f"{attack}, eps {eps_text(attack, eps)}", fontsize=8)
            axis.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45, ha="right")
            axis.set_yticks(range(len(labels) + 1), (ITSELF, *labels), fontsize=7)
        axes[line][0].set_ylabel("made on", fontsize=8)
    return figure


def _before(row: Row, attacked: Row) -> bool:
    """Whether it says how good the model was before the attack. Other sets have clean rows, too."""
    if row.dataset != attacked.dataset:
        return False
    if row.metric == BEFORE:
        return row.condition == attacked.condition
    return (row.condition, row.metric, row.n) == ("clean", "top1", attacked.n)


def _routing(rows: list[Row], labels: dict[str, str], colors: dict[str, str]) -> Figure:
    """Mean over blocks and severities or eps; models without MoE blocks are not in it."""
    colors = {label: colors[label] for label in dict.fromkeys(labels[row.model] for row in rows)}
    kinds = list(dict.fromkeys(row.condition for row in rows))
    figure = Figure(figsize=(7, 0.8 + 0.24 * len(kinds) * len(colors)), layout="constrained")
    axis, height = figure.subplots(), 0.8 / len(colors)
    for place, (label, color) in enumerate(colors.items()):
        own = [row for row in rows if labels[row.model] == label]
        means = [[r.value for r in own if r.condition == kind] for kind in kinds]
        at = np.arange(len(kinds)) + (place + 0.5) * height - 0.4
        axis.barh(at, [float(np.mean(v)) if v else np.nan for v in means], height, color=color, label=label)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="routing change, 1 - IoU of expert sets, mean over MoE blocks", xlim=(0, None))
    axis.legend(fontsize=8)
    return figure


def _examples(evaluation: Evaluation) -> Figure:
    """The first pictures of each condition, severity 3 or the middle eps, as the first model saw them."""
    chosen: dict[str, list[int]] = {}
    for number, cell in enumerate(evaluation.cells):
        own = cell.source in (None, evaluation.models[0].name)
        if number in evaluation.examples and cell.condition != SANITY and own:
            chosen.setdefault(f"{cell.pictures.name}: {cell.condition}", []).append(number)
    for numbers in chosen.values():  # budgets come in any order
        numbers.sort(key=lambda number: float(evaluation.cells[number].severity or 0))
    lines = [(what, numbers[len(numbers) // 2]) for what, numbers in chosen.items()]
    side = max(evaluation.examples[number].shape[-1] for _, number in lines)
    sheet = np.full((len(lines) * (side + 1), 6 * (side + 1), 3), 255, dtype=np.uint8)
    for line, (_, number) in enumerate(lines):
        for place, picture in enumerate(evaluation.examples[number][:6]):
            top, left = line * (side + 1), place * (side + 1)
            sheet[top : top + side, left : left + side] = picture.permute(1, 2, 0).numpy()
    figure = Figure(figsize=(8.5, 0.85 * len(lines) + 0.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest", aspect="equal")
    axis.set_xticks([])
    middles = [line * (side + 1) + side / 2 for line in range(len(lines))]
    told = [f"{what.replace(': ', chr(10))} {evaluation.cells[number].severity}".strip() for what, number in lines]
    axis.set_yticks(middles, told, fontsize=7)
    return figure
