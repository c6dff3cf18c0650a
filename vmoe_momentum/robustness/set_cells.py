"""The cells of published sets and of regenerated corruptions, and which pictures and labels they have."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import labels
from .asked import BENCHMARK, SEVERITIES
from .cells import Cell
from .corruptions import REGISTRY
from .ids import choose
from .imagenet_c import find_tree
from .models import Model
from .pictures import Change, Pictures, subset
from .regenerated import read_mark
from .sets import SETS, PublishedSet, check_set
from .settings import Settings


class _Counted(NamedTuple):
    """Classes that count, ascending, and what label an answer of each is: its place, or one that several share."""

    classes: list[int]
    labels: list[int]


def regenerated_cells(clean: Pictures, settings: Settings) -> list[Cell]:
    return [
        Cell(clean._replace(name=f"{clean.name} (regenerated)"), "regenerated", name, str(severity),
             Change(name, severity, settings.seed))
        for name in (BENCHMARK if settings.corruptions is None else settings.corruptions)
        if name in REGISTRY
        for severity in settings.severities or SEVERITIES
    ]  # fmt: skip


def corrupted_cells(name: str, settings: Settings, models: Sequence[Model]) -> list[Cell]:
    """A published set of corruptions and severities."""
    root, own = settings.sets[name], SETS[name]
    chosen = None
    if settings.corruptions is not None:
        chosen = [each for each in settings.corruptions if each in (*own.corruptions, *own.extra)]
        if not chosen:
            told = ", ".join(settings.corruptions)
            raise ValueError(
                f"--{name}={root}: none of --corruptions=[{told}] is one of its; name some, or leave one of the two out"
            )
    levels = None if settings.severities is None else list(settings.severities)
    made = read_mark(Path(root), f"--{name}={root}") if name == "imagenet_c" else None
    cells, first = [], None
    for (condition, severity), folder in find_tree(root, chosen, levels, name).items():
        pictures = pictures_of(name, str(folder), settings, models)
        files = [f"{path.parent.name}/{path.name}" for path in pictures.paths]
        first = first or files
        if files != first:
            raise ValueError(
                f"--{name}={root}: {condition}/{severity} has other pictures than the first folder ({len(files)} and "
                f"{len(first)} files); a part is missing, and unequal parts are not the benchmark's"
            )
        pictures = limited(pictures, settings, f"--{name}={root}")._replace(whole=own.whole)
        if made is None:
            cells.append(Cell(_named(pictures), "published", condition, str(severity)))
        else:
            told = f"corrupted by data prepare imagenet-c with seed {made['settings']['seed']}, not the published ones"
            pictures = pictures._replace(name=f"{name} (regenerated)", made=told)
            cells.append(Cell(pictures, "regenerated", condition, str(severity)))
    return cells


def shifted_cells(name: str, settings: Settings, models: Sequence[Model]) -> list[Cell]:
    """A published set of other pictures, and of --data those of the classes that count there."""
    own, setting = SETS[name], f"--{name}={settings.sets[name]}"
    if models[0].num_classes != 1000:
        raise ValueError(f"{setting}: it is for models of ImageNet's 1,000 classes, not {models[0].num_classes}")
    _check_imagenet(models, setting)
    folders = labels.list_folders(Path(settings.sets[name]) / own.place, f"--{name}")
    index, counted = _known(own, Path(settings.sets[name]), folders, setting)
    if own.mapping is None:
        check_set(name, setting, folders, (index.labels[folder] for folder in folders))
    pictures = _labelled(name, folders, index, counted)._replace(whole=own.whole, border=own.border)
    if not pictures.paths:
        raise ValueError(f"{setting}: none of its pictures is of a class of ImageNet-1k")
    if own.classes == "o":  # pictures of none of the classes: labels mean nothing, confidence does
        pictures = pictures._replace(labels=[0] * len(pictures.paths))
    cells = [Cell(_named(limited(pictures, settings)), "published", "shifted")]
    if settings.data is not None and counted is not None:
        same = pictures_of("data", settings.data, settings, models, counted)
        same = limited(same, settings, f"--data={settings.data}", part=True)
        cells.append(Cell(same._replace(name=f"data on {name}'s classes"), "published", "clean"))
    return cells


def _known(
    own: PublishedSet, root: Path, folders: dict[str, list[Path]], setting: str
) -> tuple[labels.Index, _Counted | None]:
    """A class of each folder of a published set, and which classes count."""
    if own.mapping is None:
        index = labels.class_index(None, 1000, set(folders))
        index.check(list(folders), setting)
        few = labels.subset(own.classes) if own.classes else None
        return index, None if few is None else _Counted(few, list(range(len(few))))
    known = own.mapping(root, setting)
    strange = sorted(set(folders) - set(known))
    if strange:
        raise ValueError(f"{setting}: folder {strange[0]} is none of {own.title}'s {len(known)}; take it out")
    classed = {folder: classes for folder, classes in sorted(known.items()) if classes}
    label_of = {index: label for label, classes in enumerate(classed.values()) for index in classes}
    first = {folder: classes[0] for folder, classes in classed.items()}
    counted = sorted(label_of)
    return (
        labels.Index(first, f"by {own.title}'s own mapping"),
        _Counted(counted, [label_of[index] for index in counted]),
    )


def _check_imagenet(models: Sequence[Model], setting: str) -> None:
    """Raises ValueError: a model of 1,000 classes that are not ImageNet's, or in another order."""
    for model in models:
        index = labels.class_index(model.class_names, 1000, set(labels.wnids()), model.class_ids)
        if [index.labels.get(wnid) for wnid in labels.wnids()] != list(range(1000)):
            raise ValueError(
                f"{setting}: it is for models of ImageNet's 1,000 classes; those of --model={model.name} are others, "
                f"or in another order ({index.rule})"
            )


