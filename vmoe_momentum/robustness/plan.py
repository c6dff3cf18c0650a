"""Which cells a report needs, checked before any of them is run."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..ranges import check_all
from . import labels
from .asked import BENCHMARK, RANGES, SEVERITIES, TRANSFER_NAMES
from .attacks import ATTACKS, PLAIN, Budget, Norm, check_attack, check_budget
from .cells import Cell
from .corruptions import REGISTRY
from .ids import choose, read_ids
from .imagenet_c import find_tree
from .models import Model
from .pictures import Change, Pictures
from .regenerated import read_mark
from .sets import SETS, PublishedSet, check_set, named_corruptions

LARGE_EPS = 64 / 255  # Linf: any undefended model must fall
DEFAULT_EPS: dict[Norm, tuple[float, ...]] = {"Linf": (1 / 255, 2 / 255, 4 / 255), "L2": (0.5, 1.0, 2.0)}


class Settings(NamedTuple):
    """What was asked for. eps in units of pixels in [0, 1]."""

    data: str | None = None
    sets: dict[str, str] = {}  # name of a published set (sets.SETS) -> its folder
    corruptions: tuple[str, ...] | None = None  # None: the 15
    severities: tuple[int, ...] | None = None  # None: all five
    regenerate: bool = True
    attacks: tuple[str, ...] = ("fgsm", "pgd", "pgd-margin", "square")
    transfer: tuple[str, ...] = ()  # attacks whose pictures, made on each model, are shown to all of them
    eps: tuple[float, ...] = DEFAULT_EPS["Linf"]
    norm: Norm = "Linf"
    steps: int = 20
    queries: int = 5000
    query_images: int | None = None  # None: see query_count
    router_aware: bool = False
    random_start: bool = False
    restarts: int = 1
    eot: int = 1
    limit: int | None = None
    ids: str | None = None  # file that names the pictures of data and imagenet_c to take
    seed: int = 0


def make_plan(settings: Settings, models: Sequence[Model]) -> list[Cell]:
    """Every cell, in the order they are run. Raises ValueError and FileNotFoundError: anything that cannot be done."""
    check_settings(settings)
    if settings.data is None and not settings.sets:
        raise ValueError("nothing to evaluate: give --data, or one of " + ", ".join(f"--{name}" for name in SETS))
    _check_models(models)
    cells: list[Cell] = []
    if settings.data is not None:
        clean = _limited(_pictures("data", settings.data, settings, models), settings, f"--data={settings.data}")
        cells.append(Cell(clean, "clean", "clean"))
        cells += _regenerated(clean, settings) if settings.regenerate else []
        for name in all_attacks(settings):
            for model in models:
                check_attack(name, model.view.size, model.num_classes, settings.norm)
                if ATTACKS[name].needs_router and model.router_loss is None:
                    raise ValueError(f"attacks={name}: --model={model.name} has no routers; leave one of them out")
        if settings.transfer:
            _check_transfer(models)
        if settings.router_aware and all(model.router_loss is None for model in models):
            raise ValueError("--router_aware: none of the models has routers; leave it out")
        cells += _adversarial(clean, settings, [model.name for model in models])
    for name in (name for name in SETS if name in settings.sets):
        cells += (_corrupted if SETS[name].corruptions else _shifted)(name, settings, models)
    return cells


def describe_pictures(cells: Sequence[Cell]) -> dict[str, dict[str, str | int]]:
    """Where each set lies, how many it has, which ones (a hash of names and sizes) and how models see them."""
    found: dict[str, dict[str, str | int]] = {}
    for cell in cells:
        if cell.pictures.name in found:
            continue
        digest = hashlib.sha256()
        for path in cell.pictures.paths:
            told = f"{path.parent.name}/{path.name}/{path.stat().st_size}"
            digest.update(told.encode(errors="surrogateescape"))
        if cell.pictures.whole:
            seen = "whole, resized to the model's input where they are not of its size"
        elif cell.change is not None:
            seen = "at 64 px and more Resize(256), CenterCrop(224), then corrupted; whole from there on"
        else:
            seen = "at 64 px and more the middle, at the model's input size and crop_pct; else whole"
        if cell.pictures.made:
            seen = f"{cell.pictures.made}; {seen}"
        if cell.pictures.border:
            seen = f"without the {cell.pictures.border} px of its border; {seen}"
        folder = str(cell.pictures.paths[0].parent.parent)
        found[cell.pictures.name] = {
            "folder": folder, "pictures": len(cell.pictures.paths), "sha256": digest.hexdigest(), "seen": seen,
            "labels": cell.pictures.labelled,
        }  # fmt: skip
    return found


def check_settings(settings: Settings) -> None:
    """Whatever needs no model. Raises ValueError, FileNotFoundError: names, numbers, folders that mean nothing."""
    check_all("--", settings._asdict(), RANGES)
    for name, root in {"data": settings.data, **settings.sets}.items():
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"--{name}={root}: no such folder")
    if settings.ids is not None:
        if settings.limit is not None:
            raise ValueError(f"--ids={settings.ids}: it says which pictures, so leave out --limit={settings.limit}")
        read_ids(settings.ids)
    if "imagenet_o" in settings.sets and settings.data is None:
        raise ValueError(
            f"--imagenet_o={settings.sets['imagenet_o']}: needs --data, pictures of known classes to tell its own from"
        )
    for setting in ("corruptions", "severities", "attacks", "transfer", "eps"):
        values = getattr(settings, setting) or ()
        told = [f"{255 * value:g}/255" for value in values] if setting == "eps" else list(values)
        twice = [value for place, value in enumerate(told) if value in told[:place]]
        if twice:
            raise ValueError(f"--{setting}: {twice[0]} is there twice; name each once")
    if settings.severities is not None and not settings.severities:
        raise ValueError("--severities=[]: use some of 1 to 5, or leave it out for all")
    _check_corruptions(settings)
    if all_attacks(settings) and not settings.eps:
        raise ValueError("--eps=[]: give budgets, such as [1/255], or no attacks (--attacks=[])")
    for name in settings.transfer:
        if name not in TRANSFER_NAMES:
            raise ValueError(f"--transfer={name}: not one of {', '.join(TRANSFER_NAMES)}")
    for name in all_attacks(settings):
        for eps in settings.eps:
            check_budget(name, _budget(settings, eps, name))
    if settings.router_aware and not any(ATTACKS[name].router for name in all_attacks(settings)):
        knowing = ", ".join(name for name, found in ATTACKS.items() if found.router)
        raise ValueError(f"--router_aware: none of --attacks={list(settings.attacks)} uses it; {knowing} do")


def _check_corruptions(settings: Settings) -> None:
    """Raises ValueError: a name of none of the sets, or of one that was not given."""
    for name in settings.corruptions or ():
        if name not in named_corruptions():
            raise ValueError(f"--corruptions={name}: not one of {', '.join(named_corruptions())}")
        owner = next(key for key, each in SETS.items() if name in (*each.corruptions, *each.extra))
        if name not in REGISTRY and owner not in settings.sets:
            raise ValueError(f"--corruptions={name}: it is of {SETS[owner].title}; give its folder as --{owner}")


def all_attacks(settings: Settings) -> tuple[str, ...]:
    """By their names, each once."""
    return tuple(dict.fromkeys((*settings.attacks, *settings.transfer)))


def _budget(settings: Settings, eps: float, attack: str | None = None) -> Budget:
    """With what the attack follows and nothing else, so that a kept cell goes on being it; None: noise."""
    plain, known = Budget(eps, settings.norm, seed=settings.seed), ATTACKS.get(attack or "")
    if known is None:  # noise, or no attack, as check_budget will say
        return plain
    spent = {} if known.spends is None else {known.spends: getattr(settings, known.spends)}
    return plain._replace(**spent, **_options(attack, settings))


def _options(attack: str, settings: Settings) -> dict[str, int]:
    """Those of PLAIN that it takes; none where there is no such attack, as check_budget will say."""
    return {name: getattr(settings, name) for name in PLAIN if getattr(ATTACKS.get(attack), name, None)}


def _severity(eps: float, norm: Norm) -> str:
    """As rows say it: of 255 in Linf."""
    return f"{255 * eps:g}" if norm == "Linf" else f"{eps:g}"


def parse_eps(text: str | float) -> float:
    """`4/255` or `0.0157`. Raises ValueError: neither."""
    above, slash, below = str(text).partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--eps={text}: use a number in pixels of [0, 1], such as 4/255") from error


def _check_models(models: Sequence[Model]) -> None:
    """Raises ValueError: they do not have the same number of classes."""
    if len({model.num_classes for model in models}) > 1:
        told = ", ".join(f"{model.name} {model.num_classes}" for model in models)
        raise ValueError(f"--model: they have different numbers of classes ({told}); compare models of one task")


def _check_transfer(models: Sequence[Model]) -> None:
    """Raises ValueError: one model's pictures cannot be shown to another."""
    if len(models) < 2:
        raise ValueError("--transfer: pictures made on one model are shown to the others; give two --model at least")
    first = models[0]
    other = next((model for model in models if model.view != first.view), None)
    if other is not None:
        told = [f"{model.name} {tuple(model.view)}" for model in (first, other)]
        raise ValueError(
            f"--transfer: models see other cuts of a picture ({', '.join(told)}: size, crop_pct, interpolation, ...), "
            "so pictures made on one mean nothing to the other; compare models of one view, or leave it out"
        )


