"""ObjectNet's own mapping of its folders to classes of ImageNet-1k (Barbu et al., NeurIPS 2019).

Four files that unpack beside the pictures, ROOT/mappings: folder -> label, label -> ImageNet's names divided by "; ",
the names by number of ILSVRC2012 (one a line, from 0), and class index -> that number.
"""

import json
from pathlib import Path
from typing import Any

FOLDERS, LABELS = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"
NUMBERS, NAMES = "pytorch_to_imagenet_2012_id.json", "imagenet_to_label_2012_v2"


def read_classes(root: Path, setting: str) -> dict[str, list[int]]:
    """Folder -> its class indices, ascending; none for folders that ImageNet-1k has no class for.

    Raises FileNotFoundError, ValueError: a file is missing, or not the one that was published.
    """
    place = root / "mappings"
    for name in (FOLDERS, LABELS, NUMBERS, NAMES):
        if not (place / name).is_file():
            raise FileNotFoundError(
                f"{setting}: no mappings/{name} in it, which says what its folders are; give the folder that ObjectNet "
                "unpacks to, with images/ and mappings/"
            )
    labels, words, numbers = (_read(place / name) for name in (FOLDERS, LABELS, NUMBERS))
    try:
        lines = (place / NAMES).read_text(encoding="utf-8").splitlines()
        index = {lines[number].strip(): int(key) for key, number in numbers.items()}
        classes = {label: sorted(index[name] for name in told.split("; ")) for label, told in words.items()}
        found = {folder: classes.get(label, []) for folder, label in labels.items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{setting}: {place} does not fit together ({error!r}); unpack ObjectNet again") from error
    every = [index for classes in found.values() for index in classes]
    if len(set(every)) < len(every) or not every or not set(every) <= set(range(1000)):
        raise ValueError(f"{setting}: {place} names a class of ImageNet-1k twice, or none; unpack ObjectNet again")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); unpack ObjectNet again") from error
    return found