def _index(folders: list[str], order: labels.Order | None, models: Sequence[Model], setting: str) -> labels.Index:
    """Each model labels the folders by its own rule. Raises ValueError: two of them do not agree."""
    first, found = models[0], None
    rules: dict[str, list[str]] = {}
    for model in models:
        index = labels.class_index(model.class_names, model.num_classes, set(folders), model.class_ids, order)
        index.check(folders, setting if len(models) == 1 else f"{setting}, --model={model.name}")
        found = found or index
        rules.setdefault(index.rule, []).append(model.name)
        differs = next((name for name in folders if index.labels[name] != found.labels[name]), None)
        if differs is not None:
            raise ValueError(
                f"{setting}: {first.name} and {model.name} number their classes differently: folder {differs} is class "
                f"{found.labels[differs]} of {first.name} ({found.rule}) and {index.labels[differs]} of {model.name} "
                f"({index.rule}); compare them in separate reports, or let a callable say its class_ids"
            )
    assert found is not None  # there is a model
    told = [rule if len(rules) == 1 else f"{', '.join(names)}: {rule}" for rule, names in rules.items()]
    return found._replace(rule="; ".join(told))


def pictures_of(
    name: str, root: str, settings: Settings, models: Sequence[Model], counted: _Counted | None = None
) -> Pictures:
    folders = labels.list_folders(Path(root), f"--{name}")
    order = labels.read_order(
        Path(settings.data or settings.sets.get(name, root))
    )  # one order for a model that has none of its own
    index = _index(list(folders), order, models, f"--{name}={root}")
    pictures = _labelled(name, folders, index, counted)
    if counted is not None and not pictures.paths:
        raise ValueError(f"--{name}={root}: none of its pictures is of the {len(counted.classes)} classes that count")
    return pictures


def _labelled(name: str, folders: dict[str, list[Path]], index: labels.Index, counted: _Counted | None) -> Pictures:
    """Pictures of folders that are no class that counts are left out."""
    known = index.labels
    found = [(path, known[folder]) for folder, paths in folders.items() if folder in known for path in paths]
    classes, merged = None, None
    if counted is not None:
        label_of = dict(zip(*counted, strict=True))
        found = [(path, label_of[label]) for path, label in found if label in label_of]
        several = len(set(counted.labels)) < len(counted.labels)
        classes, merged = counted.classes, counted.labels if several else None
    paths, chosen = [path for path, _ in found], [label for _, label in found]
    return Pictures(name, paths, chosen, classes, labelled=index.rule, merged=merged)


def limited(pictures: Pictures, settings: Settings, listed: str | None = None, part: bool = False) -> Pictures:
    """Those that --ids names, or a fixed random part of `limit` pictures, in the set's order.

    listed: the setting that the list's pictures are of; None for other sets. part: not all classes are there.
    """
    if settings.ids is not None:
        return pictures if listed is None else choose(pictures, settings.ids, listed, part)
    if settings.limit is None or settings.limit >= len(pictures.paths):
        return pictures
    return pictures.only(subset(len(pictures.paths), settings.limit, settings.seed))


def _named(pictures: Pictures) -> Pictures:
    """A part of a published set says so, where it is known how many the whole has."""
    whole, count = SETS[pictures.name].count, len(pictures.paths)
    return pictures if whole in (None, count) else pictures._replace(name=f"{pictures.name} ({count:,} of {whole:,})")
