"""Which class a folder of pictures is: wnids from the lists that timm ships, never the order of folders."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ..pictures import class_folders, find_pictures, mention

# First 16 hex digits of the SHA-256 of timm's lists: another list would give other numbers without any error.
SHA = {
    "imagenet_synsets.txt": "70002b0ff5de60a3",
    "imagenet_a_synsets.txt": "9826a24166e74ce6",
    "imagenet_r_synsets.txt": "a6a0729f7a992302",
    "imagenet_real_labels.json": "d83e9bff374c631a",
}
REAL = "imagenet_real_labels.json"


@cache
def wnids(name: str = "imagenet_synsets.txt") -> tuple[str, ...]:
    """A list of timm's."""
    return tuple(_info(name).decode().split())


@cache
def _index() -> dict[str, int]:
    return {wnid: place for place, wnid in enumerate(wnids())}


def subset(which: str) -> list[int]:
    """The 200 class indices of ImageNet-A, -R or -O, ascending."""
    if which == "o":
        content = (Path(__file__).parent / "imagenet_o_wnids.txt").read_text()
        return sorted(_index()[wnid] for wnid in content.split())
    return sorted(_index()[wnid] for wnid in wnids(f"imagenet_{which}_synsets.txt"))


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """ReaL's label sets of the 50,000 validation images, in the order of their numbers; empty where none fits."""
    return tuple(tuple(labels) for labels in json.loads(_info(REAL)))


def _info(name: str) -> bytes:
    """A list of timm's. Raises ValueError: it is not the known one."""
    content = (files("timm.data") / "_info" / name).read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(SHA[name]):
        raise ValueError(f"timm's {name} is another list than the one that the classes are known by; use timm>=1.0.31")
    return content


class Listing(NamedTuple):
    """Pictures and their labels."""

    paths: list[Path]
    labels: list[int]


def list_pictures(
    root: Path, class_names: list[str] | None, num_classes: int, setting: str, class_ids: list[str] | None = None
) -> Listing:
    """One folder a class, labelled as `class_index` says. Sorted by class and file name.

    Of a root with splits the validation split, ROOT/val. Raises FileNotFoundError, ValueError: nothing there, or a
    folder that is none of the classes.
    """
    folders = list_folders(root, setting)
    known = class_index(class_names, num_classes, set(folders), class_ids, read_order(root))
    known.check(list(folders), f"{setting}={root}")
    paths = [path for found in folders.values() for path in found]
    return Listing(paths, [known.labels[name] for name, found in folders.items() for _ in found])


def list_folders(root: Path, setting: str) -> dict[str, list[Path]]:
    """Folder name -> its pictures, both sorted; of ROOT/val where there is one.

    What is no picture is left out and said. Raises FileNotFoundError, ValueError: nothing there.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{setting}={root}: no such folder")
    place = root / "val" if (root / "val").is_dir() else root
    folders, left_out = class_folders(place)
    if not folders:
        raise ValueError(f"{setting}={root}: no class folders in it")
    listed = {}
    for folder in folders:
        listed[folder.name], others = find_pictures(folder)
        left_out += others
    mention(f"{setting}={root}", left_out)
    if not any(listed.values()):
        raise ValueError(f"{setting}={root}: no pictures in its class folders")
    return listed


class Order(NamedTuple):
    """What classes.json of prepared data says: folders and names in the order of labels."""

    ids: list[str]
    names: list[str]


def read_order(root: Path) -> Order | None:
    """None where there is no classes.json. Raises ValueError: it is not data prepare's."""
    path = root / "classes.json"
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["classes"]
        return Order([str(entry["id"]) for entry in entries], [str(entry["name"]) for entry in entries])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not written by data prepare ({error}); mend it, or take it away") from error


class Index(NamedTuple):
    """Which label a folder's name is, and by which rule."""

    labels: dict[str, int]
    rule: str

    def check(self, folders: list[str], setting: str) -> None:
        """Raises ValueError: a folder is no class."""
        for name in folders:
            if name not in self.labels:
                raise ValueError(
                    f"{setting}: folder {name} is no class of this model ({self.rule}); use the folder names it was "
                    "trained on, its class names, wnids of ImageNet-1k, or numbers from 0"
                )


def class_index(
    class_names: list[str] | None,
    num_classes: int,
    folders: set[str],
    class_ids: list[str] | None = None,
    order: Order | None = None,
) -> Index:
    """Folder name -> label by the first rule that knows all the folders; it asks nothing of other models.

    1. class_ids: the folder names that the model was trained on, as its checkpoint or its attribute `class_ids` says;
    2. class_names: its display names, those that only one class has;
    3. for a model of 1,000 classes that says no ids: wnids of ImageNet-1k;
    4. for another model that says neither: the data's own classes.json, where it has as many classes;
    5. numbers from 0, unless the model's own ids or names are numbers: then they are names like others;
    6. for a model that says neither, and not of 1,000 classes: all its classes in the order of folders.

    order: of the data. A checkpoint that kept names only takes the ids of data whose names are the same.
    """
    if class_ids is None and class_names is not None and order is not None and order.names == class_names:
        class_ids = order.ids
    rules = list(_rules(class_names, num_classes, folders, class_ids, order))
    nothing = Index({}, "it says none")
    return next((index for index in rules if folders <= set(index.labels)), rules[0] if rules else nothing)


def _rules(
    names: list[str] | None, num_classes: int, folders: set[str], ids: list[str] | None, order: Order | None
) -> Iterator[Index]:
    """Those that apply, best first."""
    numbered = _numbers(names if ids is None else ids)
    wordless = ids is None and names is None and num_classes != 1000
    if ids is not None:
        yield Index(_places(ids), "by the folder names it was trained on")
    if names is not None:
        counted = Counter(names)
        yield Index({name: k for name, k in _places(names).items() if counted[name] == 1}, "by its class names")
    if num_classes == 1000 and ids is None and not numbered:
        yield Index(dict(_index()), "by wnids of ImageNet-1k")
    if wordless and order is not None and len(order.ids) == num_classes:
        yield Index(_places(order.ids), "by the data's classes.json")
    if _numbers(folders) and not numbered:  # a class is one folder: 7, and not 0007 beside it
        numbers = {name: int(name) for name in folders if name == str(int(name))}
        yield Index({name: k for name, k in numbers.items() if k < num_classes}, "by numbers")
    if wordless and len(folders) == num_classes:
        yield Index(_places(sorted(folders)), "by the order of folders")


def _places(names: Iterable[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _numbers(names: Collection[str] | None) -> bool:
    return all(name.isdecimal() for name in names) if names else False
