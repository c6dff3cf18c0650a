"""The pictures of benchmarks/evidence.py, from the rows alone."""

from collections.abc import Callable
from pathlib import Path

from evidence_answers import answers, table_of, value
from evidence_arms import ARMS, DEPTHS, GAMMAS, RULES
from evidence_questions import PRIMARY
from evidence_rows import INSIDE, RANKS, Row, value_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NAMES = ("forest", "depth", "margin", "mechanism")
COLORS = {"gain": "tab:blue", "loss": "tab:red"}  # of verdicts; grey says neither


def draw(rows: list[Row], folder: Path) -> None:
    """NAME.png each of the parts that have rows; others are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {row["part"] for row in rows}
    for name, part, make in (
        ("forest", "main", forest), ("mechanism", "main", mechanism), ("depth", "depth", depth),
        ("margin", "margin", margin),
    ):  # fmt: skip
        (folder / f"{name}.png").unlink(missing_ok=True)
        if part in parts:
            make(rows).savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def forest(rows: list[Row]) -> Figure:
    found = answers(rows)
    figure, axes = panels(len(PRIMARY), 6.0, 5.2)
    for axis, measure in zip(axes, PRIMARY, strict=True):
        own = [answer for answer in found if answer.measure is measure]
        axis.axvspan(-measure.counts, measure.counts, color="grey", alpha=0.15, linewidth=0)
        axis.axvline(0, color="grey", linewidth=0.8)
        for place, answer in enumerate(own):
            if answer.found is not None:
                low, high, color = answer.found.low, answer.found.high, COLORS.get(answer.verdict, "dimgrey")
                axis.plot([low, high], [place, place], color=color, linewidth=1.6)
                axis.plot(answer.found.mean, place, "s", color=color, markersize=6)
                axis.plot(answer.found.values, [place] * answer.wanted, ".", color="black", alpha=0.5, markersize=4)
        labels = [f"{a.question.number}  {a.question.arm}\n- {a.question.control}" for a in own]
        axis.set_yticks(range(len(own)), labels if axis is axes[0] else [""] * len(own), fontsize=7)
        axis.set(title=measure.told, xlabel=f"difference, {measure.unit}", ylim=(len(own) - 0.5, -0.5))
        axis.grid(axis="y", linewidth=0.3)
    return figure


def depth(rows: list[Row]) -> Figure:
    table = table_of(rows)
    figure, (axis,) = panels(1, 6.0, 4.2)
    for number, rule in enumerate(("residual", "residual_norm", "heavy_ball_07", "heavy_ball_07_norm")):
        points = {d: _of_seeds(table, f"depth_{d}_{rule}", lambda row: 100 * value(row, "top1")) for d in DEPTHS}
        _lines(axis, points, rule, f"C{number}")
    axis.set(xscale="log", xlabel="blocks", ylabel="clean top-1, %")
    axis.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


def margin(rows: list[Row]) -> Figure:
    table = table_of(rows)
    figure, (left, right) = panels(2, 5.4, 4.2)
    for number, rule in enumerate(RULES):
        color = f"C{number}"
        arms = {gamma: f"margin_{rule}_{gamma:g}" for gamma in GAMMAS}
        _lines(left, {g: _of_seeds(table, arm, lambda row: 100 * value(row, "top1")) for g, arm in arms.items()}, rule,
               color)  # fmt: skip
        lost = [g for g, arm in arms.items() for seed in range(3) if table.get((arm, seed), {}).get("diverged")]
        left.plot(lost, [10.0] * len(lost), "x", color=color)
        inside = {
            gamma: _of_seeds(table, arms[1.0], lambda row, name=name: 100 * value_of(row, name))
            for gamma, name in zip(GAMMAS, INSIDE, strict=True)
        }
        _lines(right, inside, rule, color)
    left.set(xlabel="gamma", ylabel="clean top-1, %")
    right.set(xlabel="gamma", ylabel="% of eigenvalues inside the region", ylim=(0, 101))
    left.legend(fontsize=8)
    return figure


def mechanism(rows: list[Row]) -> Figure:
    table = table_of(rows)
    names = [arm.name for arm in ARMS.values() if arm.part == "main" and arm.rule is not None]
    figure, axes = panels(4, 4.6, 6.2)
    shown: list[tuple[str, Callable[[Row], float]]] = [
        ("% of eigenvalues inside the rule's region", lambda row: 100 * value_of(row, "share_rule")),
        ("expert load, coefficient of variation", lambda row: value_of(row, "load_cv")),
        ("% of tokens that choose the loudest expert", lambda row: 100 * value_of(row, RANKS[0])),
        ("routing change under noise, %", lambda row: 100 * value_of(row, "routing_change")),
    ]
    for axis, (title, pick) in zip(axes, shown, strict=True):
        for place, name in enumerate(names):
            values = _of_seeds(table, name, pick)
            axis.plot(values, [place] * len(values), ".", color="black", alpha=0.5)
            if values:
                axis.plot(sum(values) / len(values), place, "s", color="tab:blue", markersize=5)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.grid(axis="y", linewidth=0.3)
        axis.set_xlabel(title, fontsize=8)
    return figure


def _of_seeds(table: dict[tuple[str, int], Row], arm: str, pick: Callable[[Row], float]) -> list[float]:
    """Of the seeds that are there and have it."""
    values = [pick(table[arm, seed]) for seed in range(ARMS[arm].seeds) if (arm, seed) in table]
    return [found for found in values if found == found]


def _lines(axis: Axes, points: dict[float, list[float]], label: str, color: str) -> None:
    known = {x: values for x, values in points.items() if values}
    axis.plot(list(known), [sum(v) / len(v) for v in known.values()], color=color, label=label, linewidth=1.2)
    for x, values in known.items():
        axis.plot([x] * len(values), values, ".", color=color, alpha=0.6, markersize=5)
