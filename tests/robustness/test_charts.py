"""Every picture against the rows it draws: bars, points and names as they are in the figure, not as code meant them."""

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic import PART, cells, evaluation

from vmoe_momentum.robustness.charts import draw
from vmoe_momentum.robustness.corruptions import BENCHMARK, EXTRA
from vmoe_momentum.robustness.rows import Row
from vmoe_momentum.robustness.summary import make_rows

LABELS = ["Residual", "HeavyBall", "HeavyBall", "dense"]
PLANS = {
    "plain": cells("regenerated", "attacks"),
    "with sets": cells("regenerated", "attacks", "sets"),
    "published beside regenerated": cells("regenerated", "attacks", "published", "sets"),
    "in L2": cells("attacks", "sets", norm="L2"),
    "sets only": cells("sets"),
}


def mean(rows: list[Row], label: str, **wanted) -> float:
    """In %, over models of the label and whatever is not asked for."""
    found = [
        100 * row.value
        for row in rows
        if row.model.partition("#")[0] == label and all(getattr(row, key) == value for key, value in wanted.items())
    ]
    return float(np.mean(found)) if found else np.nan


def legend(figure: Figure) -> dict[str, tuple]:
    """Label -> colour."""
    (found,) = [axis.get_legend() for axis in figure.axes if axis.get_legend() is not None]
    handles = [*found.get_lines(), *found.get_patches()]
    colors = [h.get_color() if hasattr(h, "get_color") else h.get_facecolor() for h in handles]
    texts = [text.get_text() for text in found.get_texts()]
    return dict(zip(texts, map(matplotlib.colors.to_rgba, colors), strict=True))


def check_bars(figure: Figure, rows: list[Row], dataset: str) -> None:
    (axis,) = figure.axes
    names = [text.get_text().replace("\n", "_") for text in axis.get_xticklabels()]
    drawn = {row.condition for row in rows if row.dataset == dataset} & {*BENCHMARK, *EXTRA}
    assert set(names) == drawn
    assert len(axis.containers) == len(legend(figure)) == 3
    for bars in axis.containers:
        color, label = legend(figure)[bars.get_label()], bars.get_label()
        for place, bar in enumerate(bars):
            wanted = mean(rows, label, dataset=dataset, condition=names[place], severity_or_eps="mean", metric="top1")
            assert bar.get_height() == pytest.approx(wanted) and bar.get_facecolor() == color
            assert abs(bar.get_x() + bar.get_width() / 2 - place) < 0.5


def check_curves(figure: Figure, rows: list[Row], dataset: str) -> None:
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == list(legend(figure))
    own = [row for row in rows if row.condition in BENCHMARK]
    for line in axis.lines:
        assert matplotlib.colors.to_rgba(line.get_color()) == legend(figure)[line.get_label()]
        for level, value in zip(*line.get_data(), strict=True):
            asked = {"dataset": dataset, "severity_or_eps": str(int(level)), "metric": "top1"}
            assert value == pytest.approx(mean(own, line.get_label(), **asked))
        assert sorted({r.severity_or_eps for r in own if r.dataset == dataset} - {"mean"}) == [
            str(int(level)) for level in line.get_xdata()
        ]


def check_attacks(figure: Figure, rows: list[Row], made) -> None:
    """At 0 the accuracy before the attack, on the same pictures; then each budget, ascending."""
    panels = [axis for axis in figure.axes if axis.axison]
    attacks = [row for row in rows if row.metric == "robust_top1" and row.condition != "sanity-pgd"]
    assert {axis.get_title() for axis in panels} == {row.condition for row in attacks}
    for axis in panels:
        name = axis.get_title()
        assert ("255" in axis.get_xlabel()) == (not name.endswith("-L2"))
        for line in axis.lines:
            label = line.get_label()
            sizes, values = line.get_data()
            assert list(sizes) == ([0, 0.5, 1, 2] if name.endswith("-L2") else [0, 1, 2, 4])
            of = list(PART) if name.startswith("square") else slice(None)
            before = [100 * made.outcomes[m.name, 0].correct[of].mean() for m in made.models if m.label == label]
            assert values[0] == pytest.approx(np.mean(before))
            for size, value in zip(sizes[1:], values[1:], strict=True):
                asked = {"condition": name, "severity_or_eps": f"{size:g}", "metric": "robust_top1"}
                assert value == pytest.approx(mean(rows, label, **asked))


def check_routing(figure: Figure, rows: list[Row]) -> None:
    (axis,) = figure.axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    own = [row._replace(metric="routing") for row in rows if row.metric.startswith("routing_change/")]
    assert set(names) == {row.condition for row in own} - {"sanity-pgd"} and "dense" not in legend(figure)
    for bars in axis.containers:
        for place, bar in enumerate(bars):
            wanted = mean(own, bars.get_label(), condition=names[place]) / 100
            assert bar.get_width() == pytest.approx(wanted)
            assert bar.get_facecolor() == legend(figure)[bars.get_label()]
            assert abs(bar.get_y() + bar.get_height() / 2 - place) < 0.5


def check_examples(figure: Figure, made) -> None:
    """Each line shows the cell it names: pictures are filled with their cell's number."""
    (axis,) = figure.axes
    sheet = axis.images[0].get_array()
    told = [text.get_text() for text in axis.get_yticklabels()]
    assert len(told) == len({(c.pictures.name, c.condition) for c in made.cells if c.condition != "sanity-pgd"})
    for line, text in enumerate(told):
        cell = made.cells[int(sheet[line * 9, 0, 0])]
        assert text == f"{cell.pictures.name}\n{cell.condition} {cell.severity}".strip()
        middle = "" if not cell.severity else "2" if cell.kind in ("attack", "noise") else "3"
        assert cell.severity == ("1" if cell.condition.endswith("-L2") else middle)  # also of unsorted budgets


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_picture_shows_its_rows(plan) -> None:
    made = evaluation(plan, LABELS, dense=("dense",))
    rows = make_rows(made)
    figures = draw(made, rows)
    for name, figure in figures.items():
        kind, _, dataset = name.partition(", ")
        checks = {
            "corruptions": lambda f, d: check_bars(f, rows, d), "severity": lambda f, d: check_curves(f, rows, d),
            "attacks": lambda f, d: check_attacks(f, rows, made), "routing": lambda f, d: check_routing(f, rows),
            "examples": lambda f, d: check_examples(f, made),
        }  # fmt: skip
        checks[kind](figure, dataset)  # a picture without a check is an error here
    parts = {name.partition(", ")[0] for name in figures}
    corrupted = any(cell.severity.isdecimal() and cell.attack is None and cell.kind != "noise" for cell in plan)
    attacked = any(cell.attack for cell in plan)
    assert parts == {"examples", "routing"} | ({"corruptions", "severity"} if corrupted else set()) | (
        {"attacks"} if attacked else set()
    )


def test_twelve_models_have_twelve_colours() -> None:
    made = evaluation(cells("attacks"), [f"model {i}" for i in range(12)])
    figure = draw(made, make_rows(made))["attacks"]
    assert len(legend(figure)) == len(set(legend(figure).values())) == 12
