"""The published sets of pictures, an entry each: what its folder looks like, what counts, and how it is told from
others, as a wrong path gives a plausible score.

To add one: an entry of SETS, and its row in the guide (README.md beside this file).
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .asked import BENCHMARK, EXTRA
from .labels import subset, wnids
from .objectnet import read_classes

_WNIDS = "one folder a wnid"
_TREE = "<corruption>/<severity>/<wnid>/*"
_RENDITIONS = (
    "art|cartoon|deviantart|embroidery|graffiti|graphic|misc|origami|painting|sculpture|sketch|sticker|tattoo|toy|"
    "videogame"
)
_VAL = r"ILSVRC2012_val_\d{8}(_n\d{8})?"


class PublishedSet(NamedTuple):
    """What is known of one.

    corruptions: of a set of such; a mean is over these, each at five severities. extra: what lies beside them and
    never counts. groups: folders around corruptions, as archives unpack. mapping: ROOT -> folder -> its classes of
    ImageNet-1k (none for most), for folders that are no wnids; a picture is right where the likeliest of all classes
    named is one of its folder's.
    """

    title: str
    layout: str
    # pictures, of a corruption and severity in a set of such; None where no source states it
    count: int | None  # type: ignore[assignment]  # hides the tuple's method
    corruptions: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    classes: str = ""  # a, r, o: these 200 count alone (labels.subset)
    files: str = ""  # regular expression of its names, where they tell
    looks_like: str = ""  # another one (or val), whose names it has
    whole: bool = False  # pictures have their final size: never cropped
    border: int = 0  # pixels around each that are cut off
    place: str = ""  # folder below ROOT with the class folders
    mapping: Callable[[Path, str], dict[str, list[int]]] | None = None


SETS = {  # the name is the option's
    "imagenet_c": PublishedSet(
        "ImageNet-C", _TREE, 50_000, BENCHMARK, EXTRA, ("noise", "blur", "weather", "digital", "extra"), whole=True
    ),
    "imagenet_c_bar": PublishedSet(
        "ImageNet-C-bar", _TREE, 50_000, (
            "blue_noise_sample", "brownish_noise", "caustic_refraction", "checkerboard_cutout", "cocentric_sine_waves",
            "inverse_sparkles", "perlin_noise", "plasma_noise", "single_frequency_greyscale", "sparkles",
        ), whole=True,
    ),
    "imagenet_3dcc": PublishedSet(
        "ImageNet-3DCC", _TREE, None, (
            "near_focus", "far_focus", "fog_3d", "flash", "color_quant", "low_light", "xy_motion_blur", "z_motion_blur",
            "iso_noise", "bit_error", "h265_abr", "h265_crf",
        ), whole=True,
    ),
    "imagenet_a": PublishedSet("ImageNet-A", _WNIDS, 7_500, classes="a"),
    # parts of -R may hold sketches only, so their names say nothing of -Sketch where there are few folders
    "imagenet_r": PublishedSet("ImageNet-R", _WNIDS, 30_000, classes="r", files=rf"({_RENDITIONS})_\d+"),
    "imagenet_o": PublishedSet("ImageNet-O", _WNIDS, 2_000, classes="o"),
    "imagenet_v2": PublishedSet("ImageNetV2", "one folder a class, 0 to 999", 10_000),
    "imagenet_sketch": PublishedSet("ImageNet-Sketch", _WNIDS, 50_889, files=r"sketch_\d+"),
    "imagenet_stylized": PublishedSet(
        "Stylized ImageNet", f"{_WNIDS}, also below val/", 50_000, looks_like="val", whole=True
    ),
    "objectnet": PublishedSet(
        "ObjectNet", "images/<folder>/* and mappings/*.json as they unpack", None, border=2, place="images",
        mapping=read_classes,
    ),
}  # fmt: skip
_OTHERS = {"val": "ImageNet's validation pictures, or made of these"}
_LISTED = 200  # folders of a set of few classes


def set_of(dataset: str) -> PublishedSet | None:
    """By a set's name in rows, which says more in brackets. None for other pictures."""
    return SETS.get(dataset.partition(" (")[0])


def corruptions_of(dataset: str) -> tuple[str, ...]:
    """The corruptions that a mean over this set of pictures is over; of regenerated ones ImageNet-C's."""
    found = set_of(dataset)
    return BENCHMARK if found is None else found.corruptions


def named_corruptions() -> tuple[str, ...]:
    """All that --corruptions may name, the benchmark's first."""
    return tuple(name for each in SETS.values() for name in (*each.corruptions, *each.extra))


def recognise(folders: dict[str, list[Path]]) -> str | None:
    """A name of SETS, or val; None where nothing tells. folders: name of the class folder -> its pictures."""
    names, stems = set(folders), [path.stem for paths in folders.values() for path in paths]
    for name, each in SETS.items():
        if each.classes and names == {wnids()[place] for place in subset(each.classes)}:
            return name
    patterns = {"val": _VAL, **{name: each.files for name, each in SETS.items() if each.files}}
    for name, pattern in patterns.items():
        few = name in SETS and bool(SETS[name].classes)
        fits = all(re.fullmatch(pattern, stem) for stem in stems)
        if fits and (name == "val" or few == (len(names) <= _LISTED)):
            return name
    if all(name.isdecimal() for name in names):
        return "imagenet_v2"
    return None


def check_set(name: str, setting: str, folders: dict[str, list[Path]], found: Iterable[int]) -> None:
    """Raises ValueError: the folder given for the set `name` (of SETS) holds another one.

    found: classes of its folders. Numbered folders may be any set that someone sorted anew, but for ImageNet-Sketch's
    and the 200 classes of -A, -R and -O that is told by the classes and the names.
    """
    own, looks = SETS[name], recognise(folders)
    told = ""
    if looks is not None and looks not in (name, own.looks_like):
        told = f"; it looks like {SETS[looks].title if looks in SETS else _OTHERS[looks]}"
    if own.classes:
        counted = set(subset(own.classes))
        others = sorted(set(found) - counted)
        if others:
            raise ValueError(
                f"{setting}: {len(others)} of its {len(folders)} class folders (such as {wnids()[others[0]]}) are none "
                f"of the {len(counted)} of {own.title}{told}; give the folder of {own.title}, or these pictures as "
                "--data"
            )
    if told and not (looks == "imagenet_v2" and own.classes):
        raise ValueError(f"{setting}: it is not {own.title}{told}; give its folder as the option of that name")
