"""Tables of a report, as text. Everything in %, rows and JSON hold shares."""

from statistics import fmean, stdev
from typing import NamedTuple

from .bootstrap import GroupDifference, Interval
from .compare import Comparison
from .falls import Fall
from .rows import Row
from .summary import BEFORE

MANY = 3  # labels; with more of them a line each, not a column each


class Table(NamedTuple):
    title: str
    note: str
    header: list[str]
    lines: list[list[str]]


NOTE = (
    "In %: top-1, and mCE where it says so. Brackets: 95 % intervals over images, bootstrap, and Clopper and Pearson's "
    "where all images agree; differences are paired. ± after an accuracy: standard deviation over the models of one "
    "label; after a difference: its standard error over them. Bold: the best mean, whatever its interval. n: pictures. "
    "worst-case: stands every attack of that eps; worst-case-transfer: those made on the other models, too. mCE: mean "
    "over the 15 corruptions of the error over AlexNet's, of "
    "the published pictures only. 200 classes: of these alone, the logits of the others are cut off."
)


def comparison_table(lines: list[Comparison], wide: bool | None = None) -> Table:
    """A column a label or, by default of more than three, a line a label."""
    labels = list(dict.fromkeys(label for line in lines for label in line.groups))
    if len(labels) <= MANY if wide is None else wide:
        header = ["in %", *labels, *[f"{label} - {labels[0]}" for label in labels[1:]], "n"]
        table = [
            [line.what, *[value_text(line, label) for label in labels],
             *[difference_text(line.differences[label]) for label in labels[1:]], str(line.n)]
            for line in lines
        ]  # fmt: skip
    else:
        header = ["in %", "model", "mean", f"minus {labels[0]}", "n"]
        table = [
            [line.what if label == labels[0] else "", label, value_text(line, label),
             difference_text(line.differences.get(label)), str(line.n)]
            for line in lines
            for label in labels
        ]  # fmt: skip
    return Table("Comparison", NOTE, header, table)


def value_text(line: Comparison, label: str) -> str:
    interval = line.groups[label]
    text = f"{100 * interval.value:.1f}"
    text = f"**{text}**" if interval.value == line.best and len(line.groups) > 1 else text
    spread = line.seeds[label]
    seeds = "" if spread is None else f" ± {100 * spread:.1f}"
    return f"{text}{seeds} {_bounds(interval, '.1f')}"


def difference_text(found: GroupDifference | None) -> str:
    if found is None:
        return ""
    text = f"{100 * found.images.value:+.1f} {_bounds(found.images, '+.1f')}"
    return text + ("" if found.seeds is None else f", seeds ± {100 * found.seeds:.1f}")


def _bounds(interval: Interval, form: str) -> str:
    return f"[{100 * interval.low:{form}}, {100 * interval.high:{form}}]"


# metric -> title, note
HEADLINES = {
    "mce": (
        "mCE (%)", "Mean over the 15 corruptions of the error over AlexNet's (6-digit table), in %; lower is better."
    ),
    "relative_mce": ("Relative mCE (%)", "The same of the errors' rise over the clean error; lower is better."),
}  # fmt: skip
METRICS = {
    "top1": (
        "Top-1 (%) of every condition", "n: pictures, times corruptions and severities where these are put together."
    ),
    "top5": ("Top-5 (%) of every condition", "The label is among the five likeliest of the classes that count."),
    "ce": ("CE (%)", "Error over AlexNet's, five severities together."),
    "ece": (
        "Expected calibration error (%)",
        "Gap of confidence and accuracy, mean over 15 bins of one width by their pictures; of several severities or "
        "corruptions the mean of theirs.",
    ),
    "rms_calibration_error": ("RMS calibration error (%)", "Bins of 100 images of like confidence, all bins."),
    "aurra": ("AURRA (%)", "Mean accuracy of the n most confident images over all n."),
    "aupr": ("AUPR (%)", "Pictures of no known class found by low confidence."),
    "zero_gradient": ("Images without a gradient (%)", "Of the cross-entropy at the clean picture."),
    "routing_change": ("Routing change (%)", "1 - IoU of each token's expert sets, mean over blocks."),
}  # fmt: skip


