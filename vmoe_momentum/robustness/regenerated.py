"""What `data prepare imagenet-c` leaves beside its pictures, so that nobody takes them for the published ones.

OUT/regenerated.json: settings, versions, counts, sha256 of the checksums and of itself, written last.
OUT/checksums.sha256: of every other file, as `sha256sum -c` reads it.
OUT.unfinished/unfinished.json: while the tree grows.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..pictures import is_picture, read_picture
from ..progress import track

MARK, UNFINISHED, CHECKSUMS = "regenerated.json", "unfinished.json", "checksums.sha256"
README = """# Corruptions made anew, not the published ImageNet-C

`<corruption>/<severity>/<class>/*`, the layout of ImageNet-C, made by `vmoe-momentum data prepare imagenet-c` with the
parameters and quirks of ImageNet-C (hendrycks/robustness), maybe from other pictures than ImageNet's. The published set
was made without a seed, so no copy is equal to it: do not put numbers on these pictures beside published ones, and
report no mCE of them, which is relative to AlexNet's errors on the published ones. What they were made of, with which
seed and by which versions of which packages: `regenerated.json`. `sha256sum -c checksums.sha256` checks the files.
"""


def read_mark(root: Path, setting: str) -> dict[str, Any] | None:
    """What regenerated.json says of a tree; None for one that has none, such as the published one.

    Raises ValueError: the tree is not finished, or the file is not what was written.
    """
    if (root / UNFINISHED).exists():
        raise ValueError(f"{setting}: not finished; run its `data prepare imagenet-c` again, which goes on from there")
    path = root / MARK
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("sha256") != digest_of(found):
            raise ValueError("edited")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not as data prepare wrote it ({error}); prepare it again") from error


def holds(root: Path) -> bool:
    """Whether the folder is one of these, finished or not."""
    return (root / MARK).is_file() or (root / UNFINISHED).is_file()


def digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_regenerated(root: str, sample: int | None, num_workers: int) -> str:
    """Every file against its checksum, and `sample` pictures (None: all) decoded; gives a line that says so.

    Raises ValueError: a file is missing, changed, or was not prepared.
    """
    folder = Path(root)
    told = read_mark(folder, f"root={root}")
    assert told is not None  # `holds` said so
    listed = (folder / CHECKSUMS).read_bytes() if (folder / CHECKSUMS).is_file() else b""
    if hashlib.sha256(listed).hexdigest() != told["checksums"]:
        raise ValueError(f"{folder / CHECKSUMS}: missing, or changed since it was prepared; prepare it again")
    lines = [line.split("  ", 1) for line in listed.decode().split("\n") if line]
    known = {name: digest for digest, name in lines}
    _refuse_others(folder, known)
    pictures = [name for name in known if is_picture(Path(name).name)]
    count = len(pictures) if sample is None else min(sample, len(pictures))
    chosen = {pictures[i * len(pictures) // count] for i in range(count)}

    def look(name: str) -> str | None:
        path = folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        if hashlib.sha256(content).hexdigest() != known[name]:
            return f"{path}: its contents differ from {CHECKSUMS}"
        if name in chosen:
            read_picture(path, content=content)
        return None

    for wrong in track(_in_threads(look, list(known), num_workers), "reading files", len(known)):
        if wrong:
            raise ValueError(f"{wrong}; prepare it again")
    return (
        f"{root}: sound (regenerated corruptions of {told['pictures']} pictures, {told['conditions']} of each, "
        f"{count} decoded, checksums of {len(known)} files)"
    )


def _in_threads(look: Any, names: list[str], num_workers: int) -> Iterator[str | None]:
    window = 64 * num_workers  # a few at a time, so that the first error ends it
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(names), window):
            yield from pool.map(look, names[start : start + window])


def _refuse_others(folder: Path, known: dict[str, str]) -> None:
    """Raises ValueError: a picture that was not prepared; it would be counted."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if is_picture(path.name) and path.is_file() and name not in known:
            raise ValueError(f"{path}: not prepared with the others; take it away, or prepare it again")