def _index(folders: list[str], order: labels.Order | None, models: Sequence[Model], setting: str) -> labels.Index:
    """Each model labels the folders by its own rule. Raises ValueError: two of them do not agree."""
    first, found, rules = models[0], None, {}
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
    told = [rule if len(rules) == 1 else f"{', '.join(names)}: {rule}" for rule, names in rules.items()]
    return found._replace(rule="; ".join(told))


class _Counted(NamedTuple):
    """Classes that count, ascending, and what label an answer of each is: its place, or one that several share."""

    classes: list[int]
    labels: list[int]


def _pictures(
    name: str, root: str, settings: Settings, models: Sequence[Model], counted: _Counted | None = None
) -> Pictures:
    folders = labels.list_folders(Path(root), f"--{name}")
    order = labels.read_order(
        Path(settings.data or settings.sets.get(name, root))
    )  # one order for a model that has none of its own
    index = _index(list(folders), order, models, f"--{name}={root}")
    pictures = _labelled(name, folders, index, counted)
    if not pictures.paths:
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


def _limited(pictures: Pictures, settings: Settings, listed: str | None = None, part: bool = False) -> Pictures:
    """Those that --ids names, or a fixed random part of `limit` pictures, in the set's order.

    listed: the setting that the list's pictures are of; None for other sets. part: not all classes are there.
    """
    if settings.ids is not None:
        return pictures if listed is None else choose(pictures, settings.ids, listed, part)
    if settings.limit is None or settings.limit >= len(pictures.paths):
        return pictures
    order = subset(len(pictures.paths), settings.limit, settings.seed)
    paths, chosen = ([values[i] for i in order] for values in (pictures.paths, pictures.labels))
    return pictures._replace(paths=paths, labels=chosen)


