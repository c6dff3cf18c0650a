"""Which cells a report needs, checked before any of them is run."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..ranges import check_all
from . import labels
from .asked import BENCHMARK, RANGES, SEVERITIES, SHIFTED, TRANSFER_NAMES
from .attacks import ATTACKS, PLAIN, Budget, Norm, check_attack, check_budget
from .cells import Cell
from .corruptions import check_corruption
from .ids import choose, read_ids
from .imagenet_c import find_tree
from .models import Model
from .pictures import Change, Pictures
from .sets import check_set

# pictures in the published sets (a corruption and severity of ImageNet-C); parts are labelled as parts
PUBLISHED = {
    "imagenet_c": 50_000, "imagenet_a": 7_500, "imagenet_r": 30_000, "imagenet_o": 2_000, "imagenet_v2": 10_000,
    "imagenet_sketch": 50_889,
}  # fmt: skip
LARGE_EPS = 64 / 255  # Linf: any undefended model must fall
DEFAULT_EPS: dict[Norm, tuple[float, ...]] = {"Linf": (1 / 255, 2 / 255, 4 / 255), "L2": (0.5, 1.0, 2.0)}


class Settings(NamedTuple):
    """What was asked for. Folders are None where a set is not wanted; eps in units of pixels in [0, 1]."""

    data: str | None = None
    imagenet_c: str | None = None
    imagenet_a: str | None = None
    imagenet_r: str | None = None
    imagenet_o: str | None = None
    imagenet_v2: str | None = None
    imagenet_sketch: str | None = None
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
    if all(getattr(settings, name) is None for name in ("data", *PUBLISHED)):
        raise ValueError("nothing to evaluate: give --data, or one of " + ", ".join(f"--{name}" for name in PUBLISHED))
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
    if settings.imagenet_c is not None:
        cells += _published(settings, models)
    for name, which in SHIFTED.items():
        root = getattr(settings, name)
        if root is not None:
            cells += _shifted(name, root, which, settings, models)
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
        folder = str(cell.pictures.paths[0].parent.parent)
        found[cell.pictures.name] = {
            "folder": folder, "pictures": len(cell.pictures.paths), "sha256": digest.hexdigest(), "seen": seen,
            "labels": cell.pictures.labelled,
        }  # fmt: skip
    return found


def check_settings(settings: Settings) -> None:
    """Whatever needs no model. Raises ValueError, FileNotFoundError: names, numbers, folders that mean nothing."""
    check_all("--", settings._asdict(), RANGES)
    for name in ("data", *PUBLISHED):
        root = getattr(settings, name)
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"--{name}={root}: no such folder")
    if settings.ids is not None:
        if settings.limit is not None:
            raise ValueError(f"--ids={settings.ids}: it says which pictures, so leave out --limit={settings.limit}")
        read_ids(settings.ids)
    if settings.imagenet_o is not None and settings.data is None:
        raise ValueError(
            f"--imagenet_o={settings.imagenet_o}: needs --data, pictures of known classes to tell its own from"
        )
    for setting in ("corruptions", "severities", "attacks", "transfer", "eps"):
        values = getattr(settings, setting) or ()
        told = [f"{255 * value:g}/255" for value in values] if setting == "eps" else list(values)
        twice = [value for place, value in enumerate(told) if value in told[:place]]
        if twice:
            raise ValueError(f"--{setting}: {twice[0]} is there twice; name each once")
    if settings.severities is not None and not settings.severities:
        raise ValueError("--severities=[]: use some of 1 to 5, or leave it out for all")
    for name in settings.corruptions or ():
        check_corruption(name, "--corruptions")
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


def all_attacks(settings: Settings) -> tuple[str, ...]:
    """By their names, each once."""
    return tuple(dict.fromkeys((*settings.attacks, *settings.transfer)))


def _budget(settings: Settings, eps: float, attack: str | None = None) -> Budget:
    """With the options that the attack takes."""
    plain = Budget(eps, settings.norm, settings.steps, settings.queries, settings.seed)
    return plain if attack is None else plain._replace(**_options(attack, settings))


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


def _pictures(
    name: str, root: str, settings: Settings, models: Sequence[Model], classes: list[int] | None = None
) -> Pictures:
    folders = labels.list_folders(Path(root), f"--{name}")
    order = labels.read_order(Path(settings.data or root))  # one order for a model that has none of its own
    index = _index(list(folders), order, models, f"--{name}={root}")
    pictures = _labelled(name, folders, index, classes)
    if not pictures.paths:
        raise ValueError(f"--{name}={root}: none of its pictures is of the {len(classes)} classes that count")
    return pictures


def _labelled(name: str, folders: dict[str, list[Path]], index: labels.Index, classes: list[int] | None) -> Pictures:
    found = [(path, index.labels[folder]) for folder, paths in folders.items() for path in paths]
    if classes is not None:
        position = {label: place for place, label in enumerate(classes)}
        found = [(path, position[label]) for path, label in found if label in position]
    return Pictures(name, [path for path, _ in found], [label for _, label in found], classes, labelled=index.rule)


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
    """A part of a published set says so."""
    whole, count = PUBLISHED[pictures.name], len(pictures.paths)
    return pictures if count == whole else pictures._replace(name=f"{pictures.name} ({count:,} of {whole:,})")


def subset(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` numbers, ascending, the same ones for the same seed."""
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))


