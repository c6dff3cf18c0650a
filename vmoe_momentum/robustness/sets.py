"""Which published set a folder holds, by its class folders and file names: a wrong path gives a plausible score."""

import re
from collections.abc import Iterable
from pathlib import Path

from .labels import subset, wnids

TITLES = {
    "imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R", "imagenet_o": "ImageNet-O", "imagenet_v2": "ImageNetV2",
    "imagenet_sketch": "ImageNet-Sketch", "val": "ImageNet's validation pictures",
}  # fmt: skip
_RENDITIONS = (
    "art|cartoon|deviantart|embroidery|graffiti|graphic|misc|origami|painting|sculpture|sketch|sticker|tattoo|toy|"
    "videogame"
)
# names of whole sets; parts of -R may hold sketches only, so those say nothing of -Sketch where there are few folders
_FILES = {
    "val": r"ILSVRC2012_val_\d{8}(_n\d{8})?", "imagenet_sketch": r"sketch_\d+", "imagenet_r": rf"({_RENDITIONS})_\d+",
}  # fmt: skip


def recognise(folders: dict[str, list[Path]]) -> str | None:
    """A key of TITLES; None where nothing tells. folders: name of the class folder -> its pictures."""
    names, stems = set(folders), [path.stem for paths in folders.values() for path in paths]
    for which in "aro":
        if names == _folders(which):
            return f"imagenet_{which}"
    for which, pattern in _FILES.items():
        if all(re.fullmatch(pattern, stem) for stem in stems) and (which != "imagenet_sketch" or len(names) > 200):
            return which
    if all(name.isdecimal() for name in names):
        return "imagenet_v2"
    return None


def check_set(name: str, setting: str, folders: dict[str, list[Path]], found: Iterable[int]) -> None:
    """Raises ValueError: the folder given for the set `name` (of TITLES) holds another one.

    found: classes of its folders. Numbered folders may be any set that someone sorted anew, but for ImageNet-Sketch's
    and the 200 classes of -A, -R and -O that is told by the classes and the names.
    """
    looks = recognise(folders)
    told = f"; it looks like {TITLES[looks]}" if looks is not None and looks != name else ""
    which = name.removeprefix("imagenet_")
    if which in ("a", "r", "o"):
        own = set(subset(which))
        others = sorted(set(found) - own)
        if others:
            raise ValueError(
                f"{setting}: {len(others)} of its {len(folders)} class folders (such as {wnids()[others[0]]}) are none "
                f"of the 200 of {TITLES[name]}{told}; give the folder of {TITLES[name]}, or these pictures as --data"
            )
    if told and not (looks == "imagenet_v2" and which in ("a", "r", "o")):
        raise ValueError(f"{setting}: it is not {TITLES[name]}{told}; give its folder as the option of that name")


def _folders(which: str) -> set[str]:
    return {wnids()[place] for place in subset(which)}