def _named(pictures: Pictures) -> Pictures:
    """A part of a published set says so, where it is known how many the whole has."""
    whole, count = SETS[pictures.name].count, len(pictures.paths)
    return pictures if whole in (None, count) else pictures._replace(name=f"{pictures.name} ({count:,} of {whole:,})")


def subset(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` numbers, ascending, the same ones for the same seed."""
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))


def _regenerated(clean: Pictures, settings: Settings) -> list[Cell]:
    return [
        Cell(clean._replace(name=f"{clean.name} (regenerated)"), "regenerated", name, str(severity),
             Change(name, severity, settings.seed))
        for name in (BENCHMARK if settings.corruptions is None else settings.corruptions)
        if name in REGISTRY
        for severity in settings.severities or SEVERITIES
    ]  # fmt: skip


def _adversarial(clean: Pictures, settings: Settings, models: Sequence[str]) -> list[Cell]:
    few = tuple(subset(len(clean.paths), query_count(settings, len(clean.paths)), settings.seed))
    cells = []
    if all_attacks(settings):
        noise = "uniform-noise" if settings.norm == "Linf" else "uniform-noise-L2"
        cells += [
            Cell(clean, "noise", noise, _severity(eps, settings.norm), budget=_budget(settings, eps))
            for eps in settings.eps
        ]
    for name in all_attacks(settings):
        bought = ATTACKS[name].spends == "queries"  # dear, so run on a part
        for eps in settings.eps:
            cell = Cell(
                clean, "attack", condition_of(name, settings), _severity(eps, settings.norm), attack=name,
                budget=_budget(settings, eps, name), router_aware=_drives_routers(name, settings),
                order=few if bought else None,
            )  # fmt: skip
            # of the model they are made on it is the attack itself
            cells += [cell._replace(source=model) for model in models] if name in settings.transfer else [cell]
    if any(ATTACKS[name].spends == "steps" for name in all_attacks(settings)):
        check = tuple(subset(len(clean.paths), 100, settings.seed))
        budget = Budget(LARGE_EPS, steps=settings.steps, seed=settings.seed, eot=settings.eot)
        severity = _severity(LARGE_EPS, "Linf")
        cells.append(Cell(clean, "attack", "sanity-pgd", severity, attack="pgd-margin", budget=budget, order=check))
    return cells


def query_count(settings: Settings, pictures: int) -> int:
    """Pictures that attacks by queries get: unless it is said, a tenth, 100 at least and 1,000 at most."""
    return min(1000, max(100, pictures // 10)) if settings.query_images is None else settings.query_images


def _drives_routers(name: str, settings: Settings) -> bool:
    return ATTACKS[name].needs_router or (settings.router_aware and ATTACKS[name].router)


def condition_of(name: str, settings: Settings) -> str:
    """The attack with its budget, as rows call it: pgd-20-rs-r5-eot4-router-L2."""
    told = name + {"steps": f"-{settings.steps}", "queries": f"-{settings.queries}q", None: ""}[ATTACKS[name].spends]
    options = _options(name, settings)
    told += "-rs" if options.get("random_start") else ""
    for option, short in (("restarts", "r"), ("eot", "eot")):
        told += f"-{short}{options[option]}" if options.get(option, 1) > 1 else ""
    router = settings.router_aware and ATTACKS[name].router
    return told + ("-router" if router else "") + ("" if settings.norm == "Linf" else "-L2")


def _corrupted(name: str, settings: Settings, models: Sequence[Model]) -> list[Cell]:
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
        pictures = _pictures(name, str(folder), settings, models)
        files = [f"{path.parent.name}/{path.name}" for path in pictures.paths]
        first = first or files
        if files != first:
            raise ValueError(
                f"--{name}={root}: {condition}/{severity} has other pictures than the first folder ({len(files)} and "
                f"{len(first)} files); a part is missing, and unequal parts are not the benchmark's"
            )
        pictures = _limited(pictures, settings, f"--{name}={root}")._replace(whole=own.whole)
        if made is None:
            cells.append(Cell(_named(pictures), "published", condition, str(severity)))
        else:
            told = f"corrupted by data prepare imagenet-c with seed {made['settings']['seed']}, not the published ones"
            pictures = pictures._replace(name=f"{name} (regenerated)", made=told)
            cells.append(Cell(pictures, "regenerated", condition, str(severity)))
    return cells


def _shifted(name: str, settings: Settings, models: Sequence[Model]) -> list[Cell]:
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
    cells = [Cell(_named(_limited(pictures, settings)), "published", "shifted")]
    if settings.data is not None and counted is not None:
        same = _pictures("data", settings.data, settings, models, counted)
        same = _limited(same, settings, f"--data={settings.data}", part=True)
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