def _regenerated(clean: Pictures, settings: Settings) -> list[Cell]:
    return [
        Cell(clean._replace(name=f"{clean.name} (regenerated)"), "regenerated", name, str(severity),
             Change(name, severity, settings.seed))
        for name in (BENCHMARK if settings.corruptions is None else settings.corruptions)
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
        budget = _budget(settings, LARGE_EPS)._replace(norm="Linf", eot=settings.eot)
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


def _published(settings: Settings, models: Sequence[Model]) -> list[Cell]:
    names = None if settings.corruptions is None else list(settings.corruptions)
    levels = None if settings.severities is None else list(settings.severities)
    cells, first = [], None
    for (name, severity), folder in find_tree(settings.imagenet_c, names, levels).items():
        pictures = _pictures("imagenet_c", str(folder), settings, models)
        files = [f"{path.parent.name}/{path.name}" for path in pictures.paths]
        first = first or files
        if files != first:
            raise ValueError(
                f"--imagenet_c={settings.imagenet_c}: {name}/{severity} has other pictures than the first folder "
                f"({len(files)} and {len(first)} files); a part is missing, and unequal parts are not the benchmark's"
            )
        pictures = _named(_limited(pictures, settings, f"--imagenet_c={settings.imagenet_c}"))
        cells.append(Cell(pictures._replace(whole=True), "published", name, str(severity)))
    return cells


def _shifted(name: str, root: str, which: str | None, settings: Settings, models: Sequence[Model]) -> list[Cell]:
    if models[0].num_classes != 1000:
        raise ValueError(f"--{name}={root}: it is for models of ImageNet's 1,000 classes, not {models[0].num_classes}")
    _check_imagenet(models, f"--{name}={root}")
    classes = None if which is None else labels.subset(which)
    folders = labels.list_folders(Path(root), f"--{name}")
    index = labels.class_index(None, 1000, set(folders))
    index.check(list(folders), f"--{name}={root}")
    check_set(name, f"--{name}={root}", folders, (index.labels[folder] for folder in folders))
    pictures = _labelled(name, folders, index, classes)
    if which == "o":  # pictures of none of the classes: labels mean nothing, confidence does
        pictures = pictures._replace(labels=[0] * len(pictures.paths))
    cells = [Cell(_named(_limited(pictures, settings)), "published", "shifted")]
    if settings.data is not None and classes is not None:
        same = _pictures("data", settings.data, settings, models, classes)
        same = _limited(same, settings, f"--data={settings.data}", part=True)
        cells.append(Cell(same._replace(name=f"data on {name}'s classes"), "published", "clean"))
    return cells


def _check_imagenet(models: Sequence[Model], setting: str) -> None:
    """Raises ValueError: a model of 1,000 classes that are not ImageNet's, or in another order."""
    for model in models:
        index = labels.class_index(model.class_names, 1000, set(labels.wnids()), model.class_ids)
        if [index.labels.get(wnid) for wnid in labels.wnids()] != list(range(1000)):
            raise ValueError(
                f"{setting}: it is for models of ImageNet's 1,000 classes; those of --model={model.name} are others, "
                f"or in another order ({index.rule})"
            )