def metric_tables(
    rows: list[Row],
    wanted: dict[str, tuple[str, str]],
    classes: dict[str, int],
    labels: dict[str, str] | None = None,
) -> list[Table]:
    """One for each metric that there are rows of. classes: of sets of which not all count, how many do.

    labels: of each model its column, with mean ± standard deviation of several; by default each has its own.
    """
    column = {row.model: row.model if labels is None else labels[row.model] for row in rows}
    models = list(dict.fromkeys(column.values()))
    tables = []
    for metric, (title, note) in wanted.items():
        family = (metric, "robust_top1", BEFORE) if metric == "top1" else (metric,)
        own = [row for row in rows if row.metric.partition("/")[0] in family]
        own.sort(key=lambda row: family.index(row.metric.partition("/")[0]))
        if not own or (metric == "zero_gradient" and not any(row.value for row in own)):
            continue
        by_key: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
        for row in own:
            by_key.setdefault(_key(row), {}).setdefault(column[row.model], []).append(row)
        names, legend = short_names(models)
        lines = [
            [_name(key, classes), *[_mean(found.get(model, [])) for model in models], _count(found)]
            for key, found in by_key.items()
        ]
        header = ["condition", *names, "n"]
        tables.append(Table(title, note + legend, header, lines))
    return tables


def fall_tables(falls: list[Fall], classes: dict[str, int]) -> list[Table]:
    """Differences from clean pictures, and of several models what they gain or lose in places."""
    models = list(dict.fromkeys(fall.model for fall in falls))
    tables = []
    for title, metrics in (("Top-1", ("top1", "robust_top1")), ("Top-5", ("top5",))):
        by_key: dict[tuple[str, str, str, str], dict[str, Fall]] = {}
        for fall in falls:
            if fall.metric in metrics:
                by_key.setdefault(_key(fall), {})[fall.model] = fall
        names, legend = short_names(models)
        lines = [
            [_name(key, classes), *[_fall(found.get(model), len(models)) for model in models]]
            for key, found in by_key.items()
        ]
        note = "Difference in points, of other sets from clean pictures of the same classes." + legend
        if len(models) > 1:
            note += " In brackets: places gained (+) or lost among these models."
        if lines:
            tables.append(Table(f"{title} against clean (%)", note, ["condition", *names], lines))
    return tables


def _fall(fall: Fall | None, models: int) -> str:
    if fall is None:
        return ""
    places = fall.rank_on_clean - fall.rank
    return f"{100 * fall.difference:+.1f}" + (f" ({places:+d})" if models > 1 and places else "")


def short_names(models: list[str]) -> tuple[list[str], str]:
    """Of columns, and what a note then adds: many long names would push the numbers off the page."""
    if len(models) <= MANY + 1:
        return models, ""
    names = [f"({place})" for place in range(1, len(models) + 1)]
    return names, " " + ", ".join(f"{name} {model}" for name, model in zip(names, models, strict=True)) + "."


def _count(found: dict[str, list[Row]]) -> str:
    return str(next(iter(found.values()))[0].n)


def _key(row: Row | Fall) -> tuple[str, str, str, str]:
    return row.dataset, row.condition, row.severity_or_eps, row.metric.partition("/")[0]


def _name(key: tuple[str, str, str, str], classes: dict[str, int]) -> str:
    dataset, condition, severity, metric = key
    few = f", {classes[dataset]} classes" if dataset in classes else ""
    what = {"robust_top1": ", robust", BEFORE: ", before the attack"}.get(metric, "")
    return f"{dataset}{few}: {condition} {severity}".strip() + what


def _mean(rows: list[Row]) -> str:
    """Over blocks and, of several models, over these, with their standard deviation."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(100 * row.value)
    values = [fmean(own) for own in found.values()]
    return (f"{fmean(values):.1f}" if values else "") + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
