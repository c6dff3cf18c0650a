"""`data prepare imagenet-c`: ImageNet-C's corruptions of a folder of pictures, in the published layout."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files.staging import refuse_existing, resumed
from ..pictures import picture_size, read_picture, require_utf8
from ..progress import track
from ..ranges import THREADS, in_range
from ..resources import usable_cores
from .asked import BENCHMARK, EXTRA, RANGES, SEVERITIES
from .labels import list_folders
from .regenerated import CHECKSUMS, MARK, README, UNFINISHED, digest_of, read_mark

_ENDS = {".JPEG": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}  # of whole files
_MADE_BY = ("vmoe_momentum", "numpy", "scipy", "opencv-python", "pillow", "torchvision")  # what bytes may depend on


@in_range("--", severities=RANGES["severities"], seed=RANGES["seed"], num_workers=THREADS)
def prepare_imagenet_c(
    source: str,
    out: str,
    corruptions: list[str] | None = None,
    severities: list[int] | None = None,
    seed: int = 0,
    upright: bool = False,
    num_workers: int = -1,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> str:
    """ImageNet-C's corruptions of labelled pictures, made anew in the layout of the published ones.

    `source` holds val/<class>/* or <class>/*, ImageNet's validation pictures or any others; `out` gets
    <corruption>/<severity>/<class>/*, as any reader of ImageNet-C takes it, and says in regenerated.json and README.md
    that it is not the published set. Photographs become JPEGs of 224 x 224 and quality 85, pictures below 64 px PNGs of
    their size. `robustness --imagenet_c OUT` gives the numbers of `robustness --data SOURCE` with the same seed.
    Stopped or killed, the same command goes on in OUT.unfinished; the bytes are the same.

    Args:
        source: Folder with the pictures.
        out: Folder to create. Of ImageNet's 50,000 pictures it needs about 70 GB.
        corruptions: Names, of the 15 of the benchmark and the 4 beside it; null for the 15.
        severities: Some of 1 to 5; null for all.
        seed: Of the corruptions, 0 to 2147483647.
        upright: Turn pictures as their EXIF orientation says, which the published ones are without.
        num_workers: Processes, 1 to 1024; -1 for one per usable core.
        overwrite: Replace a set prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `out` exists or overlaps, a name means nothing, a picture does not decode, versions changed midway.
    """
    names, levels = _chosen(corruptions, severities)
    target, folder = Path(out), Path(source)
    for setting, path in (("source", source), ("out", out)):
        require_utf8(str(Path(path).absolute()), f"--{setting}")
    settings: dict[str, Any] = {
        "source": str(folder.resolve()), "corruptions": names, "severities": levels, "seed": seed, "upright": upright,
    }  # fmt: skip
    if exist_ok and (there := read_mark(target, f"--out={out}")) is not None:
        if there["settings"] != settings:
            raise ValueError(
                f"--out={out}: prepared with {there['settings']}, not with {settings}; choose another folder, or "
                "replace it with --overwrite and without --exist_ok"
            )
        return f"{out}: {there['pictures']} pictures, {there['conditions']} corruptions x severities of each"
    a, b = folder.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ValueError(f"--out={out}: it overlaps --source={source}; choose a folder outside it")
    refuse_existing(target, overwrite, MARK)
    _try(names)
    folders = list_folders(folder, "--source")
    targets = _targets(folders, folder)
    workers = usable_cores() if num_workers < 0 else num_workers
    begun = {"settings": settings, "pictures": _digest(targets), "versions": _versions()}
    with resumed(target, overwrite, MARK) as work:
        _begin(work, begun, target)
        jobs = _Jobs(work, targets, names, levels, seed, upright)
        with (work / CHECKSUMS).open("w", encoding="utf-8") as checksums:
            for made in track(jobs.run(workers), "corrupting pictures", len(targets)):
                checksums.writelines(f"{digest}  {name}\n" for name, digest in made)
            for name in _beside(work, folder):
                checksums.write(f"{hashlib.sha256((work / name).read_bytes()).hexdigest()}  {name}\n")
        told = {
            "format": 1, "settings": settings, "pictures": len(targets), "classes": len(folders),
            "conditions": len(names) * len(levels), "made_of": begun["pictures"], "versions": begun["versions"],
            "checksums": hashlib.sha256((work / CHECKSUMS).read_bytes()).hexdigest(),
        }  # fmt: skip
        (work / MARK).write_text(json.dumps({**told, "sha256": digest_of(told)}, indent=1) + "\n", encoding="utf-8")
        (work / UNFINISHED).unlink()
    return (
        f"{out}: {len(targets)} pictures, {told['conditions']} corruptions x severities of each\n"
        f"use it with robustness --imagenet_c {out}; it is not the published ImageNet-C, so it has no mCE"
    )


def _chosen(corruptions: list[str] | None, severities: list[int] | None) -> tuple[list[str], list[int]]:
    """Raises ValueError: a name of none, or one twice."""
    known = (*BENCHMARK, *EXTRA)
    names = list(BENCHMARK) if corruptions is None else corruptions
    levels = list(SEVERITIES) if severities is None else severities
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"--corruptions={strange[0]}: not one of {', '.join(known)}")
    for setting, values in (("corruptions", names), ("severities", levels)):
        if not values or len(set(values)) < len(values):
            told = f"[{','.join(map(str, values))}]"
            raise ValueError(f"--{setting}={told}: name some, each once, or leave it out for all")
    return names, levels


def _try(names: list[str]) -> None:
    """Each corruption once: what is not installed shows before the work. Raises ValueError."""
    import numpy as np

    from .corruptions import corrupt_to_file

    for name in names:
        corrupt_to_file(np.zeros((32, 32, 3), np.uint8), name, 1, 0, "")


def _targets(folders: dict[str, list[Path]], source: Path) -> list[tuple[Path, str]]:
    """Every picture, and what it is called in a folder of a severity. All are looked at, but not decoded.

    Order stays: --limit takes the same pictures of both. Raises ValueError: no picture, or two of one name.
    """
    from .corruptions import SMALL

    found: list[tuple[Path, str]] = []
    root = source / "val" if (source / "val").is_dir() else source
    listed = [(path, folder) for folder, paths in folders.items() for path in paths]
    for path, folder in track(listed, "looking at pictures"):
        require_utf8(path.name, path.parent)
        suffix = ".png" if min(picture_size(path)) < SMALL else ".JPEG"
        within = path.relative_to(root / folder).with_suffix(suffix)
        found.append((path, f"{folder}/{within.as_posix()}"))
    parts = [tuple(name.split("/")) for _, name in found]
    if parts != sorted(set(parts)):
        found = [(path, f"{name.rpartition('.')[0]}{path.suffix}{name[name.rindex('.') :]}") for path, name in found]
    names = [name for _, name in found]
    broken = next((name for name in names if set(name) & set("\\\r\n")), None)
    if broken:
        raise ValueError(f"--source={source}: {broken!r} has a line end or backslash in its name; rename it")
    twice = next((name for name, other in zip(sorted(names), sorted(names)[1:], strict=False) if name == other), None)
    if twice:
        raise ValueError(f"--source={source}: two pictures would both be {twice}; rename one")
    return found


def _digest(targets: Sequence[tuple[Path, str]]) -> str:
    """Of names and sizes: another one is another set of pictures."""
    digest = hashlib.sha256()
    for path, name in targets:
        digest.update(f"{name}/{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    from .versions import versions

    return {name: version for name, version in versions().items() if name in _MADE_BY}


def _begin(work: Path, begun: dict[str, Any], target: Path) -> None:
    """Raises ValueError: what lies there was begun otherwise."""
    path = work / UNFINISHED
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if there != begun:
            keys = [key for key in begun if not isinstance(there, dict) or there.get(key) != begun[key]]
            raise ValueError(
                f"--out={target}: {work} was begun with other {', '.join(keys)}; give the same ones again, or remove "
                f"{work.name} to begin anew"
            )
        return
    if [entry for entry in os.listdir(work) if not entry.startswith(".")]:
        raise ValueError(f"--out={target}: {work} holds something else (no {UNFINISHED}); move it away")
    draft = work / f".{UNFINISHED}"
    draft.write_text(json.dumps(begun, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _beside(work: Path, source: Path) -> list[str]:
    """Writes the page for people and the order of classes, where the source says one; gives their names."""
    (work / "README.md").write_text(README, encoding="utf-8")
    if not (source / "classes.json").is_file():
        return ["README.md"]
    shutil.copyfile(source / "classes.json", work / "classes.json")
    return ["README.md", "classes.json"]


class _Jobs:
    """A picture each: all of its files. For torch's DataLoader, whose workers are watched and end with us."""

    def __init__(
        self,
        work: Path,
        targets: Sequence[tuple[Path, str]],
        names: Sequence[str],
        levels: Sequence[int],
        seed: int,
        upright: bool,
    ) -> None:
        self.work, self.targets, self.seed, self.upright = work, targets, seed, upright
        self.conditions = [(name, level) for name in names for level in levels]

    def run(self, workers: int) -> Iterator[list[tuple[str, str]]]:
        """(name, sha256) of every file, picture by picture in order. Raises ValueError: one does not decode."""
        from torch.utils.data import DataLoader

        processes = 0 if workers == 1 else min(workers, len(self.targets))
        # no Dataset, whose class would import torch here; what has a length and places does
        for made in DataLoader(self, None, num_workers=processes):  # type: ignore[arg-type]
            if isinstance(made, str):
                raise ValueError(made)
            yield made

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> list[tuple[str, str]] | str:
        """A message where something is wrong: an exception out of a worker would come with the worker's stack."""
        try:
            return self._make(*self.targets[number])
        except OSError as error:
            told = f"{error.filename or self.work}: cannot be written ({error.strerror}); what is done is kept: make "
            return told + "room, and run the same command again"
        except ValueError as error:
            return str(error)

    def _make(self, path: Path, name: str) -> list[tuple[str, str]]:
        import numpy as np

        from .corruptions import corrupt_to_file
        from .pictures import for_corruption

        base, made = None, []
        for corruption, level in self.conditions:
            within = f"{corruption}/{level}/{name}"
            place = self.work / within
            content = _whole(place)
            if content is None:
                base = np.asarray(for_corruption(read_picture(path, self.upright))) if base is None else base
                content = corrupt_to_file(base, corruption, level, self.seed, f"{path.parent.name}/{path.name}")
                _write(place, content)
            made.append((within, hashlib.sha256(content).hexdigest()))
        return made


def _whole(place: Path) -> bytes | None:
    """A file of an earlier attempt. None where there is none, or a crash of the machine left a part of it."""
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        return None
    return content if content.endswith(_ENDS[place.suffix]) else None


def _write(place: Path, content: bytes) -> None:
    """Under its name only when whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.new")
    draft.write_bytes(content)
    draft.replace(place)
