"""What each condition costs against clean pictures: the difference, and the place among the models of the report."""

from collections.abc import Iterable
from typing import NamedTuple

from .rows import Row
from .summary import BEFORE

METRICS = ("top1", "top5", "robust_top1")
Key = tuple[str, str, str, str, str]  # dataset, condition, severity or eps, metric, model


class Fall(NamedTuple):
    """One accuracy of one model beside the one on clean pictures. Shares: 0.5 is 50 %."""

    model: str
    dataset: str
    condition: str
    severity_or_eps: str
    metric: str  # of METRICS
    value: float
    clean: float  # of the same pictures or, for other sets, of the clean ones of the same classes
    rank: int  # by value, 1 is the best; then by top-5, then by name
    rank_on_clean: int

    @property
    def difference(self) -> float:
        return self.value - self.clean


def make_falls(rows: Iterable[Row]) -> list[Fall]:
    """Of every set, mean of corruptions and attack that clean pictures were evaluated beside.

    Places as timm's results/generate_csv_results.py gives them, among the models that have both numbers.
    """
    found = {(row.dataset, row.condition, row.severity_or_eps, row.metric, row.model): row.value for row in rows}
    groups: dict[tuple[str, str, str, str], dict[str, Key]] = {}  # model -> what is its number on clean pictures
    for key in found:
        base = _base(found, key)
        if base is not None:
            groups.setdefault(key[:4], {})[key[4]] = base
    falls = []
    for (dataset, condition, severity, metric), bases in groups.items():
        place = (dataset, condition, severity)
        values = {model: found[*place, metric, model] for model in bases}
        clean = {model: found[base] for model, base in bases.items()}
        seconds = [
            {model: found.get((*where, "top5", model), 0.0) for model in bases}
            for where in (place, next(iter(bases.values()))[:3])
        ]
        ranks, before = ranked(values, seconds[0]), ranked(clean, seconds[1])
        falls += [
            Fall(model, *place, metric, values[model], clean[model], ranks[model], before[model]) for model in bases
        ]
    return falls


def ranked(values: dict[str, float], seconds: dict[str, float]) -> dict[str, int]:
    """Place by value, then by the second value, then by name."""
    order = sorted(values, key=lambda model: (-values[model], -seconds[model], model))
    return {model: place for place, model in enumerate(order, start=1)}


def _base(found: dict[Key, float], key: Key) -> Key | None:
    """Of the clean number; None for what is clean itself, one of several severities, or has none beside it."""
    dataset, condition, severity, metric, model = key
    if metric not in METRICS or condition == "clean" or (metric != "robust_top1" and severity not in ("", "mean")):
        return None
    candidates = [
        (dataset, condition, severity, BEFORE, model),  # the part that was attacked
        (f"data on {dataset.partition(' ')[0]}'s classes", "clean", "", metric, model),
        ("data", "clean", "", metric.removeprefix("robust_"), model),
    ]
    return next((each for each in candidates if each in found), None)
