"""Lists of pictures: only these are evaluated."""

from collections import Counter
from pathlib import Path

from .pictures import Pictures


def read_ids(file: str) -> list[str]:
    """A picture a line, as CLASS/NAME or NAME, such as RobustBench's helper_files/imagenet_test_image_ids.txt.

    Raises FileNotFoundError, ValueError: no such file, no text, no line, one line twice.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--ids={file}: no such file; give a text file with a picture a line, as CLASS/NAME")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--ids={file}: cannot be read as text ({error}); a picture a line, as CLASS/NAME") from error
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"--ids={file}: no line in it; name a picture a line, as CLASS/NAME, or leave it out for all")
    for line, count in Counter(found).items():
        if count > 1:
            raise ValueError(f"--ids={file}: {line} is there {count} times; name each picture once")
    return found


def choose(pictures: Pictures, file: str, setting: str, part: bool = False) -> Pictures:
    """Those of the list, in the set's order. part: `pictures` are of some classes only, so others may be named.

    Raises ValueError: a line that names none of the pictures or two, two lines that name one, none left.
    """
    places: dict[str, list[int]] = {}
    for place, path in enumerate(pictures.paths):
        for name in (path.name, f"{path.parent.name}/{path.name}"):
            places.setdefault(name, []).append(place)
    wanted, missing = dict[int, str](), []
    for line in read_ids(file):
        found = places.get(line, [])
        if not found:
            missing.append(line)
        elif len(found) > 1:
            first, second = (f"{pictures.paths[i].parent.name}/{line}" for i in found[:2])
            raise ValueError(
                f"--ids={file}: {line} is {first} as well as {second} of {setting}; write it as CLASS/NAME"
            )
        elif found[0] in wanted:
            raise ValueError(
                f"--ids={file}: {wanted[found[0]]} and {line} are one picture of {setting}; name each picture once"
            )
        else:
            wanted[found[0]] = line
    if missing and not part:
        others = f" and {len(missing) - 1:,} more are" if len(missing) > 1 else " is"
        raise ValueError(
            f"--ids={file}: {missing[0]}{others} not in {setting}, which has {len(pictures.paths):,} pictures such as "
            f"{pictures.paths[0].parent.name}/{pictures.paths[0].name}"
        )
    if not wanted:
        raise ValueError(f"--ids={file}: none of its pictures is of the {len(set(pictures.labels))} classes that count")
    return pictures.only(sorted(wanted))
