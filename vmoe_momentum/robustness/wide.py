"""Tables for other programs: one line a model, and timm's results columns."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

from .evaluate import Evaluation
from .labels import wnids
from .models import Model
from .rows import Row

TIMM = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
DIFFERENCES = ("top1_diff", "top5_diff", "rank_diff")
TIMM_NAMES = {  # what timm's results/ calls these sets
    "imagenet_v2": "imagenetv2-matched-frequency", "imagenet_sketch": "sketch",
}  # fmt: skip


def parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


def dataset_of(evaluation: Evaluation) -> str:
    """Of the clean pictures, as file names and other tools say it: imagenet, or the name of their folder."""
    pictures = next((cell.pictures for cell in evaluation.cells if cell.kind == "clean"), None)
    if pictures is None or (
        evaluation.models[0].num_classes == 1000 and {path.parent.name for path in pictures.paths} <= set(wnids())
    ):
        return "imagenet"  # all sets that need no clean pictures are ImageNet's
    root = pictures.paths[0].absolute().parent.parent
    return slug((root.parent if root.name == "val" else root).name) or "data"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def models_csv(models: Sequence[Model], rows: Iterable[Row]) -> str:
    """A line a model: its name, its label, its parameters, and a column for every number, as shares."""
    found: dict[str, dict[str, str]] = {model.name: {} for model in models}
    for row in rows:
        name = "/".join(part for part in (row.dataset, row.condition, row.severity_or_eps, row.metric) if part)
        found[row.model][name] = f"{row.value:.8g}"
    columns = list(dict.fromkeys(name for numbers in found.values() for name in numbers))
    lines = [
        [model.name, model.label, parameters(model), *[found[model.name].get(name, "") for name in columns]]
        for model in models
    ]
    return _csv([["model", "label", "params", *columns], *lines])


def timm_csvs(evaluation: Evaluation, rows: Iterable[Row]) -> dict[str, str]:
    """File name -> lines as in timm's results/*.csv, what its generate_csv_results.py adds included.

    One of the clean pictures, and one of each set, real labels and mean of corruptions, with the difference and the
    change of rank against clean pictures of the same classes. In %.
    """
    own, sets = dataset_of(evaluation), dict[str, dict[str, dict[str, float]]]()
    for row in rows:
        name = _name(row, own)
        if name is not None and row.metric in ("top1", "top5"):
            sets.setdefault(name, {}).setdefault(row.model, {})[row.metric] = row.value
    order = {name: _sorted(found) for name, found in sets.items()}
    files = {}
    for name in sets:
        plain = name == own or name.endswith("-clean")
        bases = () if plain else (f"{name}-clean", own)
        base = next((b for b in bases if b in sets and b != name), None)
        lines = []
        for rank, model in enumerate(order[name]):
            opened = next(each for each in evaluation.models if each.name == model)
            texts = _texts(sets[name][model])
            view = opened.view
            line = [model, *texts, f"{parameters(opened) / 1e6:.2f}", view.size, f"{view.crop_pct:.3f}"]
            line.append(view.interpolation)
            if base is not None:
                known = model in sets[base]
                line += _differences(texts, _texts(sets[base][model])) if known else ["", ""]
                line.append(_signed(order[base].index(model) - rank) if known else "")
            lines.append(line)
        files[f"results-{name}.csv"] = _csv([[*TIMM, *(() if base is None else DIFFERENCES)], *lines])
    return files


def _name(row: Row, own: str) -> str | None:
    """Of the set in file names; None where it has no file."""
    whole = row.dataset.partition(" (")[0]
    if row.dataset.startswith("data on "):
        return f"{slug(row.dataset.removeprefix('data on ').partition(chr(39))[0])}-clean"
    if row.condition == "clean":
        return own
    if row.condition == "real labels":
        return f"{own}-real"
    if row.condition == "shifted":
        return TIMM_NAMES.get(whole, slug(whole))
    if row.severity_or_eps == "mean" and "corruptions" in row.condition:
        return slug(whole if whole != "data" else f"{own}-regenerated")
    return None


def _sorted(found: dict[str, dict[str, float]]) -> list[str]:
    """Names of models, the best first: by what is written, as timm's script sees no more than that."""
    rounded = {model: [float(text or 0) for text in _texts(numbers)] for model, numbers in found.items()}
    return sorted(rounded, key=lambda model: (-rounded[model][0], -rounded[model][2], model))


def _texts(numbers: dict[str, float]) -> list[str]:
    """top1, top1_err, top5, top5_err; no top-5 of five classes and fewer."""
    return [
        text
        for metric in ("top1", "top5")
        for text in (
            [f"{100 * numbers[metric]:.3f}", f"{100 - 100 * numbers[metric]:.3f}"] if metric in numbers else ["", ""]
        )
    ]


def _differences(mine: list[str], clean: list[str]) -> list[str]:
    return [f"{float(mine[i]) - float(clean[i]):+.3f}" if mine[i] and clean[i] else "" for i in (0, 2)]


def _signed(places: int) -> str:
    return f"{places:+d}" if places else "0"


def _csv(lines: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
